"""Batch, instance and group norm: combine statistics, normalise + activate, and the backward.

Activations are seen as a matrix [rows, channels], rows being the N * H * W pixels. The batch is one
or more groups of `rows` rows, each normalised by statistics of its own; for instance norm (Ulyanov
et al., 2016) each image is one. Group norm (Wu and He, 2018) is that too, but every `span` channels
in a row share mean and variance. What is known of a group's channels travels as vectors[group] [5,
channels] in the accumulator's dtype, whose rows the constants below name.

The matrix lies in memory row by row, channels_last; or, with PLANES, as PyTorch's contiguous
tensors do, the `pixels` of a channel of an image in a row. A tile then holds pixels of one image.

Numbers that change with the batch do not specialise a kernel: the last, smaller batch of an epoch
would compile all of them anew. Only channels decide about vector loads.
"""

import triton
import triton.language as tl

from .activation import activate, activation_backward, activation_backward_at
from .loading import in_bounds, run_in_bounds
from .overlap import wait_for_previous

MEAN = tl.constexpr(0)
UNBIASED_VAR = tl.constexpr(1)
RSTD = tl.constexpr(2)  # 1 / sqrt(biased var + eps)
SCALE = tl.constexpr(3)  # gamma * rstd
SHIFT = tl.constexpr(4)  # beta


