"""Images with labels from every kind of source, batches of both, and data that have none."""

import gzip
import itertools
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from genfast.training.data import (
    Batches,
    LabelledImages,
    checksum,
    load_images,
    load_labelled,
    sources,
)
from genfast.training.data import labels as data_labels
from genfast.training.errors import BadInput

RAMP = np.arange(6 * 8 * 8, dtype=np.uint8).reshape(6, 8, 8)
CPU = torch.device("cpu")


def _png(path, level):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), level).save(path)


def _idx_images(path, images=RAMP):
    path.write_bytes(b"\0\0\x08\x03" + struct.pack(">3I", *images.shape) + images.tobytes())
    return path


def _idx_labels(path, values, claimed=None):
    count = len(values) if claimed is None else claimed
    content = b"\0\0\x08\x01" + struct.pack(">I", count) + bytes(values)
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)


def test_digits():
    found = load_labelled("digits", 16)
    assert found.classes == tuple("0123456789")
    assert torch.equal(found.labels, torch.from_numpy(load_digits().target).long())
    assert torch.equal(found.images, load_images("digits", 16))


def test_folders_are_classes(tmp_path):
    for name, level in (("dog/1.png", 20), ("cat/2.png", 10), ("dog/3.png", 21), ("ant/4.png", 1)):
        _png(tmp_path / name, level)
    (tmp_path / "cat/1.png").write_bytes(b"nonsense")  # Its label goes with it.
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.warns(UserWarning, match="skipped 1 of 5 images"):
        found = load_labelled(tmp_path, 8)
    assert found.classes == ("ant", "cat", "dog")
    pairs = zip(found.labels.tolist(), found.images[:, 0, 0, 0].tolist(), strict=True)
    assert sorted(pairs) == [(0, 1), (1, 10), (2, 20), (2, 21)]


@pytest.mark.parametrize(
    ("names", "dtype", "shape"),
    [(("images", "labels"), np.int64, (6,)), (("x_train", "y_train"), np.uint8, (6, 1))],
)
def test_npz(tmp_path, names, dtype, shape):
    values = np.array([7, 3, 3, 9, 7, 3], dtype).reshape(shape)
    arrays = dict(zip(names, (RAMP, values), strict=True))
    np.savez_compressed(tmp_path / "a.npz", **arrays, x_test=RAMP[:2], y_test=values[:2])
    found = load_labelled(tmp_path / "a.npz")
    assert found.classes == ("3", "7", "9")
    assert found.labels.dtype == torch.int64 and found.labels.tolist() == [1, 0, 0, 2, 1, 0]
    assert torch.equal(found.images, load_images(tmp_path / "a.npz"))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("infix", ["-", "."])
def test_mnist(tmp_path, suffix, infix):
    path = _idx_images(tmp_path / f"train-images{infix}idx3-ubyte")
    _idx_labels(tmp_path / f"train-labels{infix}idx1-ubyte{suffix}", [5, 0, 4, 1, 9, 2])
    for source in (path, tmp_path):
        found = load_labelled(source)
        assert found.classes == tuple("012459")
        assert found.labels.tolist() == [4, 0, 3, 1, 5, 2]


def _npz(path, values, name="labels"):
    np.savez(path / "a.npz", images=RAMP, **{name: values})
    return path / "a.npz"


def _folder(path, *names):
    for name in names:
        _png(path / name, 5)
    return path


def _mnist(path, *given, name="train-labels-idx1-ubyte"):
    _idx_labels(path / name, *given)
    return _idx_images(path / "train-images-idx3-ubyte")


