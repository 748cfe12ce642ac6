"""Training on several processes of this machine: python -m benchmarks.scaling.

Weak scaling: each process has its own batch, on a CPU one thread, so that twice the processes have
twice the work. Groups of processes take turns within one run. Bytes a step are counted. Beside them
stands a model of 8 H100, which is no measurement: nccl_model.py.
"""

import argparse
import csv
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks import exchanges, machine, nccl_model, timing
from benchmarks.throughput import RESULTS
from benchmarks.workloads import MODELS, Workload
from genfast.training import GANStep, VAEStep
from genfast.training.runs.workers import convert_batch_norms, joined

WARMUP_STEPS, COUNTED_STEPS, TURN_SECONDS = 3, 2, 4.0
BATCHES, GPUS = (128, 1024), (1, 2, 4, 8)  # Of the model.
COLUMNS = (
    "kind", "model", "batch_size", "image_size", "processes", "sync_bn",
    "images_per_s", "p20", "p80", "turns", "efficiency", "efficiency_p20", "efficiency_p80",
    *(f"{purpose}_{what}" for purpose in exchanges.PURPOSES for what in ("calls", "bytes")),
    "step_us", "exchange_us", "note",
    "machine", "torch", "triton", "python", "date",
)  # fmt: skip


def measure(model, counts, seconds, device, batch_size=None):
    """Rows of what was measured, dicts by the names in `COLUMNS`, and the counts of the largest.

    Args:
        model: one of `workloads.MODELS`.
        counts: numbers of processes, 1 among them.
        seconds: how long to time all groups together.
        device: "cpu" or "cuda".
        batch_size: a process's; None for the model's own.

    Returns:
        (rows, calls, bytes): the last two of a step by `sync_bn` and purpose.
    """
    groups = [(count, sync) for count in counts for sync in ((False, True) if count > 1 else (0,))]
    with ExitStack() as stack:
        started = {
            (count, bool(sync)): stack.enter_context(
                _Group(model, count, bool(sync), device, batch_size)
            )
            for count, sync in groups
        }
        facts = {key: group.ready() for key, group in started.items()}
        rates = {key: [] for key in started}
        ends = time.monotonic() + seconds
        with tqdm(total=seconds, desc="timing", leave=False, unit="s") as bar:
            while time.monotonic() < ends or len(rates[1, False]) < 3:
                order = list(started)
                for key in order[:: -1 if len(rates[1, False]) % 2 else 1]:
                    rates[key].append(started[key].turn(TURN_SECONDS))
                    bar.update(TURN_SECONDS)
    rows = []
    for (count, sync), found in rates.items():
        middle, low, high = timing.summary(found)
        shares = [rate / (count * one) for rate, one in zip(found, rates[1, False], strict=True)]
        share, low_share, high_share = timing.summary(shares)
        rows.append(
            _row("measured", model, facts[count, sync], count, sync)
            | {
                "images_per_s": f"{middle:.1f}", "p20": f"{low:.1f}", "p80": f"{high:.1f}",
                "turns": len(found), "efficiency": f"{share:.3f}",
                "efficiency_p20": f"{low_share:.3f}", "efficiency_p80": f"{high_share:.3f}",
            }
        )  # fmt: skip
    return rows, {sync: facts[max(counts), sync] for sync in (False, True)}


def predict(facts):
    """Rows of the model of a DCGAN-64 on H100s; see nccl_model.py.

    facts: of a step by `sync_bn`, as `measure` gives them. Of statistics the kernels make two
        exchanges for each use of a batch norm, one a way.
    """
    rows = []
    for batch in BATCHES:
        alone = nccl_model.step_seconds(batch)
        for sync, fact in facts.items():
            calls = fact["calls"] | {"statistics": 2 * fact["calls"].get("norms", 0)}
            for count in GPUS:
                exchange = nccl_model.exchange_seconds(count, calls, fact["bytes"])
                rows.append(
                    _row("model", "dcgan", fact | {"calls": calls}, count, sync)
                    | {
                        "batch_size": batch,
                        "images_per_s": f"{count * batch / (alone + exchange):.0f}",
                        "efficiency": f"{alone / (alone + exchange):.3f}",
                        "step_us": f"{alone * 1e6:.0f}",
                        "exchange_us": f"{exchange * 1e6:.0f}",
                        "note": nccl_model.WORDS,
                    }
                )
    return rows


def _row(kind, model, fact, count, sync):
    row = {
        "kind": kind, "model": model, "batch_size": fact["batch_size"],
        "image_size": fact["image_size"], "processes": count, "sync_bn": int(sync),
    }  # fmt: skip
    for purpose in exchanges.PURPOSES:
        for what in ("calls", "bytes"):
            row[f"{purpose}_{what}"] = round(fact[what].get(purpose, 0)) if count > 1 else 0
    return row


