"""Penalties, critics, spectral norm and augmentations, beside a plain PyTorch loop with them."""

import copy
import gc
import warnings
import weakref
from contextlib import contextmanager

import pytest
import torch
from oracle import assert_close
from test_augment import by_image
from test_losses import of_paper, softplus
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrizations import _SpectralNorm

from genfast import autograd
from genfast.backend import use_backend
from genfast.models import DCGANDiscriminator, DCGANGenerator
from genfast.nn import FusedSequential
from genfast.training import GANStep
from genfast.training.errors import BadInput
from genfast.training.runs.checkpoint import read_checkpoint, restore, save_checkpoint
from genfast.training.runs.config import Config, check_settings, prepare, prepare_resumed
from genfast.training.runs.loop import train
from genfast.training.runs.models import build_step
from genfast.training.steps import adam, base
from genfast.training.steps.penalties import PENALTIES
from genfast.training.steps.precision import Precision

# High, so that what an update leaves out shows in the losses; exact in float32, in which a captured
# step keeps them.
RATES = 2**-8, 2**-10
IGNORED = pytest.mark.filterwarnings("ignore:genfast. the penalty wgan-gp is not defined")


def networks(norm=True):
    torch.manual_seed(0)
    discriminator = DCGANDiscriminator(1, 8, 16)
    if not norm:
        layers = [m for m in discriminator.main if not isinstance(m, nn.BatchNorm2d)]
        discriminator.main = FusedSequential(*layers)
    return DCGANGenerator(8, 8, 1, 16), discriminator


def optimizers(generator, discriminator):
    return tuple(adam(n, lr) for n, lr in zip((generator, discriminator), RATES, strict=True))


def convolutions(discriminator):
    return [layer for layer in discriminator.main if isinstance(layer, nn.Conv2d)]


@contextmanager
def steady(network):
    norms = [m for m in network.modules() if isinstance(m, _SpectralNorm)]
    for norm in norms:
        norm.training = False
    yield
    for norm in norms:
        norm.training = True


def plain_loop(generator, discriminator, batches, *, loss="non-saturating", penalty=None,
               penalty_weight=10, penalty_every=1, n_critic=1, clip_critic=None,
               spectral_norm=False, augment=None, flip=False, merged=True):  # fmt: skip
    """The losses of each step, written as the papers have them."""
    if spectral_norm:
        for layer in convolutions(discriminator):
            parametrizations.spectral_norm(layer)
    g_optimizer, d_optimizer = optimizers(generator, discriminator)
    torch.manual_seed(1)

    def judged(images):
        for name in augment.split(",") if augment else ():
            images = by_image(name, images)
        return discriminator(images)

    def judged_both(reals, fakes):  # The discriminator sees them one after the other.
        images = torch.cat([reals, fakes])
        for name in augment.split(",") if augment else ():
            images = by_image(name, images)
        return torch.cat([discriminator(half) for half in images.chunk(2)])

    def squared_norms(images):
        images = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(judged(images).sum(), images, create_graph=True)
        return gradient.square().sum((1, 2, 3))

    def penalty_of(reals, fakes):
        if penalty == "wgan-gp":
            share = torch.rand(len(reals), 1, 1, 1)
            norms = squared_norms(share * reals + (1 - share) * fakes).sqrt()
            return penalty_weight * ((norms - 1) ** 2).mean()
        points = [reals, fakes] if penalty == "r1-r2" else [reals]
        return penalty_weight / 2 * sum(squared_norms(x).mean() for x in points)

    found = []
    for i, reals in enumerate(batches):
        if flip:
            chosen = torch.rand(len(reals), 1, 1, 1) < 0.5
            pairs = zip(reals, chosen, strict=True)
            reals = torch.stack([image.flip(2) if turn else image for image, turn in pairs])
        fakes = generator(torch.randn(len(reals), 8, 1, 1))
        for layer in convolutions(discriminator):
            layer.weight  # noqa: B018  Of spectral norm an iteration.
        with steady(discriminator):
            d_optimizer.zero_grad()
            if augment and merged:
                logits = judged_both(reals, fakes.detach())
            else:
                logits = torch.cat([judged(reals), judged(fakes.detach())])
            d_loss = of_paper(loss, "discriminator", logits)
            d_loss.backward()
            if penalty and i % penalty_every == 0:
                (penalty_every * penalty_of(reals, fakes.detach())).backward()
            d_optimizer.step()
            if clip_critic:
                for p in discriminator.parameters():
                    p.data.clamp_(-clip_critic, clip_critic)
            if i % n_critic < n_critic - 1:
                g_loss = of_paper(loss, "generator", logits[len(reals) :])
            else:
                g_optimizer.zero_grad()
                if loss == "rpgan":
                    of_reals = judged(reals).detach()
                    g_loss = softplus(of_reals - judged(fakes)).mean()
                else:
                    g_loss = of_paper(loss, "generator", judged(fakes))
                g_loss.backward()
                g_optimizer.step()
        found.append(torch.stack([d_loss.detach(), g_loss.detach()]))
    return torch.stack(found)


