"""What Hopper's machine code of the products must look like: only so do they reach its rate.

A wgmma of both operands in shared memory runs beside the loads and the other wgmmas of its step. An
operand that passes through registers makes each wait for the one before.
"""

import pytest

pytest.importorskip("triton", reason="compiles Triton kernels")

from benchmarks.model.prediction import recorded

# Descriptors move multiples of 16 bytes; beside one of them latents, with 100 channels, are loaded
# 8 bytes at a time.
LEAST_CHANNELS = 4
# Two programs share a multiprocessor: half of its 64 Ki registers among 256 threads each.
MOST_REGISTERS = 128


def products(model):
    """(launch, `Code`) of each product in half precision whose loads can all be asynchronous."""
    recording, codes = recorded(model, 128, "sm_90")
    for launch in recording.launches:
        arguments = launch.arguments
        if launch.name not in ("fprop", "dgrad", "wgrad"):
            continue
        if all(arguments[c] % LEAST_CHANNELS == 0 for c in ("C_small", "C_big")):
            yield launch, codes[launch.compiled]


@pytest.mark.parametrize("model", ["dcgan", "dcgan-128", "conv-vae"])
def test_products_multiply_from_shared_memory(model):
    found = list(products(model))
    assert {launch.name for launch, _ in found} == {"fprop", "dgrad", "wgrad"}
    for launch, code in found:
        assert launch.arguments["DESCRIPTORS"], launch
        assert code.layout_changes == 0, launch
        assert code.spills == 0, launch
        if launch.arguments["num_warps"] == 8:
            assert code.registers <= MOST_REGISTERS, launch
        (loop,) = (region for region in code.regions[1:] if region.count("HGMMA"))
        rows = launch.arguments["BLOCK_M"] // (16 * launch.arguments["num_warps"])
        assert loop.count("HGMMA") == rows * launch.arguments["BLOCK_K"] // 16, launch
        assert not loop.waits_inside, launch
        assert loop.loads == "asynchronous", launch
