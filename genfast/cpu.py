"""Convolutions on the CPU: PyTorch's own, but for shapes of GANs that a matrix product does faster.

A layer between a latent and a map, or a map and a logit, is a matrix product: forward and backward
take half of oneDNN's time in float32, and a seventh in bfloat16.

The other two ways are for bfloat16 on processors that multiply it. Measured beside oneDNN on 2
cores with AVX-512 BF16, batch 64: the weight gradient of 512 x 256 channels on 4 x 4 maps takes
24 ms, as a product of unfolded images 12 ms; the layer from 64 channels to RGB 8.0 ms, with its
four phases as 12 channels of one convolution 4.6 ms. In float32 both lose: 0.7 of oneDNN's speed.

Tensors are (N, C, H, W), weights (C_small, C_big, kh, kw), as in `genfast.launch`. Results and
gradients have the memory formats that PyTorch gives them; batch norm sums channels_last memory less
exactly. Which way is taken depends on shapes, formats, dtypes and the processor, so repeated runs
give the same bits.
"""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from genfast import layout
from genfast.geometry import ConvGeometry

# oneDNN's bfloat16 weight gradient is slow on maps of so few pixels. On larger ones unfolding the
# images costs what the product wins.
_MOST_PIXELS_UNFOLDED = 16
# oneDNN computes the channels of a convolution's output in blocks of 16.
_MOST_PHASE_CHANNELS = 16


def looks_for_bfloat16():
    """Asks PyTorch what `has_bfloat16` knows."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


# To ask takes as long as the rest of the look at a layer.
_HAS_BFLOAT16 = looks_for_bfloat16()


def has_bfloat16():
    """Whether this processor multiplies bfloat16; otherwise it is emulated."""
    return _HAS_BFLOAT16


def may_gain(layer, x):
    """Whether a convolution layer may run otherwise than it runs itself: a look that costs little.

    On a CPU there is nothing else to gain: what follows is PyTorch's either way, and to check the
    arguments of a block costs more than most of these layers could win.

    Args:
        layer: a stock `nn.Conv2d` or `nn.ConvTranspose2d`. Its weight is not looked at, as a
            parametrisation would compute it.
        x: its input on a CPU, (N, C, H, W).
    """
    kernel_size, padding = layer.kernel_size, layer.padding
    covered = (1, 1) if layer.transposed else kernel_size
    # Of every layer, so first what rules out most of them.
    bfloat16_pays = has_bfloat16() and _bfloat16_pays(autocast_dtype(x))
    if not bfloat16_pays and x.size(-1) != covered[1]:
        return False
    size = x.shape[2:]
    if size == covered and padding in ((0, 0), "valid") and not any(layer.output_padding):
        return bfloat16_pays or _products_pay(autocast_dtype(x))
    if not bfloat16_pays:
        return False
    if isinstance(padding, str):
        return True
    if layer.transposed:
        geometry = ConvGeometry.conv_transpose(
            size, kernel_size, layer.stride, padding, layer.output_padding
        )
    else:
        geometry = ConvGeometry.conv(size, kernel_size, layer.stride, padding)
    c_big = layer.out_channels if layer.transposed else layer.in_channels
    return _has_few_pixels(geometry) or _has_few_phases(c_big, geometry)


def autocast_dtype(x):
    """What convolutions of `x` compute in: autocast's dtype where it is on, else that of `x`."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def conv2d(x, weight, bias, stride, padding):
    """`torch.nn.functional.conv2d`; stride and padding are pairs."""
    geometry = ConvGeometry.conv(tuple(x.shape[2:]), tuple(weight.shape[2:]), stride, padding)
    one_format = layout.is_channels_last(x) == layout.is_channels_last(weight)
    if geometry.is_product and one_format and _products_pay(x.dtype):
        matrix, _ = _as_matrices(weight)
        y = F.linear(matrix(x), matrix(weight), bias)[:, :, None, None]
        return _as_pytorch_would(y, x, weight)
    if (weight.requires_grad and _unfolding_pays(x, geometry)) or (
        x.requires_grad and _phases_pay(weight, geometry)
    ):
        return _Convolution.apply(x, weight, bias, geometry, False)
    return F.conv2d(x, weight, bias, stride, padding)


