"""The first GAN: two multilayer perceptrons (Goodfellow et al., 2014, arXiv:1406.2661).

The sizes are those of the authors' MNIST experiment: 1200 rectified linear units twice in the
generator, 240 maxout units of 5 pieces twice in the discriminator, with dropout. Two things differ.
Images lie in [-1, 1] and the generator ends in tanh rather than a sigmoid, so that both GANs here
take the same images; and the noise is Gaussian rather than uniform.

`batch_norm` puts batch norm (Ioffe and Szegedy, 2015, arXiv:1502.03167) before the rectifiers of
the generator, as DCGAN's has it: what the noise adds to a layer is then not drowned by what is
common to all images. With labels the generator needs it, or it comes to draw one image a class.

With `classes` the networks are conditional as those of Mirza and Osindero (2014, arXiv:1411.1784):
labels and noise, or labels and images, have hidden layers of their own, side by side, before one
that joins them. The layer of a label is an embedding: that is what a layer makes of a one-hot
vector.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from genfast.models.classes import check_classes
from genfast.nn import FusedSequential


class Maxout(nn.Module):
    """Each output is the largest of `pieces` linear functions (Goodfellow et al., 2013).

    Shape:
        (N, in_features) to (N, out_features).
    """

    def __init__(self, in_features: int, out_features: int, pieces: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, out_features * pieces)
        self.pieces = pieces

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Evaluate every piece and keep the largest."""
        return self.linear(x).unflatten(1, (-1, self.pieces)).amax(2)


class GANGenerator(nn.Module):
    """Noise to images.

    Args:
        image_shape: (C, H, W) of the images.
        nz: the length of the noise vector.
        hidden: the width of the two hidden layers.
        classes: how many classes there are labels of; None for a generator that takes no labels.
        batch_norm: whether batch norm comes before the rectifiers. It trains on two images or more.

    Shape:
        (N, nz), and int64 labels (N,), to (N, C, H, W), in [-1, 1].

    Example:
        >>> generator = GANGenerator((1, 8, 8), nz=4, hidden=16, classes=10)
        >>> generator(torch.randn(2, 4), torch.tensor([3, 7])).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 28, 28),
        nz: int = 100,
        hidden: int = 1200,
        classes: int | None = None,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        check_classes(classes)
        self.image_shape = tuple(image_shape)
        self.latent_shape = (nz,)
        self.classes = classes
        # Of the first layer a sixth is the noise's, the rest the label's: 200 and 1000 there.
        of_noise = hidden // 6 if classes else hidden
        layers = _layer(nz, of_noise, batch_norm)
        self._joined = len(layers)  # Where the label's comes to the noise's.
        layers += _layer(hidden, hidden, batch_norm)
        layers += [nn.Linear(hidden, math.prod(self.image_shape)), nn.Tanh()]
        self.main = FusedSequential(*layers)
        if classes:
            self.embedding = nn.Embedding(classes, hidden - of_noise)
            nn.init.normal_(self.embedding.weight, 0.0, nz**-0.5)  # Not to drown the noise.

    def forward(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Draw the images that these noise vectors, and labels, stand for."""
        if not self.classes:
            return self.main(z).view(-1, *self.image_shape)
        hidden = self.main[: self._joined](z)
        of_label = self.embedding(labels).relu().to(hidden.dtype)
        images = self.main[self._joined :](torch.cat([hidden, of_label], 1))
        return images.view(-1, *self.image_shape)


def _layer(in_features: int, out_features: int, batch_norm: bool) -> list[nn.Module]:
    norm = [nn.BatchNorm1d(out_features)] if batch_norm else []
    return [nn.Linear(in_features, out_features), *norm, nn.ReLU(True)]


class GANDiscriminator(nn.Module):
    """Images to logits: positive where an image looks real.

    Args:
        image_shape: (C, H, W) of the images.
        units, pieces: the size of the two maxout layers.
        classes: how many classes there are labels of; None for a discriminator that takes none.

    Shape:
        (N, C, H, W), and int64 labels (N,), to (N,).

    Example:
        >>> GANDiscriminator((1, 8, 8), units=8)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2])
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 28, 28),
        units: int = 240,
        pieces: int = 5,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        check_classes(classes)
        self.classes = classes
        of_label = 5 * units // 24 if classes else 0  # 50 there.
        self.main = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(0.2),
            Maxout(math.prod(image_shape), units, pieces),
            nn.Dropout(0.5),
            Maxout(units + of_label, units, pieces),
            nn.Dropout(0.5),
            nn.Linear(units, 1),
        )
        if classes:
            # From N(0, 1): begun smaller, the label of digits was passed over for long.
            self.embedding = nn.Embedding(classes, of_label)

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Judge the images, and whether they are of these classes."""
        if not self.classes:
            return self.main(images).squeeze(1)
        hidden = self.main[:3](images)
        hidden = torch.cat([hidden, self.embedding(labels).to(hidden.dtype)], 1)
        return self.main[3:](hidden).squeeze(1)


class GAN(nn.Module):
    """The pair, as `generator` and `discriminator`, for one shape of images.

    Args:
        image_shape: (C, H, W) of the images.
        nz: the length of the noise vector.
        classes: how many classes there are labels of; None for networks that take no labels.
        batch_norm: whether the generator has batch norm.

    Example:
        >>> gan = GAN((1, 8, 8), nz=4)
        >>> gan.discriminator(gan.generator(torch.randn(2, 4))).shape
        torch.Size([2])
    """

    def __init__(
        self,
        image_shape: Sequence[int] = (1, 28, 28),
        nz: int = 100,
        classes: int | None = None,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.generator = GANGenerator(image_shape, nz, classes=classes, batch_norm=batch_norm)
        self.discriminator = GANDiscriminator(image_shape, classes=classes)
