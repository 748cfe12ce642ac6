"""Check, tune, time and profile on a GPU: python -m benchmarks.gpu.

One call takes at most `--minutes`; the next one picks up where it stopped. Each stage is a process
of its own, so a crash costs one stage. What was done, and with which sources, is in
benchmarks/results/gpu/stages.json; a stage whose sources changed is done again.

Who has half an hour begins with `--only ceilings tests`, then `--only tuning overlap`, then `--only
steps profile`, ten minutes each; `sanitizer` and `blocks`, which lets torch.compile tune itself for
a quarter of an hour, come after those.
"""

import argparse
import datetime
import json
import subprocess
import sys
import time

import torch
from tqdm import tqdm

from benchmarks import machine
from benchmarks.gpu.stages import MORE_TO_DO, RESULTS, ROOT, STAGES

_SPARE_SECONDS = 10  # To write results and leave.


def main():
    """Returns the exit status: 1 if a stage failed."""
    args = _parser().parse_args()
    if not torch.cuda.is_available():
        sys.exit("expected a CUDA or ROCm GPU, PyTorch finds none")
    deadline = time.monotonic() + 60 * args.minutes
    RESULTS.mkdir(parents=True, exist_ok=True)
    done = _read_state()
    failed = False
    chosen = [stage for stage in STAGES if args.only is None or stage.name in args.only]
    for stage in tqdm(chosen, "stages"):
        record = done.get(stage.name, {})
        is_done = record.get("outcome") == "complete" and stage.name not in args.again
        if is_done and record["digest"] == stage.digest:
            continue
        left = deadline - time.monotonic() - _SPARE_SECONDS
        if left < 20:
            print(f"no time left for {stage.name} and what follows; call again", flush=True)
            break
        done[stage.name] = _run(stage, left)
        failed |= done[stage.name]["outcome"] == "failed"
        (RESULTS / "stages.json").write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
    for name, record in done.items():
        print(f"{name:10} {record['outcome']:10} {record['seconds']:6.0f} s  {record['last_line']}")
    return 1 if failed else 0


def _run(stage, seconds):
    print(f"== {stage.name}, at most {seconds:.0f} s", flush=True)
    started = time.monotonic()
    command = [sys.executable, "-m", f"benchmarks.gpu.{stage.name}", "--seconds", f"{seconds:.0f}"]
    log = RESULTS / f"{stage.name}.log"
    with open(log, "w", encoding="utf-8") as file:
        try:
            done = subprocess.run(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds + 5
            )
            status = done.returncode
        except subprocess.TimeoutExpired:
            status = MORE_TO_DO
    outcomes = {0: "complete", MORE_TO_DO: "unfinished"}
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    print("\n".join(lines[-25:]), flush=True)
    return {
        "outcome": outcomes.get(status, "failed"),
        "digest": stage.digest,
        "seconds": round(time.monotonic() - started),
        "last_line": (lines or ["it printed nothing"])[-1][-160:],
        **machine.describe(torch.device("cuda")),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _read_state():
    path = RESULTS / "stages.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.split("\n")[0]
    )
    names = [stage.name for stage in STAGES]
    parser.add_argument("--minutes", type=float, default=9.0, help="of this call (default: 9)")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STAGE", help=", ".join(names))
    parser.add_argument(
        "--again", nargs="+", choices=names, default=(), metavar="STAGE", help="even if complete"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
