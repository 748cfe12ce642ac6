"""Networks of the shapes that people train, in PyTorch's own layers: for the drop-in benchmark.

Written here after the papers named. Layers and widths are the papers'; on a CPU images are smaller
and blocks fewer where one step would take seconds. Dropout is left out, as two networks would draw
different masks and could not be compared.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from benchmarks.workloads import stock
from genfast.models import DCGANDiscriminator, DCGANGenerator


@dataclass(frozen=True)
class Network:
    """A network to be accelerated: `build()` makes it, and it takes (batch_size, *shape).

    gpu_batch_size, gpu_shape: what it is timed with on a GPU; None for the same as on a CPU.
    """

    name: str
    build: callable
    batch_size: int
    shape: tuple[int, ...]
    gpu_batch_size: int | None = None
    gpu_shape: tuple[int, ...] | None = None

    def on(self, device):
        """The same network with the batch and the shape for this `torch.device`."""
        if device.type != "cuda":
            return self
        return replace(
            self,
            batch_size=self.gpu_batch_size or self.batch_size,
            shape=self.gpu_shape or self.shape,
        )


class _Residual(nn.Module):
    """Two convolutions padded by reflection, instance norm, and what came in added."""

    def __init__(self, channels):
        super().__init__()
        self.block = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels),
            nn.ReLU(True),
            nn.ReflectionPad2d(1), nn.Conv2d(channels, channels, 3), nn.InstanceNorm2d(channels),
        )  # fmt: skip

    def forward(self, x):
        return x + self.block(x)


def residual_generator(width=64, blocks=6):
    """Image to image, as in CycleGAN (Zhu et al., 2017, arXiv:1703.10593, appendix 7.2)."""
    layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, width, 7), nn.InstanceNorm2d(width), nn.ReLU()]
    for w in (width, 2 * width):
        layers += [nn.Conv2d(w, 2 * w, 3, 2, 1), nn.InstanceNorm2d(2 * w), nn.ReLU(True)]
    layers += [_Residual(4 * width) for _ in range(blocks)]
    for w in (4 * width, 2 * width):
        layers += [
            nn.ConvTranspose2d(w, w // 2, 3, 2, 1, output_padding=1),
            nn.InstanceNorm2d(w // 2),
            nn.ReLU(True),
        ]
    layers += [nn.ReflectionPad2d(3), nn.Conv2d(width, 3, 7), nn.Tanh()]
    return nn.Sequential(*layers)


def patch_discriminator(width=64):
    """A logit for each 70 x 70 patch (Isola et al., 2017, arXiv:1611.07004, section 6.1.2)."""
    layers = [nn.Conv2d(3, width, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    for w, stride in ((width, 2), (2 * width, 2), (4 * width, 1)):
        layers += [
            nn.Conv2d(w, 2 * w, 4, stride, 1, bias=False),
            nn.BatchNorm2d(2 * w),
            nn.LeakyReLU(0.2, True),
        ]
    return nn.Sequential(*layers, nn.Conv2d(8 * width, 1, 4, 1, 1))


class _UpBlock(nn.Module):
    """Pre-activated residual block that doubles the resolution."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.relu = nn.ReLU()

    def forward(self, x):
        h = F.interpolate(self.relu(self.norm1(x)), scale_factor=2)
        h = self.relu(self.norm2(self.conv1(h)))
        return self.conv2(h) + self.shortcut(F.interpolate(x, scale_factor=2))


class ResNetGenerator(nn.Module):
    """32 x 32 images (Miyato et al., 2018, arXiv:1802.05957, appendix B.4)."""

    def __init__(self, width=256, latent_dim=128):
        super().__init__()
        self.width = width
        self.linear = nn.Linear(latent_dim, width * 4 * 4)
        self.block1 = _UpBlock(width, width)
        self.block2 = _UpBlock(width, width)
        self.block3 = _UpBlock(width, width)
        self.norm = nn.BatchNorm2d(width)
        self.conv = nn.Conv2d(width, 3, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, z):
        h = self.linear(z).view(-1, self.width, 4, 4)
        h = self.block3(self.block2(self.block1(h)))
        return torch.tanh(self.conv(self.relu(self.norm(h))))


