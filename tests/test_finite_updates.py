"""Gradients that are scaled down, and updates passed over as they are not finite."""

import math

import pytest
import torch

from genfast.models import VAE, DCGANDiscriminator, DCGANGenerator
from genfast.training import GANStep, VAEStep
from genfast.training.errors import Diverged
from genfast.training.runs.checkpoint import read_checkpoint
from genfast.training.runs.config import prepare
from genfast.training.runs.loop import train
from genfast.training.runs.loss_log import LossLog
from genfast.training.steps import base

PRECISIONS = ["fp32", "bf16", "fp16"]


def make(optimizer=None, **options):
    torch.manual_seed(0)
    networks = DCGANGenerator(8, 4, 1, 16), DCGANDiscriminator(1, 4, 16)
    if optimizer:
        options["optimizers"] = [optimizer(n.parameters(), 1.0) for n in networks]
    return GANStep(*networks, **options)


def images():
    return 2 * torch.rand(4, 1, 16, 16) - 1


def values(network):
    return [t.clone() for t in network.state_dict().values()]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_have_at_most_that_norm(precision):
    """An update by plain gradient descent with a rate of 1 is as long as its gradient."""
    for limit, shorter in ((1e-3, False), (1e3, True)):
        step = make(torch.optim.SGD, clip_grad=limit, precision=precision)
        for scaler in step.scalers.values():
            scaler._init_scale = 2.0**10  # Of which no gradient overflows.
        before = [[p.detach().clone() for p in n.parameters()] for n in step.modules.values()]
        step(images())
        for network, old in zip(step.modules.values(), before, strict=True):
            moved = [p - q for p, q in zip(network.parameters(), old, strict=True)]
            length = torch.stack([m.norm() for m in moved]).norm().item()
            assert 1e-3 < length < 1e3 if shorter else length == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD])
def test_what_is_not_finite_leaves_no_trace(optimizer, precision, captured, capture_anyway):
    if captured:
        capture_anyway()
    step = make(optimizer, skip_nonfinite=True, precision=precision)
    for _ in range(4):  # In fp16 the first ones overflow, until the scale fits.
        step(images())
    skipped, scales = step.skipped, [s.get_scale() for s in step.scalers.values()]
    generator, discriminator = (values(n) for n in (step.generator, step.discriminator))
    d_loss, _ = step(images() * math.nan)
    assert d_loss.isnan() and step.skipped == skipped + 1
    assert all(map(torch.equal, values(step.discriminator), discriminator))
    assert not all(map(torch.equal, values(step.generator), generator))
    assert (scales == [1.0, 1.0]) == (precision != "fp16")
    step(images())
    assert step.skipped == skipped + 1
    assert not all(map(torch.equal, values(step.discriminator), discriminator))


def test_a_vae_has_both():
    torch.manual_seed(0)
    model = VAE(64, 8, 2)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    step = VAEStep(
        model, optimizer=optimizer, clip_grad=1e-3, skip_nonfinite=True, precision="fp32"
    )
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    step(torch.rand(4, 1, 8, 8))
    step(torch.full((4, 1, 8, 8), math.nan))
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    assert step.skipped == 1 and (after - before).norm().item() == pytest.approx(1e-3, rel=1e-3)


def test_without_it_nothing_is_counted():
    step = make(precision="fp32")
    step(images() * math.nan)
    assert step.skipped == 0 and "skipped" not in step.modules
    assert not all(p.isfinite().all() for p in step.discriminator.parameters())


def test_a_capture_needs_a_decision_on_the_device(monkeypatch):
    monkeypatch.setattr(base, "why_not_captured", lambda device, optimizers: None)
    step = make(torch.optim.SGD, skip_nonfinite=True)
    assert "decides on the host for optimizers without fused=True" in step.why_not_captured
    with pytest.raises(ValueError, match="a step that can be captured, but skip_nonfinite decides"):
        make(torch.optim.SGD, skip_nonfinite=True, capture=True)


def test_a_run_that_would_end_goes_on(tmp_path, capsys):
    """A weight so large that no update of the discriminator is finite."""
    given = dict(epochs=1, batch_size=600, nz=4, ngf=4, ndf=4, image_size=16, penalty="r1",
                 penalty_weight=1e38, penalty_every=2, precision="fp32")  # fmt: skip
    config, digits = prepare("dcgan", "digits", given)
    with pytest.raises(Diverged):
        train(config, digits, tmp_path / "ends", device="cpu")
    config, digits = prepare("dcgan", "digits", given | dict(skip_nonfinite=True))
    for out, seconds in (("whole", math.inf), ("parts", 0)):
        train(config, digits, tmp_path / out, device="cpu", max_seconds=seconds)
    stopped = tmp_path / "parts" / "checkpoint.pt"
    train(config, digits, tmp_path / "parts", device="cpu", resume_from=stopped)
    assert capsys.readouterr().err.count("\n1 updates were passed over, as they were not fin") == 3
    whole, parts = (read_checkpoint(tmp_path / n / "checkpoint.pt") for n in ("whole", "parts"))
    for name, module in whole["modules"].items():
        assert all(torch.equal(value, parts["modules"][name][key]) for key, value in module.items())


def test_losses_that_are_not_finite_may_be_written(tmp_path):
    log = LossLog(tmp_path / "metrics.csv", ("d_loss",), 4)
    log.add(1, 1, (torch.tensor(math.nan),))
    log.passes_over = True
    assert log.flush()["d_loss"] == "nan"
    log.add(2, 1, (torch.tensor(math.nan),))
    log.passes_over = False
    with pytest.raises(Diverged, match="the losses of step 2 are d_loss nan"):
        log.flush()