def conv_transpose2d(x, weight, bias, stride, padding, output_padding):
    """`torch.nn.functional.conv_transpose2d`; stride, padding and output_padding are pairs."""
    geometry = ConvGeometry.conv_transpose(
        tuple(x.shape[2:]), tuple(weight.shape[2:]), stride, padding, output_padding
    )
    if geometry.is_product and _products_pay(x.dtype):
        matrix, image = _as_matrices(weight)
        if bias is not None:
            bias = matrix(bias[None, :, None, None].expand(1, *weight.shape[1:]))[0]
        y = image(F.linear(x.flatten(1), matrix(weight).t(), bias))
        return _as_pytorch_would(y, x, weight)
    if _phases_pay(weight, geometry) or (weight.requires_grad and _unfolding_pays(x, geometry)):
        return _Convolution.apply(x, weight, bias, geometry, True)
    return F.conv_transpose2d(x, weight, bias, stride, padding, output_padding)


class _Convolution(Function):
    """conv2d, or conv_transpose2d if `transposed`, where one of the ways for bfloat16 pays."""

    @staticmethod
    def forward(ctx, x, weight, bias, geometry, transposed):
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.transposed = geometry, transposed
        g = geometry
        if not transposed:
            return F.conv2d(x, weight, bias, g.stride, g.padding)
        if not _phases_pay(weight, g) or not _is_finite(x):
            return F.conv_transpose2d(x, weight, bias, g.stride, g.padding, g.output_padding)
        return _as_pytorch_would(_dgrad_by_phases(x, weight, g, bias), x, weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        geometry, transposed = ctx.geometry, ctx.transposed
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dx = dweight = None
        if not torch.is_grad_enabled():  # Under create_graph: PyTorch's own can be differentiated.
            if need_x and not transposed and _phases_pay(weight, geometry) and _is_finite(dy):
                dx = layout.like(_dgrad_by_phases(dy, weight, geometry, None), x)
            big, small = (dy, x) if transposed else (x, dy)
            if need_weight and _unfolding_pays(big, geometry):
                dweight = layout.like(_wgrad_by_unfolding(big, small, geometry), weight)
        missing = need_x and dx is None, need_weight and dweight is None, False
        if any(missing):
            found = torch.ops.aten.convolution_backward(
                dy, x, weight, None, geometry.stride, geometry.padding, (1, 1), transposed,
                geometry.output_padding if transposed else (0, 0), 1, missing,
            )  # fmt: skip
            dx = layout.like(found[0], x) if missing[0] else dx
            dweight = layout.like(found[1], weight) if missing[1] else dweight
        return dx, dweight, dy.sum((0, 2, 3)) if need_bias else None, None, None


def _as_pytorch_would(y, x, weight):
    """The output in the memory format of PyTorch's convolution."""
    channels_last = layout.is_channels_last(x) or layout.is_channels_last(weight)
    return layout.channels_last(y) if channels_last else layout.contiguous(y)


def _products_pay(dtype):
    return dtype in (torch.float32, torch.float64) or _bfloat16_pays(dtype)


def _bfloat16_pays(dtype):
    return dtype == torch.bfloat16 and has_bfloat16()


def _unfolding_pays(x, geometry):
    """Whether wgrad is a product of unfolded images; `x` is any tensor of the convolution."""
    return _has_few_pixels(geometry) and _bfloat16_pays(x.dtype)


def _has_few_pixels(geometry):
    few = geometry.small[0] * geometry.small[1] <= _MOST_PIXELS_UNFOLDED
    return few and not geometry.is_product


def _phases_pay(weight, geometry):
    """Whether dgrad has phases of one size and so few channels that all are columns together."""
    return _has_few_phases(weight.shape[1], geometry) and _bfloat16_pays(weight.dtype)


def _has_few_phases(c_big, geometry):
    (sh, sw), (h, w) = geometry.stride, geometry.small
    alike = sh == sw > 1 and geometry.big == (h * sh, w * sw) and not geometry.is_product
    return alike and c_big * sh * sw <= _MOST_PHASE_CHANNELS


def _as_matrices(weight):
    """Two functions: images to matrices of a row each, in the order of the weight's memory; back.

    (N, C, kh, kw) to [N, C * kh * kw], or to [N, kh * kw * C] if the weight is channels_last. Views
    of memory of that format.
    """
    c, kh, kw = weight.shape[1:]
    if layout.is_channels_last(weight):
        return (
            lambda images: images.permute(0, 2, 3, 1).flatten(1),
            lambda matrix: matrix.view(-1, kh, kw, c).permute(0, 3, 1, 2),
        )
    return lambda images: images.flatten(1), lambda matrix: matrix.view(-1, c, kh, kw)


def _wgrad_by_unfolding(big, small, geometry):
    """(C_small, C_big, kh, kw), channels_last."""
    rows = small.permute(0, 2, 3, 1).reshape(-1, small.shape[1])
    matrix = torch.mm(rows.t(), _unfold(big, geometry))
    return matrix.view(-1, *geometry.kernel_size, big.shape[1]).permute(0, 3, 1, 2)


def _unfold(big, geometry):
    """[N * h_small * w_small, taps * C_big]: what each pixel of the small side touches."""
    (kh, kw), (sh, sw), (ph, pw) = geometry.kernel_size, geometry.stride, geometry.padding
    padded = F.pad(big.permute(0, 2, 3, 1), (0, 0, pw, pw, ph, ph)).contiguous()
    n, _, _, c = padded.shape
    stride_n, stride_y, stride_x, stride_c = padded.stride()
    windows = padded.as_strided(
        (n, *geometry.small, kh, kw, c),
        (stride_n, stride_y * sh, stride_x * sw, stride_y, stride_x, stride_c),
    )
    return windows.reshape(-1, kh * kw * c)


def _is_finite(x):
    """Whether no value is infinite or NaN, which the phases' zero taps would spread."""
    return bool(x.sum(dtype=torch.float32).isfinite())


def _dgrad_by_phases(small, weight, geometry, bias):
    """One convolution of stride 1 computes every phase's channels; then they are interleaved.

    Pixel (y * s + py) of the big side meets pixel y + d of the small side at tap py + p - s * d.
    """
    s = geometry.stride[0]
    c_small, c_big = weight.shape[:2]
    indices, pads = [], []
    for k, p in zip(geometry.kernel_size, geometry.padding, strict=True):
        reach = max((k - 1 - p) // s, (s - 1 + p) // s)
        taps = [[phase + p - s * d for d in range(-reach, reach + 1)] for phase in range(s)]
        # The row of zeros below the kernel stands for taps that are not in it.
        indices.append(torch.tensor([[t if 0 <= t < k else k for t in row] for row in taps]))
        pads.append(reach)
    rows, columns = indices
    padded = F.pad(weight, (0, 1, 0, 1))
    phases = padded[:, :, rows[:, :, None, None], columns]  # [c_small, c_big, py, dy, px, dx]
    phases = phases.permute(1, 2, 4, 0, 3, 5).reshape(
        c_big * s * s, c_small, 2 * pads[0] + 1, 2 * pads[1] + 1
    )
    phases = phases.contiguous(memory_format=torch.channels_last)
    phase_bias = None if bias is None else bias.repeat_interleave(s * s)
    return F.pixel_shuffle(F.conv2d(small, phases, phase_bias, 1, pads), s)
