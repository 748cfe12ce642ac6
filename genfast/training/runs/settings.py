"""The settings of runs: what each may be and what it means. Which model has which: models.py.

To add one, add a row here and name it among the defaults of the models that have it. The command
line, checkpoints and Python's checks follow from that.
"""

from typing import NamedTuple

from genfast.losses import GAN_LOSSES, LIKELIHOODS
from genfast.models.sizes import LARGEST, SMALLEST
from genfast.training.data.decoding import COLOURS, is_colour
from genfast.training.runs.rules import (
    ABOVE_0,
    BELOW_1,
    BETWEEN_0_AND_1,
    FLAG,
    FROM_0,
    Rule,
    names,
    one_of,
    sizes,
    whole,
)
from genfast.training.steps.augment import EXPECTED, are_names
from genfast.training.steps.penalties import PENALTIES
from genfast.training.steps.precision import PRECISIONS


class Setting(NamedTuple):
    """A setting of a run.

    Attributes:
        rule: its values, a `Rule`.
        text: what it means, for the command line's help.
        optional: whether None is a value too: without it.
        once: what runs had that began before there was this setting; None for optional ones.
        metavar: what stands for a value in the help; by default N or X, or the choices.
        default: the default in words; by default it is made of those of the models.
    """

    rule: Rule
    text: str
    optional: bool = False
    once: object = None
    metavar: str | None = None
    default: str | None = None


# In the order of the command line's help.
SETTINGS = {
    "background": Setting(
        Rule(str, COLOURS, is_colour),
        "what lies behind transparent images: white, black or a colour such as '#ff8800'",
        optional=True,
        metavar="COLOUR",
    ),
    "image_size": Setting(
        sizes(),
        "height and width: 64 for squares, else as 96x64; networks of convolutions take "
        f"{SMALLEST} to {LARGEST} for the smaller, where both can be halved until 4 to 7 of it are "
        "left, the others any",
        metavar="PIXELS",
        default="16 for digits, 32 with dcgan; 64 for photos and folders; that of the images for "
        "arrays",
    ),
    "batch_size": Setting(whole(), "images a step, in each process that torchrun started"),
    "epochs": Setting(whole(), "passes over the images", optional=True),
    "steps": Setting(whole(), "training steps in all, in place of --epochs", optional=True),
    "lr": Setting(ABOVE_0, "learning rate of Adam"),
    "beta1": Setting(BELOW_1, "beta1 of Adam"),
    "nz": Setting(whole(), "length of the noise or latent vector"),
    "ngf": Setting(whole(), "channels next to the image in the generator or VAE"),
    "ndf": Setting(whole(), "channels next to the image in the discriminator"),
    "seed": Setting(whole(0, 2**63 - 1), "of weights, noise and the order of the images"),
    "precision": Setting(
        one_of(*PRECISIONS),
        "bf16 and fp16 are autocast; auto takes bf16 where it is fast, else fp32",
    ),
    "loss": Setting(one_of(*GAN_LOSSES), "what a GAN's networks minimise", once="non-saturating"),
    "conditional": Setting(
        FLAG,
        "train on images with labels, and draw images of a class",
        once=False,
    ),
    "ema": Setting(
        BELOW_1,
        "keep an average of a GAN's generator, 0.999 for example, from which pictures are drawn",
        optional=True,
        metavar="DECAY",
    ),
    "lr_g": Setting(
        ABOVE_0, "learning rate of a GAN's generator", optional=True, default="that of --lr"
    ),
    "lr_d": Setting(
        ABOVE_0,
        "learning rate of a GAN's discriminator",
        optional=True,
        default="that of --lr; of a conditional gan 0.0006, where --lr is not given",
    ),
    "n_critic": Setting(whole(), "updates of a discriminator for one of its generator", once=1),
    "penalty": Setting(
        one_of(*PENALTIES), "keeps a discriminator's gradient by its images small", optional=True
    ),
    "penalty_weight": Setting(
        ABOVE_0,
        "weight of --penalty: lambda of wgan-gp, gamma of r1 and r1-r2",
        optional=True,
        default=", ".join(f"{name} {penalty.weight:g}" for name, penalty in PENALTIES.items()),
    ),
    "penalty_every": Setting(
        whole(),
        "at how many updates of a discriminator one has the --penalty, with so many times its "
        "weight",
        optional=True,
        default="1",
    ),
    "clip_critic": Setting(
        ABOVE_0,
        "keep a discriminator's parameters within this distance of 0, such as 0.01 for wgan",
        optional=True,
    ),
    "spectral_norm": Setting(FLAG, "spectral norm on a GAN's discriminator", once=False),
    "augment": Setting(
        Rule(str, EXPECTED, are_names),
        "what a discriminator sees is changed at random, real and generated images alike: "
        f"{EXPECTED}",
        optional=True,
        metavar="NAMES",
    ),
    "clip_grad": Setting(
        ABOVE_0, "scale a network's gradients down to this norm at each update", optional=True
    ),
    "skip_nonfinite": Setting(
        FLAG, "pass over updates that are not finite, and count them, instead of ending", once=False
    ),
    "flip": Setting(FLAG, "mirror real images of a GAN left to right at random", once=False),
    "batch_norm": Setting(FLAG, "batch norm in the generator of perceptrons", once=False),
    "sync_bn": Setting(
        FLAG,
        "batch norms take their statistics from the images of all processes that torchrun started",
        once=False,
    ),
    "likelihood": Setting(
        one_of(*LIKELIHOODS),
        "what a VAE's pixels are, given the latent: white with a probability, or normal",
        once="bernoulli",
    ),
    "beta": Setting(FROM_0, "weight of the KL divergence in a VAE's loss", once=1.0),
    "beta_warmup": Setting(
        whole(),
        "epochs over which that weight grows to --beta",
        optional=True,
        metavar="EPOCHS",
    ),
    "importance_samples": Setting(
        whole(),
        "minimise the importance-weighted bound of so many latents an image",
        optional=True,
        metavar="K",
    ),
    "gamma": Setting(
        FROM_0,
        "weight of a VAE/GAN's reconstruction beside what its discriminator says",
        once=1e-2,
    ),
    "validate": Setting(
        BETWEEN_0_AND_1,
        "keep this share of the images aside, 0.1 for example, and measure a VAE on them",
        optional=True,
        metavar="SHARE",
    ),
    "compile": Setting(
        FLAG,
        "let torch.compile make a VAE's forward and backward pass",
        optional=True,
    ),
}

# What a run notes of its images, and nobody sets.
NOTED = {
    "num_images": whole(),
    "checksum": whole(0, 2**32 - 1),
    "channels": one_of(1, 3),
}
# What a conditional run notes too; other runs have none.
CLASSES = names(2)
RULES = {
    "data": Rule(str, "a name or a path", bool),
    **NOTED,
    "classes": CLASSES,
    **{name: setting.rule for name, setting in SETTINGS.items()},
}


def option(name):
    """A setting's name as it is written on the command line."""
    return "--" + str(name).replace("_", "-")
