"""Images from where people keep them, as one uint8 tensor.

Images stay uint8, (N, C, H, W) with C of 1 or 3, until they are a batch: a quarter of the memory.
"""

import gzip
import math
import os
import struct
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from genfast.training.errors import BadInput, require

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
IDX_NAMES = ("train-images-idx3-ubyte", "train-images.idx3-ubyte")
DEFAULT_SIZES = {"digits": 32, "photos": 64}
DEFAULT_FOLDER_SIZE = 64
PHOTO_CROPS = 2048
# From this many bytes on, images in a .npy file stay there, and threads fetch the batches. Smaller
# sets are read: then nothing happens when the file is changed or removed during training.
LARGE = 2**30
SAMPLED = 1024  # How many images the checksum of a large set is made of.
NAMED = 20  # How many of the images that could not be read a warning names.


def load_images(source, image_size=None):
    """Load images, cropped to squares around their centres and resized.

    Args:
        source: "digits" (scikit-learn's 1,797 handwritten digits), "photos" (random crops of
            scikit-learn's two photographs), or a path: a folder of png, jpg and webp images of any
            depth, a `.npy` or `.npz` file of uint8 images, or MNIST's IDX file, plain or gzipped,
            or the folder it lies in.
        image_size: height and width in pixels. None: 32 for digits, 64 for photos and folders, and
            what arrays and IDX files already have (their smaller side).

    Returns:
        A uint8 tensor (N, C, image_size, image_size), C 1 for grey images and 3 for colour. Not to
        be written to: images in a `.npy` file of a GiB or more that need no cropping and resizing
        are not read but mapped into memory, so that they may take more than there is. Such a file
        must not change as long as the tensor is in use.

    Raises:
        BadInput: there is nothing readable, or it is not what was expected.

    Warns:
        UserWarning: images in a folder that could not be read and were skipped, by name.
    """
    if source == "digits":
        return resize(_digits(), image_size or DEFAULT_SIZES["digits"])
    if source == "photos":
        return _photos(image_size or DEFAULT_SIZES["photos"])
    path = Path(source)
    if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
        raise BadInput(f"expected a readable folder, got {path}, which may not be read")
    if source == "" or not path.exists():  # An empty name would be the current folder.
        raise BadInput(
            f"expected --data to be digits, photos, or the path of a folder, .npy, .npz or IDX "
            f"file, got {str(source)!r}, where there is nothing"
        )
    if path.is_dir():
        idx = _idx_file_in(path)
        if idx is None:
            return _read_folder(path, image_size or DEFAULT_FOLDER_SIZE)
        path = idx
    elif path.suffix.lower() in IMAGE_SUFFIXES:
        raise BadInput(f"expected --data to be a folder of images, got the single image {path}")
    return resize(_read_array_file(path), image_size)


