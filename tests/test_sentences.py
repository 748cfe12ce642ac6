"""What a machine refuses, and streams that are closed, end in one sentence or pass unnoticed."""

import ast
import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from genfast import cli
from genfast.training import memory
from genfast.training.errors import EXTRAS
from genfast.training.memory import limited_memory, missing_memory

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has these limits and files")


@pytest.fixture
def train(tmp_path):
    """The arguments of a small run, but for its folder."""
    np.save(tmp_path / "images.npy", np.zeros((4, 16, 16), np.uint8))
    rest = ("--epochs", "1", "--device", "cpu", "--precision", "fp32")
    return ["train", "vae", "--data", str(tmp_path / "images.npy"), *rest]


ON_CUDA = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB."
)
ALL = "lower --batch-size, --image-size, --nz, --ngf or --ndf"
FREE = "free some, or give another --device"


@pytest.mark.parametrize(
    ("error", "amount"),
    [
        (ON_CUDA, "2.00 GiB"),
        (RuntimeError("CUDA error: out of memory"), "what is needed"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"), "what is needed"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 3221225472"
                      " bytes. Error code 12"), "3.0 GiB"),
        (MemoryError(), "what is needed"),
        (MemoryError("Unable to allocate 7.11 PiB for an array with shape (1,)"), "7.11 PiB"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "what is needed"),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (RuntimeError("shapes do not match"), None),
        (ValueError("out of memory"), None),
    ],
)  # fmt: skip
def test_errors_for_lack_of_memory(error, amount):
    assert missing_memory(error) == amount


@pytest.mark.parametrize(
    ("command", "advice"),
    [
        (["train", "dcgan", "--data", "digits"], ALL),
        (["train", "gan", "--data", "digits"], "lower --batch-size, --image-size or --nz"),
        (["train", "dcgan", "--out", "x", "--resume"], FREE),
        (["sample", "x"], "lower --num"),
        (["demo"], FREE),
    ],
)
def test_what_to_do_without_memory(command, advice, monkeypatch, capsys):
    def refuse(*_, **__):
        raise ON_CUDA

    monkeypatch.setattr(cli.train, "_resume_from", refuse)
    monkeypatch.setattr(cli.sample, "sample_checkpoint", refuse)
    monkeypatch.setattr(cli.demo, "demo", refuse)
    assert cli.main([*command, "--device", "cpu"]) == 1
    expected = f"genfast: error: expected enough memory, got no room for 2.00 GiB: {advice}\n"
    assert capsys.readouterr().err == expected


def test_other_errors_are_not_hidden(monkeypatch, train):
    def fail(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(cli.train, "prepared", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        cli.main(train)


@linux
def test_a_model_larger_than_memory(train, tmp_path, monkeypatch, capsys):
    import resource

    monkeypatch.setattr(memory, "available_memory", lambda: 2**26)
    monkeypatch.setattr(memory, "STACKS", 0)
    before = resource.getrlimit(resource.RLIMIT_DATA)
    assert cli.main([*train, "--nz", "100000", "--out", str(tmp_path / "out")]) == 1
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    error = capsys.readouterr().err
    assert "got no room for 152.6 MiB: lower --batch-size, --image-size or --nz\n" in error


@linux
def test_there_is_a_limit():
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    with limited_memory(CPU):
        assert 0 < resource.getrlimit(resource.RLIMIT_DATA)[0] < 2**50
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            torch.empty(2**50, dtype=torch.uint8)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    with limited_memory(torch.device("cuda")):  # Its driver reserves addresses as it likes.
        assert resource.getrlimit(resource.RLIMIT_DATA) == before


def test_sizes_that_no_memory_has(train, capsys, tmp_path):
    train[1] = "dcgan"
    assert cli.main([*train, "--ngf", str(10**9), "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(rf"genfast: error: expected enough memory, got [^\n]+: {ALL}\n", error)


def test_an_option_in_error_takes_one_line(capsys):
    for arguments, message in (
        (["train", "gan", "--epochs", str(10**30)], "argument --epochs: expected a whole number"),
        (["train", "gan", "--colour"], "unrecognized arguments: --colour"),
        (["train"], "the following arguments are required: model"),
        ([], "the following arguments are required: COMMAND"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert re.fullmatch(rf"genfast: error: {message}[^\n]*; python -m genfast .*\n", error)


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_hint_names_all_of_an_extra(extra):
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    named = ast.literal_eval(re.search(rf"^{extra} = (\[.*\])$", setup, re.M)[1])
    assert tuple(re.split("[<>=]", name)[0] for name in named) == EXTRAS[extra][1]


def test_what_genfast_needs_is_not_there():
    code = "sys.modules['torch'] = None; from genfast.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-c", f"import sys; {code}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "genfast: error: expected torch, got none: python -m pip install torch\n"


def test_a_terminal_that_lacks_letters(monkeypatch):
    """The help names authors, and a metric stands with its spread."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", "--help"])
    assert stop.value.code == 0
    assert rb"Fr\xe9chet" in raw.getvalue()


def _without_reader():
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


def test_a_reader_that_goes_away(train, tmp_path, monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, _without_reader())
    assert cli.main([*train, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/checkpoint.pt").exists()
    assert cli.main(["env"]) == 0
    assert cli.main(["sample", "absent.pt"]) == 1
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    sys.stdout.flush()  # As Python does when it ends.
    sys.stderr.flush()


@linux
def test_a_disk_that_is_full(train, tmp_path, monkeypatch, capsys):
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        assert cli.main(["env"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    with open("/dev/full", "w") as full, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", full)
        assert cli.main([*train, "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith("epoch_001.png\n")


@linux
def test_standard_streams_that_are_closed(train, tmp_path):
    # The losses must not end up in the file that takes the number of standard error.
    code = f"""
import os, sys
from genfast import cli
status = cli.main({[*train, "--out", str(tmp_path / "out")]!r})
sys.exit(status or os.readlink("/proc/self/fd/2") != os.devnull)
"""
    command = 'exec "$@" <&- >&- 2>&-'
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["sh", "-c", command, "sh", sys.executable, "-c", code], cwd=ROOT, env=environment
    )
    assert done.returncode == 0
    assert (tmp_path / "out/samples/epoch_001.png").exists()
