"""Pictures of what a model makes of noise."""

from dataclasses import replace

import torch

from genfast.training.runs import checkpoint, pictures
from genfast.training.runs.config import Config, build_step
from genfast.training.runs.devices import as_device
from genfast.training.steps.precision import resolve_precision


def draw_noise(num, step, seed):
    """(num, *latent_shape) from N(0, 1): the same on every device, whatever training draws."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, *step.latent_shape, generator=generator).to(step.device)


def write_samples(step, noise, config, path):
    """Write a grid of the images that the networks of a step make of noise, as PNG."""
    images = torch.cat([step.sample(z) for z in noise.split(256)])
    images = images.reshape(-1, config.channels, config.image_size, config.image_size)
    pictures.save_grid(pictures.to_uint8(images, step.pixel_range), path)


def sample_checkpoint(path, num, out, *, device, seed=0):
    """Write a grid of `num` new images by the networks of a checkpoint, as PNG.

    Raises:
        BadInput: the checkpoint cannot be read, or an extra is not installed.
    """
    device = as_device(device)
    content = checkpoint.read_checkpoint(path)
    config = Config.of_checkpoint(content, path)
    step = build_step(_drawn_here(config, device), device)
    checkpoint.restore_modules(step, content, path)
    write_samples(step, draw_noise(num, step, seed), config, out)


def _drawn_here(config, device):
    """The settings, in float32 where the device has not the precision that trained the model."""
    try:
        resolve_precision(config.precision, device)
    except ValueError:
        return replace(config, precision="fp32")
    return config
