"""`genfast evaluate`: whose images are measured in which features, and what it refuses."""

import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch

from genfast import cli, use_backend
from genfast.training.errors import BadInput
from genfast.training.evaluation import digits, evaluate
from genfast.training.evaluation.digits import Classifier, good_classifier
from genfast.training.evaluation.features import extract, extractor
from genfast.training.evaluation.frechet import frechet_distance
from genfast.training.runs.config import prepare
from genfast.training.runs.loop import train
from genfast.training.runs.models import build_step
from genfast.training.runs.pictures import to_uint8
from genfast.training.runs.samples import draw_noise

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
CPU = torch.device("cpu")
GREY, COLOUR = (1, 8, 8), (3, 8, 8)


class Columns(torch.nn.Module):
    """Features that say which values came: each image's mean over columns, (N, 3 W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean(2).flatten(1)


class Faulty(torch.nn.Module):
    """Features that are none, in several ways."""

    def __init__(self, way: int):
        super().__init__()
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == 0:
            return x.flatten(1) / 0.0
        if self.way == 1:
            return x
        if self.way == 2:
            return x.flatten(1)[1:]
        if self.way == 3:
            return x.flatten(1).long()
        return x.reshape(7, 7)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """TorchScript files by what is in them, images, and a run on them that keeps an average."""
    folder = tmp_path_factory.mktemp("evaluation")
    torch.jit.script(Columns()).save(folder / "columns.pt")
    for way in range(5):
        torch.jit.script(Faulty(way)).save(folder / f"faulty{way}.pt")
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    np.save(folder / "images.npy", pixels)
    np.save(folder / "colour.npy", np.repeat(pixels[..., None], 3, -1))
    config, images = prepare(
        "gan", folder / "images.npy", dict(epochs=2, batch_size=5, nz=4, ema=0.9, precision="fp32")
    )
    with use_backend("reference"):  # The fixture that does so for tests comes later.
        train(config, images, folder / "run", device="cpu")
    return folder


def _images(shape, count=6):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)


def _expected(images):
    return (images.expand(-1, 3, -1, -1).double() / 255).mean(2).flatten(1).float()


def _save_onnx(path, count):
    """`Columns` as an ONNX file for so many images, "n" for any number."""
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["means"], axes=[2], keepdims=0),
        helper.make_node("Flatten", ["means"], ["y"], axis=1),
    ]
    x = helper.make_tensor_value_info("x", kind, [count, 3, 8, 8])
    y = helper.make_tensor_value_info("y", kind, [count, 24])
    graph = helper.make_graph(nodes, "columns", [x], [y])
    opset = [helper.make_opsetid("", 13)]
    onnx.save(helper.make_model(graph, ir_version=8, opset_imports=opset), path)


class _Inception(torch.nn.Module):
    """Stands in for torch-fidelity's."""

    def __init__(self, name, features_list):
        super().__init__()
        self.features_list = features_list

    def forward(self, images):
        assert self.features_list == ["2048"] and images.dtype == torch.uint8
        return (Columns()(images / 255.0),)


def _module(monkeypatch, name, **contents):
    module = ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("shape", [GREY, COLOUR])
@pytest.mark.parametrize("kind", ["columns.pt", "columns.onnx", "inception"])
def test_every_kind_of_features_sees_the_same_images(kind, shape, files, monkeypatch):
    _module(monkeypatch, "torch_fidelity", FeatureExtractorInceptionV3=_Inception)
    if kind == "columns.onnx":
        pytest.importorskip("onnxruntime")
        _save_onnx(files / kind, "n")
    name = kind if kind == "inception" else str(files / kind)
    images = _images(shape)
    found = extract(extractor(name, shape, CPU), name, images.split(4))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, _expected(images))


def _refused(name, shape, message):
    with pytest.raises(BadInput, match=message) as raised:
        extract(extractor(name, shape, CPU), name, [_images(shape)])
    assert "\n" not in str(raised.value)


