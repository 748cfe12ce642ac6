"""How long a run is and what it leaves: steps, pictures, kept checkpoints, curves, TensorBoard."""

import json
import os
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genfast.cli import main
from genfast.training.errors import BadInput, Diverged
from genfast.training.runs import curve, loop
from genfast.training.runs.checkpoint import read_checkpoint
from genfast.training.runs.config import Config, prepare, prepare_resumed
from genfast.training.runs.loop import train
from genfast.training.runs.loss_log import LossLog

CPU = torch.device("cpu")
SMALL = ("--batch-size", "4", "--nz", "3", "--device", "cpu")
HEADER = "step,epoch,d_loss,g_loss,images_per_second\n"


@pytest.fixture
def images(tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8))
    return path


def _prepared(images, **given):
    return prepare("vae", images, dict(batch_size=4, nz=3) | given)


def _train(images, out, given, **options):
    return train(*_prepared(images, **given), out, device=CPU, **options)


def _resume(out, given, path=None, **options):
    path = path or out / "checkpoint.pt"
    settings, loaded = prepare_resumed("vae", None, given, path)
    return train(settings, loaded, out, device=CPU, resume_from=path, **options)


def _losses(out):
    lines = (out / "metrics.csv").read_text().splitlines()
    return [line.rpartition(",")[0] for line in lines]


def _names(folder):
    return sorted(os.listdir(folder))


def _command(*arguments):
    return main([str(a) for a in arguments])


def _refused(capsys, *arguments):
    assert _command(*arguments) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"genfast: error: expected [^\n]+\n", error), error
    return error


# How long.


def test_a_run_of_steps_and_its_resume(images, tmp_path):
    """Stopped after a step, gone on with to more steps, and then by epochs."""
    outputs = dict(sample_every=3, keep=2, checkpoint_seconds=0)
    whole = _train(images, tmp_path / "whole", dict(steps=8), **outputs)
    assert (whole.finished, whole.steps) == (True, 8)
    assert whole.picture == tmp_path / "whole/samples/step_0000008.png"
    assert _names(tmp_path / "whole/checkpoints") == ["step_0000007.pt", "step_0000008.pt"]
    out = tmp_path / "parts"
    assert _train(images, out, dict(steps=2), max_seconds=0, **outputs).steps == 1
    assert _resume(out, {}, **outputs).steps == 2
    assert _resume(out, dict(steps=4), **outputs).steps == 4
    (out / "samples/step_0000002.png").unlink()  # The last of a shorter run has one too.
    (out / "samples/step_0000004.png").unlink()
    assert _resume(out, dict(steps=8), **outputs).finished
    assert _losses(out) == _losses(tmp_path / "whole")
    for name in ("samples", "checkpoints"):
        assert _names(out / name) == _names(tmp_path / "whole" / name)
    assert _names(out / "samples") == [f"step_000000{i}.png" for i in (3, 6, 8)]
    for name in _names(out / "samples"):
        assert (out / "samples" / name).read_bytes() == (
            tmp_path / "whole/samples" / name
        ).read_bytes()
    ours, theirs = (
        read_checkpoint(run / "checkpoint.pt")["modules"]["model"]
        for run in (out, whole.picture.parents[1])
    )
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    longer = _resume(out, dict(epochs=3))
    assert (longer.steps, longer.picture) == (9, out / "samples/epoch_003.png")
    settings = json.loads((out / "config.json").read_text())
    assert (settings["epochs"], settings["steps"]) == (3, None)
    for given in (dict(steps=9), dict(epochs=3)):
        (name,) = given
        with pytest.raises(BadInput, match=f"--{name} of more than the {given[name]} that .* has"):
            _resume(out, given)


def test_pictures_of_epochs_and_of_the_last_step(images, tmp_path):
    _train(images, tmp_path / "a", dict(steps=5))
    assert _names(tmp_path / "a/samples") == ["epoch_001.png", "step_0000005.png"]
    _train(images, tmp_path / "b", dict(epochs=2))
    assert _names(tmp_path / "b/samples") == ["epoch_001.png", "epoch_002.png"]


