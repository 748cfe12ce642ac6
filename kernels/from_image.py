"""fprop and wgrad where the big side is an image of 1 to 4 channels, kept padded to 4.

With 3 channels nothing is aligned and every element must be addressed, and masked, alone. So the
big side is first written as padded[N, Hp, Wp, 4]: the missing channels are zeros, and so is a
border as wide as the convolution's padding (wider at the bottom and the right, where windows reach
further). Small's pixel (n, y, x) then meets KH runs of KW * 4 consecutive elements, its window,
without a mask:

    fprop_image   out[pixel, cs] = sum over k of weight[cs, k] * window[pixel, k]
    wgrad_image   out[cs, k] = sum over pixels of small[pixel, cs] * window[pixel, k]

where k = (ky * KW + kx) * 4 + cb. In fprop channels are the rows of the product and pixels its
columns: sums over pixels then stay within few threads.

Where the image is the gradient at a generator's images, and a batch norm is below, memory takes
time and products take hardly any. So `norm_sums_image` computes the gradient of the norm's output
for its sums alone, with wgrad in the same pass; and fprop, AT_INPUT, computes it again and goes on
to the gradient of the norm's input.

The padded image's width is even, and its addresses are counted in units of UNIT elements, so that a
compiler can tell how well they are aligned whatever the width: 16 bytes for half precision and an
even stride.
"""

import triton
import triton.language as tl

from .activation import activation_backward
from .loading import in_bounds, run_in_bounds
from .norm import RSTD
from .normalizing import load_vectors, normalized, normalized_rows
from .overlap import wait_for_previous
from .product import (
    GRADIENT_AT_ONCE,
    dot,
    finished,
    gradient_at_input,
    gradient_in_pieces,
    zero_beyond,
)
from .rounding import as_stored

# What only counts must not compile a kernel anew, neither for a last batch that is smaller nor for
# another size of image. Channels decide about vector loads.
_PAD_COUNTS = (
    "pixels", "H", "W", "width_magic", "width_shift", "height_magic", "height_shift", "Hp", "Wp",
    "pad_h", "pad_w", "stride_xn", "stride_xc", "stride_xh", "stride_xw", "stride_yn", "stride_yc",
    "stride_yh", "stride_yw",
)  # fmt: skip
_JOIN_COUNTS = (
    "pixels", "H", "W", "width_magic", "width_shift", "height_magic", "height_shift", "Hp", "Wp",
    "pad_h", "pad_w", "stride_realn", "stride_realc", "stride_realh", "stride_realw",
    "stride_faken", "stride_fakec", "stride_fakeh", "stride_fakew",
)  # fmt: skip
_FPROP_COUNTS = (
    "pixels", "tiles_per_group", "tiles_per_program", "one_more", "image_step", "row_step",
    "window_step", "width_magic", "width_shift", "height_magic", "height_shift",
)  # fmt: skip
_SUMS_COUNTS = tuple(name for name in _FPROP_COUNTS if name != "tiles_per_group")
_WGRAD_COUNTS = (
    "pixels", "tiles_per_split", "image_step", "row_step", "window_step", "width_magic",
    "width_shift", "height_magic", "height_shift", "group_pixels",
)  # fmt: skip


