"""One optimisation step of a GAN or a VAE.

A step is an object that owns its networks and optimizers and is called with a batch. What it
returns stays on the device: nothing here waits for it.
"""

from genfast.training.steps.base import adam
from genfast.training.steps.gan import GANResult, GANStep
from genfast.training.steps.vae import VAEResult, VAEStep
from genfast.training.steps.vae_gan import VAEGANResult, VAEGANStep

__all__ = [
    "GANResult",
    "GANStep",
    "VAEGANResult",
    "VAEGANStep",
    "VAEResult",
    "VAEStep",
    "adam",
]
