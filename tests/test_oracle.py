"""The rule that results are held to lets through what it should, and nothing else."""

import pytest
import torch
from oracle import GRADIENT_FACTOR, VALUE_FACTOR, assert_close, largest_error, norm_of_errors

NAMES = {"output": VALUE_FACTOR, "gradient of x": GRADIENT_FACTOR}
DTYPES = [torch.float32, torch.bfloat16]


def sample(dtype):
    """An exact result, and eager PyTorch's: a few roundings off, few of them by much."""
    exact = torch.randn(64, 64, dtype=torch.float64)
    eager = exact + 0.5 * torch.finfo(dtype).eps * torch.randn_like(exact)
    return exact, eager.to(dtype)


def allowed(exact, eager, factor, error_of, one_rounding):
    return factor * error_of(eager, exact) + one_rounding * error_of(exact, 0 * exact)


def hold(name, result, exact, eager):
    assert_close({name: result}, {name: exact}, [({name: eager}, {name: exact})])


def moved(exact, errors, dtype):
    """exact + errors where the rounding to dtype leaves just about that: signs chosen at random."""
    return (exact + errors * torch.randn_like(exact).sign()).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "factor"), NAMES.items())
def test_the_same_error_passes(name, factor, dtype):
    exact, eager = sample(dtype)
    hold(name, eager, exact, eager)
    hold(name, exact.to(dtype), exact, eager)
    hold(name, exact.to(dtype), exact, exact.to(dtype))  # One rounding of the output.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "factor"), NAMES.items())
def test_one_element_too_far_off(name, factor, dtype):
    exact, eager = sample(dtype)
    most = allowed(exact, eager, factor, largest_error, torch.finfo(dtype).eps)
    result = eager.clone()
    result[3, 4] = exact[3, 4] + 1.2 * most
    with pytest.raises(AssertionError, match=f"{name}: error"):
        hold(name, result, exact, eager)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("name", "factor"), NAMES.items())
def test_every_element_off_as_only_one_may_be(name, factor, dtype):
    """60 % of the largest error that is allowed, everywhere: only the norm sees it."""
    exact, eager = sample(dtype)
    eps = torch.finfo(dtype).eps
    most = allowed(exact, eager, factor, largest_error, eps)
    result = moved(exact, 0.6 * most, dtype)
    assert largest_error(result, exact) <= most
    with pytest.raises(AssertionError) as raised:
        hold(name, result, exact, eager)
    assert f"{name}: norm of errors" in str(raised.value)
    assert f"{name}: error" not in str(raised.value)
    # What is allowed in norm is allowed, wherever it lies.
    in_norm = allowed(exact, eager, factor, norm_of_errors, eps / 2)
    each = in_norm / exact.numel() ** 0.5
    hold(name, moved(exact, 0.8 * each, dtype), exact, eager)


def test_nan_is_no_pass():
    exact, eager = sample(torch.float32)
    result = eager.clone()
    result[0, 0] = float("nan")
    with pytest.raises(AssertionError, match="output: error nan"):
        hold("output", result, exact, eager)


def test_no_tolerance_grows_with_the_number_of_elements():
    """Four copies of a result err twice as much in norm, and so does what they are held to."""
    exact, eager = sample(torch.float32)
    eps = torch.finfo(torch.float32).eps
    each = allowed(exact, eager, VALUE_FACTOR, norm_of_errors, eps / 2) / exact.numel() ** 0.5
    for copies in (1, 4):
        wide, narrow = exact.repeat(copies, 1), eager.repeat(copies, 1)
        hold("output", moved(wide, 0.95 * each, torch.float32), wide, narrow)
        with pytest.raises(AssertionError, match="norm of errors"):
            hold("output", moved(wide, 1.05 * each, torch.float32), wide, narrow)
