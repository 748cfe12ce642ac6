"""A run's folder: whose files may be written over, and one run at a time."""

import errno
import fcntl
import importlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from genfast import cli
from genfast.training.errors import BadInput
from genfast.training.files import replacing
from genfast.training.runs import config, demo, lock, loop

CPU = torch.device("cpu")
TINY = ("--batch-size", "4", "--nz", "3", "--epochs", "1", "--device", "cpu")
HEADER = "step,epoch,loss,reconstruction,kl,images_per_second\n"


@pytest.fixture
def images(tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8))
    return path


@pytest.fixture
def run(images, tmp_path):
    """The folder of a finished run of two steps."""
    _train(images, tmp_path / "run")
    return tmp_path / "run"


def _command(*arguments):
    return cli.main([str(a) for a in arguments])


def _train(images, out, **options):
    settings, loaded = config.prepare("vae", images, dict(batch_size=4, nz=3, epochs=1))
    return loop.train(settings, loaded, out, device=CPU, **options)


def _resume(path, out, epochs=2):
    settings, loaded = config.prepare_resumed("vae", None, dict(epochs=epochs), path)
    return loop.train(settings, loaded, out, device=CPU, resume_from=path)


def _state(folder):
    """Every name below a folder, with the bytes of the plain files."""
    paths = sorted(Path(folder).rglob("*"))
    return {str(p): p.read_bytes() if p.is_file() else None for p in paths}


