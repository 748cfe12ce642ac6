"""The study of quality: both recipes start alike, and the verdict is the one statistics gives."""

import csv
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks import quality
from benchmarks.quality_report import LAST, MEASURES, compare, table
from genfast.training.evaluation.digits import Classifier

CPU = torch.device("cpu")
YARDSTICK = {"frechet_of_real_halves": 5.0, "frechet_of_noise": 900.0, "classifier_accuracy": 0.98}


def test_both_recipes_train_the_same_networks():
    steps = quality.build_steps(3, 16, CPU, precision="fp32")
    images = torch.rand(8, 1, 16, 16) * 2 - 1
    z = torch.randn(5, quality.NZ, 1, 1)
    losses, samples = [], []
    for step in steps.values():
        first = step.sample(z)
        torch.manual_seed(1)
        losses.append([[loss.item() for loss in step(images)] for _ in range(5)])
        samples.append((first, step.sample(z)))
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    for ours, theirs in zip(*samples, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert (samples[1][0] - samples[1][1]).abs().max() > 1e-2  # Both have learned something.


def test_stock_recipe_is_plain_pytorch():
    step = quality.build_steps(0, 16, CPU)["stock"]
    for network in (step.generator, step.discriminator):
        assert type(network.main) is torch.nn.Sequential
        assert all(p.is_contiguous() and p.dtype == torch.float32 for p in network.parameters())
    step.sample(torch.randn(2, quality.NZ, 1, 1))
    assert step.generator.training


def _rows(ours, theirs, measurements=LAST + 2):
    """Rows of runs whose last measurements have these means; those before would change them."""
    rows = []
    for recipe, results in (("genfast", ours), ("stock", theirs)):
        for seed, result in enumerate(results):
            for i in range(measurements):
                swing = (-1) ** i if i < measurements - 1 else 0
                value = result + swing if i >= measurements - LAST else 1e6
                measured = dict.fromkeys(MEASURES, value)
                rows.append({"seed": seed, "recipe": recipe, "epoch": i + 1} | measured)
    return rows


def test_comparison_is_student_s():
    ours, theirs = [3.0, 4.5, 4.0], [5.0, 3.5, 6.5]
    comparisons = compare(_rows(ours, theirs))
    assert [c.measure for c in comparisons] == list(MEASURES)
    interval = stats.ttest_ind(ours, theirs).confidence_interval(0.95)
    for c in comparisons:
        assert (c.genfast_mean, c.stock_mean) == pytest.approx((np.mean(ours), np.mean(theirs)))
        deviations = np.std(ours, ddof=1), np.std(theirs, ddof=1)
        assert (c.genfast_sd, c.stock_sd) == pytest.approx(deviations)
        assert c.difference == pytest.approx(np.mean(ours) - np.mean(theirs))
        assert (c.low, c.high) == pytest.approx(tuple(interval))
        assert c.within_spread


@pytest.mark.parametrize("shift", [-6, 6])
def test_a_difference_beyond_the_spread(shift):
    ours = [3.0, 4.5, 4.0]
    comparisons = compare(_rows(ours, [value + shift for value in ours]))
    assert not any(c.within_spread for c in comparisons)
    text = table(comparisons, YARDSTICK)
    assert text.count("NO\n") == 3
    assert f"{-shift:+.2f}" in text


def test_a_small_study(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(quality, "NGF", 4)
    monkeypatch.setattr(quality, "NDF", 4)
    monkeypatch.setattr(quality, "BATCH_SIZE", 256)
    out = tmp_path / "results"
    arguments = ["--seeds", "2", "--epochs", "3", "--every", "2", "--device", "cpu"]
    assert quality.main([*arguments, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Fréchet distance" in printed
    with open(out / "quality.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = [
        (seed, recipe, epoch)
        for seed in ("0", "1")
        for recipe in ("genfast", "stock")
        for epoch in ("2", "3")
    ]
    assert [(row["seed"], row["recipe"], row["epoch"]) for row in rows] == expected
    for name in (*MEASURES, "machine", "torch", "date", "classifier_accuracy"):
        assert all(row[name] for row in rows)
    values = np.array([[float(row[name]) for name in MEASURES] for row in rows])
    # A recipe's runs differ by their seeds more than the recipes differ after so few steps.
    np.testing.assert_allclose(values[0], values[2], rtol=0.1)
    assert not np.allclose(values[0], values[4], rtol=1e-3)
    with open(out / "quality_summary.csv", newline="") as file:
        summary = list(csv.DictReader(file))
    assert [row["measure"] for row in summary] == list(MEASURES)
    mean = values[[0, 1, 4, 5], 0].mean()
    assert float(summary[0]["genfast_mean"]) == pytest.approx(mean, rel=1e-4)
    assert (out / "quality.png").stat().st_size > 10_000


def _classify_without_training(monkeypatch, accuracy):
    untrained = Classifier().requires_grad_(False)
    monkeypatch.setattr(quality, "train_classifier", lambda digits: (untrained, accuracy))
    monkeypatch.setattr(quality, "check_matplotlib", lambda: None)


def test_a_poor_classifier_measures_nothing(monkeypatch):
    _classify_without_training(monkeypatch, 0.96)
    with pytest.raises(RuntimeError, match="97% of the digits held out, .* recognises 96.0%"):
        quality.main(["--device", "cpu"])


def test_a_run_that_diverges(monkeypatch, capsys):
    _classify_without_training(monkeypatch, 0.98)
    monkeypatch.setattr(quality, "LR", 1e30)
    assert quality.main(["--epochs", "1", "--device", "cpu"]) == 1
    assert "error: training diverged: by epoch 1 a loss" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seeds", "1"], "expected a whole number from 2, got '1'"),
        (["--epochs", "0"], "expected a whole number from 1, got '0'"),
        (["--every", "x"], "expected a whole number from 1, got 'x'"),
        (["--image-size", "21"], "in multiples of 4, as its smaller side is from 16 to 31, got 21"),
    ],
)
def test_unsuitable_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit):
        quality.main(arguments)
    assert message in capsys.readouterr().err


def test_matplotlib_is_missed_before_the_work(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert quality.main([]) == 1
    error = capsys.readouterr().err
    assert "error: this needs matplotlib" in error
    assert 'pip install "genfast[benchmark]"' in error
