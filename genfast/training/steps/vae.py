"""One optimisation step of a VAE."""

import math
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from genfast import functional, losses, reference
from genfast.losses import LikelihoodName
from genfast.training.image_range import OVERSHOOT
from genfast.training.steps import kl_weight, vae_form
from genfast.training.steps.base import Batch, Step, adam, evaluating
from genfast.training.steps.labels import Labels, classes_of
from genfast.training.steps.precision import PrecisionName
from genfast.training.steps.spread import Spread, unwrapped
from genfast.training.steps.trial import undone

# (model, images) -> (reconstruction, mu, logvar).
Adapter = Callable[[Any, torch.Tensor], Sequence[torch.Tensor]]
# (mu, logvar) -> (z, kl).
_Sampler = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# How far images whose range nobody said may lie outside [0, 1]: roundings.
_SLACK = 1e-3


class VAEResult(NamedTuple):
    """The loss of one step and its two parts in nats an image, scalar tensors on the device.

    The parts are not weighted: with a beta the loss is reconstruction + beta * kl. Of several
    samples an image they are means over these, and their sum is at least the loss.

    Example:
        >>> result = VAEResult(torch.tensor(90.0), torch.tensor(80.0), torch.tensor(10.0))
        >>> float(result.loss - result.kl)
        80.0
    """

    loss: torch.Tensor
    reconstruction: torch.Tensor
    kl: torch.Tensor


