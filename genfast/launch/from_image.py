"""fprop and wgrad where the big side is an image: its padded copy, and what runs on that.

why = from_image.why_not(geometry, c_small, c_big, images)     None: it fits
image = from_image.padded(x, geometry)                         once an image
small, statistics = from_image.fprop(image, weight, epilogue)
dweight = from_image.wgrad(image, small)
sums, dweight = from_image.norm_sums(image, weight, below)    a gradient's, which is not stored

x = from_image.joined(reals, fakes, geometry, dtype)           two batches, in padded memory at once
image = from_image.found(x, geometry)                          its `Padded`, without a pass
"""

import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from genfast.backend import triton
from genfast.geometry import ConvGeometry
from genfast.launch import memory, norm, passes, start, sums, tape, tiles

if triton is not None:
    from genfast.kernels import from_image as kernels

# The channels of a padded image.
CHANNELS = 4
# Of `norm_sums`, at most: it has two accumulators.
_SUMS_CHANNELS = 64
# Pixels are divided by sizes through multiplications that are exact below this.
_PIXEL_LIMIT = 2**30
# Of `pad_image` and `join_images`: four pixels a thread.
_PAD_BLOCK = 512
# The storages that `joined` has written, and the `_signature` of what it returned; and those that
# it has read last, the `_signature` of the generated images there, and a `_Copy` of them.
# PyTorch keeps a storage's Python object as long as the storage, whatever views come and go: here
# what autograd saved is recognised, and the next owner of the same addresses is not.
_written: Any = weakref.WeakKeyDictionary()
_copied: Any = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Padded:
    """An image with 4 channels and a border of zeros, as the kernels here read it.

    data: dense (N, Hp, Wp, 4): `geometry.padding` rows and columns of zeros, the image, and zeros
        as far as any window reaches; Wp is even. Channels from c_big on are zeros.
    geometry: of the convolution whose big side it is.
    c_big: channels of the image itself.
    """

    data: torch.Tensor
    geometry: ConvGeometry
    c_big: int


@dataclass(frozen=True)
class _Copy:
    """Images as they were at a version of theirs, at a version of the padded memory they are in."""

    images_version: int
    data: torch.Tensor
    data_version: int


@dataclass(frozen=True)
class ImageConfig:
    """Tiles of the kernels, chosen by reading machine code: no spills, several programs resident.

    channels: at most so many of the small side in a tile; half as many take half the warps.
    pixels: of a tile of fprop.
    statistics_pixels: of one with statistics, which take registers of their own.
    elements: at most so many of the windows in a step of fprop, and in a tile of wgrad.
    reduced: pixels of a step of wgrad.
    num_warps: for a tile of `channels`.
    fprop_stages, wgrad_stages: tiles on their way from memory.
    resident: programs that share a multiprocessor.
    sums_resident: so many of `norm_sums`, which takes more registers.
    """

    channels: int
    pixels: int
    statistics_pixels: int
    elements: int
    reduced: int
    num_warps: int
    fprop_stages: int
    wgrad_stages: int
    resident: int
    sums_resident: int


# Small enough that a test's few pixels and channels span several ragged tiles.
_INTERPRETED = ImageConfig(32, 32, 32, 64, 32, 1, 1, 1, 1, 1)
# Elements of two and of four bytes.
_SHIPPED = {
    "sm_90": {
        2: ImageConfig(128, 128, 64, 64, 64, 8, 3, 4, 3, 3),
        4: ImageConfig(64, 64, 64, 64, 32, 4, 2, 3, 3, 2),
    },
    "sm_80": {
        2: ImageConfig(128, 128, 64, 64, 64, 8, 2, 3, 2, 2),
        4: ImageConfig(64, 64, 64, 32, 32, 4, 2, 3, 2, 2),
    },
    "gfx942": {
        2: ImageConfig(128, 128, 64, 64, 64, 8, 1, 2, 2, 2),
        4: ImageConfig(64, 64, 64, 32, 32, 4, 1, 2, 2, 2),
    },
}
_SHIPPED["sm_100"] = _SHIPPED["sm_90"]
# Without matrix instructions: what more would not fit into the registers.
_IEEE = ImageConfig(32, 64, 64, 32, 32, 4, 2, 2, 3, 2)


