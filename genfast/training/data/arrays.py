"""Images in .npy, .npz and IDX files. What a header claims is checked before memory is taken."""

import gzip
import io
import math
import struct
import warnings
import zipfile
from contextlib import contextmanager

import numpy as np
import torch

from genfast.training.errors import BadInput
from genfast.training.memory import require_memory

NPY_START = 2**16  # Bytes that hold any header of a .npy file that NumPy takes.
PIECE = 2**20  # Bytes read at a time.


def read_array_file(path, map_from):
    """The images of a .npy, .npz or IDX file, the latter plain or gzipped.

    Args:
        path: a regular file; without the suffix of the first two it is taken for IDX.
        map_from: from this many bytes on, images that lie in the file as they are stay there.

    Returns:
        A uint8 tensor (N, C, H, W), C 1 or 3, of any size.

    Raises:
        BadInput: the file holds something else, less than it claims, or more than fits in memory.
    """
    read = {".npy": _read_npy, ".npz": _read_npz}.get(path.suffix.lower(), _read_idx)
    with reading(path, "uint8 images"):
        return _to_tensor(read(path), path, map_from)


@contextmanager
def reading(path, what):
    """Within, any error becomes a BadInput that names `what` was expected in a file, and why."""
    try:
        yield
    except BadInput:
        raise
    except Exception as error:  # Damaged bytes make the readers raise nearly anything.
        reason = str(error).partition("\n")[0] or type(error).__name__
        if isinstance(error, EOFError):  # The readers of archives say no more than that.
            reason = "it is truncated"
        raise BadInput(f"expected {what} in {path}, could not read it: {reason}") from None


def to_nchw(images):
    """A tensor (N, C, H, W), in memory of its own, of an array (N, H, W, C)."""
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy())


def _read_npy(path):
    with open(path, "rb") as file:
        shape, order, offset = _image_header(file, path)
    _check_claim(shape, path.stat().st_size - offset)
    return np.memmap(path, np.uint8, "r", offset, shape, order)


def _read_npz(path):
    with zipfile.ZipFile(path) as archive:
        member = _only_array(archive, path)
        with archive.open(member) as file:
            shape, order, offset = _image_header(file, path)
        _check_claim(shape, member.file_size - offset)
        with archive.open(member) as file:
            file.read(offset)
            pixels, length = unpack(file, math.prod(shape), f"the images in {path}")
    _check_claim(shape, length)  # The archive's own list may have claimed too much as well.
    return pixels.reshape(shape, order=order)


def _only_array(archive, path):
    found = members(archive)
    names = list(found)
    name = next((n for n in ("images", "x_train") if n in names), names[0] if names else None)
    if name is None or (len(names) > 1 and name not in ("images", "x_train")):
        raise BadInput(
            f"expected {path} to hold one array, or one called images or x_train, "
            f"got {', '.join(names[:9]) or 'none'}" + (" …" if len(names) > 9 else "")
        )
    return found[name]


def members(archive):
    """The arrays of a .npz file, an open archive: what `zipfile` knows of each by its name."""
    return {info.filename.removesuffix(".npy"): info for info in archive.infolist()}


def npy_header(file):
    """(shape, order, dtype, offset of the data) of an array in .npy format; ValueError if none."""
    # Of a bounded part, for a header may claim to be of any length itself.
    start = io.BytesIO(file.read(NPY_START))
    version = np.lib.format.read_magic(start)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"expected version 1 or 2 of the format, got {version[0]}")
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(start)
    else:
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(start)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, and reading those can run code")
    return shape, "F" if fortran else "C", dtype, start.tell()


def _image_header(file, path):
    """(shape, order, offset of the data) of uint8 images in .npy format."""
    shape, order, dtype, offset = npy_header(file)
    if dtype != np.uint8:
        raise BadInput(f"{_expected(path)}, got dtype {dtype}")
    _check_shape(shape, path)
    return shape, order, offset


