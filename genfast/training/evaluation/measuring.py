"""Measuring a trained model: images of its own beside real ones, by several metrics."""

import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import genfast
from genfast.training.data import LabelledImages, load_images, load_labelled
from genfast.training.errors import BadInput, require
from genfast.training.evaluation.features import extract, extractor
from genfast.training.evaluation.metrics import METRICS
from genfast.training.evaluation.sets import T, Watch, unwatched
from genfast.training.files import replacing
from genfast.training.run_files import settings_of
from genfast.training.runs.classes import in_parts, labels_of_data
from genfast.training.runs.config import Config
from genfast.training.runs.devices import as_device
from genfast.training.runs.pictures import to_uint8
from genfast.training.runs.rules import shown
from genfast.training.runs.samples import draw_noise
from genfast.training.runs.trained import drawing_step, opened

MOST = 50_000  # Images of each kind, unless asked for more: as many as the papers take.
BATCH = 64  # Images whose features are computed at once; Inception enlarges them to 299 x 299.


class Evaluation(NamedTuple):
    """What was measured, and of what.

    Attributes:
        metrics: a dict of numbers; NAME_sd is the spread of NAME over subsets.
        about: a dict of what they depend on: num (images of each kind), features, feature_length,
            seed, checkpoint, steps, average (whether an average of the generator drew), data,
            image_size, precision, and versions.

    Example:
        >>> Evaluation({"fid": 12.5}, {"num": 50_000}).as_dict()
        {'metrics': {'fid': 12.5}, 'num': 50000}
    """

    metrics: dict
    about: dict

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {"metrics": self.metrics, **self.about}


def evaluate(
    path: str | os.PathLike,
    data: str | os.PathLike | None = None,
    *,
    metrics: Sequence[str] = tuple(METRICS),
    features: str | None = None,
    num: int | None = None,
    seed: int = 0,
    ema: bool = True,
    device: str | torch.device = "auto",
    bars: bool = False,
) -> Evaluation:
    """Measure the model of a checkpoint.

    The images it draws are rounded to 256 levels, as pictures of them are. They and as many real
    ones go through the same extractor of features. A conditional model draws as many of each class
    as there are among the real ones, which therefore need labels.

    Args:
        path: the checkpoint, the folder of its run, or weights of the generator of PyTorch's
            public DCGAN example, which need `data`.
        data: the real images, as `load_images` takes them, which are brought to the model's size.
            None: those of the run.
        metrics: names of `METRICS`.
        features: as `extractor` takes it. None: "digits" for the digits, else "inception".
        num: how many images of each kind; None for as many as there are real ones, at most `MOST`.
            Where there are more real ones, the seed chooses among them.
        seed: of the noise, of the choice, and of the kernel distance's subsets.
        ema: draw from the average of the generator where the run kept one.
        device: where images are drawn and features computed.
        bars: show progress on standard error.

    Returns:
        An `Evaluation`.

    Raises:
        BadInput: an argument does not fit, or something cannot be read or had.

    Example:
        >>> found = evaluate("runs/gan-digits", metrics=["kid"], features="features.pt", num=8)
        >>> list(found.metrics)
        ['kid', 'kid_sd']
    """
    metrics = _checked_metrics(metrics)
    device = as_device(device)
    watch = _bars if bars else unwatched
    file = opened(path)
    file.check_draws()
    path, config = file.path, file.config
    if file.alone and data is None:
        raise BadInput(
            f"expected --data with the weights in {path}, which do not tell what images they were "
            "made of, got none"
        )
    real = _real_images(config, data, path)
    num = _checked_num(num, len(real), metrics)
    data = config.data if data is None else str(data)
    features = features or ("digits" if data == "digits" else "inception")
    run = extractor(features, real.shape[1:], device)
    step = drawing_step(file, device)
    if not ema:
        step.average = None
    if num < len(real):
        order = torch.randperm(len(real), generator=torch.Generator().manual_seed(seed))
        real = real[order[:num].sort().values]
    labels = None
    if isinstance(real, LabelledImages):
        real, labels = real.images, labels_of_data(config, real)
    of_real = extract(run, features, _watched(real.split(BATCH), "real images", watch))
    given = in_parts(draw_noise(num, step, seed), labels, BATCH)
    drawn = (to_uint8(step.sample(z, y), step.pixel_range) for z, y in given)
    of_drawn = extract(run, features, watch(drawn, "generated images", len(given)))
    _warn_of_rank("fid" in metrics, num, of_real.shape[1])
    of_real, of_drawn = of_real.to(device), of_drawn.to(device)
    measured: dict[str, float] = {}
    for name in metrics:
        measured |= METRICS[name].measure(of_real, of_drawn, seed, watch)
    about = {
        "num": num,
        "features": features,
        "feature_length": of_real.shape[1],
        "seed": seed,
        "checkpoint": str(path.absolute()),
        "steps": file.content["steps"],
        "average": getattr(step, "average", None) is not None,
        "data": data,
        "image_size": config.image_size,
        "precision": step.precision,
        "versions": {"genfast": genfast.__version__, "torch": torch.__version__},
    }
    return Evaluation(measured, about)


