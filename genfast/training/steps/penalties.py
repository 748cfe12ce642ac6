"""Penalties on how steep a discriminator is: on its logits' gradient by the images.

To add one, add a row to `PENALTIES`. The command line and `GANStep` take it from there.
"""

from typing import NamedTuple

import torch

from genfast.losses import widen


def _real(reals, fakes):
    return reals


def _fake(reals, fakes):
    return fakes


def _between(reals, fakes):
    """On the line from each real image to a generated one, anywhere with equal probability."""
    share = torch.rand(len(reals), 1, 1, 1, dtype=reals.dtype, device=reals.device)
    return fakes + share * (reals - fakes)


class Penalty(NamedTuple):
    """A penalty on g(x), the gradient of the sum of an image's logits by the image x.

    It is weight * factor * the sum over `points` of mean((|g(x)| - norm)²), with the Euclidean norm
    over all pixels of an image and the mean over the images of a batch, in float32 or wider.

    Attributes:
        points: functions of as many real and generated images that give the images x. Each may draw
            random numbers.
        norm: what |g(x)| should be.
        weight: the default.
        factor: what the weight is multiplied with.
        of_each_image: whether its derivation takes a logit for a function of its own image, which a
            discriminator with batch norm does not give.
    """

    points: tuple
    norm: float
    weight: float
    factor: float = 1.0
    of_each_image: bool = False

    def terms(self, gradient):
        """factor * (|g(x)| - norm)² for each image: (N, C, H, W) to (N,), float32 or wider."""
        gradient = widen(gradient)
        if not self.norm:  # A root would have no derivative at 0.
            return self.factor * gradient.square().sum((1, 2, 3))
        norms = torch.linalg.vector_norm(gradient, dim=(1, 2, 3))
        return self.factor * (norms - self.norm).square()


PENALTIES = {
    # Gulrajani et al. (2017), equation 3.
    "wgan-gp": Penalty((_between,), norm=1.0, weight=10.0, of_each_image=True),
    # Mescheder et al. (2018), equation 9: gamma / 2 times the squared norm. The weight is gamma.
    "r1": Penalty((_real,), norm=0.0, weight=10.0, factor=0.5),
    # The same, equations 9 and 10 together; Huang et al. (2024).
    "r1-r2": Penalty((_real, _fake), norm=0.0, weight=10.0, factor=0.5),
}


def penalty(name):
    """The `Penalty` of that name; ValueError if there is none."""
    if name not in PENALTIES:
        raise ValueError(f"expected a penalty among {tuple(PENALTIES)}, got {name!r}")
    return PENALTIES[name]
