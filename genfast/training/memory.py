"""Where memory is short: an error in time, and what it lacks."""

import errno
import re
from contextlib import contextmanager
from pathlib import Path

try:
    import resource
except ImportError:  # Windows has no such limits.
    resource = None

# How PyTorch, CUDA and its libraries say that there is no more. Of sizes whose product passes 64
# bits PyTorch says something else.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|ALLOC_FAILED|size calculation overflowed"
    r"|integer multiplication overflow"
)
_AMOUNT = re.compile(r"(?:[Tt]ried|Unable) to allocate (?:([\d.]+ [KMGTPE]iB)|(\d+) bytes)")
CONTROL_GROUPS = Path("/sys/fs/cgroup")
# In either version: a group's limit, its statistics, and the name of what its processes hold.
_FILES = (
    ("memory.max", "memory.stat", "anon"),
    ("memory/memory.limit_in_bytes", "memory/memory.stat", "total_rss"),
)


@contextmanager
def limited_memory(device):
    """Within, on a CPU under Linux, what the machine has no room for cannot be allocated.

    Linux itself promises any amount, and kills whoever takes it at its word.
    """
    limit = _limit() if device.type == "cpu" else None
    if limit is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    lowest = min([limit, *(value for value in before if value != resource.RLIM_INFINITY)])
    resource.setrlimit(resource.RLIMIT_DATA, (lowest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def missing_memory(error):
    """What could not be allocated, such as "2.00 GiB"; None if the error has another cause."""
    message = str(error)
    out_of_memory = (
        isinstance(error, MemoryError)
        or getattr(error, "errno", None) == errno.ENOMEM
        or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(message))
    )
    if not out_of_memory:
        return None
    found = _AMOUNT.search(message)
    if found is None:
        return "what is needed"
    return found[1] or f"{int(found[2]) / 2**30:.3g} GiB"


def _limit():
    """How many bytes this process may hold in all, a container's limit included; None: unknown."""
    try:
        held = _numbers("/proc/self/status")["VmData"] * 1024
        machine = _numbers("/proc/meminfo")
        rooms = [(machine["MemAvailable"] + machine["SwapFree"]) * 1024]
    except (OSError, KeyError):  # Not Linux.
        return None
    for limit, statistics, of_processes in _FILES:
        try:
            limit = int((CONTROL_GROUPS / limit).read_text())
            rooms.append(limit - _numbers(CONTROL_GROUPS / statistics)[of_processes])
        except (OSError, KeyError, ValueError):  # There is no such group, or no limit.
            continue
    return held + max(0, min(rooms))


def _numbers(path):
    """The lines "name: number" or "name number" of a file as a dict."""
    lines = re.findall(r"^(\w+):?\s+(\d+)", Path(path).read_text(), re.MULTILINE)
    return {name: int(number) for name, number in lines}
