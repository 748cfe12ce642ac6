"""Writing files so that a crash leaves either the old one or the new one."""

import os
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path):
    """Open a binary file that takes the place of `path` once it is whole and on the disk.

    Whatever happens inside or after, `path` is either the old file or the new one.
    """
    path = Path(path)
    unfinished = path.with_name(path.name + ".unfinished")
    with open(unfinished, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
