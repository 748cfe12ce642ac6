"""Rules of values: one for the command line, for Python and for a checkpoint."""

import reprlib
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

# Counts end here: products of two of them still fit into 64 bits.
LARGEST = 10**9


class Rule(NamedTuple):
    """Values that a setting takes.

    Attributes:
        kind: int, float, str or bool. An int does for a float.
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


ABOVE_0 = Rule(float, "a number above 0", lambda v: 0 < v < float("inf"))
FROM_0 = Rule(float, "a number from 0", lambda v: 0 <= v < float("inf"))
BELOW_1 = Rule(float, "a number from 0 to below 1", lambda v: 0 <= v < 1)
FLAG = Rule(bool, "True or False", lambda v: True)
