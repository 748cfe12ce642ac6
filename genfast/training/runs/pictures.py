"""Grids of images, written as PNG."""

import math

import torch

from genfast.training.data.decoding import DRAWN_BY
from genfast.training.errors import require
from genfast.training.files import replacing

MARGIN = 2
SMALLEST_TILE = 64


def to_uint8(images, pixel_range):
    """Float images with `pixel_range` = (low, high) to uint8, clipped: `normalize` undone."""
    low, high = pixel_range
    return ((images - low) * (255 / (high - low))).round().clamp(0, 255).to(torch.uint8)


def grid(images, columns=None):
    """Arrange uint8 images (N, C, H, W) in rows of `columns` (None: about square): (C, H', W').

    Small images are magnified by a whole number, to tiles of at least 64 pixels, so that a person
    can see them; the pixels stay sharp squares.
    """
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    scale = max(1, math.ceil(SMALLEST_TILE / max(height, width)))
    images = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    step_y, step_x = height * scale + MARGIN, width * scale + MARGIN
    canvas = images.new_zeros(channels, rows * step_y + MARGIN, columns * step_x + MARGIN)
    for i, image in enumerate(images):
        top, left = i // columns * step_y + MARGIN, i % columns * step_x + MARGIN
        canvas[:, top : top + height * scale, left : left + width * scale] = image
    return canvas


def save_grid(images, path, columns=None):
    """Write uint8 images (N, C, H, W), C 1 or 3, as one PNG picture, which says who drew it.

    columns: as `grid` takes them.
    """
    image_module = require("PIL.Image", "pillow")
    text = require("PIL.PngImagePlugin", "pillow").PngInfo()
    text.add_text(*DRAWN_BY)  # So that no folder of images takes it for one.
    pixels = grid(images, columns).permute(1, 2, 0).contiguous().cpu().numpy()
    picture = image_module.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    with replacing(path) as file:
        picture.save(file, format="PNG", pnginfo=text)
