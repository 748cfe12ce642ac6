"""The products of a kernel that covers the whole map and leaves few channels, by `oracle`."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS, pairwise
from oracle import DRAWS, assert_close

from genfast import reference
from genfast.geometry import ConvGeometry
from genfast.launch import logits
from genfast.launch.epilogue import Epilogue

SLOPE = 0.3
# Of the big side: its size and channels. 4 x 5 x 9 elements are three of the interpreter's tiles,
# the last of them ragged; 2 x 2 x 1 are less than one.
MAPS = (((4, 4), 16), ((4, 5), 9), ((2, 2), 1), ((1, 3), 40))
CASES = pairwise(
    dict(
        map=MAPS,
        c_small=(1, 2, 3, 4),
        batch=(1, 3, 19),
        dtype=DTYPES,
        activation=("identity", "relu", "leaky_relu", "tanh", "sigmoid"),
        bias=(False, True),
        layout=("contiguous", "channels_last", "sliced"),
    )
)


def case_id(case):
    (height, width), channels = case["map"]
    rest = [v for k, v in case.items() if k != "map"]
    return "-".join(map(str, (f"{height}x{width}x{channels}", *rest)))


def geometry_of(case):
    size, _ = case["map"]
    return ConvGeometry.conv(size, size, (1, 1), (0, 0))


def tensors_of(case, device):
    size, c_big = case["map"]
    n, c_small = case["batch"], case["c_small"]
    values = dict(
        big=torch.randn(n, c_big, *size),
        small=torch.randn(n, c_small, 1, 1),
        weight=torch.randn(c_small, c_big, *size) * (c_big * size[0] * size[1]) ** -0.5,
        small_bias=torch.randn(c_small) if case["bias"] else None,
        big_bias=torch.randn(c_big) if case["bias"] else None,
    )
    return {k: None if v is None else v.to(device, case["dtype"]) for k, v in values.items()}


def expected(case, tensors, dtype):
    """The formulas in a dtype, with PyTorch."""
    t = {name: None if v is None else v.to(dtype) for name, v in tensors.items()}
    act = case["activation"], SLOPE
    weight = t["weight"].clone().requires_grad_()
    linear = F.conv2d(t["big"], weight)
    return {
        "fprop": reference.activate(F.conv2d(t["big"], t["weight"], t["small_bias"]), *act),
        "dgrad": reference.activate(
            F.conv_transpose2d(t["small"], t["weight"], t["big_bias"]), *act
        ),
        "gradient of the weight": torch.autograd.grad(linear, weight, t["small"])[0],
    }


def results(case, tensors):
    geometry, layout = geometry_of(case), LAYOUTS[case["layout"]]
    big, small, weight = (layout(tensors[name]) for name in ("big", "small", "weight"))
    epilogue = Epilogue(activation=case["activation"], negative_slope=SLOPE)
    assert logits.fits(geometry, case["c_small"], epilogue)
    found = {
        "fprop": logits.fprop(big, weight, geometry, replace(epilogue, bias=tensors["small_bias"])),
        "dgrad": logits.dgrad(small, weight, geometry, replace(epilogue, bias=tensors["big_bias"]))[
            0
        ],
        "gradient of the weight": logits.wgrad(big, small, geometry),
    }
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in found.values())
    return found


def hold_to_rule(case, device):
    tensors = tensors_of(case, device)
    narrow = torch.float32 if case["dtype"] == torch.float64 else case["dtype"]

    def sample(some):
        some = {k: None if v is None else v.to(narrow) for k, v in some.items()}
        return expected(case, some, narrow), expected(case, some, torch.float64)

    samples = [sample(tensors)] + [sample(tensors_of(case, device)) for _ in range(DRAWS - 1)]
    oracle = expected(case, tensors, torch.float64)
    assert_close(results(case, tensors), oracle, samples)


@pytest.mark.kernels
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_logits(case, device):
    hold_to_rule(case, device)


@pytest.mark.kernels
@pytest.mark.parametrize("c_small", [1, 3])
def test_split_weight_gradient(c_small, device, monkeypatch):
    """Rows that several programs share, the last of them with fewer."""
    monkeypatch.setattr(logits, "_splits", lambda steps, *_: min(steps, 2))
    hold_to_rule(
        dict(CASES[0], c_small=c_small, batch=2 * logits._ROWS + 5, dtype=torch.float32), device
    )


def test_rows_are_split_only_where_that_pays():
    splits = partial(logits._splits, programs=132)
    assert splits(steps=1, tiles_k=1) == 1
    assert splits(steps=4, tiles_k=16) == 1  # Adding partial sums takes longer.
    assert splits(steps=64, tiles_k=128) == 1  # The programs fill the GPU already.
    assert splits(steps=32, tiles_k=16) == 8


@pytest.mark.parametrize(
    ("geometry", "c_small", "epilogue", "reason"),
    [
        (ConvGeometry.conv((5, 4), (4, 4), (1, 1), (0, 0)), 1, Epilogue(), "whole map"),
        (ConvGeometry.conv((4, 4), (4, 4), (1, 1), (1, 1)), 1, Epilogue(), "whole map"),
        (ConvGeometry.conv((4, 4), (4, 4), (1, 1), (0, 0)), 5, Epilogue(), "1 to 4 channels"),
        (ConvGeometry.conv((4, 4), (4, 4), (1, 1), (0, 0)), 1, Epilogue(groups=2), "normalised"),
    ],
    ids=["beyond the kernel", "padding", "channels", "statistics"],
)
def test_what_is_declined(geometry, c_small, epilogue, reason):
    assert reason in logits.why_not(geometry, c_small, epilogue)
    assert not logits.fits(geometry, c_small, epilogue)
