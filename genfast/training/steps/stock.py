"""The DCGAN step as PyTorch's public example writes it: what genfast's own is compared with."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F


class StockGANStep:
    """One update of a discriminator and then of a generator, with nothing left out.

    The discriminator judges real and generated images one after the other, and the generator's
    update computes the discriminator's gradients too. The arguments named are the improvements
    that users know; without them it is the example's step.

    Args:
        generator: (N, *latent_shape) to images.
        discriminator: images to N numbers, of whatever shape.
        optimizers: of the generator and of the discriminator.
        latent_shape: of one image's noise.
        criterion: (what the discriminator gives, flattened to (N,), and labels (N,)) to the mean
            loss. By default the example's, of probabilities.
        autocast: what to call for a context around forward passes and losses.
        frozen: whether the generator's update leaves out the gradients of the discriminator's
            weights.
        compiler: compiles the generator and both losses with the passes they need. The
            discriminator's two passes make one function then, so it may do with them what it can.

    Calling it with images (N, C, H, W), and optionally the noise (N, *latent_shape) that is drawn
    otherwise after the pass over the real images, makes a step and returns (d_loss, g_loss), scalar
    tensors on the device without a gradient.
    """

    def __init__(
        self,
        generator,
        discriminator,
        optimizers,
        *,
        latent_shape,
        criterion=F.binary_cross_entropy,
        autocast=nullcontext,
        frozen=False,
        compiler=None,
    ):
        self.generator, self.discriminator = generator, discriminator
        self.g_optimizer, self.d_optimizer = optimizers
        self._latent_shape, self._frozen = latent_shape, frozen
        self._ones = self._zeros = None

        def generate(z):
            with autocast():
                return generator(z)

        def loss_of(images, labels):
            with autocast():
                return criterion(discriminator(images).flatten(), labels)

        def both_losses(images, fakes, ones, zeros):
            return loss_of(images, ones) + loss_of(fakes, zeros)

        self._generate, self._loss, self._both_losses = generate, loss_of, None
        if compiler:
            self._generate, self._loss, self._both_losses = map(
                compiler, (generate, loss_of, both_losses)
            )

    def __call__(self, images, noise=None):
        """Make one step."""
        self._prepare_labels(images)
        self.discriminator.zero_grad()
        if self._both_losses is None:
            real_loss = self._loss(images, self._ones)
            real_loss.backward()
        if noise is None:
            noise = torch.randn(len(images), *self._latent_shape, device=images.device)
        fakes = self._generate(noise)
        if self._both_losses is None:
            fake_loss = self._loss(fakes.detach(), self._zeros)
            fake_loss.backward()
            d_loss = real_loss + fake_loss
        else:
            d_loss = self._both_losses(images, fakes.detach(), self._ones, self._zeros)
            d_loss.backward()
        self.d_optimizer.step()

        self.generator.zero_grad()
        if self._frozen:
            self.discriminator.requires_grad_(False)
        g_loss = self._loss(fakes, self._ones)
        g_loss.backward()
        self.g_optimizer.step()
        if self._frozen:
            self.discriminator.requires_grad_(True)
        return d_loss.detach(), g_loss.detach()

    def _prepare_labels(self, images):
        if self._ones is None or len(self._ones) != len(images):
            self._ones = torch.ones(len(images), device=images.device)
            self._zeros = torch.zeros_like(self._ones)


def loss_of_logits(logits, labels):
    """The example's loss for a discriminator that leaves its last sigmoid out."""
    return F.binary_cross_entropy(logits.sigmoid(), labels)
