"""Images that a run keeps aside, and how well its VAE does on them: validation.csv."""

import csv
import math

import numpy as np
import torch

from genfast.training.data import LabelledImages, Streamed
from genfast.training.errors import BadInput
from genfast.training.files import replacing

NAME = "validation.csv"
SAMPLES = 64  # Of the importance-weighted bound at the end of a run.
COLUMNS = ["step", "epoch", "elbo", "reconstruction", "kl", f"iwae_{SAMPLES}"]
# Beside the numbers of epochs, which begin at 0, so that the split is no epoch's order.
_SPLIT = 2**32 - 1


def num_training(num_images, share):
    """How many of so many images are trained on where a share of them is kept aside, or None.

    Raises:
        BadInput: there are too few images to keep one and train on one.
    """
    if share is None:
        return num_images
    left = num_images - max(1, round(share * num_images))
    if left < 1:
        raise BadInput(
            f"expected images to train on beside those of --validate {share}, got {num_images} in "
            "all"
        )
    return left


def split(num_images, share, seed):
    """The numbers of the images that are trained on, and of those kept aside: two int64 tensors.

    Both None where none are kept aside. They depend on the three arguments alone.
    """
    if share is None:
        return None, None
    state = np.random.SeedSequence([seed, _SPLIT]).generate_state(1, np.uint32)
    generator = torch.Generator().manual_seed(int(state[0]))
    order = torch.randperm(num_images, generator=generator)
    left = num_training(num_images, share)
    return order[:left], order[left:].sort().values


class HeldOut:
    """Measures a VAE on images kept aside, and writes a row each time.

    Columns: step, epoch, elbo (the evidence lower bound in nats an image), its parts reconstruction
    and kl (elbo = -(reconstruction + kl)), and iwae_64, the importance-weighted bound of 64
    samples, which only the last row of a run has. Of a Gaussian likelihood they lack its constant.

    Args:
        path: the file. Its rows of steps up to `keep` stay.
        step: a `VAEStep`.
        images: all uint8 images of the run, in CPU memory or mapped; or `LabelledImages`; or a
            `Streamed`, of which those kept aside are read once.
        chosen: the numbers of those kept aside.
        batch_size, seed: of the run.
        keep: the number of steps that a resumed run has behind it.

    Attributes:
        newest: what the progress bar shows, a dict.
    """

    def __init__(self, path, step, images, chosen, batch_size, seed, keep=0):
        self.path, self.newest = path, {}
        if isinstance(images, Streamed):
            images, chosen = images.read(chosen), torch.arange(len(chosen))
        self._step, self._chosen = step, chosen
        labelled = isinstance(images, LabelledImages)
        self._tensors = (images.images, images.labels) if labelled else (images,)
        self._batch_size, self._seed = batch_size, seed
        rows = _kept_rows(path, keep) if keep else []
        with replacing(path) as file:
            file.write("".join(",".join(row) + "\n" for row in [COLUMNS, *rows]).encode())

    def measure(self, steps, epoch, last=False):
        """Measure, and write a row; a sentence about it.

        The noise is the same each time, and no random number of the training is used up.
        """
        bound = self._means()
        row = [steps, epoch, f"{-bound[0]:.4f}", *(f"{v:.4f}" for v in bound[1:]), ""]
        self.newest = {"held-out": f"{bound[0]:.3f}"}
        words = (
            f"held-out ELBO {-bound[0]:.2f} nats an image, reconstruction {bound[1]:.2f} and KL "
            f"{bound[2]:.2f}, of {len(self._chosen)} images"
        )
        if last:
            tight, *_ = self._means(SAMPLES)
            row[-1] = f"{-tight:.4f}"
            words += f"; IWAE bound of {SAMPLES} samples {-tight:.2f}"
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(row)
        return words

    def _means(self, samples=None):
        """The means of a `VAEResult` over the images, floats."""
        device = self._step.device
        # As many latents at a time as a step of training has.
        size = max(1, self._batch_size // (samples or 1))
        sums = 0.0
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self._seed)
            for part in self._chosen.split(size):
                batch = tuple(t.index_select(0, part).to(device) for t in self._tensors)
                result = torch.stack(tuple(self._step.evaluate(batch, samples)))
                sums = sums + len(part) * result.double()
        return (sums / len(self._chosen)).tolist()


def is_header(columns):
    """Whether these are the columns of such a file."""
    return columns == COLUMNS


def _kept_rows(path, keep):
    if not path.exists():
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        rows = [line.rstrip("\n").split(",") for line in file]
    return [row for row in rows if _is_row(row) and float(row[0]) <= keep]


def _is_row(fields):
    try:
        numbers = [float(field) for field in fields if field]
    except ValueError:
        return False
    return len(fields) == len(COLUMNS) and len(numbers) >= 5 and all(map(math.isfinite, numbers))
