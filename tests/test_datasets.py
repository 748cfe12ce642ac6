"""People's own data sets: what an item may be, in which order it comes, and `genfast.train`."""

import json
import multiprocessing
import os
import random
import warnings
from contextlib import closing
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

import genfast
from genfast.training.data import Batches, DataSet, LabelledImages, Streamed
from genfast.training.data.items import item_of
from genfast.training.errors import BadInput
from genfast.training.runs import checkpoint

CPU = torch.device("cpu")
WHITE = (255, 255, 255)
LEVELS = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(4, 5, 3) * 4
COLOUR = torch.from_numpy(LEVELS).permute(2, 0, 1)
GREY = COLOUR[:1]
CLEAR = np.concatenate([LEVELS, np.full((4, 5, 1), 255, np.uint8)], 2)
CLEAR[0, 0, 3] = 0


class Pictures(Dataset):
    """Grey pictures, each another, with labels; `change` is what a transform makes of one."""

    classes = ["left", "right"]

    def __init__(self, count=12, change=None):
        self.change, self.bad, self.read = change, None, []
        draw = np.random.default_rng(0)
        self.pictures = [
            Image.fromarray(p) for p in draw.integers(256, size=(count, 8, 8), dtype=np.uint8)
        ]

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, number):
        if number == self.bad:
            raise OSError("no such picture\nand more lines")
        picture = self.pictures[number]
        return (self.change(picture) if self.change else picture), number % 2


def flipped(picture):
    """As torchvision's flips and crops draw."""
    random.random()
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if torch.rand(1) < 0.5 else picture


def rarely_changed(picture):
    return Image.new("L", (8, 8)) if np.random.random() < 1e-9 else picture


def load(items, conditional=False, size=None, seed=0, **options):
    data = DataSet(items, **options)
    return data.load(size, background="white", conditional=conditional, seed=seed)[0]


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (Image.fromarray(LEVELS), COLOUR),
        (Image.fromarray(LEVELS[..., 0]), GREY),
        (Image.fromarray(LEVELS[..., 0]).convert("P"), GREY.expand(3, -1, -1)),
        (LEVELS, COLOUR),
        (LEVELS[..., 0], GREY),
        (LEVELS.transpose(2, 0, 1), COLOUR),
        (LEVELS[:, :, ::-1].copy()[:, :, ::-1], COLOUR),
        (COLOUR, COLOUR),
        (COLOUR.permute(1, 2, 0), COLOUR),
        (COLOUR / 255, COLOUR),  # What ToTensor makes.
        (COLOUR.double() / 255, COLOUR),
        ((COLOUR / 255).half(), COLOUR),
        ((LEVELS / 255).astype(np.float32), COLOUR),
        ([GREY, 1], GREY),
        ((GREY,), GREY),
        ({"image": GREY, "label": 1}, GREY),
        ({"label": 1, "anything": GREY}, GREY),
        ({"mask": GREY, "pixel_values": COLOUR}, COLOUR),
    ],
)  # fmt: skip
def test_images_of_items(item, expected):
    pixels, label = item_of(item, (0.0, 1.0), WHITE)
    assert pixels.dtype == torch.uint8 and torch.equal(pixels, expected)
    has_label = isinstance(item, list) or (isinstance(item, dict) and "label" in item)
    assert label == (1 if has_label else None)


def test_images_after_normalize_and_transparent_ones():
    normalised = COLOUR / 127.5 - 1
    assert torch.equal(item_of(normalised, (-1.0, 1.0), WHITE)[0], COLOUR)
    overshot = item_of(torch.tensor([[[1.05, -0.05]]]), (0.0, 1.0), WHITE)[0]
    assert overshot.tolist() == [[[255, 0]]]
    pixels, _ = item_of(Image.fromarray(CLEAR), (0.0, 1.0), (255, 0, 0))
    assert pixels[:, 0, 0].tolist() == [255, 0, 0] and torch.equal(pixels[:, 1], COLOUR[:, 1])


