"""Images from every kind of source, and what is said about each that cannot be used."""

import gzip
import itertools
import re
import struct
import sys
import threading
import time
import warnings
from contextlib import closing, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from genfast.training.data import (
    Batches,
    checksum,
    load_images,
    normalize,
    prefetch,
    sources,
)
from genfast.training.data.prefetch import CudaCopies, NoCopy, Prefetcher, WaitingClock
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
    monkeypatch.setattr(sources, "PHOTO_CROPS", 24)
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
    monkeypatch.setattr(sources, "NAMED", 2)
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


def test_endings_in_capitals(tmp_path):
    np.save(tmp_path / "a.npy", RAMP)
    (tmp_path / "a.npy").rename(tmp_path / "a.NPY")
    assert load_images(tmp_path / "a.NPY").shape == (5, 1, 8, 8)


def test_an_empty_name_is_not_the_current_folder(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", RAMP)
    monkeypatch.chdir(tmp_path)
    _fails("", "where there is nothing")


def test_npz_of_several_arrays(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=RAMP, y_train=np.arange(5))
    assert load_images(tmp_path / "a.npz").shape == (5, 1, 8, 8)
    np.savez(tmp_path / "b.npz", first=RAMP, second=RAMP)
    _fails(tmp_path / "b.npz", "b.npz", "one called images or x_train", "first, second")


def test_oblong_arrays_become_squares_where_asked(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(2 * 4 * 8, dtype=np.uint8).reshape(2, 4, 8))
    assert load_images(tmp_path / "a.npy").shape == (2, 1, 4, 8)
    images = load_images(tmp_path / "a.npy", 4)
    assert images.shape == (2, 1, 4, 4)
    assert images[0, 0, 0].tolist() == [2, 3, 4, 5]


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("folder", [False, True])
def test_mnist_files(tmp_path, zipped, folder):
    content = _idx(RAMP)
    path = tmp_path / ("train-images-idx3-ubyte" + (".gz" if zipped else ""))
    path.write_bytes(gzip.compress(content, mtime=0) if zipped else content)
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
    # As of a folder without any permission, which the superuser of a container would read.
    monkeypatch.setattr("os.access", lambda path, mode: False)
    _fails(tmp_path, "readable folder", "may not be read")


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


def test_npz_that_is_called_npy(tmp_path):
    np.savez(tmp_path / "a.npz", RAMP)
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    _fails(tmp_path / "a.npy", "a.npy", "could not read")


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
        (gzip.compress(_idx(RAMP), mtime=0)[:-30], ["gzip", "truncated"]),
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
    with pytest.raises(BadInput, match="pip install pillow scikit-learn tqdm$") as caught:
        load_images(tmp_path if source == "folder" else source)
    assert f"expected {package}, which this needs" in str(caught.value)


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


CPU = torch.device("cpu")
COLOURS = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)


@pytest.fixture
def all_sets_are_large(monkeypatch):
    """Sets of any size stay in their file, and threads gather their batches."""
    monkeypatch.setattr(sources, "LARGE", 0)


def _data_threads():
    return [t for t in threading.enumerate() if t.name.startswith("genfast-data")]


def _wait_until(holds):
    until = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.001)


@pytest.mark.parametrize("layout", ["NHW", "NHWC", "NCHW"])
def test_large_arrays_stay_in_their_file(tmp_path, layout, all_sets_are_large):
    nchw = COLOURS.transpose(0, 3, 1, 2)
    array = {"NHW": COLOURS[..., 0], "NHWC": COLOURS, "NCHW": np.ascontiguousarray(nchw)}[layout]
    path = tmp_path / "images.npy"
    np.save(path, array)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = load_images(path, 8)
    expected = torch.from_numpy(nchw[:, :1].copy() if layout == "NHW" else nchw.copy())
    assert torch.equal(images, expected)
    streamed = Batches(images, 7, 3, CPU).stream(4)
    gathered = Batches(expected, 7, 3, CPU)._gathered(Batches(expected, 7, 3, CPU)._indices(4))
    for batch, same in itertools.islice(zip(streamed, gathered, strict=True), 12):
        assert torch.equal(batch, same)
    streamed.close()
    with open(path, "r+b") as file:  # The tensor shows what is in the file now.
        file.seek(-1, 2)
        file.write(bytes([255 - array.flat[-1]]))
    assert images[-1, -1, -1, -1] == 255 - array.flat[-1]


