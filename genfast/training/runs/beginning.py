"""Weights that a new run begins with: those of an earlier run, or of PyTorch's public example."""

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from genfast.training.errors import BadInput
from genfast.training.runs import checkpoint
from genfast.training.runs.config import Config, check_settings
from genfast.training.runs.finite import refuse_not_finite
from genfast.training.runs.rules import shown
from genfast.training.runs.settings import option
from genfast.training.runs.trained import opened

# The settings by which networks have their shape. Not all models have each.
_SHAPES = ("image_size", "nz", "ngf", "ndf", "conditional", "batch_norm", "spectral_norm")


class Beginning(NamedTuple):
    """The weights of some of a model's networks.

    model: its name.
    settings: what the run has to have for them to fit: a dict of values, each with the path of the
        file that asks for it.
    channels: likewise of its images.
    modules: the networks' `state_dict` by the network's name, each with the path of its file.
    """

    model: str
    settings: dict[str, tuple[Any, str]]
    channels: tuple[int, str]
    modules: dict[str, tuple[dict[str, Any], str]]

    def settled(self, given: dict[str, Any]) -> dict[str, Any]:
        """The settings `given` for a run, and those that the weights ask for.

        Raises:
            BadInput: one contradicts them, or is not one that the model takes.
        """
        given = check_settings(self.model, given)
        for name, (value, path) in self.settings.items():
            _refuse_other(option(name), value, path, given.get(name, value))
        return given | {name: value for name, (value, _) in self.settings.items()}

    def check(self, config: Config) -> None:
        """BadInput unless the weights fit a run of these settings."""
        if config.model != self.model:
            path = self.channels[1]
            raise BadInput(f"expected weights of {config.model}, got those of {self.model}: {path}")
        for name, (value, path) in self.settings.items():
            _refuse_other(option(name), value, path, getattr(config, name))
        value, path = self.channels
        if config.channels != value:
            raise BadInput(
                f"expected images with {value} channels, as the weights in {path} draw, got "
                f"{config.channels} from {config.data}"
            )

    def put_into(self, step: Any) -> None:
        """Load the weights into the networks of a fresh step; an average begins with them too.

        Raises:
            BadInput: they are those of another architecture, or not finite.
        """
        for name, (state, path) in self.modules.items():
            checkpoint.restore_modules(step, {"modules": {name: state}}, path, [name])
            refuse_not_finite({name: step.modules[name]}, path)
        average = getattr(step, "average", None)
        if average and "generator" in self.modules:
            average.module.load_state_dict(step.modules["generator"].state_dict())


def read_beginning(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], model: str
) -> Beginning:
    """The weights for a new run of a model.

    Args:
        paths: of a file, or of several with different networks: each a checkpoint, the folder of a
            run, or weights of PyTorch's public DCGAN example, which fit `dcgan`.
        model: one of `MODELS`.

    Raises:
        BadInput: there is none, one cannot be read or is of another model, two hold the same
            network, or they do not fit each other.
    """
    settings: dict[str, tuple[Any, str]] = {}
    modules: dict[str, tuple[dict[str, Any], str]] = {}
    channels = None
    for path in _several(paths):
        file = opened(path)
        name = str(file.path)
        if file.config.model != model:
            raise BadInput(
                f"expected weights of {model} to begin with, got those of {file.config.model} in "
                f"{name}"
            )
        for setting in file.shapes or _SHAPES:
            value = getattr(file.config, setting)
            if value is not None:
                before, of = settings.setdefault(setting, (value, name))
                _refuse_other(option(setting), before, of, value, f" in {name}")
        channels = channels or (file.config.channels, name)
        _refuse_other("channels", *channels, file.config.channels, f" in {name}")
        # Those that have an optimizer; what else a checkpoint holds followed its run.
        networks = [file.alone] if file.alone else file.content["optimizers"]
        for network in networks:
            if network in modules:
                raise BadInput(
                    f"expected one file with the weights of the {network}, got two, "
                    f"{modules[network][1]} and {name}"
                )
            modules[network] = file.content["modules"].get(network), name
    if channels is None:
        raise BadInput("expected a file with weights to begin with, got none")
    return Beginning(model, settings, channels, modules)


def _several(paths: Any) -> list[str | os.PathLike[str]]:
    several = [paths] if isinstance(paths, str | os.PathLike) else paths
    several = list(several) if isinstance(several, Iterable) else [several]
    for path in several:
        if not isinstance(path, str | os.PathLike):
            raise BadInput(f"expected init_from to be a path or several, got {shown(path)}")
    return several


def _refuse_other(called, value, path, other, where=""):
    """BadInput unless the `other` value, found in words `where`, is what the weights have."""
    if other == value:
        return
    if isinstance(value, bool):
        wanted, got = (called, "none") if value else (f"no {called}", "one")
    else:
        wanted, got = f"{called} {value}", other
    raise BadInput(
        f"expected {wanted}, with which the weights in {path} were made, got {got}{where}"
    )
