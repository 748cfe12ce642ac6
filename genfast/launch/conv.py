"""The three products of a convolution: fprop, dgrad and wgrad, with what rides on them."""

import math
from dataclasses import replace
from functools import partial

import torch

from genfast import library, reference
from genfast.backend import triton
from genfast.geometry import ConvGeometry
from genfast.launch import (
    boxes,
    first_use,
    from_image,
    logits,
    memory,
    norm,
    phases,
    predict,
    start,
    sums,
    tape,
    tiles,
    to_image,
)
from genfast.launch.epilogue import PLAIN
from genfast.launch.operand import operand

if triton is not None:
    from genfast.kernels import conv as kernels

# The least K of a matrix unit's step in half precision.
_LEAST_DEPTH = 16
# The kernels divide numbers of pixels in 32 bits, a tile beyond the last one too.
_PIXEL_LIMIT = 2**30
_FLAT = ConvGeometry((1, 1), (1, 1), (1, 1), (1, 1), (0, 0))


def fprop(big, weight, geometry, epilogue=PLAIN):
    """`conv2d`, or the input gradient of `conv_transpose2d`.

    Args:
        big: (N, C_big, H, W) of `geometry.big`, or an `Operand` or `Output` of such.
        weight: (C_small, C_big, kh, kw).
        geometry: a `ConvGeometry`.
        epilogue: an `Epilogue` over C_small channels.

    Returns:
        (N, C_small, Ho, Wo) of `geometry.small`, channels_last; and its `TileStatistics`, its sums
        (groups, parts, 2 * channels or channels) as a gradient, or None: see `Epilogue`.
    """
    big = operand(big)
    c_small, c_big = weight.shape[:2]
    is_logit = logits.fits(geometry, c_small, epilogue) and epilogue.output is None
    is_image = not is_logit and from_image.fits(geometry, c_small, c_big, big.value.shape[0])
    if epilogue.added is not None and (is_logit or is_image):
        return _adding_later(fprop, big, weight, geometry, epilogue)
    if is_logit:
        value, how = big.unnormalized()
        return logits.fprop(value, weight, geometry, epilogue, **how), None
    if is_image:
        return from_image.fprop(big.padded(geometry), weight, epilogue)
    return _conv("fprop", big.tensor(), weight, geometry, epilogue)


def dgrad(small, weight, geometry, epilogue=PLAIN):
    """`conv_transpose2d`, or the input gradient of `conv2d`.

    As `fprop` with the sides swapped: (N, C_small, ...) of `geometry.small` in,
    (N, C_big, ...) of `geometry.big` out, the epilogue over C_big channels.
    """
    small = operand(small)
    c_small, c_big = weight.shape[:2]
    is_logit = logits.fits(geometry, c_small, epilogue)
    is_image = not is_logit and to_image.fits(geometry, c_small, c_big, epilogue)
    if epilogue.added is not None and (is_logit or is_image):
        return _adding_later(dgrad, small, weight, geometry, epilogue)
    if is_logit:
        return logits.dgrad(small.tensor(), weight, geometry, epilogue)
    if is_image:
        value, how = small.as_read()
        return to_image.dgrad(value, weight, geometry, epilogue, **how), None
    return _conv("dgrad", small.tensor(), weight, geometry, epilogue)


def _adding_later(product, source, weight, geometry, epilogue):
    """As `fprop` or `dgrad`, where the kernels beside images and logits add nothing."""
    before = replace(epilogue, added=None, activation="identity")
    z, _ = product(source, weight, geometry, before)
    z.add_(epilogue.added)
    return reference.activate(z, epilogue.activation, epilogue.negative_slope, inplace=True), None


def wgrad(big, small, geometry):
    """The weight gradient of `conv2d` and `conv_transpose2d`: (C_small, C_big, kh, kw).

    Args:
        big: (N, C_big, H, W) of `geometry.big`, or an `Operand` or `Output` of such.
        small: (N, C_small, Ho, Wo) of `geometry.small`, likewise.
        geometry: a `ConvGeometry`.
    """
    big, small = operand(big), operand(small)
    c_small, c_big = small.channels, big.channels
    if logits.fits(geometry, c_small, PLAIN):
        value, how = big.unnormalized()
        return logits.wgrad(value, small.tensor(), geometry, **how)
    if from_image.fits(geometry, c_small, c_big, big.value.shape[0]):
        value, how = small.as_read()
        return from_image.wgrad(big.padded(geometry), value, **how)
    return _wgrad(big.tensor(), small.tensor(), geometry)


