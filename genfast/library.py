"""fprop, dgrad and wgrad by PyTorch's libraries: oneDNN on a CPU, cuDNN and cuBLAS on a GPU.

Tensors are (N, C, H, W), weights (C_small, C_big, kh, kw), as in `genfast.launch`. A convolution
that is a matrix product is computed as one: it is written into and out of channels_last memory.
"""

import torch
import torch.nn.functional as F


def fprop(big, weight, geometry, bias=None):
    """`conv2d`, or the input gradient of `conv_transpose2d`: (N, C_small, *geometry.small)."""
    if not geometry.is_product:
        return F.conv2d(big, weight, bias, geometry.stride, geometry.padding)
    small = empty(len(big), weight.shape[0], geometry.small, big)
    torch.mm(pixels_as_channels(big), taps_as_columns(weight).t(), out=small.flatten(1))
    return small if bias is None else small.add_(bias[:, None, None])


def dgrad(small, weight, geometry, bias=None):
    """`conv_transpose2d`, or the input gradient of `conv2d`: (N, C_big, *geometry.big)."""
    if not geometry.is_product:
        return F.conv_transpose2d(
            small, weight, bias, geometry.stride, geometry.padding, geometry.output_padding
        )
    big = empty(len(small), weight.shape[1], geometry.big, small)
    torch.mm(small.flatten(1), taps_as_columns(weight), out=pixels_as_channels(big))
    return big if bias is None else big.add_(bias[:, None, None])


def wgrad(big, small, geometry):
    """The weight gradient of both: (C_small, C_big, kh, kw), channels_last."""
    dweight = empty(small.shape[1], big.shape[1], geometry.kernel_size, big)
    if geometry.is_product:
        torch.mm(small.flatten(1).t(), pixels_as_channels(big), out=taps_as_columns(dweight))
        return dweight
    # The weight's values are not read, only its shape and memory format.
    return torch.ops.aten.convolution_backward(
        small, big, dweight, None, geometry.stride, geometry.padding, (1, 1), False, (0, 0), 1,
        (False, True, False),
    )[1].contiguous(memory_format=torch.channels_last)  # fmt: skip


def empty(n, channels, size, like):
    """An uninitialised channels_last tensor (n, channels, *size)."""
    return torch.empty(
        (n, channels, *size),
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def pixels_as_channels(images):
    """(N, C, H, W) as a matrix [N, H * W * C]; a view of channels_last memory."""
    return images.permute(0, 2, 3, 1).flatten(1)


def taps_as_columns(weight):
    """(C_small, C_big, kh, kw) as a matrix [C_small, kh * kw * C_big]; a view likewise."""
    return weight.permute(0, 2, 3, 1).flatten(1)
