"""Trained models, from a checkpoint to images."""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from genfast.training.errors import BadInput
from genfast.training.image_range import OVERSHOOT, brought
from genfast.training.runs import checkpoint, latents
from genfast.training.runs.classes import in_parts, labels_given, labels_of_samples
from genfast.training.runs.config import Config
from genfast.training.runs.devices import as_device
from genfast.training.runs.example_weights import are_example_weights, example_weights
from genfast.training.runs.finite import refuse_not_finite
from genfast.training.runs.models import build_step
from genfast.training.runs.rules import Rule, shown, whole
from genfast.training.runs.settings import RULES
from genfast.training.steps.precision import resolve_precision

__all__ = ["Trained", "load"]

# See `Trained`.
Labels = str | int | Sequence[str | int] | torch.Tensor | None
AT_ONCE = 256  # Images that run through a network together: as many as a GPU is busy with.


def load(
    path: str | os.PathLike, device: str | torch.device = "auto", *, ema: bool = True
) -> "Trained":
    """A trained model, ready to draw.

        >>> model = load("runs/gan-digits", "cpu")
        >>> images = model.sample(64)
        >>> images.shape
        torch.Size([64, 1, 8, 8])

    Args:
        path: a checkpoint, the folder of a run, or weights of the generator of PyTorch's public
            DCGAN example (netG_epoch_24.pth).
        device: a `torch.device`, or "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        ema: whether images are drawn by the average of a generator where the run kept one.

    Returns:
        A `Trained`.

    Raises:
        BadInput: the checkpoint cannot be read, holds weights that are not finite, or this machine
            has no such device.
    """
    device = as_device(device)
    file = opened(path)
    file.check_draws()
    step = drawing_step(file, device)
    if not ema:
        step.average = None
    for module in step.modules.values():
        module.eval()
    return Trained(file.config, step, file.path, file.content["steps"])


class Opened(NamedTuple):
    """A file of trained weights.

    path: its path.
    config: the `Config` of its run; of PyTorch's public example, one that gives such networks.
    content: what `read_checkpoint` gives; of the example, steps and modules alone.
    alone: the name of the only network whose weights there are; None in a checkpoint.
    shapes: then the names of the settings that are known; else none.
    """

    path: Path
    config: Config
    content: dict[str, Any]
    alone: str | None = None
    shapes: tuple[str, ...] = ()

    def check_draws(self) -> None:
        """BadInput if no images can be drawn."""
        if self.alone == "discriminator":
            raise BadInput(
                f"expected weights that draw images, got those of a discriminator alone in "
                f"{self.path}"
            )


def opened(path: Any) -> Opened:
    """What a checkpoint holds, given by itself or by its run's folder, or a file of the example.

    Raises:
        BadInput: it cannot be read, or is something else.
    """
    path = checkpoint.file_of(path)
    content = checkpoint.read_file(path)
    if are_example_weights(content):
        found = example_weights(content, path)
        content = {"steps": 0, "modules": {found.network: found.state}}
        return Opened(path, found.config(), content, found.network, tuple(found.settings))
    content = checkpoint.check_content(content, path)
    return Opened(path, Config.of_checkpoint(content, path), content)


def drawing_step(file: Opened, device: torch.device) -> Any:
    """A step with the networks of a file, to draw from and not to go on training.

    What a file of one network lacks has fresh weights.

    In float32 where the device has not the precision that trained them.

    Args:
        file: what `opened` gave, or with another precision.
        device: a `torch.device`.

    Raises:
        BadInput: the weights are not finite, or those of another architecture.
    """
    step = build_step(_drawn_here(file.config, device), device)
    names = [file.alone] if file.alone else None
    checkpoint.restore_modules(step, file.content, file.path, names)
    refuse_not_finite(step.modules, file.path)
    return step


