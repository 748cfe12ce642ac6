"""Labels of images, from where people keep them beside the images."""

import gzip
import os
import re
import struct
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from genfast.training.data import arrays
from genfast.training.errors import BadInput

# Arrays of a .npz file: those of images that `arrays` looks for, in its order, and of their labels.
BESIDE = {"images": "labels", "x_train": "y_train"}


@dataclass(frozen=True)
class LabelledImages:
    """Images and the class of each.

    Attributes:
        images: uint8 (N, C, H, W), as `load_images` gives them.
        labels: int64 (N,), in CPU memory: numbers into `classes`.
        classes: the names of the classes, two or more: in the order of the labels' numbers, or of
            the folders' names.

    Example:
        >>> images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
        >>> cats_and_dogs = LabelledImages(images, torch.tensor([0, 1, 1]), ("cat", "dog"))
        >>> len(cats_and_dogs[1:])
        2
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        return self.images.shape

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, chosen: slice | torch.Tensor) -> "LabelledImages":
        """Those that a slice or a tensor of numbers chooses."""
        return LabelledImages(self.images[chosen], self.labels[chosen], self.classes)


def labelled(
    images: torch.Tensor, values: np.typing.ArrayLike, source: str | os.PathLike
) -> LabelledImages:
    """`LabelledImages` of images and as many whole numbers or names.

    Numbers that no image has are no classes: the labels 3 and 7 are two classes of these names.

    Raises:
        BadInput: there is one class only.
    """
    names, numbers = np.unique(values, return_inverse=True)
    # A checkpoint holds Unicode alone, and the names of folders may be any bytes.
    classes = tuple(os.fsencode(str(n)).decode("utf-8", "backslashreplace") for n in names)
    if len(classes) < 2:
        raise BadInput(
            f"expected images of two or more classes in {source} for --conditional, got only the "
            f"class {classes[0]!r}"
        )
    return LabelledImages(images, torch.from_numpy(numbers.reshape(-1).astype(np.int64)), classes)


def refuse_without(source: str | os.PathLike) -> NoReturn:
    """Raise the BadInput for data that have no labels."""
    raise BadInput(
        "expected images with labels for --conditional (a folder with a folder for each class, a "
        ".npz file with images and labels or x_train and y_train, MNIST's files, or digits), got "
        f"{source}, which has none"
    )


def folders_of(paths: Iterable[Path], folder: Path) -> list[str]:
    """The name of the folder in which each of the images lies, right below `folder`.

    Raises:
        BadInput: an image lies elsewhere.
    """
    for path in paths:
        if path.parent.parent != folder:
            raise BadInput(
                f"expected every image in the folder of its class, right below {folder}, for "
                f"--conditional, got {path}"
            )
    return [path.parent.name for path in paths]


def read_label_file(path: Path, count: int) -> np.ndarray:
    """The labels of the images in a .npz or IDX file, from that file or from the one beside it.

    Args:
        path: the file of images.
        count: how many they are.

    Returns:
        Whole numbers from 0, an array (count,).

    Raises:
        BadInput: there are none, or they are something else or of another length.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        refuse_without(path)
    with arrays.reading(path, "labels"):
        found, home = _of_npz(path, count) if suffix == ".npz" else _beside_idx(path, count)
    if found.size and found.min() < 0:
        raise BadInput(f"expected labels from 0 on in {home}, got {found.min()}")
    return found


def _of_npz(path: Path, count: int) -> tuple[np.ndarray, Path]:
    with zipfile.ZipFile(path) as archive:
        members = arrays.members(archive)
        name = next((theirs for ours, theirs in BESIDE.items() if ours in members), None)
        if name not in members:
            raise BadInput(
                f"expected arrays called images and labels, or x_train and y_train, in {path} for "
                f"--conditional, got {', '.join(list(members)[:9])}"
            )
        with archive.open(members[name]) as file:
            shape, _, dtype, offset = arrays.npy_header(file)
        if dtype.kind not in "iu":
            raise BadInput(f"expected {name} in {path} to be whole numbers, got dtype {dtype}")
        if shape not in ((count,), (count, 1)):  # The latter as Keras has them.
            raise BadInput(f"expected {count} {name}, one an image, in {path}, got shape {shape}")
        with archive.open(members[name]) as file:
            file.read(offset)
            content, length = arrays.unpack(file, count * dtype.itemsize, f"the labels in {path}")
    if length != len(content):
        raise ValueError(f"its header claims {len(content)} bytes of {name}, it has {length}")
    return content.view(dtype), path


def _beside_idx(path: Path, count: int) -> tuple[np.ndarray, Path]:
    """Of MNIST's format: 0, 0, 8 for uint8, the rank 1, the length as a big-endian int32, data."""
    home = _label_file_beside(path)
    with arrays.reading(home, "labels"):
        with open(home, "rb") as file:
            gzipped = file.read(2) == b"\x1f\x8b"
        with (gzip.open if gzipped else open)(home, "rb") as file:
            header = file.read(8)
            if header[:4] != b"\0\0\x08\x01" or len(header) < 8:
                raise BadInput(
                    f"expected {home} to hold labels (IDX type 8, rank 1), got another header"
                )
            (claimed,) = struct.unpack(">I", header[4:])
            if claimed != count:
                raise BadInput(
                    f"expected {count} labels, one for each image in {path}, in {home}, got "
                    f"{claimed}"
                )
            content, length = arrays.unpack(file, count, f"the labels in {home}")
    if length != count:
        raise BadInput(
            f"expected {count} bytes of labels in {home}, got {length}: the file is truncated or "
            "damaged"
        )
    return content, home


def _label_file_beside(path: Path) -> Path:
    """train-labels-idx1-ubyte for train-images-idx3-ubyte, plain or gzipped."""
    name = re.sub(r"\.gz$", "", path.name)
    if "images" not in name:
        refuse_without(path)
    name = name.replace("images", "labels").replace("idx3", "idx1")
    beside = [path.with_name(name + suffix) for suffix in ("", ".gz")]
    found = next((candidate for candidate in beside if candidate.is_file()), None)
    if found is None:
        raise BadInput(
            f"expected the labels of {path} beside it for --conditional, in {name} or {name}.gz, "
            "found neither"
        )
    return found
