"""Whole training steps, side by side in one run: python -m benchmarks.throughput --model dcgan.

What is timed is the step: its batch of float images is on the device already. The variants take
short turns, in changing order. No speed is reported of a variant whose first losses are not those
of PyTorch's public recipe, within what its precision allows.
"""

import argparse
import contextlib
import csv
import os
import shutil
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

from benchmarks import agreement, cold_start, machine, timing
from benchmarks.variants import VARIANTS, why_not_run
from benchmarks.workloads import MODELS, Workload
from genfast.cli.options import of_rule
from genfast.models.sizes import height_and_width, why_not
from genfast.training.runs.settings import RULES

_BAR = "{desc}: {percentage:3.0f}%|{bar}|"
RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "model", "batch_size", "image_size", "variant", "ours", "precision",
    "images_per_s", "p20", "p80", "turns", "vs_example", "vs_best_baseline",
    "disagreement", "import_s", "first_step_s", "memory_mib",
    "machine", "torch", "triton", "python", "date",
)  # fmt: skip


def compare(workload, names, seconds, cold=True):
    """Check and time variants of a workload.

    Args:
        workload: a `Workload`.
        names: of variants that run here; the reference, "example", is checked against anyway.
        seconds: how long to time all of them together.
        cold: whether to measure cold starts, each in a process of its own.

    Returns:
        (rows, refused): a dict for each variant that agrees, by the names in `COLUMNS` that
        describe no machine; and for the others their names with a sentence that says why.
    """
    if not cold:
        return _compare(workload, names, seconds, {})
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "now"  # Always the same path: what compilers keep holds it.
        with mock.patch.dict(os.environ, cold_start.caches(cache)):
            starts = _cold_starts(workload, names, cache, Path(folder) / "all")
            return _compare(workload, names, seconds, starts)


def _cold_starts(workload, names, cache, kept):
    """Measure each with an empty cache; then leave all they compiled in it, for the timing."""
    starts = {}
    for name in tqdm(names, "cold starts", leave=False):
        cache.mkdir()
        starts[name] = cold_start.measure(name, workload, cache)
        shutil.copytree(cache, kept, dirs_exist_ok=True)
        shutil.rmtree(cache)
    if kept.exists():
        kept.rename(cache)
    return starts


def _compare(workload, names, seconds, starts):
    shares, refused = _check(workload, names)
    for name, start in starts.items():
        if "error" in start:
            refused.setdefault(name, f"its cold start failed: {start['error']}")
    steps = {
        name: VARIANTS[name].build(workload)
        for name in tqdm(shares, "building", leave=False)
        if name not in refused
    }
    with tqdm(total=seconds, desc="timing", leave=False, bar_format=_BAR) as bar:
        rates = timing.interleaved(steps, workload.images(), seconds, progress=bar.update)
    return _rows(workload, rates, shares, starts), refused


def _check(workload, names):
    """What share of the allowed disagreement each variant has; and those that do not agree."""
    with precise_products():
        example = agreement.first_losses(VARIANTS["example"].build, workload)
    allowed, shares, refused = {}, {}, {}
    for name in tqdm(names, "comparing losses", leave=False):
        variant = VARIANTS[name]
        if name == "example" and workload.device.type == "cpu":
            shares[name] = 0.0  # It is the reference, to the last bit.
            continue
        try:
            losses = agreement.first_losses(variant.build, workload)
        except Exception as error:  # Compilers fail in many ways; the others go on.
            refused[name] = f"it failed: {str(error).strip().partition(chr(10))[0]}"
            continue
        coarse = variant.rounds_coarsely(workload)
        if coarse not in allowed:
            shaken = VARIANTS["amp" if coarse else "example"].build
            with precise_products():
                allowed[coarse] = agreement.allowance(shaken, workload, example, coarse)
        if variant.draws_own_noise(workload):
            share = agreement.disagreement_of_means(losses, example)
        else:
            share = agreement.disagreement(losses, example, allowed[coarse])
        if share <= 1:
            shares[name] = share
        else:
            refused[name] = (
                f"its losses are {share:.1f} times as far from the example's as its precision "
                f"allows\n  example {_series(example)}\n  {name} {_series(losses)}"
            )
    return shares, refused


