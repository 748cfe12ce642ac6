"""Pixels as files keep them, 256 levels of uint8, and as the networks take them, floats."""

import torch


def scale_and_shift(pixel_range: tuple[float, float]) -> tuple[float, float]:
    """(scale, shift) with which level p is p * scale + shift in `pixel_range` = (low, high)."""
    low, high = pixel_range
    return (high - low) / 255, low


def normalize(
    images: torch.Tensor, pixel_range: tuple[float, float], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """uint8 images to `dtype` with 0 and 255 at the ends of `pixel_range` = (low, high).

    Example:
        >>> normalize(torch.tensor([0, 51, 255], dtype=torch.uint8), (-1.0, 1.0))
        tensor([-1.0000, -0.6000,  1.0000])
    """
    scale, shift = scale_and_shift(pixel_range)
    return images.to(dtype, copy=True).mul_(scale).add_(shift)
