"""The command `genfast`, which `python -m genfast` is too."""

import os
import signal
import sys
from contextlib import suppress

NEEDED = "numpy", "torch"  # pip brings them, unless it was told not to or they were removed.
INTERRUPTED = 130  # The exit status of a command that a shell's Ctrl-C ended.


def main():
    """Run the command line and return its exit status; an interrupt is one word at any time."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        # PyTorch takes seconds to import, and an exception in the middle may come out as another.
        signal.signal(signal.SIGINT, _leave)
    try:
        from genfast.cli import main as run_command
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        install = f"python -m pip install {error.name}"
        print(f"genfast: error: expected {error.name}, got none: {install}", file=sys.stderr)
        return 1

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return run_command()
    except KeyboardInterrupt:
        _tell()
        return INTERRUPTED
    finally:
        if interruptible:  # From here on Python would print a traceback.
            signal.signal(signal.SIGINT, signal.SIG_DFL)


def _leave(*_):
    _tell()
    os._exit(INTERRUPTED)


def _tell():
    if os.environ.get("LOCAL_RANK", "0") != "0":  # Of processes that torchrun started one speaks.
        return
    if sys.stderr is not None:  # Were it closed, its number might be another file's.
        with suppress(OSError):
            os.write(2, b"genfast: interrupted\n")


if __name__ == "__main__":
    sys.exit(main())
