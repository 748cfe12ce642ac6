"""Which configuration a product takes where its GPU has no table: timed the first time it runs.

Like `torch.backends.cudnn.benchmark`, and where that is on: a few tiles and PyTorch's convolution
run the product that is asked for, with all that rides on it, and the fastest is taken from then on,
in this process and, through `timings`, in later ones. Candidates read the operands and write
memory of their own, one result at a time.
"""

import functools
import hashlib
import math
import os
import statistics
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from genfast import kernels
from genfast.backend import INTERPRETING, triton
from genfast.launch import tape, tiles, timings

# The tiles that are timed, those of which the model expects most.
_TILES = 3
# Each candidate's samples, in turns with the others', and the calls of one.
_SAMPLES = 5
_CALLS = 5
# Longer calls are timed one at a time.
_LONG_US = 2000.0
# How long a GPU waits before a sample, in its cycles, until all of it is queued.
_WAITS = (2 * 10**6, 8 * 10**6, 32 * 10**6)
# So many times as large or as small a batch takes what was timed.
_NEAR = 2.0

# One product is timed at a time; autograd runs backward in threads of its own.
_lock = threading.RLock()
# {(GPU, versions): {(epilogue, a problem's key): {images: GemmConfig}}}
_found: dict[Any, Any] = {}
_switched_off = False


def config(architecture, problem, epilogue, run, device):
    """The configuration for a `Problem`: as `tiles.gemm_config`, unless a first use found another.

    Args:
        architecture: as there.
        problem: a `Problem`.
        epilogue: an `Epilogue`, what rides on the product.
        run: computes the product with it by a `GemmConfig`, and changes nothing.
        device: a `torch.device`, where.
    """
    expected = tiles.gemm_config(architecture, problem)
    if why_off(device) is not None or tiles.tuned(architecture).get(problem.key):
        return expected
    candidates = _candidates(architecture, problem, expected)
    with _lock:
        rides = words(epilogue)
        known = _known(device).setdefault((rides, problem.key), {})
        images = tiles.nearest(known, problem.images)
        # Whatever a file says, only what would be timed is run.
        if images and _is_near(images, problem.images) and known[images] in candidates:
            return known[images]
        if is_captured(device):
            return expected
        times, complete = _time(candidates, run, device)
        # Where nothing ran, the caller will meet the error.
        fastest = min(times, key=times.get, default=expected)
        known[problem.images] = fastest
        if complete and times:
            _keep(device, rides, problem, fastest, times)
        return fastest


def why_off(device):
    """A sentence saying why first uses are not timed on a device, nor taken from earlier ones.

    None if they are. The same sums everywhere take the same tiles, so what was timed earlier does
    not count either under `torch.use_deterministic_algorithms(True)`.

    Raises:
        ValueError: GENFAST_AUTOTUNE holds neither 0 nor 1.
    """
    if _switched_off:
        return "the program switched it off"
    asked = os.environ.get("GENFAST_AUTOTUNE", "")
    if asked not in ("", "0", "1"):
        raise ValueError(f"expected GENFAST_AUTOTUNE to be 0 or 1, got {asked!r}")
    if asked == "0":
        return "GENFAST_AUTOTUNE is 0"
    if asked == "" and not torch.backends.cudnn.benchmark:
        return "torch.backends.cudnn.benchmark is off, and GENFAST_AUTOTUNE is not 1"
    if torch.are_deterministic_algorithms_enabled():
        return "torch.use_deterministic_algorithms is on"
    return why_no_clock(device)


def why_no_clock(device):
    """A sentence saying why nothing can be timed on a device; None if it can."""
    if device.type != "cuda":
        return f"nothing is timed on the device {device}"
    if INTERPRETING:
        return "the kernels are interpreted"
    return None


