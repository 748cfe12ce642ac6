"""Real and generated images as one batch of the discriminator.

Where its first layer runs on the kernels of `genfast.launch.from_image`, one kernel converts,
concatenates and pads them. What it writes is a tensor like any other to whoever else reads it.
"""

import torch

from genfast import functional
from genfast.geometry import ConvGeometry, pair
from genfast.launch import from_image
from genfast.nn import FusedSequential, first_run
from genfast.training import pixels

# In float64 kernels run interpreted only, and would round what lies between to float32.
_DTYPES = {torch.float32, torch.bfloat16, torch.float16}


def joined(discriminator, reals, fakes, pixel_range):
    """Both in padded memory, which the first layer of the discriminator reads as it is.

    To be asked within the autocast in which the discriminator will run, as that decides about the
    dtype of its layers.

    Args:
        discriminator: of layers that are all known, which nobody watches.
        reals: (N, C, H, W), floating point, or uint8 for images that are to be in `pixel_range`.
        fakes: likewise, floating point.

    Returns:
        (2N, C, H, W) in the dtype of the first layer, first the real images; None where PyTorch's
        operations have to make one batch of them.
    """
    block = _first_block(discriminator)
    if block is None or block.output_padding is not None or reals.device != fakes.device:
        return None
    dtype = functional.autocast_dtype(fakes.device)
    if dtype is None:
        dtype = block.weight.dtype
        if fakes.dtype != dtype:
            return None  # The layer will raise an error.
    if not {dtype, block.weight.dtype, fakes.dtype, reals.dtype} - {torch.uint8} <= _DTYPES:
        return None
    if block.around is not None:
        _, (before, block, _) = functional.form_of(fakes, [], block)
        if before is not None:
            return None  # The images meet something else first.
    vectors = [t for t in block.vectors.values() if t is not None]
    if functional.implementation(fakes, reals, block.weight, *vectors) != "triton":
        return None
    geometry = _geometry(block, fakes)
    if geometry is None:
        return None
    scale, shift = 1.0, 0.0
    if reals.dtype == torch.uint8:
        scale, shift = pixels.scale_and_shift(pixel_range)
    return from_image.joined(reals, fakes, geometry, dtype, scale, shift)


def _first_block(discriminator):
    """What the images meet first, a `functional.Block` of a chain; None if it is something else."""
    for module in discriminator.modules():
        if isinstance(module, FusedSequential) and len(module):
            run = first_run(module)
            if run.fused and run.is_block:
                return run.block()
        elif not any(module.children()):
            return None
    return None


def _geometry(block, images):
    """That of a convolution whose kernels read padded memory; None if others run it."""
    c_small, c_big, *kernel_size = block.weight.shape
    count, channels, *size = images.shape
    if channels != c_big:
        return None  # The layer will raise an error.
    stride, padding = pair(block.stride, "stride"), pair(block.padding, "padding")
    geometry = ConvGeometry.conv(size, tuple(kernel_size), stride, padding)
    fits = min(geometry.small) > 0 and from_image.fits(geometry, c_small, c_big, 2 * count)
    return geometry if fits else None
