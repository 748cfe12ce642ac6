"""A whole training step as one CUDA graph: captured once, then replayed with a single launch.

Parameters, batch norms' statistics and counters, the optimizers' moments and step counts, and the
random numbers of a replay go on from where they are, as in a step that was not captured.
"""

import warnings

import torch

from genfast.backend import selected_backend

_WARMUP_STEPS = 3
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
    miss: modes of modules, the parameters that are frozen, the backend, tensors that were replaced.
    Images of another shape than those captured first, and a step that cannot be captured, run as
    they are.

    Args:
        step: the function.
        modules, optimizers: lists of all that it changes.
        scalers: the gradient scalers it uses.
        recorder: makes of a function without arguments one that replays it: `CUDARecorder`.

    Attributes:
        failure: why capturing failed; None as long as it has not.
    """

    def __init__(self, step, modules, optimizers, scalers, recorder):
        self._step = step
        self._modules, self._optimizers, self._scalers = modules, optimizers, scalers
        self._recorder = recorder
        self._rates = [
            [_rate_on_device(group, recorder.device) for group in optimizer.param_groups]
            for optimizer in optimizers
        ]
        self._images = self._replay = self._losses = self._seen = None
        self.failure = None

    def __call__(self, images):
        """Make one step; the losses are the caller's to keep."""
        if self.failure or (self._images is not None and not _alike(images, self._images)):
            return self._step(images)
        self._take_rates()
        if self._replay is None or self._seen != self._fingerprint():
            self._replay = None  # Frees the memory of an outdated graph.
            self._images = images.clone()
            self._capture()
            if self.failure:
                return self._step(images)
        self._images.copy_(images)
        self._replay()
        return tuple(self._losses.clone())

    def _capture(self):
        state = _State(self._modules, self._optimizers, self._scalers, self._recorder.device)
        try:
            self._recorder.warm_up(lambda: self._step(self._images), _WARMUP_STEPS)
        finally:
            state.restore()
        try:
            self._replay = self._recorder.record(self._record)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            self.failure = f"the step could not be captured: {reason}"
            warnings.warn(f"genfast: {self.failure}; it runs uncaptured", stacklevel=4)
            state.restore()
            return
        self._seen = self._fingerprint()

    def _record(self):
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        self._losses = torch.stack(self._step(self._images))

    def _take_rates(self):
        """Let learning rates that somebody set as numbers reach the graph."""
        for optimizer, rates in zip(self._optimizers, self._rates, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                if group["lr"] is not rate:
                    rate.fill_(group["lr"])
                    group["lr"] = rate

    def _fingerprint(self):
        """What a graph has built into it, and does not read anew at each replay."""
        modes = [m.training for module in self._modules for m in module.modules()]
        settings = [
            [v for k, v in group.items() if k not in ("params", "lr")]
            for optimizer in self._optimizers
            for group in optimizer.param_groups
        ]
        tensors = [t for module in self._modules for t in _tensors(module)]
        frozen = [t.requires_grad for t in tensors]
        states = [t for o in self._optimizers for state in o.state.values() for t in state.values()]
        places = [t.data_ptr() for t in (*tensors, *states) if isinstance(t, torch.Tensor)]
        return selected_backend(), modes, settings, frozen, places


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
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            for _ in range(times):
                function()
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def record(self, function):
        """Record the function without running it; returns what replays it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            function()
        return graph.replay


class _State:
    """Everything that a warm-up changes, to be put back: values return, no tensor is replaced."""

    def __init__(self, modules, optimizers, scalers, device):
        self._device = device
        self._tensors = [t for module in modules for t in _tensors(module)]
        self._values = [t.detach().clone() for t in self._tensors]
        self._optimizers = optimizers
        self._moments = [
            {p: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}
            for optimizer in optimizers
        ]
        self._scalers = [(scaler, scaler.state_dict()) for scaler in scalers]
        self._cpu_rng = torch.get_rng_state()
        self._rng = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    @torch.no_grad()
    def restore(self):
        for tensor, value in zip(self._tensors, self._values, strict=True):
            tensor.copy_(value)
        for optimizer, moments in zip(self._optimizers, self._moments, strict=True):
            for parameter, state in optimizer.state.items():
                for name, tensor in state.items():
                    before = moments.get(parameter)
                    tensor.zero_() if before is None else tensor.copy_(before[name])
            optimizer.zero_grad(set_to_none=True)
        for scaler, state in self._scalers:
            if scaler._scale is None:  # It was not used yet, by the warm-up neither.
                continue
            scaler._scale.fill_(state["scale"])
            scaler._growth_tracker.fill_(state["_growth_tracker"])
        torch.set_rng_state(self._cpu_rng)
        if self._rng is not None:
            torch.cuda.set_rng_state(self._rng, self._device)


def _rate_on_device(group, device):
    """A group's learning rate as a scalar tensor, which a replay reads."""
    return torch.as_tensor(float(group["lr"]), dtype=torch.float32, device=device).clone()


def _tensors(module):
    yield from module.parameters()
    yield from module.buffers()


def _alike(a, b):
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