def why_not(geometry, c_small, c_big, images):
    """Why these kernels do not take a convolution; None if they do.

    In float64 they run interpreted only.

    Args:
        geometry: a `ConvGeometry`.
        c_small, c_big: channels.
        images: of the batch.
    """
    if not 1 <= c_big <= CHANNELS:
        return f"expected 1 to {CHANNELS} channels on the big side, got {c_big}"
    if c_small < 8 or c_small % 8:
        return f"expected a multiple of 8 channels on the small side, got {c_small}"
    if images < 1:
        return f"expected at least one image, got {images}"
    if geometry.is_product:
        return "expected windows that move over the image, got a kernel as large as the image"
    pixels = images * max(math.prod(geometry.small), math.prod(padded_size(geometry)))
    if pixels >= _PIXEL_LIMIT:
        return f"expected fewer than {_PIXEL_LIMIT} pixels, got {pixels}"
    return None


def fits(geometry, c_small, c_big, images):
    """Whether these kernels take a convolution: see `why_not`."""
    return why_not(geometry, c_small, c_big, images) is None


def padded_size(geometry):
    """(Hp, Wp): everything of the image and of the windows, the width made even."""
    height, width = (
        max(padding + big, (small - 1) * stride + kernel)
        for big, small, kernel, stride, padding in zip(
            geometry.big, geometry.small, geometry.kernel_size, geometry.stride, geometry.padding,
            strict=True,
        )
    )  # fmt: skip
    return height, width + width % 2


def padded(x, geometry, dtype=None, y=None, activation="identity", negative_slope=0.0, out=None):
    """The padded copy of an image, or of the gradient at an image, in one pass.

    Args:
        x: (N, C, H, W) of `geometry.big`, of 1 to 4 channels; contiguous or channels_last is read
            as it is.
        geometry: a `ConvGeometry`.
        dtype: of the copy; that of x by default.
        y: like x, or None: act(u), where x is the gradient of y and the copy becomes that of u.
        activation, negative_slope: of y, as in `functional.conv_block`.
        out: dense (N, Hp, Wp, 4) to write, a run of a larger batch for example, in place of a new
            tensor; its dtype counts.
    """
    n, channels, *_ = x.shape
    x = _dense(x)
    if out is None:
        out = torch.empty(_padded_shape(n, geometry), dtype=dtype or x.dtype, device=x.device)
    other = x if y is None else _dense(y)
    pixels = out.numel() // CHANNELS
    tape.start(
        kernels.pad_image,
        (tiles.ceil_div(pixels, _PAD_BLOCK),),
        x_ptr=x,
        y_ptr=other,
        padded_ptr=out,
        pixels=pixels,
        **_places(geometry),
        **_strides("x", x),
        **_strides("y", other),
        negative_slope=negative_slope,
        C=channels,
        HAS_Y=y is not None,
        ACTIVATION=activation,
        ACC_DTYPE=start.tl_dtype(start.acc_dtype(x.dtype)),
        BLOCK=_PAD_BLOCK,
    )
    return Padded(out, geometry, channels)


def joined(reals, fakes, geometry, dtype, scale=1.0, shift=0.0):
    """Real and generated images as one batch, which the kernels here then read where it lies.

    Args:
        reals: (N, C, H, W) of `geometry.big`, of 1 to 4 channels, uint8 or floating point up to
            float32, of any strides.
        fakes: likewise, floating point.
        geometry: of the convolution that will read them; `fits` holds for 2N images.
        dtype: of the batch: float32 or half precision.
        scale, shift: a real pixel p becomes p * scale + shift, rounded in float32 after each.

    Returns:
        (2N, C, H, W), first the real images: a view of padded memory, which `found` knows again.
        Whoever changes it in place changes what the kernels read. As long as nobody does, `found`
        also knows that the fakes are in there, if they were of `dtype`.
    """
    n, channels, *_ = reals.shape
    data = torch.empty(_padded_shape(2 * n, geometry), dtype=dtype, device=reals.device)
    pixels = data.numel() // (2 * CHANNELS)
    tape.start(
        kernels.join_images,
        (tiles.ceil_div(pixels, _PAD_BLOCK), 2),
        real_ptr=reals,
        fake_ptr=fakes,
        padded_ptr=data,
        pixels=pixels,
        **_places(geometry),
        **_strides("real", reals),
        **_strides("fake", fakes),
        scale=scale,
        shift=shift,
        C=channels,
        HAS_SCALE=(scale, shift) != (1.0, 0.0),
        BLOCK=_PAD_BLOCK,
        enable_fp_fusion=False,  # Two roundings, as in PyTorch's operations.
    )
    (top, left), (height, width) = geometry.padding, geometry.big
    inside = data[:, top : top + height, left : left + width, :channels]
    x = inside.permute(0, 3, 1, 2)
    _written[x.untyped_storage()] = _signature(x, geometry)
    if fakes.dtype == dtype:
        copy = _Copy(fakes._version, data[n:], data._version)
        _copied[fakes.untyped_storage()] = _signature(fakes, geometry), copy
    return x


