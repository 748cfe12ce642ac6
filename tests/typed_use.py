"""A program of a user's, which `make lint` type-checks and nobody runs.

What is right must pass. What is wrong has a `type: ignore`, which the checker reports where it is
not needed: so a type that became looser, down to Any, is noticed.
"""

from pathlib import Path

import torch
from torch import nn
from typing_extensions import assert_type

import genfast
from genfast import functional, losses
from genfast.convert import Report
from genfast.models import VAE, DCGANDiscriminator, DCGANGenerator
from genfast.nn import DiscriminatorBlock, FusedSequential, GeneratorBlock
from genfast.training import GANResult, GANStep, VAEResult, VAEStep
from genfast.training.data import LabelledImages, load_images, load_labelled, resize
from genfast.training.evaluation import Evaluation, evaluate
from genfast.training.runs.trained import Trained


def right(images: torch.Tensor, weight: torch.Tensor) -> None:
    generator, discriminator = (
        DCGANGenerator(nz=8, image_size=16),
        DCGANDiscriminator(image_size=16),
    )
    gan = GANStep(generator, discriminator, loss="hinge", precision="bf16", ema=0.999)
    assert_type(gan(images), GANResult)
    assert_type(gan([images, torch.zeros(2, dtype=torch.int64)]).d_loss, torch.Tensor)
    assert_type(gan.sample(torch.randn(2, 8, 1, 1)), torch.Tensor)
    assert_type(gan.why_not_captured, str | None)
    vae = VAEStep(VAE(), likelihood="gaussian", beta=4, image_shape=(1, 28, 28))
    assert_type(vae((images,)), VAEResult)
    assert_type(vae.encode(images), tuple[torch.Tensor, torch.Tensor])

    assert_type(genfast.accelerate(generator, channels_last=True), Report)
    assert_type([entry.how for entry in genfast.accelerate(generator)], list[str])
    genfast.restore(generator)
    with genfast.use_backend("reference"):
        y = functional.conv_block(images, weight, stride=(2, 2), norm="batch", activation="relu")
    assert_type(y, torch.Tensor)
    FusedSequential(GeneratorBlock(8, 4), DiscriminatorBlock(4, 8, norm=False), nn.Flatten())
    assert_type(losses.gan_loss("wgan").generator(y), torch.Tensor)

    assert_type(load_images("digits", 16), torch.Tensor)
    assert_type(resize(load_labelled("digits"), 16), LabelledImages)
    outcome = genfast.train("dcgan", "digits", out="runs/digits", epochs=1)
    assert_type(outcome.picture, Path | None)
    model = genfast.load("runs/digits", "cpu")
    assert_type(model, Trained)
    assert_type(model.sample(4, labels=["0", 1, "2", 3]), torch.Tensor)
    assert_type(evaluate("runs/digits", metrics=["fid"]), Evaluation)


def wrong(images: torch.Tensor, weight: torch.Tensor, network: nn.Module) -> None:
    genfast.accelerate("model")  # type: ignore[arg-type]
    genfast.accelerate(network, True)  # type: ignore[call-arg]
    genfast.accelerat(network)  # type: ignore[attr-defined]
    genfast.use_backend("cuda")  # type: ignore[arg-type]
    genfast.load(3)  # type: ignore[arg-type]
    GANStep(network, network, loss=3)  # type: ignore[arg-type]
    GANStep(network, network, precision="bf61")  # type: ignore[arg-type]
    GANStep(network)  # type: ignore[call-arg]
    GANStep(network, network)("images")  # type: ignore[arg-type]
    print(GANStep(network, network)(images).loss)  # type: ignore[attr-defined]
    VAEStep(network, likelihood="poisson")  # type: ignore[arg-type]
    functional.conv_block(images, weight, norm="layer")  # type: ignore[arg-type]
    functional.reparameterize(images, 0.0)  # type: ignore[arg-type]
    losses.kl_divergence(images)  # type: ignore[call-arg]
    GeneratorBlock("8", 4)  # type: ignore[arg-type]
    DCGANGenerator(image_size=64.0)  # type: ignore[arg-type]
    load_images("digits", 16.0)  # type: ignore[arg-type]
