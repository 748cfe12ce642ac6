"""Rounding to the dtype of memory, where a kernel goes on computing with what it stores.

Compiled, that dtype is the one of the pointer or descriptor. Interpreted, half-precision tensors
are widened to float32 before a kernel sees them, so their pointers do not tell: whoever starts a
kernel that rounds hands over the dtype of the caller's tensor as a constexpr, STORED_DTYPE.
"""

import triton
import triton.language as tl

# Triton's interpreter truncates float32 to bfloat16. Whether kernels are interpreted is settled
# when they are decorated.
_TRUNCATES = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x, float32 or of DTYPE, rounded to DTYPE: to nearest, ties to even. Its dtype stays x's.

    What is too large becomes an infinity, and NaN stays NaN.
    """
    if x.dtype == DTYPE:
        y = x
    else:
        tl.static_assert(x.dtype == tl.float32)
        if _TRUNCATES and DTYPE.is_bf16():
            # bfloat16 is the upper half of a float32. Adding just under half of its last bit, or
            # exactly half where that bit is 1, carries where the value is to round up: from
            # subnormals on, and at the end into infinity.
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            y = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
        else:
            y = x.to(DTYPE).to(x.dtype)
    return y
