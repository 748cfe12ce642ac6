"""Where a kernel goes on with what it stores, it goes on with the values as they are stored."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import assert_stable_statistics

pytest.importorskip("triton", reason="it is about Triton kernels")

import triton
import triton.language as tl
from genfast.kernels.rounding import rounded

from genfast.geometry import ConvGeometry
from genfast.kernels import rounding
from genfast.launch import conv, norm, start
from genfast.launch.epilogue import Epilogue

pytestmark = pytest.mark.kernels

HALF = [torch.bfloat16, torch.float16]
# How a compiled kernel rounds to nearest, ties to even. CDNA3 has no instruction for bfloat16:
# there it is integer arithmetic, with this constant for just under half of the last bit.
CONVERSION = {
    ("sm_80", torch.bfloat16): "cvt.rn.bf16",
    ("sm_90", torch.bfloat16): "cvt.rn.bf16",
    ("sm_80", torch.float16): "cvt.rn.f16",
    ("sm_90", torch.float16): "cvt.rn.f16",
    ("gfx942", torch.bfloat16): "0x7fff",
    ("gfx942", torch.float16): "v_cvt_f16_f32",
}
SPECIAL = [0.0, -0.0, float("inf"), -float("inf"), float("nan")]


@triton.jit
def round_all(x_ptr, y_ptr, length, STORED_DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """y = x rounded to STORED_DTYPE, both of x's dtype. Grid: (tiles of length,)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < length, other=0.0)
    tl.store(y_ptr + i, rounded(x, STORED_DTYPE), mask=i < length)


def bits_that_decide():
    """float32 values: specials, any bits at all, and ties of both half-precision formats."""
    any_bits = torch.randint(-(2**31), 2**31, (1 << 14,), dtype=torch.int64).to(torch.int32)
    # The last kept bit is bit 16 (bfloat16) or bit 13 (float16): a tie and its two neighbours.
    ties = [
        any_bits >> (kept) << (kept) | (1 << (kept - 1)) + near
        for kept in (16, 13)
        for near in (-1, 0, 1)
    ]
    # Where float16 has normal values, subnormal ones, and the first that are too large.
    ranges = torch.cat([torch.rand(1 << 12) * 10.0**e for e in (0, 5, -5, -8)])
    values = torch.cat([any_bits, *ties]).view(torch.float32)
    largest = torch.tensor([65504.0, 65519.996, 65520.0, 3.3895314e38, 3.4028235e38])
    return torch.cat([torch.tensor(SPECIAL), largest, -largest, ranges, -ranges, values])


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # What becomes infinite.
@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_as_pytorch_rounds(dtype, device):
    x = bits_that_decide().to(device)
    y = torch.empty_like(x)
    tiles = triton.cdiv(x.numel(), 1024)
    stored = start.tl_dtype(dtype)
    start.kernel(
        round_all, (tiles,), x_ptr=x, y_ptr=y, length=x.numel(), STORED_DTYPE=stored, BLOCK=1024
    )
    expected = x.to(dtype).float()
    number = ~expected.isnan()
    assert torch.equal(y.isnan(), expected.isnan())
    # As bits, for the sign of 0.
    assert torch.equal(y[number].view(torch.int32), expected[number].view(torch.int32))


def compile_all():
    """Print as JSON the assembly of `round_all`, for a process in which nothing is interpreted."""
    from benchmarks.model.recording import Recorder

    x, found = torch.empty(4096), []
    for architecture, dtype in CONVERSION:
        recorder = Recorder(architecture)
        stored = start.tl_dtype(dtype)
        recorder.start(
            round_all, (4,), x_ptr=x, y_ptr=x, length=4096, STORED_DTYPE=stored, BLOCK=1024
        )
        (compiled,) = recorder.code.values()
        found.append(compiled.assembly)
    print(json.dumps(found))


