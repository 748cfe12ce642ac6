"""Adam's update of all weights of an optimizer's group: the table of addresses, and the start."""

import math
from typing import NamedTuple

import numpy as np
import torch

from genfast.backend import triton
from genfast.launch import start, tiles

if triton is not None:
    from genfast.kernels import adam as kernels

# Elements of a program. A thread has 4, one vector of float32: with 8 the vectors of half precision
# would be whole too, but registers would halve the programs of a multiprocessor.
_CHUNK = 1024
_THREADS = _CHUNK // 4
# Vector loads need it of every address.
_ALIGNMENT = 16


class Weight(NamedTuple):
    """A parameter, Adam's state of it, and its gradient: tensors on one device.

    p, m, v: float32, of one shape and one dense memory layout.
    step: how many updates there were, this one among them: a float32 scalar.
    gradient: float32 or in half precision, laid out alike.
    copy: in half precision, laid out alike; it gets what p becomes. None if there is none.
    """

    p: torch.Tensor
    m: torch.Tensor
    v: torch.Tensor
    step: torch.Tensor
    gradient: torch.Tensor
    copy: torch.Tensor | None


def why_not(p, *others):
    """Say why the kernel cannot address these tensors with one index; None if it can.

    Args:
        p: a float32 tensor.
        others: of its shape.
    """
    if not _is_dense(p):
        return "it has gaps in memory"
    if any(_layout(t) != _layout(p) for t in others):
        return "what belongs to it lies in memory in another order"
    if any(t.data_ptr() % _ALIGNMENT for t in (p, *others)):
        return f"it or what belongs to it begins at no multiple of {_ALIGNMENT} bytes"
    return None


def table(weights):
    """Where these are, a list of `Weight`: int64 on the CPU, for `adam`."""
    rows, first_chunk = [], 0
    for w in weights:
        tensors = (w.p, w.m, w.v, w.step, w.gradient)
        addresses = [t.data_ptr() for t in tensors]
        addresses.append(0 if w.copy is None else w.copy.data_ptr())
        is_half = w.gradient.dtype != torch.float32
        rows.append([*addresses, is_half, w.p.numel(), first_chunk])
        first_chunk += _chunks(w.p)
    of_chunks = np.repeat(np.arange(len(rows)), [_chunks(w.p) for w in weights])
    return torch.from_numpy(np.concatenate([of_chunks, np.ravel(rows)]).astype(np.int64))


def adam(table, weights, *, lr, betas, eps, weight_decay):
    """Update all of them in place, as `torch.optim.Adam` does.

    Args:
        table: what `table` gave for these weights, on their device.
        weights: a list of `Weight`, whose half precision is all of one dtype.
        lr: a number, or a tensor of one element on the same device.
        betas, eps, weight_decay: numbers.
    """
    on_device = isinstance(lr, torch.Tensor)
    beta1, beta2 = betas
    reads = [t for w in weights for t in (w.p, w.m, w.v, w.step, w.gradient)]
    writes = [t for w in weights for t in (w.p, w.m, w.v, w.copy) if t is not None]
    start.kernel(
        kernels.adam,
        (sum(_chunks(w.p) for w in weights),),
        reads=reads,
        writes=writes,
        table_ptr=table,
        lr_ptr=lr if on_device else table,
        lr=0.0 if on_device else float(lr),
        one_minus_beta1=1.0 - beta1,
        one_minus_beta2=1.0 - beta2,
        log_beta1=_log(beta1),
        log_beta2=_log(beta2),
        eps=float(eps),
        weight_decay=float(weight_decay),
        HAS_LR_PTR=on_device,
        HAS_WEIGHT_DECAY=weight_decay != 0,
        HALF_DTYPE=start.tl_dtype(_half_dtype(weights)),
        BLOCK=_CHUNK,
        num_warps=_THREADS // start.threads_of_a_warp(table),
    )


def _chunks(p):
    return tiles.ceil_div(p.numel(), _CHUNK)


def _log(beta):
    return math.log(beta) if beta > 0 else -math.inf


def _half_dtype(weights):
    """The dtype of gradients and copies that are not in float32; float32 if none is."""
    given = (t for w in weights for t in (w.gradient, w.copy) if t is not None)
    return next((t.dtype for t in given if t.dtype != torch.float32), torch.float32)


def _layout(t):
    """What tells where an element is, whatever a dimension of size 1 has for a stride."""
    return [(size, stride) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def _is_dense(t):
    expected = 1
    for size, stride in sorted(_layout(t), key=lambda dimension: dimension[1]):
        if stride != expected:
            return False
        expected *= size
    return True
