"""The weight of the KL divergence in a VAE's loss: beta, at once or after a warm-up."""

import math

import torch
from torch import nn


class KLWeight(nn.Module):
    """Beta (Higgins et al., 2017), reached in equal parts over the first updates.

    The weight of update i, counted from 1, is beta * min(1, i / warmup). A module, so that a
    captured step moves its counter as it moves a batch norm's, and a checkpoint keeps it.

    Args:
        beta: a number from 0. 1 is the evidence lower bound.
        warmup: the number of updates until beta is reached (Bowman et al., 2016; Sønderby et al.,
            2016), from 1.
        device: of the counter.

    Attributes:
        steps: an int64 scalar, how many updates there were.
    """

    def __init__(self, beta, warmup, device):
        super().__init__()
        self._beta, self._warmup = float(beta), warmup
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=device))

    @torch.no_grad()
    def forward(self):
        """Count one more update, and give its weight, a float32 scalar on the device."""
        self.steps.add_(1)
        return self._beta * (self.steps / self._warmup).clamp(max=1)


def check(beta, warmup):
    """ValueError unless these are a beta and a number of updates, or None for no warm-up."""
    number = isinstance(beta, int | float) and not isinstance(beta, bool)
    if not (number and 0 <= beta < math.inf):
        raise ValueError(f"expected beta to be a number from 0, got {beta!r}")
    if warmup is not None and not (type(warmup) is int and warmup >= 1):
        raise ValueError(
            f"expected beta_warmup to be a whole number of steps from 1, or None, got {warmup!r}"
        )
