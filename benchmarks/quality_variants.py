"""What losses and other settings of the step do for quality.

python -m benchmarks.quality --variants

One DCGAN is trained on digits in each way of `VARIANTS`, from the same weights, for as many steps,
with the same noise. What the generators make is compared with all digits. Written are
results/quality_variants.csv (every measurement), quality_variants_summary.csv and
quality_variants.png.
"""

import statistics
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import machine, quality
from benchmarks.quality_report import write_csv
from genfast.losses import GAN_LOSSES
from genfast.training.data import Batches
from genfast.training.errors import Diverged, require
from genfast.training.evaluation.digits import (
    PIXEL_RANGE,
    check_accuracy,
    load_digits,
    train_classifier,
)
from genfast.training.evaluation.frechet import frechet_distance
from genfast.training.evaluation.neighbours import density_coverage, precision_recall
from genfast.training.files import replacing
from genfast.training.runs.devices import as_device
from genfast.training.runs.pictures import to_uint8

SHOWN = 20
LAST = 2  # Measurements whose mean is the result of a run, as GANs go up and down.
MEASURES = ("frechet_distance", "precision_of_samples", "recall", "density", "coverage")
TENTH = 0.1


class Variant(NamedTuple):
    """A way to train.

    name: in the table.
    options: of `GANStep`.
    share: how much of the digits is trained on, the same ones for each variant.
    """

    name: str
    options: dict
    share: float = 1.0


# To add one, add a row; what is about little data beside "a tenth of them". In a short run an
# average over many steps would still hold the first weights.
VARIANTS = (
    *(Variant(loss, {"loss": loss}) for loss in GAN_LOSSES),
    Variant("ema 0.98", {"ema": 0.98}),
    Variant("r1", {"penalty": "r1", "penalty_weight": 1.0, "penalty_every": 4}),
    Variant("wgan, clipped", {"loss": "wgan", "clip_critic": 0.01, "n_critic": 2}),
    Variant("a tenth of them", {}, TENTH),
    Variant("a tenth, augmented", {"augment": "translation,cutout"}, TENTH),
)


def run(*, seeds, epochs, image_size, every, device):
    """Train each variant and measure.

    Args:
        seeds: how many runs of each.
        epochs: passes over all digits; who sees fewer digits makes as many steps.
        image_size: of the digits, in pixels.
        every: such epochs between two measurements.
        device: a `torch.device`.

    Returns:
        (rows, samples): a dict for each measurement, with NaN for those of a run that diverged; and
        uint8 images (`SHOWN`, 1, H, W) by the variant that drew them with the first seed.
    """
    tqdm = require("tqdm", "tqdm").tqdm
    digits = load_digits(image_size)
    classifier, accuracy = train_classifier(digits)
    check_accuracy(accuracy)
    real = classifier.features(digits.images)

    def measure(images):
        found = classifier.features(images)
        both = (*precision_recall(real, found), *density_coverage(real, found))
        return dict(zip(MEASURES, (frechet_distance(real, found), *both), strict=True))

    rows, samples = [], {"real digits": digits.images[:SHOWN]}
    steps = len(digits.images) // quality.BATCH_SIZE
    with tqdm(total=len(VARIANTS) * seeds * epochs * steps, unit="step") as bar:
        for seed in range(seeds):
            z = torch.randn(quality.SAMPLES, quality.NZ, 1, 1, generator=_generator(seed))
            z = z.to(device)
            order = torch.randperm(len(digits.images), generator=_generator(seed))
            for variant in VARIANTS:
                bar.set_description(f"seed {seed}, {variant.name}")
                seen = digits.images[order[: round(variant.share * len(order))]]
                step = quality.genfast_step(
                    quality.build_networks(seed, image_size), device, **variant.options
                )
                batches = Batches(seen, min(quality.BATCH_SIZE, len(seen)), seed, device)
                passes = steps / len(batches)  # Over what it sees, an epoch of all digits.
                about = {"variant": variant.name, "share": variant.share, "seed": seed}
                schedule = round(epochs * passes), round(every * passes)
                try:
                    for row in quality.train(step, batches, z, *schedule, measure, seed, bar):
                        rows.append(about | row)
                except Diverged:
                    lost = dict.fromkeys((*MEASURES, "d_loss", "g_loss"), float("nan"))
                    rows.append(about | {"precision": step.precision, "epoch": schedule[0]} | lost)
                if seed == 0:
                    samples[variant.name] = to_uint8(step.sample(z[:SHOWN]), PIXEL_RANGE).cpu()
    return rows, samples


