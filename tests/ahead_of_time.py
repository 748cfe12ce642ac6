"""Compile kernels for GPUs that are not here, and read the result.

    python tests/ahead_of_time.py sm_90                   every kernel and configuration, a table
    python tests/ahead_of_time.py sm_89 --few             each kernel and shipped tile at least once
    python tests/ahead_of_time.py sm_90 --of from_image   its cases; `outputs`: to_image and logits
    python tests/ahead_of_time.py sm_90 --code            with what the machine code holds (NVIDIA)
    python tests/ahead_of_time.py sm_90 --json            a JSON object a launch, for the tests

The kernels are those that `genfast.launch` would start for the cases: it runs as it is, with the
starting replaced by compiling and the architecture by the one asked for. Nothing executes, so the
tensors' values mean nothing. Not for TRITON_INTERPRET=1. With another Triton first on PYTHONPATH,
it is that one which compiles.
"""

import argparse
import contextlib
import importlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import dependent_launch
import triton

from benchmarks.model import machine_code
from benchmarks.model.driver import TARGETS
from benchmarks.model.recording import compiling

HERE = Path(__file__).parent
# Of the cases, each a file beside this one: ahead_of_time_every.py and so on.
CASES = ("every", "from_image", "dgrad_wgrad", "outputs")
# Instructions in PTX, or in what AMD's assembler reads.
ASSEMBLY = {
    "matrix": r"wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma",
    "wgmma": r"wgmma\.mma_async",
    "fma": r"\bfma\.rn|v_fma|v_pk_fma",
    "tma": r"cp\.async\.bulk\.tensor",
}


def facts_of(architecture, *options, of="every", triton=None):
    """The facts of each launch, from a process where nothing is interpreted, for the tests.

    Args:
        architecture: a key of `TARGETS`.
        options: "--few" and "--code".
        of: one of `CASES`.
        triton: a folder that holds a Triton to compile with; None for the installed one.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = [HERE.parent] if triton is None else [triton, HERE.parent]
    environment["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    command = [sys.executable, __file__, architecture, "--of", of, "--json", *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


def compile_cases(architecture, cases, code=False):
    """Compile what the cases start; yield a dictionary of facts for each launch.

    Args:
        architecture: a key of `TARGETS`.
        cases: pairs of a name and what to call.
        code: whether to read the machine code too.
    """
    known = {}
    with compiling(architecture) as recorder:
        for name, case in cases:
            recorder.launches.clear()
            case()
            for launch in recorder.launches:
                if launch.compiled not in known:
                    known[launch.compiled] = _read(recorder.code[launch.compiled], code)
                yield {"case": name, **_asked(launch), **known[launch.compiled]}


def _asked(launch):
    arguments = launch.arguments
    return {
        "triton": triton.__version__,
        "kernel": launch.name,
        "hash": launch.compiled,
        "dtype": launch.dtype,
        "precision": arguments.get("PRECISION", ""),
        "loader": "descriptors" if arguments.get("DESCRIPTORS") else "pointers",
        "tile": [arguments[k] for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if k in arguments],
    }


def _read(compiled, code):
    facts = {"warps": compiled.warps, "shared": compiled.shared}
    for name, pattern in ASSEMBLY.items():
        facts[name] = len(re.findall(pattern, compiled.assembly))
    facts |= dependent_launch.facts_of(compiled.assembly)
    if not code:
        return facts | machine_code.resources(compiled)
    read = machine_code.read(compiled)
    loop = max(read.regions[1:], key=lambda region: region.instructions, default=None)
    return facts | {
        "registers": read.registers,
        "spills": read.spills,
        **_held(read.regions),
        "loop": _held([loop] if loop else []),
    }


def _held(regions):
    """Instructions, and of those that move memory {bytes of a thread: how many}.

    The bytes are texts, as the keys of JSON are.
    """
    held = {"instructions": sum(region.instructions for region in regions)}
    for kind, opcode in (("loads", "LDG"), ("copies", "LDGSTS"), ("stores", "STG")):
        total = Counter()
        for region in regions:
            total.update(region.widths(opcode))
        held[kind] = {str(width): count for width, count in total.items()}
    return held


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("architecture", choices=TARGETS)
    parser.add_argument("--of", choices=CASES, default="every", help="whose cases")
    parser.add_argument("--few", action="store_true", help="not every case")
    parser.add_argument("--code", action="store_true", help="read the machine code too")
    parser.add_argument("--json", action="store_true", help="one JSON object a launch")
    arguments = parser.parse_args()
    cases = importlib.import_module(f"ahead_of_time_{arguments.of}").cases
    chosen = cases(arguments.architecture, arguments.few)
    seen = set()
    with contextlib.suppress(BrokenPipeError):
        for facts in compile_cases(arguments.architecture, chosen, arguments.code):
            if arguments.json:
                print(json.dumps(facts), flush=True)
            elif facts["hash"] not in seen:
                print(_row(facts), flush=True)
            seen.add(facts["hash"])


def _row(facts):
    tile = "x".join(map(str, facts["tile"]))
    row = (
        f"{facts['kernel']:32} {facts['case']:16} {facts['dtype']:9} {facts['precision']:5} "
        f"{facts['loader']:11} {tile:11} {facts['warps']} warps {facts['registers']:4} registers "
        f"{facts['spills']:4} spills {facts['shared']:7} B shared {facts['matrix']:4} matrix "
        f"{facts['tma']:3} TMA"
    )
    if "instructions" in facts:
        loop = facts["loop"]["instructions"]
        row += f" {facts['instructions']:5} instructions {loop:4} in the longest loop"
        row += "".join(f" {kind} {facts[kind]}" for kind in ("loads", "copies", "stores"))
    return row


if __name__ == "__main__":
    main()
