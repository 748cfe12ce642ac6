"""Triton's interpreter, made faster for the tests, leaves nothing behind and computes the same."""

import pytest
import torch

from genfast.backend import INTERPRETING, triton

if triton is None or not INTERPRETING:
    pytest.skip("no kernel is interpreted here", allow_module_level=True)

import triton.language as tl
from triton.runtime.errors import InterpreterError


@triton.jit
def twice(x):
    return added(x, x)


@triton.jit
def added(x, y):
    return tl.where(x > 0, x + y, tl.zeros_like(x))


@triton.jit
def doubled(x_ptr, out_ptr, N, BLOCK: tl.constexpr, FAILS: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = twice(tl.load(x_ptr + i, mask=i < N))
    if FAILS:
        x = x + tl.nothing(x)
    tl.store(out_ptr + i, x, mask=i < N)


def language():
    """Triton's own, by name."""
    places = (tl, tl.core, tl.math, tl.tensor)
    return [{n: v for n, v in vars(place).items() if n[0] != "_"} for place in places]


def test_a_kernel_with_functions_and_what_remains_of_it():
    before = language()
    x, out = torch.arange(-3.0, 4.0), torch.empty(7)
    for fails in (False, True, False):
        out.fill_(torch.nan)
        if fails:
            with pytest.raises(InterpreterError, match="nothing"):
                doubled[(2,)](x, out, 7, BLOCK=4, FAILS=True)
        else:
            doubled[(2,)](x, out, 7, BLOCK=4, FAILS=False)
            assert torch.equal(out, 2 * x.clamp(min=0))
        assert language() == before