def _refuses(capsys, expected, *arguments):
    assert _command(*arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("genfast: error: expected ")
    assert error.count("\n") == 1
    assert expected in error, error


# What `sample --out` may write over.


def test_sample_writes_over_a_picture_and_an_empty_file(run, tmp_path):
    out = tmp_path / "drawn.png"
    for before in (None, b""):
        if before is not None:
            out.write_bytes(before)
        for _ in range(2):
            assert _command("sample", run, "--num", 2, "--out", out, "--device", "cpu") == 0
        assert Image.open(out).format == "PNG"


def test_sample_writes_over_nothing_else(run, tmp_path, capsys):
    (tmp_path / "notes.png").write_text("no picture")
    os.link(run / "checkpoint.pt", tmp_path / "model.png")
    (tmp_path / "null.png").symlink_to("/dev/null")
    os.mkfifo(tmp_path / "pipe.png")
    before = _state(tmp_path)
    for name in ("notes.png", "model.png", "null.png", "pipe.png"):
        _refuses(capsys, f"got {tmp_path / name}", "sample", run, "--out", tmp_path / name)
    for name in ("run/checkpoint.pt", "drawn.jpg", "drawn", "/dev/null"):
        _refuses(capsys, "to end in .png", "sample", run, "--out", tmp_path / name)
    assert _state(tmp_path) == before


def test_sample_follows_a_link_to_a_picture(run, tmp_path):
    (tmp_path / "link.png").symlink_to("drawn.png")
    for _ in range(2):  # The first time it leads nowhere.
        out = tmp_path / "link.png"
        assert _command("sample", run, "--num", 1, "--out", out, "--device", "cpu") == 0
        assert out.is_symlink()
        assert Image.open(tmp_path / "drawn.png").format == "PNG"


def test_what_is_unfinished_goes_through_no_link_or_pipe(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "a.unfinished").symlink_to("mine")
    os.mkfifo(tmp_path / "b.unfinished")
    for name in "ab":
        with pytest.raises(FileExistsError), replacing(tmp_path / name) as file:
            file.write(b"new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["a.unfinished", "b.unfinished", "mine"]


# What a run may write over.

FOREIGN = {
    "config.json": '{"model": "mine", "versions": {"torch": "2"}}',
    "config.json ": "[1, 2",
    "config.json  ": "",
    "metrics.csv": "step,accuracy\n1,0.5\n",
    "metrics.csv ": b"\xff\xfe\0\0\n",
    "metrics.csv  ": HEADER + "1,1,2.0,1.0,1.0,9.0\n2,1,2.0,1.0,1.0,9.0\n",
    "samples": "a file",
    "samples/epoch_001.png": "a picture",
    "samples/Epoch_0123.PNG": "a picture",
    "checkpoint.pt": "somebody's",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others_stay(tmp_path, images, capsys, name):
    out = tmp_path / "folder"
    path = out / name.strip()
    path.parent.mkdir(parents=True)
    content = FOREIGN[name]
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = _state(out)
    _refuses(capsys, str(out), "train", "vae", "--data", images, "--out", out, *TINY)
    with pytest.raises(BadInput, match="expected"):
        _train(images, out)
    with pytest.raises(BadInput, match="expected"):
        _train(images, out, demo=True)
    assert _state(out) == before


def test_what_does_not_collide_is_no_hindrance(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/kick.wav").write_text("sound")
    (tmp_path / "train.py").write_text("print()")
    assert _command("train", "vae", "--data", images, "--out", ".", *TINY) == 0
    assert (tmp_path / "checkpoint.pt").exists()
    assert (tmp_path / "samples/kick.wav").read_text() == "sound"


def test_links_and_pipes_are_foreign(tmp_path, images):
    out = tmp_path / "out"
    for name in ("config.json", "metrics.csv", "checkpoint.pt"):
        out.mkdir()
        os.mkfifo(out / name)
        with pytest.raises(BadInput, match="expected"):
            _train(images, out)
        (out / name).unlink()
        (out / name).symlink_to("nowhere")
        with pytest.raises(BadInput, match="expected"):
            _train(images, out)
        assert os.listdir(out) == [name]
        (out / name).unlink()
        out.rmdir()


def test_a_finished_run_is_safe_from_python_too(run, images):
    before = _state(run)
    for options in ({}, {"demo": True}):
        with pytest.raises(BadInput, match="holds one"):
            _train(images, run, **options)
    (run / "checkpoint.pt").rename(run / "best.pt")
    with pytest.raises(BadInput, match="holds the losses of one"):
        _train(images, run)
    (run / "best.pt").rename(run / "checkpoint.pt")
    assert _state(run) == before


def test_a_resume_elsewhere_is_guarded_as_a_new_run(run, tmp_path, capsys):
    (tmp_path / "other/samples").mkdir(parents=True)
    (tmp_path / "other/config.json").write_text("{}")
    command = ("train", "vae", "--epochs", 2, "--device", "cpu", "--resume", run / "checkpoint.pt")
    _refuses(capsys, "config.json", *command, "--out", tmp_path / "other")
    assert _command(*command, "--out", tmp_path / "new") == 0
    # A copy beside a run's checkpoint does not take its place.
    (run / "old.pt").write_bytes((run / "checkpoint.pt").read_bytes())
    before = _state(run)
    capsys.readouterr()
    _refuses(capsys, "holds one", *command[:-1], run / "old.pt")
    assert _state(run) == before


def test_a_resume_does_not_replace_foreign_settings(run):
    (run / "config.json").write_text("{}")
    before = _state(run)
    with pytest.raises(BadInput, match="config.json to be the settings of a genfast run"):
        _resume(run / "checkpoint.pt", run)
    assert _state(run) == before


def test_a_run_that_left_no_checkpoint_may_begin_again(run, images):
    """As after a kill in the first step, with or without its row and its picture."""
    (run / "checkpoint.pt").unlink()
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(lines[:2]))
    assert _train(images, run).finished


def test_runs_of_before_resume(run):
    """They had no lock and no word on demos, and a checkpoint may have been renamed."""
    settings = json.loads((run / "config.json").read_text())
    del settings["demo"]
    (run / "config.json").write_text(json.dumps(settings))
    (run / "checkpoint.pt").rename(run / "best.pt")
    assert _resume(run / "best.pt", run).finished
    assert len((run / "metrics.csv").read_text().splitlines()) == 1 + 4


def test_a_demo_takes_the_place_of_a_demo_alone(tmp_path, images, run):
    _train(images, tmp_path / "demo", demo=True)
    (tmp_path / "demo/notes.txt").write_text("mine")
    assert _train(images, tmp_path / "demo", demo=True).finished
    assert (tmp_path / "demo/notes.txt").read_text() == "mine"
    # One that was gone on with is a run like others.
    _resume(tmp_path / "demo/checkpoint.pt", tmp_path / "demo")
    before = _state(tmp_path / "demo")
    with pytest.raises(BadInput, match="holds one: give another --out"):
        _train(images, tmp_path / "demo", demo=True)
    assert _state(tmp_path / "demo") == before


def test_a_demo_removes_no_run_of_the_users(run, capsys, monkeypatch):
    monkeypatch.setattr(
        demo, "prepare", lambda *_: config.prepare("vae", run / "../images.npy", {})
    )
    before = _state(run)
    _refuses(capsys, "holds one", "demo", "--out", run, "--device", "cpu")
    assert _state(run) == before


def test_a_demo_of_before(tmp_path, images):
    """Demos did not say so in config.json at first."""
    out = tmp_path / "demo"
    _train(images, out, demo=True)
    settings = json.loads((out / "config.json").read_text()) | dict(model="dcgan", data="digits")
    del settings["demo"]
    (out / "config.json").write_text(json.dumps(settings))
    assert _train(images, out, demo=True).finished


# One run a folder.

# Like a process that reads a data set, its child outlives it for a while.
HOLD = """
import os, sys, time
from pathlib import Path
from genfast.training.runs.lock import held
with held(Path(sys.argv[1])):
    if not os.fork():
        os.closerange(0, 3)
        time.sleep(20)
        os._exit(0)
    print("held", flush=True)
    sys.stdin.read()
"""


def _holder(folder):
    """A process that holds the folder's lock until its standard input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"held\n"
    return process


def test_a_second_run_is_refused_until_the_first_is_dead(tmp_path, images, run, capsys):
    process = _holder(run)
    before = _state(run)
    in_use = f"in use by process {process.pid} on "
    resume = ("train", "vae", "--out", run, "--resume", "--epochs", 2, "--device", "cpu")
    _refuses(capsys, in_use, *resume)
    with pytest.raises(BadInput, match=in_use):
        _resume(run / "checkpoint.pt", run)
    assert _state(run) == before
    process.kill()
    process.communicate()
    assert (run / lock.NAME).exists()
    assert _command(*resume) == 0
    assert not (run / lock.NAME).exists()
    assert "warning" not in capsys.readouterr().err


def test_a_lock_names_no_process_that_merely_has_the_number(run):
    """The number in a file that a killed run left may be another process's by now: here ours."""
    (run / lock.NAME).write_text(f"{os.getppid()} {os.uname().nodename}\n")
    assert _resume(run / "checkpoint.pt", run).finished


def test_the_refusal_comes_before_the_images_are_loaded(run, capsys, monkeypatch):
    monkeypatch.setattr(cli.train, "prepared", lambda *_: pytest.fail("loaded the images"))
    with lock.held(run):
        _refuses(capsys, "in use by process", "train", "vae", "--out", run, "--resume")


def test_of_two_that_begin_at_once_one_trains(tmp_path, images):
    outcomes = []

    def train():
        try:
            outcomes.append(_train(images, tmp_path / "out"))
        except Exception as error:
            outcomes.append(f"{type(error).__name__}: {error}")

    torch.set_num_threads(1)
    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [o for o in outcomes if isinstance(o, str)]
    assert len(refused) == 3, outcomes
    for outcome in refused:
        assert re.match("BadInput: .*(in use by|holds one)", outcome)


def test_many_take_turns_and_never_two_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TRIES", 1000)
    monkeypatch.setattr(lock, "PAUSE", 0.0005)
    inside, most = [], []

    def take():
        for _ in range(20):
            with lock.held(tmp_path):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0002)
                inside.pop()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(most) == 80
    assert os.listdir(tmp_path) == []


def test_one_that_looks_does_not_turn_away_one_that_begins(tmp_path):
    (tmp_path / lock.NAME).write_text("")
    descriptor = os.open(tmp_path / lock.NAME, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    threading.Timer(0.05, os.close, [descriptor]).start()
    with lock.held(tmp_path):
        pass


def test_a_lock_of_another_host_is_told(tmp_path):
    (tmp_path / lock.NAME).write_text("17 elsewhere\n")
    with (
        pytest.warns(UserWarning, match="process 17 on elsewhere, left its lock"),
        lock.held(tmp_path),
    ):
        assert (tmp_path / lock.NAME).read_text().startswith(f"{os.getpid()} ")


@pytest.mark.parametrize("kind", ["text", "pipe", "link"])
def test_a_foreign_file_of_that_name_stays(tmp_path, kind):
    path = tmp_path / lock.NAME
    if kind == "text":
        path.write_text("mine")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("mine")
    lock.refuse_held(tmp_path)
    with pytest.raises((BadInput, OSError), match=lock.NAME), lock.held(tmp_path):
        pass
    assert os.listdir(tmp_path) == [lock.NAME]
    assert kind != "text" or path.read_text() == "mine"


def test_a_file_system_without_locks_is_told(tmp_path, images, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(UserWarning, match="there are no locks on the file system of .*out"):
        assert _train(images, tmp_path / "out").finished
    assert lock.NAME not in os.listdir(tmp_path / "out")


def test_a_system_without_flock(tmp_path, images, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)
    try:
        importlib.reload(lock)
        with pytest.warns(UserWarning, match="there are no locks"):
            assert _train(images, tmp_path / "out").finished
    finally:
        monkeypatch.undo()
        importlib.reload(lock)


def test_a_run_that_cannot_begin_leaves_no_folder(run, tmp_path):
    with pytest.raises(BadInput, match="--epochs of more than"):
        _resume(run / "checkpoint.pt", tmp_path / "new/deep", epochs=1)
    assert not (tmp_path / "new").exists()
