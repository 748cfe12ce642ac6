"""What lies linearly around a convolution of stride 1, as part of that convolution.

Nearest upsampling by s, then a convolution of k x k taps with padding p, is the transposed
convolution of stride s and padding k - 1 - p whose k + s - 1 square taps are the sum of the s * s
shifted copies of the convolution's, turned by half. An output pixel meets ((k + s - 1) / s)^2 taps
instead of k^2, 4 instead of 9 for k = 3 and s = 2, and there is no upsampled tensor. (Karras et
al., arXiv:1710.10196 and arXiv:1812.04948, train generators with layers fused in this way.)

A convolution, then the mean of each s x s pixels, is a convolution of stride s and the same padding
whose k + s - 1 square taps are the mean of those copies: 16 products instead of 36. Both hold for
every size, PyTorch's floors of it included, and for a bias.

A convolution of k x k taps and padding p, then `F.pixel_shuffle` by r (Shi et al., 2016,
arXiv:1609.05158), is the transposed convolution of stride r, r * k square taps and padding
r * (k - 1 - p): pixel (r * y + i, r * x + j) of channel c is what channel c * r * r + i * r + j had
at (y, x), whose tap (a, b) is tap (i + r * (k - 1 - a), j + r * (k - 1 - b)). It multiplies as
much, and a pass over memory is saved. Its bias differs by phase, which is (i, j).

On a CPU the mean is taken of what goes in instead, at every pixel: then 9 products for 36 do, of
the weight as it is.

The weights are made by differentiable operations, in the weight's own dtype with sums in float32,
so that everything that differentiates or replaces a weight goes on working.
"""

import functools
import math
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from genfast import cpu, layout
from genfast.geometry import ConvGeometry
from genfast.launch import conv, predict, start
from genfast.padding import reflected, reflects

# Layers that may become part of the convolution after them, and of the one before them.
LEADING = {nn.Upsample, nn.UpsamplingNearest2d, nn.ZeroPad2d, nn.ReflectionPad2d}
TRAILING = {nn.AvgPool2d, nn.PixelShuffle}
LAYERS = LEADING | TRAILING
_SCALES = (2, 4)
_POOLED = 2
_SHUFFLED = (2, 3, 4)
# On a CPU, of float32. Weights cost as much to make as so many pixels of the smaller image gain;
# and a block costs 0.1 ms of Python more than its layers, the time of so many multiply-adds.
_LEAST_PIXELS = 1024
_LEAST_MACS = 2**23
# Values of an input so small that even the look at what is around would take longer than it gains.
_LEAST_VALUES = 2**13
_LEAST_PADDED = 2**16  # A pass of its own over so many values takes as long as such a look.
# Kernels that make a weight and its gradient, less those of a pass over images and its gradient.
_MORE_LAUNCHES = 4
# Images have fewer channels, and kernels of their own, whose time no model here tells.
_LEAST_SHUFFLED = 8


class Around(NamedTuple):
    """What lies around a convolution, one of stride 1 but for `pad`.

    pad: mode and sizes of the `F.pad` before it, or None.
    upsample: how often nearest upsampling before it repeats rows and columns; 1 for none.
    pool: the side of the squares whose mean is taken after it; 1 for none.
    shuffle: by how much its output is shuffled into pixels; 1 for not at all.
    """

    pad: tuple[str, tuple[int, ...]] | None = None
    upsample: int = 1
    pool: int = 1
    shuffle: int = 1


class Form(NamedTuple):
    """How a block with something around its convolution runs.

    before: a function of its input, or None.
    block: a `functional.Block` with nothing around.
    after: a function of the convolution's output, before norm and activation; or None.
    """

    before: Any
    block: Any
    after: Any


def upsampling(layer):
    """By what a layer upsamples so that it can be part of a convolution after it; 0 if not so."""
    if not isinstance(layer, nn.Upsample) or layer.mode != "nearest" or layer.size is not None:
        return 0
    if layer.recompute_scale_factor:
        return 0
    return _one_of(layer.scale_factor, _SCALES, int | float)


def zero_padding(layer):
    """The rows above and below, and columns on either side, that a layer adds; None if not so."""
    if type(layer) is not nn.ZeroPad2d:
        return None
    left, right, top, bottom = layer.padding
    return (top, left) if left == right >= 0 and top == bottom >= 0 else None


def pooling(layer):
    """The side of the squares that a layer averages as part of a convolution; 0 if not so."""
    if type(layer) is not nn.AvgPool2d or layer.ceil_mode or layer.divisor_override is not None:
        return 0
    if layer.padding not in (0, (0, 0)):
        return 0
    side = _one_of(layer.kernel_size, (_POOLED,), int)
    return side if _one_of(layer.stride, (side,), int) else 0


