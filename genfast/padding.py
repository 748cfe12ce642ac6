"""Padding by reflection, of and into channels_last memory: the same bits every run.

On a GPU PyTorch's own takes and gives contiguous memory, copying what is not, and its gradient is
added up by atomics. Here one pass copies the image into the middle of the padded one, and small
copies fill the border. The gradient is the image's part of the padded gradient, to whose pixels the
border's are added, side by side. Both are linear and each is the other's gradient.
"""

import torch
from torch.autograd import Function

from genfast import layout


def reflects(size, sizes):
    """Whether an image of this (height, width) has the pixels that are to be reflected.

    Args:
        size: of the image.
        sizes: (left, right, top, bottom), as `reflected` takes them.
    """
    left, right, top, bottom = sizes
    return min(sizes) >= 0 and max(left, right) < size[1] and max(top, bottom) < size[0]


def reflected(x, sizes, dtype):
    """`F.pad(x, sizes, mode="reflect").to(dtype)`, channels_last.

    Args:
        x: (N, C, H, W), in any memory format. Its gradient has that format too.
        sizes: (left, right, top, bottom) in pixels, for which `reflects` holds.
        dtype: of the result.
    """
    return _Reflection.apply(x, tuple(sizes), dtype)


class _Reflection(Function):
    """`reflected`."""

    @staticmethod
    def forward(ctx, x, sizes, dtype):
        ctx.sizes, ctx.dtype, ctx.last = sizes, x.dtype, layout.is_channels_last(x)
        left, right, top, bottom = sizes
        n, c, h, w = x.shape
        shape = n, c, h + top + bottom, w + left + right
        y = torch.empty(shape, dtype=dtype, device=x.device, memory_format=torch.channels_last)
        rows = y[:, :, top : top + h]
        rows[..., left : left + w].copy_(x)
        _fill(rows, 3, left, right)
        _fill(y, 2, top, bottom)  # The columns' corners too.
        return y

    @staticmethod
    def backward(ctx, dy):
        return _ReflectionGradient.apply(dy, ctx.sizes, ctx.dtype, ctx.last), None, None


class _ReflectionGradient(Function):
    """The gradient of x, channels_last if `last`, else contiguous."""

    @staticmethod
    def forward(ctx, dy, sizes, dtype, last):
        ctx.sizes, ctx.dtype = sizes, dy.dtype
        left, right, top, bottom = sizes
        h, w = dy.shape[2] - top - bottom, dy.shape[3] - left - right
        rows = dy[:, :, top : top + h]
        memory_format = torch.channels_last if last else torch.contiguous_format
        # The columns beside the image, with what comes to them from above and below.
        columns = [rows[..., :left].clone(), rows[..., left + w :].clone()]
        places = [dy[..., :left], dy[..., left + w :]]
        dx = rows[..., left : left + w].to(dtype, memory_format=memory_format, copy=True)
        for to, given in zip([*columns, dx], [*places, dy[..., left : left + w]], strict=True):
            _add(to, 2, given[:, :, :top], given[:, :, top + h :])
        _add(dx, 3, *columns)
        return dx

    @staticmethod
    def backward(ctx, ddx):
        return _Reflection.apply(ddx, ctx.sizes, ctx.dtype), None, None, None


def _fill(t, dim, before, after):
    """Fill the two borders of a tensor along a dimension with what is to be seen in them."""
    last = t.shape[dim] - after - 1
    if before:
        t.narrow(dim, 0, before).copy_(_mirrored(t.narrow(dim, before + 1, before), dim))
    if after:
        t.narrow(dim, last + 1, after).copy_(_mirrored(t.narrow(dim, last - after, after), dim))


def _add(t, dim, before, after):
    """Add the gradients of the borders along a dimension to the pixels seen there."""
    first, last = before.shape[dim], after.shape[dim]
    if first:
        t.narrow(dim, 1, first).add_(_mirrored(before, dim))
    if last:
        t.narrow(dim, t.shape[dim] - 1 - last, last).add_(_mirrored(after, dim))


def _mirrored(t, dim):
    return t.flip(dim) if t.shape[dim] > 1 else t
