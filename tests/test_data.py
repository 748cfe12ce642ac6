"""Images from every kind of source, and what is said about each that cannot be used."""

import gzip
import re
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from genfast.training import data
from genfast.training.data import Batches, load_images, normalize
from genfast.training.errors import BadInput

RAMP = np.arange(5 * 8 * 8, dtype=np.uint8).reshape(5, 8, 8)


def _fails(source, *words, image_size=16):
    """Loading raises BadInput, in one sentence that holds all these words."""
    with pytest.raises(BadInput) as caught:
        load_images(source, image_size)
    message = str(caught.value)
    assert "expected" in message
    assert "\n" not in message
    for word in words:
        assert re.search(word, message), f"{word!r} is not in: {message}"


def _idx(images):
    return b"\0\0\x08\x03" + struct.pack(">3I", *images.shape) + images.tobytes()


def _png(path, color, size=(20, 12), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def test_digits_are_the_real_ones():
    images = load_images("digits", 16)
    assert images.shape == (1797, 1, 16, 16)
    assert images.dtype == torch.uint8
    # The first is a zero: dark in the middle, bright around it.
    assert images[0, 0, 7:9, 7:9].float().mean() < 60
    assert images[0, 0].max() > 200
    assert load_images("digits").shape == (1797, 1, 32, 32)


def test_photos_are_varied_and_the_same_each_time(monkeypatch):
    monkeypatch.setattr(data, "PHOTO_CROPS", 24)
    images = load_images("photos", 32)
    assert images.shape == (24, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert len({image.numpy().tobytes() for image in images}) == 24
    assert images.float().std() > 20
    assert torch.equal(images, load_images("photos", 32))


def test_folder_of_any_depth_and_kind(tmp_path):
    _png(tmp_path / "a.png", (255, 0, 0))
    _png(tmp_path / "deep/er/b.JPG", (0, 255, 0))
    _png(tmp_path / "deep/c.webp", (0, 0, 255))
    _png(tmp_path / "d.jpeg", 77, mode="L")
    (tmp_path / "notes.txt").write_text("no image")
    images = load_images(tmp_path, 16)
    assert images.shape == (4, 3, 16, 16)
    colors = images.float().mean((2, 3))
    expected = torch.tensor([[255, 0, 0], [77, 77, 77], [0, 0, 255], [0, 255, 0]]).float()
    torch.testing.assert_close(colors, expected, atol=3, rtol=0)
    assert load_images(tmp_path).shape[-1] == 64


def test_folder_of_grey_images_has_one_channel(tmp_path):
    _png(tmp_path / "a.png", 10, mode="L")
    _png(tmp_path / "b.png", 200, mode="L")
    images = load_images(tmp_path, 16)
    assert images.shape == (2, 1, 16, 16)
    assert images.flatten(1).float().mean(1).tolist() == [10, 200]


def test_palette_and_transparency(tmp_path):
    _png(tmp_path / "a.png", (9, 99, 199, 255), mode="RGBA")
    Image.new("RGB", (20, 20), (9, 99, 199)).convert("P").save(tmp_path / "b.png")
    images = load_images(tmp_path, 16)
    assert images.shape == (2, 3, 16, 16)
    torch.testing.assert_close(images[0], images[1], atol=30, rtol=0)


def test_images_are_cropped_in_the_middle(tmp_path):
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert load_images(tmp_path, 16).min() == 255


def test_exif_orientation_is_respected(tmp_path):
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255  # The upper half is bright.
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # To be turned by 90 degrees clockwise: the bright half comes to the right.
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    loaded = load_images(tmp_path, 16)[0].float()
    assert loaded[:, :, 9:].min() > 200
    assert loaded[:, :, :7].max() < 50


def test_corrupt_images_are_named_counted_and_skipped(tmp_path):
    for i in range(3):
        _png(tmp_path / f"good{i}.png", (i, i, i))
    (tmp_path / "text.png").write_bytes(b"this is no image")
    whole = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(whole).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:1000])
    with pytest.warns(UserWarning, match="skipped 2 of 5 images.*cut.jpg.*text.png"):
        images = load_images(tmp_path, 16)
    assert images.shape[0] == 3


