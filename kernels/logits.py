"""fprop, dgrad and wgrad of a kernel that covers the whole map and leaves few channels: logits.

`DCGANDiscriminator` ends so: 4 x 4 pixels of 512 channels become one number. As matrix products
these would have one column; they are dot products, and bound by memory. An image is a row of `big`,
[N, K], K being all of its elements, and the weight is [C_SMALL, K].

Addresses are 64-bit: an activation may hold more than 2^31 elements.
"""

import triton
import triton.language as tl

from .activation import activate
from .loading import in_bounds
from .normalizing import load_vectors, normalized, normalized_rows
from .overlap import wait_for_previous
from .product import gradient_at_input, gradient_epilogue
from .rounding import rounded


@triton.jit(do_not_specialize=["group_images"])
def logits_fprop(
    big_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    K,
    negative_slope,
    vectors_ptr,
    C_big,
    group_images,
    big_slope,
    C_SMALL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BIG_ACTIVATION: tl.constexpr,
    STORED_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[n, cs] = act(sum over k of big[n, k] * weight[cs, k] + bias[cs]). Grid: (N,).

    With HAS_NORM, big is normalised and activated as it is read, by the vectors of the group of
    `group_images` images that n belongs to. CHANNELS is C_big where that divides BLOCK_K, else 0.
    """
    wait_for_previous()
    n = tl.program_id(0).to(tl.int64)
    big_ptr += n * K
    if HAS_NORM:
        group = tl.program_id(0) // group_images
        if CHANNELS:
            # Each step has the same channels, several times.
            mean, scale, shift = load_vectors(vectors_ptr, group, C_big, tl.arange(0, CHANNELS))
    acc = (tl.zeros((BLOCK_K,), ACC_DTYPE),) * C_SMALL
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        big = tl.load(big_ptr + k % K, mask=k < K, other=0.0).to(ACC_DTYPE)
        if HAS_NORM:
            if CHANNELS:
                big = normalized(
                    big.reshape(BLOCK_K // CHANNELS, CHANNELS),
                    mean[None, :], scale[None, :], shift[None, :], big_slope, BIG_ACTIVATION,
                ).reshape(BLOCK_K)  # fmt: skip
            else:
                mean, scale, shift = load_vectors(vectors_ptr, group, C_big, k % C_big)
                big = normalized(big, mean, scale, shift, big_slope, BIG_ACTIVATION)
            big = tl.where(k < K, rounded(big, STORED_DTYPE), 0.0)
        sums = ()
        for cs in tl.static_range(C_SMALL):
            weight = tl.load(weight_ptr + cs * K + k % K, mask=k < K, other=0.0)
            sums = sums + (acc[cs] + big * weight.to(ACC_DTYPE),)
        acc = sums
    for cs in tl.static_range(C_SMALL):
        logit = tl.sum(acc[cs], axis=0)
        if HAS_BIAS:
            logit += tl.load(bias_ptr + cs).to(ACC_DTYPE)
        logit = activate(logit, negative_slope, ACTIVATION)
        tl.store(out_ptr + n * C_SMALL + cs, logit.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["N", "tiles_n", "tiles_k"])
def logits_dgrad(
    small_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    below_ptr,
    vectors_ptr,
    sums_ptr,
    N,
    K,
    C_big,
    tiles_n,
    tiles_k,
    negative_slope,
    C_SMALL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_BELOW: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    AT_INPUT: tl.constexpr,
    STORES: tl.constexpr,
    ACTIVATION: tl.constexpr,
    STORED_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[n, k] = act(sum over cs of small[n, cs] * weight[cs, k] + bias[k % C_big]).

    With HAS_BELOW it is the gradient of a layer's output, `below`, of out's shape: see
    `gradient_epilogue`, whose rows are the k and whose columns are images. N then counts the images
    of one group, of which there are `tiles_n` tiles. Memory takes the time here, so that gradient
    is computed twice rather than stored: for its sums alone, without STORES, and then AT_INPUT, see
    `gradient_at_input`. Grid: (tiles of N, of all groups * tiles of K).
    """
    wait_for_previous()
    tile = tl.program_id(0) // tiles_k
    k = tl.program_id(0) % tiles_k * BLOCK_K + tl.arange(0, BLOCK_K)
    if HAS_BELOW:
        group = tile // tiles_n
        n0 = (tile - group * tiles_n) * BLOCK_N
        exists = n0 + tl.arange(0, BLOCK_N) < N
        n = (group * N + n0).to(tl.int64) + tl.arange(0, BLOCK_N)
    else:
        n = tile.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        exists = n < N
    row = in_bounds(n, exists)
    acc = tl.zeros((BLOCK_N, BLOCK_K), ACC_DTYPE)
    for cs in tl.static_range(C_SMALL):
        small = tl.load(small_ptr + row * C_SMALL + cs, mask=exists, other=0.0).to(ACC_DTYPE)
        weight = tl.load(weight_ptr + cs * K + k % K, mask=k < K, other=0.0).to(ACC_DTYPE)
        acc += small[:, None] * weight[None, :]
    if HAS_BELOW:
        count = tl.minimum(N - n0, BLOCK_N)
        below = tl.load(
            below_ptr + row[:, None] * K + (k % K)[None, :],
            mask=exists[:, None] & (k < K)[None, :],
            other=0.0,
        )
        # acc is 0 where an image does not exist: small is.
        if AT_INPUT:
            acc = gradient_at_input(
                acc.T, below.T, count, group, k, C_big, N * (K // C_big), vectors_ptr, sums_ptr,
                negative_slope, ACTIVATION,
            ).T  # fmt: skip
        else:
            acc = gradient_epilogue(
                acc.T, below.T, count, tile, group, k, K, C_big, vectors_ptr, sums_ptr,
                negative_slope, HAS_NORM, HAS_SUMS, ACTIVATION, STORED_DTYPE,
            ).T  # fmt: skip
    else:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + k % C_big).to(ACC_DTYPE)[None, :]
        acc = activate(acc, negative_slope, ACTIVATION)
    if STORES:
        tl.store(
            out_ptr + n[:, None] * K + k[None, :],
            acc.to(out_ptr.dtype.element_ty),
            mask=exists[:, None] & (k < K)[None, :],
        )


@triton.jit(do_not_specialize=["N", "steps_per_split", "group_images"])
def logits_wgrad(
    big_ptr,
    small_ptr,
    out_ptr,
    N,
    K,
    steps_per_split,
    vectors_ptr,
    C_big,
    group_images,
    big_slope,
    C_SMALL: tl.constexpr,
    HAS_NORM: tl.constexpr,
    GROUPED: tl.constexpr,
    BIG_ACTIVATION: tl.constexpr,
    STORED_DTYPE: tl.constexpr,
    ACC_DTYPE: tl.constexpr,
    REPEATS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[split, cs, k] = sum over the split's n of small[n, cs] * big[n, k].

    REPEATS * BLOCK_N rows are on their way at a time; those that differ by BLOCK_N belong to one
    thread, which adds them first. With HAS_NORM, big is normalised and activated as it is read,
    each group of `group_images` images by its own vectors. Grid: (tiles of K, splits).
    """
    wait_for_previous()
    ROWS: tl.constexpr = REPEATS * BLOCK_N
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    split = tl.program_id(1).to(tl.int64)
    if HAS_NORM:
        channel = k % C_big
        group = tl.minimum(split * steps_per_split * ROWS, N - 1).to(tl.int32) // group_images
        mean, scale, shift = load_vectors(vectors_ptr, group, C_big, channel)
    acc = (tl.zeros((BLOCK_N, BLOCK_K), ACC_DTYPE),) * C_SMALL
    for step in range(0, steps_per_split):
        n = (split * steps_per_split + step) * ROWS + tl.arange(0, ROWS)
        row = in_bounds(n, n < N)
        big = tl.load(
            big_ptr + row[:, None] * K + (k % K)[None, :],
            mask=(n < N)[:, None] & (k < K)[None, :],
            other=0.0,
        )
        if HAS_NORM:
            first = ((split * steps_per_split + step) * ROWS).to(tl.int32)
            last = tl.minimum(first + ROWS, N) - 1
            big = normalized_rows(
                big, n, first, last, group_images, group, mean, scale, shift, vectors_ptr, C_big,
                channel, big_slope, GROUPED, BIG_ACTIVATION,
            )  # fmt: skip
            big = tl.where((n < N)[:, None], rounded(big, STORED_DTYPE), 0.0)
        big = big.to(ACC_DTYPE)
        sums = ()
        for cs in tl.static_range(C_SMALL):
            small = tl.load(small_ptr + row * C_SMALL + cs, mask=n < N, other=0.0)
            products = big * small.to(ACC_DTYPE)[:, None]
            added = tl.sum(products.reshape(REPEATS, BLOCK_N, BLOCK_K), axis=0)
            sums = sums + (acc[cs] + added,)
        acc = sums
    for cs in tl.static_range(C_SMALL):
        total = tl.sum(acc[cs], axis=0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + (split * C_SMALL + cs) * K + k, total, mask=k < K)
