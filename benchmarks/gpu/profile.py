"""Where one captured training step's time goes: by kernel, the gaps between them, and their number.

For genfast and for the strongest baseline whose step is one graph too.
"""

import sys

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.clock import deadline_of_arguments
from benchmarks.gpu.stages import RESULTS, digest_of
from benchmarks.gpu.table import Table
from benchmarks.variants import VARIANTS
from benchmarks.workloads import Workload

STEPS = 5
RUNS = (("dcgan", 128), ("dcgan", 1024), ("vae", 128), ("conv-vae", 128))
COLUMNS = ("model", "batch_size", "variant", "kernel", "count", "us", "share")


def main():
    deadline_of_arguments(__doc__)
    torch.backends.cudnn.benchmark = True
    table = Table(RESULTS / "profile.csv", COLUMNS, digest_of("profile"))
    for model, batch_size in RUNS:
        for variant in ("genfast", "graphed"):
            facts = {"model": model, "batch_size": batch_size, "variant": variant}
            if facts not in table:
                workload = Workload.of(model, torch.device("cuda"), batch_size)
                for row in profiled(VARIANTS[variant].build(workload), workload.images()):
                    table.add(facts | row)
            _show(table, facts)
    return 0


def profiled(step, images):
    """Rows for one step: each kernel by name, then "(gaps)" and "(all)"; `us` is of a step."""
    for _ in range(5):
        step(images)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            step(images)
        torch.cuda.synchronize()
    events = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return rows_of([(e.name, e.time_range.start, e.time_range.end) for e in events], STEPS)


def rows_of(events, steps):
    """As `profiled`, of (name, start, end) in microseconds over so many steps."""
    totals = {}
    for name, start, end in events:
        count, us = totals.get(name, (0, 0.0))
        totals[name] = count + 1, us + end - start
    wall = max(end for _, _, end in events) - min(start for _, start, _ in events)
    totals["(gaps)"] = 0, wall - sum(us for _, us in totals.values())
    totals["(all)"] = len(events), wall
    return [
        {
            "kernel": name[:100],
            "count": f"{count / steps:g}",
            "us": f"{us / steps:.2f}",
            "share": f"{us / wall:.4f}",
        }
        for name, (count, us) in sorted(totals.items(), key=lambda item: -item[1][1])
    ]


def _show(table, facts, most=14):
    rows = [row for row in table.rows if all(row[k] == str(v) for k, v in facts.items())]
    print(" ".join(map(str, facts.values())))
    for row in rows[:most]:
        print(
            f"  {row['us']:>9} us {float(row['share']):6.1%} {row['count']:>5} {row['kernel'][:80]}"
        )


if __name__ == "__main__":
    sys.exit(main())