def test_large_arrays_can_be_resized(tmp_path, monkeypatch):
    path = tmp_path / "images.npy"
    np.save(path, COLOURS[:, :6])
    small = [load_images(path, size) for size in (None, 16)]
    monkeypatch.setattr(sources, "LARGE", 0)
    for images, size in zip(small, (None, 16), strict=True):
        assert torch.equal(load_images(path, size), images)


def test_large_arrays_in_another_order(tmp_path, all_sets_are_large):
    np.save(tmp_path / "a.npy", np.asfortranarray(COLOURS))
    _fails(tmp_path / "a.npy", "a.npy", "C order", image_size=8)


def test_a_set_larger_than_memory(tmp_path, monkeypatch):
    """118 GB in a file that takes no space on the disk where it was never written to."""
    monkeypatch.setattr(sources, "SAMPLED", 16)  # For some disks are slow.
    path, count = tmp_path / "images.npy", 600_000
    file = np.lib.format.open_memmap(path, "w+", np.uint8, (count, 256, 256, 3))
    file[[0, 123_456, count - 1], 0, 0, 0] = 1, 2, 3
    file.flush()
    del file
    images = load_images(path, 256)
    assert images.shape == (count, 3, 256, 256)
    assert images[[0, 123_456, count - 1], 0, 0, 0].tolist() == [1, 2, 3]
    before = checksum(images)
    batches = Batches(images, 8, 0, CPU)
    place = (batches._order(5) == 123_456).nonzero().item()
    with closing(batches.stream(5 * len(batches) + place // 8)) as stream:
        assert next(stream)[place % 8, 0, 0, 0] == 2
    np.lib.format.open_memmap(path, "r+")[-1] = 0
    assert checksum(images) != before


def test_checksums(monkeypatch):
    images = torch.from_numpy(COLOURS).permute(0, 3, 1, 2)
    for large in (sources.LARGE, 0):
        monkeypatch.setattr(sources, "LARGE", large)
        whole = checksum(images)
        assert checksum(images.contiguous()) == whole  # In whatever order they lie in memory.
        assert checksum(images.flip(0)) != whole
        assert checksum(images[:-1]) != whole
        changed = images.clone()
        changed[17, 1, 2, 3] ^= 1
        assert checksum(changed) != whole
    assert checksum(images.reshape(40, 1, 8, 24)) != whole


def test_checksums_of_large_sets_are_of_a_sample(monkeypatch, all_sets_are_large):
    monkeypatch.setattr(sources, "SAMPLED", 4)
    images = _numbered(40).clone()
    whole = checksum(images)
    for i in range(40):
        changed = images.clone()
        changed[i] = 99
        assert (checksum(changed) != whole) == (i in (0, 13, 26, 39))


def test_batches_gathered_ahead_are_those_gathered_in_turn(monkeypatch):
    in_turn = _take(Batches(_numbered(10), 3, seed=4, device=CPU), 12)
    monkeypatch.setattr(sources, "LARGE", 0)
    ahead = Batches(_numbered(10), 3, seed=4, device=CPU)
    for start in range(12):
        assert _take(ahead, 12 - start, start) == in_turn[start:]
    batches = list(itertools.islice(ahead.stream(), 12))  # Each has memory of its own.
    assert [batch[:, 0, 0, 0].tolist() for batch in batches] == in_turn


def test_threads_end_with_the_stream(all_sets_are_large):
    stream = Batches(_numbered(10), 3, seed=0, device=CPU).stream()
    assert not _data_threads()
    next(stream)
    assert _data_threads()
    stream.close()
    assert not _data_threads()


def test_threads_end_where_the_stream_is_forgotten(all_sets_are_large):
    next(Batches(_numbered(10), 3, seed=0, device=CPU).stream())
    assert not _data_threads()


def _prefetch(fill, batch_size=1, carrier=None, clock=None):
    """A Prefetcher over batches of the numbers from 0, in order."""
    indices = (np.arange(i, i + batch_size) for i in itertools.count(0, batch_size))
    return Prefetcher(fill, indices, carrier or NoCopy((batch_size,)), clock or WaitingClock())


def _copy(indices, out):
    out[:] = indices


def test_threads_end_in_the_middle_of_a_batch(monkeypatch):
    def slowly(indices, out):
        pieces.append(len(indices))
        time.sleep(0.02)

    pieces = []
    monkeypatch.setattr(prefetch, "PIECE", 1)
    with _prefetch(slowly, batch_size=1000) as batches:
        batches._advance()
        _wait_until(lambda: len(pieces) >= prefetch.THREADS)
        started = time.monotonic()
    assert time.monotonic() - started < 1  # 20 s are left.
    assert not _data_threads()


def test_an_error_in_a_thread_comes_in_place_of_the_batch():
    def fails(indices, out):
        if indices[0] == 5:
            raise OSError("the disk is gone")
        _copy(indices, out)

    with _prefetch(fails) as batches:
        batches._advance()
        _wait_until(lambda: all(future.done() for future in batches._gathering))
        assert [next(batches).item() for _ in range(5)] == [0, 1, 2, 3, 4]
        with pytest.raises(OSError, match="the disk is gone"):
            next(batches)
    assert not _data_threads()


def test_slow_batches_arrive_in_order():
    def late(indices, out):
        time.sleep(0.01 * (indices[0] % 3))
        _copy(indices, out)

    with _prefetch(late) as batches:
        assert [next(batches).item() for _ in range(20)] == list(range(20))


def _share(fill_seconds, step_seconds, carrier=None):
    def fill(indices, out):
        time.sleep(fill_seconds)
        _copy(indices, out)

    clock = WaitingClock()
    with _prefetch(fill, carrier=carrier, clock=clock) as batches:
        for _ in range(10):
            next(batches)
            time.sleep(step_seconds)
        return clock.share()


def test_share_of_waiting():
    # Not much narrower, as a machine that has other work to do makes all of it wait.
    assert _share(fill_seconds=0.08, step_seconds=0.0) > 0.7
    assert _share(fill_seconds=0.0, step_seconds=0.03) < 0.3
    # A batch every 0.03 s, as `THREADS` gather at a time, and half of that is spent on steps.
    share = _share(fill_seconds=0.03 * prefetch.THREADS, step_seconds=0.015)
    assert 0.2 < share < 0.8


def test_waiting_beside_a_busy_device_does_not_count():
    class Busy(NoCopy):
        def device_is_busy(self):
            return True

    assert _share(fill_seconds=0.02, step_seconds=0.0, carrier=Busy((1,))) == 0


def test_share_starts_anew(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(prefetch.time, "perf_counter", lambda: now[0])
    clock = WaitingClock()
    clock.add(1.0)
    now[0] = 104.0
    assert clock.share() == 0.25
    now[0] = 106.0
    assert clock.share() == 0
    clock.add(1.0)
    clock.restart()
    now[0] = 107.0
    assert clock.share() == 0


def test_gathering_from_memory_counts_as_waiting(monkeypatch):
    now = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(now)))
    batches = Batches(_numbered(10), 3, seed=0, device=CPU)
    stream = batches.stream()  # Looks at the clock at 1, for the first batch at 2 and 3.
    next(stream)
    assert batches.waiting.share() == 1 / 3  # At 4.


class _Event:
    """An event that is reached when the test says so."""

    reached = False

    def __init__(self, enable_timing=False):
        self.enable_timing = enable_timing

    def record(self, stream):
        stream.work.append(self)

    def query(self):
        return self.reached

    def synchronize(self):
        self.reached = True

    def elapsed_time(self, end):
        assert self.enable_timing and end.enable_timing and end.reached
        return 250.0  # ms


class _Stream:
    """A stream that takes note of its work. What it copies is the buffer itself, not a copy."""

    device = CPU

    def __init__(self, device=None):
        self.work = []

    def record_event(self):
        self.work.append(_Event())
        return self.work[-1]

    def wait_event(self, event):
        self.work.append(("wait", event))


class _Cuda:
    """What `CudaCopies` asks of CUDA, with events reached when a test wants them to be."""

    def __init__(self, monkeypatch):
        self.computing, self.in_use = _Stream(), []
        cuda = SimpleNamespace(
            Stream=_Stream,
            Event=_Event,
            current_stream=lambda device: self.computing,
            stream=lambda stream: nullcontext(),
        )
        fake = SimpleNamespace(empty=self._empty, uint8=torch.uint8, cuda=cuda)
        monkeypatch.setattr(prefetch, "torch", fake)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *args: self.in_use.append(args))

    @staticmethod
    def _empty(shape, dtype, pin_memory):
        assert pin_memory
        return torch.empty(shape, dtype=dtype)


