"""How a run ends and goes on: signals, interrupts at any time, kills, and the first checkpoint."""

import csv
import fcntl
import multiprocessing
import os
import pty
import random
import select
import signal
import subprocess
import sys
import termios
import time
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from genfast import cli
from genfast.training.runs import config, loop, loss_log
from genfast.training.runs.checkpoint import read_checkpoint
from genfast.training.runs.models import MODELS

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SMALL = ("--batch-size", "4", "--nz", "3", "--device", "cpu", "--checkpoint-seconds", "0")


@pytest.fixture
def images(tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (12, 16, 16), dtype=np.uint8))
    return path


def _command(*arguments):
    return cli.main([str(a) for a in arguments])


def _train(images, out, **options):
    settings, loaded = config.prepare("vae", images, dict(batch_size=4, nz=3, epochs=2))
    return loop.train(settings, loaded, out, device=CPU, **options)


def _losses(out):
    with open(out / "metrics.csv", newline="") as file:
        return [row[:-1] for row in csv.reader(file)]


def _at_step(monkeypatch, number, act):
    """Let something happen during a step."""

    def add(log, step, *rest):
        real(log, step, *rest)
        if step == number:
            act()

    real = loss_log.LossLog.add
    monkeypatch.setattr(loss_log.LossLog, "add", add)


def _started(target, *arguments):
    """A process forked from one that has imported PyTorch already."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["genfast.cli", "torch._dynamo", "PIL.Image", "tqdm"])
    process = processes.Process(target=target, args=arguments)
    process.start()
    return process


def _quietly(arguments):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    sys.exit(cli.main(arguments))


def _in_terminal(name, arguments):
    os.setsid()
    terminal = os.open(name, os.O_RDWR | os.O_NOCTTY)
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    for descriptor in range(3):
        os.dup2(terminal, descriptor)
    os.close(terminal)
    torch.set_num_threads(1)
    sys.exit(cli.main(arguments))


# Signals.


@pytest.mark.parametrize("numbers", [(1,), (1, 1, 1), (15, 1), (1, 15)])
def test_a_hangup_saves_as_sigterm_does(tmp_path, images, monkeypatch, numbers):
    """Shell and system both send one when a terminal closes, and a second must not kill."""
    _at_step(monkeypatch, 2, lambda: [os.kill(os.getpid(), n) for n in numbers])
    outcome = _train(images, tmp_path / "out")
    assert (outcome.interrupted, outcome.steps) == (True, 2)
    assert read_checkpoint(tmp_path / "out/checkpoint.pt")["steps"] == 2
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_under_nohup_a_hangup_changes_nothing(tmp_path, images, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        _at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGHUP))
        assert _train(images, tmp_path / "out").finished
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_closes(tmp_path, images):
    """No line can be written any more; the checkpoint is."""
    out = tmp_path / "out"
    terminal, inside = pty.openpty()
    arguments = ("train", "vae", "--data", images, "--out", out, *SMALL[:-2], "--epochs", 10**6)
    process = _started(_in_terminal, os.ttyname(inside), [str(a) for a in arguments])
    try:
        # Held open until the other end is: it would be hung up at once.
        while not (out / "checkpoint.pt").exists():
            assert process.is_alive()
            time.sleep(0.01)
        os.close(inside)
        deadline = time.monotonic() + 60
        while len(_losses(out)) < 20:
            if select.select([terminal], [], [], 0.05)[0]:
                os.read(terminal, 10000)
            assert time.monotonic() < deadline
        os.close(terminal)
        process.join(60)
        assert not process.is_alive()
    finally:
        process.kill()
    logged = [int(row[0]) for row in _losses(out)[1:]]
    assert read_checkpoint(out / "checkpoint.pt")["steps"] == logged[-1] > 1
    left = ["checkpoint.pt", "config.json", "losses.png", "metrics.csv", "samples"]
    assert sorted(os.listdir(out)) == left


# The first seconds.

INTERRUPTED = """
import os, runpy, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
sys.argv[1:] = ["env"]
runpy.run_module("genfast", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("module", ["genfast.cli", "torch", "genfast.training.runs.loop"])
def test_an_interrupt_while_pytorch_is_imported(module):
    code = INTERRUPTED.format(module=module)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "genfast: interrupted\n")


def test_importing_the_package_alone_imports_nothing_else():
    code = "import sys, genfast; print(*sorted({'numpy', 'torch', 'triton'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("\n", "")


def test_the_public_names_are_there():
    import genfast
    import genfast.convert

    assert set(genfast.__all__) <= set(dir(genfast))
    assert genfast.accelerate is genfast.convert.accelerate
    assert all(getattr(genfast, name) for name in genfast.__all__)
    with pytest.raises(AttributeError, match="'genfast' has no attribute 'absent'"):
        genfast.absent  # noqa: B018


