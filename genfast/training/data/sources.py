"""Images from where people keep them, as one uint8 tensor.

Images stay uint8, (N, C, H, W) with C of 1 or 3, until they are a batch: a quarter of the memory.
"""

import math
import os
import re
import stat
import warnings
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F

from genfast.models.sizes import ImageSize, height_and_width
from genfast.training import progress
from genfast.training.data.arrays import read_array_file, to_nchw
from genfast.training.data.decoding import Colour, Decoded, colour, decode
from genfast.training.data.folders import IMAGE_SUFFIXES, find_images, special_kind
from genfast.training.data.labels import (
    LabelledImages,
    folders_of,
    labelled,
    read_label_file,
    refuse_without,
)
from genfast.training.errors import BadInput, require
from genfast.training.memory import require_memory

Images = TypeVar("Images", torch.Tensor, LabelledImages)

IDX_NAMES = ("train-images-idx3-ubyte", "train-images.idx3-ubyte")
DEFAULT_SIZES = {"digits": 32, "photos": 64}
DEFAULT_FOLDER_SIZE = 64
PHOTO_CROPS = 2048
# From this many bytes on, images in a .npy or plain IDX file stay there, and threads fetch the
# batches. Smaller sets are read: then nothing happens when the file is changed or removed during
# training.
LARGE = 2**30
SAMPLED = 1024  # How many images the checksum of a large set is made of.
NAMED = 20  # How many of the files that were left out a warning names.


def load_images(
    source: str | os.PathLike,
    image_size: ImageSize | None = None,
    *,
    background: str | None = "white",
    run_folder: str | os.PathLike | None = None,
) -> torch.Tensor:
    """Load images, each cropped around its centre to the shape asked for, and resized.

    In a folder, links to folders are followed, each real folder is entered once, and pictures that
    genfast drew are left out (those of `train` and `sample`).

    Args:
        source: "digits" (scikit-learn's 1,797 handwritten digits), "photos" (random crops of
            scikit-learn's two photographs), or a path: a folder of png, jpg and webp images of any
            depth, a `.npy` or `.npz` file of uint8 images, or MNIST's IDX file, plain or gzipped,
            or the folder it lies in.
        image_size: height and width in pixels: an int for squares, a (height, width), or text such
            as "96x64". None: 32 for digits, 64 for photos and folders, and what arrays and IDX
            files already have.
        background: what lies behind transparent images: "white", "black" or "#rrggbb". None drops
            the transparency and shows the colours that lie under it, whatever they are.
        run_folder: the folder of the run that asks, which is passed over if it lies in `source`.

    Returns:
        A uint8 tensor (N, C, height, width), C 1 for grey images and 3 for colour. Grey
        images on a coloured background have colour. Not to be written to: images in a `.npy` or
        plain IDX file of a GiB or more that need no cropping and resizing are not read but mapped
        into memory, so that they may take more than there is. Such a file must not change as long
        as the tensor is in use.

    Raises:
        BadInput: there is nothing readable, it is not what was expected (FIFOs, sockets and devices
            are never opened), or it takes more memory than is free.

    Warns:
        UserWarning: what was passed over in a folder, and images that were skipped, by name and
            with the reason.

    Example:
        >>> load_images("digits", 16).shape
        torch.Size([1797, 1, 16, 16])
    """
    return _load(source, image_size, background, run_folder)[0]


def load_labelled(
    source: str | os.PathLike,
    image_size: ImageSize | None = None,
    *,
    background: str | None = "white",
    run_folder: str | os.PathLike | None = None,
) -> LabelledImages:
    """As `load_images`, with the class of each image: `LabelledImages`.

    The digits have labels, and so have folders with a folder of images for each class, right below
    and with no image elsewhere; `.npz` files with `images` and `labels`, or `x_train` and
    `y_train`; and MNIST's IDX files, whose labels lie in a file beside them.

    Raises:
        BadInput: as `load_images`; or there are no labels, they are not whole numbers from 0, not
            as many as the images, or all the same.

    Example:
        >>> load_labelled("digits", 16).classes
        ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')
    """
    images, values = _load(source, image_size, background, run_folder, with_labels=True)
    return labelled(images, values, source)


