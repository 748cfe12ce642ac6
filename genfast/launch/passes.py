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


def shares(tensor, count, channel_tiles, each):
    """How programs share `count` tiles of pixels, `each` of them on every multiprocessor.

    Args:
        tensor: as for `programs`.
        channel_tiles: the grid's first axis, whose programs share the pixels alike.

    Returns:
        How many programs do, and the arguments that `kernels.from_image.share` takes.
    """
    sharing = min(count, tiles.ceil_div(programs(tensor, each), channel_tiles))
    return sharing, dict(tiles_per_program=count // sharing, one_more=count % sharing)


def elementwise(x, groups, planes=False, tiles_read=1):
    """Grid, and arguments that say what lies where, for one pass over groups of [rows, C].

    Args:
        x: NHWC, or with `planes` NCHW; dense.
        groups: equal parts of the batch.
        tiles_read: of how many tiles of another tensor a tile of x is made.
    """
    channels = x.shape[1] if planes else x.shape[3]
    count = x.numel() // (channels * groups)
    pixels = x.numel() // (x.shape[0] * channels)
    if planes:
        # Along the pixels of a channel memory is contiguous, and from one channel to the next.
        block_r, block_c = (32, 16) if INTERPRETING else (512, 64)
        block_r = min(block_r, max(16, tiles.power_of_two(pixels)))
        # Elements that are loaded one by one have an address each, which fill the registers.
        elements = (2048 if pixels % 4 else 4096) // tiles_read
        block_c = min(block_c, elements // block_r, tiles.power_of_two(channels))
        rows_of_tiles = count // pixels * tiles.ceil_div(pixels, block_r)
    else:
        block_c = min(64, tiles.power_of_two(channels))
        block_r = 64 if INTERPRETING else 4096 // tiles_read // block_c
        if 1 < groups == x.shape[0]:  # Of whole images a batch does not change the rows.
            block_r = min(block_r, max(16, tiles.power_of_two(pixels)))
        rows_of_tiles = tiles.ceil_div(count, block_r)
    grid = (rows_of_tiles, tiles.ceil_div(channels, block_c), groups)
    return grid, dict(
        rows=count,
        channels=channels,
        pixels=pixels if planes else 1,
        PLANES=planes,
        BLOCK_R=block_r,
        BLOCK_C=block_c,
    )


def parts_of_pass(x, grid):
    """In how many parts a reduction over the tiles of `elementwise` keeps a GPU busy."""
    count, *others = grid
    return min(count, max(1, programs(x, 4) // math.prod(others)))


def rows(x):
    """A tensor as a matrix: its first dimension, which a batch can change, and what a row has."""
    count = max(1, x.shape[0]) if x.dim() else 1
    return count, x.numel() // count
