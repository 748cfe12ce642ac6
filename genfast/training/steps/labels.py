"""The labels of a batch, for networks that take them.

A network takes labels if it has `classes`, how many there are, and what is called takes `labels`,
int64 (N,), after the images or the noise: `forward(z, labels)`, `encode(images, labels)`.
"""

import inspect
from contextlib import contextmanager

import torch


def classes_of(network, function="forward"):
    """How many classes a network takes labels of; None if it takes none."""
    classes = getattr(network, "classes", None)
    if type(classes) is not int:  # Somebody else's may be names, or a layer.
        return None
    network = getattr(network, "_orig_mod", network)  # Of what torch.compile made.
    try:
        parameters = inspect.signature(getattr(network, function)).parameters
    except (AttributeError, TypeError, ValueError):
        return None
    return classes if "labels" in parameters else None


class Labels:
    """What networks are given beside images or noise: `network(x, *labels(len(x)))`.

    More images or latents than the batch has are several batches, one after the other, or with
    `each` several of one image, one after the other.

    Within a step they are the labels of its batch, in memory that a captured step finds again: one
    place for each size of a batch.

    Args:
        classes: how many there are; None if the networks take no labels.
    """

    def __init__(self, classes=None):
        self.classes = classes
        self._memory = {}
        self._current = None
        self._seen = False

    @classmethod
    def of(cls, **classes):
        """For parts that work together, with `classes_of` each; ValueError unless they agree."""
        first, *others = classes.values()
        if any(other != first for other in others):
            found = (f"{number or 'none'} for the {name}" for name, number in classes.items())
            raise ValueError(
                f"expected labels of as many classes for each of {', '.join(classes)}, or for "
                f"none, got {', '.join(found)}"
            )
        return cls(first)

    def __call__(self, count, each=False):
        """(labels,) for `count` images or latents; () for networks that take none."""
        if self.classes is None:
            return ()
        times, rest = divmod(count, len(self._current))
        if rest:
            raise ValueError(
                f"expected a number of images that the {len(self._current)} of the batch divide, "
                f"got {count}"
            )
        if times == 1:
            return (self._current,)
        return (self._current.repeat_interleave(times) if each else self._current.repeat(times),)

    @contextmanager
    def of_batch(self, labels, images):
        """Within, they are those of a batch, None if it has none, where the networks take any."""
        if self.classes is None:
            yield
            return
        if labels is None:
            raise ValueError(
                f"expected [images, labels], as the networks take labels of {self.classes} "
                "classes, got images alone"
            )
        with self._current_ones(self._placed(self._checked(labels, images))):
            yield

    @contextmanager
    def given(self, labels, z):
        """Within, they are these, for the noise `z`; ValueError for what the networks do not take.

        labels: int64 (N,), or None for networks that take none.
        """
        if (labels is None) != (self.classes is None):
            takes = "none" if self.classes is None else f"those of {self.classes} classes"
            came = "none" if labels is None else "some"
            raise ValueError(f"expected the labels that the networks take, {takes}, got {came}")
        if labels is None:
            yield
            return
        with self._current_ones(self._checked(labels, z)):
            yield

    @contextmanager
    def _current_ones(self, labels):
        before, self._current = self._current, labels
        try:
            yield
        finally:
            self._current = before

    def _placed(self, labels):
        place = self._memory.get(len(labels))
        if place is None:
            place = self._memory[len(labels)] = torch.empty_like(labels)
        return place.copy_(labels)

    def _checked(self, labels, images):
        if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
            came = f"{labels.dtype}" if isinstance(labels, torch.Tensor) else type(labels).__name__
            raise TypeError(f"expected labels as a tensor of whole numbers, got {came}")
        if labels.shape != (len(images),):
            raise ValueError(
                f"expected labels of shape ({len(images)},), one an image, got "
                f"{tuple(labels.shape)}"
            )
        if labels.device != images.device and not labels.is_cpu:
            raise ValueError(f"expected labels on {images.device}, got them on {labels.device}")
        # On a GPU that waits for the device: the first time only.
        if labels.is_cpu or not self._seen:
            low, high = (v.item() for v in labels.aminmax())
            if low < 0 or high >= self.classes:
                wrong = low if low < 0 else high
                raise ValueError(
                    f"expected labels from 0 to {self.classes - 1}, as the networks take, got "
                    f"{wrong}"
                )
            self._seen = True
        return labels.to(images.device, torch.int64, non_blocking=True)
