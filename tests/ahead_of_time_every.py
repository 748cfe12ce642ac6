"""Every kernel, and every configuration that is shipped or was timed: cases of ahead_of_time.py."""

import contextlib
import dataclasses
from functools import partial

import torch

from benchmarks.gpu.problems import call, forced
from benchmarks.model.recording import rounding
from genfast.geometry import ConvGeometry
from genfast.launch import adam, conv, losses, norm, sampling, tiles
from genfast.launch.epilogue import Epilogue

OPERATIONS = ("fprop", "dgrad", "wgrad")
ACTIVATIONS = ("relu", "leaky_relu", "tanh", "sigmoid", "identity")


def cases(architecture, few):
    """(name, what to call).

    Args:
        architecture: a key of `benchmarks.model.driver.TARGETS`.
        few: whether each kernel, and each shipped tile, once in bfloat16 is enough, and the widest
            tile for each precision of float32.
    """
    for precision, config, case in _cases(architecture, few):
        yield precision, partial(_run, precision, config, case)


def _run(precision, config, case):
    with rounding(precision), forced(config) if config else contextlib.nullcontext():
        case()


def _cases(architecture, few):
    """(precision, configuration or None for the one that is chosen, what to call)."""
    k4s2 = ConvGeometry((16, 16), (8, 8), (4, 4), (2, 2), (1, 1))
    whole = ConvGeometry((4, 4), (1, 1), (4, 4), (1, 1), (0, 0))
    k3s2_odd = ConvGeometry((15, 15), (8, 8), (3, 3), (2, 2), (1, 1))
    half, *_, ieee = tiles.precisions(architecture)
    for precision in tiles.precisions(architecture):
        dtype = torch.bfloat16 if precision == half else torch.float32
        aligned = tiles.shipped(architecture, precision)
        scattered = tiles.shipped(architecture, precision, scattered=True)
        for shipped, geometry, channels in (
            (aligned, k4s2, (256, 128)),
            (scattered, k3s2_odd, (40, 24)),
        ):
            for tile, config in enumerate(shipped):
                if few and precision != half and (tile or shipped is scattered):
                    continue
                operations = OPERATIONS
                if few and precision != "ieee" and (precision, tile) != (half, 0):
                    # Each tile once, in turns. Without tensor cores registers are scarce.
                    operations = (OPERATIONS[(tile + 1) % 3],)
                arguments = geometry, dtype, *channels
                yield precision, config, partial(_convolutions, *arguments, operations=operations)
        # What runs where geometry or alignment forbid descriptors.
        if aligned[0].descriptors and precision != "tf32" and not few:
            pointers = dataclasses.replace(aligned[0], descriptors=False)
            yield precision, pointers, partial(_convolutions, k4s2, dtype, 256, 128)
    if few:
        yield half, None, partial(_around, torch.bfloat16, ("leaky_relu",), few=True)
        return
    yield half, None, partial(_around, torch.bfloat16, ACTIVATIONS)
    yield ieee, tiles.shipped(architecture, ieee)[0], partial(_around, torch.float32, ("relu",))
    # The ends of the networks. Triton makes an argument of 1 a constant, so sizes of 1 are kernels
    # of their own.
    yield half, None, partial(_convolutions, k4s2, torch.bfloat16, 128, 3)
    yield half, None, partial(_convolutions, whole, torch.bfloat16, 1, 64)
    yield half, None, partial(_convolutions, whole, torch.bfloat16, 112, 64, batch=1)
    yield ieee, None, partial(_convolutions, k4s2, torch.float32, 128, 3)
    # float16 differs from bfloat16 in the name of an instruction.
    yield half, None, partial(_convolutions, k4s2, torch.float16, 256, 128)
    yield half, None, partial(_convolutions, k3s2_odd, torch.float16, 40, 24)
    yield from _tuned_cases(architecture)


def _tuned_cases(architecture):
    """One product for each operation and tile in the table of what was timed."""
    found = {}
    for where, problem, config in tiles.read_tuned():
        if where == architecture and not config.library:
            key = problem.operation, problem.precision, problem.scattered, config
            found.setdefault(key, problem)
    for (_, precision, _, config), problem in found.items():
        small = dataclasses.replace(problem, images=min(problem.images, 64))
        yield precision, config, lambda p=small: call(p, "cpu")()


def _image(channels, size, dtype, batch=64):
    return torch.empty(batch, channels, *size, dtype=dtype).to(memory_format=torch.channels_last)


def _convolutions(geometry, dtype, c_small, c_big, batch=64, operations=OPERATIONS):
    big = _image(c_big, geometry.big, dtype, batch)
    small = _image(c_small, geometry.small, dtype, batch)
    weight = torch.empty(c_small, c_big, *geometry.kernel_size, dtype=dtype)
    statistics = Epilogue(groups=2)
    if "fprop" in operations:
        conv.fprop(big, weight, geometry, statistics)
    if "dgrad" in operations:
        conv.dgrad(small, weight, geometry, statistics)
    if "wgrad" in operations:
        conv.wgrad(big, small, geometry)


