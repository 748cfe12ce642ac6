"""Losses of logits, summed in a fixed order: no atomics.

loss = scale * sum over i of f(x[i], t[i]). The targets t are a tensor (HAS_TARGETS; then LOSS is
"logistic") or labels: 1, real, for the first `ones` terms and 0, generated, for the others. There
are rows * row_length terms; only the length of a row, which the batch does not change, decides
about vector loads. A term is a logit, or (PAIRED) a logit of the first half minus that of the
second.

LOSS            f for the label 1    for the label 0
logistic        softplus(-x)         softplus(x)         cross entropy; x - t x + ... for targets
least-squares   (x - 1)^2 / 2        x^2 / 2             Mao et al. (2017), a = 0, b = c = 1
hinge           max(0, 1 - x)        max(0, 1 + x)       Lim and Ye (2017)
linear          -x                   x                   Arjovsky et al. (2017)
"""

import triton
import triton.language as tl

from .activation import log1p, sigmoid
from .loading import run_in_bounds
from .overlap import wait_for_previous


# One kernel for 0, 1 and other numbers of labels, and for batches of any size.
@triton.jit(do_not_specialize=["rows", "ones", "tiles_per_part"])
def logit_loss(
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
    LOSS: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[part] = scale * the sum over the part's tiles of BLOCK terms. Grid: (parts,).

    With HAS_GRADIENT also what `logit_loss_backward` makes of dloss = 1.
    """
    wait_for_previous()
    part = tl.program_id(0).to(tl.int64)
    terms = rows.to(tl.int64) * row_length
    loss = tl.zeros((BLOCK,), dtype=ACC_DTYPE)
    for step in range(0, tiles_per_part):
        i = (part * tiles_per_part + step) * BLOCK + tl.arange(0, BLOCK)
        exists = i < terms
        i = run_in_bounds(i, exists)
        x = _terms(logits_ptr, i, exists, terms, ACC_DTYPE, PAIRED)
        if HAS_TARGETS:
            t = tl.load(targets_ptr + i, mask=exists, other=0.0).to(ACC_DTYPE)
            # max(x, 0) - t * x, without the difference of two large numbers.
            value = tl.where(x > 0, x * (1.0 - t), -t * x) + log1p(tl.exp(-tl.abs(x)))
            slope = sigmoid(x) - t
        else:
            value, slope = _of_label(x, i < ones, LOSS)
        loss += tl.where(exists, value, 0.0)
        if HAS_GRADIENT:
            _store_gradient(dlogits_ptr, i, slope * scale, exists, terms, PAIRED)
    tl.store(out_ptr + part, scale * tl.sum(loss))


@triton.jit(do_not_specialize=["rows", "ones"])
def logit_loss_backward(
    dloss_ptr,
    logits_ptr,
    targets_ptr,
    dlogits_ptr,
    rows,
    row_length,
    ones,
    scale,
    ACC_DTYPE: tl.constexpr,
    LOSS: tl.constexpr,
    HAS_TARGETS: tl.constexpr,
    PAIRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dlogits = f'(x) * scale * dloss, with dloss one value. Grid: (tiles of BLOCK terms,)."""
    wait_for_previous()
    factor = scale * tl.load(dloss_ptr).to(ACC_DTYPE)
    terms = rows.to(tl.int64) * row_length
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = i < terms
    i = run_in_bounds(i, exists)
    x = _terms(logits_ptr, i, exists, terms, ACC_DTYPE, PAIRED)
    if HAS_TARGETS:
        slope = sigmoid(x) - tl.load(targets_ptr + i, mask=exists, other=0.0).to(ACC_DTYPE)
    else:
        _, slope = _of_label(x, i < ones, LOSS)
    _store_gradient(dlogits_ptr, i, slope * factor, exists, terms, PAIRED)


@triton.jit
def _terms(logits_ptr, i, exists, terms, ACC_DTYPE: tl.constexpr, PAIRED: tl.constexpr):
    x = tl.load(logits_ptr + i, mask=exists, other=0.0).to(ACC_DTYPE)
    if PAIRED:
        x -= tl.load(logits_ptr + terms + i, mask=exists, other=0.0).to(ACC_DTYPE)
    return x


@triton.jit
def _store_gradient(dlogits_ptr, i, dx, exists, terms, PAIRED: tl.constexpr):
    dx = dx.to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + i, dx, mask=exists)
    if PAIRED:
        tl.store(dlogits_ptr + terms + i, -dx, mask=exists)


@triton.jit
def _of_label(x, is_real, LOSS: tl.constexpr):
    """f and f' of x, by the label; NaN comes through."""
    tl.static_assert(
        LOSS == "logistic" or LOSS == "least-squares" or LOSS == "hinge" or LOSS == "linear"
    )
    if LOSS == "least-squares":
        slope = tl.where(is_real, x - 1.0, x)
        value = 0.5 * slope * slope
    elif LOSS == "hinge":
        margin = tl.where(is_real, 1.0 - x, 1.0 + x)
        value = tl.where(margin < 0, 0.0, margin)
        slope = tl.where(margin <= 0, 0.0, tl.where(is_real, -1.0, 1.0))
    elif LOSS == "linear":
        value = tl.where(is_real, -x, x)
        slope = tl.where(is_real, -1.0, 1.0)
    else:
        wrong = tl.where(is_real, -x, x)
        # softplus(x) - max(x, 0) also lets NaN through.
        value = tl.where(wrong > 0, wrong, 0.0) + log1p(tl.exp(-tl.abs(x)))
        # sigmoid(x) - 1 = -sigmoid(-x), whose digits stay where x is large.
        slope = tl.where(is_real, -sigmoid(-x), sigmoid(x))
    return value, slope.to(x.dtype)
