"""A whole training step as one CUDA graph: captured once, then replayed with a single launch.

Parameters, batch norms' statistics and counters, the optimizers' moments and step counts, and the
random numbers of a replay go on from where they are, as in a step that was not captured.
"""

import warnings

import torch

from genfast.training.steps.built_in import BuiltIn
from genfast.training.steps.snapshot import Snapshot
from genfast.training.steps.updates import recording

_WARMUP_STEPS = 3
# A recording can fail by what another thread does meanwhile.
_ATTEMPTS = 2
# Adam's state before its first step is zeros, so a warm-up's trace can be taken out again.
_CAPTURABLE = (torch.optim.Adam, torch.optim.AdamW)


def why_not_captured(device, optimizers):
    """Say why a step cannot be captured; None if it can.

    Args:
        device: a `torch.device`.
        optimizers: those the step updates.
    """
    if device.type != "cuda":
        return f"only a GPU has graphs, and the device is {device}"
    for optimizer in optimizers:
        if type(optimizer) not in _CAPTURABLE:
            return f"only Adam and AdamW are captured, got {type(optimizer).__name__}"
        if not all(group["capturable"] for group in optimizer.param_groups):
            return "an optimizer was made without capturable=True"
    return None


class CapturedStep:
    """Runs `step(images) -> tuple of scalar tensors`, replaying what it captured of it.

    The first call captures. A later one captures anew when something changed that a replay would
    miss and `BuiltIn` sees. Images of another shape than those captured first, and a step that
    cannot be captured, run as they are. A capture that fails is tried once more, and leaves no
    trace: the step then runs as if there had been none.

    Args:
        step: the function.
        modules, optimizers: lists of all that it changes.
        scalers: the gradient scalers it uses.
        recorder: makes of a function without arguments one that replays it: `CUDARecorder`.
        half_weights: the `HalfWeights` it uses.
        updates: the `Update` of each optimizer.

    Attributes:
        failure: why capturing failed; None as long as it has not.
    """

    def __init__(self, step, modules, optimizers, scalers, recorder, half_weights=(), updates=()):
        self._step = step
        self._modules, self._optimizers, self._scalers = modules, optimizers, scalers
        self._half_weights, self._updates = half_weights, updates
        self._recorder = recorder
        self._rates = [
            [_rate_on_device(group, recorder.device) for group in optimizer.param_groups]
            for optimizer in optimizers
        ]
        # What somebody set, which the tensors above stand in for.
        self._set_rates = [[g["lr"] for g in optimizer.param_groups] for optimizer in optimizers]
        self.failure = None
        self._forget()

    def __call__(self, images):
        """Make one step; the losses are the caller's to keep."""
        if self.failure or (self._images is not None and not _alike(images, self._images)):
            return self._step(images)
        self._take_rates()
        if self._replay is None or not self._built_in.holds():
            self._forget()  # Frees the memory of an outdated graph.
            reason = self._capture(images)
            if reason:
                losses = self._step(images)  # Where the step itself is wrong, it says so here.
                self.failure = f"the step could not be captured: {reason}"
                warnings.warn(f"genfast: {self.failure}; it runs uncaptured", stacklevel=3)
                return losses
        self._images.copy_(images)
        self._replay()
        return tuple(self._losses.clone())

    def _forget(self):
        self._images = self._replay = self._losses = self._built_in = self._read = None

    def _capture(self, images):
        """Capture, or say why not, and then all is as it was before."""
        for _ in range(_ATTEMPTS):
            self._take_rates()
            before = Snapshot(
                self._modules,
                self._optimizers,
                self._scalers,
                self._half_weights,
                self._recorder.device,
            )
            warm = False
            try:
                self._images = images.clone()
                self._recorder.warm_up(lambda: self._step(self._images), _WARMUP_STEPS)
                before.put_values_back()
                warm = True
                with recording(*self._updates):
                    self._replay = self._recorder.record(self._record)
                self._built_in = BuiltIn(
                    [*self._modules, *self._optimizers, *self._scalers], self._recorder.device
                )
                # Memory from before the recording, which those who made it may let go.
                self._read = [part.recorded for part in (*self._half_weights, *self._updates)]
                return None
            except BaseException as error:
                self._forget()
                before.put_back()
                self._give_rates_back()
                if not isinstance(error, Exception):
                    raise
                # Not the error itself, which keeps what it was raised among.
                reason = str(error).partition("\n")[0] or type(error).__name__
            if not warm:  # Which no recording had to do with.
                break
        return reason

    def _record(self):
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        self._losses = torch.stack(self._step(self._images))

    def _take_rates(self):
        """Let learning rates that somebody set as numbers reach the graph."""
        for optimizer, rates, given in self._all_rates():
            for i, (group, rate) in enumerate(zip(optimizer.param_groups, rates, strict=True)):
                if group["lr"] is not rate:
                    given[i] = group["lr"]
                    rate.fill_(group["lr"])
                    group["lr"] = rate

    def _give_rates_back(self):
        """Let learning rates be what was set: a number has more digits than its tensor."""
        for optimizer, rates, given in self._all_rates():
            for group, rate, value in zip(optimizer.param_groups, rates, given, strict=True):
                if rate.item() != torch.as_tensor(value, dtype=rate.dtype).item():
                    # A scheduler has changed the tensor since.
                    value = value.copy_(rate) if isinstance(value, torch.Tensor) else rate.item()
                group["lr"] = value

    def _all_rates(self):
        return zip(self._optimizers, self._rates, self._set_rates, strict=True)


class CapturedTurns:
    """Runs a step that does not the same at each call: a `CapturedStep` for each turn.

    Args:
        make: a function that gives a `CapturedStep`.
        turn: a function that tells what the next call does, hashable.
    """

    def __init__(self, make, turn):
        self._make, self._turn = make, turn
        self._steps = {turn(): make()}

    def __call__(self, *given):
        """Make one step; the losses are the caller's to keep."""
        turn = self._turn()
        if turn not in self._steps:
            self._steps[turn] = self._make()
        return self._steps[turn](*given)

    @property
    def failure(self):
        """Why capturing failed, of the first turn where it did; None as long as it has not."""
        return next((step.failure for step in self._steps.values() if step.failure), None)


class CUDARecorder:
    """Warms up and records on a stream of its own, as PyTorch's notes on CUDA graphs ask for.

    Args:
        device: a CUDA `torch.device`.
    """

    def __init__(self, device):
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, function, times):
        """Run the function: kernels get compiled and libraries allocate."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(times):
                    function()
        finally:  # What is put back after an error must come after what ran.
            current.wait_stream(self._stream)

    def record(self, function):
        """Record the function without running it; returns what replays it."""
        graph = torch.cuda.CUDAGraph()
        # Whoever pins memory meanwhile, as a loader's thread does, would break a "global" capture.
        capture = torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local")
        # A capture that fails only when it ends does not leave its stream.
        with torch.cuda.stream(torch.cuda.current_stream(self.device)), capture:
            function()
        return graph.replay


def _rate_on_device(group, device):
    """A group's learning rate as a scalar tensor, which a replay reads."""
    return torch.as_tensor(float(group["lr"]), dtype=torch.float32, device=device).clone()


def _alike(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
