"""Tile shapes: which are shipped for which architecture, and how one is chosen for a problem.

What was timed on a GPU, by `python -m benchmarks.gpu`, is in tuned.csv, one line a problem; all
else is chosen by size from the tables below, unless `first_use` times it.
"""

import csv
import functools
import math
import operator
from dataclasses import dataclass, fields, replace
from pathlib import Path

from genfast.launch import predict

TUNED = Path(__file__).with_name("tuned.csv")


@dataclass(frozen=True)
class GemmConfig:
    """How one implicit matrix product is computed.

    block_m, block_n, block_k: the tile in the product's own M, N and K: see kernels/conv.py.
    num_warps, num_stages: of the compiled kernel.
    descriptors: load and store through tensor descriptors where geometry and alignment allow.
    splits: in how many parts wgrad's long reduction is cut; 0 leaves it to `predict.splits`.
    library: leave the product to PyTorch's own convolution, where that was or must be faster; what
        surrounds it stays ours. The other fields then mean nothing.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool
    splits: int = 0
    library: bool = False


LIBRARY = GemmConfig(0, 0, 0, 0, 0, False, library=True)


@dataclass(frozen=True)
class Problem:
    """One product, in the terms that decide which tile is fast.

    operation: "fprop", "dgrad" or "wgrad".
    precision: "half", or how a product of float32 rounds: "tf32" or "ieee". Float64, which only
        the interpreter takes, counts as "ieee".
    statistics: whether it emits batch statistics.
    c_small, c_big, small, big, kernel_size, stride: the convolution's channels and sizes (height,
        width), as in kernels/conv.py.
    images: of the batch.
    """

    operation: str
    precision: str
    statistics: bool
    c_small: int
    c_big: int
    small: tuple[int, int]
    big: tuple[int, int]
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    images: int

    @property
    def itemsize(self):
        """Bytes of an operand's element."""
        return 2 if self.precision == "half" else 4

    @property
    def taps(self):
        """How many weights a pair of channels has."""
        return math.prod(self.kernel_size)

    @property
    def rows(self):
        """M: channels."""
        return self.c_big if self.operation == "dgrad" else self.c_small

    @property
    def columns(self):
        """N: pixels, of one phase for dgrad; for wgrad channels."""
        if self.operation == "wgrad":
            return self.c_big
        size = self.small
        if self.operation == "dgrad":
            size = (-(-n // s) for n, s in zip(self.big, self.stride, strict=True))
        return self.images * math.prod(size)

    @property
    def bytes(self):
        """Of both operands and the result, each moved once."""
        big = self.images * self.c_big * math.prod(self.big)
        small = self.images * self.c_small * math.prod(self.small)
        return self.itemsize * (big + small + self.c_small * self.c_big * self.taps)

    @property
    def scattered(self):
        """Whether elements must be addressed one by one."""
        packed = self.c_big < 16 and self.taps > 1  # Taps and channels in one axis.
        return packed or self.c_small % LEAST_VECTOR > 0 or self.c_big % LEAST_VECTOR > 0

    @property
    def key(self):
        """Everything but the batch."""
        return tuple(value for name, value in vars(self).items() if name != "images")


# Elements loaded or stored together: of fewer, a tile's addresses alone fill the registers.
LEAST_VECTOR = 4
# From how many images on, and which batches stand for all of them.
_BATCHES = ((2048, (2048, 8192)), (32, (32, 64, 128, 256)), (8, (8, 16)), (1, (1, 4)))

# Small enough that a test's few pixels and channels span several ragged tiles.
_INTERPRETED = (GemmConfig(64, 32, 32, 1, 1, True),)

# By precision. From compiling, not yet from timing: no spills, and on Hopper TMA, wgmma with both
# operands in shared memory, and at most 128 registers where two programs share a multiprocessor.
# Ampere-class shared memory (99 KiB on sm_86) bounds the pointer tiles' stages; a gfx942 compute
# unit has 64 KiB.
# NVIDIA's tensor cores multiply no float32 unrounded. Their "ieee" tile is the widest without
# spills: 128x64x32 has 255 registers and 300 bytes, and 64x32x32 with 4 warps 296 in wgrad.
_SHIPPED = {
    "sm_90": {
        "half": (
            GemmConfig(128, 128, 64, 8, 3, True),
            GemmConfig(64, 128, 64, 4, 4, True),
            GemmConfig(128, 64, 64, 4, 4, True),
            GemmConfig(64, 64, 64, 4, 4, True),
            GemmConfig(64, 32, 64, 4, 4, True),
        ),
        "tf32": (
            GemmConfig(128, 64, 32, 8, 3, True),
            GemmConfig(64, 64, 32, 4, 3, True),
            GemmConfig(64, 32, 32, 4, 3, True),
        ),
        "ieee": (GemmConfig(64, 32, 32, 8, 3, True),),
    },
    "sm_80": {
        "half": (
            GemmConfig(128, 128, 32, 8, 4, False),
            GemmConfig(64, 128, 32, 4, 4, False),
            GemmConfig(128, 64, 32, 4, 4, False),
            GemmConfig(64, 64, 32, 4, 4, False),
            GemmConfig(32, 64, 32, 4, 4, False),
        ),
        "tf32": (
            GemmConfig(64, 64, 32, 4, 3, False),
            GemmConfig(64, 32, 32, 4, 3, False),
            GemmConfig(32, 64, 32, 4, 3, False),
        ),
        "ieee": (GemmConfig(64, 32, 32, 8, 3, False),),
    },
    "gfx942": {
        "half": (
            GemmConfig(128, 128, 32, 8, 2, False),
            GemmConfig(64, 128, 32, 4, 2, False),
            GemmConfig(64, 64, 32, 4, 2, False),
            GemmConfig(32, 64, 32, 4, 2, False),
        ),
        "ieee": (
            GemmConfig(64, 64, 32, 4, 2, False),
            GemmConfig(64, 32, 32, 4, 2, False),
            GemmConfig(32, 64, 32, 4, 2, False),
        ),
    },
}
# Where every element is addressed, loaded and stored on its own: small tiles and many warps, or the
# addresses alone fill the registers. Ordered by rows.
_SCATTERED = {
    "half": (
        GemmConfig(64, 64, 32, 8, 2, False),
        GemmConfig(32, 32, 32, 4, 2, False),
        GemmConfig(16, 64, 32, 4, 2, False),
    ),
    "tf32": (
        GemmConfig(64, 64, 32, 8, 2, False),
        GemmConfig(32, 32, 32, 4, 2, False),
        GemmConfig(16, 32, 32, 4, 2, False),
    ),
    "ieee": (
        GemmConfig(64, 32, 16, 8, 2, False),
        GemmConfig(32, 64, 16, 8, 2, False),
    ),
}
# Data-centre Blackwell starts from Hopper's tiles.
_SHIPPED["sm_100"] = _SHIPPED["sm_90"]


def precisions(architecture):
    """What the `precision` of a product can be on an architecture."""
    return tuple(_SHIPPED[family(architecture)])


def shipped(architecture, precision, scattered=False):
    """The configurations of an architecture for a `Problem`'s precision."""
    if architecture == "interpreter":
        return _INTERPRETED
    if scattered:
        scalar = _without_matrix_units(architecture, precision)
        return _SCATTERED["tf32" if precision == "ieee" and not scalar else precision]
    return _SHIPPED[family(architecture)][precision]


def family(architecture):
    """The architecture whose tiles this one takes: itself, where it has some of its own."""
    if architecture in _SHIPPED:
        return architecture
    # Consumer Blackwell, Ada and older have Ampere's shared memory; other AMD chips CDNA3's.
    return "gfx942" if architecture.startswith("gfx") else "sm_80"


def _without_matrix_units(architecture, precision):
    return precision == "ieee" and architecture.startswith("sm_")


@functools.cache
def gemm_config(architecture, problem):
    """The configuration for a `Problem`.

    The one that was fastest for it, or for the batch nearest in size, where it was timed;
    otherwise the library's where no matrix unit helps, else the one that is predicted to take least
    time. Unaligned channels are at the ends of networks, where memory decides and not arithmetic.

    Args:
        architecture: "sm_90", "gfx942" and so on, or "interpreter".
        problem: a `Problem`.
    """
    timed = tuned(architecture).get(problem.key)
    if timed:
        return timed[nearest(timed, problem.images)]
    return ranked(architecture, problem)[0]


@functools.cache
def ranked(architecture, problem):
    """The configurations for a `Problem` that is not in the table, best first: a tuple."""
    candidates = shipped(architecture, problem.precision, problem.scattered)
    if problem.scattered:
        fitting = tuple(c for c in candidates if c.block_m < 2 * problem.rows)
        return fitting or candidates[-1:]
    if _without_matrix_units(architecture, problem.precision):
        return LIBRARY, *candidates
    chip = predict.chip(architecture)
    likes = [replace(problem, images=images) for images in _like(problem.images)]
    times = {c: [predict.cycles(c, like, chip) for like in likes] for c in candidates}
    best = list(map(min, zip(*times.values(), strict=True)))
    # By how many times as long as the best of each batch it takes.
    return tuple(sorted(times, key=lambda c: sum(map(operator.truediv, times[c], best))))


@functools.cache
def splits(architecture, problem, config):
    """In how many parts a configuration cuts wgrad's reduction: see `predict.splits`."""
    if config.splits:
        return config.splits
    like = replace(problem, images=representative(problem.images))
    return predict.splits(config, like, predict.chip(architecture))


def representative(images):
    """A batch that stands for all that share tiles with one of so many images."""
    batches = _like(images)
    return batches[len(batches) // 2]


def nearest(batches, images):
    """Of some batches, the one that is least times as large or as small; None of none."""
    return min(batches, key=lambda n: abs(math.log(n / images)), default=None)


def _like(images):
    """Batches, among them the one of so many images, that share their tiles.

    The last batch of an epoch is smaller, and a tile of its own would be compiled for it alone.
    """
    return next(batches for first, batches in _BATCHES if images >= first)


@functools.cache
def tuned(architecture):
    """What was timed: {a problem's key: {images: the fastest configuration}}."""
    found = {}
    for where, problem, config in read_tuned():
        if where == architecture:
            found.setdefault(problem.key, {})[problem.images] = config
    return found


def read_tuned():
    """The rows of tuned.csv: a list of (architecture, `Problem`, `GemmConfig`)."""
    if not TUNED.exists():
        return []
    with open(TUNED, newline="", encoding="utf-8") as file:
        return [
            (row["architecture"], from_row(Problem, row), from_row(GemmConfig, row))
            for row in csv.DictReader(file)
        ]


def write_tuned(rows):
    """Write tuned.csv: rows of (architecture, `Problem`, `GemmConfig`)."""
    with open(TUNED, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        names = (*Problem.__dataclass_fields__, *GemmConfig.__dataclass_fields__)
        writer.writerow(("architecture", *names))
        for architecture, problem, config in rows:
            facts = vars(problem) | vars(config)
            writer.writerow((architecture, *(written(facts[name]) for name in names)))


def written(value):
    """A field's value as text: see `from_row`."""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return int(value) if isinstance(value, bool) else value


def from_row(kind, row):
    """A `Problem` or `GemmConfig`, the kind, from a dict of its fields as text."""
    return kind(**{f.name: _READ[f.type](row[f.name]) for f in fields(kind)})


# How a field of each type reads from text.
_READ = {
    int: int,
    str: str,
    bool: lambda text: bool(int(text)),
    tuple[int, int]: lambda text: tuple(map(int, text.split("x"))),
}


def box(pixels, height, width):
    """[n, h, w] powers of two with product `pixels`, no wider and higher than an image needs."""
    w = min(pixels, power_of_two(width))
    h = min(pixels // w, power_of_two(height))
    return pixels // (h * w), h, w


def pixel_tiles(size, block, box):
    if box is None:
        return ceil_div(math.prod(size), block)
    return math.prod(map(ceil_div, size, box))


def ceil_div(a, b):
    return -(-a // b)


def power_of_two(n):
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