def lies_padded(x, geometry):
    """Whether x is all of what `joined` gave for this geometry."""
    if x.shape[1] > CHANNELS:  # No image, and nothing to look up.
        return False
    return _written.get(x.untyped_storage()) == _signature(x, geometry)


def found(x, geometry):
    """The `Padded` of x that `joined` has written for this geometry; None if it has not.

    Nothing but what x holds can have been changed there: the border and missing channels are zeros.
    """
    n, channels, *_ = x.shape
    if channels > CHANNELS:
        return None
    if lies_padded(x, geometry):
        shape = _padded_shape(n, geometry)
        dense = [math.prod(shape[i + 1 :]) for i in range(4)]
        return Padded(x.detach().as_strided(shape, dense, 0), geometry, channels)
    signature, copy = _copied.get(x.untyped_storage(), (None, None))
    if signature != _signature(x, geometry):
        return None
    if (x._version, copy.data._version) != (copy.images_version, copy.data_version):
        return None
    return Padded(copy.data, geometry, channels)


def fprop(image, weight, epilogue):
    """`conv2d`, or the input gradient of `conv_transpose2d`.

    Args:
        image: a `Padded`.
        weight: (C_small, C_big, kh, kw).
        epilogue: an `Epilogue` over C_small channels.

    Returns:
        (N, C_small, Ho, Wo), channels_last; its `TileStatistics`, its sums as a gradient or None.
    """
    data, geometry = image.data, image.geometry
    n, c_small, groups = data.shape[0], weight.shape[0], epilogue.parts_of_batch
    result = memory.channels_last((n, *geometry.small, c_small), data)
    out = memory.nhwc(result)
    config = _config(data)
    block_m = _channel_block(config, c_small)
    pixels = n // groups * math.prod(geometry.small)
    alone = epilogue.groups == 0 and epilogue.output is None
    block_n = config.pixels if alone else config.statistics_pixels
    tiles_per_group = tiles.ceil_div(pixels, block_n)
    count = groups * tiles_per_group
    channel_tiles = tiles.ceil_div(c_small, block_m)
    programs, shares = passes.shares(data, count, channel_tiles, config.resident)
    reductions = epilogue.reductions(out, count)
    tape.start(
        kernels.fprop_image,
        (channel_tiles, programs),
        padded_ptr=data,
        weight_ptr=memory.nhwc(weight),
        out_ptr=out,
        below_ptr=epilogue.below(out),
        pixels=pixels,
        eighths=c_small // 8,
        tiles_per_group=tiles_per_group,
        **shares,
        **_windows(image),
        **epilogue.arguments(out, reductions),
        AT_INPUT=epilogue.at_input is not None,
        **start.arithmetic(data),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=_element_block(config, _elements(geometry)),
        num_warps=_warps(config, block_m),
        num_stages=config.fprop_stages,
    )
    return result, reductions


def has_norm_sums(geometry, tensor, below):
    """Whether `norm_sums` takes the gradient at an image like the tensor, and the layer below.

    Args:
        geometry: of a convolution for which `fits` holds.
        tensor: of the image's dtype and device.
        below: an `Output`.
    """
    if not below.is_made_reading or len(below.vectors) > 1:
        return False
    elements = _elements(geometry)
    return elements <= _element_block(_config(tensor), elements)


