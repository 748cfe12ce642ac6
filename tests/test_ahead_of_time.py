"""Every kernel and shipped configuration compiles for GPUs that are not here, and compiles well."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="compiles Triton kernels")

HERE = Path(__file__).parent
GEMMS = ("fprop", "dgrad", "wgrad")
KERNELS = {
    *GEMMS,
    "sum_partials",
    "tile_statistics",
    "combine_statistics",
    "batch_statistics",
    "normalize_activate",
    "norm_backward_reduce",
    "norm_backward",
    "activation_backward_from_output",
    "reparameterize",
    "reparameterize_backward",
    "logistic_loss",
    "logistic_loss_backward",
}
# Bytes of shared memory a block can have: sm_86 and sm_89 have less than sm_80 and use its tiles.
SHARED = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


def compile_for(architecture):
    """The facts of each kernel, from a process where nothing is interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parent)
    command = [sys.executable, str(HERE / "ahead_of_time.py"), architecture, "--json"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("architecture", SHARED)
def test_every_kernel_and_configuration_compiles(architecture):
    facts = compile_for(architecture)
    assert {f["kernel"] for f in facts} == KERNELS
    assert max(f["shared"] for f in facts) <= SHARED[architecture]
    for f in facts:
        if f["kernel"] in GEMMS:
            # NVIDIA's tensor cores multiply no float32 unrounded.
            assert (f["matrix"] > 0) == (architecture == "gfx942" or not is_ieee(f)), f
            # A few bytes of stack cost nothing beside the tile; on Hopper there are none at all.
            assert f["spills"] <= (0 if architecture == "sm_90" else 24), f
    rounded = {f["precision"] for f in facts if f["kernel"] in GEMMS and f["dtype"] == "float32"}
    assert rounded == ({"ieee"} if architecture == "gfx942" else {"ieee", "tf32"})
    if architecture == "sm_90":
        check_hopper_instructions(facts)


def is_ieee(facts):
    return facts["dtype"] == "float32" and facts["precision"] == "ieee"


def check_hopper_instructions(facts):
    half = [f for f in facts if f["kernel"] in GEMMS and f["dtype"] in ("bfloat16", "float16")]
    for f in half:
        assert f["wgmma"] > 0, f
        assert (f["tma"] > 0) == (f["loader"] == "descriptors"), f
    assert {(f["kernel"], f["loader"]) for f in half} == {
        (kernel, loader) for kernel in GEMMS for loader in ("descriptors", "pointers")
    }
