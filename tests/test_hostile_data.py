"""Files that would hang, fill memory or claim what they do not hold end in a sentence at once."""

import gzip
import io
import os
import re
import socket
import struct
import subprocess
import sys
import threading
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genfast.training import memory
from genfast.training.data import DataSet, Streamed, decoding, load_images, sources
from genfast.training.errors import BadInput
from genfast.training.runs import config

RAMP = np.arange(5 * 8 * 8, dtype=np.uint8).reshape(5, 8, 8)
ROOT = Path(__file__).parents[1]


def _says(path, *words, size=None):
    """Loading raises BadInput in one sentence with these words, and takes next to no memory."""
    tracemalloc.start()
    try:
        with pytest.raises(BadInput) as caught:
            load_images(path, size)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert message.startswith("expected")
    assert "\n" not in message
    for word in words:
        assert re.search(word, message), f"{word!r} is not in: {message}"


def _socket(path):
    """A socket at a path, however long that is."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


MAKERS = {
    "FIFO": os.mkfifo,
    "socket": _socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("name", ["images", "images.npy", "images.npz", "images.gz", "a.png"])
def test_special_files_as_data(tmp_path, kind, name):
    MAKERS[kind](tmp_path / name)
    _says(tmp_path / name, f"folder or a file of images, got a {kind}: .*{name}")


@pytest.mark.parametrize("kind", MAKERS)
def test_special_files_in_a_folder(tmp_path, kind):
    for name in ("a.png", "deep/b.jpg", "deep/notes"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        MAKERS[kind](tmp_path / name)
    _says(tmp_path, rf"found none; passed over: .*a.png \(a {kind}\); .*b.jpg \(a {kind}\)$")
    Image.new("L", (16, 16), 7).save(tmp_path / "c.png")
    with pytest.warns(
        UserWarning, match=rf"passed over in .*a.png \(a {kind}\); .*b.jpg \(a {kind}"
    ):
        assert load_images(tmp_path, 16).shape == (1, 1, 16, 16)


@pytest.mark.parametrize("kind", MAKERS)
def test_special_files_with_mnists_names(tmp_path, kind):
    MAKERS[kind](tmp_path / "train-images-idx3-ubyte")
    _says(tmp_path, "found none")


def test_devices_at_the_command_line(tmp_path):
    """In a process of its own, which may not take much memory nor time."""
    os.mkfifo(tmp_path / "fifo")
    code = (
        "import sys; from genfast import cli; sys.exit([cli.main(a.split()) for a in sys.argv[1:]])"
    )
    paths = (
        "/dev/zero",
        "/dev/stdin",
        tmp_path / "fifo",
        "/dev/null",
        "/proc/self/mem",
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *(f"train vae --data {p} --out {tmp_path}/o" for p in paths)],
        stdin=subprocess.PIPE,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )
    lines = done.stderr.splitlines()
    assert len([line for line in lines if line.startswith("genfast: error: expected")]) == 5, lines
    assert "[1, 1, 1, 1, 1]" in lines


def _header(shape, order=False, descr="|u1", version=(1, 0)):
    text = f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text


def _npz(path, content, method=zipfile.ZIP_DEFLATED, name="images.npy"):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr(name, content)


CLAIMS = [
    (2**40, 64, 64),
    (2**64, 8, 8),  # In 64 bits its size is nothing.
    (2**32, 2**32, 1),
    (2**62, 4, 4, 1),
    (6, 8, 8),
]


@pytest.mark.parametrize("shape", CLAIMS)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_claims_of_more_than_there_is(tmp_path, shape, suffix):
    path, content = tmp_path / f"a.{suffix}", _header(shape) + RAMP.tobytes()
    path.write_bytes(content) if suffix == "npy" else _npz(path, content)
    _says(path, rf"a.{suffix}, could not read it: its header claims \d+ bytes .*, it has 320$")


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (_header((-5, 8, -8)), "negative shape"),
        (_header((5, 8, 8), descr="<f8"), "dtype float64"),
        (_header((2**40, 8, 8), descr="|O"), "Python objects"),
        (_header((2**40, 8, 8), version=(3, 0)), "version 1 or 2 of the format, got 3"),
        (b"\x93NUMPY\2\0\xff\xff\xff\xff" + b"(" * 100, "could not read"),
        (b"\x93NUMPY\2\0\xff\xff\0\0" + b"(" * 2**17, "could not read"),
        (_header("(" * 5000), "could not read"),
        (_header("9" * 9000), "could not read"),
        (_header((5, 8.0, 8)), "could not read"),
    ],
    ids=["negative", "double", "objects", "version", "cut", "long", "nested", "digits", "fraction"],
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_strange_headers(tmp_path, suffix, header, words):
    path, content = tmp_path / f"a.{suffix}", header + RAMP.tobytes()
    path.write_bytes(content) if suffix == "npy" else _npz(path, content)
    _says(path, words)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_every_honest_header(tmp_path, suffix, version, order):
    array = np.random.default_rng(0).integers(0, 256, (5, 8, 6, 3), dtype=np.uint8)
    content = io.BytesIO()
    np.lib.format.write_array(content, np.asarray(array, order=order), version)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content.getvalue() + b"more") if suffix == "npy" else _npz(
        path, content.getvalue()
    )
    expected = torch.from_numpy(array.transpose(0, 3, 1, 2).copy())
    assert torch.equal(load_images(path), expected)


def _stream(path, head, count):
    """A gzip file of `head` and this many zeros."""
    path.write_bytes(gzip.compress(head + bytes(count), 1))


def _idx(*shape):
    return b"\0\0\x08\x03" + struct.pack(">3I", *shape)


def test_gzip_bombs(tmp_path, monkeypatch):
    path = tmp_path / "train-images-idx3-ubyte.gz"
    _stream(path, b"", 2**26)
    _says(path, "got type 0")
    _stream(path, _idx(5, 8, 8), 2**26)  # More than was claimed is not unpacked.
    _says(path, "expected 320 bytes", "got 321")
    _stream(path, _idx(2**32 - 1, 2**32 - 1, 2**32 - 1), 0)
    _says(
        path, r"the images in .* to fit into the [\d.]+ GiB of memory that are free, got 7\d+.* GiB"
    )
    _stream(path, _idx(2**10, 2**8, 2**8), 0)
    monkeypatch.setattr(memory, "available_memory", lambda: 2**26 - 1)
    _says(tmp_path, "to fit into the 0.1 GiB of memory that are free, got 0.1 GiB")


def test_archive_bombs(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    _npz(path, _header((2**10, 2**8, 2**8)) + bytes(2**26))
    assert path.stat().st_size < 2**17
    monkeypatch.setattr(memory, "available_memory", lambda: 2**26 - 1)
    _says(path, "the images in .* to fit into the 0.1 GiB of memory that are free, got 0.1 GiB")
    monkeypatch.undo()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", _header((2**44, 8, 8)) + RAMP.tobytes())
        archive.infolist()[0].file_size = 2**50 + len(_header((2**44, 8, 8)))  # As it is listed.
    _says(path, "to fit into the .* GiB of memory that are free, got 1048576.0 GiB")


def test_a_list_in_an_archive_that_claims_too_much(tmp_path):
    path, content = tmp_path / "a.npz", _header((50, 8, 8)) + RAMP.tobytes()
    _npz(path, content)
    written = path.read_bytes()
    directory = written.rindex(b"PK\1\2")
    size = struct.pack("<I", len(content) - 320 + 3200)
    path.write_bytes(written[: directory + 24] + size + written[directory + 28 :])
    _says(path, "could not read it")


def test_archives_of_others(tmp_path):
    path = tmp_path / "a.npz"
    _npz(path, b"no array", name="images")
    _says(path, "could not read it")
    _npz(path, b"", name="images.npy")
    _says(path, "could not read it")
    np.save(tmp_path / "b.npy", RAMP)
    (tmp_path / "b.npy").rename(path)
    _says(path, "could not read it: File is not a zip file")
    np.savez_compressed(path, images=RAMP)
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1  # Encrypted, it says.
    content[6] |= 1
    path.write_bytes(content)
    _says(path, "could not read it: .*encrypted")
    np.savez(path, **{f"n{i}": RAMP for i in range(30)})
    _says(path, "got n0, n1, n2, n3, n4, n5, n6, n7, n8 …$")


def test_wrong_bits_in_an_archive_are_noticed(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, images=RAMP)
    content = path.read_bytes()
    path.write_bytes(content.replace(RAMP[2].tobytes(), RAMP[3].tobytes()))
    _says(path, "could not read it: Bad CRC-32")


def test_large_files_of_another_kind_are_not_read(tmp_path):
    path = tmp_path / "film"
    with open(path, "wb") as file:
        file.write(b"RIFF")
        file.truncate(2**40)  # It takes no space on the disk.
    _says(path, "IDX")


def test_large_idx_files_stay_where_they_are(tmp_path, monkeypatch):
    path = tmp_path / "images"
    with open(path, "wb") as file:
        file.write(_idx(2**20, 2**9, 2**9))
        file.truncate(16 + 2**38)
    images = load_images(path)
    assert images.shape == (2**20, 1, 2**9, 2**9)
    assert images[-1].max() == 0
    monkeypatch.setattr(memory, "available_memory", lambda: 2**30)
    _says(path, "1048576 images of 256 x 256 pixels to fit into the 1.0 GiB", size=256)
    path.write_bytes(_idx(5, 8, 8) + RAMP.tobytes())
    small = load_images(path)
    monkeypatch.setattr(sources, "LARGE", 0)
    assert torch.equal(load_images(path), small)


def test_more_images_than_fit(tmp_path, monkeypatch):
    for i in range(3):
        Image.new("L", (4, 4)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(memory, "available_memory", lambda: 3 * 3 * 16 * 16 - 1)
    _says(tmp_path, "3 images of 16 x 16 pixels to fit into", size=16)
    monkeypatch.setattr(memory, "available_memory", lambda: 3 * 3 * 16 * 16)
    assert len(load_images(tmp_path, 16)) == 3


def test_image_bombs(tmp_path):
    Image.new("L", (16, 16), 7).save(tmp_path / "good.png")
    Image.new("1", (16, 16)).save(tmp_path / "bomb.png")
    content = (tmp_path / "bomb.png").read_bytes()
    header = b"IHDR" + struct.pack(">2I", 60000, 60000) + content[24:29]
    header += struct.pack(">I", zlib.crc32(header))
    (tmp_path / "bomb.png").write_bytes(content[:12] + header + content[33:])
    with pytest.warns(UserWarning, match=r"skipped 1 of 2 images: .*bomb.png .*decompression bomb"):
        assert load_images(tmp_path, 16).shape == (1, 1, 16, 16)


def test_large_images_are_decoded_a_few_at_a_time(tmp_path, monkeypatch):
    for i in range(12):
        Image.new("L", (20, 20 + i), i).save(tmp_path / f"{i:02}.png")
    Image.new("L", (90, 90), 99).save(tmp_path / "large.png")  # More than are lent at all.
    monkeypatch.setattr(decoding, "_pixels", decoding._Loan(1300))
    at_work, most = [0], [0]
    flatten, changing = decoding._on_background, threading.Lock()

    def counted(image, background):
        with changing:
            at_work[0] += image.width * image.height
            most[0] = max(most[0], at_work[0])
        try:
            return flatten(image, background)
        finally:
            with changing:
                at_work[0] -= image.width * image.height

    monkeypatch.setattr(decoding, "_on_background", counted)
    values = load_images(tmp_path, 16).flatten(1).float().mean(1).tolist()
    assert values == [*range(12), 99]
    assert most[0] == 8100


def test_an_image_for_which_memory_is_short_is_not_skipped(tmp_path, monkeypatch):
    """Else it would depend on the moment which images a run has."""

    def fails(*_):
        raise MemoryError

    Image.new("L", (16, 16)).save(tmp_path / "a.png")
    monkeypatch.setattr(decoding, "_on_background", fails)
    _says(tmp_path, "expected memory enough for the image .*a.png, got no more")


def test_what_was_lent_comes_back_after_an_error():
    loan = decoding._Loan(10)
    for _ in range(3):
        with pytest.raises(ValueError, match="x"), loan.lent(100):
            raise ValueError("x")
    with loan.lent(10):
        pass


def test_free_memory(tmp_path, monkeypatch):
    free = memory.available_memory()
    assert 2**24 < free < 2**60
    own = [Path("/"), Path("/a"), Path("/a/b")]
    monkeypatch.setattr(memory, "_own_cgroups", lambda: own)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_free_of_the_machine", lambda: 1000)
    assert memory.available_memory() == 1000

    def group(path, limit, used, statistics):
        names = ("memory.max", "memory.current", "memory.stat")
        if path.startswith("memory"):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")
        (tmp_path / path).mkdir(parents=True, exist_ok=True)
        for name, text in zip(names, (limit, used, statistics), strict=True):
            (tmp_path / path / name).write_text(text)

    group("a/b", "max\n", "500\n", "anon 400\ninactive_file 100\n")
    assert memory.available_memory() == 1000
    group("a", "900\n", "500\n", "anon 400\ninactive_file 100\n")
    assert memory.available_memory() == 500
    group("memory/a/b", "700\n", "600\n", "inactive_file 1\ntotal_inactive_file 150\n")
    assert memory.available_memory() == 250
    group("memory", "700\n", "900\n", "total_inactive_file 150\n")
    assert memory.available_memory() == 0


def test_processes_on_one_machine_share_its_memory(monkeypatch):
    images = torch.zeros(4, 1, 10, 10)
    data = DataSet(images)
    for name in ("_own_cgroups", "_free_in_cgroups"):
        monkeypatch.setattr(memory, name, lambda: [])
    for free, here, streams in ((800, 1, False), (2399, 3, True), (2400, 3, False)):
        for name, value in dict(RANK=1, WORLD_SIZE=2 * here, LOCAL_WORLD_SIZE=here).items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.setattr(memory, "_free_of_the_machine", lambda free=free: free)
        loaded, _ = data.load(10, background="white", conditional=False, seed=0)
        assert isinstance(loaded, Streamed) == streams
    with pytest.raises(BadInput, match=r"free for each of the 3 processes on this machine, got"):
        memory.require_memory(801, "four images")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert memory.available_memory() == 2400


def test_settings_of_a_run_say_it_too(tmp_path):
    """`prepare` as a function guards as the command does."""
    os.mkfifo(tmp_path / "images.npy")
    with pytest.raises(BadInput, match="got a FIFO"):
        config.prepare("vae", tmp_path / "images.npy", {})


@pytest.mark.parametrize("name", ["x" * 5000, "a.png/b", "nul\0byte", "loop"])
def test_impossible_paths(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    _says(tmp_path / name, "expected --data to be")
