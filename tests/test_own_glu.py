"""Gated linear units that people wrote themselves: which are seen, and that they run fused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_module
from own_layers import Sliced
from torch import nn

from genfast import accelerate, own_glu


class ByShape(nn.Module):
    def forward(self, images):
        """Halves by their number."""
        half = images.shape[1] // 2
        a, b = images[:, 0:half, :, :], images[:, half : images.shape[1], ...]
        return b.sigmoid() * a


class Chunked(nn.Module):
    def forward(self, x):
        out, gate = x.chunk(2, dim=1)
        return torch.mul(out, F.sigmoid(gate))


class Split(nn.Module):
    def forward(self, x):
        halves = torch.split(x, x.size()[1] // 2, dim=1)
        return halves[0] * torch.nn.functional.sigmoid(halves[1])


class Named(nn.Module):
    def forward(self, x):
        return F.glu(x, dim=1)


class Swapped(nn.Module):
    def forward(self, x):
        a, b = x.chunk(2, 1)
        return torch.sigmoid(a) * b


class OfWidths(nn.Module):
    def forward(self, x):
        a, b = x.chunk(2, 3)
        return a * torch.sigmoid(b)


class Third(nn.Module):
    def forward(self, x):
        n = x.size(1) // 3
        return x[:, :n] * torch.sigmoid(x[:, n:])


class Tanh(nn.Module):
    def forward(self, x):
        a, b = x.chunk(2, 1)
        return a * torch.tanh(b)


class Scaled(nn.Module):
    def forward(self, x):
        a, b = x.chunk(2, 1)
        return 2 * a * torch.sigmoid(b)


class Both(nn.Module):
    def forward(self, x):
        nc = x.size(1) // 2
        return x[:, :nc] * torch.sigmoid(x[:, :nc])


class Stepped(nn.Module):
    def forward(self, x):
        nc = x.size(1) // 2
        return x[:, :nc:2] * torch.sigmoid(x[:, nc:])


class Cropped(nn.Module):
    def forward(self, x):
        nc = x.size(1) // 2
        return x[:, :nc, 1:] * torch.sigmoid(x[:, nc:, 1:])


class Counting(nn.Module):
    def forward(self, x):
        self.count = 1
        a, b = x.chunk(2, 1)
        return a * torch.sigmoid(b)


class Last(nn.Module):
    def forward(self, x):
        return F.glu(x)


class Asking(nn.Module):
    def forward(self, x):
        assert x.size(1) % 4 == 0
        a, b = x.chunk(2, 1)
        return a * torch.sigmoid(b)


class Optional(nn.Module):
    def forward(self, x, scale=None):
        a, b = x.chunk(2, 1)
        return a * torch.sigmoid(b)


class Shadowed(nn.Module):
    def forward(self, x):
        return sigmoid_of_mine(x)


def sigmoid_of_mine(x):
    a, b = x.chunk(2, 1)
    return a * torch.sigmoid(b)


SEEN = Sliced, ByShape, Chunked, Split, Named
OTHERS = (
    Swapped, OfWidths, Third, Tanh, Scaled, Both, Stepped, Cropped, Counting, Last, Asking,
    Optional, Shadowed, nn.ReLU, nn.Identity,
)  # fmt: skip


def block(kind, channels=6):
    torch.manual_seed(0)
    layers = nn.Conv2d(3, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), kind()
    return nn.Sequential(*layers, nn.Conv2d(channels // 2, 3, 1))


def plan(network):
    return [run.layers for run in network.plan()]


@pytest.mark.parametrize("kind", SEEN)
def test_what_is_one_runs_with_the_norm_before_it(kind, device):
    stock = block(kind).to(device).to(memory_format=torch.channels_last)
    ours = copy.deepcopy(stock)
    accelerate(ours)
    assert plan(ours) == [f"Conv2d + BatchNorm2d + {kind.__name__}", "Conv2d"]
    x = torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last)
    assert_module(ours, stock, x)
    called = []
    ours[2].register_forward_hook(lambda *_: called.append(1))
    ours(x)
    assert called == [1]


@pytest.mark.parametrize("kind", OTHERS)
def test_what_is_another_is_called(kind):
    accelerate(nn.Sequential(kind()))
    assert not own_glu.is_found(kind)


def test_a_class_that_is_changed_is_called():
    kind = type("Changed", (nn.Module,), {"forward": Chunked.forward})
    network = block(kind)
    accelerate(network)
    assert plan(network)[0] == "Conv2d + BatchNorm2d + Changed"
    kind.forward = Tanh.forward
    assert plan(network)[:2] == ["Conv2d + BatchNorm2d", "Changed"]


def test_called_in_a_forward_of_ones_own(device):
    class Up(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.glu = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), Sliced()

        def forward(self, x):
            return self.glu(self.bn(self.conv(x)))

    stock = Up().to(device)
    ours = copy.deepcopy(stock)
    (entry,) = accelerate(ours)
    assert entry.fused and entry.layers == "Conv2d + BatchNorm2d + Sliced"
    assert_module(ours, stock, torch.randn(2, 3, 4, 5, device=device))


def test_channels_without_halves_are_left_to_it():
    network = block(Chunked, 5)
    accelerate(network)
    assert plan(network)[:2] == ["Conv2d + BatchNorm2d", "Chunked"]
    assert "Chunked '2' stays out: 5 channels have no halves" in network.plan()[0].reason
    one = nn.Sequential(nn.Conv2d(3, 4, 1), Chunked())
    accelerate(one)
    assert "without a norm before it" in one.plan()[0].reason
