"""The first GAN: two multilayer perceptrons (Goodfellow et al., 2014, arXiv:1406.2661).

The sizes are those of the authors' MNIST experiment: 1200 rectified linear units twice in the
generator, 240 maxout units of 5 pieces twice in the discriminator, with dropout. Two things differ.
Images lie in [-1, 1] and the generator ends in tanh rather than a sigmoid, so that both GANs here
take the same images; and the noise is Gaussian rather than uniform.
"""

import math

from torch import nn


class Maxout(nn.Module):
    """Each output is the largest of `pieces` linear functions (Goodfellow et al., 2013).

    Shape:
        (N, in_features) to (N, out_features).
    """

    def __init__(self, in_features, out_features, pieces):
        super().__init__()
        self.linear = nn.Linear(in_features, out_features * pieces)
        self.pieces = pieces

    def forward(self, x):
        """Evaluate every piece and keep the largest."""
        return self.linear(x).unflatten(1, (-1, self.pieces)).amax(2)


class GANGenerator(nn.Module):
    """Noise to images.

    Args:
        image_shape: (C, H, W) of the images.
        nz: the length of the noise vector.
        hidden: the width of the two hidden layers.

    Shape:
        (N, nz) to (N, C, H, W), in [-1, 1].
    """

    def __init__(self, image_shape=(1, 28, 28), nz=100, hidden=1200):
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.latent_shape = (nz,)
        self.main = nn.Sequential(
            nn.Linear(nz, hidden),
            nn.ReLU(True),
            nn.Linear(hidden, hidden),
            nn.ReLU(True),
            nn.Linear(hidden, math.prod(self.image_shape)),
            nn.Tanh(),
        )

    def forward(self, z):
        """Draw the images that these noise vectors stand for."""
        return self.main(z).view(-1, *self.image_shape)


class GANDiscriminator(nn.Module):
    """Images to logits: positive where an image looks real.

    Args:
        image_shape: (C, H, W) of the images.
        units, pieces: the size of the two maxout layers.

    Shape:
        (N, C, H, W) to (N,).
    """

    def __init__(self, image_shape=(1, 28, 28), units=240, pieces=5):
        super().__init__()
        self.main = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(0.2),
            Maxout(math.prod(image_shape), units, pieces),
            nn.Dropout(0.5),
            Maxout(units, units, pieces),
            nn.Dropout(0.5),
            nn.Linear(units, 1),
        )

    def forward(self, images):
        """Judge the images."""
        return self.main(images).squeeze(1)


class GAN(nn.Module):
    """The pair, as `generator` and `discriminator`, for one shape of images.

    Args:
        image_shape: (C, H, W) of the images.
        nz: the length of the noise vector.
    """

    def __init__(self, image_shape=(1, 28, 28), nz=100):
        super().__init__()
        self.generator = GANGenerator(image_shape, nz)
        self.discriminator = GANDiscriminator(image_shape)
