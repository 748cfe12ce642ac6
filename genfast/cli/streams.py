"""Standard streams that may be closed, or break while something is written."""

import errno
import os
import sys


def open_closed_streams():
    """Open the null device where a standard stream is closed.

    The next file that is opened, a checkpoint perhaps, would get its number, and then whatever
    libraries and compilers write there.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(descriptor, True)
            setattr(sys, name, os.fdopen(descriptor, mode))


class Unbreakable:
    """A text stream that goes on into the null device when it cannot be written to any more.

    Letters that its encoding lacks are written as Python writes them to standard error: \\xe9.

    Args:
        stream: the stream.
        needed: whether an error is to be raised the first time, unless only the reader has gone.
    """

    def __init__(self, stream, needed):
        self._stream = stream
        self._needed = needed

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        try:
            self._unless_broken(self._stream.write, text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            plain = text.encode(encoding, "backslashreplace").decode(encoding)
            self._unless_broken(self._stream.write, plain)
        return len(text)

    def flush(self):
        self._unless_broken(self._stream.flush)

    def _unless_broken(self, function, *arguments):
        try:
            function(*arguments)
        except OSError as error:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), self._stream.fileno())
            if self._needed and error.errno not in (errno.EPIPE, errno.EIO):
                raise


def tell(message):
    """A message for people, beside what a command prints."""
    print(f"genfast: {message}", file=sys.stderr)
