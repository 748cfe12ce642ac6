"""Whole training steps beside every baseline: `benchmarks.throughput`, model by model.

Without cold starts, each of which compiles everything anew in a process of its own: a dozen of them
take longer than a call may. What is compiled here is kept, for a run that did not come to its end.
"""

import subprocess
import sys
import time

import torch

from benchmarks import machine
from benchmarks.gpu.clock import deadline_of_arguments
from benchmarks.gpu.stages import MORE_TO_DO, ROOT, digest_of
from benchmarks.throughput import RESULTS

# Most important first; and the seconds below which one is not begun.
RUNS = (
    ("dcgan", 128, 240),
    ("dcgan", 1024, 240),
    ("vae", 128, 150),
    ("conv-vae", 128, 200),
)
_TIMING_SECONDS = 20


def main():
    deadline = deadline_of_arguments(__doc__)
    device = torch.device("cuda")
    notes = RESULTS / "gpu" / "steps.txt"
    done = notes.read_text().splitlines() if notes.exists() else []
    digest = digest_of("steps")
    unfinished = failed = False
    for model, batch_size, least in RUNS:
        name = f"{model} {batch_size} {digest}"
        if name in done:
            continue
        if deadline.left < least:
            unfinished = True
            break
        command = [
            sys.executable, "-m", "benchmarks.throughput", "--model", model, "--batch-size",
            str(batch_size), "--device", "cuda", "--seconds", str(_TIMING_SECONDS),
            "--no-cold-start",
        ]  # fmt: skip
        started = time.time()
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=deadline.left).returncode
        except subprocess.TimeoutExpired:
            print(f"{model} at batch {batch_size} ran out of time", flush=True)
            unfinished = True
            break
        failed |= status != 0
        # One variant that gets no speed leaves those of the others, which need not be timed again.
        if status == 0 or _is_written(model, batch_size, started):
            done.append(name)
            notes.write_text("\n".join(done) + "\n")
    print(f"steps on {machine.name(device)}: {len(done)} of {len(RUNS)} runs noted")
    return MORE_TO_DO if unfinished else int(failed)


def _is_written(model, batch_size, since):
    found = RESULTS.glob(f"throughput_{model}_batch{batch_size}_cuda-*.csv")
    # A file system's clock may be behind by some milliseconds.
    return any(path.stat().st_mtime > since - 1 for path in found)


if __name__ == "__main__":
    sys.exit(main())