class Trained:
    """A trained model. Images are floats in [0, 1], (N, C, H, W), in float32 on its device.

    Attributes:
        config: the `Config` of the run.
        path: the checkpoint's `Path`.
        steps: after how many training steps that was written; 0 of the public example's weights,
            which do not tell.
        generator: a GAN's generator as images are drawn by it, in evaluation mode; None of a VAE.
        model: the VAE, in evaluation mode; None of a GAN.
        device: where the networks are.
        latent_shape: the shape of one image's latent, whose prior is N(0, 1).
        image_shape: (C, H, W).
        classes: the names of a conditional model's classes; None of another model.

    A conditional model takes `labels` beside images and latents: a name or number of a class for
    all of them, or one for each: a list of these, or a tensor of whole numbers into `classes`.

    Example:
        >>> model = load("runs/gan-digits", "cpu")
        >>> model
        <gan of 1 x 8 x 8 after 1 steps: runs/gan-digits/checkpoint.pt>
        >>> model.interpolate(start=0, end=1, num=3).shape
        torch.Size([3, 1, 8, 8])
    """

    def __init__(self, config: Config, step: Any, path: str | os.PathLike, steps: int) -> None:
        self.config, self.path, self.steps = config, Path(path), steps
        self.classes = config.classes
        self.device, self.latent_shape = step.device, tuple(step.latent_shape)
        self.image_shape = config.image_shape
        self.model = step.modules.get("model")
        average = getattr(step, "average", None)
        self.generator = average.module if average else step.modules.get("generator")
        self._step = step

    def __repr__(self) -> str:
        c, h, w = self.image_shape
        return f"<{self.config.model} of {c} x {h} x {w} after {self.steps} steps: {self.path}>"

    def sample(self, num: int, seed: int = 0, labels: Labels = None) -> torch.Tensor:
        """Draw `num` new images: the same for a seed on every device, up to rounding.

        labels: see above. None: as many of each class, class by class.

        Raises:
            BadInput: the number or the seed is none, or the labels are not such.
        """
        z = self.noise(num, seed)
        return self.decode(z, labels_of_samples(self.config, num) if labels is None else labels)

    def noise(self, num: int, seed: int = 0) -> torch.Tensor:
        """The latents of `sample`, (num, *latent_shape) on the CPU."""
        return next(self._draws(num, seed))

    def _draws(self, num: int, seed: int) -> Iterator[torch.Tensor]:
        _check("num", whole(), num)
        _check("seed", RULES["seed"], seed)
        return latents.draws(num, self.latent_shape, seed)

    def decode(self, z: torch.Tensor, labels: Labels = None) -> torch.Tensor:
        """The images that latents stand for, (N, *latent_shape) to (N, C, H, W).

        z: of any device and dtype of floats. labels: see above.
        """
        if not isinstance(z, torch.Tensor) or tuple(z.shape[1:]) != self.latent_shape:
            raise BadInput(f"expected latents (N, {_listed(self.latent_shape)}), got {_came(z)}")
        low, high = self._step.pixel_range
        parts = self._parts(z.to(self.device, torch.float32), labels)
        images = torch.cat([self._step.sample(*part) for part in parts])
        return ((images - low) / (high - low)).clamp(0, 1)

    def _parts(
        self, tensor: torch.Tensor, labels: Labels
    ) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """(part, its labels or None) of as many as run together."""
        labels = labels_given(self.config, len(tensor), labels)
        return in_parts(tensor, labels, AT_ONCE)

    def encode(
        self, images: torch.Tensor, labels: Labels = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean and log-variance of images' latents, (N, *latent_shape) each, by a VAE.

        images: (N, C, H, W) of the model's size, floats in [0, 1] or uint8, of any device. labels:
            see above.

        Raises:
            BadInput: the model is no VAE, or the images or labels are not such.
        """
        self.check_encodes("encode images")
        images = self._checked_images(images).to(self.device)
        found = [self._step.encode(*part) for part in self._parts(images, labels)]
        mu, logvar = (torch.cat(parts) for parts in zip(*found, strict=True))
        return mu, logvar

    def reconstruct(self, images: torch.Tensor, labels: Labels = None) -> torch.Tensor:
        """What a VAE makes of images, by the means of their latents: as `encode` takes them."""
        self.check_encodes("reconstruct images")
        return self.decode(self.encode(images, labels)[0], labels)

    def interpolate(self, start: int, end: int, num: int, labels: Labels = None) -> torch.Tensor:
        """`num` images on the way from `sample(1, start)` to `sample(1, end)`, spherically.

        See `latents.between`. labels: see above.
        """
        _check("num", whole(), num)
        a, b = (self.noise(1, seed)[0] for seed in (start, end))
        return self.decode(latents.between(a, b, num), labels)

    def walk(self, num: int, frames: int, seed: int = 0, labels: Labels = None) -> torch.Tensor:
        """`num` closed walks through the latent space, of as many frames each.

        labels: of the walks, as `sample` takes them.

        Returns:
            (frames, num, C, H, W); the first frame is `sample(num, seed)` and follows the last.
        """
        _check("frames", whole(), frames)
        first, second = islice(self._draws(num, seed), 2)
        z = latents.around(first, second, frames)
        if labels is None:
            labels = labels_of_samples(self.config, num)
        labels = labels_given(self.config, num, labels)
        every = None if labels is None else labels.repeat(frames)
        return self.decode(z.flatten(0, 1), every).unflatten(0, (frames, num))

    def manifold(self, side: int, labels: Labels = None) -> torch.Tensor:
        """side x side images over the latent plane of a VAE: see `latents.quantiles`.

        labels: see above.

        Raises:
            BadInput: the model is no VAE whose latent has two dimensions.
        """
        _check("side", whole(), side)
        if self.model is None or self.latent_shape != (2,):
            raise BadInput(
                f"expected a VAE with a latent of two dimensions (--nz 2) for a manifold, got a "
                f"{self.config.model} with --nz {self.latent_shape[0]} in {self.path}"
            )
        return self.decode(latents.quantiles(side), labels)

    def check_encodes(self, purpose: str) -> None:
        if not hasattr(self._step, "encode"):
            raise BadInput(f"expected a VAE to {purpose}, got a {self.config.model} in {self.path}")

    def _checked_images(self, images: object) -> torch.Tensor:
        """Images as the step takes them: floats in its `pixel_range`, or uint8."""
        if isinstance(images, torch.Tensor) and images.shape[1:] == self.image_shape:
            if images.dtype == torch.uint8:
                return images
            if images.is_floating_point():
                _check_range(images)
                return brought(images.float(), (0.0, 1.0), self._step.pixel_range)
        raise BadInput(
            f"expected floats or uint8 images (N, {_listed(self.image_shape)}), got {_came(images)}"
        )


def _check_range(images: torch.Tensor) -> None:
    if not images.numel():
        return
    low, high = (v.item() for v in images.aminmax())
    if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):
        raise BadInput(f"expected images in [0, 1], got values from {low:g} to {high:g}")


def _listed(shape: Iterable[int]) -> str:
    return ", ".join(map(str, shape))


def _came(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return shown(value)


def _check(name: str, rule: Rule, value: object) -> None:
    if not rule.allows(value):
        raise BadInput(f"expected {name} to be {rule.expected}, got {shown(value)}")


def _drawn_here(config: Config, device: torch.device) -> Config:
    """The settings, in float32 where the device has not the precision that trained the model."""
    try:
        resolve_precision(config.precision, device)
    except ValueError:
        return replace(config, precision="fp32")
    return config
