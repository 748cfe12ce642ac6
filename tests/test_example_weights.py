"""Weights of PyTorch's public DCGAN example, and runs that begin with weights of others."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import genfast
from genfast import cli, use_backend
from genfast.training.errors import BadInput
from genfast.training.runs import beginning, loop
from genfast.training.runs.checkpoint import read_checkpoint
from genfast.training.runs.config import prepare
from genfast.training.runs.models import build_step
from genfast.training.runs.trained import opened

NZ, NGF, NDF, NC = 5, 4, 2, 3


def generator():
    """The layers of the example's Generator, which it keeps as `main`, with trained statistics."""
    layers, width = [nn.ConvTranspose2d(NZ, 8 * NGF, 4, 1, 0, bias=False)], 8 * NGF
    while width > NGF:
        layers += [nn.BatchNorm2d(width), nn.ReLU(True)]
        layers += [nn.ConvTranspose2d(width, width // 2, 4, 2, 1, bias=False)]
        width //= 2
    layers += [nn.BatchNorm2d(NGF), nn.ReLU(True), nn.ConvTranspose2d(NGF, NC, 4, 2, 1, bias=False)]
    network = nn.ModuleDict({"main": nn.Sequential(*layers, nn.Tanh())})
    for _ in range(5):
        network["main"](torch.randn(8, NZ, 1, 1))
    return network.eval()


def discriminator():
    """Likewise its Discriminator, to the sigmoid at its end."""
    layers, width = [nn.Conv2d(NC, NDF, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)], NDF
    while width < 8 * NDF:
        layers += [nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width)]
        layers += [nn.LeakyReLU(0.2, True)]
        width *= 2
    layers += [nn.Conv2d(width, 1, 4, 1, 0, bias=False), nn.Sigmoid()]
    return nn.ModuleDict({"main": nn.Sequential(*layers)}).eval()


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """(folder with netG.pth and netD.pth, the two networks)."""
    folder = tmp_path_factory.mktemp("example")
    torch.manual_seed(0)
    with use_backend("reference"):
        networks = generator(), discriminator()
    for network, name in zip(networks, ("netG.pth", "netD.pth"), strict=True):
        torch.save(network.state_dict(), folder / name)
    return folder, networks


def _run(*arguments):
    return cli.main([*map(str, arguments)])


def test_a_generator_draws_what_the_example_draws(example, tmp_path):
    folder, (network, _) = example
    state = network.state_dict()
    counted = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    torch.save({f"module.{k}": v for k, v in state.items()}, tmp_path / "parallel.pth")
    torch.save(counted, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    z = torch.randn(6, NZ, 1, 1)
    with torch.no_grad():
        expected = (network["main"](z) + 1) / 2
    for path in (folder / "netG.pth", tmp_path / "parallel.pth", tmp_path / "old.pth"):
        model = genfast.load(path, "cpu")
        assert model.image_shape == (NC, 64, 64)
        torch.testing.assert_close(model.decode(z), expected)
    sampled = tmp_path / "x.png"
    assert _run("sample", folder / "netG.pth", "--num", 3, "--out", sampled, "--device", "cpu") == 0
    with Image.open(sampled) as picture:
        assert picture.size == (2 * 66 + 2, 2 * 66 + 2)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_networks_are_exported(example, tmp_path):
    folder, networks = example
    inputs = torch.randn(2, NZ, 1, 1), torch.rand(2, NC, 64, 64)
    for name, network, given in zip(("netG", "netD"), networks, inputs, strict=True):
        out = tmp_path / f"{name}.pt"
        assert _run("export", folder / f"{name}.pth", "--format", "torchscript", "--out", out) == 0
        with torch.no_grad():
            if name == "netG":
                expected = (network["main"](given) + 1) / 2
            else:
                expected = network["main"](given * 2 - 1).flatten().logit()
        found = torch.jit.load(out)(given)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_run_begins_with_both_networks(example, tmp_path):
    """By their sizes, with fresh optimizers, and its average with the generator."""
    folder, networks = example
    np.save(tmp_path / "a.npy", np.zeros((4, 32, 32, 3), np.uint8))
    out = tmp_path / "out"
    given = ("--epochs", 1, "--batch-size", 4, "--lr", 1e-30, "--ema", 0.5, "--device", "cpu")
    with use_backend("reference"):
        assert _run("train", "dcgan", "--data", tmp_path / "a.npy", "--out", out, *given,
                    "--init-from", folder / "netD.pth", folder / "netG.pth") == 0  # fmt: skip
    content = read_checkpoint(out / "checkpoint.pt")
    config = content["config"]
    assert [config[k] for k in ("nz", "ngf", "ndf", "image_size")] == [NZ, NGF, NDF, 64]
    for name, network in zip(("generator", "discriminator"), networks, strict=True):
        saved = content["modules"][name]
        for key, value in network.named_parameters():
            torch.testing.assert_close(saved[key], value.detach())
        assert content["optimizers"][name]["state"][0]["step"] == 1
    averaged = content["modules"]["average"]["main.0.weight"]
    torch.testing.assert_close(averaged, networks[0]["main"][0].weight.detach())


def test_a_run_begins_with_another(tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (4, 24, 16), np.uint8))
    config, images = prepare("vae", tmp_path / "a.npy", dict(epochs=1, nz=3))
    with use_backend("reference"):
        loop.train(config, images, tmp_path / "first", device="cpu")
        genfast.train(
            "vae", np.zeros((4, 24, 20), np.uint8), out=tmp_path / "second", quiet=True,
            device="cpu", init_from=tmp_path / "first", epochs=1, lr=1e-30, image_size=(24, 16),
        )  # fmt: skip
        first = beginning.read_beginning(tmp_path / "first", "vae")
    before, after = (read_checkpoint(tmp_path / n / "checkpoint.pt") for n in ("first", "second"))
    torch.testing.assert_close(after["modules"]["model"], before["modules"]["model"])
    # What it began with is kept by a run that goes on from it, in another folder too.
    began = [str(tmp_path / "first" / "checkpoint.pt")]
    genfast.train("vae", np.zeros((4, 24, 20), np.uint8), out=tmp_path / "more", quiet=True,
                  device="cpu", resume=tmp_path / "second", epochs=2)  # fmt: skip
    for name, expected in (("first", None), ("second", began), ("more", began)):
        assert json.loads((tmp_path / name / "config.json").read_text())["init_from"] == expected
    elsewhere = replace(config, init_from=("/elsewhere/first",))  # As another machine has it.
    assert loop._what_all_share(elsewhere, None) == loop._what_all_share(config, None)
    with pytest.raises(BadInput, match="resume_from or init_from, got both"):
        loop.train(config, images, tmp_path / "third", device="cpu", init_from=first,
                   resume_from=tmp_path / "first")  # fmt: skip


def test_a_checkpoint_that_does_not_say_what_its_run_began_with(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 24, 16), np.uint8))
    config, images = prepare("vae", tmp_path / "a.npy", dict(epochs=1, nz=3))
    loop.train(config, images, tmp_path / "old", device="cpu")
    path = tmp_path / "old" / "checkpoint.pt"
    content = torch.load(path, weights_only=True)
    assert content["config"].pop("init_from") is None
    torch.save(content, path)
    assert genfast.load(path, "cpu").sample(2).shape == (2, 1, 24, 16)
    genfast.train("vae", out=tmp_path / "old", resume=True, epochs=2, device="cpu", quiet=True)
    assert read_checkpoint(path)["config"]["init_from"] is None
    for value in (3, ("a.pt", 3), ()):
        content["config"]["init_from"] = value
        torch.save(content, path)
        with pytest.raises(BadInput, match="expected --init-from to be paths of files, got"):
            genfast.load(path, "cpu")


