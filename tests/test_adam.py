"""Adam's update by one kernel: PyTorch's numbers, and PyTorch itself wherever there is a reason."""

import copy
import warnings

import pytest
import torch
from oracle import assert_close, assert_same_losses
from torch import nn
from torch.optim import optimizer as torch_optimizer

from genfast.backend import INTERPRETING, use_backend
from genfast.launch import adam, first_use, start
from genfast.models import DCGANDiscriminator, DCGANGenerator
from genfast.training import GANStep, VAEStep
from genfast.training.steps import base, half_weights, updates
from genfast.training.steps.half_weights import HalfWeights
from genfast.training.steps.precision import Precision
from genfast.training.steps.updates import Update, recording

pytestmark = pytest.mark.kernels

# Less than a vector, an odd count, more than a chunk by one and by a vector and a half.
SHAPES = ((1,), (7,), (1025,), (3, 2, 7, 25), (4, 3, 4, 4))


# By the kernel, by PyTorch, and exactly.
WAYS = ((True, torch.float32), (False, torch.float32), (False, torch.float64))


def parameters(shapes=SHAPES, dtype=torch.float32, device="cpu"):
    made = [nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) for shape in shapes]
    if len(shapes[-1]) == 4:
        made[-1].data = made[-1].data.contiguous(memory_format=torch.channels_last)
    return made


def twin(given, dtype):
    return [nn.Parameter(p.detach().to(dtype, copy=True)) for p in given]


def make_groups(given, weight_decay):
    """Two groups, of other rates."""
    common = dict(weight_decay=weight_decay)
    return [
        dict(params=given[:2], lr=2e-4, betas=(0.5, 0.999), **common),
        dict(params=given[2:], lr=3e-2, betas=(0.9, 0.99), eps=1e-5, **common),
    ]


def optimizer_of(given, weight_decay=0.0, **options):
    return torch.optim.Adam(make_groups(given, weight_decay), fused=True, **options)


def set_gradients(given, gradients):
    for p, gradient in zip(given, gradients, strict=True):
        p.grad = None
        if gradient is not None:
            p.grad = torch.empty_like(p).copy_(gradient)


def trained(optimizer, given, gradients, step):
    """Parameters and state after updates by these gradients, by name."""
    for of_step in gradients:
        set_gradients(given, of_step)
        step()
    results = {}
    for i, p in enumerate(given):
        results[f"p{i}"] = p.detach().clone()
        state = optimizer.state[p]
        results |= {f"{name}{i}": t.clone() for name, t in state.items() if name != "step"}
        assert state["step"].item() == sum(g[i] is not None for g in gradients)
    return results


def assert_same(ours, eager, exact):
    """Lists of parameters, as PyTorch updated them in float32 and in float64, by the rule."""
    ours, eager, exact = (
        {f"p{i}": p.detach() for i, p in enumerate(of)} for of in (ours, eager, exact)
    )
    assert_close(ours, exact, [(eager, exact)])


def draw_gradients(shapes, steps, device="cpu"):
    """Of many sizes; the second parameter has none in the second step."""
    drawn = [
        [torch.randn(s, device=device) * 10.0 ** -(i % 4) for s in shapes] for i in range(steps)
    ]
    drawn[1][1] = None
    return drawn


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_updates_are_pytorchs(weight_decay, started, device):
    def all_three(seed):
        torch.manual_seed(seed)
        given, gradients = parameters(device=device), draw_gradients(SHAPES, 5, device)
        eager, exact = twin(given, torch.float32), twin(given, torch.float64)
        optimizers = [optimizer_of(p, weight_decay) for p in (given, eager, exact)]
        steps = Update(optimizers[0]).step, optimizers[1].step, optimizers[2].step
        return [
            trained(o, p, gradients, step)
            for o, p, step in zip(optimizers, (given, eager, exact), steps, strict=True)
        ]

    ours, eager, exact = all_three(0)
    assert started == ["adam"] * 2 * 5
    assert_close(ours, exact, [(eager, exact), *(all_three(seed)[1:] for seed in range(1, 4))])
    again, *_ = all_three(0)
    for name, tensor in ours.items():
        assert torch.equal(tensor, again[name]), name


