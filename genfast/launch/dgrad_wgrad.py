"""dgrad of a layer and wgrad of the one below it, which reads an image, by one kernel.

if dgrad_wgrad.gains(dz, weight, geometry, below, image_geometry, c_image, sums):
    dweight, sums = dgrad_wgrad.dgrad_wgrad(dz, weight, geometry, below, image, sums)
"""

import math
from dataclasses import dataclass, replace

import torch

from genfast.backend import triton
from genfast.geometry import ConvGeometry
from genfast.launch import (
    boxes,
    conv,
    from_image,
    memory,
    passes,
    predict,
    start,
    sums,
    tape,
    tiles,
)
from genfast.launch.epilogue import Epilogue
from genfast.launch.operand import Output

if triton is not None:
    from genfast.kernels import dgrad_wgrad as kernels

# Elements of a window: more of them would not fit the registers.
_MOST_ELEMENTS = 64


@dataclass(frozen=True)
class Shipped:
    """Chosen by reading machine code: no spills, and several programs resident.

    tile: of the dgrad, a `tiles.GemmConfig`.
    resident: programs that share a multiprocessor.
    """

    tile: tiles.GemmConfig
    resident: int


# By descriptors alone, and for Hopper alone, where a product's first operand may lie in registers:
# on Blackwell results are in a memory of their own, and nobody has looked at what that costs.
_SHIPPED = {
    "half": Shipped(tiles.GemmConfig(64, 128, 64, 4, 3, True), 3),
    "tf32": Shipped(tiles.GemmConfig(64, 64, 32, 4, 3, True), 3),
}


def gains(
    dz: torch.Tensor,
    weight: torch.Tensor,
    geometry: ConvGeometry,
    below: Output,
    image_geometry: ConvGeometry,
    c_image: int,
    with_sums: bool,
) -> bool:
    """Whether the one kernel takes both products, and is predicted to take less time than two.

    By the model in `predict`, where the two may take a larger tile, but write and read the gradient
    between them.

    Args:
        dz, weight, geometry: of `conv.dgrad`.
        below: the output of the layer below.
        image_geometry, c_image: of that layer's convolution.
        with_sums: whether the sums of its gradient are wanted too.
    """
    n, c_small, c_big = dz.shape[0], *weight.shape[:2]
    if below.vectors is not None or geometry.is_product:
        return False
    if image_geometry.taps * from_image.CHANNELS > _MOST_ELEMENTS:
        return False
    if not from_image.fits(image_geometry, c_big, c_image, n):
        return False
    problem = conv.problem_of("dgrad", dz, geometry, c_small, c_big, with_sums)
    architecture = start.architecture(dz)
    shipped = _shipped(dz)
    if shipped is None or not (boxes.folds(geometry) and boxes.stride_divides_kernel(geometry)):
        return False
    if any(channels * dz.element_size() % 16 for channels in (c_small, c_big)):
        return False  # No descriptors: see `memory.descriptor_fits`.
    alone = tiles.gemm_config(architecture, problem)
    if not alone.descriptors:  # PyTorch's library has none either.
        return False
    # A smaller last batch goes the same way.
    problem = replace(problem, images=tiles.representative(n))
    chip = predict.chip(architecture)
    gradient = problem.images * c_big * math.prod(geometry.big) * problem.itemsize
    # dgrad reads as much as it writes, the output below; then wgrad, bound by memory, reads it.
    written = max(predict.cycles(alone, problem, chip), (problem.bytes + gradient) / chip.bandwidth)
    apart = written + predict.LAUNCH + gradient / chip.bandwidth
    return predict.cycles(shipped.tile, problem, chip) < apart


