"""Whole networks, each in one short file: GAN, DCGAN, VAE, ConvVAE and VAE/GAN."""

from genfast.models.dcgan import DCGANDiscriminator, DCGANGenerator, weights_init
from genfast.models.gan import GAN, GANDiscriminator, GANGenerator
from genfast.models.vae import VAE, ConvVAE
from genfast.models.vae_gan import VAEGAN, VAEGANDiscriminator, VAEGANEncoder

__all__ = [
    "GAN",
    "VAE",
    "VAEGAN",
    "ConvVAE",
    "DCGANDiscriminator",
    "DCGANGenerator",
    "GANDiscriminator",
    "GANGenerator",
    "VAEGANDiscriminator",
    "VAEGANEncoder",
    "weights_init",
]
