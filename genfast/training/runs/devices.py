"""The device of a run, by its name."""

from contextlib import suppress

import torch

from genfast.backend import selected_backend
from genfast.functional import why_not_triton
from genfast.training.errors import BadInput
from genfast.training.runs.rules import shown
from genfast.training.steps.precision import resolve_precision


def as_device(device):
    """The `torch.device` that is meant.

    Args:
        device: a `torch.device`, or "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".

    Raises:
        BadInput: it is something else, or this machine has no such device.
    """
    found = None
    if isinstance(device, str | torch.device):
        name = str(device)
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        with suppress(RuntimeError):
            found = torch.device(name)
    came = shown(str(device) if isinstance(device, torch.device) else device)
    if found is None or found.type not in ("cpu", "cuda"):
        raise BadInput(f"expected --device to be auto, cpu, cuda or cuda:N, got {came}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise BadInput(
            f"expected --device to be one this machine has, got {came}; PyTorch finds "
            f"{torch.cuda.device_count()} GPUs"
        )
    return found


def working_device(device: object) -> torch.device:
    """As `as_device`; BadInput if the backend that was asked for is none, or cannot run there."""
    found = as_device(device)
    try:
        asked = selected_backend()
    except ValueError as error:
        raise BadInput(str(error)) from None
    reason = asked == "triton" and why_not_triton(torch.empty(1, device=found))
    if reason:
        raise BadInput(
            f"expected kernels to run, as GENFAST_BACKEND=triton or use_backend asks, but {reason}"
        )
    return found


def check_precision(precision: str | None, device: torch.device) -> None:
    """BadInput where a precision, None for the default, cannot be had on this device."""
    try:
        resolve_precision(precision or "auto", device)
    except ValueError as error:
        raise BadInput(str(error)) from None
