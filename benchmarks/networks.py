"""Networks of the shapes that people train, in PyTorch's own layers: for the drop-in benchmark.

Written here after the papers named; widths are those of the public implementations, images smaller
where one step would take seconds on a CPU.
"""

from dataclasses import dataclass

from torch import nn

from benchmarks.workloads import stock
from genfast.models import DCGANDiscriminator, DCGANGenerator


@dataclass(frozen=True)
class Network:
    """A network to be accelerated: `build()` makes it, and it takes (batch_size, *shape)."""

    name: str
    build: callable
    batch_size: int
    shape: tuple[int, ...]


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


def residual_generator(width=32, blocks=3):
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
    for w, stride in ((width, 2), (2 * width, 1)):
        layers += [
            nn.Conv2d(w, 2 * w, 4, stride, 1, bias=False),
            nn.BatchNorm2d(2 * w),
            nn.LeakyReLU(0.2, True),
        ]
    return nn.Sequential(*layers, nn.Conv2d(4 * width, 1, 4, 1, 1))


NETWORKS = (
    Network("DCGAN-64 generator", lambda: stock(DCGANGenerator()), 32, (100, 1, 1)),
    Network("DCGAN-64 discriminator", lambda: stock(DCGANDiscriminator()), 32, (3, 64, 64)),
    Network("CycleGAN generator", residual_generator, 2, (3, 64, 64)),
    Network("PatchGAN", patch_discriminator, 8, (3, 64, 64)),
)
