"""One picture's file, decoded into pixels of one size."""

import re
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from genfast.training.data.arrays import to_nchw
from genfast.training.errors import BadInput, require

BACKGROUNDS = {"white": "#ffffff", "black": "#000000"}
COLOURS = "white, black or a colour such as #ff8800"
# Pixels that all threads together decode at a time: at 8 to 12 bytes each, 1.5 GiB at most.
PIXELS = 2**27
ROWS = 256
Colour = tuple[int, int, int]
# (3, H, W) uint8, whether it is grey, None; or None, None, and what is wrong with the picture.
Decoded = tuple[Any, Any, str | None]
DRAWN_BY = ("Software", "genfast")  # A text in each PNG that genfast draws, by which to know it.


def colour(background: str) -> Colour:
    """(red, green, blue), 0 to 255, of "white", "black" or "#rrggbb"; BadInput for another text.

    Example:
        >>> colour("#ff8800")
        (255, 136, 0)
    """
    if not (isinstance(background, str) and is_colour(background)):
        raise BadInput(f"expected --background to be {COLOURS}, got {background!r}")
    red, green, blue = bytes.fromhex(BACKGROUNDS.get(background, background)[1:])
    return red, green, blue


def is_colour(text: str) -> bool:
    """Whether `colour` takes a text."""
    return bool(re.fullmatch("#[0-9a-fA-F]{6}", BACKGROUNDS.get(text, text)))


def decode(path: Path, size: tuple[int, int], background: Colour | None) -> Decoded:
    """Decode one picture: cropped around its centre, resized, on a background.

    Args:
        path: a regular file.
        size: (height, width) in pixels.
        background: (red, green, blue) behind what is transparent. None drops the transparency and
            shows the colours that lie under it, whatever they are.

    Returns:
        ((3, H, W) uint8, whether it is grey, None), or (None, None, what is wrong).

    Raises:
        BadInput: memory is short.
    """
    image_module = require("PIL.Image", "pillow")
    image_ops = require("PIL.ImageOps", "pillow")
    try:
        with image_module.open(path) as image:
            if image.info.get(DRAWN_BY[0]) == DRAWN_BY[1]:
                return None, None, "drawn by genfast"
            is_grey = image.mode in ("1", "L", "LA")
            if image.mode.startswith(("I", "F")):  # Pillow would cut their values off at 255.
                return None, None, f"expected 8 bits a channel, got mode {image.mode}"
            # JPEGs decode at a half, a quarter or an eighth of their size for a part of the time.
            # Of the longer side, as some are turned afterwards.
            image.draft("RGB", (2 * max(size), 2 * max(size)))
            with _pixels.lent(image.width * image.height):
                _mend_transparent_colour(image, path)
                image_ops.exif_transpose(image, in_place=True)
                opaque, is_mixed = _on_background(image, background)
                fitted = image_ops.fit(opaque, size[::-1], image_module.Resampling.LANCZOS)
    except MemoryError:  # That is not the image's fault, and next time it might be there.
        raise BadInput(f"expected memory enough for the image {path}, got no more") from None
    except Exception as error:  # Damaged bytes make the decoders raise nearly anything.
        return None, None, str(error) or type(error).__name__
    if is_mixed:
        is_grey &= len(set(background or ())) == 1
    return to_nchw(np.array(fitted)[None])[0], is_grey, None


def opaque_pixels(image: Any, background: tuple[int, int, int]) -> torch.Tensor:
    """The pixels of a Pillow image, turned upright, on a background: uint8 (C, H, W).

    C is 1 for grey images, on a grey background, and 3 for others.

    Raises:
        ValueError: it has more than 8 bits a channel.
    """
    if image.mode.startswith(("I", "F")):  # Pillow would cut their values off at 255.
        raise ValueError(f"expected 8 bits a channel, got an image of mode {image.mode}")
    grey = image.mode in ("1", "L", "LA")
    image = require("PIL.ImageOps", "pillow").exif_transpose(image)
    opaque, is_mixed = _on_background(image, background)
    pixels = to_nchw(np.array(opaque)[None])[0]
    if is_mixed:
        grey &= len(set(background)) == 1
    return pixels[:1] if grey else pixels


def _on_background(image, background):
    """The image in RGB, and whether any of the background shows."""
    if background is None or not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB"), False
    canvas = require("PIL.Image", "pillow").new("RGB", image.size, background)
    shows = False
    for top in range(0, image.height, ROWS):  # In parts, as each takes memory several times.
        box = (0, top, image.width, min(top + ROWS, image.height))
        part = image.crop(box).convert("RGBA")
        alpha = part.getchannel("A")
        shows |= alpha.getextrema()[0] < 255
        canvas.paste(part.convert("RGB"), box, alpha)
    return canvas, shows


def _mend_transparent_colour(image, path):
    """Bring the one transparent colour of a PNG to 8 bits a channel, as Pillow does the pixels."""
    transparent = image.info.get("transparency")
    if image.format != "PNG" or image.mode not in ("L", "RGB") or transparent is None:
        return
    with open(path, "rb") as file:
        file.seek(24)  # Past the signature, the first chunk's length and name, width and height.
        bits = file.read(1)[0]
    if image.mode == "L" and bits < 8:
        image.info["transparency"] = transparent * 255 // (2**bits - 1)
    if image.mode == "RGB" and bits == 16:
        image.info["transparency"] = tuple(value >> 8 for value in transparent)


class _Loan:
    """Lets threads take parts of a limited amount, and wait until enough was given back.

    More than there is at all is lent to one alone.
    """

    def __init__(self, amount):
        self._amount = self._left = amount
        self._given_back = threading.Condition()

    @contextmanager
    def lent(self, amount):
        amount = min(amount, self._amount)
        with self._given_back:
            self._given_back.wait_for(lambda: self._left >= amount)
            self._left -= amount
        try:
            yield
        finally:
            with self._given_back:
                self._left += amount
                self._given_back.notify_all()


_pixels = _Loan(PIXELS)