def dgrad_wgrad(
    dz: torch.Tensor,
    weight: torch.Tensor,
    geometry: ConvGeometry,
    below: Output,
    image: from_image.Padded,
    with_sums: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight gradient of a layer that reads an image, from the gradient of the one above it.

    Args:
        dz: (N, C_small, ...) of `geometry.small`: see `gains`, which holds.
        weight: (C_small, C_big, kh, kw), of the layer above.
        geometry: of that layer.
        below: the output of the layer that reads the image, (N, C_big, ...) of `geometry.big`.
        image: the `from_image.Padded` that it reads.
        with_sums: whether the sums of its gradient are wanted too.

    Returns:
        (C_big, c_image, kh, kw) of the layer that reads the image; and the sums of the gradient of
        what its activation takes, (1, parts, C_big), or None: see `Epilogue`.
    """
    small, weight = memory.nhwc(dz), memory.nhwc(weight)
    n, _, _, c_small = small.shape
    c_big = weight.shape[3]
    y = memory.nhwc(below.value)
    small, y, weight = (t if memory.descriptor_fits(t) else t.clone() for t in (small, y, weight))
    shipped = _shipped(small)
    tile = shipped.tile
    size = tuple(map(tiles.ceil_div, geometry.big, geometry.stride))
    box = tiles.box(tile.block_n, *size)
    boxes_n, boxes_h, boxes_w = map(tiles.ceil_div, (n, *size), box)
    count = boxes_n * boxes_h * boxes_w
    phases = geometry.stride[0] * geometry.stride[1]
    channel_tiles = tiles.ceil_div(c_big, tile.block_m)
    programs, shares = passes.shares(small, count * phases, channel_tiles, shipped.resident)

    below_image = image.geometry
    dweight = memory.channels_last((c_big, *below_image.kernel_size, image.c_big), small)
    target = sums.partials(programs, dweight)
    reductions = Epilogue(output=below, sums=with_sums).reductions(y, count * phases)
    tape.start(
        kernels.dgrad_wgrad_image,
        (channel_tiles, programs),
        small=boxes.small_descriptor(small, box, tile.block_k),
        weight=memory.descriptor(weight.view(c_small, -1), [tile.block_k, tile.block_m]),
        below=boxes.big_descriptor(y, geometry, box, tile.block_m),
        padded_ptr=image.data,
        out_ptr=target,
        sums_ptr=target if reductions is None else reductions,
        N=n,
        H_big=geometry.big[0],
        W_big=geometry.big[1],
        C_big=c_big,
        C_small=c_small,
        boxes=count,
        boxes_h=boxes_h,
        boxes_w=boxes_w,
        **shares,
        **_windows(image),
        negative_slope=below.negative_slope,
        KH=geometry.kernel_size[0],
        KW=geometry.kernel_size[1],
        **boxes.stride_and_padding(geometry),
        HAS_SUMS=reductions is not None,
        ACTIVATION=below.activation,
        STORED_DTYPE=start.tl_dtype(small.dtype),
        **start.arithmetic(small),
        **boxes.alignments(c_big, c_small),
        BOX_N=box[0],
        BOX_H=box[1],
        BOX_W=box[2],
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        BLOCK_E=max(16, tiles.power_of_two(below_image.taps * from_image.CHANNELS)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    sums.sum_partials(target, dweight)
    return dweight, reductions


def _shipped(tensor):
    """The `Shipped` for operands like a tensor, None where there is none."""
    architecture, precision = start.architecture(tensor), conv.precision_of(tensor)
    if architecture == "interpreter":
        return Shipped(tiles.shipped(architecture, precision)[0], 1)
    return _SHIPPED.get(precision) if tiles.family(architecture) == "sm_90" else None


def _windows(image):
    """Where windows begin, for the kernel."""
    n, height, width, channels = image.data.shape
    geometry = image.geometry
    stride_h, stride_w = geometry.stride
    # Whatever the sizes, all steps are multiples of it: see `kernels.from_image`.
    unit = 2 * channels if stride_w % 2 == 0 else channels
    image_step = height * width * channels // unit
    row_step = stride_h * width * channels // unit
    rows, columns = geometry.small
    last = (n - 1) * image_step + (rows - 1) * row_step
    return dict(
        image_step=image_step,
        row_step=row_step,
        window_step=width * channels // unit,
        last=last + (columns - 1) * stride_w * channels // unit,
        C_IMAGE=image.c_big,
        IMAGE_KH=geometry.kernel_size[0],
        IMAGE_KW=geometry.kernel_size[1],
        IMAGE_STRIDE_W=stride_w,
        UNIT=unit,
    )