@contextlib.contextmanager
def precise_products():
    """Within, a GPU's float32 is float32: the reference must not be rounded to TF32."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


def _series(losses):
    return "; ".join(" ".join(f"{value:.4g}" for value in column) for column in losses.T)


def _rows(workload, rates, shares, starts):
    baselines = [name for name in rates if not VARIANTS[name].ours]
    # No other is faster than the best one in the median round.
    best = max(baselines, default=None, key=lambda n: timing.ratio(rates[n], rates[baselines[0]]))
    rows = []
    for name, turns in rates.items():
        start = starts.get(name, {})
        median, p20, p80 = timing.summary(turns)
        rows.append(
            {
                "model": workload.model,
                "batch_size": workload.batch_size,
                "image_size": workload.image_size,
                "variant": name,
                "ours": int(VARIANTS[name].ours),
                "precision": VARIANTS[name].precision(workload),
                "images_per_s": _rounded(median),
                "p20": _rounded(p20),
                "p80": _rounded(p80),
                "turns": len(turns),
                "vs_example": _ratio(rates, name, "example"),
                "vs_best_baseline": _ratio(rates, name, best),
                "disagreement": _rounded(shares[name]),
                **{
                    key: _rounded(start[key]) if key in start else ""
                    for key in ("import_s", "first_step_s", "memory_mib")
                },
            }
        )
    return rows


def _ratio(rates, name, other):
    return _rounded(timing.ratio(rates[name], rates[other])) if other in rates else ""


def _rounded(value):
    return float(f"{value:.4g}")


def write(rows, device, path):
    """Write rows with what they were measured on as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = machine.describe(device)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | about for row in rows)


def table(rows):
    """The rows as text, the fastest last."""
    lines = [
        f"{'variant':18}{'images/s':>10}{'20 %':>9}{'80 %':>9}{'x example':>11}{'x best':>8}"
        f"{'first step':>12}{'memory':>11}"
    ]
    for row in sorted(rows, key=lambda row: row["images_per_s"]):
        start = f"{row['first_step_s']:.1f} s" if row["first_step_s"] != "" else "-"
        memory = f"{row['memory_mib']:.0f} MiB" if row["memory_mib"] != "" else "-"
        ratios = (row["vs_example"], row["vs_best_baseline"])
        example, best = (f"{ratio:.2f}" if ratio != "" else "-" for ratio in ratios)
        lines.append(
            f"{row['variant']:18}{row['images_per_s']:10.0f}{row['p20']:9.0f}{row['p80']:9.0f}"
            f"{example:>11}{best:>8}{start:>12}{memory:>11}"
        )
    return "\n".join(lines)


def main(arguments=None):
    """Returns the exit status: 1 if a variant was refused."""
    args = _parser().parse_args(arguments)
    available = torch.cuda.is_available()
    chosen = args.device
    if chosen == "auto":
        chosen = "cuda" if available else "cpu"
    if chosen == "cuda" and not available:
        sys.exit("expected a GPU for --device cuda, PyTorch finds none")
    if args.image_size and args.model in ("dcgan", "conv-vae"):
        reason = why_not(*height_and_width(args.image_size))
        if reason:
            sys.exit(f"expected --image-size {reason} for {args.model}, got {args.image_size}")
    device = torch.device(chosen)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # For every variant, as users of amp have it.
    workload = Workload.of(args.model, device, args.batch_size, args.image_size)
    names, skipped = [], {}
    for name in args.only or VARIANTS:
        reason = why_not_run(name, workload, asked_for=args.only is not None)
        if reason:
            skipped[name] = reason
        else:
            names.append(name)
    shape = " x ".join(map(str, workload.image_shape))
    print(
        f"{workload.model}, batch {workload.batch_size} of {shape}, on {machine.name(device)}, "
        f"PyTorch {torch.__version__}; the step alone, its batch on the device",
        flush=True,
    )
    rows, refused = compare(workload, names, args.seconds, cold=not args.no_cold_start)
    print(table(rows))
    for name, reason in skipped.items():
        print(f"not run: {name}: {reason}")
    for name, reason in refused.items():
        print(f"NO SPEED REPORTED: {name}: {reason}")
    default = RESULTS / (
        f"throughput_{workload.model}_batch{workload.batch_size}_{machine.slug(device)}.csv"
    )
    path = Path(args.out) if args.out else default
    write(rows, device, path)
    print(path)
    return 1 if refused else 0


def _whole(text):
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _parser():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--batch-size", type=_whole, help="(default: PyTorch's example's)")
    parser.add_argument(
        "--image-size",
        type=of_rule(RULES["image_size"]),
        help="such as 64, or 96x64, height first (default: PyTorch's example's)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, metavar="NAME", help="variants")
    parser.add_argument(
        "--seconds", type=float, default=90.0, help="of timing, for all together (default: 90)"
    )
    parser.add_argument("--no-cold-start", action="store_true", help="skip the cold starts")
    parser.add_argument("--out", help="the CSV (default: one in benchmarks/results)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
