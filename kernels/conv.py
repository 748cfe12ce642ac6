"""fprop, dgrad and wgrad: a convolution and its gradients as implicit matrix products.

small[n, y, x] meets big[n, y * STRIDE_H - PAD_H + ky, x * STRIDE_W - PAD_W + kx] at tap (ky, kx):

    fprop   big, weight -> small    conv2d; the input gradient of conv_transpose2d
    dgrad   small, weight -> big    conv_transpose2d; the input gradient of conv2d
    wgrad   big, small -> weight    the weight gradient of both

`big`, `small`, `weight` and `out` are pointers to dense memory or, with DESCRIPTORS, tensor
descriptors of it. Descriptors move boxes of BOX_N x BOX_H x BOX_W pixels and fill what lies outside
with zeros, which is the padding. They see `small` as [N, H, W, C], and `weight` as a matrix
[C_small, taps * C_big]; `big` they see as [N, H / STRIDE_H, STRIDE_H, W / STRIDE_W, STRIDE_W * C],
where the pixels that one tap (fprop) or one phase (dgrad) touches are a box too. Pointers take any
geometry, with masks.

Channels are the rows of a product and pixels its columns: acc[channels, pixels]. Triton multiplies
from shared memory what it loaded as a matrix, which a weight is, as either operand; a box of pixels
that is reshaped to a matrix only as the second one. The first would pass through registers, and
each multiplication would wait for the one before.

The batch is one or more groups of N images, each with batch statistics of its own: a discriminator
judges real and generated images in one pass. N counts the images of one group. A box at a group's
end may hold images of the next one: they count in no statistics here, and are stored as the next
group's own boxes store them, the same bits once more.

With HAS_BELOW what is computed is the gradient of a layer's output, and `below` that output, of the
result's shape: see `gradient_epilogue`. There groups differ in what they multiply by, so that boxes
of several images are GROUPED: a descriptor's first axis is the group, and images beyond a group's
end are beyond the end of the second one. `big` then is [groups, N, H / STRIDE_H, STRIDE_H * W /
STRIDE_W, STRIDE_W * C], of which a box is one of a phase's pixels where it is as wide as they are.
With HAS_ADDED `below`, of the result's shape too, is added to it before the activation.

Addresses are 64-bit: an activation may hold more than 2^31 elements. Pixels are fewer than 2^30, so
they are numbered in 32 bits: a 64-bit division is a function of 80 instructions. A pixel that is
masked may have any number, the sum of one that wrapped around too.

By pointers every load needs an address and a mask, and what computes them must not take longer than
the products: loops only add and compare.
"""

import triton
import triton.language as tl

from .loading import aligned, in_bounds, in_range, run_in_bounds, wide_product
from .overlap import wait_for_previous
from .product import dot, finished

# A row or column that is in no image, whatever tap is added.
OUTSIDE = tl.constexpr(-(2**30))
# Arguments that only count: another value of them is no other kernel.
_COUNTS = ["N", "H_big", "W_big", "H_small", "W_small", "tiles_per_group"]


