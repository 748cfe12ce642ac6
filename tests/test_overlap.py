"""Every kernel waits for the one before it, before it reaches memory; only those start early.

Tests that compile kernels check the PTX of each, by `dependent_launch`; here are the checks of that
itself, of the sources and of what starts kernels.
"""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dependent_launch import check, facts_of

pytest.importorskip("triton", reason="it is about Triton kernels")

import triton
import triton.language as tl
from genfast.kernels.overlap import wait_for_previous

from genfast.launch import start

ROOT = Path(__file__).parents[1]
STARTED = sorted(
    (path.stem, name)
    for path in (ROOT / "genfast" / "launch").glob("*.py")
    for name in re.findall(r"(?:tape\.start|start\.kernel)\(\s*kernels\.(\w+),", path.read_text())
)


def statements(function):
    """Those of a function's syntax tree, without its documentation."""
    body = function.body
    is_documented = isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)
    return body[is_documented:]


def test_every_kernel_that_is_started_waits_first_and_nothing_else_waits():
    begin_so = set()
    for path in (ROOT / "kernels").glob("*.py"):
        for function in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(function, ast.FunctionDef):
                continue
            calls = ["wait_for_previous()" in ast.unparse(s) for s in statements(function)]
            assert not any(calls[1:]), function.name
            if calls[:1] == [True]:
                assert ast.unparse(statements(function)[0]) == "wait_for_previous()", function.name
                begin_so.add(function.name)
    assert len(STARTED) >= 24
    assert begin_so == {name for _, name in STARTED}


class Started(Exception):
    """Raised with the arguments that Triton would have got."""


class Kernel:
    """Stands in for what Triton makes of a function."""

    def __init__(self, function):
        self.fn = function

    def __getitem__(self, grid):
        def launch(**arguments):
            raise Started(arguments)

        return launch


def waits(x_ptr):
    """Waits."""
    wait_for_previous()
    tl.load(x_ptr)


def waits_late(x_ptr):
    tl.load(x_ptr)
    wait_for_previous()


def waits_never(x_ptr):
    tl.load(x_ptr)


def moves_first(box):
    box.load([0])
    wait_for_previous()


def nothing():
    pass


CUDA = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("function", "capability", "hip", "early"),
    [
        (waits, (9, 0), None, True),
        (waits, (10, 0), None, True),
        (waits, (12, 1), None, True),
        (waits, (8, 9), None, False),
        (waits, (9, 4), "6.4", False),
        (waits_late, (9, 0), None, False),
        (waits_never, (9, 0), None, False),
        (moves_first, (9, 0), None, False),
        (nothing, (9, 0), None, False),
    ],
)
def test_only_kernels_that_wait_first_start_early(function, capability, hip, early, monkeypatch):
    monkeypatch.setattr(start, "INTERPRETING", False)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    start.starts_early.cache_clear()
    with pytest.raises(Started) as started:
        start.kernel(Kernel(function), (1,), device=CUDA, x=1)
    start.starts_early.cache_clear()
    assert started.value.args == ({"x": 1} | ({"launch_pdl": True} if early else {}),)


