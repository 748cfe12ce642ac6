"""The classes of a conditional run: which are drawn, and in which order."""

import math

import torch

from genfast.training.errors import BadInput
from genfast.training.runs.rules import shown

NUM = 64
# Of a conditional model, where nobody says how many: so many of each class, of so many classes.
OF_A_CLASS, CLASSES_SHOWN = 8, 32
NAMED = 20  # How many names of classes a message holds.


def labels_of_samples(config, num=None, of_class=None):
    """The labels of a grid of samples, int64 (num,): as many of each class, class by class.

    Args:
        config: a `Config`.
        num: how many samples. None: 8 of each of the first 32 classes, or 64 of one.
        of_class: all are of this class: its name, or its number from 0 where no name is a number.

    Returns:
        The labels; None for a run that is not conditional.

    Raises:
        BadInput: there is no such class.
    """
    if not config.conditional:
        if of_class is not None:
            raise BadInput(
                f"expected a model trained with --conditional for --class {of_class}, got one "
                "trained without"
            )
        return None
    if of_class is not None:
        return torch.full((num or NUM,), _class_number(config.classes, str(of_class)))
    count = len(config.classes)
    if num is None:
        return torch.arange(min(count, CLASSES_SHOWN)).repeat_interleave(OF_A_CLASS)
    return torch.arange(num) // math.ceil(num / count)


def _class_number(classes, text):
    if text in classes:
        return classes.index(text)
    numbers = not any(name.isdecimal() for name in classes)
    if numbers and text.isdecimal() and len(text) < 10 and int(text) < len(classes):
        return int(text)
    named = ", ".join(classes[:NAMED]) + (" …" if len(classes) > NAMED else "")
    also = f", or a number from 0 to {len(classes) - 1}" if numbers else ""
    raise BadInput(f"expected --class to be one of {named}{also}, got {shown(text)}")


def labels_given(config, num, given):
    """The labels of `num` images as somebody gives them, int64 (num,); None for no labels.

    Args:
        config: a `Config`.
        num: how many images or latents they are for.
        given: a name or number of a class for all of them; a list of these, one each; a tensor of
            whole numbers into the classes; or None, for a run that is not conditional.

    Raises:
        BadInput: they are something else, or not for such a run.
    """
    if not config.conditional:
        if given is not None:
            raise BadInput("expected no labels for a model trained without --conditional, got some")
        return None
    count = len(config.classes)
    if given is None:
        raise BadInput(
            f"expected labels for a model trained with --conditional on {count} classes, got none"
        )
    if isinstance(given, str | int):
        given = [given] * num
    if isinstance(given, list | tuple):
        given = [_class_number(config.classes, v) if isinstance(v, str) else v for v in given]
    try:
        labels = torch.as_tensor(given).cpu()
    except (RuntimeError, TypeError, ValueError):
        raise BadInput(f"expected labels as whole numbers or names, got {shown(given)}") from None
    if labels.is_floating_point() or labels.shape != (num,):
        raise BadInput(
            f"expected {num} labels, whole numbers or names, got {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
    if num and not 0 <= int(labels.min()) <= int(labels.max()) < count:
        raise BadInput(f"expected labels from 0 to {count - 1}, got {shown(labels.tolist())}")
    return labels.to(torch.int64)


def labels_of_data(config, data):
    """The labels of `LabelledImages`, by the names of their classes, as a run of classes has them.

    Raises:
        BadInput: they have a class that the run had not.
    """
    unknown = next((name for name in data.classes if name not in config.classes), None)
    if unknown is not None:
        raise BadInput(f"expected images of the run's classes, got some of the class {unknown!r}")
    numbers = torch.tensor([config.classes.index(name) for name in data.classes])
    return numbers[data.labels]


def in_parts(tensor, labels, size):
    """Pairs of so many rows of a tensor and their labels, on its device, or None: a list."""
    parts = tensor.split(size)
    of_parts = [None] * len(parts) if labels is None else labels.to(tensor.device).split(size)
    return list(zip(parts, of_parts, strict=True))


def row_length(labels):
    """How many samples a row of their grid has, to hold one class; None for about a square.

    labels: as `labels_of_samples` gives them.
    """
    if labels is None or labels[0] == labels[-1]:
        return None
    return int((labels == labels[0]).sum())
