"""Two sets of features: what is checked of them, and distances between them in blocks."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
import torch

# Rows of a block: its distances take 32 MiB in float64, whatever the number of images.
BLOCK = 2048

T = TypeVar("T")
Features = torch.Tensor | np.ndarray
# (items, what is done, how many items) -> the items.
Watch = Callable[[Iterable[Any], str, int], Iterable[Any]]


def checked_sets(features: Features, others: Features, least: int = 2) -> list[torch.Tensor]:
    """Both as tensors (N, D) and (M, D) of floating point, where they are.

    Args:
        features, others: tensors or arrays.
        least: how many rows each has to have.

    Raises:
        ValueError: they are not that, or not finite.
    """
    sets = [
        f if isinstance(f, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(f))
        for f in (features, others)
    ]
    shapes = " and ".join(str(tuple(f.shape)) for f in sets)
    if any(f.ndim != 2 or len(f) < least for f in sets) or sets[0].shape[1] != sets[1].shape[1]:
        raise ValueError(
            f"expected features (N, D) and (M, D), N and M at least {least}, got {shapes}"
        )
    if not all(f.isfinite().all() for f in sets):
        raise ValueError("expected finite features, got some that are infinite or not a number")
    return [f if f.is_floating_point() else f.double() for f in sets]


def mean_of(features: torch.Tensor) -> torch.Tensor:
    """The mean row (D,) in float64, without a copy of the whole set in it."""
    total = torch.zeros((), dtype=torch.float64, device=features.device)
    for part in features.split(BLOCK):
        total = total + part.double().sum(0)
    return total / len(features)


def unwatched(blocks: Iterable[T], text: str, total: int) -> Iterable[T]:
    """In place of a progress bar."""
    return blocks


def squared_distances(
    features: torch.Tensor, others: torch.Tensor, text: str = "distances", watch: Watch = unwatched
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Squared Euclidean distances between the rows of two sets, in blocks.

    In float64: |a - b|^2 is taken from |a|^2, |b|^2 and a b, as a matrix product is the only way
    that is fast, and in float32 these would cancel where the sets are far from 0.

    Args:
        features, others: tensors (N, D) and (M, D) on one device; the same object for the distances
            within a set.
        text: what is done, in words, for the progress bar.
        watch: a function of (iterable, text, number of blocks) that gives its items.

    Yields:
        (rows, columns, block): two slices, and a float64 tensor that holds the distances between
        those rows of `features` and those of `others`. Of a row to itself it is infinity.
    """
    firsts = [(i, j) for i in range(0, len(features), BLOCK) for j in range(0, len(others), BLOCK)]
    for i, j in watch(firsts, text, len(firsts)):
        rows, columns = slice(i, i + BLOCK), slice(j, j + BLOCK)
        a, b = features[rows].double(), others[columns].double()
        squares = a.square().sum(1)[:, None] + b.square().sum(1)
        block = torch.addmm(squares, a, b.T, alpha=-2).clamp_(min=0)
        if features is others and i == j:
            block.fill_diagonal_(torch.inf)
        yield rows, columns, block
