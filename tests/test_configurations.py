"""Every shipped tile computes the right numbers: a tile that compiles may still be wrong."""

import dataclasses

import pytest
import torch
from cases import Case, Geometry
from oracle import assert_block, evaluate

from benchmarks.gpu.problems import recorded
from benchmarks.gpu.tuning import candidates
from genfast.launch import start, tiles

pytest.importorskip("triton", reason="the tiles are those of Triton kernels")
pytestmark = pytest.mark.kernels

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
EVEN = Geometry(2, 2, 0, big=(16, 8), small=(8, 4))  # few taps: the tile is what is tested
ODD = Geometry((3, 2), 2, (1, 0), big=(15, 8), small=(8, 4))
BATCH = 5  # 160 pixels of the small side: more than the largest tile's rows, and a ragged end


def shipped(scattered):
    """The shipped tiles, each once, with a dtype that it is shipped for; every second transposed.

    Both layers run all three products.
    """
    found = {}
    for architecture in ARCHITECTURES:
        for precision in tiles.precisions(architecture):
            dtype = torch.bfloat16 if precision == "half" else torch.float32
            for config in tiles.shipped(architecture, precision, scattered):
                # Warps and stages mean nothing to the interpreter; a GPU has one architecture.
                tile = dataclasses.replace(config, num_warps=4, num_stages=2)
                found.setdefault(tile, (config, dtype))
    return [(*value, i % 2 > 0) for i, value in enumerate(found.values())]


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
    run = start.kernel

    def recording(kernel, grid, **arguments):
        if "DESCRIPTORS" in arguments:
            seen.add(arguments["DESCRIPTORS"])
        run(kernel, grid, **arguments)

    monkeypatch.setattr(start, "kernel", recording)
    return seen


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("config", "dtype", "transposed"), shipped(False), ids=describe)
def test_shipped_tile(config, dtype, transposed, device, loaders, monkeypatch):
    monkeypatch.setattr(tiles, "gemm_config", lambda *_: config)
    # Descriptors ask for whole tiles of the big side's channels; the small side's end inside one.
    c_big = max(config.block_n, config.block_k)
    channels = (c_big + 8, c_big) if transposed else (c_big, c_big + 8)
    case = Case(transposed, EVEN, channels, BATCH, dtype, weight_layout="channels_last")
    assert_block(case, device)
    assert loaders == {config.descriptors}


@pytest.mark.one_in(2)
@pytest.mark.parametrize(("config", "dtype", "transposed"), shipped(True), ids=describe)
def test_tile_for_unaligned_channels(config, dtype, transposed, device, monkeypatch):
    monkeypatch.setattr(tiles, "gemm_config", lambda *_: config)
    # Of an image, packed, or more than a tile has.
    channels = (37, config.block_n + 3) if transposed else (3, 37)
    assert_block(Case(transposed, ODD, channels, BATCH, dtype), device)


def problem(images, **changes):
    """The second layer of a DCGAN-64's discriminator."""
    facts = dict(
        operation="fprop", precision="half", statistics=True, c_small=128, c_big=64, small=(16, 16),
        big=(32, 32), kernel_size=(4, 4), stride=(2, 2),
    )  # fmt: skip
    return tiles.Problem(**facts | changes, images=images)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of two timed batches of one problem, written and read anew."""
    monkeypatch.setattr(tiles, "TUNED", tmp_path / "tuned.csv")
    small = tiles.GemmConfig(64, 64, 32, 4, 3, True)
    large = tiles.GemmConfig(128, 256, 64, 8, 3, False, splits=3, library=True)
    timed = [("sm_90", problem(128), small), ("sm_90", problem(1024), large)]
    tiles.write_tuned(timed)
    tiles.tuned.cache_clear()
    tiles.gemm_config.cache_clear()
    yield small, large
    tiles.tuned.cache_clear()
    tiles.gemm_config.cache_clear()


def test_the_nearest_timed_batch_decides(table):
    small, large = table
    for images, expected in ((1, small), (128, small), (300, small), (500, large), (4096, large)):
        assert tiles.gemm_config("sm_90", problem(images)) == expected


@pytest.mark.parametrize(
    "changes",
    [
        dict(operation="dgrad"),
        dict(precision="tf32"),
        dict(statistics=False),
        dict(c_small=256),
        dict(big=(33, 33)),
        dict(stride=(1, 2)),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_another_problem_is_chosen_by_size(table, changes):
    config = tiles.gemm_config("sm_90", problem(128, **changes))
    assert config in tiles.shipped("sm_90", changes.get("precision", "half"))


def test_another_architecture_is_chosen_by_size(table):
    config = tiles.gemm_config("sm_80", problem(128))
    assert config in tiles.shipped("sm_80", "half")


@pytest.mark.parametrize("operation", ("fprop", "dgrad", "wgrad"))
@pytest.mark.parametrize("architecture", ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"))
def test_float32_without_tensor_cores_is_the_librarys(architecture, operation):
    unrounded = problem(128, operation=operation, precision="ieee")
    assert tiles.gemm_config(architecture, unrounded).library
    tile, *others = tiles.shipped(architecture, "ieee")
    assert (tile.block_m, tile.block_n, tile.block_k, others) == (64, 32, 32, [])
    assert tile in candidates(unrounded)
    for precision in ("half", "tf32"):
        rounded = problem(128, operation=operation, precision=precision)
        assert not tiles.gemm_config(architecture, rounded).library
    ends = problem(128, operation=operation, precision="ieee", c_big=3)
    chosen = tiles.gemm_config(architecture, ends)
    assert chosen in tiles.shipped(architecture, "ieee", scattered=True)


def test_amd_multiplies_float32_itself():
    for precision in tiles.precisions("gfx942"):
        chosen = tiles.gemm_config("gfx942", problem(128, precision=precision))
        assert chosen in tiles.shipped("gfx942", precision)


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("dtype", "setting", "precision"),
    [
        (torch.bfloat16, "tf32", "half"),
        (torch.float16, "ieee", "half"),
        (torch.float32, "tf32", "tf32"),
        (torch.float32, "ieee", "ieee"),
        (torch.float32, "none", "ieee"),
    ],
)
def test_a_problem_knows_how_its_products_round(
    dtype, setting, precision, device, round_convolutions
):
    round_convolutions(setting)
    case = Case(False, EVEN, (8, 8), 1, dtype)
    with recorded() as problems:
        evaluate(case.fused, case, case.tensors(device))
    assert {p.precision for p in problems} == {precision}
    assert {p.itemsize for p in problems} == {dtype.itemsize}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_tile_is_wider_than_needed(architecture):
    narrow = tiles.gemm_config(architecture, problem(64, operation="dgrad", c_big=3))
    assert narrow.block_m == 16
    few = tiles.gemm_config(architecture, problem(1, small=(1, 1), big=(2, 2)))
    assert few.block_n <= 64
