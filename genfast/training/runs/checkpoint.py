"""Checkpoints: everything a run needs to go on as if it had never stopped, in one file.

The file is what `torch.save` writes of tensors, numbers, strings and containers of them, so that it
loads with `weights_only=True` and runs no code.
"""

import io
import pickle
import zipfile
from pathlib import Path

import torch

from genfast.training.errors import BadInput
from genfast.training.files import replacing

NAME = "checkpoint.pt"
FORMAT = "genfast checkpoint 1"
PARTS = {"config", "steps", "modules", "optimizers", "rng"}


def save_checkpoint(path, step, config, steps):
    """Write a checkpoint, atomically.

    Args:
        path: the file.
        step: a `GANStep` or `VAEStep`, whose modules and optimizers are saved.
        config: a dict of numbers and strings that says how the run was set up.
        steps: the number of steps made, which also is the position in the stream of batches.
    """
    content = {
        "format": FORMAT,
        "config": config,
        "steps": steps,
        "modules": {name: m.state_dict() for name, m in step.modules.items()},
        "optimizers": {name: _plain(o.state_dict()) for name, o in step.optimizers.items()},
        "scalers": {name: s.state_dict() for name, s in step.scalers.items()},
        "rng": _rng_states(step.device),
    }
    # Into memory first: where a disk is full, PyTorch's writer says something else.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with replacing(path) as file:
        file.write(buffer.getbuffer())


def read_checkpoint(path):
    """Read a checkpoint into CPU memory: the dict that `save_checkpoint` wrote.

    Raises:
        BadInput: there is no such file, it is damaged, or it is something else.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"expected a checkpoint file at {path}, where there is none")
    try:
        _check_whole(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged bytes make the unpickler raise nearly anything.
        # PyTorch's message may advise to load without `weights_only`, which runs a stranger's code.
        advises = isinstance(error, pickle.UnpicklingError)
        reason = "it is damaged or something else" if advises else str(error).partition("\n")[0]
        raise BadInput(
            f"expected a genfast checkpoint at {path}, could not read it: {reason}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadInput(f"expected a genfast checkpoint at {path}, got another kind of file")
    missing = sorted(PARTS - content.keys())
    if missing:
        raise BadInput(f"expected a whole genfast checkpoint at {path}, it lacks {missing[0]}")
    return content


def _check_whole(path):
    """Compare the checksums in the file, which `torch.load` does not: wrong bits would train on."""
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged:
        raise ValueError(f"{damaged} is damaged")


def restore_modules(step, content, path):
    """Load the networks' weights; BadInput if they are those of another architecture."""
    for name, module in step.modules.items():
        saved = content["modules"].get(name)
        mismatch = "it has none" if saved is None else _mismatch(module.state_dict(), saved)
        if mismatch:
            raise BadInput(
                f"expected the weights of a {type(module).__name__} in {path}, but {mismatch}"
            )
        module.load_state_dict(saved)


def restore(step, content, path):
    """Put networks, optimizers and random number generators where they were."""
    restore_modules(step, content, path)
    for name, optimizer in step.optimizers.items():
        # Whether it fits a captured graph depends on where it runs now.
        capturable = [group["capturable"] for group in optimizer.param_groups]
        optimizer.load_state_dict(content["optimizers"][name])
        for group, value in zip(optimizer.param_groups, capturable, strict=True):
            group["capturable"] = value
    for name, scaler in step.scalers.items():
        scaler.load_state_dict(content["scalers"][name])
    torch.set_rng_state(content["rng"]["cpu"])
    if step.device.type == "cuda" and "cuda" in content["rng"]:
        torch.cuda.set_rng_state(content["rng"]["cuda"], step.device)


def _plain(state):
    """An optimizer's state with its learning rates, which a captured step keeps on the device."""
    groups = [group | {"lr": float(group["lr"])} for group in state["param_groups"]]
    return state | {"param_groups": groups}


def _mismatch(expected, saved):
    """How two state_dicts differ in names or shapes, in a few words; None if they do not."""
    for name, tensor in expected.items():
        if name not in saved:
            return f"{name} is missing"
        if saved[name].shape != tensor.shape:
            return f"{name} has shape {tuple(saved[name].shape)} instead of {tuple(tensor.shape)}"
    extra = saved.keys() - expected.keys()
    return f"there is also {min(extra)}" if extra else None


def _rng_states(device):
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states
