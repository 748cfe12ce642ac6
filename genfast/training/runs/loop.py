"""The training loop: steps, losses on disk, sample pictures, checkpoints, and a clean stop."""

import json
import math
import platform
import signal
import sys
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

import genfast
from genfast.training.data import Batches, normalize
from genfast.training.errors import BadInput, require
from genfast.training.files import replacing
from genfast.training.runs import checkpoint
from genfast.training.runs.config import build_step, check_run
from genfast.training.runs.devices import as_device
from genfast.training.runs.loss_log import LossLog
from genfast.training.runs.samples import draw_noise, write_samples

SAMPLES = 64
REPORT_SECONDS = 0.5
CHECKPOINT_SECONDS = 30.0


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        finished: whether all epochs were made; if not, a signal or the time limit stopped it.
        interrupted: whether a signal stopped it.
        steps: how many steps have been made, those before a resume included.
        picture: the last picture written, or None.
    """

    finished: bool
    interrupted: bool
    steps: int
    picture: Path | None


def train(
    config,
    images,
    out,
    *,
    device,
    resume_from=None,
    checkpoint_seconds=CHECKPOINT_SECONDS,
    max_seconds=math.inf,
):
    """Train a model and write what comes of it into a folder.

    The folder gets config.json, metrics.csv (one row a step), samples/epoch_NNN.png (of the same
    noise each time) and checkpoint.pt. A checkpoint is written every `checkpoint_seconds`, at the
    end, and when SIGINT or SIGTERM asks to stop, which happens after the current step; a second
    signal stops at once. A resumed run goes on with the step after its checkpoint, wherever in an
    epoch that is, and with the losses of a run that was never interrupted.

    Args:
        config: a `Config`.
        images: the uint8 images (N, C, H, W) that `config` was made for.
        out: the folder; made if need be.
        device: a `torch.device`, or its name as `as_device` takes it.
        resume_from: the path of a checkpoint to go on from.
        checkpoint_seconds: 0 writes a checkpoint after each step.
        max_seconds: stop when this time has passed.

    Returns:
        An `Outcome`.

    Raises:
        BadInput: an argument or the checkpoint does not fit, or an extra is not installed.
        Diverged: a loss is no longer finite.
    """
    check_run(config, images)
    device = as_device(device)
    tqdm = require("tqdm", "tqdm").tqdm
    require("PIL.Image", "pillow")
    torch.manual_seed(config.seed)
    step = build_step(config, device)
    batches = Batches(images, config.batch_size, config.seed, device)
    noise = draw_noise(SAMPLES, step, config.seed)
    done = 0
    if resume_from is not None:
        content = checkpoint.read_checkpoint(resume_from)
        checkpoint.restore(step, content, resume_from)
        done = content["steps"]
    total = config.epochs * len(batches)
    if done >= total:
        raise BadInput(
            f"expected --epochs of more than the {done // len(batches)} that {resume_from} has "
            f"behind it, got {config.epochs}"
        )

    out = Path(out)
    (out / "samples").mkdir(parents=True, exist_ok=True)
    _write_settings(out / "config.json", config, step)
    loss_log = LossLog(out / "metrics.csv", step.result_fields, config.batch_size, keep=done)

    size = f"{config.channels} x {config.image_size} x {config.image_size}"
    tqdm.write(
        f"{config.model} on {len(images)} images of {size} from {config.data}, on {device} in "
        f"{step.precision}, into {out}",
        file=sys.stderr,
    )

    picture = None
    started = saved_at = time.monotonic()
    with (
        cudnn_setting("deterministic", True),  # Else a resumed run could not repeat its losses.
        _StopOnSignal() as stop,
        tqdm(total=total, initial=done, unit="step", dynamic_ncols=True) as bar,
        closing(batches.stream(done)) as stream,  # However this ends, so do its threads.
    ):
        for batch in islice(stream, total - done):
            result = step(normalize(batch, step.pixel_range))
            done += 1
            epoch = math.ceil(done / len(batches))
            loss_log.add(done, epoch, result)
            bar.update()

            now = time.monotonic()
            stopping = stop.requested or done == total or now - started >= max_seconds
            saving = stopping or now - saved_at >= checkpoint_seconds
            ends_epoch = done % len(batches) == 0
            if saving or ends_epoch or loss_log.age() >= REPORT_SECONDS:
                bar.set_description(f"epoch {epoch}/{config.epochs}", refresh=False)
                newest = loss_log.flush()
                bar.set_postfix(newest | {"data": f"{batches.waiting.share():.0%}"})
            if ends_epoch:
                picture = out / "samples" / f"epoch_{epoch:03d}.png"
                write_samples(step, noise, config, picture)
            if saving:
                checkpoint.save_checkpoint(out / checkpoint.NAME, step, config.as_dict(), done)
                saved_at = time.monotonic()
            if saving or ends_epoch:
                loss_log.restart_clock()
                batches.waiting.restart()
            if stopping:
                break
    return Outcome(done == total, stop.requested and done < total, done, picture)


def _write_settings(path, config, step):
    settings = config.as_dict() | {
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
def cudnn_setting(name, value):
    """Set one attribute of `torch.backends.cudnn` for a while; its `flags` would set them all."""
    before = getattr(torch.backends.cudnn, name)
    setattr(torch.backends.cudnn, name, value)
    try:
        yield
    finally:
        setattr(torch.backends.cudnn, name, before)


class _StopOnSignal:
    """While entered, the first SIGINT or SIGTERM sets `requested`; the next acts as ever."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.requested = False
        self._before = {}

    def __enter__(self):
        # Python takes signal handlers from the main thread alone.
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._request) for s in self.SIGNALS}
        return self

    def __exit__(self, *exception):
        self._restore()

    def _request(self, *_):
        self.requested = True
        self._restore()

    def _restore(self):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
