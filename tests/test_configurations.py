"""Every shipped tile computes the right numbers: a tile that compiles may still be wrong."""

import dataclasses

import pytest
import torch
from cases import Case, Geometry
from oracle import assert_block

from genfast import launch

pytest.importorskip("triton", reason="the tiles are those of Triton kernels")
pytestmark = pytest.mark.kernels

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
EVEN = Geometry(2, 2, 0, big=(16, 8), small=(8, 4))  # few taps: the tile is what is tested
ODD = Geometry(3, 2, 1, big=(15, 7), small=(8, 4))
BATCH = 5  # 160 pixels of the small side: more than the largest tile's rows, and a ragged end


def shipped(scattered):
    """The shipped tiles, each once, with a dtype that it is shipped for."""
    found = {}
    for architecture in ARCHITECTURES:
        for dtype in (torch.bfloat16, torch.float32):
            for config in launch.configs.shipped(architecture, dtype.itemsize, scattered):
                # Warps and stages mean nothing to the interpreter; a GPU has one architecture.
                tile = dataclasses.replace(config, num_warps=4, num_stages=2)
                found.setdefault(tile, (config, dtype))
    return list(found.values())


def describe(value):
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if dataclasses.is_dataclass(value):
        loader = "descriptors" if value.descriptors else "pointers"
        return f"{value.block_m}x{value.block_n}x{value.block_k}-{loader}"
    return "transposed" if value else "conv"


@pytest.fixture
def loaders(monkeypatch):
    """The loaders of the products that were started: True for descriptors."""
    seen = set()
    start = launch._start

    def recording(kernel, grid, **arguments):
        if "DESCRIPTORS" in arguments:
            seen.add(arguments["DESCRIPTORS"])
        start(kernel, grid, **arguments)

    monkeypatch.setattr(launch, "_start", recording)
    return seen


@pytest.mark.parametrize("transposed", (False, True), ids=describe)
@pytest.mark.parametrize(("config", "dtype"), shipped(scattered=False), ids=describe)
def test_shipped_tile(config, dtype, transposed, device, loaders, monkeypatch):
    monkeypatch.setattr(launch.configs, "gemm_config", lambda *_: config)
    # Descriptors ask for whole tiles of the big side's channels; the small side's end inside one.
    c_big = max(config.block_n, config.block_k)
    channels = (c_big + 8, c_big) if transposed else (c_big, c_big + 8)
    case = Case(transposed, EVEN, channels, BATCH, dtype, weight_layout="channels_last")
    assert_block(case, device)
    assert loaders == {config.descriptors}


@pytest.mark.parametrize("transposed", (False, True), ids=describe)
@pytest.mark.parametrize(("config", "dtype"), shipped(scattered=True), ids=describe)
def test_tile_for_unaligned_channels(config, dtype, transposed, device, monkeypatch):
    monkeypatch.setattr(launch.configs, "gemm_config", lambda *_: config)
    for c_big in (3, config.block_n + 3):
        channels = (37, c_big) if transposed else (c_big, 37)
        assert_block(Case(transposed, ODD, channels, BATCH, dtype), device)