def test_a_range_far_wider_than_the_images_is_told():
    dark, light = (COLOUR / 255 * 0.3), (COLOUR / 255 * 0.3 + 0.7)
    for items in ([dark, light.numpy()], [dark, dark], [light.double(), dark]):
        with pytest.warns(UserWarning, match=r"their image_range, \[0, 255\], got .* of <list>$"):
            load(items, image_range=(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load([dark, light], image_range=(0, 40))
        load([torch.full((1, 8, 8), 0.5)], image_range=(0, 255))
        load([COLOUR // 100], image_range=(0, 255))  # Not floats, whose range nobody says.


SIXTEEN = Image.fromarray(np.full((8, 8), 4000, np.uint16))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (
            SIXTEEN,
            "expected 8 bits a channel, got an image of mode I;16, in item 0 of the data set",
        ),
        (torch.zeros(4, 8, 8), r"with C of 1 or 3, got shape \(4, 8, 8\), in item 0"),
        (CLEAR, r"with C of 1 or 3, got shape \(4, 5, 4\)"),
        (torch.zeros(3, 0, 8), r"got shape \(3, 0, 8\)"),
        (torch.zeros(8), r"got shape \(8,\)"),
        (
            torch.zeros(1, 8, 8, dtype=torch.int32),
            "expected uint8 or floats as pixels, got torch.i",
        ),
        (COLOUR / 127.5 - 1, r"floats in \[0, 1\], got -1 to .*\(-1, 1\) after Normalize"),
        (COLOUR.float(), r"expected floats in \[0, 1\], got 0 to 236"),
        (torch.full((1, 8, 8), torch.nan), "got nan to nan"),
        ("a.png", "expected an image of Pillow, NumPy or PyTorch, .* got a str"),
        ((1, COLOUR), "got a int in a tuple"),
        ({"left": GREY, "right": GREY}, "one of left, right, 2 of which may be"),
        ({"label": 1}, "one of label, 0 of which"),
    ],
)
def test_items_that_are_no_images(item, message):
    with pytest.raises(BadInput, match=message):
        load([item])


class Stream(IterableDataset):
    def __len__(self):
        return 1

    def __iter__(self):
        yield GREY


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        ([], {}, "with items, got an empty list"),
        (Stream(), {}, "with len.. and items by number, got a Stream, which only gives one after"),
        (DataLoader([GREY]), {}, "got a DataLoader, .* one after the other: give its dataset$"),
        (7, {}, "got a int$"),
        ({"train": [GREY]}, {}, "got a dict of train: give one of them"),
        (torch.zeros(3, 2, 8, 8, dtype=torch.uint8), {}, r"C of 1 or 3, got shape \(3, 2, 8, 8\)"),
        (np.zeros((8, 8), np.uint8), {}, r"got shape \(8, 8\)"),
        ([GREY], {"num_workers": -1}, "num_workers to be a whole number from 0, got -1"),
        ([GREY], {"image_range": (1, 0)}, r"image_range to be \(low, high\).*got \(1, 0\)"),
        ([(GREY, 0)], {"classes": 2}, "classes with conditional=True, got them without"),
        ([GREY], {"cache": "disk"}, "cache to be True, False or None, got 'disk'"),
        ([(GREY, 0)], {"conditional": True}, "that does not tell, got None"),
        ([(GREY, 0)], {"conditional": True, "classes": ["a", "a"]}, "two or more classes, each"),
        ([(GREY, 2)], {"conditional": True, "classes": 2}, "labels from 0 to 1, got 2, in item 0"),
        ([(GREY, "c")], {"conditional": True, "classes": "ab"}, "names of the classes or how many"),
        ([(GREY, "c")], {"conditional": True, "classes": ["a", "b"]}, "name of a class .*got 'c'"),
        ([GREY], {"conditional": True, "classes": 2}, "whole number or a name as label, got None"),
        ([GREY] * 20 + [COLOUR], {"cache": True}, None),
        ([GREY] * 19 + [COLOUR] + [GREY] * 380, {}, "grey images, as the first ones are.*item 19 "),
    ],
)  # fmt: skip
def test_data_sets_that_do_not_fit(items, options, message):
    if message is None:
        assert load(items, **options).shape == (21, 3, 4, 5)
        return
    with pytest.raises(BadInput, match=message):
        load(items, **options)


