"""DCGAN: a GAN of convolutions (Radford, Metz and Chintala, 2016, arXiv:1511.06434).

The layers, their names in `state_dict` and their initialisation are those of the DCGAN among
PyTorch's public examples, so checkpoints load from one into the other. The discriminator ends
before the example's sigmoid: it returns logits, from which the loss is computed more accurately.

With `classes` both are conditional. The generator is given an embedding of the label beside the
noise, in the way of Mirza and Osindero (2014, arXiv:1411.1784); the discriminator adds the inner
product of an embedding of the label and its last features (Miyato and Koyama, 2018,
arXiv:1802.05637).
"""

import torch
from torch import nn

from genfast.models.classes import check_classes
from genfast.models.sizes import ImageSize, halved
from genfast.nn import FusedSequential


def weights_init(module: nn.Module) -> None:
    """Initialise one layer as DCGANs are: `model.apply(weights_init)`.

    Weights of convolutions are drawn from N(0, 0.02), those of batch norms from N(1, 0.02) with
    biases of 0; the second number is the standard deviation.

    Example:
        >>> layer = nn.BatchNorm2d(4).apply(weights_init)
        >>> layer.bias.tolist()
        [0.0, 0.0, 0.0, 0.0]
    """
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


class DCGANGenerator(nn.Module):
    """Noise to images: 4x4 pixels first, then twice the size and half the channels a block.

    Images whose smaller side is no power of two begin with more, 96x64 with 6x4: see
    `genfast.models.sizes.halved`.

    Args:
        nz: the length of the noise vector.
        ngf: the channels of the last hidden layer; each further one towards the noise has twice
            as many.
        nc: the channels of the images.
        image_size: their height and width, an int for squares or (height, width): the smaller from
            16 to 256.
        classes: how many classes there are labels of; None for a generator that takes no labels.

    Shape:
        (N, nz, 1, 1), and int64 labels (N,), to (N, nc, height, width), in [-1, 1].

    Example:
        >>> generator = DCGANGenerator(nz=8, ngf=4, image_size=16)
        >>> generator(torch.randn(2, 8, 1, 1)).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self,
        nz: int = 100,
        ngf: int = 64,
        nc: int = 3,
        image_size: ImageSize = 64,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        size = halved(image_size)
        check_classes(classes)
        self.latent_shape = (nz, 1, 1)
        self.classes = classes
        width = ngf * size.growth
        layers = [
            nn.ConvTranspose2d(2 * nz if classes else nz, width, size.base, 1, 0, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(True),
        ]
        while width > ngf:
            layers += [
                nn.ConvTranspose2d(width, width // 2, 4, 2, 1, bias=False),
                nn.BatchNorm2d(width // 2),
                nn.ReLU(True),
            ]
            width //= 2
        layers += [nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False), nn.Tanh()]
        self.main = FusedSequential(*layers)
        self.apply(weights_init)
        # The layout the kernels read, so that no step repacks a weight.
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if classes:
            self.embedding = nn.Embedding(classes, nz)
            # Of a length of 1, as a one-hot label would have. Where it begins as strong as the
            # noise, a generator of digits comes to draw one picture a class: in 30 epochs the
            # deviation within a class fell to 0.02, this way it stays at 0.19, of 0.29 in the data.
            nn.init.normal_(self.embedding.weight, 0.0, nz**-0.5)

    def forward(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Draw the images that these noise vectors, and labels, stand for."""
        if self.classes:
            z = torch.cat([z, self.embedding(labels)[:, :, None, None]], 1)
        return self.main(z)


class DCGANDiscriminator(nn.Module):
    """Images to logits, the generator mirrored: half the size and twice the channels a block.

    Args:
        nc: the channels of the images.
        ndf: the channels of the first hidden layer; each further one has twice as many.
        image_size: height and width of the images, an int for squares or (height, width): the
            smaller from 16 to 256.
        classes: how many classes there are labels of; None for a discriminator that takes none.

    Shape:
        (N, nc, height, width), and int64 labels (N,), to (N,): positive where an image looks real,
        and of its class.

    Example:
        >>> discriminator = DCGANDiscriminator(ndf=4, image_size=(16, 24))
        >>> discriminator(torch.rand(2, 3, 16, 24) * 2 - 1).shape
        torch.Size([2])
    """

    def __init__(
        self, nc: int = 3, ndf: int = 64, image_size: ImageSize = 64, classes: int | None = None
    ) -> None:
        super().__init__()
        size = halved(image_size)
        check_classes(classes)
        self.classes = classes
        layers = [nn.Conv2d(nc, ndf, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)]
        width = ndf
        while width < ndf * size.growth:
            layers += [
                nn.Conv2d(width, width * 2, 4, 2, 1, bias=False),
                nn.BatchNorm2d(width * 2),
                nn.LeakyReLU(0.2, True),
            ]
            width *= 2
        layers += [nn.Conv2d(width, 1, size.base, 1, 0, bias=False)]
        self.main = FusedSequential(*layers)
        self.apply(weights_init)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if classes:
            self.embedding = nn.Embedding(classes, width)
            nn.init.normal_(self.embedding.weight, 0.0, 0.02)  # As the weights of the last layer.

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Judge the images, and whether they are of these classes."""
        if not self.classes:
            return self.main(images).flatten()
        features = self.main[:-1](images)
        wide = torch.promote_types(features.dtype, torch.float32)
        projection = self.embedding(labels) * features.sum((2, 3), dtype=wide)
        return self.main[-1:](features).flatten() + projection.sum(1)
