"""Sums over parts, in an order that depends on the shape alone."""

import torch

from genfast.backend import triton
from genfast.launch import passes, start, tiles

if triton is not None:
    from genfast.kernels import sums as kernels

# So many sums fill a GPU with tiles that are wide; fewer are cut finer, with more parts at a time.
_MANY = 2**16


def partials(parts, out):
    """Memory for so many parts of `out`, in the dtype that its products are added in."""
    dtype = start.acc_dtype(out.dtype)
    return torch.empty((parts, out.numel()), dtype=dtype, device=out.device)


def sum_partials(partials, out, *, of_batch=False):
    """out = partials.sum(-2).

    Args:
        partials: (parts, length) or (groups, parts, length), dense.
        out: of any dtype and shape with that many elements, dense.
        of_batch: out has a row for each image. Any number of those is one kernel; any other length
            and parts of any number are one kernel a length.
    """
    *groups, parts, length = partials.shape
    rows, row_length = passes.rows(out) if of_batch else (1, length)
    block_p, block = (64, 64) if of_batch else _tile(length)
    start.kernel(
        kernels.sum_partials,
        (tiles.ceil_div(length, block), *groups),
        partials_ptr=partials,
        out_ptr=out,
        rows=rows,
        row_length=row_length,
        parts=parts,
        BLOCK_P=block_p,
        BLOCK=block,
    )


def _tile(length):
    """Parts and sums of a tile. The number of parts, which a batch changes, has no say."""
    if length >= _MANY:
        return 8, 512
    block = min(64, tiles.power_of_two(length))
    return min(1024, 4096 // block), block
