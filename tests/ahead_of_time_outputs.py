"""Compile the kernels that make images and logits for a GPU that is not here; print JSON facts.

    python tests/ahead_of_time_outputs.py sm_90

As ahead_of_time.py, for `genfast.launch.to_image` and `genfast.launch.logits`: the launches run as
they are, with the starting replaced by compiling. Not for TRITON_INTERPRET=1.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import triton

from benchmarks.model.driver import AbsentDriver
from genfast.geometry import ConvGeometry
from genfast.launch import logits, start, to_image
from genfast.launch.conv import Epilogue


def cases():
    """(name, what to call)."""
    half, full = torch.bfloat16, torch.float32
    k4, k3, k7 = (4, 2, 1), (3, 1, 1), (7, 1, 3)
    yield "generator", lambda: image(128, 64, 3, 32, k4, half)
    yield "discriminator", lambda: image(128, 64, 3, 32, k4, half, backward=True)
    yield "generator of z", lambda: image(128, 64, 3, 32, k4, half, normalized="relu")
    yield "k3 of z", lambda: image(64, 128, 3, 64, k3, torch.float16, normalized="leaky_relu")
    yield "k7 of z of 256", lambda: image(1, 256, 3, 64, k7, half, normalized="tanh", groups=2)
    yield "k7 tf32 of z", lambda: image(1, 64, 3, 64, k7, full, normalized="relu", precision="tf32")
    yield "float32 of z", lambda: image(64, 64, 3, 32, k4, full, normalized="relu")
    yield "one channel", lambda: image(128, 64, 1, 14, k4, torch.float16)
    yield "wide", lambda: image(16, 64, 4, 128, k4, half, backward=True)
    yield "k3", lambda: image(64, 128, 3, 64, k3, half)
    yield "k3 of 256", lambda: image(64, 256, 3, 32, k3, half, backward=True)
    yield "k7", lambda: image(1, 64, 3, 256, k7, half)
    yield "k7 of 256", lambda: image(1, 256, 3, 64, k7, half, backward=True)
    yield "k7 tf32", lambda: image(1, 128, 3, 64, k7, full, backward=True, precision="tf32")
    yield "k7 tf32 of 64", lambda: image(1, 64, 3, 64, k7, full, backward=True, precision="tf32")
    yield "k7 float32", lambda: image(1, 64, 3, 256, k7, full, backward=True)
    yield "float32", lambda: image(64, 64, 3, 32, k4, full, backward=True)
    yield "float32 of 128", lambda: image(64, 128, 3, 32, k3, full)
    yield "tf32", lambda: image(64, 64, 3, 32, k4, full, backward=True, precision="tf32")
    yield "ragged", lambda: image(64, 24, 3, 15, k4, half)
    yield from logit_cases("logit", 1, 512, half)
    yield from logit_cases("four logits", 4, 64, full)


def image(
    n, c_small, c_big, size, kernel, dtype, backward=False, precision="ieee", normalized=None,
    groups=1,
):  # fmt: skip
    k, s, p = kernel
    geometry = ConvGeometry.conv_transpose((size,) * 2, (k,) * 2, (s,) * 2, (p,) * 2, (0, 0))
    small = torch.empty(n, size, size, c_small, dtype=dtype).permute(0, 3, 1, 2)
    weight = torch.empty(c_small, c_big, k, k, dtype=dtype)
    epilogue = Epilogue(bias=torch.empty(c_big, dtype=dtype), activation="tanh")
    options = dict(y=small, activation="leaky_relu", negative_slope=0.2)
    torch.backends.cudnn.conv.fp32_precision = precision
    if normalized:
        epilogue = Epilogue(activation="tanh")
        to_image.dgrad(small, weight, geometry, epilogue, **of_z(c_small, normalized, groups))
    elif backward:
        to_image.dgrad(small, weight, geometry, Epilogue(), **options)
    else:
        to_image.dgrad(small, weight, geometry, epilogue)


def of_z(channels, activation, groups):
    vectors = torch.empty(groups, 5, channels)
    return dict(vectors=vectors, activation=activation, negative_slope=0.2)


def logit_cases(name, c_small, c_big, dtype):
    geometry = ConvGeometry((4, 4), (1, 1), (4, 4), (1, 1), (0, 0))
    big = torch.empty(256, 4, 4, c_big, dtype=dtype).permute(0, 3, 1, 2)
    weight = torch.empty(c_small, c_big, 4, 4, dtype=dtype)
    small = torch.empty(256, c_small, 1, 1, dtype=dtype)
    yield f"{name} fprop", lambda: logits.fprop(big, weight, geometry, Epilogue())
    yield f"{name} dgrad", lambda: logits.dgrad(small, weight, geometry, Epilogue())
    yield f"{name} wgrad", lambda: logits.wgrad(big, small, geometry)
    z = of_z(c_big, "leaky_relu", 1)
    yield f"{name} fprop of z", lambda: logits.fprop(big, weight, geometry, Epilogue(), **z)
    yield f"{name} wgrad of z", lambda: logits.wgrad(big, small, geometry, **z)
    two = of_z(c_big, "leaky_relu", 2)
    yield f"{name} wgrad of z of two", lambda: logits.wgrad(big, small, geometry, **two)


def read(compiled, architecture):
    shared = {"shared": compiled.metadata.shared}
    if architecture.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        return shared | {"spills": _number(r"\.vgpr_spill_count:\s+(\d+)", text)}
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin)
        code = _output(triton.knobs.nvidia.nvdisasm.path, "-c", cubin)
    instructions, loop = [], []
    labels = {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        if found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(\S+)(.*)", line):
            instructions.append(found[1])
            target = re.search(r"\.L_x_\d+", found[2])
            if found[1].startswith("BRA") and target and target[0] in labels:
                body = instructions[labels[target[0]] :]
                loop = max(loop, body, key=len) if len(body) > 1 else loop
    return shared | {
        "registers": _number(r"REG:(\d+)", usage),
        "spills": _number(r"LOCAL:(\d+)", usage) + _number(r"STACK:(\d+)", usage),
        "instructions": len(instructions),
        "loop": len(loop),
        "wgmma": _count("HGMMA", instructions),
        "asynchronous vectors": _count(r"LDGSTS.*\.128", loop),
        "narrow loads in loop": _count(r"LDG\.", loop) + _count(r"LDGSTS(?!.*\.128)", loop),
        "vector loads": _count(r"LDG.*\.128", instructions),
        "vector stores": _count(r"STG.*\.128", instructions),
    }


def _output(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _number(pattern, text):
    return int(re.search(pattern, text)[1])


def _count(pattern, instructions):
    return sum(bool(re.match(pattern, i)) for i in instructions)


def main(architecture):
    triton.runtime.driver.set_active(AbsentDriver(architecture))
    found = []

    def record(kernel, grid, **arguments):
        found.append(read(kernel.warmup(**arguments, grid=grid), architecture))

    with (
        mock.patch.object(start, "kernel", record),
        mock.patch.object(start, "architecture", lambda tensor: architecture),
    ):
        names, calls = zip(*cases(), strict=True)
        for call in calls:
            call()
    print(json.dumps(dict(zip(names, found, strict=True))))


if __name__ == "__main__":
    main(sys.argv[1])
