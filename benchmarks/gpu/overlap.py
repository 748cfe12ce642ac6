"""Captured training steps whose kernels start early, beside the same ones whose kernels do not.

In turns, in one process: a graph keeps what its kernels were captured as (kernels/overlap.py).
"""

import contextlib
import sys
from unittest import mock

import torch

from benchmarks import timing
from benchmarks.gpu.clock import deadline_of_arguments
from benchmarks.gpu.stages import MORE_TO_DO, RESULTS, digest_of
from benchmarks.gpu.table import Table
from benchmarks.variants import VARIANTS
from benchmarks.workloads import Workload
from genfast.launch import start, tape

RUNS = (("dcgan", 128), ("dcgan", 1024), ("vae", 128), ("conv-vae", 128))
COLUMNS = ("model", "batch_size", "early_images_per_s", "late_images_per_s", "speedup", "same_bits")
_SECONDS = 15
# Of each training whose losses are compared: some before a step is captured, most after.
_STEPS = 50


def main():
    deadline = deadline_of_arguments(__doc__)
    device = torch.device("cuda")
    if torch.version.hip or torch.cuda.get_device_capability(device) < start.LEAST_TO_START_EARLY:
        print("no kernel starts early on this GPU")
        return 0
    torch.backends.cudnn.benchmark = True
    table = Table(RESULTS / "overlap.csv", COLUMNS, digest_of("overlap"))
    for model, batch_size in RUNS:
        facts = {"model": model, "batch_size": batch_size}
        if facts in table:
            continue
        if deadline.left < 3 * _SECONDS:
            return MORE_TO_DO
        table.add(facts | compared(Workload.of(model, device, batch_size), _SECONDS))
    for row in table.rows:
        print(f"{row['model']} at {row['batch_size']}: {row['speedup']} times as fast with overlap")
    differ = [row["model"] for row in table.rows if row["same_bits"] != "True"]
    print(f"losses differ: {', '.join(differ)}" if differ else "all losses are the same bits")
    return 1 if differ else 0


def compared(workload, seconds, steps=_STEPS):
    """The table's facts of a workload.

    Args:
        workload: a `Workload`.
        seconds: how long to time both.
        steps: how many losses to compare.
    """
    images, made, losses = workload.images(), {}, {}
    for name, how in (("late", none_starts_early), ("early", contextlib.nullcontext)):
        with how():
            made[name] = VARIANTS["genfast"].build(workload)
            torch.manual_seed(0)
            losses[name] = torch.tensor([[*made[name](images)] for _ in range(steps)])
    rates = timing.interleaved(made, images, seconds)
    return {
        "early_images_per_s": f"{timing.summary(rates['early'])[0]:.0f}",
        "late_images_per_s": f"{timing.summary(rates['late'])[0]:.0f}",
        "speedup": f"{timing.ratio(rates['early'], rates['late']):.4f}",
        "same_bits": torch.equal(losses["early"], losses["late"]),
    }


@contextlib.contextmanager
def none_starts_early():
    """Within, each kernel starts when the one before it has ended."""
    # A tape replays kernels as they were when it was recorded.
    tape.forget()
    try:
        with mock.patch.object(start, "starts_early", lambda function, device: False):
            yield
    finally:
        tape.forget()


if __name__ == "__main__":
    sys.exit(main())