def shuffling(layer: nn.Module) -> int:
    """By what a layer shuffles channels into pixels as part of a convolution; 0 if not so."""
    if type(layer) is not nn.PixelShuffle:
        return 0
    return _one_of(layer.upscale_factor, _SHUFFLED, int)


def _one_of(value, numbers, kinds):
    """A number, or a pair of it, as an int if it is one of these and of these kinds; else 0."""
    first, *others = value if isinstance(value, tuple) else (value,)
    same = first in numbers and all(v == first for v in others) and len(others) < 2
    return int(first) if same and all(isinstance(v, kinds) for v in (first, *others)) else 0


def leads(layers, conv):
    """Whether layers, one after the other, can be part of the convolution after them.

    Args:
        layers: of the classes in `LEADING`.
        conv: a stock convolution that fuses.
    """
    if not isinstance(conv, nn.Conv2d) or conv.padding_mode != "zeros":
        return False
    upsamplings, last = list(layers[:-1]), layers[-1]
    if type(last) is nn.ReflectionPad2d:
        return len(layers) == 1
    if zero_padding(last) is None:
        upsamplings.append(last)
    if not upsamplings:
        return True
    fits = zip(padding_of(conv, layers), conv.kernel_size, strict=True)
    return (
        len(upsamplings) == 1
        and upsampling(upsamplings[0]) > 0
        and conv.stride == (1, 1)
        and all(p < k for p, k in fits)
    )


def trails(layer, conv, leading=()):
    """Whether a layer after a convolution that fuses can be part of it.

    leading: layers before the convolution that are, as `leads` allows.
    """
    if not _may_be_pooled(conv):
        return False
    if pooling(layer):
        return True
    by = shuffling(layer)
    if not by or conv.out_channels % (by * by):
        return False
    return all(p < k for p, k in zip(padding_of(conv, leading), conv.kernel_size, strict=True))


def _may_be_pooled(conv):
    return isinstance(conv, nn.Conv2d) and conv.stride == (1, 1)