def test_labels_and_names_of_classes():
    class Feature:
        names = ["cat", "dog"]

    class Rows(list):  # As Hugging Face's data sets tell.
        features = {"image": None, "label": Feature()}

    rows = Rows([{"image": GREY, "label": n} for n in (1, 0, 1)])
    for items, options, classes, labels in (
        (rows, {}, ("cat", "dog"), [1, 0, 1]),
        (Subset(Pictures(), [1, 2, 4]), {}, ("left", "right"), [1, 0, 0]),
        (TensorDataset(GREY[None], torch.tensor([2])), {"classes": 3}, ("0", "1", "2"), [2]),
        ([(GREY, "b"), (GREY, "a")], {"classes": ["a", "b"]}, ("a", "b"), [1, 0]),
    ):
        images = load(items, conditional=True, **options)
        assert isinstance(images, LabelledImages)
        assert images.classes == classes and images.labels.tolist() == labels
        assert list(load(items, conditional=True, cache=False, **options).read().labels) == labels


def test_what_is_read_once_and_what_is_streamed():
    plain = load(Pictures())
    assert plain.dtype == torch.uint8 and plain.shape == (12, 1, 8, 8)
    assert isinstance(load(Pictures(), cache=False), Streamed)
    assert isinstance(load(Pictures(change=flipped), cache=True), torch.Tensor)
    # Random numbers that hardly ever change anything are random numbers.
    for change in (flipped, rarely_changed):
        assert isinstance(load(Pictures(change=change)), Streamed)
    own = np.random.default_rng()
    unseeded = Pictures(
        change=lambda p: Image.fromarray(own.integers(256, size=(8, 8), dtype="u1"))
    )
    with pytest.warns(UserWarning, match="came out differently from the same seeds"):
        assert isinstance(load(unseeded), Streamed)
    assert torch.equal(load(torch.arange(192, dtype=torch.uint8).view(3, 8, 8)).flatten(),
                       torch.arange(192, dtype=torch.uint8))  # fmt: skip
    several = [torch.zeros(1, 9, 20), torch.zeros(1, 30, 30)]
    assert load(several).shape == (2, 1, 64, 64) and load(several[:1]).shape == (1, 1, 9, 20)


def _states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def _taken(images, start, count, seed=3):
    with closing(Batches(images, 4, seed, CPU).stream(start)) as stream:
        return list(islice(stream, count))


