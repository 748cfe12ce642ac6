"""losses.png: how the losses of a run went, drawn from metrics.csv when it ends.

Drawn with Pillow, which training needs anyway, in some 50 ms of a core: to import matplotlib alone
takes about a second at the end of every run, however short.
"""

import csv
import math
import warnings
from array import array

import numpy as np
import torch

from genfast.training.errors import require
from genfast.training.runs import pictures
from genfast.training.runs.loss_log import FIRST, LAST, is_header

WIDTH, HEIGHT = 800, 400
LEFT, RIGHT, TOP, BOTTOM = 70, 24, 36, 44  # Margins around the area of the curves.
FINER = 2  # Drawn so many times as large and then reduced, for smooth lines.
OPACITY = 50  # Of a band, of 255.
BLACK, GREY, WHITE = "#222222", "#dddddd", "#ffffff"
COLOURS = ("#d1495b", "#00798c", "#edae49", "#7b4fa3", "#5b8c3e", "#30638e")
PARTS = 100
# The axis leaves out the most extreme values, such as those of the first steps.
SHOWN = (0.01, 0.99)


def draw_curve(log, path):
    """Draw the losses in `log`, a run's metrics.csv, as the picture `path`, a PNG.

    Each loss is a line, the means over `PARTS` equal parts of the steps, on a band from the
    smallest to the largest of a part: else the ups and downs of a GAN's losses hide where they
    tend. With fewer than two steps nothing is drawn.

    Warns:
        UserWarning: Pillow was built without FreeType, so that nothing can be drawn.
    """
    steps, losses = read_losses(log)
    if len(steps) < 2:
        return
    if not require("PIL.features", "pillow").check("freetype2"):
        warnings.warn(f"{path} is not drawn, as this Pillow has no FreeType", stacklevel=2)
        return
    pictures.save_png(_drawn(steps, losses), path)


def read_losses(log):
    """The steps in a metrics.csv, and its losses by their names: arrays of float64."""
    with open(log, newline="", encoding="utf-8", errors="replace") as file:
        rows = csv.reader(file)
        columns = next(rows, [])
        if not is_header(columns):
            return np.empty(0), {}
        found = [array("d") for _ in columns]
        for row in rows:
            if len(row) == len(columns):
                for values, text in zip(found, row, strict=True):
                    values.append(float(text or "nan"))
    by_name = {name: np.array(values) for name, values in zip(columns, found, strict=True)}
    steps = by_name["step"]
    return steps, {k: v for k, v in by_name.items() if k not in (*FIRST, *LAST)}


def ticks(low, high, count=5):
    """Round numbers from `low` to `high`, about `count`: multiples of 1, 2 or 5 times a power."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * min((1, 2, 5, 10), key=lambda n: abs(n * power - rough))
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _drawn(steps, losses):
    """The picture's pixels, uint8 (3, HEIGHT, WIDTH)."""
    image_module = require("PIL.Image", "pillow")
    canvas = image_module.new("RGB", (WIDTH * FINER, HEIGHT * FINER), WHITE)
    axes = _Axes(canvas, (steps[0], steps[-1]), _shown_range(losses.values()))
    axes.draw()
    named = list(zip(losses.items(), COLOURS * len(losses), strict=False))
    parts = [(_parts(steps, values, PARTS), colour) for (_, values), colour in named]
    for (x, low, _, high), colour in parts:
        axes.band(x, low, high, colour)
    for (x, _, mean, _), colour in parts:
        axes.line(x, mean, colour)
    axes.legend([(name, colour) for (name, _), colour in named])
    small = canvas.resize((WIDTH, HEIGHT), image_module.Resampling.BOX)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def _shown_range(series):
    """From where to where the vertical axis goes, for values that may be alike or not finite."""
    ends = [np.quantile(v[np.isfinite(v)], SHOWN) for v in series if np.isfinite(v).any()]
    low, high = (min(e[0] for e in ends), max(e[1] for e in ends)) if ends else (0.0, 1.0)
    pad = 0.05 * (high - low) or 0.05 * abs(high) or 0.05
    return low - pad, high + pad


def _parts(steps, values, count):
    """(x, smallest, mean, largest) of the finite values in each of `count` equal parts with any."""
    finite = np.isfinite(values)
    steps, values = steps[finite], values[finite]
    if not len(steps):
        return (np.empty(0),) * 4
    first, last = steps[0], steps[-1]
    part = np.minimum((steps - first) / max(last - first, 1) * count, count - 1).astype(int)
    starts = np.flatnonzero(np.diff(part, prepend=-1))
    counts = np.diff(np.append(starts, len(part)))
    return (
        np.add.reduceat(steps, starts) / counts,
        np.minimum.reduceat(values, starts),
        np.add.reduceat(values, starts) / counts,
        np.maximum.reduceat(values, starts),
    )


class _Axes:
    """The area of the curves on a canvas, with coordinates of steps and losses."""

    def __init__(self, canvas, across, upwards):
        self._canvas, self._draw = canvas, require("PIL.ImageDraw", "pillow").Draw(canvas)
        self._font = require("PIL.ImageFont", "pillow").load_default(13 * FINER)
        self._across, self._upwards = across, upwards
        self._left, self._right = LEFT * FINER, (WIDTH - RIGHT) * FINER
        self._top, self._bottom = TOP * FINER, (HEIGHT - BOTTOM) * FINER

    def _x(self, step):
        first, last = self._across
        return self._left + (step - first) / (last - first) * (self._right - self._left)

    def _y(self, value):
        low, high = self._upwards
        y = self._bottom - (value - low) / (high - low) * (self._bottom - self._top)
        return np.clip(y, self._top, self._bottom)

    def _points(self, x, y):
        return list(zip(self._x(x).tolist(), self._y(y).tolist(), strict=True))

    def _text(self, x, y, text, anchor, colour=BLACK):
        self._draw.text((x, y), text, colour, self._font, anchor)

    def draw(self):
        gap = 6 * FINER
        for value in ticks(*self._upwards):
            y = self._y(value)
            self._draw.line([(self._left, y), (self._right, y)], GREY, FINER)
            self._text(self._left - gap, y, f"{value:.6g}", "rm")
        for value in ticks(*self._across, count=8):
            if value == int(value):
                self._text(self._x(value), self._bottom + gap, f"{value:,.0f}", "mt")
        middle = (self._left + self._right) / 2
        self._text(middle, HEIGHT * FINER - gap, "step", "mb")

    def band(self, x, low, high, colour):
        if len(x) > 1:
            mask = require("PIL.Image", "pillow").new("L", self._canvas.size)
            outline = self._points(x, low) + self._points(x, high)[::-1]
            require("PIL.ImageDraw", "pillow").Draw(mask).polygon(outline, OPACITY)
            self._canvas.paste(colour, mask=mask)

    def line(self, x, y, colour):
        self._draw.line(self._points(x, y), colour, 2 * FINER, joint="curve")

    def legend(self, names):
        x, y = self._left, self._top / 2
        for name, colour in names:
            self._draw.line([(x, y), (x + 20 * FINER, y)], colour, 4 * FINER)
            x += 26 * FINER
            self._text(x, y, name, "lm")
            x += self._draw.textlength(name, self._font) + 24 * FINER
