"""The versions of Python that `make` takes are those that setup.py takes."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TAKEN = re.search(r"^VERSIONS := (.*)$", MAKEFILE, re.M)[1].split()


def test_setup_takes_the_same():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    allowed = SpecifierSet(re.search(r'python_requires="(.+)"', setup)[1])
    assert {f"3.{n}" for n in range(30) if f"3.{n}.1" in allowed} == set(TAKEN)


def test_pages_and_constraints_name_the_same():
    first, last = sorted(TAKEN, key=lambda version: int(version[2:]))[:: len(TAKEN) - 1]
    for name in ("README.md", "docs/installing.md", "constraints.txt"):
        text = " ".join((ROOT / name).read_text(encoding="utf-8").replace("#", "").split())
        assert f"Python {first} to {last}" in text


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(("version", "taken"), [("3.9.18", 0), ("3.13.2", 1), ("3.14.0", 0)])
def test_make(version, taken, tmp_path):
    for name in ("Makefile", "setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    # It says its version, has the modules that are asked for, and makes no virtual environment.
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] && echo {version}\n')
    python.chmod(0o755)
    command = ["make", "demo", f"PYTHON={python}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode != 0
    assert (f"making .venv with {python} ({version})" in done.stdout) == taken
    refusal = f"needs one of Python {' '.join(TAKEN)}. Tried: {python} ({version})."
    assert (refusal in done.stderr) != taken