@triton.jit(do_not_specialize=_COUNTS)
def fprop(
    big,
    weight,
    out,
    bias_ptr,
    vectors_ptr,
    count_ptr,
    mean_ptr,
    m2_ptr,
    below,
    sums_ptr,
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
    HAS_BELOW: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORED_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BIG_ALIGNMENT: tl.constexpr,
    SMALL_ALIGNMENT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    STORE_DESCRIPTOR: tl.constexpr,
    GROUPED: tl.constexpr,
    PACKED: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[n, y, x, cs] = act(sum over taps and cb of weight * big).

    M = C_small, N = pixels of small, K = taps * C_big. PACKED makes (tap, cb) one reduction axis,
    which wastes nothing when C_big is less than BLOCK_K: an image has 3 channels. Grid: (tiles of
    C_small * groups * tiles_per_group).
    """
    wait_for_previous()
    C_big = aligned(C_big, BIG_ALIGNMENT)
    C_small = aligned(C_small, SMALL_ALIGNMENT)
    TAPS: tl.constexpr = KH * KW
    tiles_m = tl.cdiv(C_small, BLOCK_M)
    tile = tl.program_id(0) // tiles_m
    cs0 = tl.program_id(0) % tiles_m * BLOCK_M
    n, y, x, exists, count, n0, y0, x0 = _pixels(
        tile % tiles_per_group, tile // tiles_per_group * N, N, H_small, W_small,
        BLOCK_N, BOX_N, BOX_H, BOX_W, DESCRIPTORS,
    )  # fmt: skip

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    Y, X, pixel = _in_big(n, y, x, H_big, W_big, STRIDE_H, STRIDE_W, PAD_H, PAD_W)
    Y = tl.where(exists, Y, OUTSIDE)
    if PACKED:
        cs = cs0 + tl.arange(0, BLOCK_M)
        rows = in_bounds(cs, cs < C_small).to(tl.int64) * (TAPS * C_big)
        for k0 in range(0, TAPS * C_big, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            in_k = k < TAPS * C_big
            a = tl.load(
                weight + rows[:, None] + run_in_bounds(k, in_k)[None, :],
                mask=(cs < C_small)[:, None] & in_k[None, :],
                other=0.0,
            )
            b = _load_pixels_packed(big, Y, X, pixel, k, H_big, W_big, C_big, KW, TAPS)
            acc = dot(a, b.T, acc, PRECISION)
    else:
        # Taps are the inner part of the loop: their pixels overlap, so they meet in the cache.
        for step in range(0, tl.cdiv(C_big, BLOCK_K) * TAPS):
            tap = step % TAPS
            ky = tap // KW
            kx = tap % KW
            cb0 = step // TAPS * BLOCK_K
            a = _load_weight(
                weight, cs0, tap, cb0, C_small, C_big, True, TAPS, False, DESCRIPTORS,
                BLOCK_M, BLOCK_K,
            )  # fmt: skip
            if DESCRIPTORS:
                b = _load_box_of_big(
                    big, n0, y0, x0, ky, kx, cb0, C_big,
                    STRIDE_H, STRIDE_W, PAD_H, PAD_W, BLOCK_N, BLOCK_K,
                )  # fmt: skip
            else:
                b = _load_pixels(
                    big, Y + ky, X + kx, pixel + (ky * W_big + kx), cb0,
                    H_big, W_big, C_big, BLOCK_K,
                )  # fmt: skip
            acc = dot(a, b.T, acc, PRECISION)

    row = cs0 + tl.arange(0, BLOCK_M)
    group = tile // tiles_per_group
    stored = (n * H_small + y) * W_small + x
    values = acc
    if HAS_BELOW or HAS_ADDED:
        if GROUPED:
            box = below.load([group, n0 - group * N, y0, x0, cs0])
            values = box.reshape(BLOCK_N, BLOCK_M).T
        elif STORE_DESCRIPTOR:
            values = below.load([n0, y0, x0, cs0]).reshape(BLOCK_N, BLOCK_M).T
        else:
            values = _load_below(below, stored, exists, row, C_small)
    acc = finished(
        acc, values, exists, count, tile, group, row, C_small, channels, bias_ptr, vectors_ptr,
        count_ptr, mean_ptr, m2_ptr, sums_ptr, negative_slope, HAS_BIAS, HAS_NORM, HAS_STATISTICS,
        HAS_BELOW, HAS_SUMS, HAS_ADDED, ACTIVATION, STORED_DTYPE,
    )  # fmt: skip
    if GROUPED:
        box = acc.to(out.dtype).T.reshape(1, BOX_N, BOX_H, BOX_W, BLOCK_M)
        out.store([group, n0 - group * N, y0, x0, cs0], box)
    elif STORE_DESCRIPTOR:
        out.store([n0, y0, x0, cs0], acc.to(out.dtype).T.reshape(BOX_N, BOX_H, BOX_W, BLOCK_M))
    else:
        tl.store(
            out + stored.to(tl.int64)[None, :] * C_small + row[:, None],
            acc.to(out.dtype.element_ty),
            mask=(row < C_small)[:, None] & exists[None, :],
        )


@triton.jit(do_not_specialize=_COUNTS)
def dgrad(
    small,
    weight,
    out,
    bias_ptr,
    vectors_ptr,
    count_ptr,
    mean_ptr,
    m2_ptr,
    below,
    sums_ptr,
    N,
    H_big,
    W_big,
    C_big,
    H_small,
    W_small,
    C_small,
    channels,
    bias_step,
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
    HAS_BELOW: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    HAS_ADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORED_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BIG_ALIGNMENT: tl.constexpr,
    SMALL_ALIGNMENT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SMALL_DESCRIPTOR: tl.constexpr,
    STORE_DESCRIPTOR: tl.constexpr,
    GROUPED: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[n, Y, X, cb] = act(sum over taps and cs of weight * small).

    The output splits into STRIDE_H * STRIDE_W phases, (Y, X) = (y * STRIDE_H + py, ...): within one
    phase the taps that meet a pixel are the same, every STRIDE-th of the kernel, so each phase is a
    dense stride-1 convolution and nothing is multiplied by an inserted zero. M = C_big, N = pixels
    of a phase, K = the phase's taps * C_small. The bias of a phase lies bias_step after that of the
    phase before, 0 for one bias. Grid: (phases * tiles of C_big * groups *
    tiles_per_group): the phases of a tile read the same pixels, so they run side by side.
    """
    wait_for_previous()
    C_big = aligned(C_big, BIG_ALIGNMENT)
    C_small = aligned(C_small, SMALL_ALIGNMENT)
    TAPS: tl.constexpr = KH * KW
    PHASES: tl.constexpr = STRIDE_H * STRIDE_W
    # The taps of a phase; the last may lie beyond a kernel that the stride does not divide.
    PHASE_KH: tl.constexpr = (KH + STRIDE_H - 1) // STRIDE_H
    PHASE_KW: tl.constexpr = (KW + STRIDE_W - 1) // STRIDE_W
    PHASE_TAPS: tl.constexpr = PHASE_KH * PHASE_KW

    phase = tl.program_id(0) % PHASES
    py = phase // STRIDE_W
    px = phase % STRIDE_W
    tiles_m = tl.cdiv(C_big, BLOCK_M)
    tile = tl.program_id(0) // PHASES // tiles_m
    cb0 = tl.program_id(0) // PHASES % tiles_m * BLOCK_M
    group = tile // tiles_per_group
    tile = tile % tiles_per_group
    n, y, x, exists, count, n0, y0, x0 = _pixels(
        tile,
        group * N,
        N,
        (H_big - py + STRIDE_H - 1) // STRIDE_H,
        (W_big - px + STRIDE_W - 1) // STRIDE_W,
        BLOCK_N,
        BOX_N,
        BOX_H,
        BOX_W,
        DESCRIPTORS,
    )

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    Y = tl.where(exists, y, OUTSIDE)
    pixel = (n * H_small + y) * W_small + x
    # A tap STRIDE further on in the kernel meets the pixel before.
    first_ky = (py + PAD_H) % STRIDE_H
    first_kx = (px + PAD_W) % STRIDE_W
    first_dy = (py + PAD_H) // STRIDE_H
    first_dx = (px + PAD_W) // STRIDE_W
    for step in range(0, tl.cdiv(C_small, BLOCK_K) * PHASE_TAPS):
        phase_tap = step % PHASE_TAPS
        cs0 = step // PHASE_TAPS * BLOCK_K
        ky = first_ky + phase_tap // PHASE_KW * STRIDE_H
        kx = first_kx + phase_tap % PHASE_KW * STRIDE_W
        dy = first_dy - phase_tap // PHASE_KW
        dx = first_dx - phase_tap % PHASE_KW
        in_kernel = (ky < KH) & (kx < KW)
        a = _load_weight(
            weight, cs0, ky * KW + kx, cb0, C_small, C_big, in_kernel, TAPS, True, DESCRIPTORS,
            BLOCK_K, BLOCK_M,
        )  # fmt: skip
        if SMALL_DESCRIPTOR:
            b = small.load([n0, y0 + dy, x0 + dx, cs0]).reshape(BLOCK_N, BLOCK_K)
        else:
            # A tap beside the kernel meets no pixel: zero times an infinite one would be NaN.
            b = _load_pixels(
                small, Y + tl.where(in_kernel, dy, OUTSIDE), x + dx, pixel + (dy * W_small + dx),
                cs0, H_small, W_small, C_small, BLOCK_K,
            )  # fmt: skip
        acc = dot(a, b.T, acc, PRECISION)

    # A group's statistics lie together: its phases, and their tiles.
    part = (group * PHASES + phase) * tiles_per_group + tile
    row = cb0 + tl.arange(0, BLOCK_M)
    stored = (n * H_big + y * STRIDE_H + py) * W_big + x * STRIDE_W + px
    if HAS_BIAS:
        bias_ptr += phase * bias_step
    column = py * (W_big // STRIDE_W) + x0  # Of all phases' pixels in a row: see GROUPED.
    values = acc
    if HAS_BELOW or HAS_ADDED:
        if GROUPED:
            box = below.load([group, n0 - group * N, y0, column, px * C_big + cb0])
            values = box.reshape(BLOCK_N, BLOCK_M).T
        elif STORE_DESCRIPTOR:
            values = below.load([n0, y0, py, x0, px * C_big + cb0]).reshape(BLOCK_N, BLOCK_M).T
        else:
            values = _load_below(below, stored, exists, row, C_big)
    acc = finished(
        acc, values, exists, count, part, group, row, C_big, channels, bias_ptr, vectors_ptr,
        count_ptr, mean_ptr, m2_ptr, sums_ptr, negative_slope, HAS_BIAS, HAS_NORM, HAS_STATISTICS,
        HAS_BELOW, HAS_SUMS, HAS_ADDED, ACTIVATION, STORED_DTYPE,
    )  # fmt: skip
    if GROUPED:
        box = acc.to(out.dtype).T.reshape(1, BOX_N, BOX_H, BOX_W, BLOCK_M)
        out.store([group, n0 - group * N, y0, column, px * C_big + cb0], box)
    elif STORE_DESCRIPTOR:
        box = acc.to(out.dtype).T.reshape(BOX_N, BOX_H, 1, BOX_W, BLOCK_M)
        out.store([n0, y0, py, x0, px * C_big + cb0], box)
    else:
        tl.store(
            out + stored.to(tl.int64)[None, :] * C_big + row[:, None],
            acc.to(out.dtype.element_ty),
            mask=(row < C_big)[:, None] & exists[None, :],
        )


@triton.jit(do_not_specialize=[*_COUNTS[:-1], "tiles_per_split"])
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
    BIG_ALIGNMENT: tl.constexpr,
    SMALL_ALIGNMENT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    SMALL_DESCRIPTOR: tl.constexpr,
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
    wait_for_previous()
    C_big = aligned(C_big, BIG_ALIGNMENT)
    C_small = aligned(C_small, SMALL_ALIGNMENT)
    columns = TAPS * C_big if PACKED else C_big
    tiles_n = tl.cdiv(columns, BLOCK_N)
    cs0 = tl.program_id(0) // tiles_n * BLOCK_M
    cb0 = tl.program_id(0) % tiles_n * BLOCK_N
    tap = tl.program_id(1)
    split = tl.program_id(2)
    cs = cs0 + tl.arange(0, BLOCK_M)
    cb = cb0 + tl.arange(0, BLOCK_N)

    pixels = N * H_small * W_small
    first = split * tiles_per_split
    n, y, x, exists, count, n0, y0, x0 = _pixels(
        first, 0, N, H_small, W_small, BLOCK_K, BOX_N, BOX_H, BOX_W, DESCRIPTORS,
    )  # fmt: skip
    # A program's tap is always the same, unless all are columns.
    ky = tap // KW
    kx = tap % KW
    Y, X, pixel = _in_big(n, y, x, H_big, W_big, STRIDE_H, STRIDE_W, PAD_H - ky, PAD_W - kx)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    for step in range(0, tiles_per_split):
        tile = first + step
        a = _load_small_transposed(
            small, tile, pixels, cs0, C_small, SMALL_DESCRIPTOR, BLOCK_K, BLOCK_M
        )
        if DESCRIPTORS:
            n, y, x, exists, count, n0, y0, x0 = _pixels(
                tile, 0, N, H_small, W_small, BLOCK_K, BOX_N, BOX_H, BOX_W, DESCRIPTORS,
            )  # fmt: skip
            b = _load_box_of_big(
                big, n0, y0, x0, ky, kx, cb0, C_big,
                STRIDE_H, STRIDE_W, PAD_H, PAD_W, BLOCK_K, BLOCK_N,
            )  # fmt: skip
        else:
            exists = tl.arange(0, BLOCK_K) < pixels - tile * BLOCK_K
            inside = tl.where(exists, Y, OUTSIDE)
            if PACKED:
                b = _load_pixels_packed(big, inside, X, pixel, cb, H_big, W_big, C_big, KW, TAPS)
            else:
                b = _load_pixels(big, inside, X, pixel, cb0, H_big, W_big, C_big, BLOCK_N)
            Y, X, pixel = _next_in_big(
                Y, X, pixel, BLOCK_K, H_small, W_small, H_big, W_big, STRIDE_H, STRIDE_W,
                PAD_H - ky, PAD_W - kx,
            )  # fmt: skip
        acc = dot(a, b, acc, PRECISION)

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
    """The BLOCK pixels of a tile: n, y, x, whether they exist, how many do, a box's n0, y0, x0.

    Tiles cover the N images from `first` on, a group. A box is what a descriptor moves. Without
    one, pixels are taken in memory's order, which leaves no ragged edge inside an image.
    """
    lane = tl.arange(0, BLOCK)
    if BOXED:
        tiles_w = tl.cdiv(W, BOX_W)
        tiles_h = tl.cdiv(H, BOX_H)
        n0 = first + tile // (tiles_h * tiles_w) * BOX_N
        y0 = tile // tiles_w % tiles_h * BOX_H
        x0 = tile % tiles_w * BOX_W
        n = n0 + lane // (BOX_H * BOX_W)
        y = y0 + lane // BOX_W % BOX_H
        x = x0 + lane % BOX_W
        count = tl.minimum(BOX_N, first + N - n0)
        count *= tl.minimum(BOX_H, H - y0) * tl.minimum(BOX_W, W - x0)
    else:
        n0 = 0
        y0 = 0
        x0 = 0
        # A phase of a map of 1 pixel may have none: then none exists, whatever its division gives.
        rows = tl.maximum(H, 1)
        columns = tl.maximum(W, 1)
        pixel = tile * BLOCK + lane
        n = first + pixel // (rows * columns)
        y = pixel // columns % rows
        x = pixel % columns
        count = tl.minimum(BLOCK, tl.maximum(N * H * W - tile * BLOCK, 0))
    return n, y, x, (n < first + N) & (y < H) & (x < W), count, n0, y0, x0


@triton.jit
def _in_big(n, y, x, H, W, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, pad_h, pad_w):
    """Where small's pixels meet big: row and column, which may be outside, and number of the pixel.

    pad_h, pad_w: the padding, less the tap.
    """
    Y = y * STRIDE_H - pad_h
    X = x * STRIDE_W - pad_w
    return Y, X, (n * H + Y) * W + X


@triton.jit
def _next_in_big(
    Y, X, pixel, PIXELS: tl.constexpr, H_small, W_small, H_big, W_big,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, pad_h, pad_w,
):  # fmt: skip
    """What `_in_big` gives for the pixels that come PIXELS later in small's memory.

    Carried from tile to tile: three divisions for each pixel would be most of wgrad's instructions.
    All but comparisons and additions is the same in every tile.
    """
    step_x = PIXELS % W_small
    step_y = PIXELS // W_small % H_small
    step_n = PIXELS // W_small // H_small
    Y += step_y * STRIDE_H
    X += step_x * STRIDE_W
    pixel += (step_n * H_big + step_y * STRIDE_H) * W_big + step_x * STRIDE_W
    beyond = W_small * STRIDE_W - pad_w <= X
    X = tl.where(beyond, X - W_small * STRIDE_W, X)
    Y = tl.where(beyond, Y + STRIDE_H, Y)
    pixel = tl.where(beyond, pixel + (STRIDE_H * W_big - W_small * STRIDE_W), pixel)
    beyond = H_small * STRIDE_H - pad_h <= Y
    Y = tl.where(beyond, Y - H_small * STRIDE_H, Y)
    pixel = tl.where(beyond, pixel + (H_big - H_small * STRIDE_H) * W_big, pixel)
    return Y, X, pixel


@triton.jit
def _load_box_of_big(
    big, n0, y0, x0, ky, kx, c0, C,
    STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """[PIXELS, CHANNELS] of big by its descriptor: what meets a box of small at a tap."""
    # Device division rounds towards zero; adding PAD strides first makes it a floor.
    shift_y = (ky - PAD_H + PAD_H * STRIDE_H) // STRIDE_H - PAD_H
    shift_x = (kx - PAD_W + PAD_W * STRIDE_W) // STRIDE_W - PAD_W
    parity_y = ky - PAD_H - shift_y * STRIDE_H
    parity_x = kx - PAD_W - shift_x * STRIDE_W
    box = big.load([n0, y0 + shift_y, parity_y, x0 + shift_x, parity_x * C + c0])
    return box.reshape(PIXELS, CHANNELS)


@triton.jit
def _load_pixels(source, Y, X, pixel, c0, H, W, C, CHANNELS: tl.constexpr):
    """[pixels, CHANNELS] of rows Y and columns X, channels c0 on; zeros outside of the image.

    pixel: the pixels' numbers in the whole batch.
    """
    c = c0 + tl.arange(0, CHANNELS)
    inside = in_range(Y, H) & in_range(X, W)
    row = wide_product(in_bounds(pixel, inside), C)
    return tl.load(
        source + run_in_bounds(c, c < C)[None, :] + row[:, None],
        mask=inside[:, None] & (c < C)[None, :],
        other=0.0,
    )


@triton.jit
def _load_pixels_packed(big, Y0, X0, pixel, k, H, W, C, KW: tl.constexpr, TAPS: tl.constexpr):
    """As `_load_pixels`, each column k being a tap and a channel: k = (ky * KW + kx) * C + c."""
    tap = k // C
    ky = tap // KW
    kx = tap % KW
    Y = Y0[:, None] + ky[None, :]
    X = X0[:, None] + kx[None, :]
    inside = (tap < TAPS)[None, :] & in_range(Y, H) & in_range(X, W)
    # A row's part and a column's part: one 64-bit addition an element, which saves registers.
    row_offset = pixel.to(tl.int64) * C
    column_offset = (ky * W + kx) * C + k % C
    offset = in_bounds(row_offset[:, None] + column_offset[None, :], inside)
    return tl.load(big + offset, mask=inside, other=0.0)


@triton.jit
def _load_small_transposed(
    small, tile, pixels, c0, C,
    DESCRIPTORS: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """[CHANNELS, PIXELS] of small: a run of its `pixels`, channels c0 and on.

    As in `_load_weight`, pointers are transposed and not what they load.
    """
    if DESCRIPTORS:
        # A box of whole rows is a run of pixels, and small has no padding.
        values = small.load([tile * PIXELS, c0]).T
    else:
        pixel = tile * PIXELS + tl.arange(0, PIXELS)
        c = c0 + tl.arange(0, CHANNELS)
        row = wide_product(in_bounds(pixel, pixel < pixels), C)
        values = tl.load(
            small + run_in_bounds(c, c < C)[:, None] + row[None, :],
            mask=(c < C)[:, None] & (pixel < pixels)[None, :],
            other=0.0,
        )
    return values


@triton.jit
def _load_below(below, pixel, exists, row, C):
    """[rows, pixels] of the layer below: what lies where the result will, by the same addresses."""
    first = in_bounds(pixel, exists).to(tl.int64) * C
    offset = run_in_bounds(row, row < C)[:, None] + first[None, :]
    return tl.load(below + offset, mask=(row < C)[:, None] & exists[None, :], other=0.0)


@triton.jit
def _load_weight(
    weight, cs0, tap, cb0, C_small, C_big, in_kernel,
    TAPS: tl.constexpr, TRANSPOSED: tl.constexpr, DESCRIPTORS: tl.constexpr,
    SMALL: tl.constexpr, BIG: tl.constexpr,
):  # fmt: skip
    """[SMALL, BIG] channels of one tap, or [BIG, SMALL]; zeros where the tap is not in the kernel.

    Pointers are transposed, not what they load: only so are the loads pipelined on sm_80.
    """
    if DESCRIPTORS:
        values = weight.load([cs0, tap * C_big + cb0])
        if TRANSPOSED:
            values = values.T
    else:
        lane = tl.arange(0, SMALL)
        cb = cb0 + tl.arange(0, BIG)
        in_cb = cb < C_big
        if TRANSPOSED:
            in_cs = lane < tl.where(in_kernel, C_small - cs0, 0)
            # The first of these channels exists; a tap beside the kernel has the address of tap 0.
            first = (cs0.to(tl.int64) * TAPS + tl.where(in_kernel, tap, 0)) * C_big
            row = wide_product(in_bounds(lane, in_cs) * TAPS, C_big)
            offset = run_in_bounds(cb, in_cb)[:, None] + row[None, :]
            mask = in_cb[:, None] & in_cs[None, :]
        else:
            in_cs = lane < C_small - cs0
            first = tap.to(tl.int64) * C_big
            row = in_bounds(cs0 + lane, in_cs).to(tl.int64) * TAPS * C_big
            offset = row[:, None] + run_in_bounds(cb, in_cb)[None, :]
            mask = in_cs[:, None] & in_cb[None, :]
        values = tl.load(weight + first + offset, mask=mask, other=0.0)
    return values
