"""One kernel for dgrad and the wgrad below it, at an image: what it computes, and where it runs."""

from dataclasses import dataclass

import dependent_launch
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, pairwise
from oracle import DRAWS, assert_close
from torch import nn
from torch.autograd import gradcheck

from genfast import reference
from genfast.backend import INTERPRETING
from genfast.geometry import ConvGeometry
from genfast.launch import conv, dgrad_wgrad, from_image, start, tiles
from genfast.launch.epilogue import Epilogue
from genfast.launch.operand import Output
from genfast.nn import FusedSequential

pytest.importorskip("triton", reason="it is about a Triton kernel")

from ahead_of_time import facts_of
from test_ahead_of_time import OLDEST_TRITON

pytestmark = pytest.mark.kernels

interpreted = pytest.mark.skipif(not INTERPRETING, reason="the GPU may have no such kernel")
SLOPE = 0.25  # A product with it is exact.


@dataclass(frozen=True)
class Route:
    """Two convolutions, of an image of this size and of what comes out: kernel, stride, padding.

    channels: of the image, between the two, and of the upper one's result.
    """

    size: tuple[int, int]
    lower: tuple
    upper: tuple
    channels: tuple[int, int, int]
    batch: int = 3

    @property
    def geometries(self):
        lower = ConvGeometry.conv(self.size, *map(_pair, self.lower))
        return lower, ConvGeometry.conv(lower.small, *map(_pair, self.upper))


def _pair(n):
    return n if isinstance(n, tuple) else (n, n)


# The interpreter's tile is 64 channels by 32 pixels by 32 channels, of 5 programs.
ROUTES = {
    "whole boxes": Route((32, 16), (4, 2, 1), (4, 2, 1), (3, 64, 32), batch=2),
    "ragged boxes": Route((20, 28), (4, 2, 1), (4, 2, 1), (3, 16, 40), batch=2),
    "boxes of images": Route((8, 8), (4, 2, 1), (4, 2, 1), (1, 72, 8), batch=11),
    "no phases": Route((5, 7), (3, 1, 1), (3, 1, 1), (4, 8, 16)),
    "nine phases": Route((13, 19), (2, 2, 0), (3, 3, 1), (2, 8, 8), batch=5),
    "two sides": Route((9, 7), ((3, 4), (2, 1), (0, 2)), ((3, 4), (1, 2), (2, 1)), (3, 8, 8)),
}
routes = pytest.mark.parametrize("route", ROUTES)


def tensors_of(route, activation, device, dtype=torch.float64, whole=False):
    """x, dz, the upper weight and the lower output y; `whole`: numbers whose sums are exact."""
    lower, upper = route.geometries
    c_image, c_big, c_small = route.channels
    shapes = dict(
        x=(route.batch, c_image, *lower.big),
        dz=(route.batch, c_small, *upper.small),
        weight=(c_small, c_big, *upper.kernel_size),
        y=(route.batch, c_big, *lower.small),
    )
    made = {name: torch.randn(shape) for name, shape in shapes.items()}
    if whole:
        # As large as lets some gradients have more digits than half precision.
        most = dict(x=2, dz=64, weight=8, y=4)
        made = {
            name: (t * most[name] / 2).round().clamp(-most[name], most[name])
            for name, t in made.items()
        }
    else:
        made["weight"] *= (c_small * upper.taps) ** -0.5
        made["y"] = reference.activate(made["y"], activation, SLOPE)
    return {
        name: t.to(device, dtype, memory_format=torch.channels_last) for name, t in made.items()
    }


def ours(route, tensors, activation, with_sums):
    """The kernel's weight gradient and sums."""
    lower, upper = route.geometries
    below = Output(tensors["y"], None, activation, SLOPE)
    image = from_image.padded(tensors["x"], lower)
    arguments = tensors["dz"], tensors["weight"], upper, below
    assert dgrad_wgrad.gains(*arguments, lower, route.channels[0], with_sums)
    return dgrad_wgrad.dgrad_wgrad(*arguments, image, with_sums)


