"""fprop, dgrad and wgrad by PyTorch's own convolutions: oneDNN on a CPU, cuDNN on a GPU.

Tensors are (N, C, H, W), weights (C_small, C_big, kh, kw), as in `genfast.launch`.
"""

import torch
import torch.nn.functional as F


def fprop(big, weight, geometry, bias=None):
    """`conv2d`, or the input gradient of `conv_transpose2d`: (N, C_small, *geometry.small)."""
    return F.conv2d(big, weight, bias, geometry.stride, geometry.padding)


def dgrad(small, weight, geometry, bias=None):
    """`conv_transpose2d`, or the input gradient of `conv2d`: (N, C_big, *geometry.big)."""
    return F.conv_transpose2d(
        small, weight, bias, geometry.stride, geometry.padding, geometry.output_padding
    )


def wgrad(big, small, geometry):
    """The weight gradient of both: (C_small, C_big, kh, kw), channels_last."""
    # Not the weight, whose values nobody reads here, only its shape and memory format.
    weight = torch.empty(
        (small.shape[1], big.shape[1], *geometry.kernel_size),
        dtype=big.dtype,
        device=big.device,
        memory_format=torch.channels_last,
    )
    return torch.ops.aten.convolution_backward(
        small, big, weight, None, geometry.stride, geometry.padding, (1, 1), False, (0, 0), 1,
        (False, True, False),
    )[1].contiguous(memory_format=torch.channels_last)  # fmt: skip
