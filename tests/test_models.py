"""The models: their keys, shapes and initialisation, and that public checkpoints load."""

import pytest
import torch
from torch import nn

from genfast import losses
from genfast.models import GAN, VAE, ConvVAE, DCGANDiscriminator, DCGANGenerator, weights_init


def _batch_norm(index):
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    return [f"main.{index}.{name}" for name in names]


def _stock_generator(nz, ngf, nc):
    """The generator of PyTorch's public DCGAN example, 64 x 64, layer by layer."""
    return nn.Sequential(
        nn.ConvTranspose2d(nz, ngf * 8, 4, 1, 0, bias=False),
        nn.BatchNorm2d(ngf * 8),
        nn.ReLU(True),
        nn.ConvTranspose2d(ngf * 8, ngf * 4, 4, 2, 1, bias=False),
        nn.BatchNorm2d(ngf * 4),
        nn.ReLU(True),
        nn.ConvTranspose2d(ngf * 4, ngf * 2, 4, 2, 1, bias=False),
        nn.BatchNorm2d(ngf * 2),
        nn.ReLU(True),
        nn.ConvTranspose2d(ngf * 2, ngf, 4, 2, 1, bias=False),
        nn.BatchNorm2d(ngf),
        nn.ReLU(True),
        nn.ConvTranspose2d(ngf, nc, 4, 2, 1, bias=False),
        nn.Tanh(),
    )


def _stock_discriminator(nc, ndf):
    """The discriminator of the same example, up to its sigmoid."""
    return nn.Sequential(
        nn.Conv2d(nc, ndf, 4, 2, 1, bias=False),
        nn.LeakyReLU(0.2, True),
        nn.Conv2d(ndf, ndf * 2, 4, 2, 1, bias=False),
        nn.BatchNorm2d(ndf * 2),
        nn.LeakyReLU(0.2, True),
        nn.Conv2d(ndf * 2, ndf * 4, 4, 2, 1, bias=False),
        nn.BatchNorm2d(ndf * 4),
        nn.LeakyReLU(0.2, True),
        nn.Conv2d(ndf * 4, ndf * 8, 4, 2, 1, bias=False),
        nn.BatchNorm2d(ndf * 8),
        nn.LeakyReLU(0.2, True),
        nn.Conv2d(ndf * 8, 1, 4, 1, 0, bias=False),
    )


def test_dcgan_keys_are_those_of_the_public_example():
    generator = [f"main.{i}.weight" for i in (0, 3, 6, 9, 12)]
    generator += [key for i in (1, 4, 7, 10) for key in _batch_norm(i)]
    discriminator = [f"main.{i}.weight" for i in (0, 2, 5, 8, 11)]
    discriminator += [key for i in (3, 6, 9) for key in _batch_norm(i)]
    assert set(DCGANGenerator(ngf=4).state_dict()) == set(generator)
    assert set(DCGANDiscriminator(ndf=4).state_dict()) == set(discriminator)


def test_a_public_generator_checkpoint_loads_and_draws_the_same(tmp_path):
    stock = nn.ModuleDict({"main": _stock_generator(10, 4, 3)})
    torch.save(stock.state_dict(), tmp_path / "netG.pth")
    ours = DCGANGenerator(10, 4, 3)
    ours.load_state_dict(torch.load(tmp_path / "netG.pth", weights_only=True))
    z = torch.randn(2, 10, 1, 1)
    torch.testing.assert_close(ours(z), stock["main"](z))


def test_a_public_discriminator_checkpoint_loads_and_judges_the_same():
    stock = nn.ModuleDict({"main": _stock_discriminator(3, 4)})
    ours = DCGANDiscriminator(3, 4)
    ours.load_state_dict(stock.state_dict())
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), stock["main"](images).flatten())


@pytest.mark.parametrize("image_size", [16, 32, 64, 128, 256])
def test_dcgan_sizes(image_size):
    generator = DCGANGenerator(nz=5, ngf=2, nc=3, image_size=image_size)
    discriminator = DCGANDiscriminator(nc=3, ndf=2, image_size=image_size)
    images = generator(torch.randn(2, 5, 1, 1))
    assert images.shape == (2, 3, image_size, image_size)
    assert images.abs().max() <= 1
    assert discriminator(images).shape == (2,)
    assert generator.main[0].out_channels == 2 * image_size // 8
    assert discriminator.main[-1].in_channels == 2 * image_size // 8


@pytest.mark.parametrize("model", [DCGANGenerator, DCGANDiscriminator, ConvVAE])
@pytest.mark.parametrize(
    ("image_size", "message"),
    [
        (8, "with a smaller side from 16 to 256, got 8"),
        ((320, 512), "with a smaller side from 16 to 256, got 320x512"),
        ((48, 60), "in multiples of 8, as its smaller side is from 32 to 63, got 48x60"),
        ("48", "to be a number of pixels from 1, or a .*, got '48'"),
    ],
)
def test_other_sizes_are_refused(model, image_size, message):
    with pytest.raises(ValueError, match=f"expected image_size {message}"):
        model(image_size=image_size)