def gan_step(generator, discriminator, **options):
    chosen = optimizers(generator, discriminator)
    return GANStep(generator, discriminator, optimizers=chosen, **options)


def losses_of(step, batches):
    torch.manual_seed(1)
    return torch.stack([torch.stack(tuple(step(images))) for images in batches])


@IGNORED
@pytest.mark.parametrize(
    ("options", "norm", "merge"),
    [
        (dict(loss="wgan", penalty="wgan-gp", n_critic=3), False, None),
        (dict(penalty="wgan-gp", penalty_every=2, penalty_weight=1), True, None),
        (dict(penalty="r1", penalty_every=3), True, None),
        (dict(loss="rpgan", penalty="r1-r2", penalty_weight=3), True, None),
        (dict(loss="rpgan", penalty="r1-r2", penalty_weight=3), True, False),
        (dict(loss="wgan", clip_critic=0.02, n_critic=5), True, None),
        (dict(loss="hinge", spectral_norm=True), True, None),
        (dict(loss="hinge", spectral_norm=True, penalty="r1"), False, False),
        (dict(augment="color,translation,cutout", flip=True), True, None),
        (dict(loss="rpgan", augment="translation", penalty="r1"), True, False),
    ],
)
def test_a_step_is_that_of_a_plain_loop(options, norm, merge):
    batches = 2 * torch.rand(20, 4, 1, 16, 16) - 1
    merged = merge is None
    expected = plain_loop(*networks(norm), batches, merged=merged, **options)
    step = gan_step(*networks(norm), precision="fp32", merge=merge, **options)
    found = losses_of(step, batches)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert (step.why_not_merged is None) == (merge is None)


class Tiny(nn.Module):
    """A discriminator of fused blocks for 8 x 8 pixels, which the interpreter gets through soon."""

    def __init__(self, norm):
        super().__init__()
        norms = [nn.BatchNorm2d(4)] if norm else []
        blocks = nn.Conv2d(4, 4, 4, 2, 1), *norms, nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 2)
        self.main = FusedSequential(nn.Conv2d(1, 4, 4, 2, 1), nn.Tanh(), *blocks)

    def forward(self, images):
        return self.main(images).flatten()


def tiny_networks(norm):
    torch.manual_seed(0)
    generator = nn.Sequential(nn.ConvTranspose2d(8, 1, 8), nn.Tanh())
    return generator, Tiny(norm).to(memory_format=torch.channels_last)


