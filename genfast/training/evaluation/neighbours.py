"""What the nearest neighbours of features say: how good samples are, and how various.

A set's manifold is taken for the balls around its members that reach to their k-th nearest
neighbours.
"""

import torch

from genfast.training.evaluation.sets import (
    Features,
    Watch,
    checked_sets,
    squared_distances,
    unwatched,
)

# Of the papers.
NEIGHBOURS_OF_PRECISION = 3
NEIGHBOURS_OF_DENSITY = 5


def precision_recall(
    real: Features,
    generated: Features,
    *,
    k: int = NEIGHBOURS_OF_PRECISION,
    watch: Watch = unwatched,
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 2019, arXiv:1904.06991).

    Precision is the share of generated images that lie in the manifold of the real ones, recall
    that of real images in the manifold of the generated ones. Balls hold their surface.

    Args:
        real, generated: features, tensors or arrays (N, D) and (M, D), N and M above k.
        k: which neighbour a ball reaches to.
        watch: see `squared_distances`.

    Returns:
        (precision, recall), each from 0 to 1.

    Raises:
        ValueError: the features are not that.
    """
    real, generated = checked_sets(real, generated, k + 1)
    of_real, of_generated = (_radii(f, k, watch) for f in (real, generated))
    precise = torch.zeros(len(generated), dtype=torch.bool, device=real.device)
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, columns, block in squared_distances(real, generated, watch=watch):
        precise[columns] |= (block <= of_real[rows, None]).any(0)
        recalled[rows] |= (block <= of_generated[columns]).any(1)
    return _share(precise), _share(recalled)


def density_coverage(
    real: Features, generated: Features, *, k: int = NEIGHBOURS_OF_DENSITY, watch: Watch = unwatched
) -> tuple[float, float]:
    """Density and coverage (Naeem et al., 2020, arXiv:2002.09797).

    Density counts in how many balls of real images a generated one lies, by k: 1 on average where
    both sets are of one distribution, more where samples crowd where real images do. Coverage is
    the share of balls that hold a generated image. Balls do not hold their surface, as in the
    authors' program: so two equal sets come to 1.

    Args and Raises: as `precision_recall`.

    Returns:
        (density, coverage), from 0; coverage up to 1.
    """
    real, generated = checked_sets(real, generated, k + 1)
    radii = _radii(real, k, watch)
    balls = torch.zeros(len(generated), dtype=torch.int64, device=real.device)
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, columns, block in squared_distances(real, generated, watch=watch):
        inside = block < radii[rows, None]
        balls[columns] += inside.sum(0)
        covered[rows] |= inside.any(1)
    return balls.double().mean().item() / k, _share(covered)


def _radii(features: torch.Tensor, k: int, watch: Watch) -> torch.Tensor:
    """The squared distance of each row to its k-th nearest neighbour in the same set: (N,)."""
    nearest = torch.full((len(features), k), torch.inf, dtype=torch.float64, device=features.device)
    for rows, _, block in squared_distances(features, features, "neighbours", watch):
        candidates = torch.cat([nearest[rows], block], 1)
        nearest[rows] = candidates.topk(k, largest=False, sorted=True).values
    return nearest[:, -1]


def _share(flags: torch.Tensor) -> float:
    return flags.double().mean().item()