def test_features_that_cannot_be_had(files, monkeypatch):
    _refused("absent.pt", GREY, "digits, inception or a TorchScript or ONNX file, got absent.pt")
    _refused("digits", COLOUR, "expected grey images for --features digits, got 3 channels")
    _refused(str(files / "images.npy"), GREY, "expected a TorchScript file at .*could not read it")
    for way, message in enumerate(
        [
            r"finite floats \(6, D\) for 6 images, got float32 \(6, 192\) with NaN or infinity",
            r"got float32 \(6, 3, 8, 8\)",
            r"got float32 \(5, 192\)",
            r"got int64 \(6, 192\)",
            r"to take images of 8 x 8 pixels, but it failed: .*shape '\[7, 7\]' is invalid",
        ]
    ):
        _refused(str(files / f"faulty{way}.pt"), GREY, message)
    for package, name in (("onnxruntime", "damaged.onnx"), ("torch_fidelity", "inception")):
        if name != "inception":
            name = str(files / name)
            open(name, "wb").close()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            pip = package.replace("_", "-")
            _refused(name, GREY, f"expected {pip},.* pip install onnxruntime torch-fidelity$")

    def unreachable(*_):
        raise OSError("<urlopen error>\nand more")

    _module(monkeypatch, "torch_fidelity", FeatureExtractorInceptionV3=unreachable)
    _refused("inception", GREY, "could not have them: <urlopen error>; give --features a file")


def test_onnx_files_that_cannot_be_used(files):
    pytest.importorskip("onnxruntime")
    (files / "damaged.onnx").write_bytes(b"nothing")
    _refused(str(files / "damaged.onnx"), GREY, "expected an ONNX file at .*, could not read it: ")
    _save_onnx(files / "one.onnx", 1)
    _refused(str(files / "one.onnx"), GREY, "any number of images at .*, got one for 1: export it")
    _save_onnx(files / "columns.onnx", "n")
    _refused(
        str(files / "columns.onnx"), (1, 9, 9), "to take images of 9 x 9 pixels, but it failed"
    )


def _by_hand(folder, num, seed, ema):
    """The Fréchet distance of what the run's generator draws, without `evaluate`."""
    config, images = prepare("gan", folder / "images.npy", dict(nz=4, precision="fp32"))
    step = build_step(config, CPU)
    saved = torch.load(folder / "run/checkpoint.pt", weights_only=True)["modules"]
    step.generator.load_state_dict(saved["average" if ema else "generator"])
    drawn = to_uint8(step.sample(draw_noise(num, step, seed)), (-1.0, 1.0))
    chosen = torch.randperm(20, generator=torch.Generator().manual_seed(seed))[:num]
    return frechet_distance(_expected(images[chosen]), _expected(drawn))


@pytest.mark.filterwarnings("ignore:fid of")
@pytest.mark.parametrize(("ema", "num"), [(True, 20), (False, 20), (True, 9)])
def test_what_is_measured(files, ema, num):
    """The images that `sample` draws from the same seed, from the average unless told otherwise."""
    found = evaluate(files / "run", features=str(files / "columns.pt"), seed=3, ema=ema, num=num)
    assert found.metrics["fid"] == pytest.approx(_by_hand(files, num, 3, ema), rel=1e-4)
    assert found.metrics["fid"] != pytest.approx(_by_hand(files, num, 4, ema), rel=1e-3)
    about = dict(num=num, feature_length=24, seed=3, steps=8, average=ema, image_size=8)
    assert about.items() <= found.about.items()


@pytest.mark.filterwarnings("ignore:fid of")
def test_a_conditional_model_draws_the_classes_of_the_real_images(files, tmp_path):
    pixels = np.load(files / "images.npy")
    labels = np.arange(20) % 4 // 3  # Three quarters of one class.
    np.savez(tmp_path / "data.npz", images=pixels, labels=labels)
    np.savez(tmp_path / "other.npz", images=pixels, labels=labels + 5)
    given = dict(epochs=1, batch_size=5, nz=4, precision="fp32", conditional=True)
    config, images = prepare("gan", tmp_path / "data.npz", given)
    train(config, images, tmp_path / "run", device="cpu")
    columns = str(files / "columns.pt")
    found = evaluate(tmp_path / "run", features=columns, metrics=["fid"])
    step = build_step(config, CPU)
    saved = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["modules"]
    step.generator.load_state_dict(saved["generator"])
    drawn = to_uint8(step.sample(draw_noise(20, step, 0), torch.from_numpy(labels)), (-1.0, 1.0))
    by_hand = frechet_distance(_expected(images.images), _expected(drawn))
    assert found.metrics["fid"] == pytest.approx(by_hand, rel=1e-4)
    with pytest.raises(
        BadInput, match="expected images of the run's classes, got some of the class '5'"
    ):
        evaluate(tmp_path / "run", tmp_path / "other.npz", features=columns)


