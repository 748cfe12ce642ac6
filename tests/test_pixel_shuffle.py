"""Convolutions that put out shuffled pixels: where they do, and that the rest is PyTorch's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_module
from torch import nn
from torch._subclasses import FakeTensorMode

from genfast import accelerate, folding, functional
from genfast.geometry import ConvGeometry
from genfast.launch import conv, phases, tiles
from genfast.launch.epilogue import Epilogue
from genfast.nn import FusedSequential

kernels = pytest.mark.kernels
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture
def gaining(monkeypatch):
    """As if all of them gained; what each block became of which there is something around."""
    forms, form = [], folding.form

    def noting(*args):
        forms.append(form(*args))
        return forms[-1]

    monkeypatch.setattr(folding, "form", noting)
    monkeypatch.setattr(folding, "_shuffling_gains", lambda *_: True)
    return forms


def fused(stock):
    return FusedSequential(*copy.deepcopy(stock))


@pytest.mark.parametrize(
    ("kernel", "padding", "by", "size"),
    [
        ((3, 3), (1, 1), 2, (3, 4)),
        ((1, 1), (0, 0), 3, (4, 3)),
        ((5, 4), (2, 0), 2, (5, 4)),
        ((3, 2), (2, 1), 4, (2, 1)),
    ],
)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_weights(kernel, padding, by, size, layout):
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    weight = torch.randn(2 * by * by, 3, *kernel, dtype=torch.float64).to(memory_format=layout)
    bias = torch.randn(2 * by * by, dtype=torch.float64)
    made, of_phases = folding.shuffled(weight, bias, by)
    y = F.conv_transpose2d(
        x, made, None, by, [by * (k - 1 - p) for k, p in zip(kernel, padding, strict=True)]
    )
    phases.add_bias(y, of_phases, (by, by))
    expected = F.pixel_shuffle(F.conv2d(x, weight, bias, 1, padding), by)
    torch.testing.assert_close(y, expected)
    assert made.is_contiguous(memory_format=layout) or kernel == (1, 1)
    dy = torch.randn_like(y)
    small = F.pixel_unshuffle(dy, by).sum((0, 2, 3)).view(2, -1).t()
    torch.testing.assert_close(phases.bias_gradient(dy, (by, by)), small)


def network(device, dtype=torch.float32, layout=torch.contiguous_format):
    return nn.Sequential(
        nn.Conv2d(2, 8, (2, 1)), nn.PixelShuffle(2), nn.LeakyReLU(0.2),
        nn.Conv2d(2, 9, 1), nn.PixelShuffle(3), nn.BatchNorm2d(1), nn.ReLU(),
    ).to(device, dtype, memory_format=layout)  # fmt: skip


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("library", [False, True])
def test_chain(dtype, library, device, gaining, monkeypatch, started):
    """One chain without a pass that shuffles; the bias of a phase is in the product's kernel."""
    if library:
        monkeypatch.setattr(tiles, "gemm_config", lambda *_: tiles.LIBRARY)
    layout = LAYOUTS[dtype == torch.bfloat16]
    stock = network(device, dtype, layout)
    ours = fused(stock)
    x = torch.randn(2, 2, 2, 2, device=device).to(dtype)
    assert_module(ours, stock, x)
    assert all(form.before is form.after is None for form in gaining)
    assert library or not {"normalize_activate", "tile_statistics"} & set(started[:2])
    assert fused(stock)(x).stride() == stock(x).stride()


@pytest.mark.float64
@kernels
def test_second_derivatives(device, gaining):
    stock = network(device).eval()
    stock = stock.double()
    results = []
    for module in (stock, fused(stock)):
        x = torch.linspace(-1, 1, 16, device=device).to(stock[0].weight.dtype)
        x = (9 * x).sin().view(2, 2, 2, 2).requires_grad_()
        (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), [x, *module.parameters()]))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    assert gaining


@pytest.mark.float64
@kernels
def test_a_norm_takes_no_bias_of_phases_away(device, gaining):
    """Frozen weights: the bias alone wants a gradient."""
    stock = nn.Sequential(nn.Conv2d(2, 8, 1), nn.PixelShuffle(2), nn.BatchNorm2d(2)).to(device)
    stock.requires_grad_(False)[0].bias.requires_grad_()
    stock = stock.double()
    gradients = []
    for module in (fused(stock), stock):
        x = torch.linspace(-1, 1, 12, device=device).to(stock[0].bias.dtype).view(1, 2, 2, 3).cos()
        module(x).pow(3).sum().backward()
        gradients.append(module[0].bias.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().max() > 0


class Written(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.act = nn.Conv2d(2, 8, 1), nn.PReLU()

    def forward(self, x):
        return self.act(F.pixel_shuffle(self.conv(x), 2))


@kernels
def test_functions(device, gaining):
    stock = Written().to(device)
    ours = copy.deepcopy(stock)
    assert [str(e) for e in accelerate(ours)] == ["conv: Conv2d + PixelShuffle + PReLU: fused"]
    x = torch.randn(1, 2, 2, 3, device=device)
    assert_module(ours, stock, x)
    assert gaining and all(form.after is None for form in gaining)
    gaining.clear()
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), stock(x))
    assert gaining[-1].after is not None  # The compiler's own pass.


