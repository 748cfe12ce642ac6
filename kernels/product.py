"""What every product does: multiply, and finish its accumulator, acc[channels, pixels]."""

import triton
import triton.language as tl

from .activation import activate
from .norm import MEAN, SCALE, SHIFT
from .rounding import rounded

# Columns of a ragged tile whose masks are in registers at a time: with those of 128 columns at once
# a tile of 128 x 128 takes 173 registers on sm_90, with 32 it takes 124, and two programs share a
# multiprocessor.
MASKED_AT_ONCE = tl.constexpr(32)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, in acc's dtype."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def epilogue(
    acc, exists, count, tile, row, rows, channels, bias_ptr, vectors_ptr,
    count_ptr, mean_ptr, m2_ptr, negative_slope,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_STATISTICS: tl.constexpr,
    ACTIVATION: tl.constexpr, STORED_DTYPE: tl.constexpr,
):  # fmt: skip
    """Bias, this tile's batch statistics, normalisation by known statistics, activation.

    Rows of acc are channels, columns pixels: a thread holds many pixels of few channels, so what a
    channel needs are a few registers, and its sums are additions within the thread. The statistics,
    count[tile], mean[tile, row] and m2[tile, row] (the sum of squared deviations from that mean),
    are of the values as they are stored, since those get normalised.
    """
    channel = row % channels
    if HAS_BIAS:
        acc += tl.load(bias_ptr + channel).to(acc.dtype)[:, None]
    if HAS_STATISTICS:
        acc = rounded(acc, STORED_DTYPE)
        if count == acc.shape[1]:
            mean = tl.sum(acc, axis=1) / acc.shape[1]
            deviation = acc - mean[:, None]
            m2 = tl.sum(deviation * deviation, axis=1)
        else:
            mean = _sum_existing(acc, exists) / tl.maximum(count, 1).to(acc.dtype)
            m2 = _sum_squared_deviations(acc, exists, mean)
        offset = tl.cast(tile, tl.int64) * rows + row
        tl.store(mean_ptr + offset, mean, mask=row < rows)
        tl.store(m2_ptr + offset, m2, mask=row < rows)
        # Every channel's program stores the same count, so no one needs to be chosen.
        tl.store(count_ptr + tile, count.to(acc.dtype))
    if HAS_NORM:
        mean = tl.load(vectors_ptr + MEAN * channels + channel)
        scale = tl.load(vectors_ptr + SCALE * channels + channel)
        shift = tl.load(vectors_ptr + SHIFT * channels + channel)
        acc = (acc - mean[:, None]) * scale[:, None] + shift[:, None]
    return activate(acc, negative_slope, ACTIVATION)


@triton.jit
def _sum_existing(acc, exists):
    """The sum of each row's pixels that exist."""
    if acc.shape[1] > MASKED_AT_ONCE:
        left, right, left_exists, right_exists = _halves(acc, exists)
        total = _sum_existing(left, left_exists) + _sum_existing(right, right_exists)
    else:
        total = tl.sum(tl.where(exists[None, :], acc, 0.0), axis=1)
    return total


@triton.jit
def _sum_squared_deviations(acc, exists, mean):
    """The sum of the squared deviations from `mean` of each row's pixels that exist."""
    if acc.shape[1] > MASKED_AT_ONCE:
        left, right, left_exists, right_exists = _halves(acc, exists)
        total = _sum_squared_deviations(left, left_exists, mean)
        total += _sum_squared_deviations(right, right_exists, mean)
    else:
        deviation = tl.where(exists[None, :], acc - mean[:, None], 0.0)
        total = tl.sum(deviation * deviation, axis=1)
    return total


@triton.jit
def _halves(acc, exists):
    ROWS: tl.constexpr = acc.shape[0]
    HALF: tl.constexpr = acc.shape[1] // 2
    left, right = acc.reshape(ROWS, 2, HALF).permute(0, 2, 1).split()
    # Booleans cannot be split.
    left_exists, right_exists = exists.to(tl.int32).reshape(2, HALF).permute(1, 0).split()
    return left, right, left_exists != 0, right_exists != 0
