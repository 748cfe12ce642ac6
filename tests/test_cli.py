"""The command line: every command, every sentence about bad input, interrupts and kills."""

import csv
import errno
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import genfast
from genfast import cli
from genfast.training.errors import BadInput
from genfast.training.runs import demo, devices
from genfast.training.runs.config import prepare_resumed

ROOT = Path(__file__).parents[1]
TINY = ["--batch-size", "4", "--nz", "3", "--device", "cpu"]
TINY_DCGAN = [*TINY, "--ngf", "4", "--ndf", "4"]


@pytest.fixture
def images(tmp_path):
    path = tmp_path / "images.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (12, 16, 16), dtype=np.uint8))
    return str(path)


def _run(*arguments):
    return cli.main([str(a) for a in arguments])


def _fails(capsys, *arguments):
    """The one line that a failing command prints."""
    assert _run(*arguments) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"genfast: error: [^\n]+\n", error), error
    assert "expected" in error
    return error


def _losses(out):
    with open(Path(out) / "metrics.csv", newline="") as file:
        return [row[:-1] for row in csv.reader(file)]


@pytest.mark.parametrize("model", ["gan", "dcgan", "vae", "conv-vae"])
def test_train_then_sample(tmp_path, images, model, capsys):
    out = tmp_path / "out"
    assert _run("train", model, "--data", images, "--epochs", 1, "--out", out, *TINY) == 0
    assert capsys.readouterr().out == f"{out}/samples/epoch_001.png\n"
    assert sorted(p.name for p in out.iterdir()) == [
        "checkpoint.pt", "config.json", "losses.png", "metrics.csv", "samples",
    ]  # fmt: skip
    for checkpoint in (out, out / "checkpoint.pt"):
        picture = tmp_path / "picture.png"
        assert _run("sample", checkpoint, "--num", 5, "--out", picture, "--device", "cpu") == 0
        with Image.open(picture) as opened:
            assert opened.size == (3 * 66 + 2, 2 * 66 + 2)
        picture.unlink()


def test_folder_and_image_size(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    arguments = ("--data", tmp_path, "--image-size", 16, "--epochs", 1, "--out", tmp_path / "out")
    assert _run("train", "dcgan", *arguments, *TINY_DCGAN) == 0
    error = capsys.readouterr().err
    assert re.search(r"genfast: warning: skipped 1 of 5 images.*broken\.png", error)
    assert "4 images of 3 x 16 x 16" in error


def test_env(capsys):
    assert _run("env") == 0
    printed = capsys.readouterr().out
    for word in ("genfast", "python", "torch", "triton", "device", "precision", "float32 "):
        assert re.search(rf"^{word}", printed, re.M)
    assert re.search("runs (the Triton kernels|PyTorch, because)", printed)


def test_env_says_why(monkeypatch, capsys):
    monkeypatch.setattr(cli.environment, "selected_backend", lambda: "auto")
    monkeypatch.setattr(cli.environment, "why_not_triton", lambda t: f"{t.device} is too slow")
    assert _run("env", "--device", "cpu") == 0
    assert "bfloat16   runs PyTorch, because cpu is too slow" in capsys.readouterr().out
    monkeypatch.setattr(cli.environment, "why_not_triton", lambda t: None)
    assert _run("env", "--device", "cpu") == 0
    assert "float16    runs the Triton kernels" in capsys.readouterr().out
    monkeypatch.setattr(cli.environment, "selected_backend", lambda: "reference")
    assert _run("env", "--device", "cpu") == 0
    assert "because the backend 'reference' was asked for" in capsys.readouterr().out


def test_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "TRAINING_SECONDS", 0)
    monkeypatch.setattr(demo, "ROUNDS", 4)
    monkeypatch.setattr(demo, "STEADY", math.inf)
    prepare = demo.prepare
    tiny = dict(image_size=16, ngf=4, ndf=4)
    monkeypatch.setattr(demo, "prepare", lambda *args: prepare(*args[:2], tiny))
    for _ in range(2):  # It runs again over what it left.
        assert _run("demo", "--out", tmp_path / "demo", "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert re.search(r"stock PyTorch recipe, float32: \d+ images/s", printed)
    assert re.search(r"genfast, (bf16|fp32): \d+ images/s, \d+\.\d\d times as many", printed)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "stylegan"], "invalid choice: 'stylegan'"),
        (
            ["train", "gan", "--epochs", "0"],
            "expected a whole number from 1 to 1,000,000,000, got '0'",
        ),
        (
            ["train", "gan", "--batch-size", "1.5"],
            "expected a whole number from 1 to 1,000,000,000, got '1.5'",
        ),
        (["train", "gan", "--lr", "nan"], "expected a number above 0, got 'nan'"),
        (["train", "gan", "--beta1", "1"], "expected a number from 0 to below 1, got '1'"),
        (
            ["train", "gan", "--seed", "-1"],
            "a whole number from 0 to 9,223,372,036,854,775,807, got",
        ),
        (
            ["train", "gan", "--precision", "fp8"],
            "expected auto, fp32, tf32, bf16 or fp16, got 'fp8'",
        ),
        (["sample", "x", "--num", "0"], "expected a whole number from 1 to 1,000,000,000, got '0'"),
        ([], "required"),
    ],
)
def test_unsuitable_arguments(arguments, expected, capsys):
    with pytest.raises(SystemExit) as stop:
        _run(*arguments)
    assert stop.value.code == 2
    assert expected in capsys.readouterr().err


