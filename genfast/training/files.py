"""Writing files so that a crash leaves either the old one or the new one."""

import errno
import os
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path):
    """Open a binary file that takes the place of `path` once it is whole and on the disk.

    Whatever happens inside or after, `path` is either the old file or the new one. After an error
    nothing else is left, as what is unfinished may be what fills the disk.

    Raises:
        OSError: as `open` does, or `path` with ".unfinished" after it is no plain file.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    if os.path.lexists(unfinished) and (unfinished.is_symlink() or not unfinished.is_file()):
        raise FileExistsError(errno.EEXIST, "expected a plain file or none", str(unfinished))
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # Of a full disk the system names no file.
        raise
    finally:
        with suppress(OSError):
            unfinished.unlink()
