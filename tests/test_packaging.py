"""The wheel and the sdist: what they hold, and that genfast works away from the checkout."""

import datetime
import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
import stand_ins
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import genfast

ROOT = Path(__file__).parents[1]
# The build tools are installed: nothing is fetched.
OFFLINE = ("--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")


def run(*command, cwd, **variables):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=env | {k: str(v) for k, v in variables.items()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of the sources, since building leaves files beside them."""
    source = tmp_path_factory.mktemp("source")
    left_out = shutil.ignore_patterns("__pycache__")
    for folder in ("benchmarks", "docs", "genfast", "kernels", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=left_out)
    for pattern in ("*.in", "*.md", "*.py", "*.toml", "*.txt", "Makefile"):
        for path in ROOT.glob(pattern):
            shutil.copy(path, source)
    (source / "genfast/launch/tuned.csv").write_text("")  # There is none before a GPU was timed.
    return source


@pytest.fixture(scope="module")
def archives(sources, tmp_path_factory):
    """The wheel and the sdist, by the hooks that build tools call."""
    out = tmp_path_factory.mktemp("archives")
    code = "import setuptools.build_meta as b; b.build_sdist({0!r}); b.build_wheel({0!r})"
    run("-c", code.format(str(out)), cwd=sources)
    return out


@pytest.fixture(scope="module")
def wheel(archives):
    return next(archives.glob("*.whl"))


@pytest.fixture(scope="module")
def sdist(archives):
    return next(archives.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def metadata(wheel):
    """What a package index reads of the wheel: fields, and the description as the payload."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = (n for n in file.namelist() if n.endswith(".dist-info/METADATA"))
        return email.message_from_string(file.read(name).decode())


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with what pip installs of the wheel."""
    folder = tmp_path_factory.mktemp("installed")
    run("-m", "pip", "install", *OFFLINE, "--target", folder, wheel, cwd=folder)
    return folder


def test_wheel_installs_all_of_genfast_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0].split("-")[0] for name in names} == {"genfast"}
    kernels = {f"genfast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert "genfast/kernels/conv.py" in kernels
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "genfast").rglob("*.py")}
    assert kernels | package | {"genfast/py.typed", "genfast/launch/tuned.csv"} <= names


def test_the_command_catches_an_interrupt_from_its_start_on(wheel):
    """It imports no PyTorch before; see genfast/__main__.py."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = (n for n in file.namelist() if n.endswith("entry_points.txt"))
        assert "genfast = genfast.__main__:main" in file.read(name).decode()


def test_sdist_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as file:
        held = {name.partition("/")[2] for name in file.getnames()}
    assert {"genfast/py.typed", "genfast/launch/tuned.csv", "kernels/conv.py"} <= held

    def contents(path):
        with zipfile.ZipFile(path) as file:
            return {name: file.read(name) for name in file.namelist()}

    out = "--no-build-isolation", "--wheel-dir", tmp_path
    run("-m", "pip", "wheel", *OFFLINE, *out, sdist, cwd=tmp_path)
    assert contents(next(tmp_path.glob("*.whl"))) == contents(wheel)


def test_description_has_no_link_that_is_dead_on_an_index(metadata, sdist):
    text = metadata.get_payload()
    links = re.findall(r"\]\(\s*([^)]*)", text)
    assert [link for link in links if not link.startswith("https://")] == []
    paths = {*re.findall(r"\(`([^`]+)`\)", text)}
    assert {"DESIGN.md", "docs/lightning.md"} <= paths
    assert "# genfast\n\ngenfast is built" in text  # And no picture in between.
    with tarfile.open(sdist) as file:
        assert paths <= {name.partition("/")[2] for name in file.getnames()}


def test_constraints_pin_what_make_test_installs(metadata):
    """Directly and by what that needs in turn, as far as it is installed here."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(str(pin.specifier).startswith("==") for pin in pins)
    seen, waiting = set(), [("test", line) for line in metadata.get_all("Requires-Dist")]
    while waiting:
        of_extra, line = waiting.pop()
        need = Requirement(line)
        if need.marker and not need.marker.evaluate({"extra": of_extra}):
            continue
        for extra in {"", *need.extras} - {e for name, e in seen if name == need.name}:
            seen.add((need.name, extra))
            try:
                waiting += [(extra, line) for line in requires(need.name) or ()]
            except PackageNotFoundError:
                continue
    needed = {canonicalize_name(name) for name, _ in seen}
    # PyTorch's build for CUDA says itself which libraries it was built with.
    needed = {name for name in needed if not name.startswith(("cuda-", "nvidia-"))}
    assert needed >= stand_ins.WITHOUT  # Else an example in docs/ would run nowhere.
    assert needed <= {canonicalize_name(pin.name) for pin in pins}


def test_changelog_tells_of_this_version():
    lines = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
    newest, date = next(line for line in lines if line.startswith("## ")).split(" - ")
    assert newest == f"## [{genfast.__version__}]"
    datetime.date.fromisoformat(date)


def test_demo_runs_from_what_is_installed(installed, tmp_path):
    code = """
import json, sys
from genfast.training.runs import demo
prepare, small = demo.prepare, dict(steps=2, image_size=16, ngf=4, ndf=4, batch_size=8)
demo.prepare = lambda model, data, given: prepare(model, data, small)
demo.WARMUP_STEPS = demo.ROUNDS = demo.STEPS_A_TURN = 1
from genfast.__main__ import main
import genfast, genfast.kernels, importlib.util
sys.argv = ["genfast", "demo", "--out", "demo", "--device", "cpu"]
status = main()
conv = importlib.util.find_spec("genfast.kernels.conv")
print(json.dumps([status, genfast.__file__, genfast.kernels.__file__, conv.origin]))
"""
    printed = run("-c", code, cwd=tmp_path, PYTHONPATH=installed, OMP_NUM_THREADS=1)
    assert "the digits your DCGAN drew last: demo/samples/" in printed
    status, *files = json.loads(printed.splitlines()[-1])
    package = installed / "genfast"
    expected = [
        package / "__init__.py",
        package / "kernels/__init__.py",
        package / "kernels/conv.py",
    ]
    assert (status, files) == (0, [str(path) for path in expected])
    assert list((tmp_path / "demo/samples").glob("*.png"))
