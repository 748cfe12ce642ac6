"""The captured step, with a recorder that replays by running again, as there may be no GPU."""

import copy

import pytest
import torch
from torch import nn

from genfast.training.steps.capture import CapturedStep, why_not_captured

CPU = torch.device("cpu")


class Recorder:
    """Counts what is asked of it; replaying runs the function."""

    device = CPU

    def __init__(self, fails=False):
        self.warmed_up = self.recorded = self.replayed = 0
        self.fails = fails

    def warm_up(self, function, times):
        self.warmed_up += times
        for _ in range(times):
            function()

    def record(self, function):
        self.recorded += 1
        if self.fails:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

        def replay():
            self.replayed += 1
            function()

        return replay


def make(recorder=None, seed=0, **options):
    """A model with everything a step changes: weights, statistics, a counter, moments, noise."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=2**-7, fused=True, **options)

    def step(x):
        optimizer.zero_grad(set_to_none=True)
        loss = (model(x + torch.randn_like(x)) ** 2).mean()
        loss.backward()
        optimizer.step()
        return loss.detach(), loss.detach() + 1

    captured = recorder and CapturedStep(step, [model], [optimizer], [], recorder)
    return model, optimizer, captured or step


def state(model, optimizer):
    moments = [t for s in optimizer.state.values() for t in s.values()]
    return [t.clone() for t in (*model.state_dict().values(), *moments, torch.get_rng_state())]


def run(step, steps=5):
    torch.manual_seed(1)
    x = torch.randn(6, 3)
    torch.manual_seed(2)
    return [torch.stack(tuple(step(x))) for _ in range(steps)]


def test_warm_up_leaves_no_trace():
    plain_model, plain_optimizer, plain = make()
    recorder = Recorder()
    model, optimizer, captured = make(recorder)
    for ours, expected in zip(run(captured), run(plain), strict=True):
        assert torch.equal(ours, expected)
    plain_state, ours = state(plain_model, plain_optimizer), state(model, optimizer)
    assert all(map(torch.equal, ours, plain_state))
    assert (recorder.warmed_up, recorder.recorded, recorder.replayed) == (3, 1, 5)


def test_moments_from_before_are_kept():
    _, _, plain = make()
    run(plain)
    expected = run(plain)
    model, optimizer, uncaptured = make()
    run(uncaptured)
    captured = CapturedStep(uncaptured, [model], [optimizer], [], Recorder())
    assert all(map(torch.equal, run(captured), expected))


def test_losses_are_the_callers_to_keep():
    _, _, captured = make(Recorder())
    first = captured(torch.ones(6, 3))
    before = [t.item() for t in first]
    captured(torch.zeros(6, 3))
    assert [t.item() for t in first] == before


def test_learning_rates_reach_the_graph():
    recorder = Recorder()
    _, optimizer, captured = make(recorder)
    _, plain_optimizer, plain = make()
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    plain_schedule = torch.optim.lr_scheduler.ExponentialLR(plain_optimizer, 0.5)
    for _ in range(3):
        torch.testing.assert_close(run(captured, 1), run(plain, 1))
        schedule.step()
        plain_schedule.step()
    for group in (*optimizer.param_groups, *plain_optimizer.param_groups):
        group["lr"] = 0.3
    torch.testing.assert_close(run(captured), run(plain))
    assert recorder.recorded == 1
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.3)


@pytest.mark.parametrize(
    "change",
    [
        lambda model, optimizer: model[1].eval(),
        lambda model, optimizer: model[0].weight.requires_grad_(False),
        lambda model, optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
        lambda model, optimizer: optimizer.param_groups[0].update(weight_decay=0.1),
        lambda model, optimizer: setattr(model[2], "weight", nn.Parameter(torch.ones(1, 4))),
    ],
    ids=["mode", "frozen", "loaded moments", "weight decay", "replaced weight"],
)
def test_what_a_replay_would_miss_is_captured_anew(change):
    recorder = Recorder()
    model, optimizer, captured = make(recorder)
    run(captured, 2)
    change(model, optimizer)
    run(captured, 2)
    assert recorder.recorded == 2


def test_loading_weights_needs_no_new_capture():
    recorder = Recorder()
    model, _, captured = make(recorder)
    other, _, plain = make(seed=3)
    run(captured, 1)
    model.load_state_dict(other.state_dict())
    run(captured, 1)
    assert recorder.recorded == 1


def test_another_batch_size_runs_uncaptured():
    recorder = Recorder()
    _, _, captured = make(recorder)
    captured(torch.ones(6, 3))
    assert len(captured(torch.ones(4, 3))) == 2
    captured(torch.ones(6, 3))
    assert (recorder.recorded, recorder.replayed) == (1, 2)


def test_a_step_that_cannot_be_captured_runs_all_the_same():
    model, optimizer, captured = make(Recorder(fails=True))
    plain_model, plain_optimizer, plain = make()
    with pytest.warns(UserWarning, match="not permitted when stream is capturing; it runs uncap"):
        ours = run(captured)
    assert all(map(torch.equal, ours, run(plain)))
    assert all(map(torch.equal, state(model, optimizer), state(plain_model, plain_optimizer)))
    assert "could not be captured" in captured.failure


def test_why_not_captured():
    cuda = torch.device("cuda")
    weights = [nn.Parameter(torch.ones(2))]
    assert why_not_captured(cuda, [torch.optim.AdamW(weights, capturable=True)]) is None
    assert "device is cpu" in why_not_captured(CPU, [])
    assert "got SGD" in why_not_captured(cuda, [torch.optim.SGD(weights)])
    assert "capturable=True" in why_not_captured(cuda, [torch.optim.Adam(weights)])
