"""Batches of uint8 images, shuffled anew each epoch."""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import partial
from typing import Any

import numpy as np
import torch

from genfast.training.data import sources
from genfast.training.data.datasets import Streamed
from genfast.training.data.labels import LabelledImages
from genfast.training.data.prefetch import CudaCopies, NoCopy, Prefetcher, WaitingClock, sent
from genfast.training.errors import BadInput


class Batches:
    """Batches of shuffled images, each image at most once an epoch; the last, smaller one is left.

    The order of an epoch depends on the seed and the epoch's number alone. So a resumed run needs
    no state to go on with the very batches that an interrupted one would have seen.

    Images that take at most a quarter of a GPU's free memory move there, and batches are gathered
    from them there. Otherwise threads gather batches ahead of the step, in pinned memory, from
    which they are copied while the step runs. On a CPU they do so for sets of a GiB or more, which
    may lie in a file. From memory a batch is gathered in less than a hundredth of the time of the
    fastest step, and on the same cores: there a thread would gain nothing.

    Labels are gathered in turn wherever the images are, as they are few bytes. A `Streamed` set
    reads its batches, and their labels, itself.

    Attributes:
        waiting: a `WaitingClock`, whose `share()` says how much the data hold up training.

    Args:
        images: uint8 (N, C, H, W), `LabelledImages`, or a `Streamed`.
        batch_size: the number of images a batch; BadInput if there are fewer.
        seed: an int from 0.
        device: where batches are wanted.
        chosen: the numbers of the images that take part, an int64 tensor; None for all.
        rank, count: which of how many processes draws these batches. All draw from one order: of
            each `count * batch_size` images the first takes the first `batch_size`, and so on.

    Example:
        >>> images = torch.zeros(10, 1, 8, 8, dtype=torch.uint8)
        >>> batches = Batches(images, batch_size=4, seed=0, device=torch.device("cpu"))
        >>> len(batches), next(batches.stream()).shape
        (2, torch.Size([4, 1, 8, 8]))
    """

    def __init__(
        self,
        images: torch.Tensor | LabelledImages | Streamed,
        batch_size: int,
        seed: int,
        device: torch.device,
        chosen: torch.Tensor | None = None,
        *,
        rank: int = 0,
        count: int = 1,
    ) -> None:
        self._chosen = chosen
        self._count = len(images) if chosen is None else len(chosen)
        if self._count < batch_size * count:
            most = f"the {self._count} images"
            if count > 1:
                most = f"{self._count // count}, as {count} processes share {most}"
            raise BadInput(f"expected --batch-size of at most {most}, got {batch_size}")
        self.labels: Any = None
        if isinstance(images, LabelledImages):
            self.labels, images = images.labels, images.images
        on_cuda = device.type == "cuda"
        self._streamed = isinstance(images, Streamed)
        if (
            on_cuda
            and not isinstance(images, Streamed)
            and images.nbytes <= torch.cuda.mem_get_info(device)[0] // 4
        ):
            images = images.to(device)
            self.labels = self.labels if self.labels is None else self.labels.to(device)
        self.images: Any = images
        self.batch_size = batch_size
        self._together = batch_size * count
        self._own = slice(rank * batch_size, (rank + 1) * batch_size)
        self.seed = seed
        self.device = device
        self.waiting = WaitingClock()
        self._prefetches = images.device.type == "cpu" and (
            on_cuda or images.nbytes >= sources.LARGE
        )

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return self._count // self._together

    def stream(self, start: int = 0) -> Generator[Any, None, None]:
        """Yield uint8 batches for ever, epoch after epoch, from batch number `start` on.

        Of labelled images a batch is (images, labels), int64 (batch_size,). Closing the generator
        ends the threads, if there are any.
        """
        self.waiting.restart()
        indices = self._indices(start)
        if self._streamed:
            keys = ((n // len(self), chosen) for n, chosen in enumerate(indices, start))
            return self.images.batches(keys, self.device, self.waiting)
        gather = self._prefetched if self._prefetches else self._gathered
        return gather(indices) if self.labels is None else self._with_labels(gather, indices)

    def _with_labels(
        self,
        gather: Callable[[Iterator[torch.Tensor]], Generator[torch.Tensor, None, None]],
        indices: Iterator[torch.Tensor],
    ) -> Generator[tuple[torch.Tensor, torch.Tensor], None, None]:
        # Batches that are gathered ahead ask for indices ahead.
        ahead: deque[torch.Tensor] = deque()

        def noted() -> Iterator[torch.Tensor]:
            for chosen in indices:
                ahead.append(chosen)
                yield chosen

        with closing(gather(noted())) as batches:
            for batch in batches:
                labels = self.labels.index_select(0, ahead.popleft())
                yield batch, sent(labels, batch.device)

    def _gathered(self, indices: Iterator[torch.Tensor]) -> Generator[torch.Tensor, None, None]:
        on_cpu = self.images.device.type == "cpu"
        for chosen in indices:
            started = time.perf_counter()
            batch = self.images.index_select(0, chosen)
            if on_cpu:  # On a GPU it only was asked for.
                self.waiting.add(time.perf_counter() - started)
            yield batch

    def _prefetched(self, indices: Iterator[torch.Tensor]) -> Generator[torch.Tensor, None, None]:
        # Rows are read as they lie in memory or in the file: with channels last, or not.
        channels_last = not self.images.is_contiguous()
        images = self.images.permute(0, 2, 3, 1) if channels_last else self.images
        fill = partial(_take, images.contiguous().numpy())
        shape = (self.batch_size, *images.shape[1:])
        if self.device.type == "cuda":
            carrier = CudaCopies(self.device, shape, self.waiting)
        else:
            carrier = NoCopy(shape)
        arrays = (chosen.numpy() for chosen in indices)
        with Prefetcher(fill, arrays, carrier, self.waiting) as batches:
            for batch in batches:
                yield batch.permute(0, 3, 1, 2) if channels_last else batch

    def _indices(self, start: int) -> Iterator[torch.Tensor]:
        epoch, skipped = divmod(start, len(self))
        while True:
            order = sent(self._order(epoch), self.images.device)
            for chosen in order.split(self._together)[skipped : len(self)]:
                yield chosen[self._own]
            epoch, skipped = epoch + 1, 0

    def _order(self, epoch: int) -> torch.Tensor:
        seed = np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint32)
        generator = torch.Generator().manual_seed(int(seed[0]))
        order = torch.randperm(self._count, generator=generator)
        return order if self._chosen is None else self._chosen[order]


def _take(rows: np.ndarray, indices: np.ndarray, out: np.ndarray) -> None:
    # By default `take` would gather into a second array first, to leave `out` alone after an error.
    np.take(rows, indices, axis=0, out=out, mode="clip")
