"""The time that Python takes for a block or a norm, forward and backward: a fast GPU waits for it.

    python -m benchmarks.host                       of this checkout
    python -m benchmarks.host --against COMMIT      beside that of a commit, in turns

No kernel runs: tensors are on the CPU, of few images, and the kernels' code is that for an H100.
Timed is first what is ours and PyTorch's alone, checks, choices, memory and autograd, with nothing
where a kernel would start; then with Triton's part of a start, up to its call of the driver.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TURNS = 12
CALLS = 200


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host", description=__doc__)
    parser.add_argument("--against", metavar="COMMIT", help="another commit to time beside")
    parser.add_argument("--turns", type=int, default=TURNS, help="of each (default %(default)s)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        trees = {"this checkout": ROOT}
        if options.against:
            trees[options.against] = _extract(options.against, Path(folder))
        found = {name: [] for name in trees}
        for _ in range(options.turns):
            for name, tree in trees.items():
                found[name].append(_measure_in_process(tree))
    print(_table(found))


def _extract(commit, folder):
    """The files of a commit, in a folder of their own."""
    archive = subprocess.run(
        ["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE
    ).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive, check=True)
    return folder


def _measure_in_process(tree):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--measure"]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"expected to time {tree}, got:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout)


def _table(found):
    """Microseconds: the median over turns, and how they compare turn by turn."""
    names = list(found)
    known = [found[name][0].keys() for name in names]
    lines = [" " * 42 + "".join(f"{name:>22}" for name in names)]
    for what in known[0]:
        if not all(what in of for of in known):
            continue  # The other commit knows no such thing.
        times = [[turn[what] for turn in found[name]] for name in names]
        line = f"{what:42}" + "".join(f"{statistics.median(t):19.1f} us" for t in times)
        if len(times) == 2:
            ratio = statistics.median(a / b for a, b in zip(*times, strict=True))
            line += f"   ratio {ratio:.2f}"
        lines.append(line)
    return "\n".join(lines)


def _measure():
    """Microseconds of each part, by what it is."""
    import torch

    from genfast import functional, use_backend

    functional.why_device_cannot_run_triton = lambda device: None
    torch.set_num_threads(1)
    owner, starts, names = _starting()
    setattr(owner, names, lambda tensor: "sm_90")
    start = getattr(owner, starts)
    setattr(owner, starts, lambda *args, **kwargs: None)
    times = {}
    times["autograd alone, forward"], times["autograd alone, backward"] = _nothing(torch)
    with use_backend("triton"):
        for part in ("", ", with Triton"):
            if part:
                _stand_in_for_the_driver()
                setattr(owner, starts, start)
            for name, block, size in (
                ("generator block", functional.conv_transpose_block, (128, 64, 8)),
                ("discriminator block", functional.conv_block, (64, 128, 16)),
            ):
                # Other images than in the first part: what was recorded there starts nothing.
                images = 8 if part else 4
                found = _block(torch, block, images, *size)
                for way, us in zip(("forward", "backward"), found, strict=True):
                    times[f"{name}, {way}{part}"] = us
            if hasattr(functional, "norm_block"):
                for name, run, inputs in _norms(torch, 8 if part else 4):
                    found = _times(torch, run, inputs)
                    for way, us in zip(("forward", "backward"), found, strict=True):
                        times[f"{name}, {way}{part}"] = us
    print(json.dumps(times))


def _stand_in_for_the_driver():
    """Let Triton compile for an H100 and start nothing."""
    import triton
    from triton.compiler.compiler import CompiledKernel

    place = importlib.util.spec_from_file_location("driver", ROOT / "benchmarks/model/driver.py")
    driver = importlib.util.module_from_spec(place)
    place.loader.exec_module(driver)  # This checkout's: a commit may have none.
    triton.runtime.driver.set_active(driver.AbsentDriver("sm_90"))
    CompiledKernel._init_handles = lambda self: None
    CompiledKernel.run = property(lambda self: lambda *arguments: None)
    CompiledKernel.function = None


def _starting():
    """The module that starts kernels, and in there what does and what names the GPU."""
    try:
        return importlib.import_module("genfast.launch.start"), "kernel", "architecture"
    except ImportError:  # Commits of before the kernels' launchers were a package.
        return importlib.import_module("genfast.launch"), "_start", "_architecture"


def _block(torch, block, images, in_channels, out_channels, size):
    """Microseconds of its forward and of its backward pass, in bf16 with weights of that dtype."""
    from genfast import functional

    half = dict(dtype=torch.bfloat16)
    x = torch.randn(images, in_channels, size, size, **half).requires_grad_()
    shape = (out_channels, in_channels, 4, 4)
    if block is functional.conv_transpose_block:
        shape = (in_channels, out_channels, 4, 4)
    x, weight = (
        t.contiguous(memory_format=torch.channels_last).detach().requires_grad_()
        for t in (x, torch.randn(shape, **half))
    )
    gamma, beta = (torch.ones(out_channels).requires_grad_() for _ in range(2))
    mean, var = torch.zeros(out_channels), torch.ones(out_channels)
    counter = torch.tensor(0)

    def run():
        return block(
            x, weight, stride=2, padding=1, norm=True, norm_weight=gamma, norm_bias=beta,
            running_mean=mean, running_var=var, num_batches_tracked=counter,
            activation="leaky_relu",
        )  # fmt: skip

    return _times(torch, run, (x, weight, gamma, beta))


def _norms(torch, images):
    """Of batch norm with ReLU that follow no convolution: name, function, what gets gradients."""
    from genfast import functional
    from genfast.nn import FusedSequential

    x = torch.randn(images, 64, 16, 16, dtype=torch.bfloat16).requires_grad_()
    gamma, beta = (torch.ones(64).requires_grad_() for _ in range(2))
    mean, var, counter = torch.zeros(64), torch.ones(64), torch.tensor(0)

    def run():
        return functional.norm_block(
            x, norm_weight=gamma, norm_bias=beta, running_mean=mean, running_var=var,
            num_batches_tracked=counter, activation="relu",
        )  # fmt: skip

    yield "norm", run, (x, gamma, beta)
    layers = FusedSequential(torch.nn.BatchNorm2d(64), torch.nn.ReLU())
    # Images of another size: the function's tape is not this one's.
    wide = torch.randn(images, 64, 16, 24, dtype=torch.bfloat16).requires_grad_()
    yield "norm, as layers", lambda: layers(wide), (wide, *layers.parameters())


def _nothing(torch):
    """Microseconds of a function of as many tensors that does nothing: autograd's own share."""

    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            return torch.empty_like(tensors[0])

        @staticmethod
        def backward(ctx, dy):
            return ctx.saved_tensors

    inputs = [torch.randn(8).requires_grad_() for _ in range(4)]
    return _times(torch, lambda: Nothing.apply(*inputs), inputs)


def _times(torch, run, inputs):
    dy = torch.empty_like(run())
    forward, backward = [], []
    for _ in range(CALLS):
        started = time.perf_counter()
        y = run()
        between = time.perf_counter()
        torch.autograd.grad(y, inputs, dy)
        ended = time.perf_counter()
        forward.append(between - started)
        backward.append(ended - between)
    # The first calls choose tiles and fill caches.
    return [1e6 * statistics.median(times[CALLS // 4 :]) for times in (forward, backward)]


if __name__ == "__main__":
    if sys.argv[1:] == ["--measure"]:
        _measure()
    else:
        main()
