"""One optimisation step of a GAN."""

from numbers import Integral
from typing import NamedTuple

import torch

from genfast import losses
from genfast.nn import statistics_groups
from genfast.training.memory import missing_memory
from genfast.training.steps.average import Average
from genfast.training.steps.base import Step, adam, evaluating, frozen
from genfast.training.steps.joining import joined
from genfast.training.steps.judge import Judge, describe
from genfast.training.steps.merging import (
    converts_its_input,
    why_they_differ,
    why_two_passes,
    why_unknown,
)
from genfast.training.steps.trial import undone

_LATENT_SHAPE = (100, 1, 1)


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
        discriminator: images to logits, one an image or a map of them. Where it ends in a Sigmoid,
            what goes into that is taken, and a warning says so.
        latent_shape: the shape of one image's noise. By default the generator's own `latent_shape`,
            or else (100, 1, 1).
        loss: the name of a loss in `genfast.losses.GAN_LOSSES`. Where that judges images in pairs,
            the generator's update also runs the discriminator on the real images.
        optimizers: of the generator and of the discriminator, in this order. By default
            Adam(lr=2e-4, betas=(0.5, 0.999)) for each.
        precision: "auto", "fp32", "tf32", "bf16" or "fp16"; see `resolve_precision`.
        merge: whether the discriminator sees real and generated images in one pass, with batch
            statistics of their own. None: where its layers are known to allow it, or where both
            ways give the same for the first batch.
        capture: whether the step runs as one CUDA graph. None: where that is possible. Then an
            optimizer's learning rates are tensors; schedulers and plain numbers still set them.
        ema: keep an average of the generator with this decay, such as 0.999, from which `sample`
            draws. None: keep none.
        output: a function that picks the logits out of what the discriminator returns, or "logits":
            what it returns are logits, whatever it looks like. None: that is checked.

    Calling it with images (N, C, H, W), floats in [-1, 1] or uint8 from 0 to 255, or with what a
    loader gives, a list or tuple that begins with them, makes one step and returns a `GANResult`.
    Level p of uint8 images is taken for p * 2 / 255 - 1. The first call also runs the networks to
    learn how they are to be run, and puts back what that moved.

    Attributes:
        why_not_merged, why_not_captured, why_no_half_weights, why_not_adam_kernel: why not, in
            words; None where it is.
            Where only the first batch can tell, `why_not_merged` is final after the first call.
        final_sigmoid: the name of the Sigmoid in which the discriminator ends; None if in none.
        average: the `Average` of the generator that `sample` draws from, or None to draw from the
            generator itself.

    Raises:
        ValueError: there is no such loss, precision or decay, capture=True and it cannot be, or an
            optimizer does not hold its network's parameters.
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
        latent_shape=None,
        loss="non-saturating",
        optimizers=None,
        precision="auto",
        merge=None,
        capture=None,
        output=None,
        ema=None,
    ):
        self.generator = generator
        self.discriminator = discriminator
        self.latent_shape = _latent_shape(latent_shape, generator)
        self.loss = losses.gan_loss(loss)
        self._judge = Judge(discriminator, output)
        if optimizers is None:
            optimizers = adam(generator), adam(discriminator)
        if not isinstance(optimizers, tuple | list) or len(optimizers) != 2:
            raise ValueError(
                "expected optimizers of the generator and of the discriminator, in this order, got "
                f"{describe(optimizers)}"
            )
        g_optimizer, d_optimizer = optimizers
        never, unknown = why_two_passes(discriminator), why_unknown(discriminator)
        self._known = not (never or unknown)
        self._converts = self._known and converts_its_input(discriminator)
        self._merge_if_equal = merge is None and not never and unknown is not None
        self.why_not_merged = never or unknown
        if merge is not None:
            self.why_not_merged = None if merge else "it was switched off"
        self.average = self._average = None if ema is None else Average(generator, ema)
        super().__init__(
            {"generator": generator, "discriminator": discriminator},
            {"generator": g_optimizer, "discriminator": d_optimizer},
            precision,
            capture,
            {} if ema is None else {"average": self.average.module},
        )

    @property
    def final_sigmoid(self):
        """The name of the Sigmoid whose input is taken for the logits; None if there is none."""
        return self._judge.sigmoid

    def _look(self, images):
        with (
            torch.no_grad(),
            undone(self.generator, self.device),
            undone(self.discriminator, self.device),
        ):
            try:
                fakes = self._generate(images)
            except Exception as error:  # It is somebody's own code.
                if missing_memory(error):
                    raise
                raise ValueError(
                    "expected a generator that takes noise of this latent_shape alone, but for "
                    f"latent_shape={self.latent_shape} and {len(images)} images it raised "
                    f"{type(error).__name__}: " + str(error).partition("\n")[0]
                ) from error
        self._check_fakes(fakes, images)
        with self._precision.autocast():
            self._judge.look(images)
        if self._merge_if_equal:
            with self._precision.exact_products():
                why = why_they_differ(
                    self._judge, self.discriminator, self.loss, images, fakes.to(images.dtype)
                )
            self.why_not_merged = why and f"{self.why_not_merged}, and {why}"
            self._merge_if_equal = False

    def _step_in_precision(self, images):
        losses = super()._step_in_precision(images)
        if self._average:  # By now the generator holds its own weights again.
            self._average.update()
        return losses

    def _step(self, images):
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        fakes = self._generate(images)
        self._check_fakes(fakes, images)
        d_loss = self._update_discriminator(images, fakes.detach())
        return d_loss, self._update_generator(images, fakes)

    def _generate(self, images):
        """As many images as these are, by the generator."""
        dtype = images.dtype if images.is_floating_point() else self._dtype
        z = torch.randn(len(images), *self.latent_shape, device=images.device, dtype=dtype)
        with self._precision.autocast():
            return self.generator(z)

    def _check_fakes(self, fakes, images):
        if not isinstance(fakes, torch.Tensor):
            raise TypeError(f"expected a generator that returns images, got {describe(fakes)}")
        if fakes.shape != images.shape:
            raise ValueError(
                f"expected images of the shape the generator makes, {tuple(fakes.shape)}, got "
                f"{tuple(images.shape)}"
            )

    def _update_discriminator(self, reals, fakes):
        if self.why_not_merged and self.loss.paired:
            logits = [self._logits(self._floats(reals)), self._logits(fakes)]
            loss = self._backward(torch.cat(logits), self.loss.discriminator, "discriminator")
        elif self.why_not_merged:
            # The first pass's graph is gone before the second pass.
            loss = self._backward(
                self._logits(self._floats(reals)), self.loss.real, "discriminator"
            )
            loss = loss + self._backward(self._logits(fakes), self.loss.fake, "discriminator")
        else:
            both = self._both(reals, fakes)
            with statistics_groups(self.discriminator, 2):
                logits = self._logits(both)
            loss = self._backward(logits, self.loss.discriminator, "discriminator")
        self._precision.update("discriminator", refresh=True)
        # The gradients' memory serves the generator's update.
        self.optimizers["discriminator"].zero_grad(set_to_none=True)
        return loss

    def _both(self, reals, fakes):
        """Real images, then generated ones: a batch of the discriminator."""
        if self._known:
            with self._precision.autocast():
                both = joined(self.discriminator, reals, fakes, self.pixel_range)
            if both is not None:
                return both
        reals = self._floats(reals)
        if self._converts:
            reals = reals.to(fakes.dtype)  # Less to concatenate than what `cat` would make.
        return torch.cat([reals, fakes])

    def _update_generator(self, reals, fakes):
        with frozen(self.discriminator):
            if self.loss.paired:
                with torch.no_grad():
                    of_reals = self._logits(self._floats(reals))
                logits = torch.cat([of_reals, self._logits(fakes)])
            else:
                logits = self._logits(fakes)
            loss = self._backward(logits, self.loss.generator, "generator")
        self._precision.update("generator")
        return loss

    def _logits(self, images):
        with self._precision.autocast():
            return self._judge(images)

    def _backward(self, logits, loss_of, optimizer):
        loss = loss_of(logits)
        self._precision.backward(loss, optimizer)
        return loss.detach()

    def _draw(self, z):
        generator = self.average.module if self.average else self.generator
        with evaluating(generator):
            return generator(z)


def _latent_shape(given, generator):
    """The shape of one image's noise, a tuple: as given, or else as the generator has it."""
    if given is None:
        given = getattr(generator, "latent_shape", None)
        if not isinstance(given, tuple | list) or not _are_lengths(given):
            return _LATENT_SHAPE
    given = (given,) if isinstance(given, Integral) else tuple(given)
    if not _are_lengths(given):
        raise ValueError(f"expected latent_shape to be whole numbers from 1 on, got {given}")
    return given


def _are_lengths(shape):
    return all(isinstance(n, Integral) and n > 0 for n in shape)
