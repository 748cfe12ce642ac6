"""VAE/GAN: a VAE whose decoder is a GAN's generator (Larsen et al., 2016, arXiv:1512.09300).

The layers are those of DCGANs, for images in [-1, 1].
"""

import torch
from torch import nn

from genfast.models.dcgan import DCGANGenerator, weights_init
from genfast.models.sizes import ImageSize, halved
from genfast.nn import DiscriminatorBlock, FusedSequential


def _halving(
    nc: int, width: int, image_size: ImageSize
) -> tuple[list[DiscriminatorBlock], int, tuple[int, int]]:
    """Blocks from an image to its smallest maps, each with twice the channels.

    Returns:
        (blocks, the channels of the last one, (height, width) of its maps).
    """
    size = halved(image_size)
    blocks, widest = [DiscriminatorBlock(nc, width, inplace=True)], width * size.growth
    while width < widest:
        blocks.append(DiscriminatorBlock(width, width * 2, inplace=True))
        width *= 2
    return blocks, widest, size.base


def _from_maps(in_channels: int, out_channels: int, base: tuple[int, int]) -> DiscriminatorBlock:
    """Maps of (height, width) `base` to as many numbers an image."""
    return DiscriminatorBlock(
        in_channels, out_channels, base, 1, 0, bias=True, norm=False, activation="identity"
    )


class VAEGANEncoder(nn.Module):
    """Images to the mean and log-variance of their latents.

    Args:
        nc: the channels of the images.
        image_size: their height and width, as `DCGANGenerator` takes it.
        nz: the length of the latent vector.
        width: the channels next to the image.

    Shape:
        (N, nc, height, width) to two of (N, nz).

    Example:
        >>> mu, logvar = VAEGANEncoder(image_size=16, nz=8, width=4)(torch.zeros(2, 3, 16, 16))
        >>> mu.shape
        torch.Size([2, 8])
    """

    def __init__(
        self, nc: int = 3, image_size: ImageSize = 64, nz: int = 100, width: int = 64
    ) -> None:
        super().__init__()
        blocks, widest, base = _halving(nc, width, image_size)
        self.main = FusedSequential(*blocks, _from_maps(widest, 2 * nz, base))
        self.apply(weights_init)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode the images."""
        return self.main(images).flatten(1).chunk(2, dim=1)


class VAEGANDiscriminator(nn.Module):
    """Images to logits, in two parts: `features`, and `judge` of these.

    Args:
        nc, image_size: of the images.
        ndf: the channels next to the image.

    Shape:
        (N, nc, height, width) to (N,); features are those of the last halving, (N, 8 * ndf, 4, 4)
        for images of 64 pixels.

    Example:
        >>> VAEGANDiscriminator(image_size=16, ndf=4).features(torch.zeros(2, 3, 16, 16)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(self, nc: int = 3, image_size: ImageSize = 64, ndf: int = 64) -> None:
        super().__init__()
        blocks, widest, base = _halving(nc, ndf, image_size)
        self.features = FusedSequential(*blocks)
        self.judge = FusedSequential(_from_maps(widest, 1, base), nn.Flatten(0))
        self.apply(weights_init)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Judge the images."""
        return self.judge(self.features(images))


class VAEGAN(nn.Module):
    """The three networks, as `encoder`, `decoder` and `discriminator`.

    Args:
        nc: the channels of the images.
        image_size: their height and width, as `DCGANGenerator` takes it.
        nz: the length of the latent vector.
        ngf: the channels next to the image in encoder and decoder.
        ndf: likewise in the discriminator.

    Example:
        >>> model = VAEGAN(image_size=16, nz=8, ngf=4, ndf=4)
        >>> mu, logvar = model.encoder(torch.zeros(2, 3, 16, 16))
        >>> model.decoder(mu[:, :, None, None]).shape
        torch.Size([2, 3, 16, 16])
    """

    def __init__(
        self, nc: int = 3, image_size: ImageSize = 64, nz: int = 100, ngf: int = 64, ndf: int = 64
    ) -> None:
        super().__init__()
        self.encoder = VAEGANEncoder(nc, image_size, nz, ngf)
        self.decoder = DCGANGenerator(nz, ngf, nc, image_size)
        self.discriminator = VAEGANDiscriminator(nc, image_size, ndf)