def test_sixteen_bits_a_channel_are_not_cut_off(tmp_path):
    _png(tmp_path / "good.png", 9, mode="L")
    deep = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    with pytest.warns(UserWarning, match="deep.png .expected 8 bits a channel, got mode I"):
        assert load_images(tmp_path, 16).shape == (1, 1, 16, 16)


def test_a_warning_names_so_many_and_counts_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "NAMED", 2)
    _png(tmp_path / "z.png", 9, mode="L")
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(b"nonsense")
    with pytest.warns(UserWarning, match="skipped 5 of 6 .*0.png.*1.png.*; and 3 more$"):
        load_images(tmp_path, 16)


def test_large_jpegs_are_sampled_finely(tmp_path):
    ramp = np.tile(np.linspace(0, 255, 1024).astype(np.uint8), (1024, 1))
    Image.fromarray(np.stack([ramp] * 3, 2)).save(tmp_path / "a.jpg", quality=95)
    row = load_images(tmp_path, 16)[0, 0, 8].float()
    torch.testing.assert_close(row, torch.linspace(8, 247, 16), atol=3, rtol=0)


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW"])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_arrays(tmp_path, layout, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)
    array = {"NHW": pixels[:, 0], "NHWC": pixels.transpose(0, 2, 3, 1), "NCHW": pixels}[layout]
    path = tmp_path / f"images.{suffix}"
    np.save(path, array) if suffix == "npy" else np.savez(path, array)
    expected = pixels[:, :1] if layout == "NHW" else pixels
    assert torch.equal(load_images(path), torch.from_numpy(expected.copy()))
    assert load_images(path, 32).shape == (5, expected.shape[1], 32, 32)


def test_npz_of_several_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=RAMP, y_train=np.arange(5))
    assert load_images(tmp_path / "a.npz").shape == (5, 1, 8, 8)
    np.savez(tmp_path / "b.npz", first=RAMP, second=RAMP)
    _fails(tmp_path / "b.npz", "b.npz", "one called images or x_train", "first, second")


def test_oblong_arrays_become_squares(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(2 * 4 * 8, dtype=np.uint8).reshape(2, 4, 8))
    images = load_images(tmp_path / "a.npy")
    assert images.shape == (2, 1, 4, 4)
    assert images[0, 0, 0].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("folder", [False, True])
def test_mnist_files(tmp_path, zipped, folder):
    content = _idx(RAMP)
    path = tmp_path / ("train-images-idx3-ubyte" + (".gz" if zipped else ""))
    path.write_bytes(gzip.compress(content) if zipped else content)
    images = load_images(tmp_path if folder else path)
    assert torch.equal(images, torch.from_numpy(RAMP[:, None].copy()))


def test_missing_path(tmp_path):
    _fails(tmp_path / "nothing", "digits, photos", "nothing")


def test_empty_folder(tmp_path):
    _fails(tmp_path, r"\.png", "found none", re.escape(str(tmp_path)))


def test_folder_without_a_readable_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"nonsense")
    _fails(tmp_path, "none of 1", "a.png")


def test_unreadable_folder(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("os.scandir", refuse)
    monkeypatch.setattr("os.listdir", refuse)
    _fails(tmp_path, "Permission denied")


def test_single_image(tmp_path):
    _png(tmp_path / "a.png", (1, 2, 3))
    _fails(tmp_path / "a.png", "folder of images", "a.png")


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (RAMP.astype(np.float32), ["uint8", "float32"]),
        (RAMP[0], [r"\(8, 8\)"]),
        (np.zeros((2, 5, 8, 8), np.uint8), ["1 or 3", r"\(2, 5, 8, 8\)"]),
        (np.zeros((0, 8, 8), np.uint8), ["empty", r"\(0, 8, 8"]),
        (np.array(["a", None], object), ["could not read"]),
    ],
)
def test_unsuitable_arrays(tmp_path, array, words):
    np.save(tmp_path / "a.npy", array)
    _fails(tmp_path / "a.npy", "a.npy", *words)


