"""Every kernel and shipped configuration compiles for GPUs that are not here, and compiles well."""

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="compiles Triton kernels")

import dependent_launch
from ahead_of_time import facts_of

from genfast.launch import tiles

HERE = Path(__file__).parent
GEMMS = ("fprop", "dgrad", "wgrad")
KERNELS = {
    *GEMMS,
    "sum_partials",
    "tile_statistics",
    "combine_statistics",
    "batch_statistics",
    "shared_statistics",
    "shared_sums",
    "known_statistics",
    "normalize_activate",
    "norm_backward_reduce",
    "norm_backward",
    "gated_normalize",
    "gated_backward_reduce",
    "gated_backward",
    "activation_backward_from_output",
    "reparameterize",
    "reparameterize_backward",
    "importance_samples",
    "importance_samples_backward",
    "logit_loss",
    "logit_loss_backward",
    "adam",
}
# Tests of their own compile these, in more ways.
ENDS = {
    "pad_image",
    "join_images",
    "fprop_image",
    "norm_sums_image",
    "wgrad_image",
    "to_image",
    "logits_fprop",
    "logits_dgrad",
    "logits_wgrad",
}
# Bytes of shared memory a block can have.
KIB = 1024
SHARED = {
    "sm_80": 99 * KIB,  # 163 in truth, but consumer cards share the tiles.
    "sm_86": 99 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_120": 99 * KIB,
    "gfx942": 64 * KIB,
}
# All cases, which take three times as long; else each kernel and each tile once.
IN_FULL = ("sm_90",)
# One for each way to load; the others compile the same code but for limits and multiplications.
OF_EACH_KIND = ("sm_80", "sm_90", "gfx942")
OLDEST = "3.6"
OLDEST_TRITON = Path(sys.prefix) / f"triton-{OLDEST}"
ON_OLDEST = ("sm_90", pytest.param("sm_80", marks=pytest.mark.exhaustive))  # Each way to load.


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, marks=() if a in OF_EACH_KIND else pytest.mark.exhaustive) for a in SHARED],
)
def test_every_kernel_compiles(architecture):
    check(facts_of(architecture, "--few"), architecture)


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", IN_FULL)
def test_every_configuration_compiles(architecture):
    facts = facts_of(architecture)
    check(facts, architecture)
    check_every_loader(facts)


@pytest.mark.parametrize("architecture", ON_OLDEST)
def test_the_oldest_triton_compiles_them_too(architecture):
    if not OLDEST_TRITON.exists():
        pytest.skip(f"{OLDEST_TRITON} is absent: `make test` installs Triton {OLDEST} there")
    facts = facts_of(architecture, "--few", triton=OLDEST_TRITON)
    assert {f["triton"].rpartition(".")[0] for f in facts} == {OLDEST}
    check(facts, architecture)


def test_the_oldest_triton_is_the_oldest_allowed():
    allowed = re.search(r"triton>=([\d.]+)", (HERE.parent / "setup.py").read_text()).group(1)
    made = re.search(r"^OLDEST_TRITON := (.*)$", (HERE.parent / "Makefile").read_text(), re.M)
    assert allowed == made.group(1) == OLDEST


def check(facts, architecture):
    assert {f["kernel"] for f in facts} - ENDS == KERNELS
    assert max(f["shared"] for f in facts) <= SHARED[architecture]
    check_every_tile(facts, architecture)
    dependent_launch.check(facts, architecture)
    for f in facts:
        if f["kernel"] in GEMMS:
            # NVIDIA's tensor cores multiply no float32 unrounded.
            assert (f["matrix"] > 0) == (architecture == "gfx942" or not is_ieee(f)), f
            # A few bytes of stack cost nothing beside the tile; on Hopper there are none at all.
            assert f["spills"] <= (0 if architecture == "sm_90" else 24), f
            if architecture == "sm_90" and f["dtype"] != "float32":
                # A wgmma has 64 rows.
                assert (f["wgmma"] > 0) == (f["tile"][0] >= 64), f
                assert (f["tma"] > 0) == (f["loader"] == "descriptors"), f


def check_every_tile(facts, architecture):
    """Each shipped tile was met in bfloat16, and float32 in each way that it rounds there."""
    half, *wide = tiles.precisions(architecture)
    met = [f for f in facts if f["kernel"] in GEMMS]
    shipped = [*tiles.shipped(architecture, half), *tiles.shipped(architecture, half, True)]
    assert {(c.block_m, c.block_n, c.block_k, c.num_warps) for c in shipped} <= {
        (*f["tile"], f["warps"]) for f in met if f["dtype"] == "bfloat16"
    }
    assert {f["precision"] for f in met if f["dtype"] == "float32"} == set(wide)


def is_ieee(facts):
    return facts["dtype"] == "float32" and facts["precision"] == "ieee"


def check_every_loader(facts):
    """Where there are descriptors, each product is compiled with them and without."""
    half = [f for f in facts if f["kernel"] in GEMMS and f["dtype"] in ("bfloat16", "float16")]
    assert {(f["kernel"], f["loader"]) for f in half} == {
        (kernel, loader) for kernel in GEMMS for loader in ("descriptors", "pointers")
    }
