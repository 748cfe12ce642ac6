"""The device of a run, by its name."""

from contextlib import suppress

import torch

from genfast.training.errors import BadInput
from genfast.training.runs.rules import shown


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