def _load(
    source: str | os.PathLike,
    image_size: ImageSize | None,
    background: str | None,
    run_folder: str | os.PathLike | None,
    with_labels: bool = False,
) -> tuple[torch.Tensor, Any]:
    """The images, and the label of each, a number or a name; None where none are asked for."""
    behind = None if background is None else colour(background)
    size = None if image_size is None else height_and_width(image_size)
    if source == "digits":
        images, values = _digits()
        return resize(images, size or DEFAULT_SIZES["digits"]), values
    if source == "photos":
        if with_labels:
            refuse_without(source)
        return _photos(size or (DEFAULT_SIZES["photos"],) * 2), None
    path = Path(source)
    mode = _mode(path) if source != "" else None  # An empty name would be the current folder.
    if mode is None and is_name_of_a_data_set(source):
        raise BadInput(
            f"expected --data, as the run was given a data set in Python, {source}, to which no "
            "path leads: genfast.train goes on with it"
        )
    if mode is None:
        raise BadInput(
            f"expected --data to be digits, photos, or the path of a folder, .npy, .npz or IDX "
            f"file, got {str(source)!r}, where there is nothing"
        )
    kind = special_kind(mode)
    if kind:  # Opening it might wait for ever.
        raise BadInput(f"expected --data to be a folder or a file of images, got {kind}: {path}")
    if stat.S_ISDIR(mode):
        if not os.access(path, os.R_OK | os.X_OK):
            raise BadInput(f"expected a readable folder, got {path}, which may not be read")
        idx = _idx_file_in(path)
        if idx is None:
            size = size or (DEFAULT_FOLDER_SIZE, DEFAULT_FOLDER_SIZE)
            return _read_folder(path, size, behind, run_folder, with_labels)
        path = idx
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        raise BadInput(f"expected --data to be a folder of images, got the single image {path}")
    images = read_array_file(path, LARGE)
    values = read_label_file(path, len(images)) if with_labels else None
    return resize(images, size), values


def is_name_of_a_data_set(source: object) -> bool:
    """Whether this is what a run that was given a data set in Python notes as its data."""
    return bool(re.fullmatch(r"<\w+>", str(source)))


def _mode(path: Path) -> int | None:
    """The `st_mode` of a path; None if there is nothing."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # A loop of links, no permission, a zero byte.
        raise BadInput(f"expected --data to be a path that can be read, but {error}") from None


def resize(images: Images, image_size: ImageSize | None) -> Images:
    """Crop uint8 images (N, C, H, W) around their centres to a size's shape, then resize them.

    `image_size` as in `load_images`; None leaves them as they are. `LabelledImages` keep labels.

    Example:
        >>> resize(torch.zeros(2, 3, 20, 30, dtype=torch.uint8), (16, 24)).shape
        torch.Size([2, 3, 16, 24])
    """
    if image_size is None:
        return images
    if isinstance(images, LabelledImages):
        return replace(images, images=resize(images.images, image_size))
    size: tuple[int, int] = height_and_width(image_size)
    found: tuple[int, int] = (images.shape[2], images.shape[3])
    if found == size:
        return images
    count = math.prod((*images.shape[:2], *size))
    if count >= LARGE:
        require_memory(count, _of_pixels(len(images), size))
    resized = torch.empty(*images.shape[:2], *size, dtype=torch.uint8)
    height, width = crop = _largest_within(found, size)
    top, left = (found[0] - height) // 2, (found[1] - width) // 2
    # In parts, as the images may take more memory than there is.
    for images_in, images_out in zip(images.split(1024), resized.split(1024), strict=True):
        part = images_in[:, :, top : top + height, left : left + width].contiguous()
        if crop != size:
            part = F.interpolate(part, size, mode="bicubic", antialias=True)
        images_out.copy_(part)
    return resized


def _largest_within(found: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The (height, width) of the largest part of `found` pixels that has the shape of `size`."""
    (height, width), (h, w) = found, size
    if height * w > width * h:
        return max(1, round(width * h / w)), width
    return height, max(1, round(height * w / h))


def _of_pixels(count: int, size: tuple[int, int]) -> str:
    return f"{count} images of {size[0]} x {size[1]} pixels"


def _digits() -> tuple[torch.Tensor, np.ndarray]:
    datasets = require("sklearn.datasets", "scikit-learn")
    digits = datasets.load_digits()
    grey = digits.images  # (1797, 8, 8), 0 to 16
    return torch.from_numpy(np.round(grey * (255 / 16)).astype(np.uint8))[:, None], digits.target


