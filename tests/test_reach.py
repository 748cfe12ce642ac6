"""What `accelerate` reaches beyond a container's layers: chains across borders, norms, replicas."""

import copy
import types
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_module
from torch import nn
from torch.nn.parallel import replicate
from torch.nn.utils import spectral_norm

from genfast import accelerate, functional, networks, reference, use_backend
from genfast.nn import FusedSequential, GeneratorBlock

pytestmark = pytest.mark.kernels


class Block(nn.Module):
    """A block of image-to-image networks."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(c_in, c_out, 3, 1, 1), nn.BatchNorm2d(c_out)
        self.act = nn.LeakyReLU(0.2)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Optional(Block):
    """The same, with what is often optional, and an activation that is a function."""

    def forward(self, x, skip=None):
        """Line by line."""
        x = self.conv(x)
        if self.bn is not None:
            x = self.bn(x)
        x = F.relu(x)
        return x


class Double(nn.Module):
    """A container in a class of its own."""

    def __init__(self, c_in, c_out):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(c_in, c_out, 1), nn.ReLU(), Block(c_out, c_out))

    def forward(self, x):
        return self.layers(x)


class Network(nn.Module):
    """Containers called one after another."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(2, 3, 3, 1, 1))
        self.blocks = nn.ModuleList([Block(3, 3), nn.Sequential(Optional(3, 3))])
        self.last = nn.ConvTranspose2d(3, 2, 2, 2)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def _nested():
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 3, 3, 1, 1), nn.BatchNorm2d(3)),
        nn.ReLU(),
        nn.Sequential(nn.Identity(), nn.Sequential(nn.Conv2d(3, 2, 1)), nn.Sequential(), nn.Tanh()),
    )


def _twice():
    block = Block(2, 2)
    return nn.Sequential(block, Block(2, 2), block)


def _across_pytorchs():
    return nn.Sequential(Double(2, 3), nn.Sequential(nn.AvgPool2d(2), Block(3, 2)), Block(2, 2))


ACROSS = {
    # What makes it, and the numbers of blocks in the chains that run.
    "containers": (_nested, [2]),
    "forwards": (lambda: nn.Sequential(Block(2, 3), Optional(3, 2)), [2]),
    "a container in a class": (lambda: nn.Sequential(Double(2, 3), Double(3, 2)), [4]),
    "a forward": (Network, [4]),
    "the same block twice": (_twice, [2, 1]),
    "around what does not fuse": (_across_pytorchs, [2, 2]),
}


@pytest.fixture
def chains(monkeypatch):
    """The numbers of blocks of the chains that run."""
    found, run = [], functional.chain

    def counting(x, blocks, *args):
        found.append(len(blocks))
        return run(x, blocks, *args)

    monkeypatch.setattr(functional, "chain", counting)
    return found


def _outcome(network, x):
    """Output, gradients and state; as in a training step."""
    x = x.clone().requires_grad_()
    y = network(x)
    y.square().sum().backward()
    grads = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    return [y.detach(), x.grad, grads, network.state_dict()]


def _pair(stock, device):
    stock = stock.to(device, torch.float64)
    model = copy.deepcopy(stock)
    accelerate(model)
    return model, stock


def _x(device, channels=2):
    return torch.randn(2, channels, 4, 6, device=device, dtype=torch.float64)


@pytest.mark.float64
@pytest.mark.parametrize("name", ACROSS)
def test_a_chain_goes_on_across_borders(name, device, chains):
    make, sizes = ACROSS[name]
    model, stock = _pair(make(), device)
    x = _x(device)
    torch.testing.assert_close(_outcome(model, x), _outcome(stock, x))
    assert chains == sizes


def _hook(*_):
    return None


def _compile(block):
    # As `compile` does, at a fraction of the time.
    block._compiled_call_impl = lambda x: block._call_impl(x) * 2


class Calling(Block):
    """Sees that it is called."""

    def __call__(self, x):
        return super().__call__(x) + 1


WATCHED = {
    "hook": lambda block: block.register_forward_hook(_hook),
    "hook before": lambda block: block.register_forward_pre_hook(_hook),
    "hook in backward": lambda block: block.register_full_backward_hook(_hook),
    "forward": lambda block: vars(block).update(
        forward=types.MethodType(lambda self, x: type(self).forward(self, x) * 2, block)
    ),
    "compiled": _compile,
}


