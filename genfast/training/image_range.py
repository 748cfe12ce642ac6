"""The range of float images, which a step cannot see: what is assumed, and what is refused.

A pixel of 0.5 is grey in [0, 1] and light in [-1, 1]. Trained on in the wrong range, a network
learns nothing useful and nothing fails. So the range is the step's own unless somebody says
otherwise, and a first batch that cannot be meant so is refused.
"""

import math
import warnings
from numbers import Real
from typing import Any

import torch

Range = tuple[float, float]
# How far beyond their range images may go, as a share of it: bicubic resizing overshoots.
OVERSHOOT = 0.1
# Images that span less of their range, 5 of 256 levels, are nearly one grey. Of ranges that are
# taken for one another the smaller are less of the larger: 1/255, 2/255, 255/65535.
NARROW = 0.02


def checked(image_range: Any) -> Range | None:
    """An `image_range` as two floats; None as it is. ValueError if it is something else."""
    if image_range is None:
        return None
    pair = image_range if isinstance(image_range, tuple | list) else ()
    numbers = all(isinstance(v, Real) and math.isfinite(v) for v in pair)
    if len(pair) != 2 or not numbers or not pair[0] < pair[1]:
        raise ValueError(
            "expected image_range to be (low, high) of float images, such as (0, 1) or (-1, 1), "
            f"got {image_range!r}"
        )
    return float(pair[0]), float(pair[1])


def brought(images: torch.Tensor, image_range: Range | None, pixel_range: Range) -> torch.Tensor:
    """Float images from one range to the other; where these are the same, the very images."""
    if image_range in (None, pixel_range):
        return images
    (low, high), (start, end) = image_range, pixel_range
    scale = (end - start) / (high - low)
    return images * scale + (start - low * scale)


def check_first(images: torch.Tensor, image_range: Range | None, pixel_range: Range) -> None:
    """Look at a first batch of floats, as they were given; on a GPU that waits for the device.

    Raises:
        ValueError: they go far beyond what `image_range` says; or nobody said it, the step takes
            images from below 0 on, and none of the values is below 0.

    Warns:
        UserWarning: nobody said their range, and they go far beyond the step's own; or it is far
            wider than they are.
    """
    found_low, found_high = (v.item() for v in images.detach().aminmax())
    low, high = image_range or pixel_range
    slack = OVERSHOOT * (high - low)
    beyond = found_low < low - slack or found_high > high + slack
    came = f"values from {found_low:g} to {found_high:g}"
    if image_range is None and low < 0 <= found_low < found_high:
        likely = 1 if found_high <= 1 + slack else 255
        raise ValueError(
            f"expected float images in [{low:g}, {high:g}], got {came}, none below 0: give "
            f"image_range=(0, {likely}) to have them scaled, or image_range=({low:g}, {high:g}) if "
            "they are right"
        )
    if beyond and image_range:
        raise ValueError(
            f"expected float images in [{low:g}, {high:g}], as image_range says, got {came}"
        )
    if beyond:
        warnings.warn(
            f"genfast: expected float images in [{low:g}, {high:g}], got {came}: they are taken as "
            "they are; give image_range=(low, high) to have them scaled",
            stacklevel=4,
        )
    sentence = image_range and why_narrow(found_low, found_high, image_range)
    if sentence:
        warnings.warn(f"genfast: {sentence}", stacklevel=4)


def why_narrow(found_low: float, found_high: float, image_range: Range) -> str | None:
    """A sentence where images between these values are nearly one grey in a range; else None.

    Constant ones, which say nothing of their range, are as they are meant.
    """
    low, high = image_range
    if not 0 < found_high - found_low < NARROW * (high - low):
        return None
    return (
        f"expected float images that fill their image_range, [{low:g}, {high:g}], got values from "
        f"{found_low:g} to {found_high:g}, which are nearly one grey in there: give "
        "image_range=(low, high) as they are"
    )
