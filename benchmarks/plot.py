"""Pictures of the results: python -m benchmarks.plot makes a PNG beside each throughput CSV."""

import argparse
import csv
import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.throughput import RESULTS

OURS, OTHERS = "#d1495b", "#8d99ae"


def plot(path):
    """Draw a throughput CSV as bars, the fastest on top; returns the picture's path.

    The bar is the median of the turns, the whiskers are their 20th and 80th percentiles.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = sorted(csv.DictReader(file), key=lambda row: float(row["images_per_s"]))
    speeds = [float(row["images_per_s"]) for row in rows]
    whiskers = [
        [speed - float(row["p20"]) for speed, row in zip(speeds, rows, strict=True)],
        [float(row["p80"]) - speed for speed, row in zip(speeds, rows, strict=True)],
    ]
    figure = Figure(figsize=(8, 1.7 + 0.42 * len(rows)), layout="constrained")
    axes = figure.subplots()
    colours = [OURS if row["ours"] == "1" else OTHERS for row in rows]
    axes.barh(
        [row["variant"] for row in rows], speeds, xerr=whiskers, color=colours, ecolor="#2b2d42"
    )
    for i, (speed, row) in enumerate(zip(speeds, rows, strict=True)):
        label = f"{speed:,.0f}"
        if row["vs_example"]:
            label += f"  ({float(row['vs_example']):.2f}x example)"
        axes.annotate(
            label, (float(row["p80"]), i), (6, 0), textcoords="offset points", va="center", size=9
        )
    figure.legend(
        [Patch(color=OURS), Patch(color=OTHERS)], ["genfast", "PyTorch"],
        loc="outside lower center", ncols=2, frameon=False,
    )  # fmt: skip
    axes.set_xlim(0, max(float(row["p80"]) for row in rows) * 1.35)
    axes.set_xlabel("images a second, whole training steps (more is better)")
    first = rows[0]
    size = first["image_size"]
    height, width = size.split("x") if "x" in size else (size, size)
    axes.set_title(
        f"{first['model']}, batch {first['batch_size']}, {height} x {width} pixels\n"
        f"{first['machine']}, PyTorch {first['torch']}, {first['date']}",
        fontsize=10,
    )
    axes.spines[["top", "right"]].set_visible(False)
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=130)
    return out


def main():
    """Draw every CSV of throughputs there is."""
    draw_all("throughput", plot)


def draw_all(benchmark, plot):
    """Draw the CSVs that the command line names, or else all of a benchmark."""
    parser = argparse.ArgumentParser(description=f"Draw a PNG beside each CSV of {benchmark}.")
    parser.add_argument("csv", nargs="*", type=Path, help="files (default: those of the results)")
    paths = parser.parse_args().csv or sorted(RESULTS.glob(f"{benchmark}_*.csv"))
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        sys.exit(f"expected files to draw, found none at {', '.join(missing)}")
    if not paths:
        sys.exit(f"expected {benchmark}_*.csv in {RESULTS}, found none: run benchmarks.{benchmark}")
    for path in paths:
        print(plot(path))


if __name__ == "__main__":
    main()
