"""Half-precision copies of weights: the same training as autocast's own conversions."""

import copy

import pytest
import torch
from torch import nn

import genfast
from genfast.losses import gan_loss
from genfast.models import VAE, DCGANDiscriminator, DCGANGenerator
from genfast.training import GANStep, VAEStep
from genfast.training.steps.half_weights import HalfWeights, in_use


def _dcgan():
    torch.manual_seed(0)
    return DCGANGenerator(8, 4, 3, 16), DCGANDiscriminator(3, 4, 16)


def _autocast_gan_step(generator, discriminator, images, z, optimizers):
    """The step by autocast alone."""
    loss = gan_loss("non-saturating")
    with torch.autocast("cpu", torch.bfloat16):
        fakes = generator(z)
    for pass_images, loss_of in ((images, loss.real), (fakes.detach(), loss.fake)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = discriminator(pass_images)
        loss_of(logits).backward()
    optimizers[1].step()
    optimizers[1].zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        logits = discriminator(fakes)
    loss.generator(logits).backward(inputs=list(generator.parameters()))
    optimizers[0].step()
    optimizers[0].zero_grad()


def _adams(*modules):
    return [torch.optim.Adam(m.parameters(), 2e-4, (0.5, 0.999), fused=True) for m in modules]


def test_gan_step_is_autocasts_to_the_last_bit():
    ours, theirs = _dcgan(), _dcgan()
    step = GANStep(*ours, latent_shape=(8, 1, 1), precision="bf16", merge=False)
    optimizers = _adams(*theirs)
    for i in range(3):
        images = torch.randn(4, 3, 16, 16).tanh().contiguous(memory_format=torch.channels_last)
        torch.manual_seed(i)
        step(images)
        torch.manual_seed(i)
        _autocast_gan_step(*theirs, images, torch.randn(4, 8, 1, 1), optimizers)
    for mine, other in zip(ours, theirs, strict=True):
        for (name, p), q in zip(
            mine.state_dict().items(), other.state_dict().values(), strict=True
        ):
            assert torch.equal(p, q), name


def test_parameters_stay_and_gradients_are_float32():
    model = VAE(image_dim=16, hidden_dim=8, latent_dim=2)
    before = dict(model.named_parameters())
    step = VAEStep(model, precision="bf16")
    step(torch.rand(4, 1, 4, 4))
    after = dict(model.named_parameters())
    assert all(after[name] is p and p.dtype == torch.float32 for name, p in before.items())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in after.values())


def test_gradients_add_to_those_that_are_there():
    layer = nn.Linear(3, 2)
    x = torch.randn(5, 3)
    half = HalfWeights(layer, torch.bfloat16)
    for passes in (1, 2):
        with in_use(half), torch.autocast("cpu", torch.bfloat16):
            layer(x).sum().backward()
            half.hand_over_gradients()
        expected = passes * x.bfloat16().sum(0).float().expand(2, 3)
        torch.testing.assert_close(layer.weight.grad, expected, rtol=2e-2, atol=2e-2)


def test_changes_between_steps_and_frozen_layers_count():
    layer = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    layer[0].weight.requires_grad_(False)
    half = HalfWeights(layer, torch.bfloat16)
    for value in (1.0, 2.0):
        with torch.no_grad():
            layer[0].weight.fill_(value)
        with in_use(half):
            assert layer[0].weight.dtype == torch.bfloat16
            assert layer[0].weight.eq(value).all() and not layer[0].weight.requires_grad
            with torch.autocast("cpu", torch.bfloat16):
                layer(torch.randn(4, 3)).sum().backward()
            half.hand_over_gradients()
    assert layer[0].weight.grad is None and layer[1].weight.grad is not None


def test_an_error_leaves_the_parameters():
    layer = nn.Linear(3, 2)
    weight = layer.weight
    with pytest.raises(RuntimeError), in_use(HalfWeights(layer, torch.bfloat16)):
        raise RuntimeError
    assert layer.weight is weight


def test_watched_parameters_stay_themselves():
    layers = [nn.Linear(3, 3) for _ in range(4)]
    seen = []
    layers[0].weight.register_hook(seen.append)
    layers[1].weight.register_post_accumulate_grad_hook(seen.append)
    nn.utils.parametrizations.spectral_norm(layers[2])
    weights = [layer.weight for layer in layers[:2]]
    model = nn.Sequential(*layers)
    with in_use(HalfWeights(model, torch.bfloat16)):
        assert [layer.weight for layer in layers[:2]] == weights
        assert layers[2].parametrizations.weight.original.dtype == torch.float32
        assert layers[3].weight.dtype == torch.bfloat16
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, 3)).sum().backward()
    assert len(seen) == 2


