"""The metrics of two sets of features against float64 loops, closed forms and each other."""

import itertools

import numpy as np
import pytest
import torch

from genfast.training.evaluation import METRICS, sets
from genfast.training.evaluation.kernel_distance import kernel_distance
from genfast.training.evaluation.neighbours import density_coverage, precision_recall
from genfast.training.evaluation.sets import squared_distances, unwatched


def _sets(shift=0.7, dtype=np.float32):
    """Real and generated features that overlap in part, of other numbers than blocks have."""
    draw = np.random.default_rng(0)
    real, generated = draw.normal(size=(43, 3)), draw.normal(size=(37, 3)) * 0.8
    return real.astype(dtype), (generated + shift).astype(dtype)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(sets, "BLOCK", 16)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_distances(offset):
    """Also far from the origin, where squares in float32 would leave nothing of them."""
    real, generated = (torch.from_numpy(f) + offset for f in _sets())
    for others in (generated, real):
        found = torch.full((len(real), len(others)), torch.nan, dtype=torch.float64)
        for rows, columns, block in squared_distances(real, others):
            found[rows, columns] = block
        expected = (real.double()[:, None] - others.double()).square().sum(2)
        if others is real:
            expected.fill_diagonal_(torch.inf)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def _loops(real, generated, k, inside):
    """Shares and counts as the papers define them, one pair at a time."""
    real, generated = real.astype(float), generated.astype(float)

    def radius(i, own):
        return sorted(np.linalg.norm(own[i] - own[j]) for j in range(len(own)) if j != i)[k - 1]

    real_balls = [radius(i, real) for i in range(len(real))]
    generated_balls = [radius(j, generated) for j in range(len(generated))]
    hits = np.zeros((len(real), len(generated)), bool)
    back = hits.copy()
    for i, j in itertools.product(range(len(real)), range(len(generated))):
        distance = np.linalg.norm(real[i] - generated[j])
        hits[i, j] = inside(distance, real_balls[i])
        back[i, j] = inside(distance, generated_balls[j])
    return hits, back


@pytest.mark.parametrize("k", [1, 3, 5])
def test_neighbours(k):
    real, generated = _sets()
    hits, back = _loops(real, generated, k, np.less_equal)
    expected = hits.any(0).mean(), back.any(1).mean()
    assert all(0 < share < 1 for share in expected) and expected[0] != expected[1]
    assert precision_recall(real, generated, k=k) == pytest.approx(expected, abs=1e-12)
    hits, _ = _loops(real, generated, k, np.less)
    expected = hits.sum(0).mean() / k, hits.any(1).mean()
    assert density_coverage(real, generated, k=k) == pytest.approx(expected, abs=1e-12)


def test_surfaces_and_equal_sets():
    """On a line: the ball of 0 reaches to 1, and so touches what was generated at 1."""
    real, generated = np.array([[0.0], [1.0], [8.0]]), np.array([[-1.0], [30.0]])
    assert precision_recall(real, generated, k=1) == (0.5, 1.0)
    assert density_coverage(real, generated, k=1) == (0.0, 0.0)
    real, _ = _sets()
    assert precision_recall(real, real.copy()) == (1.0, 1.0)
    assert density_coverage(real, real.copy()) == (1.0, 1.0)


def _discrepancy(x, y):
    """Gretton et al. (2012), lemma 6, one pair at a time."""

    def mean(a, b):
        pairs = [(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if a is not b or i != j]
        return sum((float(p @ q) / len(p) + 1) ** 3 for p, q in pairs) / len(pairs)

    x, y = x.astype(float), y.astype(float)
    return mean(x, x) + mean(y, y) - 2 * mean(x, y)


def test_kernel_distance():
    real, generated = _sets()
    generated = np.concatenate([generated, generated[:6] + 0.1])
    expected = _discrepancy(real, generated)
    mean, deviation = kernel_distance(real, generated)
    assert (mean, deviation) == (pytest.approx(expected, rel=1e-9), 0)
    # Subsets of any size give the same on average: the estimator has no bias.
    found, spread = kernel_distance(real, generated, subsets=1000, size=4)
    assert abs(found - expected) < 4 * spread / 1000**0.5
    assert spread > 0.1 * expected
    assert kernel_distance(real, generated, seed=1, subsets=5, size=9) == kernel_distance(
        real, generated, seed=1, subsets=5, size=9
    )
    assert kernel_distance(real, generated, seed=1, size=9) != kernel_distance(
        real, generated, size=9
    )


@pytest.mark.parametrize("name", METRICS)
def test_the_table(name):
    metric, (real, generated) = METRICS[name], _sets()
    near, far = (metric.measure(real, generated + move, 0, unwatched) for move in (0, 9))
    assert near != far and all(np.isfinite(list(near.values())))
    metric.measure(real[: metric.least], generated[: metric.least], 0, unwatched)
    with pytest.raises(ValueError, match=f"N and M at least {metric.least}, got"):
        metric.measure(real, generated[: metric.least - 1], 0, unwatched)