def wgrad_makes(source_is_big, weight, geometry, images):
    """Whether `wgrad` can make an `Output` of its value as it reads it; see `Output.as_read`.

    Args:
        source_is_big: the side that the output is.
        weight: (C_small, C_big, kh, kw).
        geometry: a `ConvGeometry`.
        images: of the batch.
    """
    c_small, c_big = weight.shape[:2]
    if logits.fits(geometry, c_small, PLAIN):
        return source_is_big
    return from_image.fits(geometry, c_small, c_big, images) and not source_is_big


def computed_twice(operation, source, weight, geometry, below):
    """Whether the gradient of an `Output` takes less time if it is computed twice than if stored.

    So it is beside images and logits, where products are bound by memory: `norm_sums`, and then the
    product with an epilogue `at_input`.

    Args:
        operation: "fprop" or "dgrad", that computes it.
        source: (N, C, H, W), what the product reads.
        weight, geometry: of the convolution.
        below: the `Output`.
    """
    if not below.is_made_reading:
        return False
    c_small, c_big = weight.shape[:2]
    is_logit = logits.fits(geometry, c_small, PLAIN)
    if operation == "dgrad":
        return is_logit
    fits = not is_logit and from_image.fits(geometry, c_small, c_big, source.shape[0])
    return fits and from_image.has_norm_sums(geometry, source, below)


def norm_sums(operation, source, weight, geometry, below, want_dweight):
    """The sums that the backward of an `Output`'s batch norm needs, where it is `computed_twice`.

    Args:
        operation, weight, geometry, below: as there.
        source: a tensor or an `Operand`.
        want_dweight: whether the weight's gradient is wanted, of `below` and the source.

    Returns:
        (groups, parts, 2 * channels): sums of g and of g * xhat; and the weight's gradient, or None
        where it was not wanted or is not computed with them.
    """
    source = operand(source)
    if operation == "dgrad":
        return logits.norm_sums(source.tensor(), weight, geometry, below), None
    return from_image.norm_sums(source.padded(geometry), weight, below, want_dweight)


def sums_apart(operation, source, weight, geometry, output_is_read):
    """Whether sums over each image take less time as a pass of their own than with the product.

    With it no tile may hold pixels of two images, and of a tile of 128 pixels an image of 4 x 4
    fills an eighth. By the model in `predict`.

    Args:
        operation: "fprop" or "dgrad".
        source: (N, C, H, W), what the product reads.
        weight, geometry: of the convolution.
        output_is_read: whether the pass reads another tensor of the result's size too.
    """
    c_small, c_big = weight.shape[:2]
    architecture = start.architecture(source)
    if source.shape[0] == 1:
        return False
    size = geometry.small
    if operation == "dgrad":
        size = tuple(map(tiles.ceil_div, geometry.big, geometry.stride))
    problem = problem_of(operation, source, geometry, c_small, c_big, True)
    config = tiles.gemm_config(architecture, problem)
    # A smaller last batch goes the same way.
    images = tiles.representative(source.shape[0])
    problem = replace(problem, images=images)
    if config.library:
        return True
    box = tiles.box(config.block_n, *size)
    alone, together = (
        tiles.pixel_tiles((n, *size), config.block_n, box if config.descriptors else None)
        for n in (1, images)
    )
    if images * alone == together:
        return False
    chip = predict.chip(architecture)
    grown = replace(problem, images=tiles.ceil_div(images * images * alone, together))
    plain = replace(problem, statistics=False)
    channels, sides = (c_small, geometry.small) if operation == "fprop" else (c_big, geometry.big)
    read = images * channels * math.prod(sides) * problem.itemsize * (1 + output_is_read)
    of_pass = predict.LAUNCH + read / chip.bandwidth
    return predict.cycles(config, plain, chip) + of_pass < predict.cycles(config, grown, chip)


