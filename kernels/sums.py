"""Sums over parts: no atomics, so the bits are the same every time."""

import triton
import triton.language as tl

from .loading import in_bounds, run_in_bounds
from .overlap import wait_for_previous


@triton.jit(do_not_specialize=["rows", "parts", "chunk"])
def sum_partials(
    partials_ptr,
    out_ptr,
    rows,
    row_length,
    parts,
    chunk,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[group, c, i] = sum over p of partials[group, p, i], always in the same order.

    Of each `chunk` of parts, the c-th; one chunk of all of them gives the whole sum.

    There are rows * row_length sums, of which a batch can change the rows. BLOCK_P parts are on
    their way at a time: one by one, hundreds of parts would wait hundreds of times for memory.
    Grid: (tiles of the sums, groups, chunks).
    """
    wait_for_previous()
    group = tl.program_id(1).to(tl.int64)
    length = rows.to(tl.int64) * row_length
    partials_ptr += group * parts * length
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_i = i < length
    i = run_in_bounds(i, in_i)
    acc = tl.zeros((BLOCK_P, BLOCK), dtype=partials_ptr.dtype.element_ty)
    begin = tl.program_id(2) * chunk
    end = tl.minimum(begin + chunk, parts)
    for first in range(begin, end, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        in_p = p < end
        offset = in_bounds(p, in_p)[:, None] * length + i[None, :]
        acc += tl.load(partials_ptr + offset, mask=in_p[:, None] & in_i[None, :], other=0.0)
    out = tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty)
    row = group * tl.num_programs(2) + tl.program_id(2)
    tl.store(out_ptr + row * length + i, out, mask=in_i)