@pytest.mark.kernels
@pytest.mark.parametrize(("name", "norm"), [("wgan-gp", False), ("r1-r2", True)])
def test_second_derivatives_on_the_kernels(name, norm, device, monkeypatch):
    """Of real images in place of those between, which in float64 would be others."""
    points = PENALTIES["r1"].points if name == "wgan-gp" else PENALTIES[name].points
    monkeypatch.setitem(PENALTIES, name, PENALTIES[name]._replace(points=points))
    reals, fakes = (torch.randn(3, 1, 8, 8, device=device) for _ in range(2))

    def plain(discriminator):
        dtype, total = next(discriminator.parameters()).dtype, 0
        for images in (reals, fakes)[: len(points)]:
            images = images.to(dtype).requires_grad_()
            logits = discriminator(images).sum()
            (gradient,) = torch.autograd.grad(logits, images, create_graph=True)
            squares = gradient.square().sum((1, 2, 3))
            total = total + (squares / 2 if norm else (squares.sqrt() - 1) ** 2).mean()
        (10 * total).backward()
        return gradients_of(discriminator)

    def gradients_of(discriminator):
        return {f"gradient of {n}": p.grad for n, p in discriminator.named_parameters()}

    generator, discriminator = (n.to(device) for n in tiny_networks(norm))
    with use_backend("reference"):
        eager = plain(copy.deepcopy(discriminator))
        exact = plain(copy.deepcopy(discriminator).double())
    step = GANStep(generator, discriminator, penalty=name, precision="fp32", capture=False)
    step._penalise(reals, fakes)
    assert_close(gradients_of(discriminator), exact, [(eager, exact)])


@pytest.mark.kernels
def test_a_penalty_computes_no_gradient_that_is_thrown_away(device, started):
    images = torch.rand(2, 1, 8, 8, device=device, requires_grad=True)
    _, discriminator = tiny_networks(norm=True)
    discriminator.to(device)
    with autograd.inputs_first():
        total = discriminator(images).sum()
    started.clear()
    (gradient,) = torch.autograd.grad(total, images, create_graph=True)
    assert started and not any("wgrad" in name for name in started)
    gradient.square().sum().backward()
    assert any("wgrad" in name for name in started)
    # The last bias has none, as in PyTorch.
    assert [p.grad is None for p in discriminator.parameters()].count(True) == 1


def test_spectral_norm_leaves_blocks_fused():
    step = gan_step(*networks(), spectral_norm=True)
    runs = step.discriminator.main.plan()
    assert [run.fused and len(run.modules) for run in runs] == [2, 3, 1]
    weight = step.discriminator.main[0].parametrizations.weight.original
    assert any(p is weight for p in step.optimizers["discriminator"].param_groups[0]["params"])


EVERYTHING = dict(
    penalty="r1", penalty_every=3, n_critic=2, spectral_norm=True, clip_critic=0.5,
    augment="color,translation,cutout", flip=True,
)  # fmt: skip


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_turns_are_captured_each(precision, capture_anyway, monkeypatch):
    images = 2 * torch.rand(4, 1, 16, 16) - 1

    def losses(step):
        first = losses_of(step, [images] * 5)
        for optimizer in step.optimizers.values():
            optimizer.param_groups[0]["lr"] = 2**-7
        return torch.cat([first, losses_of(step, [images] * 9)])

    plain = gan_step(*networks(), precision=precision, **EVERYTHING)
    expected = losses(plain)
    capture_anyway()
    recorded, record = [], base.CUDARecorder.record
    monkeypatch.setattr(base.CUDARecorder, "record", lambda *a: recorded.append(1) or record(*a))
    step = gan_step(*networks(), precision=precision, **EVERYTHING)
    assert torch.equal(losses(step), expected)
    turns = list(step._run._steps)
    # The first turn once more: the generator's optimizer had no state yet.
    assert len(recorded) == len(turns) + 1
    assert turns == [(True, False), (False, True), (False, False), (True, True)]
    assert step._run.failure is None
    for ours, theirs in zip(step.modules.values(), plain.modules.values(), strict=True):
        pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)


