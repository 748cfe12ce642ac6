"""One run a folder: a lock that ends with the process that holds it, however that ends."""

import errno
import os
import re
import socket
import stat
import time
import warnings
from contextlib import ExitStack, contextmanager, suppress

from genfast.training.errors import BadInput

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]

NAME = "genfast.lock"
TRIES, PAUSE = 10, 0.03  # One that only looks holds the lock for a moment.
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)
_HELD = (BlockingIOError, PermissionError)  # Which of them depends on the file system.
_HOLDER = re.compile(r"(\d+) (\S+)\n?")

_descriptors: set[int] = set()  # Of the locks that this process holds.


def _let_go():
    """A child has the open file too, and would hold the lock when its parent is killed."""
    while _descriptors:
        os.close(_descriptors.pop())


if fcntl is not None:
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def held(folder):
    """Hold the lock of an existing folder while entered.

    It is `flock` on a file that stays open. The kernel drops it when the process ends, so that what
    a killed run leaves stands in nobody's way, whoever has its process number now. The file names
    the holder for the message, and goes at the end.

    Raises:
        BadInput: another run holds it.

    Warns:
        UserWarning: there are no locks here, or the last holder was on another host and left the
            file behind: not every shared file system takes locks from host to host.
    """
    path = folder / NAME
    descriptor = _acquired(path)
    if descriptor is not None:
        _descriptors.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _descriptors:  # Not in a child, which has let it go.
            _descriptors.remove(descriptor)
            # Removed before it is let go: who has it open already sees that it is not there.
            if _is_at(path, descriptor):
                with suppress(OSError):
                    path.unlink()
            os.close(descriptor)


def refuse_held(folder):
    """BadInput if another run holds the folder's lock now; changes nothing."""
    path = folder / NAME
    if fcntl is None or not path.is_file():
        return
    with suppress(OSError):  # What cannot be opened or locked is told when it is wanted.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except _HELD:
            raise _in_use(path, _holder(descriptor)) from None
        finally:
            os.close(descriptor)


def _acquired(path):
    """The descriptor of the locked file, or None where there are no locks."""
    if fcntl is None:
        return _warn_of_none(path)
    for tried in range(TRIES):
        if tried:
            time.sleep(PAUSE)
        with ExitStack() as unless_locked:
            descriptor = _opened(path)
            unless_locked.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except _HELD:
                holder = _holder(descriptor)
                continue
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                if os.fstat(descriptor).st_size == 0:
                    path.unlink(missing_ok=True)
                return _warn_of_none(path)
            holder = None
            if _is_at(path, descriptor):  # Else the one who held it has just removed it.
                _sign(path, descriptor)
                unless_locked.pop_all()
                return descriptor
    raise _in_use(path, holder)


def _opened(path):
    # Not blocking, as opening a FIFO would wait for its other end.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open(path, flags, 0o666)
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise _foreign(path)


def _is_at(path, descriptor):
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except OSError:
        return False


def _holder(descriptor):
    """(process, host) as text, or None if it has not been written yet."""
    found = _HOLDER.fullmatch(os.pread(descriptor, 1000, 0).decode(errors="replace"))
    return found and found.groups()


def _sign(path, descriptor):
    host = socket.gethostname() or "localhost"
    last = _holder(descriptor)
    # Looked at within the lock: before, its holder might have been writing.
    if last is None and os.fstat(descriptor).st_size:
        raise _foreign(path)
    if last and last[1] != host:
        warnings.warn(
            f"the last run in {path.parent}, process {last[0]} on {last[1]}, left its lock behind: "
            f"if it still runs there, stop one of the two",
            stacklevel=2,
        )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()} {host}\n".encode(), 0)


def _foreign(path):
    return BadInput(f"expected {path} to be the lock of a genfast run, got another file")


def _warn_of_none(path):
    warnings.warn(
        f"there are no locks on the file system of {path.parent}: nothing keeps a second run out "
        f"of it",
        stacklevel=2,
    )


def _in_use(path, holder):
    who = "process {} on {}".format(*holder) if holder else "another process"
    return BadInput(
        f"expected a folder that no other run uses, but {path.parent} is in use by {who}: wait "
        f"until that ends, or give another --out"
    )
