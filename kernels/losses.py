"""Binary cross entropy of logits, summed in a fixed order: no atomics.

loss = scale * sum over i of softplus(x[i]) - t[i] * x[i]. The targets t are a tensor (HAS_TARGETS)
or labels: 1 for the first `ones` values, 0 for the others. There are rows * row_length values; only
the length of a row, which the batch does not change, decides about vector loads.
"""

import triton
import triton.language as tl

from .loading import run_in_bounds
from .overlap import wait_for_previous


# One kernel for 0, 1 and other numbers of labels, and for batches of any size.
@triton.jit(do_not_specialize=["rows", "ones", "tiles_per_part"])
def logistic_loss(
    logits_ptr,
    targets_ptr,
    out_ptr,
    dlogits_ptr,
    rows,
    row_length,
    ones,
    scale,
    tiles_per_part,
    ACC_DTYPE: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[part] = scale * the sum over the part's tiles of BLOCK values. Grid: (parts,).

    With HAS_GRADIENT also what `logistic_loss_backward` makes of dloss = 1.
    """
    wait_for_previous()
    part = tl.program_id(0).to(tl.int64)
    loss = tl.zeros((BLOCK,), dtype=ACC_DTYPE)
    for step in range(0, tiles_per_part):
        i = (part * tiles_per_part + step) * BLOCK + tl.arange(0, BLOCK)
        exists = i < rows.to(tl.int64) * row_length
        i = run_in_bounds(i, exists)
        x = tl.load(logits_ptr + i, mask=exists, other=0.0).to(ACC_DTYPE)
        if HAS_TARGETS:
            t = tl.load(targets_ptr + i, mask=exists, other=0.0).to(ACC_DTYPE)
            # max(x, 0) - t * x, without the difference of two large numbers.
            rest = tl.where(x > 0, x * (1.0 - t), -t * x)
        else:
            wrong = tl.where(i < ones, -x, x)
            rest = tl.where(wrong > 0, wrong, 0.0)
        # softplus(x) - max(x, 0), which also lets NaN through.
        loss += tl.where(exists, rest + _log1p(tl.exp(-tl.abs(x))), 0.0)
        if HAS_GRADIENT:
            dx = _gradient(x, targets_ptr, i, exists, ones, HAS_TARGETS) * scale
            tl.store(dlogits_ptr + i, dx.to(dlogits_ptr.dtype.element_ty), mask=exists)
    tl.store(out_ptr + part, scale * tl.sum(loss))


@triton.jit(do_not_specialize=["rows", "ones"])
def logistic_loss_backward(
    dloss_ptr,
    logits_ptr,
    targets_ptr,
    dlogits_ptr,
    rows,
    row_length,
    ones,
    scale,
    ACC_DTYPE: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dlogits = (sigmoid(x) - t) * scale * dloss, with dloss one value. Grid: (tiles of BLOCK,)."""
    wait_for_previous()
    factor = scale * tl.load(dloss_ptr).to(ACC_DTYPE)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = i < rows.to(tl.int64) * row_length
    i = run_in_bounds(i, exists)
    x = tl.load(logits_ptr + i, mask=exists, other=0.0).to(ACC_DTYPE)
    dx = _gradient(x, targets_ptr, i, exists, ones, HAS_TARGETS) * factor
    tl.store(dlogits_ptr + i, dx.to(dlogits_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _gradient(x, targets_ptr, i, exists, ones, HAS_TARGETS: tl.constexpr):
    """sigmoid(x) - t."""
    if HAS_TARGETS:
        return _sigmoid(x) - tl.load(targets_ptr + i, mask=exists, other=0.0).to(x.dtype)
    # sigmoid(x) - 1 = -sigmoid(-x), whose digits stay where x is large.
    return tl.where(i < ones, -_sigmoid(-x), _sigmoid(x))


@triton.jit
def _sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _log1p(e):
    # For e in [0, 1]. 1 + e drops digits of e; they come back as the first term of Taylor's series
    # around the rounded sum u, and e - (u - 1) is exact.
    u = 1.0 + e
    return tl.log(u) + (e - (u - 1.0)) / u
