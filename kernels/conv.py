"""fprop, dgrad and wgrad: a convolution and its gradients as implicit matrix products.

small[n, y, x] meets big[n, y * STRIDE_H - PAD_H + ky, x * STRIDE_W - PAD_W + kx] at tap (ky, kx):

    fprop   big, weight -> small    conv2d; the input gradient of conv_transpose2d
    dgrad   small, weight -> big    conv_transpose2d; the input gradient of conv2d
    wgrad   big, small -> weight    the weight gradient of both

`big`, `small`, `weight` and `out` are pointers to dense memory or, with DESCRIPTORS, tensor
descriptors of it. Descriptors move boxes of BOX_N x BOX_H x BOX_W pixels and fill what lies outside
with zeros, which is the padding. They see `small` as [N, H, W, C] and `weight` as
[C_small, taps, C_big]; `big` they see as [N, H / STRIDE_H, STRIDE_H, W / STRIDE_W, STRIDE_W * C],
where the pixels that one tap (fprop) or one phase (dgrad) touches are a box too. Pointers take any
geometry, with masks.

The batch is one or more groups of N images, each with batch statistics of its own: a discriminator
judges real and generated images in one pass. N counts the images of one group.

Addresses are 64-bit: an activation may hold more than 2^31 elements.
"""

import triton
import triton.language as tl

from .activation import activate
from .norm import MEAN, SCALE, SHIFT
from .rounding import rounded

# Of a tile's statistics. On sm_90 a tile of 128 x 128 takes 213 registers with all columns at once,
# 127 so: then two programs share a multiprocessor.
COLUMNS_AT_ONCE = tl.constexpr(32)


