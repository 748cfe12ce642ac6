"""The benchmark's own honesty: who is compared, that they agree, and how figures are made."""

import csv

import pytest
import torch
from torch import nn

from benchmarks import agreement, dropin, networks, plot, throughput, timing
from benchmarks.variants import VARIANTS, Variant, why_not_run
from benchmarks.workloads import Workload, stock
from genfast import accelerate, functional, use_backend
from genfast.models import DCGANDiscriminator, DCGANGenerator
from genfast.nn import FusedBlock, FusedSequential

CPU = torch.device("cpu")
TINY = {
    "gan": Workload("gan", 4, 8, CPU),
    "dcgan": Workload("dcgan", 4, 16, CPU, width=4),
    "vae": Workload("vae", 4, 8, CPU),
    "conv-vae": Workload("conv-vae", 4, 16, CPU, width=4),
}
EAGER = [n for n in VARIANTS if not n.startswith("compile")]


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    """As on a CPU without Triton's interpreter, which would take minutes."""
    monkeypatch.setattr(functional, "why_not_triton", lambda *_, **__: "not in this test")


@pytest.mark.one_in(2)
@pytest.mark.parametrize("model", TINY)
def test_variants_train_the_same(model):
    workload = TINY[model]
    names = [name for name in EAGER if why_not_run(name, workload) is None]
    shares, refused = throughput._check(workload, names)
    assert not refused
    assert list(shares) == names
    assert len(names) >= 5


def test_weights_images_and_losses_are_the_same_each_time():
    workload = TINY["dcgan"]
    first, second = workload.networks(), workload.networks()
    for a, b in zip(first, second, strict=True):
        assert all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))
    assert torch.equal(workload.images(), workload.images())
    build = VARIANTS["example"].build
    losses = agreement.first_losses(build, workload)
    assert torch.equal(losses, agreement.first_losses(build, workload))
    assert losses.shape == (agreement.STEPS, 2)


@pytest.mark.parametrize("model", ["dcgan", "conv-vae"])
def test_baselines_hold_no_module_of_ours(model):
    for network in TINY[model].networks():
        modules = list(stock(network).modules())
        assert not any(isinstance(m, FusedSequential | FusedBlock) for m in modules)


def _slightly_wrong(workload, dropout=True):
    """The example, but that its second step trains on another batch."""
    step, calls = VARIANTS["example"].build(workload, dropout), []

    def run(images):
        calls.append(1)
        return step(images.flip(0) * 0.9 if len(calls) == 2 else images)

    return run


def _broken(workload, dropout=True):
    raise RuntimeError("no such kernel\nand more")


def test_no_speed_without_agreement(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(VARIANTS, "wrong", Variant(_slightly_wrong, half=False))
    monkeypatch.setitem(VARIANTS, "broken", Variant(_broken, half=False))
    monkeypatch.setattr(Workload, "of", lambda *_: TINY["dcgan"])
    out = tmp_path / "results.csv"
    status = throughput.main(
        ["--model", "dcgan", "--device", "cpu", "--seconds", "0", "--no-cold-start"]
        + ["--only", "example", "wrong", "broken", "genfast/fp32", "graphed", "--out", str(out)]
    )
    printed = capsys.readouterr().out
    assert status == 1
    assert "NO SPEED REPORTED: wrong: its losses are" in printed
    assert "NO SPEED REPORTED: broken: it failed: no such kernel\n" in printed
    assert "not run: graphed: there is no GPU" in printed
    with open(out, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["variant"] for row in rows] == ["example", "genfast/fp32"]
    assert tuple(rows[0]) == throughput.COLUMNS
    for row in rows:
        assert 0 < float(row["p20"]) <= float(row["images_per_s"]) <= float(row["p80"])
        assert float(row["disagreement"]) <= 1
        assert row["machine"] and row["torch"] == torch.__version__
    assert float(rows[0]["vs_example"]) == 1
    picture = plot.plot(out)
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_not_a_number_never_agrees():
    reference = torch.ones(3, 2)
    assert agreement.disagreement(reference * torch.nan, reference, reference) == float("inf")


def test_turns_are_interleaved_in_changing_order():
    order = []
    steps = {name: lambda images, name=name: order.append(name) for name in "abc"}
    rates = timing.interleaved(steps, torch.zeros(2, 1), seconds=0, turn_seconds=0)
    assert {name: len(turns) for name, turns in rates.items()} == dict(a=3, b=3, c=3)
    assert "".join(order[-9:]) == "abcacbcab"


def test_summary():
    assert timing.summary([5.0]) == (5.0, 5.0, 5.0)
    assert timing.summary([float(v) for v in range(11)]) == pytest.approx((5.0, 2.0, 8.0))


def test_a_ratio_is_of_turns_of_the_same_round():
    # The machine is four times as slow in the second round, and once only one of the two was.
    assert timing.ratio([12.0, 3.0, 12.0], [6.0, 1.5, 1.0]) == 2


TINY_NETWORK = networks.Network(
    "tiny",
    lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 3, dilation=2)
    ),
    2,
    (3, 8, 8),
)
# Each of `networks.NETWORKS`, in its order, as narrow as it can be, and the shape it takes.
TINY_NETWORKS = (
    (lambda: stock(DCGANGenerator(ngf=2)), (100, 1, 1), (3, 64, 64)),
    (lambda: stock(DCGANDiscriminator(ndf=2)), (3, 64, 64), ()),
    (lambda: networks.residual_generator(4, blocks=2), (3, 16, 16), (3, 16, 16)),
    (lambda: networks.patch_discriminator(2), (3, 70, 70), (1, 6, 6)),
    (lambda: networks.ResNetGenerator(4, latent_dim=8), (8,), (3, 32, 32)),
    (lambda: networks.ResNetDiscriminator(4), (3, 32, 32), (1,)),
    (lambda: networks.UNet(2, depth=4), (3, 32, 32), (3, 32, 32)),
    (lambda: networks.BetaVAE(2), (3, 64, 64), (3, 64, 64)),
)


