"""Checkpoints of which a part is missing, empty or something else end in one sentence."""

import copy
import csv
import re
import warnings

import numpy as np
import pytest
import torch

from genfast import cli
from genfast.models import DCGANDiscriminator, DCGANGenerator
from genfast.training import GANStep
from genfast.training.errors import BadInput
from genfast.training.runs import checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a small finished run."""
    folder = tmp_path_factory.mktemp("run")
    np.save(folder / "images.npy", np.zeros((4, 16, 16), np.uint8))
    arguments = ("--data", folder / "images.npy", "--epochs", 2, "--nz", 3, "--batch-size", 4)
    out = ("--out", folder / "out", "--device", "cpu", "--precision", "fp32")
    assert cli.main(["train", "vae", *map(str, arguments + out)]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def content(run):
    return checkpoint.read_checkpoint(run / "checkpoint.pt")


def _sentence(capsys, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cli.main([*map(str, arguments), "--device", "cpu"]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"genfast: error: expected [^\n]+\n", error), error
    assert "weights_only" not in error
    return error


def _put(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(content):
        for key in keys:
            content = content[key]
        content[last] = value

    return change


def _drop(*keys):
    def change(content):
        for key in keys[:-1]:
            content = content[key]
        del content[keys[-1]]

    return change


MOMENTS = ("optimizers", "model", "state")
EVERYWHERE = {
    "no config": (_drop("config"), "it lacks config"),
    "config is text": (_put("config", "vae"), "its config is 'vae'"),
    "text for a number": (_put("config", "nz", "many"), "--nz to be a whole .*, got 'many' in the"),
    "out of range": (_put("config", "image_size", -1), "--image-size to be .*, got -1 in the"),
    "absurd width": (_put("config", "nz", 10**30), "--nz to be a whole number"),
    "unknown model": (_put("config", "model", "stylegan"), "a model among .*, got 'stylegan'"),
    "unknown setting": (_put("config", "depth", 3), "settings of a genfast run .*'depth'"),
    "steps are text": (_put("steps", "2"), "its steps is '2'"),
    "steps below 0": (_put("steps", -1), "its steps are -1"),
    "no modules": (_put("modules", {}), "the weights of a VAE in .*, but it has none"),
    "modules are a list": (_put("modules", []), "its modules is a value of type list"),
    "a module is a number": (_put("modules", "model", 3), "VAE in .*, but it has none"),
    "empty weights": (_put("modules", "model", {}), "fc1.weight is missing"),
    "a weight is text": (_put("modules", "model", "fc1.bias", "x"), "fc1.bias is 'x'"),
    "a weight of another type": (
        _put("modules", "model", "fc1.bias", torch.zeros(400, dtype=torch.int64)),
        "fc1.bias is torch.int64 instead of torch.float32",
    ),
    "a weight without data": (
        _put("modules", "model", "fc1.bias", torch.zeros(400, device="meta")),
        "fc1.bias is not dense in memory",
    ),
    "a weight too many": (_put("modules", "model", 3, torch.zeros(1)), "there is also 3"),
}
RESUMED = {
    "no optimizers": (_put("optimizers", {}), "lacks the state of the model's optimizer"),
    "an optimizer is a list": (_put("optimizers", "model", []), "lacks the state of the model's"),
    "no moments": (_put(*MOMENTS, {}), "of parameter 0, it has none"),
    "moments of one": (_drop(*MOMENTS, 1), "of parameter 1, it has none"),
    "a moment is missing": (_drop(*MOMENTS, 0, "exp_avg"), "exp_avg is missing"),
    "a moment is text": (_put(*MOMENTS, 0, "step", "2"), "parameter 0, step is '2'"),
    "a moment of another shape": (
        _put(*MOMENTS, 0, "exp_avg_sq", torch.zeros(3)),
        r"exp_avg_sq has shape \(3,\) instead of \(400, 256\)",
    ),
    "no random numbers": (_put("rng", {}), "the cpu's random numbers is not one"),
    "few random numbers": (
        _put("rng", "cpu", torch.zeros(3, dtype=torch.uint8)),
        "the cpu's random numbers is not one",
    ),
    "random floats": (_put("rng", "cpu", torch.zeros(5056)), "the cpu's random numbers is not one"),
    "empty random numbers": (
        _put("rng", "cpu", torch.zeros(5056, dtype=torch.uint8)),
        "the cpu's random numbers is not one",
    ),
}


@pytest.mark.parametrize("name", EVERYWHERE | RESUMED)
def test_a_part_is_not_what_it_should_be(name, content, tmp_path, capsys):
    change, message = (EVERYWHERE | RESUMED)[name]
    content = copy.deepcopy(content)
    change(content)
    path = tmp_path / "c.pt"
    torch.save(content, path)
    resume = ("train", "vae", "--resume", path, "--epochs", 3, "--out", tmp_path / "out")
    assert re.search(message, _sentence(capsys, *resume))
    if name in EVERYWHERE:
        assert re.search(message, _sentence(capsys, "sample", path, "--out", tmp_path / "a.png"))
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning")
def test_torchscript_is_named(tmp_path, capsys):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(str(tmp_path / "c.pt"))
    assert "saved by TorchScript" in _sentence(capsys, "sample", tmp_path / "c.pt")


def test_no_advice_to_run_a_strangers_code(tmp_path, monkeypatch):
    torch.save({}, tmp_path / "c.pt")

    def advises(*_, **__):
        raise RuntimeError("Cannot read it. Consider setting weights_only=False.")

    monkeypatch.setattr(torch, "load", advises)
    with pytest.raises(BadInput, match="could not read it: it is damaged or something else$"):
        checkpoint.read_checkpoint(tmp_path / "c.pt")


def _step(precision):
    torch.manual_seed(0)
    networks = DCGANGenerator(5, 4, 1, 16), DCGANDiscriminator(1, 4, 16)
    return GANStep(*networks, latent_shape=(5, 1, 1), precision=precision)


def test_a_refused_checkpoint_changes_nothing(tmp_path):
    step = _step("fp32")
    step(torch.zeros(4, 1, 16, 16))
    checkpoint.save_checkpoint(tmp_path / "c.pt", step, {}, 1)
    content = checkpoint.read_checkpoint(tmp_path / "c.pt")
    step(torch.zeros(4, 1, 16, 16))
    before = copy.deepcopy([m.state_dict() for m in step.modules.values()])
    content["modules"]["discriminator"] = {}
    with pytest.raises(BadInput, match="DCGANDiscriminator"):
        checkpoint.restore(step, content, "c.pt")
    after = [m.state_dict() for m in step.modules.values()]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "state", [None, {}, {"scale": "x"}, float("nan")], ids=["none", "empty", "few", "nan"]
)
def test_gradient_scalers(tmp_path, state):
    step = _step("fp16")
    checkpoint.save_checkpoint(tmp_path / "c.pt", step, {}, 1)  # As if each step had overflowed.
    content = checkpoint.read_checkpoint(tmp_path / "c.pt")
    checkpoint.restore(step, content, "c.pt")
    if isinstance(state, float):
        state = content["scalers"]["generator"] | {"scale": state}
    content["scalers"]["generator"] = state
    with pytest.raises(BadInput, match="the generator's gradient scaler is not one"):
        checkpoint.restore(step, content, "c.pt")


def test_optimizers_keep_the_settings_of_the_run(tmp_path):
    step = _step("fp32")
    step(torch.zeros(4, 1, 16, 16))
    checkpoint.save_checkpoint(tmp_path / "c.pt", step, {}, 1)
    content = checkpoint.read_checkpoint(tmp_path / "c.pt")
    content["optimizers"]["generator"]["param_groups"] = [{"lr": "fast"}]
    checkpoint.restore(step, content, "c.pt")
    assert step.optimizers["generator"].param_groups[0]["lr"] == 2e-4


def test_stray_bytes_among_the_losses(run, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes())
    header, *rows = (run / "metrics.csv").read_bytes().splitlines(keepends=True)
    stray = b"\xff\xfe\0\n" + b"x,1,1,1,1,1\n" + b"9" * 200_000 + b"\n"
    (out / "metrics.csv").write_bytes(header + rows[0] + stray + rows[1] + b"3,1,\xff")
    capsys.readouterr()
    resume = ("train", "vae", "--out", out, "--resume", "--epochs", 3, "--device", "cpu")
    assert cli.main([*map(str, resume)]) == 0
    assert "warning: left out 3 lines of" in capsys.readouterr().err
    with open(out / "metrics.csv", newline="", encoding="utf-8") as file:
        assert [row[0] for row in csv.reader(file)] == ["step", "1", "2", "3"]
    assert (out / "metrics.csv").read_bytes().startswith(header + rows[0] + rows[1])
