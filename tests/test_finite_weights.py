"""Weights that are not finite replace no checkpoint and draw nothing, and a lost game is told."""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from genfast import cli
from genfast.training.errors import BadInput, Diverged
from genfast.training.runs import checkpoint, config, loop
from genfast.training.runs.finite import first_not_finite
from genfast.training.runs.loss_log import LossLog
from genfast.training.runs.models import build_step
from genfast.training.runs.samples import sample_checkpoint

CPU = torch.device("cpu")


def _settings(tmp_path, model="dcgan"):
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16), dtype=np.uint8)
    np.save(tmp_path / "images.npy", images)
    widths = dict(ngf=4, ndf=4) if model == "dcgan" else {}
    given = dict(batch_size=4, nz=3, epochs=4, **widths)
    return config.prepare(model, tmp_path / "images.npy", given)


def _spoiled(monkeypatch, number, spoil):
    """Runs whose networks are spoiled after a step's losses are known, which stay finite."""

    def build_step(settings, device, *rest):
        step = build(settings, device, *rest)
        real, made = step._step, []

        def spoiling(images):
            losses = real(images)
            made.append(1)
            if len(made) == number:
                spoil(step)
            return losses

        step._step = spoiling
        return step

    build = loop.build_step
    monkeypatch.setattr(loop, "build_step", build_step)


def _spoil_weight(step):
    with torch.no_grad():
        next(step.modules["generator"].parameters())[0] = math.nan


def _spoil_statistics(step):
    norm = next(m for m in step.modules["generator"].modules() if isinstance(m, nn.BatchNorm2d))
    norm.running_var[0] = math.inf


@pytest.mark.parametrize("spoil", [_spoil_weight, _spoil_statistics])
def test_the_last_good_checkpoint_stays(tmp_path, monkeypatch, spoil):
    out = tmp_path / "out"
    _spoiled(monkeypatch, 5, spoil)
    expected = r"after step 5 generator\.main.* holds NaN or infinity; the last good checkpoint is "
    with pytest.raises(Diverged, match=expected + re.escape(f"{out}/checkpoint.pt, of step 4")):
        loop.train(*_settings(tmp_path), out, device=CPU, checkpoint_seconds=0)
    assert checkpoint.read_checkpoint(out / "checkpoint.pt")["steps"] == 4


def test_no_picture_of_what_is_not_finite(tmp_path, monkeypatch):
    out = tmp_path / "out"
    _spoiled(monkeypatch, 6, _spoil_weight)  # The last step of an epoch, when no saving is due.
    with pytest.raises(Diverged, match="of step 1"):
        loop.train(*_settings(tmp_path), out, device=CPU, checkpoint_seconds=1000)
    assert [p.name for p in (out / "samples").iterdir()] == ["epoch_001.png"]


def test_a_checkpoint_that_is_not_finite(tmp_path, capsys):
    """As earlier versions wrote them."""
    settings, images = _settings(tmp_path)
    path = tmp_path / "bad.pt"
    step = build_step(settings, CPU)
    step(torch.zeros(4, 1, 16, 16))
    _spoil_weight(step)
    checkpoint.save_checkpoint(path, step, settings.as_dict(), 3)
    expected = "expected finite weights in .*bad.pt, got NaN or infinity in generator.main"
    with pytest.raises(BadInput, match=expected):
        sample_checkpoint(path, 4, tmp_path / "drawn.png", device=CPU)
    with pytest.raises(BadInput, match=expected):
        loop.train(settings, images, tmp_path / "out", device=CPU, resume_from=path)
    assert cli.main(["sample", str(path), "--out", str(tmp_path / "drawn.png")]) == 1
    assert re.search(expected, capsys.readouterr().err)
    assert not (tmp_path / "drawn.png").exists()


def test_only_what_is_not_finite_is_found():
    def found(**changed):
        module = nn.Module()
        tensors = dict(a=torch.full((3,), 3e38), b=torch.ones(2, 2), c=torch.empty(0)) | changed
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return first_not_finite({"net": module})

    assert found() is None
    assert found(d=torch.tensor(2**62), e=torch.tensor(True), f=torch.ones(3).half()) is None
    for value in (math.nan, math.inf, -math.inf):
        assert found(b=torch.tensor([1.0, value, 2.0])) == "net.b"
        assert found(d=torch.tensor([value]).bfloat16()) == "net.d"
    assert first_not_finite({"net": nn.ReLU()}) is None


def _training_with_losses(tmp_path, monkeypatch, d_losses, model="dcgan"):
    """The messages of the warnings of a run with these losses of the discriminator."""

    def add(log, step, epoch, result):
        real(log, step, epoch, [torch.tensor(d_losses[step - 1]), *result[1:]])

    real = LossLog.add
    monkeypatch.setattr(LossLog, "add", add)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loop.train(*_settings(tmp_path, model), tmp_path / "out", device=CPU)
    return [str(w.message) for w in caught]


def test_a_discriminator_that_has_won_is_told_once(tmp_path, monkeypatch):
    losses = [1.0, 0.0, 0.0, 0.0, 0.0, 0.3, 0.0, 1e-4, 0.0, 0.0, 0.0, 0.0]  # Epochs of 3 steps.
    (message,) = _training_with_losses(tmp_path, monkeypatch, losses)
    assert "the discriminator has won: its loss was next to 0 in every step of epoch 3" in message


def test_no_false_alarm(tmp_path, monkeypatch):
    losses = [1.0, 0.0, 0.0, 0.0, 0.0, 0.3, 0.0, 0.0, 0.001, 0.0, 0.0, 0.9]
    assert _training_with_losses(tmp_path, monkeypatch, losses) == []


def test_a_vae_has_no_discriminator(tmp_path, monkeypatch):
    assert _training_with_losses(tmp_path, monkeypatch, [0.0] * 12, "vae") == []
