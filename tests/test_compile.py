"""`torch.compile` keeps the fused kernels: one operator a chain, and the results of eager calls."""

import copy
from contextlib import ExitStack
from typing import NamedTuple

import pytest
import torch
from functorch.compile import make_boxed_func
from oracle import largest_error
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import genfast
from genfast import functional, losses, operators  # noqa: F401  operators registers what is tested
from genfast.backend import INTERPRETING
from genfast.models import ConvVAE, DCGANDiscriminator, DCGANGenerator
from genfast.nn import DiscriminatorBlock, FusedSequential, GeneratorBlock, statistics_groups

pytestmark = pytest.mark.kernels

OPERATORS = (
    "chain",
    "chain_backward",
    "importance_samples",
    "importance_samples_backward",
    "logit_loss",
    "logit_loss_backward",
    "reparameterize",
    "reparameterize_backward",
    "reparameterize_with_kl",
)


@pytest.fixture(autouse=True)
def forget():
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that runs what PyTorch traces as it is, and keeps it."""

    def __init__(self):
        self.graphs = []
        self.backend = aot_autograd(fw_compiler=self._keep)

    def _keep(self, graph, inputs):
        self.graphs.append(graph)
        return make_boxed_func(graph.forward)

    @property
    def operators(self):
        """The nodes that call an operator."""
        nodes = [n for g in self.graphs for n in g.graph.nodes]
        return [n for n in nodes if isinstance(n.target, torch._ops.OpOverload)]

    def assert_fused(self, *, blocks, chains, **ours):
        """Hold the graphs to so many operators of ours, and to no convolution or norm beside."""
        names = [n.target.name() for n in self.operators]
        others = [name for name in names if "convolution" in name or "norm" in name]
        assert not others
        for name, count in dict(chain=chains, **ours).items():
            assert names.count(f"genfast::{name}") == count, name
        specs = [n.args[2] for n in self.operators if n.target.name() == "genfast::chain"]
        assert sum(spec.count(";") for spec in specs) == blocks


def compiled(function, **options):
    """The function compiled, and its `Graphs`."""
    graphs = Graphs()
    return torch.compile(function, backend=graphs.backend, fullgraph=True, **options), graphs


def assert_same(ours, eager):
    """Hold two modules in which the same has happened to the same state and gradients."""
    for (name, value), other in zip(
        ours.state_dict().items(), eager.state_dict().values(), strict=True
    ):
        if INTERPRETING or "running" not in name:
            assert torch.equal(value, other), name
        else:  # A GPU's multiplication and addition is one rounding, PyTorch's operations are two.
            rounding = torch.finfo(value.dtype).eps * other.abs().max().item()
            assert largest_error(value, other) <= rounding, name
    for (name, p), q in zip(ours.named_parameters(), eager.parameters(), strict=True):
        assert p.grad is q.grad is None or torch.equal(p.grad, q.grad), name


class Case(NamedTuple):
    """A network and how it is called."""

    make: callable
    shape: tuple
    blocks: int
    training: bool = True
    groups: int = 1
    frozen: tuple = ()
    needs_x: bool = False
    half: bool = False


def accelerated():
    """Layers as users have them: contiguous weights, biases, a norm without parameters."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.BatchNorm2d(8, affine=False),
        nn.Tanh(),
        nn.Conv2d(8, 4, (2, 3), bias=False),
        nn.BatchNorm2d(4, momentum=None),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(4, 2, 3, 2, 1, output_padding=1),
        nn.Sigmoid(),
    )
    genfast.accelerate(model)
    return model


