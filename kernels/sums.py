"""Sums over parts: no atomics, so the bits are the same every time."""

import triton
import triton.language as tl


@triton.jit
def sum_partials(
    partials_ptr,
    out_ptr,
    length,
    parts,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[group, i] = sum over p of partials[group, p, i], always in the same order.

    BLOCK_P parts are on their way at a time: one by one, hundreds of parts would wait hundreds of
    times for memory. Grid: (tiles of length, groups).
    """
    group = tl.program_id(1).to(tl.int64)
    partials_ptr += group * parts * length
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK_P, BLOCK), dtype=partials_ptr.dtype.element_ty)
    for first in range(0, parts, BLOCK_P):
        p = first + tl.arange(0, BLOCK_P)
        inside = (p < parts)[:, None] & (i < length)[None, :]
        offset = p[:, None].to(tl.int64) * length + i[None, :]
        acc += tl.load(partials_ptr + offset, mask=inside, other=0.0)
    out = tl.sum(acc, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + group * length + i, out, mask=i < length)
