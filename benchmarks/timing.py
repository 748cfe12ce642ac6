"""Times steps in short turns, one variant after another, so that a drift slows all of them."""

import statistics
import time

import torch

WARMUP_STEPS = 4


def interleaved(steps, images, seconds, turn_seconds=0.5, progress=None):
    """Time callables side by side.

    Args:
        steps: a dict of functions of a batch.
        images: the batch.
        seconds: how long to measure, warm-up aside. Each gets at least 3 turns.
        turn_seconds: about how long a turn is; it holds at least one step.
        progress: called with the seconds that have passed since its last call.

    Returns:
        A dict of lists: images a second in each turn. Turns of the same index are one round.
    """
    lengths = {}
    for name, step in steps.items():
        _run(step, images, WARMUP_STEPS)
        lengths[name] = max(1, round(turn_seconds / _run(step, images, 1)))
    rates = {name: [] for name in steps}
    order, turn = list(steps), 0
    started = before = time.perf_counter()
    while len(rates[order[-1]]) < 3 or time.perf_counter() - started < seconds:
        for name in order[::-1] if turn % 2 else order:
            count = lengths[name]
            rates[name].append(count * len(images) / _run(steps[name], images, count))
        order, turn = order[1:] + order[:1], turn + 1  # Nobody always follows the same one.
        now = time.perf_counter()
        if progress:
            progress(now - before)
        before = now
    return rates


def summary(rates):
    """(median, 20th percentile, 80th percentile) of a list of rates."""
    if len(rates) == 1:
        return (rates[0],) * 3
    cuts = statistics.quantiles(rates, n=10, method="inclusive")
    return statistics.median(rates), cuts[1], cuts[7]


def ratio(rates, others):
    """How many times as fast as another: the median of the quotients of turns of the same round.

    A machine that others share may be slower in one round than in the next; a quotient hardly is.
    """
    return statistics.median(a / b for a, b in zip(rates, others, strict=True))


def _run(step, images, count):
    """Seconds for so many steps."""
    _synchronize(images.device)
    started = time.perf_counter()
    for _ in range(count):
        step(images)
    _synchronize(images.device)
    return time.perf_counter() - started


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
