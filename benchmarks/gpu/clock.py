"""Times work on a GPU by replaying it from a graph, so that no launch from Python counts."""

import argparse
import itertools
import statistics
import time

import torch

_CALLS = 10  # In a graph.
_REPLAYS = 5


def microseconds(calls, seconds=0.02):
    """The median time of one call, in microseconds.

    Args:
        calls: functions that do the same on tensors of their own. They take turns, so that what one
            left in the cache does not serve the next; on a GPU all of them get captured.
        seconds: about how long to measure.
    """
    if not torch.cuda.is_available():
        return 1e6 * _median_of(calls[0], 1, 1)
    count = max(_CALLS, len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()  # Compiles, and lets libraries choose.
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for call in itertools.islice(itertools.cycle(calls), count):
                call()
    torch.cuda.synchronize()
    once = _events(graph, 2)
    replays = max(_REPLAYS, min(200, int(seconds / (once * 1e-3))))
    times = [_events(graph, 1) for _ in range(replays)]
    return 1e3 * statistics.median(times) / count


def _events(graph, replays):
    """Milliseconds of a replay."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(replays):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / replays


def host_microseconds(call, times=50):
    """The median time of one call as its caller sees it, launches included, in microseconds."""
    if not torch.cuda.is_available():
        return 1e6 * _median_of(call, 1, 1)
    for _ in range(3):
        call()
    return 1e6 * _median_of(call, 5, times // 5)


def _median_of(call, calls, rounds):
    times = []
    for _ in range(rounds):
        _synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        _synchronize()
        times.append((time.perf_counter() - started) / calls)
    return statistics.median(times)


def _synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Deadline:
    """How much of a stage's time is left."""

    def __init__(self, seconds):
        self._end = time.monotonic() + seconds

    @property
    def left(self):
        """Seconds, never below 0."""
        return max(0.0, self._end - time.monotonic())


def deadline_of_arguments(description):
    """The `Deadline` that `--seconds` sets for a stage."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=600.0, help="to stop after")
    return Deadline(parser.parse_args().seconds)