def test_labels_of_the_weights_mean_what_those_of_the_images_do(tmp_path):
    images = [(torch.rand(1, 8, 8), i % 2) for i in range(4)]
    given = dict(device="cpu", quiet=True, conditional=True, steps=1, batch_size=4, nz=3)
    first = tmp_path / "first"
    genfast.train("vae", images, out=first, classes=["cat", "dog"], **given)
    for classes, message in (
        (["dog", "ant"], "expected 'cat' as class 0, with which .*first.*, got 'dog' from <list>"),
        (["cat", "ant"], "expected 'dog' as class 1, with which .*, got 'ant' from <list>"),
        (["cat", "dog", "ant"], "expected the 2 classes with which .* were made, got 3 from"),
    ):
        with pytest.raises(BadInput, match=message):
            genfast.train("vae", images, out=tmp_path / "b", init_from=first, classes=classes,
                          **given)  # fmt: skip
        assert not (tmp_path / "b").exists()
    genfast.train("vae", images, out=tmp_path / "b", init_from=first, classes=["cat", "dog"],
                  **given)  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--init-from netG.pth --nz 9", "--nz 5, with which the weights in .*netG.pth .*, got 9"),
        ("--init-from netG.pth --image-size 64x96", "--image-size 64, with .*, got 64x96"),
        ("--init-from netG.pth grey.pth", "channels 3, .*netG.pth .* got 1 in .*grey.pth"),
        ("--init-from netG.pth netG.pth", "one file with the weights of the generator, got two"),
        ("--init-from netG.pth", "images with 3 channels, as .*netG.pth draw, got 1 from .*a.npy"),
        ("--init-from netD.pth --spectral-norm", "netD.pth, but .* missing"),
        ("--init-from deep.pth", "image_size with a smaller side .*, got 8, .* in .*deep.pth"),
        ("--init-from other.pth", "weights of a DCGAN, as .* other.pth, got 0 convolutions"),
        (
            "--init-from biased.pth",
            "weights of a DCGAN's generator, .*, but there is also main.0.b",
        ),
        ("--init-from nan.pth", "finite weights in .*nan.pth, got NaN"),
        ("--init-from list.pth", "a genfast checkpoint at .*list.pth, got another kind of file"),
    ],
)
def test_weights_that_do_not_fit(arguments, message, example, tmp_path, capsys, monkeypatch):
    folder, (network, judge) = example
    monkeypatch.chdir(tmp_path)
    channels = 3 if "spectral" in arguments else 1
    np.save("a.npy", np.zeros((4, 64, 64, channels), np.uint8))
    state = network.state_dict()
    for name in ("netG.pth", "netD.pth"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    first, last = state["main.0.weight"], state["main.12.weight"]
    others = {
        "grey": judge.state_dict() | {"main.0.weight": torch.zeros(NDF, 1, 4, 4)},
        "deep": {"main.0.weight": first, "main.1.weight": first[0], "main.3.weight": last},
        "other": {"main.0.weight": torch.zeros(3, 3)},
        "biased": state | {"main.0.bias": torch.zeros(8 * NGF)},
        "nan": state | {"main.0.weight": first * float("nan")},
        "list": [1, 2],
    }
    name = arguments.split()[-1].removesuffix(".pth")
    if name in others:
        torch.save(others[name], f"{name}.pth")
    if name == "nan":
        np.save("a.npy", np.zeros((4, 64, 64, 3), np.uint8))
    given = ("--data", "a.npy", "--out", "out", "--epochs", "1", "--device", "cpu")
    assert _run("train", "dcgan", *given, *arguments.split()) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(rf"genfast: error: expected [^\n]*{message}[^\n]*\n", error), error


def test_what_a_file_cannot_do(example, tmp_path, capsys):
    folder, _ = example
    for arguments, message in (
        (("sample", folder / "netD.pth", "--out", tmp_path / "x.png"), "of a discriminator alone"),
        (("evaluate", folder / "netG.pth"), "expected --data with the weights in .*netG.pth"),
        (("train", "dcgan", "--resume", folder / "netG.pth"), "checkpoint at .*netG.pth, got anot"),
        (
            ("export", folder / "netG.pth", "--part", "discriminator", "--format", "state-dict",
             "--out", tmp_path / "d.pth"),
            "--part generator of dcgan, got discriminator",
        ),
        (("train", "vae", "--data", "digits", "--init-from", folder / "netG.pth"), "of vae to beg"),
    ):  # fmt: skip
        assert _run(*arguments) == 1
        assert re.search(message, capsys.readouterr().err)


def test_what_is_exported_comes_back(tmp_path):
    """Weights that genfast wrote, of an oblong size, are such files too."""
    with use_backend("reference"):
        step = build_step(_oblong(tmp_path), torch.device("cpu"))
    torch.save(step.discriminator.state_dict(), tmp_path / "d.pth")
    file = opened(tmp_path / "d.pth")
    assert (file.alone, file.config.image_size, file.config.ndf) == ("discriminator", "48x32", 2)


def _oblong(folder):
    np.save(folder / "a.npy", np.zeros((2, 48, 32), np.uint8))
    return prepare("dcgan", folder / "a.npy", dict(epochs=1, ndf=2, ngf=2, nz=2))[0]