def _run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def test_the_command(files, tmp_path, capsys):
    out = tmp_path / "report.json"
    command = ["evaluate", files / "run", "--features", files / "columns.pt", "--device", "cpu"]
    assert _run(*command, "--out", out) == 0
    printed = capsys.readouterr()
    assert "warning: fid of 20 images in 24 features is far too large" in printed.err
    header, *lines, last = printed.out.splitlines()
    assert header.split() == ["metric", "value", "images", "features", "seed"]
    names = ["fid", "kid", "precision", "recall", "density", "coverage"]
    assert [line.split()[0] for line in lines] == names
    assert all(line.split()[-3:] == ["20", str(files / "columns.pt"), "0"] for line in lines)
    assert last == str(out)
    first = json.loads(out.read_text())
    assert list(first["metrics"]) == [*names[:2], "kid_sd", *names[2:]]
    assert f"{first['metrics']['fid']:.4g}" == lines[0].split()[1]

    options = ("--metrics", "kid,fid", "--num", 9, "--data", files / "images.npy", "--out", out)
    assert _run(*command, *options) == 0  # An earlier report may be replaced.
    second = json.loads(out.read_text())
    assert list(second["metrics"]) == ["kid", "kid_sd", "fid"] and second["num"] == 9
    assert _run(*command, *options) == 0
    assert json.loads(out.read_text()) == second


def test_what_the_command_refuses(files, tmp_path, capsys):
    features = ("--features", files / "columns.pt", "--device", "cpu")
    mine = tmp_path / "mine.json"
    mine.write_text('{"versions": {"genfast": "0.1.0"}}')
    for arguments, message in (
        ((files / "absent",), "expected a checkpoint file at"),
        ((files / "run", "--num", 21), "at least the 21 images that --num asks for, got 20"),
        ((files / "run", "--num", 5), "at least 6 images, which density-coverage needs, got 5"),
        ((files / "run", "--data", files / "colour.npy"), "with 1 channels, .* got 3"),
        ((files / "run", "--out", tmp_path), "name of a file, got the folder"),
        ((files / "run", "--out", tmp_path / "no/a.json"), "in a folder that exists"),
        ((files / "run", "--out", mine), "mine.json, which is neither and stays as it is"),
    ):
        assert _run("evaluate", *arguments, *features) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert pytest.raises(BadInput, match=message).matches(BadInput(error)), error
    assert "metrics" not in mine.read_text()
    with pytest.raises(SystemExit):
        _run("evaluate", files / "run", "--metrics", "fid,is")
    assert "expected names among fid, kid, precision-recall, den" in capsys.readouterr().err
    for metrics in ("fid", (), ["is"]):
        with pytest.raises(BadInput, match="expected metrics among fid, kid"):
            evaluate(files / "run/checkpoint.pt", metrics=metrics)


def test_the_classifier_is_trained_once(tmp_path, monkeypatch):
    trainings = []

    def stand_in(of):
        trainings.append(len(of.images))
        return Classifier().requires_grad_(False), accuracy

    monkeypatch.setattr(digits, "train_classifier", stand_in)
    monkeypatch.setenv("GENFAST_CACHE_DIR", str(tmp_path / "cache"))
    accuracy = 0.5
    _refused("digits", GREY, "held out, .* got one that recognises 50.0%, of 8 x 8 pixels")
    accuracy = 0.98
    first, second = good_classifier(8), good_classifier(8)
    assert trainings == [1797, 1797]
    images = _images(GREY)
    np.testing.assert_array_equal(first.features(images), second.features(images))
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(kept.read_bytes()[:-100])
    found = extract(extractor("digits", GREY, CPU), "digits", [images])
    assert len(trainings) == 3 and found.shape == (6, 64)
    good_classifier(8)
    assert len(trainings) == 3
    monkeypatch.setenv("GENFAST_CACHE_DIR", str(kept))  # No folder: then it is kept nowhere.
    good_classifier(8)
    assert len(trainings) == 4
