"""Variational autoencoders (Kingma and Welling, 2014, arXiv:1312.6114).

`VAE` has the layers, and the names in `state_dict`, of the VAE among PyTorch's public examples.
Both models end in a sigmoid taken in at least float32 also under autocast: bfloat16 has no number
between 0.996 and 1, and the loss takes the logarithm of one minus the result.

With `classes` encoder and decoder are given the label too (Sohn, Lee and Yan, 2015).
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from genfast.functional import reparameterize
from genfast.models.classes import check_classes
from genfast.models.sizes import ImageSize, halved, height_and_width
from genfast.nn import DiscriminatorBlock, FusedSequential, GeneratorBlock


def _sigmoid(logits: torch.Tensor) -> torch.Tensor:
    return torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))


class VAE(nn.Module):
    """One hidden layer each way, 784-400-20 by default.

    Args:
        image_dim: the number of values of an image.
        hidden_dim: the width of the hidden layers.
        latent_dim: the length of the latent vector.
        classes: how many classes there are labels of; None for a model that takes no labels. Both
            hidden layers are then given a one-hot label beside what they take: that adds a row of
            an embedding to each.

    Example:
        >>> reconstruction, mu, logvar = VAE(64, 16, latent_dim=4)(torch.rand(2, 1, 8, 8))
        >>> reconstruction.shape, mu.shape
        (torch.Size([2, 64]), torch.Size([2, 4]))
    """

    def __init__(
        self,
        image_dim: int = 784,
        hidden_dim: int = 400,
        latent_dim: int = 20,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        check_classes(classes)
        self.latent_dim = latent_dim
        self.classes = classes
        self.fc1 = nn.Linear(image_dim, hidden_dim)
        self.fc21 = nn.Linear(hidden_dim, latent_dim)
        self.fc22 = nn.Linear(hidden_dim, latent_dim)
        self.fc3 = nn.Linear(latent_dim, hidden_dim)
        self.fc4 = nn.Linear(hidden_dim, image_dim)
        if classes:
            self.label_of_encoder = nn.Embedding(classes, hidden_dim)
            self.label_of_decoder = nn.Embedding(classes, hidden_dim)

    def encode(
        self, images: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, ...) in [0, 1] to the mean and log-variance of the latent, (N, latent_dim) each.

        labels: int64 (N,), for a conditional model.
        """
        hidden = self.fc1(images.flatten(1))
        if self.classes:
            hidden = hidden + self.label_of_encoder(labels)
        hidden = F.relu(hidden)
        # Both heads in one matrix product: each alone is too narrow to be worth its start.
        heads = self.fc21, self.fc22
        weight, bias = (torch.cat([getattr(h, name) for h in heads]) for name in ("weight", "bias"))
        mu, logvar = F.linear(hidden, weight, bias).chunk(2, dim=1)
        return mu, logvar

    def reparameterize(self, mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
        """Sample the latent: see `genfast.functional.reparameterize`."""
        return reparameterize(mu, logvar)

    def decode_logits(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """(N, latent_dim) to flat images before the sigmoid, (N, image_dim)."""
        hidden = self.fc3(z)
        if self.classes:
            hidden = hidden + self.label_of_decoder(labels)
        return self.fc4(F.relu(hidden))

    def decode(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """(N, latent_dim) to flat images, (N, image_dim) in [0, 1]."""
        return _sigmoid(self.decode_logits(z, labels))

    def forward(
        self, images: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images, and labels, to (their reconstructions, mu, logvar)."""
        mu, logvar = self.encode(images, labels)
        return self.decode(self.reparameterize(mu, logvar), labels), mu, logvar


class ConvVAE(nn.Module):
    """A VAE of the blocks DCGANs are made of: down to 4x4 pixels or a few more, and up again.

    Args:
        nc: the channels of the images.
        image_size: their height and width, as `DCGANGenerator` takes it.
        latent_dim: the length of the latent vector.
        width: the channels of the layers next to the image; each halving of the size doubles them.
        classes: how many classes there are labels of; None for a model that takes no labels. An
            embedding of the label is then one more channel of the image, and another one lies
            beside the latent.

    Example:
        >>> model = ConvVAE(image_size=16, latent_dim=4, width=4)
        >>> reconstruction, mu, logvar = model(torch.rand(2, 1, 16, 16))
        >>> reconstruction.shape, mu.shape
        (torch.Size([2, 1, 16, 16]), torch.Size([2, 4]))
    """

    def __init__(
        self,
        nc: int = 1,
        image_size: ImageSize = 32,
        latent_dim: int = 32,
        width: int = 32,
        classes: int | None = None,
    ) -> None:
        super().__init__()
        size = halved(image_size)
        heads = 2 * latent_dim
        check_classes(classes)
        self.latent_dim = latent_dim
        self.classes = classes
        widest = width * size.growth
        # The widths from the image's side to the smallest maps.
        widths = [width]
        while widths[-1] < widest:
            widths.append(widths[-1] * 2)
        self.encoder = FusedSequential(
            DiscriminatorBlock(nc + bool(classes), width, inplace=True),
            *(DiscriminatorBlock(w, w * 2, inplace=True) for w in widths[:-1]),
            DiscriminatorBlock(
                widest, heads, size.base, 1, 0, bias=True, norm=False, activation="identity"
            ),
        )
        self.decoder = FusedSequential(
            GeneratorBlock(2 * latent_dim if classes else latent_dim, widest, size.base, 1, 0),
            *(GeneratorBlock(w * 2, w) for w in reversed(widths[:-1])),
            GeneratorBlock(width, nc, bias=True, norm=False, activation="identity"),
        )
        if classes:
            self.label_of_encoder = nn.Embedding(classes, math.prod(height_and_width(image_size)))
            self.label_of_decoder = nn.Embedding(classes, latent_dim)

    def encode(
        self, images: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(N, nc, H, W) in [0, 1] to the mean and log-variance, (N, latent_dim) each.

        labels: int64 (N,), for a conditional model.
        """
        if self.classes:
            channel = self.label_of_encoder(labels).view(-1, 1, *images.shape[2:])
            images = torch.cat([images, channel.to(images.dtype)], 1)
        return self.encoder(images).flatten(1).chunk(2, dim=1)

    def reparameterize(self, mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
        """Sample the latent: see `genfast.functional.reparameterize`."""
        return reparameterize(mu, logvar)

    def decode_logits(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """(N, latent_dim) to images before the sigmoid, (N, nc, H, W)."""
        if self.classes:
            z = torch.cat([z, self.label_of_decoder(labels)], 1)
        return self.decoder(z[:, :, None, None])

    def decode(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """(N, latent_dim) to images, (N, nc, H, W) in [0, 1]."""
        return _sigmoid(self.decode_logits(z, labels))

    def forward(
        self, images: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Images, and labels, to (their reconstructions, mu, logvar)."""
        mu, logvar = self.encode(images, labels)
        return self.decode(self.reparameterize(mu, logvar), labels), mu, logvar
