"""Which files of a folder are taken for images: links, loops, and what genfast drew itself."""

import json
import os
import re
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from genfast import cli
from genfast.training.data import load_images
from genfast.training.data.folders import find_images
from genfast.training.errors import BadInput
from genfast.training.runs import config, loop
from genfast.training.runs.samples import sample_checkpoint

CPU = torch.device("cpu")
TINY = dict(batch_size=4, epochs=2, nz=3, image_size=16, ngf=4, ndf=4)


def _picture(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (16, 16), value).save(path)


@pytest.fixture
def folder(tmp_path):
    for name, value in (("b/2.png", 2), ("a.png", 1), ("c/d/4.png", 4), ("c/3.png", 3)):
        _picture(tmp_path / "data" / name, value)
    return tmp_path / "data"


def _values(folder, **options):
    """The one value each image has, in order; what was said must be expected by the caller."""
    return load_images(folder, 16, **options).flatten(1).float().mean(1).tolist()


def _quietly(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return _values(folder, **options)


def test_links_to_folders_are_followed(folder, tmp_path):
    _picture(tmp_path / "elsewhere/deep/9.png", 9)
    (folder / "b/link").symlink_to(tmp_path / "elsewhere")
    (folder / "z").symlink_to("../elsewhere/deep")  # The same images by another name.
    assert _quietly(folder) == [1, 2, 9, 3, 4]
    (tmp_path / "by a link").symlink_to(folder)
    assert _quietly(tmp_path / "by a link") == [1, 2, 9, 3, 4]


def test_a_folder_in_a_linked_one_is_entered_once(folder, tmp_path):
    _picture(tmp_path / "elsewhere/8.png", 8)
    _picture(tmp_path / "elsewhere/deep/9.png", 9)
    (folder / "l1").symlink_to(tmp_path / "elsewhere/deep")
    (folder / "l2").symlink_to(tmp_path / "elsewhere")
    assert _quietly(folder) == [1, 2, 3, 4, 9, 8]


def test_loops_change_nothing(folder, tmp_path):
    before = find_images(folder)
    (folder / "a").symlink_to(folder)  # First in the order of names.
    (folder / "c/d/up").symlink_to("../..")
    (folder / "b/self").symlink_to(".")
    (folder / "c/twice").symlink_to(folder / "b")
    assert find_images(folder) == before
    assert _quietly(folder) == [1, 2, 3, 4]
    # Two linked folders that lead to each other.
    for name, other, value in (("x", "y", 7), ("y", "x", 8)):
        _picture(tmp_path / name / f"{value}.png", value)
        (tmp_path / name / "other").symlink_to(tmp_path / other)
    (folder / "out").symlink_to(tmp_path / "x")
    assert _quietly(folder) == [1, 2, 3, 4, 7, 8]


def test_links_upwards_are_not_followed_and_said(folder, tmp_path):
    _picture(tmp_path / "not asked for.png", 99)
    (folder / "c/up").symlink_to(tmp_path)
    with pytest.warns(UserWarning, match=r"passed over in .*c/up \(a link to a folder above it\)"):
        assert _values(folder) == [1, 2, 3, 4]
    (folder / "c/up").unlink()
    _picture(tmp_path / "other/deep/5.png", 5)
    (tmp_path / "other/deep/up").symlink_to(tmp_path / "other")
    (tmp_path / "other/deep/root").symlink_to("/")
    (folder / "other").symlink_to(tmp_path / "other/deep")
    with pytest.warns(UserWarning, match=r"other/root \(a link .*other/up \(a link"):
        assert _values(folder) == [1, 2, 3, 4, 5]


def test_broken_links_are_skipped_and_said(folder):
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "c/gone").symlink_to("/nowhere/at/all")
    (folder / "loop").symlink_to("loop")
    with pytest.warns(UserWarning, match=r"c/gone \(a broken link\); .*gone.png .*; .*loop \(a br"):
        assert _values(folder) == [1, 2, 3, 4]


def test_what_was_passed_over_is_named_where_nothing_is_left(tmp_path):
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(BadInput, match=r"found none; passed over: .*gone.png \(a broken link\)"):
        load_images(tmp_path)


def test_links_to_images_are_images(folder, tmp_path):
    _picture(tmp_path / "elsewhere.png", 5)
    (folder / "link.png").symlink_to(tmp_path / "elsewhere.png")
    assert _quietly(folder) == [1, 2, 3, 4, 5]


def _run(folder, out, **options):
    settings, images = config.prepare("dcgan", folder, TINY, out)
    loop.train(settings, images, out, device=CPU, **options)


def test_the_runs_folder_inside_its_data(folder):
    out = folder / "runs/mine"
    _run(folder, out, max_seconds=0)
    path = out / "checkpoint.pt"
    # What people do in a run's folder and beside it.
    sample_checkpoint(path, 3, out / "more.png", device=CPU)
    sample_checkpoint(path, 3, folder / "samples.png", device=CPU)
    _picture(out / "best.png", 77)
    with pytest.warns(UserWarning) as said:
        settings, images = config.prepare_resumed("dcgan", None, {}, path)
    assert len(images) == 4
    words = [str(warning.message) for warning in said]
    assert any(re.search(r"passed over .*runs/mine \(this run's folder\)$", w) for w in words)
    assert any(re.search(r"1 of 5 images: .*samples.png \(drawn by genfast\)$", w) for w in words)
    loop.train(settings, images, out, device=CPU, resume_from=path)
    (folder / "samples.png").unlink()
    with pytest.warns(UserWarning, match="this run's folder"):
        config.prepare_resumed("dcgan", folder, {}, path, out)


