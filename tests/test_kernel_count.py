"""How many kernels a step of a DCGAN-64 starts, counted without a GPU.

On a GPU a small kernel costs a few microseconds however little it does, so kernels are a cost of
their own. Here nothing is computed: the kernels of genfast are counted instead of started, at the
sizes and with the tiles of a real step on sm_90, and PyTorch's operations run on the CPU and are
counted as one kernel each.
"""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from genfast.backend import INTERPRETING
from genfast.launch import start
from genfast.models import DCGANDiscriminator, DCGANGenerator
from genfast.training import GANStep

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not INTERPRETING, reason="counts on the CPU; on a GPU test_gpu.py does"),
]

# By batch: sums over many tiles take another kernel.
MOST_KERNELS = {64: 89, 128: 89, 1024: 96}
# Beside views: operations that take memory without writing to it, and the profiler's marks.
_START_NOTHING = (
    "_record_function_enter_new", "_record_function_exit", "detach", "empty", "empty_like",
    "empty_strided", "new_empty", "new_empty_strided",
)  # fmt: skip


class Operations(TorchDispatchMode):
    """Counts PyTorch's operations into a list of names."""

    def __init__(self, names):
        super().__init__()
        self._names = names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if not function.is_view and name not in _START_NOTHING:
            self._names.append(name)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def started(monkeypatch):
    """The names of the kernels that genfast would start."""
    names = []
    monkeypatch.setattr(start, "architecture", lambda tensor: "sm_90")
    monkeypatch.setattr(
        start, "kernel", lambda kernel, grid, **arguments: names.append(kernel.__name__)
    )
    # Filling fresh memory with NaN, as tests of the kernels do, would count too.
    torch.use_deterministic_algorithms(False)
    return names


@pytest.mark.parametrize("batch_size", [64, 128, 1024])
def test_a_step_starts_few_kernels(batch_size, started):
    step = GANStep(
        DCGANGenerator(),
        DCGANDiscriminator(),
        precision="bf16",
        capture=False,
        output="logits",  # Nothing is computed, so there is nothing to check.
    )
    images = torch.zeros(batch_size, 3, 64, 64).to(memory_format=torch.channels_last)
    step(images)  # The first step also makes what later ones reuse.
    counted = []
    for _ in range(2):  # What is recorded, and what is replayed.
        started.clear()
        with Operations(started):
            step(images)
        counted.append(list(started))
    assert counted[0] == counted[1]
    counts = Counter(started)
    # Three layers of each network, and the ends that have kernels of their own.
    assert counts["fprop"] == 9 and counts["dgrad"] == 8 + 1 and counts["wgrad"] == 6 + 1
    assert counts["fprop_image"] == 3 and counts["to_image"] == 2
    # The ninth dgrad is one with the weight gradient at the images.
    assert counts["dgrad_wgrad_image"] == 1 and counts["wgrad_image"] == 0
    # The gradients beside images and logits are computed twice, and no norm's pass reads them.
    assert counts["norm_sums_image"] == 1 and counts["norm_backward"] == 7
    assert counts["join_images"] == 1 and counts["pad_image"] == 1 and counts["cat"] == 0
    assert counts["logits_fprop"] == 2 and counts["logits_dgrad"] == 4
    assert counts["logits_wgrad"] == 1
    assert counts["logit_loss"] == 2 and counts["logit_loss_backward"] == 0
    # Each network's step counters, and all else of its update.
    assert counts["_foreach_add_"] == counts["adam"] == 2 and not counts["_fused_adam_"]
    stacks_losses = 1  # In a captured step.
    assert len(started) + stacks_losses <= MOST_KERNELS[batch_size], started
