"""The step of PyTorch's example that all comparisons share: its order, and what its options do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from genfast.training.steps.stock import StockGANStep, loss_of_logits


def _networks():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (1, 2, 2)))
    discriminator = nn.Sequential(
        nn.Conv2d(1, 4, 2), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(4, 1)
    )
    return generator, discriminator


def _step(networks, **options):
    optimizers = [torch.optim.SGD(n.parameters(), 0.1) for n in networks]
    options = dict(latent_shape=(3,), criterion=loss_of_logits) | options
    return StockGANStep(*networks, optimizers, **options)


def _trained(images, **options):
    networks = _networks()
    step = _step(networks, **options)
    torch.manual_seed(1)
    losses = [torch.stack(step(x)) for x in images]
    return torch.stack(losses), [n.state_dict() for n in networks]


IMAGES = torch.randn(3, 8, 1, 2, 2, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize(
    "options",
    [
        dict(frozen=True),
        dict(compiler=lambda function: function),
        dict(criterion=F.binary_cross_entropy_with_logits),
    ],
    ids=lambda options: next(iter(options)),
)
def test_improvements_change_no_number(options):
    torch.testing.assert_close(_trained(IMAGES, **options), _trained(IMAGES))


def test_the_example_s_order():
    """Real and generated images are two batches, and the generator meets the new discriminator."""
    networks = _networks()
    seen = []
    networks[1].register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    noise = torch.randn(8, 3)
    before = [p.detach().clone() for p in networks[1].parameters()]
    fakes = networks[0](noise)
    d_loss, g_loss = _step(networks)(IMAGES[0], noise)
    (real, on_real), (detached, on_fake), (last, on_last) = seen
    assert torch.equal(real, IMAGES[0])
    assert torch.equal(detached, fakes)
    assert torch.equal(last, fakes)
    assert (detached.requires_grad, last.requires_grad) == (False, True)
    expected = F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
    torch.testing.assert_close(d_loss, expected)
    torch.testing.assert_close(g_loss, F.softplus(-on_last).mean())
    assert not any(map(torch.equal, before[-2:], list(networks[1].parameters())[-2:]))
    assert not torch.equal(on_last, on_fake)
    assert not (d_loss.requires_grad or g_loss.requires_grad)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_generator_s_update_leaves_nothing_out_unless_asked(frozen):
    networks = _networks()
    step = _step(networks, frozen=frozen)
    kept = []
    step.d_optimizer.register_step_post_hook(
        lambda *_: kept.extend(p.grad.clone() for p in networks[1].parameters())
    )
    step(IMAGES[0])
    gradients = [p.grad for p in networks[1].parameters()]
    assert all(map(torch.equal, gradients, kept)) == frozen
    assert all(p.requires_grad for p in networks[1].parameters())


def test_batches_of_another_size():
    losses, _ = _trained([IMAGES[0], IMAGES[1][:5], IMAGES[2]])
    assert losses.isfinite().all()
