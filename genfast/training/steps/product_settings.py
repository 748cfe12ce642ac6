"""In what a GPU computes products of float32, by PyTorch's settings of two generations.

PyTorch refuses to read an old setting (`allow_tf32`, `torch.get_float32_matmul_precision`) that
disagrees with the new ones (`fp32_precision`). So here they change together.
"""

from contextlib import contextmanager

import torch
from torch.backends import _FP32Precision


@contextmanager
def products_in(precision):
    """Within, a GPU's products of float32 are in float32 ("ieee") or rounded to TF32 ("tf32").

    All settings can be read within and afterwards, and are put back to what they were. One thing
    PyTorch lets nobody put back: that cuDNN's have never been set. They then no longer follow a
    `torch.backends.fp32_precision` that is set later.
    """
    with _cudnn_in(precision), _matmul_in(precision):
        yield


@contextmanager
def _cudnn_in(precision):
    if torch.backends.cudnn.conv.fp32_precision == precision and _old_cudnn_agrees(precision):
        yield
        return
    places = ("cuda", "conv"), ("cuda", "rnn")
    own = [_own(*place) for place in places]
    try:
        allowed = _cudnn_allows_tf32(places)
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        _set(places, [precision, precision])
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
        _set(places, own)


@contextmanager
def _matmul_in(precision):
    places = ("cuda", "matmul"), ("mkldnn", "matmul")
    own = [_own(*place) for place in places]
    try:
        old = _old_matmul_precision(places)
        torch.set_float32_matmul_precision("highest" if precision == "ieee" else "high")
        # A CPU's products stay in float32: the old setting is for both, and agrees with that.
        _set(places, [precision, "ieee"])
        yield
    finally:
        torch.set_float32_matmul_precision(old)
        _set(places, own)


def _old_cudnn_agrees(precision):
    try:
        return torch.backends.cudnn.allow_tf32 == (precision == "tf32")
    except RuntimeError:
        return False


def _cudnn_allows_tf32(places):
    """The old setting, also where PyTorch refuses to read it; the new ones may be changed."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:
        _set(places, ["ieee", "ieee"])
    return not _old_cudnn_agrees("ieee")


def _old_matmul_precision(places):
    """The old setting, also where PyTorch refuses to read it; the new ones may be changed."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        _set(places, ["ieee", "ieee"])
    return torch.get_float32_matmul_precision()


def _set(places, values):
    for place, value in zip(places, values, strict=True):
        _FP32Precision(*place).fp32_precision = value


def _own(backend, op):
    """What is set here: "none" where the setting follows the one above it, as which it reads."""
    setting = _FP32Precision(backend, op)
    value = setting.fp32_precision
    if value == "none" or backend == "generic":
        return value
    above = ("generic", "all") if op == "all" else (backend, "all")
    if _FP32Precision(*above).fp32_precision != value:
        return value
    kept = _own(*above)
    try:
        _set([above], ["tf32" if value == "ieee" else "ieee"])
        follows = setting.fp32_precision != value
    finally:
        _set([above], [kept])
    return "none" if follows else value
