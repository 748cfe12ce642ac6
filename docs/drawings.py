"""The drawings of these pages: `python docs/drawings.py` writes them into docs/pictures.

The README's strip of digits too: some of the digits of the chapter on classes, a column a class.
"""

import math
from pathlib import Path
from xml.etree import ElementTree

import numpy
import torch
from PIL import Image

from genfast.training.runs.pictures import MARGIN, SMALLEST_TILE, grid, save_png

FOLDER = Path(__file__).parent / "pictures"
INK, PALE, BLUE, ORANGE, GREEN = "#333333", "#f2f2f2", "#cfe2f3", "#fce5cd", "#d9ead3"
COLOURS = [BLUE, ORANGE, GREEN, "#ead1dc"]


class Drawing:
    """An SVG picture of boxes, arrows, grids and words; lengths in pixels, y down."""

    def __init__(self, width, height):
        self._root = ElementTree.Element(
            "svg",
            xmlns="http://www.w3.org/2000/svg",
            viewBox=f"0 0 {width} {height}",
            width=str(width),
            height=str(height),
        )
        self._add("rect", width=width, height=height, fill="white")

    def text(self, x, y, words, size=14, anchor="middle", bold=False):
        """Words, centred at (x, y) unless `anchor` says "start" or "end"."""
        element = self._add(
            "text", x=x, y=y + size * 0.35, fill=INK, font_size=size, text_anchor=anchor,
            font_family="sans-serif", font_weight="bold" if bold else "normal",
        )  # fmt: skip
        element.text = words

    def box(self, x, y, width, height, words="", colour=PALE, size=14):
        """A box with its left upper corner at (x, y); words may have several lines."""
        self._add(
            "rect", x=x, y=y, width=width, height=height, fill=colour, stroke=INK, rx=4,
        )  # fmt: skip
        lines = words.split("\n") if words else []
        for i, line in enumerate(lines):
            offset = (i - (len(lines) - 1) / 2) * size * 1.25
            self.text(x + width / 2, y + height / 2 + offset, line, size)

    def arrow(self, x1, y1, x2, y2, dashed=False):
        """A straight arrow."""
        dash = {"stroke_dasharray": "5 4"} if dashed else {}
        length = math.hypot(x2 - x1, y2 - y1)
        along = (x2 - x1) / length, (y2 - y1) / length
        x3, y3 = x2 - 9 * along[0], y2 - 9 * along[1]
        self._add("line", x1=x1, y1=y1, x2=x3, y2=y3, stroke=INK, stroke_width=1.5, **dash)
        across = -5 * along[1], 5 * along[0]
        corners = [(x2, y2), (x3 + across[0], y3 + across[1]), (x3 - across[0], y3 - across[1])]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        self._add("polygon", points=points, fill=INK)

    def cells(self, x, y, side, rows, columns, colour_of, words_of=lambda row, column: ""):
        """A grid of squares; `colour_of` and `words_of` take a row and a column."""
        for row in range(rows):
            for column in range(columns):
                left, top = x + column * side, y + row * side
                self._add(
                    "rect", x=left, y=top, width=side, height=side, stroke=INK,
                    fill=colour_of(row, column),
                )  # fmt: skip
                words = words_of(row, column)
                if words:
                    self.text(left + side / 2, top + side / 2, words, size=side * 0.4)

    def __str__(self):
        ElementTree.indent(self._root)
        return ElementTree.tostring(self._root, encoding="unicode") + "\n"

    def _add(self, kind, **attributes):
        named = {name.replace("_", "-"): f"{value}" for name, value in attributes.items()}
        return ElementTree.SubElement(self._root, kind, named)


def gan():
    """Two networks, and what each is told."""
    d = Drawing(720, 250)
    d.box(20, 150, 90, 50, "noise z", PALE)
    d.arrow(110, 175, 160, 175)
    d.box(160, 145, 120, 60, "generator\nG", BLUE)
    d.arrow(280, 175, 330, 175)
    d.box(330, 150, 110, 50, "G(z)", PALE)
    d.box(330, 50, 110, 50, "real image x", PALE)
    d.arrow(440, 75, 500, 110)
    d.arrow(440, 175, 500, 140)
    d.box(500, 95, 120, 60, "discriminator\nD", ORANGE)
    d.arrow(620, 125, 660, 125)
    d.text(688, 125, "logit")
    d.text(560, 40, "D learns: x is real, G(z) is not", 13)
    d.text(400, 232, "G learns through D: make the logit of G(z) large", 13)
    return d


