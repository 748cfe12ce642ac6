"""One optimisation step of a GAN."""

from contextlib import contextmanager
from typing import NamedTuple

import torch

from genfast import losses
from genfast.nn import statistics_groups
from genfast.training.steps.base import Step, adam, evaluating
from genfast.training.steps.merging import converts_its_input, why_not_merged
from genfast.training.steps.updates import clear_gradients


class GANResult(NamedTuple):
    """The losses of one step, scalar tensors on the device."""

    d_loss: torch.Tensor
    g_loss: torch.Tensor


class GANStep(Step):
    """Update the discriminator on real and generated images, then the generator: one GAN step.

    The order and the losses are those of Goodfellow et al. (2014), algorithm 1 with k = 1, as
    PyTorch's public DCGAN example has them: the generated images of both updates are the same.

    Args:
        generator: (N, *latent_shape) to images in [-1, 1].
        discriminator: images to logits.
        latent_shape: the shape of one image's noise.
        loss: the name of a loss in `genfast.losses`.
        optimizers: of the generator and of the discriminator, in this order. By default
            Adam(lr=2e-4, betas=(0.5, 0.999)) for each.
        precision: "auto", "fp32", "tf32", "bf16" or "fp16"; see `resolve_precision`.
        merge: whether the discriminator sees real and generated images in one pass, with batch
            statistics of their own. None: where its layers are known to allow it. True is for a
            discriminator with a `forward` of its own that treats images one by one.
        capture: whether the step runs as one CUDA graph. None: where that is possible. Then an
            optimizer's learning rates are tensors; schedulers and plain numbers still set them.

    Calling it with float images (N, C, H, W) in [-1, 1] makes one step and returns a `GANResult`.

    Attributes:
        why_not_merged, why_not_captured: why not, in words; None where it is.

    Raises:
        ValueError: there is no such loss or precision, or capture=True and it cannot be.
    """

    pixel_range = (-1.0, 1.0)
    weights_reused = True
    result_fields = GANResult._fields
    _result = GANResult

    def __init__(
        self,
        generator,
        discriminator,
        *,
        latent_shape=(100, 1, 1),
        loss="non-saturating",
        optimizers=None,
        precision="auto",
        merge=None,
        capture=None,
    ):
        self.generator = generator
        self.discriminator = discriminator
        self.latent_shape = tuple(latent_shape)
        self.loss = losses.gan_loss(loss)
        g_optimizer, d_optimizer = optimizers or (adam(generator), adam(discriminator))
        reason = why_not_merged(discriminator)
        self._converts = reason is None and converts_its_input(discriminator)
        if merge is not None:
            reason = None if merge else "it was switched off"
        self.why_not_merged = reason
        super().__init__(
            {"generator": generator, "discriminator": discriminator},
            {"generator": g_optimizer, "discriminator": d_optimizer},
            precision,
            capture,
        )

    def _step(self, images):
        for optimizer in self.optimizers.values():
            clear_gradients(optimizer)
        z = torch.randn(len(images), *self.latent_shape, device=images.device, dtype=images.dtype)
        with self._precision.autocast():
            fakes = self.generator(z)
        if fakes.shape != images.shape:
            raise ValueError(
                f"expected images of the shape the generator makes, {tuple(fakes.shape)}, got "
                f"{tuple(images.shape)}"
            )
        return self._update_discriminator(images, fakes.detach()), self._update_generator(fakes)

    def _update_discriminator(self, reals, fakes):
        if self.why_not_merged:
            # The first pass's graph is gone before the second pass.
            loss = self._backward(self._judge(reals), self.loss.real, "discriminator")
            loss = loss + self._backward(self._judge(fakes), self.loss.fake, "discriminator")
        else:
            if self._converts:
                reals = reals.to(fakes.dtype)  # Less to concatenate than what `cat` would make.
            with statistics_groups(self.discriminator, 2):
                logits = self._judge(torch.cat([reals, fakes]))
            loss = self._backward(logits, self.loss.discriminator, "discriminator")
        self._precision.update("discriminator")
        # The gradients' memory serves the generator's update.
        clear_gradients(self.optimizers["discriminator"])
        self._precision.refresh("discriminator")
        return loss

    def _update_generator(self, fakes):
        with _frozen(self.discriminator):
            loss = self._backward(self._judge(fakes), self.loss.generator, "generator")
        self._precision.update("generator")
        return loss

    def _judge(self, images):
        with self._precision.autocast():
            return self.discriminator(images)

    def _backward(self, logits, loss_of, optimizer):
        loss = loss_of(logits)
        self._precision.backward(loss, optimizer)
        return loss.detach()

    def _draw(self, z):
        with evaluating(self.generator):
            return self.generator(z)


@contextmanager
def _frozen(module):
    """Let no gradient of the module's own parameters be computed, only those that flow through."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
