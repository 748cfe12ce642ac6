"""What a run may write over in its folder: what a run of its own left, and nobody else's files."""

import os
import re
from contextlib import contextmanager, suppress

from genfast.training.errors import BadInput
from genfast.training.run_files import CURVE, PICTURES, SETTINGS, head, settings_of
from genfast.training.runs import board, held_out, kept, lock
from genfast.training.runs.checkpoint import NAME as CHECKPOINT
from genfast.training.runs.loss_log import is_header
from genfast.training.runs.pictures import drawn_by_genfast

LOSSES = "metrics.csv"
VALIDATION = held_out.NAME
# Some file systems ignore case.
_PICTURE = re.compile(r"(?:epoch_\d{3,}|step_\d{7,})\.png", re.IGNORECASE)


@contextmanager
def claimed(out, resume_from=None, *, demo=False):
    """Make the folder if need be, and hold its lock while entered.

    Args:
        out: a `Path`.
        resume_from: the path of the checkpoint to go on from, which may lie elsewhere.
        demo: whether this is a demo, which may take the place of an earlier one: what that left is
            removed.

    Raises:
        BadInput: the folder is in use, or the run would write over files that are not its own.
    """
    check(out, resume_from, demo=demo)  # Before anything is made.
    new = [path for path in (out, *out.parents) if not path.exists()]
    out.mkdir(parents=True, exist_ok=True)
    try:
        with lock.held(out):
            _check_files(out, resume_from, demo)
            if demo and _is_demo(out):
                _remove_run(out)
            yield
    finally:
        with suppress(OSError):  # They hold a run, unless it could not begin.
            for path in new:
                path.rmdir()


def check(out, resume_from=None, *, demo=False):
    """BadInput if a run could not claim the folder `out` now; changes nothing. See `claimed`."""
    if out.exists() and not out.is_dir():
        raise BadInput(f"expected --out to be a folder, got the file {out}")
    lock.refuse_held(out)
    _check_files(out, resume_from, demo)


def _check_files(out, resume_from, demo):
    settings = _settings(out / SETTINGS)
    steps = _steps_logged(out / LOSSES)
    _refuse_another_validation(out / VALIDATION)
    pictures = _pictures(out / PICTURES)
    checkpoints = _kept(out / kept.FOLDER)
    _check_curve(out / CURVE)
    if os.path.lexists(out / board.FOLDER) and not (out / board.FOLDER).is_dir():
        raise _foreign(out / board.FOLDER, "a folder for what TensorBoard shows of a run")
    if demo and _is_demo(out):
        return
    checkpoint = out / CHECKPOINT
    if os.path.lexists(checkpoint) and not (resume_from and _are_same(resume_from, checkpoint)):
        way_on = "give " if demo else "give --resume to go on with it, or "
        raise BadInput(
            f"expected --out to be a folder without a run, but {out} holds one: {way_on}another "
            f"--out"
        )
    if resume_from and _are_same(resume_from.parent, out) and (settings or steps is not None):
        return
    # What is left of a run that ended before its first checkpoint: one step, perhaps its picture.
    if steps and steps > 1:
        raise BadInput(
            f"expected --out to be a folder without a run, but {out / LOSSES} holds the losses of "
            f"one: give another --out"
        )
    if len(pictures) > (1 if settings else 0):
        raise BadInput(
            f"expected --out to be a folder without pictures of a run, got {pictures[-1]}: give "
            f"another --out"
        )
    if checkpoints:
        raise BadInput(
            f"expected --out to be a folder without checkpoints of a run, got {checkpoints[-1]}: "
            f"give another --out"
        )


def _settings(path):
    """What a run wrote about itself; None where there is nothing, BadInput if it is another's."""
    if not os.path.lexists(path):
        return None
    settings = settings_of(path)
    if settings is None:
        raise _foreign(path, "the settings of a genfast run")
    return settings


def _steps_logged(path):
    """How many steps metrics.csv holds, counted to 2; None without it, BadInput if another's."""
    if not os.path.lexists(path):
        return None
    header, *rows = head(path).decode(errors="replace").splitlines()[:3] or [""]
    if not is_header(header.split(",")):
        raise _foreign(path, "the losses of a genfast run")
    return len(rows)


def _refuse_another_validation(path):
    """BadInput if a file that a run would write over is not one that a run left."""
    if os.path.lexists(path):
        header, *_ = head(path).decode(errors="replace").splitlines() or [""]
        if not held_out.is_header(header.split(",")):
            raise _foreign(path, "what a genfast run measured")


def _pictures(folder):
    """The paths of what look like pictures of a run."""
    if not os.path.lexists(folder):
        return []
    if not folder.is_dir():
        raise _foreign(folder, "a folder for the pictures of a run")
    return sorted(path for path in folder.iterdir() if _PICTURE.fullmatch(path.name))


def _kept(folder):
    """The paths of what look like checkpoints that a run keeps besides the last one."""
    if not os.path.lexists(folder):
        return []
    if not folder.is_dir():
        raise _foreign(folder, "a folder for the checkpoints of a run")
    return kept.in_folder(folder)


def _check_curve(path):
    if os.path.lexists(path) and not (path.is_file() and drawn_by_genfast(path)):
        raise _foreign(path, "the picture of a genfast run's losses")


def _foreign(path, expected):
    return BadInput(
        f"expected {path} to be {expected}, got something else, which stays as it is: give "
        f"another --out"
    )


def _is_demo(out):
    settings = _settings(out / SETTINGS)
    if not settings:
        return False
    # Version 0.1.0 did not say so at first.
    before = (settings.get("model"), settings.get("data"), out.name) == ("dcgan", "digits", "demo")
    return settings.get("demo", before) is True


def _remove_run(out):
    files = out / CHECKPOINT, out / LOSSES, out / VALIDATION, out / CURVE
    for path in (*files, *_pictures(out / PICTURES)):
        path.unlink(missing_ok=True)


def _are_same(path, other):
    return path.exists() and other.exists() and path.samefile(other)