@pytest.mark.float64
@pytest.mark.parametrize("how", WATCHED)
@pytest.mark.parametrize("kind", [Block, lambda *c: nn.Sequential(Block(*c))])
def test_a_border_that_is_watched_is_kept(kind, how, device, chains):
    model, stock = _pair(nn.Sequential(Block(2, 3), kind(3, 2), Block(2, 2)), device)
    for network in (model, stock):
        WATCHED[how](network[1])
    x, called = _x(device), []
    model[1].register_forward_pre_hook(_hook)  # Counts for nothing once it is removed.
    model[1]._forward_pre_hooks.popitem()
    torch.testing.assert_close(model(x), stock(x))
    assert chains == [1, 1, 1]
    assert not called


@pytest.mark.float64
def test_a_class_that_sees_its_calls(device, chains):
    model, stock = _pair(nn.Sequential(Block(2, 3), Calling(3, 2)), device)
    x = _x(device)
    torch.testing.assert_close(model(x), stock(x))
    assert chains == [1, 1]


def test_a_forward_that_is_replaced_for_all(device, chains, monkeypatch):
    model, stock = _pair(nn.Sequential(Block(2, 3), Block(3, 2)), device)
    monkeypatch.setattr(Block, "forward", lambda self, x: self.conv(x) * 2)
    x = _x(device)
    torch.testing.assert_close(model(x), stock(x))
    assert not chains


@pytest.mark.float64
def test_hooks_for_all_modules_see_containers(device):
    model, stock = _pair(_nested(), device)
    x, seen = _x(device), []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.append(type(module).__name__)
    )
    try:
        torch.testing.assert_close(model(x), stock(x))
    finally:
        handle.remove()
    ours, theirs = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert [name.removeprefix("Fused") for name in ours] == theirs


class Meddling(nn.Module):
    """Changes what is called after it."""

    def __init__(self, target):
        super().__init__()
        self.target = [target]

    def forward(self, x):
        (block,) = self.target
        block.bn = None
        return x


@pytest.mark.float64
@pytest.mark.parametrize("inside", [False, True])
def test_what_follows_is_looked_up_when_it_is_reached(inside, device, chains):
    block = Optional(3, 2)
    meddling = Meddling(block)
    layers = [Block(2, 3), nn.Sequential(meddling) if inside else meddling, block, Block(2, 2)]
    model, stock = _pair(nn.Sequential(*layers), device)
    x = _x(device)
    torch.testing.assert_close(model(x), stock(x))
    assert model[2].bn is None
    assert chains == [1, 2]


class Broken(Block):
    """Its forward fails after its convolution."""

    def forward(self, x):
        return self.missing(self.conv(x))


class BrokenLater(Block):
    """The same, on a line of its own."""

    def forward(self, x):
        x = self.conv(x)
        x = self.missing(x)
        return x


@pytest.mark.float64
@pytest.mark.parametrize("cls", [Broken, BrokenLater])
def test_what_fails_fails_when_it_is_its_turn(cls, device):
    model, stock = _pair(nn.Sequential(Block(2, 3), cls(3, 2)), device)
    x = _x(device)
    for network in (model, stock):
        with pytest.raises(AttributeError, match="missing"):
            network(x)
    torch.testing.assert_close(model.state_dict(), stock.state_dict())


def of_its_argument(self, x):
    x = self.conv(x)
    if x.shape[1] > 2:
        x = self.bn(x)
    return self.act(x)


def of_another_argument(self, x, y):
    return self.act(self.conv(y))


def with_two_arguments(self, x, y):
    return self.act(self.conv(x))


def before_the_chain(self, x):
    return self.act(self.conv(F.pad(x, (1, 1))))


def after_the_chain(self, x):
    return self.act(self.conv(x)) + 1


def with_an_effect(self, x):
    self.calls = 1
    return self.act(self.conv(x))


def with_more_than_itself(self, x):
    return self.act(self.conv(x), x.shape)


def with_a_name(self, x, scale=1.0, *, mode=None):
    h = self.act(self.conv(x))
    return h


def with_another_name(self, x):
    self.y = self.act(self.conv(x))
    return x


