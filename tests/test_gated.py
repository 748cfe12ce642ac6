"""The gated linear unit after a norm, in chains and alone; where it stays PyTorch's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, assert_module
from torch import nn

from genfast import accelerate, functional, use_backend
from genfast.launch import norm
from genfast.nn import FusedSequential, statistics_groups

pytestmark = pytest.mark.kernels


def network(device, dtype=torch.float32):
    return nn.Sequential(
        nn.Conv2d(2, 6, 1), nn.BatchNorm2d(6), nn.GLU(1),
        nn.Conv2d(3, 8, (2, 1)), nn.GroupNorm(2, 8), nn.GLU(dim=1),
    ).to(device, dtype)  # fmt: skip


def fused(stock):
    return FusedSequential(*copy.deepcopy(stock))


def image(device, dtype=torch.float32, memory_format=torch.contiguous_format):
    return torch.randn(2, 2, 3, 2, device=device).to(dtype).contiguous(memory_format=memory_format)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chain(dtype, device, started):
    """Each norm and its gate are passes of their own kernels; no operation of PyTorch's runs."""
    stock = network(device, dtype)
    ours = fused(stock)
    assert [len(run.modules) for run in ours.plan()] == [3, 3]
    x = image(device, dtype, torch.channels_last)
    assert ours(x).stride() == stock(x).stride()
    assert started.count("gated_normalize") == 2
    stock = network(device, dtype)
    assert_module(fused(stock), stock, x)
    ours.eval()
    with torch.no_grad():
        y = ours(x)
    torch.testing.assert_close(ours(x).detach(), y, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("norm_layer", "shape", "layout"),
    [
        (lambda: nn.BatchNorm2d(42, momentum=None), (4, 42, 7, 5), torch.contiguous_format),
        (lambda: nn.BatchNorm2d(42), (4, 42, 7, 5), torch.channels_last),
        (lambda: nn.BatchNorm1d(6), (5, 6), torch.contiguous_format),
        (lambda: nn.GroupNorm(1, 2), (1, 2, 4, 3), torch.contiguous_format),
    ],
    ids=["planes", "channels_last", "vectors", "one channel of one image"],
)
@pytest.mark.parametrize("training", [True, False])
def test_alone(norm_layer, shape, layout, training, device):
    stock = nn.Sequential(norm_layer(), nn.GLU(1)).to(device).train(training)
    for tensor in (*stock.parameters(), *stock.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.randn(shape, device=device)
    x = x.contiguous(memory_format=layout) if x.dim() == 4 else x
    assert fused(stock)(x).stride() == copy.deepcopy(stock)(x).stride()
    assert_module(fused(stock), stock, x)


def test_groups_of_a_batch(device):
    """Their statistics, and the sums of their gradients, are their own."""
    stock = nn.Sequential(nn.BatchNorm2d(4), nn.GLU(1)).to(device)
    ours, x = fused(stock), torch.randn(6, 4, 2, 3, device=device, requires_grad=True)
    dy = torch.randn(6, 2, 2, 3, device=device)
    results = []
    with statistics_groups(ours, 3):
        results.append([ours(x)])
    results.append([torch.cat([stock(part) for part in x.chunk(3)])])
    for module, result in zip((ours, stock), results, strict=True):
        result += torch.autograd.grad(result[0], [x, *module.parameters()], dy)
        result += module.buffers()
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_every_magnitude(device):
    """Values and derivatives where the gate is shut, open or between."""
    magnitudes = torch.tensor([1e-8, 1e-3, 0.1, 1.0, 3.0, 15.0, 50.0, 200.0], device=device)
    gate = magnitudes[:, None] * torch.linspace(1, 1.99, 8, device=device)
    gate = torch.cat([gate, -gate], 1)
    z = torch.stack([1.5 + 0 * gate, gate])[None]
    one = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0], device=device).view(1, 5, 1).expand(1, 5, 2)
    one = one.contiguous()
    dz, _, _ = norm.norm_backward(
        torch.ones_like(z[:, :1]), z, one, training=False, need_dz=True, need_total=False,
        activation="glu", negative_slope=0.0,
    )  # fmt: skip
    u = z.clone().requires_grad_()
    y = F.glu(u, 1)
    eager = y.detach(), *torch.autograd.grad(y.sum(), u)
    # In float64 too PyTorch's derivative loses the digits of 1 - sigmoid.
    half, gate = z.double().chunk(2, 1)
    shut, opened = torch.sigmoid(-gate), torch.sigmoid(gate)
    exact = half * opened, torch.cat([opened, half * opened * shut], 1)
    found = (norm.normalize_activate(z, one, "glu", 0.0), dz), eager, exact
    ours, eager, oracle = (
        {
            f"{name} at {m:.0e}": row
            for name, t in (("value", y[0, 0]), ("by half", dx[0, 0]), ("by gate", dx[0, 1]))
            for m, row in zip(magnitudes, t, strict=True)
        }
        for y, dx in found
    )
    assert_close(ours, oracle, [(eager, oracle)])


@pytest.mark.float64
def test_second_derivatives(device):
    stock = network(device)[:6]
    stock = stock.double()
    results = []
    for module in (stock, fused(stock)):
        x = torch.linspace(-1, 1, 24, device=device).to(stock[0].weight.dtype)
        x = (3 * x).sin().view(2, 2, 3, 2).requires_grad_()
        (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), [x, *module.parameters()]))
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


class Written(nn.Module):
    """A unit in the middle of a forward, and one that halves the columns."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return F.glu(F.glu(self.norm(self.conv(x)), dim=1))


def test_functions(device):
    stock = Written().to(device)
    ours = copy.deepcopy(stock)
    report = accelerate(ours)
    (entry,) = report
    assert entry.fused and entry.layers == "Conv2d + BatchNorm2d + GLU"
    assert_module(ours, stock, image(device))
    torch._dynamo.reset()
    compiled = torch.compile(ours.eval(), backend="eager", fullgraph=True)
    x = image(device)
    torch.testing.assert_close(compiled(x), ours(x))


def test_stays_out(device):
    stock = nn.Sequential(nn.Conv2d(2, 4, 1), nn.GLU(1), nn.BatchNorm2d(2), nn.GLU()).to(device)
    ours = fused(stock)
    reasons = [run.reason for run in ours.plan()]
    assert reasons[0] in str(accelerate(copy.deepcopy(stock)))
    assert reasons[0].startswith("GLU '1' stays out: without a norm")
    assert reasons[2] == "GLU '3' stays out: its dim is -1, not 1"
    x = image(device)
    torch.testing.assert_close(ours(x), stock(x))


def test_as_a_function(device):
    """Without a norm too, and by PyTorch; an odd number of channels is an error."""
    x, weight = image(device), torch.randn(4, 2, 1, 1, device=device)
    expected = F.glu(F.conv2d(x, weight), 1)
    with use_backend("reference"):
        torch.testing.assert_close(functional.conv_block(x, weight, activation="glu"), expected)
    torch.testing.assert_close(functional.conv_block(x, weight, activation="glu"), expected)
    for norm_of in (False, True):
        with pytest.raises(ValueError, match="an even number of channels for 'glu', got 3"):
            functional.conv_block(x, weight[:3], norm=norm_of, activation="glu")
    with pytest.raises(ValueError, match="an even number of channels for 'glu', got 3"):
        functional.norm_block(x.new_ones(2, 3, 2, 2), activation="glu")
