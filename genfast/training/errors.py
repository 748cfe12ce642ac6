"""What a person at the command line is told in one sentence, instead of a traceback."""

import errno
import importlib
import re

# The extra "train" of setup.py, by the names that pip knows.
TRAIN = ("pillow", "scikit-learn", "tqdm")
# How PyTorch, CUDA and its libraries say that memory is short. Of sizes whose product passes 64
# bits PyTorch says something else.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|ALLOC_FAILED|size calculation overflowed"
    r"|integer multiplication overflow"
)
_AMOUNT = re.compile(r"(?:tried to|Unable to) allocate (?:([\d.]+ [KMGTPE]iB)|(\d+) bytes)")


class BadInput(ValueError):
    """Something given from outside cannot be used: the message says what was expected and came."""


class Diverged(RuntimeError):
    """The losses are no longer finite."""


def require(module, package):
    """Import a module of an optional package; BadInput says how to install it if it is absent.

    Args:
        module: the name to import, such as "PIL.Image".
        package: the name pip knows, such as "pillow".
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BadInput(
            f"expected {package}, which this needs, but it could not be imported ({error}): "
            f"install what training needs with python -m pip install {' '.join(TRAIN)}"
        ) from error


def missing_memory(error):
    """What could not be allocated, such as "2.00 GiB"; None if the error has another cause."""
    message = str(error)
    out_of_memory = (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(message))
    )
    if not out_of_memory:
        return None
    found = _AMOUNT.search(message)
    if found is None:
        return "what is needed"
    return found[1] or f"{int(found[2]) / 2**30:.3g} GiB"
