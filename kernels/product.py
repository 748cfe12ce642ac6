"""What every product does: multiply, and finish its accumulator, acc[channels, pixels]."""

import triton
import triton.language as tl

from .activation import activate, activation_backward, activation_backward_at
from .norm import RSTD
from .normalizing import load_vectors
from .rounding import rounded

# Columns of a ragged tile whose masks are in registers at a time: with those of 128 columns at once
# a tile of 128 x 128 takes 173 registers on sm_90, with 32 it takes 124, and two programs share a
# multiprocessor.
MASKED_AT_ONCE = tl.constexpr(32)
# Columns whose gradient is computed at a time, of which a thread then has 4 elements: where those
# of all 128 columns may be computed at once, a tile of 128 x 128 takes 180 registers.
GRADIENT_AT_ONCE = tl.constexpr(8)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, in acc's dtype."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def finished(
    acc, below, exists, count, part, group, row, rows, channels, bias_ptr, vectors_ptr,
    count_ptr, mean_ptr, m2_ptr, sums_ptr, negative_slope,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_STATISTICS: tl.constexpr,
    HAS_BELOW: tl.constexpr, HAS_SUMS: tl.constexpr, HAS_ADDED: tl.constexpr,
    ACTIVATION: tl.constexpr, STORED_DTYPE: tl.constexpr,
):  # fmt: skip
    """What is stored of acc: by `gradient_epilogue` where there is a layer below, else `epilogue`.

    below: of that layer the tile's elements; with HAS_ADDED those of what is added; else anything.
    """
    if HAS_BELOW:
        if HAS_SUMS:
            acc = zero_beyond(acc, exists, count)
        acc = gradient_epilogue(
            acc, below, count, part, group, row, rows, channels, vectors_ptr, sums_ptr,
            negative_slope, HAS_NORM, HAS_SUMS, ACTIVATION, STORED_DTYPE,
        )  # fmt: skip
    else:
        acc = epilogue(
            acc, below, exists, count, part, row, rows, channels, bias_ptr, vectors_ptr, count_ptr,
            mean_ptr, m2_ptr, negative_slope, HAS_BIAS, HAS_NORM, HAS_STATISTICS, HAS_ADDED,
            ACTIVATION, STORED_DTYPE,
        )  # fmt: skip
    return acc


