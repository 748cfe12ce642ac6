"""The products of a kernel that covers the whole map and leaves few channels, as dot products."""

from genfast.backend import INTERPRETING, triton
from genfast.launch import memory, norm, passes, start, sums, tape, tiles
from genfast.launch.epilogue import Epilogue

if triton is not None:
    from genfast.kernels import logits as kernels

# What wgrad reads at a time: rows, of which a thread has some, and columns, which of 2 bytes are a
# line of the cache.
_ROWS, _REPEATS, _COLUMNS = (8, 4, 16) if INTERPRETING else (256, 8, 64)
# Steps of wgrad that take as long as starting a kernel that adds up partial sums.
_STEPS_OF_A_LAUNCH = 6


def fits(geometry, c_small, epilogue):
    """Whether `fprop`, `dgrad` and `wgrad` take this problem; see `why_not`."""
    return why_not(geometry, c_small, epilogue) is None


def why_not(geometry, c_small, epilogue):
    """A sentence saying why the products here do not take this problem; None if they do.

    Args:
        geometry: a `ConvGeometry`.
        c_small: the channels of its small side.
        epilogue: an `Epilogue`.
    """
    if not geometry.is_product:
        return "the kernel does not cover the whole map"
    if not 1 <= c_small <= 4:
        return f"logits have 1 to 4 channels, these have {c_small}"
    if epilogue.groups or epilogue.vectors is not None:
        return "logits are not normalised"
    return None


def fprop(big, weight, geometry, epilogue, vectors=None, activation="identity", negative_slope=0.0):
    """As `conv.fprop`, where `fits`: (N, C_small, 1, 1), channels_last.

    Args:
        big, weight, geometry, epilogue: as there, big being a tensor.
        vectors: None, or (groups, 5, C_big) of a batch norm whose input big is, and whose activated
            output is meant.
        activation, negative_slope: of that output, as in `functional.conv_block`.
    """
    big, weight = memory.nhwc(big), memory.nhwc(weight)
    c_small = weight.shape[0]
    c_big = big.shape[3]
    result = memory.channels_last((big.shape[0], *geometry.small, c_small), big)
    k = geometry.taps * c_big
    block_k = _block(k, 64 if INTERPRETING else 4096)
    tape.start(
        kernels.logits_fprop,
        (big.shape[0],),
        big_ptr=big,
        weight_ptr=weight,
        bias_ptr=memory.dense(epilogue.bias, result),
        out_ptr=memory.nhwc(result),
        K=k,
        C_SMALL=c_small,
        **_epilogue(epilogue),
        **_normalization(big, vectors, activation, negative_slope),
        **_accumulator(big),
        CHANNELS=c_big if vectors is not None and block_k % c_big == 0 else 0,
        BLOCK_K=block_k,
    )
    return result


def dgrad(small, weight, geometry, epilogue):
    """As `conv.dgrad`, where `fits`: (N, C_big, *geometry.big), channels_last; its sums or None."""
    result = memory.channels_last((len(small), *geometry.big, weight.shape[1]), small)
    return result, _dgrad(small, weight, geometry, epilogue, memory.nhwc(result), stores=True)


def norm_sums(small, weight, geometry, below):
    """Of a gradient that `dgrad` would compute, the sums that a batch norm's backward needs.

    The gradient itself is not stored: `dgrad` with an epilogue `at_input` computes it again.

    Args:
        small, weight, geometry: as of `dgrad`.
        below: the `Output` whose gradient it is, with vectors.

    Returns:
        (groups, parts, 2 * C_big): sums of g and of g * xhat.
    """
    z = memory.nhwc(below.value)
    return _dgrad(small, weight, geometry, Epilogue(output=below), z, stores=False)


