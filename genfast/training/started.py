"""What torchrun tells each of the processes that it starts, by the environment."""

import os


def number(name: str, default: int) -> int:
    """A whole number from the environment."""
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def are_several() -> bool:
    """Whether this process is one of several."""
    return number("WORLD_SIZE", 1) > 1 and "RANK" in os.environ


def processes_here() -> int:
    """How many of them are on this machine, this one among them."""
    return max(1, number("LOCAL_WORLD_SIZE", 1)) if are_several() else 1


def is_first_here() -> bool:
    """Whether this is the one process of its machine that says what holds for all of them."""
    return not are_several() or number("LOCAL_RANK", 0) == 0