def norm_sums(image, weight, below, want_dweight):
    """Of a gradient that `fprop` would compute, the sums that a batch norm's backward needs.

    The gradient itself is not stored: `fprop` with an epilogue `at_input` computes it again, as
    memory would take longer.

    Args:
        image: a `Padded`, the gradient at an image, where `has_norm_sums`.
        weight: (C_small, C_big, kh, kw) of the `conv_transpose2d` that made the image.
        below: the `Output` that it made it of, (N, C_small, Ho, Wo), with vectors.
        want_dweight: whether the weight's gradient, which takes the same reading, is wanted.

    Returns:
        (1, parts, 2 * C_small): sums of g and of g * xhat; and the weight's gradient or None.
    """
    data, geometry = image.data, image.geometry
    z, c_small = memory.nhwc(below.value), weight.shape[0]
    config = _config(data)
    block_m = min(_SUMS_CHANNELS, _channel_block(config, c_small))
    block_n = config.statistics_pixels
    pixels = data.shape[0] * math.prod(geometry.small)
    count = tiles.ceil_div(pixels, block_n)
    channel_tiles = tiles.ceil_div(c_small, block_m)
    programs, shares = passes.shares(data, count, channel_tiles, config.sums_resident)
    of_norm = z.new_empty((1, programs, 2 * c_small), dtype=start.acc_dtype(z.dtype))
    dweight = partials = None
    if want_dweight:
        dweight = memory.channels_last((c_small, *geometry.kernel_size, image.c_big), data)
        partials = sums.partials(programs, dweight)
    tape.start(
        kernels.norm_sums_image,
        (channel_tiles, programs),
        padded_ptr=data,
        weight_ptr=memory.nhwc(weight),
        z_ptr=z,
        vectors_ptr=below.vectors,
        sums_ptr=of_norm,
        dweight_ptr=partials if want_dweight else of_norm,
        pixels=pixels,
        eighths=c_small // 8,
        **shares,
        **_windows(image),
        negative_slope=below.negative_slope,
        HAS_WGRAD=want_dweight,
        ACTIVATION=below.activation,
        STORED_DTYPE=start.tl_dtype(z.dtype),
        **start.arithmetic(data),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=_element_block(config, _elements(geometry)),
        num_warps=_warps(config, block_m),
        num_stages=config.fprop_stages,
        # Unasked, the compiler takes 213 for 4 warps, and only two programs fit.
        **(dict(maxnreg=168) if config.sums_resident == 3 else {}),
    )
    if want_dweight:
        sums.sum_partials(partials, dweight)
    return of_norm, dweight


def wgrad(image, small, y=None, vectors=None, activation="identity", negative_slope=0.0):
    """The weight gradient of `conv2d` and `conv_transpose2d`: (C_small, C_big, kh, kw).

    Args:
        image: a `Padded`.
        small: (N, C_small, Ho, Wo) of `geometry.small`, in the image's dtype.
        y: like small, or None: act(u), where small is the gradient of y, and that of u is meant.
        vectors: None, or (groups, 5, C_small) of a batch norm whose input small is, and whose
            activated output is meant. Not together with y.
        activation, negative_slope: of y, or of that output, as in `functional.conv_block`.
    """
    data, geometry, c_big = image.data, image.geometry, image.c_big
    small = memory.nhwc(small)
    y = None if y is None else memory.nhwc(y)
    groups, normalization = norm.reading(small, vectors)
    c_small = small.shape[3]
    dweight = memory.channels_last((c_small, *geometry.kernel_size, c_big), data)
    config = _config(data)
    elements = _elements(geometry)
    block_m = _channel_block(config, c_small)
    block_n = _element_block(config, elements)
    pixels = data.shape[0] * math.prod(geometry.small)
    steps = tiles.ceil_div(pixels, config.reduced)
    mn_tiles = tiles.ceil_div(c_small, block_m), tiles.ceil_div(elements, block_n)
    # Fewer programs than fprop's, as each writes partial sums, and none that is short: it would pay
    # more for these than it shares.
    programs = tiles.ceil_div(2 * passes.programs(data, config.resident), 3)
    splits = min(tiles.ceil_div(programs, math.prod(mn_tiles)), tiles.ceil_div(steps, 4))
    tiles_per_split = tiles.ceil_div(steps, splits)
    splits = tiles.ceil_div(steps, tiles_per_split)
    target = sums.partials(splits, dweight) if splits > 1 else dweight
    tape.start(
        kernels.wgrad_image,
        (*mn_tiles, splits),
        padded_ptr=data,
        small_ptr=small,
        y_ptr=small if y is None else y,
        out_ptr=target,
        pixels=pixels,
        eighths=c_small // 8,
        tiles_per_split=tiles_per_split,
        **_windows(image),
        negative_slope=negative_slope,
        group_pixels=pixels // groups,
        HAS_Y=y is not None,
        GROUPED=groups > 1,
        **normalization,
        ACTIVATION=activation,
        **start.arithmetic(data),
        # An operand that a program computed is written to shared memory in rows only if it is the
        # second one; wgmma's first one would be put together in registers, 2 bytes at a time.
        SWAPPED=(
            vectors is not None and start.architecture(data) == "sm_90" and data.element_size() == 2
        ),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=config.reduced,
        num_warps=_warps(config, block_m),
        num_stages=config.wgrad_stages,
    )
    if splits > 1:
        sums.sum_partials(target, dweight)
    return dweight