def test_bad_input_ends_in_one_sentence(tmp_path, images, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = ("train", "dcgan", "--device", "cpu")
    assert "expected --data" in _fails(capsys, *train)
    assert "where there is nothing" in _fails(capsys, *train, "--data", "absent")
    assert "got 50" in _fails(capsys, *train, "--data", images, "--image-size", 50)
    assert "got --ngf" in _fails(capsys, "train", "vae", "--data", images, "--ngf", 8)
    assert "got 13" in _fails(capsys, *train, "--data", images, "--batch-size", 13)
    assert "got the file" in _fails(capsys, *train, "--data", images, "--out", images)
    assert "got it alone" in _fails(capsys, *train, "--resume")
    absent = _fails(capsys, *train, "--out", "runs/absent", "--resume")
    assert "expected a checkpoint file at runs/absent/checkpoint.pt" in absent
    for device in ("tpu", "meta", "cuda:99"):
        error = _fails(capsys, "train", "gan", "--data", images, "--device", device)
        assert f"got '{device}'" in error
    assert not (tmp_path / "runs").exists()


def test_a_backend_that_cannot_run(images, tmp_path, monkeypatch, capsys):
    def unknown():
        raise ValueError("expected GENFAST_BACKEND to be another")

    monkeypatch.setattr(devices, "why_not_triton", lambda t: "there is no GPU")
    for backend, message in (
        (lambda: "triton", "GENFAST_BACKEND=triton or use_backend asks, but there is no GPU"),
        (unknown, "expected GENFAST_BACKEND to be another"),
    ):
        monkeypatch.setattr(devices, "selected_backend", backend)
        assert message in _fails(capsys, "train", "vae", "--data", images, "--device", "cpu")
        with pytest.raises(BadInput, match=message):
            genfast.train("dcgan", images, out=tmp_path / "run", device="cpu")


def test_a_backend_that_does_not_exist():
    done = subprocess.run(
        [sys.executable, "-m", "genfast", "env"],
        cwd=ROOT,
        env=os.environ | {"GENFAST_BACKEND": "cuda"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    expected = r"genfast: error: expected GENFAST_BACKEND to be one of .*, got 'cuda'\n"
    assert re.fullmatch(expected, done.stderr)


def test_bad_checkpoints_end_in_one_sentence(tmp_path, images, capsys):
    assert "where there is none" in _fails(capsys, "sample", tmp_path / "absent.pt")
    assert "could not read" in _fails(capsys, "sample", images)
    out = tmp_path / "out"
    arguments = ("--data", images, "--epochs", 1, "--out", out, *TINY)
    assert _run("train", "vae", *arguments) == 0
    capsys.readouterr()
    sample = ("sample", out, "--out", tmp_path / "no/folder.png")
    assert "folder that exists" in _fails(capsys, *sample)
    resume = ("--out", out, "--resume", "--device", "cpu")
    assert "expected a checkpoint of gan at" in _fails(capsys, "train", "gan", *resume)
    assert "got one of vae" in _fails(capsys, "train", "gan", "--resume", out / "checkpoint.pt")
    assert "expected --nz 3" in _fails(capsys, "train", "vae", *resume, "--nz", 4)
    assert "expected --epochs of more than the 1" in _fails(capsys, "train", "vae", *resume)


def test_files_that_cannot_be_written(tmp_path, images, capsys, monkeypatch):
    arguments = ("train", "vae", "--data", images, "--epochs", 1, *TINY, "--out")
    assert "Not a directory" in _fails(capsys, *arguments, tmp_path / "images.npy/out")
    assert _run(*arguments, tmp_path / "out") == 0
    capsys.readouterr()
    assert "got the folder" in _fails(capsys, "sample", tmp_path / "out", "--out", tmp_path)

    def fill(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = sorted((tmp_path / "out").rglob("*")), (tmp_path / "out/checkpoint.pt").read_bytes()
    monkeypatch.setattr(os, "fsync", fill)
    resume = ("train", "vae", "--out", tmp_path / "out", "--resume", "--epochs", 2)
    error = _run(*resume), capsys.readouterr().err
    assert error[0] == 1
    assert re.fullmatch(r"genfast: error: expected .*No space left on device.*out/.*\n", error[1])
    after = sorted((tmp_path / "out").rglob("*")), (tmp_path / "out/checkpoint.pt").read_bytes()
    assert after == before


def test_resuming_elsewhere_does_not_overwrite_another_run(tmp_path, images, capsys):
    arguments = ("train", "vae", "--data", images, "--epochs", 1, *TINY, "--out")
    for name in ("one", "two"):
        assert _run(*arguments, tmp_path / name) == 0
    capsys.readouterr()
    resume = ("train", "vae", "--epochs", 2, "--resume", tmp_path / "one/checkpoint.pt", "--out")
    assert "holds one" in _fails(capsys, *resume, tmp_path / "two")
    assert _run(*resume, tmp_path / "three") == 0


def test_a_run_in_a_precision_that_the_device_lacks(tmp_path, images, capsys):
    out = tmp_path / "out"
    assert _run("train", "vae", "--data", images, "--epochs", 1, "--out", out, *TINY) == 0
    content = torch.load(out / "checkpoint.pt", weights_only=True)
    content["config"]["precision"] = "tf32"
    torch.save(content, out / "checkpoint.pt")
    capsys.readouterr()
    resume = ("train", "vae", "--out", out, "--resume", "--epochs", 2, "--device", "cpu")
    assert "expected tf32 on an NVIDIA GPU" in _fails(capsys, *resume)
    assert _run("sample", out, "--out", tmp_path / "s.png", "--device", "cpu") == 0


def test_a_finished_run_is_not_overwritten(tmp_path, images, capsys):
    arguments = ("train", "vae", "--data", images, "--epochs", 1, "--out", tmp_path / "out", *TINY)
    assert _run(*arguments) == 0
    before = (tmp_path / "out/checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert "holds one: give --resume" in _fails(capsys, *arguments)
    assert (tmp_path / "out/checkpoint.pt").read_bytes() == before


def test_default_folder(tmp_path, images, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert _run("train", "vae", "--data", images, "--epochs", 1, *TINY) == 0
    assert (tmp_path / "runs/vae-images.npy/checkpoint.pt").exists()
    resume = ("train", "vae", "--data", images, "--resume", "--epochs", 2, "--device", "cpu")
    assert _run(*resume) == 0
    assert len(_losses("runs/vae-images.npy")) == 1 + 6


def _start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "genfast", *map(str, arguments)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def _wait_for(condition, process, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_run_resumes_with_the_losses_of_an_uninterrupted_one(
    tmp_path, images, signal_number, monkeypatch
):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "out"
    arguments = ("train", "dcgan", "--data", images, *TINY_DCGAN, "--checkpoint-seconds", 0)
    process = _start(*arguments, "--out", out, "--epochs", 100000)
    checkpoint = out / "checkpoint.pt"
    _wait_for(checkpoint.exists, process)
    first = checkpoint.stat().st_mtime_ns
    _wait_for(lambda: checkpoint.stat().st_mtime_ns != first, process)
    process.send_signal(signal_number)
    error = process.communicate(timeout=60)[1]

    steps = prepare_resumed("dcgan", None, {}, checkpoint) and _steps(checkpoint)
    if signal_number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        said = re.search(r"stopped after step (\d+); to go on: python -m (genfast .*)\n", error)
        assert int(said[1]) == steps
        assert f"--out {out}" in said[2]
        assert said[2].endswith("--resume")

    epochs = steps // 3 + 2
    assert _run(*arguments[:-2], "--out", out, "--resume", "--epochs", epochs) == 0
    assert _run(*arguments[:-2], "--out", tmp_path / "whole", "--epochs", epochs) == 0
    assert _losses(out) == _losses(tmp_path / "whole")


def _steps(path):
    from genfast.training.runs.checkpoint import read_checkpoint

    return read_checkpoint(path)["steps"]


def test_help_needs_no_extras_and_shows_defaults():
    code = """
import runpy, sys
sys.modules.update(dict.fromkeys(["PIL", "matplotlib", "safetensors", "scipy", "sklearn", "tqdm"]))
sys.argv[1:] = ["train", "--help"]
runpy.run_module("genfast", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert words.startswith("usage: genfast train")
    assert "(default: gan 0.5; dcgan 0.5; vae 0.9; conv-vae 0.9; vae-gan 0.5)" in words


def test_missing_tqdm_is_named(images, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    error = _fails_without_extra(capsys, "train", "vae", "--data", images, "--out", tmp_path / "o")
    assert "tqdm" in error
    assert not (tmp_path / "o").exists()


def _fails_without_extra(capsys, *arguments):
    assert _run(*arguments) == 1
    error = capsys.readouterr().err
    assert "python -m pip install pillow scikit-learn tqdm\n" in error
    return error
