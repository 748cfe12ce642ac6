"""The built wheel: what it contains, and that it works away from the checkout."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy of the sources, since building leaves files beside them."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in ("genfast", "kernels", "tests"):
        shutil.copytree(ROOT / folder, source / folder)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    # The build tools are installed: nothing is fetched.
    options = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", out)
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, source], check=True)
    return next(out.glob("*.whl"))


def test_wheel_installs_nothing_but_genfast(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"genfast"}
    kernels = {f"genfast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert "genfast/kernels/conv.py" in kernels
    assert kernels <= set(names)


def test_the_command_catches_an_interrupt_from_its_start_on(wheel):
    """It imports no PyTorch before; see genfast/__main__.py."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = (n for n in file.namelist() if n.endswith("entry_points.txt"))
        assert "genfast = genfast.__main__:main" in file.read(name).decode()


def test_installed_kernels_come_from_the_wheel(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = """
import importlib.util, json, sys
sys.path.insert(0, sys.argv[1])
import genfast.kernels
conv = importlib.util.find_spec("genfast.kernels.conv")
print(json.dumps([genfast.kernels.__file__, conv.origin]))
"""
    found = subprocess.run(
        [sys.executable, "-c", code, tmp_path], cwd="/", capture_output=True, text=True, check=True
    )
    folder = tmp_path / "genfast" / "kernels"
    assert json.loads(found.stdout) == [str(folder / "__init__.py"), str(folder / "conv.py")]
