"""How tensors lie in memory for the kernels, and how a descriptor sees them.

Tensors come and go as PyTorch's (N, C, H, W); inside, activations are dense NHWC memory and weights
dense [C_small, kh, kw, C_big], which is what `torch.channels_last` makes of both. `channels_last`
input is taken as it is, anything else is copied into that layout first.
"""

import math

import torch

from genfast.backend import triton

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor


def nhwc(x):
    """(N, C, H, W) as dense (N, H, W, C) memory; no copy where it is channels_last already."""
    return x.permute(0, 2, 3, 1).contiguous()


def channels_last(nhwc_shape, like, dtype=None):
    """An empty (N, C, H, W) tensor; no view of another, so that callers may change it in place."""
    n, h, w, c = nhwc_shape
    return torch.empty(
        (n, c, h, w),
        dtype=dtype or like.dtype,
        device=like.device,
        memory_format=torch.channels_last,
    )


def dense(vector, stand_in):
    """The vector with its elements side by side; for None another tensor, which nobody reads."""
    return stand_in if vector is None else vector.contiguous()


def descriptor_fits(tensor):
    """Whether a descriptor can address a dense tensor: rows of whole 16 bytes, sizes of 32 bits."""
    row = tensor.shape[-1] * tensor.element_size()
    return row % 16 == 0 and tensor.data_ptr() % 16 == 0 and tensor.shape[0] < 2**31


def descriptor(tensor, block_shape):
    # Dense strides, spelled out: PyTorch leaves any stride on a dimension of size 1.
    strides = [math.prod(tensor.shape[i + 1 :]) for i in range(tensor.dim())]
    return TensorDescriptor(tensor, list(tensor.shape), strides, block_shape)
