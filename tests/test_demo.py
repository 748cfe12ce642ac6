"""The demo's verdict: by the quotients of the same round, and none on a busy machine."""

import pytest
import torch

from genfast.training.runs import demo


@pytest.mark.parametrize(
    ("rates", "others", "words"),
    [
        ([200.0] * 20, [100.0] * 20, "2.00 times as many"),
        # The machine slows down by half after some rounds, for both alike.
        ([200.0] * 8 + [100.0] * 12, [100.0] * 8 + [50.0] * 12, "2.00 times as many"),
        # Whoever is interrupted in a round: a few rounds do not count,
        ([200.0] * 18 + [20.0] * 2, [100.0] * 20, "2.00 times as many"),
        # more do.
        (
            [200.0, 100.0, 300.0, 150.0] * 5,
            [100.0] * 20,
            "no verdict: the machine was too busy, 1.38 to 2.25 times as many in the middle half "
            "of 20 rounds",
        ),
        ([200.0] * 3, [100.0] * 3, "no verdict: only 3 rounds fitted into 25 s"),
    ],
)
def test_verdict(rates, others, words):
    assert demo.verdict(rates, others) == words


def test_both_take_turns_and_nobody_is_always_first(monkeypatch):
    monkeypatch.setattr(demo, "ROUNDS", 3)
    monkeypatch.setattr(demo, "WARMUP_STEPS", 0)
    monkeypatch.setattr(demo, "STEPS_A_TURN", 1)
    monkeypatch.setattr(demo, "_rate", lambda step, *rest: step())
    order = []
    steps = (lambda: order.append("a") or 1.0, lambda: order.append("b") or 2.0)
    rates = demo.compare(steps, None, (0.0, 1.0), torch.device("cpu"))
    assert "".join(order) == "ab" + "abbaab"
    assert rates == [[1.0] * 3, [2.0] * 3]
