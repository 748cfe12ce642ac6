"""What is trained: a model with its weights, the shape of its images, and a batch of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import nn

from genfast.models import GAN, VAE, ConvVAE, DCGANDiscriminator, DCGANGenerator
from genfast.models.sizes import height_and_width
from genfast.nn import FusedBlock
from genfast.training.data import load_images, normalize

SEED = 0
_ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "identity": nn.Identity}


class Model(NamedTuple):
    """A model that is timed: one row of `MODELS`.

    build: a function of (the images' shape, the channels next to the image of networks of
        convolutions) that gives (generator, discriminator), or (vae,).
    batch_size, image_size: as PyTorch's public examples have them.
    channels: of the images.
    is_vae: whether a step trains one model rather than two against each other.
    """

    build: Callable
    batch_size: int
    image_size: int
    channels: int
    is_vae: bool = False


def _gan(shape, width):
    gan = GAN(shape)
    return gan.generator, gan.discriminator


def _dcgan(shape, width):
    images = dict(nc=shape[0], image_size=shape[1:])
    return DCGANGenerator(ngf=width, **images), DCGANDiscriminator(ndf=width, **images)


def _vae(shape, width):
    return (VAE(math.prod(shape)),)


def _conv_vae(shape, width):
    return (ConvVAE(shape[0], shape[1:], width=width // 2),)


# MNIST's images for the perceptrons, 64 x 64 RGB for the convolutions.
MODELS = {
    "gan": Model(_gan, 128, 28, 1),
    "dcgan": Model(_dcgan, 64, 64, 3),
    "vae": Model(_vae, 128, 28, 1, is_vae=True),
    "conv-vae": Model(_conv_vae, 64, 64, 3, is_vae=True),
}


@dataclass(frozen=True)
class Workload:
    """A model at a batch size and image size on a device.

    model: one of `MODELS`.
    image_size: an int for squares, or text such as "96x64", height first.
    width: channels next to the image of the networks of convolutions (ngf and ndf).
    shake, shake_seed: change each weight by up to this share of itself, at random.
    """

    model: str
    batch_size: int
    image_size: int | str
    device: torch.device
    width: int = 64
    shake: float = 0.0
    shake_seed: int = 0

    @classmethod
    def of(cls, model, device, batch_size=None, image_size=None):
        """The model as PyTorch's public examples have it, but for what is given."""
        return cls(
            model,
            batch_size or MODELS[model].batch_size,
            image_size or MODELS[model].image_size,
            device,
        )

    @property
    def is_vae(self):
        """Whether a step trains one model rather than two against each other."""
        return MODELS[self.model].is_vae

    @property
    def image_shape(self):
        """(C, H, W)."""
        return MODELS[self.model].channels, *height_and_width(self.image_size)

    def images(self):
        """The same float batch every time, on the device, in the range the model expects.

        Real images, digits or photos: on noise a VAE's loss hardly moves, whatever it does.
        """
        images = _images("photos" if self.image_shape[0] == 3 else "digits", self.image_size)
        chosen = torch.arange(self.batch_size) % len(images)
        pixel_range = (0.0, 1.0) if self.is_vae else (-1.0, 1.0)
        return normalize(images[chosen], pixel_range).to(self.device)

    def networks(self, dropout=True):
        """(generator, discriminator) or (vae,), with the same weights every time.

        Without `dropout` nothing is random but the noise that the step draws.
        """
        torch.manual_seed(SEED)
        networks = MODELS[self.model].build(self.image_shape, self.width)
        for module in (m for network in networks for m in network.modules()):
            if isinstance(module, nn.Dropout) and not dropout:
                module.p = 0.0
        if self.shake:
            generator = torch.Generator().manual_seed(self.shake_seed)
            for p in (p for network in networks for p in network.parameters()):
                noise = torch.rand(p.shape, generator=generator) * 2 - 1
                p.data.mul_(1 + self.shake * noise)
        return tuple(network.to(self.device) for network in networks)


@cache
def _images(source, size):
    return load_images(source, size)


def stock(module):
    """Replace genfast's containers inside a model by PyTorch's, which hold the same layers."""
    for name, child in module.named_children():
        setattr(module, name, stock(child))
    if isinstance(module, FusedBlock):
        activation = _ACTIVATIONS[module.activation]
        last = activation(0.2, True) if activation is nn.LeakyReLU else activation()
        return nn.Sequential(*module.children(), last)
    if isinstance(module, nn.Sequential):
        return nn.Sequential(*module)
    return module
