"""The losses of GANs and VAEs, in at least float32 whatever the precision of the networks."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from genfast import reference


def widen(t):
    """The tensor in float32, or as it is if wider: a loss in half precision loses its digits."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def real_loss(logits):
    """Binary cross entropy of the discriminator's logits against the label 1: a scalar.

    The mean of -log(sigmoid(logits)), which is softplus(-logits) and exact for logits of any size.
    """
    return F.softplus(-widen(logits)).mean()


def fake_loss(logits):
    """Binary cross entropy of the discriminator's logits against the label 0: a scalar.

    The mean of -log(1 - sigmoid(logits)), which is softplus(logits).
    """
    return F.softplus(widen(logits)).mean()


class GANLoss(NamedTuple):
    """What makes a GAN's loss: each function takes logits of any shape and gives a scalar.

    The discriminator minimises `real(D(x)) + fake(D(G(z)))`, the generator `generator(D(G(z)))`.
    """

    real: Callable
    fake: Callable
    generator: Callable


# Goodfellow et al. (2014), end of section 3: the generator maximises log D(G(z)), where the
# minimax game would have it minimise log(1 - D(G(z))). That is cross entropy against the label 1.
GAN_LOSSES = {"non-saturating": GANLoss(real=real_loss, fake=fake_loss, generator=real_loss)}


def gan_loss(name):
    """The `GANLoss` of that name; ValueError if there is none."""
    if name not in GAN_LOSSES:
        raise ValueError(f"expected a loss among {tuple(GAN_LOSSES)}, got {name!r}")
    return GAN_LOSSES[name]


def reconstruction_loss(reconstruction, images, *, logits=False):
    """Binary cross entropy between images in [0, 1], summed over pixels and batch: a scalar.

    The images may have any shapes of (N, values) in all. A value between 0 and 1 is taken as the
    probability of a white pixel, as PyTorch's public VAE example takes it. With `logits` the
    reconstruction is what a sigmoid would make such values of: exact for logits of any size, where
    the example's loss ends at 100 nats a pixel, and one pass less.
    """
    reconstruction, images = widen(reconstruction).flatten(1), widen(images).flatten(1)
    if logits:
        return F.binary_cross_entropy_with_logits(reconstruction, images, reduction="sum")
    return F.binary_cross_entropy(reconstruction, images, reduction="sum")


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
