"""The files by which the folder of a run is known, to runs and to data that hold one."""

import json
import re
from contextlib import suppress

SETTINGS = "config.json"
PICTURES = "samples"
CURVE = "losses.png"
SAMPLE = re.compile(r"(?:epoch|step)_\d+\.png")  # The names of pictures in there.
_LONGEST = 2**16  # Bytes: what is longer is no settings of a run, nor the head of its losses.


def head(path):
    """The first bytes of a file; none of what is not a plain file, which may block."""
    if not path.is_file():
        return b""
    with open(path, "rb") as file:
        return file.read(_LONGEST)


def settings_of(path):
    """What a run wrote about itself into a file: a dict; None if it holds something else."""
    settings = None
    with suppress(ValueError, RecursionError):
        settings = json.loads(head(path))
    versions = settings.get("versions") if isinstance(settings, dict) else None
    return settings if isinstance(versions, dict) and "genfast" in versions else None
