"""What a setting may be: one rule for the command line, for Python and for a checkpoint."""

import reprlib
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from genfast.losses import GAN_LOSSES
from genfast.training.data.decoding import COLOURS, is_colour
from genfast.training.steps.precision import PRECISIONS

# Counts end here: products of two of them still fit into 64 bits.
LARGEST = 10**9


class Rule(NamedTuple):
    """Values that a setting takes.

    Attributes:
        kind: int, float or str. An int does for a float.
        expected: the values in words.
        holds: a function of a value of that kind.
    """

    kind: type
    expected: str
    holds: Callable

    def allows(self, value):
        """Whether a value, of whatever type, is one of these."""
        # Not `isinstance`: a bool is no number here, and `torch.load` refuses NumPy's numbers.
        if type(value) is not self.kind and not (self.kind is float and type(value) is int):
            return False
        try:
            return self.holds(self.kind(value))
        except OverflowError:  # An int that no float can hold.
            return False

    def read(self, text):
        """The value that text stands for; ValueError if it is none of these."""
        try:
            value = self.kind(text)
        except ValueError:
            value = None
        if not self.allows(value):
            raise ValueError(f"expected {self.expected}, got {shown(text)}")
        return value


def shown(value):
    """A value for a message: short and in one line; of other types than plain ones, the type."""
    if value is None or type(value) in (bool, int, float, str):
        with suppress(ValueError):  # Of an int with thousands of digits.
            return reprlib.repr(value)
    return f"a value of type {type(value).__name__}"


def whole(low=1, high=LARGEST):
    """The rule for whole numbers from `low` to `high`."""
    return Rule(int, f"a whole number from {low} to {high:,}", lambda v: low <= v <= high)


def one_of(choices):
    """The rule for one of a few strings or numbers."""
    words = f"{', '.join(map(str, choices[:-1]))} or {choices[-1]}"
    return Rule(type(choices[0]), words, lambda v: v in choices)


# By the names of `Config`.
RULES = {
    "data": Rule(str, "a name or a path", bool),
    "num_images": whole(),
    "checksum": whole(0, 2**32 - 1),
    "image_size": whole(),
    "channels": one_of((1, 3)),
    "batch_size": whole(),
    "epochs": whole(),
    "lr": Rule(float, "a number above 0", lambda v: 0 < v < float("inf")),
    "beta1": Rule(float, "a number from 0 to below 1", lambda v: 0 <= v < 1),
    "nz": whole(),
    "ngf": whole(),
    "ndf": whole(),
    "seed": whole(0, 2**63 - 1),
    "precision": one_of(PRECISIONS),
    "loss": one_of(tuple(GAN_LOSSES)),
    "ema": Rule(float, "a number from 0 to below 1", lambda v: 0 <= v < 1),
    "background": Rule(str, COLOURS, is_colour),
}