def test_early_and_late_updates_correct_the_bias(started, device):
    """The corrections are exact at every count, where they are close to 0 and where to 1."""
    counts, gradient = (1, 2, 30, 500, 501, 5000, 100000), torch.randn(64, device=device)
    for count in counts:
        results = []
        for kernel, dtype in WAYS:
            p = nn.Parameter(torch.zeros(64, device=device, dtype=dtype))
            optimizer = torch.optim.Adam([p], 1.0, (0.5, 0.999), fused=True)
            step = Update(optimizer).step if kernel else optimizer.step
            p.grad = gradient.to(dtype)
            step()
            optimizer.state[p]["step"].fill_(count - 1)
            with torch.no_grad():
                p.zero_()
            step()
            results.append([p])
        assert_same(*results)
    assert started == ["adam"] * 2 * len(counts)


def test_an_infinite_second_moment_stops_its_weight(device):
    p = nn.Parameter(torch.ones(5, device=device))
    update = Update(torch.optim.Adam([p], fused=True))
    p.grad = torch.ones_like(p)
    update.step()
    before = p.detach().clone()
    p.grad[2] = 1e30
    update.step()
    p.grad[2] = 1.0
    update.step()
    assert p.isfinite().all() and p[2] == before[2] and (p[:2] < before[:2]).all()