@interpreted
@pytest.mark.parametrize(
    ("route", "activation"),
    list(zip(ROUTES, ("identity", "relu", "leaky_relu") * 2, strict=True)),
)
def test_bits_are_those_of_two_kernels(route, activation, device):
    """Of numbers whose sums are exact in any order, rounded where the gradient would be stored."""
    route, dtype, with_sums = ROUTES[route], torch.bfloat16, activation != "relu"
    lower, upper = route.geometries
    tensors = tensors_of(route, activation, device, dtype, whole=True)
    dweight, sums = ours(route, tensors, activation, with_sums)
    epilogue = Epilogue(output=Output(tensors["y"], None, activation, SLOPE), sums=with_sums)
    g, expected_sums = conv.dgrad(tensors["dz"], tensors["weight"], upper, epilogue)
    expected = from_image.wgrad(from_image.padded(tensors["x"], lower), g)
    assert dweight.is_contiguous(memory_format=torch.channels_last)
    assert dweight.dtype == dtype and torch.equal(dweight, expected)
    assert (sums is not None) == with_sums
    assert sums is None or torch.equal(sums, expected_sums)
    exact, _ = conv.dgrad(tensors["dz"].float(), tensors["weight"].float(), upper)
    assert not torch.equal(exact, exact.to(dtype).float())


BACKWARD = {
    "relu": lambda dy, y: torch.ops.aten.threshold_backward(dy, y, 0),
    "leaky_relu": lambda dy, y: torch.ops.aten.leaky_relu_backward(dy, y, SLOPE, True),
    "tanh": torch.ops.aten.tanh_backward,
}


def plain(route, tensors, activation):
    """The gradients of the lower layer's weight and bias by PyTorch."""
    lower, upper = route.geometries
    x, dz, weight, y = tensors.values()
    sides = upper.stride, upper.padding
    dy = F.conv_transpose2d(dz, weight, None, *sides, upper.output_padding)
    g = BACKWARD[activation](dy, y)
    shape = route.channels[1], route.channels[0], *lower.kernel_size
    dweight = torch.nn.grad.conv2d_weight(x, shape, g, lower.stride, lower.padding)
    return {"gradient of weight": dweight, "gradient of bias": g.sum((0, 2, 3))}


@interpreted
@pytest.mark.parametrize(
    "case",
    [
        tuple(row.values())
        for row in pairwise(dict(route=list(ROUTES)[2:], dtype=DTYPES, activation=list(BACKWARD)))
    ],
    ids=lambda case: "-".join(map(str, case)),
)
@pytest.mark.one_in(4)
def test_gradients(case, device):
    name, dtype, activation = case
    route = ROUTES[name]
    narrow = torch.float32 if dtype == torch.float64 else dtype
    draws = [tensors_of(route, activation, device, dtype) for _ in range(DRAWS)]
    dweight, sums = ours(route, draws[0], activation, True)
    samples = [
        tuple(
            plain(route, {name: t.to(to) for name, t in tensors.items()}, activation)
            for to in (narrow, torch.float64)
        )
        for tensors in draws
    ]
    exact = plain(route, {name: t.double() for name, t in draws[0].items()}, activation)
    found = {"gradient of weight": dweight, "gradient of bias": sums.sum((0, 1)).to(dtype)}
    assert_close(found, exact, samples)


@pytest.mark.float64
@interpreted
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_differences(bias, device):
    """Those of a chain's parameters, by finite differences."""
    layers = nn.Conv2d(1, 8, 4, 2, 1, bias=bias), nn.LeakyReLU(SLOPE), nn.Conv2d(8, 2, 4, 2, 1)
    model = FusedSequential(*layers).to(device, torch.float64)
    x = torch.randn(1, 1, 8, 12, dtype=torch.float64, device=device)
    parameters = dict(model.named_parameters())

    def run(*values):
        return torch.func.functional_call(model, dict(zip(parameters, values, strict=True)), x)

    assert gradcheck(run, tuple(parameters.values()), fast_mode=True)


