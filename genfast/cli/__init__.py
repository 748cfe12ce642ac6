"""The command line, one file a command."""

import argparse
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout

import torch

import genfast
from genfast.backend import selected_backend
from genfast.cli import demo, environment, evaluate, export, reconstruct, sample, train
from genfast.cli.streams import Unbreakable, open_closed_streams, tell
from genfast.launch import first_use
from genfast.training.errors import BadInput, Diverged, Elsewhere, LostWorker
from genfast.training.memory import limited_memory, missing_memory
from genfast.training.runs.devices import as_device
from genfast.training.runs.workers import before_they_meet, let_speak, refuse_several
from genfast.training.started import is_first_here

COMMANDS = (train, sample, reconstruct, evaluate, export, environment, demo)


def main(arguments=None):
    """Run a command; returns the exit status: 0, 1 after an error, 130 after an interrupt."""
    open_closed_streams()
    out, errors = Unbreakable(sys.stdout, needed=True), Unbreakable(sys.stderr, needed=False)
    with redirect_stdout(out), redirect_stderr(errors), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: tell(f"warning: {message}")
        return _run(arguments)


def _run(arguments):
    try:
        try:
            with before_they_meet():
                args = _parser().parse_args(arguments)
                _check_backend()
                if not getattr(args, "spreads", False):
                    refuse_several(args.command)
                device = as_device(args.device)
            with limited_memory(device):
                return args.run(args)
        finally:
            sys.stdout.flush()  # At Python's exit it would be too late to say why it failed.
    except Elsewhere as error:
        if error.needs_time:
            let_speak()
    except (BadInput, Diverged, LostWorker) as error:
        tell(f"error: {error}")
    except (MemoryError, OSError, RuntimeError) as error:
        amount = missing_memory(error)
        if amount:
            tell(f"error: expected enough memory, got no room for {amount}: {_remedy(args)}")
        elif isinstance(error, OSError):  # A full disk, a folder that must not be written to.
            tell(f"error: expected files that can be read and written, but {error}")
        else:
            raise
    except KeyboardInterrupt:
        if is_first_here():
            tell("interrupted")
        return 130
    return 1


def _remedy(args):
    """What to do where memory is short."""
    lowered = getattr(args, "memory_options", lambda args: [])(args)
    if not lowered:
        return "free some, or give another --device"
    return "lower " + ", ".join(lowered[:-1]) + (" or " if lowered[1:] else "") + lowered[-1]


def _check_backend():
    try:
        selected_backend()
        first_use.why_off(torch.device("cpu"))
    except ValueError as error:
        raise BadInput(str(error)) from None


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        """Say what is wrong with an option in one line; argparse would print all options too."""
        tell(f"error: {message}; python -m {self.prog} --help says what there is")
        sys.exit(2)


def _parser():
    parser = _Parser(prog="genfast", description=genfast.__doc__)
    parser.add_argument("--version", action="version", version=f"genfast {genfast.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for command in COMMANDS:
        command.add(commands)
    return parser