class VAEStep(Step[VAEResult]):
    """Minimise the negative evidence lower bound of one batch (Kingma and Welling, 2014).

    As in PyTorch's public VAE example, what is minimised is the sum over the batch; the result
    holds nats an image. Whatever loss a model has of its own is not asked for.

    What a model takes and gives is found out at the first step by running it once, which leaves no
    trace in it: whether `encode` wants images or rows of pixels, the latent's shape, and how
    `decode` ends. Images stay in [0, 1] for the network if its own do, as after a sigmoid; else, as
    after tanh or a layer alone, it is given and asked for images scaled to [-1, 1].

    Args:
        model: has `encode(images)`, which gives the mean and the log-variance of the latent as a
            pair, or under names such as `mu` and `logvar`, and `decode(z) -> images` or rows of
            pixels; or it is a `nn.ModuleDict` of an `encoder` and a `decoder` that do so. Where it
            has `decode_logits`, the decoder before its sigmoid, that is taken. A standard deviation
            in place of the log-variance cannot be told from one. Where it has `classes`, a number,
            and these functions take `labels`, int64 (N,), they are given those of the batch.
            It may be wrapped in `DistributedDataParallel`, as for `GANStep`.
        optimizer: of the model's parameters. By default Adam(lr=2e-4, betas=(0.5, 0.999)).
        precision, capture, clip_grad, skip_nonfinite: as in `GANStep`.
        compile: whether `torch.compile` makes the forward and backward pass. A small model on a CPU
            trains faster so, after some 20 s for the first step. On a CPU it needs a C++ compiler.
        likelihood: of an image given its latent: "bernoulli" is `losses.reconstruction_loss`, and
            what a decoder gives that ends in a layer alone are its logits; "gaussian" is
            `losses.gaussian_reconstruction_loss`, of unit variance in the range that the network is
            given. None: bernoulli where the decoder's images are in [0, 1], else gaussian.
        beta: the weight of the KL divergence (Higgins et al., 2017).
        beta_warmup: the number of steps over which that weight grows to beta, in equal parts from
            0; None to begin with beta. `modules["kl_weight"]` then counts the steps.
        importance_samples: minimise the importance-weighted bound of so many latents an image
            (Burda et al., 2016), which the model decodes as one batch. With 1 it is the evidence
            lower bound whose KL divergence is that at the one latent drawn, log q - log p, and not
            its closed form. None: that bound, with the closed form.
        adapter: a function (model, images) -> (reconstruction, mu, logvar), for a model whose
            parts are called otherwise. It draws the latent itself.
        image_shape: (C, H, W), to which `sample` brings rows of pixels. None: as in the first step.
        image_range: (low, high) of the float images that it is called with, such as (0, 1), which
            are brought to [0, 1]. None: they are in [0, 1].

    Calling it with images (N, C, H, W), floats in `image_range` or uint8, of which level p is taken
    for p / 255, or with a list, tuple or dict of them and of labels where the model takes any,
    makes one step and returns a `VAEResult`.

    Attributes:
        why_not_captured: why not, in words; None where it is.
        image_shape: see above; None as long as it is not known.

    Raises:
        ValueError, TypeError: there is no such precision, likelihood, beta or number of samples,
            the model is no VAE of this form, or capture=True or compile=True and it cannot be.

    Example:
        >>> from genfast.models import VAE
        >>> step = VAEStep(VAE(64, 16, latent_dim=4), precision="fp32")
        >>> result = step(torch.rand(2, 1, 8, 8))
        >>> bool(result.loss == result.reconstruction + result.kl)
        True
        >>> step.sample(torch.randn(5, 4)).shape
        torch.Size([5, 1, 8, 8])
    """

    pixel_range = (0.0, 1.0)
    weights_reused = False
    result_fields = VAEResult._fields
    model: Any
    _present: Any
    _decoder: Any
    _drawing: Any
    _latent_shape: tuple[int, ...] | None
    _result = VAEResult

    def __init__(
        self,
        model: nn.Module,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        precision: PrecisionName = "auto",
        clip_grad: float | None = None,
        skip_nonfinite: bool = False,
        capture: bool | None = None,
        compile: bool = False,
        likelihood: LikelihoodName | None = None,
        beta: float = 1.0,
        beta_warmup: int | None = None,
        importance_samples: int | None = None,
        adapter: Adapter | None = None,
        image_shape: Sequence[int] | None = None,
        image_range: Sequence[float] | None = None,
    ) -> None:
        if likelihood not in (None, *losses.LIKELIHOODS):
            raise ValueError(
                f"expected a likelihood among {losses.LIKELIHOODS} or None, got {likelihood!r}"
            )
        if not isinstance(model, torch.nn.Module):
            raise TypeError(f"expected a model that is a module, got {vae_form.describe(model)}")
        networks, group = unwrapped({"model": model})
        model = networks["model"]
        self._coders = vae_form.coders(model)
        if self._coders is None and adapter is None:
            raise ValueError(
                "expected a model with encode(images) and decode(z), or an adapter that gives "
                f"(reconstruction, mu, logvar), got {vae_form.describe(model)}"
            )
        kl_weight.check(beta, beta_warmup)
        if importance_samples is not None:
            _check_samples(importance_samples, adapter)
            if beta != 1 or beta_warmup:
                raise ValueError(
                    "expected beta=1 without a warm-up for importance_samples, as only the weights "
                    f"of p(image, z) bound its likelihood, got beta={beta} and "
                    f"beta_warmup={beta_warmup}"
                )
        if compile and adapter:
            raise ValueError("expected encode and decode for compile=True, got an adapter")
        self.model = model
        self.image_shape = None if image_shape is None else tuple(image_shape)
        self._adapter = adapter
        self._likelihood = likelihood
        if adapter is None:
            self._labels = Labels.of(**{name: classes_of(model, name) for name in self._coders})
        self._beta, self._samples = float(beta), importance_samples
        self._has_logits = adapter is None and hasattr(model, "decode_logits")
        self._present = self._decoder = self._drawing = self._latent_shape = None
        warmup: dict[str, nn.Module] = {}
        if beta_warmup:
            device = next(model.parameters()).device
            warmup["kl_weight"] = kl_weight.KLWeight(beta, beta_warmup, device)
        super().__init__(
            {"model": model},
            {"model": optimizer or adam(model)},
            precision,
            capture,
            warmup,
            clip_grad=clip_grad,
            skip_nonfinite=skip_nonfinite,
            spread=Spread(group, sums=True) if group else None,
            image_range=image_range,
        )
        self._warmup = warmup.get("kl_weight")
        self._compiled_terms = None
        if compile:
            name = missing_compiler(self.device)
            if name:
                raise ValueError(
                    f"expected a C++ compiler for compile=True on a CPU, found no {name}"
                )
            self._compiled_terms = torch.compile(self._terms_given_noise)

    @property
    def likelihood(self) -> LikelihoodName | None:
        """The name of the images' likelihood; None as long as it is to be found out."""
        if self._likelihood:
            return self._likelihood
        end = self._end
        if end is None:
            return None
        return "bernoulli" if end == "unit" else "gaussian"

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of one image's latent: until the first step what `model.latent_dim` says."""
        if self._latent_shape is not None:
            return self._latent_shape
        said = getattr(self.model, "latent_dim", None)
        if not isinstance(said, int):
            raise ValueError(
                "expected a first step, or a model whose latent_dim tells the latent's shape, got "
                f"{vae_form.describe(self.model)} without either"
            )
        return (said,)

    def _encode(self, images: torch.Tensor) -> Any:
        return getattr(self.model, self._coders[0])(images, *self._labels(len(images)))

    def _decode(self, z: torch.Tensor) -> Any:
        return getattr(self.model, self._coders[1])(z, *self._labels(len(z), each=True))

    def _look(self, images: torch.Tensor) -> None:
        """Find out what the model takes and gives, by running it on these images once."""
        self._check_first(images)
        autocast = self._precision.autocast
        with undone(self.model, self.device), torch.enable_grad(), autocast():
            if self._adapter:
                adapter = partial(self._adapter, self.model)
                self._present, _ = vae_form.presentation(adapter, images)
                (reconstruction, mu, logvar), decoder = vae_form.watched(
                    self.model, lambda: vae_form.adapted(adapter(self._present(images)))
                )
                vae_form.check_latent(images, mu, logvar)
            else:
                self._present, result = vae_form.presentation(self._encode, images)
                mu, logvar = vae_form.posterior(result)
                vae_form.check_latent(images, mu, logvar)
                (reconstruction,), decoder = vae_form.watched(
                    self.model, lambda: (vae_form.decode(self._decode, losses.widen(mu)),)
                )
            vae_form.check_reconstruction(images, reconstruction)
            unused = vae_form.unused_parameters(self.model, reconstruction, mu, logvar)
        self._decoder, self._latent_shape = decoder, tuple(mu.shape[1:])
        self.image_shape = tuple(images.shape[1:])
        self._check_likelihood(self._end)
        if unused:
            _warn(
                f"{len(unused)} parameters of the {type(self.model).__name__}, {unused[0]} the "
                "first, take no part in encoding or decoding: it is trained without them, as a VAE "
                "whose prior is N(0, 1)"
            )
        probabilities = self.likelihood == "bernoulli" and not self._gives_logits
        if probabilities and reconstruction.dtype.itemsize < 4:
            _warn(
                f"the decoder's probabilities are {reconstruction.dtype}, in which those near 1 "
                "are 1: have a decode_logits, an nn.Sigmoid at the end, or precision='fp32'"
            )

    def _check_first(self, images: torch.Tensor) -> None:
        shape = tuple(images.shape[1:])
        if len(images) == 0:
            raise ValueError("expected at least one image, got none")
        if self.image_shape not in (None, shape):
            raise ValueError(f"expected images of shape {self.image_shape}, got {shape}")
        low, high = (v.item() for v in images.aminmax())
        slack = OVERSHOOT if self._image_range else _SLACK
        if low >= -slack and high <= 1 + slack:
            return
        hint = ""
        if self._image_range is None and low >= -OVERSHOOT and high <= 1 + OVERSHOOT:
            hint = ": give image_range=(0, 1) where they overshoot it, as resized images do"
        elif self._image_range is None and -1 - 2 * OVERSHOOT <= low < 0 and high <= 1 + OVERSHOOT:
            hint = ": give image_range=(-1, 1) to have them scaled"
        raise ValueError(f"expected images in [0, 1], got values from {low:g} to {high:g}{hint}")

    @property
    def _takes_logits(self) -> bool:
        """Whether what runs is `decode_logits`."""
        return self._has_logits and self._likelihood != "gaussian"

    @property
    def _end(self) -> str | None:
        """How the decoder ends; None as long as it is to be found out."""
        return "unit" if self._takes_logits else self._decoder and self._decoder.end

    def _check_likelihood(self, end: str | None) -> None:
        if self._likelihood == "bernoulli" and end in ("tanh", "positive"):
            values = "from -1 on" if end == "tanh" else "from 0 on"
            raise ValueError(
                "expected a decoder that gives probabilities or logits for likelihood='bernoulli', "
                f"got one that gives other values {values}"
            )

    @property
    def _gives_logits(self) -> bool:
        """Whether what the loss is given are the logits of probabilities."""
        if self.likelihood == "gaussian":
            return False
        return self._takes_logits or self._skipped is not None or self._end == "open"

    @property
    def _skipped(self) -> Any:
        """The sigmoid at the decoder's end, which the loss takes itself; or None."""
        if self._takes_logits or self.likelihood == "gaussian":
            return None
        return self._decoder.sigmoid

    @property
    def _signed(self) -> bool:
        """Whether the network's images are those of [0, 1] scaled to [-1, 1]."""
        return self.likelihood == "gaussian" and self._end in ("tanh", "open")

    def _step(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        images = self._floats(images)
        self.optimizers["model"].zero_grad(set_to_none=True)
        beta = self._warmup() if self._warmup else self._beta
        with vae_form.skipped(self._skipped) as skips:
            if self._compiled_terms is None:
                minimised, *terms = self._terms(images, _sampler(self._samples), beta)
                if self._skipped and len(skips) != 1:
                    raise RuntimeError(
                        "expected the decoder to end in its sigmoid as in the first step, got one "
                        "that was changed since: make a new step"
                    )
            else:
                # Noise comes from outside: compiled code would draw other numbers.
                samples = () if self._samples is None else (self._samples,)
                shape = (len(images), *samples, *self.latent_shape)
                noise = torch.randn(shape, device=images.device)
                minimised, *terms = self._compiled_terms(images, noise, beta)
        self._precision.backward(minimised, "model")
        self._precision.update("model")
        return tuple(terms)

    @torch.no_grad()
    def evaluate(self, batch: Batch, importance_samples: int | None = None) -> VAEResult:
        """The bound of images that are not trained on: a `VAEResult`, of which nothing moves.

        By the running statistics of batch norms. Its `loss` is minus the evidence lower bound, of
        one latent an image and the closed form of the KL divergence; or with `importance_samples`
        minus the importance-weighted bound of so many, which is no lower and nearer to the images'
        log-likelihood (Burda et al., 2016). It has no beta. A Gaussian lacks its constant, as in
        training.

        Args:
            batch: images as a step takes them.
            importance_samples: how many latents an image, or None.
        """
        if importance_samples is not None:
            _check_samples(importance_samples, self._adapter)
        images, labels = self._checked(batch)
        with self._precision.products(), self._labels.of_batch(labels, images):
            self._look_once(images)
            with evaluating(self.model), vae_form.skipped(self._skipped):
                sample = _sampler(importance_samples)
                _, *terms = self._terms(self._floats(images), sample, 1.0)
        return VAEResult(*terms)

    def _terms(
        self, images: torch.Tensor, sample: _Sampler, beta: float | torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """What is minimised, and the terms of a `VAEResult`.

        sample: (mu, logvar) in float32 to latents and the KL divergence of each image, (N,); or to
            several latents an image and log q - log p of each, (N, samples).
        beta: a number or a scalar tensor.
        """
        if self._signed:
            images = 2 * images - 1
        reconstruction, kl = self._reconstructed(images, sample)
        if kl.dim() == 1:
            reconstruction, kl = self._reconstruction_loss(reconstruction, images), kl.sum()
            plain = isinstance(beta, float) and beta == 1
            minimised = reconstruction + (kl if plain else beta * kl)
        else:
            reconstruction = losses.each_reconstruction_loss(
                reconstruction.unflatten(0, kl.shape),
                images,
                "gaussian" if self.likelihood == "gaussian" else "bernoulli",
                logits=self._gives_logits,
            )
            minimised = losses.iwae_loss(reconstruction, kl)
            reconstruction, kl = (t.mean(1).sum() for t in (reconstruction, kl))
        # Detached, or compiled code would provide for gradients that flow through these too.
        terms = (t.detach() / len(images) for t in (minimised, reconstruction, kl))
        return minimised, *terms

    def _terms_given_noise(
        self, images: torch.Tensor, noise: torch.Tensor, beta: float | torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        def sample(mu: torch.Tensor, logvar: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if self._samples is not None:
                return reference.importance_samples(mu, logvar, noise.to(mu.dtype))
            kl = reference.kl_divergence(mu, logvar)
            return reference.reparameterize(mu, logvar, noise.to(mu.dtype)), kl

        return self._terms(images, sample, beta)

    def _reconstructed(
        self, images: torch.Tensor, sample: _Sampler
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the decoder makes of these images' latents, a batch, and their KL divergences."""
        if self._adapter:
            with self._precision.autocast():
                result = self._adapter(self.model, self._present(images))
            reconstruction, mu, logvar = vae_form.adapted(result)
            return reconstruction, reference.kl_divergence(losses.widen(mu), losses.widen(logvar))
        with self._precision.autocast():
            mu, logvar = vae_form.posterior(self._encode(self._present(images)))
        z, kl = sample(losses.widen(mu), losses.widen(logvar))
        if kl.dim() == 2:
            z = z.flatten(0, 1)
        with self._precision.autocast():
            if self._takes_logits:
                return self.model.decode_logits(z, *self._labels(len(z), each=True)), kl
            return vae_form.decoded(self._decode(z)), kl

    def _reconstruction_loss(
        self, reconstruction: torch.Tensor, images: torch.Tensor
    ) -> torch.Tensor:
        if self.likelihood == "gaussian":
            return losses.gaussian_reconstruction_loss(reconstruction, images)
        return losses.reconstruction_loss(reconstruction, images, logits=self._gives_logits)

    @torch.no_grad()
    def encode(
        self, images: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean and the log-variance of images' latents, (N, *latent_shape) each, in float32.

        By the running statistics of batch norms, as `sample` draws. `images` are what a step takes,
        and so are `labels`, int64 (N,), for a model that takes them.
        """
        images = self._floats(self._brought(images))
        with self._precision.products(), self._labels.given(labels, images):
            self._look_once(images)
            images = 2 * images - 1 if self._signed else images
            with self._precision.autocast(), evaluating(self.model):
                if self._adapter:
                    result = self._adapter(self.model, self._present(images))
                    _, mu, logvar = vae_form.adapted(result)
                else:
                    mu, logvar = vae_form.posterior(self._encode(self._present(images)))
        return losses.widen(mu), losses.widen(logvar)

    def _draw(self, z: torch.Tensor) -> torch.Tensor:
        if self._coders is None:
            raise ValueError(
                "expected a model with decode(z) to sample from, got "
                f"{vae_form.describe(self.model)}"
            )
        with evaluating(self.model):
            decoder = self._drawing if self._adapter else self._decoder
            if decoder or self._takes_logits:
                decoded = vae_form.decoded(self._decode(z))
                end = decoder.end if self._adapter else self._end
            else:
                with torch.enable_grad():
                    (decoded,), decoder = vae_form.watched(
                        self.model, lambda: (vae_form.decode(self._decode, z),)
                    )
                decoded, end = decoded.detach(), decoder.end
                self._check_likelihood(end)
                # An adapter's reconstruction may end otherwise than what `decode` gives.
                self._drawing = decoder
                self._decoder = self._decoder or decoder
        return self._as_images(decoded, end)

    def _as_images(self, decoded: torch.Tensor, end: str | None) -> torch.Tensor:
        """What `decode` gave, which ends so, as images (N, C, H, W) in `pixel_range`."""
        if end == "open" and self.likelihood == "bernoulli":
            decoded = losses.widen(decoded).sigmoid()
        elif end in ("open", "tanh"):
            decoded = (decoded + 1) / 2
        if end != "unit":
            decoded = decoded.clamp(*self.pixel_range)
        if decoded.dim() == 4:
            return decoded
        shape = self.image_shape
        if shape is None or decoded.shape[1:].numel() != math.prod(shape):
            wanted = shape or "a shape that a step or image_shape tells"
            raise ValueError(
                f"expected decode to give images or rows of {wanted}, got shape "
                f"{tuple(decoded.shape)}"
            )
        return decoded.reshape(len(decoded), *shape)


def _sampler(samples: int | None) -> _Sampler:
    """What draws latents and their KL divergences: see `VAEStep._terms`."""
    if samples is None:
        return functional.reparameterize_with_kl
    return partial(functional.importance_samples, samples=samples)


def _check_samples(samples: object, adapter: Adapter | None) -> None:
    if type(samples) is not int or samples < 1:
        raise ValueError(
            f"expected importance_samples to be a whole number from 1, or None, got {samples!r}"
        )
    if adapter:
        raise ValueError(
            "expected encode and decode for importance_samples, got an adapter, which draws one "
            "latent itself"
        )


def _warn(message: str) -> None:
    warnings.warn(f"genfast: {message}", stacklevel=5)


def missing_compiler(device: torch.device) -> str | None:
    """The name of the C++ compiler that `torch.compile` needs for the device and that is missing.

    None if it has what it needs.
    """
    name = os.environ.get("CXX", "g++")  # As `torch.compile` chooses it.
    return name if device.type == "cpu" and shutil.which(name) is None else None