def test_a_buffer_is_kept_until_it_is_copied(monkeypatch):
    _Cuda(monkeypatch)
    copies = CudaCopies(CPU, (1,), WaitingClock())
    with _prefetch(_copy, carrier=copies) as batches:
        held = [next(batches) for _ in range(prefetch.BUFFERS - 1)]
        _wait_until(lambda: all(future.done() for future in batches._gathering))
        assert [batch.item() for batch in held] == list(range(prefetch.BUFFERS - 1))
        assert copies.take_buffer() is None
        for _, copied in list(copies._reading)[:2]:
            copied.reached = True
        batches._advance()
        _wait_until(lambda: all(future.done() for future in batches._gathering))
        assert sorted(batch.item() for batch in held[:2]) == [6, 7]
        assert [batch.item() for batch in held[2:]] == list(range(2, prefetch.BUFFERS - 1))


def test_the_step_waits_for_the_copy_and_keeps_its_memory(monkeypatch):
    cuda = _Cuda(monkeypatch)
    copies = CudaCopies(CPU, (1,), WaitingClock())
    for _ in range(2):
        copies.start(copies.take_buffer())
    events = [copied for _, copied in copies._started]
    for i, copied in enumerate(events):
        batch = copies.receive()
        before, waited, after = cuda.computing.work[-3:]
        assert waited == ("wait", copied)
        assert isinstance(before, _Event) and isinstance(after, _Event)
        assert len(cuda.in_use) == i + 1
        assert cuda.in_use[i][0] is batch
        assert cuda.in_use[i][1] is cuda.computing