def _generator(seed):
    return torch.Generator().manual_seed(seed)


def summarise(rows):
    """A dict for each variant: of each of `MEASURES` the mean over seeds and its sd."""
    summary = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        seeds = dict.fromkeys(row["seed"] for row in own)
        found = {"variant": variant, "share": own[0]["share"]}
        for measure in MEASURES:
            results = [
                statistics.fmean([row[measure] for row in own if row["seed"] == seed][-LAST:])
                for seed in seeds
            ]
            found[measure] = statistics.fmean(results)
            found[f"{measure}_sd"] = float(np.std(results, ddof=1))
        summary.append(found)
    return summary


def table(summary):
    """The summary as text."""
    titles = ("Fréchet distance", "precision", "recall", "density", "coverage")
    lines = [f"{'mean ± sd over seeds':20}" + "".join(f"{title:>18}" for title in titles)]
    for found in summary:
        cells = (
            f"{found[m]:.{1 if m == 'frechet_distance' else 2}f} ± "
            f"{found[f'{m}_sd']:.{1 if m == 'frechet_distance' else 2}f}"
            for m in MEASURES
        )
        lines.append(f"{found['variant']:20}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def report(args):
    """Run the study that the command line asks for; returns the exit status 0."""
    device = as_device(args.device)
    rows, samples = run(
        seeds=args.seeds,
        epochs=args.epochs,
        image_size=args.image_size,
        every=args.every,
        device=device,
    )
    about = {
        "epochs_of_all": args.epochs,
        "seeds": args.seeds,
        "image_size": args.image_size,
        "batch_size": quality.BATCH_SIZE,
        "samples": quality.SAMPLES,
    } | machine.describe(device)
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv([row | about for row in rows], args.out / "quality_variants.csv")
    summary = summarise(rows)
    print(table(summary))
    write_csv([row | about for row in summary], args.out / "quality_variants_summary.csv")
    title = (
        f"One DCGAN on digits, {args.epochs} epochs, {args.seeds} seeds, in {rows[0]['precision']} "
        f"on {about['machine']}"
    )
    draw(rows, summary, samples, title, args.out / "quality_variants.png")
    print(args.out / "quality_variants.png")
    return 0


def draw(rows, summary, samples, title, path):
    """Write the picture: a bar a variant with a dot a seed at its left, what it draws at its right.

    Args:
        rows, samples: as `run` gives them.
        summary: as `summarise` gives it.
        title: in words.
        path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 0.5 * len(summary) + 1.7), layout="constrained")
    figure.suptitle(title)
    names = [found["variant"] for found in summary]
    axes, *strips = _columns(figure, len(names))
    axes.barh(names, [found["frechet_distance"] for found in summary], color="#0072b2", alpha=0.35)
    for place, name in enumerate(names):
        own = [row for row in rows if row["variant"] == name]
        for seed in dict.fromkeys(row["seed"] for row in own):
            last = [row["frechet_distance"] for row in own if row["seed"] == seed][-LAST:]
            axes.plot(statistics.fmean(last), place, "o", color="#0072b2", markersize=4)
    axes.set(title="Fréchet distance from all digits; a dot a seed", ylim=(len(names) - 0.5, -1.5))
    axes.spines[["top", "right"]].set_visible(False)
    for strip, name in zip(strips, ("real digits", *names), strict=True):
        strip.imshow(np.concatenate(list(samples[name][:, 0].numpy()), axis=1), cmap="gray")
        strip.set(xticks=[], yticks=[], frame_on=False)
    strips[0].set_title("samples of the first seed; above, real digits")
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=70)


def _columns(figure, count):
    """Axes for bars, and one more strip than there are bars beside them."""
    grid = figure.add_gridspec(count + 1, 2, width_ratios=(1, 1.4))
    bars = figure.add_subplot(grid[:, 0])
    return bars, *(figure.add_subplot(grid[i, 1]) for i in range(count + 1))
