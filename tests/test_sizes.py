"""Sizes of images: which ones halve, what networks make of them, and oblong images in runs."""

import json

import numpy as np
import pytest
import torch
from oracle import assert_same_losses
from PIL import Image

import genfast
from genfast import cli, models, use_backend
from genfast.models import sizes
from genfast.training import GANStep
from genfast.training.data import load_images, sources
from genfast.training.errors import BadInput
from genfast.training.runs.checkpoint import read_checkpoint
from genfast.training.runs.config import Config, prepare


@pytest.mark.parametrize(
    ("size", "halvings", "base"),
    [
        (16, 2, (4, 4)),
        (28, 2, (7, 7)),
        (64, 4, (4, 4)),
        ("96x64", 4, (6, 4)),
        ((64, 96), 4, (4, 6)),
        ("48x80", 3, (6, 10)),
        (256, 6, (4, 4)),
    ],
)
def test_the_smaller_side_is_halved_to_4_to_7(size, halvings, base):
    assert sizes.halved(size) == (halvings, base)


@pytest.mark.parametrize(
    ("found", "nearest"),
    [
        ((28, 31), (28, 32)),
        ((100, 75), (112, 80)),
        ((127, 130), (128, 160)),  # Rounded up, the smaller side is halved once more.
        ((300, 400), (256, 384)),
        ((12, 8), (24, 16)),
    ],
)
def test_arrays_come_to_the_nearest_size_that_halves(found, nearest):
    assert sizes.nearest(*found) == nearest


@pytest.mark.kernels
def test_networks_of_oblong_images_on_kernels(device):
    """The first and last layers meet maps of 6 x 4."""
    torch.manual_seed(0)
    found = []
    for backend in ("triton", "reference"):
        torch.manual_seed(0)
        networks = (
            models.DCGANGenerator(3, 2, 1, (24, 16)).to(device),
            models.DCGANDiscriminator(1, 2, (24, 16)).to(device),
        )
        step = GANStep(*networks, latent_shape=(3, 1, 1), precision="fp32", capture=False)
        images = torch.rand(2, 1, 24, 16).to(device) * 2 - 1
        with use_backend(backend):
            losses = [[float(loss) for loss in step(images)] for _ in range(2)]
        found.append(losses)
    assert_same_losses(*found)


def test_a_label_is_a_channel_of_oblong_images():
    model = models.ConvVAE(1, (24, 16), 3, 2, classes=3)
    with use_backend("reference"):
        reconstructed, mu, _ = model(torch.rand(2, 1, 24, 16), torch.tensor([0, 2]))
    assert reconstructed.shape == (2, 1, 24, 16) and mu.shape == (2, 3)


def _picture(height, width, bright):
    """Dark but for `bright` columns, which are red above and white below their middle."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, bright] = 255
    pixels[: height // 2, bright, 1:] = 0
    return pixels


def test_oblong_images_of_files_and_arrays(tmp_path, monkeypatch):
    """They are cropped to the shape asked for, height first, and not stretched."""
    pixels = _picture(48, 64, slice(16, 48))
    (tmp_path / "folder").mkdir()
    Image.fromarray(pixels).save(tmp_path / "folder/a.png")
    np.save(tmp_path / "a.npy", pixels[None])
    for source in ("folder", "a.npy"):
        for size in ("24x16", (48, 32)):
            images = load_images(tmp_path / source, size)
            height, width = sizes.height_and_width(size)
            assert images.shape == (1, 3, height, width)
            assert images[0, 0].min() > 240
            assert (
                images[0, 1, : height // 3].max() < 15 and images[0, 1, -height // 3 :].min() > 240
            )
    monkeypatch.setattr(sources, "PHOTO_CROPS", 4)
    assert load_images("photos", "96x16").shape == (4, 3, 96, 16)
    assert load_images("photos", "16x96").shape == (4, 3, 16, 96)


@pytest.mark.parametrize("model", ["gan", "dcgan", "vae", "conv-vae", "vae-gan"])
def test_runs_of_oblong_images(model, tmp_path):
    np.save(tmp_path / "a.npy", np.random.default_rng(0).integers(0, 256, (4, 24, 20), np.uint8))
    given = ["--nz", "3", "--batch-size", "2", "--epochs", "1"]
    if model not in ("gan", "vae"):
        given += ["--ngf", "2"] + (["--ndf", "2"] if model != "conv-vae" else [])
    out = tmp_path / "out"
    with use_backend("reference"):
        assert _run("train", model, "--data", tmp_path / "a.npy", "--image-size", "24x16",
                    "--out", out, *given) == 0  # fmt: skip
        assert _run("train", model, "--resume", out, "--image-size", "24x16", "--epochs", 2) == 0
        assert _run("sample", out, "--num", 2, "--out", f"{tmp_path}/drawn/") == 0
        if model != "dcgan" and model != "gan":
            assert _run("reconstruct", out, "--num", 3, "--out", tmp_path / "pairs.png") == 0
    assert read_checkpoint(out / "checkpoint.pt")["config"]["image_size"] == "24x16"
    assert json.loads((out / "config.json").read_text())["image_size"] == "24x16"
    with Image.open(tmp_path / "drawn/00001.png") as picture:
        assert picture.size == (16, 24)
    trained = genfast.load(out, "cpu")
    assert trained.image_shape == (1, 24, 16)
    exported = tmp_path / "weights.pth"
    assert cli.main(["export", str(out), "--format", "state-dict", "--out", str(exported)]) == 0


def _run(*arguments):
    return cli.main([*map(str, arguments), "--device", "cpu"])


def test_sizes_in_settings(tmp_path):
    """One form is kept, whichever was given; that of squares is the int of older runs."""
    np.save(tmp_path / "a.npy", np.zeros((4, 24, 20), np.uint8))
    for given, kept in ((16, 16), ("16x16", 16), ((24, 16), "24x16"), ([24, 16], "24x16")):
        config, images = prepare("dcgan", tmp_path / "a.npy", dict(image_size=given))
        assert (config.image_size, config.image_shape[1:]) == (kept, images.shape[2:])
        assert Config(**config.as_dict() | dict(image_size=given)) == config
    assert prepare("vae", tmp_path / "a.npy", {})[0].image_size == "24x20"
    for wrong in ("24x", "x16", "0x16", "24x16x8", (24, 16, 8), (24,), (24.0, 16), True, 0):
        with pytest.raises(BadInput, match="expected --image-size to be a whole .* HEIGHTxWIDTH"):
            prepare("vae", tmp_path / "a.npy", dict(image_size=wrong))
