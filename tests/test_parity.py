"""Thirty training steps, accelerated beside PyTorch's own, from the same start."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_same_losses
from torch import nn

from genfast import accelerate, use_backend
from genfast.models import DCGANDiscriminator, DCGANGenerator
from genfast.nn import GaussianSampler
from genfast.reference import kl_divergence, reparameterize
from genfast.training import GANStep
from genfast.training.steps.stock import StockGANStep

pytestmark = pytest.mark.kernels

STEPS = 20
FEW_STEPS = 5  # Of larger models.


def dcgan():
    """Generator and discriminator of 4 x 4 images: every launch is interpreted."""
    generator = nn.Sequential(
        nn.ConvTranspose2d(4, 8, 2, 1, 0, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(True),
        nn.ConvTranspose2d(8, 1, 4, 2, 1, bias=False),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(
        nn.Conv2d(1, 4, 4, 2, 1, bias=False),
        nn.BatchNorm2d(4),
        nn.LeakyReLU(0.2, True),
        nn.Conv2d(4, 1, 2, 1, 0, bias=False),
    )
    return generator, discriminator


def train_dcgan(generator, discriminator, device):
    """The losses of both at every step, by the recipe of Radford et al. (2016)."""
    draw = torch.Generator().manual_seed(0)
    networks = generator, discriminator
    optimizers = [torch.optim.Adam(m.parameters(), lr=2e-4, betas=(0.5, 0.999)) for m in networks]
    stock_step = StockGANStep(
        *networks, optimizers, latent_shape=(4, 1, 1), criterion=F.binary_cross_entropy_with_logits
    )
    losses = []
    for _ in range(STEPS):
        real = torch.rand(8, 1, 4, 4, generator=draw).to(device) * 2 - 1
        noise = torch.randn(8, 4, 1, 1, generator=draw).to(device)
        losses.append([loss.item() for loss in stock_step(real, noise)])
    return losses


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@pytest.mark.exhaustive
def test_dcgan(device):
    stock = [model.to(device) for model in dcgan()]
    ours = copy.deepcopy(stock)
    for model in ours:
        assert all(entry.fused for entry in accelerate(model))
    assert_same_losses(train_dcgan(*ours, device), train_dcgan(*stock, device))
    for model, expected in zip(ours, stock, strict=True):
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(buffer, expected.get_buffer(name), rtol=1e-2, atol=1e-3)


def test_dcgan_of_pytorchs_example(device):
    """The layers and channels' proportions of the real one, at a size that can be interpreted."""
    stock = [
        DCGANGenerator(nz=6, ngf=2, nc=3, image_size=16).to(device),
        DCGANDiscriminator(nc=3, ndf=2, image_size=16).to(device),
    ]
    ours = copy.deepcopy(stock)
    results = []
    for backend, models in (("triton", ours), ("reference", stock)):
        step = GANStep(*models, latent_shape=(6, 1, 1), precision="fp32", capture=False)
        torch.manual_seed(0)
        images = torch.randn(4, 3, 16, 16).tanh().to(device)
        with use_backend(backend):
            results.append([[float(loss) for loss in step(images)] for _ in range(FEW_STEPS)])
    assert_same_losses(*results)


class VAE(nn.Module):
    """A convolutional VAE of 4 x 4 images; `sampler` draws the latent."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(1, 4, 2, 2, 0), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 2, 1, 0)
        )
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(3, 4, 2, 1, 0),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 1, 2, 2, 0),
            nn.Sigmoid(),
        )
        self.sampler = GaussianSampler()

    def forward(self, images):
        mu, logvar = self.encoder(images).chunk(2, dim=1)
        return self.decoder(self.sampler(mu, logvar)), mu, logvar


def plain_sampler(mu, logvar):
    """PyTorch's arithmetic with the noise the kernels draw: their z where mu and logvar are 0."""
    zeros = torch.zeros_like(mu)
    with use_backend("triton"):
        eps = GaussianSampler()(zeros, zeros)
    return reparameterize(mu, logvar, eps)


def train_vae(model, device):
    """The negative evidence lower bound at every step (Kingma and Welling, 2014)."""
    draw = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(STEPS):
        images = torch.rand(8, 1, 4, 4, generator=draw).to(device)
        recon, mu, logvar = model(images)
        bce = F.binary_cross_entropy(recon, images, reduction="sum")
        loss = bce + kl_divergence(mu, logvar).sum()
        step(optimizer, loss)
        losses.append([loss.item()])
    return losses


def test_vae(device):
    stock = VAE().to(device)
    ours = copy.deepcopy(stock)
    assert all(entry.fused for entry in accelerate(ours))
    del stock.sampler
    stock.sampler = plain_sampler
    assert_same_losses(train_vae(ours, device), train_vae(stock, device))
