"""What the blocks of docs/ import and the tests' environment may lack: stand-ins, or a reason.

A stand-in has as much of a package's interface as the blocks use, made anew here.
"""

import importlib.util
import re
import sys
from types import ModuleType

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

WITHOUT = {"accelerate", "lightning"}  # Frameworks: a stand-in would show nothing.


def provide(block, monkeypatch):
    """Let a block's imports be found; the name of a package that it cannot do without, or None."""
    names = re.findall(r"^(?:import|from) (\w+)", block, re.M)
    for name in names:
        if name in sys.modules or importlib.util.find_spec(name):
            continue
        if name in WITHOUT:
            return name
        for module in MODULES[name]():
            monkeypatch.setitem(sys.modules, module.__name__, module)
    return None


def _module(name, **content):
    module = ModuleType(name)
    vars(module).update(content)
    return module


class _Compose:
    def __init__(self, transforms):
        self._transforms = transforms

    def __call__(self, image):
        for transform in self._transforms:
            image = transform(image)
        return image


class _Resize:
    def __init__(self, size):
        self._size = size

    def __call__(self, image):
        return image.resize((self._size, self._size))


class _RandomHorizontalFlip:
    def __call__(self, image):
        flips = torch.rand(1).item() < 0.5
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flips else image


class _ToTensor:
    def __call__(self, image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class _FakeData(Dataset):
    def __init__(self, size, image_size, num_classes, transform):
        self._size, self._image_size = size, image_size
        self._num_classes, self._transform = num_classes, transform

    def __len__(self):
        return self._size

    def __getitem__(self, index):
        draw, (channels, height, width) = np.random.default_rng(index), self._image_size
        pixels = draw.integers(256, size=(height, width, channels), dtype=np.uint8)
        return self._transform(Image.fromarray(pixels)), index % self._num_classes


def _torchvision():
    data = _module("torchvision.datasets", FakeData=_FakeData)
    transforms = _module(
        "torchvision.transforms",
        Compose=_Compose,
        RandomHorizontalFlip=_RandomHorizontalFlip,
        Resize=_Resize,
        ToTensor=_ToTensor,
    )
    return _module("torchvision", datasets=data, transforms=transforms), data, transforms


class _ClassLabel:
    def __init__(self, names):
        self.names = names


class _Rows:
    """Hugging Face's `Dataset`, which is none of PyTorch's: columns, and rows as dicts."""

    def __init__(self, columns, features):
        self._columns, self.features = columns, features

    @classmethod
    def from_dict(cls, columns, features):
        return cls(columns, features)

    def __len__(self):
        return len(next(iter(self._columns.values())))

    def __getitem__(self, key):
        if isinstance(key, str):
            return self._columns[key]
        return {name: column[key] for name, column in self._columns.items()}


def _datasets():
    content = dict(ClassLabel=_ClassLabel, Dataset=_Rows, Features=dict, Image=object)
    return (_module("datasets", **content),)


MODULES = {"datasets": _datasets, "torchvision": _torchvision}