@pytest.fixture
def accelerated():
    """What is accelerated runs so, and not as the reference."""
    with use_backend("auto"):
        yield


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_dropin_measures_turns_of_the_same_rounds(precision, accelerated):
    row = dropin.measure(TINY_NETWORK, precision, CPU, seconds=0.01, backend="aot_eager")
    assert set(row) == set(dropin.COLUMNS) - {"machine", "torch", "triton", "python", "date"}
    assert row["turns"] >= 3
    assert row["p20"] <= row["ratio"] <= row["p80"]
    assert row["compiled_p20"] <= row["compiled_ratio"] <= row["compiled_p80"]
    assert row["not_compiled"] == ""
    assert row["memory_format"] == ("contiguous" if precision == "fp32" else "channels_last")
    assert (row["convolutions"], row["convolutions_fused"]) == (2, 1)
    assert (row["norms"], row["norms_fused"]) == (1, 1)
    assert row["not_on_kernels"] == "not in this test"


def test_dropin_refuses_a_network_that_computes_something_else(monkeypatch):
    stock = nn.Sequential.forward
    monkeypatch.setattr(FusedSequential, "forward", lambda self, x: stock(self, x) * 1.01)
    with pytest.raises(AssertionError, match="the accelerated network's output 0 0.01 off, stock"):
        dropin.measure(TINY_NETWORK, "fp32", CPU, seconds=0.01, left_out="not in this test")


class _Breaks(nn.Sequential):
    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


def test_dropin_says_why_a_network_is_not_compiled(accelerated, monkeypatch):
    """A graph that breaks is a failure, and so are other results."""
    breaks = networks.Network("breaks", lambda: _Breaks(nn.Conv2d(3, 4, 3)), 2, (3, 8, 8))
    row = dropin.measure(breaks, "fp32", CPU, seconds=0.01, backend="eager")
    assert row["compiled_ratio"] is None
    assert row["not_compiled"].startswith("Unsupported: ")

    def wrong(graph, _):
        return lambda *inputs: [y * 1.01 for y in graph(*inputs)]

    row = dropin.measure(TINY_NETWORK, "fp32", CPU, seconds=0.01, backend=wrong)
    assert row["compiled_images_per_s"] is None
    assert row["not_compiled"].startswith("output 0 0.01 off, ")
    assert "tiny, fp32: not compiled: output 0 0.01 off, " in dropin.table([row])
    monkeypatch.setattr(dropin, "missing_compiler", lambda _: "g++")
    row = dropin.measure(TINY_NETWORK, "fp32", CPU, seconds=0.01)
    assert row["not_compiled"] == "there is no g++"


def test_dropin_writes_and_draws_a_row_a_network(accelerated, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(dropin, "NETWORKS", [TINY_NETWORK])
    out = tmp_path / "rows.csv"
    assert dropin.main(["--seconds", "0.01", "--compile-seconds", "0", "--out", str(out)]) == 0
    with open(out, encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["network"] for row in rows} == {"tiny"}
    assert all(row["compiled_ratio"] == "" for row in rows)
    assert all(row["not_compiled"] == "left out after 0 s of compiling" for row in rows)
    printed = capsys.readouterr().out
    assert "2/3" in printed
    assert "what fuses runs through PyTorch here: not in this test" in printed
    assert out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.one_in(2)
@pytest.mark.parametrize("build, shape, out_shape", TINY_NETWORKS)
def test_dropin_networks_compute_the_same(build, shape, out_shape, accelerated):
    network = networks.Network("tiny", build, 2, shape)
    torch.manual_seed(0)
    y = build()(torch.randn(2, *shape))
    assert (y[0] if isinstance(y, tuple) else y).shape == (2, *out_shape)
    row = dropin.measure(network, "fp32", CPU, seconds=0, left_out="not in this test")
    assert row["ratio"] > 0
    assert row["norms_fused"] <= row["norms"]


@pytest.mark.parametrize("network", networks.NETWORKS, ids=lambda network: network.name)
def test_dropin_networks_are_stock_and_reported(network):
    """Every convolution has a line; of them and of the norms at least 95 % fuse."""
    model = network.build()
    assert not any(isinstance(m, FusedSequential | FusedBlock) for m in model.modules())
    convolutions = [n for n, m in model.named_modules() if isinstance(m, dropin._CONVOLUTIONS)]
    report = accelerate(model)
    shares = dropin._shares(model, report)
    fused = {entry.name: entry.fused for entry in report}
    assert set(convolutions) <= set(fused)
    assert all(entry.fused or entry.reason for entry in report)
    for layers in ("convolutions", "norms"):
        assert shares[f"{layers}_fused"] >= 0.95 * shares[layers], layers
    sequential = [n for n in convolutions if isinstance(_parent(model, n), nn.Sequential)]
    assert all(fused[name] for name in sequential)


def _parent(model, name):
    return model.get_submodule(name.rpartition(".")[0])
