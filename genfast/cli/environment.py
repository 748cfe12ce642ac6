"""`genfast env`: versions, the device, and which kernels run."""

import platform

import numpy
import torch

import genfast
from genfast.backend import selected_backend, triton
from genfast.cli.options import add_device
from genfast.functional import why_not_triton
from genfast.launch import first_use, timings
from genfast.training.runs.devices import as_device
from genfast.training.steps.precision import resolve_precision


def add(commands):
    """Add the command to a parser's."""
    parser = commands.add_parser("env", help="print versions, the device, and which kernels run")
    parser.set_defaults(run=run)
    add_device(parser)


def run(args):
    """Print them."""
    device = as_device(args.device)
    print(f"genfast    {genfast.__version__}")
    print(f"python     {platform.python_version()} on {platform.platform()}")
    print(f"torch      {torch.__version__}")
    print(f"triton     {triton.__version__ if triton else 'not installed'}")
    print(f"numpy      {numpy.__version__}")
    print(f"device     {device}: {_device_name(device)}")
    print(f"precision  {resolve_precision('auto', device)}")
    print(f"backend    {selected_backend()}")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        reason = why_not_triton(torch.empty(1, device=device, dtype=dtype))
        runs = f"PyTorch, because {reason}" if reason else "the Triton kernels"
        if selected_backend() == "reference":
            runs = "PyTorch, because the backend 'reference' was asked for"
        print(f"{str(dtype).removeprefix('torch.'):<10} runs {runs}")
    off = first_use.why_off(device)
    print(f"first use  {f'not timed, because {off}' if off else 'timed'}")
    print(f"timings    {_kept_timings(device)}")
    return 0


def _kept_timings(device):
    """The file of what first uses found, and how much of it holds here."""
    try:
        path = timings.path()
        found, bad = timings.read(path)
    except (timings.NotOurs, OSError) as error:
        return f"not used, because {error}"
    here = sum((timing.gpu, timing.versions) == first_use.where(device) for timing in found)
    unreadable = f", {bad} lines that cannot be read" if bad else ""
    return f"{path}: {here} products for this GPU and versions, {len(found)} in all{unreadable}"


def _device_name(device):
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"{torch.cuda.get_device_name(device)}, capability {major}.{minor}"
    return f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
