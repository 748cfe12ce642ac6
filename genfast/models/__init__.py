"""Whole networks, each in one short file: GAN, DCGAN, VAE and ConvVAE."""

from genfast.models.dcgan import DCGANDiscriminator, DCGANGenerator, weights_init
from genfast.models.gan import GAN, GANDiscriminator, GANGenerator
from genfast.models.vae import VAE, ConvVAE

__all__ = [
    "GAN",
    "VAE",
    "ConvVAE",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "GANDiscriminator",
    "GANGenerator",
    "weights_init",
]