def resize(images, image_size):
    """Crop uint8 images (N, C, H, W) to squares around their centres, then resize the squares.

    `image_size` is in pixels; None keeps the size of the square.
    """
    height, width = images.shape[2:]
    side = min(height, width)
    if height == width and image_size in (None, side):
        return images
    size = image_size or side
    resized = torch.empty(*images.shape[:2], size, size, dtype=torch.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    # In parts, as the images may take more memory than there is.
    for images_in, images_out in zip(images.split(1024), resized.split(1024), strict=True):
        square = images_in[:, :, top : top + side, left : left + side].contiguous()
        if size != side:
            square = F.interpolate(square, (size, size), mode="bicubic", antialias=True)
        images_out.copy_(square)
    return resized


def _digits():
    datasets = require("sklearn.datasets", "scikit-learn")
    grey = datasets.load_digits().images  # (1797, 8, 8), 0 to 16
    return torch.from_numpy(np.round(grey * (255 / 16)).astype(np.uint8))[:, None]


def _photos(image_size):
    """Square crops of a quarter to half of a photograph's height, anywhere in it, half mirrored.

    The crops are the same in every run: they are the data set, not a part of the training.
    """
    require("PIL.Image", "pillow")
    datasets = require("sklearn.datasets", "scikit-learn")
    photos = [_to_nchw(image[None]) for image in datasets.load_sample_images().images]
    draw = np.random.default_rng(0)
    crops = torch.empty(PHOTO_CROPS, 3, image_size, image_size, dtype=torch.uint8)
    for i in range(PHOTO_CROPS):
        photo = photos[i % len(photos)]
        height, width = photo.shape[2:]
        side = int(draw.integers(height // 4, height // 2 + 1))
        top, left = draw.integers(height - side + 1), draw.integers(width - side + 1)
        crop = photo[:, :, top : top + side, left : left + side]
        crops[i] = resize(crop.flip(3) if draw.random() < 0.5 else crop, image_size)[0]
    return crops


def _to_nchw(images):
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def _read_folder(folder, image_size):
    require("PIL.Image", "pillow")
    require("tqdm", "tqdm")
    paths = sorted(p for p in _files_below(folder) if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise BadInput(
            f"expected images ({', '.join(IMAGE_SUFFIXES)}) or MNIST's {IDX_NAMES[0]} in the "
            f"folder {folder} or below, found none"
        )
    images = torch.empty(len(paths), 3, image_size, image_size, dtype=torch.uint8)
    count, grey, failures = 0, True, []
    for path, (pixels, is_grey, problem) in _decode_all(paths, image_size):
        if problem:
            failures.append(f"{path} ({problem})")
            continue
        images[count] = pixels
        grey &= is_grey
        count += 1
    if count == 0:
        raise BadInput(
            f"expected readable images in {folder}, could read none of {len(paths)}: {failures[0]}"
        )
    if failures:
        more = f"; and {len(failures) - NAMED} more" if len(failures) > NAMED else ""
        warnings.warn(
            f"skipped {len(failures)} of {len(paths)} images, which could not be read: "
            + "; ".join(failures[:NAMED])
            + more,
            stacklevel=3,
        )
    images = images[:count]
    return images[:, :1].contiguous() if grey else images


def _files_below(folder):
    def refuse(error):  # `os.walk` would pass over what it may not read.
        raise BadInput(f"expected a readable folder, could not read {error.filename}: {error}")

    for where, _, names in os.walk(folder, onerror=refuse):
        yield from (Path(where, name) for name in names)


def _decode_all(paths, image_size):
    """Yield (path, what `_decode` gives) in order; by threads, as decoders release the GIL."""
    tqdm = require("tqdm", "tqdm").tqdm
    # Closing the results cancels what is left, so that an interrupt need not wait for all of it.
    with (
        ThreadPoolExecutor() as pool,
        closing(pool.map(lambda path: _decode(path, image_size), paths)) as decoded,
    ):
        yield from tqdm(zip(paths, decoded, strict=True), "images", len(paths), leave=False)


def _decode(path, image_size):
    """One image as ((3, H, W) uint8, whether it is grey, None), or (None, None, what is wrong)."""
    image_module = require("PIL.Image", "pillow")
    image_ops = require("PIL.ImageOps", "pillow")
    try:
        with image_module.open(path) as image:
            is_grey = image.mode in ("1", "L", "LA")
            if image.mode.startswith(("I", "F")):  # Pillow would cut their values off at 255.
                return None, None, f"expected 8 bits a channel, got mode {image.mode}"
            # JPEGs decode at a half, a quarter or an eighth of their size for a part of the time.
            image.draft("RGB", (2 * image_size, 2 * image_size))
            upright = image_ops.exif_transpose(image).convert("RGB")
            square = image_ops.fit(
                upright, (image_size, image_size), image_module.Resampling.LANCZOS
            )
    except Exception as error:  # Damaged bytes make the decoders raise nearly anything.
        return None, None, str(error) or type(error).__name__
    return _to_nchw(np.array(square)[None])[0], is_grey, None


def _idx_file_in(folder):
    candidates = (folder / f"{name}{suffix}" for name in IDX_NAMES for suffix in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def _read_array_file(path):
    """The images of a .npy, .npz or IDX file, (N, C, H, W) uint8 of any size."""
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            return _images_from_array(np.lib.format.open_memmap(path, mode="r"), path)
        if suffix == ".npz":
            return _images_from_array(_only_array(path), path)
        return _read_idx(path)
    except BadInput:
        raise
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise BadInput(f"expected uint8 images in {path}, could not read it: {error}") from None


def _only_array(path):
    with np.load(path, allow_pickle=False) as arrays:
        names = arrays.files
        name = next((n for n in ("images", "x_train") if n in names), names[0] if names else None)
        if name is None or (len(names) > 1 and name not in ("images", "x_train")):
            raise BadInput(
                f"expected {path} to hold one array, or one called images or x_train, "
                f"got {', '.join(names) or 'none'}"
            )
        return arrays[name]


def _images_from_array(array, path):
    expected = f"expected uint8 images (N, H, W), (N, H, W, C) or (N, C, H, W) in {path}"
    if array.dtype != np.uint8:
        raise BadInput(f"{expected}, got dtype {array.dtype}")
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4 or not {1, 3} & {array.shape[1], array.shape[3]}:
        raise BadInput(f"{expected} with C of 1 or 3, got shape {array.shape}")
    if 0 in array.shape:
        raise BadInput(f"{expected}, got an empty array of shape {array.shape}")
    channels_last = array.shape[3] in (1, 3)
    if array.nbytes < LARGE:
        return _to_nchw(array) if channels_last else torch.from_numpy(np.array(array))
    if not array.flags.c_contiguous:
        raise BadInput(f"{expected} in C order, as it is too large to be read, got another order")
    images = _view(array)
    return images.permute(0, 3, 1, 2) if channels_last else images


def _view(array):
    with warnings.catch_warnings():
        # It may lie in a file that must not be written to, and nothing here writes to images.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def _read_idx(path):
    """MNIST's format: 0, 0, the type (8: uint8), the rank, the sizes as big-endian int32, the data.

    Described by Y. LeCun, C. Cortes and C. Burges on "The MNIST database of handwritten digits".
    """
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except EOFError:
            raise BadInput(f"expected a whole gzip file, got {path}, which is truncated") from None
    if content[:2] != b"\0\0" or len(content) < 4:
        raise BadInput(
            f"expected {path} to be a folder of images, a .npy or .npz file, or an IDX file, and "
            f"it is none: an IDX file starts with two zero bytes"
        )
    kind, rank = content[2], content[3]
    if (kind, rank) != (8, 3):
        raise BadInput(
            f"expected {path} to hold uint8 images (IDX type 8, rank 3), got type {kind}, "
            f"rank {rank}" + (": these may be labels" if rank == 1 else "")
        )
    if len(content) < 16:
        raise BadInput(f"expected an IDX header of 16 bytes in {path}, got {len(content)}")
    shape = struct.unpack(">3I", content[4:16])
    if len(content) - 16 != math.prod(shape):
        raise BadInput(
            f"expected {math.prod(shape)} bytes of pixels in {path} for {shape[0]} images of "
            f"{shape[1]} x {shape[2]}, got {len(content) - 16}: the file is truncated or damaged"
        )
    return _images_from_array(np.frombuffer(content, np.uint8, offset=16).reshape(shape), path)


def fingerprint(images):
    """A checksum of the images, by which a resumed run knows that its data are the same.

    Of a set of a GiB or more it takes the shape and 1,024 images, evenly spread. Other images, or
    the same ones in another order, are noticed then too; a change to one image in a hundred goes
    unnoticed about once in 30,000 times, a change to a few images nearly always.
    """
    if images.nbytes < LARGE:
        return zlib.crc32(images.contiguous().numpy())
    checksum = zlib.crc32(str(tuple(images.shape)).encode())
    count = min(SAMPLED, len(images))
    for i in range(count):
        image = images[i * (len(images) - 1) // max(count - 1, 1)]
        checksum = zlib.crc32(image.contiguous().numpy(), checksum)
    return checksum