def _around(dtype, activations, few=False):
    """Batch norm, sampling and losses, and the epilogues of the generator's end and of eval."""
    geometry = ConvGeometry((16, 16), (8, 8), (4, 4), (2, 2), (1, 1))
    z = _image(64, geometry.big, dtype)
    small = _image(128, geometry.small, dtype)
    weight, bias = torch.empty(128, 64, 4, 4, dtype=dtype), torch.empty(64, dtype=dtype)
    gamma, beta = torch.empty(64), torch.empty(64)
    conv.dgrad(small, weight, geometry, Epilogue(bias=bias, activation="tanh"))
    evaluation = Epilogue(vectors=torch.empty(1, 5, 64), activation="relu")
    conv.dgrad(small, weight, geometry, evaluation)
    _, statistics = conv.dgrad(small, weight, geometry, Epilogue(groups=1))
    running = torch.empty(64), torch.empty(64), 0.1
    norm.batch_statistics(norm.TileStatistics(
        torch.empty(999), torch.empty(999, 64), torch.empty(999, 64), 1, 1
    ), gamma, beta, 1e-5, *running)  # fmt: skip
    vectors = norm.batch_statistics(statistics, gamma, beta, 1e-5, *running)
    norm.statistics_of(z, groups=2)
    for activation in activations:
        options = dict(activation=activation, negative_slope=0.2)
        norm.normalize_activate(z, vectors, **options)
        norm.norm_backward(z, z, vectors, training=True, need_dz=True, **options)
        norm.activation_backward(z, z, **options)
    norm.normalize_activate(z, vectors, "glu", 0.0)
    gated = dict(activation="glu", negative_slope=0.0, want_y=True)
    norm.norm_backward(z[:, :32], z, vectors, training=True, need_dz=True, **gated)
    options = dict(need_dz=True, activation="relu", negative_slope=0.0)
    norm.norm_backward(z, z, vectors, training=False, **options)
    some = z[:16]  # Whose sums `norm_backward` finishes itself.
    norm.norm_backward(some, some, vectors, training=True, **options)
    _norms_of_images(dtype, few)
    seed = torch.empty(1, dtype=torch.int64)
    for with_kl, shape in ((False, (128, 100)), (True, (128, 100)), (True, (1, 1))):
        mu = torch.empty(shape, dtype=dtype)
        sampling.reparameterize(mu, mu, seed, with_kl=with_kl)
        sampling.reparameterize_backward(mu, mu[:, 0] if with_kl else None, mu, mu, seed)
        z, kl = sampling.importance_samples(mu, mu, 8, seed)
        sampling.importance_samples_backward(z, kl if with_kl else None, mu, mu, 8, seed)
    for logits in (torch.empty(128, dtype=dtype), torch.empty(128 * 784, dtype=dtype))[few:]:
        for targets in (64, logits) if few else (0, 1, 64, logits):
            for with_gradient in (False, True):
                losses.logit_loss(logits, targets, 1.0, with_gradient=with_gradient)
            losses.logit_loss_backward(torch.empty(()), logits, targets, 1.0)
        for kind in ("logistic", "least-squares", "hinge", "linear")[3 * few :]:
            for paired in (False, True):
                losses.logit_loss(logits, 64, 1.0, kind, paired, with_gradient=True)
                losses.logit_loss_backward(torch.empty(()), logits, 64, 1.0, kind, paired)
    _adam(dtype)


def _norms_of_images(dtype, few):
    """Instance and group norm, known statistics, and all passes over contiguous memory."""
    gamma, beta = torch.empty(64), torch.empty(64)
    norm.known_statistics(gamma, beta, gamma, beta, 1e-5, torch.float32)
    options = dict(activation="leaky_relu", negative_slope=0.2)
    for size in ((16, 16), (4, 4), (15, 15))[2 * few :]:
        z = _image(64, size, dtype, 8)
        for lying in (z, z.contiguous()):
            for span in (1, 2) if few else (1, 2, 64):
                statistics = norm.statistics_of(lying, 8)
                vectors = norm.batch_statistics(statistics, gamma, beta, 1e-5, span=span)
                norm.normalize_activate(lying, vectors, **options)
                norm.normalize_activate(lying, vectors, **options, dtype=torch.float32)
                backward = dict(training=True, need_dz=True, span=span, **options)
                norm.norm_backward(lying, lying, vectors, **backward)
        vectors = norm.batch_statistics(norm.statistics_of(lying, 1), gamma, beta, 1e-5)
        for training in (True, False):
            backward = dict(training=training, need_dz=True, **options)
            norm.norm_backward(lying, lying, vectors, **backward)


def _adam(half):
    """The update of a weight with a gradient and a copy in half precision, in a captured step."""
    p, step = torch.empty(64, 64), torch.empty(())
    weights = [adam.Weight(p, p, p, step, p.to(half), p.to(half))]
    numbers = dict(betas=(0.5, 0.999), eps=1e-8, weight_decay=0.0)
    adam.adam(adam.table(weights), weights, lr=torch.empty(()), **numbers)