@pytest.mark.parametrize(
    ("forward", "opens"),
    [
        (Block.forward, True),
        (Optional.forward, True),
        (with_a_name, True),
        (of_its_argument, False),
        (of_another_argument, False),
        (with_two_arguments, False),
        (before_the_chain, False),
        (after_the_chain, False),
        (with_an_effect, False),
        (with_more_than_itself, False),
        (with_another_name, False),
    ],
    ids=lambda value: getattr(value, "__qualname__", None),
)
def test_which_forwards_open(forward, opens):
    network = networks.Network(type("Written", (nn.Module,), {"forward": forward}))
    assert (network.methods["forward"].opened is not None) == opens
    assert hasattr(network.rewritten, "_genfast_calls") == opens


def _stack_of(node):
    """The paths and classes of the modules that an exported operation was called in."""
    return node.meta.get("nn_module_stack", {}).values()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("how", ["export", "trace", "fx", "compile", "compile for no kernels"])
def test_who_reads_the_calls_reads_them_as_they_are(how, device, monkeypatch):
    model, stock = _pair(nn.Sequential(Block(2, 3), nn.Sequential(Optional(3, 2))), device)
    model, stock, x = model.eval(), stock.eval(), _x(device)
    if how == "compile for no kernels":
        monkeypatch.setattr(functional, "why_not_triton", lambda *_, **__: "not in this test")
    with use_backend("auto"):
        if how == "trace":
            made = torch.jit.trace(model, x)
        elif how == "fx":
            made = torch.fx.symbolic_trace(model)
        elif how == "export":
            made = torch.export.export(model, (x,), strict=False).module()
            held = {path for node in made.graph.nodes for path, _ in _stack_of(node)}
            assert {"0", "1", "1.0", "1.0.conv"} <= held
        else:
            made = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(made(x), stock(x))
    if how == "trace":  # A container calls a container.
        assert str(made.graph).count("prim::CallMethod") == 2


class Report(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3)
        self.hooked, self.grouped = nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, groups=2)
        self.after, self.unused = nn.InstanceNorm2d(4), nn.LayerNorm(4)
        self.hooked.register_forward_hook(_hook)

    def forward(self, x):
        x = self.hooked(self.conv(F.relu(self.norm(x))))
        return torch.tanh(self.after(self.grouped(x)))


def test_the_report_tells_of_norms():
    report = accelerate(Report())
    assert [(e.name, e.layers, e.fused) for e in report.norms] == [
        ("norm", "BatchNorm2d + ReLU", True),
        ("hooked", "GroupNorm", False),
        ("after", "InstanceNorm2d + Tanh", True),
        ("unused", "LayerNorm", False),
    ]
    assert [e.name for e in report] == ["conv", "grouped"]
    assert report.norms[1].reason == "it has a hook"
    assert report.norms[3].reason.startswith("no call like self.unused(x) is seen")
    assert (report.norms_fused, report.norms_total) == (2, 4)
    lines = str(report).splitlines()
    assert [line.split()[0] for line in lines[3:9]] == [
        "norm", "conv", "hooked", "grouped", "after", "unused",
    ]  # fmt: skip
    assert lines[-1].endswith("of each convolution) and 50% of the norms")


def test_the_report_of_perceptrons_and_blocks(device):
    layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    report = accelerate(layers.to(device))
    (entry,) = report.norms
    assert str(entry) == "1: BatchNorm1d + ReLU: fused"
    assert str(report).splitlines()[0] == "genfast: the model has no 2-d convolution"
    assert str(report).splitlines()[-1] == "100% of the norms fuse"
    hooked = GeneratorBlock(2, 3)
    hooked.conv.register_forward_hook(_hook)
    layers = nn.Sequential(GeneratorBlock(2, 2), hooked, nn.Linear(1, 1))
    report = accelerate(layers.to(device))
    assert [e.how for e in report] == ["fused", "PyTorch: it has a hook"]
    assert [e.name for e in report.norms] == ["1.norm"]
    assert (report.norms_fused, report.norms_total) == (1, 2)


def _replicas(model):
    """Two, as `nn.DataParallel` makes them, but on one device."""

    def broadcast(tensors, devices, detach=False):
        first, second = ([t * 1 for t in tensors] for _ in devices)
        if detach:  # Buffers: the first replica has the model's own, in which statistics move.
            first = [t.detach() for t in tensors]
        return [first, second]

    with mock.patch.dict(
        replicate.__globals__,
        _broadcast_coalesced_reshape=broadcast,
        _get_device_index=lambda device, _: device,
    ):
        return replicate(model, [0, 1])