def _padded_shape(n, geometry):
    return n, *padded_size(geometry), CHANNELS


def _signature(x, geometry):
    return geometry, x.dtype, x.shape, x.stride(), x.storage_offset()


def _places(geometry):
    """What tells which pixel of an image a pixel of the padded one holds."""
    size = padded_size(geometry)
    width_magic, width_shift = _magic(size[1])
    height_magic, height_shift = _magic(size[0])
    return dict(
        H=geometry.big[0],
        W=geometry.big[1],
        width_magic=width_magic,
        width_shift=width_shift,
        height_magic=height_magic,
        height_shift=height_shift,
        Hp=size[0],
        Wp=size[1],
        pad_h=geometry.padding[0],
        pad_w=geometry.padding[1],
    )


def _config(data):
    architecture = start.architecture(data)
    if architecture == "interpreter":
        return _INTERPRETED
    amd = architecture.startswith("gfx")  # whose matrix instructions take float32 as it is
    if data.element_size() == 4 and start.precision(data) == "ieee" and not amd:
        return _IEEE
    return _SHIPPED[tiles.family(architecture)][data.element_size()]


def _channel_block(config, c_small):
    return min(config.channels, max(16, tiles.power_of_two(c_small)))


def _element_block(config, elements):
    return min(config.elements, max(16, tiles.power_of_two(elements)))


def _warps(config, block_m):
    return max(min(4, config.num_warps), config.num_warps * block_m // config.channels)


def _elements(geometry):
    """Of a window."""
    return geometry.taps * CHANNELS


def _windows(image):
    """Where windows begin, for the kernels: steps are in units that all of them divide by."""
    geometry = image.geometry
    _, height, width, _ = image.data.shape
    kernel_h, kernel_w = geometry.kernel_size
    stride_h, stride_w = geometry.stride
    small_h, small_w = geometry.small
    unit = 2 * CHANNELS if stride_w % 2 == 0 else CHANNELS
    width_magic, width_shift = _magic(small_w)
    height_magic, height_shift = _magic(small_h)
    return dict(
        image_step=(height - small_h * stride_h) * width * CHANNELS // unit,
        row_step=(stride_h * width - small_w * stride_w) * CHANNELS // unit,
        window_step=width * CHANNELS // unit,
        width_magic=width_magic,
        width_shift=width_shift,
        height_magic=height_magic,
        height_shift=height_shift,
        C_BIG=image.c_big,
        KH=kernel_h,
        KW=kernel_w,
        STRIDE_W=stride_w,
        UNIT=unit,
    )


def _magic(divisor):
    """What `kernels.from_image._quotient` multiplies and shifts by to divide numbers below 2^30."""
    shift = (divisor - 1).bit_length()
    return -(-(1 << (30 + shift)) // divisor), shift


def _dense(x):
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return x if dense else x.contiguous()


def _strides(name, x):
    n, c, h, w = x.stride()
    return {f"stride_{name}n": n, f"stride_{name}c": c, f"stride_{name}h": h, f"stride_{name}w": w}
