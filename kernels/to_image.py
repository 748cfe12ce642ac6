"""dgrad to an image: `conv_transpose2d` to, or the input gradient of `conv2d` from, few channels.

Not as in conv.py, where each tap loads the pixels that it multiplies: here a pixel of small is
loaded once and multiplied with all the taps of all the image's channels, a product of 64 columns
for a kernel of 4 x 4, and the products that meet in an element of the image are added afterwards.

A program walks down the rows of small. A row of the image is complete after the last row of small
that touches it, so between two steps only the sums of the KH - STRIDE_H rows that are not complete
yet are carried; the rows' sums are additions within a thread. Along a row of the image the products
of neighbouring pixels meet, which lie in other threads: they are gathered.

Addresses are 64-bit: an activation may hold more than 2^31 elements.
"""

import triton
import triton.language as tl

from .activation import activate, activation_backward
from .loading import in_bounds
from .normalizing import load_vectors, normalized_rows
from .overlap import wait_for_previous
from .product import dot
from .rounding import as_stored

# So many of the product's columns belong to a tap: an image has 1 to 4 channels.
CHANNELS = tl.constexpr(4)


@triton.jit(
    do_not_specialize=[
        "N", "H_small", "W_small", "H_big", "W_big",
        "tiles_w", "tile_w", "first_x", "segments", "first_step", "steps_per_segment",
        "group_images",
    ]
)  # fmt: skip
def to_image(
    small_ptr,
    y_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    N,
    H_small,
    W_small,
    C_small,
    H_big,
    W_big,
    tiles_w,
    tile_w,
    first_x,
    segments,
    first_step,
    steps_per_segment,
    negative_slope,
    y_slope,
    vectors_ptr,
    group_images,
    C_BIG: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_NORM: tl.constexpr,
    GROUPED: tl.constexpr,
    Y_ACTIVATION: tl.constexpr,
    STORED_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNKED: tl.constexpr,
    BLOCK_KH: tl.constexpr,
    BLOCK_KW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out[n, Y, X, cb] = act(sum over taps and cs of small * act'(y) * weight).

    With HAS_Y, small is the gradient of y = act(u) and becomes that of u as it is loaded. With
    HAS_NORM, it is y's batch norm's input and becomes y, each group of `group_images` images by its
    own vectors. Y_ACTIVATION is what made y.

    A tile is BLOCK_N images by BLOCK_W pixels of a row of small, from first_x + a multiple of
    tile_w on; it makes STRIDE_W * tile_w pixels of STRIDE_H rows of the image in each step, at most
    BLOCK_E elements a row. Step s has row s of small and completes the rows of the image from
    s * STRIDE_H - PAD_H on. Grid: (tiles of images * tiles of a row * segments of the steps).
    """
    wait_for_previous()
    BLOCK_P: tl.constexpr = BLOCK_N * BLOCK_W
    CARRIED: tl.constexpr = KH - STRIDE_H
    WARM_UP: tl.constexpr = (CARRIED + STRIDE_H - 1) // STRIDE_H
    # Neighbouring segments share rows of small, which so meet in the cache.
    segment = tl.program_id(0) % segments
    tile_x = tl.program_id(0) // segments % tiles_w
    n0 = (tl.program_id(0) // segments // tiles_w).to(tl.int64) * BLOCK_N
    x0 = tile_x * tile_w + first_x

    cs = tl.arange(0, BLOCK_C)
    if not CHUNKED:
        weight = _load_weight(weight_ptr, cs, C_small, C_BIG, KH, KW, BLOCK_KH, BLOCK_KW)
    if HAS_NORM:
        tl.static_assert(not HAS_Y)
        first_image = n0.to(tl.int32)
        last_image = tl.minimum(first_image + BLOCK_N, N) - 1
        group = first_image // group_images
        if not CHUNKED:
            # Of channels that do not exist others', and z = 0: their weights are 0.
            mean, scale, shift = load_vectors(vectors_ptr, group, C_small, cs % C_small)
    p = tl.arange(0, BLOCK_P)
    n = n0 + p // BLOCK_W
    x = x0 + p % BLOCK_W
    exists = (n < N) & (x >= 0) & (x < W_small)
    pixel = n * H_small * W_small + x

    source, meets = _source(
        tile_x * tile_w, x0, C_BIG, KW, STRIDE_W, PAD_W, BLOCK_N, BLOCK_W, BLOCK_E
    )
    TERMS: tl.constexpr = meets.shape[0]
    e = tl.arange(0, BLOCK_E)
    X0 = tile_x * tile_w * STRIDE_W
    elements = tl.minimum(tile_w * STRIDE_W, W_big - X0) * C_BIG
    image = n0 + tl.arange(0, BLOCK_N)
    stored = (image < N)[:, None] & (e < elements)[None, :]
    out_ptr += (image * H_big * W_big + X0)[:, None] * C_BIG + e[None, :]
    if HAS_BIAS:
        bias = tl.load(bias_ptr + e % C_BIG).to(ACC_DTYPE)[None, :]

    carry = (tl.zeros((BLOCK_P, BLOCK_KW // 2, CHANNELS, 2), ACC_DTYPE),) * CARRIED
    first = first_step + segment * steps_per_segment
    for step in range(first - WARM_UP, first + steps_per_segment):
        # Triton 3.9's interpreter takes no mask that a scalar's truth is part of.
        row_exists = exists & (p < tl.where((step >= 0) & (step < H_small), BLOCK_P, 0))
        if HAS_NORM:
            # The same, made again: it would be carried along with the loads, a bit an element.
            on_map = (exists & ((step >= 0) & (step < H_small)))[:, None]
        row = pixel + tl.cast(step, tl.int64) * W_small
        pixel_offset = in_bounds(row * C_small, row_exists)
        if CHUNKED:
            acc = tl.zeros((BLOCK_P, BLOCK_KH * BLOCK_KW * CHANNELS), ACC_DTYPE)
            for c0 in range(0, C_small, BLOCK_C):
                a = _load_small(
                    small_ptr, y_ptr, pixel_offset, row_exists, c0 + cs, C_small, y_slope,
                    HAS_Y, Y_ACTIVATION, ACC_DTYPE,
                )  # fmt: skip
                if HAS_NORM:
                    channel = (c0 + cs) % C_small
                    mean, scale, shift = load_vectors(vectors_ptr, group, C_small, channel)
                    a = normalized_rows(
                        a, n, first_image, last_image, group_images, group, mean, scale, shift,
                        vectors_ptr, C_small, channel, y_slope, GROUPED, Y_ACTIVATION,
                    )  # fmt: skip
                    a = as_stored(a, on_map, small_ptr.dtype.element_ty, STORED_DTYPE)
                b = _load_weight(weight_ptr, c0 + cs, C_small, C_BIG, KH, KW, BLOCK_KH, BLOCK_KW)
                acc = dot(a, b, acc, PRECISION)
        else:
            a = _load_small(
                small_ptr, y_ptr, pixel_offset, row_exists, cs, C_small, y_slope,
                HAS_Y, Y_ACTIVATION, ACC_DTYPE,
            )  # fmt: skip
            if HAS_NORM:
                a = normalized_rows(
                    a, n, first_image, last_image, group_images, group, mean, scale, shift,
                    vectors_ptr, C_small, cs % C_small, y_slope, GROUPED, Y_ACTIVATION,
                )  # fmt: skip
                a = as_stored(a, on_map, small_ptr.dtype.element_ty, STORED_DTYPE)
            acc = tl.dot(a, weight, input_precision=PRECISION, out_dtype=ACC_DTYPE)

        rows = _split_rows(acc.reshape(BLOCK_P, BLOCK_KW // 2, BLOCK_KH, CHANNELS, 2))
        sums = ()
        for ky in tl.static_range(KH):
            sums = sums + ((rows[ky] + carry[ky] if ky < CARRIED else rows[ky]),)
        for ky in tl.static_range(STRIDE_H):
            Y = step * STRIDE_H - PAD_H + ky
            if (step >= first) & (Y >= 0) & (H_big > Y):
                # In this order the threads of a warp write, and gather, neighbouring addresses.
                products = sums[ky].permute(1, 3, 0, 2).reshape(BLOCK_KW * BLOCK_P * CHANNELS)
                terms = tl.gather(products, source, 0).reshape(TERMS, BLOCK_N, BLOCK_E)
                out = tl.sum(tl.where(meets[:, None, :], terms, 0.0), axis=0)
                if HAS_BIAS:
                    out += bias
                out = activate(out, negative_slope, ACTIVATION).to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + tl.cast(Y, tl.int64) * W_big * C_BIG, out, mask=stored)
        carry = sums[STRIDE_H:]


@triton.jit
def _load_small(
    small_ptr, y_ptr, pixel_offset, exists, cs, C_small, y_slope,
    HAS_Y: tl.constexpr, Y_ACTIVATION: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """[BLOCK_P, BLOCK_C]: channels cs of small, or of the gradient of y's input."""
    # Channels that small does not have are masked, and point at others that it has. After a
    # remainder Triton still knows which are neighbours, and joins their loads.
    offset = pixel_offset[:, None] + (cs % C_small)[None, :]
    inside = exists[:, None] & (cs < C_small)[None, :]
    values = tl.load(small_ptr + offset, mask=inside, other=0.0)
    if HAS_Y and Y_ACTIVATION != "identity":
        y = tl.load(y_ptr + offset, mask=inside, other=0.0).to(ACC_DTYPE)
        du = activation_backward(values.to(ACC_DTYPE), y, y_slope, Y_ACTIVATION)
        values = du.to(small_ptr.dtype.element_ty)
    return values


@triton.jit
def _load_weight(
    weight_ptr, cs, C_small, C_BIG: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_KH: tl.constexpr, BLOCK_KW: tl.constexpr,
):  # fmt: skip
    """[BLOCK_C, columns] of the weight, the columns being (kx // 2, ky, cb, kx % 2).

    In the accumulator of a product a thread has columns that differ in the last bit and from the
    fourth on (also on AMD, where it has others, this order is right). So it has the taps of a
    pixel and a channel, and the rows of the taps can be told apart without moving a value.
    """
    column = tl.arange(0, BLOCK_KH * BLOCK_KW * CHANNELS)
    cb = column // 2 % CHANNELS
    ky = column // (2 * CHANNELS) % BLOCK_KH
    kx = column // (2 * CHANNELS * BLOCK_KH) * 2 + column % 2
    used = (cs < C_small)[:, None] & ((ky < KH) & (kx < KW) & (cb < C_BIG))[None, :]
    offset = cs[:, None] * (KH * KW * C_BIG) + ((ky * KW + kx) * C_BIG + cb)[None, :]
    return tl.load(weight_ptr + in_bounds(offset, used), mask=used, other=0.0)


@triton.jit
def _source(
    x_tile, x0, C_BIG: tl.constexpr, KW: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_W: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Which of the products [BLOCK_KW, BLOCK_N * BLOCK_W, CHANNELS] of a row meet in its elements.

    Returns their indices, flat, and whether they exist: [terms, BLOCK_N, BLOCK_E], flat too, and
    [terms, BLOCK_E].
    """
    TAPS: tl.constexpr = (KW + STRIDE_W - 1) // STRIDE_W
    TERMS: tl.constexpr = triton.next_power_of_2(TAPS)
    e = tl.arange(0, BLOCK_E)
    # The image's border moved to the left by the padding: never negative, so divisions are floors.
    X = x_tile * STRIDE_W + e // C_BIG + PAD_W
    term = tl.arange(0, TERMS)[:, None]
    kx = (X % STRIDE_W)[None, :] + term * STRIDE_W
    column = (X // STRIDE_W)[None, :] - term - x0
    meets = (kx < KW) & (column >= 0) & (column < BLOCK_W)
    product = (kx * (BLOCK_N * BLOCK_W) + column) * CHANNELS + (e % C_BIG)[None, :]
    image = tl.arange(0, BLOCK_N) * (BLOCK_W * CHANNELS)
    source = tl.where(meets, product, 0)[:, None, :] + image[None, :, None]
    return source.reshape(TERMS * BLOCK_N * BLOCK_E), meets


@triton.jit
def _split_rows(products):
    """[pixels, columns // 2, rows, channels, 2] as a tuple of tensors, one for each row."""
    P: tl.constexpr = products.shape[0]
    X: tl.constexpr = products.shape[1]
    ROWS: tl.constexpr = products.shape[2]
    if ROWS == 1:
        return (products.reshape(P, X, CHANNELS, 2),)
    else:
        halves = products.reshape(P, X, 2, ROWS // 2, CHANNELS, 2).permute(0, 1, 3, 4, 5, 2)
        low, high = halves.split()
        return _split_rows(low) + _split_rows(high)
