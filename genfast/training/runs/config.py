"""What a run is made of: its settings, settled from what was given, the model and the images."""

import os
from collections.abc import Mapping
from dataclasses import asdict, field, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from genfast.losses import GAN_LOSSES
from genfast.models.sizes import SMALLEST, height_and_width, nearest, plain, why_not
from genfast.training.data import (
    DataSet,
    LabelledImages,
    Streamed,
    checksum,
    colour,
    load_images,
    load_labelled,
    resize,
)
from genfast.training.data.sources import DEFAULT_SIZES, is_name_of_a_data_set
from genfast.training.errors import BadInput
from genfast.training.runs.checkpoint import file_of, read_checkpoint
from genfast.training.runs.held_out import num_training
from genfast.training.runs.models import MODELS
from genfast.training.runs.rules import plain_size, shown
from genfast.training.runs.settings import NOTED, RULES, SETTINGS, option

# How long a run is to be: by one of the two.
LENGTHS = {"epochs", "steps"}


class _Settled:
    if TYPE_CHECKING:  # What tables make of it, which no type checker reads: see `Config`.
        __dataclass_fields__: ClassVar[dict[str, Any]]

        def __init__(self, **settings: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    def __post_init__(self):
        known = _settings_of(self.model)
        for name in ("data", *NOTED):
            _check_setting(name, getattr(self, name))
        given = {}
        for name, setting in SETTINGS.items():
            value = getattr(self, name)
            if value is None and name in known:
                value = setting.once
                object.__setattr__(self, name, value)
            lacks = value is None and (setting.optional or name not in known)
            if not lacks:
                given[name] = value
        size = check_settings(self.model, given)["image_size"]
        object.__setattr__(self, "image_size", size)
        if not given.keys() & LENGTHS:
            raise BadInput("expected --epochs or --steps, got neither")
        if self.conditional:
            _check_setting("classes", self.classes)
        elif self.classes is not None:
            raise BadInput("expected classes of a conditional run alone, got some of another run")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self.channels, *height_and_width(self.image_size)

    def as_dict(self) -> dict[str, Any]:
        """The settings as a dict of numbers, strings and None, and a tuple of `classes`."""
        return asdict(self)

    @classmethod
    def of_checkpoint(cls, content, path):
        """The settings in what `read_checkpoint` gave; BadInput if they are not those of a run."""
        try:
            return cls(**content["config"])
        except TypeError as error:
            reason = str(error).partition(" ")[2]
            raise BadInput(
                f"expected the settings of a genfast run in {path}, got others: {reason}"
            ) from None
        except BadInput as error:
            raise BadInput(f"{error} in the checkpoint {path}") from None


if TYPE_CHECKING:

    class Config(_Settled):
        pass


Config = make_dataclass(  # type: ignore[assignment,misc]
    "Config",
    [
        ("model", str),
        ("data", str),
        *((name, int) for name in NOTED),
        *((name, setting.rule.kind, field(default=None)) for name, setting in SETTINGS.items()),
        ("classes", tuple, field(default=None)),
    ],
    bases=(_Settled,),
    frozen=True,
)
Config.__module__ = __name__
Config.__doc__ = """The settings of a run: those of settings.py, each an attribute.

`image_size` is an int for squares, else text such as "96x64"; `image_shape` is (C, H, W).

A setting is None where the model has none of that name, and where it is optional and not asked for.
Of `epochs` and `steps` one is None.
One that began after the run is what it then was.

`num_images`, `checksum` and `channels` tell the images of a run from others. `classes` are the
names of a conditional run's classes, in the order of the labels; None for another run. `background`
is None for runs begun when the transparency of images was dropped. BadInput if a setting is not
what its rule allows, or not one that the model has.
"""


def check_settings(model, given):
    """The settings in the dict `given` as plain numbers and strings.

    Raises:
        BadInput: one of them is not one that the model has or takes.
    """
    known = _settings_of(model)
    if not isinstance(given, Mapping):
        raise BadInput(f"expected settings as a dict, got {shown(given)}")
    # A NumPy number would end up in a checkpoint, which then could not be loaded.
    given = {k: v.item() if isinstance(v, np.generic) else v for k, v in given.items()}
    for name, value in given.items():
        if name not in known:
            raise BadInput(
                f"expected settings that {model} has, got {option(name)}, which it lacks"
            )
        _check_setting(name, value)
    if "image_size" in given:
        given["image_size"] = plain_size(given["image_size"])
    if given.keys() >= LENGTHS:
        raise BadInput(
            f"expected --epochs or --steps, got both, {given['epochs']} and {given['steps']}"
        )
    size = given.get("image_size", SMALLEST)
    reason = why_not(*height_and_width(size)) if MODELS[model].convolutional else None
    if reason:
        raise BadInput(f"expected --image-size {reason} for {model}, got {size}")
    for name in ("penalty_weight", "penalty_every"):
        if given.get(name) is not None and given.get("penalty") is None:
            raise BadInput(f"expected {option(name)} with --penalty, got it alone")
    if model == "vae-gan" and GAN_LOSSES[given.get("loss", "non-saturating")].paired:
        raise BadInput(
            "expected a --loss that judges images alone for vae-gan, got "
            f"{given['loss']}, which judges them in pairs"
        )
    samples, beta = given.get("importance_samples"), given.get("beta", 1)
    if samples and (beta != 1 or given.get("beta_warmup")):
        raise BadInput(
            "expected --importance-samples with --beta 1 and without --beta-warmup, as other "
            f"weights make no bound, got --beta {beta}"
            + (f" and --beta-warmup {given['beta_warmup']}" if given.get("beta_warmup") else "")
        )
    return given


def _settings_of(model):
    """The names of the settings that a model has; BadInput if there is no such model."""
    if not (isinstance(model, str) and model in MODELS):
        raise BadInput(f"expected a model among {', '.join(MODELS)}, got {shown(model)}")
    return {"image_size", *MODELS[model].defaults}


def _check_setting(name, value):
    rule = RULES[name]
    if not rule.allows(value):
        called = name if name in NOTED or name == "classes" else option(name)
        raise BadInput(f"expected {called} to be {rule.expected}, got {shown(value)}")


def prepare(model, data, given, out=None, processes=1):
    """Load the images and settle what was not given.

    Args:
        model: one of `MODELS`.
        data: as `load_images` takes it, or a `DataSet`.
        given: a dict of the settings that are not to be the defaults.
        out: the folder the run will have, from which no images are taken if it lies in `data`.
        processes: how many of them share each batch, each with its own `batch_size`.

    Returns:
        (Config, uint8 images, or `LabelledImages` for a conditional run, or a `Streamed`).

    Raises:
        BadInput: a setting or the data cannot be used.
    """
    given = check_settings(model, given)
    if given.get("sync_bn") and processes == 1:
        raise BadInput(
            "expected --sync-bn with several processes, as torchrun starts them, got it with one"
        )
    _check_data(data)
    kind = MODELS[model]
    settings = kind.defaults | (kind.on_digits if data == "digits" else {})
    settings |= kind.with_labels if given.get("conditional") else {}
    if "steps" in given:
        settings["epochs"] = None
    if "lr" in given and "lr_d" in settings:
        settings["lr_d"] = None  # A default beside another --lr would be of no use.
    chosen = settings | given
    images, crc = _images(data, chosen, out, lambda *size: _network_size(kind, *size))
    left = num_training(len(images), given.get("validate"))
    if left < processes:
        raise BadInput(f"expected an image for each of {processes} processes, got {left} images")
    settings["batch_size"] = min(settings["batch_size"], left // processes)
    config = Config(
        model=model,
        data=_lasting(data),
        num_images=len(images),
        checksum=crc,
        classes=_classes_of(images),
        **(settings | given | dict(channels=images.shape[1], image_size=plain(*images.shape[2:]))),
    )
    _check_batch_norm(config, processes)
    return config, images


def _check_batch_norm(config, processes):
    """BadInput where perceptrons' batch norm is to share what is not there, or has one image."""
    if config.batch_norm is False and config.sync_bn:
        raise BadInput("expected --batch-norm with --sync-bn, got a gan without batch norm")
    if config.batch_norm and config.batch_size * (processes if config.sync_bn else 1) < 2:
        raise BadInput(
            "expected 2 images or more for batch norm, got 1: give a --batch-size of 2 or more, or "
            "--no-batch-norm"
        )


def _images(data, settings, run_folder, fitting):
    """The images of a run, and their checksum.

    Args:
        data: as `prepare` takes it.
        settings: a dict of the run's settings.
        run_folder: the run's folder, or None.
        fitting: a function of the images' own height and width that gives the size they are to
            have.
    """
    size, conditional = settings.get("image_size"), bool(settings.get("conditional"))
    background = settings["background"]
    if isinstance(data, DataSet):
        return data.load(
            size,
            background=background,
            conditional=conditional,
            seed=settings["seed"],
            fitting=fitting,
        )
    load = load_labelled if conditional else load_images
    images = load(data, size, background=background, run_folder=run_folder)
    images = resize(images, fitting(*images.shape[2:]))
    return images, checksum(images)


def _network_size(kind, height, width):
    """The size of images for networks of this kind that is nearest to theirs: see `nearest`."""
    return nearest(height, width) if kind.convolutional else (height, width)


def _classes_of(images):
    return images.classes if isinstance(images, LabelledImages | Streamed) else None


def _check_data(data):
    if not isinstance(data, str | os.PathLike | DataSet):
        raise BadInput(f"expected --data to be digits, photos or a path, got {shown(data)}")


def prepare_resumed(model, data, given, path, out=None):
    """As `prepare`, for a run that goes on from the checkpoint at `path`.

    The settings are the checkpoint's; of those given only `epochs` or `steps` may differ, and
    `data` (None for the checkpoint's) may name another place that holds the same images. `path` may
    be that of the run's folder. `out` is the folder of the run that goes on, None for the
    checkpoint's.

    Raises:
        BadInput: a setting or the images are not those the run began with.
    """
    given = check_settings(model, given)
    if data is not None:
        _check_data(data)
    path = file_of(path)
    began = Config.of_checkpoint(read_checkpoint(path), path)
    if began.model != model:
        raise BadInput(f"expected a checkpoint of {model} at {path}, got one of {began.model}")
    length = {name: given.pop(name) for name in LENGTHS & given.keys()}
    for name, value in given.items():
        start = getattr(began, name)
        if name == "background" and start is None:
            raise BadInput(
                f"expected no --background, as the run in {path} began when the transparency of "
                f"images was dropped, got {value}"
            )
        if (start is None or start is False) and value is not start:
            raise BadInput(
                f"expected no {option(name)}, without which the run in {path} began, got {value}"
            )
        same = colour(value) == colour(start) if name == "background" else value == start
        if not same:
            raise BadInput(
                f"expected {option(name)} {start}, with which the run in {path} began, got {value}"
            )
    if length:
        length = dict.fromkeys(LENGTHS) | length
    config = replace(began, data=_lasting(data or began.data), **length)
    images, crc = _images(
        data if isinstance(data, DataSet) else config.data,
        config.as_dict(),
        Path(path).parent if out is None else out,
        lambda *size: config.image_size,
    )
    if crc != began.checksum:
        raise BadInput(
            f"expected the {began.num_images} images with which the run in {path} began, got "
            f"{len(images)} images from {config.data} that are not the same"
        )
    if _classes_of(images) != began.classes:
        raise BadInput(
            f"expected the names of classes with which the run in {path} began, got others from "
            f"{config.data}"
        )
    return config, images


def _lasting(data):
    """`data` as it holds in any folder: a path is made absolute."""
    if isinstance(data, DataSet):
        return data.name
    lasts = data in DEFAULT_SIZES or is_name_of_a_data_set(data)
    return data if lasts else str(Path(data).absolute())


def check_run(config, images):
    """BadInput unless these are a `Config` and the images it was made for."""
    if not isinstance(config, Config):
        raise BadInput(f"expected a Config, as prepare gives it, got {shown(config)}")
    shape = (config.num_images, *config.image_shape)
    came = shown(images)
    if config.conditional:
        if _classes_of(images) != config.classes:
            raise BadInput(
                "expected the LabelledImages that prepare gives with the settings of a conditional "
                f"run, got {came}"
            )
        images = images.images if isinstance(images, LabelledImages) else images
    if isinstance(images, Streamed) and (images.shape, images.classes) == (shape, config.classes):
        return
    if isinstance(images, torch.Tensor):
        if images.dtype == torch.uint8 and images.shape == shape:
            return
        came = f"{images.dtype} {tuple(images.shape)}"
    raise BadInput(
        f"expected the images that prepare gives with the settings, a uint8 tensor {shape}, "
        f"got {came}"
    )
