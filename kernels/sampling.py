"""Reparameterised sampling: the noise is drawn in the kernel, and drawn again in backward.

mu and logvar are matrices [N, D]; of several samples an image, sample k of image n is the row
n * samples + k of a matrix [N * samples, D], and mu and logvar are read as they are. With
Q = ceil(D / 4), the Philox counter row * Q + i gives four normals, for the columns 4i to 4i + 3:
the noise depends on the seed and the shape, not on the tiles, and a thread's four values are one
vector in memory.
"""

import triton
import triton.language as tl

from .loading import in_bounds, run_in_bounds
from .overlap import wait_for_previous


# D alone decides about vector loads; a smaller batch is the same kernel.
@triton.jit(do_not_specialize=["N", "quarter", "tiles_per_part"])
def reparameterize(
    mu_ptr,
    logvar_ptr,
    seed_ptr,
    z_ptr,
    kl_ptr,
    N,
    D,
    quarter,
    tiles_per_part,
    ACC_DTYPE: tl.constexpr,
    HAS_KL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """z = mu + exp(logvar / 2) * eps and, with HAS_KL, this part's share of each row's KL.

    kl[part, n] = 1/2 * sum over the part's columns of mu^2 + exp(logvar) - 1 - logvar (Kingma and
    Welling, 2014, appendix B). Grid: (tiles of rows, parts of the columns).
    """
    wait_for_previous()
    seed = tl.load(seed_ptr)
    part = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    kl = tl.zeros((BLOCK_N, 4 * BLOCK_Q), dtype=ACC_DTYPE)
    for step in range(0, tiles_per_part):
        i0 = (part * tiles_per_part + step) * BLOCK_Q
        noise = _normals(seed, n, i0, quarter, BLOCK_N, BLOCK_Q)
        offset, inside = _columns(n, i0, N, D, BLOCK_Q)
        mu = tl.load(mu_ptr + offset, mask=inside, other=0.0).to(ACC_DTYPE)
        logvar = tl.load(logvar_ptr + offset, mask=inside, other=0.0).to(ACC_DTYPE)
        z = mu + tl.exp(0.5 * logvar) * noise.to(ACC_DTYPE)
        tl.store(z_ptr + offset, z.to(z_ptr.dtype.element_ty), mask=inside)
        if HAS_KL:
            kl += mu * mu + _expm1(logvar) - logvar
    if HAS_KL:
        out = kl_ptr + part.to(tl.int64) * N + n
        tl.store(out, 0.5 * tl.sum(kl, axis=1), mask=n < N)


@triton.jit(do_not_specialize=["N", "quarter", "tiles_per_part"])
def reparameterize_backward(
    dz_ptr,
    dkl_ptr,
    mu_ptr,
    logvar_ptr,
    seed_ptr,
    dmu_ptr,
    dlogvar_ptr,
    N,
    D,
    quarter,
    tiles_per_part,
    ACC_DTYPE: tl.constexpr,
    HAS_DZ: tl.constexpr,
    HAS_DKL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """dmu = dz + dkl * mu; dlogvar = 1/2 * (dz * eps * exp(logvar / 2) + dkl * (exp(logvar) - 1)).

    Grid: as forward's.
    """
    wait_for_previous()
    seed = tl.load(seed_ptr)
    part = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_DKL:
        dkl = tl.load(dkl_ptr + in_bounds(n, n < N), mask=n < N, other=0.0)
        dkl = dkl.to(ACC_DTYPE)[:, None]
    for step in range(0, tiles_per_part):
        i0 = (part * tiles_per_part + step) * BLOCK_Q
        offset, inside = _columns(n, i0, N, D, BLOCK_Q)
        logvar = tl.load(logvar_ptr + offset, mask=inside, other=0.0).to(ACC_DTYPE)
        dmu = tl.zeros((BLOCK_N, 4 * BLOCK_Q), dtype=ACC_DTYPE)
        dlogvar = tl.zeros((BLOCK_N, 4 * BLOCK_Q), dtype=ACC_DTYPE)
        if HAS_DZ:
            noise = _normals(seed, n, i0, quarter, BLOCK_N, BLOCK_Q)
            dz = tl.load(dz_ptr + offset, mask=inside, other=0.0).to(ACC_DTYPE)
            dmu += dz
            dlogvar += 0.5 * dz * noise.to(ACC_DTYPE) * tl.exp(0.5 * logvar)
        if HAS_DKL:
            mu = tl.load(mu_ptr + offset, mask=inside, other=0.0).to(ACC_DTYPE)
            dmu += dkl * mu
            dlogvar += 0.5 * dkl * _expm1(logvar)
        tl.store(dmu_ptr + offset, dmu.to(dmu_ptr.dtype.element_ty), mask=inside)
        tl.store(dlogvar_ptr + offset, dlogvar.to(dlogvar_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "samples", "quarter", "tiles_per_part"])
def importance_samples(
    mu_ptr,
    logvar_ptr,
    seed_ptr,
    z_ptr,
    kl_ptr,
    N,
    samples,
    D,
    quarter,
    tiles_per_part,
    ACC_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """z = mu + exp(logvar / 2) * eps for each sample, and this part's share of its log q - log p.

    kl[part, row] = 1/2 * sum over the part's columns of z^2 - eps^2 - logvar. Grid: (tiles of the
    N * samples rows, parts of the columns).
    """
    wait_for_previous()
    seed = tl.load(seed_ptr)
    part = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = N * samples
    kl = tl.zeros((BLOCK_N, 4 * BLOCK_Q), dtype=ACC_DTYPE)
    for step in range(0, tiles_per_part):
        i0 = (part * tiles_per_part + step) * BLOCK_Q
        noise = _normals(seed, row, i0, quarter, BLOCK_N, BLOCK_Q).to(ACC_DTYPE)
        of_image, inside = _columns(row // samples, i0, N, D, BLOCK_Q)
        mu = tl.load(mu_ptr + of_image, mask=inside, other=0.0).to(ACC_DTYPE)
        logvar = tl.load(logvar_ptr + of_image, mask=inside, other=0.0).to(ACC_DTYPE)
        offset, _ = _columns(row, i0, rows, D, BLOCK_Q)
        z = mu + tl.exp(0.5 * logvar) * noise
        tl.store(z_ptr + offset, z.to(z_ptr.dtype.element_ty), mask=inside)
        # z^2 - eps^2 by the difference z - eps, which near the prior is small and has all digits.
        shift = mu + _expm1(0.5 * logvar) * noise
        kl += shift * (2.0 * noise + shift) - logvar
    out = kl_ptr + part.to(tl.int64) * rows + row
    tl.store(out, 0.5 * tl.sum(kl, axis=1), mask=row < rows)


@triton.jit(do_not_specialize=["N", "samples", "quarter"])
def importance_samples_backward(
    dz_ptr,
    dkl_ptr,
    mu_ptr,
    logvar_ptr,
    seed_ptr,
    dmu_ptr,
    dlogvar_ptr,
    N,
    samples,
    D,
    quarter,
    ACC_DTYPE: tl.constexpr,
    HAS_DZ: tl.constexpr,
    HAS_DKL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """dmu = sum of d; dlogvar = 1/2 * sum of (d * exp(logvar / 2) * eps - dkl); d = dz + dkl * z.

    The sums are over an image's samples, BLOCK_K at a time. Grid: (N * tiles of the columns,).
    """
    wait_for_previous()
    seed = tl.load(seed_ptr)
    tiles = (quarter + BLOCK_Q - 1) // BLOCK_Q
    n = tl.program_id(0) // tiles
    i0 = tl.program_id(0) % tiles * BLOCK_Q
    of_image, exists = _columns(n + tl.zeros((1,), dtype=tl.int32), i0, N, D, BLOCK_Q)
    mu = tl.load(mu_ptr + of_image, mask=exists, other=0.0).to(ACC_DTYPE)
    deviation = tl.load(logvar_ptr + of_image, mask=exists, other=0.0).to(ACC_DTYPE)
    deviation = tl.exp(0.5 * deviation)
    dmu = tl.zeros((BLOCK_K, 4 * BLOCK_Q), dtype=ACC_DTYPE)
    dlogvar = tl.zeros((BLOCK_K, 4 * BLOCK_Q), dtype=ACC_DTYPE)
    end = (n + 1) * samples
    for first in range(0, samples, BLOCK_K):
        row = n * samples + first + tl.arange(0, BLOCK_K)
        offset, inside = _columns(row, i0, end, D, BLOCK_Q)
        scaled = deviation * _normals(seed, row, i0, quarter, BLOCK_K, BLOCK_Q).to(ACC_DTYPE)
        d = tl.zeros((BLOCK_K, 4 * BLOCK_Q), dtype=ACC_DTYPE)
        if HAS_DZ:
            d += tl.load(dz_ptr + offset, mask=inside, other=0.0).to(ACC_DTYPE)
        if HAS_DKL:
            in_row = row < end
            dkl = tl.load(dkl_ptr + in_bounds(row, in_row), mask=in_row, other=0.0)
            dkl = dkl.to(ACC_DTYPE)[:, None]
            d += dkl * (mu + scaled)
            dlogvar -= dkl
        dmu += d
        dlogvar += d * scaled
    dmu = tl.sum(dmu, axis=0)[None, :]
    dlogvar = 0.5 * tl.sum(dlogvar, axis=0)[None, :]
    tl.store(dmu_ptr + of_image, dmu.to(dmu_ptr.dtype.element_ty), mask=exists)
    tl.store(dlogvar_ptr + of_image, dlogvar.to(dlogvar_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _normals(seed, n, i0, quarter, BLOCK_N: tl.constexpr, BLOCK_Q: tl.constexpr):
    """[BLOCK_N, 4 * BLOCK_Q] independent draws of N(0, 1), float32, for the counters from i0 on."""
    i = i0 + tl.arange(0, BLOCK_Q)
    counter = n[:, None].to(tl.int64) * quarter + i[None, :]
    r0, r1, r2, r3 = tl.randint4x(seed, counter)
    x0, y0 = _normal_pair(r0, r1)
    x1, y1 = _normal_pair(r2, r3)
    return tl.join(tl.join(x0, y0), tl.join(x1, y1)).reshape(BLOCK_N, 4 * BLOCK_Q)


@triton.jit
def _normal_pair(r, s):
    """Two draws of N(0, 1) from two of 32 random bits: sqrt(-2 ln u) times a unit vector.

    Box and Muller (1958). A library's sine must reduce any angle; a fraction of a turn is a few
    bits of the draw, which is half the instructions.
    """
    # u lies in [2^-33, 1]: draws reach 6.8 standard deviations.
    u = r.to(tl.uint32, bitcast=True).to(tl.float32) * (2.0**-32) + 2.0**-33
    radius = tl.sqrt(-2.0 * tl.log(u))
    # 30 bits are an angle of at most an eighth of a turn, the other two bits turn and mirror it.
    signed = s.to(tl.int32, bitcast=True)
    angle = (signed << 2).to(tl.float32) * (3.141592653589793 * 2.0**-33)
    # Taylor's series are exact in float32 here: what they leave out is below angle^10 / 10!.
    square = angle * angle
    sine = angle * _horner(square, -1 / 6, 1 / 120, -1 / 5040, 1 / 362880)
    cosine = _horner(square, -1 / 2, 1 / 24, -1 / 720, 1 / 40320)
    cosine = tl.where(signed < 0, -cosine, cosine)
    swap = (signed & 0x40000000) != 0
    return radius * tl.where(swap, sine, cosine), radius * tl.where(swap, cosine, sine)


@triton.jit
def _horner(x, a, b, c, d):
    return 1.0 + x * (a + x * (b + x * (c + x * d)))


@triton.jit
def _columns(n, i0, N, D, BLOCK_Q: tl.constexpr):
    """Offsets of the rows n and the columns from 4 * i0 on, and whether they exist."""
    d = 4 * i0 + tl.arange(0, 4 * BLOCK_Q)
    in_n, in_d = n < N, d < D
    offset = in_bounds(n, in_n)[:, None].to(tl.int64) * D + run_in_bounds(d, in_d)[None, :]
    return offset, in_n[:, None] & in_d[None, :]


@triton.jit
def _expm1(x):
    # Near 0, where a trained posterior meets the prior, exp(x) - 1 cancels: Taylor's series, whose
    # first term left out is below one rounding for |x| < 1/4: x^8 / 8!, in float64 x^14 / 14!.
    if x.dtype == tl.float64:
        series = 1.0 + x / 13.0
        for k in tl.static_range(12, 1, -1):
            series = 1.0 + x / k * series
    else:
        series = _horner(x, 1 / 2, 1 / 6, 1 / 24, 1 / 120 + x * (1 / 720 + x * (1 / 5040)))
    return tl.where(tl.abs(x) < 0.25, x * series, tl.exp(x) - 1.0)
