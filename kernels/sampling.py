"""Reparameterised sampling: the noise is drawn in the kernel, and drawn again in backward.

mu and logvar are matrices [N, D]. With Q = ceil(D / 4), one Philox counter row * Q + i gives four
normals, for the columns i, Q + i, 2Q + i and 3Q + i: the noise depends on the seed and the shape,
not on the tiles.
"""

import triton
import triton.language as tl


@triton.jit
def reparameterize(
    mu_ptr,
    logvar_ptr,
    seed_ptr,
    z_ptr,
    kl_ptr,
    N,
    D,
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
    seed = tl.load(seed_ptr)
    part = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    quarter = tl.cdiv(D, 4)
    kl = tl.zeros((BLOCK_N, BLOCK_Q), dtype=ACC_DTYPE)
    for step in range(0, tiles_per_part):
        i = (part * tiles_per_part + step) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        noise = _normals(seed, n, i, quarter)
        for j in tl.static_range(4):
            offset, inside = _columns(n, i, j, quarter, N, D)
            mu = tl.load(mu_ptr + offset, mask=inside, other=0.0).to(ACC_DTYPE)
            logvar = tl.load(logvar_ptr + offset, mask=inside, other=0.0).to(ACC_DTYPE)
            z = mu + tl.exp(0.5 * logvar) * noise[j].to(ACC_DTYPE)
            tl.store(z_ptr + offset, z.to(z_ptr.dtype.element_ty), mask=inside)
            if HAS_KL:
                kl += mu * mu + _expm1(logvar) - logvar
    if HAS_KL:
        out = kl_ptr + part.to(tl.int64) * N + n
        tl.store(out, 0.5 * tl.sum(kl, axis=1), mask=n < N)


@triton.jit
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
    seed = tl.load(seed_ptr)
    part = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    quarter = tl.cdiv(D, 4)
    for step in range(0, tiles_per_part):
        i = (part * tiles_per_part + step) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        noise = _normals(seed, n, i, quarter)
        for j in tl.static_range(4):
            offset, inside = _columns(n, i, j, quarter, N, D)
            logvar = tl.load(logvar_ptr + offset, mask=inside, other=0.0).to(ACC_DTYPE)
            dmu = tl.zeros((BLOCK_N, BLOCK_Q), dtype=ACC_DTYPE)
            dlogvar = tl.zeros((BLOCK_N, BLOCK_Q), dtype=ACC_DTYPE)
            if HAS_DZ:
                dz = tl.load(dz_ptr + offset, mask=inside, other=0.0).to(ACC_DTYPE)
                dmu += dz
                dlogvar += 0.5 * dz * noise[j].to(ACC_DTYPE) * tl.exp(0.5 * logvar)
            if HAS_DKL:
                dkl = tl.load(dkl_ptr + n, mask=n < N, other=0.0).to(ACC_DTYPE)[:, None]
                mu = tl.load(mu_ptr + offset, mask=inside, other=0.0).to(ACC_DTYPE)
                dmu += dkl * mu
                dlogvar += 0.5 * dkl * _expm1(logvar)
            tl.store(dmu_ptr + offset, dmu.to(dmu_ptr.dtype.element_ty), mask=inside)
            tl.store(dlogvar_ptr + offset, dlogvar.to(dlogvar_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _normals(seed, n, i, quarter):
    return tl.randn4x(seed, n[:, None].to(tl.int64) * quarter + i[None, :])


@triton.jit
def _columns(n, i, j: tl.constexpr, quarter, N, D):
    """Offsets of columns j * quarter + i in the rows n, and whether they exist."""
    d = j * quarter + i
    inside = (n < N)[:, None] & ((i < quarter) & (d < D))[None, :]
    return n[:, None].to(tl.int64) * D + d[None, :], inside


@triton.jit
def _expm1(x):
    # Near 0, where a trained posterior meets the prior, exp(x) - 1 cancels: Taylor's series, whose
    # first term left out is x^13 / 13!, below one rounding of float64 for |x| < 1/4.
    series = 1.0 + x / 12.0
    for k in tl.static_range(11, 1, -1):
        series = 1.0 + x / k * series
    return tl.where(tl.abs(x) < 0.25, x * series, tl.exp(x) - 1.0)
