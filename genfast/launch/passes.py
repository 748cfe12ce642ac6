"""How many programs fill a GPU, and the grids of passes over memory."""

import math

from genfast.backend import INTERPRETING
from genfast.launch import predict, start, tiles


def programs(tensor, each):
    """How many programs fill the GPU that a tensor is on, `each` on every multiprocessor.

    All grids whose programs share work are sized by it. It follows the architecture and not the
    card, so that sums over parts are added in one order on all cards of an architecture.
    """
    return each * predict.chip(start.architecture(tensor)).multiprocessors


def elementwise(x, groups):
    """Grid, rows of a group and tile for one pass over an NHWC tensor as groups of [rows, C]."""
    channels = x.shape[3]
    block_c = min(64, tiles.power_of_two(channels))
    block_r = 64 if INTERPRETING else 4096 // block_c
    rows = x.numel() // (channels * groups)
    grid = (tiles.ceil_div(rows, block_r), tiles.ceil_div(channels, block_c), groups)
    return grid, rows, dict(BLOCK_R=block_r, BLOCK_C=block_c)


def parts_of_pass(x, grid):
    """In how many parts a reduction over the tiles of `elementwise` keeps a GPU busy."""
    count, *others = grid
    return min(count, max(1, programs(x, 4) // math.prod(others)))


def rows(x):
    """A tensor as a matrix: its first dimension, which a batch can change, and what a row has."""
    count = max(1, x.shape[0]) if x.dim() else 1
    return count, x.numel() // count
