"""The models that runs train: their settings with defaults, and the step that is built of them.

To add one, add a row to `MODELS`.
"""

from collections.abc import Callable
from typing import NamedTuple

from genfast.models import GAN, VAE, VAEGAN, ConvVAE, DCGANDiscriminator, DCGANGenerator
from genfast.training.errors import BadInput
from genfast.training.runs.held_out import num_training
from genfast.training.runs.workers import ALONE, convert_batch_norms
from genfast.training.steps import GANStep, VAEGANStep, VAEStep, adam
from genfast.training.steps.vae import missing_compiler


class Model(NamedTuple):
    """A kind of model.

    Attributes:
        networks: a function of a `Config` that gives its networks with fresh weights, a tuple.
        step: a function of a `Config`, of these on their device, and of the steps of an epoch that
            gives the `Step` that trains them.
        defaults: its settings besides `image_size`, with their values for images of all kinds.
        on_digits: those that differ for the digits, which are few and simple: more epochs, smaller
            images and latents, narrower networks.
        with_labels: those that differ for a conditional run.
        convolutional: whether its networks halve the image down to a few pixels; perceptrons take
            any size.
    """

    networks: Callable
    step: Callable
    defaults: dict
    on_digits: dict
    with_labels: dict = {}
    convolutional: bool = False


def _gan(config):
    gan = GAN(config.image_shape, config.nz, _classes(config), bool(config.batch_norm))
    return gan.generator, gan.discriminator


def _dcgan(config):
    images = dict(nc=config.channels, image_size=_size(config), classes=_classes(config))
    generator = DCGANGenerator(config.nz, config.ngf, **images)
    return generator, DCGANDiscriminator(ndf=config.ndf, **images)


def _vae(config):
    c, h, w = config.image_shape
    return (VAE(image_dim=c * h * w, latent_dim=config.nz, classes=_classes(config)),)


def _conv_vae(config):
    images = dict(nc=config.channels, image_size=_size(config), classes=_classes(config))
    return (ConvVAE(latent_dim=config.nz, width=config.ngf, **images),)


def _vae_gan(config):
    model = VAEGAN(config.channels, _size(config), config.nz, config.ngf, config.ndf)
    return model.encoder, model.decoder, model.discriminator


def _vae_gan_step(config, networks, epoch):
    return VAEGANStep(
        *networks,
        gamma=config.gamma,
        loss=config.loss,
        optimizers=[_adam(network, config) for network in networks],
        precision=config.precision,
    )


def _gan_step(config, networks, epoch):
    generator, discriminator = networks
    return GANStep(
        generator,
        discriminator,
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


def _vae_step(config, networks, epoch):
    (model,) = networks
    device = next(model.parameters()).device
    return VAEStep(
        model,
        optimizer=_adam(model, config),
        clip_grad=config.clip_grad,
        skip_nonfinite=config.skip_nonfinite,
        precision=config.precision,
        compile=bool(config.compile) and missing_compiler(device) is None,
        likelihood=config.likelihood,
        beta=config.beta,
        beta_warmup=config.beta_warmup and max(1, config.beta_warmup * epoch),
        importance_samples=config.importance_samples,
        image_shape=config.image_shape,
    )


def _adam(module, config, lr=None):
    return adam(module, lr or config.lr, (config.beta1, 0.999))


def _size(config):
    return config.image_shape[1:]


def _classes(config):
    """How many classes the networks take labels of; None if they take none."""
    return len(config.classes) if config.conditional else None


_ALL = dict(steps=None, seed=0, precision="auto", background="white")
_GUARDS = dict(clip_grad=None, skip_nonfinite=False)
_GANS = dict(
    batch_size=64, lr=2e-4, lr_g=None, lr_d=None, beta1=0.5, nz=100, loss="non-saturating",
    ema=None, n_critic=1, penalty=None, penalty_weight=None, penalty_every=None, clip_critic=None,
    spectral_norm=False, augment=None, flip=False, **_GUARDS, **_ALL,
)  # fmt: skip
_VAES = dict(
    batch_size=128, epochs=25, lr=1e-3, beta1=0.9, likelihood="bernoulli", beta=1.0,
    beta_warmup=None, importance_samples=None, validate=None, compile=None, **_GUARDS, **_ALL,
)  # fmt: skip
_CONDITIONAL = dict(conditional=False)
_BATCH_NORMS = dict(sync_bn=False)
# Learning rates, betas and widths are those of the papers and of PyTorch's public examples.
MODELS = {
    "gan": Model(
        _gan,
        _gan_step,
        dict(epochs=50, batch_norm=False, **_GANS, **_CONDITIONAL, **_BATCH_NORMS),
        dict(image_size=16, epochs=150),
        with_labels=dict(batch_norm=True, lr_d=6e-4),
    ),
    "dcgan": Model(
        _dcgan,
        _gan_step,
        dict(epochs=25, ngf=64, ndf=64, **_GANS, **_CONDITIONAL, **_BATCH_NORMS),
        dict(image_size=32, epochs=80, lr=5e-4, nz=20, ngf=32, ndf=16),
        convolutional=True,
    ),
    "vae": Model(
        _vae,
        _vae_step,
        dict(nz=20, **_VAES, **_CONDITIONAL),
        dict(image_size=16, batch_size=64, epochs=150, nz=10),
    ),
    "conv-vae": Model(
        _conv_vae,
        _vae_step,
        dict(nz=32, ngf=32, **_VAES, **_CONDITIONAL, **_BATCH_NORMS),
        dict(image_size=16, batch_size=64, epochs=60, nz=10),
        convolutional=True,
    ),
    "vae-gan": Model(
        _vae_gan,
        _vae_gan_step,
        dict(
            batch_size=64,
            epochs=25,
            lr=2e-4,
            beta1=0.5,
            nz=100,
            ngf=64,
            ndf=64,
            loss="non-saturating",
            gamma=1e-2,
            **_ALL,
            **_BATCH_NORMS,
        ),
        dict(image_size=32, epochs=80, lr=5e-4, nz=10, ngf=32, ndf=16),
        convolutional=True,
    ),
}


def check_compiler(config, device):
    """BadInput where training is to be compiled and nothing can: pictures need no compiler."""
    compiler = missing_compiler(device) if config.compile else None
    if compiler:
        raise BadInput(f"expected a C++ compiler for --compile on a CPU, found no {compiler}")


def build_step(config, device, workers=ALONE):
    """The step that trains the model of these settings on this device, with fresh weights.

    workers: the processes that share its batches, which all come here.
    """
    kind = MODELS[config.model]
    networks = [workers.shared(network.to(device)) for network in kind.networks(config)]
    if config.sync_bn and workers.count > 1:  # Only now: on a CPU the wrapper refuses them.
        networks = [convert_batch_norms(network) for network in networks]
    images = num_training(config.num_images, config.validate)
    return kind.step(config, networks, images // (config.batch_size * workers.count))
