"""Reparameterised sampling and its gradients."""

import torch

from genfast.backend import triton
from genfast.launch import passes, start, sums, tape, tiles

if triton is not None:
    from genfast.kernels import sampling as kernels


def reparameterize(mu, logvar, seed, *, with_kl):
    """z = mu + exp(logvar / 2) * eps and, if `with_kl`, the KL divergence of each row, else None.

    Args:
        mu, logvar: (N, ...), of one shape and dtype.
        seed: (1,) int64 on the device: the key of the noise.
    """
    mu, logvar = mu.contiguous(), logvar.contiguous()
    z = torch.empty_like(mu)
    grid, sizes = _sampling_grid(mu)
    rows, parts = sizes["N"], grid[1]
    acc_dtype = start.acc_dtype(mu.dtype)
    kl = partials = None
    if with_kl:
        kl = partials = torch.empty(rows, dtype=acc_dtype, device=mu.device)
        if parts > 1:
            partials = torch.empty((parts, rows), dtype=acc_dtype, device=mu.device)
    tape.start(
        kernels.reparameterize,
        grid,
        mu_ptr=mu,
        logvar_ptr=logvar,
        seed_ptr=seed,
        z_ptr=z,
        kl_ptr=partials if with_kl else z,
        ACC_DTYPE=start.tl_dtype(acc_dtype),
        HAS_KL=with_kl,
        **sizes,
    )
    if with_kl and parts > 1:
        sums.sum_partials(partials, kl, of_batch=True)
    return z, kl


def reparameterize_backward(dz, dkl, mu, logvar, seed):
    """The gradients of mu and logvar; dz or dkl is None where nothing flows back."""
    mu, found, common = _backward(dz, dkl, mu, logvar, seed)
    grid, sizes = _sampling_grid(mu)
    tape.start(
        kernels.reparameterize_backward,
        grid,
        **common,
        **sizes,
    )
    return found


def _backward(dz, dkl, mu, logvar, seed):
    """mu, dense; memory for its gradient and that of logvar; and the arguments of both kernels."""
    mu, logvar = mu.contiguous(), logvar.contiguous()
    dmu, dlogvar = torch.empty_like(mu), torch.empty_like(logvar)
    return (
        mu,
        (dmu, dlogvar),
        dict(
            dz_ptr=mu if dz is None else dz.contiguous(),
            dkl_ptr=mu if dkl is None else dkl.contiguous(),
            mu_ptr=mu,
            logvar_ptr=logvar,
            seed_ptr=seed,
            dmu_ptr=dmu,
            dlogvar_ptr=dlogvar,
            ACC_DTYPE=start.tl_dtype(start.acc_dtype(mu.dtype)),
            HAS_DZ=dz is not None,
            HAS_DKL=dkl is not None,
        ),
    )


def importance_samples(mu, logvar, samples, seed):
    """z for `samples` draws an image, and log q(z | image) - log p(z) of each.

    Args:
        mu, logvar: (N, ...), of one shape and dtype.
        samples: how many, from 1.
        seed: (1,) int64 on the device. Draw k of image n has the noise that `reparameterize` gives
            the row n * samples + k of a matrix.

    Returns:
        (N, samples, ...) like mu, and (N, samples), float32 or wider.
    """
    mu, logvar = mu.contiguous(), logvar.contiguous()
    z = mu.new_empty((mu.shape[0], samples, *mu.shape[1:]))
    grid, sizes = _sampling_grid(z.flatten(0, 1))
    parts = grid[1]
    acc_dtype = start.acc_dtype(mu.dtype)
    kl = partials = torch.empty(z.shape[:2], dtype=acc_dtype, device=mu.device)
    if parts > 1:
        partials = kl.new_empty((parts, kl.numel()))
    tape.start(
        kernels.importance_samples,
        grid,
        mu_ptr=mu,
        logvar_ptr=logvar,
        seed_ptr=seed,
        z_ptr=z,
        kl_ptr=partials,
        samples=samples,
        ACC_DTYPE=start.tl_dtype(acc_dtype),
        **sizes | dict(N=mu.shape[0]),
    )
    if parts > 1:
        sums.sum_partials(partials, kl, of_batch=True)
    return z, kl


def importance_samples_backward(dz, dkl, mu, logvar, samples, seed):
    """The gradients of mu and logvar; dz or dkl is None where nothing flows back."""
    mu, found, common = _backward(dz, dkl, mu, logvar, seed)
    rows, columns = passes.rows(mu)
    quarter = tiles.ceil_div(columns, 4)
    # 1024 values a tile, as forward.
    block_q = min(64, tiles.power_of_two(quarter))
    block_k = min(256 // block_q, tiles.power_of_two(samples))
    tape.start(
        kernels.importance_samples_backward,
        (rows * tiles.ceil_div(quarter, block_q),),
        **common,
        N=rows,
        samples=samples,
        D=columns,
        quarter=quarter,
        BLOCK_K=block_k,
        BLOCK_Q=block_q,
    )
    return found


def _sampling_grid(mu):
    """Grid and sizes for sampling, mu seen as a matrix of its first dimension and the rest."""
    rows, columns = passes.rows(mu)
    quarter = tiles.ceil_div(columns, 4)
    block_q = min(256, tiles.power_of_two(quarter))
    block_n = 256 // block_q  # Of a smaller batch too: a tile of its own would be a new kernel.
    row_tiles, column_tiles = tiles.ceil_div(rows, block_n), tiles.ceil_div(quarter, block_q)
    # A row is cut where there are too few of them to fill a GPU, and at the grid's limit.
    parts = min(column_tiles, max(1, passes.programs(mu, 16) // row_tiles))
    tiles_per_part = tiles.ceil_div(column_tiles, parts)
    sizes = dict(
        N=rows, D=columns, quarter=quarter, tiles_per_part=tiles_per_part,
        BLOCK_N=block_n, BLOCK_Q=block_q,
    )  # fmt: skip
    return (row_tiles, tiles.ceil_div(column_tiles, tiles_per_part)), sizes