def test_a_run_whose_folder_is_its_data(folder):
    _run(folder, folder)
    with pytest.warns(UserWarning, match=r"samples \(sample pictures of a run: 2\)$"):
        _, images = config.prepare_resumed("dcgan", None, {}, folder / "checkpoint.pt")
    assert len(images) == 4


def test_train_on_the_current_folder_can_resume(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    arguments = ["train", "dcgan", "--data", ".", "--batch-size", "2", "--nz", "3", "--ngf", "4"]
    arguments += ["--ndf", "4", "--image-size", "16", "--device", "cpu", "--epochs"]
    assert cli.main([*arguments, "1"]) == 0
    assert (folder / "runs/dcgan-data/samples/epoch_001.png").exists()
    assert cli.main([*arguments, "2", "--resume"]) == 0
    error = capsys.readouterr().err
    assert re.search(r"passed over in .*runs/dcgan-data \(this run's folder\)", error)
    assert error.count("dcgan on 4 images") == 2


@pytest.mark.parametrize("older", [False, True])
def test_sample_pictures_of_other_runs(folder, older):
    other = folder / "runs/other"
    settings, images = config.prepare("dcgan", folder, TINY)
    loop.train(settings, images, other, device=CPU)
    _picture(other / "samples/mine.png", 5)
    _picture(folder / "samples/epoch_001.png", 6)  # Of no run.
    if older:  # From before pictures said who drew them.
        for path in (other / "samples").glob("epoch_*"):
            with Image.open(path) as picture:
                picture.load()
            picture.save(path)
    with pytest.warns(UserWarning, match=r"other/samples \(sample pictures of a run: 2\)"):
        assert _values(folder) == [1, 2, 3, 4, 5, 6]
    # Moved out of the run's folder they still are known, those of older runs aside.
    shutil.move(other / "samples/epoch_001.png", folder / "z.png")
    with pytest.warns(UserWarning) as said:
        assert len(_values(folder)) == (7 if older else 6)
    drawn = any("z.png (drawn by genfast)" in str(warning.message) for warning in said)
    assert drawn != older


def test_data_inside_the_runs_folder(folder):
    out = folder.parent
    assert _quietly(folder, run_folder=out) == [1, 2, 3, 4]
    assert _quietly(folder, run_folder=folder) == [1, 2, 3, 4]
    assert _quietly(folder, run_folder=folder / "not yet there") == [1, 2, 3, 4]
    (folder / "c/more").symlink_to(out / "more")
    _picture(out / "more/5.png", 5)
    assert _quietly(folder, run_folder=out) == [1, 2, 3, 4, 5]


def test_links_into_the_runs_folder(folder, tmp_path):
    for name in ("run/top.png", "run/samples/epoch_001.png"):
        _picture(tmp_path / name, 9)
    (folder / "run").symlink_to(tmp_path / "run")
    (folder / "shown").symlink_to(tmp_path / "run/samples")
    with pytest.warns(UserWarning, match="run/?.* .*this run's folder.*shown .*this run's folder"):
        assert _values(folder, run_folder=tmp_path / "run") == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[" * 60000,
        "[]",
        "3",
        '{"model": "mine"}',
        '{"model": 1, "versions": 3}',
        "\xff",
        "{" * 9,
    ],
)
def test_settings_of_others_are_no_run(folder, text):
    (folder / "config.json").write_text(text, encoding="latin-1")
    _picture(folder / "samples/epoch_001.png", 6)
    assert _quietly(folder) == [1, 2, 3, 4, 6]


def test_settings_that_would_hang_are_not_opened(folder):
    os.mkfifo(folder / "config.json")
    _picture(folder / "samples/epoch_001.png", 6)
    assert _quietly(folder) == [1, 2, 3, 4, 6]


def test_settings_that_loop_writes_are_known(folder):
    """Names that stand in two places stay the same."""
    out = folder / "run"
    _run(folder, out)
    settings = json.loads((out / "config.json").read_text())
    assert {"model", "versions"} <= settings.keys()
    paths, passed_over = find_images(folder)
    assert not [path for path in paths if "run" in path.parts]
    assert passed_over == [
        f"{out / 'losses.png'} (the losses of a run)",
        f"{out / 'samples'} (sample pictures of a run: 2)",
    ]


def test_folders_that_may_not_be_read_end_in_a_sentence(folder, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if os.path.basename(path) == "d":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(BadInput, match="expected a readable folder, could not read .*d: .*denied"):
        load_images(folder)


def test_many_folders_deep(tmp_path):
    path = tmp_path / "/".join(str(i) for i in range(200))
    _picture(path / "a.png", 3)
    np.testing.assert_array_equal(_quietly(tmp_path), [3])
