"""Dropout between chains: PyTorch's own, so that a seed gives what it gives on PyTorch's layers."""

import copy

import pytest
import torch
from oracle import assert_close
from torch import nn

from genfast import accelerate, functional

pytestmark = pytest.mark.kernels


class Written(nn.Module):
    """A layer of the second chain in a forward of its own."""

    def __init__(self, first, conv):
        super().__init__()
        self.first, self.conv = first, conv
        self.drop, self.act = nn.Dropout2d(0.25), nn.LeakyReLU(0.2)

    def forward(self, x):
        return self.drop(self.act(self.conv(self.first(x))))


def network():
    first = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
    return Written(first, nn.Conv2d(4, 5, 1))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_same_seed_same_masks(layout, device, monkeypatch):
    """Whatever fuses around them, and in the order of memory that PyTorch's layers would see."""
    stock = network().to(device, memory_format=layout)
    ours, blocks, run = copy.deepcopy(stock), [], functional.chain

    def counting(x, given, *args):
        blocks.append([b.activation for b in given])
        return run(x, given, *args)

    monkeypatch.setattr(functional, "chain", counting)
    lines = str(accelerate(ours))
    assert "fused; Dropout 'first.3' stays out: its random numbers are PyTorch's own" in lines
    assert "fused; Dropout2d 'drop' stays out: its random numbers are PyTorch's own" in lines
    x, dy = torch.randn(3, 2, 4, 2, device=device), torch.randn(3, 5, 4, 2, device=device)
    results = []
    for module in (ours, stock, copy.deepcopy(stock).double()):
        torch.manual_seed(5)
        leaf = x.to(module.conv.weight.dtype, copy=True).requires_grad_()
        y = module(leaf)
        wanted = dict(module.named_parameters()) | {"x": leaf}
        gradients = torch.autograd.grad(y, wanted.values(), dy.to(y.dtype))
        named = {f"gradient of {n}": g for n, g in zip(wanted, gradients, strict=True)}
        results.append({"output": y.detach(), **named})
    found, eager, exact = results
    assert blocks == [["relu"], ["leaky_relu"]]
    assert torch.equal(found["output"] == 0, eager["output"] == 0)
    assert_close(found, exact, [(eager, exact)])
    ours.eval(), stock.eval(), blocks.clear()
    torch.testing.assert_close(ours(x), stock(x))
    assert blocks == [["relu", "leaky_relu"]]  # Nothing is between them then.
