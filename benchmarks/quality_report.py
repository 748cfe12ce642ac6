"""What a study of quality comes to: the comparison, its table, its CSV files and its picture."""

import csv
import importlib
import io
import statistics
from typing import NamedTuple

import numpy as np

from genfast.training.errors import BadInput, require
from genfast.training.files import replacing

MEASURES = {"frechet_distance": "Fréchet distance", "d_loss": "d_loss", "g_loss": "g_loss"}
TITLES = {
    "frechet_distance": "Fréchet distance from the real digits",
    "d_loss": "loss of the discriminator",
    "g_loss": "loss of the generator",
}
NAMES = {"genfast": "genfast", "stock": "stock PyTorch", "real": "real digits"}
COLORS = {"genfast": "#0072b2", "stock": "#d55e00"}  # Told apart by the colour-blind as well.
LAST = 5
CONFIDENCE = 0.95


class Comparison(NamedTuple):
    """A measure of both recipes over the seeds; `low` to `high` is where the difference lies."""

    measure: str
    genfast_mean: float
    genfast_sd: float
    stock_mean: float
    stock_sd: float
    difference: float
    low: float
    high: float

    @property
    def within_spread(self):
        """Whether runs with other seeds differ so much that the difference may be chance."""
        return self.low <= 0 <= self.high


def compare(rows):
    """Compare two recipes by several runs of each.

    The result of a run is the mean of its `LAST` measurements, as GANs go up and down. The
    difference lies within the spread over the seeds if it is no larger than chance makes it: if the
    95 % confidence interval for the difference between the means of two groups holds 0 (Student,
    1908; the groups' variances are pooled).

    Args:
        rows: dicts as in `benchmarks.quality.Study`, of at least two seeds.

    Returns:
        A list of a `Comparison` for each of `MEASURES`.
    """
    student = require("scipy.stats", "scikit-learn").t
    comparisons = []
    for measure in MEASURES:
        ours, theirs = (_results(rows, recipe, measure) for recipe in ("genfast", "stock"))
        means = [statistics.mean(values) for values in (ours, theirs)]
        deviations = [statistics.stdev(values) for values in (ours, theirs)]
        runs = len(ours)
        error = ((deviations[0] ** 2 + deviations[1] ** 2) / runs) ** 0.5
        reach = error * float(student.ppf((1 + CONFIDENCE) / 2, 2 * runs - 2))
        difference = means[0] - means[1]
        comparisons.append(
            Comparison(
                measure, means[0], deviations[0], means[1], deviations[1],
                difference, difference - reach, difference + reach,
            )
        )  # fmt: skip
    return comparisons


def _results(rows, recipe, measure):
    """The results of a recipe's runs, one number a seed."""
    return [statistics.mean([row[measure] for row in run][-LAST:]) for run in _runs(rows, recipe)]


def _runs(rows, recipe):
    """The rows of a recipe: a list for each seed."""
    seeds = dict.fromkeys(row["seed"] for row in rows)
    return [
        [row for row in rows if (row["recipe"], row["seed"]) == (recipe, seed)] for seed in seeds
    ]


def table(comparisons, yardstick):
    """The comparison as text, with what says how large a Fréchet distance is."""
    lines = [
        f"{'mean ± sd over seeds':22}{'genfast':>16}{'stock PyTorch':>16}{'difference':>12}"
        f"{'95 % interval':>18}  within the spread over seeds"
    ]
    for c in comparisons:
        ours = f"{c.genfast_mean:.2f} ± {c.genfast_sd:.2f}"
        theirs = f"{c.stock_mean:.2f} ± {c.stock_sd:.2f}"
        interval = f"{c.low:+.2f} to {c.high:+.2f}"
        lines.append(
            f"{MEASURES[c.measure]:22}{ours:>16}{theirs:>16}{c.difference:>+12.2f}{interval:>18}  "
            + ("yes" if c.within_spread else "NO")
        )
    lines.append(
        f"For scale, Fréchet distances: the two halves of the real digits "
        f"{yardstick['frechet_of_real_halves']:.1f}, noise {yardstick['frechet_of_noise']:.0f}. "
        f"The classifier knows {yardstick['classifier_accuracy']:.1%} of the digits held out."
    )
    return "\n".join(lines)


def write_csv(rows, path):
    """Write dicts of the same keys as CSV, floats with six digits; a crash leaves the old file."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def check_matplotlib():
    """BadInput if matplotlib is not installed."""
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise BadInput(
            f"this needs matplotlib, which could not be imported ({error}): "
            'install it with pip install "genfast[benchmark]"'
        ) from error


def draw(study, title, path):
    """Write the picture of a `benchmarks.quality.Study`: curves above, samples below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.6), layout="constrained")
    curves, strips = figure.subfigures(2, 1, height_ratios=(2.6, 1))
    for axes, measure in zip(curves.subplots(1, 3), MEASURES, strict=True):
        _draw_curves(axes, study.rows, measure)
        if measure == "frechet_distance":
            floor = study.yardstick["frechet_of_real_halves"]
            axes.axhline(floor, color="0.4", linestyle=":")
            axes.annotate(
                "two halves of the real digits", (0.98, floor), xytext=(0, 3), ha="right",
                xycoords=("axes fraction", "data"), textcoords="offset points", color="0.4",
            )  # fmt: skip
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.legend(frameon=False)
    curves.suptitle(title)
    for axes, (maker, images) in zip(
        strips.subplots(len(study.samples), 1), study.samples.items(), strict=True
    ):
        axes.imshow(np.concatenate(list(images[:, 0].numpy()), axis=1), cmap="gray")
        axes.set_ylabel(NAMES[maker], rotation=0, ha="right", va="center")
        axes.set(xticks=[], yticks=[], frame_on=False)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _draw_curves(axes, rows, measure):
    for recipe, color in COLORS.items():
        runs = _runs(rows, recipe)
        epochs = [row["epoch"] for row in runs[0]]
        values = np.array([[row[measure] for row in run] for run in runs])
        axes.plot(epochs, values.T, color=color, linewidth=0.7, alpha=0.45)
        axes.plot(epochs, values.mean(0), color=color, linewidth=2.2, label=NAMES[recipe])
    axes.set(title=TITLES[measure], xlabel="epoch")
    axes.spines[["top", "right"]].set_visible(False)
