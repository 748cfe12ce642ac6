"""Losses and sample pictures for TensorBoard, an option that needs its package."""

from contextlib import contextmanager

from genfast.training.errors import BadInput, require
from genfast.training.runs.rules import Rule, shown

FOLDER = "tensorboard"
LOGS = Rule(str, "tensorboard", lambda v: v == "tensorboard", ("tensorboard",))


class Board:
    """Takes what a run would show, and shows nothing: what runs have without the option."""

    def losses(self, step, values):
        """Take the losses of a step, a dict of numbers."""

    def picture(self, step, pixels):
        """Take a sample picture, uint8 (C, H, W)."""


class TensorBoard(Board):
    """Writes events into a folder, as `opened` gives one."""

    def __init__(self, writer):
        self._writer = writer

    def losses(self, step, values):
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step, pixels):
        self._writer.add_image("samples", pixels.cpu(), step)


def check(log):
    """BadInput if `log` names no way to log, or one whose package is missing."""
    if log is not None and not LOGS.allows(log):
        raise BadInput(f"expected --log to be {LOGS.expected}, got {shown(log)}")
    if log is not None:
        _writer_class()


@contextmanager
def opened(log, out, done):
    """The `Board` of a run in the folder `out`, which goes on after step `done`."""
    if log is None:
        yield Board()
        return
    # Of events of before a kill, those beyond the checkpoint are made anew.
    purge_step = done + 1 if done else None
    with _writer_class()(str(out / FOLDER), purge_step=purge_step) as writer:
        yield TensorBoard(writer)


def _writer_class():
    return require("torch.utils.tensorboard", "tensorboard", extra="log").SummaryWriter
