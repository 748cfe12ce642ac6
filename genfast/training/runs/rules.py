"""Rules of values: one for the command line, for Python and for a checkpoint."""

import reprlib
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from genfast.models.sizes import height_and_width, plain

# Counts end here: products of two of them still fit into 64 bits.
LARGEST = 10**9


class Rule(NamedTuple):
    """Values that a setting takes.

    Attributes:
        kind: int, float, str, bool or tuple. An int does for a float.
        expected: the values in words.
        holds: a function of a value of that kind.
        choices: the values, where they are few.
    """

    kind: type
    expected: str
    holds: Callable
    choices: tuple = ()

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


def one_of(*choices):
    """The rule for one of a few strings or numbers."""
    words = f"{', '.join(map(str, choices[:-1]))} or {choices[-1]}"
    return Rule(type(choices[0]), words, lambda v: v in choices, choices)


class _Sizes(Rule):
    """The rule for sizes, of which there is a form for people and one that is kept: `plain_size`.

    An int stands for a square, text such as "96x64" and a (height, width) for any.
    """

    def allows(self, value: object) -> bool:
        return plain_size(value) is not None

    def read(self, text: str) -> int | str:
        value = plain_size(int(text) if text.isdecimal() and text.isascii() else text)
        if value is None:
            raise ValueError(f"expected {self.expected}, got {shown(text)}")
        return value


def sizes() -> Rule:
    """The rule for heights and widths in pixels."""
    expected = f"a whole number from 1 to {LARGEST:,}, or HEIGHTxWIDTH such as 96x64"
    return _Sizes(int, expected, lambda value: plain_size(value) is not None)


def plain_size(value: object) -> int | str | None:
    """A size as settings keep it: an int for squares, else text; None if it is none.

    Ints are plain ones, as in `Rule`.
    """
    ints = (value,) if type(value) is int else value if isinstance(value, tuple | list) else ()
    if not (type(value) is str or (ints and all(type(v) is int for v in ints))):
        return None
    try:
        height, width = height_and_width(value)  # type: ignore[arg-type]
    except ValueError:
        return None
    return plain(height, width) if max(height, width) <= LARGEST else None


def names(low):
    """The rule for a tuple of at least `low` names, no two of them the same."""
    return Rule(
        tuple,
        f"at least {low} names, each another",
        lambda v: all(type(n) is str and n for n in v) and len(v) == len(set(v)) >= low,
    )


ABOVE_0 = Rule(float, "a number above 0", lambda v: 0 < v < float("inf"))
FROM_0 = Rule(float, "a number from 0", lambda v: 0 <= v < float("inf"))
BELOW_1 = Rule(float, "a number from 0 to below 1", lambda v: 0 <= v < 1)
BETWEEN_0_AND_1 = Rule(float, "a number above 0 and below 1", lambda v: 0 < v < 1)
FLAG = Rule(bool, "True or False", lambda v: True)
