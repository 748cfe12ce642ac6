"""What was fastest at a product's first use, in a file that processes share.

One line a product, beside the GPU, the versions and the batch that it holds for. A writing takes a
lock, adds to what the file holds by then and puts a new file in its place, so a reader meets whole
files only. Without a lock, as on Windows, two writings at once may lose lines, which are then timed
again.
"""

import csv
import io
import os
import tempfile
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path

from genfast.launch import tiles

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# Other columns are another format and take another number.
NAME = "first_use_1.csv"
# For another process's writing, which takes milliseconds.
_LOCK_SECONDS = 5.0
# Of which troubles a process has warned: each once.
_warned: set[str] = set()


@dataclass(frozen=True)
class Timing:
    """The fastest configuration of a product on a GPU.

    gpu: its name.
    versions: of all that decides how fast kernels are, in words.
    epilogue: what rides on the product, in words.
    problem: a `Problem`.
    config: the fastest `GemmConfig`.
    us, library_us: microseconds that it took, and PyTorch's convolution; "" where that did not run.
    """

    gpu: str
    versions: str
    epilogue: str
    problem: tiles.Problem
    config: tiles.GemmConfig
    us: str
    library_us: str

    @property
    def key(self):
        """What no two lines share."""
        return self.gpu, self.versions, self.epilogue, self.problem


_TEXTS = tuple(f.name for f in fields(Timing) if f.type is str)
_NAMES = tuple(f.name for kind in (tiles.Problem, tiles.GemmConfig) for f in fields(kind))
COLUMNS = (*_TEXTS, *_NAMES)


class NotOurs(Exception):
    """A file of this name that something else wrote; it stays as it is."""


def path():
    """Where the file is or would be.

    In the folder GENFAST_CACHE_DIR, else in genfast in XDG_CACHE_HOME, else in ~/.cache/genfast.

    Raises:
        OSError: there is no home folder.
    """
    folder = os.environ.get("GENFAST_CACHE_DIR")
    if folder:
        return Path(folder) / NAME
    caches = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(caches):  # A relative one is to be ignored, by the XDG specification.
        return Path(caches) / "genfast" / NAME
    try:
        return Path.home() / ".cache" / "genfast" / NAME
    except RuntimeError as error:
        raise OSError(str(error)) from None


def load():
    """All `Timing`s of the file, a list; with a warning where it cannot be used."""
    try:
        found, bad = read(path())
    except (NotOurs, OSError) as error:
        _warn_once("use", error)
        return []
    if bad:
        _warn_once("lines", f"{path()} has {bad} lines that cannot be read, and are not used")
    return found


def read(path):
    """The file's `Timing`s, a list, and how many lines are none; nothing where there is no file.

    Raises:
        NotOurs: it has other columns, or is no text.
        OSError: as `open` does.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return [], 0
    except UnicodeDecodeError:
        raise NotOurs(f"expected {path} to be genfast's, got a file that is no text") from None
    if not text:
        return [], 0
    header, *lines = text.splitlines()
    if header != ",".join(COLUMNS):
        raise NotOurs(f"expected {path} to have genfast's columns, got others")
    found, bad = [], 0
    for line in lines:
        try:
            found.append(_timing(dict(zip(COLUMNS, next(csv.reader([line])), strict=True))))
        except (ValueError, TypeError, csv.Error, StopIteration):
            bad += 1
    return found, bad


def _timing(row):
    return Timing(
        **{name: row[name] for name in _TEXTS},
        problem=tiles.from_row(tiles.Problem, row),
        config=tiles.from_row(tiles.GemmConfig, row),
    )


def add(timing):
    """Write a `Timing` into the file, in the place of an older one of the same product.

    Where that is impossible it warns, once; nothing but speed depends on the file.
    """
    try:
        target = Path(os.path.realpath(path()))  # What is a link stays one.
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.with_name(target.name + ".lock")):
            kept = {known.key: known for known in read(target)[0]}
            kept[timing.key] = timing
            _replace(target, kept.values())
    except (NotOurs, OSError) as error:
        _warn_once("use", error)


@contextmanager
def _locked(path):
    """Within, no other process is here.

    Raises:
        TimeoutError: others are, for seconds.
    """
    if fcntl is None:
        yield
        return
    with open(path, "ab") as file:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process holds {path}") from None
                time.sleep(0.005)
        yield  # Closing the file lets go.


def _replace(path, timings):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for timing in timings:
        facts = vars(timing) | vars(timing.problem) | vars(timing.config)
        writer.writerow(tiles.written(facts[name]) for name in COLUMNS)
    handle, unfinished = tempfile.mkstemp(prefix=path.name, suffix=".unfinished", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(text.getvalue().encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(unfinished)
        raise


def _warn_once(trouble, message):
    if trouble in _warned:
        return
    _warned.add(trouble)
    if trouble == "use":
        message = f"what first uses find is kept in this process only: {message}"
    warnings.warn(f"genfast: {message}", stacklevel=3)
