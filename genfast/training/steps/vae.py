"""One optimisation step of a VAE."""

import os
import shutil
from typing import NamedTuple

import torch

from genfast import functional, losses, reference
from genfast.training.steps.base import Step, adam, evaluating
from genfast.training.steps.updates import clear_gradients


class VAEResult(NamedTuple):
    """The loss of one step and its two parts in nats an image, scalar tensors on the device."""

    loss: torch.Tensor
    reconstruction: torch.Tensor
    kl: torch.Tensor


class VAEStep(Step):
    """Minimise the negative evidence lower bound of one batch (Kingma and Welling, 2014).

    As in PyTorch's public VAE example, what is minimised is the sum over the batch; the result
    holds nats an image.

    Args:
        model: has `encode(images) -> (mu, logvar)` and `decode(z) -> images in [0, 1]`; where it
            has `decode_logits`, the decoder before its sigmoid, that is taken.
        optimizer: of the model's parameters. By default Adam(lr=2e-4, betas=(0.5, 0.999)).
        precision, capture: as in `GANStep`.
        compile: whether `torch.compile` makes the forward and backward pass. A small model on a CPU
            trains faster so, after some 20 s for the first step. Needs `model.latent_dim`, and on
            a CPU a C++ compiler.

    Calling it with float images (N, C, H, W) in [0, 1] makes one step and returns a `VAEResult`.

    Attributes:
        why_not_captured: why not, in words; None where it is.

    Raises:
        ValueError: there is no such precision, or capture=True or compile=True and it cannot be.
    """

    pixel_range = (0.0, 1.0)
    weights_reused = False
    result_fields = VAEResult._fields
    _result = VAEResult

    def __init__(self, model, *, optimizer=None, precision="auto", capture=None, compile=False):
        self.model = model
        super().__init__({"model": model}, {"model": optimizer or adam(model)}, precision, capture)
        self._compiled_terms = None
        if compile:
            name = missing_compiler(self.device)
            if name:
                raise ValueError(
                    f"expected a C++ compiler for compile=True on a CPU, found no {name}"
                )
            self._compiled_terms = torch.compile(self._terms_given_noise)

    @property
    def latent_shape(self):
        """The shape of one image's latent."""
        return (self.model.latent_dim,)

    def _step(self, images):
        clear_gradients(self.optimizers["model"])
        if self._compiled_terms is None:
            minimised, *terms = self._terms(images, functional.reparameterize_with_kl)
        else:
            # Noise comes from outside: compiled code would draw other numbers.
            noise = torch.randn(len(images), *self.latent_shape, device=images.device)
            minimised, *terms = self._compiled_terms(images, noise)
        self._precision.backward(minimised, "model")
        self._precision.update("model")
        return tuple(terms)

    def _terms(self, images, sample):
        """What is minimised, and the terms of a `VAEResult`.

        sample: (mu, logvar) in float32 to latents and the KL divergence of each image.
        """
        with self._precision.autocast():
            mu, logvar = self.model.encode(images)
        z, kl = sample(losses.widen(mu), losses.widen(logvar))
        reconstruction, kl = self._reconstruction_loss(z, images), kl.sum()
        minimised = reconstruction + kl
        # Detached, or compiled code would provide for gradients that flow through these too.
        terms = (t.detach() / len(images) for t in (minimised, reconstruction, kl))
        return minimised, *terms

    def _terms_given_noise(self, images, noise):
        def sample(mu, logvar):
            kl = reference.kl_divergence(mu, logvar)
            return reference.reparameterize(mu, logvar, noise.to(mu.dtype)), kl

        return self._terms(images, sample)

    def _reconstruction_loss(self, z, images):
        logits = hasattr(self.model, "decode_logits")
        with self._precision.autocast():
            decoded = self.model.decode_logits(z) if logits else self.model.decode(z)
        return losses.reconstruction_loss(decoded, images, logits=logits)

    def _draw(self, z):
        with evaluating(self.model):
            return self.model.decode(z)


def missing_compiler(device):
    """The name of the C++ compiler that `torch.compile` needs for the device and that is missing.

    None if it has what it needs.
    """
    name = os.environ.get("CXX", "g++")  # As `torch.compile` chooses it.
    return name if device.type == "cpu" and shutil.which(name) is None else None