@pytest.mark.parametrize("name", ["a.npy", "a.npz"])
@pytest.mark.parametrize("content", [b"", b"nonsense", b"PK\x03\x04nonsense", b"\x93NUMPY\1\0"])
def test_damaged_arrays(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    _fails(tmp_path / name, name, "could not read")


def test_truncated_arrays(tmp_path):
    np.save(tmp_path / "a.npy", RAMP)
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-100])
    _fails(tmp_path / "a.npy", "a.npy", "could not read")
    np.savez_compressed(tmp_path / "a.npz", RAMP)
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:-100])
    _fails(tmp_path / "a.npz", "a.npz", "could not read")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (_idx(RAMP)[:-1], ["320 bytes", "5 images of 8 x 8", "got 319", "truncated"]),
        (_idx(RAMP) + b"\0", ["320 bytes", "got 321"]),
        (_idx(RAMP)[:9], ["header of 16 bytes", "got 9"]),
        (gzip.compress(_idx(RAMP))[:-30], ["gzip", "truncated"]),
        (b"\x1f\x8b and nonsense", ["could not read"]),
        (b"\0\0\x08\x01" + struct.pack(">I", 3) + b"abc", ["rank 3", "rank 1", "labels"]),
        (b"\0\0\x0d\x03" + bytes(12), ["type 8", "type 13"]),
        (b"\0\0\x08\x03" + bytes(12), ["empty"]),
        (b"a text file", ["IDX"]),
        (b"", ["IDX"]),
    ],
)
def test_damaged_idx(tmp_path, content, words):
    (tmp_path / "images").write_bytes(content)
    _fails(tmp_path / "images", "images", *words)


@pytest.mark.parametrize(
    ("module", "package", "source"),
    [
        ("sklearn.datasets", "scikit-learn", "digits"),
        ("sklearn.datasets", "scikit-learn", "photos"),
        ("PIL.Image", "pillow", "photos"),
        ("PIL.Image", "pillow", "folder"),
        ("tqdm", "tqdm", "folder"),
    ],
)
def test_missing_extras_are_named(tmp_path, monkeypatch, module, package, source):
    monkeypatch.setitem(sys.modules, module, None)  # Importing it then fails.
    with pytest.raises(BadInput, match=re.escape('pip install "genfast[train]"')) as caught:
        load_images(tmp_path if source == "folder" else source)
    assert f"this needs {package}" in str(caught.value)


def test_normalize_ends_of_the_range():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert normalize(images, (-1.0, 1.0)).tolist() == pytest.approx([-1, -0.6, 1], abs=1e-6)
    assert normalize(images, (0.0, 1.0)).tolist() == pytest.approx([0, 0.2, 1], abs=1e-6)
    assert normalize(images, (0.0, 1.0)).max() <= 1


def _numbered(count):
    return torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)


def _take(batches, count, start=0):
    stream = batches.stream(start)
    return [next(stream)[:, 0, 0, 0].tolist() for _ in range(count)]


def test_batches_show_each_image_once_an_epoch_in_changing_order():
    batches = Batches(_numbered(10), 3, seed=0, device=torch.device("cpu"))
    assert len(batches) == 3
    epochs = [sum(_take(batches, 3, start), []) for start in (0, 3, 6)]
    for seen in epochs:
        assert len(set(seen)) == 9
    assert epochs[0] != epochs[1] != epochs[2]
    assert len(set(sum((_take(batches, 3, 3 * e) for e in range(9)), [])[0])) > 1


def test_batches_go_on_anywhere():
    batches = Batches(_numbered(10), 3, seed=4, device=torch.device("cpu"))
    whole = _take(batches, 12)
    for start in range(12):
        assert _take(batches, 12 - start, start) == whole[start:]
    other = Batches(_numbered(10), 3, seed=5, device=torch.device("cpu"))
    assert _take(other, 12) != whole


def test_too_large_a_batch():
    with pytest.raises(BadInput, match="expected --batch-size of at most the 10 images, got 11"):
        Batches(_numbered(10), 11, seed=0, device=torch.device("cpu"))
