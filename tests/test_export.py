"""`genfast export`: what other programs read gives the images that genfast draws."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from torch import nn

from genfast import cli, models
from genfast.backend import use_backend
from genfast.training.runs import checkpoint, exporting
from genfast.training.runs.config import Config
from genfast.training.runs.models import build_step
from genfast.training.runs.samples import draw_noise

TINY = ("--batch-size", "4", "--nz", "3", "--device", "cpu", "--epochs", "1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of all models on a few images, by the model's name."""
    folder = tmp_path_factory.mktemp("runs")
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16), dtype=np.uint8)
    np.save(folder / "images.npy", images)
    np.savez(folder / "labelled.npz", images=images, labels=np.arange(8) % 2)
    more = {
        "gan": [],
        "dcgan": ["--ngf", "4", "--ndf", "4", "--ema", "0.5"],
        "vae": [],
        "conv-vae": ["--ngf", "4"],
        "conditional": ["--conditional"],
        "vae-gan": ["--ngf", "4", "--ndf", "4"],
    }
    for model, arguments in more.items():
        data = "labelled.npz" if model == "conditional" else "images.npy"
        out = ["--data", str(folder / data), "--out", str(folder / model)]
        model = "gan" if model == "conditional" else model
        with use_backend("reference"):  # This is before each test's own environment.
            assert cli.main(["train", model, *out, *TINY, *arguments]) == 0
    return folder


def _export(runs, model, form, out, *more):
    return cli.main(["export", str(runs / model), "--format", form, "--out", str(out), *more])


