"""Tile shapes: which are shipped for which architecture, and how one is chosen for a problem."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GemmConfig:
    """How one implicit matrix product is tiled.

    block_m, block_n, block_k: the tile in the product's own M, N and K.
    num_warps, num_stages: of the compiled kernel.
    descriptors: load and store through tensor descriptors where geometry and alignment allow.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool


# Small enough that a test's few pixels and channels span several ragged tiles.
_INTERPRETED = (GemmConfig(64, 32, 32, 1, 1, True),)

# Two-byte and four-byte elements, widest tile first. The Hopper figures are from compiling (no
# spills, wgmma, TMA), not yet from timing. Ampere-class shared memory (99 KiB on sm_86) bounds the
# pointer tiles' stages; a gfx942 compute unit has 64 KiB.
_SHIPPED = {
    "sm_90": {
        2: (
            GemmConfig(128, 128, 64, 8, 4, True),
            GemmConfig(128, 64, 64, 4, 4, True),
            GemmConfig(64, 32, 64, 4, 4, True),
            GemmConfig(64, 16, 64, 4, 4, True),
        ),
        4: (
            GemmConfig(128, 64, 32, 8, 3, True),
            GemmConfig(64, 32, 32, 4, 3, True),
            GemmConfig(64, 16, 32, 4, 3, True),
        ),
    },
    "sm_80": {
        2: (
            GemmConfig(128, 128, 32, 8, 4, False),
            GemmConfig(128, 64, 32, 4, 4, False),
            GemmConfig(64, 32, 32, 4, 4, False),
            GemmConfig(64, 16, 32, 4, 4, False),
        ),
        4: (
            GemmConfig(64, 64, 32, 4, 3, False),
            GemmConfig(64, 32, 32, 4, 3, False),
            GemmConfig(64, 16, 32, 4, 3, False),
        ),
    },
    "gfx942": {
        2: (
            GemmConfig(128, 128, 32, 8, 2, False),
            GemmConfig(128, 64, 32, 4, 2, False),
            GemmConfig(64, 32, 32, 4, 2, False),
            GemmConfig(64, 16, 32, 4, 2, False),
        ),
        4: (
            GemmConfig(64, 64, 32, 4, 2, False),
            GemmConfig(64, 32, 32, 4, 2, False),
            GemmConfig(64, 16, 32, 4, 2, False),
        ),
    },
}
# Where channels are not a multiple of 16, every element is addressed, loaded and stored on its own:
# small tiles and many warps, or the addresses alone fill the registers.
_SCATTERED = (
    GemmConfig(64, 64, 32, 8, 2, False),
    GemmConfig(64, 32, 32, 8, 2, False),
    GemmConfig(64, 16, 32, 4, 2, False),
)
# Data-centre Blackwell starts from Hopper's tiles.
_SHIPPED["sm_100"] = _SHIPPED["sm_90"]


def shipped(architecture, itemsize, scattered=False):
    """The configurations of an architecture for elements of `itemsize` bytes, widest tile first."""
    if architecture == "interpreter":
        return _INTERPRETED
    if scattered:
        return _SCATTERED
    if architecture in _SHIPPED:
        return _SHIPPED[architecture][itemsize]
    # Consumer Blackwell, Ada and older have Ampere's shared memory; other AMD chips CDNA3's.
    family = "gfx942" if architecture.startswith("gfx") else "sm_80"
    return _SHIPPED[family][itemsize]


def gemm_config(architecture, itemsize, m, n, scattered):
    """The configuration for an m x n product: no wider than its columns and rows need.

    Args:
        architecture: "sm_90", "gfx942" and so on, or "interpreter".
        itemsize: bytes of an operand's element.
        m, n: rows and columns of the product.
        scattered: whether a number of channels is not a multiple of 16.
    """
    candidates = shipped(architecture, itemsize, scattered)
    for config in candidates:
        if config.block_n <= max(n, 16) and config.block_m <= max(m, 64):
            return config
    return candidates[-1]
