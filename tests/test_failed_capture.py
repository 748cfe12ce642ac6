"""A capture that fails leaves no trace: what follows is, bit for bit, as if it was never tried."""

import warnings

import pytest
import torch
from torch import nn

from genfast.models import DCGANDiscriminator, DCGANGenerator
from genfast.training import GANStep
from genfast.training.steps import base
from genfast.training.steps.capture import CapturedStep
from genfast.training.steps.snapshot import Snapshot

CPU = torch.device("cpu")


class Recorder:
    """Runs what it is to record, and replays by running again.

    Attributes:
        fails_in: where `break_down` raises: "warm-up", "recording" or nowhere.
        failures: how often it still will.
    """

    device = CPU

    def __init__(self, device=CPU):
        self.warmed_up = self.recorded = self.failures = 0
        self.fails_in = self.now = None

    def warm_up(self, function, times):
        for i in range(times):
            self.warmed_up += 1
            self.now = "warm-up" if i == 1 else "another warm-up"  # The second one.
            function()
        self.now = None

    def record(self, function):
        self.recorded += 1
        if self.fails_in == "recording" and self.failures:
            self.now = "recording"
            function()
        return function

    def break_down(self):
        if self.now == self.fails_in and self.failures:
            self.failures -= 1
            self.now = None
            raise RuntimeError("a transient failure\nmore")
        return self.now


def _make(monkeypatch, precision, recorder, lr=2**-12):
    """A step whose discriminator's update breaks down where the recorder says so."""
    torch.manual_seed(0)
    networks = DCGANGenerator(8, 4, 3, 16), DCGANDiscriminator(3, 4, 16)
    optimizers = [torch.optim.Adam(n.parameters(), lr, (0.5, 0.999), fused=True) for n in networks]
    with monkeypatch.context() as patch:
        if recorder:
            patch.setattr(base, "why_not_captured", lambda device, optimizers: None)
            patch.setattr(base, "CUDARecorder", lambda device: recorder)
        step = GANStep(
            *networks, latent_shape=(8, 1, 1), optimizers=optimizers, precision=precision
        )
    if recorder:
        # In fp16 between a scaler's `step` and its `update`.
        owner = step.scalers.get("discriminator", step._precision)
        update = owner.update

        def breaking(*args, **kwargs):
            if precision == "fp16":
                recorder.break_down()
            update(*args, **kwargs)
            if precision != "fp16":
                recorder.break_down()

        owner.update = breaking
    return step


def _state(step):
    """All that a step may change, as a dict of tensors and plain things."""
    state = {"rng": torch.get_rng_state()}
    for name, module in step.modules.items():
        state |= {f"{name} {k}": v for k, v in module.state_dict().items()}
        state |= {f"{name} {k} gradient": p.grad for k, p in module.named_parameters()}
        kept = {k for m in module.modules() for k in vars(m)}
        state[f"{name} attributes"] = sorted(kept)
    for name, optimizer in step.optimizers.items():
        for i, p in enumerate(optimizer.param_groups[0]["params"]):
            state |= {f"{name} {i} {k}": v for k, v in optimizer.state.get(p, {}).items()}
        state[f"{name} settings"] = {
            k: v for k, v in optimizer.param_groups[0].items() if k != "params"
        }
        state[f"{name} optimizer"] = sorted(vars(optimizer))
    for name, scaler in step.scalers.items():
        state[f"{name} scale"], state[f"{name} growth"] = scaler._scale, scaler._growth_tracker
        state[f"{name} stages"] = [s["stage"] for s in scaler._per_optimizer_states.values()]
    for name, half in step._precision.half_weights.items():
        copies, gradients = half._copies.values(), half._gradients.values()
        state |= {f"{name} copy {i}": v for i, v in enumerate(copies)}
        state |= {f"{name} copy's gradient {i}": v for i, v in enumerate(gradients)}
    return {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}


def _assert_same(ours, expected):
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(ours[name], value), name
        else:
            assert ours[name] == value, name


def _images():
    torch.manual_seed(1)
    return torch.rand(4, 3, 16, 16) * 2 - 1


def _watch(step, recorder, seen):
    """Let `seen` get the state in which a step begins that no recorder runs."""
    (inner,) = step._run._steps.values()
    original = inner._step

    def watched(images):
        if inner._images is None:
            seen.append(_state(step))
        return original(images)

    inner._step = watched


