"""How long a fresh process takes to its first step, and the memory that a variant needs alone.

    python -m benchmarks.cold_start '{"model": "dcgan", "variant": "genfast", ...}'

prints one JSON object. Compilers' caches are empty at first: `measure` gives them a new folder.
"""

import json
import os
import resource
import subprocess
import sys
import time

STEPS = 3


def measure(variant, workload, cache):
    """Run a variant in a process of its own.

    Args:
        variant: its name.
        workload: a `Workload`.
        cache: a folder for what compilers keep; empty, or the start is not a cold one.

    Returns:
        A dict: import_s, first_step_s (from building the model to the end of the first step) and
        memory_mib (GPU: most memory allocated at once; CPU: growth of the process beyond imports).
        On failure {"error": the last line it printed}.
    """
    settings = {
        "variant": variant,
        "model": workload.model,
        "batch_size": workload.batch_size,
        "image_size": workload.image_size,
        "width": workload.width,
        "device": str(workload.device),
    }
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cold_start", json.dumps(settings)],
        capture_output=True,
        text=True,
        env=os.environ | caches(cache),
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def caches(folder):
    """Environment variables that make the compilers and genfast keep what they make in `folder`."""
    return {
        "GENFAST_CACHE_DIR": os.path.join(folder, "genfast"),
        "TORCHINDUCTOR_CACHE_DIR": os.path.join(folder, "inductor"),
        "TRITON_CACHE_DIR": os.path.join(folder, "triton"),
    }


def _run(settings):
    started = time.perf_counter()
    import torch

    from benchmarks.variants import VARIANTS
    from benchmarks.workloads import Workload

    device = torch.device(settings["device"])
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.backends.cudnn.benchmark = True
        torch.cuda.init()
    imported = time.perf_counter()
    memory_before = 0 if on_gpu else _peak_of_process()
    names = ("model", "batch_size", "image_size", "width")
    workload = Workload(device=device, **{name: settings[name] for name in names})
    images = workload.images()
    loaded = time.perf_counter()
    step = VARIANTS[settings["variant"]].build(workload)
    built = time.perf_counter() - loaded
    before = time.perf_counter()
    losses = step(images)
    assert all(loss.isfinite().item() for loss in losses)  # Waits for the device.
    first = time.perf_counter()
    for _ in range(STEPS):
        step(images)
    if on_gpu:
        torch.cuda.synchronize()
        memory = torch.cuda.max_memory_allocated() / 2**20
    else:
        memory = _peak_of_process() - memory_before
    return {
        "import_s": imported - started,
        "first_step_s": first - before + built,
        "memory_mib": memory,
    }


def _peak_of_process():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    print(json.dumps(_run(json.loads(sys.argv[1]))))