def _drawn(runs, model, count=5):
    """Latents, and what genfast draws of them, in [0, 1]."""
    part = exporting.load_part(runs / model / "checkpoint.pt")
    z = torch.randn(count, *part.example.shape[1:], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return z, part.module(z)


@pytest.mark.parametrize("model", ["gan", "dcgan", "vae", "conv-vae", "vae-gan"])
def test_a_part_draws_what_sample_draws(runs, model):
    path = runs / model / "checkpoint.pt"
    content = checkpoint.read_checkpoint(path)
    step = build_step(Config.of_checkpoint(content, path), torch.device("cpu"))
    checkpoint.restore_modules(step, content, path)
    z = draw_noise(5, step, 1)
    low, high = step.pixel_range
    with torch.no_grad():
        ours = exporting.load_part(path).module(z)
    assert ours.shape == (5, 1, 16, 16)
    torch.testing.assert_close(ours, (step.sample(z) - low) / (high - low), atol=2e-2, rtol=0)


def test_onnx(runs, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    out = tmp_path / "generator.onnx"
    assert _export(runs, "dcgan", "onnx", out) == 0
    session = runtime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map["part"] == "generator"
    for count in (1, 5):  # A batch of any size.
        z, expected = _drawn(runs, "dcgan", count)
        (images,) = session.run(["images"], {"z": z.numpy()})
        assert np.abs(images - expected.numpy()).max() <= 1e-4


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")
@pytest.mark.parametrize("model", ["gan", "dcgan", "vae", "conv-vae"])
def test_torchscript(runs, model, tmp_path):
    out = tmp_path / "g.pt"
    assert _export(runs, model, "torchscript", out) == 0
    notes = {"genfast.json": ""}
    program = torch.jit.load(str(out), _extra_files=notes)
    assert f'"model": "{model}"' in str(notes["genfast.json"])
    z, expected = _drawn(runs, model)
    torch.testing.assert_close(program(z), expected)


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")
def test_torchscript_of_an_encoder_and_a_discriminator(runs, tmp_path):
    images = torch.rand(3, 1, 16, 16)
    out = tmp_path / "encoder.pt"
    assert _export(runs, "conv-vae", "torchscript", out, "--part", "encoder") == 0
    mean, logvar = torch.jit.load(str(out))(images)
    expected = exporting.load_part(runs / "conv-vae/checkpoint.pt", "encoder").network
    with torch.no_grad():
        torch.testing.assert_close((mean, logvar), tuple(expected.encode(images)))
    network = exporting.load_part(runs / "vae-gan/checkpoint.pt", "encoder")
    with torch.no_grad():
        torch.testing.assert_close(network.module(images), network.network(2 * images - 1))
    out = tmp_path / "discriminator.pt"
    assert _export(runs, "dcgan", "torchscript", out, "--part", "discriminator") == 0
    network = exporting.load_part(runs / "dcgan/checkpoint.pt", "discriminator").network
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.load(str(out))(images), network(2 * images - 1))


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated")
def test_a_conditional_network_takes_labels(runs, tmp_path):
    out, notes = tmp_path / "g.pt", {"genfast.json": ""}
    assert _export(runs, "conditional", "torchscript", out) == 0
    program = torch.jit.load(str(out), _extra_files=notes)
    assert json.loads(json.loads(notes["genfast.json"])["classes"]) == ["0", "1"]
    network = exporting.load_part(runs / "conditional/checkpoint.pt").network
    z, labels = torch.randn(3, 3), torch.tensor([0, 1, 1])
    with torch.no_grad():
        torch.testing.assert_close(program(z, labels), (network(z, labels) + 1) / 2)


def test_weights_load_without_genfast(runs, tmp_path):
    """The keys are those of a plain `nn.Sequential` in a module called `main`."""
    z, expected = _drawn(runs, "dcgan")
    stock = nn.ModuleDict({"main": nn.Sequential(*models.DCGANGenerator(3, 4, 1, 16).main)}).eval()
    files = [("state-dict", "g.pth", torch.load)]
    safetensors = pytest.importorskip("safetensors.torch")
    files.append(("safetensors", "g.safetensors", safetensors.load_file))
    for form, name, load in files:
        assert _export(runs, "dcgan", form, tmp_path / name) == 0
        stock.load_state_dict(load(tmp_path / name))
        with torch.no_grad():
            torch.testing.assert_close((stock["main"](z) + 1) / 2, expected)


def test_the_newest_generator_on_request(runs, tmp_path):
    for name, more in (("average.pth", []), ("newest.pth", ["--no-ema"])):
        assert _export(runs, "dcgan", "state-dict", tmp_path / name, *more) == 0
    average, newest = (torch.load(tmp_path / n) for n in ("average.pth", "newest.pth"))
    assert any(not torch.equal(average[name], newest[name]) for name in newest)


@pytest.mark.parametrize(
    ("model", "form", "out", "more", "message"),
    [
        ("gan", "state-dict", "g.pt", [], r"expected --out to end in \.pth for --format state-"),
        ("gan", "state-dict", "absent/g.pth", [], "expected --out in a folder that exists, got"),
        ("gan", "state-dict", "mine.pth", [], "expected --out to be new, got .*, which stays as"),
        ("gan", "state-dict", "g.pth", ["--part", "encoder"], "--part generator or discriminator"),
        ("vae", "onnx", "g.onnx", ["--part", "generator"], "expected --part decoder or encoder of"),
        ("absent", "onnx", "g.onnx", [], "expected a checkpoint file at"),
    ],
)
def test_bad_input_ends_in_a_sentence(runs, model, form, out, more, message, tmp_path, capsys):
    (tmp_path / "mine.pth").write_text("mine")
    assert _export(runs, model, form, tmp_path / out, *more) == 1
    error = capsys.readouterr().err
    assert re.search(f"^genfast: error: .*{message}[^\n]*\n$", error)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.pth"]
    assert (tmp_path / "mine.pth").read_text() == "mine"


@pytest.mark.parametrize(
    ("form", "suffix", "absent"), [("onnx", "onnx", "onnx"), ("safetensors",) * 3]
)
def test_an_absent_extra_is_named(runs, form, suffix, absent, tmp_path, monkeypatch, capsys):
    for name in (absent, f"{absent}.torch"):
        monkeypatch.setitem(sys.modules, name, None)
    assert _export(runs, "gan", form, tmp_path / f"g.{suffix}") == 1
    assert (
        f"pip install {' '.join(('onnx', 'onnxscript', 'safetensors'))}" in capsys.readouterr().err
    )


def test_half_a_file_is_no_file(runs, tmp_path, monkeypatch):
    def fails(part, path):
        path.write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setitem(exporting.FORMATS, "state-dict", exporting.Format(fails, ".pth", "weights"))
    assert _export(runs, "gan", "state-dict", tmp_path / "g.pth") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("model", ["gan", "conv-vae", "vae-gan"])
def test_batches_of_any_size(runs, model):
    """As the exporters of graphs see a network: nothing in it is a constant of its batch."""
    part = exporting.load_part(runs / model / "checkpoint.pt")
    example = part.example.expand(2, *part.example.shape[1:]).contiguous()
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    with use_backend("reference"):
        program = torch.export.export(part.module, (example,), dynamic_shapes=dynamic)
    z, expected = _drawn(runs, model)
    torch.testing.assert_close(program.module()(z), expected)