@pytest.mark.parametrize("earlier", [0, 2], ids=["at first", "anew"])
@pytest.mark.parametrize(("where", "failures"), [("warm-up", 9), ("recording", 9)])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_failed_capture_was_never_tried(precision, where, failures, earlier, monkeypatch):
    recorder, images, seen = Recorder(), _images(), []
    step, plain = (_make(monkeypatch, precision, r) for r in (recorder, None))
    assert bool(plain._precision.half_weights) == (precision != "fp32")
    torch.manual_seed(2)
    expected = [plain(images) for _ in range(earlier)]
    for optimizer in plain.optimizers.values():
        optimizer.param_groups[0]["eps"] = 1e-7
    before = _state(plain)
    expected += [plain(images) for _ in range(3)]
    after = _state(plain)

    torch.manual_seed(2)
    ours = [step(images) for _ in range(earlier)]
    assert recorder.recorded == (earlier > 0) and step._run.failure is None
    for optimizer in step.optimizers.values():
        optimizer.param_groups[0]["eps"] = 1e-7  # Captures anew.
    recorder.fails_in, recorder.failures = where, failures
    _watch(step, recorder, seen)
    with pytest.warns(UserWarning, match="captured: a transient failure; it runs uncaptured"):
        ours += [step(images)]
    ours += [step(images) for _ in range(2)]
    assert failures - recorder.failures == (1 if where == "warm-up" else 2)
    _assert_same(seen[0], before)
    _assert_same(_state(step), after)
    assert all(map(torch.equal, sum(ours, ()), sum(expected, ())))


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_recording_that_failed_once_is_made_again(precision, monkeypatch):
    recorder, images = Recorder(), _images()
    recorder.fails_in, recorder.failures = "recording", 1
    step, plain = (_make(monkeypatch, precision, r) for r in (recorder, None))
    losses = []
    for each in (plain, step):
        torch.manual_seed(2)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            losses.append([each(images) for _ in range(3)])
    assert recorder.recorded == 2 and step._run.failure is None
    assert all(map(torch.equal, sum(losses[0], ()), sum(losses[1], ())))
    for name, module in step.modules.items():
        for key, value in plain.modules[name].state_dict().items():
            assert torch.equal(module.state_dict()[key], value), key


def test_learning_rates_are_the_numbers_that_were_set(monkeypatch):
    recorder, images = Recorder(), _images()
    recorder.fails_in, recorder.failures = "recording", 2
    step, plain = (_make(monkeypatch, "fp32", r, lr=2e-4) for r in (recorder, None))
    torch.manual_seed(2)
    expected = [plain(images) for _ in range(3)]
    torch.manual_seed(2)
    with pytest.warns(UserWarning, match="it runs uncaptured"):
        ours = [step(images) for _ in range(3)]
    assert all(map(torch.equal, sum(ours, ()), sum(expected, ())))
    for optimizer in step.optimizers.values():
        assert optimizer.param_groups[0]["lr"] == 2e-4
        assert type(optimizer.param_groups[0]["lr"]) is float


def test_a_changed_rate_outlives_a_failed_capture(monkeypatch):
    recorder, images = Recorder(), _images()
    step = _make(monkeypatch, "fp32", recorder)
    step(images)
    optimizer = step.optimizers["generator"]
    optimizer.param_groups[0]["lr"].fill_(0.125)  # As a scheduler does.
    optimizer.param_groups[0]["eps"] = 1e-7
    recorder.fails_in, recorder.failures = "recording", 2
    with pytest.warns(UserWarning, match="it runs uncaptured"):
        step(images)
    assert optimizer.param_groups[0]["lr"] == 0.125


def _captured(forward, recorder):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)

    def step(x):
        optimizer.zero_grad(set_to_none=True)
        loss = forward(model(x)).sum()
        loss.backward()
        optimizer.step()
        return (loss.detach(),)

    return model, CapturedStep(step, [model], [optimizer], [], recorder)


def test_an_error_of_the_step_itself_is_the_steps():
    bad = [True]

    def forward(y):
        if bad[0]:
            raise ValueError("expected something else")
        return y

    recorder = Recorder()
    _, captured = _captured(forward, recorder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="expected something else"):
            captured(torch.ones(3, 2))
        bad[0] = False
        captured(torch.ones(4, 2))
    assert captured.failure is None and recorder.recorded == 1


def test_an_interrupted_recording_leaves_no_trace():
    class Interrupted(Recorder):
        def record(self, function):
            function()
            raise KeyboardInterrupt

    model, captured = _captured(lambda y: y + torch.randn_like(y), Interrupted())
    before = [p.detach().clone() for p in model.parameters()]
    rng = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        captured(torch.ones(3, 2))
    assert all(map(torch.equal, model.parameters(), before))
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


def test_attributes_and_buffers_that_a_step_replaces_are_put_back():
    layer = nn.BatchNorm1d(2)
    layer.calls, layer.last = 1, None
    before = dict(layer._buffers)
    snapshot = Snapshot([layer], [], [], [], CPU)
    layer.calls, layer.last = 2, torch.ones(1)
    layer.running_mean = torch.ones(2)
    layer.register_buffer("new", torch.ones(1))
    layer.num_batches_tracked.add_(1)
    snapshot.put_back()
    assert (layer.calls, layer.last) == (1, None)
    assert layer._buffers.keys() == before.keys()
    assert all(layer._buffers[name] is before[name] for name in before)
    assert layer.num_batches_tracked == 0


def test_a_gpus_random_numbers_are_put_back(monkeypatch):
    states = {"cuda": torch.tensor([1])}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: states[device.type])
    monkeypatch.setattr(
        torch.cuda, "set_rng_state", lambda state, device: states.update({device.type: state})
    )
    for put_back in (Snapshot.put_back, Snapshot.put_values_back):
        snapshot = Snapshot([], [], [], [], torch.device("cuda"))
        states["cuda"] = torch.tensor([2])
        put_back(snapshot)
        assert states["cuda"] == 1
