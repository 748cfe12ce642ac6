"""What is shown of work while it goes on, which may be hidden: bars, and lines above them."""

import sys
from contextlib import contextmanager
from contextvars import ContextVar

from genfast.training.errors import require

_hidden = ContextVar("hidden", default=False)


@contextmanager
def hidden(value=True):
    """Show neither bars nor lines while entered; `value` may be False, which changes nothing."""
    token = _hidden.set(_hidden.get() or value)
    try:
        yield
    finally:
        _hidden.reset(token)


def bar(*arguments, **options):
    """A tqdm bar: see its documentation."""
    return require("tqdm", "tqdm").tqdm(*arguments, disable=_hidden.get(), **options)


def say(line):
    """Write a line for people above the bars, on standard error."""
    if not _hidden.get():
        require("tqdm", "tqdm").tqdm.write(line, file=sys.stderr)
