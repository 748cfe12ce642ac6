"""The losses of GANs and VAEs, in at least float32 whatever the precision of the networks.

Those of logits are binary cross entropy, summed: one kernel each way on a GPU.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F

from genfast import autograd, operators, reference
from genfast.functional import implementation

__all__ = [
    "GAN_LOSSES",
    "LIKELIHOODS",
    "GANLoss",
    "discriminator_loss",
    "each_reconstruction_loss",
    "elbo_loss",
    "fake_loss",
    "gan_loss",
    "gaussian_reconstruction_loss",
    "iwae_loss",
    "kl_divergence",
    "real_loss",
    "reconstruction_loss",
]


def widen(t: torch.Tensor) -> torch.Tensor:
    """The tensor in float32, or as it is if wider: a loss in half precision loses its digits."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


class GANLoss(NamedTuple):
    """A GAN's loss, all of it exact for logits of any size: what minimises what.

    kind: how a logit is judged by its label, real or generated: a row of the table in
        kernels/losses.py.
    generator_kind: likewise for the generator's update, where generated images want to be taken for
        real ones.
    maximises: whether the generator instead maximises the discriminator's loss.
    paired: whether real and generated images are judged in pairs, by the difference of their
        logits: a real image wants to be more real than a generated one.

    Example:
        >>> hinge = GAN_LOSSES["hinge"]
        >>> hinge.discriminator(torch.tensor([0.5, -2.0])).item()  # Of a real, a generated image.
        0.5
        >>> hinge.generator(torch.tensor([-2.0])).item()
        2.0
    """

    kind: str
    generator_kind: str
    maximises: bool = False
    paired: bool = False

    def real(self, logits: torch.Tensor) -> torch.Tensor:
        """The discriminator's loss of real images' logits, of any shape: their mean, a scalar."""
        self._check_alone()
        return _loss(logits, logits.numel(), logits.numel(), self.kind)

    def fake(self, logits: torch.Tensor) -> torch.Tensor:
        """The discriminator's loss of generated images' logits: as `real`."""
        self._check_alone()
        return _loss(logits, 0, logits.numel(), self.kind)

    def discriminator(self, logits: torch.Tensor) -> torch.Tensor:
        """The discriminator's loss of logits (2 N, ...), of N real and then N generated images.

        The sum of `real` of the first half and `fake` of the second; of pairs, their mean.

        Raises:
            ValueError: there are no two halves.
        """
        _check_halves(logits)
        half = logits.numel() // 2
        return _loss(logits, half, half, self.kind, self.paired)

    def generator(self, logits: torch.Tensor) -> torch.Tensor:
        """The generator's loss of its images' logits: a scalar.

        Where images are judged in pairs, of logits as `discriminator` takes them.
        """
        if self.paired:
            _check_halves(logits)
            return _loss(logits, 0, logits.numel() // 2, self.generator_kind, paired=True)
        if self.maximises:
            return _loss(logits, 0, -logits.numel(), self.generator_kind)
        return _loss(logits, logits.numel(), logits.numel(), self.generator_kind)

    def _check_alone(self) -> None:
        if self.paired:
            raise ValueError(
                "expected real and generated images together, as this loss judges them in pairs, "
                "got logits of either alone"
            )


GAN_LOSSES = {
    # Goodfellow et al. (2014), end of section 3: the generator maximises log D(G(z)), where the
    # minimax game would have it minimise log(1 - D(G(z))).
    "non-saturating": GANLoss("logistic", "logistic"),
    # The same, equation 1.
    "minimax": GANLoss("logistic", "logistic", maximises=True),
    # Mao et al. (2017), with the labels 0 and 1.
    "lsgan": GANLoss("least-squares", "least-squares"),
    # Lim and Ye (2017); Miyato et al. (2018).
    "hinge": GANLoss("hinge", "linear"),
    # Arjovsky et al. (2017). The critic must be kept smooth by a penalty or by clipping.
    "wgan": GANLoss("linear", "linear"),
    # Jolicoeur-Martineau (2018); Huang et al. (2024).
    "rpgan": GANLoss("logistic", "logistic", paired=True),
}


def gan_loss(name: str) -> GANLoss:
    """The `GANLoss` of that name; ValueError if there is none.

    Example:
        >>> gan_loss("wgan").generator(torch.tensor([1.0, 3.0])).item()
        -2.0
    """
    if name not in GAN_LOSSES:
        raise ValueError(f"expected a loss among {tuple(GAN_LOSSES)}, got {name!r}")
    return GAN_LOSSES[name]


def real_loss(logits: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy of the discriminator's logits against the label 1: a scalar.

    The mean of -log(sigmoid(logits)), which is softplus(-logits) and exact for logits of any size.

    Example:
        >>> real_loss(torch.tensor([0.0, 100.0])).item()  # Half of log 2.
        0.3465735912322998
    """
    return GAN_LOSSES["non-saturating"].real(logits)


def fake_loss(logits: torch.Tensor) -> torch.Tensor:
    """Binary cross entropy of the discriminator's logits against the label 0: a scalar.

    The mean of -log(1 - sigmoid(logits)), which is softplus(logits).

    Example:
        >>> fake_loss(torch.tensor([-100.0, 100.0])).item()
        50.0
    """
    return GAN_LOSSES["non-saturating"].fake(logits)


def discriminator_loss(logits: torch.Tensor) -> torch.Tensor:
    """`real_loss` of the first half of the logits plus `fake_loss` of the second: a scalar.

    Args:
        logits: (2 N, ...), of N real images and then of as many generated ones.

    Raises:
        ValueError: there are no two halves.

    Example:
        >>> discriminator_loss(torch.tensor([-100.0, 100.0])).item()  # Both are judged wrongly.
        200.0
    """
    return GAN_LOSSES["non-saturating"].discriminator(logits)


def _check_halves(logits: torch.Tensor) -> None:
    if logits.dim() == 0 or len(logits) % 2:
        raise ValueError(
            f"expected logits of as many generated as real images, got shape {tuple(logits.shape)}"
        )


# What the pixels of an image are, given its latent: white with a probability, or normal.
LikelihoodName = Literal["bernoulli", "gaussian"]
LIKELIHOODS: tuple[LikelihoodName, ...] = get_args(LikelihoodName)


def reconstruction_loss(
    reconstruction: torch.Tensor, images: torch.Tensor, *, logits: bool = False
) -> torch.Tensor:
    """Binary cross entropy between images in [0, 1], summed over pixels and batch: a scalar.

    The images may have any shapes of (N, values) in all. A value between 0 and 1 is taken as the
    probability of a white pixel, as PyTorch's public VAE example takes it. With `logits` the
    reconstruction is what a sigmoid would make such values of: exact for logits of any size, where
    the example's loss ends at 100 nats a pixel, and one pass less.

    Raises:
        ValueError: the two differ in the number of images or of values, or in the device.

    Example:
        >>> images = torch.tensor([[0.0, 1.0]])
        >>> reconstruction_loss(torch.tensor([[0.0, 1.0]]), images).item()
        0.0
        >>> reconstruction_loss(torch.tensor([[-100.0, -100.0]]), images, logits=True).item()
        100.0
    """
    _check_alike(reconstruction, images)
    if logits:
        return _loss(reconstruction, images, count=1)
    reconstruction, images = widen(reconstruction).flatten(1), widen(images).flatten(1)
    return F.binary_cross_entropy(reconstruction, images, reduction="sum")


def gaussian_reconstruction_loss(
    reconstruction: torch.Tensor, images: torch.Tensor
) -> torch.Tensor:
    """Half the squared error between images and what a decoder made, summed: a scalar.

    That is -log N(images; reconstruction, 1), summed over pixels and batch, but for a constant of
    log(2 pi) / 2 = 0.919 a value: the decoder of Kingma and Welling (2014), appendix C.2, with its
    variance fixed at 1. The images may have any shapes of (N, values) in all.

    Raises:
        ValueError: as `reconstruction_loss`.

    Example:
        >>> gaussian_reconstruction_loss(torch.zeros(2, 3), torch.ones(2, 3)).item()
        3.0
    """
    _check_alike(reconstruction, images)
    if reconstruction.shape != images.shape:
        reconstruction, images = reconstruction.flatten(1), images.flatten(1)
    return 0.5 * F.mse_loss(widen(reconstruction), widen(images), reduction="sum")


def _check_alike(reconstruction: torch.Tensor, images: torch.Tensor) -> None:
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


def kl_divergence(mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)), summed over latent and batch: a scalar.

    The formula and its source: `genfast.reference.kl_divergence`.

    Example:
        >>> kl_divergence(torch.ones(2, 4), torch.zeros(2, 4)).item()
        4.0
    """
    return reference.kl_divergence(widen(mu), widen(logvar)).sum()


def elbo_loss(
    reconstruction: torch.Tensor, images: torch.Tensor, mu: torch.Tensor, logvar: torch.Tensor
) -> torch.Tensor:
    """The negative evidence lower bound, summed over the batch, in nats: a scalar.

    Takes what a VAE's forward returns, with the images it was given.

    Example:
        >>> images, mu = torch.tensor([[0.0, 1.0]]), torch.ones(1, 4)
        >>> elbo_loss(images, images, mu, torch.zeros(1, 4)).item()
        2.0
    """
    return reconstruction_loss(reconstruction, images) + kl_divergence(mu, logvar)


def each_reconstruction_loss(
    reconstruction: torch.Tensor,
    images: torch.Tensor,
    likelihood: LikelihoodName,
    *,
    logits: bool = False,
) -> torch.Tensor:
    """-log p(image | latent) of each of several reconstructions an image: (N, samples).

    Args:
        reconstruction: (N, samples, ...), of as many values as an image has, in any shape.
        images: (N, ...); not copied for the samples.
        likelihood: a name in `LIKELIHOODS`: the terms of `reconstruction_loss` or
            `gaussian_reconstruction_loss`, not summed over images.
        logits: as `reconstruction_loss` takes it.

    Example:
        >>> reconstruction = torch.zeros(2, 5, 3)
        >>> each_reconstruction_loss(reconstruction, torch.ones(2, 3), "gaussian").shape
        torch.Size([2, 5])
    """
    _check_alike(reconstruction[:, 0], images)
    x, images = widen(reconstruction).flatten(2), widen(images).flatten(1).unsqueeze(1)
    if likelihood == "gaussian":
        return 0.5 * (x - images).square().sum(2)
    images = images.expand_as(x)
    loss = F.binary_cross_entropy_with_logits if logits else F.binary_cross_entropy
    return loss(x, images, reduction="none").sum(2)


def iwae_loss(reconstruction: torch.Tensor, kl: torch.Tensor) -> torch.Tensor:
    """The negative importance-weighted bound, summed over the batch, in nats: a scalar.

    -log of the mean over samples of w = p(image | z) p(z) / q(z | image) (Burda et al., 2016,
    equation 8). Of one sample that is the negative evidence lower bound, with log q - log p at that
    sample in the place of the KL divergence.

    Args:
        reconstruction: -log p(image | z), (N, samples): `each_reconstruction_loss`.
        kl: log q(z | image) - log p(z), (N, samples): `functional.importance_samples`.

    Example:
        >>> iwae_loss(torch.ones(2, 5), torch.ones(2, 5)).item()  # All samples say the same.
        4.0
    """
    if reconstruction.shape != kl.shape or kl.dim() != 2:
        raise ValueError(
            "expected two tensors of one shape (N, samples), got shapes "
            f"{tuple(reconstruction.shape)} and {tuple(kl.shape)}"
        )
    log_weights = -(widen(reconstruction) + widen(kl))
    return (math.log(kl.shape[1]) - log_weights.logsumexp(1)).sum()


def _loss(
    logits: torch.Tensor,
    targets: torch.Tensor | int,
    count: int,
    kind: str = "logistic",
    paired: bool = False,
) -> torch.Tensor:
    """sum(f(logits, targets)) / count: a scalar, float32 or wider.

    Args:
        logits: of any shape.
        targets: for "logistic" probabilities of the label 1, as many as logits in the same order;
            or the number of labels 1, which belong to the first terms, and labels 0 to the others.
        count: an int, below 0 for the negative of a mean.
        kind, paired: as `reference.logit_loss` takes them.
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
        return operators.logit_loss(logits, targets, count, kind, paired)
    logit_loss = autograd.logit_loss if runs == "triton" else reference.logit_loss
    # The mean of no values is NaN, as PyTorch has it.
    return logit_loss(logits, targets, 1 / count if count else math.nan, kind, paired)


def _side_by_side(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as vectors, in the order that `logits` has in memory: then only `targets` is copied."""
    if logits.dim() == 4 and logits.shape == targets.shape and not logits.is_contiguous():
        logits, targets = (t.permute(0, 2, 3, 1) for t in (logits, targets))
    return logits.reshape(-1).contiguous(), targets.reshape(-1).contiguous()
