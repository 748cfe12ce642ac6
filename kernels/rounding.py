"""Rounding to the dtype of memory, where a kernel goes on computing with what it stores.

Compiled, that dtype is the one of the pointer or descriptor. Interpreted, half-precision tensors
are widened to float32 before a kernel sees them, so their pointers do not tell: whoever starts a
kernel that rounds hands over the dtype of the caller's tensor as a constexpr, STORED_DTYPE.
"""

import triton
import triton.language as tl

# Whether kernels are interpreted is settled when they are decorated.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x, float32 or of DTYPE, rounded to DTYPE: to nearest, ties to even. Its dtype stays x's.

    What is too large becomes an infinity, and NaN stays NaN.
    """
    if x.dtype == DTYPE:
        y = x
    else:
        tl.static_assert(x.dtype == tl.float32)
        if _INTERPRETED and DTYPE.is_bf16():
            # The interpreter would truncate. bfloat16 is the upper half of a float32. Adding just
            # under half of its last bit, or exactly half where that bit is 1, carries where the
            # value is to round up: from subnormals on, and at the end into infinity.
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            y = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
        elif not _INTERPRETED and tl.target_info.is_cuda() and DTYPE.is_bf16():
            y = _rounded_pairs(
                x, "cvt.rn.bf16x2.f32 p, $3, $2; shl.b32 $0, p, 16; and.b32 $1, p, 0xffff0000;"
            )
        elif not _INTERPRETED and tl.target_info.is_cuda() and DTYPE.is_fp16():
            y = _rounded_pairs(
                x,
                "cvt.rn.f16x2.f32 p, $3, $2; mov.b32 {low, high}, p; "
                "cvt.f32.f16 $0, low; cvt.f32.f16 $1, high;",
            )
        else:
            y = x.to(DTYPE).to(x.dtype)
    return y


@triton.jit
def _rounded_pairs(x, ASM: tl.constexpr):
    """Two values in one conversion, which the compiler does not make of two casts and back.

    A single conversion to bfloat16 takes 8 times as long as most instructions, a pair's does not:
    in a tile of 128 x 128 that is 1,000 cycles beside the 8,000 of a product with K = 1,024.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .b32 p; .reg .b16 low, high; " + ASM + " }",
        "=f,=f,f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=2,
    )


@triton.jit
def to_memory(x, DTYPE: tl.constexpr):
    """x, float32, in DTYPE for memory that is reached by its address alone: rounded to nearest."""
    if _INTERPRETED:
        # Of half precision in fact, where that of arguments is widened.
        x = rounded(x, DTYPE)
    return x.to(DTYPE)