def test_memory_that_a_graph_reads_outlives_the_next_recording(capture_anyway):
    capture_anyway()
    step = gan_step(*networks(), precision="bf16", n_critic=2)
    images = 2 * torch.rand(4, 1, 16, 16) - 1
    step(images)
    copies = step._precision.half_weights["discriminator"].copies.values()
    first = [weakref.ref(copy) for copy in copies]
    step(images)
    del copies
    gc.collect()
    assert first and all(copy() is not None for copy in first)
    newest = step._precision.half_weights["discriminator"].copies.values()
    assert not any(copy() is other for copy, other in zip(first, newest, strict=True))


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_of_a_linear_discriminator(name):
    """Its gradient is its weight everywhere: here of norm 13, and 0, where a root has no slope."""
    factor = {"wgan-gp": (13 - 1) ** 2, "r1": 13**2 / 2, "r1-r2": 13**2 / 2}[name]
    gradient = torch.tensor([3.0, 4.0, 12.0, 0.0], dtype=torch.bfloat16).view(1, 1, 2, 2)
    terms = PENALTIES[name].terms(gradient.expand(5, 1, 2, 2))
    assert terms.dtype == torch.float32 and terms.tolist() == [factor] * 5
    assert PENALTIES[name].weight == 10
    zero = torch.zeros(1, 1, 2, 2, requires_grad=True)
    PENALTIES[name].terms(zero).sum().backward()
    assert zero.grad.isfinite().all()


def test_points_between_are_anywhere_between():
    torch.manual_seed(0)
    reals, fakes = torch.ones(200, 1, 1, 2), -torch.ones(200, 1, 1, 2)
    (between,) = (points(reals, fakes) for points in PENALTIES["wgan-gp"].points)
    assert torch.equal(between[..., 0], between[..., 1])
    assert between.min() < -0.9 and between.max() > 0.9 and between.mean().abs() < 0.2


def test_gradients_of_scaled_losses_are_scaled_back():
    layer, images = nn.Linear(3, 1), torch.rand(2, 3, requires_grad=True)
    optimizer = torch.optim.Adam(layer.parameters())
    precision = Precision("fp16", images.device, {"d": layer}, {"d": optimizer})
    gradient = precision.gradient(layer(images), images, "d")
    torch.testing.assert_close(gradient, layer.weight.expand(2, 3))
    assert gradient.requires_grad


def test_a_run_and_its_resume(tmp_path):
    given = dict(epochs=1, batch_size=440, nz=4, ngf=4, ndf=4, image_size=16, lr_g=1e-3, lr_d=2e-3)
    config, images = prepare("dcgan", "digits", given | EVERYTHING)
    train(config, images, tmp_path / "whole", device="cpu")
    train(config, images, tmp_path / "parts", device="cpu", max_seconds=0)
    stopped = tmp_path / "parts" / "checkpoint.pt"
    assert read_checkpoint(stopped)["counters"] == {"calls": 1}
    train(config, images, tmp_path / "parts", device="cpu", resume_from=stopped)
    whole, parts = (read_checkpoint(tmp_path / n / "checkpoint.pt") for n in ("whole", "parts"))
    assert whole["counters"] == {"calls": 4}
    for name, module in whole["modules"].items():
        assert all(torch.equal(value, parts["modules"][name][key]) for key, value in module.items())
    rates = [o["param_groups"][0]["lr"] for o in whole["optimizers"].values()]
    assert rates == [1e-3, 2e-3]
    with pytest.raises(BadInput, match="expected no --skip-nonfinite, without which the run in"):
        prepare_resumed("dcgan", None, dict(skip_nonfinite=True), stopped)


