"""Adam's update of many weights by one launch, which finds them through a table of addresses.

Kingma and Ba (2015), algorithm 1, in the order of PyTorch's `torch.optim.Adam`: with the gradient
g, to which weight_decay * p was added, and t the number of updates, this one among them,

    m += (1 - beta1) * (g - m)
    v += (1 - beta2) * (g * g - v)
    p -= lr / (1 - beta1^t) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

All of it in float32. What is close to 0 arrives as itself, 1 - beta and log(beta), for rounding a
beta close to 1 first would leave few of its digits.
"""

import triton
import triton.language as tl

from .loading import run_in_bounds
from .overlap import wait_for_previous
from .rounding import to_memory

# Columns of a row of the table, one row a weight. The first seven are addresses; a gradient's is
# one of float32 or of half precision; a copy's is 0 where there is none.
P = tl.constexpr(0)
M = tl.constexpr(1)
V = tl.constexpr(2)
STEP = tl.constexpr(3)
GRADIENT = tl.constexpr(4)
COPY = tl.constexpr(5)
HALF = tl.constexpr(6)  # Whether the gradient is in half precision.
ELEMENTS = tl.constexpr(7)
FIRST_CHUNK = tl.constexpr(8)
COLUMNS = tl.constexpr(9)


@triton.jit
def adam(
    table_ptr,
    lr_ptr,
    lr,
    one_minus_beta1,
    one_minus_beta2,
    log_beta1,
    log_beta2,
    eps,
    weight_decay,
    HAS_LR_PTR: tl.constexpr,
    HAS_WEIGHT_DECAY: tl.constexpr,
    HALF_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Update a chunk of BLOCK elements of one weight, and its half-precision copy if it has one.

    table_ptr: int64: for each chunk the row of its weight, then the rows. Every address in it is a
        multiple of 16, that of a step counter one of 4. Step counters are advanced already.
    HAS_LR_PTR: lr_ptr is read, one number of any floating-point dtype; else it is lr.
    Grid: (chunks,).
    """
    wait_for_previous()
    chunk = tl.program_id(0)
    row = table_ptr + tl.num_programs(0) + tl.load(table_ptr + chunk) * COLUMNS
    p_ptr = _pointer(row + P, tl.float32)
    m_ptr = _pointer(row + M, tl.float32)
    v_ptr = _pointer(row + V, tl.float32)
    first = (chunk - tl.load(row + FIRST_CHUNK)) * BLOCK
    count = tl.minimum(tl.load(row + ELEMENTS) - first, BLOCK).to(tl.int32)
    t = tl.load(tl.load(row + STEP).to(tl.pointer_type(tl.float32)))
    if HAS_LR_PTR:
        lr = tl.load(lr_ptr).to(tl.float32)
    step_size = lr / _one_minus_exp(t * log_beta1)
    root2 = tl.sqrt(_one_minus_exp(t * log_beta2))
    # Without a mask in the whole chunks: where it could change within a vector, none is loaded.
    if count == BLOCK:
        _update(
            p_ptr, m_ptr, v_ptr, row, first, count, step_size, root2, one_minus_beta1,
            one_minus_beta2, eps, weight_decay, HAS_WEIGHT_DECAY, HALF_DTYPE, BLOCK, MASKED=False,
        )  # fmt: skip
    else:
        _update(
            p_ptr, m_ptr, v_ptr, row, first, count, step_size, root2, one_minus_beta1,
            one_minus_beta2, eps, weight_decay, HAS_WEIGHT_DECAY, HALF_DTYPE, BLOCK, MASKED=True,
        )  # fmt: skip


@triton.jit
def _update(
    p_ptr,
    m_ptr,
    v_ptr,
    row,
    first,
    count,
    step_size,
    root2,
    one_minus_beta1,
    one_minus_beta2,
    eps,
    weight_decay,
    HAS_WEIGHT_DECAY: tl.constexpr,
    HALF_DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    MASKED: tl.constexpr,
):
    i = tl.arange(0, BLOCK)
    exists = None
    if MASKED:
        exists = i < count
        i = run_in_bounds(i, exists)
    p_ptr += first
    m_ptr += first
    v_ptr += first
    g = _gradient(row, first, i, exists, HALF_DTYPE)
    p = tl.load(p_ptr + i, mask=exists)
    m = tl.load(m_ptr + i, mask=exists)
    v = tl.load(v_ptr + i, mask=exists)
    if HAS_WEIGHT_DECAY:
        g += weight_decay * p
    m += one_minus_beta1 * (g - m)
    # An infinite v stops its weight, here as in PyTorch; the difference would make it NaN.
    v = tl.where(v == float("inf"), v, v + one_minus_beta2 * (g * g - v))
    p -= step_size * m / (tl.sqrt_rn(v) / root2 + eps)
    tl.store(p_ptr + i, p, mask=exists)
    tl.store(m_ptr + i, m, mask=exists)
    tl.store(v_ptr + i, v, mask=exists)
    if not HALF_DTYPE.is_fp32():
        copy = tl.load(row + COPY)
        if copy != 0:
            copy_ptr = _pointer(row + COPY, HALF_DTYPE) + first
            tl.store(copy_ptr + i, to_memory(p, HALF_DTYPE), mask=exists)


@triton.jit
def _gradient(row, first, i, exists, HALF_DTYPE: tl.constexpr):
    if HALF_DTYPE.is_fp32():
        g = tl.load(_pointer(row + GRADIENT, tl.float32) + first + i, mask=exists)
    elif tl.load(row + HALF) != 0:
        g = tl.load(_pointer(row + GRADIENT, HALF_DTYPE) + first + i, mask=exists).to(tl.float32)
    else:
        g = tl.load(_pointer(row + GRADIENT, tl.float32) + first + i, mask=exists)
    return g


@triton.jit
def _pointer(cell_ptr, DTYPE: tl.constexpr):
    """The address in this cell as a pointer, of whose alignment the compiler then knows."""
    return tl.multiple_of(tl.load(cell_ptr).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0, to the last digits where that is close to 0."""
    # Taylor's series: what it leaves out is below 1e-8 of it for x > -0.5.
    series = 1.0 + x / 8
    for n in tl.static_range(7, 1, -1):
        series = 1.0 + x / n * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))