def test_discriminator_returns_logits():
    logits = DCGANDiscriminator(1, 8, 16)(torch.randn(64, 1, 16, 16))
    assert (logits < 0).any()
    assert (logits > 0).any()


@pytest.mark.parametrize("model", [DCGANGenerator(ngf=16), DCGANDiscriminator(ndf=16)])
def test_dcgan_initialisation(model):
    for layer in model.main:
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            count = layer.weight.numel()
            # Four standard errors of a mean and of a standard deviation over `count` draws.
            assert abs(layer.weight.mean().item()) < 4 * 0.02 / count**0.5
            assert abs(layer.weight.std().item() - 0.02) < 4 * 0.02 / (2 * count) ** 0.5
        if isinstance(layer, nn.BatchNorm2d):
            count = layer.weight.numel()
            assert abs(layer.weight.mean().item() - 1) < 4 * 0.02 / count**0.5
            assert layer.weight.std() > 0
            assert layer.bias.count_nonzero() == 0


def test_weights_init_applies_to_any_model():
    layer = nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.Linear(2, 2))
    linear = layer[2].weight.clone()
    layer.apply(weights_init)
    assert layer[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert layer[1].weight.mean().item() == pytest.approx(1, abs=0.01)
    assert torch.equal(layer[2].weight, linear)


def test_convolution_weights_lie_channels_last():
    model = DCGANGenerator(ngf=4)
    assert model.main[3].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.main[3].weight.is_contiguous()


def test_gan_shapes():
    gan = GAN(image_shape=(3, 10, 12), nz=7)
    images = gan.generator(torch.randn(4, 7))
    assert images.shape == (4, 3, 10, 12)
    assert images.abs().max() <= 1
    assert gan.discriminator(images).shape == (4,)


def test_vae_keys_are_those_of_the_public_example():
    names = ("fc1", "fc21", "fc22", "fc3", "fc4")
    keys = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    model = VAE()
    assert set(model.state_dict()) == keys
    assert model.fc1.weight.shape == (400, 784)
    assert model.fc21.weight.shape == model.fc22.weight.shape == (20, 400)


@pytest.mark.parametrize("shape", [(5, 784), (5, 1, 28, 28)])
def test_vae_forward(shape):
    recon, mu, logvar = VAE()(torch.rand(shape))
    assert recon.shape == (5, 784)
    assert recon.min() >= 0
    assert recon.max() <= 1
    assert mu.shape == logvar.shape == (5, 20)


@pytest.mark.parametrize("image_size", [16, 32, 64, 128, 256])
def test_conv_vae_forward(image_size):
    model = ConvVAE(nc=3, image_size=image_size, latent_dim=6, width=2)
    images = torch.rand(2, 3, image_size, image_size)
    recon, mu, logvar = model(images)
    assert recon.shape == images.shape
    assert recon.min() >= 0
    assert recon.max() <= 1
    assert mu.shape == logvar.shape == (2, 6)
    assert model.decode(torch.randn(3, 6)).shape == (3, 3, image_size, image_size)


@pytest.mark.parametrize("model", [VAE(), ConvVAE(image_size=16, width=4)])
def test_vae_samples_its_latent(model):
    mu, logvar = torch.full((1000, 2), 3.0), torch.full((1000, 2), -2.0)
    torch.manual_seed(0)
    z = model.reparameterize(mu, logvar)
    assert z.mean().item() == pytest.approx(3, abs=0.05)
    assert z.std().item() == pytest.approx(torch.tensor(-1.0).exp().item(), rel=0.1)


@pytest.mark.parametrize("model", [VAE(256), ConvVAE(image_size=16, width=4)])
def test_vae_reconstructs_in_float32_under_autocast(model):
    with torch.autocast("cpu", torch.bfloat16):
        recon, *_ = model(torch.rand(2, 1, 16, 16))
    assert recon.dtype == torch.float32


def test_gan_losses_are_cross_entropy_against_labels():
    logits = torch.tensor([-200.0, -3.0, 0.0, 0.5, 90.0])
    bce = nn.functional.binary_cross_entropy_with_logits
    loss = losses.gan_loss("non-saturating")
    torch.testing.assert_close(loss.real(logits), bce(logits, torch.ones(5)))
    torch.testing.assert_close(loss.fake(logits), bce(logits, torch.zeros(5)))
    torch.testing.assert_close(loss.generator(logits), bce(logits, torch.ones(5)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_of_half_precision_are_float32(dtype):
    logits = torch.randn(8, dtype=dtype)
    assert losses.real_loss(logits).dtype == torch.float32
    torch.testing.assert_close(losses.fake_loss(logits), losses.fake_loss(logits.float()))


def test_unknown_loss_is_refused():
    with pytest.raises(ValueError, match="expected a loss among .*non-saturating.*, got 'hing'"):
        losses.gan_loss("hing")


def test_elbo_is_that_of_the_public_example():
    images, recon = torch.rand(4, 1, 3, 3), torch.rand(4, 9)
    mu, logvar = torch.randn(4, 2), torch.randn(4, 2)
    bce = nn.functional.binary_cross_entropy(recon, images.view(-1, 9), reduction="sum")
    kl = -0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
    torch.testing.assert_close(losses.elbo_loss(recon, images, mu, logvar), bce + kl)
