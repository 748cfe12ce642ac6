"""Does genfast's speed cost quality? python -m benchmarks.quality

The same DCGAN is trained on digits by two recipes. For each seed, genfast's step (in the precision
it chooses) and PyTorch's public recipe (float32, NCHW) start from the same weights and see the same
batches and the same noise for as many epochs. What their generators make is compared with the real
digits by the Fréchet distance; see `genfast.training.evaluation`. Written are results/quality.csv
(every measurement), quality_summary.csv (the comparison) and quality.png. With --variants it is
losses and other settings that are compared; see `benchmarks.quality_variants`.
"""

import argparse
import copy
import math
import statistics
import sys
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import machine
from benchmarks.quality_report import check_matplotlib, compare, draw, table, write_csv
from benchmarks.workloads import stock
from genfast.models import DCGANDiscriminator, DCGANGenerator
from genfast.models.sizes import halved
from genfast.training import GANStep
from genfast.training.data import Batches, normalize
from genfast.training.errors import BadInput, Diverged, require
from genfast.training.evaluation.digits import (
    PIXEL_RANGE,
    check_accuracy,
    load_digits,
    train_classifier,
)
from genfast.training.evaluation.frechet import frechet_distance
from genfast.training.runs.devices import as_device
from genfast.training.runs.pictures import to_uint8
from genfast.training.steps.stock import StockGANStep, loss_of_logits

RESULTS = Path(__file__).parent / "results"
SUMMARY = "Train a DCGAN on digits with genfast and with stock PyTorch, and compare what it draws."
# The DCGAN for digits of `genfast train`, with which its samples get good.
BATCH_SIZE, LR, BETAS, NZ, NGF, NDF = 64, 5e-4, (0.5, 0.999), 20, 32, 16
SAMPLES = 2048  # Generated for each measurement, always from the same noise.
SHOWN = 24


class Study(NamedTuple):
    """What `run` found.

    rows: a dict for each measurement: seed, recipe ("genfast" or "stock"), precision, epoch,
        frechet_distance, and d_loss and g_loss, their means since the measurement before.
    samples: images by who made them: "genfast" and "stock", with the first seed and the same noise,
        and "real": uint8 (`SHOWN`, 1, H, W).
    yardstick: a dict of numbers that say what a Fréchet distance here is worth.
    """

    rows: list
    samples: dict
    yardstick: dict


class StockStep(StockGANStep):
    """The step of PyTorch's public DCGAN example: float32, NCHW, nothing left out.

    Args:
        generator: (N, NZ, 1, 1) to images.
        discriminator: images to logits.
    """

    precision = "fp32"

    def __init__(self, generator, discriminator):
        # Weights and, through them, all that is computed: contiguous, as PyTorch's users have it.
        networks = [
            network.to(memory_format=torch.contiguous_format)
            for network in (generator, discriminator)
        ]
        optimizers = [torch.optim.Adam(network.parameters(), LR, BETAS) for network in networks]
        super().__init__(*networks, optimizers, latent_shape=(NZ, 1, 1), criterion=loss_of_logits)

    @torch.no_grad()
    def sample(self, z):
        """Images in [-1, 1] for this noise, by the running statistics of batch norms."""
        self.generator.eval()
        images = self.generator(z)
        self.generator.train()
        return images


def run(*, seeds, epochs, image_size, every, device):
    """Train with both recipes and measure.

    Args:
        seeds: how many.
        epochs: of each run.
        image_size: of the digits, in pixels: as `DCGANGenerator` takes it.
        every: epochs between two measurements.
        device: a `torch.device`.

    Returns:
        A `Study`.

    Raises:
        BadInput: an extra is not installed.
        Diverged: a loss is no longer finite.
    """
    tqdm = require("tqdm", "tqdm").tqdm
    digits = load_digits(image_size)
    classifier, accuracy = train_classifier(digits)
    check_accuracy(accuracy)
    real = classifier.features(digits.images)

    def distance(images):
        return frechet_distance(real, classifier.features(images))

    def measure(images):
        return {"frechet_distance": distance(images)}

    rows, samples = [], {"real": digits.images[:SHOWN]}
    steps = len(digits.images) // BATCH_SIZE
    with tqdm(total=seeds * 2 * epochs * steps, unit="step") as bar:
        for seed in range(seeds):
            z = torch.randn(SAMPLES, NZ, 1, 1, generator=torch.Generator().manual_seed(seed))
            z = z.to(device)
            for recipe, step in build_steps(seed, image_size, device).items():
                bar.set_description(f"seed {seed}, {recipe}")
                batches = Batches(digits.images, BATCH_SIZE, seed, device)
                for row in train(step, batches, z, epochs, every, measure, seed, bar):
                    rows.append({"seed": seed, "recipe": recipe, **row})
                if seed == 0:
                    samples[recipe] = to_uint8(step.sample(z[:SHOWN]), PIXEL_RANGE).cpu()
    yardstick = {"classifier_accuracy": accuracy, **_yardstick(digits, real, distance)}
    return Study(rows, samples, yardstick)


