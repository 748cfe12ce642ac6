"""What `norm.normalize_activate` would have written, made of z by whoever reads it.

y = act((z - mean) * scale + shift), each group of the batch by its own vectors, in the dtype of the
accumulator and then rounded as if it had been stored: a product of z then has the bits of one of y.
"""

import triton
import triton.language as tl

from .activation import activate
from .norm import MEAN, SCALE, SHIFT
from .rounding import widened


@triton.jit
def load_vectors(vectors_ptr, group, channels, c):
    """Mean, scale and shift of a group's channels c, all of which exist."""
    vectors_ptr += tl.cast(group, tl.int64) * 5 * channels
    mean = tl.load(vectors_ptr + MEAN * channels + c)
    scale = tl.load(vectors_ptr + SCALE * channels + c)
    shift = tl.load(vectors_ptr + SHIFT * channels + c)
    return mean, scale, shift


@triton.jit
def normalized(z, mean, scale, shift, negative_slope, ACTIVATION: tl.constexpr):
    """y, not rounded yet, in the dtype of the vectors, which broadcast to z."""
    return activate((widened(z, mean.dtype) - mean) * scale + shift, negative_slope, ACTIVATION)


@triton.jit
def normalized_rows(
    z, row, first, last, group_rows, group, mean, scale, shift, vectors_ptr, channels, c,
    negative_slope, GROUPED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """As `normalized`, z[row, c] being rows of the batch, from `first` to `last`.

    Groups have `group_rows` rows; without GROUPED there is one. A program has in registers what its
    first row is normalised by, mean, scale and shift of `group`: few programs, or few of their
    steps, meet another group, whose vectors are loaded then.
    """
    y = normalized(z, mean[None, :], scale[None, :], shift[None, :], negative_slope, ACTIVATION)
    if GROUPED:
        last_group = last // group_rows
        if last_group > group:
            for other in range(tl.maximum(group + 1, first // group_rows), last_group + 1):
                mean, scale, shift = load_vectors(vectors_ptr, other, channels, c)
                others = normalized(
                    z, mean[None, :], scale[None, :], shift[None, :], negative_slope, ACTIVATION
                )
                y = tl.where((row >= other * group_rows)[:, None], others, y)
    return y
