"""One item of somebody's data set: its image as uint8 pixels, and its label."""

import math
import reprlib
import sys
from collections.abc import Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch

from genfast.training.data.decoding import opaque_pixels
from genfast.training.image_range import OVERSHOOT
from genfast.training.parts import FORMS, images_and_labels


def item_of(
    item: Any, image_range: tuple[float, float], background: tuple[int, int, int]
) -> tuple[torch.Tensor, Any]:
    """The pixels of an item, uint8 (C, H, W) of any size with C of 1 or 3, and its label as it is.

    Args:
        item: an image; a list or tuple that begins with one, and goes on with its label if it has
            one; or a dict of them: see `training.parts`. An image is a Pillow image, or a tensor or
            array (H, W), (C, H, W) or (H, W, C) of uint8 or of floats.
        image_range: (low, high) of floats, which are rounded to 256 levels.
        background: (red, green, blue) behind a transparent Pillow image.

    Raises:
        TypeError, ValueError: it is none of these, or floats lie elsewhere. The message begins with
            "expected".
    """
    image, label = images_and_labels(item, _may_be_image)
    if _is_pillow(image):
        return opaque_pixels(image, background), label
    if isinstance(image, np.ndarray):
        # A copy, as a view may run backwards, or must not be written to, which PyTorch takes badly.
        return _of_tensor(torch.from_numpy(np.array(image, order="C")), image_range, True), label
    if isinstance(image, torch.Tensor):
        return _of_tensor(image.detach().cpu(), image_range, False), label
    came = f"a {type(image).__name__}" + ("" if image is item else f" in a {type(item).__name__}")
    raise TypeError(f"expected an image of Pillow, NumPy or PyTorch, {FORMS}, got {came}")


def float_bounds(item: Any) -> tuple[float, float] | None:
    """The least and the largest value of an item's image of floats; None of another image."""
    image, _ = images_and_labels(item, _may_be_image)
    if isinstance(image, np.ndarray):
        image = torch.from_numpy(np.array(image))
    if not (isinstance(image, torch.Tensor) and image.is_floating_point()):
        return None
    low, high = image.detach().aminmax()
    return low.item(), high.item()


def label_of(label: Any, classes: Sequence[str]) -> int:
    """The number of a label's class: of a whole number from 0 to below their count, or a name.

    Raises:
        TypeError, ValueError: it is none of these. The message begins with "expected".
    """
    if isinstance(label, str):
        if label not in classes:
            raise ValueError(f"expected the name of a class as label, got {reprlib.repr(label)}")
        return classes.index(label)
    if isinstance(label, torch.Tensor | np.ndarray) and math.prod(label.shape) == 1:
        label = label.item()
    if isinstance(label, bool) or not isinstance(label, Integral):
        raise TypeError(f"expected a whole number or a name as label, got {reprlib.repr(label)}")
    if not 0 <= int(label) < len(classes):
        raise ValueError(f"expected labels from 0 to {len(classes) - 1}, got {int(label)}")
    return int(label)


def _may_be_image(value):
    return _is_pillow(value) or (isinstance(value, torch.Tensor | np.ndarray) and value.ndim >= 2)


def _is_pillow(value):
    module = sys.modules.get("PIL.Image")  # Who has such an image has imported it.
    return module is not None and isinstance(value, module.Image)


def _of_tensor(image, image_range, last):
    """last: whether channels are looked for last first, as arrays have them."""
    pixels = image[None] if image.ndim == 2 else image
    ends = (2, 0) if last else (0, 2)
    place = next((i for i in ends if pixels.ndim == 3 and pixels.shape[i] in (1, 3)), None)
    if place is None or 0 in pixels.shape:
        raise ValueError(
            "expected an image (H, W), (C, H, W) or (H, W, C) with C of 1 or 3, got shape "
            f"{tuple(image.shape)}"
        )
    if place == 2 and image.ndim == 3:
        pixels = pixels.permute(2, 0, 1)
    if pixels.dtype == torch.uint8:
        return pixels
    if not pixels.is_floating_point():
        raise TypeError(f"expected uint8 or floats as pixels, got {pixels.dtype}")
    low, high = image_range
    found_low, found_high = (v.item() for v in pixels.aminmax())
    slack = OVERSHOOT * (high - low)  # What lies so far beyond is cut off.
    if not (found_low >= low - slack and found_high <= high + slack):
        raise ValueError(
            f"expected floats in [{low:g}, {high:g}], got {found_low:g} to {found_high:g}: "
            "image_range=(low, high) says what they are, (-1, 1) after Normalize(0.5, 0.5)"
        )
    levels = (pixels.to(torch.float32) - low) * (255 / (high - low))
    return levels.round_().clamp_(0, 255).to(torch.uint8)
