"""Sums with what a block gives: where they run with it, and that the rest is Python's."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_module
from torch import nn

from genfast import accelerate, functional
from genfast import nn as blocks
from genfast.launch import tiles

pytestmark = pytest.mark.kernels

C = 3


class Block(nn.Module):
    """Layers for the forwards below; what is in `block` runs when the container is called."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(C, C, 3, 1, 1), nn.ConvTranspose2d(C, C, 4, 2, 1)
        self.down, self.norm = nn.Conv2d(C, C, 4, 2, 1), nn.BatchNorm2d(C)
        self.same = nn.Conv2d(C, C, 1)
        self.block = nn.Sequential(
            nn.ReLU(True), nn.Conv2d(C, C, 3, 1, 1), nn.InstanceNorm2d(C, affine=True)
        )
        self.relu, self.leaky = nn.ReLU(True), nn.LeakyReLU(0.3)


def of_container(self, x):
    x = x * 1.0
    return x + self.block(x)


def of_container_in_place(self, x):
    out = self.block(x * 1.0)
    out += x
    return out


def statements(self, x):
    identity = x
    out = self.down(x).relu()
    out = self.norm(self.conv2(out))
    out += identity
    out = self.relu(out)
    return out


def without_norm(self, x):
    h = self.conv2(F.relu(self.down(x)))
    return torch.tanh(x + h)


def alone(self, x):
    return self.conv1(x) + x


def before_what_keeps_its_input(self, x):
    h = self.norm(self.conv1(x))
    return self.leaky(h + x)


def of_two_calls(self, x):
    return F.relu(self.norm(self.conv1(x)) + self.same(x))


def of_two_chains(self, x):
    h = F.interpolate(x, scale_factor=2) + self.conv2(F.relu(x))
    h = self.leaky(h)
    return h * 2


@pytest.fixture
def sums(monkeypatch):
    """For each chain that could add whether it did, and its last activation."""
    found, run = [], functional.chain_and_sum

    def noting(x, given, added, leads, then):
        y, is_whole = run(x, given, added, leads, then)
        activation = then[0] if then else given[-1].activation
        found.append(activation if is_whole else None)
        return y, is_whole

    monkeypatch.setattr(functional, "chain_and_sum", noting)
    return found


def network(forward, device="cpu", memory_format=torch.channels_last, **members):
    """`Block` with this forward, stock and accelerated."""
    stock = type("Written", (Block,), {"forward": forward} | members)().to(device)
    stock = stock.to(memory_format=memory_format)
    used = {n for n in forward.__code__.co_names if n in dict(stock.named_children())}
    for name in {n for n, _ in stock.named_children()} - used:
        delattr(stock, name)
    ours = copy.deepcopy(stock)
    accelerate(ours)
    return stock, ours


def image(device="cpu", memory_format=torch.channels_last):
    return torch.randn(2, C, 4, 6, device=device).contiguous(memory_format=memory_format)


