"""The kernel distance between two sets of features (Bińkowski et al., 2018, arXiv:1801.01401)."""

import statistics

import torch

from genfast.training.evaluation.sets import Features, Watch, checked_sets, unwatched

SUBSETS = 100
SUBSET_SIZE = 1000


def kernel_distance(
    features: Features,
    others: Features,
    *,
    seed: int = 0,
    subsets: int = SUBSETS,
    size: int = SUBSET_SIZE,
    watch: Watch = unwatched,
) -> tuple[float, float]:
    """Mean and standard deviation over subsets of the squared maximum mean discrepancy.

    As for the kernel inception distance: the unbiased estimator, under the kernel
    (x y / D + 1)^3, so that its mean is 0 for two sets of one distribution, however small, and
    single values may lie below 0.

    Args:
        features, others: tensors or arrays (N, D) and (M, D) of finite numbers, N and M at least 2.
        seed: of the subsets.
        subsets: how many pairs of subsets are drawn. Where a pair holds both sets it is one.
        size: how many rows each has, without repetition; at most N and M.
        watch: see `squared_distances`.

    Raises:
        ValueError: the features are not that.
    """
    features, others = checked_sets(features, others)
    size = min(size, len(features), len(others))
    if len(features) == len(others) == size:
        subsets = 1
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in watch(range(subsets), "kernel distance", subsets):
        pair = [
            f[torch.randperm(len(f), generator=generator)[:size].to(f.device)].double()
            for f in (features, others)
        ]
        found.append(_discrepancy(*pair))
    return statistics.fmean(found), statistics.pstdev(found)


def _discrepancy(x: torch.Tensor, y: torch.Tensor) -> float:
    """The unbiased estimate of Gretton et al. (2012), lemma 6, for two sets of m rows."""
    m = len(x)
    within = sum(k.sum() - k.diagonal().sum() for k in (_kernel(x, x), _kernel(y, y)))
    return (within / (m * (m - 1)) - 2 * _kernel(x, y).mean()).item()


def _kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3
