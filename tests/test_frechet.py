"""The Fréchet distance on Gaussians with known distances, and on digits, noise and both mixed."""

import numpy as np
import pytest
import torch

from genfast.training.evaluation.digits import load_digits, train_classifier
from genfast.training.evaluation.frechet import frechet_distance, gaussian_distance


@pytest.fixture(scope="module")
def digits():
    return load_digits(16)


@pytest.fixture(scope="module")
def trained(digits):
    return train_classifier(digits)


@pytest.fixture(scope="module")
def classifier(trained):
    return trained[0]


def _rotation(size, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]


def _covariance(size, seed, rank=None):
    factor = np.random.default_rng(seed).normal(size=(size, rank or size))
    return factor @ factor.T


def test_gaussians_in_one_dimension():
    # (m1 - m2)^2 + (s1 - s2)^2
    distance = gaussian_distance(np.array([1.0]), np.array([[9.0]]), np.array([3.0]), np.eye(1))
    assert distance == pytest.approx(4 + 4, rel=1e-12)


def test_gaussians_with_the_same_axes():
    """The distance is that of the means and of the standard deviations, axis by axis."""
    draw = np.random.default_rng(0)
    deviations, others = draw.uniform(0, 3, (2, 5))
    mean, other = draw.normal(size=(2, 5))
    axes = _rotation(5, 1)
    covariances = [axes @ np.diag(d**2) @ axes.T for d in (deviations, others)]
    expected = ((mean - other) ** 2).sum() + ((deviations - others) ** 2).sum()
    distance = gaussian_distance(mean, covariances[0], other, covariances[1])
    assert distance == pytest.approx(expected, rel=1e-10)


def test_gaussians_with_other_axes():
    """Against the roots of the eigenvalues of S1 S2 itself, which is not symmetric."""
    zero = np.zeros(6)
    one, other = _covariance(6, 1), _covariance(6, 2)
    roots = np.sqrt(np.linalg.eigvals(one @ other).real)
    expected = np.trace(one) + np.trace(other) - 2 * roots.sum()
    assert gaussian_distance(zero, one, zero, other) == pytest.approx(expected, rel=1e-8)
    assert gaussian_distance(zero, other, zero, one) == pytest.approx(expected, rel=1e-8)


def test_two_by_two():
    """tr (S1 S2)^(1/2) = sqrt(tr(S1 S2) + 2 sqrt(det(S1 S2))) for matrices of two rows."""
    one, other = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[5.0, -2.0], [-2.0, 1.0]])
    product = one @ other
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
    zero = np.zeros(2)
    assert gaussian_distance(zero, one, zero, other) == pytest.approx(5 + 6 - 2 * root, rel=1e-12)


def test_flat_gaussians():
    """Directions without any spread do no harm, neither in one nor in the other."""
    zero = np.zeros(8)
    flat = _covariance(8, 1, rank=3)
    assert gaussian_distance(zero, flat, zero, flat) < 1e-12 * np.trace(flat)
    assert gaussian_distance(zero, flat, zero, 4 * flat) == pytest.approx(np.trace(flat))
    assert gaussian_distance(zero, flat, zero, np.zeros((8, 8))) == pytest.approx(np.trace(flat))


def test_sets_of_features():
    draw = np.random.default_rng(0)
    features = draw.normal(size=(500, 4)).astype(np.float32)
    assert frechet_distance(features, features) < 1e-12
    assert frechet_distance(features, features[::-1]) < 1e-12
    # Far from the origin, where float32 would have lost all of the distance.
    assert frechet_distance(features + 1000.0, features + 1003.0) == pytest.approx(36, rel=1e-3)
    assert frechet_distance(features, 3 * features) == pytest.approx(
        4 * (np.cov(features.T).trace() + (features.mean(0) ** 2).sum()), rel=1e-5
    )
    one = features[:, :1]
    assert frechet_distance(one, one + 2) == pytest.approx(4, rel=1e-6)


@pytest.mark.parametrize(
    ("features", "others", "message"),
    [
        (np.zeros((5, 3)), np.zeros((5, 4)), r"\(N, D\) and \(M, D\).*got \(5, 3\) and \(5, 4\)"),
        (np.zeros((1, 3)), np.zeros((5, 3)), r"at least 2, got \(1, 3\)"),
        (np.zeros(3), np.zeros((5, 3)), r"got \(3,\)"),
        (np.full((5, 3), np.nan), np.zeros((5, 3)), "expected finite features"),
    ],
)
def test_unsuitable_features(features, others, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(features, others)


def test_classifier_knows_digits_it_has_not_seen(trained):
    assert trained[1] >= 0.97


def test_classifier_is_the_same_each_time(digits, classifier):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    one, other = (train_classifier(digits, epochs=1)[0] for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    np.testing.assert_array_equal(one.features(digits.images), other.features(digits.images))
    assert not np.array_equal(one.features(digits.images), classifier.features(digits.images))


def test_every_feature_tells_digits_apart(digits, classifier):
    features = classifier.features(digits.images)
    assert features.dtype == np.float64
    assert features.shape == (1797, 64)
    assert features.std(0).min() > 1e-3


def test_real_digits_are_near_and_noise_is_far(digits, classifier):
    features = classifier.features(digits.images)
    halves = np.array_split(np.random.default_rng(0).permutation(features), 2)
    noise = torch.randint(0, 256, digits.images.shape, dtype=torch.uint8)
    near = frechet_distance(*halves)
    far = frechet_distance(features, classifier.features(noise))
    assert far > 50 * near
    threes, eights = (features[digits.labels.numpy() == label] for label in (3, 8))
    assert near < 0.1 * frechet_distance(threes, eights)


def test_the_more_noise_the_farther(digits, classifier):
    features = classifier.features(digits.images)
    noise = torch.randn(digits.images.shape)
    distances = [0.0]
    for deviation in (8, 16, 32, 64, 128):
        noisy = (digits.images + deviation * noise).round().clamp(0, 255).to(torch.uint8)
        distances.append(frechet_distance(features, classifier.features(noisy)))
    assert all(b > 1.5 * a for a, b in zip(distances, distances[1:], strict=False))


def test_missing_digits_are_noticed(digits, classifier):
    """A generator that draws perfect digits, but not all of them, is no perfect generator."""
    features = classifier.features(digits.images)
    few = [
        frechet_distance(features, features[digits.labels.numpy() < kinds]) for kinds in (9, 6, 3)
    ]
    halves = np.array_split(np.random.default_rng(0).permutation(features), 2)
    assert frechet_distance(*halves) < few[0] < few[1] < few[2]
