"""The metrics of generated images, each of two sets of features.

To add one, add a row to `METRICS`. The command line follows from that.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from genfast.training.evaluation.frechet import frechet_distance
from genfast.training.evaluation.kernel_distance import kernel_distance
from genfast.training.evaluation.neighbours import (
    NEIGHBOURS_OF_DENSITY,
    NEIGHBOURS_OF_PRECISION,
    density_coverage,
    precision_recall,
)
from genfast.training.evaluation.sets import Watch


class Metric(NamedTuple):
    """A metric.

    Attributes:
        measure: a function of the features of real and of generated images, a seed, and `watch` as
            `squared_distances` takes it, that gives a dict of numbers. The one called NAME_sd is
            the spread of the one called NAME.
        least: how many images of each it needs.
        text: what it says, for the command line's help.
    """

    measure: Callable[[torch.Tensor, torch.Tensor, int, Watch], dict[str, float]]
    least: int
    text: str


def _fid(real: torch.Tensor, generated: torch.Tensor, seed: int, watch: Watch) -> dict[str, float]:
    return {"fid": frechet_distance(real, generated)}


def _kid(real: torch.Tensor, generated: torch.Tensor, seed: int, watch: Watch) -> dict[str, float]:
    mean, deviation = kernel_distance(real, generated, seed=seed, watch=watch)
    return {"kid": mean, "kid_sd": deviation}


def _precision_recall(
    real: torch.Tensor, generated: torch.Tensor, seed: int, watch: Watch
) -> dict[str, float]:
    precision, recall = precision_recall(real, generated, watch=watch)
    return {"precision": precision, "recall": recall}


def _density_coverage(
    real: torch.Tensor, generated: torch.Tensor, seed: int, watch: Watch
) -> dict[str, float]:
    density, coverage = density_coverage(real, generated, watch=watch)
    return {"density": density, "coverage": coverage}


METRICS = {
    "fid": Metric(_fid, 2, "Fréchet distance, Heusel et al. 2017"),
    "kid": Metric(_kid, 2, "kernel distance, Bińkowski et al. 2018"),
    "precision-recall": Metric(
        _precision_recall, NEIGHBOURS_OF_PRECISION + 1, "Kynkäänniemi et al. 2019"
    ),
    "density-coverage": Metric(_density_coverage, NEIGHBOURS_OF_DENSITY + 1, "Naeem et al. 2020"),
}
