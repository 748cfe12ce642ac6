"""One optimisation step of a VAE/GAN (Larsen et al., 2016, arXiv:1512.09300)."""

from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import nn

from genfast import functional, losses
from genfast.nn import statistics_groups
from genfast.training.steps import vae_form
from genfast.training.steps.base import Step, adam, evaluating, frozen
from genfast.training.steps.merging import why_two_passes, why_unknown
from genfast.training.steps.precision import PrecisionName
from genfast.training.steps.spread import unwrapped


class VAEGANResult(NamedTuple):
    """The losses of one step, scalar tensors on the device.

    d_loss: the discriminator's. g_loss: the decoder's as a generator, of reconstructions and of
    samples. reconstruction and kl: in nats an image; the first is that of the features.

    Example:
        >>> VAEGANResult._fields
        ('d_loss', 'g_loss', 'reconstruction', 'kl')
    """

    d_loss: torch.Tensor
    g_loss: torch.Tensor
    reconstruction: torch.Tensor
    kl: torch.Tensor


class VAEGANStep(Step[VAEGANResult]):
    """Update the discriminator, then encoder and decoder: one step of a VAE/GAN.

    An image is encoded and decoded again, and another is decoded from noise. To the discriminator
    both are generated ones. The reconstruction is compared with the image by the discriminator's
    features: half the squared error, which is -log N(features; those of the reconstruction, 1) but
    for a constant. The losses are those of algorithm 1 of the paper:

        discriminator: real(x) + fake(reconstruction) + fake(sample)
        encoder:       KL divergence + reconstruction
        decoder:       gamma * reconstruction + generator(reconstruction) + generator(sample)

    Encoder and decoder are updated against the discriminator as it then is; the paper takes all
    gradients first. With loss="minimax" the generator's terms are the paper's, which vanish where
    the discriminator is sure; those of "non-saturating" do not.

    Args:
        encoder: images in [-1, 1] to the mean and log-variance of the latent, as a pair or under
            names such as `mu` and `logvar`, (N, ...) each.
        decoder: latents, of `latent_shape`, to images in [-1, 1].
        discriminator: has `features(images)` and `judge(features)`, which gives the logits.
        latent_shape: the shape of one image's latent, to which the encoder's are brought. By
            default the decoder's own `latent_shape`.
        gamma: the weight of reconstruction in the decoder's loss, from 0.
        loss: the name of a loss in `genfast.losses.GAN_LOSSES` that judges images alone.
        optimizers: of the encoder, the decoder and the discriminator, in this order. By default
            Adam(lr=2e-4, betas=(0.5, 0.999)) for each.
        precision, capture, image_range: as in `GANStep`.

    Calling it with images (N, C, H, W), floats in `image_range` or uint8, or with a list, tuple or
    dict of them, makes one step and returns a `VAEGANResult`.

    Attributes:
        why_not_merged: why the discriminator does not see its three batches in one pass, in words;
            None if it does.

    Raises:
        ValueError: there is no such loss, precision or gamma, capture=True and it cannot be, or an
            optimizer does not hold its network's parameters.
        TypeError: the discriminator has not both parts.

    Example:
        >>> from genfast.models import VAEGAN
        >>> model = VAEGAN(image_size=16, nz=8, ngf=4, ndf=4)
        >>> step = VAEGANStep(model.encoder, model.decoder, model.discriminator, precision="fp32")
        >>> result = step(torch.rand(2, 3, 16, 16) * 2 - 1)
        >>> step.sample(torch.randn(5, 8, 1, 1)).shape
        torch.Size([5, 3, 16, 16])
    """

    pixel_range = (-1.0, 1.0)
    weights_reused = True
    result_fields = VAEGANResult._fields
    discriminator: Any
    _result = VAEGANResult

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        discriminator: nn.Module,
        *,
        latent_shape: Sequence[int] | None = None,
        gamma: float = 1e-2,
        loss: str = "non-saturating",
        optimizers: Sequence[torch.optim.Optimizer] | None = None,
        precision: PrecisionName = "auto",
        capture: bool | None = None,
        image_range: Sequence[float] | None = None,
    ) -> None:
        self.encoder, self.decoder, self.discriminator = encoder, decoder, discriminator
        if not all(callable(getattr(discriminator, n, None)) for n in ("features", "judge")):
            raise TypeError(
                "expected a discriminator with features(images) and judge(features), got a "
                f"{type(discriminator).__name__}"
            )
        shape = getattr(decoder, "latent_shape", None) if latent_shape is None else latent_shape
        if not isinstance(shape, tuple | list):
            raise ValueError(f"expected latent_shape, or a decoder that has one, got {shape!r}")
        self.latent_shape = tuple(shape)
        if not (isinstance(gamma, Real | float) and 0 <= gamma < float("inf")):
            raise ValueError(f"expected gamma to be a number from 0, got {gamma!r}")
        self.gamma = float(gamma)
        self.loss = losses.gan_loss(loss)
        if self.loss.paired:
            raise ValueError(f"expected a loss that judges images alone for a VAE/GAN, got {loss}")
        networks = {"encoder": encoder, "decoder": decoder, "discriminator": discriminator}
        if unwrapped(networks)[1] is not None:
            raise ValueError("expected networks that one process trains, got them wrapped for many")
        optimizers = optimizers or [adam(network) for network in networks.values()]
        if len(optimizers) != 3:
            raise ValueError(
                "expected optimizers of the encoder, the decoder and the discriminator, in this "
                f"order, got {len(optimizers)}"
            )
        self.why_not_merged = why_two_passes(discriminator) or why_unknown(discriminator)
        super().__init__(
            networks,
            dict(zip(networks, optimizers, strict=True)),
            precision,
            capture,
            image_range=image_range,
        )

    def encode(
        self, images: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean and the log-variance of images' latents, (N, *latent_shape) each, in float32.

        By the running statistics of batch norms, as `sample` draws. `images` are what a step takes;
        labels are taken by none of these networks.
        """
        images = self._floats(self._brought(images))
        shape = len(images), *self.latent_shape
        with (
            torch.no_grad(),
            self._labels.given(labels, images),
            self._precision.products(),
            self._precision.autocast(),
            evaluating(self.encoder),
        ):
            found = vae_form.posterior(self.encoder(images))
        mu, logvar = (losses.widen(t).reshape(shape) for t in found)
        return mu, logvar

    def _step(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        images = self._floats(images)
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        made, kl = self._reconstructed(images)
        z = torch.randn(len(images), *self.latent_shape, device=images.device, dtype=images.dtype)
        with self._precision.autocast():
            drawn = self.decoder(z)
        d_loss = self._update_discriminator(images, made.detach(), drawn.detach())
        return d_loss, *self._update_coders(images, made, drawn, kl)

    def _reconstructed(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the decoder makes of the images' latents, and the KL divergence in nats an image."""
        with self._precision.autocast():
            mu, logvar = vae_form.posterior(self.encoder(images))
        z, kl = functional.reparameterize_with_kl(losses.widen(mu), losses.widen(logvar))
        with self._precision.autocast():
            made = self.decoder(z.reshape(len(images), *self.latent_shape))
        if made.shape != images.shape:
            raise ValueError(
                f"expected images of the shape the decoder makes, {tuple(made.shape)}, got "
                f"{tuple(images.shape)}"
            )
        return made, kl.sum() / len(images)

    def _update_discriminator(self, *batches: torch.Tensor) -> torch.Tensor:
        """On real images, reconstructions and samples."""
        with self._precision.autocast():
            if self.why_not_merged:
                logits = [self._judged(self._features(images)) for images in batches]
            else:
                with statistics_groups(self.discriminator, len(batches)):
                    logits = self._judged(self._features(torch.cat(batches))).chunk(len(batches))
        real, made, drawn = logits
        loss = self.loss.real(real) + self.loss.fake(made) + self.loss.fake(drawn)
        self._precision.backward(loss, "discriminator")
        self._precision.update("discriminator", refresh=True)
        self.optimizers["discriminator"].zero_grad(set_to_none=True)
        return loss.detach()

    def _update_coders(
        self, images: torch.Tensor, made: torch.Tensor, drawn: torch.Tensor, kl: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        with frozen(self.discriminator):
            with self._precision.autocast():
                with torch.no_grad():
                    wanted = self._features(images)
                features = self._features(made)
                logits = self._judged(features), self._judged(self._features(drawn))
            reconstruction = losses.gaussian_reconstruction_loss(features, wanted) / len(images)
            g_loss = self.loss.generator(logits[0]) + self.loss.generator(logits[1])
            # One graph, two losses: each trains its own network alone.
            self._precision.backward(
                reconstruction + kl, "encoder", inputs=self._trained("encoder"), again=True
            )
            self._precision.backward(
                self.gamma * reconstruction + g_loss, "decoder", inputs=self._trained("decoder")
            )
        self._precision.update("encoder")
        self._precision.update("decoder")
        return g_loss.detach(), reconstruction.detach(), kl.detach()

    def _trained(self, name: str) -> list[nn.Parameter]:
        return [p for p in self.modules[name].parameters() if p.requires_grad]

    def _features(self, images: torch.Tensor) -> torch.Tensor:
        return self.discriminator.features(images)

    def _judged(self, features: torch.Tensor) -> torch.Tensor:
        return self.discriminator.judge(features)

    def _draw(self, z: torch.Tensor) -> torch.Tensor:
        with evaluating(self.decoder):
            return self.decoder(z)