def test_a_critic_that_cannot_tell_has_not_won(tmp_path):
    given = dict(epochs=2, batch_size=1000, nz=4, ngf=4, ndf=4, image_size=16, loss="wgan")
    config, images = prepare("dcgan", "digits", given | dict(clip_critic=1e-4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(config, images, tmp_path / "run", device="cpu")
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert abs(float(rows[2].split(",")[2])) < 5e-4


def test_settings_of_before_there_were_these():
    config, _ = prepare("gan", "digits", dict(epochs=1))
    added = ("penalty", "penalty_weight", "penalty_every", "clip_critic", "augment", "lr_g", "lr_d",
             "n_critic", "spectral_norm", "flip")  # fmt: skip
    old = {k: v for k, v in config.as_dict().items() if k not in added}
    found = Config.of_checkpoint({"config": old}, "c.pt")
    assert [getattr(found, name) for name in added] == [None] * 7 + [1, False, False]


@pytest.mark.parametrize("counters", [[], {}, {"calls": -1}, {"calls": "1"}, {"calls": True}])
def test_counters_that_are_none(counters, tmp_path):
    given = dict(epochs=1, batch_size=900, nz=4, ngf=4, ndf=4, image_size=16)
    config, _ = prepare("dcgan", "digits", given)
    step, path = build_step(config, torch.device("cpu")), tmp_path / "c.pt"
    save_checkpoint(path, step, config.as_dict(), 0)
    content = read_checkpoint(path)
    with pytest.raises(BadInput, match="expected a whole genfast checkpoint at .* counters"):
        restore(step, content | {"counters": counters}, path)
    del content["counters"]  # As runs had none that began before there were any.
    restore(step, content, path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(penalty="r3"), r"expected a penalty among \('wgan-gp', 'r1', 'r1-r2'\), got 'r3'"),
        (dict(penalty="r1", penalty_weight=0), "expected penalty_weight to be a number above 0"),
        (dict(penalty="r1", penalty_every=1.5), "expected penalty_every to be a whole number"),
        (dict(penalty_every=4), "expected a penalty for its weight and how often, got none"),
        (dict(n_critic=0), "expected n_critic to be a whole number from 1 on, got 0"),
        (dict(clip_critic=-1), "expected clip_critic to be a number above 0, got -1"),
        (dict(augment="blur"), "expected one or more of color, .* got 'blur'"),
    ],
)
def test_arguments_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        GANStep(*networks(), **options)


def test_discriminators_that_cannot_have_it():
    generator, discriminator = networks()
    GANStep(generator, discriminator, spectral_norm=True)
    with pytest.raises(ValueError, match="layer main.0 has a parametrisation already"):
        GANStep(generator, discriminator, spectral_norm=True)
    step, images = GANStep(*networks(), penalty="wgan-gp"), 2 * torch.rand(2, 1, 16, 16) - 1
    with pytest.warns(UserWarning, match="wgan-gp is not defined for a discriminator with batch"):
        step(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(images)  # It was said.
        GANStep(*networks(norm=False), penalty="wgan-gp")(images)


def test_an_average_moves_when_the_generator_does():
    """Batch norm's statistics move at every call."""
    step = gan_step(*networks(), n_critic=2, ema=0.5, precision="fp32")
    newest, average = (m.main[1].running_mean for m in (step.generator, step.average.module))
    seen = []
    for _ in range(2):
        step(2 * torch.rand(2, 1, 16, 16) - 1)
        seen.append((newest.clone(), average.clone()))
    assert seen[0][0].norm() > 0 and not seen[0][1].any()
    assert torch.equal(seen[1][1], seen[1][0] / 2)


@pytest.mark.parametrize("name", ["penalty_weight", "penalty_every"])
def test_settings_that_need_a_penalty(name):
    option = name.replace("_", "-")
    with pytest.raises(BadInput, match=f"expected --{option} with --penalty, got it alone"):
        check_settings("gan", {name: 2})
    check_settings("gan", {name: 2, "penalty": "r1"})
    with pytest.raises(BadInput, match=f"expected settings that vae has, got --{option}"):
        check_settings("vae", {name: 2})
