"""Networks whose `forward` is their own: what fuses there, and that all else stays theirs."""

import argparse
import copy
import functools
import inspect
import io
import json.decoder
import pickle
import random
import re
import textwrap
import threading
import traceback
import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_module
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm
from torch.utils.checkpoint import checkpoint

import genfast
from genfast import accelerate, calls, functional, restore, use_backend
from genfast.models import weights_init
from genfast.nn import statistics_groups
from genfast.source import source_of

pytestmark = pytest.mark.kernels


class Generator(nn.Module):
    """A DCGAN's generator, layer by layer."""

    def __init__(self):
        super().__init__()
        self.deconv1 = nn.ConvTranspose2d(3, 6, 3, 1, 0, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.deconv2 = nn.ConvTranspose2d(6, 4, 4, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4)
        self.deconv3 = nn.ConvTranspose2d(4, 1, 3, 1, 1)

    def forward(self, z):
        x = F.relu(self.bn1(self.deconv1(z)))
        x = F.relu(self.bn2(self.deconv2(x)), inplace=True)
        return torch.tanh(self.deconv3(x))


class Residual(nn.Module):
    """A block as image-to-image networks have them, with what they make optional."""

    def __init__(self, channels, norm):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.norm1 = self.norm2 = None
        if norm:
            self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.act = nn.LeakyReLU(0.2)

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        if self.norm1 is not None:
            out = self.norm1(out)
        out = self.act(out)
        out = self.conv2(out)
        if self.norm2:
            out = self.norm2(out)
        out += identity
        return out


class Translator(nn.Module):
    """Residual blocks within convolutions."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(2, 4, 3, 2, 1)
        self.blocks = nn.ModuleList([Residual(4, True), Residual(4, False)])
        self.up = nn.ConvTranspose2d(4, 2, 4, 2, 1)

    def forward(self, x):
        x = self.down(x).relu()
        for block in self.blocks:
            x = block(x)
        return self.up(x).tanh()


class Normalised(nn.Module):
    """A residual block of a discriminator with spectral norm and one activation for all."""

    def __init__(self, norm):
        super().__init__()
        self.activation = nn.ReLU()
        self.c1 = norm(nn.Conv2d(2, 4, 3, 1, 1))
        self.c2 = norm(nn.Conv2d(4, 4, 3, 1, 1))
        self.c_sc = norm(nn.Conv2d(2, 4, 1, 1, 0))

    def shortcut(self, x):
        return F.avg_pool2d(self.c_sc(x), 2)

    def residual(self, x):
        h = x
        h = self.activation(h)
        h = self.c1(h)
        h = self.activation(h)
        h = self.c2(h)
        return F.avg_pool2d(h, 2)

    def forward(self, x):
        return self.residual(x) + self.shortcut(x)


class UNet(nn.Module):
    """Convolutions whose outputs are used again further up."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 3, 4, 2, 1), nn.Conv2d(3, 4, 4, 2, 1)
        self.deconv2, self.deconv1 = (
            nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.ConvTranspose2d(6, 2, 4, 2, 1),
        )  # fmt: skip
        self.norm2, self.dnorm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(3)
        self.relu = nn.ReLU()

    def forward(self, x):
        e1 = self.conv1(x)
        e2 = self.norm2(self.conv2(F.leaky_relu(e1, 0.2)))
        d2 = self.dnorm2(self.deconv2(self.relu(e2)))
        d2 = torch.cat([d2, e1], 1)
        return torch.tanh(self.deconv1(self.relu(d2)))


NETWORKS = {
    # What makes it, its input, and the numbers of blocks in the chains that run.
    "generator": (Generator, (2, 3, 1, 1), [3]),
    "translator": (Translator, (2, 2, 6, 4), [1, 2, 2, 1]),
    "spectral norm": (lambda: Normalised(parametrizations.spectral_norm), (2, 2, 4, 4), [2, 1]),
    "spectral norm by hook": (lambda: Normalised(spectral_norm), (2, 2, 4, 4), [2, 1]),
    "u-net": (UNet, (2, 2, 8, 4), [1, 2, 1]),
}


@pytest.fixture
def chains(monkeypatch):
    """The numbers of blocks of the chains that run."""
    found, run, run_and_add = [], functional.chain, functional.chain_and_sum

    def counting(x, blocks, *args):
        found.append(len(blocks))
        return run(x, blocks, *args)

    def counting_sums(x, blocks, *args):
        before = len(found)
        y = run_and_add(x, blocks, *args)
        if len(found) == before:  # Else it was a chain without the sum.
            found.append(len(blocks))
        return y

    monkeypatch.setattr(functional, "chain", counting)
    monkeypatch.setattr(functional, "chain_and_sum", counting_sums)
    return found


def _looks(model):
    return [(type(m), list(vars(m))) for m in model.modules()]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_run_fused(name, training, device, chains):
    make, shape, sizes = NETWORKS[name]
    stock = make().to(device).train(training)
    model = copy.deepcopy(stock)
    keys, parameters = list(model.state_dict()), list(map(id, model.parameters()))
    report = accelerate(model)
    assert all(entry.fused for entry in report)
    assert not any(entry.container for entry in report)
    assert list(model.state_dict()) == keys
    assert list(map(id, model.parameters())) == parameters
    assert (repr(model), type(model).__name__) == (repr(stock), type(stock).__name__)
    assert isinstance(model, type(stock))
    assert_module(model, stock, torch.randn(shape, device=device))
    assert chains == sizes
    restore(model)
    assert _looks(model) == _looks(stock)


@pytest.mark.parametrize("name", NETWORKS)
def test_on_a_cpu_the_layers_run_themselves(name, chains, monkeypatch):
    make, shape, _ = NETWORKS[name]
    stock = make()
    model = copy.deepcopy(stock)
    accelerate(model)
    monkeypatch.setattr("genfast.nn.kernels_run_on_cpu", lambda: False)
    monkeypatch.setattr("genfast.cpu.may_gain", lambda layer, x: False)
    x = torch.randn(shape)
    assert torch.equal(model(x), stock(x))
    assert not chains


class Layers(nn.Module):
    """Some layers; what calls them is given."""

    def __init__(self):
        super().__init__()
        self.conv, self.other = nn.Conv2d(2, 2, 3, 1, 1), nn.Conv2d(2, 2, 3, 1, 1)
        self.norm, self.act = nn.BatchNorm2d(2), nn.ReLU()
        self.layers = nn.ModuleList([nn.Conv2d(2, 2, 1), nn.Sigmoid(), nn.Conv2d(2, 2, 1)])
        self.flag, self.slope, self.calls = True, 0.3, 0


def _network(forward, device="cpu", **members):
    """`Layers` with this forward, accelerated, and a stock copy."""
    stock = type("Written", (Layers,), {"forward": forward} | members)().to(device)
    model = copy.deepcopy(stock)
    accelerate(model)
    return model, stock


def one_line(self, x):
    return self.act(self.norm(self.conv(x)))


def names_of_their_own(self, x):
    h1 = self.conv(x)
    h2 = self.norm(h1)
    h3 = F.leaky_relu(h2, negative_slope=self.slope)
    y = self.other(h3)
    return y


def used_again(self, x):
    h = self.conv(x)
    y = self.act(h)
    return y + h


def of_another_variable(self, x):
    h = self.conv(x)
    y = self.act(x)
    return y + h


def used_again_by_an_assignment(self, x):
    h = self.conv(x)
    y = self.act(h)
    h += 1
    return y


def kept_by_a_function(self, x):
    h = self.conv(x)
    y = self.act(h)
    return (lambda: y + h)()


def read_by_a_function(self, x):
    def add(value):
        return value + x

    x = self.conv(x)
    x = add(x)
    return x


def seen_by_locals(self, x):
    h = self.conv(x)
    y = self.act(h)
    return y + locals()["h"]


def deleted(self, x):
    h = self.conv(x)
    y = self.act(h)
    del h
    return y


def in_a_handler(self, x):
    try:
        x = self.conv(x)
        x = self.act(x)
        x = self.no_such_layer(x)
    except AttributeError:
        return x


def with_an_else(self, x):
    x = self.conv(x)
    if not self.flag:  # noqa: SIM108
        x = self.act(x)
    else:
        x = self.norm(self.other(x))
    x = self.norm(x) if self.slope > 1 else x
    return self.other(x)


def with_more_in_a_branch(self, x):
    x = self.conv(x)
    if self.flag:
        x = self.act(x)
        self.calls += 1
    return self.other(x)


def condition_on_the_value(self, x):
    x = self.conv(x)
    if x.mean() > 100:
        x = self.norm(x)
    return self.act(x)


def loop_over_layers(self, x):
    for layer in self.layers:
        x = layer(x)
    for layer in reversed(self.layers):
        x = layer(x)
    return self.act(x)


def loop_whose_variable_is_used(self, x):
    for layer in self.layers:
        x = layer(x)
    return layer(x)


def loop_over_pairs(self, x):
    for conv, norm in zip([self.conv, self.other], [self.norm, self.norm], strict=True):
        x = norm(conv(x)).relu()
    return x


def by_number(self, x):
    for i in (0, 2):
        x = torch.sigmoid(self.layers[i](x))
    return x


def by_attribute_name(self, x):
    for name in ("conv", "other"):
        x = self.act(getattr(self, name)(x))
    return x


def twice(self, x):
    x = self.act(self.conv(x))
    x = self.act(self.conv(x))
    return self.norm(self.other(self.norm(self.conv(x))))


def goes_on_within_a_sum(self, x):
    h = self.conv(x)
    h = self.act(h)
    return self.norm(self.other(h)) * 2 + x


def order_of_a_sum(self, x):
    h = self.conv(x)
    return F.dropout(x, 0.5, True) + self.act(h)


def in_place_after_the_convolution(self, x):
    h = self.conv(x)
    h += x
    h = self.other(h)
    h.mul_(2)
    y = self.norm(h)
    y.add_(1)
    return y


@pytest.mark.float64
@pytest.mark.parametrize(
    ("forward", "sizes"),
    [
        (one_line, [1]),
        (names_of_their_own, [2]),
        (used_again, [1]),
        (of_another_variable, [1]),
        (used_again_by_an_assignment, [1]),
        (kept_by_a_function, [1]),
        (read_by_a_function, [1]),
        (seen_by_locals, [1]),
        (deleted, [1]),
        (in_a_handler, [1]),
        (with_an_else, [2, 1]),
        (with_more_in_a_branch, [1, 1]),
        (condition_on_the_value, [1]),
        (loop_over_layers, [2, 2]),
        (loop_whose_variable_is_used, [1, 1, 1]),
        (loop_over_pairs, [1, 1]),
        (by_number, [1, 1]),
        (by_attribute_name, [1, 1]),
        (twice, [1, 1, 2]),
        (goes_on_within_a_sum, [2]),
        (order_of_a_sum, [1]),
        (in_place_after_the_convolution, [1, 1]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
@pytest.mark.parametrize("channels_last", [True, False])
def test_what_runs_together(forward, sizes, channels_last, device, chains):
    model, stock = _network(forward, device)
    x = torch.randn(2, 2, 5, 4, device=device, dtype=torch.float64)
    model, stock = model.double(), stock.double()
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
        model, stock = (m.to(memory_format=torch.channels_last) for m in (model, stock))
    results = []
    for network in (model, stock):
        torch.manual_seed(3)
        leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = network(leaf)
        y.square().sum().backward()
        grads = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
        results.append([y, leaf.grad, grads, network.state_dict()])
    torch.testing.assert_close(*results)
    assert results[0][0].stride() == results[1][0].stride()
    assert chains == sizes


@pytest.mark.float64
@pytest.mark.parametrize("norm", [nn.InstanceNorm2d(2, affine=True), nn.GroupNorm(1, 2)])
def test_norms_alone_and_after_convolutions(norm, device, chains, started):
    def forward(self, x):
        x = F.leaky_relu(self.norm(x), 0.2)
        return self.act(self.norm(self.conv(F.avg_pool2d(x, 2))))

    stock = type("Written", (Layers,), {"forward": forward})()
    stock.norm = copy.deepcopy(norm)
    stock = stock.to(device, torch.float64)
    model = copy.deepcopy(stock)
    accelerate(model)
    x = torch.randn(2, 2, 6, 4, device=device, dtype=torch.float64)
    torch.testing.assert_close(model(x), stock(x))
    assert chains == [1]
    assert len(started) > 3  # Those of the norm alone too.


class Everything(nn.Module):
    """A forward that depends on all that a trace would freeze, and leaves traces of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3, 1, 1), nn.BatchNorm2d(4)
        self.down, self.up = nn.Conv2d(4, 4, 3, 2, 1), nn.ConvTranspose2d(4, 4, 2, 2)
        self.scale, self.calls, self.kept, self.log = 1.0, 0, None, []

    def forward(self, x, *others, mode="plain", noise=None, **options):
        self.calls += 1
        x = F.relu(self.norm(self.conv(x)))
        if self.training:
            x = F.dropout(x, 0.5) * random.random()
        if x.shape[-1] > 4:
            x = self.up(F.leaky_relu(self.down(x), self.scale))
        self.kept = self.conv(x[:, :2])
        self.log.append(tuple(self.kept.shape))
        if self.kept.mean() > 0:
            x = x + self.kept
        for other in others:
            x = x + self.conv(other)
        if noise is not None:
            x = x + noise
        if mode == "frozen":
            with torch.no_grad():
                return {"y": torch.tanh(self.conv(x[:, :2])), "options": options}
        with torch.autocast(x.device.type, torch.bfloat16):
            half = torch.tanh(self.conv(x[:, :2]))
        return half, [x, self.calls]


def _outcome(network, *args, **kwargs):
    random.seed(0)
    torch.manual_seed(0)
    network.zero_grad()
    out = network(*args, **kwargs)
    if isinstance(out, tuple):
        out[1][0].square().sum().backward()
    else:
        assert not out["y"].requires_grad
    grads = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    return [out, grads, network.state_dict(), network.kept, network.calls, network.log]


@pytest.mark.float64
def test_nothing_is_frozen(device, chains):
    stock = Everything().to(device, torch.float64)
    model = copy.deepcopy(stock)
    assert all(entry.fused for entry in accelerate(model))
    small, large = (torch.randn(2, 2, 4, n, device=device, dtype=torch.float64) for n in (4, 6))
    settings = [
        (True, 1.0, (small,), {}),
        (False, 1.0, (large,), {}),
        (True, 0.3, (large, large + 1), {"noise": 0.5}),
        (False, 0.7, (small,), {"mode": "frozen", "other": 3}),
        (True, 0.7, (large,), {"mode": "frozen"}),
    ]
    for training, scale, args, kwargs in settings:
        chains.clear()
        for network in (model, stock):
            network.train(training).scale = scale
        ours, expected = (_outcome(network, *args, **kwargs) for network in (model, stock))
        torch.testing.assert_close(ours, expected)
        assert len(chains) >= 3
    model.scale = -1.0  # Which only PyTorch's activation takes.
    stock.scale = -1.0
    torch.testing.assert_close(_outcome(model, large), _outcome(stock, large))


def test_what_a_layer_does_to_its_owner_is_seen_by_the_next_statement(device):
    def forward(self, x):
        x = self.conv(x)
        x = self.norm(x)
        if self.flag:
            x = self.act(x)
        return self.other(x)

    model, stock = _network(forward, device)
    for network in (model, stock):

        def swap(module, args, output, network=network):
            network.flag = not network.flag
            network.other = network.layers[2]

        network.norm.register_forward_hook(swap)
    x = torch.randn(2, 2, 5, 4, device=device)
    for _ in range(2):
        torch.testing.assert_close(model(x), stock(x))


def _changed(change):
    def hook(network):
        network.norm.register_forward_hook(lambda module, inputs, output: output * 2)

    def pre_hook(network):
        network.conv.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))

    def replaced(network):
        network.conv = nn.Sequential(nn.Identity(), network.other)

    def frozen(network):
        network.conv.requires_grad_(False)
        network.norm.eval()

    def of_the_layer(network):
        network.conv.forward = lambda x: x * 3

    def of_the_network(network):
        network.forward = lambda x: network.conv(x) * 5

    def of_the_class(network):
        cls = type(network)
        cls = vars(cls).get("_genfast_rewritten_from", cls)
        cls.forward = lambda self, x: self.conv(x) * 7

    def function(network):
        del network.act
        network.act = torch.tanh

    def dtype(network):
        network.double()

    def spectral(network):
        torch.manual_seed(0)
        parametrizations.spectral_norm(network.conv)

    return locals()[change]


@pytest.mark.float64
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "change",
    ["hook", "pre_hook", "replaced", "frozen", "of_the_layer", "of_the_network", "of_the_class",
     "function", "dtype", "spectral"],
)  # fmt: skip
def test_changes_before_and_after(change, before, device):
    networks = []
    for accelerated in (True, False):
        torch.manual_seed(1)
        network = type("Written", (Layers,), {"forward": one_line})().to(device)
        if before:
            _changed(change)(network)
        if accelerated:
            accelerate(network)
        if not before:
            _changed(change)(network)
        networks.append(network)
    dtype = torch.float64 if change == "dtype" else torch.float32
    x = torch.randn(2, 2, 5, 4, device=device, dtype=dtype)
    for _ in range(2):
        torch.testing.assert_close(*(network(x) for network in networks))
    torch.testing.assert_close(*(network.state_dict() for network in networks))
    restore(networks[0])
    torch.testing.assert_close(*(network(x) for network in networks))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_layer_that_is_torchscript(device):
    stock = Residual(3, True).to(device)
    stock.norm1 = torch.jit.script(stock.norm1)
    model = copy.deepcopy(stock)
    accelerate(model)
    x = torch.randn(2, 3, 5, 4, device=device)
    torch.testing.assert_close(model(x), stock(x))


def test_hooks_for_all_modules_see_all_calls(device):
    stock = Generator().to(device)
    model = copy.deepcopy(stock)
    accelerate(model)
    x, seen = torch.randn(2, 3, 1, 1, device=device), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.append(type(module).__name__)
    )
    try:
        torch.testing.assert_close(model(x), stock(x))
    finally:
        handle.remove()
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :]
    assert "ReLU" not in seen


def test_a_latent_that_is_a_parameter_and_what_is_no_image(device, chains):
    model, stock = _network(one_line, device)
    x = nn.Parameter(torch.randn(2, 2, 5, 4, device=device))
    torch.testing.assert_close(model(x), stock(x))
    assert chains == [1]
    for network in (model, stock):  # Batch norm takes batches, a convolution single images too.
        with pytest.raises(ValueError, match="expected 4D input"):
            network(x[0])


@pytest.mark.float64
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(reentrant, device):
    stock = Residual(3, True).to(device, torch.float64)
    model = copy.deepcopy(stock)
    accelerate(model)
    x = torch.randn(2, 3, 5, 4, device=device, dtype=torch.float64, requires_grad=True)
    results = []
    for network in (model, stock):
        checkpoint(network, x, use_reentrant=reentrant).square().sum().backward()
        results.append([x.grad, [p.grad for p in network.parameters()], network.state_dict()])
        x.grad = None
    torch.testing.assert_close(*results)


def test_functional_calls_and_transforms(device):
    stock = Generator().to(device, torch.float64)
    model = copy.deepcopy(stock)
    accelerate(model)
    z = torch.randn(2, 3, 1, 1, device=device, dtype=torch.float64)
    other = {name: p.detach() + 0.1 for name, p in stock.named_parameters()}
    with use_backend("auto"):
        torch.testing.assert_close(
            *(torch.func.functional_call(network, other, (z,)) for network in (model, stock))
        )
        results = []
        for network in (model.eval(), stock.eval()):

            def loss(parameters, network=network):
                return torch.func.functional_call(network, parameters, (z,)).square().sum()

            results.append(torch.func.grad(loss)(other))
    torch.testing.assert_close(*results)


@pytest.mark.float64
@pytest.mark.one_in(3)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_networks_keep_the_kernels(name, training, device):
    make, shape, sizes = NETWORKS[name]
    stock = make().to(device, torch.float64).train(training)
    model = copy.deepcopy(stock)
    accelerate(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    x = torch.randn(shape, device=device, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = torch.compile(model, backend=backend, fullgraph=True)(x)
    torch.testing.assert_close(y, stock(x))
    torch.testing.assert_close(model.state_dict(), stock.state_dict())
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("genfast" in target for target in targets) == len(sizes)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["export", "strict export", "trace", "fx"])
def test_what_reads_the_forward_reads_the_users(how, device, chains):
    stock = UNet().to(device).eval()
    model = copy.deepcopy(stock)
    accelerate(model)
    x = torch.randn(2, 2, 8, 4, device=device)
    with use_backend("auto"):
        if how == "trace":
            made = torch.jit.trace(model, x)
        elif how == "fx":
            made = torch.fx.symbolic_trace(model)
        else:
            made = torch.export.export(model, (x,), strict=how == "strict export").module()
        torch.testing.assert_close(made(x), stock(x))
    if how != "fx":  # What it gives calls the layers; and tracing runs the model as it is, too.
        assert how == "trace" or not chains
        assert "genfast" not in str(made.graph if how == "trace" else made)


@pytest.mark.parametrize("why", ["exporting", "tracing", "reference"])
def test_where_the_users_own_forward_runs(why, device, monkeypatch):
    model, _ = _network(one_line, device)
    stacks = []

    def forward(x):
        stacks.append([frame.filename for frame in traceback.extract_stack()])
        return x

    model.act.forward = forward
    x = torch.randn(2, 2, 5, 4, device=device)
    model(x)
    monkeypatch.setattr(torch.compiler, "_is_exporting_flag", why == "exporting")
    monkeypatch.setattr(torch.jit, "is_tracing", lambda: why == "tracing")
    with use_backend("reference" if why == "reference" else "auto"):
        model(x)
    fused, own = stacks
    assert calls.__file__ in fused
    assert calls.__file__ not in own


def test_threads_share_a_network(device, monkeypatch):
    # Triton's interpreter is one for all threads.
    lock, run = threading.Lock(), functional.chain

    def one_at_a_time(*args):
        with lock:
            return run(*args)

    monkeypatch.setattr(functional, "chain", one_at_a_time)
    stock = Translator().to(device).eval()
    model = copy.deepcopy(stock)
    accelerate(model)
    x = torch.randn(2, 2, 6, 4, device=device)
    expected, found = stock(x), []
    replicas = [model._replicate_for_data_parallel() for _ in range(3)]
    for replica in replicas:
        replica._parameters = model._parameters
    threads = [threading.Thread(target=lambda r=r: found.append(r(x))) for r in replicas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(found, [expected] * 3)


@pytest.mark.float64
@pytest.mark.parametrize("name", NETWORKS)
def test_copies_and_pickles(name, device, chains):
    make, shape, sizes = NETWORKS[name]
    stock = make().to(device, torch.float64).eval()
    model = copy.deepcopy(stock)
    accelerate(model)
    x = torch.randn(shape, device=device, dtype=torch.float64)
    twins = [copy.deepcopy(model)]
    if name != "spectral norm":  # PyTorch refuses to pickle parametrised modules.
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twins += pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)
    for twin in twins:
        chains.clear()
        assert type(twin) is type(model)
        torch.testing.assert_close(twin(x), stock(x))
        assert chains == sizes
        restore(twin)
        assert _looks(twin) == _looks(stock)


class Built(Layers):
    """Says itself how it is pickled."""

    forward = one_line

    def __reduce__(self):
        return type(self), (), self.__dict__


def _instance(cls):
    return cls()


class BuiltByAFunction(Built):
    def __reduce__(self):
        return _instance, (type(self),), self.__dict__


@pytest.mark.parametrize("cls", [Built, BuiltByAFunction])
def test_a_class_that_pickles_itself(cls):
    model = cls()
    accelerate(model)
    assert type(model) is not cls
    twin = pickle.loads(pickle.dumps(model))
    assert type(twin) is cls
    torch.testing.assert_close(twin.state_dict(), model.state_dict())


def test_weights_init_of_dcgans():
    model = Generator()
    accelerate(model)
    model.apply(weights_init)
    assert 0.01 < model.deconv1.weight.std() < 0.03


@pytest.mark.float64
def test_statistics_of_groups(device):
    model = Generator().to(device, torch.float64)
    apart = copy.deepcopy(model)
    accelerate(model)
    parts = torch.randn(2, 3, 3, 1, 1, device=device, dtype=torch.float64)
    with statistics_groups(model, 2):
        y = model(torch.cat(list(parts)))
    torch.testing.assert_close(y, torch.cat([apart(part) for part in parts]))
    torch.testing.assert_close(model.state_dict(), apart.state_dict())


def raises(self, x):
    x = self.conv(x)
    x = self.norm(x)
    x = self.layers.missing(x)
    return x


def test_an_error_is_reported_in_the_users_lines(device):
    model, _ = _network(raises, device)
    with pytest.raises(AttributeError) as caught:
        model(torch.randn(2, 2, 5, 4, device=device))
    lines = traceback.extract_tb(caught.value.__traceback__)
    assert any(f.filename == __file__ and "self.layers.missing(x)" in f.line for f in lines)
    with pytest.raises(ValueError, match="expected x with 2 channels") as caught:
        model(torch.randn(2, 7, 5, 4, device=device))
    lines = traceback.extract_tb(caught.value.__traceback__)
    assert any(f.filename == __file__ and "x = self.conv(x)" in f.line for f in lines)


def decorate(function):
    @functools.wraps(function)
    def inner(*args):
        return function(*args)

    return inner


class Decorated(Layers):
    @decorate
    def forward(self, x):
        return self.act(self.conv(x))


class Base(Layers):
    def head(self, x):
        return self.norm(self.conv(x))

    def forward(self, x):
        return self.act(self.head(x))


class Derived(Base):
    __slots__ = ()

    def forward(self, x):
        x = super().forward(x)
        return self.__private(self.other(x))

    def __private(self, x):
        return self.act(self.conv(x))


class Registering(Layers):
    def __init_subclass__(cls, key, **options):
        super().__init_subclass__(**options)

    forward = one_line


def _without_source():
    names = {"Layers": Layers}
    exec("class Typed(Layers):\n    def forward(self, x):\n        return self.conv(x)", names)
    return names["Typed"]()


def _changed_file():
    def forward(self, x):
        return self.act(self.conv(x))

    code = forward.__code__
    forward.__code__ = code.replace(co_names=tuple(n.replace("act", "norm") for n in code.co_names))
    return type("Changed", (Layers,), {"forward": forward})()


LEFT_ALONE = {
    "decorated": (Decorated, "Decorated.forward is no plain Python function"),
    "no source": (_without_source, "the source of Typed.forward is not at hand"),
    "changed": (_changed_file, "is not what runs"),
    "no subclass": (Registering, "Registering allows no subclass"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_left_alone(name, device, chains):
    make, reason = LEFT_ALONE[name]
    stock = make().to(device)
    model = copy.deepcopy(stock)
    report = accelerate(model)
    assert not report[0].fused
    assert re.search(reason, report[0].reason), report[0].reason
    assert type(model) is type(stock)
    x = torch.randn(2, 2, 5, 4, device=device)
    assert torch.equal(model(x), stock(x))
    assert not chains


@pytest.mark.parametrize("module", [argparse, json.decoder, textwrap, nn.modules.rnn])
def test_methods_are_made_again_from_their_source(module):
    """Of classes of all kinds: the source is found to be what runs, and gives the same again."""
    classes = [c for c in vars(module).values() if inspect.isclass(c)]
    methods = {f for c in classes if c.__module__ == module.__name__ for f in vars(c).values()
               if inspect.isfunction(f) and not inspect.isgeneratorfunction(f)}  # fmt: skip
    made = 0
    for method in methods:
        if hasattr(method, "__wrapped__") or inspect.getsource(method).lstrip().startswith("@"):
            continue
        tree, build = source_of(method, {"given": 1})
        twin = build(tree)
        assert twin.__code__.co_code == method.__code__.co_code
        assert inspect.signature(twin) == inspect.signature(method)
        made += 1
    assert made >= 4


def test_methods_inherited_private_and_called_directly(device, chains):
    stock = Derived().to(device)
    model = copy.deepcopy(stock)
    accelerate(model)
    x = torch.randn(2, 2, 5, 4, device=device)
    torch.testing.assert_close(model(x), stock(x))
    assert chains == [1, 1, 1]
    torch.testing.assert_close(model.head(x), stock.head(x))
    assert len(chains) == 4


def test_a_convolution_that_nobody_is_seen_to_call(device):
    def forward(self, x):
        return self.act(F.conv2d(x, self.conv.weight) + self.other(x)[..., 1:-1, 1:-1])

    model, stock = _network(forward, device)
    report = accelerate(model)
    by_name = {entry.name: entry for entry in report}
    assert by_name["other"].fused
    assert by_name["conv"].reason == "no call like self.conv(x) is seen in the methods of Written"
    x = torch.randn(2, 2, 5, 4, device=device)
    torch.testing.assert_close(model(x), stock(x))


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.act = nn.Conv2d(2, 4, 3, 1, 1), nn.ReLU()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 2, 2), nn.BatchNorm2d(4))
        self.grouped = nn.Conv2d(4, 4, 3, 1, 1, groups=4)
        self.unused = Residual(4, True)

    def forward(self, x):
        return self.grouped(self.body(self.act(self.stem(x))))


def test_the_report_is_a_table():
    report = accelerate(Whole())
    lines = str(report).splitlines()
    assert lines[0].startswith("genfast: 4 of 5 convolutions fuse")
    assert lines[1].split() == ["layer", "runs", "with", "how"]
    rows = [[part.strip() for part in line.split("  ") if part.strip()] for line in lines[3:8]]
    assert rows == [
        ["stem", "Conv2d + ReLU", "fused"],
        ["body.0", "Conv2d + BatchNorm2d", "fused"],
        ["grouped", "Conv2d", "PyTorch: it has 4 groups"],
        ["unused.conv1", "Conv2d + BatchNorm2d + LeakyReLU", "fused when unused is called"],
        ["unused.conv2", "Conv2d + BatchNorm2d", "fused when unused is called"],
    ]
    # Multiply-adds an output pixel: 72, 64, 36, 144 and 144, of which 36 are not fused.
    assert [entry.multiply_adds for entry in report] == [72, 64, 36, 144, 144]
    assert report.fused_share == 424 / 460
    assert lines[-1].startswith("92% of the multiply-adds fuse")
    # A pixel that a transposed convolution of stride 2 puts out meets a quarter of the taps.
    assert [entry.multiply_adds for entry in accelerate(Generator())] == [162, 96, 36]


def test_accelerate_twice_and_a_layer_added_later(device, chains):
    model = genfast.nn.FusedSequential(Residual(2, False)).to(device)
    accelerate(model)
    cls = type(model[0])
    report = accelerate(model)
    assert type(model[0]) is cls
    assert all(entry.fused for entry in report)
    model[0].norm1 = nn.BatchNorm2d(2).to(device)
    assert accelerate(model)[0].layers == "Conv2d + BatchNorm2d + LeakyReLU"
    model(torch.randn(2, 2, 5, 4, device=device))
    assert chains == [2]