def predicted(
    architecture: str,
    precision: str,
    images: int,
    geometry: ConvGeometry,
    c_small: int,
    c_big: int,
) -> float | None:
    """The cycles of fprop, dgrad and wgrad together, by the model in `predict`.

    Args:
        architecture, precision: as of `tiles.gemm_config` and of a `tiles.Problem`.
        images: of the batch.
        geometry, c_small, c_big: of the convolution.

    Returns:
        None where PyTorch's library computes one of them.
    """
    total, chip = 0, predict.chip(architecture)
    for operation in ("fprop", "dgrad", "wgrad"):
        problem = tiles.Problem(
            operation, precision, False, c_small, c_big, geometry.small, geometry.big,
            geometry.kernel_size, geometry.stride, images,
        )  # fmt: skip
        config = tiles.gemm_config(architecture, problem)
        if config.library:
            return None
        total += predict.cycles(config, problem, chip)
    return total


def _wgrad(big, small, geometry, config=None):
    """As `wgrad`, by a `GemmConfig`; None takes the one to choose."""
    run = partial(_wgrad, big, small, geometry)
    channels = small.shape[1], big.shape[1]
    config, splits = _config("wgrad", big, geometry, *channels, PLAIN, config, run)
    if config.library:
        return library.wgrad(big, small, geometry)
    big, small = memory.nhwc(big), memory.nhwc(small)
    dweight = memory.channels_last((small.shape[3], *geometry.kernel_size, big.shape[3]), big)
    big, small, geometry = _collapse(big, small, geometry)
    n, h_small, w_small, c_small = small.shape
    _, h_big, w_big, c_big = big.shape

    packed = c_big < min(config.block_n, _LEAST_DEPTH) and geometry.taps > 1
    # The reduction is over pixels: what a descriptor moves is a box of block_k of them, whole rows
    # of images, so that in small it is a run of pixels.
    box = tiles.box(config.block_k, h_small, w_small)
    boxed = (
        config.descriptors
        and not packed
        and h_small % box[1] == w_small % box[2] == 0  # A ragged box would pair zeros with pixels.
        and boxes.folds(geometry)
        and memory.descriptor_fits(big)
    )
    small_boxed = boxed and memory.descriptor_fits(small)
    k_tiles = tiles.pixel_tiles((n, h_small, w_small), config.block_k, box if boxed else None)
    columns = geometry.taps * c_big if packed else c_big
    mn_tiles = tiles.ceil_div(c_small, config.block_m) * tiles.ceil_div(columns, config.block_n)
    taps = 1 if packed else geometry.taps
    # What is summed is summed for any batch: another dtype of the target is another kernel.
    summed = splits > 1
    tiles_per_split = tiles.ceil_div(k_tiles, min(splits, k_tiles))
    splits = tiles.ceil_div(k_tiles, tiles_per_split)

    target = sums.partials(splits, dweight) if summed else dweight
    if boxed:
        big = boxes.big_descriptor(big, geometry, box, config.block_n)
    if small_boxed:
        small = memory.descriptor(small.view(-1, c_small), [config.block_k, config.block_m])
    tape.start(
        kernels.wgrad,
        (mn_tiles, taps, splits),
        big=big,
        small=small,
        out_ptr=target,
        N=n,
        H_big=h_big,
        W_big=w_big,
        C_big=c_big,
        H_small=h_small,
        W_small=w_small,
        C_small=c_small,
        tiles_per_split=tiles_per_split,
        KW=geometry.kernel_size[1],
        TAPS=geometry.taps,
        **boxes.stride_and_padding(geometry),
        **boxes.alignments(c_big, c_small),
        **start.arithmetic(dweight),
        DESCRIPTORS=boxed,
        SMALL_DESCRIPTOR=small_boxed,
        PACKED=packed,
        **_tile(config, box),
    )
    if summed:
        sums.sum_partials(target, dweight)
    return dweight


