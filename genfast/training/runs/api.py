"""`genfast.train`: a run from Python, with images from wherever Python has them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from genfast.training import progress
from genfast.training.data import DataSet
from genfast.training.errors import BadInput
from genfast.training.runs import checkpoint, folder
from genfast.training.runs.beginning import Beginning, read_beginning
from genfast.training.runs.config import Config, check_settings, prepare, prepare_resumed
from genfast.training.runs.devices import check_precision, working_device
from genfast.training.runs.loop import CHECKPOINT_SECONDS, Outcome, check_outputs
from genfast.training.runs.loop import train as run
from genfast.training.runs.models import MODELS
from genfast.training.runs.rules import shown
from genfast.training.runs.workers import alike_in_all, ending_in_turn, joined


@ending_in_turn()
def train(
    model: str,
    dataset: Any = None,
    *,
    out: str | os.PathLike,
    device: str | torch.device = "auto",
    resume: bool | str | os.PathLike = False,
    init_from: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    image_range: tuple[float, float] | None = None,
    classes: Sequence[str] | int | None = None,
    num_workers: int = 0,
    cache: bool | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    sample_every: int | None = None,
    keep: int = 0,
    log: str | None = None,
    quiet: bool = False,
    **settings: Any,
) -> Outcome:
    """Train a model on a data set, as `genfast train` does, and write it into a folder.

        outcome = genfast.train("dcgan", dataset, out="runs/mine", epochs=20)
        images = genfast.load("runs/mine").sample(64)

    Images of a data set are cropped around their centres and resized, if need be, and rounded to
    256 levels. Where reading its items draws no random numbers and they fit into memory,
    they are read once; else they are read anew for each batch, so that a transform may draw others
    each time. Before an item is read, the global random numbers of Python, NumPy and PyTorch are
    seeded from the run's seed, the epoch and the item's number, in whichever process: a resumed run
    goes on with the batches and the losses of one that was never stopped, whatever `num_workers`
    is. A generator of the data set's own is not reached by that, and a warning says so.

    In a script that torchrun starts in several processes, these train together, as those of
    `torchrun -m genfast train` do: the first writes, and its `Outcome` alone has the picture.

    Args:
        model: "gan", "dcgan", "vae", "conv-vae" or "vae-gan".
        dataset: what has `len()` and items by number: a `torch.utils.data.Dataset`, a data set of
            torchvision or of Hugging Face, a list. An item is an image, a list or tuple that begins
            with one and goes on with its label, or a dict with an `image` (or `img`, `images`,
            `pixel_values`) and perhaps a `label`. An image is a Pillow image, or a tensor or array
            of uint8 or floats: see `image_range`. Or a uint8 tensor or array of images; or what
            --data takes, "digits", "photos" or a path. None: what a resumed run had, if that was a
            name or a path.
        out: the folder of the run.
        device: a `torch.device`, "auto", "cpu", "cuda" or "cuda:N".
        resume: True goes on from the checkpoint in `out`, or begins where there is none; the path
            of a checkpoint, or of a run's folder, goes on from there. Of the settings only `epochs`
            or `steps` may change, and the data set must be the same: its length and 16 of its items
            are compared.
        init_from: a path, or several, of weights that a new run begins with, as `read_beginning`
            takes them: of a checkpoint, or of PyTorch's public DCGAN example.
        image_range: (low, high) of images that are floats. None: (0, 1), as ToTensor makes them.
        classes: of a conditional run, the names of the classes in the order of the labels' numbers,
            or how many there are. None: as the data set tells by its `classes` or `features`.
        num_workers: how many processes read items; 0 for none beside this one.
        cache: whether items are read once, with what their transforms drew then. None: see above.
        checkpoint_seconds, sample_every, keep, log: as in `training.runs.loop.train`.
        quiet: whether to show no progress.
        settings: those of the command line, with `_` for `-`: epochs=20, batch_size=64, lr=2e-4,
            conditional=True and so on.

    Returns:
        An `Outcome`: whether the run was `finished`, the `steps` it made and its last `picture`. A
        run that Ctrl-C stopped returns too, with `interrupted`.

    Raises:
        BadInput, a ValueError: an argument, the data set or the checkpoint does not fit.
        Diverged: a loss or a weight is no longer finite.
        LostWorker: another process has ended.
        Elsewhere: another process raises what is wrong. Where nothing catches it, the script ends
            without a word, as one that has failed.

    Example:
        >>> images = torch.randint(0, 256, (16, 1, 8, 8), dtype=torch.uint8)  # Or a data set.
        >>> train("gan", images, out="runs/noise", steps=2, batch_size=4, quiet=True).steps
        2
    """
    with alike_in_all():
        if not isinstance(model, str):
            raise BadInput(
                f"expected the name of a model, {', '.join(MODELS)}, got a {type(model).__name__}: "
                "networks of your own train by GANStep or VAEStep in a loop of yours"
            )
        path = _checkpoint_of(out, resume)
        given = check_settings(model, {k: v for k, v in settings.items() if v is not None})
        device = working_device(device)
        check_precision(given.get("precision"), device)
        check_outputs(checkpoint_seconds, sample_every, keep, log)
        folder.check(_folder(out), path)
        data = _data(
            dataset, dict(image_range=image_range, classes=classes, cache=cache), num_workers
        )
    with joined(device) as (workers, own_device), progress.hidden(quiet):
        config, images, beginning = workers.together(
            lambda: prepared(model, data, given, out, path, init_from, device, workers.count)
        )
        return run(
            config,
            images,
            out,
            device=own_device,
            resume_from=path,
            init_from=beginning,
            checkpoint_seconds=checkpoint_seconds,
            sample_every=sample_every,
            keep=keep,
            log=log,
            workers=workers,
        )


def prepared(
    model: str,
    data: Any,
    given: dict[str, Any],
    out: str | os.PathLike,
    resume_from: Path | None,
    init_from: str | os.PathLike | Sequence[str | os.PathLike] | None,
    device: torch.device,
    processes: int,
) -> tuple[Config, Any, Beginning | None]:
    """What `loop.train` takes of a run that begins, or goes on: of Python's and of the command's.

    Args:
        model, data, given, out: as `prepare` takes them.
        resume_from: the path of the checkpoint to go on from, or None.
        init_from: as `train` takes it; a run that goes on has no use for it.
        device: that it will run on.
        processes: how many train together.

    Returns:
        (settings, images, what the weights begin with or None).
    """
    if resume_from:
        config, images = prepare_resumed(model, data, given, resume_from, out, processes)
        check_precision(config.precision, device)  # The run may have begun on another machine.
        return config, images, None
    # No path at all is a mistake too, of a pattern that fits no file perhaps.
    beginning = None if init_from is None else read_beginning(init_from, model)
    settled = beginning.settled(given) if beginning else given
    return *prepare(model, data, settled, out, processes), beginning


def _folder(out: object) -> Path:
    if not isinstance(out, str | os.PathLike):
        raise BadInput(f"expected out to be the path of a folder, got {shown(out)}")
    return Path(out)


def _checkpoint_of(out: object, resume: object) -> Path | None:
    """The path of the checkpoint to go on from, or None where a run is to begin."""
    if resume is False or resume is None:
        return None
    if resume is not True:
        if not isinstance(resume, str | os.PathLike):
            raise BadInput(f"expected resume to be True, False or a path, got {shown(resume)}")
        return checkpoint.file_of(resume)
    path = _folder(out) / checkpoint.NAME
    return path if os.path.lexists(path) else None


def _data(dataset: Any, about: dict[str, Any], num_workers: int) -> Any:
    """What `prepare` takes."""
    if dataset is None or isinstance(dataset, str | os.PathLike):
        told = [name for name, value in about.items() if value is not None]
        if told or num_workers:
            raise BadInput(
                f"expected {(told or ['num_workers'])[0]} for a data set in Python alone, got it "
                f"with {'none' if dataset is None else shown(str(dataset))}"
            )
        return dataset
    return DataSet(dataset, num_workers=num_workers, **about)
