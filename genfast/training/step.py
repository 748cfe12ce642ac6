"""One optimisation step of a GAN or a VAE.

A step is an object that owns its networks and optimizers and is called with a batch. What it
returns stays on the device: nothing here waits for it.
"""

import os
import shutil
from contextlib import contextmanager
from typing import NamedTuple

import torch

from genfast import functional, losses, reference
from genfast.nn import statistics_groups
from genfast.training.graph import CapturedStep, CUDARecorder, why_not_captured
from genfast.training.merging import converts_its_input, why_not_merged
from genfast.training.precision import Precision
from genfast.training.updates import clear_gradients


class GANResult(NamedTuple):
    """The losses of one step, scalar tensors on the device."""

    d_loss: torch.Tensor
    g_loss: torch.Tensor


class VAEResult(NamedTuple):
    """The loss of one step and its two parts in nats an image, scalar tensors on the device."""

    loss: torch.Tensor
    reconstruction: torch.Tensor
    kl: torch.Tensor


def adam(module, lr=2e-4, betas=(0.5, 0.999)):
    """Adam as fast as PyTorch has it where the module is: fused, and on a GPU fit for a graph."""
    on_gpu = _device_of(module).type == "cuda"
    return torch.optim.Adam(module.parameters(), lr, betas, fused=True, capturable=on_gpu)


def _device_of(module):
    return next(module.parameters()).device


def _checked_images(images, device):
    """The images in the memory format of the kernels; an error unless a step can take them."""
    if images.dim() != 4:
        raise ValueError(f"expected images of shape (N, C, H, W), got shape {tuple(images.shape)}")
    if not images.is_floating_point():
        raise TypeError(f"expected floating-point images, got {images.dtype}")
    if images.device != device:
        raise ValueError(f"expected images on the networks' device {device}, got {images.device}")
    return images.contiguous(memory_format=torch.channels_last)


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


class _Step:
    """What steps share: precision, capture, and the checks of a batch.

    Subclasses have `_step(images) -> tuple of scalar tensors`, the attributes `pixel_range`,
    `latent_shape` and `weights_reused` (whether a network takes part in more than one pass), and
    `_draw(z)`, their images in `pixel_range`.
    """

    def __init__(self, modules, optimizers, precision, capture):
        self.modules, self.optimizers = modules, optimizers
        self.device = _device_of(next(iter(modules.values())))
        self._precision = Precision(
            precision, self.device, modules, optimizers, self.weights_reused
        )
        reason = "it was switched off"
        if capture is not False:
            reason = why_not_captured(self.device, optimizers.values())
        if capture and reason:
            raise ValueError(f"expected a step that can be captured, but {reason}")
        self.why_not_captured = reason
        self._run = self._step_in_precision
        if reason is None:
            self._run = CapturedStep(
                self._step_in_precision,
                list(modules.values()),
                list(optimizers.values()),
                list(self.scalers.values()),
                CUDARecorder(self.device),
            )

    @property
    def precision(self):
        """The name of the precision, never "auto"."""
        return self._precision.name

    @property
    def scalers(self):
        """The gradient scalers of fp16 by their optimizer's name."""
        return self._precision.scalers

    def __call__(self, images):
        """Make one step."""
        images = _checked_images(images, self.device)
        with self._precision.products():
            return self._result(*self._run(images))

    def _step_in_precision(self, images):
        with self._precision.weights():
            return self._step(images)

    @torch.no_grad()
    def sample(self, z):
        """Images in `pixel_range` for this noise, by the running statistics of batch norms."""
        with self._precision.products(), self._precision.autocast():
            return self._draw(z).float()


class GANStep(_Step):
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
        with _evaluating(self.generator):
            return self.generator(z)


class VAEStep(_Step):
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
        with _evaluating(self.model):
            return self.model.decode(z)


def missing_compiler(device):
    """The name of the C++ compiler that `torch.compile` needs for the device and that is missing.

    None if it has what it needs.
    """
    name = os.environ.get("CXX", "g++")  # As `torch.compile` chooses it.
    return name if device.type == "cpu" and shutil.which(name) is None else None


@contextmanager
def _evaluating(module):
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