def _dgrad(small, weight, geometry, epilogue, out, stores):
    """As `dgrad`, but its sums or None. Without `stores` out, (N, H, W, C_big), stays as it is."""
    small, weight = memory.nhwc(small), memory.nhwc(weight)
    n, _, _, c_small = small.shape
    c_big = weight.shape[3]
    k = geometry.taps * c_big
    # A program reads its columns of the weight once for all of its rows. Sums are of many rows: a
    # program writes as many as it has columns.
    rows, columns = 4, 1024
    if epilogue.output is not None:
        rows, columns = 16 if stores else 32, 256
    if start.architecture(small) == "interpreter":
        rows, columns = 2, 64
    block_n, block_k = rows, _block(k, columns)
    groups = epilogue.parts_of_batch
    tiles_n, tiles_k = tiles.ceil_div(n // groups, block_n), tiles.ceil_div(k, block_k)
    sums_of_gradient = epilogue.reductions(out, groups * tiles_n, k)
    tape.start(
        kernels.logits_dgrad,
        (groups * tiles_n * tiles_k,),
        small_ptr=small,
        weight_ptr=weight,
        bias_ptr=memory.dense(epilogue.bias, out),
        out_ptr=out,
        below_ptr=epilogue.below(out),
        N=n // groups,
        K=k,
        C_big=c_big,
        tiles_n=tiles_n,
        tiles_k=tiles_k,
        C_SMALL=c_small,
        HAS_BIAS=epilogue.bias is not None,
        # Sums are of what is stored.
        STORED_DTYPE=start.tl_dtype(out.dtype if stores else start.acc_dtype(out.dtype)),
        AT_INPUT=epilogue.at_input is not None,
        STORES=stores,
        **epilogue.of_gradient(out, sums_of_gradient),
        **_accumulator(small),
        BLOCK_N=block_n,
        BLOCK_K=block_k,
    )
    return sums_of_gradient


def wgrad(big, small, geometry, vectors=None, activation="identity", negative_slope=0.0):
    """As `conv.wgrad`, where `fits`: (C_small, C_big, kh, kw), channels_last.

    Args:
        big, small, geometry: as there, both being tensors.
        vectors, activation, negative_slope: as in `fprop`.
    """
    big, small = memory.nhwc(big), memory.nhwc(small)
    n, _, _, c_small = small.shape
    c_big = big.shape[3]
    dweight = memory.channels_last((c_small, *geometry.kernel_size, c_big), big)
    k = geometry.taps * c_big
    block_k = _block(k, _COLUMNS)
    tiles_k = tiles.ceil_div(k, block_k)
    steps = tiles.ceil_div(n, _ROWS)
    steps_per_split = tiles.ceil_div(steps, _splits(steps, tiles_k, passes.programs(big, 1)))
    splits = tiles.ceil_div(steps, steps_per_split)
    target = sums.partials(splits, dweight) if splits > 1 else dweight
    tape.start(
        kernels.logits_wgrad,
        (tiles_k, splits),
        big_ptr=big,
        small_ptr=small,
        out_ptr=target,
        N=n,
        K=k,
        steps_per_split=steps_per_split,
        C_SMALL=c_small,
        **_normalization(big, vectors, activation, negative_slope),
        GROUPED=vectors is not None and vectors.shape[0] > 1,
        **_accumulator(big),
        REPEATS=_REPEATS,
        BLOCK_N=_ROWS // _REPEATS,
        BLOCK_K=block_k,
        num_warps=8,
    )
    if splits > 1:
        sums.sum_partials(target, dweight)
    return dweight


def _splits(steps, tiles_k, programs):
    """In how many parts to cut wgrad's steps: more than one only where that pays for their sum.

    programs: that fill the GPU, one a multiprocessor.
    """
    splits = min(max(programs // tiles_k, 1), steps)
    saved = steps - tiles.ceil_div(steps, splits)
    return splits if saved > _STEPS_OF_A_LAUNCH else 1


def _block(k, largest):
    return min(tiles.power_of_two(k), largest)


def _epilogue(epilogue):
    return dict(
        negative_slope=epilogue.negative_slope,
        HAS_BIAS=epilogue.bias is not None,
        ACTIVATION=epilogue.activation,
    )


def _normalization(big, vectors, activation, negative_slope):
    """big: (N, H, W, C_big) memory."""
    groups, normalization = norm.reading(big, vectors)
    return normalization | dict(
        C_big=big.shape[3],
        group_images=big.shape[0] // groups,
        big_slope=negative_slope,
        BIG_ACTIVATION=activation,
    )


def _accumulator(tensor):
    return dict(ACC_DTYPE=start.tl_dtype(start.acc_dtype(tensor.dtype)))
