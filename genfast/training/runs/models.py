"""The models that runs train: their settings with defaults, and the step that is built of them.

To add one, add a row to `MODELS`.
"""

from collections.abc import Callable
from typing import NamedTuple

from genfast.models import GAN, VAE, ConvVAE, DCGANDiscriminator, DCGANGenerator
from genfast.training.steps import GANStep, VAEStep, adam


class Model(NamedTuple):
    """A kind of model.

    Attributes:
        build: a function of a `Config` and a device that gives the `Step` that trains it, with
            fresh weights.
        defaults: its settings besides `image_size`, with their values for images of all kinds.
        on_digits: those that differ for the digits, which are few and simple: more epochs, smaller
            images and latents, narrower networks.
        convolutional: whether its networks halve the image down to 4 pixels; perceptrons take any
            size.
    """

    build: Callable
    defaults: dict
    on_digits: dict
    convolutional: bool = False


def _gan(config, device):
    gan = GAN(_image_shape(config), config.nz)
    return _gan_step(config, device, gan.generator, gan.discriminator)


def _dcgan(config, device):
    generator = DCGANGenerator(config.nz, config.ngf, config.channels, config.image_size)
    discriminator = DCGANDiscriminator(config.channels, config.ndf, config.image_size)
    return _gan_step(config, device, generator, discriminator)


def _vae(config, device):
    c, h, w = _image_shape(config)
    return _vae_step(config, device, VAE(image_dim=c * h * w, latent_dim=config.nz))


def _conv_vae(config, device):
    model = ConvVAE(config.channels, config.image_size, config.nz, config.ngf)
    return _vae_step(config, device, model)


def _gan_step(config, device, generator, discriminator):
    generator.to(device)
    discriminator.to(device)
    return GANStep(
        generator,
        discriminator,
        latent_shape=generator.latent_shape,
        loss=config.loss,
        ema=config.ema,
        penalty=config.penalty,
        penalty_weight=config.penalty_weight,
        penalty_every=config.penalty_every or 1,
        n_critic=config.n_critic,
        clip_critic=config.clip_critic,
        spectral_norm=config.spectral_norm,
        augment=config.augment,
        flip=config.flip,
        clip_grad=config.clip_grad,
        skip_nonfinite=config.skip_nonfinite,
        optimizers=(
            _adam(generator, config, config.lr_g),
            _adam(discriminator, config, config.lr_d),
        ),
        precision=config.precision,
    )


def _vae_step(config, device, model):
    model.to(device)
    return VAEStep(
        model,
        optimizer=_adam(model, config),
        clip_grad=config.clip_grad,
        skip_nonfinite=config.skip_nonfinite,
        precision=config.precision,
        image_shape=_image_shape(config),
    )


def _adam(module, config, lr=None):
    return adam(module, lr or config.lr, (config.beta1, 0.999))


def _image_shape(config):
    return config.channels, config.image_size, config.image_size


_ALL = dict(seed=0, precision="auto", background="white")
_GUARDS = dict(clip_grad=None, skip_nonfinite=False)
_GANS = dict(
    batch_size=64, lr=2e-4, lr_g=None, lr_d=None, beta1=0.5, nz=100, loss="non-saturating",
    ema=None, n_critic=1, penalty=None, penalty_weight=None, penalty_every=None, clip_critic=None,
    spectral_norm=False, augment=None, flip=False, **_GUARDS, **_ALL,
)  # fmt: skip
_VAES = dict(batch_size=128, epochs=25, lr=1e-3, beta1=0.9, **_GUARDS, **_ALL)
# Learning rates, betas and widths are those of the papers and of PyTorch's public examples.
MODELS = {
    "gan": Model(_gan, dict(epochs=50, **_GANS), dict(image_size=16, epochs=150)),
    "dcgan": Model(
        _dcgan,
        dict(epochs=25, ngf=64, ndf=64, **_GANS),
        dict(image_size=32, epochs=80, lr=5e-4, nz=20, ngf=32, ndf=16),
        convolutional=True,
    ),
    "vae": Model(_vae, dict(nz=20, **_VAES), dict(image_size=16, batch_size=64, epochs=150, nz=10)),
    "conv-vae": Model(
        _conv_vae,
        dict(nz=32, ngf=32, **_VAES),
        dict(image_size=16, batch_size=64, epochs=60, nz=10),
        convolutional=True,
    ),
}


def build_step(config, device):
    """The step that trains the model of these settings on this device, with fresh weights."""
    return MODELS[config.model].build(config, device)