def _checked_metrics(metrics: Sequence[str]) -> tuple[str, ...]:
    if isinstance(metrics, str) or not metrics or any(name not in METRICS for name in metrics):
        raise BadInput(f"expected metrics among {', '.join(METRICS)}, got {shown(metrics)}")
    return tuple(dict.fromkeys(metrics))


def _real_images(
    config: Config, data: str | os.PathLike | None, path: Path
) -> torch.Tensor | LabelledImages:
    load = load_labelled if config.conditional else load_images
    images = load(
        config.data if data is None else data,
        config.image_size,
        background=config.background,
        run_folder=path.parent,
    )
    if images.shape[1] != config.channels:
        raise BadInput(
            f"expected --data of images with {config.channels} channels, as the model of {path} "
            f"draws, got {images.shape[1]}"
        )
    return images


def _checked_num(num: int | None, available: int, metrics: Sequence[str]) -> int:
    least, name = max((METRICS[name].least, name) for name in metrics)
    wanted = min(available, MOST) if num is None else num
    if wanted < least:
        raise BadInput(f"expected at least {least} images, which {name} needs, got {wanted}")
    if wanted > available:
        raise BadInput(
            f"expected --data of at least the {wanted} images that --num asks for, got {available}"
        )
    return wanted


def _warn_of_rank(measures_fid: bool, num: int, length: int) -> None:
    if measures_fid and num <= length:
        warnings.warn(
            f"fid of {num} images in {length} features is far too large, as so few have no whole "
            f"covariance: compare it with others of {num} images only, or give kid",
            stacklevel=3,
        )


def _watched(parts: Sequence[torch.Tensor], text: str, watch: Watch) -> Iterable[torch.Tensor]:
    return watch(parts, text, len(parts))


def _bars(blocks: Iterable[T], text: str, total: int) -> Iterable[T]:
    tqdm = require("tqdm", "tqdm").tqdm
    return tqdm(blocks, text, total, leave=False, dynamic_ncols=True)


def report_file(out: str | os.PathLike) -> Path:
    """Where a report named `out` goes; BadInput if it must not be written there.

    It may be new, or take the place of an older report.
    """
    target = Path(os.path.realpath(out))
    if target.is_dir():
        raise BadInput(f"expected --out to be the name of a file, got the folder {out}")
    if not target.parent.is_dir():
        raise BadInput(f"expected --out in a folder that exists, got {out}")
    if os.path.lexists(target) and "metrics" not in (settings_of(target) or {}):
        raise BadInput(
            f"expected --out to be new or an earlier report, got {out}, which is neither and stays "
            f"as it is"
        )
    return target


def write_report(evaluation: Evaluation, target: Path) -> None:
    """Write an `Evaluation` as JSON."""
    with replacing(target) as file:
        file.write((json.dumps(evaluation.as_dict(), indent=2) + "\n").encode())


def table(evaluation: Evaluation) -> str:
    """An `Evaluation` as lines of text for people."""
    about = evaluation.about
    rows = [("metric", "value", "images", "features", "seed")]
    for name, value in evaluation.metrics.items():
        if name.endswith("_sd"):
            continue
        spread = evaluation.metrics.get(f"{name}_sd")
        words = f"{value:.4g}" + (f" ± {spread:.2g}" if spread is not None else "")
        rows.append((name, words, str(about["num"]), about["features"], str(about["seed"])))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