@triton.jit
def fprop(
    big,
    weight,
    out,
    bias_ptr,
    vectors_ptr,
    count_ptr,
    mean_ptr,
    m2_ptr,
    N,
    H_big,
    W_big,
    C_big,
    H_small,
    W_small,
    C_small,
    channels,
    tiles_per_group,
    negative_slope,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORED_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[n, y, x, cs] = act(sum over taps and cb of big * weight).

    M = pixels of small, N = C_small, K = taps * C_big. PACKED makes (tap, cb) one reduction axis,
    which wastes nothing when C_big is less than BLOCK_K: an image has 3 channels. Grid: (groups *
    tiles_per_group * tiles of C_small).
    """
    OUT_DTYPE: tl.constexpr = out.dtype if DESCRIPTORS else out.dtype.element_ty
    TAPS: tl.constexpr = KH * KW
    tiles_n = tl.cdiv(C_small, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    cs0 = tl.program_id(0) % tiles_n * BLOCK_N
    cs = cs0 + tl.arange(0, BLOCK_N)
    n, y, x, exists, n0, y0, x0 = _pixels(
        tile % tiles_per_group, tile // tiles_per_group * N, N, H_small, W_small,
        BLOCK_M, BOX_N, BOX_H, BOX_W, DESCRIPTORS,
    )  # fmt: skip

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    if PACKED:
        for k0 in range(0, TAPS * C_big, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            a = _load_big_packed(
                big, n, y, x, exists, k, H_big, W_big, C_big,
                KW, STRIDE_H, STRIDE_W, PAD_H, PAD_W, TAPS,
            )  # fmt: skip
            inside = (k < TAPS * C_big)[:, None] & (cs < C_small)[None, :]
            b = tl.load(
                weight + cs[None, :].to(tl.int64) * (TAPS * C_big) + k[:, None],
                mask=inside,
                other=0.0,
            )
            acc = _dot(a, b, acc, PRECISION)
    else:
        # Taps are the inner part of the loop: their pixels overlap, so they meet in the cache.
        for step in range(0, tl.cdiv(C_big, BLOCK_K) * TAPS):
            tap = step % TAPS
            cb0 = step // TAPS * BLOCK_K
            a = _load_big(
                big, n, y, x, exists, n0, y0, x0, tap // KW, tap % KW, cb0, H_big, W_big, C_big,
                STRIDE_H, STRIDE_W, PAD_H, PAD_W, DESCRIPTORS, BLOCK_M, BLOCK_K,
            )  # fmt: skip
            b = _load_weight(
                weight, cs0, tap, cb0, C_small, C_big, True, TAPS, DESCRIPTORS, BLOCK_N, BLOCK_K
            )
            acc = _dot(a, b.T, acc, PRECISION)

    acc = _epilogue(
        acc, exists, tile, cs, C_small, channels, bias_ptr, vectors_ptr,
        count_ptr, mean_ptr, m2_ptr, negative_slope, HAS_BIAS, HAS_NORM, HAS_STATISTICS, ACTIVATION,
        STORED_DTYPE,
    )  # fmt: skip
    if DESCRIPTORS:
        box = acc.to(OUT_DTYPE).reshape(BOX_N, BOX_H, BOX_W, BLOCK_N)
        out.store([n0, y0, x0, cs0], box)
    else:
        pixel = (n * H_small + y) * W_small + x
        tl.store(
            out + pixel[:, None] * C_small + cs[None, :],
            acc.to(OUT_DTYPE),
            mask=exists[:, None] & (cs < C_small)[None, :],
        )


@triton.jit
def dgrad(
    small,
    weight,
    out,
    bias_ptr,
    vectors_ptr,
    count_ptr,
    mean_ptr,
    m2_ptr,
    N,
    H_big,
    W_big,
    C_big,
    H_small,
    W_small,
    C_small,
    channels,
    tiles_per_group,
    negative_slope,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORED_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[n, Y, X, cb] = act(sum over taps and cs of small * weight).

    The output splits into STRIDE_H * STRIDE_W phases, (Y, X) = (y * STRIDE_H + py, ...): within one
    phase the taps that meet a pixel are the same, every STRIDE-th of the kernel, so each phase is a
    dense stride-1 convolution and nothing is multiplied by an inserted zero. M = pixels of a phase,
    N = C_big. Grid: (groups * tiles_per_group * tiles of C_big, phases).
    """
    OUT_DTYPE: tl.constexpr = out.dtype if DESCRIPTORS else out.dtype.element_ty
    TAPS: tl.constexpr = KH * KW
    # The taps of a phase; the last may lie beyond a kernel that the stride does not divide.
    PHASE_KH: tl.constexpr = (KH + STRIDE_H - 1) // STRIDE_H
    PHASE_KW: tl.constexpr = (KW + STRIDE_W - 1) // STRIDE_W
    PHASE_TAPS: tl.constexpr = PHASE_KH * PHASE_KW

    phase = tl.program_id(1)
    py = phase // STRIDE_W
    px = phase % STRIDE_W
    tiles_n = tl.cdiv(C_big, BLOCK_N)
    tile = tl.program_id(0) // tiles_n
    cb0 = tl.program_id(0) % tiles_n * BLOCK_N
    cb = cb0 + tl.arange(0, BLOCK_N)
    group = tile // tiles_per_group
    tile = tile % tiles_per_group
    n, y, x, exists, n0, y0, x0 = _pixels(
        tile,
        group * N,
        N,
        (H_big - py + STRIDE_H - 1) // STRIDE_H,
        (W_big - px + STRIDE_W - 1) // STRIDE_W,
        BLOCK_M,
        BOX_N,
        BOX_H,
        BOX_W,
        DESCRIPTORS,
    )

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    for step in range(0, tl.cdiv(C_small, BLOCK_K) * PHASE_TAPS):
        phase_tap = step % PHASE_TAPS
        cs0 = step // PHASE_TAPS * BLOCK_K
        ky = (py + PAD_H) % STRIDE_H + phase_tap // PHASE_KW * STRIDE_H
        kx = (px + PAD_W) % STRIDE_W + phase_tap % PHASE_KW * STRIDE_W
        in_kernel = (ky < KH) & (kx < KW)
        # Both divisions are exact: the tap was chosen so.
        dy = (py + PAD_H - ky) // STRIDE_H
        dx = (px + PAD_W - kx) // STRIDE_W
        a = _load_small(
            small, n, y, x, exists & in_kernel, n0, y0, x0, dy, dx, cs0,
            H_small, W_small, C_small, DESCRIPTORS, BLOCK_M, BLOCK_K,
        )  # fmt: skip
        b = _load_weight(
            weight, cs0, ky * KW + kx, cb0, C_small, C_big, in_kernel,
            TAPS, DESCRIPTORS, BLOCK_K, BLOCK_N,
        )  # fmt: skip
        acc = _dot(a, b, acc, PRECISION)

    # A group's statistics lie together: its phases, and their tiles.
    part = (group * tl.num_programs(1) + phase) * tiles_per_group + tile
    acc = _epilogue(
        acc, exists, part, cb, C_big, channels, bias_ptr, vectors_ptr,
        count_ptr, mean_ptr, m2_ptr, negative_slope, HAS_BIAS, HAS_NORM, HAS_STATISTICS, ACTIVATION,
        STORED_DTYPE,
    )  # fmt: skip
    if DESCRIPTORS:
        box = acc.to(OUT_DTYPE).reshape(BOX_N, BOX_H, 1, BOX_W, BLOCK_N)
        out.store([n0, y0, py, x0, px * C_big + cb0], box)
    else:
        pixel = (n * H_big + y * STRIDE_H + py) * W_big + x * STRIDE_W + px
        tl.store(
            out + pixel[:, None] * C_big + cb[None, :],
            acc.to(OUT_DTYPE),
            mask=exists[:, None] & (cb < C_big)[None, :],
        )


@triton.jit
def wgrad(
    big,
    small,
    out_ptr,
    N,
    H_big,
    W_big,
    C_big,
    H_small,
    W_small,
    C_small,
    tiles_per_split,
    KW: tl.constexpr,
    TAPS: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[split, cs, tap, cb] = sum over the split's pixels of small * big: M = C_small, N = C_big.

    The reduction, over every pixel of small, is long and the tiles are few, so it is split;
    `sum_partials` adds the splits in a fixed order. Grid: (tiles of C_small * tiles of C_big, taps,
    splits). PACKED makes (tap, cb) the columns, as in fprop, and the grid's second axis 1.
    """
    columns = TAPS * C_big if PACKED else C_big
    tiles_n = tl.cdiv(columns, BLOCK_N)
    cs0 = tl.program_id(0) // tiles_n * BLOCK_M
    cb0 = tl.program_id(0) % tiles_n * BLOCK_N
    tap = tl.program_id(1)
    split = tl.program_id(2)
    cs = cs0 + tl.arange(0, BLOCK_M)
    cb = cb0 + tl.arange(0, BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    for step in range(0, tiles_per_split):
        n, y, x, exists, n0, y0, x0 = _pixels(
            split * tiles_per_split + step,
            0, N, H_small, W_small, BLOCK_K, BOX_N, BOX_H, BOX_W, DESCRIPTORS,
        )  # fmt: skip
        a = _load_small(
            small, n, y, x, exists, n0, y0, x0, 0, 0, cs0,
            H_small, W_small, C_small, DESCRIPTORS, BLOCK_K, BLOCK_M,
        )  # fmt: skip
        if PACKED:
            b = _load_big_packed(
                big, n, y, x, exists, cb, H_big, W_big, C_big,
                KW, STRIDE_H, STRIDE_W, PAD_H, PAD_W, TAPS,
            )  # fmt: skip
        else:
            b = _load_big(
                big, n, y, x, exists, n0, y0, x0, tap // KW, tap % KW, cb0, H_big, W_big, C_big,
                STRIDE_H, STRIDE_W, PAD_H, PAD_W, DESCRIPTORS, BLOCK_K, BLOCK_N,
            )  # fmt: skip
        acc = _dot(a.T, b, acc, PRECISION)

    column = cb if PACKED else tap * C_big + cb
    row = split.to(tl.int64) * C_small + cs
    tl.store(
        out_ptr + row[:, None] * (TAPS * C_big) + column[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(cs < C_small)[:, None] & (cb < columns)[None, :],
    )


@triton.jit
def _pixels(
    tile,
    first,
    N,
    H,
    W,
    BLOCK: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BOXED: tl.constexpr,
):
    """The BLOCK pixels of a tile: n, y, x, whether they exist, and the corner n0, y0, x0 of a box.

    Tiles cover the N images from `first` on, a group. A box is what a descriptor moves. Without
    one, pixels are taken in memory's order, which leaves no ragged edge inside an image.
    """
    row = tl.arange(0, BLOCK)
    if BOXED:
        tiles_w = tl.cdiv(W, BOX_W)
        tiles_h = tl.cdiv(H, BOX_H)
        n0 = first + tile // (tiles_h * tiles_w) * BOX_N
        y0 = tile // tiles_w % tiles_h * BOX_H
        x0 = tile % tiles_w * BOX_W
        n = (n0 + row // (BOX_H * BOX_W)).to(tl.int64)
        y = y0 + row // BOX_W % BOX_H
        x = x0 + row % BOX_W
    else:
        n0 = 0
        y0 = 0
        x0 = 0
        pixel = tl.cast(tile, tl.int64) * BLOCK + row
        # A phase of a map of 1 pixel may have none: then none exists, whatever its division gives.
        rows = tl.maximum(H, 1)
        columns = tl.maximum(W, 1)
        n = first + pixel // (rows * columns)
        y = (pixel // columns % rows).to(tl.int32)
        x = (pixel % columns).to(tl.int32)
    return n, y, x, (n < first + N) & (y < H) & (x < W), n0, y0, x0


@triton.jit
def _load_big(
    big, n, y, x, exists, n0, y0, x0, ky, kx, c0, H, W, C,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    DESCRIPTORS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] of big: the pixels that meet small's (n, y, x) at a tap, channels c0 on."""
    if DESCRIPTORS:
        # Device division rounds towards zero; adding PAD strides first makes it a floor.
        shift_y = (ky - PAD_H + PAD_H * STRIDE_H) // STRIDE_H - PAD_H
        shift_x = (kx - PAD_W + PAD_W * STRIDE_W) // STRIDE_W - PAD_W
        parity_y = ky - PAD_H - shift_y * STRIDE_H
        parity_x = kx - PAD_W - shift_x * STRIDE_W
        box = big.load([n0, y0 + shift_y, parity_y, x0 + shift_x, parity_x * C + c0])
        values = box.reshape(ROWS, COLUMNS)
    else:
        c = c0 + tl.arange(0, COLUMNS)
        Y = y * STRIDE_H - PAD_H + ky
        X = x * STRIDE_W - PAD_W + kx
        inside = exists & (Y >= 0) & (Y < H) & (X >= 0) & (X < W)
        pixel = (n * H + Y) * W + X
        values = tl.load(
            big + pixel[:, None] * C + c[None, :],
            mask=inside[:, None] & (c < C)[None, :],
            other=0.0,
        )
    return values


@triton.jit
def _load_big_packed(
    big, n, y, x, exists, k, H, W, C,
    KW: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """As `_load_big`, each column k being a tap and a channel: k = (ky * KW + kx) * C + c."""
    tap = k // C
    ky = tap // KW
    kx = tap % KW
    Y0 = y * STRIDE_H - PAD_H
    X0 = x * STRIDE_W - PAD_W
    Y = Y0[:, None] + ky[None, :]
    X = X0[:, None] + kx[None, :]
    inside = exists[:, None] & (tap < TAPS)[None, :] & (Y >= 0) & (Y < H) & (X >= 0) & (X < W)
    # A row's part and a column's part: one 64-bit addition an element, which saves registers.
    row_offset = ((n * H + Y0) * W + X0) * C
    column_offset = (ky * W + kx) * C + k % C
    return tl.load(big + row_offset[:, None] + column_offset[None, :], mask=inside, other=0.0)


@triton.jit
def _load_small(
    small, n, y, x, exists, n0, y0, x0, dy, dx, c0, H, W, C,
    DESCRIPTORS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] of small: the pixels (n, y + dy, x + dx), channels c0 and on."""
    if DESCRIPTORS:
        values = small.load([n0, y0 + dy, x0 + dx, c0]).reshape(ROWS, COLUMNS)
    else:
        c = c0 + tl.arange(0, COLUMNS)
        Y = y + dy
        X = x + dx
        inside = exists & (Y >= 0) & (Y < H) & (X >= 0) & (X < W)
        pixel = (n * H + Y) * W + X
        values = tl.load(
            small + pixel[:, None] * C + c[None, :],
            mask=inside[:, None] & (c < C)[None, :],
            other=0.0,
        )
    return values


@triton.jit
def _load_weight(
    weight, cs0, tap, cb0, C_small, C_big, in_kernel, TAPS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """[ROWS of C_small, COLUMNS of C_big] of one tap; zeros where the tap is not in the kernel."""
    if DESCRIPTORS:
        values = weight.load([cs0, tap, cb0]).reshape(ROWS, COLUMNS)
    else:
        cs = cs0 + tl.arange(0, ROWS)
        cb = cb0 + tl.arange(0, COLUMNS)
        values = tl.load(
            weight + (cs[:, None].to(tl.int64) * TAPS + tap) * C_big + cb[None, :],
            mask=(cs < C_small)[:, None] & (cb < C_big)[None, :] & in_kernel,
            other=0.0,
        )
    return values


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def _epilogue(
    acc, exists, tile, column, columns, channels, bias_ptr, vectors_ptr,
    count_ptr, mean_ptr, m2_ptr, negative_slope,
    HAS_BIAS: tl.constexpr, HAS_NORM: tl.constexpr, HAS_STATISTICS: tl.constexpr,
    ACTIVATION: tl.constexpr, STORED_DTYPE: tl.constexpr,
):  # fmt: skip
    """Bias, this tile's batch statistics, normalisation by known statistics, activation.

    The statistics, count[tile], mean[tile, column] and m2[tile, column] (the sum of squared
    deviations from that mean), are of the values as they are stored, since those get normalised.
    """
    channel = column % channels
    if HAS_BIAS:
        acc += tl.load(bias_ptr + channel).to(acc.dtype)[None, :]
    if HAS_STATISTICS:
        # In place of the accumulator: both together would not fit into the registers.
        acc = rounded(acc, STORED_DTYPE)
        count = tl.sum(exists.to(acc.dtype), axis=0)
        _store_statistics(acc, exists, count, tile, column, columns, mean_ptr, m2_ptr)
        # Every column's program stores the same count, so no one needs to be chosen.
        tl.store(count_ptr + tile, count)
    if HAS_NORM:
        mean = tl.load(vectors_ptr + MEAN * channels + channel)
        scale = tl.load(vectors_ptr + SCALE * channels + channel)
        shift = tl.load(vectors_ptr + SHIFT * channels + channel)
        acc = (acc - mean[None, :]) * scale[None, :] + shift[None, :]
    return activate(acc, negative_slope, ACTIVATION)


@triton.jit
def _store_statistics(acc, exists, count, tile, column, columns, mean_ptr, m2_ptr):
    """mean[tile, column] and m2[tile, column] of the rows that exist.

    A few columns at a time: each thread of a matrix product holds values of many columns, and their
    means, sums and addresses together would take as many registers as the accumulator.
    """
    ROWS: tl.constexpr = acc.shape[0]
    COLUMNS: tl.constexpr = acc.shape[1]
    if COLUMNS > COLUMNS_AT_ONCE:
        left, right = acc.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
        left_column, right_column = column.reshape(2, COLUMNS // 2).permute(1, 0).split()
        _store_statistics(left, exists, count, tile, left_column, columns, mean_ptr, m2_ptr)
        _store_statistics(right, exists, count, tile, right_column, columns, mean_ptr, m2_ptr)
    else:
        mean = tl.sum(tl.where(exists[:, None], acc, 0.0), axis=0) / tl.maximum(count, 1.0)
        deviation = tl.where(exists[:, None], acc - mean[None, :], 0.0)
        offset = tile.to(tl.int64) * columns + column
        tl.store(mean_ptr + offset, mean, mask=column < columns)
        tl.store(m2_ptr + offset, tl.sum(deviation * deviation, axis=0), mask=column < columns)