STAYS_OUT = {
    "norm": [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.PixelShuffle(2)],
    "stride": [nn.Conv2d(3, 4, 1, 2), nn.PixelShuffle(2)],
    "much padding": [nn.Conv2d(3, 4, 1, 1, 1), nn.PixelShuffle(2)],
    "by 5": [nn.Conv2d(3, 25, 1), nn.PixelShuffle(5)],
    "the other way": [nn.Conv2d(3, 4, 1), nn.PixelUnshuffle(2)],
    "transposed": [nn.ConvTranspose2d(3, 4, 1), nn.PixelShuffle(2)],
    "padded by a layer": [nn.ZeroPad2d(1), nn.Conv2d(3, 4, 1), nn.PixelShuffle(2)],
}


@kernels
@pytest.mark.parametrize("name", STAYS_OUT)
def test_stays_out(name, device, gaining):
    stock = nn.Sequential(*STAYS_OUT[name]).to(device)
    *_, last = fused(stock).plan()
    assert len(last.modules) == 1 and not last.fused
    if name == "norm":
        assert "PixelShuffle '2' stays out: the norm before" in str(accelerate(fused(stock)))
    x = torch.randn(1, 3, 2, 4, device=device)
    torch.testing.assert_close(fused(stock)(x), stock(x))


@kernels
def test_few_channels_are_shuffled_by_pytorch(device):
    """Of an image, with any bias: its kernels add one of each channel."""
    stock = nn.Sequential(nn.Conv2d(2, 12, 1), nn.PixelShuffle(2), nn.Tanh()).to(device)
    assert_module(fused(stock), stock, torch.randn(1, 2, 2, 2, device=device))
    x, weight = torch.randn(2, 4, 1, 2, device=device), torch.randn(4, 3, 2, 2, device=device)
    geometry = ConvGeometry.conv_transpose((1, 2), (2, 2), (2, 2), (0, 0), (0, 0))
    bias = torch.randn(4, 3, device=device)
    expected = F.conv_transpose2d(x, weight, None, 2)
    phases.add_bias(expected, bias, (2, 2))
    found, _ = conv.dgrad(x, weight, geometry, Epilogue(bias=bias))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_formats_are_those_of_pytorchs_shuffle(device, layout):
    """On a GPU it gives contiguous memory; PyTorch knows that without one."""
    made, _ = folding.shuffled(torch.empty(8, 4, 1, 1), None, 2)
    with FakeTensorMode():
        x = torch.empty(2, 4, 2, 3, device=device).to(memory_format=layout)
        weight = torch.empty(8, 4, 1, 1, device=device)
        y = F.pixel_shuffle(F.conv2d(x, weight), 2)
        block = functional.Block(made, None, 2, 0, 0, None, "relu", 0.0, shuffle=2)
        found = functional._pytorchs_format(x, [block], functional._geometries(x, [block]))
    assert y.is_contiguous(memory_format=found)


@pytest.mark.parametrize(
    ("images", "side", "channels", "out_channels", "architecture", "gains"),
    [
        (16, 24, 64, 64, "sm_90", True),  # SRGAN's and ESRGAN's, of their crops.
        (16, 64, 64, 64, "sm_90", True),
        (8, 64, 64, 32, "sm_90", False),  # A phase fills half a tile.
        (16, 16, 256, 256, "sm_90", True),
        (1, 4, 256, 256, "sm_90", False),  # The weight's order takes longer.
        (16, 1, 256, 256, "sm_90", False),
        (16, 64, 64, 3, "sm_90", False),
    ],
)
def test_where_it_gains(images, side, channels, out_channels, architecture, gains):
    shape = 4 * out_channels, channels, 3, 3
    given = 2, shape, (1, 1), (side, side), images, True, 2, "half", architecture
    assert folding._shuffling_gains(*given) == gains


def test_a_cpu_shuffles_as_pytorch_does(monkeypatch):
    monkeypatch.setattr(functional, "why_not_triton", lambda *_, **__: "no kernels here")
    stock = network("cpu")
    x = torch.randn(2, 2, 2, 2)
    torch.testing.assert_close(fused(stock)(x), stock(x), rtol=0, atol=0)
