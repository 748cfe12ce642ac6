"""Which files of a folder are its images: not what would hang, nor what training itself drew."""

import os
import stat
from pathlib import Path

from genfast.training.errors import BadInput
from genfast.training.run_files import CURVE, PICTURES, SAMPLE, SETTINGS, settings_of

IMAGE_SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
SPECIAL = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
FOLDER, LINK, FILE, BROKEN = "a folder", "a link to a folder", "a file", "a broken link"


def special_kind(mode):
    """What a file with this `st_mode` is if opening it may wait for ever: "a FIFO"; else None."""
    return next((kind for is_kind, kind in SPECIAL if is_kind(mode)), None)


def find_images(folder, run_folder=None):
    """The files with an image's suffix in a folder and all below it.

    Links to folders are followed, but each real folder is entered once: under the name that leads
    to it without links, if there is one, else under the first in the order of names. So a loop of
    links changes nothing. A link to a folder above itself or above `folder` is not followed.

    Args:
        folder: the folder.
        run_folder: the folder of the run that asks, which is passed over if it lies below; or None.

    Returns:
        The paths, sorted, and a list of what was passed over, each with the reason: the run's
        folder, sample pictures of other runs, broken links, FIFOs, sockets and devices.

    Raises:
        BadInput: a folder may not be read.
    """
    try:
        walk = _Walk(folder, run_folder)
    except OSError as error:
        raise BadInput(
            f"expected a readable folder, could not read {error.filename}: {error}"
        ) from None
    return sorted(walk.paths), sorted(walk.passed_over)


class _Walk:
    """What `find_images` finds. Folders go by two paths: as people know them, and the real one."""

    def __init__(self, folder, run_folder):
        self.paths = []
        self.passed_over = []
        real = os.path.realpath(folder)
        self._entered = {_identity(real)}
        self._above = _identities_above(real)
        self._run = None
        if run_folder is not None and os.path.isdir(run_folder):
            # Data inside the run's folder are not the run's own.
            self._run = next(iter({_identity(run_folder)} - self._above), None)
        self._links = []
        self._walk(os.fspath(folder), real)
        while self._links:
            links, self._links = sorted(self._links), []
            for shown, parent in links:
                self._follow(shown, parent)

    def _walk(self, shown, real):
        waiting = [(shown, real)]
        while waiting:
            shown, real = waiting.pop()
            drawn = 0
            of_a_run = os.path.basename(real) == PICTURES and _is_run(os.path.dirname(real))
            with os.scandir(shown) as entries:
                for entry in entries:
                    kind, path = _kind(entry), os.path.join(shown, entry.name)
                    if kind == FOLDER:
                        if self._enters(path):
                            waiting.append((path, os.path.join(real, entry.name)))
                    elif kind == LINK:
                        self._links.append((path, real))
                    elif kind == BROKEN:
                        self._pass_over(path, kind)
                    elif Path(entry.name).suffix.lower() not in IMAGE_SUFFIXES:
                        continue
                    elif kind != FILE:
                        self._pass_over(path, kind)
                    # Pictures of older runs do not say themselves who drew them.
                    elif of_a_run and SAMPLE.fullmatch(entry.name):
                        drawn += 1
                    elif entry.name == CURVE and _is_run(real):
                        self._pass_over(path, "the losses of a run")
                    else:
                        self.paths.append(Path(path))
            if drawn:
                self._pass_over(shown, f"sample pictures of a run: {drawn}")

    def _follow(self, shown, parent):
        """Enter the folder to which a link in the real folder `parent` leads."""
        real = os.path.realpath(shown)
        above = self._above | _identities_above(parent)
        if _identity(real) in above - self._entered:
            self._pass_over(shown, "a link to a folder above it")
        elif self._run in _identities_above(real):
            self._pass_over(shown, "a link into this run's folder")
        elif self._enters(shown):
            self._walk(shown, real)

    def _enters(self, path):
        identity = _identity(path)
        if identity in self._entered:
            return False
        self._entered.add(identity)
        if identity == self._run:
            self._pass_over(path, "this run's folder")
        return identity != self._run

    def _pass_over(self, path, reason):
        self.passed_over.append(f"{Path(path)} ({reason})")


def _kind(entry):
    if entry.is_symlink():
        try:
            mode = entry.stat().st_mode
        except OSError:
            return BROKEN
        return LINK if stat.S_ISDIR(mode) else special_kind(mode) or FILE
    if entry.is_dir(follow_symlinks=False):
        return FOLDER
    if entry.is_file(follow_symlinks=False):
        return FILE
    return special_kind(entry.stat(follow_symlinks=False).st_mode) or FILE


def _identity(path):
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _identities_above(real):
    """Of a folder and all that hold it."""
    return {_identity(path) for path in (real, *Path(real).parents)}


def _is_run(folder):
    """Whether a folder holds the settings of a genfast run."""
    try:
        return "model" in (settings_of(Path(folder, SETTINGS)) or {})
    except OSError:
        return False
