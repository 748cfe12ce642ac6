"""What exchanges over NVLink would cost a training step on GPUs that are not here.

It is a model, not a measurement, and proves no speed. Its assumptions are the constants below.
"""

import csv
from pathlib import Path

# Of a ring over the NVLinks of 8 H100: 370 of the 450 GB/s of the line are what NCCL reaches
# without NVLink SHARP, as its maintainer says: github.com/NVIDIA/nccl-tests/issues/212.
BUS_BYTES_PER_SECOND = 370e9
# Assumed: the order of what nccl-tests prints for a few bytes on the 8 GPUs of a machine.
LATENCY_SECONDS = 20e-6
# Gradients are gathered into one tensor and put back: read and written twice, at the rate that the
# model of the step (benchmarks/model) assumes for memory.
MEMORY_BYTES_PER_SECOND = 3.0e12
STEPS = Path(__file__).parent / "results"
WORDS = (
    f"a model, not a measurement: ring over NVLink at {BUS_BYTES_PER_SECOND / 1e9:.0f} GB/s "
    f"(nccl-tests issue 212), {LATENCY_SECONDS * 1e6:.0f} us a call (assumed), nothing overlaps"
)


def all_reduce_seconds(count, nbytes, calls=1):
    """Seconds for all-reduces among `count` GPUs of so many bytes together.

    A ring moves 2 (n - 1) / n of the bytes over each link (nccl-tests, doc/PERFORMANCE.md).
    """
    if count == 1:
        return 0.0
    return calls * LATENCY_SECONDS + 2 * (count - 1) / count * nbytes / BUS_BYTES_PER_SECOND


def exchange_seconds(count, calls, nbytes):
    """Seconds that a step's exchanges on the GPU take; control goes by the host, meanwhile.

    Args:
        count: GPUs.
        calls, nbytes: of a step by purpose, dicts as `exchanges.counted` has them.
    """
    if count == 1:
        return 0.0
    purposes = ("gradients", "statistics", "losses")
    exchanged = sum(all_reduce_seconds(count, nbytes.get(p, 0), calls.get(p, 0)) for p in purposes)
    return exchanged + 4 * nbytes.get("gradients", 0) / MEMORY_BYTES_PER_SECOND


def step_seconds(batch):
    """Seconds of a DCGAN-64's step on one H100, of the model in benchmarks/results."""
    with open(STEPS / f"model_dcgan_batch{batch}_h100.csv", newline="", encoding="utf-8") as file:
        return sum(float(row["predicted_us"]) for row in csv.DictReader(file)) / 1e6
