"""Gradients beside images and logits, computed for their norm's sums and again at its input.

What a batch norm, its activation and the layer after it do backward, by PyTorch, is held to the
rule of `oracle`: the gradients of the norm's input, of its weight and bias, of the layer's weight.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, pairwise
from oracle import DRAWS, assert_close

from genfast import reference
from genfast.geometry import ConvGeometry
from genfast.launch import conv, from_image, norm, start
from genfast.launch.epilogue import Epilogue
from genfast.launch.operand import Output
from genfast.nn import FusedSequential

pytest.importorskip("triton", reason="it is about Triton kernels")
pytestmark = pytest.mark.kernels

SLOPE = 0.2
EPS = 1e-5
WHOLE = ConvGeometry.conv((4, 3), (4, 3), (1, 1), (0, 0))


@dataclass(frozen=True)
class Layer:
    """A layer after a norm.

    operation: the product that computes the gradient of its input: "fprop" of a transposed
        convolution, which makes an image, and "dgrad" of a convolution, which makes logits.
    channels: of the small and of the big side.
    kernels: that its gradient of the norm's input takes, twice computed.
    """

    operation: str
    geometry: ConvGeometry
    channels: tuple[int, int]
    kernels: tuple[str, ...]


IMAGE = "pad_image", "norm_sums_image", "sum_partials", "sum_partials", "fprop_image"
LOGITS = "logits_dgrad", "sum_partials", "logits_dgrad"
# The interpreter's tiles have 32 channels and 32 pixels, 2 images and 64 of an image's elements.
LAYERS = {
    "image": Layer("fprop", ConvGeometry.conv((10, 14), (4, 4), (2, 2), (1, 1)), (40, 3), IMAGE),
    "3 x 3": Layer("fprop", ConvGeometry.conv((5, 6), (3, 3), (1, 1), (1, 1)), (8, 1), IMAGE),
    "logit": Layer("dgrad", WHOLE, (1, 24), LOGITS),
    "logits": Layer("dgrad", WHOLE, (3, 9), LOGITS),
}
CASES = pairwise(
    dict(
        layer=list(LAYERS),
        groups=[1, 3],
        dtype=DTYPES,
        activation=["relu", "leaky_relu", "identity", "hardswish"],
    )
)


def tensors_of(case, device):
    """z, gamma and beta of the norm, the weight of the layer, and its output's gradient."""
    layer = LAYERS[case["layer"]]
    c_small, c_big = layer.channels
    below, above = (c_small, layer.geometry.small), (c_big, layer.geometry.big)
    if layer.operation == "dgrad":
        below, above = above, below
    weight = torch.randn(c_small, c_big, *layer.geometry.kernel_size)
    tensors = dict(
        z=torch.randn(6, below[0], *below[1]) + torch.randn(below[0], 1, 1),
        gamma=torch.randn(below[0]),
        beta=torch.randn(below[0]),
        weight=weight * (below[0] * layer.geometry.taps) ** -0.5,
        dy=torch.randn(6, above[0], *above[1]),
    )
    return {name: t.to(device, case["dtype"]) for name, t in tensors.items()}


def plain(case, tensors):
    """The gradients by PyTorch, in the dtype of the tensors."""
    layer = LAYERS[case["layer"]]
    *inputs, dy = tensors.values()
    z, gamma, beta, weight = (t.detach().clone().requires_grad_() for t in inputs)
    parts = z.chunk(case["groups"])
    u = [F.batch_norm(part, None, None, gamma, beta, training=True, eps=EPS) for part in parts]
    y = reference.activate(torch.cat(u), case["activation"], SLOPE)
    convolve = F.conv2d if layer.operation == "dgrad" else F.conv_transpose2d
    convolve(y, weight, None, layer.geometry.stride, layer.geometry.padding).backward(dy)
    return named(z.grad, beta.grad, gamma.grad, weight.grad)


def named(dz, dbeta, dgamma, dweight):
    return {
        "gradient of z": dz,
        "gradient of beta": dbeta,
        "gradient of gamma": dgamma,
        "gradient of weight": dweight,
    }


