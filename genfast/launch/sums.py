"""Sums over parts, in an order that depends on the shape alone."""

import math

import torch

from genfast.backend import triton
from genfast.launch import passes, start, tape, tiles

if triton is not None:
    from genfast.kernels import sums as kernels

# One program adds this many parts; more of them are added by several first. Otherwise a program
# waits for memory again and again: by the model 16,384 parts of 128 sums took 89 us on an H100.
_CHUNK = 512
# Of a few sums, such as a loss, so many parts are loaded at a time that more are no longer to wait.
_STEPS = 2
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
    length = partials.shape[-1]
    partials = in_fewer_parts(partials, _chunk(length))
    parts = partials.shape[-2]
    rows = passes.rows(out) if of_batch else (1, length)
    _sum(partials, out, rows, parts, (64, 64) if of_batch else _tile(length))


def in_fewer_parts(partials, most):
    """The same sums in at most so many parts: (..., parts, length) to (..., fewer, length)."""
    *groups, parts, length = partials.shape
    while parts > most:
        chunk = _chunk(length)
        parts = tiles.ceil_div(parts, chunk)
        sums = partials.new_empty((*groups, parts, length))
        _sum(partials, sums, (1, length), chunk, _tile(length))
        partials = sums
    return partials


def _sum(partials, out, rows, chunk, tile):
    *groups, parts, length = partials.shape
    block_p, block = tile
    tape.start(
        kernels.sum_partials,
        (tiles.ceil_div(length, block), math.prod(groups), tiles.ceil_div(parts, chunk)),
        partials_ptr=partials,
        out_ptr=out,
        rows=rows[0],
        row_length=rows[1],
        parts=parts,
        chunk=chunk,
        BLOCK_P=block_p,
        BLOCK=block,
    )


def _chunk(length):
    """How many parts one program adds."""
    at_a_time, _ = _tile(length)
    return max(_CHUNK, _STEPS * at_a_time)


def _tile(length):
    """Parts and sums of a tile. The number of parts, which a batch changes, has no say."""
    if length >= _MANY:
        return 8, 512
    block = min(64, tiles.power_of_two(length))
    return min(1024, 4096 // block), block
