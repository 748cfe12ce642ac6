"""Image sizes: how they are written, and which ones halve down to a few pixels.

A size is an int for squares, a (height, width), or text such as "96x64", height first.
"""

import re
from typing import NamedTuple

from genfast.geometry import pair

SMALLEST, LARGEST = 16, 256  # Pixels of the smaller side that networks of convolutions take.
_FEWEST = 4  # Pixels of that side that are left of it.
# A size in pixels as users write it.
ImageSize = int | str | tuple[int, int]
_TEXT = re.compile("([1-9][0-9]{0,9})x([1-9][0-9]{0,9})")


class Halved(NamedTuple):
    """What networks of convolutions make of a size of images.

    halvings: how often height and width are halved.
    base: the (height, width) that is left then.
    """

    halvings: int
    base: tuple[int, int]

    @property
    def growth(self) -> int:
        """How many times the channels next to the image those of the base are."""
        return 2 ** (self.halvings - 1)


def height_and_width(image_size: ImageSize) -> tuple[int, int]:
    """A size as (height, width); ValueError if it is none."""
    match = _TEXT.fullmatch(image_size) if isinstance(image_size, str) else None
    try:
        height, width = pair(tuple(map(int, match.groups())) if match else image_size, "image_size")
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 1:
        raise ValueError(
            f"expected image_size to be a number of pixels from 1, or a (height, width) of such, "
            f"got {image_size!r}"
        )
    return height, width


def plain(height: int, width: int) -> int | str:
    """A size as settings and files keep it: an int for squares, else text such as "96x64"."""
    return height if height == width else f"{height}x{width}"


def halved(image_size: ImageSize) -> Halved:
    """How often images of this size are halved, and to what; ValueError unless they can be.

    The smaller side decides, and the other one goes with it: both are halved until 4 to 7 pixels
    are left of the smaller, so 64 ends at 4, 96 at 6, and 96x64 at 6x4.
    """
    height, width = height_and_width(image_size)
    reason = why_not(height, width)
    if reason:
        raise ValueError(f"expected image_size {reason}, got {plain(height, width)}")
    halvings = _halvings(height, width)
    return Halved(halvings, (height >> halvings, width >> halvings))


def why_not(height: int, width: int) -> str | None:
    """What a size would have to be to be halved, as words that follow its name; None if it can."""
    smaller = min(height, width)
    if not SMALLEST <= smaller <= LARGEST:
        return f"with a smaller side from {SMALLEST} to {LARGEST}"
    whole = 2 ** _halvings(height, width)
    if height % whole or width % whole:
        return (
            f"in multiples of {whole}, as its smaller side is from {_FEWEST * whole} to "
            f"{2 * _FEWEST * whole - 1}"
        )
    return None


def nearest(height: int, width: int) -> tuple[int, int]:
    """The smallest size that can be halved and holds these images, or what is too large shrunk.

    It has their shape but for what the halvings ask for, and is their own size where that will do.
    """
    smaller = min(height, width)
    scaled = min(max(smaller, SMALLEST), LARGEST)
    height, width = (-(-side * scaled // smaller) for side in (height, width))
    while why_not(height, width):  # Rounded up, the smaller side may be halved once more.
        whole = 2 ** _halvings(height, width)
        height, width = (-(-side // whole) * whole for side in (height, width))
    return height, width


def _halvings(height: int, width: int) -> int:
    return (min(height, width) // _FEWEST).bit_length() - 1
