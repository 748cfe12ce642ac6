"""The course in docs/: its commands and Python blocks run, its links and pictures exist."""

import re
import shlex
import sys
from pathlib import Path

import pytest

from genfast import cli

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("[0-9]*.md"))
SHORTENED = {"EPOCHS": "1", "MORE_EPOCHS": "2"}
# What makes a command small, beyond its epochs: other widths cost no line that is tested.
NARROW = {
    "dcgan": ["--ngf", "4", "--ndf", "4", "--image-size", "16"],
    "conv-vae": ["--ngf", "4"],
    "vae-gan": ["--ngf", "4", "--ndf", "4"],
}

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def _blocks(page, language):
    text = page.read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [block for kind, block in fenced if kind == language]


def _commands(page):
    """The commands of a page as lists of words, as the environment variables shorten them."""
    for block in _blocks(page, ""):
        for line in block.splitlines():
            line = re.sub(r"\$\{(\w+):-\d+\}", lambda found: SHORTENED[found[1]], line)
            yield shlex.split(line)


@pages
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for block in _blocks(page, "python"):
        module = tmp_path / "block.py"
        module.write_text(block)  # `accelerate` reads the source of methods from a file.
        exec(compile(block, str(module), "exec"), {"__name__": "block", "__file__": str(module)})


@pages
def test_commands_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENFAST_CACHE_DIR", str(tmp_path / "cache"))
    for python, flag, package, *arguments in _commands(page):
        assert (python, flag, package) == ("python", "-m", "genfast")
        more = NARROW.get(arguments[1], []) if "--resume" not in arguments else []
        assert cli.main([*arguments, *more, "--device", "cpu"]) == 0, arguments
    assert "error" not in capsys.readouterr().err


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.name)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (DOCS / target).is_file(), target


def test_every_page_is_in_the_index():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\d[^)]+)\)", index) == [page.name for page in PAGES]


def test_drawings_are_what_their_script_draws(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import drawings

    for name, draw in drawings.DRAWINGS.items():
        assert (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8") == str(draw())
    del sys.modules["drawings"]


def test_every_picture_is_shown():
    shown = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    for picture in (DOCS / "pictures").iterdir():
        assert f"(pictures/{picture.name})" in shown
