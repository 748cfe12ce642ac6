"""Compile the kernels of `from_image` for a GPU that is not here, and read the machine code.

    python tests/from_image_ahead_of_time.py sm_90           every kernel of a DCGAN-64, a table
    python tests/from_image_ahead_of_time.py sm_90 --json    one JSON object a kernel

They are started as `genfast.launch.from_image` starts them, with starting replaced by compiling.
Nothing executes, so the tensors' values mean nothing. Not for TRITON_INTERPRET=1.
"""

import argparse
import json
import re
import subprocess
import tempfile
from unittest import mock

import torch
import triton

from benchmarks.model.driver import TARGETS, AbsentDriver
from genfast.geometry import ConvGeometry
from genfast.launch import from_image, start
from genfast.launch.conv import Epilogue

K4S2 = ConvGeometry.conv((64, 64), (4, 4), (2, 2), (1, 1))
OTHER = ConvGeometry.conv((66, 38), (4, 4), (2, 2), (1, 1))
K3S1 = ConvGeometry.conv((28, 28), (3, 3), (1, 1), (1, 1))
K4S1 = ConvGeometry.conv((28, 28), (4, 4), (1, 1), (1, 1))
K5S2 = ConvGeometry.conv((28, 28), (5, 5), (2, 2), (2, 2))
K7S1 = ConvGeometry.conv((28, 28), (7, 7), (1, 1), (3, 3))


def cases(dtype, full):
    """(name, what to call); the first few are what the tests look at."""
    leaky = dict(activation="leaky_relu", negative_slope=0.2)
    yield "leaky relu", lambda: _fprop(K4S2, dtype, 64, Epilogue(**leaky))
    yield "statistics", lambda: _fprop(K4S2, dtype, 64, Epilogue(groups=2))
    yield "plain", lambda: _wgrad(K4S2, dtype, 64)
    yield "leaky relu", lambda: _wgrad(K4S2, dtype, 64, y=True, **leaky)
    yield "of z", lambda: _wgrad(K4S2, dtype, 64, groups=1, activation="relu")
    yield "plain", lambda: from_image.padded(_image(3, K4S2.big, torch.float32), K4S2, dtype)
    yield "stride 1", lambda: _fprop(K4S1, dtype, 64, Epilogue())
    # The last batch of an epoch, and images of another size: nothing new to compile.
    yield "leaky relu", lambda: _fprop(OTHER, dtype, 64, Epilogue(**leaky), batch=97)
    yield "plain", lambda: _wgrad(OTHER, dtype, 64, batch=1)
    yield "plain", lambda: from_image.padded(_image(3, OTHER.big, torch.float32, 97), OTHER, dtype)
    if not full:
        return
    image = _image(3, K4S2.big, dtype)
    yield "tanh", lambda: from_image.padded(image, K4S2, y=image, activation="tanh")
    bias, vectors = torch.empty(64, dtype=dtype), torch.empty(1, 5, 64)
    every = Epilogue(bias=bias, vectors=vectors, activation="tanh")
    yield "bias, norm, tanh", lambda: _fprop(K4S2, dtype, 64, every)
    for groups in (1, 2):
        for c_small in (128, 64, 40):
            of_z = dict(groups=groups, **leaky)
            yield f"{c_small} channels of z", lambda c=c_small, z=of_z: _wgrad(K4S2, dtype, c, **z)
    yield "7x7 of z", lambda: _wgrad(K7S1, dtype, 64, groups=1, activation="tanh")
    for c_small in (128, 32, 16, 40):
        yield f"{c_small} channels", lambda c=c_small: _fprop(K4S2, dtype, c, Epilogue(**leaky))
        yield f"{c_small} channels", lambda c=c_small: _fprop(K4S2, dtype, c, Epilogue(groups=1))
        yield f"{c_small} channels", lambda c=c_small: _wgrad(K4S2, dtype, c)
    for name, geometry in (("3x3", K3S1), ("5x5/2", K5S2), ("7x7", K7S1)):
        yield name, lambda g=geometry: _fprop(g, dtype, 64, Epilogue(**leaky))
        yield name, lambda g=geometry: _wgrad(g, dtype, 64)


