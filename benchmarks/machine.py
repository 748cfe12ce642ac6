"""What the figures were measured on, in words that fit a table."""

import datetime
import os
import platform
import re
from pathlib import Path

import torch

from genfast.training.steps.precision import resolve_precision


def describe(device):
    """A dict of strings: hardware, versions, date."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    return {
        "machine": name(device),
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def name(device):
    """The GPU's name, or the CPU's with its cores and what bfloat16 instructions it has."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    amx, avx = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    has = "AMX" if amx else "AVX512-BF16" if avx else "no bfloat16"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_cpu_name()} x {cores} cores, {has}"


def half_is_fast(device):
    """Whether bfloat16 pays here; where it does not, nobody's baseline would use it."""
    return resolve_precision("auto", device) == "bf16"


def slug(device):
    """A short name for files: cuda-nvidia-h200, cpu-amd-epyc-2."""
    words = name(device).split(",")[0].lower()
    return f"{device.type}-" + re.sub(r"[^a-z0-9]+", "-", words).strip("-")


def _cpu_name():
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1).strip() if found else platform.processor() or platform.machine()