def _conv(direction, source, weight, geometry, epilogue, config=None):
    """As `fprop` or `dgrad`, the direction, by a `GemmConfig`; None takes the one to choose."""
    to_small = direction == "fprop"
    run = partial(_conv, direction, source, weight, geometry, epilogue)
    if epilogue.at_input is not None:
        raise ValueError("expected an epilogue at_input only beside images and logits, got one")
    config, _ = _config(direction, source, geometry, *weight.shape[:2], epilogue, config, run)
    if config.library:
        return _through_library(direction, source, weight, geometry, epilogue)
    source, weight = memory.nhwc(source), memory.nhwc(weight)
    c_small, c_big = weight.shape[0], weight.shape[3]
    channels = c_small if to_small else c_big
    n, groups = source.shape[0], epilogue.parts_of_batch
    out_size = geometry.small if to_small else geometry.big
    result = memory.channels_last((n, *out_size, channels), source)
    out = memory.nhwc(result)
    below = epilogue.below(out)

    # From here on, in the terms of the matrix product that runs.
    big, small = (source, out) if to_small else (out, source)
    big, small, geometry = _collapse(big, small, geometry)
    c_big = big.shape[3]
    weight = weight.view(c_small, geometry.taps * c_big)
    rows = c_small if to_small else c_big
    count = 1 if to_small else math.prod(geometry.stride)
    # Phase 0 has the most pixels; the descriptors' phases are all alike.
    size = small.shape[1:3]
    if not to_small:
        size = tuple(map(tiles.ceil_div, big.shape[1:3], geometry.stride))

    packed = to_small and c_big < min(config.block_k, _LEAST_DEPTH) and geometry.taps > 1
    if to_small:
        # A descriptor's K step of the weight must not reach into the next tap.
        divisor = c_big & -c_big
        if _LEAST_DEPTH <= divisor < config.block_k:
            config = replace(config, block_k=divisor)
    box = tiles.box(config.block_n, *size)
    boxed = (
        config.descriptors
        and not packed
        and boxes.folds(geometry)
        and memory.descriptor_fits(weight.view(-1, c_big))  # Each tap's box begins aligned.
        and (not to_small or (memory.descriptor_fits(big) and c_big % config.block_k == 0))
        and (to_small or boxes.stride_divides_kernel(geometry))
    )
    small_boxed = boxed and memory.descriptor_fits(small)
    pixels = n // groups, *size
    tiles_per_group = tiles.pixel_tiles(pixels, config.block_n, box if boxed else None)
    parts = groups * tiles_per_group * count
    reductions = epilogue.reductions(out, parts, rows)

    stored_boxed = small_boxed
    # Groups whose boxes may end in images of the next one, for which they have the wrong vectors.
    apart = groups if boxed and box[0] > 1 and epilogue.sums_per_channel == 2 and groups > 1 else 0
    if boxed:
        block_big, block_small = (
            (config.block_k, config.block_m) if to_small else (config.block_m, config.block_k)
        )
        if not to_small:
            # In the folded view of a strided side a pixel's neighbour follows it: no writing into
            # that.
            whole = geometry.stride[1] == 1 or c_big % config.block_m == 0
            stored_boxed = whole and memory.descriptor_fits(big)
        if apart and not to_small:
            # A box as wide as a phase is one of pixels in a row of all phases, too.
            stored_boxed &= geometry.stride[0] == 1 or size[1] == box[2]
        apart = apart if stored_boxed else 0
        if stored_boxed and (epilogue.output is not None or epilogue.added is not None):
            below = below if memory.descriptor_fits(below) else below.clone()
            if to_small:
                below = boxes.small_descriptor(below, box, block_small, apart)
            else:
                below = boxes.big_descriptor(below.view(big.shape), geometry, box, block_big, apart)
        if to_small or stored_boxed:
            big = boxes.big_descriptor(big, geometry, box, block_big, 0 if to_small else apart)
        if small_boxed:
            small = boxes.small_descriptor(small, box, block_small, apart if to_small else 0)
        weight = memory.descriptor(weight, [block_small, block_big])
    shared = dict(
        weight=weight,
        below=below,
        N=n // groups,
        H_big=geometry.big[0],
        W_big=geometry.big[1],
        C_big=c_big,
        H_small=geometry.small[0],
        W_small=geometry.small[1],
        C_small=c_small,
        channels=channels,
        tiles_per_group=tiles_per_group,
        KH=geometry.kernel_size[0],
        KW=geometry.kernel_size[1],
        **boxes.stride_and_padding(geometry),
        **boxes.alignments(c_big, c_small),
        **epilogue.arguments(out, reductions),
        HAS_ADDED=epilogue.added is not None,
        **start.arithmetic(source),
        DESCRIPTORS=boxed,
        STORE_DESCRIPTOR=stored_boxed,
        GROUPED=apart > 0,
        **_tile(config, box),
        **_registers(
            config, small_boxed and stored_boxed and epilogue.sums_per_channel > 0, source
        ),
    )
    grid = (parts * tiles.ceil_div(rows, config.block_m),)
    if to_small:
        tape.start(kernels.fprop, grid, big=big, out=small, PACKED=packed, **shared)
    else:
        tape.start(
            kernels.dgrad,
            grid,
            small=small,
            out=big,
            bias_step=channels if epilogue.is_biased_by_phase else 0,
            SMALL_DESCRIPTOR=small_boxed,
            **shared,
        )
    return result, reductions