@triton.jit
def epilogue(
    acc, added, exists, count, tile, row, rows, channels, bias_ptr, vectors_ptr,
    count_ptr, mean_ptr, m2_ptr, negative_slope,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_STATISTICS: tl.constexpr,
    HAS_ADDED: tl.constexpr, ACTIVATION: tl.constexpr, STORED_DTYPE: tl.constexpr,
):  # fmt: skip
    """Bias, this tile's batch statistics, normalisation by known statistics, `added`, activation.

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
        mean, scale, shift = load_vectors(vectors_ptr, 0, channels, channel)
        acc = (acc - mean[:, None]) * scale[:, None] + shift[:, None]
    if HAS_ADDED:
        acc += added.to(acc.dtype)
    return activate(acc, negative_slope, ACTIVATION)


@triton.jit
def zero_beyond(acc, exists, count):
    """acc with zeros for pixels that do not exist: they then count in no sum of gradients."""
    if count < acc.shape[1]:
        acc = tl.where(exists[None, :], acc, 0.0)
    return acc


@triton.jit
def gradient_epilogue(
    acc, below, count, part, group, row, rows, channels, vectors_ptr, sums_ptr, negative_slope,
    HAS_NORM: tl.constexpr, HAS_SUMS: tl.constexpr, ACTIVATION: tl.constexpr,
    STORED_DTYPE: tl.constexpr,
):  # fmt: skip
    """acc, the gradient of the output of the layer below, times act'(u); this tile's sums of that.

    `below` is that output where it has the tile's elements: y or, with HAS_NORM, what its batch
    norm took, z, of which u is made again as kernels/norm.py makes it, by vectors[group]. The sums
    are of the values as they are stored, since those get read. Where a pixel does not exist, acc is
    0 (see `zero_beyond`) and `below` finite.

        HAS_NORM   sums[part * repeat + row / channels] = [2, channels]: of g and g * xhat
        otherwise  sums[part * repeat + row / channels] = [channels]: of g

    repeat = rows / channels is 1, unless the channels of several pixels are one pixel's here.
    """
    channel = row % channels
    mean = 0.0
    scale = 0.0
    shift = 0.0
    if HAS_NORM:
        mean, scale, shift = load_vectors(vectors_ptr, group, channels, channel)
        mean, scale, shift = mean[:, None], scale[:, None], shift[:, None]
    COLUMNS: tl.constexpr = min(acc.shape[1], GRADIENT_AT_ONCE)
    nothing = tl.zeros((acc.shape[0], COLUMNS), acc.dtype)
    g, sum_g, sum_g_centred = gradient_in_pieces(
        acc, below, nothing, nothing, mean, scale, shift, 0.0, 0.0, count, -1, negative_slope,
        HAS_NORM, HAS_SUMS, False, ACTIVATION, STORED_DTYPE,
    )  # fmt: skip
    if HAS_SUMS:
        sum_g = tl.sum(sum_g, axis=1)
        if HAS_NORM:
            # All xhat of a row have the factor.
            rstd = tl.load(vectors_ptr + group * 5 * channels + RSTD * channels + channel)
            sum_g_xhat = tl.sum(sum_g_centred, axis=1) * rstd
            offset = tl.cast(part, tl.int64) * 2 * rows + 2 * row - channel
            tl.store(sums_ptr + offset, sum_g, mask=row < rows)
            tl.store(sums_ptr + channels + offset, sum_g_xhat, mask=row < rows)
        else:
            tl.store(sums_ptr + tl.cast(part, tl.int64) * rows + row, sum_g, mask=row < rows)
    return g


@triton.jit
def gradient_at_input(
    acc, below, count, group, row, channels, values, vectors_ptr, sums_ptr, negative_slope,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """As `gradient_epilogue` with a batch norm, but the gradient of what that norm took.

    sums[group] is [2, channels]: dbeta and dgamma of the group, which has so many `values` of each
    channel. The formula is that of `norm.norm_backward`.
    """
    channel = row % channels
    mean, scale, shift = load_vectors(vectors_ptr, group, channels, channel)
    rstd = tl.load(vectors_ptr + group * 5 * channels + RSTD * channels + channel)
    offset = tl.cast(group, tl.int64) * 2 * channels + channel
    # dz = scale * g - scale * dbeta / values - (z - mean) * (scale * rstd * dgamma / values)
    level = scale * (tl.load(sums_ptr + offset) / values)
    tilt = scale * rstd * (tl.load(sums_ptr + channels + offset) / values)
    dz, _, _ = gradient_in_pieces(
        acc, below, 0.0, 0.0, mean[:, None], scale[:, None], shift[:, None], level[:, None],
        tilt[:, None], count, -1, negative_slope, True, False, True, ACTIVATION, acc.dtype,
    )  # fmt: skip
    return dz


@triton.jit
def gradient_in_pieces(
    acc, below, sum_g, sum_g_centred, mean, scale, shift, level, tilt, count, LAST: tl.constexpr,
    negative_slope, HAS_NORM: tl.constexpr, HAS_SUMS: tl.constexpr, AT_INPUT: tl.constexpr,
    ACTIVATION: tl.constexpr, STORED_DTYPE: tl.constexpr,
):  # fmt: skip
    """g = acc * act'(u); sum_g and sum_g_centred, the sums of g and of g * (z - mean) over columns
    that are GRADIENT_AT_ONCE apart. AT_INPUT: g * scale - level - (z - mean) * tilt in g's place.

    LAST: negative, and greater from piece to piece. A count is above it, which the compiler does
    not know: so each piece is computed under a condition of its own, where the compiler neither
    makes vectors of the operations of all pieces nor puts the sums off until all are there.
    """
    ROWS: tl.constexpr = acc.shape[0]
    COLUMNS: tl.constexpr = acc.shape[1]
    if COLUMNS > GRADIENT_AT_ONCE:
        left, right = acc.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
        below_left, below_right = below.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
        left, sum_g, sum_g_centred = gradient_in_pieces(
            left, below_left, sum_g, sum_g_centred, mean, scale, shift, level, tilt, count,
            LAST - COLUMNS, negative_slope, HAS_NORM, HAS_SUMS, AT_INPUT, ACTIVATION, STORED_DTYPE,
        )  # fmt: skip
        right, sum_g, sum_g_centred = gradient_in_pieces(
            right, below_right, sum_g, sum_g_centred, mean, scale, shift, level, tilt, count, LAST,
            negative_slope, HAS_NORM, HAS_SUMS, AT_INPUT, ACTIVATION, STORED_DTYPE,
        )  # fmt: skip
        g = tl.join(left, right).permute(0, 2, 1).reshape(ROWS, COLUMNS)
    else:
        g = acc
        if count > LAST:
            y = below.to(acc.dtype)
            if HAS_NORM:
                centred = y - mean
                u = centred * scale + shift
                g = activation_backward_at(acc, u, negative_slope, ACTIVATION)
            else:
                g = activation_backward(acc, y, negative_slope, ACTIVATION)
            if HAS_SUMS:
                g = rounded(g, STORED_DTYPE)
                sum_g += g
                if HAS_NORM:
                    sum_g_centred += g * centred
            if AT_INPUT:
                g = g * scale - level - centred * tilt
    return g, sum_g, sum_g_centred


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