def ours(case, tensors):
    layer = LAYERS[case["layer"]]
    z, gamma, beta, weight, dy = (
        t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t
        for t in tensors.values()
    )
    groups, how = case["groups"], (layer.geometry,)
    vectors = norm.batch_statistics(norm.statistics_of(z, groups), gamma, beta, EPS)
    below = Output(z, vectors, case["activation"], SLOPE)
    if not conv.computed_twice(layer.operation, dy, weight, *how, below):
        return None
    partials, dweight = conv.norm_sums(layer.operation, dy, weight, *how, below, True)
    rows = z.numel() // (groups * z.shape[1])
    each, total = norm.total_sums(partials, rows, True)
    product = getattr(conv, layer.operation)
    dz, sums = product(dy, weight, *how, Epilogue(output=below, at_input=each))
    assert sums is None and dz.is_contiguous(memory_format=torch.channels_last)
    if dweight is None:
        big, small = (below, dy) if layer.operation == "dgrad" else (dy, below)
        dweight = conv.wgrad(big, small, *how)
    dbeta, dgamma = (t.to(z.dtype) for t in total)
    return named(dz, dbeta, dgamma, dweight)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_the_gradients_below(case, device):
    tensors = tensors_of(case, device)
    found = ours(case, tensors)
    if case["layer"] in ("image", "3 x 3") and case["groups"] > 1:
        assert found is None  # A generator's batch is one: nobody asked for more.
        return
    again = ours(case, tensors)
    assert all(torch.equal(found[name], again[name]) for name in found)
    dtypes = torch.float32 if case["dtype"] == torch.float64 else case["dtype"], torch.float64
    draws = [tensors] + [tensors_of(case, device) for _ in range(DRAWS - 1)]
    samples = [
        tuple(plain(case, {name: v.to(dtype) for name, v in t.items()}) for dtype in dtypes)
        for t in draws
    ]
    exact = {name: t.double() for name, t in tensors.items()}
    assert_close(found, plain(case, exact), samples)


@pytest.mark.parametrize("name", ["image", "logit"])
def test_kernels_of_a_chain(name, device, monkeypatch):
    """The gradient between is not stored, and no pass of the norm's own follows."""
    layer, case = LAYERS[name], dict(layer=name, dtype=torch.float32)
    z, _, _, weight, _ = tensors_of(case, device).values()
    kind = torch.nn.ConvTranspose2d if layer.operation == "fprop" else torch.nn.Conv2d
    inner, outer = weight.shape[:2] if kind is torch.nn.ConvTranspose2d else weight.shape[1::-1]
    geometry = layer.geometry
    chain = FusedSequential(
        torch.nn.Conv2d(inner, inner, 1),
        torch.nn.BatchNorm2d(inner),
        torch.nn.ReLU(),
        kind(inner, outer, geometry.kernel_size, geometry.stride, geometry.padding, bias=False),
    ).to(device)
    y = chain(z)
    started, run = [], start.kernel
    monkeypatch.setattr(
        start, "kernel", lambda k, grid, **a: (started.append(k.__name__), run(k, grid, **a))
    )
    y.sum().backward()
    assert tuple(started[: len(layer.kernels)]) == layer.kernels
    assert "norm_backward" not in started and "norm_backward_reduce" not in started


def test_at_input_is_of_a_norm_beside_images_and_logits(device):
    with pytest.raises(ValueError, match="expected an output with vectors beside at_input"):
        Epilogue(at_input=torch.zeros(1, 1, 16))
    geometry = ConvGeometry.conv((5, 6), (3, 3), (1, 1), (1, 1))
    x, weight = torch.ones(2, 16, 5, 6, device=device), torch.ones(8, 16, 3, 3, device=device)
    below = Output(x[:, :8].contiguous(), torch.ones(1, 5, 8, device=device), "relu", 0.0)
    epilogue = Epilogue(output=below, at_input=torch.zeros(1, 1, 16, device=device))
    with pytest.raises(ValueError, match="expected an epilogue at_input only beside images"):
        conv.fprop(x, weight, geometry, epilogue)


def test_wide_windows_are_computed_once(device):
    """A window of 7 x 7 is several steps."""
    geometry = ConvGeometry.conv((9, 9), (7, 7), (1, 1), (3, 3))
    z, vectors = torch.ones(1, 8, 9, 9, device=device), torch.ones(1, 5, 8, device=device)
    assert not from_image.has_norm_sums(geometry, z, Output(z, vectors, "relu", 0.0))
    assert not from_image.has_norm_sums(WHOLE, z, Output(z, None, "relu", 0.0))
