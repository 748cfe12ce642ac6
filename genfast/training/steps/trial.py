"""Running a network to learn something about it, without a trace."""

from contextlib import contextmanager

import torch

from genfast.training.steps.layers import DROPOUT


@contextmanager
def undone(network, device):
    """Within, the network may run: what it moved and the random numbers are put back afterwards.

    That is its buffers, and attributes that are numbers, as counters of calls are. What else a
    `forward` keeps stays as it was left.
    """
    numbers = [
        (m, {k: v for k, v in vars(m).items() if type(v) in (bool, int, float)})
        for m in network.modules()
    ]
    buffers = [(m, name, b) for m in network.modules() for name, b in m._buffers.items()]
    values = [None if b is None else b.data for _, _, b in buffers]
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            for _, _, buffer in buffers:
                if buffer is not None:
                    buffer.data = buffer.data.clone()
            yield
        finally:
            for module, kept in numbers:
                vars(module).update(kept)
            for (module, name, buffer), value in zip(buffers, values, strict=True):
                module._buffers[name] = buffer
                if buffer is not None:
                    buffer.data = value


@contextmanager
def redrawn(network, seed):
    """Within, every weight is drawn anew: what holds then is no accident of the present weights.

    A layer that a weight of 0 switches off for now is at work. Weights of products are drawn as by
    He et al. (2015), all others from N(0, 1).
    """
    generator = torch.Generator().manual_seed(seed)
    kept = [(p, p.data) for p in network.parameters() if p.is_floating_point()]
    try:
        for parameter, value in kept:
            scale = (2 / max(value[0].numel(), 1)) ** 0.5 if value.dim() > 1 else 1.0
            drawn = torch.randn(value.shape, generator=generator) * scale
            # Not filled in place: a graph that keeps the parameter for backward would notice.
            parameter.data = torch.empty_like(value).copy_(drawn)
        yield
    finally:
        for parameter, value in kept:
            parameter.data = value


@contextmanager
def without_dropout(network):
    """Within, PyTorch's dropout layers let everything pass."""
    layers = [m for m in network.modules() if type(m) in DROPOUT and m.training]
    try:
        for layer in layers:
            layer.training = False
        yield
    finally:
        for layer in layers:
            layer.training = True
