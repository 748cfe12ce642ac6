"""Which implementation runs: the Triton kernels or plain PyTorch."""

import os
from contextlib import AbstractContextManager

try:
    import triton
except ImportError:  # The package works through PyTorch where Triton is absent.
    triton = None

BACKENDS = ("auto", "triton", "reference")

# Triton settles this when a kernel is decorated, so later changes of the environment do not count.
INTERPRETING = triton is not None and triton.knobs.runtime.interpret


def _checked(name, source):
    if name not in BACKENDS:
        raise ValueError(f"expected {source} to be one of {BACKENDS}, got {name!r}")
    return name


_selected = os.environ.get("GENFAST_BACKEND", "auto")


def selected_backend():
    """The backend asked for: "auto", "triton" or "reference".

    Raises:
        ValueError: GENFAST_BACKEND holds something else.
    """
    # Checked here and not when imported: then the command line can say it without a traceback.
    return _checked(_selected, "GENFAST_BACKEND")


class use_backend(AbstractContextManager):
    """Choose the backend: `use_backend("reference")` from now on, or `with use_backend(...):`.

    "auto" takes Triton on CUDA and ROCm tensors, PyTorch on CPU tensors, and Triton on CPU tensors
    when TRITON_INTERPRET=1. "triton" raises where Triton cannot run and says why. "reference"
    always takes PyTorch. Leaving the `with` block restores the backend chosen before.

    The choice is a process-wide setting, like `torch.backends`.
    """

    def __init__(self, name):
        global _selected
        checked = _checked(name, "the backend")
        self._previous, _selected = _selected, checked

    def __exit__(self, *exception):
        global _selected
        _selected = self._previous


def why_device_cannot_run_triton(device):
    """A sentence saying why no kernel can start on this device; None if one can."""
    if triton is None:
        return "Triton is not installed"
    if device.type == "cuda" or (INTERPRETING and device.type == "cpu"):
        return None
    return f"Triton has no {device.type} target (TRITON_INTERPRET=1 interprets kernels on the CPU)"