def _image(channels, size, dtype, batch=64):
    x = torch.empty(batch, channels, *size, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def _padded(geometry, dtype, batch):
    data = torch.empty((batch, *from_image.padded_size(geometry), from_image.CHANNELS), dtype=dtype)
    return from_image.Padded(data, geometry, 3)


def _fprop(geometry, dtype, c_small, epilogue, batch=64):
    weight = torch.empty(c_small, 3, *geometry.kernel_size, dtype=dtype)
    from_image.fprop(_padded(geometry, dtype, batch), weight, epilogue)


def _wgrad(geometry, dtype, c_small, batch=64, y=False, groups=0, **activation):
    small = _image(c_small, geometry.small, dtype, batch)
    other = torch.empty_like(small) if y else None
    vectors = torch.empty(groups, 5, c_small) if groups else None
    from_image.wgrad(_padded(geometry, dtype, batch), small, other, vectors, **activation)


def compile_cases(architecture, dtype, full):
    """Compile what the cases start; yield a dictionary of facts for each kernel."""
    triton.runtime.driver.set_active(AbsentDriver(architecture))
    compiled = []

    def record(kernel, grid, **arguments):
        if kernel.__module__.endswith("from_image"):
            compiled.append((kernel.__name__, kernel.warmup(**arguments, grid=grid), arguments))

    with (
        mock.patch.object(start, "kernel", record),
        mock.patch.object(start, "architecture", lambda tensor: architecture),
    ):
        for name, case in cases(dtype, full):
            case()
            while compiled:
                kernel, result, arguments = compiled.pop()
                tile = [arguments[k] for k in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if k in arguments]
                yield {
                    "kernel": kernel,
                    "hash": result.hash,
                    "case": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "tile": tile,
                    "warps": result.metadata.num_warps,
                    "shared": result.metadata.shared,
                    **read(result),
                }


def read(compiled):
    """Registers, spills, instructions and the kinds of them that the design is about."""
    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        return {
            "registers": _number(r"\.vgpr_count:\s+(\d+)", text),
            "spills": _number(r"\.vgpr_spill_count:\s+(\d+)", text),
            "wgmma": 0,
            "matrix": len(re.findall(r"v_mfma", text)),
        }
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        code = _cuobjdump("-sass", file.name)
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, flags=re.MULTILINE)
    lines = [(int(address, 16), text) for address, text in lines if not text.startswith("NOP")]
    texts = [text for _, text in lines]
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "spills": _number(r"LOCAL:(\d+)", usage) + _number(r"STACK:(\d+)", usage),
        "instructions": len(lines),
        "loop": _longest_loop(lines),
        "wgmma": _count(r"HGMMA", texts),
        "matrix": _count(r"HGMMA|HMMA|UTC.*MMA", texts),
        "loads": _bytes_of(r"LDG(?:STS)?", texts),
        "copies": _bytes_of(r"LDGSTS", texts),
        "stores": _bytes_of(r"STG", texts),
    }


def _longest_loop(lines):
    """Instructions from the target of a backward branch to it; 0 without a loop."""
    lengths = [0]
    for address, text in lines:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if target and int(target.group(1), 16) < address:
            lengths.append(sum(int(target.group(1), 16) <= a <= address for a, _ in lines))
    return max(lengths)


def _bytes_of(mnemonic, texts):
    """How many instructions move how many bytes a thread: {bytes: number}."""
    found = {}
    for text in texts:
        match = re.match(rf"(?:@!?\w+ )?{mnemonic}((?:\.\w+)+)", text)
        if match:
            bits = re.search(r"\.[US]?(8|16|64|128)\b", match.group(1))
            size = int(bits.group(1)) // 8 if bits else 4
            found[size] = found.get(size, 0) + 1
    return found


def _count(pattern, texts):
    return sum(bool(re.search(pattern, text)) for text in texts)


def _number(pattern, text):
    return int(re.search(pattern, text).group(1))


def _cuobjdump(option, path):
    command = [triton.knobs.nvidia.cuobjdump.path, option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("architecture", choices=TARGETS)
    parser.add_argument("--json", action="store_true", help="one JSON object a line, few kernels")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tf32", action="store_true", help="products of float32 round to TF32")
    arguments = parser.parse_args()
    torch.backends.cudnn.conv.fp32_precision = "tf32" if arguments.tf32 else "ieee"
    dtype = getattr(torch, arguments.dtype)
    for facts in compile_cases(arguments.architecture, dtype, full=not arguments.json):
        text = json.dumps(facts)
        if not arguments.json:
            text = ", ".join(f"{key} {value}" for key, value in facts.items() if key != "hash")
        print(text, flush=True)


if __name__ == "__main__":
    main()