def vae():
    """The way of an image through a VAE."""
    d = Drawing(760, 200)
    d.box(15, 75, 90, 50, "image x", PALE)
    d.arrow(105, 100, 140, 100)
    d.box(140, 70, 110, 60, "encoder", BLUE)
    d.arrow(250, 90, 300, 60)
    d.arrow(250, 110, 300, 140)
    d.box(300, 35, 90, 45, "mean", PALE)
    d.box(300, 120, 90, 45, "variance", PALE)
    d.arrow(390, 58, 440, 92)
    d.arrow(390, 142, 440, 108)
    d.box(440, 75, 80, 50, "latent z", GREEN)
    d.arrow(520, 100, 555, 100)
    d.box(555, 70, 90, 60, "decoder", ORANGE)
    d.arrow(645, 100, 680, 100)
    d.text(718, 100, "image")
    d.text(480, 25, "noise", 13)
    d.arrow(480, 34, 480, 75, dashed=True)
    return d


def phases():
    """Which taps of a 4x4 kernel the four kinds of output pixels of a transposed layer meet."""
    d = Drawing(700, 300)
    side = 34

    def colour(row, column):
        return COLOURS[row % 2 * 2 + column % 2]

    d.text(136, 22, "output pixels, 8 x 8", bold=True)
    d.cells(20, 40, 29, 8, 8, colour)
    d.text(136, 286, "one colour a phase", 13)
    d.text(400, 22, "the kernel's 16 taps", bold=True)
    d.cells(332, 40, side, 4, 4, lambda r, c: colour(r + 1, c + 1), lambda r, c: f"{4 * r + c}")
    d.text(400, 200, "each phase meets 4 of them", 13)
    d.text(590, 22, "four small convolutions", bold=True)
    for i, (row, column) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        taps = [4 * r + c for r in (1 - row, 3 - row) for c in (1 - column, 3 - column)]
        x, y = 510 + column * 90, 45 + row * 90
        d.cells(
            x, y, side, 2, 2,
            lambda r, c, i=i: COLOURS[i],
            lambda r, c, taps=taps: f"{taps[2 * r + c]}",
        )  # fmt: skip
    d.text(590, 246, "nothing is multiplied by", 13)
    d.text(590, 264, "zeros that were put in", 13)
    return d


def passes():
    """Trips to memory of a block, by PyTorch and fused."""
    d = Drawing(760, 260)
    d.text(
        20,
        22,
        "PyTorch, training: each box reads its input from memory and writes its output",
        13,
        "start",
    )
    names = ["convolution", "batch statistics", "normalise", "activation"]
    for i, name in enumerate(names):
        x = 20 + i * 185
        d.box(x, 40, 150, 50, name, BLUE if i == 0 else ORANGE)
        if i < 3:
            d.arrow(x + 150, 65, x + 185, 65)
    d.text(20, 142, "genfast: two passes; the statistics leave with the convolution", 13, "start")
    d.box(20, 160, 335, 50, "convolution + statistics of each tile", BLUE)
    d.arrow(355, 185, 390, 185)
    d.box(390, 160, 335, 50, "normalise + activation", ORANGE)
    d.text(380, 240, "Beside an image or a logit the second pass is part of the next layer.", 13)
    return d


def product():
    """A convolution as one matrix product: channels down, pixels across."""
    d = Drawing(720, 300)
    d.text(110, 24, "weight", bold=True)
    d.box(40, 90, 140, 120, "channels of\nthe output\n(rows)", BLUE)
    d.text(110, 226, "taps x input channels: K", 12)
    d.text(240, 150, "x", 22)
    d.text(380, 24, "pixels", bold=True)
    d.box(290, 60, 180, 150, "what each output\npixel meets\n(columns)", GREEN)
    d.text(380, 226, "output pixels", 12)
    d.text(510, 150, "=", 22)
    d.text(620, 24, "output", bold=True)
    d.box(545, 90, 150, 120, "channels x pixels", ORANGE)
    d.text(620, 226, "a channel is a row: its sums", 12)
    d.text(620, 242, "stay within a few threads", 12)
    d.text(360, 282, "K is walked in steps; both operands come from shared memory", 13)
    return d


def digits():
    """Three of the eight images of each class in classes.png: uint8 pixels (1, 200, 662)."""
    picture = torch.from_numpy(numpy.array(Image.open(FOLDER / "classes.png")))
    side = SMALLEST_TILE + MARGIN
    tiles = picture[MARGIN:, MARGIN:].unfold(0, SMALLEST_TILE, side).unfold(1, SMALLEST_TILE, side)
    return grid(tiles.transpose(0, 1)[[1, 3, 5]].flatten(0, 1)[:, None], columns=10)


DRAWINGS = {"gan": gan, "vae": vae, "phases": phases, "passes": passes, "product": product}


def main():
    """Write all of them."""
    for name, draw in DRAWINGS.items():
        (FOLDER / f"{name}.svg").write_text(str(draw()), encoding="utf-8")
    save_png(digits(), FOLDER / "digits.png")


if __name__ == "__main__":
    main()