def _through_library(direction, source, weight, geometry, epilogue):
    """As `_conv`, with PyTorch's convolution and the epilogue as passes of their own."""
    convolve = library.fprop if direction == "fprop" else library.dgrad
    by_phase = epilogue.is_biased_by_phase
    z = convolve(source, weight, geometry, None if by_phase else epilogue.bias)
    z = z.contiguous(memory_format=torch.channels_last)
    if by_phase:
        phases.add_bias(z, epilogue.bias, geometry.stride)
    if epilogue.output is not None:
        return _gradient_of_output(z, epilogue)
    statistics = norm.statistics_of(z, epilogue.groups) if epilogue.groups else None
    activation = epilogue.activation, epilogue.negative_slope
    if epilogue.vectors is not None:
        z = norm.normalize_activate(z, epilogue.vectors, *activation, added=epilogue.added)
    else:
        if epilogue.added is not None:
            z.add_(epilogue.added)
        z = reference.activate(z, *activation, inplace=True)
    return z, statistics


def _gradient_of_output(dy, epilogue):
    """dy times act'(u) of the epilogue's output, and its sums, by passes of their own."""
    output = epilogue.output
    g = norm.activation_backward(dy, output.told_by(), output.activation, output.negative_slope)
    if output.vectors is not None:
        return g, norm.backward_sums(g, output.value, output.vectors)
    if epilogue.sums:
        return g, g.sum((0, 2, 3), dtype=start.acc_dtype(g.dtype)).view(1, 1, -1)
    return g, None


def _config(operation, tensor, geometry, c_small, c_big, epilogue, config, run):
    """The `GemmConfig` of a product and, for wgrad, in how many parts to cut its reduction.

    config: it, where it is chosen already, or None: run(config) then computes the product by one.
    """
    statistics = epilogue.groups > 0 or epilogue.sums_per_channel > 0
    problem = problem_of(operation, tensor, geometry, c_small, c_big, statistics)
    architecture = start.architecture(tensor)
    if problem.images * max(map(math.prod, (geometry.small, geometry.big))) >= _PIXEL_LIMIT:
        config = tiles.LIBRARY
    elif config is None:
        config = first_use.config(architecture, problem, epilogue, run, tensor.device)
    if operation != "wgrad" or config.library:
        return config, 1
    return config, tiles.splits(architecture, problem, config)


def precision_of(tensor):
    """The `precision` of a `Problem` whose operands are like the tensor."""
    return "half" if tensor.element_size() == 2 else start.precision(tensor)


def problem_of(operation, tensor, geometry, c_small, c_big, statistics):
    """The `Problem` of a product, one of whose operands is the tensor."""
    if geometry.is_product:
        geometry, c_big = _FLAT, c_big * geometry.taps
    return tiles.Problem(
        operation=operation,
        precision=precision_of(tensor),
        statistics=statistics,
        c_small=c_small,
        c_big=c_big,
        small=geometry.small,
        big=geometry.big,
        kernel_size=geometry.kernel_size,
        stride=geometry.stride,
        images=tensor.shape[0],
    )


def _collapse(big, small, geometry):
    """See an unpadded kernel that covers its whole input at once as the matrix product it is.

    Latents (1 x 1) to 4 x 4 and 4 x 4 to one logit: the big side's pixels become channels, in
    memory the same array, and no tap is multiplied by padding.
    """
    if not geometry.is_product:
        return big, small, geometry
    return big.view(big.shape[0], 1, 1, -1), small, _FLAT


def _registers(config, described, tensor):
    """Compiler options of sums of gradients, where all tiles are moved by descriptors.

    On Hopper they then fit the registers of which two programs of 8 warps share a multiprocessor's;
    the compiler, unasked, would rather have more in flight.
    """
    shared = described and config.num_warps == 8 and start.architecture(tensor) == "sm_90"
    return dict(maxnreg=128) if shared else {}


def _tile(config, box):
    return dict(
        BOX_N=box[0],
        BOX_H=box[1],
        BOX_W=box[2],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
