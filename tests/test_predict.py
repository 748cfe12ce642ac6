"""What chooses tiles: its instructions are those of machine code, and its choices make sense."""

from dataclasses import replace

import pytest

from genfast.launch import predict, tiles

MULTIPROCESSORS = predict.CHIPS["sm_90"].multiprocessors


def problem(operation, images, c_small=256, c_big=128, small=8):
    """A layer of a DCGAN-64 between its 4 x 4 maps and its images."""
    return tiles.Problem(
        operation=operation, precision="half", statistics=False, c_small=c_small, c_big=c_big,
        small=(small, small), big=(2 * small, 2 * small), kernel_size=(4, 4), stride=(2, 2),
        images=images,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gpu", "descriptors"),
    [("h100", True), pytest.param("a100", False, marks=pytest.mark.exhaustive)],
)
def test_instructions_are_about_those_of_machine_code(gpu, descriptors):
    pytest.importorskip("triton", reason="compiles Triton kernels")
    from benchmarks.model.prediction import predict as predictions

    checked = set()
    for cost in predictions("dcgan", 128, gpu):
        a = cost.launch.arguments
        if cost.launch.name not in ("fprop", "dgrad", "wgrad") or a["DESCRIPTORS"] != descriptors:
            continue
        if a["C_small"] % 16 or a["C_big"] % 16:  # Elements are loaded one by one.
            continue
        if a.get("HAS_BELOW"):  # The tile is chosen without what finishes a gradient.
            continue
        config = tiles.GemmConfig(
            a["BLOCK_M"], a["BLOCK_N"], a["BLOCK_K"], a["num_warps"], a["num_stages"], descriptors
        )
        like = problem(cost.launch.name, 128)
        like = replace(like, statistics=a.get("HAS_STATISTICS", False))
        if cost.launch.name == "wgrad":
            steps = a["tiles_per_split"]
        else:
            taps, depth = (16, "C_big") if cost.launch.name == "fprop" else (4, "C_small")
            steps = taps * a[depth] // a["BLOCK_K"]
        counted = cost.instructions / (cost.launch.programs * a["num_warps"])
        # Counted are both sides of a branch around statistics, of which whole tiles execute one.
        rel = 0.35 if like.statistics else 0.15
        assert predict._instructions(config, like, steps) == pytest.approx(counted, rel=rel), cost
        checked.add((cost.launch.name, like.statistics))
    # In a step every product forward has statistics, and every one backward finishes a gradient.
    assert checked == {("fprop", True), ("dgrad", True), ("wgrad", False)}


@pytest.mark.parametrize("operation", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("images", [128, 256, 1024])
def test_a_product_fills_the_chip(operation, images):
    layer = problem(operation, images)
    config = tiles.gemm_config("sm_90", layer)
    steps, programs = predict._shape(config, layer)
    if operation == "wgrad":
        parts = tiles.splits("sm_90", layer, config)
        assert parts <= steps
        programs *= parts
    # All but a twentieth, or several rounds.
    assert programs >= 0.95 * MULTIPROCESSORS


@pytest.mark.parametrize("images", [1, 2, 7, 31, 32, 97, 1000, 2047, 2048, 4096])
@pytest.mark.parametrize("architecture", ["sm_80", "sm_86", "sm_90", "sm_120", "gfx942", "gfx90a"])
def test_any_batch_has_a_tile(architecture, images):
    for operation in ("fprop", "dgrad", "wgrad"):
        layer = problem(operation, images)
        config = tiles.gemm_config(architecture, layer)
        assert config in tiles.shipped(architecture, "half")
        if operation == "wgrad":
            assert tiles.splits(architecture, layer, config) >= 1


def test_more_work_is_never_predicted_to_take_less():
    chip = predict.chip("sm_90")
    for operation in ("fprop", "dgrad", "wgrad"):
        for config in tiles.shipped("sm_90", "half"):
            config = replace(config, splits=1)
            times = [
                predict.cycles(config, problem(operation, images), chip)
                for images in (16, 64, 256, 1024, 4096)
            ]
            assert times == sorted(times)


def test_a_reduction_is_cut_only_where_that_pays():
    chip = predict.chip("sm_90")
    tile = tiles.shipped("sm_90", "half")[0]
    # 128 programs for 132 multiprocessors: parts would only be written and added.
    assert predict.splits(tile, problem("wgrad", 128, 512, 256, 4), chip) == 1
    # 32 programs leave most multiprocessors idle, but are done before parts would be added.
    assert predict.splits(tile, problem("wgrad", 16), chip) == 1
    # 16 programs, each with a long way to go.
    assert predict.splits(tile, problem("wgrad", 128, 128, 64, 16), chip) >= 6


def test_splits_that_were_timed_are_kept():
    tile = replace(tiles.shipped("sm_90", "half")[0], splits=5)
    assert tiles.splits("sm_90", problem("wgrad", 128), tile) == 5
