"""Checkpoints that a run keeps besides the last one: `checkpoints/step_0000100.pt` and so on."""

import os
import re
import shutil
import warnings

import torch

from genfast.training.files import replacing
from genfast.training.runs.checkpoint import FORMAT

FOLDER = "checkpoints"
_NAME = re.compile(r"step_(\d{7,})\.pt", re.IGNORECASE)  # Some file systems ignore case.
# What a run may change when it goes on.
_MAY_DIFFER = ("data", "epochs", "steps")


def name_of(step):
    """The name of the checkpoint of a step."""
    return f"step_{step:07d}.pt"


def in_folder(folder):
    """The paths of what look like kept checkpoints in a folder, by their steps."""
    found = [(_NAME.fullmatch(path.name), path) for path in folder.iterdir()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def is_kept(path):
    """Whether a checkpoint lies where runs keep theirs."""
    return path.absolute().parent.name == FOLDER and _NAME.fullmatch(path.name) is not None


class Kept:
    """Keeps the last few checkpoints of a run.

    Args:
        out: the folder of the run.
        count: how many, those of before a resume included; 0 keeps none, and removes none.
        settings: those of the run, a dict, by which its own checkpoints are known.
    """

    def __init__(self, out, count, settings):
        self._folder, self._count = out / FOLDER, count
        self._settings = _lasting(settings)
        self._own = {}

    def add(self, path, step):
        """Keep a copy of the checkpoint at `path`, of step number `step`; let go of the oldest."""
        if not self._count:
            return
        self._folder.mkdir(exist_ok=True)
        target = self._folder / name_of(step)
        if os.path.lexists(target) and not self._is_own(target):
            warnings.warn(
                f"{target} is no checkpoint of this run and stays as it is: that of step {step} is "
                f"not kept",
                stacklevel=3,
            )
            return
        with open(path, "rb") as source, replacing(target) as file:
            shutil.copyfileobj(source, file)
        self._own[target] = True
        own = [path for path in in_folder(self._folder) if self._is_own(path)]
        for path in own[: -self._count]:
            path.unlink()

    def _is_own(self, path):
        """Whether a file holds a checkpoint of this run: what does not is nobody's to remove."""
        if path not in self._own:
            self._own[path] = _settings_in(path) == self._settings
        return self._own[path]


def _settings_in(path):
    """The settings in a checkpoint, whose tensors are not read; None of something else."""
    if path.is_symlink() or not path.is_file():
        return None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return _lasting(content["config"]) if content["format"] == FORMAT else None
    except Exception:  # Damaged bytes make the unpickler raise nearly anything.
        return None


def _lasting(settings):
    return {k: v for k, v in settings.items() if v is not None and k not in _MAY_DIFFER}
