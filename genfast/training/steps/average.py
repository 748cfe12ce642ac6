"""The average of a network over a training: an exponential moving one of its weights and buffers.

What it draws is smoother than what the newest weights draw, and as good as the best of them (Yazıcı
et al., 2019; Karras et al., 2018).
"""

import copy

import torch


class Average:
    """Follows a network: average = decay * average + (1 - decay) * network, after each update.

    It begins as the network is. Floating-point buffers, such as a batch norm's statistics, are
    averaged too; counters are those of the network.

    Args:
        network: a `nn.Module`.
        decay: from 0, which is the network itself, to below 1.

    Attributes:
        module: the average, a copy of the network whose parameters want no gradient.

    Raises:
        ValueError: the decay is none, or the network cannot be copied.
    """

    def __init__(self, network, decay):
        if not (isinstance(decay, float | int) and 0 <= decay < 1):
            raise ValueError(f"expected ema to be a number from 0 to below 1, got {decay!r}")
        self._network, self._decay = network, float(decay)
        try:
            self.module = copy.deepcopy(network).requires_grad_(False)
        except Exception as error:  # Of a stranger's class it may be any.
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(
                f"expected a generator that can be copied for its average, but {reason}"
            ) from error

    @torch.no_grad()
    def update(self):
        """Take one more state of the network in. On a GPU that is two kernels."""
        averaged, newest, counters = [], [], []
        for ours, theirs in zip(_tensors(self.module), _tensors(self._network), strict=True):
            if ours.is_floating_point():
                averaged.append(ours)
                newest.append(theirs)
            else:
                counters.append((ours, theirs))
        torch._foreach_lerp_(averaged, newest, 1 - self._decay)
        if counters:
            torch._foreach_copy_(*map(list, zip(*counters, strict=True)))


def _tensors(module):
    return [*module.parameters(), *module.buffers()]
