"""Training: data, steps, and runs, which leave checkpoints and pictures in a folder."""

from genfast.training.steps import (
    GANResult,
    GANStep,
    VAEGANResult,
    VAEGANStep,
    VAEResult,
    VAEStep,
)

__all__ = ["GANResult", "GANStep", "VAEGANResult", "VAEGANStep", "VAEResult", "VAEStep"]