class _Group:
    """Processes that train together when it is their turn, and wait meanwhile."""

    def __init__(self, model, count, sync, device, batch_size):
        settings = dict(model=model, sync=sync, device=device, batch_size=batch_size)
        command = [sys.executable, "-m", "benchmarks.scaling", "--worker", json.dumps(settings)]
        port = _free_port()
        self._processes = [
            subprocess.Popen(
                command,
                env=os.environ
                | {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
                | {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                | {"OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                text=True,
            )
            for rank in range(count)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._processes[0].stdin.close()
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()

    def ready(self):
        """What they say when they are: a dict of `batch_size`, `calls`, `bytes` and so on."""
        return self._heard()

    def turn(self, seconds):
        """Let them train for about so long; their images a second, all together."""
        print(seconds, file=self._processes[0].stdin, flush=True)
        return self._heard()

    def _heard(self):
        line = self._processes[0].stdout.readline()
        if not line:
            sys.exit("expected processes that train together, but one has ended: see above")
        return json.loads(line)


def _free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _work(settings):
    """One process of a group: trains for as many seconds as each line of its input says."""
    with joined(settings["device"]) as (team, name):
        device = torch.device(name)
        workload = Workload.of(settings["model"], device, settings["batch_size"])
        networks = [team.shared(network) for network in workload.networks()]
        if settings["sync"]:
            networks = [convert_batch_norms(network) for network in networks]
        step = VAEStep(*networks) if workload.is_vae else GANStep(*networks)
        images = workload.images()
        for _ in range(WARMUP_STEPS):
            step(images)
        with exchanges.counted() as (calls, nbytes):
            for _ in range(COUNTED_STEPS):
                step(images)
                team.any(False, False, False)
        facts = {"batch_size": len(images), "image_size": workload.image_size}
        for what, counts in (("calls", calls), ("bytes", nbytes)):
            facts[what] = {purpose: n / COUNTED_STEPS for purpose, n in counts.items()}
        _say(team, facts)
        while True:
            line = sys.stdin.readline() if team.is_first else ""
            seconds = float(team.gathered(line)[0] or 0)
            if not seconds:
                break
            _say(team, _rate(team, step, images, seconds))


def _rate(team, step, images, seconds):
    started, steps, over = time.perf_counter(), 0, False
    while not over:
        step(images)
        steps += 1
        # As the training loop asks at each step what all of them are to do.
        over, *_ = team.any(time.perf_counter() - started >= seconds, False, False)
    if images.is_cuda:
        torch.cuda.synchronize()
    return steps * len(images) * team.count / (time.perf_counter() - started)


def _say(team, fact):
    if team.is_first:
        print(json.dumps(fact), flush=True)


def table(rows):
    """The rows as text."""
    lines = ["kind      batch  processes  sync-bn   images/s  efficiency  exchanged a step"]
    for row in rows:
        exchanged = ", ".join(
            f"{p} {row[f'{p}_bytes'] / 1e6:.3f} MB in {row[f'{p}_calls']}"
            for p in exchanges.PURPOSES
            if row[f"{p}_calls"]
        )
        lines.append(
            f"{row['kind']:9} {row['batch_size']:5}  {row['processes']:9}  {row['sync_bn']:7}  "
            f"{float(row['images_per_s']):9,.1f}  {row['efficiency']:>10}  {exchanged}"
        )
    if any(row["kind"] == "model" for row in rows):
        lines.append(nccl_model.WORDS)
    return "\n".join(lines)


def main(arguments=None):
    """Time groups of processes, print the table, write the CSV and its picture."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--model", choices=MODELS, default="dcgan")
    parser.add_argument("--batch-size", type=int, help="a process's (default: the model's own)")
    parser.add_argument("--processes", type=int, nargs="+", default=[2], help="besides one")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing (default: 60)")
    parser.add_argument("--out", help="the CSV (default: one in benchmarks/results)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        return _work(json.loads(args.worker))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    counts = sorted({1, *args.processes})
    rows, facts = measure(args.model, counts, args.seconds, device.type, args.batch_size)
    if args.model == "dcgan":
        rows += predict(facts)
    print(table(rows))
    about = machine.describe(device)
    path = Path(args.out or RESULTS / f"scaling_{args.model}_{machine.slug(device)}.csv")
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | about for row in rows)
    print(path)
    from benchmarks.plot_scaling import plot  # Here, as workers need no matplotlib.

    print(plot(path))
    return 0


if __name__ == "__main__":
    sys.exit(main())