def test_the_host_runs_so_far_ahead(monkeypatch):
    cuda = _Cuda(monkeypatch)
    clock = WaitingClock()
    copies = CudaCopies(CPU, (1,), clock)
    for _ in range(prefetch.STEPS_AHEAD + 3):
        copies.keep_pace()
        assert copies.device_is_busy()
        copies.start(copies.take_buffer() or torch.empty(1, dtype=torch.uint8))
        copies.receive()
    timed = [event for event in cuda.computing.work if getattr(event, "enable_timing", False)]
    assert [event.reached for event in timed[1::2]] == [True] * 3 + [False] * prefetch.STEPS_AHEAD
    assert clock._waited == pytest.approx(3 * 0.25)
    cuda.computing.work[-4].reached = True  # What `keep_pace` recorded last.
    assert not copies.device_is_busy()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("channels_last", [False, True])
def test_batches_on_a_gpu(monkeypatch, channels_last):
    device = torch.device("cuda")
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (999, 3, 64, 64), np.uint8))
    in_turn = list(itertools.islice(Batches(images, 50, 1, CPU).stream(7), 100))
    resident = Batches(images, 50, 1, device)
    assert resident.images.is_cuda
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    if channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    streamed = Batches(images, 50, 1, device)
    assert not streamed.images.is_cuda
    for batches in (resident, streamed):
        with closing(batches.stream(7)) as stream:
            for expected, batch in zip(in_turn, stream, strict=False):
                torch.cuda._sleep(1_000_000)  # The device lies behind the host, as it does.
                assert batch.is_cuda
                wrong = (batch.float() != expected.to(device).float()).sum()
                del batch
                assert wrong.item() == 0
