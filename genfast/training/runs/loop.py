"""The training loop: steps, losses on disk, sample pictures, checkpoints, and a clean stop."""

import json
import math
import os
import platform
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import genfast
from genfast.training import progress
from genfast.training.data import Batches, LabelledImages
from genfast.training.errors import BadInput, Diverged, require
from genfast.training.files import replacing
from genfast.training.run_files import CURVE, PICTURES, SETTINGS
from genfast.training.runs import board, checkpoint, folder
from genfast.training.runs.beginning import Beginning
from genfast.training.runs.classes import labels_of_samples
from genfast.training.runs.config import Config, check_run
from genfast.training.runs.curve import draw_curve
from genfast.training.runs.devices import as_device
from genfast.training.runs.finite import first_not_finite, refuse_not_finite
from genfast.training.runs.held_out import HeldOut, split
from genfast.training.runs.kept import Kept
from genfast.training.runs.loss_log import LossLog
from genfast.training.runs.models import build_step, check_compiler
from genfast.training.runs.rules import shown, whole
from genfast.training.runs.samples import draw_noise, write_samples
from genfast.training.steps.base import Step

__all__ = ["Outcome", "train"]

SAMPLES = 64
REPORT_SECONDS = 0.5
CHECKPOINT_SECONDS = 30.0
SAMPLE_EVERY, KEEP = whole(), whole(0)  # What these arguments may be.


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        finished: whether all steps were made; if not, a signal or the time limit stopped it.
        interrupted: whether a signal stopped it.
        steps: how many steps have been made, those before a resume included.
        picture: the last picture written, or None.

    Example:
        >>> Outcome(finished=False, interrupted=True, steps=100, picture=None).finished
        False
    """

    finished: bool
    interrupted: bool
    steps: int
    picture: Path | None


def train(
    config: Config,
    images: torch.Tensor | LabelledImages,
    out: str | os.PathLike,
    *,
    device: str | torch.device,
    resume_from: str | os.PathLike | None = None,
    init_from: Beginning | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    sample_every: int | None = None,
    keep: int = 0,
    log: str | None = None,
    max_seconds: float = math.inf,
    demo: bool = False,
) -> Outcome:
    """Train a model and write what comes of it into a folder.

    The folder gets config.json, metrics.csv (one row a step), samples/epoch_NNN.png (of the same
    noise each time), checkpoint.pt, of images kept aside validation.csv (a row an epoch), and at
    the end losses.png. It is locked while the run lasts, and nothing is written over but what a run
    of its own left there. A checkpoint is written after the first step, every `checkpoint_seconds`,
    at the end, and when SIGINT, SIGTERM or SIGHUP asks to stop, which happens after the current
    step; a second SIGINT or SIGTERM stops at once. A resumed run goes on with the step after its
    checkpoint, wherever in an epoch that is, and with the losses of a run that was never
    interrupted.

    Args:
        config: a `Config`.
        images: the uint8 images (N, C, H, W), or `LabelledImages`, that `config` was made for.
        out: the folder; made if need be.
        device: a `torch.device`, or its name as `as_device` takes it.
        resume_from: the path of a checkpoint to go on from, or of the folder of its run.
        init_from: a `Beginning`, as `read_beginning` gives it: the weights that a new run begins
            with. Its optimizers are fresh.
        checkpoint_seconds: 0 writes a checkpoint after each step.
        sample_every: the steps from one sample picture to the next, samples/step_NNNNNNN.png. None:
            one an epoch. In any case there is one of the last step.
        keep: how many of the newest checkpoints are kept as checkpoints/step_NNNNNNN.pt too.
        log: "tensorboard" writes the losses and sample pictures for TensorBoard too, into the
            folder tensorboard; None does not.
        max_seconds: stop when this time has passed.
        demo: whether this is a demo. It takes the place of an earlier one in the folder.

    Returns:
        An `Outcome`.

    Raises:
        BadInput: an argument or the checkpoint does not fit, the folder is in use or holds
            somebody else's files, or an extra is not installed.
        Diverged: a loss or a weight is no longer finite. The last checkpoint stays. With
            `skip_nonfinite` that is a weight alone.

    Warns:
        UserWarning: the discriminator has won, or the folder cannot be locked.

    Example:
        >>> from genfast.training.runs.config import prepare
        >>> settings = {"steps": 1, "image_size": 8, "batch_size": 4}
        >>> config, images = prepare("gan", "digits", settings)
        >>> train(config, images, "runs/gan-small", device="cpu").steps
        1
    """
    check_run(config, images)
    check_outputs(sample_every, keep, log)
    if init_from:
        if resume_from:
            raise BadInput("expected resume_from or init_from, got both")
        init_from.check(config)
    device = as_device(device)
    tqdm = require("tqdm", "tqdm").tqdm
    require("PIL.Image", "pillow")
    out, resume_from = Path(out), resume_from and checkpoint.file_of(resume_from)
    check_compiler(config, device)
    torch.manual_seed(config.seed)
    step = build_step(config, device)
    if init_from:
        init_from.put_into(step)
    trained_on, kept_aside = split(len(images), config.validate, config.seed)
    batches = Batches(images, config.batch_size, config.seed, device, trained_on)
    labels = labels_of_samples(config)
    noise = draw_noise(SAMPLES if labels is None else len(labels), step, config.seed)
    total = config.steps or config.epochs * len(batches)
    epochs = math.ceil(total / len(batches))
    with folder.claimed(out, resume_from, demo=demo):
        # Read within the lock: before, another run might have gone on from there.
        done = _go_on_from(resume_from, step) if resume_from else 0
        if done >= total:
            wanted, had = ("--steps", done) if config.steps else ("--epochs", done // len(batches))
            raise BadInput(
                f"expected {wanted} of more than the {had} that {resume_from} has behind it, got "
                f"{config.steps or config.epochs}"
            )
        checkpoints = _Checkpoints(out, config, checkpoint_seconds, resume_from, done, keep)
        (out / PICTURES).mkdir(exist_ok=True)
        pictures = _Pictures(out / PICTURES, sample_every, len(batches), total)
        _write_settings(out / SETTINGS, config, step, demo)
        held_out = None
        if kept_aside is not None:
            held_out = HeldOut(
                out / folder.VALIDATION,
                step,
                images,
                kept_aside,
                config.batch_size,
                config.seed,
                keep=done,
            )
        size = " x ".join(map(str, config.image_shape))
        progress.say(
            f"{config.model} on {len(images)} images of {size} from {config.data}, on {device} in "
            f"{step.precision}, into {out}"
        )

        picture, warned = None, False
        names, rows = step.result_fields, out / folder.LOSSES
        started = time.monotonic()
        with (
            checkpoints.named_if_diverged(),
            cudnn_setting("deterministic", True),  # Else a resumed run could not repeat its losses.
            _StopOnSignal() as stop,
            progress.bar(total=total, initial=done, unit="step", dynamic_ncols=True) as bar,
            closing(batches.stream(done)) as stream,  # However this ends, so do its threads.
            board.opened(log, out, done) as shown_live,
        ):
            loss_log = LossLog(rows, names, config.batch_size, keep=done, board=shown_live)
            loss_log.passes_over = bool(config.skip_nonfinite)
            for batch in islice(stream, total - done):
                result = step(batch)
                done += 1
                epoch = math.ceil(done / len(batches))
                loss_log.add(done, epoch, result)
                bar.update()

                late = time.monotonic() - started >= max_seconds
                stopping = stop.requested or done == total or late
                saving = stopping or checkpoints.due()
                ends_epoch = done % len(batches) == 0
                drawing = pictures.due(done)
                if saving or ends_epoch or drawing or loss_log.age() >= REPORT_SECONDS:
                    bar.set_description(f"epoch {epoch}/{epochs}", refresh=False)
                    newest = loss_log.flush()
                    newest |= held_out.newest if held_out else {}
                    bar.set_postfix(newest | {"data": f"{batches.waiting.share():.0%}"})
                # Of wgan a loss of 0 means that the critic cannot tell.
                won = loss_log.lost >= len(batches) and config.loss != "wgan"
                if ends_epoch and won and not warned:
                    warned = True
                    with tqdm.external_write_mode(sys.stderr):
                        _warn_of_a_lost_game(epoch)
                if saving or drawing:
                    _check_weights(step, done)
                if drawing:
                    picture = drawing
                    shown_live.picture(done, write_samples(step, noise, picture, labels))
                if held_out and ends_epoch and done < total:
                    held_out.measure(done, epoch)
                if stopping:  # Before the checkpoint: what is killed meanwhile goes on from before.
                    draw_curve(rows, out / CURVE)
                if saving:
                    checkpoints.save(step, done)
                if held_out and done == total:
                    progress.say(held_out.measure(done, epoch, last=True))
                if saving or drawing or (held_out and ends_epoch):
                    loss_log.restart_clock()
                    batches.waiting.restart()
                if stopping:
                    break
        if step.skipped:
            tqdm.write(
                f"{step.skipped} updates were passed over, as they were not finite", file=sys.stderr
            )
    return Outcome(done == total, stop.requested and done < total, done, picture)


def check_outputs(sample_every: object, keep: object, log: object) -> None:
    """BadInput if `train` does not take these arguments, or an extra is not installed."""
    given = (("--sample-every", SAMPLE_EVERY, sample_every), ("--keep", KEEP, keep))
    for name, rule, value in given:
        if value is not None and not rule.allows(value):
            raise BadInput(f"expected {name} to be {rule.expected}, got {shown(value)}")
    board.check(log)


class _Pictures:
    """Which sample pictures there are: of the ends of epochs or every so many steps, and the last.

    Args:
        folder: where they go.
        every: how many steps; None for the ends of epochs.
        epoch: the steps of one.
        total: the number of the last step.
    """

    def __init__(self, folder: Path, every: int | None, epoch: int, total: int) -> None:
        self._folder, self._every, self._epoch, self._total = folder, every, epoch, total

    def due(self, step: int) -> Path | None:
        """The path of the picture of this step, or None."""
        if self._every is None and step % self._epoch == 0:
            return self._folder / f"epoch_{step // self._epoch:03d}.png"
        if step == self._total or (self._every and step % self._every == 0):
            return self._folder / f"step_{step:07d}.png"
        return None


def _go_on_from(path: Any, step: Step) -> int:
    """Put the step where the checkpoint left it; the number of steps made until then."""
    content = checkpoint.read_checkpoint(path)
    checkpoint.restore(step, content, path)
    refuse_not_finite(step.modules, path)
    return content["steps"]


class _Checkpoints:
    """The checkpoints of a run: written when one is due, and named when the run diverges."""

    def __init__(
        self,
        out: Path,
        config: Config,
        seconds: float,
        resume_from: Any,
        steps: int,
        keep: int,
    ) -> None:
        self.path = out / checkpoint.NAME
        self._settings = config.as_dict()
        self._kept = Kept(out, keep, self._settings)
        self._seconds = seconds
        self._last = (resume_from, steps) if resume_from else None
        self._saved_at = -math.inf

    def due(self) -> bool:
        return time.monotonic() - self._saved_at >= self._seconds

    def save(self, step: Step, done: int) -> None:
        checkpoint.save_checkpoint(self.path, step, self._settings, done)
        self._last = self.path, done
        self._kept.add(self.path, done)
        self._saved_at = time.monotonic()

    @contextmanager
    def named_if_diverged(self) -> Iterator[None]:
        """Let a `Diverged` say where the last good checkpoint is."""
        try:
            yield
        except Diverged as error:
            last = "there was no checkpoint yet"
            if self._last:
                last = "the last good checkpoint is {}, of step {}".format(*self._last)
            raise Diverged(f"{error}; {last}") from None


def _check_weights(step: Step, done: int) -> None:
    name = first_not_finite(step.modules)
    if name:
        raise Diverged(f"training diverged: after step {done} {name} holds NaN or infinity")


def _warn_of_a_lost_game(epoch: int) -> None:
    warnings.warn(
        f"the discriminator has won: its loss was next to 0 in every step of epoch {epoch}, which "
        f"teaches the generator nothing; a lower --lr or more images may help",
        stacklevel=3,
    )


def _write_settings(path: Path, config: Config, step: Step, demo: bool) -> None:
    settings = config.as_dict() | {
        "demo": demo,
        "device": str(step.device),
        "precision_used": step.precision,
        "versions": {
            "genfast": genfast.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    with replacing(path) as file:
        file.write((json.dumps(settings, indent=2) + "\n").encode())


@contextmanager
def cudnn_setting(name: str, value: object) -> Iterator[None]:
    """Set one attribute of `torch.backends.cudnn` for a while; its `flags` would set them all."""
    before = getattr(torch.backends.cudnn, name)
    setattr(torch.backends.cudnn, name, value)
    try:
        yield
    finally:
        setattr(torch.backends.cudnn, name, before)


class _StopOnSignal:
    """While entered, the first SIGINT, SIGTERM or SIGHUP sets `requested`.

    After a SIGINT or SIGTERM the next of them acts as ever. A SIGHUP never does: when a terminal
    closes, the system and the shell send one each. Under `nohup` it is ignored, and stays so.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none.

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "_StopOnSignal":
        # Python takes signal handlers from the main thread alone.
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._request) for s in self.SIGNALS}
            if self.HANGUP and signal.getsignal(self.HANGUP) is not signal.SIG_IGN:
                self._before[self.HANGUP] = signal.signal(self.HANGUP, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        self._restore(*self._before)

    def _request(self, number: int, _: object) -> None:
        self.requested = True
        if number != self.HANGUP:
            self._restore(*self.SIGNALS)

    def _restore(self, *numbers: int) -> None:
        for number in numbers:
            if number in self._before:
                signal.signal(number, self._before.pop(number))