def _npy(path):
    np.save(path / "a.npy", RAMP)
    return path / "a.npy"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: "photos", "images with labels for --conditional .*, got photos, which has"),
        (_npy, r"images with labels .*a.npy, which has none"),
        (lambda path: _idx_images(path / "photographs"), "got .*photographs, which has none"),
        (lambda path: _folder(path, "a/1.png", "2.png"), r"class, right below .*, got .*/2.png"),
        (lambda path: _folder(path, "a/1.png", "b/c/2.png"), r"right below .*, got .*b/c/2.png"),
        (lambda path: _folder(path, "a/1.png", "a/2.png"), "two or more .*only the class 'a'"),
        (lambda path: _npz(path, np.ones(6, int)), "two or more classes .*only the class '1'"),
        (lambda path: _npz(path, np.arange(6), "which"), "images and labels.*, got images, which"),
        (lambda path: _npz(path, np.arange(6.0)), "labels in .* whole numbers, got dtype float64"),
        (lambda path: _npz(path, np.arange(-1, 5)), "from 0 on in .*a.npz, got -1"),
        (lambda path: _npz(path, np.arange(5)), r"6 labels, one an image, .* shape \(5,\)"),
        (lambda path: _npz(path, np.zeros((6, 2), int)), r"6 labels, .* got shape \(6, 2\)"),
        (lambda path: _npz(path, np.array([None] * 6)), "labels in .*a.npz, could not read it"),
        (lambda path: _idx_images(path / "train-images-idx3-ubyte"), "beside it .*idx1.*neither"),
        (lambda path: _mnist(path, range(5)), "6 labels, one for each image in .*, got 5"),
        (lambda path: _mnist(path, range(5), 6), "6 bytes of labels in .*labels.*, got 5"),
        (lambda path: _mnist(path, range(7), 6), "6 bytes of labels in .*labels.*, got 7"),
        (
            lambda path: _mnist(path, range(6), 10**9, name="train-labels-idx1-ubyte.gz"),
            "6 labels, one for each image in .*, got 1000000000",
        ),
    ],
)
def test_data_without_labels(tmp_path, make, message):
    with pytest.raises(BadInput, match=f"^expected [^\n]*{message}[^\n]*$"):
        load_labelled(make(tmp_path))


def test_names_are_what_a_checkpoint_can_hold():
    """Names of folders may be any bytes, and PyTorch reads no half characters."""
    found = data_labels.labelled(torch.zeros(2, 1, 1, 1), ["\udce4", "ä"], "here")
    assert found.classes == ("ä", "\\xe4")


def _numbered(count):
    images = torch.arange(count, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    return LabelledImages(images, 3 * torch.arange(count), tuple(map(str, range(3 * count))))


@pytest.mark.parametrize("large", [False, True])
def test_batches_hold_the_labels_of_their_images(monkeypatch, large):
    if large:  # Threads gather them, ahead.
        monkeypatch.setattr(sources, "LARGE", 0)
    data = _numbered(10)
    plain = Batches(data.images, 3, 4, CPU).stream(2)
    labelled = Batches(data, 3, 4, CPU).stream(2)
    for images, (same, labels) in itertools.islice(zip(plain, labelled, strict=False), 12):
        assert torch.equal(images, same)
        assert labels.tolist() == [3 * i for i in same[:, 0, 0, 0].tolist()]


def test_labels_of_images_that_stay_in_their_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGE", 0)
    images = np.broadcast_to(np.arange(6, dtype=np.uint8)[:, None, None], (6, 8, 8)).copy()
    path = _idx_images(tmp_path / "train-images-idx3-ubyte", images)
    _idx_labels(tmp_path / "train-labels-idx1-ubyte.gz", [0, 1, 2, 3, 4, 5])
    for batch, labels in itertools.islice(Batches(load_labelled(path), 2, 0, CPU).stream(), 6):
        assert batch[:, 0, 0, 0].tolist() == labels.tolist()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies to a GPU")
@pytest.mark.parametrize("resident", [True, False])
def test_batches_on_a_gpu(monkeypatch, resident):
    if not resident:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    batches = Batches(_numbered(10), 3, 4, torch.device("cuda"))
    for images, labels in itertools.islice(batches.stream(2), 12):
        assert images.is_cuda and labels.is_cuda
        assert labels.tolist() == [3 * i for i in images[:, 0, 0, 0].tolist()]


def test_a_checksum_covers_the_labels():
    data = _numbered(10)
    other = LabelledImages(data.images, data.labels.flip(0), data.classes)
    assert checksum(other) != checksum(data) != checksum(data.images)
    assert checksum(_numbered(10)) == checksum(data)


def test_a_part_of_labelled_images():
    data = _numbered(10)
    part = data[torch.tensor([7, 2])]
    assert (len(part), part.shape) == (2, (2, 1, 2, 2))
    assert part.labels.tolist() == [21, 6] and part.images[:, 0, 0, 0].tolist() == [7, 2]
    assert part.classes == data.classes


def test_a_path_may_have_a_dot_or_a_slash(tmp_path, monkeypatch):
    _folder(tmp_path, "a/1.png", "b/1.png")
    monkeypatch.chdir(tmp_path)
    for source in (".", f"{tmp_path}/", Path("."), "./"):
        assert load_labelled(source, 8).classes == ("a", "b")
