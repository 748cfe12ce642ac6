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
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

import genfast
from genfast.training import progress
from genfast.training.data import Batches, LabelledImages, Streamed
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
from genfast.training.runs.held_out import HeldOut, num_training, split
from genfast.training.runs.kept import Kept
from genfast.training.runs.loss_log import LossLog
from genfast.training.runs.models import build_step, check_compiler
from genfast.training.runs.rules import FROM_0, shown, whole
from genfast.training.runs.samples import draw_noise, write_samples
from genfast.training.runs.schedule import Schedule
from genfast.training.runs.settings import SETTINGS as OPTIONS
from genfast.training.runs.settings import option
from genfast.training.runs.workers import ALONE, Alone, lost
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
    images: torch.Tensor | LabelledImages | Streamed,
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
    workers: Alone = ALONE,
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
        images: the uint8 images (N, C, H, W), `LabelledImages`, or a `Streamed`, that `config` was
            made for.
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
        workers: the processes that train together, as `workers.joined` gives them. Each calls this
            with the same arguments but for its device; the first alone writes and warns.

    Returns:
        An `Outcome`.

    Raises:
        BadInput: an argument or the checkpoint does not fit, the folder is in use or holds
            somebody else's files, or an extra is not installed.
        Diverged: a loss or a weight is no longer finite. The last checkpoint stays. With
            `skip_nonfinite` that is a weight alone.
        LostWorker: another process has ended. The last checkpoint stays.
        Elsewhere: another process raises what is wrong.

    Warns:
        UserWarning: the discriminator has won, or the folder cannot be locked.

    Example:
        >>> from genfast.training.runs.config import prepare
        >>> settings = {"steps": 1, "image_size": 8, "batch_size": 4}
        >>> config, images = prepare("gan", "digits", settings)
        >>> train(config, images, "runs/gan-small", device="cpu").steps
        1
    """
    workers.together(lambda: _check(config, images, checkpoint_seconds, sample_every, keep, log))
    if init_from and resume_from:
        raise BadInput("expected resume_from or init_from, got both")
    if init_from:
        config = replace(config, init_from=init_from.paths)
    device = as_device(device)
    tqdm = require("tqdm", "tqdm").tqdm
    out, resume_from = Path(out), resume_from and checkpoint.file_of(resume_from)
    workers.check_same(_what_all_share(config, sample_every))
    step, batches, kept_aside = workers.together(
        lambda: _built(config, images, init_from, device, workers)
    )
    labels = labels_of_samples(config)
    noise = draw_noise(SAMPLES if labels is None else len(labels), step, config.seed)
    with workers.entered_by_first(folder.claimed(out, resume_from, demo=demo)):
        # Read within the lock: before, another run might have gone on from there.
        done, schedule = workers.together(
            lambda: _beginning(config, resume_from, step, len(batches), workers)
        )
        if workers.count > 1:
            workers.check_same(_where_all_begin(done, step))
        total = schedule.total(config)
        epochs = schedule.epoch(total)
        checkpoints = _Checkpoints(
            out, config, checkpoint_seconds, resume_from, done, keep, workers, schedule
        )
        pictures = _Pictures(out / PICTURES, sample_every, schedule, total)
        held_out = None
        with workers.first_alone() as is_here:
            if is_here:
                (out / PICTURES).mkdir(exist_ok=True)
                _write_settings(out / SETTINGS, config, step, demo, workers)
            if is_here and kept_aside is not None:
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
        spread = f", spread over {workers.count} processes" if workers.count > 1 else ""
        progress.say(
            f"{config.model} on {len(images)} images of {size} from {config.data}, on {device} in "
            f"{step.precision}{spread}, into {out}"
        )

        picture, warned, loss_log = None, False, None
        names, rows = step.result_fields, out / folder.LOSSES
        started = time.monotonic()
        with (
            checkpoints.named_if_it_ends(),
            cudnn_setting("deterministic", True),  # Else a resumed run could not repeat its losses.
            _StopOnSignal() as stop,
            progress.bar(total=total, initial=done, unit="step", dynamic_ncols=True) as bar,
            closing(batches.stream(schedule.position(done))) as stream,  # Ends its threads too.
            board.opened(log if workers.is_first else None, out, done) as shown_live,
        ):
            with workers.first_alone() as is_here:
                if is_here:
                    together = config.batch_size * workers.count
                    loss_log = LossLog(rows, names, together, keep=done, board=shown_live)
                    loss_log.passes_over = bool(config.skip_nonfinite)
            for batch in islice(stream, total - done):
                result = step(batch)
                done += 1
                epoch = schedule.epoch(done)
                if loss_log:
                    loss_log.add(done, epoch, result)
                bar.update()

                late = time.monotonic() - started >= max_seconds
                reporting = loss_log is not None and loss_log.age() >= REPORT_SECONDS
                # Each process has a clock of its own, and signals that may reach it alone.
                stopping, saving, reporting = workers.any(
                    stop.requested or done == total or late, checkpoints.due(), reporting
                )
                saving = saving or stopping
                ends_epoch = schedule.ends_epoch(done)
                drawing = pictures.due(done)
                if not (saving or ends_epoch or drawing or reporting):
                    continue
                with workers.first_alone():
                    if loss_log:
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
                        if stopping:
                            # Before the checkpoint: what is killed meanwhile goes on from before.
                            draw_curve(rows, out / CURVE)
                if saving:
                    checkpoints.save(step, done)
                if stopping:
                    with workers.first_alone() as is_here:
                        if is_here and held_out and done == total:
                            progress.say(held_out.measure(done, epoch, last=True))
                if loss_log and (saving or drawing or (held_out and ends_epoch)):
                    loss_log.restart_clock()
                    batches.waiting.restart()
                if stopping:
                    break
        if step.skipped and workers.is_first:
            tqdm.write(
                f"{step.skipped} updates were passed over, as they were not finite", file=sys.stderr
            )
        (interrupted,) = workers.any(stop.requested and done < total)
    return Outcome(done == total, interrupted, done, picture)


def _check(config: Config, images: Any, *outputs: object) -> None:
    check_run(config, images)
    check_outputs(*outputs)
    require("tqdm", "tqdm")
    require("PIL.Image", "pillow")


def _what_all_share(config: Config, sample_every: int | None) -> dict:
    """What must be the same in all processes, as a message can name it."""
    settings = config.as_dict()
    for place in ("data", "init_from"):  # Which another machine may have elsewhere.
        del settings[place]
    settings = {option(n) if n in OPTIONS else n: value for n, value in settings.items()}
    return settings | {"--sample-every": sample_every}


def _where_all_begin(done: int, step: Step) -> dict:
    """What must be the same in all processes before the first step, as a message can name it.

    From there on only gradients are exchanged: weights of another file on another machine would
    stay others.
    """
    crc = 0
    for module in step.modules.values():
        for tensor in module.state_dict().values():
            values = tensor.cpu().reshape(-1)
            crc = zlib.crc32(values.view(torch.uint8).numpy(), crc)
    return {
        "checkpoint's steps": done,
        "precision": step.precision,
        "checksum of the weights to begin with": crc,
    }


def _built(
    config: Config, images: Any, init_from: Beginning | None, device: torch.device, workers: Alone
) -> tuple[Step, Batches, torch.Tensor | None]:
    """The step, its batches, and the numbers of the images kept aside or None."""
    if init_from:
        init_from.check(config)
    check_compiler(config, device)
    torch.manual_seed(config.seed)
    step = build_step(config, device, workers)
    if init_from:
        init_from.put_into(step)
    trained_on, kept_aside = split(len(images), config.validate, config.seed)
    batches = Batches(
        images,
        config.batch_size,
        config.seed,
        device,
        trained_on,
        rank=workers.rank,
        count=workers.count,
    )
    # From here on each draws noise of its own.
    workers.seed(config.seed)
    return step, batches, kept_aside


def check_outputs(
    checkpoint_seconds: object, sample_every: object, keep: object, log: object
) -> None:
    """BadInput if `train` does not take these arguments, or an extra is not installed."""
    given = [("--checkpoint-seconds", FROM_0, checkpoint_seconds), ("--keep", KEEP, keep)]
    if sample_every is not None:
        given.append(("--sample-every", SAMPLE_EVERY, sample_every))
    for name, rule, value in given:
        if not rule.allows(value):
            raise BadInput(f"expected {name} to be {rule.expected}, got {shown(value)}")
    board.check(log)


class _Pictures:
    """Which sample pictures there are: of the ends of epochs or every so many steps, and the last.

    Args:
        folder: where they go.
        every: how many steps; None for the ends of epochs.
        schedule: the `Schedule`.
        total: the number of the last step.
    """

    def __init__(self, folder: Path, every: int | None, schedule: Schedule, total: int) -> None:
        self._folder, self._every, self._schedule, self._total = folder, every, schedule, total

    def due(self, step: int) -> Path | None:
        """The path of the picture of this step, or None."""
        if self._every is None and self._schedule.ends_epoch(step):
            return self._folder / f"epoch_{self._schedule.epoch(step):03d}.png"
        if step == self._total or (self._every and step % self._every == 0):
            return self._folder / f"step_{step:07d}.png"
        return None


def _beginning(
    config: Config, path: Any, step: Step, length: int, workers: Alone
) -> tuple[int, Schedule]:
    """How many steps a run has behind it, and its `Schedule`; the step is put to where it was.

    length: the steps of an epoch.
    """
    if path is None:
        return 0, Schedule(length)
    content = checkpoint.read_checkpoint(path)
    before = checkpoint.together_in(content)
    done, count = content["steps"], before.count if before else 1
    as_before = count == workers.count
    checkpoint.restore(step, content, path, workers.rank if as_before else 0)
    refuse_not_finite(step.modules, path)
    if not as_before:
        workers.seed(config.seed, done)
        warnings.warn(
            f"{path} is of a run of {_processes(count)}, which goes on with "
            f"{_processes(workers.count)}: not as it would have gone on otherwise",
            stacklevel=3,
        )
    if before:
        schedule = Schedule.going_on(length, done, before.position, before.epoch)
    elif as_before:
        schedule = Schedule(length)
    else:
        images = num_training(config.num_images, config.validate)
        schedule = Schedule.going_on(length, done, done, images // config.batch_size)
    if not as_before and "kl_weight" in step.modules:  # A warm-up is so many epochs long.
        step.modules["kl_weight"].steps.fill_(schedule.position(done))
    if done >= schedule.total(config):
        wanted, had, given = "--epochs", schedule.position(done) // length, config.epochs
        if config.steps:
            wanted, had, given = "--steps", done, config.steps
        raise BadInput(
            f"expected {wanted} of more than the {had} that {path} has behind it, got {given}"
        )
    return done, schedule


def _processes(count: int) -> str:
    return f"{count} processes" if count > 1 else "one process"


class _Checkpoints:
    """The checkpoints of a run: written when one is due, and named when the run ends too early."""

    def __init__(
        self,
        out: Path,
        config: Config,
        seconds: float,
        resume_from: Any,
        steps: int,
        keep: int,
        workers: Alone,
        schedule: Schedule,
    ) -> None:
        self.path = out / checkpoint.NAME
        self._settings = config.as_dict()
        self._kept = Kept(out, keep, self._settings)
        self._seconds = seconds
        self._last = (resume_from, steps) if resume_from else None
        self._saved_at = -math.inf
        self._workers, self._schedule = workers, schedule

    def due(self) -> bool:
        return time.monotonic() - self._saved_at >= self._seconds

    def save(self, step: Step, done: int) -> None:
        """Write one, in the first process, with what all have for it."""
        together = None
        if self._workers.count > 1 or self._schedule.ahead:
            together = checkpoint.Together(
                self._workers.count,
                self._schedule.position(done),
                self._schedule.length,
                tuple(self._workers.gathered(checkpoint.rng_states(step.device))),
            )
        with self._workers.first_alone() as is_here:
            if is_here:
                checkpoint.save_checkpoint(self.path, step, self._settings, done, together)
                self._kept.add(self.path, done)
        self._last = self.path, done
        self._saved_at = time.monotonic()

    @contextmanager
    def named_if_it_ends(self) -> Iterator[None]:
        """Let a `Diverged` or `LostWorker` say where the last good checkpoint is."""
        try:
            yield
        except Diverged as error:
            raise Diverged(f"{error}; {self._words()}") from None
        except RuntimeError as error:
            if not self._workers.is_lost(error):
                raise
            more = ", from which --resume goes on" if self._last else ""
            raise lost(f"; {self._words()}{more}") from error

    def _words(self) -> str:
        if not self._last:
            return "there was no checkpoint yet"
        return "the last good checkpoint is {}, of step {}".format(*self._last)


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


def _write_settings(path: Path, config: Config, step: Step, demo: bool, workers: Alone) -> None:
    settings = config.as_dict() | {
        "demo": demo,
        "processes": workers.count,
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
