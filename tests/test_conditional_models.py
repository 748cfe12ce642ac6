"""Labels together with the other options of runs, and what draws from a conditional model."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

import genfast
from genfast.cli import main
from genfast.models import DCGANDiscriminator, DCGANGenerator
from genfast.training import GANStep
from genfast.training.errors import BadInput
from genfast.training.runs.config import prepare
from genfast.training.runs.loop import train

CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of three classes, and the run of a conditional VAE on them."""
    folder, draw = tmp_path_factory.mktemp("labels"), np.random.default_rng(0)
    for i in range(12):
        path = folder / "data" / CLASSES[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    given = dict(batch_size=4, epochs=1, nz=2, conditional=True, image_size=8, validate=0.3)
    config, images = prepare("vae", folder / "data", given | dict(importance_samples=3))
    with genfast.use_backend("reference"):
        train(config, images, folder / "run", device="cpu")
    return folder


def test_images_kept_aside_have_their_labels(folder):
    with open(folder / "run" / "validation.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert np.isfinite([float(value) for value in row.values()]).all()


def test_a_loaded_model_takes_labels(folder):
    model = genfast.load(folder / "run", "cpu")
    assert model.classes == CLASSES
    bees = model.sample(4, labels="bee")
    for same in (1, ["bee"] * 4, torch.tensor([1, 1, 1, 1])):
        assert torch.equal(model.sample(4, labels=same), bees)
    each = model.sample(4)  # Two ants, two bees.
    assert torch.equal(each[2:], bees[2:]) and not torch.equal(each[:2], bees[:2])
    frames = model.walk(4, 3)
    assert torch.equal(frames[0], each)
    assert torch.equal(model.walk(4, 3, labels="bee")[0], bees)
    mu, _ = model.encode(bees, "bee")
    assert torch.equal(model.decode(mu, "bee"), model.reconstruct(bees, "bee"))
    assert not torch.equal(model.encode(bees, "cat")[0], mu)
    for call, message in (
        (
            lambda: model.decode(torch.zeros(2, 2)),
            "expected labels for a model .* 3 classes, got n",
        ),
        (lambda: model.manifold(2), "expected labels for a model"),
        (lambda: model.sample(2, labels="dog"), "to be one of ant, bee, cat, .*got 'dog'"),
        (lambda: model.sample(2, labels=[0, 3]), "labels from 0 to 2, got"),
        (lambda: model.sample(2, labels=[0, 1, 2]), r"expected 2 labels, .* \(3,\)"),
        (lambda: model.sample(2, labels=0.5), "expected 2 labels, whole numbers or names, got"),
    ):
        with pytest.raises(BadInput, match=message):
            call()


def test_pictures_from_the_command_line(folder, tmp_path, capsys):
    run, out = str(folder / "run"), str(tmp_path / "a.png")
    assert main(["sample", run, "--interpolate", "1", "2", "--class", "cat", "--out", out]) == 0
    assert main(["sample", run, "--manifold", "--num", "4", "--class", "cat", "--out", out]) == 0
    walk = ["--walk", "--num", "3", "--frames", "2", "--out", str(tmp_path / "a.gif")]
    assert main(["sample", run, *walk]) == 0
    assert main(["sample", run, "--num", "6", "--out", f"{tmp_path}/single/"]) == 0
    assert len(list((tmp_path / "single").iterdir())) == 6
    assert main(["reconstruct", run, "--num", "5", "--out", out]) == 0
    capsys.readouterr()
    assert main(["sample", run, "--interpolate", "1", "2", "--out", out]) == 1
    assert "expected --class with --interpolate or --manifold" in capsys.readouterr().err
    (folder / "data" / "dog").mkdir()
    (folder / "data" / "ant" / "0.png").rename(folder / "data" / "dog" / "0.png")
    assert main(["reconstruct", run, "--out", out]) == 1
    (folder / "data" / "dog" / "0.png").rename(folder / "data" / "ant" / "0.png")
    assert "the run's classes, got some of the class 'dog'" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:genfast. the penalty wgan-gp is not defined")
@pytest.mark.parametrize("penalty", ["wgan-gp", "r1-r2"])
def test_labels_beside_penalties_and_augmentations(penalty):
    torch.manual_seed(0)
    networks = DCGANGenerator(4, 4, 1, 16, 3), DCGANDiscriminator(1, 4, 16, 3)
    step = GANStep(
        *networks,
        precision="fp32",
        penalty=penalty,
        n_critic=2,
        spectral_norm=True,
        augment="color,translation,cutout",
        flip=True,
        loss="rpgan",
    )
    for _ in range(3):
        result = step([2 * torch.rand(4, 1, 16, 16) - 1, torch.randint(3, (4,))])
    assert result.d_loss.isfinite() and result.g_loss.isfinite()