@pytest.mark.parametrize(("forward", "last"), [
    (of_container, "identity"), (of_container_in_place, None), (statements, "relu"),
    (without_norm, "tanh"), (alone, "identity"), (before_what_keeps_its_input, "identity"),
    (of_two_calls, "relu"), (of_two_chains, "identity"),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_sums_run_with_blocks(forward, last, device, sums):
    """Also when it is recorded and replayed; an instance norm's own output is contiguous."""
    stock, ours = network(forward, device)
    assert_module(ours, stock, image(device))
    assert sums == [last]
    assert ours(image(device)).stride() == stock(image(device)).stride()
    results = []
    for _ in range(3 if forward in (statements, without_norm) else 0):
        x = torch.linspace(-1, 1, 2 * C * 24, device=device).view(2, 4, 6, C).permute(0, 3, 1, 2)
        y = ours(x.requires_grad_())
        results.append([y, *torch.autograd.grad(y.square().sum(), x)])
    torch.testing.assert_close(results[-1:], results[:1], rtol=0, atol=0)


def test_in_evaluation(device, sums, started):
    """Of known statistics, and without gradients, the convolution's kernel does all of it."""
    stock, ours = network(statements, device)
    stock.eval(), ours.eval()
    assert_module(ours, stock, image(device))
    x = image(device)
    started.clear()
    with torch.no_grad():
        torch.testing.assert_close(ours(x), stock(x))
    assert started[-1] == "dgrad" and sums == ["relu", "relu"]


def test_products_of_the_library(device, sums, monkeypatch):
    monkeypatch.setattr(tiles, "gemm_config", lambda *_: tiles.LIBRARY)
    stock, ours = network(without_norm, device)
    assert_module(ours, stock, image(device))
    assert sums == ["tanh"]


def test_beside_images_and_logits(device, sums):
    """Kernels of their own, after which the sum is a pass."""
    for layer, size in ((nn.Conv2d(3, 16, 3, 1, 1), 4), (nn.ConvTranspose2d(4, 3, 4, 2, 1), 2)):
        stock = nn.Sequential(layer).to(device).to(memory_format=torch.channels_last)
        ours = blocks.FusedSequential(*copy.deepcopy(stock))
        x = torch.randn(2, layer.in_channels, size, size, device=device)
        other = torch.randn_like(stock(x).detach()).requires_grad_()
        y, is_whole = ours.forward_adding(x, other, nn.ReLU())
        torch.testing.assert_close(y, F.relu(stock(x) + other))
        assert is_whole


def test_second_derivatives(device, sums):
    stock, ours = network(without_norm, device)
    gradients = []
    for module in (stock, ours):
        x = torch.linspace(-1, 1, 2 * C * 24, device=device).sin().view(2, C, 4, 6)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        (dx,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        parameters = list(module.parameters())
        gradients.append(torch.autograd.grad(dx.square().sum(), [x, *parameters]))
    assert sums == ["tanh"]
    for expected, found in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


def test_only_what_is_added_wants_a_gradient(device):
    block = blocks.FusedSequential(nn.Conv2d(C, C, 3, 1, 1)).to(device).requires_grad_(False)
    block = block.to(memory_format=torch.channels_last)
    other = image(device).requires_grad_()
    y, is_whole = block.forward_adding(image(device), other, nn.ReLU())
    y.sum().backward()
    assert is_whole
    torch.testing.assert_close(other.grad, (y > 0).float())


def with_given(self, x, other):
    return self.conv1(x) + other


@pytest.mark.parametrize(
    "other",
    [
        2.0,
        torch.ones(C, 1, 1),
        torch.ones(1, C, 4, 6).double(),
        torch.ones(2, C, 4, 6),
        torch.ones(4, 2, C, 4, 6),
        torch.ones(2, C, 4, 6).bfloat16(),
    ],
    ids=["number", "broadcast", "double", "contiguous", "larger", "half"],
)
def test_other_sums_are_pythons(other, device, sums):
    other = other.to(device) if isinstance(other, torch.Tensor) else other
    stock, ours = network(with_given, device)
    x = image(device)
    y, expected = ours(x, other), stock(x, other)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y.float(), expected.float())
    assert y.stride() == expected.stride() and not any(sums)


class Summed(nn.Module):
    """Adds its input to what the layers make of it."""

    def __init__(self, *layers):
        super().__init__()
        self.block = nn.Sequential(*layers)

    forward = of_container


@pytest.mark.parametrize(
    "layers",
    [
        [
            nn.Upsample(scale_factor=2),
            nn.Conv2d(C, C, 3, 1, 1),
            nn.Conv2d(C, C, 1),
            nn.AvgPool2d(2),
        ],
        [nn.Conv2d(C, 4 * C, 1), nn.PixelShuffle(2), nn.ReLU(), nn.Conv2d(C, C, 2, 2)],
    ],
    ids=["up and down", "shuffled"],
)
def test_what_is_around_a_convolution_counts(layers, device):
    """Without it the output of the first would have the right size, and other values."""
    stock = Summed(*layers).to(device).to(memory_format=torch.channels_last)
    ours = copy.deepcopy(stock)
    accelerate(ours)
    x = image(device)
    torch.testing.assert_close(ours(x), stock(x))


@pytest.mark.parametrize("leads", [True, False])
@pytest.mark.parametrize("norm", [nn.InstanceNorm2d, nn.BatchNorm2d])
def test_blocks_that_reflect_add_too(norm, leads, device, sums):
    """Those of CycleGAN: padding by reflection parts the chain, whose last part adds."""
    # On a GPU PyTorch's gradients of reflection are added up by atomics.
    torch.use_deterministic_algorithms(True, warn_only=True)

    def first(self, x):
        return F.relu(x + self.block(x))

    def second(self, x):
        return F.relu(self.block(x) + x)

    layers = [nn.ReflectionPad2d(1), nn.Conv2d(C, C, 3), norm(C), nn.ReLU()]
    layers += [nn.ReflectionPad2d(1), nn.Conv2d(C, C, 3), norm(C)]
    kind = type("Reflecting", (Summed,), {"forward": first if leads else second})
    for memory_format in (torch.channels_last, torch.contiguous_format):
        stock = kind(*copy.deepcopy(layers)).to(device).to(memory_format=memory_format)
        ours = copy.deepcopy(stock)
        accelerate(ours)
        assert_module(ours, stock, image(device, memory_format))
        x = image(device, memory_format)
        assert ours(x).stride() == stock(x).stride()
    # After an instance norm PyTorch's memory is contiguous, and so is a sum that it leads; so it is
    # after a convolution of contiguous weights behind one.
    assert ("relu" in sums) is (leads or norm is nn.BatchNorm2d)
    stock = kind(nn.Conv2d(C, C, 1), nn.InstanceNorm2d(C), *layers[4:6], nn.BatchNorm2d(C))
    ours = copy.deepcopy(stock.to(device))
    accelerate(ours)
    x = image(device)
    torch.testing.assert_close(ours(x), stock(x))
    assert ours(x).stride() == stock(x).stride()


def test_autocast_promotes(device, sums):
    stock, ours = network(alone, device)
    x = image(device)
    with torch.autocast(device.type, torch.bfloat16):
        assert ours(x).dtype == stock(x).dtype == torch.float32
    assert not any(sums)


class Noting(nn.Module):
    """Notes its calls."""

    def __init__(self, log, name):
        super().__init__()
        self.log, self.name = log, name

    def forward(self, x):
        self.log.append(self.name)
        return x


def test_calls_keep_their_order(device, sums):
    log = []

    def forward(self, x):
        h = self.relu(self.norm(self.conv1(x)))
        return self.first(self.conv1(h)) + self.second(self.norm(h))

    stock, ours = network(forward, device)
    for module in (stock, ours):
        module.first, module.second = Noting(log, "first"), Noting(log, "second")
    x = image(device)
    torch.testing.assert_close(ours(x), stock(x))
    torch.testing.assert_close(ours.norm.running_mean, stock.norm.running_mean)
    assert log == ["first", "second"] * 2 and not sums


def test_a_sum_of_two_calls_within_another(device, sums):
    def forward(self, x):
        return torch.tanh(x) * 2 + self.norm(self.conv1(torch.tanh(x) + self.same(x)))

    stock, ours = network(forward, device)
    assert_module(ours, stock, image(device))
    assert sums == ["identity", "identity"]


def test_the_first_of_two_calls_is_first(device, sums):
    """All of it: its random numbers, and what it does to modules and values before the second."""

    def forward(self, x):
        h = F.dropout(self.changing(x), 0.5, True) + self.norm(self.conv1(F.dropout(x, 0.5, True)))
        return F.relu(self.down(h) + self.block(h)[..., ::2, ::2]) + self.down(x)

    class Changing(nn.Module):
        def forward(self, x):
            self.other[0].eval()
            return x.mul_(2)

    stock, ours = network(forward, device)
    results = []
    for module in (stock, ours):
        module.changing = Changing()
        module.changing.other = [module.norm]
        torch.manual_seed(0)
        y = module.train()(image(device) * 0 + 1)
        results.append((y, module.norm.num_batches_tracked))
    torch.testing.assert_close(*results)
    assert results[1][1] == 0 and len(sums) == 2 and None not in sums


def test_lists_within_one_another_keep_their_order(device):
    def forward(self, x):
        return self.conv1(x), [1] + self.given(self.given([2]) + self.given([3]))

    _, ours = network(forward, device)
    ours.given = nn.Identity()
    assert ours(image(device))[1] == [1, 2, 3]


def test_what_takes_a_sum_is_looked_up_as_python_does(device):
    """A function before the first of two calls, what it is given beside after both."""

    def counted(self, x):
        self.number += 1
        return x

    def forward(self, x):
        h = self.acts[self.number](self.counted(x) + self.conv1(x))
        return F.leaky_relu(self.counted(h) + self.same(h), self.number)

    members = dict(number=0, acts=(torch.tanh, torch.sin), counted=counted)
    stock, ours = network(forward, device, **members)
    x = image(device)
    torch.testing.assert_close(ours(x), stock(x))
    assert ours.number == stock.number == 2


def test_what_a_layer_is_given_beside_is_looked_up_when_it_is_called(device):
    def counted(self, x):
        self.number += 1
        return x

    def one(self, x):
        return F.leaky_relu(self.conv1(self.counted(x)), negative_slope=self.number)

    def two(self, x):
        h = F.leaky_relu(self.same(self.counted(self.conv1(x))), self.number)
        h = F.leaky_relu(self.counted(self.same(h)), self.number)
        return F.leaky_relu(self.same(h) + self.counted(self.conv1(x)), self.number)

    for forward in (one, two):
        stock, ours = network(forward, device, number=0, counted=counted)
        x = image(device)
        torch.testing.assert_close(ours(x), stock(x))
        assert ours.number == stock.number > 0


def test_in_place_changes_what_others_hold(device):
    def kept(self, x):
        h = self.conv1(x)
        kept = h
        h += x
        return kept

    def given(self, x):
        out = self.same(self.relu(x))
        out += x
        return self.conv1(out)

    for forward in (kept, given):
        stock, ours = network(forward, device)
        for module in (stock, ours):
            module.same = nn.Identity()
        xs = [image(device) for _ in range(2)]
        xs[1].copy_(xs[0])
        torch.testing.assert_close(ours(xs[0]), stock(xs[1]))
        torch.testing.assert_close(*xs, rtol=0, atol=0)


def test_hooks_see_the_container(device, sums):
    stock, ours = network(of_container, device)
    seen = []
    ours.block.register_forward_hook(lambda module, args, out: seen.append(out))
    x = image(device)
    torch.testing.assert_close(ours(x), stock(x))
    assert len(seen) == 1 and not any(sums)