def test_tied_weights_have_one_copy():
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    b.weight = a.weight
    model = nn.Sequential(a, b)
    reference = copy.deepcopy(model)
    x = torch.randn(2, 3)
    half = HalfWeights(model, torch.bfloat16)
    with in_use(half), torch.autocast("cpu", torch.bfloat16):
        assert a.weight is b.weight
        model(x).sum().backward()
        half.hand_over_gradients()
    with torch.autocast("cpu", torch.bfloat16):
        reference(x).sum().backward()
    assert torch.equal(a.weight.grad, reference[0].weight.grad)


def test_networks_that_share_parameters_keep_them():
    generator, discriminator = nn.Linear(4, 4), nn.Linear(4, 4)
    discriminator.bias = generator.bias
    step = GANStep(
        nn.Sequential(nn.Flatten(), generator, nn.Unflatten(1, (1, 2, 2))),
        nn.Sequential(nn.Flatten(), discriminator),
        latent_shape=(4,),
        precision="bf16",
        output="logits",
    )
    step(torch.randn(2, 1, 2, 2).tanh())
    assert step.why_no_half_weights == "the networks share parameters"


def test_a_distributed_network_keeps_its_parameters():
    layer = nn.Linear(3, 3)

    class Distributed(nn.Module):
        __module__ = "torch.nn.parallel.distributed"

        def __init__(self):
            super().__init__()
            self.module = layer

    with in_use(HalfWeights(Distributed(), torch.bfloat16)):
        assert layer.weight.dtype == torch.float32


class LeavesAutocast(nn.Module):
    """Its head runs in float32."""

    def __init__(self):
        super().__init__()
        self.main, self.head = nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), nn.Linear(4, 1)

    def forward(self, x):
        x = self.main(x)
        with torch.autocast(x.device.type, enabled=False):
            return self.head(x.float())


class ReadsAWeight(nn.Module):
    """One of its layers' weights is used in float32 too."""

    def __init__(self):
        super().__init__()
        self.main = nn.Sequential(nn.Flatten(), nn.Linear(16, 1))

    def forward(self, x):
        return self.main(x) * self.main[1].weight.norm()


@pytest.mark.parametrize("make", [LeavesAutocast, ReadsAWeight])
def test_a_forward_of_ones_own_runs_as_under_autocast(make):
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Flatten(), nn.Linear(4, 16), nn.Unflatten(1, (1, 4, 4)))
    ours = generator, make()
    theirs = copy.deepcopy(ours)
    step = GANStep(*ours, latent_shape=(4,), precision="bf16", merge=False)
    reason = f"it, a {make.__name__}, has a forward of its own"
    assert step.why_no_half_weights == f"the discriminator: {reason}"
    optimizers = _adams(*theirs)
    for i in range(3):
        images = torch.randn(4, 1, 4, 4).tanh()
        torch.manual_seed(i)
        step(images)
        torch.manual_seed(i)
        _autocast_gan_step(*theirs, images, torch.randn(4, 4), optimizers)
    for mine, other in zip(ours, theirs, strict=True):
        for p, q in zip(mine.parameters(), other.parameters(), strict=True):
            assert torch.equal(p, q)


def test_whoever_may_read_a_weight_finds_it_as_it_is():
    networks = [copy.deepcopy(network) for network in _dcgan()]
    for network in networks:
        genfast.accelerate(network)
    step = GANStep(*networks, latent_shape=(8, 1, 1), precision="bf16")
    assert step.why_no_half_weights is None
    seen = []
    networks[0].main[0].register_forward_hook(lambda layer, *_: seen.append(layer.weight.dtype))
    assert step.why_no_half_weights == "the generator: its layer main.0 has a hook"
    step(torch.randn(2, 3, 16, 16).tanh())
    assert set(seen) == {torch.float32}
    assert GANStep(*networks, precision="fp32").why_no_half_weights == "fp32 converts no weights"

    class Own(VAE):
        def encode(self, images):
            assert self.fc1.weight.dtype == torch.float32
            return super().encode(images)

    half = HalfWeights(Own(16, 8, 2), torch.bfloat16)
    with in_use(half):
        half._network.encode(torch.rand(2, 16))
