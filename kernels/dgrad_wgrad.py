"""Where a network's backward ends at an image: dgrad of one layer and wgrad of the one below.

The layer below convolves an image of 1 to 4 channels, which needs no gradient, so the gradient of
that layer's output, a step's largest tensor, has one reader: the gradient of its weight.

    g[cb, pixel] = act'(y[pixel, cb]) * (sum over taps and cs of weight * small)     as kernels/conv
    out[cb, k] = sum over pixels of g[cb, pixel] * window[pixel, k]            as kernels/from_image

Here g is rounded as if it had been stored, and multiplied by the windows of its pixels at once. It
is the accumulator of the first product and the first operand of the second, which on Hopper may be
in registers, where it lies as it was computed.
"""

import triton
import triton.language as tl

from .from_image import load_window, share, store_dweight
from .loading import aligned
from .overlap import wait_for_previous
from .product import dot, gradient_epilogue, zero_beyond
from .rounding import as_stored

# Arguments that only count: another value of them is no other kernel.
_COUNTS = (
    "N", "H_big", "W_big", "boxes", "boxes_h", "boxes_w", "tiles_per_program", "one_more",
    "image_step", "row_step", "window_step", "last",
)  # fmt: skip


@triton.jit(do_not_specialize=_COUNTS)
def dgrad_wgrad_image(
    small,
    weight,
    below,
    padded_ptr,
    out_ptr,
    sums_ptr,
    N,
    H_big,
    W_big,
    C_big,
    C_small,
    boxes,
    boxes_h,
    boxes_w,
    tiles_per_program,
    one_more,
    image_step,
    row_step,
    window_step,
    last,
    negative_slope,
    KH: tl.constexpr,
    KW: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    C_IMAGE: tl.constexpr,
    IMAGE_KH: tl.constexpr,
    IMAGE_KW: tl.constexpr,
    IMAGE_STRIDE_W: tl.constexpr,
    UNIT: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORED_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BIG_ALIGNMENT: tl.constexpr,
    SMALL_ALIGNMENT: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """out[program, cb, ky, kx, c] = sum over the program's pixels of g * window.

    `small`, `weight` and `below` (y) are descriptors as those of `conv.dgrad`, `padded_ptr` is an
    image as kernels/from_image.py has it; IMAGE_KH to UNIT are of the convolution that reads it.
    big's pixel (n, y, x) begins to meet it n * image_step + y * row_step + x * IMAGE_STRIDE_W * 4 /
    UNIT units after its first element, the last of all pixels at `last`; the rows of a window are
    window_step apart.

    Both products have the rows M = C_big. The first has the columns N = pixels of a box in a phase
    and K = the phase's taps * C_small; the second the columns E, a window's elements, and that N as
    its K. A program takes `tiles_per_program` tiles in a row, the first `one_more` programs one
    more: the phases of a box, which read the same pixels of small, then those of the next of
    `boxes`, boxes_h * boxes_w of them an image. With HAS_SUMS sums[tile, cb] are those of g, the
    tiles of a phase together, as `conv.dgrad` has them. Grid: (tiles of C_big, programs).
    """
    wait_for_previous()
    C_big = aligned(C_big, BIG_ALIGNMENT)
    C_small = aligned(C_small, SMALL_ALIGNMENT)
    PHASES: tl.constexpr = STRIDE_H * STRIDE_W
    PHASE_KW: tl.constexpr = KW // STRIDE_W
    PHASE_TAPS: tl.constexpr = KH // STRIDE_H * PHASE_KW
    COLUMN_STEP: tl.constexpr = IMAGE_STRIDE_W * 4 // UNIT
    cb0 = tl.program_id(0) * BLOCK_M
    cb = cb0 + tl.arange(0, BLOCK_M)
    program = tl.program_id(1)
    first, tiles = share(program, tiles_per_program, one_more)

    lane = tl.arange(0, BLOCK_N)
    lane_n = lane // (BOX_H * BOX_W)
    lane_y = lane // BOX_W % BOX_H
    lane_x = lane % BOX_W
    lane_corner = lane_n * image_step + lane_y * STRIDE_H * row_step
    lane_corner += lane_x * (STRIDE_W * COLUMN_STEP)

    total = tl.zeros((BLOCK_M, BLOCK_E), dtype=ACC_DTYPE)
    for tile in range(first, first + tiles):
        phase = tile % PHASES
        py = phase // STRIDE_W
        px = phase % STRIDE_W
        box = tile // PHASES
        n0 = box // (boxes_h * boxes_w) * BOX_N
        y0 = box // boxes_w % boxes_h * BOX_H
        x0 = box % boxes_w * BOX_W
        rows_left = H_big // STRIDE_H - y0
        columns_left = W_big // STRIDE_W - x0
        exists = (lane_n < N - n0) & (lane_y < rows_left) & (lane_x < columns_left)
        count = tl.minimum(BOX_N, N - n0)
        count *= tl.minimum(BOX_H, rows_left) * tl.minimum(BOX_W, columns_left)

        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=ACC_DTYPE)
        # A tap STRIDE further on in the kernel meets the pixel before.
        for step in range(0, tl.cdiv(C_small, BLOCK_K) * PHASE_TAPS):
            tap = step % PHASE_TAPS
            cs0 = step // PHASE_TAPS * BLOCK_K
            ky = (py + PAD_H) % STRIDE_H + tap // PHASE_KW * STRIDE_H
            kx = (px + PAD_W) % STRIDE_W + tap % PHASE_KW * STRIDE_W
            dy = (py + PAD_H) // STRIDE_H - tap // PHASE_KW
            dx = (px + PAD_W) // STRIDE_W - tap % PHASE_KW
            a = weight.load([cs0, (ky * KW + kx) * C_big + cb0]).T
            b = small.load([n0, y0 + dy, x0 + dx, cs0]).reshape(BLOCK_N, BLOCK_K)
            acc = dot(a, b.T, acc, PRECISION)

        # Pixels that do not exist begin where others do, the last one if need be: their g is 0.
        corner = n0 * image_step + (y0 * STRIDE_H + py) * row_step
        corner += (x0 * STRIDE_W + px) * COLUMN_STEP
        corner = tl.minimum(corner + lane_corner, last).to(tl.int64) * UNIT
        # Loaded after the loop, into shared memory that the loop is done with.
        window = load_window(padded_ptr, corner, 0, window_step, IMAGE_KH, IMAGE_KW, UNIT, BLOCK_E)
        y = below.load([n0, y0, py, x0, px * C_big + cb0]).reshape(BLOCK_N, BLOCK_M).T
        acc = gradient_epilogue(
            zero_beyond(acc, exists, count), y, count, phase * boxes + box, 0, cb, C_big, C_big,
            out_ptr, sums_ptr, negative_slope, False, HAS_SUMS, ACTIVATION, STORED_DTYPE,
        )  # fmt: skip
        total = dot(as_stored(acc, True, window.dtype, STORED_DTYPE), window, total, PRECISION)

    store_dweight(out_ptr, total, program, 0, cb, C_big, C_IMAGE, IMAGE_KH, IMAGE_KW, BLOCK_E)