def _check_claim(shape, length):
    if math.prod(shape) > length:  # NumPy lets more follow.
        raise ValueError(f"its header claims {math.prod(shape)} bytes of pixels, it has {length}")


def unpack(file, count, what):
    """The next `count` bytes of a file that is being unpacked, and how many there were.

    Of more than `count` it counts one, and unpacks no further. `what` they are is said where they
    take more memory than is free.
    """
    require_memory(count, what)
    pixels = np.empty(count, np.uint8)
    view, length = memoryview(pixels), 0
    while length < count:
        got = file.readinto(view[length : length + PIECE])
        if not got:
            break
        length += got
    # At the end the readers also compare the checksum.
    return pixels, length + len(file.read(1))


def _read_idx(path):
    """MNIST's format: 0, 0, the type (8: uint8), the rank, the sizes as big-endian int32, the data.

    Described by Y. LeCun, C. Cortes and C. Burges on "The MNIST database of handwritten digits".
    """
    with open(path, "rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
    if not gzipped:
        with open(path, "rb") as file:
            shape = _idx_shape(file.read(16), path)
        _check_idx_length(shape, path.stat().st_size - 16, path)
        return np.memmap(path, np.uint8, "r", 16, shape)
    try:
        with gzip.open(path) as file:
            shape = _idx_shape(file.read(16), path)
            pixels, length = unpack(file, math.prod(shape), f"the images in {path}")
    except EOFError:
        raise BadInput(f"expected a whole gzip file, got {path}, which is truncated") from None
    _check_idx_length(shape, length, path)
    return pixels.reshape(shape)


def _idx_shape(header, path):
    if header[:2] != b"\0\0" or len(header) < 4:
        raise BadInput(
            f"expected {path} to be a folder of images, a .npy or .npz file, or an IDX file, and "
            f"it is none: an IDX file starts with two zero bytes"
        )
    kind, rank = header[2], header[3]
    if (kind, rank) != (8, 3):
        raise BadInput(
            f"expected {path} to hold uint8 images (IDX type 8, rank 3), got type {kind}, "
            f"rank {rank}" + (": these may be labels" if rank == 1 else "")
        )
    if len(header) < 16:
        raise BadInput(f"expected an IDX header of 16 bytes in {path}, got {len(header)}")
    shape = struct.unpack(">3I", header[4:])
    _check_shape(shape, path)
    return shape


def _check_idx_length(shape, length, path):
    if length != math.prod(shape):
        raise BadInput(
            f"expected {math.prod(shape)} bytes of pixels in {path} for {shape[0]} images of "
            f"{shape[1]} x {shape[2]}, got {length}: the file is truncated or damaged"
        )


def _expected(path):
    return f"expected uint8 images (N, H, W), (N, H, W, C) or (N, C, H, W) in {path}"


def _check_shape(shape, path):
    if len(shape) not in (3, 4) or (len(shape) == 4 and not {1, 3} & {shape[1], shape[3]}):
        raise BadInput(f"{_expected(path)} with C of 1 or 3, got shape {shape}")
    if 0 in shape:
        raise BadInput(f"{_expected(path)}, got an empty array of shape {shape}")
    if min(shape) < 0:
        raise BadInput(f"{_expected(path)}, got the negative shape {shape}")


def _to_tensor(array, path, map_from):
    if array.ndim == 3:
        array = array[..., None]
    channels_last = array.shape[3] in (1, 3)
    if array.nbytes < map_from:
        return to_nchw(array) if channels_last else torch.from_numpy(np.array(array))
    if not array.flags.c_contiguous:
        raise BadInput(
            f"{_expected(path)} in C order, as it is too large to be read, got another order"
        )
    images = _view(array)
    return images.permute(0, 3, 1, 2) if channels_last else images


def _view(array):
    with warnings.catch_warnings():
        # It may lie in a file that must not be written to, and nothing here writes to images.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)
