"""How both sides of a convolution are seen by descriptors, and what kernels are told of it."""

import math

from genfast.launch import memory


def folds(geometry):
    """Whether a strided side folds evenly into a descriptor's view: see `big_descriptor`."""
    return all(n % s == 0 for n, s in zip(geometry.big, geometry.stride, strict=True))


def stride_divides_kernel(geometry):
    return all(k % s == 0 for k, s in zip(geometry.kernel_size, geometry.stride, strict=True))


def big_descriptor(big, geometry, box, block_channels, groups=0):
    """big as [N, H / sh, sh, W / sw, sw * C]: a tap's or a phase's pixels are a box of it.

    With groups as [groups, N / groups, H / sh, sh * W / sw, sw * C]: see `kernels.conv`.
    """
    n, h, w, c = big.shape
    sh, sw = geometry.stride
    if groups:
        rows = big.view(groups, n // groups, h // sh, sh * (w // sw), sw * c)
        return memory.descriptor(rows, [1, *box, block_channels])
    folded = big.view(n, h // sh, sh, w // sw, sw * c)
    return memory.descriptor(folded, [box[0], box[1], 1, box[2], block_channels])


def small_descriptor(small, box, block_channels, groups=0):
    """small as [N, H, W, C], or with groups as [groups, N / groups, H, W, C]."""
    if groups:
        small = small.unflatten(0, (groups, -1))
        return memory.descriptor(small, [1, *box, block_channels])
    return memory.descriptor(small, [*box, block_channels])


def stride_and_padding(geometry):
    return dict(
        STRIDE_H=geometry.stride[0],
        STRIDE_W=geometry.stride[1],
        PAD_H=geometry.padding[0],
        PAD_W=geometry.padding[1],
    )


def alignments(c_big, c_small):
    """Powers of two that divide the channels, as far as they decide how wide loads are."""
    return dict(BIG_ALIGNMENT=math.gcd(c_big, 16), SMALL_ALIGNMENT=math.gcd(c_small, 16))
