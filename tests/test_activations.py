"""Activations beside those of cases.py: in chains, alone, compiled; where they stay PyTorch's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, assert_module
from test_compile import compiled
from torch import nn

from genfast import accelerate, functional, use_backend
from genfast.launch import norm, tiles
from genfast.nn import FusedSequential
from genfast.reference import ACTIVATION, activate

pytestmark = pytest.mark.kernels

LAYERS = {
    "relu6": nn.ReLU6,
    "hardtanh": nn.Hardtanh,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "softplus": nn.Softplus,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "prelu": nn.PReLU,
    "prelu of channels": lambda: nn.PReLU(5),
}
# Where an activation bends in value, a rounding to half precision would choose its derivative.
SMOOTH = {"elu", "softplus", "silu", "gelu", "gelu_tanh", "mish"}


def network(make, device, first_norm=True):
    """Two blocks with the activation after each: after a convolution alone, or after a norm."""
    layers = [nn.Conv2d(3, 5, 3, 1, 1), nn.BatchNorm2d(5), make()]
    if not first_norm:
        del layers[1]
    layers += [nn.ConvTranspose2d(5, 5, 2, 2), nn.GroupNorm(1, 5), make()]
    stock = nn.Sequential(*layers).to(device)
    for layer in stock:
        if hasattr(layer, "num_parameters"):
            nn.init.uniform_(layer.weight, -0.5, 0.5)
    return stock


def fused(stock):
    return FusedSequential(*copy.deepcopy(stock))


@pytest.mark.parametrize("name", ["elu", "softplus", "gelu", "prelu", "prelu of channels"])
def test_after_norms(name, device):
    """Of a norm's output backward makes again what it needs, in the product above and in passes."""
    stock = network(LAYERS[name], device)
    ours = fused(stock)
    assert [len(run.modules) for run in ours.plan()] == [3, 3]
    x = torch.randn(2, 3, 5, 3, device=device)
    if name in SMOOTH:
        stock, ours, x = stock.bfloat16(), ours.bfloat16(), x.bfloat16()
    assert_module(ours, stock, x.contiguous(memory_format=torch.channels_last))


@pytest.mark.parametrize("name", ["elu", "silu", "prelu"])
def test_after_a_convolution(name, device, started):
    """PyTorch's own where its input must be kept; a part of the product's kernel where not."""
    stock = network(LAYERS[name], device, first_norm=False)
    ours = fused(stock)
    x = torch.randn(2, 3, 4, 3, device=device)
    assert_module(ours, stock, x)
    started.clear()
    with torch.no_grad():
        z = F.conv2d(x, stock[0].weight, stock[0].bias)
        (run,) = fused(stock[:2]).plan()
        assert functional.chain(x, [run.block()]).shape == z.shape[:2] + x.shape[2:]
    assert started == ["fprop"] or (name, started) == ("prelu", ["fprop"])


@pytest.mark.parametrize("name", [n for n in ACTIVATION if n not in ("identity", "prelu", "glu")])
def test_every_magnitude(name, device):
    """Values and derivatives, also where a largest error over all would let them be 0."""
    magnitudes = torch.tensor([1e-8, 1e-3, 0.1, 1.0, 3.0, 15.0, 50.0], device=device)
    x = magnitudes[:, None] * torch.linspace(1, 1.99, 16, device=device)
    x = torch.cat([x, -x], 1)
    one = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0], device=device).view(1, 5, 1)
    image = x.view(1, 1, *x.shape)
    dz, _, _ = norm.norm_backward(
        torch.ones_like(image), image, one, training=False, need_dz=True, need_total=False,
        activation=name, negative_slope=0.2,
    )  # fmt: skip
    found = [(norm.normalize_activate(image, one, name, 0.2), dz)]
    for u in (x.clone(), x.double()):
        y = activate(u.requires_grad_(), name, 0.2)
        found.append((y.detach(), *torch.autograd.grad(y.sum(), u)))
    ours, eager, oracle = (
        {f"value at {m:.0e}": row for m, row in zip(magnitudes, y.view(x.shape), strict=True)}
        | {f"gradient at {m:.0e}": row for m, row in zip(magnitudes, dx.view(x.shape), strict=True)}
        for y, dx in found
    )
    assert_close(ours, oracle, [(eager, oracle)])


