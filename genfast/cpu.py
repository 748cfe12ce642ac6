"""Convolutions on the CPU: PyTorch's own, but for shapes of GANs that a matrix product does faster.

Measured beside oneDNN on 2 cores with AVX-512 BF16, batch 64, in bfloat16: the weight gradient of
512 x 256 channels on 4 x 4 maps takes 24 ms, as a product of unfolded images 12 ms; the layer from
latents to 4 x 4 maps takes 6.3 ms with its gradient, as a product 0.9 ms; the layer from 64
channels to RGB 8.0 ms, with its four phases as 12 channels of one convolution 4.6 ms.

The functions mirror `genfast.launch`: fprop, dgrad and wgrad of a `ConvGeometry`, tensors as
(N, C, H, W), weights as (C_small, C_big, kh, kw). Which way is taken depends on shapes and dtypes
alone, so repeated runs give the same bits.
"""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from genfast import library
from genfast.geometry import ConvGeometry
from genfast.library import fprop

# oneDNN's bfloat16 weight gradient is slow on maps of so few pixels. On larger ones unfolding the
# images costs what the product wins.
_MOST_PIXELS_UNFOLDED = 16
# oneDNN computes the channels of a convolution's output in blocks of 16.
_MOST_PHASE_CHANNELS = 16


def conv2d(x, weight, bias, stride, padding):
    """`torch.nn.functional.conv2d`; stride and padding are pairs."""
    geometry = ConvGeometry.conv(tuple(x.shape[2:]), tuple(weight.shape[2:]), stride, padding)
    return _Convolution.apply(x, weight, bias, geometry, False)


def conv_transpose2d(x, weight, bias, stride, padding, output_padding):
    """`torch.nn.functional.conv_transpose2d`; stride, padding and output_padding are pairs."""
    geometry = ConvGeometry.conv_transpose(
        tuple(x.shape[2:]), tuple(weight.shape[2:]), stride, padding, output_padding
    )
    return _Convolution.apply(x, weight, bias, geometry, True)


def dgrad(small, weight, geometry, bias=None):
    """`conv_transpose2d`, or the input gradient of `conv2d`: (N, C_big, *geometry.big)."""
    if _phases_fit_one_convolution(weight, geometry) and _is_finite(small):
        return _dgrad_by_phases(small, weight, geometry, bias)
    return library.dgrad(small, weight, geometry, bias)


def wgrad(big, small, geometry):
    """The weight gradient of `conv2d` and `conv_transpose2d`: (C_small, C_big, kh, kw)."""
    if not _worth_unfolding(big, geometry):
        return library.wgrad(big, small, geometry)
    dweight = library.empty(small.shape[1], big.shape[1], geometry.kernel_size, big)
    rows = small.permute(0, 2, 3, 1).reshape(-1, small.shape[1])
    torch.mm(rows.t(), _unfold(big, geometry), out=library.taps_as_columns(dweight))
    return dweight


class _Convolution(Function):
    """conv2d, or conv_transpose2d if `transposed`."""

    @staticmethod
    def forward(ctx, x, weight, bias, geometry, transposed):
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.transposed = geometry, transposed
        return (dgrad if transposed else fprop)(x, weight, geometry, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        geometry, transposed = ctx.geometry, ctx.transposed
        need_x, need_weight, need_bias = ctx.needs_input_grad[:3]
        dbias = dy.sum((0, 2, 3)) if need_bias else None
        if torch.is_grad_enabled():  # Under create_graph: PyTorch's own can be differentiated.
            output_padding = geometry.output_padding if transposed else (0, 0)
            dx, dweight, _ = torch.ops.aten.convolution_backward(
                dy, x, weight, None, geometry.stride, geometry.padding, (1, 1), transposed,
                output_padding, 1, (need_x, need_weight, False),
            )  # fmt: skip
            return dx, dweight, dbias, None, None
        dx = dweight = None
        if need_x:
            dx = (fprop if transposed else dgrad)(dy, weight, geometry)
        if need_weight:
            dweight = wgrad(*((dy, x) if transposed else (x, dy)), geometry)
        return dx, dweight, dbias, None, None


def _worth_unfolding(big, geometry):
    pixels = geometry.small[0] * geometry.small[1]
    few = pixels <= _MOST_PIXELS_UNFOLDED and not geometry.is_product
    return few and big.dtype == torch.bfloat16


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


def _phases_fit_one_convolution(weight, geometry):
    """Whether dgrad has phases of one size and so few channels that all are columns together."""
    (sh, sw), (h, w) = geometry.stride, geometry.small
    alike = sh == sw > 1 and geometry.big == (h * sh, w * sw) and not geometry.is_product
    return alike and weight.shape[1] * sh * sw <= _MOST_PHASE_CHANNELS


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
