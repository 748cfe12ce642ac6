"""Batch norm around the convolution: combine statistics, normalise + activate, and the backward.

Activations are seen as a matrix [rows, channels], rows being the N * H * W pixels. What is known of
the channels travels as one matrix `vectors` [5, channels] in the accumulator's dtype, whose rows
the constants below name.
"""

import triton
import triton.language as tl

from .activation import activate, activation_backward

MEAN = tl.constexpr(0)
UNBIASED_VAR = tl.constexpr(1)
RSTD = tl.constexpr(2)  # 1 / sqrt(biased var + eps)
SCALE = tl.constexpr(3)  # gamma * rstd
SHIFT = tl.constexpr(4)  # beta


@triton.jit
def combine_statistics(
    count_ptr,
    mean_ptr,
    m2_ptr,
    out_count_ptr,
    out_mean_ptr,
    out_m2_ptr,
    vectors_ptr,
    gamma_ptr,
    beta_ptr,
    parts,
    channels,
    parts_per_count,
    chunk,
    eps,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    FINAL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Combine the statistics of `chunk` parts; FINAL, of all parts, gives `vectors`.

    With counts n_i, means m_i and M2_i: mean = sum n_i m_i / sum n_i and M2 = sum M2_i +
    sum n_i (m_i - mean)^2 (Chan, Golub and LeVeque, 1983). Two passes over few numbers, which
    never subtracts large squares, and a fixed order. `parts_per_count` parts in a row share a
    count. Grid: (tiles of channels, chunks).
    """
    chunk_id = tl.program_id(1)
    first = chunk_id * chunk
    last = tl.minimum(first + chunk, parts)
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_c = c < channels
    dtype: tl.constexpr = mean_ptr.dtype.element_ty

    total = tl.zeros((BLOCK_P,), dtype=dtype)
    weighted = tl.zeros((BLOCK_P, BLOCK_C), dtype=dtype)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < last)[:, None] & in_c[None, :]
        offset = p[:, None].to(tl.int64) * channels + c[None, :]
        n = tl.load(count_ptr + p // parts_per_count, mask=p < last, other=0.0)
        total += n
        weighted += n[:, None] * tl.load(mean_ptr + offset, mask=inside, other=0.0)
    count = tl.sum(total, axis=0)
    mean = tl.sum(weighted, axis=0) / tl.maximum(count, 1.0)

    squares = tl.zeros((BLOCK_P, BLOCK_C), dtype=dtype)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        inside = (p < last)[:, None] & in_c[None, :]
        offset = p[:, None].to(tl.int64) * channels + c[None, :]
        n = tl.load(count_ptr + p // parts_per_count, mask=p < last, other=0.0)
        deviation = tl.load(mean_ptr + offset, mask=inside, other=0.0) - mean[None, :]
        squares += tl.load(m2_ptr + offset, mask=inside, other=0.0)
        squares += n[:, None] * deviation * deviation
    m2 = tl.sum(squares, axis=0)

    if FINAL:
        rstd = 1.0 / tl.sqrt(m2 / count + eps)
        scale = rstd
        if HAS_GAMMA:
            scale = rstd * tl.load(gamma_ptr + c, mask=in_c, other=0.0).to(dtype)
        shift = tl.zeros((BLOCK_C,), dtype=dtype)
        if HAS_BETA:
            shift += tl.load(beta_ptr + c, mask=in_c, other=0.0).to(dtype)
        tl.store(vectors_ptr + MEAN * channels + c, mean, mask=in_c)
        tl.store(vectors_ptr + UNBIASED_VAR * channels + c, m2 / (count - 1.0), mask=in_c)
        tl.store(vectors_ptr + RSTD * channels + c, rstd, mask=in_c)
        tl.store(vectors_ptr + SCALE * channels + c, scale, mask=in_c)
        tl.store(vectors_ptr + SHIFT * channels + c, shift, mask=in_c)
    else:
        out = chunk_id.to(tl.int64) * channels + c
        tl.store(out_mean_ptr + out, mean, mask=in_c)
        tl.store(out_m2_ptr + out, m2, mask=in_c)
        tl.store(out_count_ptr + chunk_id, count)


@triton.jit
def normalize_activate(
    z_ptr,
    vectors_ptr,
    y_ptr,
    rows,
    channels,
    negative_slope,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = act((z - mean) * scale + shift). Grid: (tiles of rows, tiles of channels).

    The mean is subtracted first: folding it into the shift loses the digits that mean and z share.
    """
    c, offset, inside = _tile(rows, channels, BLOCK_R, BLOCK_C)
    u, _ = _normalize(z_ptr, vectors_ptr, channels, c, offset, inside)
    y = activate(u, negative_slope, ACTIVATION)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_reduce(
    dy_ptr,
    z_ptr,
    vectors_ptr,
    partials_ptr,
    rows,
    channels,
    negative_slope,
    tiles_per_part,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partials[part, 0] = sum of g and partials[part, 1] = sum of g * xhat over the part's rows.

    g = dy * act'(u) and xhat = (z - mean) * rstd: over all rows the sums are dbeta and dgamma
    (Ioffe and Szegedy, 2015). Grid: (parts, tiles of channels).
    """
    part = tl.program_id(0)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    dtype: tl.constexpr = vectors_ptr.dtype.element_ty
    sum_g = tl.zeros((BLOCK_R, BLOCK_C), dtype=dtype)
    sum_g_xhat = tl.zeros((BLOCK_R, BLOCK_C), dtype=dtype)
    for step in range(0, tiles_per_part):
        row = (part * tiles_per_part + step).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        inside = (row < rows)[:, None] & (c < channels)[None, :]
        offset = row[:, None] * channels + c[None, :]
        g, xhat = _gradient_at_norm(
            dy_ptr, z_ptr, vectors_ptr, channels, c, offset, inside, negative_slope, ACTIVATION
        )
        sum_g += tl.where(inside, g, 0.0)
        sum_g_xhat += tl.where(inside, g * xhat, 0.0)
    out = partials_ptr + part.to(tl.int64) * 2 * channels + c
    tl.store(out, tl.sum(sum_g, axis=0), mask=c < channels)
    tl.store(out + channels, tl.sum(sum_g_xhat, axis=0), mask=c < channels)


@triton.jit
def norm_backward(
    dy_ptr,
    z_ptr,
    vectors_ptr,
    sums_ptr,
    dz_ptr,
    rows,
    channels,
    negative_slope,
    TRAINING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dz = scale * (g - dbeta / rows - xhat * dgamma / rows); scale * g where statistics are fixed.

    `sums` is [2, channels]: dbeta and dgamma. Grid: (tiles of rows, tiles of channels).
    """
    c, offset, inside = _tile(rows, channels, BLOCK_R, BLOCK_C)
    g, xhat = _gradient_at_norm(
        dy_ptr, z_ptr, vectors_ptr, channels, c, offset, inside, negative_slope, ACTIVATION
    )
    if TRAINING:
        in_c = c < channels
        mean_g = tl.load(sums_ptr + c, mask=in_c, other=0.0) / rows
        mean_g_xhat = tl.load(sums_ptr + channels + c, mask=in_c, other=0.0) / rows
        g = g - mean_g[None, :] - xhat * mean_g_xhat[None, :]
    scale = tl.load(vectors_ptr + SCALE * channels + c, mask=c < channels, other=0.0)
    tl.store(dz_ptr + offset, (g * scale[None, :]).to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def activation_backward_from_output(
    dy_ptr,
    y_ptr,
    du_ptr,
    length,
    negative_slope,
    ACC_DTYPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """du = dy * act'(u) elementwise, for blocks without batch norm. Grid: (tiles of length)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dy = tl.load(dy_ptr + i, mask=i < length, other=0.0).to(ACC_DTYPE)
    y = tl.load(y_ptr + i, mask=i < length, other=0.0).to(ACC_DTYPE)
    du = activation_backward(dy, y, negative_slope, ACTIVATION)
    tl.store(du_ptr + i, du.to(du_ptr.dtype.element_ty), mask=i < length)


@triton.jit
def _tile(rows, channels, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """This program's channels, its elements' offsets and whether they exist."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (c < channels)[None, :]
    return c, row[:, None] * channels + c[None, :], inside


@triton.jit
def _normalize(z_ptr, vectors_ptr, channels, c, offset, inside):
    """u = (z - mean) * scale + shift, and z - mean."""
    in_c = c < channels
    mean = tl.load(vectors_ptr + MEAN * channels + c, mask=in_c, other=0.0)
    scale = tl.load(vectors_ptr + SCALE * channels + c, mask=in_c, other=0.0)
    shift = tl.load(vectors_ptr + SHIFT * channels + c, mask=in_c, other=0.0)
    z = tl.load(z_ptr + offset, mask=inside, other=0.0).to(mean.dtype)
    centred = z - mean[None, :]
    return centred * scale[None, :] + shift[None, :], centred


@triton.jit
def _gradient_at_norm(
    dy_ptr, z_ptr, vectors_ptr, channels, c, offset, inside, negative_slope,
    ACTIVATION: tl.constexpr,
):  # fmt: skip
    """g = dy * act'(u), the gradient at the norm's output, and xhat; both recomputed from z."""
    u, centred = _normalize(z_ptr, vectors_ptr, channels, c, offset, inside)
    dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(u.dtype)
    y = activate(u, negative_slope, ACTIVATION)
    rstd = tl.load(vectors_ptr + RSTD * channels + c, mask=c < channels, other=0.0)
    return activation_backward(dy, y, negative_slope, ACTIVATION), centred * rstd[None, :]