def build_steps(seed, image_size, device, precision="auto"):
    """The step of each recipe in a dict, on networks of the same weights.

    `precision` is genfast's; the stock recipe's is float32.
    """
    ours = build_networks(seed, image_size)
    theirs = [stock(copy.deepcopy(network)).to(device) for network in ours]
    return {
        "genfast": genfast_step(ours, device, precision=precision),
        "stock": StockStep(*theirs),
    }


def build_networks(seed, image_size):
    """A generator and a discriminator, in CPU memory."""
    torch.manual_seed(seed)
    return DCGANGenerator(NZ, NGF, 1, image_size), DCGANDiscriminator(1, NDF, image_size)


def genfast_step(networks, device, **options):
    """genfast's step for a generator and a discriminator, which move to the device."""
    generator, discriminator = (network.to(device) for network in networks)
    optimizers = tuple(
        torch.optim.Adam(
            network.parameters(), LR, BETAS, fused=True, capturable=device.type == "cuda"
        )
        for network in (generator, discriminator)
    )
    return GANStep(
        generator, discriminator, latent_shape=(NZ, 1, 1), optimizers=optimizers, **options
    )


def train(step, batches, z, epochs, every, measure, seed, bar):
    """Yield a row of what `measure` gives of uint8 images, every few epochs and after the last."""
    torch.manual_seed(1_000_000 + seed)  # Both recipes draw the same noise.
    losses = []
    with closing(batches.stream()) as stream:
        for epoch in range(1, epochs + 1):
            for batch in islice(stream, len(batches)):
                losses.append(torch.stack(tuple(step(normalize(batch, PIXEL_RANGE)))))
                bar.update()
            if epoch % every and epoch < epochs:
                continue
            d_loss, g_loss = torch.stack(losses).double().mean(0).tolist()
            losses = []
            if not math.isfinite(d_loss + g_loss):
                raise Diverged(f"training diverged: by epoch {epoch} a loss is not finite")
            found = measure(to_uint8(step.sample(z), PIXEL_RANGE))
            bar.set_postfix({"Fréchet distance": f"{found['frechet_distance']:.1f}"})
            yield {
                "precision": step.precision,
                "epoch": epoch,
                **found,
                "d_loss": d_loss,
                "g_loss": g_loss,
            }


def _yardstick(digits, real, distance):
    """Fréchet distances: the mean one of two halves of the real digits, and that of noise."""
    draw = np.random.default_rng(0)
    halves = [np.array_split(draw.permutation(real), 2) for _ in range(20)]
    noise = draw.integers(0, 256, digits.images.shape, dtype=np.uint8)
    return {
        "frechet_of_real_halves": statistics.mean(frechet_distance(*pair) for pair in halves),
        "frechet_of_noise": distance(torch.from_numpy(noise)),
    }


def main(arguments=None):
    """Returns the exit status: 0, 1 after an error, 130 after an interrupt."""
    args = _parser().parse_args(arguments)
    try:
        return _report(args)
    except (BadInput, Diverged) as error:
        print(f"benchmarks.quality: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("benchmarks.quality: interrupted, and nothing written", file=sys.stderr)
        return 130


def _report(args):
    check_matplotlib()  # Rather than when all is done.
    if args.variants:
        from benchmarks import quality_variants  # It imports this module.

        return quality_variants.report(args)
    device = as_device(args.device)
    study = run(
        seeds=args.seeds,
        epochs=args.epochs,
        image_size=args.image_size,
        every=args.every,
        device=device,
    )
    comparisons = compare(study.rows)
    print(table(comparisons, study.yardstick))
    about = (
        {"image_size": args.image_size, "batch_size": BATCH_SIZE, "samples": SAMPLES}
        | study.yardstick
        | machine.describe(device)
    )
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv([row | about for row in study.rows], args.out / "quality.csv")
    summary = [c._asdict() | {"within_spread": c.within_spread} for c in comparisons]
    runs = {"seeds": args.seeds, "epochs": args.epochs}
    write_csv([row | runs | about for row in summary], args.out / "quality_summary.csv")
    precision = study.rows[0]["precision"]
    title = (
        f"One DCGAN, {args.seeds} seeds: genfast in {precision} and PyTorch's public recipe in "
        f"float32, on {about['machine']}"
    )
    draw(study, title, args.out / "quality.png")
    print(args.out / "quality.png")
    return 0


def _parser():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=SUMMARY)
    for name, least, default, text in (
        ("seeds", 2, 3, "how many runs of each recipe"),
        ("epochs", 1, 200, "of each run"),
        ("every", 1, 5, "epochs between two measurements"),
    ):
        parser.add_argument(
            f"--{name}", type=_at_least(least), default=default, metavar="N",
            help=f"{text} (default: %(default)s)",
        )  # fmt: skip
    parser.add_argument(
        "--image-size", type=_image_size, default=16, metavar="N", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--variants",
        action="store_true",
        help="compare losses and other settings of genfast's step instead",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder (default: benchmarks/results)"
    )
    return parser


def _image_size(text):
    try:
        halved(int(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return int(text)


def _at_least(least):
    def convert(text):
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number from {least}, got {text!r}")
        return int(text)

    return convert


if __name__ == "__main__":
    sys.exit(main())