def test_batches_depend_on_seed_and_position_alone():
    before = _states()
    whole = _taken(load(Pictures(change=flipped), seed=3), 0, 7)
    assert _states() == before  # Those of the training go on as if nothing had been read.
    spread = load(Pictures(change=flipped), seed=3, num_workers=2)
    for ours, theirs in zip(whole[2:], _taken(spread, 2, 5), strict=True):
        assert torch.equal(ours, theirs)
    other = _taken(load(Pictures(change=flipped), seed=4), 0, 7)
    assert not all(map(torch.equal, whole, other))
    # The same picture is drawn anew in another epoch, and in the order of `Batches`.
    plain = load(Pictures())
    still = _taken(plain, 0, 7)
    epochs = [{}, {}]
    for i, (drawn, picture) in enumerate(
        zip(torch.cat(whole[:6]), torch.cat(still[:6]), strict=True)
    ):
        (number,) = (n for n, other in enumerate(plain) if torch.equal(other, picture))
        assert torch.equal(drawn, picture) or torch.equal(drawn, picture.flip(2))
        epochs[i // 12][number] = torch.equal(drawn, picture)
    assert epochs[0].keys() == epochs[1].keys() and epochs[0] != epochs[1]
    assert 0 < sum(epochs[0].values()) < 12
    assert all(map(torch.equal, _taken(load(Pictures(), cache=False), 0, 7), still))


SMALL = dict(batch_size=4, nz=2, device="cpu", precision="fp32", quiet=True)


def _outcome(folder):
    content = checkpoint.read_checkpoint(folder / "checkpoint.pt")
    rows = [row.split(",")[:5] for row in (folder / "metrics.csv").read_text().split()]
    return rows, content["modules"]["model"]


@pytest.mark.parametrize("conditional", [False, True])
def test_a_resumed_run_is_one_that_never_stopped(conditional, tmp_path):
    settings = dict(SMALL, conditional=conditional, validate=0.3)
    once = genfast.train("vae", Pictures(change=flipped), out=tmp_path / "a", epochs=3, **settings)
    assert once.finished and once.picture.is_file() and once.steps == 6
    options = dict(settings, out=tmp_path / "b", resume=True)
    assert genfast.train("vae", Pictures(change=flipped), steps=3, **options).steps == 3
    with pytest.raises(BadInput, match="expected the 12 images with which the run in .* got 12 im"):
        genfast.train("vae", Pictures(), steps=6, **options)
    with pytest.raises(BadInput, match="was given a data set in Python, <Pictures>"):
        genfast.train("vae", steps=6, **options)
    genfast.train("vae", Pictures(change=flipped), epochs=3, **options)
    (rows, weights), (other_rows, others) = _outcome(tmp_path / "a"), _outcome(tmp_path / "b")
    assert rows == other_rows and all(torch.equal(t, others[name]) for name, t in weights.items())
    measured = [(tmp_path / name / "validation.csv").read_text().split()[-1] for name in "ab"]
    assert measured[0] == measured[1]  # Of those kept aside, read with the same random numbers.
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert config["data"] == "<Pictures>" and config["num_images"] == 12
    model = genfast.load(tmp_path / "b", "cpu")
    assert model.sample(4).shape == (4, 1, 8, 8)
    assert model.classes == (("left", "right") if conditional else None)


def test_a_run_on_a_streamed_set_is_that_on_one_read_once(tmp_path):
    files = []
    for cache in (True, False):
        folder = tmp_path / str(cache)
        options = dict(SMALL, validate=0.3, conditional=True, epochs=2)
        genfast.train("vae", Pictures(), out=folder, cache=cache, **options)
        files.append((_outcome(folder)[0], (folder / "validation.csv").read_text()))
    assert files[0] == files[1]


def test_a_data_set_that_raises_in_the_middle(tmp_path):
    items = Pictures(16, change=flipped)
    items.bad = 3  # No item that is looked at first: those are all but it of more than 16.
    items.pictures += items.pictures[:1] * 16
    options = dict(SMALL, out=tmp_path, epochs=2, checkpoint_seconds=0, resume=True)
    for workers in (0, 1):
        with pytest.raises(BadInput) as failure:
            genfast.train("vae", items, num_workers=workers, **options)
        assert str(failure.value) == (
            "expected item 3 of 32 of the data set to be readable, but it raised OSError: no such "
            "picture"
        )
    items.bad = None  # And the run goes on from the checkpoint before.
    assert genfast.train("vae", items, **options).finished


def test_other_sources_and_what_does_not_go_with_them(tmp_path):
    images = np.zeros((5, 8, 8), np.uint8)
    np.save(tmp_path / "images.npy", images)
    for number, data in enumerate((images, torch.from_numpy(images), str(tmp_path / "images.npy"))):
        assert genfast.train("vae", data, out=tmp_path / str(number), steps=1, **SMALL).finished
    for options, message in (
        (dict(dataset="digits", num_workers=2), "num_workers for a data set in Python alone"),
        (dict(dataset="digits", classes=3), "classes for a data set in Python .* with 'digits'"),
        (dict(dataset=None), "expected --data to be digits, photos or a path, got None"),
        (dict(dataset=images, init_from=[]), "file with weights to begin with, got none"),
        (dict(dataset=images, init_from=3), "init_from to be a path or several, got 3"),
        (dict(dataset=images, checkpoint_seconds="1"), "--checkpoint-seconds to be a number .*'1'"),
        (dict(dataset=images, resume=3), "resume to be True, False or a path, got 3"),
        (dict(model=torch.nn.Linear(1, 1)), "name of a model, gan, .*, got a Linear: networks of"),
        (dict(dataset=images, ngf=3), "settings that vae has, got --ngf"),
        (dict(dataset=images, out=None), "out to be the path of a folder, got None"),
    ):
        with pytest.raises(BadInput, match=message):
            genfast.train(**{"model": "vae", "out": tmp_path / "x", **SMALL, **options})
    assert not (tmp_path / "x").exists()


class OfAnotherGroup(Dataset):
    """Pictures, white where the process that reads them is of another group than the tests'."""

    group = os.getpgrp()

    def __len__(self):
        return 4

    def __getitem__(self, number):
        return torch.full((1, 8, 8), float(os.getpgrp() != self.group))


def test_signals_to_the_group_of_a_run_do_not_reach_who_reads():
    """Not those of `timeout` and of torchrun: the run goes on to the end of a step, which reads."""
    assert load(OfAnotherGroup(), num_workers=1, cache=True).eq(255).all()


def test_a_data_set_that_cannot_be_sent_to_a_new_process():
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    try:
        with pytest.raises(BadInput, match="sent to num_workers=1 other processes, but .*pickle"):
            load(Pictures(change=lambda picture: picture), num_workers=1, cache=True)
    finally:
        multiprocessing.set_start_method(before, force=True)
