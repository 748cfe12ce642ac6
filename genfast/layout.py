"""Memory formats, and the border between PyTorch's layers and what works on channels_last memory.

A tensor that crosses the border has the format that PyTorch would give it, a gradient that of the
tensor it belongs to. Not all of PyTorch's layers are right for every mixture: on a CPU the gradient
of `instance_norm` for one image is wrong where the tensor is contiguous and dy is channels_last.

Formats are told by strides, as PyTorch does. A tensor of 1 channel or 1 x 1 pixels lies in memory
the same way in both.
"""

from torch.autograd import Function


def is_channels_last(t):
    """Whether PyTorch takes `t` (N, C, H, W) for channels_last, dense or not.

    Its convolutions then return channels_last memory. The rule is that of PyTorch's
    `suggest_memory_format`, which looks at strides alone.
    """
    strides = t.stride()
    if strides[1] == 0 or t.numel() == 0:
        return False
    least = 0
    for dim in (1, 3, 2, 0):
        # Of a tensor of 1 x 1 x 1 pixels all strides are alike: contiguous.
        if strides[dim] < least or (dim == 0 and least == strides[1]):
            return False
        least = strides[dim] * t.shape[dim] if t.shape[dim] > 1 else strides[dim]
    return True


def contiguous(t):
    """(N, C, H, W) in contiguous memory, with the strides of a fresh tensor; a view if possible."""
    n, c, h, w = t.shape
    if t.stride() == (c * h * w, h * w, w, 1):
        return t
    # `contiguous` alone leaves strides as they are where a dimension is 1.
    return t.contiguous().view(n, c * h * w).view(t.shape)


def channels_last(t):
    """(N, C, H, W) in channels_last memory, with the strides of a fresh tensor, as `contiguous`."""
    if is_fresh_channels_last(t):
        return t
    n, c, h, w = t.shape
    pixels = t.permute(0, 2, 3, 1).contiguous()
    return pixels.view(n, h * w * c).view(n, h, w, c).permute(0, 3, 1, 2)


def like(t, other):
    """`t` in the memory format of `other`."""
    return channels_last(t) if is_channels_last(other) else contiguous(t)


def enter(t, inside=channels_last):
    """`inside(t)`: `t` in the format of what works on it. Its gradient leaves in that of `t`."""
    if inside is channels_last and is_fresh_channels_last(t):
        return t
    return _Border.apply(t, inside, channels_last if is_channels_last(t) else contiguous)


def is_fresh_channels_last(t):
    """Whether `t` (N, C, H, W) has the strides of a fresh channels_last tensor."""
    _, c, h, w = t.shape
    return t.stride() == (h * w * c, 1, w * c, c)


class _Border(Function):
    """A tensor in one format whose gradient is in another; each is one of the functions above."""

    @staticmethod
    def forward(ctx, t, inside, outside):
        ctx.inside, ctx.outside = inside, outside
        return inside(t)

    @staticmethod
    def backward(ctx, gradient):
        return _Border.apply(gradient, ctx.outside, ctx.inside), None, None
