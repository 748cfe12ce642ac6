"""Somebody's own data set in a run: read once, or anew each epoch where it draws random numbers.

What an item is depends on the run's seed, the epoch and the item's number alone: before an item is
read, the generators of Python, NumPy and PyTorch are seeded from these three. So it is the same in
whatever process it is read, and a resumed run goes on with the very batches it would have seen.
"""

import math
import os
import pickle
import random
import signal
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from genfast.models.sizes import ImageSize, height_and_width
from genfast.training import progress
from genfast.training.data import sources
from genfast.training.data.decoding import colour
from genfast.training.data.items import float_bounds, item_of, label_of
from genfast.training.data.labels import LabelledImages
from genfast.training.data.prefetch import WaitingClock, sent
from genfast.training.errors import BadInput
from genfast.training.image_range import NARROW, checked, why_narrow
from genfast.training.memory import available_memory, missing_memory, require_memory
from genfast.training.parts import LABELS

PROBED = 16  # Items that are looked at first, evenly spread.
AT_ONCE = 64  # Items that a worker reads at a time where all are read.
# In the place of the number of an epoch: for the items looked at first, and for those kept aside.
_PROBE, _ASIDE = 2**32 - 1, 2**32 - 2


class DataSet:
    """A data set with items by number, as `genfast.train` takes it.

    Args:
        items: has `len()` and items by numbers from 0, of the forms that `item_of` knows: a
            `torch.utils.data.Dataset`, torchvision's and Hugging Face's data sets, a list of
            images, a tensor or an array. A uint8 tensor or array of images is taken whole.
        image_range: (low, high) of images that are floats. None: (0, 1), as ToTensor makes them;
            after Normalize(0.5, 0.5) they are in (-1, 1). They are rounded to 256 levels.
        classes: the names of the classes in the order of the labels' numbers, or how many there
            are, for a conditional run. None: as the data set tells, by `classes` (torchvision) or
            by the names in `features` (Hugging Face).
        num_workers: how many processes read items; 0 for none beside this one.
        cache: whether items are read once and kept in memory, with what their transforms drew in
            the first epoch. None: where reading draws no random numbers and half of the free memory
            holds them.

    Attributes:
        name: what a run notes as its data.

    Raises:
        BadInput: an argument is something else.

    Example:
        >>> items = [(torch.rand(3, 20, 30), i % 2) for i in range(4)]
        >>> data = DataSet(items, classes=["cat", "dog"])
        >>> images, crc = data.load(16, background="white", conditional=True, seed=0)
        >>> images.shape, images.classes
        (torch.Size([4, 3, 16, 16]), ('cat', 'dog'))
    """

    def __init__(
        self,
        items: Any,
        *,
        image_range: tuple[float, float] | None = None,
        classes: Sequence[str] | int | None = None,
        num_workers: int = 0,
        cache: bool | None = None,
    ) -> None:
        _check_items(items)
        self._items = items
        self.name = f"<{type(items).__name__}>"
        try:
            self._image_range = checked(image_range) or (0.0, 1.0)
        except ValueError as error:
            raise BadInput(str(error)) from None
        if type(num_workers) is not int or num_workers < 0:
            raise BadInput(f"expected num_workers to be a whole number from 0, got {num_workers!r}")
        if cache not in (None, True, False):
            raise BadInput(f"expected cache to be True, False or None, got {cache!r}")
        self._classes, self._num_workers, self._cache = classes, num_workers, cache

    def load(
        self,
        image_size: ImageSize | None,
        *,
        background: str,
        conditional: bool,
        seed: int,
        fitting: Callable[[int, int], Any] = lambda *size: size,
    ) -> tuple["torch.Tensor | LabelledImages | Streamed", int]:
        """The images for a run.

        Args:
            image_size: the size to which images are cropped and resized, as `resize` takes it.
                None: what `fitting` makes of that of the items looked at first; of 64 x 64 where
                these are of several sizes.
            background: behind transparent images, as `colour` takes it.
            conditional: whether labels are wanted too.
            seed: of the run.
            fitting: a function of a height and a width that gives such a size.

        Returns:
            A uint8 tensor (N, C, H, W), `LabelledImages` or a `Streamed`; and their checksum.

        Raises:
            BadInput: an item cannot be read, or is something else; or classes were given, and no
                labels are wanted.

        Warns:
            UserWarning: an item came out differently from the same seeds, or `image_range` is far
                wider than the images are.
        """
        if self._classes is not None and not conditional:
            raise BadInput("expected classes with conditional=True, got them without")
        whole = _whole(self._items)
        if whole is not None and not conditional:
            images = sources.resize(whole, image_size or fitting(*whole.shape[2:]))
            return images, sources.checksum(images)
        classes = class_names(self._items, self._classes) if conditional else None
        reader = _Reader(self._items, seed, self._image_range, colour(background), classes)
        probe = _probed(reader, self.name)
        reader.size = image_size or fitting(*probe.size)
        reader.shape = (probe.channels, *height_and_width(reader.size))
        images = Streamed(reader, self._num_workers)
        cached = self._cache
        if cached is None:
            cached = not probe.varies and images.nbytes <= available_memory() // 2
        return images.read() if cached else images, probe.checksum


