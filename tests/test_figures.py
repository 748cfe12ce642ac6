"""Every figure of speed in the README and its pages comes from a file of results."""

import csv
import re
from pathlib import Path

import pytest

from benchmarks import dropin, exchanges, networks
from benchmarks.model.cost import GPUS
from benchmarks.model.prediction import predict
from benchmarks.model.report import totals

ROOT = Path(__file__).parents[1]
README, BENCHMARKS, DESIGN = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "docs/benchmarks.md", "DESIGN.md")
)


def _measured(model):
    name = re.search(rf"benchmarks/results/(throughput_{model}_\S+\.csv)", BENCHMARKS).group(1)
    with open(ROOT / "benchmarks" / "results" / name, newline="", encoding="utf-8") as file:
        return {row["variant"]: row for row in csv.DictReader(file)}


def test_table_holds_what_was_measured():
    measured = _measured("dcgan")
    rows = re.findall(r"^\| `?([\w/-]+)`? (\|(?: [\d.,]+ \|){3})$", BENCHMARKS, re.M)
    assert dict(rows) == {variant: _cells(row) for variant, row in measured.items()}
    assert measured["genfast"]["machine"].split(",")[0] in BENCHMARKS


def _cells(row):
    ratios = (float(row["vs_example"]), float(row["vs_best_baseline"]))
    return f"| {float(row['images_per_s']):,.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} |"


def test_short_table_holds_what_was_measured():
    rows = re.findall(r"^\| (\w+), .*? (\|(?: [\d.,]+ \|){3})$", README, re.M)
    dcgan, vae = _measured("dcgan")["genfast"], _measured("vae")["genfast/compiled"]
    assert rows == [("DCGAN", _cells(dcgan)), ("VAE", _cells(vae))]
    for row in (dcgan, vae):
        assert row["machine"].split(",")[0] in README
        assert f"PyTorch {row['torch'].split('+')[0]}" in README


def test_speeds_of_the_vae_are_what_was_measured():
    measured = _measured("vae")
    said = re.findall(r"at\s+([\d.]+)\s+times", BENCHMARKS.split("The VAE of")[1])
    variants = ("genfast", "compile", "genfast/compiled")
    assert said == [f"{float(measured[name]['vs_example']):.2f}" for name in variants]


def test_table_of_other_steps_is_what_was_measured():
    section = BENCHMARKS.split("## Other steps")[1].split("\n## ")[0]
    row = r"^\| (GAN|ConvVAE).*? \| (genfast\S*) (\|(?: [\d.,]+ \|){3})$"
    names = {"GAN": "gan", "ConvVAE": "conv-vae"}
    rows = re.findall(row, section, re.M)
    assert [model for model, *_ in rows] == list(names)
    for model, variant, cells in rows:
        measured = _measured(names[model])[variant]
        assert cells == _cells(measured) and measured["precision"] == "fp32"


def test_speeds_of_two_processes_are_what_was_measured():
    path = re.search(r"\(\.\./(benchmarks/results/scaling_\S+\.csv)\)", BENCHMARKS).group(1)
    with open(ROOT / path, newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if (r["kind"], r["processes"]) == ("measured", "2")]
    said = r"each: ([\d.]+) of twice the\s+speed of one, with `--sync-bn` ([\d.]+)"
    efficiencies = tuple(f"{float(row['efficiency']):.2f}" for row in rows)
    assert re.search(said, BENCHMARKS).groups() == efficiencies


def test_table_of_other_networks_is_what_was_measured():
    path = re.search(r"\(\.\./(benchmarks/results/dropin_\S+\.csv)\)", BENCHMARKS).group(1)
    with open(ROOT / path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert "\n".join(dropin.markdown_table(rows)) in BENCHMARKS
    assert rows[0]["machine"].split(",")[0] in BENCHMARKS
    assert {row["network"] for row in rows} == {network.name for network in networks.NETWORKS}


def test_what_processes_exchange_is_what_was_counted():
    """And the shares of 8 GPUs those of the model: by batch, without and with `--sync-bn`."""
    path = re.search(r"\(\.\./(benchmarks/results/scaling_\S+\.csv)\)", BENCHMARKS).group(1)
    with open(ROOT / path, newline="", encoding="utf-8") as file:
        rows = [r for r in csv.DictReader(file) if (r["kind"], r["processes"]) == ("model", "8")]
    shared = next(row for row in rows if row["sync_bn"] == "1")
    chapter = (ROOT / "docs" / "8-several-gpus.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| .* \| ([\d.]+) (MB|bytes) \| (\d+) \|$", chapter, re.M)
    for purpose, (size, unit, calls) in zip(exchanges.PURPOSES, table, strict=True):
        counted = int(shared[f"{purpose}_bytes"]) / (1e6 if unit == "MB" else 1)
        digits = len(size.partition(".")[2])
        assert (size, calls) == (f"{counted:.{digits}f}", shared[f"{purpose}_calls"])
    said = re.search(
        r"at (\S+) of 8 times the speed of one, with `--sync-bn` at (\S+); at batch 128 at (\S+) "
        r"and (\S+)\. ", " ".join(BENCHMARKS.split())
    )  # fmt: skip
    shares = {(row["batch_size"], row["sync_bn"]): float(row["efficiency"]) for row in rows}
    order = [(batch, sync) for batch in ("1024", "128") for sync in "01"]
    assert list(said.groups()) == [f"{shares[key]:.2f}" for key in order]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("batch", [128, 1024])
def test_predictions_are_those_of_the_model(batch):
    """To a hundredth: another release of Triton compiles a little differently."""
    pytest.importorskip("triton", reason="compiles Triton kernels")
    row = re.search(rf"^\| {batch} \| ([\d.]+) ms \| ([\d.]+) ms \| ([\d.]+) ms \|$", DESIGN, re.M)
    ours, eager = (predict("dcgan", batch, "h100", way) for way in ("genfast", "eager"))
    predicted = [totals(costs, GPUS["h100"]) for costs in (ours, eager)]
    expected = [*(total.predicted for total in predicted), predicted[0].arithmetic]
    assert list(map(float, row.groups())) == pytest.approx(expected, rel=1e-2)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("gpu", "name"), [("a100", "A100"), ("rtx4090", "RTX 4090")])
def test_predictions_for_other_cards_are_those_of_the_model(gpu, name):
    pytest.importorskip("triton", reason="compiles Triton kernels")
    said = re.search(
        rf"([\d.]+) ms on an {name},\s+where\s+PyTorch's\s+takes\s+([\d.]+) ms", DESIGN
    )
    predicted = [
        totals(predict("dcgan", 128, gpu, way), GPUS[gpu]).predicted for way in ("genfast", "eager")
    ]
    assert list(map(float, said.groups())) == pytest.approx(predicted, rel=1e-2)
