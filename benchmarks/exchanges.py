"""Counts what the processes of a training exchange, and says what for."""

import sys
from collections import Counter
from contextlib import contextmanager
from unittest import mock

import torch.distributed as dist

# By the function that asks for an exchange, from the innermost outwards; all else is statistics of
# batch norms.
_PURPOSES = {
    ("spread.py", "_sum"): "gradients",
    ("spread.py", "means"): "losses",
    ("spread.py", "begin"): "losses",
    ("workers.py", "any"): "control",
}
PURPOSES = ("gradients", "statistics", "losses", "control")


@contextmanager
def counted():
    """Within, what this process exchanges: (calls, bytes), two `Counter`s by purpose.

    The bytes are those of the tensors, as one process hands them over or takes them; how often
    they travel is the engine's business. Beside the purposes, `calls["norms"]` are the scalars
    among statistics: PyTorch's operations exchange one count at each use of a batch norm.
    """
    calls, bytes_ = Counter(), Counter()

    def counting(exchange, tensors_of):
        def exchanging(*arguments, **options):
            purpose = _purpose()
            calls[purpose] += 1
            tensors = tensors_of(arguments[0])
            bytes_[purpose] += sum(t.nbytes for t in tensors)
            calls["norms"] += purpose == "statistics" and tensors[0].numel() == 1
            return exchange(*arguments, **options)

        return exchanging

    with (
        mock.patch.object(dist, "all_reduce", counting(dist.all_reduce, lambda t: [t])),
        mock.patch.object(dist, "all_gather", counting(dist.all_gather, list)),
    ):
        yield calls, bytes_


def _purpose():
    frame = sys._getframe(2)
    while frame is not None:
        where = frame.f_code.co_filename.rpartition("/")[2], frame.f_code.co_name
        if where in _PURPOSES:
            return _PURPOSES[where]
        frame = frame.f_back
    return "statistics"