def _photos(size: tuple[int, int]) -> torch.Tensor:
    """Crops of a photograph, anywhere in it, half of them mirrored.

    Their smaller side is a quarter to half of its height, or less where they would not fit in.

    The crops are the same in every run: they are the data set, not a part of the training.
    """
    require("PIL.Image", "pillow")
    datasets = require("sklearn.datasets", "scikit-learn")
    photos = [to_nchw(image[None]) for image in datasets.load_sample_images().images]
    draw = np.random.default_rng(0)
    crops = torch.empty(PHOTO_CROPS, 3, *size, dtype=torch.uint8)
    for i in range(PHOTO_CROPS):
        photo = photos[i % len(photos)]
        height, width = photo.shape[2:]
        side = int(draw.integers(height // 4, height // 2 + 1))
        longer = [round(side * pixels / min(size)) for pixels in size]
        h, w = _largest_within((min(longer[0], height), min(longer[1], width)), size)
        top, left = draw.integers(height - h + 1), draw.integers(width - w + 1)
        crop = photo[:, :, top : top + h, left : left + w]
        crops[i] = resize(crop.flip(3) if draw.random() < 0.5 else crop, size)[0]
    return crops


def _read_folder(
    folder: Path,
    size: tuple[int, int],
    background: Colour | None,
    run_folder: str | os.PathLike | None,
    with_labels: bool,
) -> tuple[torch.Tensor, list[str | None]]:
    require("PIL.Image", "pillow")
    require("tqdm", "tqdm")
    paths, passed_over = find_images(folder, run_folder)
    if not paths:
        raise BadInput(
            f"expected images ({', '.join(IMAGE_SUFFIXES)}) or MNIST's {IDX_NAMES[0]} in the "
            f"folder {folder} or below, found none"
            + (f"; passed over: {_named(passed_over)}" if passed_over else "")
        )
    if passed_over:
        warnings.warn(f"passed over in {folder}: {_named(passed_over)}", stacklevel=4)
    names = folders_of(paths, folder) if with_labels else [None] * len(paths)
    require_memory(len(paths) * 3 * math.prod(size), _of_pixels(len(paths), size))
    images = torch.empty(len(paths), 3, *size, dtype=torch.uint8)
    count, grey, failures, values = 0, True, [], []
    decoded = _decode_all(paths, size, background)
    for name, (path, (pixels, is_grey, problem)) in zip(names, decoded, strict=True):
        if problem:
            failures.append(f"{path} ({problem})")
            continue
        images[count] = pixels
        grey &= is_grey
        values.append(name)
        count += 1
    if count == 0:
        raise BadInput(
            f"expected readable images in {folder}, could read none of {len(paths)}: {failures[0]}"
        )
    if failures:
        warnings.warn(
            f"skipped {len(failures)} of {len(paths)} images: {_named(failures)}", stacklevel=4
        )
    images = images[:count]
    return images[:, :1].contiguous() if grey else images, values


def _named(things: Sequence[str]) -> str:
    more = f"; and {len(things) - NAMED} more" if len(things) > NAMED else ""
    return "; ".join(things[:NAMED]) + more


def _decode_all(
    paths: Sequence[Path], size: tuple[int, int], background: Colour | None
) -> Iterator[tuple[Path, Decoded]]:
    """Yield (path, what `decode` gives) in order; by threads, as decoders release the GIL."""
    # Closing the results cancels what is left, so that an interrupt need not wait for all of it.
    with (
        ThreadPoolExecutor() as pool,
        closing(  # type: ignore[type-var]
            pool.map(lambda path: decode(path, size, background), paths)
        ) as decoded,
    ):
        yield from progress.bar(zip(paths, decoded, strict=True), "images", len(paths), leave=False)


def _idx_file_in(folder: Path) -> Path | None:
    candidates = (folder / f"{name}{suffix}" for name in IDX_NAMES for suffix in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def checksum(images: torch.Tensor | LabelledImages) -> int:
    """A number made of the images, by which a resumed run knows that its data are the same.

    Of a set of a GiB or more it takes the shape and 1,024 images, evenly spread. Other images, or
    the same ones in another order, are noticed then too; a change to one image in a hundred goes
    unnoticed about once in 30,000 times, a change to a few images nearly always. Of
    `LabelledImages` all labels count too.

    Example:
        >>> black = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
        >>> checksum(black) == checksum(black + 1)
        False
    """
    if isinstance(images, LabelledImages):
        return zlib.crc32(images.labels.numpy().data, checksum(images.images))
    if images.nbytes < LARGE:
        return zlib.crc32(images.contiguous().numpy().data)
    crc = zlib.crc32(str(tuple(images.shape)).encode())
    count = min(SAMPLED, len(images))
    for i in range(count):
        image = images[i * (len(images) - 1) // max(count - 1, 1)]
        crc = zlib.crc32(image.contiguous().numpy().data, crc)
    return crc