def normalized():
    """Norms of images."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1),
        nn.InstanceNorm2d(8, affine=True),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 6, 4, 2, 1),
        nn.GroupNorm(2, 6),
        nn.LeakyReLU(0.1),
    )
    genfast.accelerate(model)
    return model


def generator():
    return DCGANGenerator(nz=5, ngf=4, nc=3, image_size=16)


def discriminator():
    return DCGANDiscriminator(nc=3, ndf=4, image_size=16)


LATENTS, IMAGES = (2, 5, 1, 1), (2, 3, 16, 16)
CASES = {
    "generator": Case(generator, LATENTS, 3, needs_x=True),
    "generator-half": Case(generator, LATENTS, 3, half=True),
    "discriminator-groups": Case(
        discriminator, IMAGES, 3, groups=2, frozen=("main.0.weight", "main.3.bias"), needs_x=True
    ),
    "discriminator-evaluation-half": Case(discriminator, IMAGES, 3, training=False, half=True),
    "normalized": Case(normalized, (3, 3, 6, 8), 2, needs_x=True),
    "accelerated": Case(accelerated, (4, 3, 5, 6), 3, groups=2),
    "accelerated-evaluation": Case(accelerated, (2, 3, 5, 6), 3, training=False, needs_x=True),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_compiled_networks_are_the_eager_ones(case, device):
    eager = case.make().to(device).train(case.training)
    for name, p in eager.named_parameters():
        p.requires_grad_(name not in case.frozen)
    ours = copy.deepcopy(eager)
    function, graphs = compiled(ours)
    dtype = torch.bfloat16 if case.half else None
    for _ in range(3 if case.groups > 1 else 1):  # The third call replays what the second records.
        x = torch.randn(case.shape, device=device)
        results, leaves = [], {}
        for model, run in ((ours, function), (eager, eager)):
            given = x.clone().requires_grad_(case.needs_x)
            leaves[model] = [t for t in (given, *model.parameters()) if t.requires_grad]
            with ExitStack() as stack:
                stack.enter_context(torch.autocast(device.type, dtype, enabled=case.half))
                if case.groups > 1:
                    stack.enter_context(statistics_groups(model, case.groups))
                results.append(run(given))
        y, y_eager = results
        assert torch.equal(y, y_eager) and y.dtype == y_eager.dtype
        assert y.stride() == y_eager.stride()
        dy = torch.randn_like(y)
        # Not by `backward`, which brings gradients into the format of what they belong to.
        gradients = torch.autograd.grad(y, leaves[ours], dy)
        expected = torch.autograd.grad(y_eager, leaves[eager], dy)
        for i, (gradient, other) in enumerate(zip(gradients, expected, strict=True)):
            assert torch.equal(gradient, other) and gradient.stride() == other.stride(), i
        assert_same(ours, eager)
    graphs.assert_fused(blocks=case.blocks, chains=1, chain_backward=1)


def test_a_compiled_vae_and_its_losses(device):
    eager = ConvVAE(nc=1, image_size=16, latent_dim=3, width=4).to(device)
    ours = copy.deepcopy(eager)
    images = torch.rand(2, 1, 16, 16, device=device)

    def loss(model):
        mu, logvar = model.encode(images)
        z, kl = functional.reparameterize_with_kl(mu, logvar)
        logits = model.decode_logits(z)
        return losses.reconstruction_loss(logits, images, logits=True) + kl.sum()

    function, graphs = compiled(loss)
    values = []
    for model, run in ((ours, function), (eager, loss)):
        torch.manual_seed(1)
        values.append(run(model))
        values[-1].backward()
    assert torch.equal(*values)
    assert_same(ours, eager)
    graphs.assert_fused(
        blocks=6, chains=2, chain_backward=2, reparameterize_with_kl=1, reparameterize_backward=1,
        logit_loss=1, logit_loss_backward=1,
    )  # fmt: skip


def test_another_batch_size_is_the_same_graph(device):
    def judge(model, images, latent):
        logits = model(images)
        z = functional.reparameterize(latent, latent / 2)
        return losses.discriminator_loss(logits) + losses.real_loss(logits) + z.square().mean()

    eager = discriminator().to(device)
    ours = copy.deepcopy(eager)
    function, graphs = compiled(judge, dynamic=True)
    for images in (2, 4):
        x = torch.randn(images, 3, 16, 16, device=device)
        latent = torch.randn(images, 3, device=device)
        values = []
        for model, run in ((ours, function), (eager, judge)):
            torch.manual_seed(images)
            values.append(run(model, x, latent))
            values[-1].backward()
        assert torch.equal(*values)
        assert_same(ours, eager)
    assert len(graphs.graphs) == 2  # Forward and backward.
    graphs.assert_fused(
        blocks=3, chains=1, chain_backward=1, logit_loss=2, logit_loss_backward=2,
        reparameterize=1, reparameterize_backward=0,
    )  # fmt: skip


def test_without_gradients_statistics_move_and_nothing_is_kept(device):
    eager = generator().to(device)
    ours = copy.deepcopy(eager)
    function, graphs = compiled(ours)
    x = torch.randn(LATENTS, device=device)
    with torch.no_grad():
        assert torch.equal(function(x), eager(x))
    assert_same(ours, eager)
    graphs.assert_fused(blocks=3, chains=1, chain_backward=0)
    (chain,) = (n for n in graphs.operators if n.target.name() == "genfast::chain")
    # The output, and the statistics of two norms.
    assert len(chain.meta["val"]) == 3


def test_an_output_may_be_changed_in_place_where_pytorchs_may(device):
    eager = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2)).to(device)
    genfast.accelerate(eager.to(memory_format=torch.channels_last))
    ours = copy.deepcopy(eager)
    x = torch.randn(2, 3, 6, 6, device=device)

    def change(model):
        return model(x).add_(1).square().sum()

    function, graphs = compiled(change)
    for model, run in ((ours, function), (eager, change)):
        run(model).backward()
    assert_same(ours, eager)
    graphs.assert_fused(blocks=1, chains=1, chain_backward=1)


def test_what_the_kernels_do_not_take_is_traced_as_pytorchs_layers(device):
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 4, 1)
    ).to(device)
    genfast.accelerate(model)
    seen = []
    model[3].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    function, graphs = compiled(model)
    x = torch.randn(2, 4, 8, 8, device=device)
    with torch.no_grad():
        assert torch.equal(function(x), model(x))
    names = [n.target.name() for n in graphs.operators]
    assert names.count("aten::convolution") == 2 and names.count("genfast::chain") == 1
    assert seen == [(2, 4, 4, 4)] * 2


def test_transforms_and_exports_are_traced_as_pytorchs_layers(device):
    model = FusedSequential(DiscriminatorBlock(3, 4), GeneratorBlock(4, 3)).to(device).eval()
    x = torch.randn(2, 3, 8, 8, device=device)
    with genfast.use_backend("auto"):
        gradient = torch.func.grad(lambda x: model(x).square().sum())
        function, graphs = compiled(gradient)
        function(x)
        exported = [torch.export.export(model, (x,), strict=strict) for strict in (False, True)]
    traces = [[n.target.name() for n in graphs.operators]]
    for program in exported:
        traces.append([n.target.name() for n in program.graph.nodes if n.op == "call_function"])
    for names in traces:
        assert {"aten::convolution", "aten::conv2d"} & set(names)
        assert not [name for name in names if name.startswith("genfast")]


def test_within_a_trace_pytorch_may_take_everything_for_an_export(device, monkeypatch):
    """As 2.11 does: then no kernel would run in torch.compile."""
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert functional.why_not_triton(torch.zeros(1, device=device)) is None


def test_bad_input_is_named_as_in_eager_calls(device):
    function = torch.compile(DiscriminatorBlock(3, 4).to(device), backend="eager")
    with pytest.raises(ValueError, match="expected x with 3 channels"):
        function(torch.randn(2, 4, 8, 8, device=device))


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductor_runs_the_operators_too(device, started):
    from genfast.training.steps.vae import missing_compiler

    missing = missing_compiler(device)
    if missing:
        pytest.skip(f"torch.compile finds no {missing}")
    eager = FusedSequential(DiscriminatorBlock(3, 8), GeneratorBlock(8, 1, activation="tanh"))
    eager = eager.to(device)
    ours = copy.deepcopy(eager)
    x = torch.randn(2, 3, 8, 8, device=device)
    kernels = []
    for run in (torch.compile(ours, fullgraph=True), eager):
        run(x).square().sum().backward()
        kernels.append(started.copy())
        started.clear()
    assert kernels[0] == kernels[1] != []
    assert_same(ours, eager)


class _Calls(TorchDispatchMode):
    """Notes the arguments of each call of an operator of ours."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "genfast":
            self.noted.append((function, args))
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def calls():
    """By name, arguments of the operators as a trace would call them."""
    device = torch.device("cpu" if INTERPRETING else "cuda")
    torch.manual_seed(0)
    mode = _Calls()
    with pytest.MonkeyPatch.context() as patch, genfast.use_backend("triton"):
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        model = accelerated().to(device)
        x = torch.randn(4, 3, 4, 5, device=device)
        with mode, torch.no_grad():
            model(x[:2])
        with mode, statistics_groups(model, 2):
            model(x.requires_grad_()).sum().backward()
        model.to(memory_format=torch.channels_last).eval()
        model[3].requires_grad_(False)
        model[4].bias.requires_grad_(False)
        with mode:
            model(x[:2].detach().to(memory_format=torch.channels_last)).sum().backward()
            for shape in ((3, 5), (2, 3, 4, 2)):
                mu = torch.randn(shape, device=device)
                if len(shape) == 4:
                    mu = mu.to(memory_format=torch.channels_last)
                mu.requires_grad_()
                logvar = torch.randn(shape, device=device, requires_grad=True)
                functional.reparameterize(mu, logvar).sum().backward()
                z, kl = functional.reparameterize_with_kl(mu, logvar)
                kl.sum().backward()
                z, kl = functional.importance_samples(mu, logvar, 3)
                (z.sum() + kl.sum()).backward()
            logits = torch.randn(3, 4, device=device, requires_grad=True)
            targets = torch.rand(3, 4, device=device)
            loss = losses.reconstruction_loss(logits, targets, logits=True)
            (loss + losses.discriminator_loss(logits.flatten())).backward()
    found = {}
    for function, args in mode.noted:
        found.setdefault(function.name().removeprefix("genfast::"), []).append((function, args))
    return found


@pytest.mark.one_in(2)
@pytest.mark.parametrize("name", OPERATORS)
def test_operators_pass_pytorchs_own_checks(name, calls):
    assert calls.keys() == set(OPERATORS)
    for function, args in calls[name]:
        # Gradients are not differentiated, and a chain only where it keeps what that takes.
        differentiable = not name.endswith("backward") and args[-1] is not False
        opcheck(function, tuple(fresh(a, differentiable) for a in args))


def fresh(t, wants_gradient):
    """Tensors of the same values, in lists too, and anything else as it is."""
    if isinstance(t, list):
        return [fresh(one, wants_gradient) for one in t]
    if not isinstance(t, torch.Tensor):
        return t
    return t.detach().clone().requires_grad_(wants_gradient and t.is_floating_point())
