"""Rounding to the dtype of memory, where a kernel goes on computing with what it stores.

Compiled, that dtype is the one of the pointer or descriptor. Interpreted, half-precision tensors
are widened to float32 before a kernel sees them, so their pointers do not tell: whoever starts a
kernel that rounds hands over the dtype of the caller's tensor as a constexpr, STORED_DTYPE.
"""

import triton
import triton.language as tl

# Whether kernels are interpreted is settled when they are decorated.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """x, float32 or of DTYPE, rounded to DTYPE: to nearest, ties to even. Its dtype stays x's.

    What is too large becomes an infinity, and NaN stays NaN.
    """
    if x.dtype == DTYPE:
        y = x
    else:
        tl.static_assert(x.dtype == tl.float32)
        if INTERPRETED and DTYPE.is_bf16():
            # The interpreter would truncate. bfloat16 is the upper half of a float32. Adding just
            # under half of its last bit, or exactly half where that bit is 1, carries where the
            # value is to round up: from subnormals on, and at the end into infinity.
            bits = x.to(tl.uint32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            y = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
        elif not INTERPRETED and tl.target_info.is_cuda() and DTYPE.is_bf16():
            y = _rounded_pairs(
                x, "cvt.rn.bf16x2.f32 p, $3, $2; shl.b32 $0, p, 16; and.b32 $1, p, 0xffff0000;"
            )
        elif not INTERPRETED and tl.target_info.is_cuda() and DTYPE.is_fp16():
            y = _rounded_pairs(
                x,
                "cvt.rn.f16x2.f32 p, $3, $2; mov.b32 {low, high}, p; "
                "cvt.f32.f16 $0, low; cvt.f32.f16 $1, high;",
            )
        else:
            y = x.to(DTYPE).to(x.dtype)
    return y


@triton.jit
def widened(x, DTYPE: tl.constexpr):
    """x.to(DTYPE), the accumulator's."""
    if x.dtype == tl.bfloat16 and tl.target_info.is_cuda():
        # An instruction an element, of which the compiler makes three a pair.
        y = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], tl.float32,
            is_pure=True, pack=2,
        )  # fmt: skip
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def as_stored(x, exists, READ_DTYPE: tl.constexpr, STORED_DTYPE: tl.constexpr):
    """x, in the accumulator's dtype, as a kernel would read it back; 0 where it does not exist.

    Rounded to STORED_DTYPE, and in READ_DTYPE, that of the kernel's pointers to such memory: the
    same unless half precision is interpreted. `exists` broadcasts to x.
    """
    if READ_DTYPE != STORED_DTYPE:
        y = tl.where(exists, rounded(x.to(READ_DTYPE), STORED_DTYPE), 0.0)
    elif not INTERPRETED and tl.target_info.is_cuda() and READ_DTYPE.is_bf16():
        # Casts and selects would do. But the compiler moves selects, those of an activation too,
        # across casts, and then takes pairs apart and puts bits of masks together. The two of a
        # pair need not be neighbours: of few channels a thread has several pixels, so each has its
        # own mask, half of which counts.
        y = tl.inline_asm_elementwise(
            "{ .reg .b32 p, m; cvt.rn.bf16x2.f32 p, $2, $1; prmt.b32 m, $3, $4, 0x7610; "
            "and.b32 $0, p, m; }",
            "=r,f,f,r,r", [x, _ones_where(exists, x)], tl.bfloat16, is_pure=True, pack=2,
        )  # fmt: skip
    elif not INTERPRETED and tl.target_info.is_cuda() and READ_DTYPE.is_fp16():
        y = tl.inline_asm_elementwise(
            "{ .reg .b32 p, m; cvt.rn.f16x2.f32 p, $2, $1; prmt.b32 m, $3, $4, 0x7610; "
            "and.b32 $0, p, m; }",
            "=r,f,f,r,r", [x, _ones_where(exists, x)], tl.float16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        y = tl.where(exists, x, 0.0).to(READ_DTYPE)
    return y


@triton.jit
def _ones_where(exists, x):
    """32 bits of 1 for each element of x that exists, others of 0."""
    return tl.broadcast_to(tl.where(exists, -1, 0), x.shape)


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
    if INTERPRETED:
        # Of half precision in fact, where that of arguments is widened.
        x = rounded(x, DTYPE)
    return x.to(DTYPE)
