"""Addresses of masked lanes: inside the tensor, like all others.

A mask promises that a lane's value is not needed, not that its address is never read: Triton turns
loads of a pipelined loop into asynchronous copies, and one without a predicate reads whatever the
address is. So each load of these kernels takes its indices from here.
"""

import triton
import triton.language as tl

# The widest load is 16 bytes, which is 8 elements in half precision.
VECTOR = tl.constexpr(8)


@triton.jit
def in_bounds(index, exists):
    """index where it exists, elsewhere 0. As an address it is one of its own: loads stay scalar."""
    return tl.where(exists, index, 0)


@triton.jit
def in_range(index, size):
    """0 <= index < size by one comparison: without its sign a negative index is a large one."""
    return tl.cast(index, tl.uint32) < tl.cast(size, tl.uint32)


@triton.jit
def wide_product(a, b):
    """a * b in 64 bits, of 32-bit integers that are not negative.

    Where the compiler does not know that no sign is extended, the product takes six instructions,
    with it one: the factor that stays the same in a loop is extended before the loop.
    """
    return tl.cast(tl.cast(a, tl.uint32), tl.int64) * tl.cast(tl.cast(b, tl.uint32), tl.int64)


@triton.jit
def run_in_bounds(index, exists):
    """As `in_bounds`, for the axis along which memory is contiguous: loads stay vectors.

    index: a one-dimensional range whose first value is a multiple of its length, a power of two.

    The compiler would not take the result for a range. It is one in each vector that exists as a
    whole, and no vector is loaded where the mask can change inside: the compiler finds that out
    from the mask itself. A vector that does not exist starts at 0, and then the axis has at least
    as many elements as a vector.
    """
    LENGTH: tl.constexpr = index.shape[0]
    ALIGNED: tl.constexpr = LENGTH if LENGTH < VECTOR else VECTOR
    return tl.max_contiguous(tl.multiple_of(tl.where(exists, index, 0), ALIGNED), ALIGNED)


@triton.jit
def aligned(count, ALIGNMENT: tl.constexpr):
    """count, of which the compiler then knows that it is a multiple of ALIGNMENT.

    It knows of multiples of 16 anyway. Rows of 100 elements are loaded 4 at a time once it knows of
    the 4.
    """
    if ALIGNMENT < 16:
        count = count // ALIGNMENT * ALIGNMENT
    return count
