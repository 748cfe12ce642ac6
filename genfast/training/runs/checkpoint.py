"""Checkpoints: everything a run needs to go on as if it had never stopped, in one file.

The file is what `torch.save` writes of tensors, numbers, strings and containers of them, so that it
loads with `weights_only=True` and runs no code.
"""

import io
import math
import pickle
import zipfile
from pathlib import Path

import torch

from genfast.training.errors import BadInput
from genfast.training.files import replacing
from genfast.training.runs.rules import shown

NAME = "checkpoint.pt"
FORMAT = "genfast checkpoint 1"
PARTS = {
    "config": dict,
    "steps": int,
    "modules": dict,
    "optimizers": dict,
    "scalers": dict,
    "rng": dict,
}
# What Adam keeps of each parameter.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
# How files begin that `torch.save` wrote before version 1.6, which were no archives.
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


def file_of(path):
    """The path of a checkpoint, given by itself or by the folder of its run."""
    path = Path(path)
    return path / NAME if path.is_dir() else path


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
        **step.state_dict(),
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
    return check_content(read_file(path), path)


def read_file(path):
    """What a file of `torch.save` holds, in CPU memory, if it is tensors and plain values.

    Raises:
        BadInput: there is no such file, it is damaged, or it holds something else.
    """
    path = Path(path)
    if not path.is_file():
        raise BadInput(f"expected a checkpoint file at {path}, where there is none")
    try:
        if not _is_legacy(path):
            _check_archive(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # Damaged bytes make the unpickler raise nearly anything.
        # PyTorch's message may advise to load without `weights_only`, which runs a stranger's code.
        advises = isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error)
        reason = "it is damaged or something else" if advises else str(error).partition("\n")[0]
        raise BadInput(
            f"expected a genfast checkpoint at {path}, could not read it: {reason}"
        ) from error


def check_content(content, path):
    """What `read_file` gave, if it is a checkpoint; else BadInput."""
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise BadInput(f"expected a genfast checkpoint at {path}, got another kind of file")
    for name, kind in PARTS.items():
        if name not in content:
            _refuse(path, f"it lacks {name}")
        if type(content[name]) is not kind:
            _refuse(path, f"its {name} is {shown(content[name])}")
    if not 0 <= content["steps"] < 2**63:
        _refuse(path, f"its steps are {content['steps']}")
    return content


def _refuse(path, reason):
    raise BadInput(f"expected a whole genfast checkpoint at {path}, but {reason}")


def _is_legacy(path):
    with open(path, "rb") as file:
        return file.read(len(_LEGACY)) == _LEGACY


def _check_archive(path):
    """ValueError if the file is a TorchScript model, or damaged.

    `torch.load` does not compare the checksums in the file: wrong bits would train on.
    """
    with zipfile.ZipFile(path) as file:
        if any(name.endswith("/constants.pkl") for name in file.namelist()):
            raise ValueError("it is a model saved by TorchScript")
        damaged = file.testzip()
    if damaged:
        raise ValueError(f"{damaged} is damaged")


def restore_modules(step, content, path, names=None):
    """Load the networks' weights; BadInput if they are those of another architecture.

    names: of the networks, where not of all.
    """
    names = step.modules.keys() if names is None else names
    _check_modules(step, content, path, names)
    for name in names:
        step.modules[name].load_state_dict(content["modules"][name])


def restore(step, content, path):
    """Put networks, Adam's moments and random number generators where they were.

    The optimizers' settings are those that the step was built with, not the checkpoint's.

    Raises:
        BadInput: a part is not what such a step saves. Then nothing has been changed.
    """
    moments = {name: _moments(step, content, name, path) for name in step.optimizers}
    for name, scaler in step.scalers.items():
        _check_scaler(scaler.state_dict(), content["scalers"].get(name), name, path)
    if "counters" in content:  # Which were none in runs that began before there were any.
        _check_counters(step.state_dict().get("counters", {}), content["counters"], path)
    rng = content["rng"]
    _check_rng(torch.Generator(), rng.get("cpu"), path)
    on_cuda = step.device.type == "cuda" and "cuda" in rng  # The run may have begun on a CPU.
    if on_cuda:
        _check_rng(torch.Generator(step.device), rng["cuda"], path)

    _check_modules(step, content, path, step.modules.keys())
    own = step.state_dict()["optimizers"]
    optimizers = {name: own[name] | {"state": state} for name, state in moments.items()}
    step.load_state_dict(content | {"optimizers": optimizers})
    torch.set_rng_state(rng["cpu"])
    if on_cuda:
        torch.cuda.set_rng_state(rng["cuda"], step.device)


def _check_modules(step, content, path, names):
    for name in names:
        if name not in step.modules:
            _refuse(path, f"it has a module {name}, which such a run has not")
        module = step.modules[name]
        wrong = mismatch(module.state_dict(), content["modules"].get(name))
        if wrong:
            raise BadInput(
                f"expected the weights of a {type(module).__name__} in {path}, but {wrong}"
            )


def _moments(step, content, name, path):
    """An optimizer's state of each parameter by its number; BadInput if it is not whole."""
    saved = content["optimizers"].get(name)
    state = saved.get("state") if isinstance(saved, dict) else None
    if not isinstance(state, dict):
        _refuse(path, f"it lacks the state of the {name}'s optimizer")
    if not state and content["steps"] < step.first_updates.get(name, 1):
        return state
    if not state and name in content["scalers"]:
        return state  # Scaled steps that overflowed were passed over, perhaps all of them.
    optimizer = step.optimizers[name]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    count = torch.zeros((), dtype=torch.float32)
    for i, p in enumerate(parameters):
        wrong = mismatch(dict(zip(MOMENTS, (count, p, p), strict=True)), state.get(i))
        if wrong:
            _refuse(path, f"in the state of the {name}'s optimizer, of parameter {i}, {wrong}")
    return {i: state[i] for i in range(len(parameters))}


def _check_scaler(expected, saved, name, path):
    fits = isinstance(saved, dict) and saved.keys() == expected.keys()
    if not fits or not all(type(v) in (int, float) and 0 <= v < math.inf for v in saved.values()):
        _refuse(path, f"the state of the {name}'s gradient scaler is not one")


def _check_counters(expected, saved, path):
    fits = isinstance(saved, dict) and saved.keys() == expected.keys()
    if not fits or not all(type(v) is int and 0 <= v < 2**63 for v in saved.values()):
        _refuse(path, f"its counters are {shown(saved)}")


def _check_rng(generator, saved, path):
    try:
        generator.set_state(saved)
    except (TypeError, RuntimeError):
        _refuse(path, f"its state of the {generator.device.type}'s random numbers is not one")


def mismatch(expected, saved):
    """How a dict of tensors differs from those expected, in a few words; None if it does not.

    Names, shapes and dtypes must be the same, and the saved tensors dense and in CPU memory.
    """
    if not isinstance(saved, dict):
        return "it has none"
    for name, tensor in expected.items():
        if name not in saved:
            return f"{name} is missing"
        other = saved[name]
        if not isinstance(other, torch.Tensor):
            return f"{name} is {shown(other)}"
        if other.shape != tensor.shape:
            return f"{name} has shape {tuple(other.shape)} instead of {tuple(tensor.shape)}"
        if other.dtype != tensor.dtype:
            return f"{name} is {other.dtype} instead of {tensor.dtype}"
        if other.layout != torch.strided or other.device.type != "cpu":
            return f"{name} is not dense in memory"
    extra = saved.keys() - expected.keys()
    return f"there is also {min(map(str, extra))}" if extra else None


def _rng_states(device):
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states
