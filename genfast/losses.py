"""The losses of GANs and VAEs, in at least float32 whatever the precision of the networks.

Those of logits are binary cross entropy, summed: one kernel each way on a GPU.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from genfast import autograd, operators, reference
from genfast.functional import implementation


def widen(t):
    """The tensor in float32, or as it is if wider: a loss in half precision loses its digits."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def real_loss(logits):
    """Binary cross entropy of the discriminator's logits against the label 1: a scalar.

    The mean of -log(sigmoid(logits)), which is softplus(-logits) and exact for logits of any size.
    """
    return _logistic_loss(logits, logits.numel(), logits.numel())


def fake_loss(logits):
    """Binary cross entropy of the discriminator's logits against the label 0: a scalar.

    The mean of -log(1 - sigmoid(logits)), which is softplus(logits).
    """
    return _logistic_loss(logits, 0, logits.numel())


def discriminator_loss(logits):
    """`real_loss` of the first half of the logits plus `fake_loss` of the second: a scalar.

    Args:
        logits: (2 N, ...), of N real images and then of as many generated ones.

    Raises:
        ValueError: there are no two halves.
    """
    if logits.dim() == 0 or len(logits) % 2:
        raise ValueError(
            f"expected logits of as many generated as real images, got shape {tuple(logits.shape)}"
        )
    return _logistic_loss(logits, logits.numel() // 2, logits.numel() // 2)


class GANLoss(NamedTuple):
    """What makes a GAN's loss: each function takes logits of any shape and gives a scalar.

    The discriminator minimises `real(D(x)) + fake(D(G(z)))`, the generator `generator(D(G(z)))`.
    `discriminator` is that sum for logits (2 N, ...) of N real images and then N generated ones.
    """

    real: Callable
    fake: Callable
    generator: Callable
    discriminator: Callable


# Goodfellow et al. (2014), end of section 3: the generator maximises log D(G(z)), where the
# minimax game would have it minimise log(1 - D(G(z))). That is cross entropy against the label 1.
GAN_LOSSES = {
    "non-saturating": GANLoss(
        real=real_loss, fake=fake_loss, generator=real_loss, discriminator=discriminator_loss
    )
}


def gan_loss(name):
    """The `GANLoss` of that name; ValueError if there is none."""
    if name not in GAN_LOSSES:
        raise ValueError(f"expected a loss among {tuple(GAN_LOSSES)}, got {name!r}")
    return GAN_LOSSES[name]


# What the pixels of an image are, given its latent: white with a probability, or normal.
LIKELIHOODS = ("bernoulli", "gaussian")


def reconstruction_loss(reconstruction, images, *, logits=False):
    """Binary cross entropy between images in [0, 1], summed over pixels and batch: a scalar.

    The images may have any shapes of (N, values) in all. A value between 0 and 1 is taken as the
    probability of a white pixel, as PyTorch's public VAE example takes it. With `logits` the
    reconstruction is what a sigmoid would make such values of: exact for logits of any size, where
    the example's loss ends at 100 nats a pixel, and one pass less.

    Raises:
        ValueError: the two differ in the number of images or of values, or in the device.
    """
    _check_alike(reconstruction, images)
    if logits:
        return _logistic_loss(reconstruction, images, count=1)
    reconstruction, images = widen(reconstruction).flatten(1), widen(images).flatten(1)
    return F.binary_cross_entropy(reconstruction, images, reduction="sum")


def gaussian_reconstruction_loss(reconstruction, images):
    """Half the squared error between images and what a decoder made, summed: a scalar.

    That is -log N(images; reconstruction, 1), summed over pixels and batch, but for a constant of
    log(2 pi) / 2 = 0.919 a value: the decoder of Kingma and Welling (2014), appendix C.2, with its
    variance fixed at 1. The images may have any shapes of (N, values) in all.

    Raises:
        ValueError: as `reconstruction_loss`.
    """
    _check_alike(reconstruction, images)
    if reconstruction.shape != images.shape:
        reconstruction, images = reconstruction.flatten(1), images.flatten(1)
    return 0.5 * F.mse_loss(widen(reconstruction), widen(images), reduction="sum")


def _check_alike(reconstruction, images):
    if reconstruction.shape[:1] != images.shape[:1] or reconstruction.numel() != images.numel():
        raise ValueError(
            "expected a reconstruction of as many values as its images, got shapes "
            f"{tuple(reconstruction.shape)} and {tuple(images.shape)}"
        )
    if reconstruction.device != images.device:
        raise ValueError(
            "expected a reconstruction on the device of its images, got "
            f"{reconstruction.device} and {images.device}"
        )


def kl_divergence(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, 1)), summed over latent and batch: a scalar.

    The formula and its source: `genfast.reference.kl_divergence`.
    """
    return reference.kl_divergence(widen(mu), widen(logvar)).sum()


def elbo_loss(reconstruction, images, mu, logvar):
    """The negative evidence lower bound, summed over the batch, in nats: a scalar.

    Takes what a VAE's forward returns, with the images it was given.
    """
    return reconstruction_loss(reconstruction, images) + kl_divergence(mu, logvar)


def _logistic_loss(logits, targets, count):
    """sum(softplus(logits) - targets * logits) / count: a scalar, float32 or wider.

    That is binary cross entropy, -t log(sigmoid(x)) - (1 - t) log(1 - sigmoid(x)), summed.

    Args:
        logits: of any shape.
        targets: probabilities of the label 1, as many as logits in the same order; or the number of
            labels 1, which belong to the first logits, and labels 0 to the others.
        count: an int.
    """
    if isinstance(targets, torch.Tensor):
        logits, targets = _side_by_side(logits, targets)
        runs = implementation(logits, targets)
        if torch.is_grad_enabled() and targets.requires_grad:
            runs = "reference"
    else:
        logits = logits.reshape(-1).contiguous()
        runs = implementation(logits)
    if runs == "triton" and torch.compiler.is_compiling():
        return operators.logistic_loss(logits, targets, count)
    logistic_loss = autograd.logistic_loss if runs == "triton" else reference.logistic_loss
    # The mean of no values is NaN, as PyTorch has it.
    return logistic_loss(logits, targets, 1 / count if count else math.nan)


def _side_by_side(logits, targets):
    """Both as vectors, in the order that `logits` has in memory: then only `targets` is copied."""
    if logits.dim() == 4 and logits.shape == targets.shape and not logits.is_contiguous():
        logits, targets = (t.permute(0, 2, 3, 1) for t in (logits, targets))
    return logits.reshape(-1).contiguous(), targets.reshape(-1).contiguous()
