"""One optimisation step of a GAN or a VAE.

A step is an object that owns its networks and optimizers and is called with a batch. What it
returns stays on the device: nothing here waits for it.
"""

from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch

from genfast import losses
from genfast.functional import reparameterize_with_kl

PRECISIONS = ("auto", "fp32", "bf16")


class GANResult(NamedTuple):
    """The losses of one step, scalar tensors on the device."""

    d_loss: torch.Tensor
    g_loss: torch.Tensor


class VAEResult(NamedTuple):
    """The loss of one step and its two parts in nats an image, scalar tensors on the device."""

    loss: torch.Tensor
    reconstruction: torch.Tensor
    kl: torch.Tensor


def resolve_precision(precision, device):
    """What "auto" means on this device: "bf16" where it is both supported and faster, else "fp32".

    Args:
        precision: "auto", "fp32" or "bf16" (autocast; weights and losses stay in float32).
        device: a `torch.device`.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"expected a precision among {PRECISIONS}, got {precision!r}")
    if precision != "auto":
        return precision
    fast = False
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Measured on 2 cores with AVX-512 BF16: a step of a DCGAN-64 takes 0.58 of its time in
        # fp32, of the DCGAN for digits 0.7. Without these instructions bf16 would be emulated.
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bf16" if fast else "fp32"


def _adam(module, lr=2e-4, betas=(0.5, 0.999)):
    return torch.optim.Adam(module.parameters(), lr=lr, betas=betas, fused=True)


def _device_of(module):
    return next(module.parameters()).device


def _autocast(precision, device):
    return partial(torch.autocast, device.type, torch.bfloat16, enabled=precision == "bf16")


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


class GANStep:
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
        precision: "auto", "fp32" or "bf16"; see `resolve_precision`.

    Calling it with float images (N, C, H, W) in [-1, 1] makes one step and returns a `GANResult`.
    """

    pixel_range = (-1.0, 1.0)
    result_fields = GANResult._fields

    def __init__(
        self,
        generator,
        discriminator,
        *,
        latent_shape=(100, 1, 1),
        loss="non-saturating",
        optimizers=None,
        precision="auto",
    ):
        self.generator = generator
        self.discriminator = discriminator
        self.latent_shape = tuple(latent_shape)
        self.loss = losses.gan_loss(loss)
        self.g_optimizer, self.d_optimizer = optimizers or (_adam(generator), _adam(discriminator))
        self.device = _device_of(generator)
        self.precision = resolve_precision(precision, self.device)
        self._autocast = _autocast(self.precision, self.device)
        self.modules = {"generator": generator, "discriminator": discriminator}
        self.optimizers = {"generator": self.g_optimizer, "discriminator": self.d_optimizer}

    def __call__(self, images):
        """Make one step."""
        images = _checked_images(images, self.device)
        self.d_optimizer.zero_grad(set_to_none=True)
        self.g_optimizer.zero_grad(set_to_none=True)
        z = torch.randn(len(images), *self.latent_shape, device=images.device, dtype=images.dtype)
        with self._autocast():
            fakes = self.generator(z)
        d_loss = self._update_discriminator(images, fakes.detach())
        g_loss = self._update_generator(fakes)
        return GANResult(d_loss, g_loss)

    def _update_discriminator(self, reals, fakes):
        real_loss = self._backward(reals, self.loss.real)
        # Two passes, each with its own batch statistics; the first one's graph is gone by now.
        fake_loss = self._backward(fakes, self.loss.fake)
        self.d_optimizer.step()
        self.d_optimizer.zero_grad(set_to_none=True)  # Their memory serves the generator's update.
        return real_loss + fake_loss

    def _update_generator(self, fakes):
        with _frozen(self.discriminator):
            loss = self._backward(fakes, self.loss.generator)
        self.g_optimizer.step()
        return loss

    def _backward(self, images, loss_of):
        with self._autocast():
            logits = self.discriminator(images)
        loss = loss_of(logits)
        loss.backward()
        return loss.detach()

    @torch.no_grad()
    def sample(self, z):
        """Images in `pixel_range` for this noise, by the running statistics of batch norms."""
        with _evaluating(self.generator), self._autocast():
            return self.generator(z).float()


class VAEStep:
    """Minimise the negative evidence lower bound of one batch (Kingma and Welling, 2014).

    As in PyTorch's public VAE example, what is minimised is the sum over the batch; the result
    holds nats an image.

    Args:
        model: has `encode(images) -> (mu, logvar)` and `decode(z) -> images in [0, 1]`.
        optimizer: of the model's parameters. By default Adam(lr=2e-4, betas=(0.5, 0.999)).
        precision: "auto", "fp32" or "bf16"; see `resolve_precision`.

    Calling it with float images (N, C, H, W) in [0, 1] makes one step and returns a `VAEResult`.
    """

    pixel_range = (0.0, 1.0)
    result_fields = VAEResult._fields

    def __init__(self, model, *, optimizer=None, precision="auto"):
        self.model = model
        self.optimizer = optimizer or _adam(model)
        self.device = _device_of(model)
        self.precision = resolve_precision(precision, self.device)
        self._autocast = _autocast(self.precision, self.device)
        self.modules = {"model": model}
        self.optimizers = {"model": self.optimizer}

    @property
    def latent_shape(self):
        """The shape of one image's latent."""
        return (self.model.latent_dim,)

    def __call__(self, images):
        """Make one step."""
        images = _checked_images(images, self.device)
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            mu, logvar = self.model.encode(images)
        z, kl = reparameterize_with_kl(losses.widen(mu), losses.widen(logvar))
        with self._autocast():
            reconstructions = self.model.decode(z)
        reconstruction, kl = losses.reconstruction_loss(reconstructions, images), kl.sum()
        loss = reconstruction + kl
        loss.backward()
        self.optimizer.step()
        return VAEResult(*(t.detach() / len(images) for t in (loss, reconstruction, kl)))

    @torch.no_grad()
    def sample(self, z):
        """Images in `pixel_range` for this latent, by the running statistics of batch norms."""
        with _evaluating(self.model), self._autocast():
            return self.model.decode(z).float()


@contextmanager
def _evaluating(module):
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