def test_one_of_both_lengths(images, tmp_path, capsys):
    command = ("train", "vae", "--data", images, "--out", tmp_path / "out", *SMALL)
    error = _refused(capsys, *command, "--steps", 3, "--epochs", 2)
    assert "expected --epochs or --steps, got both, 2 and 3" in error
    config, _ = _prepared(images, steps=3)
    assert (config.steps, config.epochs) == (3, None)
    for epochs, steps, message in ((None, None, "got neither"), (2, 3, "got both")):
        settings = config.as_dict() | dict(epochs=epochs, steps=steps)
        with pytest.raises(BadInput, match=f"--epochs or --steps, {message}.* in the checkpoint"):
            Config.of_checkpoint({"config": settings}, "c.pt")
    # One of before there was a choice.
    del settings["steps"]
    assert Config.of_checkpoint({"config": settings}, "c.pt").epochs == 2


def test_the_command_line_and_how_it_says_to_go_on(images, tmp_path, capsys, monkeypatch):
    def add(log, step, *rest):
        real(log, step, *rest)
        if step == 3:
            os.kill(os.getpid(), 2)

    real = LossLog.add
    monkeypatch.setattr(LossLog, "add", add)
    out = tmp_path / "out"
    options = ("--steps", 5, "--keep", 1, "--sample-every", 2)
    assert _command("train", "vae", "--data", images, "--out", out, *SMALL, *options) == 130
    said = re.search(r"to go on: python -m genfast (.*)\n", capsys.readouterr().err)[1]
    assert said.endswith(f"--out {out} --steps 5 --keep 1 --sample-every 2 --resume")
    assert (out / "losses.png").exists()
    monkeypatch.undo()
    assert _command(*said.split(), "--device", "cpu") == 0
    assert capsys.readouterr().out == f"{out}/samples/step_0000005.png\n"
    assert _names(out / "checkpoints") == ["step_0000005.pt"]


def test_arguments_of_python_follow_the_same_rules(images, tmp_path):
    for options, message in (
        (dict(sample_every=0), "--sample-every to be a whole number from 1 .*, got 0"),
        (dict(keep=-1), "--keep to be a whole number from 0 .*, got -1"),
        (dict(log="wandb"), "--log to be tensorboard, got 'wandb'"),
    ):
        with pytest.raises(BadInput, match=message):
            _train(images, tmp_path / "out", dict(steps=1), **options)
    assert not (tmp_path / "out").exists()


def test_a_kill_while_the_curve_is_drawn_leaves_a_run_to_go_on_with(images, tmp_path, monkeypatch):
    """Its last checkpoint is that of before: of a finished run nothing is left to do."""

    def kill(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "draw_curve", kill)
    with pytest.raises(KeyboardInterrupt):
        _train(images, tmp_path / "out", dict(steps=3))
    monkeypatch.undo()
    assert _resume(tmp_path / "out", {}).finished
    assert (tmp_path / "out/losses.png").exists()


# Checkpoints that are kept.


def test_pruning_removes_no_file_of_others(images, tmp_path):
    out = tmp_path / "out"
    _train(images, tmp_path / "other", dict(steps=3, seed=1), keep=1)
    _train(images, out, dict(steps=3), keep=3, checkpoint_seconds=0)
    kept, path = out / "checkpoints", tmp_path / "other/checkpoints/step_0000003.pt"
    assert _names(kept) == [f"step_000000{i}.pt" for i in (1, 2, 3)]
    mine = {
        "step_0000000.pt": b"no checkpoint",
        "step_0000002.pt": path.read_bytes(),  # Of another run, by its seed.
        "step_0000005.pt": b"in the way",
        "best.pt": (kept / "step_0000001.pt").read_bytes(),
    }
    for name, content in mine.items():
        (kept / name).write_bytes(content)
    (kept / "step_0000001.PT.old").mkdir()
    with pytest.warns(UserWarning, match=r"step_0000005.pt is no checkpoint of this run and stays"):
        _resume(out, dict(steps=6), keep=2, checkpoint_seconds=0)
    left = {*mine, "step_0000001.PT.old", "step_0000004.pt", "step_0000006.pt"}
    assert set(_names(kept)) == left
    assert {name: (kept / name).read_bytes() for name in mine} == mine
    assert read_checkpoint(kept / "step_0000004.pt")["steps"] == 4


def test_going_on_from_a_kept_checkpoint(images, tmp_path, capsys):
    out = tmp_path / "out"
    _train(images, out, dict(steps=4), keep=3, checkpoint_seconds=0)
    resume = ("train", "vae", "--resume", out / "checkpoints/step_0000002.pt", "--device", "cpu")
    capsys.readouterr()
    assert "expected --out with" in _refused(capsys, *resume)
    assert "holds one" in _refused(capsys, *resume, "--out", out)
    assert _command(*resume, "--out", tmp_path / "again") == 0
    assert _losses(tmp_path / "again")[1:] == _losses(out)[3:]


