"""A classifier of handwritten digits, whose features tell how alike sets of digits are.

They are to digits what those of Inception are to photographs. Nothing is downloaded: it is trained
here, in seconds, on scikit-learn's digits.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from genfast.launch import timings
from genfast.models.sizes import ImageSize
from genfast.training.data import load_images, normalize
from genfast.training.errors import require
from genfast.training.files import replacing

FEATURES = 64
EPOCHS = 12
BATCH_SIZE = 32
LEARNING_RATE = 5e-3
HELD_OUT = 450  # A quarter of the digits.
PIXEL_RANGE = (-1.0, 1.0)
LEAST_ACCURACY = 0.97
# Other networks or another training are another classifier and take another number.
CACHED = "digits_classifier_1_{size}_torch-{torch}.pt"


class PoorClassifier(RuntimeError):
    """A classifier recognises so few digits that its features are not worth comparing."""


class Digits(NamedTuple):
    """Handwritten digits: uint8 images (N, 1, H, W), and which digit each is, int64 (N,)."""

    images: torch.Tensor
    labels: torch.Tensor


def load_digits(image_size: ImageSize) -> Digits:
    """scikit-learn's 1,797 digits, resized as `genfast train` resizes them, in its order.

    Raises:
        BadInput: scikit-learn is not installed.
    """
    datasets = require("sklearn.datasets", "scikit-learn")
    labels = torch.from_numpy(datasets.load_digits().target).long()
    return Digits(load_images("digits", image_size), labels)


class Classifier(nn.Module):
    """Digits (N, 1, H, W), as float images in [-1, 1], to 10 logits (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        # SiLU, since some of a ReLU's features would be 0 for all digits.
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(8),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, FEATURES),
            nn.SiLU(),
        )
        self.head = nn.Linear(FEATURES, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """The logits."""
        return self.head(self.body(images))

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> np.ndarray:
        """What the last layer sees of uint8 images (N, 1, H, W): a float64 array (N, FEATURES)."""
        parts = [self.body(normalize(part, PIXEL_RANGE)) for part in images.cpu().split(512)]
        return torch.cat(parts).double().numpy()

    @torch.no_grad()
    def accuracy(self, digits: Digits) -> float:
        """The share of digits that are recognised."""
        logits = self(normalize(digits.images, PIXEL_RANGE))
        return (logits.argmax(1) == digits.labels).double().mean().item()


def train_classifier(
    digits: Digits, seed: int = 0, epochs: int = EPOCHS
) -> tuple[Classifier, float]:
    """Train a classifier on three quarters of the digits, on the CPU.

    Which quarter is held out, the first weights and the order of training depend on `seed` alone.

    Returns:
        (Classifier, its accuracy on the quarter held out).
    """
    with torch.random.fork_rng(devices=[]), _one_thread():
        torch.manual_seed(seed)
        held_out, trained = torch.randperm(len(digits.images)).tensor_split([HELD_OUT])
        classifier = Classifier()
        _fit(classifier, digits, trained, epochs)
    unseen = Digits(digits.images[held_out], digits.labels[held_out])
    return classifier.requires_grad_(False), classifier.accuracy(unseen)


def good_classifier(image_size: ImageSize) -> Classifier:
    """The trained classifier for digits of this size, from the folder of caches if it is there.

    That is genfast's own, where the file of first uses lies; see `genfast.launch.timings.path`.

    Raises:
        BadInput: scikit-learn is not installed.
        PoorClassifier: it recognises too few digits.
    """
    name = CACHED.format(size=image_size, torch=torch.__version__)
    # Damaged bytes make the unpickler raise nearly anything.
    with suppress(Exception), torch.random.fork_rng(devices=[]):
        classifier = Classifier()
        kept = torch.load(timings.path().with_name(name), map_location="cpu", weights_only=True)
        classifier.load_state_dict(kept)
        return classifier.requires_grad_(False)
    classifier, accuracy = train_classifier(load_digits(image_size))
    check_accuracy(accuracy)
    with suppress(OSError):  # Without the file the next one is trained anew.
        path = timings.path().with_name(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            torch.save(classifier.state_dict(), file)
    return classifier


def check_accuracy(accuracy: float) -> None:
    """PoorClassifier unless a classifier recognises enough of the digits held out."""
    if accuracy < LEAST_ACCURACY:
        raise PoorClassifier(
            f"expected a classifier that recognises {LEAST_ACCURACY:.0%} of the digits held out, "
            f"for its features to be worth comparing, got one that recognises {accuracy:.1%}"
        )


@contextmanager
def _one_thread() -> Iterator[None]:
    """Then no sum depends on how many there are; and so small a network is fastest on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _fit(classifier: Classifier, digits: Digits, trained: torch.Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(classifier.parameters())
    steps = epochs * (len(trained) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(epochs):
        order = trained[torch.randperm(len(trained))]
        for chosen in order.split(BATCH_SIZE)[: len(trained) // BATCH_SIZE]:
            logits = classifier(normalize(digits.images[chosen], PIXEL_RANGE))
            optimizer.zero_grad()
            F.cross_entropy(logits, digits.labels[chosen]).backward()
            optimizer.step()
            schedule.step()
