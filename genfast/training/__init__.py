"""Training: data, steps, and runs, which leave checkpoints and pictures in a folder."""

from genfast.training.steps import GANResult, GANStep, VAEResult, VAEStep

__all__ = ["GANResult", "GANStep", "VAEResult", "VAEStep"]
