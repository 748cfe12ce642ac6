"""The picture of the drop-in benchmark: python -m benchmarks.plot_dropin draws its CSVs."""

import csv
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.plot import draw_all

OURS, COMPILED, TEXT = "#d1495b", "#8d99ae", "#2b2d42"
_HEIGHT = 0.38


def plot(path):
    """Draw a CSV of `benchmarks.dropin`, a panel a precision; returns the picture's path.

    A bar is the median of a variant's speed as a share of stock PyTorch's in the same round, the
    whiskers are its 20th and 80th percentiles.
    """
    path = Path(path)
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    panels = [[row for row in rows if row["precision"] == p] for p in precisions]
    most = max(map(len, panels))
    figure = Figure(figsize=(8, (1.6 + 0.62 * most) * len(panels)), layout="constrained")
    # Of one scale, so that panels can be compared; room for the label at a bar's end.
    longest = max(float(row[name] or 0) for row in rows for name in ("p80", "compiled_p80"))
    for axes, precision, panel in zip(
        figure.subplots(len(panels), squeeze=False)[:, 0], precisions, panels, strict=True
    ):
        _panel(axes, panel[::-1])
        axes.set_xlim(0, 1.3 * max(longest, 1))
        memory = panel[0]["memory_format"]
        axes.set_title(f"{precision}, {memory} memory", fontsize=10, loc="left")
    first = rows[0]
    figure.suptitle(
        f"Forward + backward of other people's networks\n{first['machine']}, "
        f"PyTorch {first['torch']}, {first['date']}",
        fontsize=10,
    )
    figure.legend(
        [Patch(color=OURS), Patch(color=COMPILED)], ["accelerate", "torch.compile"],
        loc="outside lower center", ncols=2, frameon=False,
    )  # fmt: skip
    out = path.with_suffix(".png")
    figure.savefig(out, dpi=130)
    return out


def _panel(axes, rows):
    for i, row in enumerate(rows):
        _bar(axes, i + _HEIGHT / 2, row, "", OURS)
        if row["compiled_ratio"]:
            _bar(axes, i - _HEIGHT / 2, row, "compiled_", COMPILED)
        else:
            reason = row["not_compiled"]
            reason = reason if len(reason) <= 60 else f"{reason[:60]} ..."
            axes.annotate(
                f"torch.compile: {reason}", (0, i - _HEIGHT / 2), (4, 0),
                textcoords="offset points", va="center", size=8, color=COMPILED,
            )  # fmt: skip
    axes.axvline(1, color=TEXT, linewidth=1, linestyle="--")
    axes.set_yticks(
        range(len(rows)),
        [f"{row['network']}\n{row['batch_size']} of {row['shape']}" for row in rows],
        fontsize=9,
    )
    axes.set_xlabel("speed, stock PyTorch = 1 (more is better)")
    axes.spines[["top", "right"]].set_visible(False)


def _bar(axes, y, row, prefix, colour):
    ratio, p20, p80 = (float(row[prefix + name]) for name in ("ratio", "p20", "p80"))
    axes.barh(
        y, ratio, _HEIGHT, xerr=[[ratio - p20], [p80 - ratio]], color=colour, ecolor=TEXT,
        error_kw={"linewidth": 1},
    )  # fmt: skip
    axes.annotate(
        f"{ratio:.2f}x", (p80, y), (5, 0), textcoords="offset points", va="center", size=9
    )


def main():
    """Draw every CSV of the drop-in benchmark there is."""
    draw_all("dropin", plot)


if __name__ == "__main__":
    main()
