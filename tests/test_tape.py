"""What is replayed is what was done: the same bits, in new memory, for tensors of the same kind."""

import copy
import gc
import json
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch
from cases import GEOMETRIES, Case
from oracle import evaluate, upstream_gradient
from test_ahead_of_time import OLDEST_TRITON
from test_chains import EACH, fused
from torch import nn

from genfast import functional, use_backend
from genfast.launch import tape

pytestmark = pytest.mark.kernels
ROOT = Path(__file__).parents[1]


@pytest.fixture
def replays(monkeypatch):
    """The functions that were replayed, or what else `tape.run` did, in order."""
    found, run, play = [], tape.run, tape.Tape.play

    def running(function, tensors, *settings, **known):
        found.append("ran")
        return run(function, tensors, *settings, **known)

    def playing(self, tensors):
        found[-1] = "replayed"
        return play(self, tensors)

    monkeypatch.setattr(tape, "run", running)
    monkeypatch.setattr(tape.Tape, "play", playing)
    return found


def untaped(monkeypatch):
    monkeypatch.setattr(tape, "run", lambda function, tensors, *s, **_: function(tensors, *s))


CASES = [
    Case(True, GEOMETRIES[0], (9, 6), 4, groups=2, layout="channels_last"),
    Case(False, GEOMETRIES[0], (3, 8), 2, bias=True, activation="leaky_relu"),
    Case(False, GEOMETRIES[3], (5, 7), 2, torch.bfloat16, bias=True, norm_in_float32=True),
    Case(True, GEOMETRIES[4], (5, 3), 2, mode="plain", activation="tanh", bias=True),
    Case(False, GEOMETRIES[12], (6, 1), 3, mode="plain", activation="leaky_relu", bias=True),
    Case(True, GEOMETRIES[2], (4, 5), 3, mode="evaluation", affine=False, activation="sigmoid"),
    Case(False, GEOMETRIES[5], (4, 5), 3, torch.float16, autocast=True, dy_layout="sliced"),
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_block_again_and_again(case, device, replays, monkeypatch):
    draws = []
    for seed in range(4):  # Run, recorded, replayed twice.
        torch.manual_seed(seed)
        tensors = case.tensors(device)
        draws.append((tensors, upstream_gradient(case, tensors)))

    def results():
        given = copy.deepcopy(draws)
        return [
            evaluate(case.fused, case, tensors, dy, autocast=case.autocast) for tensors, dy in given
        ]

    ours = results()
    assert replays == 4 * ["ran"] + 4 * ["replayed"]
    untaped(monkeypatch)
    for our, their in zip(ours, results(), strict=True):
        assert our.keys() == their.keys()
        for name, mine in our.items():
            assert mine is None or torch.equal(mine, their[name]), name
            assert mine is None or mine.stride() == their[name].stride(), name


@pytest.mark.one_in(2)
@EACH
def test_a_chain_again_and_again(network, shape, device, replays, monkeypatch):
    ours = fused(network()).to(device)
    theirs = copy.deepcopy(ours)
    draws = [torch.randn(shape, device=device) for _ in range(4)]

    def results(module):
        found = []
        for draw in draws:
            x = draw.clone().requires_grad_()
            y = module(x)
            gradients = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
            found.append([y.detach(), *gradients, *(b.clone() for b in module.buffers())])
        return found

    our = results(ours)
    assert replays == 4 * ["ran"] + 4 * ["replayed"]
    untaped(monkeypatch)
    for mine, their in zip(our, results(theirs), strict=True):
        assert all(map(torch.equal, mine, their))


def test_a_cumulative_average_and_frozen_parameters(device, replays, monkeypatch):
    def train():
        torch.manual_seed(0)
        module = fused(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None)))
        module.to(device)
        found = []
        for i in range(6):
            module[0].requires_grad_(i % 2 == 0)
            x = torch.randn(2, 3, 5, 5, device=device, requires_grad=True)
            module(x).square().sum().backward()
            parameters = [p.grad for p in module.parameters() if p.grad is not None]
            found += [x.grad, *(g.clone() for g in parameters), *map(torch.clone, module.buffers())]
        return found

    ours = train()
    assert replays.count("replayed") == 4 + 1 + 1  # Backward differs with what is frozen.
    untaped(monkeypatch)
    theirs = train()
    assert len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def block(x, weight, **options):
    return functional.conv_block(x, weight, padding=1, **options)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("folder", [None, OLDEST_TRITON], ids=["newest", "oldest"])
