"""Which implementation runs: the Triton kernels or plain PyTorch."""

import functools
import os
from contextlib import AbstractContextManager
from typing import Literal, get_args

import torch

try:
    import triton
except ImportError:  # The package works through PyTorch where Triton is absent.
    triton = None

BackendName = Literal["auto", "triton", "reference"]
BACKENDS: tuple[BackendName, ...] = get_args(BackendName)

# NVIDIA GPUs before Ampere (V100, T4, GTX) are not among those that Triton compiles for.
_LEAST_CAPABILITY = (8, 0)

# Triton settles this when a kernel is decorated, so later changes of the environment do not count.
INTERPRETING = triton is not None and triton.knobs.runtime.interpret


def _checked(name: str, source: str) -> BackendName:
    if name not in BACKENDS:
        raise ValueError(f"expected {source} to be one of {BACKENDS}, got {name!r}")
    return name


_selected = os.environ.get("GENFAST_BACKEND", "auto")


def selected_backend() -> BackendName:
    """The backend asked for: "auto", "triton" or "reference".

    Raises:
        ValueError: GENFAST_BACKEND holds something else.
    """
    # Checked here and not when imported: then the command line can say it without a traceback.
    return _checked(_selected, "GENFAST_BACKEND")


class use_backend(AbstractContextManager):
    """Choose the backend: `use_backend("reference")` from now on, or `with use_backend(...):`.

    "auto" takes Triton on CUDA and ROCm tensors (NVIDIA GPUs older than Ampere take PyTorch),
    PyTorch on CPU tensors, and Triton on CPU tensors when TRITON_INTERPRET=1. "triton" raises where
    Triton cannot run and says why. "reference" always takes PyTorch. Leaving the `with` block
    restores the backend chosen before.

    The choice is a process-wide setting, like `torch.backends`.

    Example:
        >>> with use_backend("reference"):
        ...     selected_backend()
        'reference'
    """

    def __init__(self, name: BackendName) -> None:
        global _selected
        checked = _checked(name, "the backend")
        self._previous, _selected = _selected, checked

    def __exit__(self, *exception: object) -> None:
        global _selected
        _selected = self._previous


def kernels_run_on_cpu() -> bool:
    """Whether a kernel can start on CPU tensors, interpreted."""
    return INTERPRETING and triton is not None


def is_exporting() -> bool:
    """Whether torch.export traces, which wants PyTorch's own operations.

    `torch.compiler.is_exporting` says so too, but in a trace of torch.compile PyTorch 2.11 takes it
    for True. There the flag that it returns elsewhere is read as it is.
    """
    flag = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def why_device_cannot_run_triton(device: torch.device) -> str | None:
    """A sentence saying why no kernel can start on this device; None if one can."""
    if triton is None:
        return "Triton is not installed"
    if INTERPRETING and device.type in ("cpu", "cuda"):
        return None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "PyTorch finds no GPU"
        # Asked for each operation, so the answer for a GPU is kept; "cuda" is whichever is current.
        index = torch.cuda.current_device() if device.index is None else device.index
        if torch.compiler.is_compiling():  # A trace looks past what is kept, with a warning.
            return _why_too_old.__wrapped__(index)
        return _why_too_old(index)
    return f"Triton has no {device.type} target (TRITON_INTERPRET=1 interprets kernels on the CPU)"


@functools.cache
def _why_too_old(index: int) -> str | None:
    if torch.version.hip:  # Its capabilities are other numbers.
        return None
    capability = torch.cuda.get_device_capability(index)
    if capability >= _LEAST_CAPABILITY:
        return None
    found = ".".join(map(str, capability))
    least = ".".join(map(str, _LEAST_CAPABILITY))
    return f"the kernels need an NVIDIA GPU of compute capability {least}, got one of {found}"
