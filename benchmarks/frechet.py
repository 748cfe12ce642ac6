"""The Fréchet distance between sets of digits, in the features of a classifier of digits.

It is to digits what the Fréchet inception distance (Heusel et al., 2017, arXiv:1706.08500) is to
photographs: 0 for sets with the same mean and covariance of features, larger the less alike they
are. Its size depends on the classifier and on how many images there are, so it compares runs that
were measured with the same ones, and nothing else.
"""

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from genfast.training.data import load_images, normalize
from genfast.training.errors import require

FEATURES = 64
EPOCHS = 12
BATCH_SIZE = 32
LEARNING_RATE = 5e-3
HELD_OUT = 450  # A quarter of the digits.
PIXEL_RANGE = (-1.0, 1.0)


class Digits(NamedTuple):
    """Handwritten digits: uint8 images (N, 1, H, W), and which digit each is, int64 (N,)."""

    images: torch.Tensor
    labels: torch.Tensor


def load_digits(image_size):
    """scikit-learn's 1,797 digits, resized as `genfast train` resizes them, in its order.

    Raises:
        BadInput: scikit-learn is not installed.
    """
    datasets = require("sklearn.datasets", "scikit-learn")
    labels = torch.from_numpy(datasets.load_digits().target).long()
    return Digits(load_images("digits", image_size), labels)


class Classifier(nn.Module):
    """Digits (N, 1, H, W), as float images in [-1, 1], to 10 logits (N, 10)."""

    def __init__(self):
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

    def forward(self, images):
        """The logits."""
        return self.head(self.body(images))

    @torch.no_grad()
    def features(self, images):
        """What the last layer sees of uint8 images (N, 1, H, W): a float64 array (N, FEATURES)."""
        parts = [self.body(normalize(part, PIXEL_RANGE)) for part in images.cpu().split(512)]
        return torch.cat(parts).double().numpy()

    @torch.no_grad()
    def accuracy(self, digits):
        """The share of digits that are recognised."""
        logits = self(normalize(digits.images, PIXEL_RANGE))
        return (logits.argmax(1) == digits.labels).double().mean().item()


def train_classifier(digits, seed=0, epochs=EPOCHS):
    """Train a classifier on three quarters of the digits, on the CPU.

    Which quarter is held out, the first weights and the order of training depend on `seed` alone.

    Returns:
        (Classifier, its accuracy on the quarter held out).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        held_out, trained = torch.randperm(len(digits.images)).tensor_split([HELD_OUT])
        classifier = Classifier()
        _fit(classifier, digits, trained, epochs)
    unseen = Digits(digits.images[held_out], digits.labels[held_out])
    return classifier.requires_grad_(False), classifier.accuracy(unseen)


def _fit(classifier, digits, trained, epochs):
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


def frechet_distance(features, others):
    """The Fréchet distance between two sets of features.

    Each set stands for the Gaussian of its mean and covariance.

    Args:
        features, others: arrays (N, D) and (M, D) of finite numbers, N and M at least 2.

    Raises:
        ValueError: they are not that.
    """
    sets = [np.asarray(f, dtype=np.float64) for f in (features, others)]
    shapes = " and ".join(str(f.shape) for f in sets)
    if any(f.ndim != 2 or len(f) < 2 for f in sets) or sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(f"expected features (N, D) and (M, D), N and M at least 2, got {shapes}")
    if not all(np.isfinite(f).all() for f in sets):
        raise ValueError("expected finite features, got some that are infinite or not a number")
    (mean, covariance), (other_mean, other_covariance) = (
        (f.mean(0), np.cov(f, rowvar=False).reshape(f.shape[1], f.shape[1])) for f in sets
    )
    return gaussian_distance(mean, covariance, other_mean, other_covariance)


def gaussian_distance(mean, covariance, other_mean, other_covariance):
    """The Fréchet distance between two Gaussians, in float64.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), by Dowson and Landau (1982), "The Fréchet distance
    between multivariate normal distributions". As in Heusel et al. (2017) it is this square that
    bears the name.

    Args:
        mean, other_mean: arrays (D,).
        covariance, other_covariance: symmetric arrays (D, D) without eigenvalues below 0.
    """
    # S1 S2 has the eigenvalues of S1^(1/2) S2 S1^(1/2), and these are the squares of the singular
    # values of S1^(1/2) S2^(1/2). Taken from there, no root of a rounding error is ever taken.
    product = _root(covariance) @ _root(other_covariance)
    trace_of_root = np.linalg.svd(product, compute_uv=False).sum()
    shift = mean - other_mean
    distance = shift @ shift + np.trace(covariance) + np.trace(other_covariance) - 2 * trace_of_root
    return max(0.0, float(distance))


def _root(covariance):
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
