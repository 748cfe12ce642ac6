"""A norm, then the gated linear unit: half of the channels, multiplied by a sigmoid of the others.

y = u_a * sigmoid(u_b), u being the norm's output, u_a its first half of channels and u_b its second
(GLU: Dauphin et al., 2017, arXiv:1612.08083). The passes are those of kernels/norm.py, of whose
matrices and vectors everything said there holds. But `channels` are those of y, a tile of which
meets two tiles of z, that of its own channels and that of the channels that gate them; z, its
vectors and all sums have 2 * channels.
"""

import triton
import triton.language as tl

from .norm import RSTD, _at_input, _channels, _normalize, _store_total, _tile
from .overlap import wait_for_previous


@triton.jit(do_not_specialize=["rows"])
def gated_normalize(
    z_ptr,
    vectors_ptr,
    y_ptr,
    rows,
    channels,
    pixels,
    PLANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = u_a * sigmoid(u_b). Grid: (tiles of a group's rows, tiles of y's channels, groups)."""
    wait_for_previous()
    group = tl.program_id(2)
    vectors_ptr += tl.cast(group, tl.int64) * 10 * channels
    c, in_c = _channels(tl.program_id(1), channels, BLOCK_C)
    start, offset, z_start, z_offset, inside = _tiles(
        tl.program_id(0), group, rows, channels, pixels, c, in_c, BLOCK_R, PLANES
    )
    u, gate, _, _ = _halves(
        z_ptr + z_start, vectors_ptr, channels, pixels, c, in_c, z_offset, inside
    )
    open_, _ = _opening(gate)
    tl.store(y_ptr + start + offset, (u * open_).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "tiles_per_part"])
def gated_backward_reduce(
    dy_ptr,
    z_ptr,
    vectors_ptr,
    partials_ptr,
    rows,
    channels,
    pixels,
    tiles_per_part,
    PLANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """partials[group, part]: the sums of g, and of g * xhat, over the part's rows.

    [2, 2 * channels], g being the gradient of u: see `norm.norm_backward_reduce`. Grid: (parts of a
    group, tiles of y's channels, groups).
    """
    wait_for_previous()
    part = tl.program_id(0)
    group = tl.program_id(2)
    vectors_ptr += tl.cast(group, tl.int64) * 10 * channels
    c, in_c = _channels(tl.program_id(1), channels, BLOCK_C)
    dtype: tl.constexpr = vectors_ptr.dtype.element_ty
    sum_g = tl.zeros((BLOCK_R, BLOCK_C), dtype=dtype)
    sum_g_xhat = tl.zeros((BLOCK_R, BLOCK_C), dtype=dtype)
    gate_sum_g = tl.zeros((BLOCK_R, BLOCK_C), dtype=dtype)
    gate_sum_g_xhat = tl.zeros((BLOCK_R, BLOCK_C), dtype=dtype)
    for step in range(0, tiles_per_part):
        start, offset, z_start, z_offset, inside = _tiles(
            part * tiles_per_part + step, group, rows, channels, pixels, c, in_c, BLOCK_R, PLANES
        )
        g, xhat, gate_g, gate_xhat, _ = _gradients(
            dy_ptr + start, z_ptr + z_start, vectors_ptr, channels, pixels, c, in_c, offset,
            z_offset, inside,
        )  # fmt: skip
        sum_g += tl.where(inside, g, 0.0)
        sum_g_xhat += tl.where(inside, g * xhat, 0.0)
        gate_sum_g += tl.where(inside, gate_g, 0.0)
        gate_sum_g_xhat += tl.where(inside, gate_g * gate_xhat, 0.0)
    part += group * tl.num_programs(0)
    out = partials_ptr + part.to(tl.int64) * 4 * channels + c
    tl.store(out, tl.sum(sum_g, axis=0), mask=in_c)
    tl.store(out + channels, tl.sum(gate_sum_g, axis=0), mask=in_c)
    tl.store(out + 2 * channels, tl.sum(sum_g_xhat, axis=0), mask=in_c)
    tl.store(out + 3 * channels, tl.sum(gate_sum_g_xhat, axis=0), mask=in_c)


@triton.jit(do_not_specialize=["rows", "parts", "groups"])
def gated_backward(
    dy_ptr,
    z_ptr,
    vectors_ptr,
    sums_ptr,
    total_ptr,
    dz_ptr,
    y_ptr,
    rows,
    channels,
    pixels,
    parts,
    groups,
    TRAINING: tl.constexpr,
    SHARED: tl.constexpr,
    WRITES_Y: tl.constexpr,
    WRITES_TOTAL: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """dz, as `norm.norm_backward` computes it, of both halves of the channels.

    sums[group] is [parts, 2, 2 * channels], and total [2, 2 * channels]. Grid: (tiles of a group's
    rows, tiles of y's channels, groups).
    """
    wait_for_previous()
    group = tl.program_id(2)
    vectors_ptr += tl.cast(group, tl.int64) * 10 * channels
    c, in_c = _channels(tl.program_id(1), channels, BLOCK_C)
    start, offset, z_start, z_offset, inside = _tiles(
        tl.program_id(0), group, rows, channels, pixels, c, in_c, BLOCK_R, PLANES
    )
    if WRITES_TOTAL:
        is_first = (tl.program_id(0) == 0) & (group == 0)
        if is_first:
            _store_total(sums_ptr, total_ptr, groups, parts, 2 * channels, c, in_c, BLOCK_P)
            _store_total(
                sums_ptr, total_ptr, groups, parts, 2 * channels, c + channels, in_c, BLOCK_P
            )
    g, xhat, gate_g, gate_xhat, y = _gradients(
        dy_ptr + start, z_ptr + z_start, vectors_ptr, channels, pixels, c, in_c, offset, z_offset,
        inside,
    )  # fmt: skip
    if WRITES_Y:
        tl.store(y_ptr + start + offset, y.to(y_ptr.dtype.element_ty), mask=inside)
    dz = _at_input(
        g, xhat, sums_ptr, vectors_ptr, group, rows, parts, 2 * channels, c, in_c,
        TRAINING, SHARED, BLOCK_P,
    )  # fmt: skip
    gate_dz = _at_input(
        gate_g, gate_xhat, sums_ptr, vectors_ptr, group, rows, parts, 2 * channels, c + channels,
        in_c, TRAINING, SHARED, BLOCK_P,
    )  # fmt: skip
    dz_ptr += z_start
    tl.store(dz_ptr + z_offset, dz.to(dz_ptr.dtype.element_ty), mask=inside)
    dz_ptr += _to_gate(channels, pixels)
    tl.store(dz_ptr + z_offset, gate_dz.to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _tiles(
    tile, group, rows, channels, pixels, c, in_c, BLOCK_R: tl.constexpr, PLANES: tl.constexpr
):
    """A tile of y, and the first of its two tiles of z: start and offsets of either, and which
    elements exist, as `norm._tile` gives them."""
    start, offset, _, inside = _tile(tile, group, rows, channels, pixels, c, in_c, BLOCK_R, PLANES)
    z_start, z_offset, _, _ = _tile(
        tile, group, rows, 2 * channels, pixels, c, in_c, BLOCK_R, PLANES
    )
    return start, offset, z_start, z_offset, inside


@triton.jit
def _to_gate(channels, pixels):
    """From an element of z to the one that gates it. `pixels` is 1 without PLANES."""
    return channels * pixels


@triton.jit
def _halves(z_ptr, vectors_ptr, channels, pixels, c, in_c, offset, inside):
    """u of `_channels` c of y and of those that gate them, and either's z - mean."""
    u, centred = _normalize(z_ptr, vectors_ptr, 2 * channels, c, in_c, offset, inside)
    gate, gate_centred = _normalize(
        z_ptr + _to_gate(channels, pixels), vectors_ptr, 2 * channels, c + channels, in_c, offset,
        inside,
    )  # fmt: skip
    return u, gate, centred, gate_centred


@triton.jit
def _opening(gate):
    """sigmoid(gate) and its derivative, neither by a difference."""
    e = tl.exp(-tl.abs(gate))
    scale = 1.0 / (1.0 + e)
    return tl.where(gate >= 0, scale, e * scale), e * scale * scale


@triton.jit
def _gradients(dy_ptr, z_ptr, vectors_ptr, channels, pixels, c, in_c, offset, z_offset, inside):
    """g = dy * dy/du and xhat of `_channels` c of y and of those that gate them; and y."""
    u, gate, centred, gate_centred = _halves(
        z_ptr, vectors_ptr, channels, pixels, c, in_c, z_offset, inside
    )
    open_, slope = _opening(gate)
    dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(u.dtype)
    rstd_ptr = vectors_ptr + RSTD * 2 * channels + c
    xhat = centred * tl.load(rstd_ptr, mask=in_c, other=0.0)[None, :]
    gate_xhat = gate_centred * tl.load(rstd_ptr + channels, mask=in_c, other=0.0)[None, :]
    return dy * open_, xhat, dy * u * slope, gate_xhat, u * open_
