"""Transparent images lie on a background, whatever way their format says what is transparent."""

import os
import re
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from genfast import cli
from genfast.training.data import colour, load_images
from genfast.training.errors import BadInput
from genfast.training.runs import checkpoint, config, loop

CPU = torch.device("cpu")
TINY = dict(batch_size=2, epochs=1, nz=3, ngf=4, ndf=4, image_size=16)
HIDDEN, SHOWN = (9, 99, 199), (30, 60, 90)


def _load(path, **options):
    """The images of a folder, in which nothing is to be warned about."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_images(path, 16, **options)


def _halves(tmp_path, **options):
    """The colours of the left and the right half of the one image."""
    image = _load(tmp_path, **options)[0]
    return tuple(tuple(image[:, 8, column].tolist()) for column in (2, 13))


def _rgba():
    """A square whose left half is transparent."""
    pixels = np.full((16, 16, 4), (*SHOWN, 255), np.uint8)
    pixels[:, :8] = (*HIDDEN, 0)
    return Image.fromarray(pixels)


def _palette(**options):
    image = Image.new("P", (16, 16), 1)
    image.putpalette([*HIDDEN, *SHOWN, *HIDDEN])
    image.paste(0, (0, 0, 8, 16))
    return image


@pytest.mark.parametrize(
    ("background", "seen"),
    [("white", (255,) * 3), ("black", (0,) * 3), ("#Ff8800", (255, 136, 0)), (None, HIDDEN)],
)
@pytest.mark.parametrize("kind", ["RGBA", "webp", "P", "P with alphas", "RGB"])
def test_what_lies_behind(tmp_path, kind, background, seen):
    name = tmp_path / ("a.webp" if kind == "webp" else "a.png")
    if kind == "RGBA":
        _rgba().save(name)
    elif kind == "webp":
        _rgba().save(name, lossless=True, exact=True)
    elif kind == "P":
        _palette().save(name, transparency=0)
    elif kind == "P with alphas":
        _palette().save(name, transparency=b"\0\xff\xff")
    else:
        image = Image.new("RGB", (16, 16), SHOWN)
        image.paste(HIDDEN, (0, 0, 8, 16))
        image.save(name, transparency=HIDDEN)
    options = {} if background == "white" else {"background": background}  # The default.
    with warnings.catch_warnings():
        if background is None:  # As Pillow says it.
            warnings.filterwarnings("ignore", "Palette images with Transparency")
        left, right = _halves(tmp_path, **options)
    assert (left, right) == (seen, SHOWN)


def test_half_transparent_pixels_are_mixed(tmp_path):
    Image.new("RGBA", (16, 16), (200, 100, 0, 51)).save(tmp_path / "a.png")
    assert _halves(tmp_path)[0] == (244, 224, 204)
    assert _halves(tmp_path, background="black")[0] == (40, 20, 0)


def _chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(path, bits, colour_type, row, transparent):
    """A square of 16 such rows, as the PNG specification has it; one colour is transparent."""
    header = struct.pack(">2I5B", 16, 16, bits, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))]
    chunks += [(b"IDAT", zlib.compress((b"\0" + row) * 16)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in chunks))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("transparent", ["dark", "bright"])
def test_one_transparent_grey_of_any_depth(tmp_path, bits, transparent):
    largest = 2**bits - 1
    levels = [0] * 8 + [largest] * 8
    row = int("".join(f"{level:0{bits}b}" for level in levels), 2).to_bytes(2 * bits, "big")
    hidden = 0 if transparent == "dark" else largest
    _png(tmp_path / "a.png", bits, 0, row, [hidden])
    behind = "white" if hidden == 0 else "black"
    both = _halves(tmp_path, background=behind)
    assert both == (((255,), (255,)) if hidden == 0 else ((0,), (0,)))
    assert _halves(tmp_path, background=None) == ((0,), (255,))


def test_one_transparent_colour_of_16_bits(tmp_path):
    hidden, shown = (0x1234, 0x5678, 0x9ABC), (0x3412, 0x7856, 0xBC9A)
    row = struct.pack(">48H", *hidden * 8, *shown * 8)
    _png(tmp_path / "a.png", 16, 2, row, hidden)
    assert _halves(tmp_path) == ((255, 255, 255), (0x34, 0x78, 0xBC))


def test_grey_images_stay_grey_on_a_grey_background(tmp_path):
    image = Image.new("LA", (16, 16), (50, 255))
    image.save(tmp_path / "a.png")
    image.putpixel((0, 0), (50, 0))
    image.save(tmp_path / "b.png")
    for background, channels in (("white", 1), ("#808080", 1), (None, 1), ("#808081", 3)):
        assert _load(tmp_path, background=background).shape == (2, channels, 16, 16)
    (tmp_path / "b.png").unlink()  # Of an image that is opaque nothing shows.
    assert _load(tmp_path, background="#808081").shape == (1, 1, 16, 16)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_opaque_images_keep_their_bits(tmp_path, mode):
    noise = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(
        tmp_path / "a.png" if mode != "CMYK" else tmp_path / "a.jpg"
    )
    before = _load(tmp_path, background=None)
    for background in ("white", "#ff8800"):
        assert torch.equal(_load(tmp_path, background=background), before)


def test_orientation_and_transparency(tmp_path):
    image = _palette()
    exif = image.getexif()
    exif[0x0112] = 3  # Turned by 180 degrees.
    image.save(tmp_path / "a.png", transparency=0, exif=exif)
    assert _halves(tmp_path) == (SHOWN, (255, 255, 255))


@pytest.mark.parametrize(
    "text", ["red", "", "#fff", "#12345g", "#1234567", "ff8800", " white", 3, []]
)
def test_unsuitable_backgrounds(tmp_path, text, capsys):
    with pytest.raises(BadInput, match="expected --background to be white, black or a colour"):
        load_images(tmp_path, background=text)
    with pytest.raises(BadInput, match="expected --background to be white, black or a colour"):
        config.prepare("vae", tmp_path, {"background": text})
    if isinstance(text, str):
        with pytest.raises(SystemExit):
            cli.main(["train", "vae", "--data", str(tmp_path), "--background", text])
        error = capsys.readouterr().err
        assert re.search("argument --background: expected .*white, black or a colour", error)


def test_colours():
    assert colour("white") == (255, 255, 255)
    assert colour("black") == (0, 0, 0)
    assert colour("#0a0B0c") == (10, 11, 12)


def _transparent_folder(folder):
    folder.mkdir()
    for i in range(4):
        image = _rgba()
        image.putpixel((15, 15), (i, i, i, 255))
        image.save(folder / f"{i}.png")
    return folder


def test_a_resumed_run_keeps_its_background(tmp_path):
    folder, path = _transparent_folder(tmp_path / "data"), tmp_path / "out/checkpoint.pt"
    given = TINY | {"background": "#FFFFFF"}
    settings, images = config.prepare("dcgan", folder, given)
    assert images[0, :, 8, 2].tolist() == [255, 255, 255]
    loop.train(settings, images, tmp_path / "out", device=CPU)
    for same in ({}, {"background": "white"}, {"background": "#ffffff"}):
        resumed, same_images = config.prepare_resumed("dcgan", None, same, path)
        assert resumed == settings
        assert torch.equal(same_images, images)
    with pytest.raises(BadInput, match="expected --background #FFFFFF, with which .*, got black"):
        config.prepare_resumed("dcgan", None, {"background": "black"}, path)
    assert config.prepare("dcgan", folder, TINY)[0].background == "white"


def test_a_run_from_before_there_was_a_background(tmp_path):
    folder, path = _transparent_folder(tmp_path / "data"), tmp_path / "out/checkpoint.pt"
    stripped = load_images(folder, 16, background=None)
    settings = config.prepare("dcgan", folder, TINY)[0].as_dict()
    settings = config.Config(**settings | {"checksum": config.checksum(stripped)})
    loop.train(settings, stripped, tmp_path / "out", device=CPU)
    content = checkpoint.read_checkpoint(path)
    del content["config"]["background"]
    torch.save(content, path)
    settings, images = config.prepare_resumed("dcgan", None, {"epochs": 2}, path)
    assert settings.background is None
    assert torch.equal(images, stripped)
    loop.train(settings, images, tmp_path / "out", device=CPU, resume_from=path)
    assert checkpoint.read_checkpoint(path)["config"]["background"] is None
    config.prepare_resumed("dcgan", None, {}, path)
    with pytest.raises(BadInput, match="expected no --background, as the run in .*, got white"):
        config.prepare_resumed("dcgan", None, {"background": "white"}, path)


def test_background_at_the_command_line(tmp_path, capsys):
    folder = _transparent_folder(tmp_path / "data")
    arguments = ["train", "dcgan", "--data", str(folder), "--out", str(tmp_path / "out")]
    arguments += ["--batch-size", "2", "--nz", "3", "--ngf", "4", "--ndf", "4", "--device", "cpu"]
    arguments += ["--image-size", "16", "--epochs"]
    assert cli.main([*arguments, "1", "--background", "#ff8800"]) == 0
    path = os.path.join(tmp_path, "out", "checkpoint.pt")
    assert checkpoint.read_checkpoint(path)["config"]["background"] == "#ff8800"
    assert cli.main([*arguments, "2", "--resume", "--background", "white"]) == 1
    assert "expected --background #ff8800" in capsys.readouterr().err
    assert cli.main([*arguments, "2", "--resume"]) == 0


def test_tall_images_are_put_together_rightly(tmp_path):
    """They are put on their background in parts; only the last rows are transparent."""
    image = Image.new("RGBA", (16, 1000), (*SHOWN, 255))
    image.paste((*HIDDEN, 0), (0, 990, 16, 1000))
    image.resize((1000, 1000)).save(tmp_path / "a.png")
    loaded = load_images(tmp_path, 1000)[0]
    assert loaded[:, 500, 500].tolist() == list(SHOWN)
    assert loaded[:, 0, 0].tolist() == list(SHOWN)
    assert loaded[:, 989, 999].tolist() == list(SHOWN)
    assert (loaded[:, 990:] == 255).all()
    assert (loaded[:, :990] == torch.tensor(SHOWN)[:, None, None]).all()