def padding_of(conv, leading=()):
    """The zeros around the input of a stock convolution, (rows, columns), those layers' included.

    Args:
        conv: the convolution.
        leading: layers before it, of the classes in `LEADING`.
    """
    padding = conv.padding
    if conv.padding_mode != "zeros" or padding == "valid":
        padding = (0, 0)
    elif padding == "same":
        padding = tuple(k // 2 for k in conv.kernel_size)
    for layer in leading:
        rows, columns = zero_padding(layer) or (0, 0)
        padding = (padding[0] + rows, padding[1] + columns)
    return padding


def around(conv, leading=(), trailing=()):
    """The `Around` of a stock convolution and of layers that are part of it; None for nothing."""
    pad = None
    if leading and type(leading[0]) is nn.ReflectionPad2d:
        pad = "reflect", leading[0].padding
    elif conv.padding_mode != "zeros" and any(conv._reversed_padding_repeated_twice):
        pad = conv.padding_mode, tuple(conv._reversed_padding_repeated_twice)
    found = Around(
        pad,
        max([1, *map(upsampling, leading)]),
        max([1, *map(pooling, trailing)]),
        max([1, *map(shuffling, trailing)]),
    )
    return None if found == Around() else found


def upsampled(weight, scale):
    """The weight of the transposed convolution that upsamples first.

    Args:
        weight: of a convolution of stride 1, (out_channels, in_channels, kh, kw).
        scale: by which nearest upsampling repeats rows and columns.

    Returns:
        (in_channels, out_channels, kh + scale - 1, kw + scale - 1), in the weight's dtype and
        memory format.
    """
    summed = _over_squares(weight, scale, divisor=1)
    return layout.like(summed.transpose(0, 1).flip(2, 3), weight)


def averaged(weight, side):
    """The weight of the convolution of stride `side` that averages squares of its output.

    Args:
        weight: of a convolution of stride 1, (out_channels, in_channels, kh, kw).
        side: of the squares.

    Returns:
        (out_channels, in_channels, kh + side - 1, kw + side - 1), in the weight's dtype and memory
        format.
    """
    return layout.like(_over_squares(weight, side), weight)


def shuffled(
    weight: torch.Tensor, bias: torch.Tensor | None, by: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of the transposed convolution whose output is shuffled already.

    Args:
        weight: of a convolution of stride 1, (out_channels, in_channels, kh, kw).
        bias: (out_channels,), or None.
        by: the square root of how many channels become pixels of one.

    Returns:
        (in_channels, out_channels / by^2, kh * by, kw * by), in the weight's memory format; and
        (by^2, out_channels / by^2), or None.
    """
    in_channels, kh, kw = weight.shape[1:]
    phases = weight.flip(2, 3).unflatten(0, (-1, by, by)).permute(3, 4, 1, 5, 2, 0)
    made = phases.reshape(in_channels, kh * by, kw * by, -1).permute(0, 3, 1, 2)
    made = layout.like(made, weight)
    return made, None if bias is None else bias.view(-1, by * by).t().contiguous()


def _over_squares(weight, side, divisor=None):
    """The sum of the side * side shifted copies of each kernel, over the divisor or their number.

    Average pooling does it in one pass, in float32, and in no other precision under autocast, as a
    product with a matrix would.
    """
    most = side // 2  # It pads by no more itself.
    rest = side - 1 - most
    padded = F.pad(weight, (rest,) * 4) if rest else weight
    return F.avg_pool2d(padded, side, 1, most, divisor_override=divisor)


def form(block, way, x, dtype, size):
    """The `Form` of a block: what is around its convolution is part of it where that gains.

    Args:
        block: a `functional.Block` with an `Around`.
        way: what runs it, as `functional.implementation` names it.
        x: any tensor of the batch on its device.
        dtype: that convolutions compute in.
        size: (height, width) of what goes into it.
    """
    a, before, after = block.around, None, None
    block = block._replace(around=None)
    if a.pad is not None:
        mode, sizes = a.pad
        before = partial(F.pad, pad=sizes, mode=mode)
        ours = way == "triton" and not torch.compiler.is_compiling()  # Which makes one pass of it.
        if ours and mode == "reflect" and reflects(size, sizes):
            before = partial(reflected, sizes=sizes, dtype=dtype)
        size = size[0] + sizes[2] + sizes[3], size[1] + sizes[0] + sizes[1]
    if a.upsample == a.pool == a.shuffle == 1:
        return Form(before, block, None)
    if a.shuffle > 1:
        gains = way == "triton" and _shuffling_gains(
            a.shuffle, tuple(block.weight.shape), tuple(block.padding), tuple(size), len(x),
            block.bias is not None, dtype.itemsize, _precision(x, dtype), start.architecture(x),
        )  # fmt: skip
        if not gains:
            return Form(before, block, partial(F.pixel_shuffle, upscale_factor=a.shuffle))
        weight, bias = shuffled(block.weight, block.bias, a.shuffle)
        rest = zip(block.weight.shape[2:], block.padding, strict=True)
        block = block._replace(
            weight=weight, bias=bias, stride=(a.shuffle,) * 2,
            padding=tuple([a.shuffle * (k - 1 - p) for k, p in rest]), output_padding=(0, 0),
            shuffle=a.shuffle,
        )  # fmt: skip
        return Form(before, block, None)
    out_channels, in_channels, *kernel_size = block.weight.shape
    gains = way != "reference" and _gains(
        a, x, dtype, way, size, in_channels, out_channels, kernel_size, block.padding
    )
    if a.upsample > 1:
        upsample = partial(F.interpolate, scale_factor=a.upsample)
        if not gains:
            before = upsample
        elif way == "cpu" and _is_pointwise(kernel_size, block.padding):
            after = upsample  # It commutes, and so a part of the pixels is multiplied.
        else:
            padding = tuple(k - 1 - p for k, p in zip(kernel_size, block.padding, strict=True))
            block = block._replace(
                weight=upsampled(block.weight, a.upsample), stride=(a.upsample,) * 2,
                padding=padding, output_padding=(0, 0),
            )  # fmt: skip
        return Form(before, block, after)
    if not gains:
        return Form(before, block, partial(F.avg_pool2d, kernel_size=a.pool))
    if way != "cpu":
        block = block._replace(weight=averaged(block.weight, a.pool), stride=(a.pool,) * 2)
    elif _is_pointwise(kernel_size, block.padding):
        before = _then(before, partial(F.avg_pool2d, kernel_size=a.pool))
    else:
        most = tuple(min(p, 1) for p in block.padding)  # The mean of zeros is 0.
        mean = partial(F.avg_pool2d, kernel_size=a.pool, stride=1, padding=most)
        before = _then(before, mean)
        padding = tuple(p - m for p, m in zip(block.padding, most, strict=True))
        block = block._replace(stride=(a.pool,) * 2, padding=padding)
    return Form(before, block, None)


def _precision(x: torch.Tensor, dtype: torch.dtype) -> str:
    """How products of this dtype round on x's device, in the words of `tiles.Problem`."""
    return "half" if dtype.itemsize == 2 else start.precision(x.new_empty(0, dtype=dtype))


def _then(first, second):
    return second if first is None else lambda x: second(first(x))


def _is_pointwise(kernel_size, padding):
    return tuple(kernel_size) == (1, 1) and tuple(padding) == (0, 0)


def gains_on_cpu(conv, a, padding, x):
    """Whether a convolution on a CPU where no kernel runs gains by what is around it.

    Args:
        conv: a stock `nn.Conv2d`. Its weight is not looked at, as a parametrisation would make it.
        a: the `Around`, or None where only its padding is not its own.
        padding: the zeros around its input.
        x: the input of all of it, (N, C, H, W).
    """
    if a is None:
        return x.numel() >= _LEAST_PADDED
    if a.upsample == a.pool == 1:
        return False  # No shuffle gains there.
    return _gains(
        a, x, cpu.autocast_dtype(x), "cpu", tuple(x.shape[2:]), conv.in_channels,
        conv.out_channels, conv.kernel_size, padding,
    )  # fmt: skip


def may_gain_on_cpu(layer, x):
    """Whether `gains_on_cpu` may hold, of a layer that might lead to a convolution or be one."""
    if x.numel() < _LEAST_VALUES or x.dim() != 4:
        return False
    if type(layer) in LEADING:
        return zero_padding(layer) is not None or upsampling(layer) > 0
    return _may_be_pooled(layer)


@functools.lru_cache(maxsize=1024)  # Sizes of images and batches may be many.
def _shuffling_gains(
    by: int,
    weight_shape: tuple[int, ...],
    padding: tuple[int, int],
    size: tuple[int, int],
    images: int,
    has_bias: bool,
    itemsize: int,
    precision: str,
    architecture: str,
) -> bool:
    """Whether a convolution gains by being shuffled as it is computed, by the model.

    The products multiply as much, but in tiles of a phase's channels, which may be few.
    """
    out_channels, in_channels, kh, kw = weight_shape
    plain = ConvGeometry.conv(size, (kh, kw), (1, 1), padding)
    channels = out_channels // (by * by)
    if channels < _LEAST_SHUFFLED or size == (1, 1) or min(plain.small) < 1:
        return False
    rest = by * (kh - 1 - padding[0]), by * (kw - 1 - padding[1])
    large = ConvGeometry.conv_transpose(size, (by * kh, by * kw), (by, by), rest, (0, 0))
    given = architecture, precision, images
    before = conv.predicted(*given, plain, out_channels, in_channels)
    after = conv.predicted(*given, large, in_channels, channels)
    if before is None or after is None:
        return False
    bandwidth = predict.chip(architecture).bandwidth
    # On a GPU PyTorch's shuffle gives contiguous memory, which what follows copies: two passes and
    # their gradients are saved. The weight's and the bias's order costs some.
    values = images * math.prod(large.big) * channels
    passes = 8 * values * itemsize / bandwidth + 4 * predict.LAUNCH
    orders = 8 * math.prod(weight_shape) * itemsize / bandwidth
    orders += (6 if has_bias else 4) * predict.LAUNCH
    return before + passes > after + orders


def _gains(a, x, dtype, way, size, in_channels, out_channels, kernel_size, padding):
    scale = max(a.upsample, a.pool)
    outer = tuple(
        n * a.upsample + 2 * p - k + 1 for n, p, k in zip(size, padding, kernel_size, strict=True)
    )
    if min(outer) < scale:
        return False  # An error, or nothing to gain.
    pixels = x.shape[0] * math.prod(outer)
    pairs, taps = in_channels * out_channels, math.prod(kernel_size)
    if way == "cpu":
        macs = pixels * pairs * taps
        if dtype not in (torch.float32, torch.float64) or macs < _LEAST_MACS:
            return False
        if a.pool > 1:  # The mean of few channels costs less than what is multiplied for them.
            return taps == 1 or 2 * out_channels >= in_channels or out_channels >= 16
        return taps == 1 or (pixels >= scale**2 * _LEAST_PIXELS and macs >= 2 * _LEAST_MACS)
    # By the model: all of a step, forward and backward.
    chip = predict.chip(start.architecture(x))
    wider = math.prod([k + scale - 1 for k in kernel_size])  # A list, for torch.compile.
    fewer = 3 * pixels * pairs * (taps - wider / scale**2)
    macs = chip.macs if dtype.itemsize == 2 else chip.macs / 2
    large = pixels * (in_channels if a.upsample > 1 else out_channels) * dtype.itemsize
    small = large / scale**2
    product = max(fewer / (chip.multiprocessors * macs), 3 * (large - small) / chip.bandwidth)
    passes = 2 * (large + small) / chip.bandwidth
    making = 8 * pairs * (taps + 3 * wider) / chip.bandwidth + _MORE_LAUNCHES * predict.LAUNCH
    return product + passes > making