@triton.jit(do_not_specialize=_PAD_COUNTS)
def pad_image(
    x_ptr,
    y_ptr,
    padded_ptr,
    pixels,
    H,
    W,
    width_magic,
    width_shift,
    height_magic,
    height_shift,
    Hp,
    Wp,
    pad_h,
    pad_w,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yn,
    stride_yc,
    stride_yh,
    stride_yw,
    negative_slope,
    C: tl.constexpr,
    HAS_Y: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """padded[n, Y, X, c] = x[n, c, Y - pad_h, X - pad_w], times act'(u) with HAS_Y; else 0.

    y = act(u) is what the layer put out and x the gradient of that, which becomes the gradient at
    u. `pixels` are the padded image's. Grid: (tiles of pixels).
    """
    wait_for_previous()
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    n, Y, X, inside = _pixel_of_image(
        pixel, pixels, H, W, width_magic, width_shift, height_magic, height_shift, Hp, Wp,
        pad_h, pad_w,
    )  # fmt: skip
    x_ptr += n * stride_xn + Y * stride_xh + X * stride_xw
    y_ptr += n * stride_yn + Y * stride_yh + X * stride_yw

    c0 = _pad_channel(
        x_ptr, y_ptr, 0, inside, stride_xc, stride_yc, negative_slope,
        C, HAS_Y, ACTIVATION, ACC_DTYPE,
    )  # fmt: skip
    c1 = _pad_channel(
        x_ptr, y_ptr, 1, inside, stride_xc, stride_yc, negative_slope,
        C, HAS_Y, ACTIVATION, ACC_DTYPE,
    )  # fmt: skip
    c2 = _pad_channel(
        x_ptr, y_ptr, 2, inside, stride_xc, stride_yc, negative_slope,
        C, HAS_Y, ACTIVATION, ACC_DTYPE,
    )  # fmt: skip
    c3 = _pad_channel(
        x_ptr, y_ptr, 3, inside, stride_xc, stride_yc, negative_slope,
        C, HAS_Y, ACTIVATION, ACC_DTYPE,
    )  # fmt: skip
    _store_pixels(padded_ptr, pixel, pixels, c0, c1, c2, c3)


@triton.jit(do_not_specialize=_JOIN_COUNTS)
def join_images(
    real_ptr,
    fake_ptr,
    padded_ptr,
    pixels,
    H,
    W,
    width_magic,
    width_shift,
    height_magic,
    height_shift,
    Hp,
    Wp,
    pad_h,
    pad_w,
    stride_realn,
    stride_realc,
    stride_realh,
    stride_realw,
    stride_faken,
    stride_fakec,
    stride_fakeh,
    stride_fakew,
    scale,
    shift,
    C: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As `pad_image`: first the real images, times `scale` plus `shift`, then the generated ones.

    Without HAS_SCALE real images are taken as they are. `pixels` are one half's of the padded
    images. Grid: (tiles of pixels, halves).
    """
    wait_for_previous()
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    half = tl.program_id(1)
    n, Y, X, inside = _pixel_of_image(
        pixel, pixels, H, W, width_magic, width_shift, height_magic, height_shift, Hp, Wp,
        pad_h, pad_w,
    )  # fmt: skip
    # A program has images of one kind, so the other kind is not loaded.
    if half == 0:
        real = real_ptr + n * stride_realn + Y * stride_realh + X * stride_realw
        c0 = _join_channel(real, 0, inside, stride_realc, scale, shift, C, HAS_SCALE)
        c1 = _join_channel(real, 1, inside, stride_realc, scale, shift, C, HAS_SCALE)
        c2 = _join_channel(real, 2, inside, stride_realc, scale, shift, C, HAS_SCALE)
        c3 = _join_channel(real, 3, inside, stride_realc, scale, shift, C, HAS_SCALE)
    else:
        fake = fake_ptr + n * stride_faken + Y * stride_fakeh + X * stride_fakew
        c0 = _join_channel(fake, 0, inside, stride_fakec, scale, shift, C, False)
        c1 = _join_channel(fake, 1, inside, stride_fakec, scale, shift, C, False)
        c2 = _join_channel(fake, 2, inside, stride_fakec, scale, shift, C, False)
        c3 = _join_channel(fake, 3, inside, stride_fakec, scale, shift, C, False)
    padded_ptr += half.to(tl.int64) * pixels * 4
    _store_pixels(padded_ptr, pixel, pixels, c0, c1, c2, c3)


@triton.jit
def _pixel_of_image(
    pixel, pixels, H, W, width_magic, width_shift, height_magic, height_shift, Hp, Wp, pad_h, pad_w
):  # fmt: skip
    """(n, Y, X) of the image that padded pixels hold, in 64 bits, and whether there is one."""
    row = _quotient(pixel, width_magic, width_shift)
    n = _quotient(row, height_magic, height_shift)
    Y = row - n * Hp - pad_h
    X = pixel - row * Wp - pad_w
    inside = (pixel < pixels) & (Y >= 0) & (Y < H) & (X >= 0) & (X < W)
    n = in_bounds(n, inside).to(tl.int64)
    Y = in_bounds(Y, inside).to(tl.int64)
    X = in_bounds(X, inside).to(tl.int64)
    return n, Y, X, inside


@triton.jit
def _store_pixels(padded_ptr, pixel, pixels, c0, c1, c2, c3):
    # A thread has a pixel's four channels, so joining them moves nothing.
    values = tl.join(tl.join(c0, c2), tl.join(c1, c3)).reshape(pixel.shape[0], 4)
    offset = pixel.to(tl.int64)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(
        padded_ptr + offset,
        values.to(padded_ptr.dtype.element_ty),
        mask=(pixel < pixels)[:, None],
    )


@triton.jit
def _join_channel(
    x_ptr, channel: tl.constexpr, inside, stride_xc, scale, shift, C: tl.constexpr,
    HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """A channel of the pixels in float32, 0 where there is none."""
    if channel >= C:
        value = tl.zeros(inside.shape, dtype=tl.float32)
    else:
        offset = tl.cast(stride_xc, tl.int64) * channel
        value = tl.load(x_ptr + offset, mask=inside, other=0).to(tl.float32)
        if HAS_SCALE:
            value = tl.where(inside, value * scale + shift, 0.0)
    return value


@triton.jit
def _pad_channel(
    x_ptr, y_ptr, channel: tl.constexpr, inside, stride_xc, stride_yc, negative_slope,
    C: tl.constexpr, HAS_Y: tl.constexpr, ACTIVATION: tl.constexpr, ACC_DTYPE: tl.constexpr,
):  # fmt: skip
    """A channel of the pixels, 0 where there is none."""
    if channel >= C:
        value = tl.zeros(inside.shape, dtype=ACC_DTYPE)
    else:
        value = tl.load(x_ptr + channel * stride_xc, mask=inside, other=0.0).to(ACC_DTYPE)
        if HAS_Y:
            y = tl.load(y_ptr + channel * stride_yc, mask=inside, other=0.0).to(ACC_DTYPE)
            value = activation_backward(value, y, negative_slope, ACTIVATION)
    return value


@triton.jit(do_not_specialize=_FPROP_COUNTS)
def fprop_image(
    padded_ptr,
    weight_ptr,
    out_ptr,
    bias_ptr,
    vectors_ptr,
    count_ptr,
    mean_ptr,
    m2_ptr,
    below_ptr,
    sums_ptr,
    pixels,
    eighths,
    tiles_per_group,
    tiles_per_program,
    one_more,
    image_step,
    row_step,
    window_step,
    width_magic,
    width_shift,
    height_magic,
    height_shift,
    negative_slope,
    C_BIG: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_W: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_STATISTICS: tl.constexpr,
    HAS_BELOW: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    AT_INPUT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORED_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[pixel, cs] = epilogue(sum over k of weight[cs, k] * window[pixel, k]).

    M = C_small, N = pixels, K = KH * KW * 4. `pixels` are one group's: no tile holds two groups. A
    program computes `tiles_per_program` tiles in a row, the first `one_more` programs one more: one
    weight serves them, and the next window is on its way while this one is multiplied. Grid: (tiles
    of C_small, programs).
    """
    wait_for_previous()
    C_small = eighths * 8
    STEPS: tl.constexpr = (KH * KW * 4 + BLOCK_K - 1) // BLOCK_K
    cs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first, tiles = share(tl.program_id(1), tiles_per_program, one_more)
    if STEPS == 1:
        weight = _load_weight(weight_ptr, cs, 0, C_small, C_BIG, KH, KW, BLOCK_K)
    for step in range(0, tiles):
        tile = first + step
        group = tile // tiles_per_group
        p0 = (tile - group * tiles_per_group) * BLOCK_N
        count = tl.minimum(pixels - p0, BLOCK_N)
        column = tl.arange(0, BLOCK_N)
        pixel = group * pixels + p0
        # Columns beyond the group's end read what its last pixel reads.
        corner = _corner(
            pixel + tl.minimum(column, count - 1), image_step, row_step,
            width_magic, width_shift, height_magic, height_shift, STRIDE_W, UNIT,
        )  # fmt: skip
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
        if STEPS == 1:
            window = load_window(padded_ptr, corner, 0, window_step, KH, KW, UNIT, BLOCK_K)
            acc = dot(weight, window.T, acc, PRECISION)
        else:
            for k0 in range(0, STEPS * BLOCK_K, BLOCK_K):
                window = load_window(padded_ptr, corner, k0, window_step, KH, KW, UNIT, BLOCK_K)
                weight = _load_weight(weight_ptr, cs, k0, C_small, C_BIG, KH, KW, BLOCK_K)
                acc = dot(weight, window.T, acc, PRECISION)
        below = acc
        if HAS_BELOW:
            offset = in_bounds(column, column < count)[:, None] * C_small
            channel = run_in_bounds(cs, cs < C_small)
            below = tl.load(
                below_ptr + pixel.to(tl.int64) * C_small + offset + channel[None, :],
                mask=(column < count)[:, None] & (cs < C_small)[None, :],
                other=0.0,
            ).T
        if AT_INPUT:
            acc = gradient_at_input(
                acc, below, count, group, cs, C_small, pixels, vectors_ptr, sums_ptr,
                negative_slope, ACTIVATION,
            )  # fmt: skip
        else:
            acc = finished(
                acc, below, column < count, count, tile, group, cs, C_small, C_small, bias_ptr,
                vectors_ptr, count_ptr, mean_ptr, m2_ptr, sums_ptr, negative_slope, HAS_BIAS,
                HAS_NORM, HAS_STATISTICS, HAS_BELOW, HAS_SUMS, False, ACTIVATION, STORED_DTYPE,
            )  # fmt: skip
        tl.store(
            out_ptr + pixel.to(tl.int64) * C_small + column[:, None] * C_small + cs[None, :],
            acc.to(out_ptr.dtype.element_ty).T,
            mask=(column < count)[:, None] & (cs < C_small)[None, :],
        )


@triton.jit(do_not_specialize=_SUMS_COUNTS)
def norm_sums_image(
    padded_ptr,
    weight_ptr,
    z_ptr,
    vectors_ptr,
    sums_ptr,
    dweight_ptr,
    pixels,
    eighths,
    tiles_per_program,
    one_more,
    image_step,
    row_step,
    window_step,
    width_magic,
    width_shift,
    height_magic,
    height_shift,
    negative_slope,
    C_BIG: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_W: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_WGRAD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORED_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Of g[pixel, cs] = act'(u) * sum over k of weight[cs, k] * window[pixel, k] the sums alone.

    u = (z - mean) * scale + shift is what a batch norm below put out, of z. A program adds up all
    of its pixels, as many as one of `fprop_image`:

        sums[program]      [2, C_small]: of g and of g * xhat, xhat = (z - mean) * rstd
        dweight[program]   [C_small, KH, KW, C_BIG], with HAS_WGRAD: of act(u) * window, wgrad's

    A window is one step: KH * KW * 4 <= BLOCK_K. Grid: (tiles of C_small, programs).
    """
    wait_for_previous()
    tl.static_assert(KH * KW * 4 <= BLOCK_K)
    C_small = eighths * 8
    cs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Channels beyond the end are computed like the first ones, and not stored.
    channel = run_in_bounds(cs, cs < C_small)
    program = tl.program_id(1)
    first, tiles = share(program, tiles_per_program, one_more)
    weight = _load_weight(weight_ptr, cs, 0, C_small, C_BIG, KH, KW, BLOCK_K)
    mean, scale, shift = load_vectors(vectors_ptr, 0, C_small, channel)
    mean, scale, shift = mean[:, None], scale[:, None], shift[:, None]
    AT_ONCE: tl.constexpr = min(BLOCK_N, GRADIENT_AT_ONCE)
    sum_g = tl.zeros((BLOCK_M, AT_ONCE), dtype=ACC_DTYPE)
    sum_g_centred = tl.zeros((BLOCK_M, AT_ONCE), dtype=ACC_DTYPE)
    dweight = tl.zeros((BLOCK_M, BLOCK_K), dtype=ACC_DTYPE)
    for step in range(0, tiles):
        p0 = (first + step) * BLOCK_N
        count = tl.minimum(pixels - p0, BLOCK_N)
        column = tl.arange(0, BLOCK_N)
        exists = column < count
        # Columns beyond the end read what the last pixel reads.
        last = tl.minimum(column, count - 1)
        corner = _corner(
            p0 + last, image_step, row_step,
            width_magic, width_shift, height_magic, height_shift, STRIDE_W, UNIT,
        )  # fmt: skip
        window = load_window(padded_ptr, corner, 0, window_step, KH, KW, UNIT, BLOCK_K)
        z = tl.load(
            z_ptr + p0.to(tl.int64) * C_small + last[:, None] * C_small + channel[None, :]
        ).T
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
        acc = zero_beyond(dot(weight, window.T, acc, PRECISION), exists, count)
        _, sum_g, sum_g_centred = gradient_in_pieces(
            acc, z, sum_g, sum_g_centred, mean, scale, shift, 0.0, 0.0, count, -1, negative_slope,
            True, True, False, ACTIVATION, ACC_DTYPE,
        )  # fmt: skip
        if HAS_WGRAD:
            y = normalized(z, mean, scale, shift, negative_slope, ACTIVATION)
            y = as_stored(y, exists[None, :], z.dtype, STORED_DTYPE)
            dweight = dot(y, window, dweight, PRECISION)

    rstd = tl.load(vectors_ptr + RSTD * C_small + channel)
    sums_ptr += tl.cast(program, tl.int64) * 2 * C_small + cs
    tl.store(sums_ptr, tl.sum(sum_g, axis=1), mask=cs < C_small)
    tl.store(sums_ptr + C_small, tl.sum(sum_g_centred, axis=1) * rstd, mask=cs < C_small)
    if HAS_WGRAD:
        store_dweight(dweight_ptr, dweight, program, 0, cs, C_small, C_BIG, KH, KW, BLOCK_K)


@triton.jit(do_not_specialize=_WGRAD_COUNTS)
def wgrad_image(
    padded_ptr,
    small_ptr,
    y_ptr,
    out_ptr,
    pixels,
    eighths,
    tiles_per_split,
    image_step,
    row_step,
    window_step,
    width_magic,
    width_shift,
    height_magic,
    height_shift,
    negative_slope,
    vectors_ptr,
    group_pixels,
    C_BIG: tl.constexpr,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_W: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_Y: tl.constexpr,
    HAS_NORM: tl.constexpr,
    GROUPED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORED_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    SWAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[split, cs, ky, kx, cb] = sum over the split's pixels of small * window.

    M = C_small, N = KH * KW * 4, K = pixels. With HAS_Y, small is the gradient of y = act(u), and
    is taken times act'(u). With HAS_NORM, small is normalised and activated as it is read, each
    group of `group_pixels` pixels by its own vectors. `sum_partials` adds the splits in a fixed
    order. SWAPPED computes the product's transpose. Grid: (tiles of C_small, tiles of KH * KW * 4,
    splits).
    """
    wait_for_previous()
    C_small = eighths * 8
    cs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = tl.program_id(1) * BLOCK_N
    split = tl.program_id(2)
    # Channels beyond the end read the first ones; their rows are not stored.
    channel = run_in_bounds(cs, cs < C_small)
    if HAS_NORM:
        tl.static_assert(not HAS_Y)
        group = tl.minimum(split * tiles_per_split * BLOCK_K, pixels - 1) // group_pixels
        mean, scale, shift = load_vectors(vectors_ptr, group, C_small, channel)
    if SWAPPED:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=ACC_DTYPE)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
    for step in range(0, tiles_per_split):
        p = (split * tiles_per_split + step) * BLOCK_K + tl.arange(0, BLOCK_K)
        pixel = tl.minimum(p, pixels - 1)
        corner = _corner(
            pixel, image_step, row_step,
            width_magic, width_shift, height_magic, height_shift, STRIDE_W, UNIT,
        )  # fmt: skip
        window = load_window(padded_ptr, corner, k0, window_step, KH, KW, UNIT, BLOCK_N)
        offset = pixel.to(tl.int64)[:, None] * C_small + channel[None, :]
        inside = (p < pixels)[:, None]
        small = tl.load(small_ptr + offset, mask=inside, other=0.0)
        if HAS_Y:
            y = tl.load(y_ptr + offset, mask=inside, other=0.0)
            small = activation_backward(
                small.to(ACC_DTYPE), y.to(ACC_DTYPE), negative_slope, ACTIVATION
            ).to(small.dtype)
        if HAS_NORM:
            first = (split * tiles_per_split + step) * BLOCK_K
            normal = normalized_rows(
                small, p, first, tl.minimum(first + BLOCK_K, pixels) - 1, group_pixels, group,
                mean, scale, shift, vectors_ptr, C_small, channel, negative_slope, GROUPED,
                ACTIVATION,
            )  # fmt: skip
            small = as_stored(normal, inside, small.dtype, STORED_DTYPE)
        if SWAPPED:
            acc = dot(window.T, small, acc, PRECISION)
        else:
            acc = dot(small.T, window, acc, PRECISION)
    if SWAPPED:
        acc = acc.T
    store_dweight(out_ptr, acc, split, k0, cs, C_small, C_BIG, KH, KW, BLOCK_N)


@triton.jit
def store_dweight(
    out_ptr, acc, part, k0, cs, C_small, C_BIG: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """out[part, cs, k0 and on] = acc[cs, k], where k is a tap and a channel."""
    k = k0 + tl.arange(0, BLOCK)
    in_kernel = (k < KH * KW * 4) & (k % 4 < C_BIG)
    column = k // 4 * C_BIG + k % 4
    row = tl.cast(part, tl.int64) * C_small + cs
    tl.store(
        out_ptr + row[:, None] * (KH * KW * C_BIG) + column[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(cs < C_small)[:, None] & in_kernel[None, :],
    )


@triton.jit
def share(program, tiles_per_program, one_more):
    """The first of a program's tiles, and how many it has: the first `one_more` have one more."""
    first = program * tiles_per_program + tl.minimum(program, one_more)
    return first, tiles_per_program + (program < one_more).to(tl.int32)


@triton.jit
def _quotient(n, magic, shift):
    """n // divisor by a multiplication: magic = ceil(2^(30 + shift) / divisor), 0 <= n < 2^30.

    shift is the smallest with divisor <= 2^shift: magic exceeds the exact factor by less than
    divisor / 2^(30 + shift), at most 2^-30, which n multiplies to less than one divisor-th.
    """
    return (tl.umulhi(n.to(tl.uint32) * 4, tl.cast(magic, tl.uint32)) >> shift).to(tl.int32)


@triton.jit
def _corner(
    pixel, image_step, row_step, width_magic, width_shift, height_magic, height_shift,
    STRIDE_W: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Where the windows of small's pixels begin in the padded images, in elements.

    pixel = (n * H + y) * W + x begins at pixel * STRIDE_W * 4, and in addition `row_step` units for
    every row before it and `image_step` units for every image.
    """
    row = _quotient(pixel, width_magic, width_shift)
    n = _quotient(row, height_magic, height_shift)
    units = (
        n.to(tl.int64) * image_step
        + row.to(tl.int64) * row_step
        + pixel.to(tl.int64) * (STRIDE_W * 4 // UNIT)
    )
    return units * UNIT


@triton.jit
def load_window(
    padded_ptr, corner, k0, window_step, KH: tl.constexpr, KW: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """window[pixel, k0 and on]: runs of KW * 4 elements, `window_step` units apart; then zeros."""
    k = k0 + tl.arange(0, BLOCK_K)
    offset = (k // (KW * 4) * window_step * UNIT + k % (KW * 4)).to(tl.int64)
    if KH * KW * 4 % BLOCK_K == 0:
        window = tl.load(padded_ptr + corner[:, None] + offset[None, :])
    else:
        in_kernel = k < KH * KW * 4
        # Whole pixels are in the kernel or not.
        offset = tl.max_contiguous(tl.multiple_of(tl.where(in_kernel, offset, 0), 4), 4)
        window = tl.load(
            padded_ptr + corner[:, None] + offset[None, :], mask=in_kernel[None, :], other=0.0
        )
    return window


@triton.jit
def _load_weight(
    weight_ptr, cs, k0, C_small, C_BIG: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """weight[cs, k0 and on], zeros where k is no tap or no channel."""
    k = k0 + tl.arange(0, BLOCK_K)
    in_kernel = (k < KH * KW * 4) & (k % 4 < C_BIG)
    column = k // 4 * C_BIG + k % 4
    inside = (cs < C_small)[:, None] & in_kernel[None, :]
    offset = cs[:, None] * (KH * KW * C_BIG) + column[None, :]
    return tl.load(weight_ptr + in_bounds(offset, inside), mask=inside, other=0.0)
