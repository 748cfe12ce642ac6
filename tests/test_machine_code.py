"""What machine code of the products must look like: only so do they reach a GPU's rate.

On Hopper a wgmma of both operands in shared memory runs beside the loads and the other wgmmas of
its step. An operand that passes through registers makes each wait for the one before. On Ampere
every load needs an address, and a scheduler that computes addresses starts no multiplication.
"""

import dependent_launch
import pytest

pytest.importorskip("triton", reason="compiles Triton kernels")

from benchmarks.model.cost import GPUS, TENSOR_OVERHEAD, programs_per_multiprocessor
from benchmarks.model.machine_code import disassembled
from benchmarks.model.prediction import recorded

# Descriptors move multiples of 16 bytes; beside one of them latents, with 100 channels, are loaded
# 8 bytes at a time.
LEAST_CHANNELS = 4
# Two programs share a multiprocessor: half of its 64 Ki registers among 256 threads each.
MOST_REGISTERS = 128
# Of an A100, for the multiply-adds of one warp's instruction: 16 x 8 x 16, at a quarter of the 1024
# that a multiprocessor does in a cycle; longer by what the model assumes for every product.
CYCLES_OF_A_MULTIPLICATION = 8 * TENSOR_OVERHEAD

# The kernels of each of the others compile as long again.
OTHERS = ["dcgan-128", "conv-vae"]
MODELS = ["dcgan", *(pytest.param(model, marks=pytest.mark.exhaustive) for model in OTHERS)]

# What may come before a kernel waits: the stack's place is computed.
ARITHMETIC = {"VIADD", "IADD3", "MOV", "S2R", "S2UR", "CS2R", "UMOV"}


def products(model, architecture="sm_90"):
    """(launch, `Code`) of each product in half precision whose loads can all be asynchronous."""
    recording, codes = recorded(model, 128, architecture)
    for launch in recording.launches:
        arguments = launch.arguments
        if launch.name not in ("fprop", "dgrad", "wgrad"):
            continue
        if all(arguments[c] % LEAST_CHANNELS == 0 for c in ("C_small", "C_big")):
            yield launch, codes[launch.compiled]


@pytest.mark.parametrize("model", MODELS)
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


def test_two_products_in_one_kernel_multiply_from_where_operands_are():
    """The second product's first operand is the first one's result, in registers."""
    recording, codes = recorded("dcgan", 128, "sm_90")
    (launch,) = (one for one in recording.launches if one.name == "dgrad_wgrad_image")
    code, compiled = codes[launch.compiled], recording.code[launch.compiled]
    _, tile, step = code.regions
    assert (tile.source, step.source) == ("dgrad_wgrad_image.tile", "dgrad_wgrad_image.step")
    assert step.count("HGMMA") == launch.arguments["BLOCK_K"] // 16
    assert not step.waits_inside and step.loads == "asynchronous"
    assert not step.count("LDS", "LDSM", "STS", "SHFL")
    # All of the second in flight together, behind the wait for the last of the first.
    assert tile.count("HGMMA") == launch.arguments["BLOCK_N"] // 16
    assert tile.count("WARPGROUP.DEPBAR") == 2
    # Windows are stored once, 16 bytes at a time, and the gradient not at all.
    windows = 2 * launch.arguments["BLOCK_N"] * launch.arguments["BLOCK_E"]
    vectors = windows // (16 * 32 * compiled.warps)
    assert tile.widths("LDG") == {16: vectors} and tile.count("STS") == vectors
    assert code.layout_changes == 1  # y from shared memory to where the product's result is.
    assert not tile.count("STG", "UTMASTG") and code.spills == 0
    fitting = programs_per_multiprocessor(
        GPUS["h100"], code.registers, compiled.warps, compiled.shared
    )
    assert fitting == 3


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", ["dcgan"])
def test_products_by_pointers_multiply_for_longer_than_they_issue(model):
    found = [
        (launch, code)
        for launch, code in products(model, "sm_80")
        # What is not a multiple of 16 is loaded element by element.
        if launch.arguments["C_small"] % 16 == launch.arguments["C_big"] % 16 == 0
    ]
    assert {launch.name for launch, _ in found} == {"fprop", "dgrad", "wgrad"}
    for launch, code in found:
        assert not launch.arguments["DESCRIPTORS"], launch
        assert code.spills == 0, launch
        (loop,) = (region for region in code.regions[1:] if region.count("HMMA"))
        assert loop.loads == "asynchronous", launch
        # Copies of 16 bytes, and each byte of both operands once.
        a = launch.arguments
        copied = 2 * (a["BLOCK_M"] + a["BLOCK_N"]) * a["BLOCK_K"]
        assert loop.opcodes["LDGSTS.E.BYPASS.128"] == copied // (16 * 32 * a["num_warps"]), launch
        # Smaller tiles are for few channels, where memory decides.
        if a["BLOCK_M"] * a["BLOCK_N"] >= 64 * 64:
            assert loop.instructions < CYCLES_OF_A_MULTIPLICATION * loop.count("HMMA"), launch


def test_adam_moves_vectors_and_fits_four_times():
    """Beside vectors, the masked path of a last chunk moves single elements."""
    recording, codes = recorded("dcgan", 128, "sm_90")
    launches = [launch for launch in recording.launches if launch.name == "adam"]
    assert len(launches) == 2
    for launch in launches:
        code, compiled = codes[launch.compiled], recording.code[launch.compiled]
        (straight,) = code.regions
        # Gradient in float32, p, m and v; a gradient in half precision is 8 bytes of a thread, as
        # an address is.
        assert straight.widths("LDG")[16] == 4 and straight.widths("STG")[16] == 3, launch
        assert straight.widths("STG")[8] == 1, launch
        assert not straight.count("BAR") and compiled.shared == 0 and code.spills == 0, launch
        assert programs_per_multiprocessor(GPUS["h100"], code.registers, compiled.warps, 0) >= 4


@pytest.mark.parametrize("model", MODELS)
def test_every_kernel_of_a_step_waits_before_it_reaches_memory(model):
    """In PTX and in what the assembler made of it, where only constants are loaded earlier."""
    recording, _ = recorded(model, 128, "sm_90")
    for compiled in recording.code.values():
        facts = dependent_launch.facts_of(compiled.assembly)
        dependent_launch.check([facts | {"kernel": compiled.name}], "sm_90")
        instructions = disassembled(compiled).instructions
        names = [instruction.name for instruction in instructions]
        wait = names.index("ACQBULK")
        assert not instructions[wait].conditional, compiled.name
        assert set(names[:wait]) <= ARITHMETIC | {"LDC", "ULDC"}, (compiled.name, names[:wait])
        assert "PREEXIT" in names[wait:], compiled.name


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", ["dcgan", "conv-vae"])
def test_no_kernel_of_a_step_waits_on_ampere(model):
    recording, _ = recorded(model, 128, "sm_80")
    for compiled in recording.code.values():
        facts = dependent_launch.facts_of(compiled.assembly)
        dependent_launch.check([facts | {"kernel": compiled.name}], "sm_80")
