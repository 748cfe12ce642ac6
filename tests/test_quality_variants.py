"""The study of losses and other settings: who is trained on what, and what is written of it."""

import csv

import pytest
import torch

from benchmarks import quality, quality_variants
from benchmarks.quality_variants import Variant
from genfast.losses import GAN_LOSSES
from genfast.training.evaluation.digits import Classifier, Digits, load_digits

TINY = (
    Variant("plain", {}),
    Variant("hinge", {"loss": "hinge"}),
    Variant("diverges", {"ema": 0.5}),
    Variant("a tenth", {}, 0.1),
)


def _read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def trained(monkeypatch):
    """Small networks, a classifier at hand, and a list of the sets that variants train on."""
    classifier = Classifier().requires_grad_(False)
    monkeypatch.setattr(quality_variants, "train_classifier", lambda of: (classifier, 0.98))
    monkeypatch.setattr(quality_variants, "VARIANTS", TINY)
    few = Digits(*(part[:200] for part in load_digits(16)))
    monkeypatch.setattr(quality_variants, "load_digits", lambda size: few)
    for name, value in dict(NGF=4, NDF=4, BATCH_SIZE=40, SAMPLES=64).items():
        monkeypatch.setattr(quality, name, value)
    seen, batches, build = [], quality_variants.Batches, quality.genfast_step

    def noting(images, *rest):
        seen.append(images)
        return batches(images, *rest)

    def diverging(networks, device, **options):
        step = build(networks, device, **options)
        if "ema" in options:
            step.optimizers["generator"].param_groups[0]["lr"] = 1e30
        return step

    monkeypatch.setattr(quality_variants, "Batches", noting)
    monkeypatch.setattr(quality, "genfast_step", diverging)
    return seen


def test_a_small_study(tmp_path, trained, capsys):
    pytest.importorskip("matplotlib")
    arguments = ["--variants", "--seeds", "2", "--epochs", "2", "--every", "1", "--device", "cpu"]
    assert quality.main([*arguments, "--out", str(tmp_path)]) == 0
    rows = _read(tmp_path / "quality_variants.csv")
    # 5 steps of 40 are an epoch; of a tenth, 20 in one batch, 5 passes are as many steps.
    epochs = {"plain": ["1", "2"], "hinge": ["1", "2"], "diverges": ["2"], "a tenth": ["5", "10"]}
    for name, of_each in epochs.items():
        own = [row for row in rows if row["variant"] == name]
        assert [row["epoch"] for row in own] == [*of_each, *of_each]
        lost = name == "diverges"
        assert all((row["frechet_distance"] == "nan") == lost for row in own)
        assert all(row["recall"] and row["machine"] and row["date"] for row in own)
    assert [len(images) for images in trained] == [200, 200, 200, 20] * 2
    assert torch.equal(trained[0][:20], trained[3])
    plain, hinge = (
        [row for row in rows if row["variant"] == name][1] for name in ("plain", "hinge")
    )
    assert plain["frechet_distance"] != hinge["frechet_distance"]

    summary = {row["variant"]: row for row in _read(tmp_path / "quality_variants_summary.csv")}
    assert list(summary) == [variant.name for variant in TINY]
    mean = sum(float(row["frechet_distance"]) for row in rows if row["variant"] == "plain") / 4
    assert float(summary["plain"]["frechet_distance"]) == pytest.approx(mean, rel=1e-4)
    assert f"{mean:.1f} ±" in capsys.readouterr().out
    assert (tmp_path / "quality_variants.png").stat().st_size > 10_000


def test_each_loss_has_its_row():
    losses = [variant.options.get("loss") for variant in quality_variants.VARIANTS]
    assert set(losses) >= set(GAN_LOSSES)
    assert any(variant.share < 1 for variant in quality_variants.VARIANTS)