def discriminator(bias=True, kernel=4, channels=(3, 16, 32), activation=None, norm=None):
    """Of images whose sides are multiples of 4; `norm` after the first convolution."""
    image, below, above = channels
    return nn.Sequential(
        nn.Conv2d(image, below, kernel, 2, (kernel - 1) // 2, bias=bias),
        *([] if norm is None else [norm(below)]),
        activation or nn.LeakyReLU(SLOPE),
        nn.Conv2d(below, above, 4, 2, 1, bias=False),
        nn.BatchNorm2d(above),
        nn.LeakyReLU(SLOPE),
        nn.Conv2d(above, 2, (4, 3)),
    )


@pytest.fixture
def started(monkeypatch):
    """The names of the kernels that would start on sm_90; nothing is computed."""
    names = []
    monkeypatch.setattr(start, "architecture", lambda tensor: "sm_90")
    monkeypatch.setattr(
        start, "kernel", lambda kernel, grid, **arguments: names.append(kernel.__name__)
    )
    torch.use_deterministic_algorithms(False)  # Filling fresh memory with NaN takes time.
    return names


HALF = torch.bfloat16
IS_ONE = {
    "a bias": dict(bias=True),
    "no bias": dict(bias=False),
    "one channel": dict(channels=(1, 64, 128)),
    "relu": dict(activation=nn.ReLU()),
    "3x3": dict(kernel=3),
}
ARE_TWO = {
    "five channels": dict(channels=(5, 16, 32)),
    "twelve channels between": dict(channels=(3, 12, 32)),
    "6x6": dict(kernel=6),
    "a norm": dict(norm=nn.BatchNorm2d),
    "many channels": dict(channels=(3, 128, 256)),  # Larger tiles, of which each reads less.
    "mish": dict(activation=nn.Mish()),
}


@pytest.mark.parametrize("name", [*IS_ONE, *ARE_TWO])
def test_where_it_runs(name, started, device):
    how = (IS_ONE | ARE_TWO)[name]
    model = FusedSequential(*discriminator(**how)).to(device, HALF)
    x = torch.empty(64, model[0].in_channels, 64, 32, dtype=HALF, device=device)
    backward_of(model, x, started)
    is_one = name in IS_ONE
    assert started.count("dgrad_wgrad_image") == is_one
    assert "wgrad_image" not in started or not is_one
    # Of whatever else wants a gradient the two kernels make what both need.
    backward_of(model, x.requires_grad_(), started)
    assert "dgrad_wgrad_image" not in started


@pytest.mark.parametrize("why", ["frozen", "sm_80", "sm_100", "library", "float32"])
def test_where_it_does_not_run(why, started, device, monkeypatch):
    model = FusedSequential(*discriminator()).to(device, HALF)
    x = torch.empty(64, 3, 64, 32, dtype=HALF, device=device)
    if why == "frozen":
        model[0].weight.requires_grad_(False)
    elif why.startswith("sm_"):
        monkeypatch.setattr(start, "architecture", lambda tensor: why)
    elif why == "library":
        monkeypatch.setattr(tiles, "gemm_config", lambda *_: tiles.LIBRARY)
    else:  # Without TF32 no tensor core multiplies it.
        model, x = model.float(), x.float()
    backward_of(model, x, started)
    assert started and "dgrad_wgrad_image" not in started


def backward_of(model, x, started):
    y = model(x)
    started.clear()
    y.sum().backward()


@pytest.mark.exhaustive
@pytest.mark.parametrize("triton", [None, OLDEST_TRITON], ids=["installed", "oldest"])
def test_hopper_instructions(triton):
    """Three programs of 128 threads share a multiprocessor; others of its cases are cheaper."""
    if triton is not None and not triton.exists():
        pytest.skip(f"{triton} is absent: `make test` installs it")
    launches = facts_of("sm_90", "--code", of="dgrad_wgrad", triton=triton)
    facts = [f for f in launches if f["kernel"] == "dgrad_wgrad_image"]
    dependent_launch.check(facts, "sm_90")
    hashes = {}
    for f in facts:
        hashes.setdefault(f["case"], set()).add(f["hash"])
        assert f["spills"] == 0 and f["registers"] <= 168 and f["shared"] <= 75 << 10, f
        assert f["wgmma"] > 0 and f["tma"] > 0, f
        assert f["loads"].keys() == ({"8"} if f["case"] == "3x3" else {"16"}), f
        assert f["loop"]["instructions"] <= 1250, f
    # A batch or an image of another size compiles nothing anew.
    assert len(facts) == len(hashes) + 2 and all(len(found) == 1 for found in hashes.values())
