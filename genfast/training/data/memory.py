"""How much memory there is to take, asked before it is taken: Linux ends who takes too much."""

import os
from pathlib import Path

from genfast.training.errors import BadInput

CGROUPS = Path("/sys/fs/cgroup")
# Of the first and second version: the limit, what is used, and what of that could be given back.
CGROUP_FILES = (
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ("memory.max", "memory.current", "memory.stat"),
)


def require_memory(count, what):
    """BadInput if `count` bytes for `what`, which the sentence names, are more than are free."""
    free = available_memory()
    if count > free:
        raise BadInput(
            f"expected {what} to fit into the {_gib(free)} of memory that are free, got "
            f"{_gib(count)}"
        )


def available_memory():
    """How many bytes this process can still take, swap included, limits of containers respected."""
    return min([_free_of_the_machine(), *_free_in_cgroups()])


def _free_of_the_machine():
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = {name: int(rest.split()[0]) for name, rest in (line.split(":") for line in lines)}
        return 1024 * (kib["MemAvailable"] + kib["SwapFree"])
    except (OSError, ValueError, KeyError):  # No Linux: all that is built in.
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free_in_cgroups():
    """For this process's group, as its container shows it, and for the groups around it."""
    for path in _own_cgroups():
        for limit, used, statistics in CGROUP_FILES:
            try:
                # No limit is "max" in the second version, which is no number.
                free = int(_text(path, limit)) - int(_text(path, used))
                rows = dict(line.split() for line in _text(path, statistics).splitlines())
            except (OSError, ValueError):
                continue
            # Pages of files that were read a while ago count as used until somebody wants them.
            yield max(0, free + int(rows.get("total_inactive_file", rows.get("inactive_file", 0))))


def _own_cgroups():
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    own = {line.split(":", 2)[2] for line in lines if line.split(":")[1] in ("", "memory")}
    return sorted({Path("/"), *(p for path in own for p in (Path(path), *Path(path).parents))})


def _text(cgroup, name):
    """The file `name` of a group; where groups are split by what they limit, that comes first."""
    controller, _, file = name.rpartition("/")
    return (CGROUPS / controller / cgroup.relative_to("/") / file).read_text()


def _gib(count):
    return f"{count / 2**30:.1f} GiB"
