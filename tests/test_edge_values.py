"""NaN, infinities, exact zeros and single pixels come out as PyTorch has them."""

from dataclasses import replace

import numpy
import pytest
import torch
from cases import ACTIVATIONS, Case, Geometry
from oracle import assert_block, assert_close, evaluate

from genfast import functional

pytestmark = pytest.mark.kernels

INF, NAN = float("inf"), float("nan")
GEOMETRY = Geometry(3, 2, 1, (7, 8), (4, 5), output_padding=1)


def assert_specials(ours, eager, oracle):
    """Hold what is finite to the rule, and the rest to be the same NaN and the same infinities."""
    finite = [{}, {}, {}]
    for name, expected in oracle.items():
        if expected is None:
            continue
        usual = expected.isfinite()
        for which, kept in zip((ours, eager, oracle), finite, strict=True):
            special = which[name].double().where(~usual, 0)
            torch.testing.assert_close(special, expected.where(~usual, 0), equal_nan=True)
            kept[name] = which[name].where(usual, 0)
    assert_close(finite[0], finite[2], [(finite[1], finite[2])])


def assert_special_block(case, tensors, device):
    """Compare a block on these tensors, output and gradients."""
    y = evaluate(case.plain, case, tensors)["output"]
    dy = torch.randn_like(y)
    exact = {name: t if t is None else t.double() for name, t in tensors.items()}
    ours = evaluate(case.fused, case, tensors, dy, torch.float32)
    eager = evaluate(case.plain, case, tensors, dy, torch.float32)
    assert_specials(ours, eager, evaluate(case.plain, case, exact, dy, torch.float64))


@pytest.mark.one_in(2)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("transposed", "mode", "value"),
    [
        (False, "training", NAN),
        (True, "evaluation", NAN),
        (False, "plain", INF),
        (True, "plain", NAN),
        (True, "plain", -INF),
    ],
)
def test_special_pixel(transposed, mode, value, activation, device):
    case = Case(transposed, GEOMETRY, mode=mode, activation=activation)
    tensors = case.tensors(device)
    tensors["x"][1, 2, 3, 2] = value
    assert_special_block(case, tensors, device)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mode", ["training", "evaluation", "plain"])
def test_exact_zeros(mode, transposed, activation, device):
    # At 0 the derivative of relu is 0, that of leaky relu the slope.
    case = Case(transposed, GEOMETRY, mode=mode, activation=activation, affine=False)
    tensors = case.tensors(device)
    tensors["x"].zero_()
    if mode == "evaluation":
        tensors["running_mean"].zero_()
    assert not evaluate(case.fused, replace(case, activation="identity"), tensors)["output"].any()
    assert_special_block(case, tensors, device)


@pytest.mark.parametrize("activation", ["tanh", "sigmoid"])
def test_saturated_activations(activation, device):
    x = torch.tensor([-INF, -1e4, -100, -20, -1e-3, -1e-30, 0, 1e-30, 1e-3, 20, 100, 1e4, INF])
    x = x.to(device).reshape(1, 1, 1, -1)
    weight = torch.ones(1, 1, 1, 1, device=device)
    results = []
    for operation, dtype in (
        (functional.conv_block, torch.float32),
        (None, torch.float32),
        (None, torch.float64),
    ):
        u = x.to(dtype).requires_grad_()
        y = operation(u, weight, activation=activation) if operation else getattr(u, activation)()
        (dx,) = torch.autograd.grad(y.sum(), u)
        results.append({"output": y.detach(), "gradient of x": dx})
    assert_specials(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_keeps_its_digits_at_every_magnitude(dtype, device):
    """A largest error over all of them would let tanh(1e-8) be 0."""
    weight = torch.ones(1, 1, 1, 1, dtype=dtype, device=device)
    ours, eager, oracle = {}, {}, {}
    for magnitude in (1e-30, 1e-8, 1e-3, 0.1, 0.25, 0.5, 1.0, 3.0, 10.0, 100.0):
        x = magnitude * torch.linspace(1, 1.99, 200, device=device)
        x = torch.cat([x, -x]).reshape(1, 1, 1, -1)
        name = f"tanh of {magnitude}"
        ours[name] = functional.conv_block(x.to(dtype), weight, activation="tanh")
        eager[name], oracle[name] = x.tanh(), x.double().tanh()
    assert_close(ours, oracle, [(eager, oracle)])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(3, 2, 1, (1, 1), (1, 1)),
        Geometry(1, 2, 0, (1, 3), (1, 2)),
        Geometry(1, 2, 0, (3, 1), (2, 1)),
        Geometry(5, 3, 2, (1, 2), (1, 1), output_padding=(0, 1)),
    ],
    ids=lambda g: f"{g}-{g.big[0]}x{g.big[1]}",
)
def test_phases_without_a_pixel(geometry, transposed, device):
    """A GPU gives no meaning to a division by their height and width, which are 0."""
    case = Case(transposed, geometry, channels=(2, 3), mode="plain", activation="identity")
    with numpy.errstate(divide="raise"):
        assert_block(case, device)


@pytest.mark.parametrize("geometry", [Geometry(3, 2, 1, (1, 1), (1, 1))], ids=str)
def test_statistics_beside_phases_without_a_pixel(geometry, device):
    case = Case(True, geometry, channels=(2, 3), batch=6)
    with numpy.errstate(divide="raise"):
        assert_block(case, device)
