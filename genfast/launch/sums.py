"""Sums over parts, in an order that depends on the shape alone."""

from genfast.backend import triton
from genfast.launch import start, tiles

if triton is not None:
    from genfast.kernels import sums as kernels


def sum_partials(partials, out):
    """out = partials.sum(-2).

    Args:
        partials: (parts, length) or (groups, parts, length), dense.
        out: of any dtype and shape with that many elements, dense.
    """
    *groups, parts, length = partials.shape
    # Many columns fill the GPU; a few are summed by few programs, each with many parts at a time.
    block_p = min(64 if length >= 64 else 1024, tiles.power_of_two(parts))
    block = min(max(64, min(1024, 4096 // block_p)), max(tiles.power_of_two(length), 1))
    start.kernel(
        kernels.sum_partials,
        (tiles.ceil_div(length, block), *groups),
        partials_ptr=partials,
        out_ptr=out,
        length=length,
        parts=parts,
        BLOCK_P=block_p,
        BLOCK=block,
    )
