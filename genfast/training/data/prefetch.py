"""Batches gathered by threads, and copied to the device, while the step before them runs.

The threads fill memory and do nothing else. Only the thread that takes the batches talks to CUDA,
for the step may be capturing a graph, which a call from another thread would break.
"""

import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait

import torch

THREADS = 4  # Mostly they wait for memory or for a disk, which serves several better than one.
BUFFERS = 6  # How many batches may be gathered, or copied, at a time.
COPIES_AHEAD = 2
STEPS_AHEAD = 8
PIECE = 64  # Images between two looks at whether to stop.
POLL_SECONDS = 0.0002


def sent(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor on its device or on a GPU; pinned on its way, as the host would else wait."""
    if t.device == device or device.type != "cuda":
        return t
    return t.pin_memory().to(device, non_blocking=True)


class WaitingClock:
    """Measures the share of the time in which training could not go on for lack of data.

    That is time in which the device had nothing left to do and the next batch was not there. On a
    CPU it is the time spent in `next(batches)`. On CUDA it is not: the host runs ahead of the
    device, and may well wait for a batch while the device is busy. There it is the time in which
    the host waited for a batch and all work was done, less a fraction of a millisecond, plus the
    time in which the device waited for the copy of a batch, known a few steps later. Images that
    lie on the device are never waited for.
    """

    def __init__(self):
        self.restart()

    def restart(self):
        """Let what was until now not count."""
        self._since = time.perf_counter()
        self._waited = 0.0

    def add(self, seconds):
        """Count these seconds as waiting."""
        self._waited += seconds

    def share(self):
        """The share, 0 to 1, of the time since the last `share` or `restart`; starts anew."""
        elapsed = time.perf_counter() - self._since
        share = min(1.0, self._waited / max(elapsed, 1e-9))
        self.restart()
        return share


class Prefetcher:
    """An iterator over batches that are gathered ahead, in order. End it by `close`, or by `with`.

    An error in a thread is raised by `next` in place of the batch it befell.

    Args:
        fill: `fill(indices, out)` writes the images with these indices into the uint8 array `out`;
            threads call it with parts of batches.
        indices: an endless iterable of int64 arrays, one a batch, all of one length.
        carrier: a `NoCopy` or a `CudaCopies`.
        clock: the `WaitingClock` to tell of waiting.
    """

    def __init__(self, fill, indices, carrier, clock):
        self._fill = fill
        self._indices = iter(indices)
        self._carrier = carrier
        self._clock = clock
        self._gathering = deque()
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(THREADS, "genfast-data")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def close(self):
        """End the threads, which stop in the middle of a batch."""
        self._closed.set()
        self._pool.shutdown(cancel_futures=True)

    def __iter__(self):
        return self

    def __next__(self):
        self._carrier.keep_pace()
        self._advance()
        while not self._carrier.started:
            self._wait()
            self._advance()
        return self._carrier.receive()

    def _advance(self):
        """Do all that can be done without waiting."""
        while self._carrier.started < COPIES_AHEAD and self._gathering:
            first = self._gathering[0]
            if not first.done() or (first.exception() and self._carrier.started):
                break  # An error waits until the batches before it have been taken.
            self._carrier.start(self._gathering.popleft().result())
        while len(self._gathering) < BUFFERS:
            buffer = self._carrier.take_buffer()
            if buffer is None:
                break
            self._gathering.append(self._pool.submit(self._gather, next(self._indices), buffer))

    def _wait(self):
        """Wait for the next batch or for a buffer, a moment at most."""
        started, busy = time.perf_counter(), self._carrier.device_is_busy()
        if self._gathering:
            wait([self._gathering[0]], POLL_SECONDS)
        else:
            time.sleep(POLL_SECONDS)
        if not busy:
            self._clock.add(time.perf_counter() - started)

    def _gather(self, indices, buffer):
        out = buffer.numpy()
        for start in range(0, len(indices), PIECE):
            if self._closed.is_set():
                break
            self._fill(indices[start : start + PIECE], out[start : start + PIECE])
        return buffer


class NoCopy:
    """Hands over the batches where they were gathered, each in memory of its own.

    Args:
        shape: the shape of a batch.
    """

    def __init__(self, shape):
        self._shape = shape
        self._ready = deque()

    @property
    def started(self):
        """How many batches `receive` can give."""
        return len(self._ready)

    def take_buffer(self):
        """A uint8 tensor to gather a batch into."""
        return torch.empty(self._shape, dtype=torch.uint8)

    def start(self, buffer):
        """Take a batch that has been gathered."""
        self._ready.append(buffer)

    def receive(self):
        """The first batch that has been started and not been received."""
        return self._ready.popleft()

    def keep_pace(self):
        """Nothing: the host cannot run ahead of itself."""

    def device_is_busy(self):
        """False: whoever asks is not computing."""
        return False


class CudaCopies:
    """Copies batches from a few pinned buffers to a GPU, on a stream beside that of the step.

    Args:
        device: a CUDA `torch.device`.
        shape: the shape of a batch.
        clock: the `WaitingClock` to tell how long the GPU waited for copies.
    """

    def __init__(self, device, shape, clock):
        self._stream = torch.cuda.Stream(device)
        self._clock = clock
        self._free = [
            torch.empty(shape, dtype=torch.uint8, pin_memory=True) for _ in range(BUFFERS)
        ]
        self._reading = deque()  # (buffer, event) of copies that may not have ended
        self._started = deque()  # (batch, event) of copies that have not been received
        self._waits = deque()  # the events between which the GPU waited for a copy
        self._before_batch = None

    @property
    def started(self):
        """How many batches `receive` can give."""
        return len(self._started)

    def take_buffer(self):
        """A pinned uint8 tensor to gather a batch into; None while copies read all of them."""
        while self._reading and self._reading[0][1].query():
            self._free.append(self._reading.popleft()[0])
        return self._free.pop() if self._free else None

    def start(self, buffer):
        """Start the copy of a batch that has been gathered."""
        with torch.cuda.stream(self._stream):
            batch = buffer.to(self._stream.device, non_blocking=True)
            copied = self._stream.record_event()
        self._reading.append((buffer, copied))
        self._started.append((batch, copied))

    def receive(self):
        """The first batch that has been started and not been received, for the current stream."""
        batch, copied = self._started.popleft()
        stream = torch.cuda.current_stream(self._stream.device)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record(stream)
        stream.wait_event(copied)
        after.record(stream)
        self._waits.append((before, after))
        # The batch lies in memory of the copying stream, which must not write there again before
        # the step is through with it.
        batch.record_stream(stream)
        return batch

    def keep_pace(self):
        """Let the host run ahead, but not so far that its batches fill the GPU's memory."""
        while len(self._waits) >= STEPS_AHEAD:
            before, after = self._waits.popleft()
            after.synchronize()
            self._clock.add(before.elapsed_time(after) / 1000)
        self._before_batch = torch.cuda.current_stream(self._stream.device).record_event()

    def device_is_busy(self):
        """Whether the GPU still has work from before the batch that is asked for."""
        return not self._before_batch.query()