@pytest.mark.parametrize("place", ["prepared", "train", "working_device"])
def test_an_interrupt_before_the_first_step(tmp_path, images, monkeypatch, capsys, place):
    def interrupt(*_, **__):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(cli.train, place, interrupt)
    assert _command("train", "vae", "--data", images, "--out", tmp_path / "out", *SMALL) == 130
    assert capsys.readouterr().err == "genfast: interrupted\n"
    assert not (tmp_path / "out").exists()


# The first checkpoint, and going on.


def test_the_first_step_is_saved(tmp_path, images, monkeypatch):
    def crash():
        raise KeyboardInterrupt

    _at_step(monkeypatch, 2, crash)
    with pytest.raises(KeyboardInterrupt):
        _train(images, tmp_path / "out", checkpoint_seconds=10**6)
    assert read_checkpoint(tmp_path / "out/checkpoint.pt")["steps"] == 1


def test_resume_begins_where_there_is_nothing_yet(tmp_path, images, capsys):
    """So that a job's script may hold one command for its first start and all others."""
    out = tmp_path / "out"
    command = ("train", "vae", "--data", images, "--out", out, *SMALL, "--resume", "--epochs")
    assert _command(*command, 1) == 0
    assert f"no checkpoint at {out}/checkpoint.pt yet: a new run begins" in capsys.readouterr().err
    assert _command(*command, 2) == 0
    assert "a new run begins" not in capsys.readouterr().err
    assert len(_losses(out)) == 1 + 6
    # A checkpoint that was named is expected to be there.
    for absent in (tmp_path / "absent.pt", tmp_path / "absent", tmp_path):
        named = ("--out", tmp_path / "new", "--resume", absent, "--epochs", 3)
        assert _command("train", "vae", "--data", images, *named) == 1
        assert "expected a checkpoint file at" in capsys.readouterr().err


def test_resume_takes_the_folder_of_a_run(tmp_path, images):
    out = tmp_path / "out"
    assert _command("train", "vae", "--data", images, "--out", out, *SMALL, "--epochs", 1) == 0
    assert _command("train", "vae", "--resume", out, "--epochs", 2, "--device", "cpu") == 0
    assert len(_losses(out)) == 1 + 6


def test_data_are_found_from_another_folder(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ("train", "vae", "--data", "images.npy", "--out", "out", *SMALL, "--epochs", 1)
    assert _command(*command) == 0
    assert read_checkpoint(tmp_path / "out/checkpoint.pt")["config"]["data"] == str(images)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert _command("train", "vae", "--resume", "../out", "--epochs", 2, "--device", "cpu") == 0
    assert config.prepare("vae", "digits", {})[0].data == "digits"


@pytest.mark.parametrize("model", MODELS)
def test_killed_again_and_again(tmp_path, images, model):
    """One command, killed at random moments until it has come to its end."""
    defaults = MODELS[model].defaults

    def start(out):
        arguments = ("train", model, "--data", images, "--out", out, *SMALL, "--epochs", 4)
        widths = [("--ngf", "4")] * ("ngf" in defaults) + [("--ndf", "4")] * ("ndf" in defaults)
        arguments = [*arguments, *chain(*widths), "--resume"]
        return _started(_quietly, [str(a) for a in arguments])

    def has_ended():
        """Whether all steps were made: one may be killed while it has nothing left but to leave."""
        path = tmp_path / "parts/checkpoint.pt"
        return path.exists() and read_checkpoint(path)["steps"] == steps

    whole = start(tmp_path / "whole")
    whole.join()
    steps = read_checkpoint(tmp_path / "whole/checkpoint.pt")["steps"]
    draw = random.Random(0)
    for _ in range(4):
        process = start(tmp_path / "parts")
        process.join(draw.uniform(0.1, 1.0))
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        if has_ended():
            break
    else:
        process = start(tmp_path / "parts")
        process.join()
        assert process.exitcode == 0
    assert whole.exitcode == 0 and has_ended()
    assert _losses(tmp_path / "parts") == _losses(tmp_path / "whole")
    last = [read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("parts", "whole")]
    for name, state in last[0]["modules"].items():
        for key, tensor in state.items():
            assert torch.equal(tensor, last[1]["modules"][name][key])
    for name in os.listdir(tmp_path / "whole/samples"):
        parts, whole = (tmp_path / folder / "samples" / name for folder in ("parts", "whole"))
        assert parts.read_bytes() == whole.read_bytes()