@pytest.mark.float64
@pytest.mark.parametrize("name", ["elu", "silu"])
def test_second_derivatives(name, device):
    """With a gradient's penalty, in float64 beside PyTorch."""
    stock = network(LAYERS[name], device, first_norm=name == "silu")
    stock = stock.double()
    results = []
    for module in (stock, fused(stock)):
        x = torch.linspace(-1, 1, 36, device=device).to(stock[0].weight.dtype)
        x = x.sin().view(1, 3, 4, 3).requires_grad_()
        (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        parameters = list(module.parameters())
        results.append(torch.autograd.grad(dx.square().sum(), parameters, allow_unused=True))
    for ours, expected in zip(results[1], results[0], strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected)


def test_products_of_the_library(device, monkeypatch):
    """Where PyTorch computes a product, a pass takes the derivative at the norm's output."""
    monkeypatch.setattr(tiles, "gemm_config", lambda *_: tiles.LIBRARY)
    stock = network(nn.GELU, device)
    assert_module(fused(stock), stock, torch.randn(2, 3, 5, 3, device=device))


@pytest.mark.parametrize("name", ["relu6", "elu", "selu", "softplus"])
def test_outputs_may_be_changed_in_place(name, device):
    """PyTorch's layers keep their input for backward; ours look whether the output is unchanged."""
    stock = network(LAYERS[name], device, first_norm=False)[:2]
    gradients = []
    for module in (stock, fused(stock)):
        x = torch.linspace(-3, 3, 27, device=device).view(1, 3, 3, 3).requires_grad_()
        module(x).mul_(2.0).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "layer", [nn.ELU(0.5), nn.Softplus(2), nn.Softplus(1, 3), nn.Hardtanh(-2, 2)], ids=str
)
def test_other_settings_stay_out(layer, device):
    stock = nn.Sequential(nn.Conv2d(3, 2, 1), layer).to(device)
    (run, alone) = fused(stock).plan()
    assert not alone.fused and "stays out: its " in run.reason
    x = 4 * torch.randn(2, 3, 3, 3, device=device)
    torch.testing.assert_close(fused(stock)(x), stock(x))


@pytest.mark.parametrize("layer", [nn.PReLU(), nn.Softplus()], ids=str)
def test_autocast_gives_pytorchs_dtype(layer, device):
    """PReLU's output is in autocast's dtype; softplus's in float32, on a GPU alone."""
    stock = nn.Sequential(nn.BatchNorm2d(3), layer).to(device)
    x = torch.randn(2, 3, 3, 3, device=device)
    with torch.autocast(device.type, torch.bfloat16):
        for of in (x, x.bfloat16()):
            ours = fused(stock)(of)
            with use_backend("reference"):
                assert ours.dtype == stock(of).dtype


class Written(nn.Module):
    """Activations as functions, with and without settings, and a sum."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 3, 3, 1, 1), nn.BatchNorm2d(3)
        self.conv2, self.conv3 = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 2, 1)
        self.norm2, self.prelu = nn.BatchNorm2d(2), nn.PReLU()

    def forward(self, x):
        x = F.gelu(self.norm1(self.conv1(x)), approximate="tanh")
        x = F.elu(self.conv2(x), 1.0)
        skip = x
        x = self.prelu(self.norm2(self.conv3(x)))
        return skip + x


def test_functions_run_with_what_they_follow(device, monkeypatch):
    stock = Written().to(device)
    ours, blocks, run = copy.deepcopy(stock), [], functional.chain
    accelerate(ours)

    def counting(x, given, *args):
        blocks.append([b.activation for b in given])
        return run(x, given, *args)

    monkeypatch.setattr(functional, "chain", counting)
    assert_module(ours, stock, torch.randn(2, 2, 3, 4, device=device))
    assert blocks == [["gelu_tanh", "elu"], ["prelu"]]


def test_compiled(device):
    """Operators as far as an activation that PyTorch applies itself in a trace."""
    stock = Written().to(device)
    ours = copy.deepcopy(stock)
    accelerate(ours)
    ours.forward, graphs = compiled(ours.forward)
    assert_module(ours, stock, torch.randn(2, 2, 3, 4, device=device))
    graphs.assert_fused(blocks=3, chains=2)
    torch._dynamo.reset()
