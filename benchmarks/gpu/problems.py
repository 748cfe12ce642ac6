"""The products that training runs, found by training: what is worth tuning."""

from contextlib import contextmanager
from unittest import mock

import torch

from benchmarks.workloads import Workload
from genfast.geometry import ConvGeometry
from genfast.launch import conv, first_use, tiles
from genfast.launch.epilogue import PLAIN, Epilogue
from genfast.training import GANStep, VAEStep


def of_training(model, batch_size, device, **sizes):
    """The `Problem`s of one training step, each once, in the order they are met."""
    workload = Workload.of(model, device, batch_size)
    if sizes:
        workload = Workload(model, batch_size, device=device, **sizes)
    networks = workload.networks()
    if workload.is_vae:
        step = VAEStep(*networks, capture=False)
    else:
        step = GANStep(*networks, latent_shape=networks[0].latent_shape, capture=False)
    with recorded() as problems:
        step(workload.images())
    return list(problems)


@contextmanager
def recorded():
    """Within, note each `Problem` that a configuration is chosen for: the keys of a dict."""
    problems = {}
    choose = tiles.gemm_config

    def choosing(architecture, problem):
        problems[problem] = None
        return choose(architecture, problem)

    with mock.patch.object(tiles, "gemm_config", choosing), first_use.switched_off():
        yield problems


@contextmanager
def forced(config):
    """Within, every product runs by this configuration."""
    with mock.patch.object(tiles, "gemm_config", lambda *_: config), first_use.switched_off():
        yield


@contextmanager
def rounding(problem):
    """Within, products of float32 round as the problem's do, the library's too."""
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [s.fp32_precision for s in settings]
    try:
        for s in settings if problem.precision != "half" else ():
            s.fp32_precision = problem.precision
        yield
    finally:
        for s, value in zip(settings, before, strict=True):
            s.fp32_precision = value


def dtype_of(problem):
    """A dtype of the problem's operands."""
    return torch.bfloat16 if problem.precision == "half" else torch.float32


def call(problem, device):
    """A function that runs the problem on random tensors of its own, by the chosen configuration.

    It returns the product, and statistics where the problem has them. To be called within
    `rounding`.
    """
    dtype = dtype_of(problem)
    geometry = _geometry(problem)
    big = _image(problem.images, problem.c_big, problem.big, dtype, device)
    small = _image(problem.images, problem.c_small, problem.small, dtype, device)
    if problem.operation == "wgrad":
        return lambda: conv.wgrad(big, small, geometry)
    taps = geometry.taps
    weight = torch.randn(
        problem.c_small, problem.c_big, *problem.kernel_size, dtype=dtype, device=device
    )
    # So that the result is about 1, whatever the length of the sums.
    weight = weight.mul_((taps * problem.c_big) ** -0.5).to(memory_format=torch.channels_last)
    epilogue = Epilogue(groups=1) if problem.statistics else PLAIN
    if problem.operation == "fprop":
        return lambda: conv.fprop(big, weight, geometry, epilogue)
    return lambda: conv.dgrad(small, weight, geometry, epilogue)


def bytes_and_flops(problem):
    """The fewest bytes that must move, and the operations that must be done."""
    taps = problem.kernel_size[0] * problem.kernel_size[1]
    big = problem.images * problem.c_big * problem.big[0] * problem.big[1]
    small = problem.images * problem.c_small * problem.small[0] * problem.small[1]
    weight = problem.c_small * problem.c_big * taps
    return (big + small + weight) * problem.itemsize, 2 * small * problem.c_big * taps


def _geometry(problem):
    paddings = []
    sizes = zip(problem.big, problem.small, problem.kernel_size, problem.stride, strict=True)
    for big, small, k, s in sizes:
        # The least padding that makes `small` of `big`; more of it would make more.
        paddings.append(max(0, -(-((small - 1) * s + k - big) // 2)))
    return ConvGeometry(
        problem.big, problem.small, problem.kernel_size, problem.stride, tuple(paddings)
    )


def _image(n, channels, size, dtype, device):
    x = torch.randn(n, *size, channels, device=device, dtype=dtype)
    return x.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