class Streamed:
    """Images of a data set that are read anew for each batch.

    Attributes:
        shape: (N, C, H, W).
        nbytes: how many bytes they would take.
        classes: the names of a conditional run's classes, whose batches have labels; else None.
        device: of the batches as they are read: the CPU.

    Example:
        >>> data = DataSet([torch.rand(1, 8, 8)] * 4, cache=False)
        >>> images, crc = data.load(8, background="white", conditional=False, seed=0)
        >>> type(images).__name__, images.shape
        ('Streamed', (4, 1, 8, 8))
    """

    device = torch.device("cpu")

    def __init__(self, reader: Any, num_workers: int) -> None:
        self._reader, self._num_workers = reader, num_workers
        self.shape = (len(reader.items), *reader.shape)
        self.nbytes = math.prod(self.shape)
        self.classes = reader.classes

    def __len__(self) -> int:
        return self.shape[0]

    def batches(
        self, keys: Iterable[tuple[int, torch.Tensor]], device: torch.device, clock: WaitingClock
    ) -> Iterator[torch.Tensor | tuple[torch.Tensor, torch.Tensor]]:
        """Yield a batch for each of the keys: uint8 images, or (images, labels) with classes.

        Args:
            keys: an iterable of (epoch, numbers of items): an int, and an int64 tensor.
            device: where batches are wanted.
            clock: the `WaitingClock` to tell of waiting.
        """
        batches = iter(self._loader([(epoch, n) for n in ns.tolist()] for epoch, ns in keys))
        while True:
            started = time.perf_counter()
            busy = (
                torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
            )
            read = next(batches, None)
            if read is None:
                return
            # Where a GPU still has work from before, nothing waited.
            if busy is None or busy.query():
                clock.add(time.perf_counter() - started)
            parts: Any = [sent(t, device) for t in _unless_failed(read)]
            yield parts[0] if self.classes is None else tuple(parts)

    def read(self, numbers: torch.Tensor | None = None) -> torch.Tensor | LabelledImages:
        """The items of these numbers, an int64 tensor, or all: a tensor or `LabelledImages`."""
        count, epoch = (len(self), 0) if numbers is None else (len(numbers), _ASIDE)
        shape = (count, *self.shape[1:])
        require_memory(count * self.nbytes // len(self), f"{count} images of the data set")
        images, found = torch.empty(shape, dtype=torch.uint8), []
        numbers = torch.arange(count) if numbers is None else numbers
        parts = ([(epoch, n) for n in part.tolist()] for part in numbers.split(AT_ONCE))
        done = 0
        with progress.bar(total=count, desc="images", leave=False, dynamic_ncols=True) as bar:
            for read in self._loader(parts):
                pixels, *labels = _unless_failed(read)
                images[done : done + len(pixels)] = pixels
                found += labels
                done += len(pixels)
                bar.update(len(pixels))
        if self.classes is None:
            return images
        return LabelledImages(images, torch.cat(found), self.classes)

    def _loader(self, keys):
        """What the reader gives for lists of keys: an iterator, whose end ends the processes."""
        loader = DataLoader(
            self._reader,
            batch_sampler=keys,
            num_workers=self._num_workers,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_signals_to_the_run,
            generator=torch.Generator(),  # Else it would use up a random number of the training.
        )
        try:
            with warnings.catch_warnings():  # The error says it.
                warnings.filterwarnings("ignore", "Got pickle error")
                return iter(loader)
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            raise BadInput(
                f"expected a data set that can be sent to num_workers={self._num_workers} other "
                f"processes, but {str(error).partition(chr(10))[0]}"
            ) from None


class _Failed(NamedTuple):
    """In the place of a batch that could not be read: why, for a `BadInput` of the run."""

    why: str


class _Reader:
    """Reads items, each with its own random numbers: what the processes of a loader are given."""

    # Of images as batches have them, known after some have been looked at: what `resize` takes, and
    # (C, H, W).
    size: Any = None
    shape: Any = None

    def __init__(self, items, seed, image_range, background, classes):
        self.items, self.classes = items, classes
        self._seed, self._image_range, self._background = seed, image_range, background

    def __getitems__(self, keys):
        """Of a list of (epoch, number): (images, labels), or (images,) of a run without classes."""
        try:
            with _random_numbers_kept():
                found = [self._fitted(epoch, number) for epoch, number in keys]
        except BadInput as error:
            return _Failed(str(error))
        images = torch.stack([pixels for pixels, _ in found])
        if self.classes is None:
            return (images,)
        return images, torch.tensor([label for _, label in found])

    def item(self, seed, epoch, number):
        """Pixels (C, H, W) of any size, and a label or None; uses up random numbers."""
        _seed_all(seed, epoch, number)
        try:
            item = self.items[number]
        except Exception as error:  # It is somebody's own code.
            if missing_memory(error):
                raise
            raise BadInput(
                f"expected item {number} of {len(self.items)} of the data set to be readable, but "
                f"it raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            ) from error
        try:
            pixels, label = item_of(item, self._image_range, self._background)
            return pixels, None if self.classes is None else label_of(label, self.classes)
        except (TypeError, ValueError) as error:
            raise BadInput(f"{error}, in item {number} of the data set") from error

    def why_narrow(self, numbers):
        """As of `image_range`, for the floats of these items; None where some are no floats."""
        bounds = []
        for number in numbers:
            _seed_all(0, _PROBE, number)
            found = float_bounds(self.items[number])
            if found is None:
                return None
            bounds.append(found)
        low, high = min(low for low, _ in bounds), max(high for _, high in bounds)
        return why_narrow(low, high, self._image_range)

    def _fitted(self, epoch, number):
        pixels, label = self.item(self._seed, epoch, number)
        if len(pixels) > self.shape[0]:
            raise BadInput(
                f"expected grey images, as the first ones are, got a coloured one, in item {number}"
                " of the data set"
            )
        fitted = sources.resize(pixels[None], self.size)[0]
        return fitted.expand(self.shape), label


class _Probe(NamedTuple):
    """What the items looked at first tell.

    size: (height, width) of all of them, or 64 x 64. channels: 1 if all are grey, else 3. varies:
    whether reading one again may give another image. checksum: of these items.
    """

    size: tuple[int, int]
    channels: int
    varies: bool
    checksum: int


def _probed(reader, name):
    count = len(reader.items)
    crc = zlib.crc32(str(count).encode())
    numbers = sorted({i * (count - 1) // (PROBED - 1) for i in range(PROBED)})
    shapes, draws, repeats = set(), False, True
    darkest, lightest, narrow = 255, 0, None
    with _random_numbers_kept():
        for number in numbers:
            _seed_all(0, _PROBE, number)
            before = _state()
            pixels, label = reader.item(0, _PROBE, number)
            draws |= _state() != before
            repeats &= torch.equal(pixels, reader.item(0, _PROBE, number)[0])
            shapes.add(tuple(pixels.shape))
            crc = zlib.crc32(f"{tuple(pixels.shape)} {label}".encode(), crc)
            crc = zlib.crc32(pixels.contiguous().numpy(), crc)
            darkest = min(darkest, int(pixels.min()))
            lightest = max(lightest, int(pixels.max()))
        if lightest - darkest <= 1 + NARROW * 255:  # Of floats as they were, levels are rounded.
            narrow = reader.why_narrow(numbers)
    if narrow:
        warnings.warn(f"{narrow}, of {name}", stacklevel=6)
    if not repeats:
        warnings.warn(
            f"an item of {name} came out differently from the same seeds of Python's, NumPy's and "
            "PyTorch's random numbers, so a resumed run will not see the same images",
            stacklevel=6,
        )
        crc = zlib.crc32(str(count).encode())
    sizes = {shape[1:] for shape in shapes}
    size = sizes.pop() if len(sizes) == 1 else (sources.DEFAULT_FOLDER_SIZE,) * 2
    return _Probe(size, max(shape[0] for shape in shapes), draws or not repeats, crc)


def class_names(items: Any, given: Sequence[str] | int | None = None) -> tuple[str, ...]:
    """The names of the classes of a data set, a tuple: as they are given, or as it tells.

    Raises:
        BadInput: it does not tell, or they are no two different names.
    """
    names: Any = given
    if names is None:
        features = getattr(items, "features", None)  # Of Hugging Face: a dict of kinds by column.
        kinds = [features.get(name) for name in LABELS] if isinstance(features, Mapping) else []
        told = [getattr(kind, "names", None) for kind in kinds] + [getattr(items, "classes", None)]
        names = next((n for n in told if n is not None), None)
        if names is None and hasattr(items, "dataset"):  # A Subset, or what random_split gives.
            return class_names(items.dataset)
    if type(names) is int:
        names = range(names)
    if isinstance(names, str) or not hasattr(names, "__iter__"):
        raise BadInput(
            "expected classes, the names of the classes or how many there are, for a conditional "
            f"run on a data set that does not tell, got {names!r}"
        )
    names = tuple(map(str, names))
    if len(set(names)) != len(names) or len(names) < 2:
        raise BadInput(f"expected two or more classes, each another, got {len(names)}: {names[:9]}")
    return names


def _check_items(items):
    name = type(items).__name__
    if isinstance(items, Mapping):
        raise BadInput(
            f"expected a data set, got a {name} of {', '.join(map(str, items))}: give one of them"
        )
    kind = type(items)
    by_number = hasattr(kind, "__getitem__") and hasattr(kind, "__len__")
    if isinstance(items, IterableDataset) or not by_number:
        raise BadInput(
            f"expected a data set with len() and items by number, got a {name}"
            + (", which only gives one after the other" if hasattr(kind, "__iter__") else "")
            + (": give its dataset" if hasattr(items, "dataset") else "")
        )
    if isinstance(items, torch.Tensor | np.ndarray) and items.ndim not in (3, 4):
        raise BadInput(
            "expected images (N, H, W), (N, C, H, W) or (N, H, W, C), got shape "
            f"{tuple(items.shape)}"
        )
    if not len(items):
        raise BadInput(f"expected a data set with items, got an empty {name}")


def _whole(items):
    """Images that lie in memory as a run has them, uint8 (N, C, H, W); None for other data sets."""
    if isinstance(items, np.ndarray) and items.dtype == np.uint8:
        with warnings.catch_warnings():  # Nothing here writes to images.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            images, places = torch.from_numpy(np.ascontiguousarray(items)), (3, 1)
    elif isinstance(items, torch.Tensor) and items.dtype == torch.uint8:
        images, places = items.detach().cpu(), (1, 3)
    else:
        return None
    images = images[:, None] if images.ndim == 3 else images
    if 0 in images.shape or (items.ndim == 4 and not {images.shape[i] for i in places} & {1, 3}):
        raise BadInput(
            "expected uint8 images (N, H, W), (N, C, H, W) or (N, H, W, C) with C of 1 or 3, got "
            f"shape {tuple(items.shape)}"
        )
    if items.ndim == 4 and next(i for i in places if images.shape[i] in (1, 3)) == 3:
        images = images.permute(0, 3, 1, 2)
    return images if images.nbytes >= sources.LARGE else images.contiguous()


def _unless_failed(read):
    if isinstance(read, _Failed):
        raise BadInput(read.why)
    return read


def _as_it_is(batch):
    return batch


def _leave_signals_to_the_run(worker):
    """A process of a loader is not to end by what asks the run to end after its step.

    Terminals, `timeout` and torchrun send a signal to all processes of a group. SIGTERM has to go
    on ending this one, as that is how a loader ends those that hang.
    """
    if hasattr(os, "setpgrp"):
        os.setpgrp()
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def _seed_all(*numbers):
    """Seed the generators that data sets draw from; CUDA's is the training's alone."""
    first, second, third = np.random.SeedSequence(numbers).generate_state(3, np.uint64).tolist()
    random.seed(first)
    np.random.seed(second % 2**32)
    torch.default_generator.manual_seed(third)


def _state():
    numpys: Any = np.random.get_state()
    _, keys, *rest = numpys
    return random.getstate(), keys.tobytes(), rest, torch.get_rng_state().numpy().tobytes()


@contextmanager
def _random_numbers_kept():
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