class Layers(nn.Module):
    """Weights with copies and one without, as a batch norm's."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(41, 25), nn.Linear(25, 1)
        self.scale = nn.Parameter(torch.ones(25))


@pytest.fixture
def known_forward(monkeypatch):
    monkeypatch.setattr(half_weights, "why_not_copied", lambda network: None)


def run_halves(network, update, half, steps):
    for _ in range(steps):
        network.zero_grad()
        with half_weights.in_use(half):
            for p in network.parameters():  # The copies.
                p.grad = torch.randn_like(p)
            update.step(refresh=True)


@pytest.mark.parametrize("refresh", [True, False])
def test_half_precision_copies_and_their_gradients(refresh, started, device, known_forward):
    torch.manual_seed(0)
    ours = Layers().to(device)
    networks = ours, copy.deepcopy(ours), copy.deepcopy(ours)
    networks[2].double()
    optimizers = [torch.optim.Adam(n.parameters(), 1e-2, fused=True) for n in networks]
    half = HalfWeights(ours, torch.bfloat16)
    update = Update(optimizers[0], half)
    for seed in range(3):
        torch.manual_seed(seed)
        ours.zero_grad()
        with half_weights.in_use(half):
            for name, p in ours.named_parameters():
                p.grad = torch.randn_like(p)
                for theirs in networks[1:]:
                    q = theirs.get_parameter(name)
                    q.grad = p.grad.to(q.dtype)
            update.step(refresh)
            for optimizer in optimizers[1:]:
                optimizer.step()
            copies = {n: p.detach().clone() for n, p in ours.named_parameters()}
    assert started == ["adam"] * 3
    assert ours.first.weight.grad is None and ours.scale.grad is not None
    assert_same(*(list(n.parameters()) for n in networks))
    for name, p in ours.named_parameters():
        if name != "scale":
            # What it stands for, to nearest, after the last update or before it.
            assert copies[name].dtype == torch.bfloat16
            assert torch.equal(copies[name], p.bfloat16()) == refresh, name


def test_gradients_of_two_backward_passes_are_added_in_float32(started, device, known_forward):
    network = Layers().to(device)
    half = HalfWeights(network, torch.bfloat16)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    update = Update(optimizer, half)
    weight, small = network.last.weight, 2.0**-12
    with half_weights.in_use(half):
        network.last.weight.grad = torch.ones_like(network.last.weight)
        half.hand_over_gradients()
        network.last.weight.grad = torch.full_like(network.last.weight, small)
        update.step(True)
    assert started == ["adam"]
    assert weight.grad.eq(1 + small).all()


def test_two_backward_passes_of_a_step_add_in_float32(started, device, known_forward):
    network = Layers().to(device)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    precision = Precision("bf16", device, dict(model=network), dict(model=optimizer))
    with precision.weights():
        for factor in (1.0, 2.0**-12):
            precision.backward(factor * network.last.weight.float().sum(), "model")
        precision.update("model")
    assert started == ["adam"]
    assert network.last.weight.grad.eq(1 + 2.0**-12).all()


def test_a_gradient_of_a_weight_that_is_not_held_is_handed_over(device, known_forward):
    network = Layers().to(device)
    half = HalfWeights(network, torch.bfloat16)
    update = Update(torch.optim.Adam(network.first.parameters(), fused=True), half)
    run_halves(network, update, half, 1)
    assert network.last.weight.grad is not None and network.first.weight.grad is None


def test_states_are_interchanged_with_pytorchs(started, device):
    given, gradients = parameters(device=device), draw_gradients(SHAPES, 6, device)
    theirs, exact = twin(given, torch.float32), twin(given, torch.float64)
    ours_by, theirs_by, exact_by = map(optimizer_of, (given, theirs, exact))
    update = Update(ours_by)
    trained(exact_by, exact, gradients, exact_by.step)
    trained(ours_by, given, gradients[:3], update.step)
    trained(theirs_by, theirs, gradients[:3], theirs_by.step)
    for a, b in ((ours_by, theirs_by), (theirs_by, ours_by)):
        state, other = a.state_dict(), b.state_dict()
        assert state["param_groups"] == other["param_groups"]
        for i, of_parameter in state["state"].items():
            assert of_parameter.keys() == other["state"][i].keys()
            for name, t in of_parameter.items():
                u = other["state"][i][name]
                assert (t.dtype, t.device, t.stride()) == (u.dtype, u.device, u.stride())
    # Each goes on from the other's.
    saved = copy.deepcopy([ours_by.state_dict(), theirs_by.state_dict()])
    ours_by.load_state_dict(saved[1])
    theirs_by.load_state_dict(saved[0])
    started.clear()
    for of_step in gradients[3:]:
        set_gradients(given, of_step)
        update.step()
        set_gradients(theirs, of_step)
        theirs_by.step()
    assert started == ["adam"] * 6
    assert_same(given, theirs, exact)
    for p, q in zip(given, theirs, strict=True):
        assert ours_by.state[p]["step"] == theirs_by.state[q]["step"]
    # And PyTorch goes on after the kernel, with the same optimizer.
    set_gradients(given, gradients[0])
    count = ours_by.state[given[0]]["step"].item()
    ours_by.step()
    assert ours_by.state[given[0]]["step"].item() == count + 1


@pytest.mark.parametrize("on_device", [False, True])
def test_schedulers_set_the_rate(on_device, started, device):
    results = []
    gradient = torch.randn(64, device=device)
    for kernel, dtype in WAYS:
        p = nn.Parameter(torch.zeros(64, device=device, dtype=dtype))
        lr = torch.tensor(0.5, device=device) if on_device else 0.5
        optimizer = torch.optim.Adam([p], lr, fused=True)
        # Asked for at each call: a scheduler wraps it.
        step = Update(optimizer).step if kernel else lambda of=optimizer: of.step()
        p.grad = gradient.to(dtype)
        step()
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        values = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # It says so if it thinks that no update was made.
            for _ in range(3):
                step()
                scheduler.step()
                values.append(p.detach().clone())
        results.append(values)
    assert started == ["adam"] * 4
    assert_same(*results)


class OwnAdam(torch.optim.Adam):
    """A subclass, which may do anything."""


def _hooked(optimizer):
    optimizer.register_step_post_hook(lambda *_: None)


def _replaced(optimizer):
    step = optimizer.step
    optimizer.step = lambda: step()


def _moved(optimizer):
    p = optimizer.param_groups[0]["params"][1]
    p.data = torch.empty(len(p) + 1)[1:].copy_(p.data)


def _strided(optimizer):
    p = optimizer.param_groups[0]["params"][1]
    p.data = torch.empty(2 * len(p))[::2].copy_(p.data)


def _grouped(name, value):
    return lambda optimizer: optimizer.param_groups[0].update({name: value})


def _state(name, value):
    def spoil(optimizer):
        p = optimizer.param_groups[0]["params"][1]
        optimizer.state[p][name] = value(optimizer.state[p].get(name))

    return spoil


REASONS = {
    "AdamW": (torch.optim.AdamW, {}, None, "the kernel is Adam's, got AdamW"),
    "subclass": (OwnAdam, {}, None, "the kernel is Adam's, got OwnAdam"),
    "amsgrad": (torch.optim.Adam, dict(amsgrad=True), None, "the kernel has no amsgrad"),
    "maximize": (torch.optim.Adam, dict(maximize=True), None, "the kernel has no maximize"),
    "decoupled": (
        torch.optim.Adam, dict(decoupled_weight_decay=True), None,
        "the kernel has no decoupled_weight_decay",
    ),
    "differentiable": (
        torch.optim.Adam, dict(fused=False, differentiable=True), None,
        "the kernel has no differentiable",
    ),
    "counters": (
        torch.optim.Adam, dict(fused=False), None,
        "step counters are on the CPU without fused=True or capturable=True",
    ),
    "hook": (torch.optim.Adam, {}, _hooked, "the optimizer has a hook"),
    "replaced step": (torch.optim.Adam, {}, _replaced, "the optimizer's step was replaced"),
    "betas": (
        torch.optim.Adam, {}, _grouped("betas", (torch.tensor(0.5), torch.tensor(0.9))),
        "the betas are tensors",
    ),
    "rate's device": (
        torch.optim.Adam, {}, _grouped("lr", torch.tensor(0.5, device="meta")),
        "the learning rate is on meta, the parameters on cpu",
    ),
    "state's dtype": (
        torch.optim.Adam, {}, _state("exp_avg", lambda t: t.double()),
        "of a parameter of shape (7,): its state is not in float32 on its device",
    ),
    "another state": (
        torch.optim.Adam, {}, _state("max_exp_avg_sq", lambda t: torch.zeros(7)),
        "of a parameter of shape (7,): its state is not Adam's",
    ),
    "counter's device": (
        torch.optim.Adam, {}, _state("step", lambda t: t.to("meta")),
        "of a parameter of shape (7,): its step counter is on another device",
    ),
    "state's layout": (
        torch.optim.Adam, {}, _state("exp_avg", lambda t: torch.zeros(14)[::2]),
        "of a parameter of shape (7,): what belongs to it lies in memory in another order",
    ),
    "place": (
        torch.optim.Adam, {}, _moved,
        "of a parameter of shape (7,): it or what belongs to it begins at no multiple of 16 bytes",
    ),
    "gaps": (torch.optim.Adam, {}, _strided, "of a parameter of shape (7,): it has gaps in memory"),
}  # fmt: skip


@pytest.mark.skipif(not INTERPRETING, reason="of tensors on the CPU")
@pytest.mark.parametrize("case", REASONS.values(), ids=REASONS)
def test_reasons_for_pytorchs_own_step(case, started):
    kind, options, spoil, reason = case
    given = parameters(SHAPES[:2])
    optimizer = kind(given, **dict(fused=True) | options)
    update = Update(optimizer)
    if not options:
        set_gradients(given, [torch.ones(s) for s in SHAPES[:2]])
        optimizer.step()
    if spoil:
        spoil(optimizer)
    assert update.why_not == reason
    called = []
    vars(optimizer)["step"] = lambda: called.append(True)
    set_gradients(given, [torch.ones(s) for s in SHAPES[:2]])
    update.step()
    assert called == [True] and not started


@pytest.mark.parametrize("when", ["pre", "post"])
def test_a_hook_of_every_optimizer_is_a_reason(when, device):
    update = Update(torch.optim.Adam(parameters(device=device), fused=True))
    register = getattr(torch_optimizer, f"register_optimizer_step_{when}_hook")
    handle = register(lambda *_: None)
    try:
        assert update.why_not == "the optimizer has a hook"
    finally:
        handle.remove()
    assert update.why_not is None


def test_an_update_waits_for_nothing(monkeypatch, device):
    """A number that is asked from a GPU waits for it, and breaks a recording."""
    p = nn.Parameter(torch.ones(5, device=device))
    update = Update(torch.optim.Adam([p], torch.tensor(0.1, device=device), fused=True))
    p.grad = torch.ones_like(p)
    update.step()
    started = []

    def fail(*_):
        raise AssertionError("waits")

    monkeypatch.setattr(start, "kernel", lambda *a, **k: started.append(k))
    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "cpu", "numpy"):
        monkeypatch.setattr(torch.Tensor, name, fail)
    update.step()
    assert len(started) == 1


@pytest.mark.float64
@pytest.mark.skipif(not INTERPRETING, reason="of tensors on the CPU")
def test_other_dtypes_devices_and_backends_are_pytorchs():
    double = Update(torch.optim.Adam(parameters(dtype=torch.float64), fused=True))
    reason = "of a parameter of shape (1,): the kernel takes float32, got torch.float64"
    assert double.why_not == reason
    two = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1, device="meta"))]
    update = Update(torch.optim.Adam(two))
    assert update.why_not == "the parameters are on more than one device"
    update = Update(torch.optim.Adam(parameters(), fused=True))
    assert update.why_not is None
    with use_backend("reference"):
        assert update.why_not == "the backend is PyTorch"
    empty = Update(torch.optim.Adam([nn.Parameter(torch.empty(0))], fused=True))
    assert empty.why_not.endswith("there is nothing to compute in an empty tensor")


def test_gradients_that_lie_otherwise_are_copied(started, device):
    torch.manual_seed(0)
    given = [nn.Parameter(torch.randn(shape, device=device)) for shape in ((6, 4), (5,), (5,))]
    theirs, exact = twin(given, torch.float32), twin(given, torch.float64)
    optimizer, *others = (torch.optim.Adam(p, 1e-2, fused=True) for p in (given, theirs, exact))
    update = Update(optimizer)
    for _ in range(3):
        of_norm = torch.randn(2, 5, device=device)
        gradients = torch.randn(4, 6, device=device).t(), of_norm[0], of_norm[1]
        for p, gradient in zip(given, gradients, strict=True):
            p.grad = gradient
        update.step()
        for of, other in zip((theirs, exact), others, strict=True):
            set_gradients(of, gradients)
            other.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(given, gradients, strict=True))
    assert started == ["adam"] * 3 and update.why_not is None
    assert_same(given, theirs, exact)


def test_a_sparse_gradient_is_pytorchs(started, device):
    p = nn.Parameter(torch.randn(6, 4, device=device))
    update = Update(torch.optim.Adam([p], fused=True))
    p.grad = torch.ones_like(p).to_sparse()
    with pytest.raises(RuntimeError, match="Adam does not support sparse gradients"):
        update.step()
    assert not started and update.why_not == "a gradient is no dense tensor"


class Graph:
    """Stands in for a CUDA graph: starts of kernels are recorded, and replayed as they were."""

    def __init__(self, monkeypatch):
        self._patch, self.starts = monkeypatch, []
        self.capturing = False
        monkeypatch.setattr(first_use, "is_captured", lambda device: self.capturing)

    def record(self, function):
        run = start.kernel
        self.capturing = True
        with self._patch.context() as patch:
            patch.setattr(start, "kernel", lambda *a, **k: self.starts.append((a, k)))
            patch.setattr(torch, "_foreach_add_", lambda *a: self.starts.append((a, None)))
            function()
        self.capturing = False
        return run

    def replay(self):
        for arguments, named in self.starts:
            if named is None:
                torch._foreach_add_(*arguments)
            else:
                start.kernel(*arguments, **named)


def test_a_recorded_update_replays_with_the_addresses_of_the_recording(device, monkeypatch):
    shapes = SHAPES[:3]
    given, gradients = parameters(shapes, device=device), draw_gradients(shapes, 4, device)
    theirs, exact = twin(given, torch.float32), twin(given, torch.float64)
    optimizer, *others = (torch.optim.Adam(p, 1e-2, fused=True) for p in (given, theirs, exact))
    update, graph = Update(optimizer), Graph(monkeypatch)
    # On a GPU memory for the table is there after one update by the kernel outside the graph.
    for of_step in (gradients[0], gradients[2]):
        set_gradients(given, of_step)
        update.step()
    update._spare[0] = torch.full((64,), -1, device=device)
    kept = [torch.empty_like(p) for p in given]
    for p, gradient in zip(given, kept, strict=True):
        p.grad = gradient
    with recording(update):
        graph.record(update.step)
        assert graph.starts[1][1]["table_ptr"].eq(-1).all()  # Nothing can be copied there yet.
    # Updates outside the graph, with gradients elsewhere, leave it alone.
    set_gradients(given, gradients[3])
    update.step()
    for gradient, value in zip(kept, gradients[2], strict=True):
        gradient.copy_(value)
    graph.replay()
    for i in (0, 2, 3, 2):
        for parameters_of, other in zip((theirs, exact), others, strict=True):
            set_gradients(parameters_of, gradients[i])
            other.step()
    assert_same(given, theirs, exact)
    assert all(optimizer.state[p]["step"].item() == 4 for p in given)


def test_somebody_elses_graph_records_pytorchs_own_step(device, monkeypatch, started):
    given = parameters(SHAPES[:2], device=device)
    optimizer = torch.optim.Adam(given, fused=True)
    update, graph = Update(optimizer), Graph(monkeypatch)
    set_gradients(given, [torch.ones(s, device=device) for s in SHAPES[:2]])
    update.step()
    started.clear()
    update._spare[0] = torch.empty(64, dtype=torch.int64, device=device)
    graph.capturing = True
    update.step()
    assert not started and optimizer.state[given[0]]["step"] == 2
    assert update.why_not == "a CUDA graph records that is not the step's own"


def test_a_network_of_any_size_is_the_same_kernel(monkeypatch):
    from test_specialisation import Keys

    keys = Keys()
    monkeypatch.setattr(start, "architecture", lambda tensor: "sm_90")
    for shapes, lr in (((3,),), 0.5), (((16, 16), (5,), (1,)), 1.0), (((4096, 3),), 0.0):
        given = parameters(shapes)
        weights = [adam.Weight(p, p, p, torch.ones(()), p, p.bfloat16()) for p in given]
        monkeypatch.setattr(start, "kernel", keys.add)
        adam.adam(adam.table(weights), weights, lr=lr, betas=(0.5, 0.9), eps=1e-8, weight_decay=0.0)
    assert len(keys.found) == 1
    adam.adam(adam.table(weights), weights, lr=lr, betas=(0.5, 0.9), eps=1e-8, weight_decay=0.5)
    assert len(keys.found) == 2


@pytest.mark.skipif(not INTERPRETING, reason="looks at addresses in the interpreter")
def test_masked_lanes_stay_inside(monkeypatch, device):
    from triton.runtime import interpreter

    given = parameters()
    update = Update(optimizer_of(given))
    set_gradients(given, [torch.ones_like(p) for p in given])
    update.step()
    spans, masked = [], []
    load = interpreter.InterpreterBuilder.create_masked_load
    run = start.kernel

    def starting(kernel, grid, reads=(), **arguments):
        reached = [*reads, arguments["table_ptr"]]
        spans[:] = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in reached]
        return run(kernel, grid, reads=reads, **arguments)

    def loading(builder, pointers, mask, *args):
        low, high = int(pointers.data.min()), int(pointers.data.max())
        assert any(first <= low and high < end for first, end in spans)
        masked.append(int((~mask.data.astype(bool)).sum()))
        return load(builder, pointers, mask, *args)

    monkeypatch.setattr(start, "kernel", starting)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", loading)
    update.step()
    assert sum(masked) > 0


@pytest.fixture
def by_kernel(monkeypatch):
    """The kernel makes updates and PyTorch all else, which takes long in the interpreter."""
    monkeypatch.setattr(updates, "selected_backend", lambda: "auto")
    with use_backend("reference"):
        yield


def networks(device):
    return DCGANGenerator(5, 4, 1, 16).to(device), DCGANDiscriminator(1, 4, 16).to(device)


def gan(seed, device, capture=False, **options):
    torch.manual_seed(seed)
    return GANStep(*networks(device), precision="bf16", capture=capture, **options)


def run(step, steps):
    torch.manual_seed(7)
    images = 2 * torch.rand(4, 1, 16, 16, device=step.device) - 1
    return [[t.item() for t in step(images)] for _ in range(steps)]


def test_a_loaded_step_goes_on_to_the_bit(by_kernel, started, device):
    step = gan(0, device)
    run(step, 3)
    state = copy.deepcopy(step.state_dict())
    expected = run(step, 3)
    for before in (0, 1, 2):  # Steps that the other one had made.
        other = gan(before, device)
        run(other, before)
        started.clear()
        other.load_state_dict(copy.deepcopy(state))
        assert run(other, 3) == expected
        assert started == ["adam"] * 6


def test_a_captured_step_records_its_updates_and_has_the_same_bits(by_kernel, device, monkeypatch):
    recorded = []

    class Recorder:
        def __init__(self, device):
            self.device = device

        def warm_up(self, function, times):
            function()

        def record(self, function):
            recorded.append([u._recorded is not None for u in step._precision.updates.values()])
            return function

    monkeypatch.setattr(base, "why_not_captured", lambda device, optimizers: None)
    monkeypatch.setattr(base, "CUDARecorder", Recorder)
    step = gan(0, device, capture=True)
    run(step, 3)
    assert recorded == [[True, True]]
    other = gan(0, device)
    run(other, 3)
    for name, module in step.modules.items():
        for p, q in zip(module.parameters(), other.modules[name].parameters(), strict=True):
            assert torch.equal(p, q), name


@pytest.mark.parametrize("merge", [True, False])
def test_a_gan_trains_as_with_pytorchs_own_step(merge, by_kernel, started, device, monkeypatch):
    step = gan(0, device, merge=merge)
    assert step.why_not_adam_kernel is None
    ours = run(step, 6)
    assert started == ["adam"] * 2 * 6
    monkeypatch.setattr(updates, "selected_backend", lambda: "reference")
    step = gan(0, device, merge=merge)
    reason = "the generator: the backend is PyTorch; the discriminator: the backend is PyTorch"
    assert step.why_not_adam_kernel == reason
    assert_same_losses(ours, run(step, 6))
    assert len(started) == 2 * 6


def test_fp16_and_a_vae_say_what_they_do(device):
    step = GANStep(*networks(device), precision="fp16")
    assert step.why_not_adam_kernel == "fp16 scales its losses, and PyTorch's own step knows how"
    from genfast.models import VAE

    step = VAEStep(VAE(16, 8, 2).to(device), precision="fp32", compile=False)
    assert step.why_not_adam_kernel is None
