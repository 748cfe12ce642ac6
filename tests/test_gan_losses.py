"""Steps with each of the losses, beside a plain PyTorch loop that writes them as the papers do."""

import copy

import pytest
import torch
from test_losses import of_paper, softplus

from genfast import losses, use_backend
from genfast.models import DCGANDiscriminator, DCGANGenerator
from genfast.training import GANStep
from genfast.training.runs.config import prepare
from genfast.training.runs.loop import train
from genfast.training.steps import adam


def networks():
    torch.manual_seed(0)
    return DCGANGenerator(8, 8, 1, 16), DCGANDiscriminator(1, 8, 16)


def plain_loop(loss, batches):
    """The losses of each step: the discriminator on reals, then on fakes, then the generator."""
    generator, discriminator = networks()
    torch.manual_seed(1)
    g_optimizer, d_optimizer = adam(generator), adam(discriminator)
    found = []
    for reals in batches:
        fakes = generator(torch.randn(len(reals), 8, 1, 1))
        d_optimizer.zero_grad()
        logits = torch.cat([discriminator(reals), discriminator(fakes.detach())])
        d_loss = of_paper(loss, "discriminator", logits)
        d_loss.backward()
        d_optimizer.step()
        g_optimizer.zero_grad()
        if loss == "rpgan":
            of_reals = discriminator(reals).detach()
            g_loss = softplus(of_reals - discriminator(fakes)).mean()
        else:
            g_loss = of_paper(loss, "generator", discriminator(fakes))
        g_loss.backward()
        g_optimizer.step()
        found.append(torch.stack([d_loss.detach(), g_loss.detach()]))
    return torch.stack(found)


@pytest.mark.parametrize(
    ("loss", "merge"),
    [*((loss, None) for loss in losses.GAN_LOSSES), ("lsgan", False), ("rpgan", False)],
)
def test_a_step_is_that_of_a_plain_loop(loss, merge):
    batches = 2 * torch.rand(20, 6, 1, 16, 16) - 1
    expected = plain_loop(loss, batches)
    step = GANStep(*networks(), loss=loss, precision="fp32", merge=merge)
    torch.manual_seed(1)
    ours = torch.stack([torch.stack(tuple(step(images))) for images in batches])
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert (step.why_not_merged is None) == (merge is None)


@pytest.mark.one_in(3)
@pytest.mark.kernels
@pytest.mark.parametrize(("loss", "merge"), [("hinge", True), ("rpgan", True), ("rpgan", False)])
def test_on_the_kernels(loss, merge, device):
    batches = (2 * torch.rand(2, 2, 1, 16, 16) - 1).to(device)
    step = GANStep(*(n.to(device) for n in networks()), loss=loss, precision="fp32", merge=merge,
                   capture=False, output="logits")  # fmt: skip
    torch.manual_seed(1)
    ours = torch.stack([torch.stack(tuple(step(images))) for images in batches])
    if device.type == "cpu":  # Elsewhere other random numbers are drawn.
        with use_backend("reference"):
            expected = plain_loop(loss, batches)
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)
    assert ours.isfinite().all()


@pytest.mark.parametrize("loss", ["minimax", "rpgan"])
def test_a_captured_step(loss, capture_anyway):
    images = 2 * torch.rand(4, 1, 16, 16) - 1
    results = []
    for captured in (False, True):
        if captured:
            capture_anyway()
        step = GANStep(*networks(), loss=loss, precision="fp32")
        torch.manual_seed(1)
        results.append([t.item() for _ in range(3) for t in step(images)])
    assert results[0] == results[1]


def test_pairs_move_running_statistics_as_often_as_a_loop_does():
    step = GANStep(*networks(), loss="rpgan", precision="fp32")
    step(2 * torch.rand(4, 1, 16, 16) - 1)
    (counter,) = {
        m.num_batches_tracked.item()
        for m in step.discriminator.modules()
        if isinstance(m, torch.nn.BatchNorm2d)
    }
    assert counter == 4  # Of real and of generated images, for either network.


def test_uneven_networks_with_pairs():
    """Maps of logits, and networks of one's own whose logits are (N, 1) or (N,)."""
    generator, _ = networks()
    patches = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 4, 2, 1), torch.nn.Conv2d(4, 1, 3))
    step = GANStep(generator, patches, loss="rpgan", precision="fp32")
    before = copy.deepcopy(generator.state_dict())
    d_loss, g_loss = step(2 * torch.rand(3, 1, 16, 16) - 1)
    assert d_loss.isfinite() and g_loss.isfinite()
    assert any(not torch.equal(v, before[k]) for k, v in generator.state_dict().items())


@pytest.mark.parametrize("loss", ["hinge", "rpgan"])
def test_a_run_from_settings_and_its_resume(loss, tmp_path):
    given = dict(epochs=1, batch_size=400, nz=4, ngf=4, ndf=4, image_size=16, loss=loss)
    config, images = prepare("dcgan", "digits", given)
    assert config.loss == loss
    outcome = train(config, images, tmp_path / "run", device="cpu", max_seconds=0)
    assert outcome.steps == 1
    rest = train(config, images, tmp_path / "run", device="cpu",
                 resume_from=tmp_path / "run" / "checkpoint.pt")  # fmt: skip
    assert rest.finished