@triton.jit(do_not_specialize=["parts", "chunk"])
def combine_statistics(
    count_ptr,
    mean_ptr,
    m2_ptr,
    out_count_ptr,
    out_mean_ptr,
    out_m2_ptr,
    parts,
    channels,
    parts_per_count,
    chunk,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Combine every `chunk` of a group's `parts` statistics into one, for very many parts.

    Grid: (tiles of channels, chunks of a group, groups).
    """
    wait_for_previous()
    chunk_id = tl.program_id(1)
    group = tl.program_id(2)
    c, in_c = _channels(tl.program_id(0), channels, BLOCK_C)
    first = chunk_id * chunk
    count, mean, m2 = _combine(
        count_ptr, mean_ptr, m2_ptr, group * parts + first, group * parts + tl.minimum(
            first + chunk, parts
        ), channels, parts_per_count, c, in_c, BLOCK_P, BLOCK_C,
    )  # fmt: skip
    part = group * tl.num_programs(1) + chunk_id
    out = part.to(tl.int64) * channels + c
    tl.store(out_mean_ptr + out, mean, mask=in_c)
    tl.store(out_m2_ptr + out, m2, mask=in_c)
    tl.store(out_count_ptr + part, count)


@triton.jit(do_not_specialize=["rows", "tiles_per_part"])
def tile_statistics(
    z_ptr,
    count_ptr,
    mean_ptr,
    m2_ptr,
    rows,
    channels,
    pixels,
    tiles_per_part,
    PLANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Count, mean and M2 of each part of a group's rows, for a z that no kernel of ours computed.

    Each of the tile's rows follows its own mean (Welford, 1962); at the end they are combined as in
    `_combine`. Grid: (parts of a group, tiles of channels, groups).
    """
    wait_for_previous()
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    part = tl.program_id(0)
    group = tl.program_id(2).to(tl.int64)
    c, in_c = _channels(tl.program_id(1), channels, BLOCK_C)
    count = tl.zeros((BLOCK_R,), dtype=dtype)
    mean = tl.zeros((BLOCK_R, BLOCK_C), dtype=dtype)
    m2 = tl.zeros((BLOCK_R, BLOCK_C), dtype=dtype)
    for step in range(0, tiles_per_part):
        start, offset, exists, inside = _tile(
            part * tiles_per_part + step, group, rows, channels, pixels, c, in_c, BLOCK_R, PLANES
        )
        z = tl.load(z_ptr + start + offset, mask=inside, other=0.0).to(dtype)
        count += exists.to(dtype)
        deviation = tl.where(inside, z - mean, 0.0)
        mean += deviation / tl.maximum(count, 1.0)[:, None]
        m2 += deviation * tl.where(inside, z - mean, 0.0)
    total = tl.sum(count, axis=0)
    centre = tl.sum(count[:, None] * mean, axis=0) / tl.maximum(total, 1.0)
    deviation = mean - centre[None, :]
    squares = m2 + count[:, None] * deviation * deviation
    out = group * tl.num_programs(0) + part
    tl.store(mean_ptr + out * channels + c, centre, mask=in_c)
    tl.store(m2_ptr + out * channels + c, tl.sum(squares, axis=0), mask=in_c)
    # Every tile of channels stores the same count, so no one needs to be chosen.
    tl.store(count_ptr + out, total)


@triton.jit(do_not_specialize=["groups", "parts"])
def batch_statistics(
    count_ptr,
    mean_ptr,
    m2_ptr,
    vectors_ptr,
    gamma_ptr,
    beta_ptr,
    running_mean_ptr,
    running_var_ptr,
    counter_ptr,
    groups,
    parts,
    channels,
    parts_per_count,
    eps,
    momentum,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_RUNNING: tl.constexpr,
    HAS_COUNTER: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Combine each group's `parts` statistics into vectors[group], and move running statistics.

    Those move once for each group, in order, as if the groups were batches that came one after
    another, and the counter of batches by as many: then one program sees all of them. Grid: (tiles
    of channels, all groups / `groups`).
    """
    wait_for_previous()
    c, in_c = _channels(tl.program_id(0), channels, BLOCK_C)
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    gamma, beta = _affine(gamma_ptr, beta_ptr, c, in_c, dtype, HAS_GAMMA, HAS_BETA, BLOCK_C)
    running_mean = tl.zeros((BLOCK_C,), dtype=dtype)
    running_var = tl.zeros((BLOCK_C,), dtype=dtype)
    if HAS_RUNNING:
        running_mean = tl.load(running_mean_ptr + c, mask=in_c, other=0.0).to(dtype)
        running_var = tl.load(running_var_ptr + c, mask=in_c, other=0.0).to(dtype)
    first_group = tl.program_id(1) * groups
    for group in range(first_group, first_group + groups):
        count, mean, m2 = _combine(
            count_ptr, mean_ptr, m2_ptr, group * parts, (group + 1) * parts,
            channels, parts_per_count, c, in_c, BLOCK_P, BLOCK_C,
        )  # fmt: skip
        unbiased_var = m2 / tl.maximum(count - 1.0, 1.0)
        rstd = 1.0 / tl.sqrt(m2 / count + eps)
        out = vectors_ptr + tl.cast(group, tl.int64) * 5 * channels + c
        _store_vectors(out, channels, mean, unbiased_var, rstd, gamma, beta, in_c)
        running_mean = running_mean * (1.0 - momentum) + mean * momentum
        running_var = running_var * (1.0 - momentum) + unbiased_var * momentum
    if HAS_RUNNING:
        tl.store(
            running_mean_ptr + c, running_mean.to(running_mean_ptr.dtype.element_ty), mask=in_c
        )
        tl.store(running_var_ptr + c, running_var.to(running_var_ptr.dtype.element_ty), mask=in_c)
    if HAS_COUNTER:
        # Only the first program's channels hold channel 0.
        first = tl.program_id(0) == 0
        tl.store(counter_ptr, tl.load(counter_ptr) + groups, mask=first)


@triton.jit
def _affine(
    gamma_ptr, beta_ptr, c, in_c, dtype: tl.constexpr, HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """gamma and beta of channels c, where absent 1 and 0."""
    gamma = tl.full((BLOCK_C,), 1.0, dtype=dtype)
    beta = tl.zeros((BLOCK_C,), dtype=dtype)
    if HAS_GAMMA:
        gamma = tl.load(gamma_ptr + c, mask=in_c, other=0.0).to(dtype)
    if HAS_BETA:
        beta = tl.load(beta_ptr + c, mask=in_c, other=0.0).to(dtype)
    return gamma, beta


@triton.jit
def _store_vectors(out, channels, mean, unbiased_var, rstd, gamma, beta, in_c):
    """The five rows of a group's vectors, `out` being the first row of the channels meant."""
    tl.store(out + MEAN * channels, mean, mask=in_c)
    tl.store(out + UNBIASED_VAR * channels, unbiased_var, mask=in_c)
    tl.store(out + RSTD * channels, rstd, mask=in_c)
    tl.store(out + SCALE * channels, rstd * gamma, mask=in_c)
    tl.store(out + SHIFT * channels, beta, mask=in_c)


@triton.jit
def _combine(
    count_ptr, mean_ptr, m2_ptr, first, last, channels, parts_per_count, c, in_c,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Count, and mean and M2 of `_channels` c, over parts `first` to before `last`.

    With counts n_i, means m_i and M2_i: mean = sum n_i m_i / sum n_i and M2 = sum M2_i +
    sum n_i (m_i - mean)^2 (Chan, Golub and LeVeque, 1983). Two passes over few numbers, which
    never subtracts large squares, and a fixed order. `parts_per_count` parts in a row share a
    count.
    """
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    total = tl.zeros((BLOCK_P,), dtype=dtype)
    weighted = tl.zeros((BLOCK_P, BLOCK_C), dtype=dtype)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        exists = p < last
        inside = exists[:, None] & in_c[None, :]
        p = in_bounds(p, exists)
        offset = p[:, None].to(tl.int64) * channels + c[None, :]
        n = tl.load(count_ptr + p // parts_per_count, mask=exists, other=0.0)
        total += n
        weighted += n[:, None] * tl.load(mean_ptr + offset, mask=inside, other=0.0)
    count = tl.sum(total, axis=0)
    mean = tl.sum(weighted, axis=0) / tl.maximum(count, 1.0)

    squares = tl.zeros((BLOCK_P, BLOCK_C), dtype=dtype)
    for start in range(first, last, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        exists = p < last
        inside = exists[:, None] & in_c[None, :]
        p = in_bounds(p, exists)
        offset = p[:, None].to(tl.int64) * channels + c[None, :]
        n = tl.load(count_ptr + p // parts_per_count, mask=exists, other=0.0)
        deviation = tl.load(mean_ptr + offset, mask=inside, other=0.0) - mean[None, :]
        squares += tl.load(m2_ptr + offset, mask=inside, other=0.0)
        squares += n[:, None] * deviation * deviation
    return count, mean, tl.sum(squares, axis=0)


@triton.jit(do_not_specialize=["parts"])
def shared_statistics(
    count_ptr,
    mean_ptr,
    m2_ptr,
    vectors_ptr,
    gamma_ptr,
    beta_ptr,
    parts,
    channels,
    span,
    parts_per_count,
    eps,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Combine each group's `parts` statistics of every `span` channels into vectors[group].

    As `_combine`, over parts and channels, each channel with the count of its part: group norm's
    statistics (Wu and He, 2018), which all channels of a span get. Grid: (channels / span, groups).
    """
    wait_for_previous()
    first_c = tl.program_id(0) * span
    group = tl.program_id(1)
    dtype: tl.constexpr = mean_ptr.dtype.element_ty
    length = parts * span
    total = tl.zeros((BLOCK,), dtype=dtype)
    weighted = tl.zeros((BLOCK,), dtype=dtype)
    for start in range(0, length, BLOCK):
        part, c, exists = _of_span(start, length, group, parts, first_c, span, BLOCK)
        offset = part.to(tl.int64) * channels + c
        n = tl.load(count_ptr + part // parts_per_count, mask=exists, other=0.0)
        total += n
        weighted += n * tl.load(mean_ptr + offset, mask=exists, other=0.0)
    count = tl.sum(total, axis=0)
    mean = tl.sum(weighted, axis=0) / tl.maximum(count, 1.0)

    squares = tl.zeros((BLOCK,), dtype=dtype)
    for start in range(0, length, BLOCK):
        part, c, exists = _of_span(start, length, group, parts, first_c, span, BLOCK)
        offset = part.to(tl.int64) * channels + c
        n = tl.load(count_ptr + part // parts_per_count, mask=exists, other=0.0)
        deviation = tl.load(mean_ptr + offset, mask=exists, other=0.0) - mean
        squares += tl.load(m2_ptr + offset, mask=exists, other=0.0) + n * deviation * deviation
    m2 = tl.sum(squares, axis=0)
    rstd = 1.0 / tl.sqrt(m2 / count + eps)
    for first in range(0, span, BLOCK_C):
        i = first + tl.arange(0, BLOCK_C)
        in_c = i < span
        c = first_c + in_bounds(i, in_c)
        gamma, beta = _affine(gamma_ptr, beta_ptr, c, in_c, dtype, HAS_GAMMA, HAS_BETA, BLOCK_C)
        out = vectors_ptr + tl.cast(group, tl.int64) * 5 * channels + c
        unbiased_var = m2 / tl.maximum(count - 1.0, 1.0)
        alike = tl.zeros((BLOCK_C,), dtype=dtype)
        _store_vectors(
            out, channels, alike + mean, alike + unbiased_var, alike + rstd, gamma, beta, in_c
        )


@triton.jit(do_not_specialize=["rows", "parts"])
def shared_sums(
    sums_ptr,
    vectors_ptr,
    out_ptr,
    rows,
    parts,
    channels,
    span,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What `norm_backward` takes off where every `span` channels share statistics: [2, channels].

    sums[group] is [parts, 2, channels]. Of the span's channels and rows, out[group] has the means
    of scale * g and of scale * g * xhat, all channels of a span the same. With dxhat = gamma * g,
    and scale = gamma * rstd, they are rstd times the means in dz = rstd * (dxhat - mean(dxhat) -
    xhat * mean(dxhat * xhat)), the gradient of group norm, which is batch norm's (Ioffe and
    Szegedy, 2015) over a span. Grid: (channels / span, groups).
    """
    wait_for_previous()
    first_c = tl.program_id(0) * span
    group = tl.program_id(1)
    vectors_ptr += tl.cast(group, tl.int64) * 5 * channels
    dtype: tl.constexpr = vectors_ptr.dtype.element_ty
    length = parts * span
    sum_g = tl.zeros((BLOCK,), dtype=dtype)
    sum_g_xhat = tl.zeros((BLOCK,), dtype=dtype)
    for start in range(0, length, BLOCK):
        part, c, exists = _of_span(start, length, group, parts, first_c, span, BLOCK)
        offset = part.to(tl.int64) * 2 * channels + c
        scale = tl.load(vectors_ptr + SCALE * channels + c, mask=exists, other=0.0)
        sum_g += scale * tl.load(sums_ptr + offset, mask=exists, other=0.0)
        sum_g_xhat += scale * tl.load(sums_ptr + channels + offset, mask=exists, other=0.0)
    count = rows.to(dtype) * span
    mean_g = tl.sum(sum_g, axis=0) / count
    mean_g_xhat = tl.sum(sum_g_xhat, axis=0) / count
    for first in range(0, span, BLOCK_C):
        i = first + tl.arange(0, BLOCK_C)
        in_c = i < span
        out = out_ptr + tl.cast(group, tl.int64) * 2 * channels + first_c + in_bounds(i, in_c)
        all_alike = tl.zeros((BLOCK_C,), dtype=dtype)
        tl.store(out, all_alike + mean_g, mask=in_c)
        tl.store(out + channels, all_alike + mean_g_xhat, mask=in_c)


@triton.jit
def _of_span(start, length, group, parts, first_c, span, BLOCK: tl.constexpr):
    """Of BLOCK pairs of a group's part and a span's channel, from `start` to before `length`: the
    part among those of all groups, the channel, and whether the pair exists."""
    i = start + tl.arange(0, BLOCK)
    exists = i < length
    i = in_bounds(i, exists)
    return group * parts + i // span, first_c + i % span, exists


@triton.jit
def known_statistics(
    running_mean_ptr,
    running_var_ptr,
    gamma_ptr,
    beta_ptr,
    vectors_ptr,
    channels,
    eps,
    HAS_GAMMA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """vectors [5, channels] of statistics that are given. Grid: (tiles of channels,)."""
    wait_for_previous()
    c, in_c = _channels(tl.program_id(0), channels, BLOCK_C)
    dtype: tl.constexpr = vectors_ptr.dtype.element_ty
    mean = tl.load(running_mean_ptr + c, mask=in_c, other=0.0).to(dtype)
    var = tl.load(running_var_ptr + c, mask=in_c, other=1.0).to(dtype)
    gamma, beta = _affine(gamma_ptr, beta_ptr, c, in_c, dtype, HAS_GAMMA, HAS_BETA, BLOCK_C)
    rstd = 1.0 / tl.sqrt(var + eps)
    out = vectors_ptr + c
    _store_vectors(out, channels, mean, var, rstd, gamma, beta, in_c)


@triton.jit(do_not_specialize=["rows"])
def normalize_activate(
    z_ptr,
    vectors_ptr,
    y_ptr,
    slope_ptr,
    added_ptr,
    rows,
    channels,
    pixels,
    negative_slope,
    slope_step,
    HAS_ADDED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = act((z - mean) * scale + shift). Grid: (tiles of a group's rows, of channels, groups).

    With HAS_ADDED what lies at added_ptr, as z does, is added before the activation. The mean is
    subtracted first: folding it into the shift loses the digits that mean and z share.
    """
    wait_for_previous()
    group = tl.program_id(2)
    vectors_ptr += tl.cast(group, tl.int64) * 5 * channels
    c, in_c = _channels(tl.program_id(1), channels, BLOCK_C)
    start, offset, _, inside = _tile(
        tl.program_id(0), group, rows, channels, pixels, c, in_c, BLOCK_R, PLANES
    )
    u, _ = _normalize(z_ptr + start, vectors_ptr, channels, c, in_c, offset, inside)
    if HAS_ADDED:
        u += tl.load(added_ptr + start + offset, mask=inside, other=0.0).to(u.dtype)
    y = _activate(u, negative_slope, slope_ptr, slope_step, c, in_c, ACTIVATION)
    tl.store(y_ptr + start + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "tiles_per_part"])
def norm_backward_reduce(
    dy_ptr,
    z_ptr,
    vectors_ptr,
    partials_ptr,
    slope_ptr,
    slope_partials_ptr,
    rows,
    channels,
    pixels,
    negative_slope,
    slope_step,
    tiles_per_part,
    ACTIVATION: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partials[group, part]: the sums of g, and of g * xhat, over the part's rows, [2, channels].

    g = dy * act'(u) and xhat = (z - mean) * rstd: over all rows the sums are dbeta and dgamma
    (Ioffe and Szegedy, 2015). For "prelu" also slope_partials[group, part], [channels]: the sums of
    dy * min(u, 0), which over all rows are the gradients of the slopes (He et al., 2015). Grid:
    (parts of a group, tiles of channels, groups).
    """
    wait_for_previous()
    part = tl.program_id(0)
    group = tl.program_id(2)
    vectors_ptr += tl.cast(group, tl.int64) * 5 * channels
    c, in_c = _channels(tl.program_id(1), channels, BLOCK_C)
    dtype: tl.constexpr = vectors_ptr.dtype.element_ty
    sum_g = tl.zeros((BLOCK_R, BLOCK_C), dtype=dtype)
    sum_g_xhat = tl.zeros((BLOCK_R, BLOCK_C), dtype=dtype)
    sum_slope = tl.zeros((BLOCK_R, BLOCK_C), dtype=dtype)
    for step in range(0, tiles_per_part):
        start, offset, _, inside = _tile(
            part * tiles_per_part + step, group, rows, channels, pixels, c, in_c, BLOCK_R, PLANES
        )
        g, xhat, u, dy = _gradient_at_norm(
            dy_ptr + start, z_ptr + start, vectors_ptr, channels, c, in_c, offset, inside,
            negative_slope, slope_ptr, slope_step, ACTIVATION, False,
        )  # fmt: skip
        sum_g += tl.where(inside, g, 0.0)
        sum_g_xhat += tl.where(inside, g * xhat, 0.0)
        if ACTIVATION == "prelu":
            sum_slope += tl.where(inside & (u <= 0), dy * u, 0.0)
    part += group * tl.num_programs(0)
    out = partials_ptr + part.to(tl.int64) * 2 * channels + c
    tl.store(out, tl.sum(sum_g, axis=0), mask=in_c)
    tl.store(out + channels, tl.sum(sum_g_xhat, axis=0), mask=in_c)
    if ACTIVATION == "prelu":
        out = slope_partials_ptr + part.to(tl.int64) * channels + c
        tl.store(out, tl.sum(sum_slope, axis=0), mask=in_c)


@triton.jit(do_not_specialize=["rows", "parts", "groups"])
def norm_backward(
    dy_ptr,
    z_ptr,
    vectors_ptr,
    sums_ptr,
    total_ptr,
    dz_ptr,
    y_ptr,
    slope_ptr,
    rows,
    channels,
    pixels,
    negative_slope,
    slope_step,
    parts,
    groups,
    TRAINING: tl.constexpr,
    SHARED: tl.constexpr,
    AT_NORM: tl.constexpr,
    WRITES_Y: tl.constexpr,
    WRITES_TOTAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dz = scale * (g - dbeta / rows - xhat * dgamma / rows); scale * g where statistics are fixed.

    AT_NORM: dy is g already. WRITES_Y: y = act(u) is written too, for who was not given it to keep.
    sums[group] is [parts, 2, channels]: parts, few of them, of the group's dbeta and dgamma. With
    WRITES_TOTAL the first program of a tile of channels also writes their total over groups, few of
    them too, [2, channels]. SHARED: channels share statistics, and sums is what `shared_sums`
    gives. Grid: (tiles of a group's rows, tiles of channels, groups).
    """
    wait_for_previous()
    group = tl.program_id(2)
    vectors_ptr += tl.cast(group, tl.int64) * 5 * channels
    c, in_c = _channels(tl.program_id(1), channels, BLOCK_C)
    start, offset, _, inside = _tile(
        tl.program_id(0), group, rows, channels, pixels, c, in_c, BLOCK_R, PLANES
    )
    if WRITES_TOTAL:
        is_first = (tl.program_id(0) == 0) & (group == 0)
        if is_first:
            _store_total(sums_ptr, total_ptr, groups, parts, channels, c, in_c, BLOCK_P)
    g, xhat, u, _ = _gradient_at_norm(
        dy_ptr + start, z_ptr + start, vectors_ptr, channels, c, in_c, offset, inside,
        negative_slope, slope_ptr, slope_step, ACTIVATION, AT_NORM,
    )  # fmt: skip
    if WRITES_Y:
        y = _activate(u, negative_slope, slope_ptr, slope_step, c, in_c, ACTIVATION)
        tl.store(y_ptr + start + offset, y.to(y_ptr.dtype.element_ty), mask=inside)
    dz = _at_input(
        g, xhat, sums_ptr, vectors_ptr, group, rows, parts, channels, c, in_c,
        TRAINING, SHARED, BLOCK_P,
    )  # fmt: skip
    tl.store(dz_ptr + start + offset, dz.to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _store_total(sums_ptr, total_ptr, groups, parts, channels, c, in_c, BLOCK_P: tl.constexpr):
    """total[2, channels]: the sums of `_channels` c over all groups and their parts."""
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    total_g = tl.zeros((c.shape[0],), dtype=dtype)
    total_g_xhat = tl.zeros((c.shape[0],), dtype=dtype)
    for other in range(0, groups):
        sum_g, sum_g_xhat = _sums_of_parts(sums_ptr, other, parts, channels, c, in_c, BLOCK_P)
        total_g += sum_g
        total_g_xhat += sum_g_xhat
    tl.store(total_ptr + c, total_g, mask=in_c)
    tl.store(total_ptr + channels + c, total_g_xhat, mask=in_c)


@triton.jit
def _at_input(
    g, xhat, sums_ptr, vectors_ptr, group, rows, parts, channels, c, in_c,
    TRAINING: tl.constexpr, SHARED: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dz of a norm, of the gradient g of its output: see `norm_backward`."""
    scale = tl.load(vectors_ptr + SCALE * channels + c, mask=in_c, other=0.0)
    if SHARED:
        means_ptr = sums_ptr + tl.cast(group, tl.int64) * 2 * channels + c
        mean_g = tl.load(means_ptr, mask=in_c, other=0.0)
        mean_g_xhat = tl.load(means_ptr + channels, mask=in_c, other=0.0)
        dz = g * scale[None, :] - mean_g[None, :] - xhat * mean_g_xhat[None, :]
    else:
        if TRAINING:
            sum_g, sum_g_xhat = _sums_of_parts(sums_ptr, group, parts, channels, c, in_c, BLOCK_P)
            g = g - (sum_g / rows)[None, :] - xhat * (sum_g_xhat / rows)[None, :]
        dz = g * scale[None, :]
    return dz


@triton.jit
def _sums_of_parts(sums_ptr, group, parts, channels, c, in_c, BLOCK_P: tl.constexpr):
    """The sums over p of sums[group, p, 0, c] and of sums[group, p, 1, c], in a fixed order."""
    dtype: tl.constexpr = sums_ptr.dtype.element_ty
    sums_ptr += tl.cast(group, tl.int64) * parts * 2 * channels
    sum_0 = tl.zeros((BLOCK_P, c.shape[0]), dtype=dtype)
    sum_1 = tl.zeros((BLOCK_P, c.shape[0]), dtype=dtype)
    for first in range(0, parts, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        exists = p < parts
        inside = exists[:, None] & in_c[None, :]
        offset = (in_bounds(p, exists) * 2 * channels)[:, None] + c[None, :]
        sum_0 += tl.load(sums_ptr + offset, mask=inside, other=0.0)
        sum_1 += tl.load(sums_ptr + channels + offset, mask=inside, other=0.0)
    return tl.sum(sum_0, axis=0), tl.sum(sum_1, axis=0)


@triton.jit(do_not_specialize=["rows"])
def activation_backward_from_output(
    dy_ptr,
    y_ptr,
    du_ptr,
    rows,
    row_length,
    negative_slope,
    ACC_DTYPE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """du = dy * act'(u) elementwise, for blocks without batch norm.

    A row is whatever is contiguous in one image. Grid: (tiles of rows * row_length,).
    """
    wait_for_previous()
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = i < rows.to(tl.int64) * row_length
    i = run_in_bounds(i, exists)
    dy = tl.load(dy_ptr + i, mask=exists, other=0.0).to(ACC_DTYPE)
    y = tl.load(y_ptr + i, mask=exists, other=0.0).to(ACC_DTYPE)
    du = activation_backward(dy, y, negative_slope, ACTIVATION)
    tl.store(du_ptr + i, du.to(du_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _channels(tile, channels, BLOCK_C: tl.constexpr):
    """A tile's channels, 0 for those that do not exist, and whether they exist."""
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    exists = c < channels
    return run_in_bounds(c, exists), exists


@triton.jit
def _tile(
    tile, group, rows, channels, pixels, c, in_c, BLOCK_R: tl.constexpr, PLANES: tl.constexpr
):
    """A tile of a group's rows and `_channels` c: where it starts, its elements' offsets from
    there, which rows exist and which elements do.

    The start is one 64-bit number, of a tile beyond the last row that of the first; the offsets are
    32-bit, which halves the work on addresses.
    """
    row = tl.arange(0, BLOCK_R)
    if PLANES:
        tiles = tl.cdiv(pixels, BLOCK_R)
        image = tile // tiles
        first = (tile - image * tiles) * BLOCK_R
        images = rows // pixels
        exists = row < tl.where(image < images, tl.minimum(pixels - first, BLOCK_R), 0)
        offset = run_in_bounds(row, exists)[:, None] + (c * pixels)[None, :]
        image = tl.cast(group, tl.int64) * images + in_bounds(image, image < images)
        start = image * channels * pixels + first
    else:
        first = tl.cast(tile, tl.int64) * BLOCK_R
        exists = row < tl.minimum(tl.maximum(rows - first, 0), BLOCK_R).to(tl.int32)
        offset = (in_bounds(row, exists) * channels)[:, None] + c[None, :]
        start = (tl.cast(group, tl.int64) * rows + in_bounds(first, first < rows)) * channels
    return start, offset, exists, exists[:, None] & in_c[None, :]


@triton.jit
def _normalize(z_ptr, vectors_ptr, channels, c, in_c, offset, inside):
    """u = (z - mean) * scale + shift, and z - mean."""
    mean = tl.load(vectors_ptr + MEAN * channels + c, mask=in_c, other=0.0)
    scale = tl.load(vectors_ptr + SCALE * channels + c, mask=in_c, other=0.0)
    shift = tl.load(vectors_ptr + SHIFT * channels + c, mask=in_c, other=0.0)
    z = tl.load(z_ptr + offset, mask=inside, other=0.0).to(mean.dtype)
    centred = z - mean[None, :]
    return centred * scale[None, :] + shift[None, :], centred


@triton.jit
def _learnt_slopes(slope_ptr, slope_step, c, in_c, dtype: tl.constexpr):
    """PReLU's of `_channels` c, [1, BLOCK_C]. slope_step: 0 where all channels share one."""
    return tl.load(slope_ptr + c * slope_step, mask=in_c, other=0.0).to(dtype)[None, :]


@triton.jit
def _activate(u, negative_slope, slope_ptr, slope_step, c, in_c, ACTIVATION: tl.constexpr):
    # A variable for both slopes would be a tensor, and interpreted a number's digits be lost in it.
    if ACTIVATION == "prelu":
        y = activate(u, _learnt_slopes(slope_ptr, slope_step, c, in_c, u.dtype), ACTIVATION)
    else:
        y = activate(u, negative_slope, ACTIVATION)
    return y


@triton.jit
def _gradient_at_norm(
    dy_ptr, z_ptr, vectors_ptr, channels, c, in_c, offset, inside, negative_slope, slope_ptr,
    slope_step, ACTIVATION: tl.constexpr, AT_NORM: tl.constexpr,
):  # fmt: skip
    """g, the gradient at the norm's output; xhat and u, computed again from z; and dy.

    g = dy * act'(u), which with AT_NORM is what lies at dy_ptr.
    """
    u, centred = _normalize(z_ptr, vectors_ptr, channels, c, in_c, offset, inside)
    dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(u.dtype)
    if AT_NORM:
        g = dy
    elif ACTIVATION == "prelu":
        slopes = _learnt_slopes(slope_ptr, slope_step, c, in_c, u.dtype)
        g = activation_backward_at(dy, u, slopes, ACTIVATION)
    else:
        g = activation_backward_at(dy, u, negative_slope, ACTIVATION)
    rstd = tl.load(vectors_ptr + RSTD * channels + c, mask=in_c, other=0.0)
    return g, centred * rstd[None, :], u, dy
