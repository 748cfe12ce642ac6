"""Settings: the same rules for the command line, for Python, and for a checkpoint."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from genfast import cli
from genfast.training.errors import BadInput
from genfast.training.runs import checkpoint, loop
from genfast.training.runs.config import Config, check_settings, prepare
from genfast.training.runs.models import MODELS, build_step
from genfast.training.runs.samples import sample_checkpoint
from genfast.training.runs.settings import RULES, SETTINGS

CPU = torch.device("cpu")
GOOD = dict(
    model="dcgan", data="digits", num_images=8, checksum=1, image_size=16, channels=1,
    batch_size=4, epochs=1, lr=2e-4, beta1=0.5, nz=3, seed=0, precision="fp32", ngf=4, ndf=4,
)  # fmt: skip
UNSUITABLE = [
    ("epochs", "0", 0),
    ("epochs", str(10**30), 10**30),
    ("batch_size", "1.5", 1.5),
    ("batch_size", "-4", -4),
    ("image_size", "x", "x"),
    ("lr", "nan", float("nan")),
    ("lr", "inf", float("inf")),
    ("lr", "0", 0),
    ("beta1", "1", 1),
    ("nz", "0", 0),
    ("ngf", "64.0", 64.0),
    ("ndf", "", None),
    ("seed", "-1", -1),
    ("seed", str(2**63), 2**63),
]


@pytest.fixture
def images(tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (4, 16, 16), dtype=np.uint8))
    return path


def test_every_setting_has_a_rule():
    settings = {name for model in MODELS.values() for name in model.defaults}
    assert {"image_size", *settings} == SETTINGS.keys()
    assert Config.__dataclass_fields__.keys() - {"model"} == RULES.keys()


@pytest.mark.parametrize(("name", "text", "value"), UNSUITABLE)
def test_three_ways_in_share_the_rules(name, text, value, capsys):
    option = "--" + name.replace("_", "-")
    expected = re.escape(RULES[name].expected)
    with pytest.raises(SystemExit):
        cli.main(["train", "dcgan", f"{option}={text}"])
    assert re.search(f"{option}: expected {expected}, got '", capsys.readouterr().err)
    with pytest.raises(BadInput, match=f"^expected {option} to be {expected}, got [^\n]+$"):
        prepare("dcgan", "digits", {name: value})
    with pytest.raises(BadInput, match=f"^expected {option} to be .* in the checkpoint c.pt$"):
        Config.of_checkpoint({"config": GOOD | {name: value}}, "c.pt")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "stylegan"}, "expected a model among .*, got 'stylegan' in the checkpoint c.pt"),
        ({"model": torch.zeros(3)}, "expected a model among .*, got a value of type Tensor in"),
        ({"precision": "fp8"}, "expected --precision to be auto, .* or fp16, got 'fp8'"),
        ({"channels": 2}, "expected channels to be 1 or 3, got 2"),
        ({"num_images": True}, "expected num_images to be a whole number .*, got True"),
        ({"data": 3}, "expected --data to be a name or a path, got 3"),
        ({"lr": 10**400}, "expected --lr to be a number above 0, got 1000"),
        ({"lr": torch.tensor(0.1)}, "expected --lr to be .*, got a value of type Tensor"),
        ({"image_size": 27}, "expected --image-size in multiples of 4, .* for dcgan, got 27"),
        ({"model": "gan"}, "expected settings that gan has, got --n[gd]f, which it lacks"),
        ({"epochs": "1" * 100}, r"got '1+\.\.\.1+' in"),
        ({"epochs": 10**5000}, "got (10+|a value of type int)"),
    ],
)
def test_settings_of_a_checkpoint(wrong, message):
    with pytest.raises(BadInput, match=message) as raised:
        Config.of_checkpoint({"config": GOOD | wrong}, "c.pt")
    assert "\n" not in str(raised.value)
    assert Config.of_checkpoint({"config": GOOD}, "c.pt").lr == 2e-4


@pytest.mark.parametrize("model", ["gan", "vae"])
@pytest.mark.parametrize("size", [1, 28])
def test_perceptrons_take_any_image_size(model, size, images, tmp_path):
    out, device = tmp_path / "out", ("--device", "cpu")
    arguments = ("--data", images, "--image-size", size, "--epochs", 1, "--out", out, *device)
    assert cli.main(["train", model, *map(str, arguments)]) == 0
    assert (
        cli.main(["sample", str(out), "--num", "1", "--out", str(tmp_path / "a.png"), *device]) == 0
    )
    with Image.open(tmp_path / "a.png") as picture:
        side = size * -(-64 // size) + 4
        assert picture.size == (side, side)


@pytest.mark.parametrize("model", ["dcgan", "conv-vae"])
def test_convolutions_take_sizes_that_halve(model):
    with pytest.raises(BadInput, match=f"in multiples of 8, .* for {model}, got 50x40"):
        check_settings(model, {"image_size": "50x40"})


def test_numbers_of_numpy_do_not_spoil_the_checkpoint(images, tmp_path):
    given = dict(lr=np.float64(1e-3), batch_size=np.int64(4), nz=np.uint8(3), epochs=1)
    config, pixels = prepare("vae", images, given)
    assert [type(v) for v in (config.lr, config.batch_size, config.nz)] == [float, int, int]
    path = tmp_path / "c.pt"
    checkpoint.save_checkpoint(path, build_step(config, CPU), config.as_dict(), 0)
    assert Config.of_checkpoint(checkpoint.read_checkpoint(path), path) == config


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("vae", np.zeros((4, 16, 16), np.uint8), {}), "--data to be digits, .* type ndarray"),
        (("vae", torch.zeros(4, 1, 16, 16), {}), "--data to be digits, .* type Tensor"),
        (("vae", None, {}), "--data to be digits, photos or a path, got None"),
        (("vae", "digits", None), "expected settings as a dict, got None"),
        ((["vae"], "digits", {}), "expected a model among .*, got a value of type list"),
    ],
)
def test_prepare_is_given_something_else(arguments, message):
    with pytest.raises(BadInput, match=message):
        prepare(*arguments)


def test_train_is_given_something_else(images, tmp_path):
    config, pixels = prepare("vae", images, dict(nz=3, epochs=1))
    out = tmp_path / "out"
    for arguments, message in (
        ((config, pixels.numpy(), out), r"uint8 tensor \(4, 1, 16, 16\), got .* type ndarray"),
        ((config, pixels.float(), out), r"got torch.float32 \(4, 1, 16, 16\)"),
        ((config, pixels[:, 0], out), r"got torch.uint8 \(4, 16, 16\)"),
        ((pixels, config, out), "expected a Config, as prepare gives it, got a value of type Tens"),
        ((config.as_dict(), pixels, out), "expected a Config, .* of type dict"),
    ):
        with pytest.raises(BadInput, match=message):
            loop.train(*arguments, device=CPU)
    for device in ("tpu", "meta", "cuda:99", "", None, torch.device("meta")):
        with pytest.raises(BadInput, match="expected --device to be .*, got"):
            loop.train(config, pixels, out, device=device)
    assert not out.exists()


def test_the_name_of_a_device_will_do(images, tmp_path):
    config, pixels = prepare("vae", images, dict(nz=3, epochs=1))
    assert loop.train(config, pixels, tmp_path / "out", device="cpu").finished
    sample_checkpoint(tmp_path / "out/checkpoint.pt", 1, tmp_path / "a.png", device="cpu")
    assert (tmp_path / "a.png").exists()