def test_what_starts_again_reaches_the_driver_as_triton_would_have_it(folder):
    if folder and not folder.exists():
        pytest.skip(f"{folder} is absent: `make test` installs Triton there")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [folder, ROOT] if folder else [ROOT]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    command = [sys.executable, str(ROOT / "tests/started_again.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    facts = [json.loads(line) for line in done.stdout.splitlines()]
    assert {f["kernel"] for f in facts} >= {"fprop", "dgrad", "wgrad", "norm_backward", "to_image"}
    assert all(f["arguments"] > 15 and not f["differ"] for f in facts), facts


def test_tensors_of_other_kinds_are_not_replayed(device, replays):
    def x(*shape, dtype=torch.float32):
        return torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)

    weight = x(16, 16, 3, 3)
    odd = torch.randn(1 + 2 * 16 * 25, device=device)[1:].view(2, 5, 5, 16).permute(0, 3, 1, 2)
    others = [
        (x(2, 16, 5, 5), weight, dict(activation="relu")),
        (x(2, 16, 5, 5), weight, dict(activation="leaky_relu", negative_slope=0.5)),
        (x(2, 16, 5, 6), weight, {}),
        (x(3, 16, 5, 5), weight, {}),
        (odd, weight, {}),  # Not at 16 bytes, which a descriptor needs.
        (x(2, 16, 5, 5), x(16, 16, 1, 1), {}),
        (x(2, 16, 5, 5, dtype=torch.bfloat16), weight.bfloat16(), {}),
    ]
    for _ in range(3):
        block(x(2, 16, 5, 5), weight)
    assert replays == ["ran", "ran", "replayed"]
    for given, w, options in others:
        del replays[:]
        ours = block(given, w, **options)
        with use_backend("reference"):
            theirs = block(given, w, **options)
        assert replays == ["ran"]
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_each_precision_of_float32_is_recorded_by_itself(device, replays, round_convolutions):
    x, weight = torch.randn(1, 4, 4, 4, device=device), torch.randn(4, 4, 3, 3, device=device)
    for precision in ("ieee", "tf32", "ieee"):
        round_convolutions(precision)
        for _ in range(3):
            block(x, weight)
    assert replays == 2 * ["ran", "ran", "replayed"] + 3 * ["replayed"]


def test_tensors_that_share_memory_are_not_recorded(device, replays):
    memory = torch.rand(2, 4, device=device) + 0.5
    mean, var = memory
    x, weight = torch.randn(1, 4, 4, 4, device=device), torch.randn(4, 4, 3, 3, device=device)
    statistics = dict(norm=True, running_mean=mean, running_var=var, training=False)
    for _ in range(4):
        ours = block(x, weight, **statistics)
    assert replays == 4 * ["ran"]
    (kept,) = (value for value in tape._tapes.values() if isinstance(value, tape.NoTape))
    assert kept.why == "two of the tensors share memory"
    with use_backend("reference"):
        torch.testing.assert_close(ours, block(x, weight, **statistics), rtol=1e-4, atol=1e-5)


STRANGER = torch.ones(3)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda tensors: [tensors[0] + STRANGER], "a tensor comes from elsewhere"),
        (lambda tensors: [STRANGER], "a tensor comes from elsewhere"),
        (lambda tensors: [tensors[0] * tensors[0].sum().item()], "gives more than tensors"),
        (lambda tensors: [tensors[0].view(torch.int32)], "a tensor comes from elsewhere"),
    ],
)
def test_what_a_replay_would_miss_is_not_recorded(function, why):
    for factor in (1.0, 2.0, 3.0):
        x = torch.arange(3.0) * factor
        (ours,) = tape.run(function, [x])
        assert torch.equal(ours, function([x])[0])
    (kept,) = tape._tapes.values()
    assert why in kept.why


def pytorchs(tensors):
    """Views, operations in place, several results, tensors in lists, results that are views."""
    x, y = tensors
    top, bottom = torch.cat([x, x * y]).chunk(2)
    mean, var = torch.var_mean(bottom.t(), 0)
    top.add_(mean)
    empty = x.new_empty(5).fill_(2.0)
    x.mul_(2)
    return [top, None, bottom[1:], var, empty, top, x]


def test_pytorchs_operations_are_replayed():
    for factor in range(1, 5):
        x, y = torch.arange(4.0).view(2, 2) + factor, torch.rand(2) + factor
        ours, theirs = [x.clone(), y], [x.clone(), y]
        found, expected = tape.run(pytorchs, ours), pytorchs(theirs)
        assert found[1] is None and found[0] is found[5]
        for mine, their in zip(found, expected, strict=True):
            assert mine is None or torch.equal(mine, their)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
        assert found[2].stride() == expected[2].stride()
    assert [type(t) for t in tape._tapes.values()] == [tape.Tape]


def test_memory_is_let_go_where_it_was(monkeypatch):
    alive = []

    def looking(self, slots):
        alive.append(sum(t is not None for t in slots))
        do(self, slots)

    def function(tensors):
        a = tensors[0] + 1
        b = a * 2
        del a
        c = b * 3
        del b
        return [c + 4]

    x = torch.ones(3)
    for _ in range(2):
        tape.run(function, [x])
    do = tape._Call.do
    monkeypatch.setattr(tape._Call, "do", looking)
    (result,) = tape.run(function, [x])
    assert alive == [1, 2, 2, 2]
    watched = weakref.ref(x), weakref.ref(result)
    del x, result
    gc.collect()
    assert [ref() for ref in watched] == [None, None]


def test_threads_at_once():
    """PyTorch's operations alone: the interpreter of kernels takes one thread."""
    x, y = torch.rand(64, 64), torch.rand(64)
    expected = pytorchs([x.clone(), y])
    wrong = []

    def work():
        for _ in range(50):
            found = tape.run(pytorchs, [x.clone(), y])
            if not all(
                a is b is None or torch.equal(a, b) for a, b in zip(found, expected, strict=True)
            ):
                wrong.append(found)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_oldest_is_forgotten(monkeypatch):
    monkeypatch.setattr(tape, "_LIMIT", 2)
    for _ in range(2):
        for n in (1, 2, 3):
            tape.run(pytorchs_sum, [torch.ones(n)])
    assert len(tape._tapes) == 2


def pytorchs_sum(tensors):
    return [tensors[0].sum()]


def test_an_error_leaves_no_recording(device):
    def fails(tensors):
        raise ValueError("on purpose")

    for _ in range(3):
        with pytest.raises(ValueError, match="on purpose"):
            tape.run(fails, [torch.ones(1)])
    assert getattr(tape._thread, "recorder", None) is None
    tape.run(pytorchs_sum, [torch.ones(3)])
