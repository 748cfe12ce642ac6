"""The README and its pages: what they tell people to type works, their links and pictures exist.

- Python blocks run, each by itself: those of every page. The README's `model` is the reader's own,
  and a page that names it finds a run in `runs/mine`.
- Commands run on the numbered pages, which are the course. On all others they are parsed: there
  they stand for folders and hours that a test does not have.
"""

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
import stand_ins
from PIL import Image
from torch import nn

from genfast import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("[0-9]*.md"))
REFERENCE = sorted({*DOCS.glob("*.md")} - {*PAGES, DOCS / "README.md"})
TOP = [ROOT / "README.md", ROOT / "DESIGN.md"]
LOG = ROOT / "benchmarks" / "TUNING.md"
SHORTENED = {"EPOCHS": "1", "MORE_EPOCHS": "2"}
# What makes a command small, beyond its epochs: other widths cost no line that is tested.
NARROW = {
    "dcgan": ["--ngf", "4", "--ndf", "4", "--image-size", "16"],
    "conv-vae": ["--ngf", "4"],
    "vae-gan": ["--ngf", "4", "--ndf", "4"],
}


def _each(pages):
    names = [str(page.relative_to(ROOT)) for page in pages]
    return pytest.mark.parametrize("page", pages, ids=names)


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


@_each([page for page in (*TOP, *PAGES, *REFERENCE) if _blocks(page, "python")])
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STEPS", "1")
    given = {"__name__": "block"}
    if page in TOP:
        given["model"] = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    if "runs/mine" in "".join(_blocks(page, "python")):
        arguments = "train gan --data digits --steps 1 --batch-size 8 --out runs/mine --device cpu"
        assert cli.main(arguments.split()) == 0
    lacking = {stand_ins.provide(block, monkeypatch) for block in _blocks(page, "python")} - {None}
    if lacking:
        pytest.skip(f"needs {' and '.join(sorted(lacking))}, which no stand-in replaces")
    for block in _blocks(page, "python"):
        module = tmp_path / "block.py"
        module.write_text(block)  # `accelerate` reads the source of methods from a file.
        exec(compile(block, str(module), "exec"), given | {"__file__": str(module)})


@_each(PAGES)
def test_commands_run(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GENFAST_CACHE_DIR", str(tmp_path / "cache"))
    for words in _commands(page):
        start = words[: words.index("genfast") + 1]
        arguments = words[len(start) :]
        more = NARROW.get(arguments[1], []) if "--resume" not in arguments else []
        arguments += [*more, "--device", "cpu"]
        if start[0] == "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", *start[1:], *arguments]
            path = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            assert subprocess.run(command, env=os.environ | path, timeout=100).returncode == 0
            continue
        assert start == ["python", "-m", "genfast"]
        assert cli.main(arguments) == 0, arguments
    assert "error" not in capsys.readouterr().err


@_each([*TOP, *REFERENCE])
def test_commands_are_understood(page):
    """In blocks, and in the text and tables: `genfast sample runs/mine --walk`."""
    text = page.read_text(encoding="utf-8")
    for line in re.findall(r"(?:^python -m |`(?:python -m )?)genfast (\w[^`\n]*)", text, re.M):
        try:
            cli._parser().parse_args(shlex.split(line))
        except SystemExit as ended:
            assert ended.code == 0, line  # As `--help` ends; 2 after a line it does not understand.


@_each([*TOP, LOG, *sorted(DOCS.glob("*.md"))])
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path, _, section = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), target
        assert not section or section in _anchors(linked), target


def _anchors(page):
    """The names that a code host gives to a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_index():
    index = (DOCS / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"\]\(([^#)]+)\)", index)
    assert [name for name in named if name[0].isdigit()] == [page.name for page in PAGES]
    assert {*named} == {page.name for page in (*PAGES, *REFERENCE)} | {"../DESIGN.md"}
    for page, following in pairwise(PAGES):
        assert f"]({following.name})" in page.read_text(encoding="utf-8").splitlines()[-1]


def test_every_paper_is_in_the_list():
    name = r"[A-ZÀ-Ž][\w-]+(?: et al\.| and [A-Z]\w+)?,? \(?(?:19|20)\d\d"
    papers = (DOCS / "papers.md").read_text(encoding="utf-8").replace(" (Radford et al.)", "")
    listed = {*re.findall(name, papers), "Radford et al., 2016"}
    for page in (*TOP, *PAGES, *REFERENCE):
        text = " ".join(page.read_text(encoding="utf-8").split())
        named = {words.replace(" (", ", ") for words in re.findall(name, text)}
        assert not named - listed - {"November 2026"}, page.name


def test_drawings_are_what_their_script_draws(monkeypatch):
    monkeypatch.syspath_prepend(str(DOCS))
    import drawings

    for name, draw in drawings.DRAWINGS.items():
        assert (DOCS / "pictures" / f"{name}.svg").read_text(encoding="utf-8") == str(draw())
    with Image.open(DOCS / "pictures" / "digits.png") as picture:
        assert (drawings.digits()[0].numpy() == numpy.array(picture)).all()
    del sys.modules["drawings"]


def test_every_picture_is_shown():
    shown = "".join(page.read_text(encoding="utf-8") for page in (*TOP, *PAGES))
    for picture in (DOCS / "pictures").iterdir():
        assert f"pictures/{picture.name})" in shown