@pytest.mark.float64
@pytest.mark.parametrize("norm", [lambda layer: layer, spectral_norm], ids=["plain", "spectral"])
def test_replicas_of_data_parallel(norm, device, chains):
    network = Network()
    network.first[0] = norm(network.first[0])
    model, stock = _pair(network, device)
    x = _x(device)
    results = []
    for whole in (model, stock):
        replicas = _replicas(whole)
        y = torch.cat([replica(part) for replica, part in zip(replicas, x.chunk(2), strict=True)])
        y.square().sum().backward()
        results.append([y, {n: p.grad for n, p in whole.named_parameters()}, whole.state_dict()])
    torch.testing.assert_close(*results)
    assert chains == [4, 4]


def test_instance_norm_of_signals(device, started):
    stock = nn.Sequential(nn.InstanceNorm1d(3, affine=True), nn.LeakyReLU(0.2)).to(device)
    model = copy.deepcopy(stock)
    assert str(accelerate(model).norms[0]) == "0: InstanceNorm1d + LeakyReLU: fused"
    assert_module(model, stock, torch.randn(2, 3, 7, device=device))
    assert "normalize_activate" in started
    single = torch.randn(3, 7, device=device)  # (C, L), which PyTorch takes too
    torch.testing.assert_close(model(single), stock(single))
    tracking = FusedSequential(nn.InstanceNorm1d(3, track_running_stats=True))
    assert tracking.plan()[0].reason == "it keeps running statistics"


@pytest.mark.float64
def test_a_norm_is_checked_once_for_what_looks_alike(device, monkeypatch):
    """And again for all that looks otherwise: what is known is what would be found now."""
    checks, check = [], functional._check_normalization
    monkeypatch.setattr(
        functional, "_check_normalization", lambda *args: checks.append(1) or check(*args)
    )
    x, vectors = torch.randn(4, 4, 3, 5, device=device), torch.rand(4, 4, device=device)
    names = ("weight", "bias", "running_mean", "running_var")
    norm = reference.Norm(*vectors, torch.tensor(0, device=device), True, 0.1, 1e-5, 1)
    block = functional.Normalization(norm, "identity", 0.2)
    fields = [
        dict(training=False), dict(momentum=0.7), dict(momentum=x.new_tensor(0.5)), dict(eps=0.1),
        dict(groups=2), dict(kind="instance"), dict(kind="group", channel_groups=2),
        dict(kind="group", channel_groups=4), dict(num_batches_tracked=None),
        dict(running_mean=None, running_var=None), *({name: None} for name in names[:2]),
        *({name: norm._asdict()[name].double()} for name in names),
    ]  # fmt: skip
    images = [
        x, x[:2], x[:, :, ::2], x[..., 0], x[:, :, 0, 0], x.double(), x.requires_grad_(False),
        x.contiguous(memory_format=torch.channels_last), x.half(), x[:, :, :1, :1],
    ]  # fmt: skip
    cases = [(x, block._replace(norm=norm._replace(**changed))) for changed in fields]
    cases += [(image, block) for image in images]
    cases += [(x, block._replace(activation=a)) for a in reference.ACTIVATIONS if a != "prelu"]
    cases += [(x, block._replace(activation="leaky_relu", negative_slope=0.5))]
    slopes = vectors[0], vectors[0, :1]
    cases += [(x, block._replace(activation="prelu", negative_slope=s)) for s in slopes]
    looks = {}
    for case in cases + cases:
        known, fresh = (
            functional._normalization_plan_of(*case),
            functional._normalization_plan(*case),
        )
        assert known._replace(look=None) == fresh
        assert looks.setdefault(known.look, fresh) == fresh
    found, made = len(looks), len(checks) - 2 * len(cases)
    assert found == made == len(cases) - 2  # Of the images one comes twice, and one activation.
    with pytest.raises(ValueError, match=r"norm_weight of shape \(4,\)"):
        functional.normalize(x, block._replace(norm=norm._replace(weight=vectors[0, :3])))
    with use_backend("reference"):
        assert functional._normalization_plan_of(x, block) is None
