"""Pictures in files: grids of images and single ones as PNG, grids that move as GIF."""

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
    """Write uint8 images (N, C, H, W), C 1 or 3, as one PNG picture: see `grid`."""
    save_png(grid(images, columns), path)


def save_png(pixels, path):
    """Write uint8 pixels (C, H, W), C 1 or 3, as a PNG that takes the place of `path`."""
    with replacing(path) as file:
        write_png(pixels, file)


def write_png(pixels, file):
    """Write uint8 pixels (C, H, W), C 1 or 3, into a binary file as PNG, which says who drew it."""
    text = require("PIL.PngImagePlugin", "pillow").PngInfo()
    text.add_text(*DRAWN_BY)  # So that no folder of images takes it for one.
    _picture(pixels).save(file, format="PNG", pnginfo=text)


def save_gif(frames, path, seconds):
    """Write uint8 frames (N, C, H, W), C 1 or 3, as a GIF that is repeated for ever.

    `seconds` is the time that a frame is shown, which GIF keeps in hundredths.
    """
    first, *rest = map(_picture, frames)
    with replacing(path) as file:
        first.save(
            file,
            format="GIF",
            save_all=True,
            append_images=rest,
            duration=round(1000 * seconds),
            loop=0,
            comment=": ".join(DRAWN_BY).encode(),
        )


def drawn_by_genfast(path):
    """Whether a file is a PNG that says that genfast drew it."""
    image_module = require("PIL.Image", "pillow")
    try:
        with image_module.open(path, formats=["PNG"]) as picture:
            return picture.info.get(DRAWN_BY[0]) == DRAWN_BY[1]
    except Exception:  # Damaged bytes make the decoder raise nearly anything.
        return False


def _picture(pixels):
    image_module = require("PIL.Image", "pillow")
    pixels = pixels.permute(1, 2, 0).contiguous().cpu().numpy()
    return image_module.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
