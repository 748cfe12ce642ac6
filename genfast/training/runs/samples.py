"""Pictures of what a model draws, and where they may be written: over nobody's files."""

import os
import stat
from itertools import starmap
from pathlib import Path

import torch

from genfast.training.errors import BadInput
from genfast.training.runs import latents, pictures
from genfast.training.runs.classes import NUM, in_parts, labels_of_samples, row_length
from genfast.training.runs.trained import AT_ONCE, load

# How every file of a format begins, by the ending of its name.
SIGNATURES = {".png": b"\x89PNG\r\n\x1a\n", ".gif": b"GIF8"}


def draw_noise(num, step, seed):
    """(num, *latent_shape) from N(0, 1): the same on every device, whatever training draws."""
    return next(latents.draws(num, step.latent_shape, seed)).to(step.device)


def write_samples(step, noise, path, labels=None):
    """Write a grid of the images that the networks of a step make of noise, as PNG.

    labels: int64, one a row of noise, those of a class together, for networks that take them. Then
        a row of the grid holds one class, unless all are of one.

    Returns:
        Its pixels, uint8 (C, H, W).
    """
    images = torch.cat([step.sample(*part) for part in in_parts(noise, labels, AT_ONCE)])
    pixels = pictures.grid(pictures.to_uint8(images, step.pixel_range), row_length(labels))
    pictures.save_png(pixels, path)
    return pixels


def sample_checkpoint(path, num, out, *, device, seed=0, ema=True, of_class=None):
    """Write `num` new images by the networks of a checkpoint to `out`, as `images_to` does.

    They are the average generator's where the run kept one, unless `ema` is False.

    Args:
        path: the checkpoint, or the folder of its run.
        num: how many. None: 64, or of a conditional model as `labels_of_samples` has it.
        out: the name of a picture or folder.
        device: a `torch.device` or its name.
        seed: of the noise.
        ema: see above.
        of_class: as `labels_of_samples` takes it, for a conditional model.

    Raises:
        BadInput: the checkpoint cannot be read, holds weights that are not finite, there is no such
            class, nothing must be written to `out`, or an extra is not installed.
    """
    model = load(path, device, ema=ema)
    labels = labels_of_samples(model.config, num, of_class)
    num = (num or NUM) if labels is None else len(labels)
    write = images_to(out, num, row_length(labels))
    write(starmap(model.decode, in_parts(model.noise(num, seed), labels, AT_ONCE)))


def images_to(out, num, columns=None):
    """How to write `num` images: a function of them in parts, floats in [0, 1], (N, C, H, W) each.

    It writes a grid of `columns` (None: about square) to `out`, a PNG; or if `out` ends in a slash,
    single pictures into that folder, 00000.png and so on, of the images' own size.

    Raises:
        BadInput: nothing must be written there. That is looked at here, before any work.
    """
    if str(out).endswith(tuple(filter(None, (os.sep, os.altsep)))):
        paths = _new_pictures(out, num)
        return lambda parts: _save_each(parts, paths)
    target = picture_file(out)
    return lambda parts: pictures.save_grid(_levels(torch.cat([*parts])), target, columns)


def walk_to(out, seconds):
    """How to write a walk: a function of floats in [0, 1], (frames, N, C, H, W).

    It writes a GIF whose frames are grids, shown for so many seconds each.

    Raises:
        BadInput: nothing must be written to `out`. That is looked at here, before any work.
    """
    target = picture_file(out, ".gif")

    def write(frames):
        grids = [pictures.grid(_levels(images)) for images in frames]
        pictures.save_gif(grids, target, seconds)

    return write


def picture_file(out, ending=".png"):
    """Where a picture named `out` goes, links followed; BadInput if it must not be written there.

    It may be new, or take the place of a picture of the same format or of an empty file. What is no
    plain file is not opened: that may block, or do something.
    """
    target, name = Path(os.path.realpath(out)), ending[1:].upper()
    if target.is_dir():
        hint = f", which takes single pictures as {os.path.join(out, '')}" * (ending == ".png")
        raise BadInput(f"expected --out to be the name of a picture, got the folder {out}{hint}")
    _check_parent(target, out)
    if {Path(out).suffix.lower(), target.suffix.lower()} != {ending}:
        raise BadInput(
            f"expected --out to end in {ending}, as {name} is what is written, got {out}"
        )
    if os.path.lexists(target) and not _is_picture(target, SIGNATURES[ending]):
        raise BadInput(
            f"expected --out to be new or a {name} picture, got {out}, which is neither and stays "
            f"as it is"
        )
    return target


def _new_pictures(out, num):
    """The paths of `num` pictures in the folder `out`; BadInput if one of them is there already."""
    folder = Path(out)
    if os.path.lexists(folder) and not folder.is_dir():
        raise BadInput(
            f"expected --out to be a folder, as it ends in a slash, got the file {folder}"
        )
    _check_parent(folder, out)
    digits = max(5, len(str(num - 1)))
    names = [f"{i:0{digits}d}.png" for i in range(num)]
    there = {name.lower() for name in os.listdir(folder)} if folder.is_dir() else set()
    taken = next((name for name in names if name in there), None)  # Some systems ignore case.
    if taken:
        raise BadInput(
            f"expected --out to be a folder without pictures of these names, got {folder / taken}, "
            f"which stays as it is: give another --out"
        )
    return [folder / name for name in names]


def _check_parent(path, out):
    if not path.parent.is_dir():
        raise BadInput(f"expected --out in a folder that exists, got {out}")


def _save_each(parts, paths):
    paths[0].parent.mkdir(exist_ok=True)
    images = (pixels for part in parts for pixels in _levels(part).cpu())
    for pixels, path in zip(images, paths, strict=True):
        with open(path, "xb") as file:  # Not over what has come there meanwhile.
            pictures.write_png(pixels, file)


def _levels(images):
    return pictures.to_uint8(images, (0, 1))


def _is_picture(path, signature):
    if not stat.S_ISREG(path.stat().st_mode):
        return False
    with open(path, "rb") as file:
        return file.read(len(signature)) in (signature, b"")
