"""What the recorder asks of PyTorch's CUDA graphs, with stand-ins as there may be no GPU."""

from contextlib import contextmanager

import pytest
import torch

from genfast.training.steps.capture import CUDARecorder

GPU = torch.device("cuda")


class Stream:
    """Notes what it waits for."""

    def __init__(self, device=None):
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)


class CUDA:
    """Stands in for `torch.cuda`: as there, a capture that fails at its end keeps its stream."""

    def __init__(self, monkeypatch):
        self.current = self.default = Stream()
        self.modes, self.fails = [], False
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    def replay(self):
        pass

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, *, stream, capture_error_mode="global"):
        self.modes.append(capture_error_mode)
        before, self.current = self.current, stream
        yield
        if self.fails:
            raise RuntimeError("operation failed due to a previous error during capture")
        self.current = before


def test_other_threads_may_allocate_during_a_capture(monkeypatch):
    cuda = CUDA(monkeypatch)
    assert CUDARecorder(GPU).record(lambda: None) == cuda.replay
    assert cuda.modes == ["thread_local"]


def test_a_capture_that_fails_leaves_its_stream(monkeypatch):
    cuda = CUDA(monkeypatch)
    cuda.fails = True
    with pytest.raises(RuntimeError, match="previous error during capture"):
        CUDARecorder(GPU).record(lambda: None)
    assert cuda.current is cuda.default


def test_what_follows_a_warm_up_that_fails_waits_for_it(monkeypatch):
    cuda = CUDA(monkeypatch)
    streams = []

    def fail():
        streams.append(cuda.current)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        CUDARecorder(GPU).warm_up(fail, 3)
    assert streams != [cuda.default]
    assert cuda.default.waited_for == streams
