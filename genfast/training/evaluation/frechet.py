"""The Fréchet distance between two sets of features (Heusel et al., 2017, arXiv:1706.08500).

It is 0 for sets with the same mean and covariance, larger the less alike they are. Its size depends
on the features and on how many images there are, so it compares models that were measured with the
same ones, and nothing else.
"""

import numpy as np
import torch

from genfast.training.evaluation.sets import BLOCK, Features, checked_sets, mean_of


def frechet_distance(features: Features, others: Features) -> float:
    """The Fréchet distance between two sets of features.

    Each set stands for the Gaussian of its mean and covariance.

    Args:
        features, others: tensors or arrays (N, D) and (M, D) of finite numbers, N and M at least 2.

    Raises:
        ValueError: they are not that.
    """
    moments = [_moments(f) for f in checked_sets(features, others)]
    (mean, covariance), (other_mean, other_covariance) = moments
    return gaussian_distance(mean, covariance, other_mean, other_covariance)


def _moments(features: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and unbiased covariance (D, D), float64 arrays."""
    mean = mean_of(features)
    covariance = torch.zeros((), dtype=torch.float64, device=features.device)
    for part in features.split(BLOCK):
        deviations = part.double() - mean
        covariance = covariance + deviations.T @ deviations
    return mean.cpu().numpy(), (covariance / (len(features) - 1)).cpu().numpy()


def gaussian_distance(
    mean: np.ndarray, covariance: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray
) -> float:
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


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
