"""Training: data, steps, the loop, checkpoints and pictures."""

from genfast.training.step import GANResult, GANStep, VAEResult, VAEStep

__all__ = ["GANResult", "GANStep", "VAEResult", "VAEStep"]
