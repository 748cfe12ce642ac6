"""The picture of the scaling benchmark: python -m benchmarks.plot_scaling draws its CSVs."""

import csv
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.plot import OTHERS, OURS, draw_all

TEXT = "#2b2d42"


def plot(path):
    """Draw a CSV of `benchmarks.scaling`; returns the picture's path.

    On the left what was measured, bars with 20th and 80th percentiles; on the right the model.
    """
    path = Path(path)
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    measured = [row for row in rows if row["kind"] == "measured"]
    modelled = [row for row in rows if row["kind"] == "model"]
    figure = Figure(figsize=(10 if modelled else 5.5, 4.6), layout="constrained")
    axes = figure.subplots(1, 2 if modelled else 1, squeeze=False)[0]
    _bars(axes[0], measured)
    if modelled:
        _lines(axes[1], modelled)
    first = measured[0]
    figure.suptitle(
        f"{first['model']}, {first['image_size']} x {first['image_size']} pixels: each process has "
        f"its own batch of {first['batch_size']}\n{first['machine']}, PyTorch {first['torch']}, "
        f"{first['date']}",
        fontsize=10,
    )
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=130)
    return out


def _bars(axes, rows):
    for i, row in enumerate(rows):
        speed, low, high = (float(row[name]) for name in ("images_per_s", "p20", "p80"))
        colour = OTHERS if row["processes"] == "1" else OURS
        axes.bar(i, speed, 0.6, yerr=[[speed - low], [high - speed]], color=colour, ecolor=TEXT)
        label = f"{speed:,.0f}"
        if row["processes"] != "1":
            label += f"\nefficiency {float(row['efficiency']):.2f}"
        axes.annotate(label, (i, high), (0, 4), textcoords="offset points", ha="center", size=9)
    axes.set_xticks(
        range(len(rows)),
        [
            f"{row['processes']} process{'es' * (row['processes'] != '1')}"
            + "\n--sync-bn" * (row["sync_bn"] == "1")
            for row in rows
        ],
        fontsize=9,
    )
    axes.set_ylim(0, 1.25 * max(float(row["p80"]) for row in rows))
    axes.set_ylabel("images a second, all processes")
    axes.set_title("measured here", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def _lines(axes, rows):
    batches = list(dict.fromkeys(row["batch_size"] for row in rows))
    for batch, colour in zip(batches, (OURS, OTHERS), strict=False):
        for sync, style in (("0", "-"), ("1", "--")):
            line = [r for r in rows if (r["batch_size"], r["sync_bn"]) == (batch, sync)]
            axes.plot(
                [int(row["processes"]) for row in line],
                [float(row["efficiency"]) for row in line],
                style, marker="o", color=colour,
                label=f"batch {batch}" + ", --sync-bn" * (sync == "1"),
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    counts = sorted({int(row["processes"]) for row in rows})
    axes.set_xticks(counts, counts)
    axes.set_xlabel("H100s of one machine")
    axes.set_ylabel("efficiency")
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False, fontsize=9)
    what, _, assumed = rows[0]["note"].partition(": ")
    assumed = assumed.replace(", ", "\n", 1)
    axes.set_title(f"DCGAN-64: {what}\n{assumed}", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def main():
    """Draw every CSV of the scaling benchmark there is."""
    draw_all("scaling", plot)


if __name__ == "__main__":
    main()
