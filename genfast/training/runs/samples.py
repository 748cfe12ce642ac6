"""Pictures of what a model makes of noise."""

import os
import stat
from dataclasses import replace
from pathlib import Path

import torch

from genfast.training.errors import BadInput
from genfast.training.runs import checkpoint, pictures
from genfast.training.runs.config import Config
from genfast.training.runs.devices import as_device
from genfast.training.runs.finite import refuse_not_finite
from genfast.training.runs.models import build_step
from genfast.training.steps.precision import resolve_precision

PNG = b"\x89PNG\r\n\x1a\n"  # How every file of that format begins.


def draw_noise(num, step, seed):
    """(num, *latent_shape) from N(0, 1): the same on every device, whatever training draws."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, *step.latent_shape, generator=generator).to(step.device)


def write_samples(step, noise, path):
    """Write a grid of the images that the networks of a step make of noise, as PNG."""
    images = torch.cat([step.sample(z) for z in noise.split(256)])
    pictures.save_grid(pictures.to_uint8(images, step.pixel_range), path)


def sample_checkpoint(path, num, out, *, device, seed=0, ema=True):
    """Write a grid of `num` new images by the networks of a checkpoint, as PNG.

    They are the average generator's where the run kept one, unless `ema` is False.

    Raises:
        BadInput: the checkpoint cannot be read, holds weights that are not finite, `out` is not the
            name of a picture, or an extra is not installed.
    """
    device = as_device(device)
    target = picture_file(out)
    content = checkpoint.read_checkpoint(path)
    config = Config.of_checkpoint(content, path)
    step = build_step(_drawn_here(config, device), device)
    checkpoint.restore_modules(step, content, path)
    refuse_not_finite(step.modules, path)
    if not ema:
        step.average = None
    write_samples(step, draw_noise(num, step, seed), target)


def picture_file(out):
    """Where a picture named `out` goes, links followed; BadInput if it must not be written there.

    It may be new, or take the place of a PNG or of an empty file. What is no plain file is not
    opened: that may block, or do something.
    """
    target = Path(os.path.realpath(out))
    if target.is_dir():
        raise BadInput(f"expected --out to be the name of a picture, got the folder {out}")
    if not target.parent.is_dir():
        raise BadInput(f"expected --out in a folder that exists, got {out}")
    if {Path(out).suffix.lower(), target.suffix.lower()} != {".png"}:
        raise BadInput(f"expected --out to end in .png, as PNG is what is written, got {out}")
    if os.path.lexists(target) and not _is_picture(target):
        raise BadInput(
            f"expected --out to be new or a PNG picture, got {out}, which is neither and stays as "
            f"it is"
        )
    return target


def _is_picture(path):
    if not stat.S_ISREG(path.stat().st_mode):
        return False
    with open(path, "rb") as file:
        return file.read(len(PNG)) in (PNG, b"")


def _drawn_here(config, device):
    """The settings, in float32 where the device has not the precision that trained the model."""
    try:
        resolve_precision(config.precision, device)
    except ValueError:
        return replace(config, precision="fp32")
    return config
