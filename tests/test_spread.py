"""Steps whose batch is spread over processes: what one process makes of all of it."""

import pytest
import torch
from oracle import LOSS_DRIFT
from process_group import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from genfast import functional
from genfast.backend import use_backend
from genfast.models import ConvVAE, DCGANDiscriminator, DCGANGenerator
from genfast.training import GANStep, VAEStep

STEPS = 20
COUNTS = [(3, 2), (2, 4)]  # Of images a process, in turn.


def _drawn(steps, counts, *shape, seed):
    """For each step, a tensor of each process: in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return [
        [torch.rand(n, *shape, generator=generator) for n in counts[i % len(counts)]]
        for i in range(steps)
    ]


def _networks(kind):
    torch.manual_seed(0)
    if kind == "vae":
        return (ConvVAE(1, 16, 3, 4),)
    generator, discriminator = DCGANGenerator(3, 4, 1, 16), DCGANDiscriminator(1, 4, 16)
    if kind == "unmerged":
        discriminator = nn.Sequential(discriminator, nn.Identity())
    return generator, discriminator


def _step(kind, networks):
    if kind == "vae":
        return VAEStep(*networks, precision="fp32")
    settings = {
        "merged": {},
        "unmerged": {"merge": False, "spectral_norm": True},
        "paired": {"loss": "rpgan", "penalty": "r1", "penalty_every": 2, "ema": 0.9},
    }
    return GANStep(*networks, precision="fp32", latent_shape=(3, 1, 1), **settings[kind])


def _trained(step, batches, noises):
    """The losses of the steps, with this noise in place of random numbers, and all weights."""
    losses = []
    for images, noise in zip(batches, noises, strict=True):
        step._generate = lambda images, z=noise: step.generator(z)
        functional._draw_noise = lambda mu, generator, z=noise: z.view(mu.shape)
        images = images if isinstance(step, VAEStep) else images * 2 - 1
        losses.append(torch.stack(step(images)).detach())
    modules = {name: m.state_dict() for name, m in step.modules.items()}
    return torch.stack(losses), modules, getattr(step, "why_not_merged", None)


def _part(rank, kind, counts):
    with use_backend("reference"):
        networks = _networks(kind)
        if rank:  # The wrapper gives all processes the weights of the first.
            for p in (p for n in networks for p in n.parameters()):
                p.detach().add_(1)
            torch.manual_seed(rank)  # And the step gives them what it draws for itself.
        wrapped = [DistributedDataParallel(n) for n in networks]
        for network in networks:  # Only now: on a CPU the wrapper refuses them.
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
        step = _step(kind, wrapped)
        batches = [parts[rank] for parts in _drawn(STEPS, counts, 1, 16, 16, seed=1)]
        noises = [parts[rank] for parts in _drawn(STEPS, counts, 3, 1, 1, seed=2)]
        return _trained(step, batches, noises)


@pytest.mark.parametrize(
    ("kind", "counts"),
    [("merged", COUNTS), ("unmerged", COUNTS), ("paired", COUNTS), ("vae", [(3, 2, 1, 2)])],
)
def test_processes_train_as_one(kind, counts, tmp_path, monkeypatch):
    monkeypatch.setattr(functional, "_draw_noise", None)  # To be put back afterwards.
    results = run(_part, len(counts[0]), tmp_path, kind, counts)
    batches, noises = (
        [torch.cat(parts) for parts in _drawn(STEPS, counts, *shape, seed=seed)]
        for shape, seed in (((1, 16, 16), 1), ((3, 1, 1), 2))
    )
    losses, modules, why = _trained(_step(kind, _networks(kind)), batches, noises)
    for their_losses, their_modules, their_why in results:
        torch.testing.assert_close(their_losses, losses, rtol=LOSS_DRIFT, atol=1e-5)
        torch.testing.assert_close(their_losses[0], losses[0], rtol=1e-5, atol=1e-6)
        assert their_why == why
        for name, state in modules.items():
            assert their_modules[name].keys() == state.keys()
            for key, value in state.items():
                expected = value.double() if value.is_floating_point() else value
                found = their_modules[name][key].to(expected.dtype)
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def _refused(rank):
    generator, discriminator = _networks("merged")
    with pytest.raises(ValueError, match="expected all networks in DistributedDataParallel or no"):
        GANStep(DistributedDataParallel(generator), discriminator)
    from torch.distributed.fsdp import fully_shard

    with pytest.raises(ValueError, match="that each process has whole.*sharded"):
        GANStep(fully_shard(nn.Linear(3, 4)), discriminator)


def test_what_is_wrapped_otherwise_is_refused(tmp_path):
    run(_refused, 1, tmp_path)