def test_the_compiler_keeps_the_rounding():
    here = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (here.parent, here)))
    done = subprocess.run(
        [sys.executable, "-c", "import test_stored_values; test_stored_values.compile_all()"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assemblies = json.loads(done.stdout)
    for (which, instruction), text in zip(CONVERSION.items(), assemblies, strict=True):
        assert instruction in text, which


def assemblies():
    """(text, constraints) of each piece of assembly in rounding.py, a function's own put in."""
    tree = ast.parse(Path(rounding.__file__).read_text())
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    given = {
        call.func.id: [a.value for a in call.args if isinstance(a, ast.Constant)]
        for call in calls
        if isinstance(call.func, ast.Name)
    }
    for call in calls:
        if getattr(call.func, "attr", "") == "inline_asm_elementwise":
            text, constraints = call.args[:2]
            for own in [""] if isinstance(text, ast.Constant) else given["_rounded_pairs"]:
                parts = [n.value for n in ast.walk(text) if isinstance(n, ast.Constant)]
                yield " ".join([*parts, own]), constraints.value.split(",")


def test_assembly_reads_all_that_it_is_given():
    """Also of the second element of a pair, which may be another pixel with a mask of its own."""
    found = list(assemblies())
    assert len(found) >= 4
    for text, constraints in found:
        assert all(f"${i}" in text for i in range(len(constraints))), text


GEOMETRIES = {
    # Channels of small and big, and whether descriptors can move the tiles.
    "pointers": (ConvGeometry((9, 7), (5, 4), (3, 3), (2, 2), (1, 1)), (5, 3), False),
    "descriptors": (ConvGeometry((8, 8), (8, 8), (3, 3), (1, 1), (1, 1)), (16, 32), True),
    "pointers to small": (ConvGeometry((8, 8), (8, 8), (3, 3), (1, 1), (1, 1)), (12, 32), True),
}


@pytest.mark.one_in(2)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("loader", GEOMETRIES)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("operation", ["fprop", "dgrad"])
def test_statistics_are_of_what_is_stored(operation, dtype, loader, groups, device, monkeypatch):
    """With mean 300 and deviation 1, bfloat16 has every second integer, float16 every quarter.

    Statistics of the values before they are rounded have another variance: in bfloat16 by a third.
    """
    geometry, (c_small, c_big), descriptors = GEOMETRIES[loader]
    started = []
    run = start.kernel
    monkeypatch.setattr(start, "kernel", lambda *a, **k: (started.append(k), run(*a, **k)))
    sides = {"fprop": (c_big, geometry.big, c_small), "dgrad": (c_small, geometry.small, c_big)}
    channels, size, out_channels = sides[operation]
    x = torch.randn(4, channels, *size, device=device, dtype=dtype)
    taps = 9 if operation == "fprop" else 9 / (geometry.stride[0] * geometry.stride[1])
    weight = torch.randn(c_small, c_big, 3, 3, device=device) / (channels * taps) ** 0.5
    bias = torch.full((out_channels,), 300.0, device=device, dtype=dtype)
    epilogue = Epilogue(bias=bias, groups=groups)
    convolve = getattr(conv, operation)
    z, statistics = convolve(x, weight.to(dtype), geometry, epilogue)
    alone, _ = convolve(x, weight.to(dtype), geometry, Epilogue(bias=bias))
    assert torch.equal(z, alone)  # Rounded for the statistics as it is for memory.
    if device.type == "cpu":  # Of the GPUs some have no descriptors.
        assert started[0]["DESCRIPTORS"] == descriptors
    # An eps that float32 does not see beside a variance of 1; what lies beyond the channels has 0.
    vectors = norm.batch_statistics(statistics, None, None, 1e-9)
    assert z.dtype == dtype and len(vectors) == groups
    for part, of_part in zip(z.float().chunk(groups), vectors, strict=True):
        for c in range(out_channels):
            values, known = part[:, c].flatten(), of_part[:, c]
            assert (values.mean() - 300).abs() < 2 and 0.2 < values.std() < 5
            normalized = (values - known[norm.MEAN]) * known[norm.RSTD]
            assert_stable_statistics(values, known[norm.MEAN], known[norm.UNBIASED_VAR], normalized)