class _DownBlock(nn.Module):
    """Residual block of convolutions with spectral norm; `first` begins without an activation."""

    def __init__(self, in_channels, out_channels, downsample, first=False):
        super().__init__()
        self.conv1 = spectral_norm(nn.Conv2d(in_channels, out_channels, 3, padding=1))
        self.conv2 = spectral_norm(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = None
        if downsample or in_channels != out_channels:
            self.shortcut = spectral_norm(nn.Conv2d(in_channels, out_channels, 1))
        self.relu = nn.ReLU()
        self.downsample, self.first = downsample, first

    def forward(self, x):
        h = self.conv1(x if self.first else self.relu(x))
        h = self.conv2(self.relu(h))
        if self.shortcut is not None:
            x = self.shortcut(x)
        h = h + x
        return F.avg_pool2d(h, 2) if self.downsample else h


class ResNetDiscriminator(nn.Module):
    """Of 32 x 32 images, a logit each (Miyato et al., 2018, appendix B.4)."""

    def __init__(self, width=128):
        super().__init__()
        self.block1 = _DownBlock(3, width, downsample=True, first=True)
        self.block2 = _DownBlock(width, width, downsample=True)
        self.block3 = _DownBlock(width, width, downsample=False)
        self.block4 = _DownBlock(width, width, downsample=False)
        self.linear = spectral_norm(nn.Linear(width, 1))
        self.relu = nn.ReLU()

    def forward(self, x):
        h = self.block4(self.block3(self.block2(self.block1(x))))
        return self.linear(self.relu(h).sum((2, 3)))


class UNet(nn.Module):
    """Image to image with skip connections (Isola et al., 2017, arXiv:1611.07004, section 6.1.1).

    Each of the `depth` levels halves the resolution.
    """

    def __init__(self, width=64, depth=7):
        super().__init__()
        widths = [min(2**i, 8) * width for i in range(depth)]
        self.down, self.down_norms = nn.ModuleList(), nn.ModuleList()
        for i, (w_in, w_out) in enumerate(zip([3, *widths], widths, strict=False)):
            normed = 0 < i < depth - 1
            self.down.append(nn.Conv2d(w_in, w_out, 4, 2, 1, bias=not normed))
            self.down_norms.append(nn.BatchNorm2d(w_out) if normed else nn.Identity())
        self.up, self.up_norms = nn.ModuleList(), nn.ModuleList()
        for i in reversed(range(1, depth)):
            w_in = widths[i] if i == depth - 1 else 2 * widths[i]  # What skipped comes with it.
            self.up.append(nn.ConvTranspose2d(w_in, widths[i - 1], 4, 2, 1, bias=False))
            self.up_norms.append(nn.BatchNorm2d(widths[i - 1]))
        self.to_image = nn.ConvTranspose2d(2 * width, 3, 4, 2, 1)

    def forward(self, x):
        skips = []
        for i, (conv, norm) in enumerate(zip(self.down, self.down_norms, strict=True)):
            x = norm(conv(F.leaky_relu(x, 0.2) if i else x))
            skips.append(x)
        skips.pop()
        for conv, norm in zip(self.up, self.up_norms, strict=True):
            x = norm(conv(F.relu(x)))
            x = torch.cat([x, skips.pop()], 1)
        return torch.tanh(self.to_image(F.relu(x)))


class BetaVAE(nn.Module):
    """Of 64 x 64 images: (reconstruction logits, mu, logvar).

    Higgins et al., 2017 (ICLR); the layers are those of Burgess et al., 2018, arXiv:1804.03599,
    appendix A, with channels that grow and a convolution in the place of the first linear layer.
    """

    def __init__(self, width=32, latent_dim=10):
        super().__init__()
        w = width
        self.conv1 = nn.Conv2d(3, w, 4, 2, 1)
        self.conv2 = nn.Conv2d(w, w, 4, 2, 1)
        self.conv3 = nn.Conv2d(w, 2 * w, 4, 2, 1)
        self.conv4 = nn.Conv2d(2 * w, 2 * w, 4, 2, 1)
        self.conv5 = nn.Conv2d(2 * w, 8 * w, 4)
        self.to_latent = nn.Linear(8 * w, 2 * latent_dim)
        self.from_latent = nn.Linear(latent_dim, 8 * w)
        self.deconv5 = nn.ConvTranspose2d(8 * w, 2 * w, 4)
        self.deconv4 = nn.ConvTranspose2d(2 * w, 2 * w, 4, 2, 1)
        self.deconv3 = nn.ConvTranspose2d(2 * w, w, 4, 2, 1)
        self.deconv2 = nn.ConvTranspose2d(w, w, 4, 2, 1)
        self.deconv1 = nn.ConvTranspose2d(w, 3, 4, 2, 1)

    def forward(self, x):
        mu, logvar = self.encode(x)
        # Not `randn_like`: of every dtype the same noise.
        noise = torch.randn(logvar.shape, device=logvar.device)
        z = mu + torch.exp(0.5 * logvar) * noise
        return self.decode(z), mu, logvar

    def encode(self, x):
        h = F.relu(self.conv1(x))
        h = F.relu(self.conv2(h))
        h = F.relu(self.conv3(h))
        h = F.relu(self.conv4(h))
        h = F.relu(self.conv5(h))
        return self.to_latent(h.flatten(1)).chunk(2, 1)

    def decode(self, z):
        h = F.relu(self.from_latent(z))[:, :, None, None]
        h = F.relu(self.deconv5(h))
        h = F.relu(self.deconv4(h))
        h = F.relu(self.deconv3(h))
        h = F.relu(self.deconv2(h))
        return self.deconv1(h)


NETWORKS = (
    Network("DCGAN generator", lambda: stock(DCGANGenerator()), 32, (100, 1, 1), 128),
    Network("DCGAN discriminator", lambda: stock(DCGANDiscriminator()), 32, (3, 64, 64), 128),
    Network("CycleGAN generator", residual_generator, 1, (3, 64, 64), 1, (3, 256, 256)),
    Network("PatchGAN", patch_discriminator, 4, (3, 128, 128), 1, (3, 256, 256)),
    Network("SNGAN generator", ResNetGenerator, 4, (128,), 64),
    Network("SNGAN discriminator", ResNetDiscriminator, 16, (3, 32, 32), 64),
    Network("U-Net", UNet, 2, (3, 128, 128), 16),
    Network("BetaVAE", BetaVAE, 64, (3, 64, 64)),
)