@pytest.mark.parametrize(("file", "name"), STARTED)
def test_every_kernel_may_start_early(file, name, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    kernel = getattr(importlib.import_module(f"genfast.kernels.{file}"), name)
    assert start.starts_early.__wrapped__(kernel.fn, CUDA)


# A label that no branch names, an address and a load of a parameter stand before the wait; so may
# they. What the other functions of a module do is no part of how its kernel begins.
PTX = """
.version 8.7
.target sm_90a
.address_size 64
.func helper(.param .b64 a) { ld.global.b32 %r1, [%rd1]; ret; }
	// .globl	kernel
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .align 64 .b8 box[128]
)
.reqntid 128
{
	.reg .pred 	%p<3>;
	.loc	1 30 0
$L__func_begin0:
	ld.param.b64 	%rd1, [kernel_param_0];	// not st.global
$L__tmp0:
	mov.u32 	%r1, %tid.x;
	.loc	2 23 8                          // overlap.py:23:8
	// begin inline asm
	griddepcontrol.wait; // dummy %r2
	// end inline asm
	griddepcontrol.launch_dependents; // dummy %r3
	@%p1 bra 	$L__BB0_2;
	{ .reg .b32 r; @%p2 ld.global.v4.b32 { %r4, %r5, %r6, %r7 }, [ %rd1 + 0 ]; }
$L__BB0_2:
	ret;
}
"""


def test_ptx_of_a_kernel_that_waits():
    facts = facts_of(PTX)
    assert facts == dict(griddepcontrol=2, waits=True, reached_before=[], lets_in=True)
    check([facts], "sm_90")
    with pytest.raises(AssertionError):
        check([facts], "sm_80")


@pytest.mark.parametrize(
    "instruction",
    [
        "ld.global.b32 %r9, [%rd1];",
        "@%p2 ld.global.nc.L1::no_allocate.v4.b32 {%r4, %r5, %r6, %r7}, [%rd1 + 0];",
        "ld.b32 %r9, [%rd1];",  # generic: any memory
        "st.global.b32 [%rd1], %r9;",
        "cp.async.cg.shared.global [%r1], [%rd1], 0x10;",
        "@%p2 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
        "[%r1], [box, {%r2, %r3}], [%r4];",
        "atom.global.add.f32 %r9, [%rd1], %r8;",
        "red.global.add.f32 [%rd1], %r8;",
        "call.uni helper, (%rd1);",
    ],
)
def test_memory_before_the_wait_is_seen(instruction):
    early = PTX.replace("mov.u32", f"{instruction}\n\tmov.u32")
    opcode = re.sub(r"^@%p2 ", "", instruction).split()[0].rstrip(";")
    facts = facts_of(early)
    # Behind a call is another block.
    assert facts["waits"] == ("call" not in instruction)
    assert facts["reached_before"][0] == opcode
    for architecture in ("sm_90", "sm_100", "sm_120"):
        with pytest.raises(AssertionError):
            check([facts], architecture)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("griddepcontrol.wait;", ""),
        ("griddepcontrol.wait;", "// griddepcontrol.wait;"),
        ("griddepcontrol.wait;", "@%p1 griddepcontrol.wait;"),  # for some threads
        ("mov.u32 	%r1, %tid.x;", "@%p1 bra $L__BB0_2;"),  # on one way of two
        ("griddepcontrol.launch_dependents;", ""),
        ("griddepcontrol.launch_dependents;", "@%p1 griddepcontrol.launch_dependents;"),
    ],
)
def test_a_wait_that_is_missing_or_not_for_all_is_seen(old, new):
    assert old in PTX
    with pytest.raises(AssertionError):
        check([facts_of(PTX.replace(old, new))], "sm_90")


def test_a_label_that_is_branched_to_begins_another_block():
    loop = PTX.replace("@%p1 bra 	$L__BB0_2", "@%p1 bra 	$L__tmp0")
    assert not facts_of(loop)["waits"]


@triton.jit
def copy(x_ptr, y_ptr, WAITS: tl.constexpr):
    """y[i] = x[i], the wait before or after a load of x[0], or absent."""
    if WAITS == "first":
        wait_for_previous()
    offset = tl.load(x_ptr)
    if WAITS == "late":
        wait_for_previous()
    i = tl.program_id(0) * 256 + tl.arange(0, 256)
    tl.store(y_ptr + i, tl.load(x_ptr + i) + offset)


def compile_all():
    """Print the facts of `copy` as JSON, for a process in which nothing is interpreted."""
    from benchmarks.model.recording import Recorder

    x, found = torch.empty(256), {}
    for architecture in ("sm_90", "sm_80", "gfx942"):
        for when in ("first", "late", "never"):
            recorder = Recorder(architecture)
            recorder.start(copy, (1,), x_ptr=x, y_ptr=x, WAITS=when)
            (compiled,) = recorder.code.values()
            found[f"{architecture} {when}"] = facts_of(compiled.assembly)
    print(json.dumps(found))


def test_the_compiler_keeps_the_order_and_a_planted_kernel_is_caught():
    here = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (here.parent, here)))
    done = subprocess.run(
        [sys.executable, "-c", "import test_overlap; test_overlap.compile_all()"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    check([found["sm_90 first"]], "sm_90")
    late, never = found["sm_90 late"], found["sm_90 never"]
    assert late["waits"] and late["reached_before"] and late["lets_in"]
    assert not never["waits"] and not never["griddepcontrol"]
    for facts in (late, never):
        with pytest.raises(AssertionError):
            check([facts], "sm_90")
    for when in ("first", "late", "never"):
        check([found[f"sm_80 {when}"]], "sm_80")
        check([found[f"gfx942 {when}"]], "gfx942")