# What a run may write over.


@pytest.mark.parametrize("name", ["losses.png", "tensorboard", "checkpoints"])
def test_files_of_others_stay(images, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(BadInput, match=f"{name} to be .*, got something else, which stays"):
        _train(images, out, dict(steps=1))
    assert (out / name).read_text() == "mine"
    assert _names(out) == [name]


def test_kept_checkpoints_and_pictures_of_steps_are_a_run(images, tmp_path):
    for name in ("checkpoints/step_0000007.pt", "samples/step_0000007.png"):
        path = tmp_path / Path(name).stem / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        with pytest.raises(BadInput, match="folder without (checkpoints|pictures) of a run, got"):
            _train(images, path.parents[1], dict(steps=1))
        path.unlink()


# What a run shows.


def test_quiet(images, tmp_path, capsys):
    command = ("train", "vae", "--data", images, *SMALL, "--steps", 2)
    assert _command(*command, "--out", tmp_path / "loud") == 0
    assert "12 images of 1 x 8 x 8" in capsys.readouterr().err
    assert _command(*command, "--out", tmp_path / "out", "--quiet") == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == (f"{tmp_path}/out/samples/step_0000002.png\n", "")
    assert "holds one" in _refused(capsys, *command, "--out", tmp_path / "out", "--quiet")
    for i in range(2):
        Image.new("L", (8, 8), 90 * i).save(tmp_path / f"{i}.png")
    folder = ("train", "vae", "--data", tmp_path, "--image-size", 8, "--batch-size", 2)
    rest = ("--steps", 1, "--quiet", "--device", "cpu", "--out", tmp_path / "b")
    assert _command(*folder, *rest) == 0
    assert re.fullmatch("(genfast: warning: [^\n]*\n)*", capsys.readouterr().err)


class Writer:
    """Stands in for TensorBoard's."""

    made = []

    def __init__(self, folder, purge_step=None):
        self.folder, self.purge_step, self.scalars, self.images = folder, purge_step, [], []
        self.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def add_image(self, name, pixels, step):
        self.images.append((name, pixels.dtype, tuple(pixels.shape), step))


def test_what_tensorboard_gets(images, tmp_path, monkeypatch):
    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(Writer, "made", [])
    out = tmp_path / "out"
    _train(images, out, dict(steps=4), log="tensorboard", sample_every=2, max_seconds=0)
    _resume(out, {}, log="tensorboard", sample_every=2)
    first, second = Writer.made
    assert (first.folder, first.purge_step, second.purge_step) == (f"{out}/tensorboard", None, 2)
    assert first.closed and second.closed
    rows = [line.split(",") for line in (out / "metrics.csv").read_text().splitlines()]
    expected = {
        (n, int(row[0])): float(v) for row in rows[1:] for n, v in zip(rows[0], row, strict=True)
    }
    got = {(name, step): value for name, value, step in first.scalars + second.scalars}
    assert {name for name, _ in got} == {"loss", "reconstruction", "kl", "images_per_second"}
    assert {step for _, step in got} == {1, 2, 3, 4}
    for (name, step), value in got.items():
        assert value == pytest.approx(expected[name, step], abs=0.06)  # The speed is rounded.
    picture = ("samples", torch.uint8, (1, 8 * 66 + 2, 8 * 66 + 2))
    assert [*first.images, *second.images] == [(*picture, 2), (*picture, 4)]


def test_tensorboard_writes_events(images, tmp_path):
    pytest.importorskip("tensorboard", reason="an extra of its own")
    _train(images, tmp_path / "out", dict(steps=1), log="tensorboard")
    (event,) = (tmp_path / "out/tensorboard").iterdir()
    assert b"reconstruction" in event.read_bytes() and b"PNG" in event.read_bytes()


def test_tensorboard_that_is_missing(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    command = ("train", "vae", "--data", images, "--out", tmp_path / "out", *SMALL)
    error = _refused(capsys, *command, "--log", "tensorboard")
    assert "expected tensorboard, which this needs, but" in error
    assert error.endswith("python -m pip install tensorboard\n")
    assert not (tmp_path / "out").exists()


# The curves.


def _drawn(tmp_path, rows):
    (tmp_path / "metrics.csv").write_text(HEADER + "".join(f"{row}\n" for row in rows))
    curve.draw_curve(tmp_path / "metrics.csv", tmp_path / "losses.png")
    with Image.open(tmp_path / "losses.png") as picture:
        assert picture.info["Software"] == "genfast"
        return np.array(picture).astype(int)


def _rows_of(pixels, colour, left, right):
    """The heights, from 0 at the bottom of the curves' area to 1, at which a colour is found."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    area = pixels[curve.TOP : -curve.BOTTOM, left:right]
    rows = np.flatnonzero((np.abs(area - rgb).max(2) < 40).any(1))
    return 1 - rows / (len(area) - 1)


def test_the_curve_is_where_the_losses_are(tmp_path):
    """One rises from 0 to 1, the other stays at a quarter; the axis goes 0.05 beyond."""
    pixels = _drawn(tmp_path, [f"{i},1,{i / 100},0.25,9" for i in range(101)])
    for left, value in ((curve.LEFT + 1, 0.0), (-curve.RIGHT - 5, 1.0)):
        height = (value - curve.SHOWN[0] + 0.05 * 0.98) / (1.1 * 0.98)
        found = _rows_of(pixels, curve.COLOURS[0], left, left + 4)
        assert found.mean() == pytest.approx(height, abs=0.03)
    flat = _rows_of(pixels, curve.COLOURS[1], curve.LEFT + 300, curve.LEFT + 600)
    assert flat.mean() == pytest.approx((0.25 - 0.01 + 0.049) / (1.1 * 0.98), abs=0.02)
    assert np.ptp(flat) < 0.02


@pytest.mark.parametrize(
    "rows",
    [
        ["1,1,0,0,9", "2,1,0,0,9"],
        ["1,1,nan,inf,9", "2,1,nan,-inf,9"],
        ["1,1,1e30,2,9", "2,1,-1e30,,9", "3,1,nan,4,9", "4,1,5"],
    ],
)
def test_curves_of_odd_losses(tmp_path, rows):
    assert _drawn(tmp_path, rows).shape == (curve.HEIGHT, curve.WIDTH, 3)


def test_no_curve_of_one_step_or_without_letters(tmp_path, monkeypatch):
    from PIL import features

    with pytest.raises(FileNotFoundError):
        _drawn(tmp_path, ["1,1,0,0,9"])
    monkeypatch.setattr(features, "check", lambda name: False)
    with (
        pytest.warns(UserWarning, match="losses.png is not drawn, as this Pillow"),
        pytest.raises(FileNotFoundError),
    ):
        _drawn(tmp_path, ["1,1,0,0,9", "2,1,0,0,9"])


def test_many_steps_share_a_part():
    steps, values = np.arange(1.0, 1001), np.random.default_rng(0).normal(size=1000)
    x, low, mean, high = curve._parts(steps, values, 10)
    assert len(x) == 10 and np.all((low < mean) & (mean < high)) and np.all(np.diff(x) > 0)
    assert low.min() == values.min() and high.max() == values.max()
    assert mean.mean() == pytest.approx(values.mean(), abs=1e-3)
    values[[0, 500, 999]] = np.nan, np.inf, -np.inf
    assert all(np.isfinite(found).all() for found in curve._parts(steps, values, 10))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (-30, 70, [-20, 0, 20, 40, 60]), (3, 3.02, 5)],
)
def test_ticks_are_round(low, high, expected):
    found = curve.ticks(low, high)
    if isinstance(expected, list):
        assert found == pytest.approx(expected)
    else:
        assert abs(len(found) - expected) <= 1 and all(low <= value <= high for value in found)


# Losses that are not finite.


def test_what_diverged_is_named(images, tmp_path, monkeypatch):
    def add(log, step, epoch, result):
        spoilt = [*result]
        if step == 3:
            spoilt[2] = torch.tensor(float("inf"))
        real(log, step, epoch, spoilt)

    real = LossLog.add
    monkeypatch.setattr(LossLog, "add", add)
    out = tmp_path / "out"
    expected = r"the losses of step 3 are loss \S+, reconstruction \S+, kl inf; the last good "
    expected += f"checkpoint is {out}/checkpoint.pt, of step 2$"
    with pytest.raises(Diverged, match=expected):
        _train(images, out, dict(steps=5), checkpoint_seconds=0, keep=2)
    assert _names(out / "checkpoints") == ["step_0000001.pt", "step_0000002.pt"]