def is_captured(device):
    """Whether what is started on a device now goes into a graph, where nothing can be timed."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


@contextmanager
def switched_off():
    """Within, nothing is timed and what was found does not count: for who forces configurations."""
    global _switched_off
    before, _switched_off = _switched_off, True
    try:
        yield
    finally:
        _switched_off = before


def microseconds(call, device):
    """A sample of how long a call keeps a GPU busy, on its current stream.

    The operands are as warm in L2 as repeating leaves them. The GPU first waits until the host has
    queued all calls, so what Python takes to start them does not count: a graph has none of that.
    """
    with torch.cuda.device(device):
        us = _sample(call, 1)
        return us if us > _LONG_US else _sample(call, _CALLS)


def _sample(call, calls):
    for wait in _WAITS:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(wait)
        start.record()
        for _ in range(calls):
            call()
        end.record()
        overtaken = start.query()  # By the GPU, which may then have waited for the host.
        end.synchronize()
        if not overtaken:
            break
    return 1e3 * start.elapsed_time(end) / calls


def words(epilogue):
    """An `Epilogue` in words, as far as it decides how long a product takes."""
    found = ["bias"] if epilogue.bias is not None else []
    if epilogue.groups:
        found.append(f"statistics of {epilogue.groups}")
    if epilogue.vectors is not None:
        found.append("norm")
    if epilogue.added is not None:
        found.append("sum")
    if epilogue.activation != "identity":
        found.append(epilogue.activation)
    if epilogue.output is not None:
        found.append(f"gradient of {epilogue.output.activation}")
        if epilogue.output.vectors is not None:
            found.append(f"norm of {epilogue.parts_of_batch}")
        elif epilogue.sums:
            found.append("sums")
    return " + ".join(found)


def where(device):
    """(name of a GPU, versions in words): what a timing holds for."""
    cudnn = torch.backends.cudnn
    settings = [name for name in ("benchmark", "deterministic") if getattr(cudnn, name)]
    name, versions = _where(device)
    return name, " ".join([versions, "cudnn", str(cudnn.version()), *settings])


@functools.cache
def _where(device):
    if device.type != "cuda":
        return "none", _versions()
    return torch.cuda.get_device_name(device), _versions()


def _versions():
    runtime = torch.version.hip or torch.version.cuda
    # PyTorch without CUDA has no such function.
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: None)()
    return (
        f"genfast {_digest()} torch {torch.__version__} triton "
        f"{triton.__version__ if triton else None} runtime {runtime} driver {driver}"
    )


def _digest():
    """Of the kernels and what starts them, in place of a version: they change in between, too."""
    digest = hashlib.sha256()
    for folder in (Path(kernels.__path__[0]), Path(__file__).parent):
        for file in sorted(folder.glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def _candidates(architecture, problem, expected):
    ranked = tiles.ranked(architecture, problem)
    return tuple(dict.fromkeys((expected, *ranked[:_TILES], tiles.LIBRARY)))


def _known(device):
    """What was found for a device so far, in this process or an earlier one."""
    place = where(device)
    if place not in _found:
        _found[place] = found = {}
        for timing in timings.load():
            if (timing.gpu, timing.versions) == place:
                known = found.setdefault((timing.epilogue, timing.problem.key), {})
                known[timing.problem.images] = timing.config
    return _found[place]


def _is_near(images, others):
    return abs(math.log(images / others)) <= math.log(_NEAR)


def _time(candidates, run, device):
    """The candidates' median microseconds, a dict without those that fail.

    And whether none failed for want of memory, which another time may be there.
    """
    complete = True
    calls = {config: functools.partial(run, config) for config in candidates}
    samples = {config: [] for config in candidates}
    with tape.unnoticed(), torch.no_grad():
        for turn in range(_SAMPLES + 1):
            for config, call in list(calls.items()):
                try:
                    if turn == 0:
                        call()  # Compiles; PyTorch's library makes its own choice.
                    else:
                        samples[config].append(microseconds(call, device))
                except Exception as error:  # Too many registers, too little memory: it is out.
                    complete &= not isinstance(error, torch.OutOfMemoryError)
                    del calls[config]
    return {config: statistics.median(samples[config]) for config in calls}, complete


def _keep(device, rides, problem, fastest, times):
    library = times.get(tiles.LIBRARY)
    timings.add(
        timings.Timing(
            *where(device),
            rides,
            problem,
            fastest,
            us=f"{times[fastest]:.2f}",
            library_us="" if library is None else f"{library:.2f}",
        )
    )
