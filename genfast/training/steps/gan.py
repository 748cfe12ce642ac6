"""One optimisation step of a GAN."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from genfast import autograd, losses
from genfast.nn import statistics_groups
from genfast.training.memory import missing_memory
from genfast.training.steps.augment import Augmentation, mirrored
from genfast.training.steps.average import Average
from genfast.training.steps.base import Step, above_0, adam, evaluating, frozen
from genfast.training.steps.joining import joined
from genfast.training.steps.judge import Judge, describe
from genfast.training.steps.labels import Labels, classes_of
from genfast.training.steps.merging import (
    converts_its_input,
    why_they_differ,
    why_two_passes,
    why_unknown,
)
from genfast.training.steps.penalties import penalty as penalty_named
from genfast.training.steps.precision import PrecisionName
from genfast.training.steps.spectral import SpectralNorm
from genfast.training.steps.spread import Spread, unwrapped
from genfast.training.steps.trial import undone

_LATENT_SHAPE = (100, 1, 1)


class _Turn(NamedTuple):
    """What a call does that others do not: how often it comes is counted on the host.

    penalised: whether the discriminator's update has the penalty.
    generator_trains: whether the generator is updated too.
    """

    penalised: bool
    generator_trains: bool


class GANResult(NamedTuple):
    """The losses of one step, scalar tensors on the device, penalties not among them.

    Where a step leaves the generator as it is, `g_loss` is what the discriminator's update made of
    the same logits.

    Example:
        >>> d_loss, g_loss = GANResult(torch.tensor(1.4), torch.tensor(0.7))
    """

    d_loss: torch.Tensor
    g_loss: torch.Tensor


class GANStep(Step[GANResult]):
    """Update the discriminator on real and generated images, then the generator: one GAN step.

    The order and the losses are those of Goodfellow et al. (2014), algorithm 1 with k = 1, as
    PyTorch's public DCGAN example has them: the generated images of both updates are the same.

    Args:
        generator: (N, *latent_shape) to images in [-1, 1]. Where it and the discriminator have
            `classes`, a number, and take `labels`, int64 (N,), after the noise and the images, they
            are given those of the batch: real and generated images have the same.
            They may be wrapped in `DistributedDataParallel`: then each process calls its step with
            its part of a batch, as often as the others, and draws random numbers of its own. The
            losses are those of all processes, and so are the updates.
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
        penalty: the name of a penalty in `penalties.PENALTIES` that the discriminator's loss has
            too, by a pass of the discriminator of its own. None: none.
        penalty_weight: its weight; None for the paper's.
        penalty_every: at how many updates of the discriminator one has the penalty, with so many
            times its weight (Karras et al., 2020, appendix B). It is the gradient of the same
            update, so Adam's rates stay, which are changed there for updates of the penalty alone.
        n_critic: at how many calls, each an update of the discriminator on a batch of its own, one
            updates the generator: the last of them.
        clip_critic: keep the discriminator's parameters within this distance of 0 (Arjovsky et al.,
            2017). None: do not.
        spectral_norm: whether to put PyTorch's spectral norm on each layer of the discriminator
            (Miyato et al., 2018), with one power iteration an update of it.
        augment: what the discriminator sees is changed so: names in `augment.AUGMENTATIONS`, with
            commas between (Zhao et al., 2020). None: as it is.
        flip: whether real images are mirrored left to right at random.
        clip_grad: the largest norm of a network's gradients at an update: larger ones are scaled
            down to it. None: any.
        skip_nonfinite: whether to pass over the updates whose gradients are not finite, and to
            count them in `skipped`. What is not finite then leaves no trace in buffers either.
        output: a function that picks the logits out of what the discriminator returns, or "logits":
            what it returns are logits, whatever it looks like. None: that is checked.
        image_range: (low, high) of the float images that it is called with, such as (0, 1), which
            are brought to [-1, 1]. None: they are in [-1, 1], and a first batch without any value
            below 0, which then looks like one in [0, 1], is refused.

    Calling it with images (N, C, H, W), floats in `image_range` or uint8 from 0 to 255, or with
    what a loader gives, a list or tuple that begins with them, and goes on with the labels where
    the networks take any, or a dict, makes one step and returns a `GANResult`.
    Level p of uint8 images is taken for p * 2 / 255 - 1. The first call also runs the networks to
    learn how they are to be run, and puts back what that moved.

    Attributes:
        why_not_merged, why_not_captured, why_no_half_weights, why_not_adam_kernel: why not, in
            words; None where it is.
            Where only the first batch can tell, `why_not_merged` is final after the first call.
        calls, skipped: how many calls there have been, and how many updates were passed over.
        final_sigmoid: the name of the Sigmoid in which the discriminator ends; None if in none.
        average: the `Average` of the generator that `sample` draws from, or None to draw from the
            generator itself.

    Raises:
        ValueError: there is no such loss, precision, decay, penalty or augmentation, a number is
            out of its range, capture=True and it cannot be, or an optimizer does not hold its
            network's parameters.

    Warns:
        UserWarning: the penalty is not defined for a discriminator with batch norm.

    Example:
        >>> from genfast.models import GAN
        >>> gan = GAN((1, 8, 8), nz=4)
        >>> step = GANStep(gan.generator, gan.discriminator, precision="fp32")
        >>> for images in torch.rand(3, 2, 1, 8, 8):  # Three batches of two.
        ...     result = step(images * 2 - 1)
        >>> bool(result.d_loss.isfinite())
        True
        >>> step.sample(torch.randn(5, 4)).shape
        torch.Size([5, 1, 8, 8])
    """

    pixel_range = (-1.0, 1.0)
    weights_reused = True
    result_fields = GANResult._fields
    _penalty: Any
    _clip: Any
    _result = GANResult

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        *,
        latent_shape: int | Sequence[int] | None = None,
        loss: str = "non-saturating",
        optimizers: Sequence[torch.optim.Optimizer] | None = None,
        precision: PrecisionName = "auto",
        merge: bool | None = None,
        capture: bool | None = None,
        output: Callable[[Any], torch.Tensor] | Literal["logits"] | None = None,
        ema: float | None = None,
        penalty: str | None = None,
        penalty_weight: float | None = None,
        penalty_every: int = 1,
        n_critic: int = 1,
        clip_critic: float | None = None,
        spectral_norm: bool = False,
        augment: str | None = None,
        flip: bool = False,
        clip_grad: float | None = None,
        skip_nonfinite: bool = False,
        image_range: Sequence[float] | None = None,
    ) -> None:
        networks = {"generator": generator, "discriminator": discriminator}
        networks, group = unwrapped(networks)
        generator, discriminator = networks.values()
        spread = Spread(group) if group else None
        self.generator = generator
        self.discriminator = discriminator
        self.latent_shape = _latent_shape(latent_shape, generator)
        self.loss = losses.gan_loss(loss)
        self._set_penalty(penalty, penalty_weight, penalty_every)
        self._n_critic = _whole("n_critic", n_critic)
        self.first_updates = {"generator": self._n_critic}
        self._clip = None if clip_critic is None else above_0("clip_critic", clip_critic)
        self._augment = None if augment is None else Augmentation(augment)
        self._flip = bool(flip)
        self._spectral_norm = SpectralNorm(discriminator) if spectral_norm else None
        if self._spectral_norm and spread:  # It has drawn vectors, each process its own.
            spread.give_to_all(self._spectral_norm.buffers())
        self._labels = Labels.of(
            generator=classes_of(generator), discriminator=classes_of(discriminator)
        )
        self._judge = Judge(discriminator, output, self._labels)
        if optimizers is None:
            optimizers = adam(generator), adam(discriminator)
        if not isinstance(optimizers, tuple | list) or len(optimizers) != 2:
            raise ValueError(
                "expected optimizers of the generator and of the discriminator, in this order, got "
                f"{describe(optimizers)}"
            )
        g_optimizer, d_optimizer = optimizers
        steady = self._spectral_norm.layers if self._spectral_norm else ()
        never, unknown = why_two_passes(discriminator, steady), why_unknown(discriminator)
        self._known = not (never or unknown)
        self._converts = self._known and converts_its_input(discriminator)
        self._merge_if_equal = merge is None and not never and unknown is not None
        self.why_not_merged: str | None = never or unknown
        if merge is not None:
            self.why_not_merged = None if merge else "it was switched off"
        self.average = self._average = None if ema is None else Average(generator, ema)
        super().__init__(
            networks,
            {"generator": g_optimizer, "discriminator": d_optimizer},
            precision,
            capture,
            {} if self.average is None else {"average": self.average.module},
            clip_grad=clip_grad,
            skip_nonfinite=skip_nonfinite,
            spread=spread,
            image_range=image_range,
        )

    @property
    def final_sigmoid(self) -> str | None:
        """The name of the Sigmoid whose input is taken for the logits; None if there is none."""
        return self._judge.sigmoid

    def _look(self, images: torch.Tensor) -> None:
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
        self._warn_of_batch_norm()
        with self._precision.autocast():
            self._judge.look(images)
        if self._merge_if_equal:
            with self._precision.exact_products(), self._steady():
                why = why_they_differ(
                    self._judge, self.discriminator, self.loss, images, fakes.to(images.dtype)
                )
            if self._spread and self._spread.any(why) and not why:
                why = "another process found a difference"
            self.why_not_merged = why and f"{self.why_not_merged}, and {why}"
            self._merge_if_equal = False

    def _set_penalty(self, name: str | None, weight: float | None, every: int) -> None:
        self._penalty_every = _whole("penalty_every", every)
        if name is None:
            if weight is not None or every != 1:
                raise ValueError("expected a penalty for its weight and how often, got none")
            self._penalty = None
            return
        self._penalty_name, self._penalty = name, penalty_named(name)
        weight = self._penalty.weight if weight is None else weight
        self._penalty_weight = above_0("penalty_weight", weight) * self._penalty_every

    def _turn(self) -> _Turn:
        """What the next call does: a `_Turn`."""
        return _Turn(
            self._penalty is not None and self.calls % self._penalty_every == 0,
            (self.calls + 1) % self._n_critic == 0,
        )

    def _warn_of_batch_norm(self) -> None:
        if not (self._penalty and self._penalty.of_each_image):
            return
        if any(isinstance(m, _BatchNorm) for m in self.discriminator.modules()):
            warnings.warn(
                f"genfast: the penalty {self._penalty_name} is not defined for a discriminator "
                "with batch norm, where a logit depends on all images of its batch (Gulrajani et "
                "al., 2017, section 4)",
                stacklevel=5,
            )

    def _step_in_precision(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        losses = super()._step_in_precision(images)
        # By now the generator holds its own weights again.
        if self._average and self._turn().generator_trains:
            self._average.update()
        return losses

    def _step(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        turn = self._turn()
        if self._flip:
            images = mirrored(images)
        with torch.set_grad_enabled(turn.generator_trains):
            fakes = self._generate(images)
        self._check_fakes(fakes, images)
        d_loss, logits = self._update_discriminator(images, fakes.detach(), turn.penalised)
        if turn.generator_trains:
            return d_loss, self._update_generator(images, fakes)
        return d_loss, self.loss.generator(logits)

    def _generate(self, images: torch.Tensor) -> torch.Tensor:
        """As many images as these are, by the generator."""
        dtype = images.dtype if images.is_floating_point() else self._dtype
        z = torch.randn(len(images), *self.latent_shape, device=images.device, dtype=dtype)
        with self._precision.autocast():
            return self.generator(z, *self._labels(len(z)))

    def _check_fakes(self, fakes: torch.Tensor, images: torch.Tensor) -> None:
        if not isinstance(fakes, torch.Tensor):
            raise TypeError(f"expected a generator that returns images, got {describe(fakes)}")
        if fakes.shape != images.shape:
            raise ValueError(
                f"expected images of the shape the generator makes, {tuple(fakes.shape)}, got "
                f"{tuple(images.shape)}"
            )

    def _update_discriminator(
        self, reals: torch.Tensor, fakes: torch.Tensor, penalised: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Its loss, and the logits it had, as `loss.generator` takes them."""
        if self._spectral_norm:
            self._spectral_norm.iterate()
        if self.why_not_merged and self.loss.paired:
            logits = torch.cat([self._logits(self._floats(reals)), self._logits(fakes)])
            loss = self._backward(logits, self.loss.discriminator, "discriminator")
        elif self.why_not_merged:
            # The first pass's graph is gone before the second pass.
            loss = self._backward(
                self._logits(self._floats(reals)), self.loss.real, "discriminator"
            )
            logits = self._logits(fakes)
            loss = loss + self._backward(logits, self.loss.fake, "discriminator")
        else:
            with self._one_pass():
                both = self._both(reals, fakes)
                with statistics_groups(self.discriminator, 2):
                    logits = self._logits(both, augmented=True)
            loss = self._backward(logits, self.loss.discriminator, "discriminator")
            logits = logits if self.loss.paired else logits[len(logits) // 2 :]
        if penalised:
            self._penalise(self._floats(reals), fakes)
        self._precision.update("discriminator", refresh=self._clip is None)
        if self._clip is not None:
            self._clip_parameters()
        # The gradients' memory serves the generator's update.
        self.optimizers["discriminator"].zero_grad(set_to_none=True)
        return loss, logits.detach()

    def _penalise(self, reals: torch.Tensor, fakes: torch.Tensor) -> None:
        """Add the penalty's gradient to those of the discriminator's parameters."""
        reals, fakes = losses.widen(reals), losses.widen(fakes)
        groups = [points(reals, fakes) for points in self._penalty.points]
        if self.why_not_merged is None:
            passes = [(torch.cat(groups) if len(groups) > 1 else groups[0], len(groups))]
        else:
            passes = [(images, 1) for images in groups]
        for images, count in passes:
            images = images.detach().requires_grad_()
            apart = statistics_groups(self.discriminator, count) if count > 1 else nullcontext()
            with autograd.inputs_first(), apart:
                logits = self._logits(images.to(self._dtype))
            gradient = self._precision.gradient(logits, images, "discriminator")
            # The mean over images of each of the points.
            penalty = self._penalty.terms(gradient).mean() * (count * self._penalty_weight)
            self._precision.backward(penalty, "discriminator")

    @torch.no_grad()
    def _clip_parameters(self) -> None:
        groups = self.optimizers["discriminator"].param_groups
        parameters = [p for group in groups for p in group["params"]]
        torch._foreach_clamp_min_(parameters, -self._clip)
        torch._foreach_clamp_max_(parameters, self._clip)
        self._precision.refresh("discriminator")

    def _one_pass(self) -> AbstractContextManager[None]:
        return self._spectral_norm.one_pass() if self._spectral_norm else nullcontext()

    def _steady(self) -> AbstractContextManager[None]:
        return self._spectral_norm.steady() if self._spectral_norm else nullcontext()

    def _both(self, reals: torch.Tensor, fakes: torch.Tensor) -> torch.Tensor:
        """Real images, then generated ones: a batch of the discriminator, augmented."""
        if self._augment:
            reals, fakes = losses.widen(self._floats(reals)), losses.widen(fakes)
            return self._augment(torch.cat([reals, fakes])).to(self._dtype)
        if self._known:
            with self._precision.autocast():
                both = joined(self.discriminator, reals, fakes, self.pixel_range)
            if both is not None:
                return both
        reals = self._floats(reals)
        if self._converts:
            reals = reals.to(fakes.dtype)  # Less to concatenate than what `cat` would make.
        return torch.cat([reals, fakes])

    def _update_generator(self, reals: torch.Tensor, fakes: torch.Tensor) -> torch.Tensor:
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

    def _logits(self, images: torch.Tensor, augmented: bool = False) -> torch.Tensor:
        """The discriminator's, of images as it is to see them or before they are augmented."""
        if self._augment and not augmented:
            images = self._augment(images).to(self._dtype)
        with self._one_pass(), self._precision.autocast():
            return self._judge(images)

    def _backward(
        self, logits: torch.Tensor, loss_of: Callable[[torch.Tensor], torch.Tensor], optimizer: str
    ) -> torch.Tensor:
        loss = loss_of(logits)
        self._precision.backward(loss, optimizer)
        return loss.detach()

    def _draw(self, z: torch.Tensor) -> torch.Tensor:
        generator = self.average.module if self.average else self.generator
        with evaluating(generator):
            return generator(z, *self._labels(len(z)))


def _latent_shape(given: Any, generator: nn.Module) -> tuple[int, ...]:
    """The shape of one image's noise, a tuple: as given, or else as the generator has it."""
    if given is None:
        given = getattr(generator, "latent_shape", None)
        if not isinstance(given, tuple | list) or not _are_lengths(given):
            return _LATENT_SHAPE
    given = (given,) if isinstance(given, Integral) else tuple(given)
    if not _are_lengths(given):
        raise ValueError(f"expected latent_shape to be whole numbers from 1 on, got {given}")
    return given


def _whole(name: str, number: Any) -> int:
    if isinstance(number, Integral) and not isinstance(number, bool) and int(number) > 0:
        return int(number)
    raise ValueError(f"expected {name} to be a whole number from 1 on, got {number!r}")


def _are_lengths(shape: Iterable[Any]) -> bool:
    return all(isinstance(n, Integral) and int(n) > 0 for n in shape)
