"""How much memory there is to take, asked before it is taken: Linux ends who takes too much.

Of several processes on a machine, as torchrun starts them, each asks for itself and is told its
part: all of them load the same data and train the same networks at the same time.
"""

import errno
import os
import re
from contextlib import contextmanager
from pathlib import Path

from genfast.training.errors import BadInput
from genfast.training.started import processes_here

try:
    import resource
except ImportError:  # Windows has no such limits.
    resource = None  # type: ignore[assignment]

CGROUPS = Path("/sys/fs/cgroup")
# Of the first and second version: the limit, what is used, and what of that could be given back.
CGROUP_FILES = (
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
    ("memory.max", "memory.current", "memory.stat"),
)
STACKS = 2**24  # Bytes of address space for the stacks of the threads of each core.
# How PyTorch, CUDA and its libraries say that there is no more. Of sizes whose product passes 64
# bits PyTorch says something else.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|ALLOC_FAILED|size calculation overflowed"
    r"|integer multiplication overflow"
)
_AMOUNT = re.compile(r"(?:[Tt]ried|Unable) to allocate (?:([\d.]+ [KMGTPE]iB)|(\d+) bytes)")


def require_memory(count, what):
    """BadInput if `count` bytes for `what`, which the sentence names, are more than are free."""
    free = available_memory()
    if count > free:
        several = processes_here()
        each = f" for each of the {several} processes on this machine" if several > 1 else ""
        raise BadInput(
            f"expected {what} to fit into the {_gib(free)} of memory that are free{each}, got "
            f"{_gib(count)}"
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
    if found[1]:
        return found[1]
    count = int(found[2])
    return _gib(count) if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def available_memory():
    """How many bytes this process can still take, swap included, limits of containers respected.

    Of what is free, the part of one of the processes that torchrun started here.
    """
    return min([_free_of_the_machine(), *_free_in_cgroups()]) // processes_here()


def _limit():
    """How many bytes of its own this process may hold in all; None where that is not counted."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    held = re.search(r"^VmData:\s+(\d+) kB$", status, re.MULTILINE)
    # The stacks of threads count in full, and hardly any of them is used.
    return held and 1024 * int(held[1]) + available_memory() + STACKS * (os.cpu_count() or 1)


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
