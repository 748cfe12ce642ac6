"""Passing over what is not finite: a gradient's update, and what it left in a network's buffers.

All of it is decided on the device, without waiting for it.
"""

from contextlib import contextmanager

import torch
from torch import nn


class Skipped(nn.Module):
    """Counts the updates that were passed over: `count`, a whole number on the device."""

    count: torch.Tensor

    def __init__(self, device):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def add_unless_finite(self, gradients):
        """One more, if a value of these tensors is not finite."""
        if gradients:
            largest = torch.stack(torch._foreach_norm(gradients, torch.inf))
            self.count += largest.isfinite().all().logical_not()


@contextmanager
def kept_finite(networks):
    """Afterwards, the buffers of a network in which one is not finite any more are as before."""
    kept = []
    with torch.no_grad():
        for network in networks:
            buffers = list(network.buffers())
            if any(b.is_floating_point() for b in buffers):
                kept.append((buffers, [b.clone() for b in buffers]))
    yield
    with torch.no_grad():
        for buffers, before in kept:
            floats = [b for b in buffers if b.is_floating_point()]
            finite = torch.stack([b.isfinite().all() for b in floats]).all()
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(torch.where(finite, buffer, value))
