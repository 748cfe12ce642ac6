"""VAE/GANs beside a plain PyTorch loop of the paper's algorithm, and as runs."""

import pytest
import torch
import torch.nn.functional as F
from oracle import LOSS_DRIFT

from genfast import use_backend
from genfast.models import VAEGAN
from genfast.nn import FusedSequential, GeneratorBlock
from genfast.training import VAEGANStep
from genfast.training.data import DataSet
from genfast.training.errors import BadInput
from genfast.training.runs.config import prepare
from genfast.training.runs.models import build_step
from genfast.training.runs.trained import Trained
from genfast.training.steps import adam

GAMMA = 0.05


def networks():
    torch.manual_seed(0)
    model = VAEGAN(1, 16, 3, 4, 4)
    return model.encoder, model.decoder, model.discriminator


def batches(count, size=6):
    return 2 * torch.rand(count, size, 1, 16, 16) - 1


def plain_loop(loss, images):
    """Algorithm 1 of Larsen et al. (2016), the discriminator's update first."""
    encoder, decoder, discriminator = networks()
    optimizers = e_optimizer, g_optimizer, d_optimizer = [adam(n) for n in networks_of(locals())]
    torch.manual_seed(1)
    found = []
    for x in images:
        for optimizer in optimizers:
            optimizer.zero_grad()
        mu, logvar = encoder(x)
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        made = decoder(z[:, :, None, None])
        drawn = decoder(torch.randn(len(x), 3, 1, 1))
        real, again, prior = (discriminator(t) for t in (x, made.detach(), drawn.detach()))
        d_loss = (
            -F.logsigmoid(real).mean() - F.logsigmoid(-again).mean() - F.logsigmoid(-prior).mean()
        )
        d_loss.backward()
        d_optimizer.step()
        with torch.no_grad():
            wanted = discriminator.features(x)
        features = discriminator.features(made)
        again, prior = discriminator.judge(features), discriminator(drawn)
        reconstruction = 0.5 * (features - wanted).square().sum() / len(x)
        kl = -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum() / len(x)
        if loss == "minimax":
            g_loss = F.logsigmoid(-again).mean() + F.logsigmoid(-prior).mean()
        else:
            g_loss = -F.logsigmoid(again).mean() - F.logsigmoid(prior).mean()
        of_encoder = torch.autograd.grad(
            kl + reconstruction, list(encoder.parameters()), retain_graph=True
        )
        of_decoder = torch.autograd.grad(
            GAMMA * reconstruction + g_loss, list(decoder.parameters())
        )
        for network, gradients in ((encoder, of_encoder), (decoder, of_decoder)):
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter.grad = gradient
        e_optimizer.step()
        g_optimizer.step()
        found.append(torch.stack([d_loss, g_loss, reconstruction, kl]).detach())
    return torch.stack(found)


def networks_of(names):
    return [names[name] for name in ("encoder", "decoder", "discriminator")]


def steps(step, images):
    torch.manual_seed(1)
    return torch.stack([torch.stack(tuple(step(x))) for x in images])


@pytest.mark.parametrize(("loss", "merged"), [("non-saturating", True), ("minimax", False)])
def test_a_step_is_that_of_a_plain_loop(loss, merged):
    images = batches(20)
    step = VAEGANStep(*networks(), gamma=GAMMA, loss=loss, precision="fp32")
    assert step.why_not_merged is None
    if not merged:
        step.why_not_merged = "it was switched off"
    ours = steps(step, images)
    torch.testing.assert_close(ours, plain_loop(loss, images), rtol=LOSS_DRIFT, atol=LOSS_DRIFT)
    assert step.sample(torch.randn(2, 3, 1, 1)).shape == (2, 1, 16, 16)


@pytest.mark.kernels
def test_two_losses_go_back_through_one_fused_chain(device):
    """What the step asks of the kernels beside what other steps do."""
    torch.manual_seed(0)
    chain = FusedSequential(GeneratorBlock(3, 4, 4, 1, 0), GeneratorBlock(4, 2)).to(device)
    x = torch.randn(2, 3, 1, 1, device=device, requires_grad=True)
    found = []
    for backend in ("triton", "reference"):
        x.grad = None
        chain.zero_grad()
        with use_backend(backend):
            y = chain(x)
            y.square().sum().backward(inputs=[x], retain_graph=True)
            assert all(p.grad is None for p in chain.parameters())
            y.sum().backward(inputs=list(chain.parameters()))
        found.append([x.grad, *(p.grad for p in chain.parameters())])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_captured(precision, capture_anyway):
    """fp16 scales its losses, two of which go back through one graph."""
    images = batches(2)
    results = []
    for captured in (False, True):
        if captured:
            capture_anyway()
        step = VAEGANStep(*networks(), precision=precision)
        results.append(steps(step, images))
    assert results[0].dtype == torch.float32 and results[0].isfinite().all()
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(loss="rpgan"), "expected a loss that judges images alone for a VAE/GAN, got rpgan"),
        (dict(gamma=-1), "expected gamma to be a number from 0, got -1"),
        (dict(optimizers=[]), None),
        (dict(optimizers=[1]), "expected optimizers of the encoder, the decoder and the discrim"),
    ],
)
def test_what_does_not_fit(options, message):
    if message is None:
        VAEGANStep(*networks(), **options)
        return
    with pytest.raises(ValueError, match=message):
        VAEGANStep(*networks(), **options)


def test_networks_that_do_not_fit():
    encoder, decoder, discriminator = networks()
    with pytest.raises(TypeError, match=r"discriminator with features\(images\) and judge"):
        VAEGANStep(encoder, decoder, torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="expected latent_shape, or a decoder that has one, got N"):
        VAEGANStep(encoder, decoder.main, discriminator)
    with pytest.raises(ValueError, match=r"the decoder makes, \(2, 1, 16, 16\), got \(2, 1, 32"):
        VAEGANStep(VAEGAN(1, 32, 3, 2).encoder, decoder, discriminator)(torch.zeros(2, 1, 32, 32))


def test_a_trained_one_encodes_images_from_0_to_1():
    """Its networks take those from -1 to 1."""
    settings = dict(nz=3, ngf=4, ndf=4, precision="fp32")
    levels = torch.randint(0, 256, (4, 1, 16, 16), dtype=torch.uint8)
    levels[0, 0, 0, :2] = torch.tensor([0, 255])
    config, _ = prepare("vae-gan", DataSet(levels), settings)
    step = build_step(config, torch.device("cpu"))
    trained = Trained(config, step, "checkpoint.pt", 0)
    with torch.no_grad():
        found = step.encoder.eval()(levels / 127.5 - 1)
    expected = tuple(t.reshape(4, *step.latent_shape) for t in found)
    for images in (levels, levels / 255):
        torch.testing.assert_close(trained.encode(images), expected)
    with pytest.raises(BadInput, match=r"expected images in \[0, 1\], got values from -1 to 1"):
        trained.encode(levels / 127.5 - 1)


def test_a_loss_of_pairs_is_refused():
    with pytest.raises(BadInput, match="--loss that judges images alone for vae-gan, got rpgan"):
        prepare("vae-gan", "digits", dict(loss="rpgan"))
