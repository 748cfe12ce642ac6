"""Looking at trained models: `genfast.load`, ways through the latent space, and what is written."""

import os
import re

import numpy as np
import pytest
import torch
from PIL import Image

import genfast
from genfast.backend import use_backend
from genfast.cli import main
from genfast.training import VAEStep
from genfast.training.data import load_images
from genfast.training.errors import BadInput
from genfast.training.runs import latents, reconstructions
from genfast.training.runs.checkpoint import read_checkpoint
from genfast.training.runs.config import prepare, prepare_resumed
from genfast.training.runs.loop import train
from genfast.training.runs.models import build_step
from genfast.training.runs.samples import images_to, sample_checkpoint

CPU = torch.device("cpu")
TINY = dict(epochs=1, batch_size=4, ngf=4, image_size=16)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with three finished runs: a GAN with an average, and two VAEs."""
    folder = tmp_path_factory.mktemp("runs")
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16), dtype=np.uint8)
    np.save(folder / "images.npy", pixels)
    for name, model, given in (
        ("gan", "dcgan", dict(nz=4, ndf=4, ema=0.5)),
        ("plane", "conv-vae", dict(nz=2)),
        ("rows", "vae", dict(nz=3)),
    ):
        wanted = TINY | given
        if model == "vae":
            del wanted["ngf"]
        config, images = prepare(model, folder / "images.npy", wanted)
        with use_backend("reference"):  # What is made before a test begins would be interpreted.
            train(config, images, folder / name, device=CPU)
    return folder


def _command(*arguments):
    return main([*map(str, arguments), "--device", "cpu"])


def _refused(capsys, *arguments):
    """The one line in which a command ends."""
    assert _command(*arguments) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"genfast: error: expected [^\n]+\n", error), error
    return error


def _pixels(path):
    with Image.open(path) as picture:
        return np.array(picture)


# Points of the latent space.


def test_the_way_between_two_latents():
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0])
    angle = torch.linspace(0, torch.pi / 2, 5)
    expected = 2 * torch.stack([angle.cos(), angle.sin()], 1)
    torch.testing.assert_close(latents.between(a, b, 5), expected)
    assert torch.equal(latents.between(a, b, 1), a[None])
    # On a line through 0 there is no angle to go through.
    for end in (a, -a, 3 * a):
        middle = latents.between(a, end, 3)[1]
        torch.testing.assert_close(middle, (a + end) / 2)
    shaped = latents.between(torch.randn(4, 1, 1), torch.randn(4, 1, 1), 3)
    assert shaped.shape == (3, 4, 1, 1) and shaped.dtype == torch.float32


def test_the_way_around_is_closed():
    a, b = torch.randn(2, 3, 500, 1)
    points = latents.around(a, b, 8)
    torch.testing.assert_close(points[[0, 2, 4, 6]], torch.stack([a, b, -a, -b]))
    torch.testing.assert_close(points[1], (a + b) / 2**0.5)
    # Each point is a draw from N(0, 1) too.
    assert points.flatten(1).std(1).sub(1).abs().max() < 0.1


def test_cells_of_the_plane_hold_as_much():
    grid = latents.quantiles(4).unflatten(0, (4, 4))
    shares = torch.tensor([1, 3, 5, 7]) / 8
    columns, rows = torch.special.ndtr(grid).unbind(2)
    torch.testing.assert_close(columns, shares.expand(4, 4))
    torch.testing.assert_close(rows, shares.flip(0)[:, None].expand(4, 4))


# Trained models.


def test_a_generator_draws_what_its_network_makes_of_the_noise(runs):
    model = genfast.load(runs / "gan", "cpu")
    assert repr(model) == f"<dcgan of 1 x 16 x 16 after 2 steps: {runs}/gan/checkpoint.pt>"
    assert (model.model, model.latent_shape, model.image_shape) == (None, (4, 1, 1), (1, 16, 16))
    noise = torch.randn(300, 4, 1, 1, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        expected = (model.generator(noise) + 1) / 2
    images = model.sample(300, seed=7)
    torch.testing.assert_close(images, expected)
    assert images.dtype == torch.float32 and not model.generator.training
    newest = genfast.load(runs / "gan/checkpoint.pt", CPU, ema=False)
    saved = read_checkpoint(runs / "gan/checkpoint.pt")["modules"]
    for loaded, name in ((model, "average"), (newest, "generator")):
        for key, value in loaded.generator.state_dict().items():
            assert torch.equal(value, saved[name][key])
    assert not torch.equal(newest.sample(2), model.sample(2))


@pytest.mark.parametrize("name", ["plane", "rows"])
def test_a_vae_encodes_and_decodes_as_its_network_does(runs, name):
    loaded = genfast.load(runs / name, "cpu")
    levels = load_images(runs / "images.npy")
    images = levels / 255
    with torch.no_grad():
        mu, logvar = loaded.model.eval().encode(images)
        expected = loaded.model.decode(mu).reshape(-1, 1, 16, 16)
    for given in (images, levels, images.double()):
        found = loaded.encode(given)
        torch.testing.assert_close(found, (mu, logvar))
    torch.testing.assert_close(loaded.reconstruct(levels), expected)
    torch.testing.assert_close(loaded.decode(mu), expected)


def test_other_ways_to_draw(runs):
    model = genfast.load(runs / "gan", "cpu")
    ends = torch.cat([model.sample(1, seed) for seed in (3, 8)])
    torch.testing.assert_close(model.interpolate(3, 8, 5)[[0, -1]], ends)
    walk = model.walk(3, 4, seed=5)
    assert walk.shape == (4, 3, 1, 16, 16)
    torch.testing.assert_close(walk[0], model.sample(3, 5))
    plane = genfast.load(runs / "plane", "cpu")
    torch.testing.assert_close(plane.manifold(3), plane.decode(latents.quantiles(3)))


def test_what_a_trained_model_does_not_take(runs):
    gan, vae = (genfast.load(runs / name, "cpu") for name in ("gan", "plane"))
    images = torch.zeros(2, 1, 16, 16)
    for call, message in (
        (lambda: gan.encode(images), "a VAE to encode images, got a dcgan in .*gan/checkpoint.pt"),
        (lambda: gan.reconstruct(images), "a VAE to reconstruct images, got a dcgan"),
        (lambda: gan.manifold(3), "a VAE with a latent of two dimensions .*, got a dcgan with"),
        (lambda: vae.encode(images[..., 1:]), r".* \(N, 1, 16, 16\), got torch.float32 \(2, 1"),
        (lambda: vae.encode(images.int()), "floats or uint8 images .*, got torch.int32"),
        (lambda: vae.encode([images]), "floats or .*, got a value of type list"),
        (lambda: vae.decode(torch.zeros(3)), r"latents \(N, 2\), got torch.float32 \(3,\)"),
        (lambda: vae.sample(0), "num to be a whole number from 1 to .*, got 0"),
        (lambda: vae.sample(1, seed=-1), "seed to be a whole number from 0 to .*, got -1"),
        (lambda: genfast.load(runs), "a checkpoint file at .*, where there is none"),
    ):
        with pytest.raises(BadInput, match=f"^expected {message}"):
            call()


def test_a_step_encodes_before_its_first_step(runs):
    """And then as after: the look at the first images leaves no trace."""
    config, images = prepare("conv-vae", runs / "images.npy", TINY | dict(nz=3))
    steps = [build_step(config, CPU) for _ in range(2)]
    steps[1].model.load_state_dict(steps[0].model.state_dict())
    first = steps[0].encode(images)
    assert [t.shape for t in first] == [(8, 3), (8, 3)]
    assert steps[0].model.training
    with torch.no_grad():
        expected = steps[1].model.eval().encode(images / 255)
    torch.testing.assert_close(first, expected)
    steps[1].model.train()
    results = []
    for step in steps:
        torch.manual_seed(1)
        results.append([t.item() for t in step(images)])
    assert results[0] == results[1]
    assert not torch.equal(steps[0].encode(images)[0], first[0])


def test_a_step_encodes_what_a_network_wants():
    """Rows of pixels, in [-1, 1] where the decoder ends in tanh."""

    class Rows(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inward, self.outward = torch.nn.Linear(64, 4), torch.nn.Linear(2, 64)

        def encode(self, rows):
            return self.inward(rows).chunk(2, 1)

        def decode(self, z):
            return self.outward(z).tanh()

    model, images = Rows(), torch.rand(3, 1, 8, 8)
    mu, logvar = VAEStep(model).encode(images)
    with torch.no_grad():
        torch.testing.assert_close((mu, logvar), model.encode(2 * images.flatten(1) - 1))


def test_a_folder_will_do_in_python_too(runs, tmp_path):
    sample_checkpoint(runs / "gan", 2, tmp_path / "a.png", device=CPU)
    config, images = prepare_resumed("dcgan", None, dict(epochs=2), runs / "gan")
    outcome = train(config, images, tmp_path / "on", device=CPU, resume_from=runs / "gan")
    assert outcome.steps == 4


# What the commands write.


def test_single_pictures(runs, tmp_path, capsys):
    folder = tmp_path / "drawn"
    (tmp_path / "file").write_text("mine")
    sample = ("sample", runs / "gan", "--num", 3, "--seed", 4, "--out")
    assert _command(*sample, f"{folder}/") == 0
    assert sorted(os.listdir(folder)) == ["00000.png", "00001.png", "00002.png"]
    images = genfast.load(runs / "gan", "cpu").sample(3, seed=4)
    for i, image in enumerate(images):
        expected = (image[0] * 255).round().to(torch.uint8).numpy()
        assert np.array_equal(_pixels(folder / f"0000{i}.png"), expected)
    # Nothing is written over, and nothing is begun that could not be ended.
    (folder / "00002.png").rename(folder / "00001.png")
    (folder / "00000.png").unlink()
    before = (folder / "00001.png").read_bytes()
    assert "got " + str(folder / "00001.png") in _refused(capsys, *sample, f"{folder}/")
    assert os.listdir(folder) == ["00001.png"]
    assert (folder / "00001.png").read_bytes() == before
    assert f"single pictures as {folder}/\n" in _refused(capsys, *sample, folder)
    assert "got the file" in _refused(capsys, *sample, f"{tmp_path}/file/")
    assert "in a folder that exists" in _refused(capsys, *sample, f"{tmp_path}/no/where/")


def test_a_picture_that_comes_meanwhile_stays(tmp_path):
    write = images_to(f"{tmp_path}/", 2)
    (tmp_path / "00001.png").write_text("mine")
    with pytest.raises(FileExistsError):
        write([torch.zeros(2, 1, 4, 4)])
    assert (tmp_path / "00001.png").read_text() == "mine"


def test_a_row_between_two_seeds_and_a_plane(runs, tmp_path):
    out = tmp_path / "a.png"
    between = ("--interpolate", 1, 2, "--num", 4)
    assert _command("sample", runs / "gan", *between, "--out", out) == 0
    assert _pixels(out).shape == (66 + 2, 4 * 66 + 2)
    assert _command("sample", runs / "plane", "--manifold", "--num", 9, "--out", out) == 0
    pixels = _pixels(out)
    assert pixels.shape == (3 * 66 + 2, 3 * 66 + 2)
    tile = genfast.load(runs / "plane", "cpu").manifold(3)[5, 0]  # Second row, third column.
    expected = (tile * 255).round().to(torch.uint8).numpy()
    assert np.array_equal(pixels[68:132:4, 134:198:4], expected)


def test_a_walk(runs, tmp_path, capsys):
    out = tmp_path / "walk.gif"
    walk = ("sample", runs / "gan", "--walk", "--num", 2, "--frames", 5, "--out")
    for _ in range(2):  # It takes the place of a GIF.
        assert _command(*walk, out) == 0
    frames = genfast.load(runs / "gan", "cpu").walk(2, 5)
    with Image.open(out) as picture:
        assert (picture.format, picture.n_frames, picture.info["loop"]) == ("GIF", 5, 0)
        assert picture.size == (2 * 66 + 2, 66 + 2)
        picture.seek(3)
        shown = np.array(picture.convert("L"))[2:66:4, 68:132:4]
    expected = (frames[3, 1, 0] * 255).round().numpy()
    assert np.abs(shown - expected).max() <= 1
    (tmp_path / "notes.gif").write_text("mine")
    assert "stays as it is" in _refused(capsys, *walk, tmp_path / "notes.gif")
    assert "to end in .gif, as GIF is" in _refused(capsys, *walk, tmp_path / "walk.png")


def test_originals_beside_reconstructions(runs, tmp_path, capsys):
    out = tmp_path / "rec.png"
    assert _command("reconstruct", runs / "plane", "--num", 3, "--seed", 1, "--out", out) == 0
    pixels = _pixels(out)
    assert pixels.shape == (66 + 2, 6 * 66 + 2)
    chosen = torch.randperm(8, generator=torch.Generator().manual_seed(1))[:3]
    originals = load_images(runs / "images.npy")[chosen]
    assert np.array_equal(pixels[2:66:4, 134:198:4], originals[1, 0].numpy())
    made = genfast.load(runs / "plane", "cpu").reconstruct(originals)[1, 0]
    assert np.array_equal(pixels[2:66:4, 200:264:4], (made * 255).round().numpy())
    # That is said before images are loaded.
    gan = ("reconstruct", runs / "gan", "--data", tmp_path / "absent", "--out", out)
    assert "a VAE to reconstruct" in _refused(capsys, *gan)
    colour = np.zeros((2, 16, 16, 3), np.uint8)
    colour[..., 0] = 255
    np.save(tmp_path / "colour.npy", colour)
    other = ("--data", tmp_path / "colour.npy", "--out", out)
    assert "expected grey images" in _refused(capsys, "reconstruct", runs / "plane", *other)


def test_grey_images_for_a_model_of_colours(runs, tmp_path):
    model = genfast.load(runs / "plane", "cpu")
    object.__setattr__(model.config, "channels", 3)
    images = reconstructions._images_like(model, runs / "images.npy")
    assert images.shape == (8, 3, 16, 16)


def test_options_that_do_not_fit(runs, tmp_path, capsys):
    out = ("--out", tmp_path / "a.png")
    for options, message in (
        (("--frames", 3), "--frames with --walk"),
        (("--interpolate", 1, 2, "--seed", 3), "no --seed with --interpolate"),
        (("--manifold", "--seed", 3), "no --seed with --manifold"),
        (("--manifold", "--num", 8), "--num to be a square"),
        (("--manifold",), "a VAE with a latent of two dimensions"),
    ):
        assert message in _refused(capsys, "sample", runs / "gan", *options, *out)
    with pytest.raises(SystemExit):
        _command("sample", runs / "gan", "--walk", "--manifold")
    assert "not allowed with argument" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
