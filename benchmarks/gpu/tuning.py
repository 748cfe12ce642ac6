"""Time every sensible tile on every product of training; genfast/launch/tuned.csv gets the best.

Compiling is what takes long, so many processes do it, in turns with the timing. A tile whose
numbers differ from the library's is never chosen.
"""

import json
import math
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from unittest import mock

import torch
from tqdm import tqdm

from benchmarks.gpu.clock import deadline_of_arguments, microseconds
from benchmarks.gpu.problems import bytes_and_flops, call, forced, of_training, rounding
from benchmarks.gpu.stages import MORE_TO_DO, RESULTS, digest_of
from benchmarks.gpu.table import Table
from genfast.launch import start, tiles
from genfast.launch.tiles import LIBRARY, GemmConfig

WORKLOADS = (("dcgan", 128), ("dcgan", 1024), ("conv-vae", 128), ("conv-vae", 1024))
COLUMNS = (
    "architecture", "problem", "config", "us", "error", "chosen", "tflops", "library_us",
)  # fmt: skip
# ||ours - library|| / ||library||: two roundings of the result, at most.
_MOST_ERROR = {2: 1e-2, 4: 2e-3}
_CACHE_BYTES = 256 * 2**20  # Inputs rotate through more memory than any cache holds.
_SHARED_BYTES = 220 * 2**10
_CHUNK = 12  # Products that are compiled, and then timed with nobody else on the GPU.

# block_m, block_n, block_k, warps, stages
_DESCRIPTOR_TILES = (
    (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3),
    (128, 128, 128, 8, 2), (128, 64, 64, 4, 4), (64, 128, 64, 4, 4), (64, 64, 64, 4, 4),
    (128, 32, 64, 4, 4), (64, 32, 64, 4, 4), (64, 16, 64, 4, 4), (64, 32, 32, 8, 3),
)  # fmt: skip
_POINTER_TILES = (
    (128, 128, 64, 8, 3), (128, 128, 32, 4, 4), (128, 64, 64, 4, 3), (64, 128, 64, 4, 3),
    (64, 64, 64, 4, 3), (64, 64, 32, 4, 4), (128, 32, 32, 4, 4), (64, 32, 64, 4, 3),
    (128, 16, 64, 4, 3), (64, 16, 64, 4, 3), (64, 32, 32, 8, 3),
)  # fmt: skip
_SCATTERED_TILES = (
    (64, 64, 32, 8, 2), (128, 32, 32, 8, 2), (64, 32, 32, 8, 2), (64, 32, 32, 4, 2),
    (128, 16, 32, 8, 2), (128, 16, 32, 4, 3), (64, 16, 32, 4, 2), (64, 16, 64, 4, 2),
    (64, 32, 16, 4, 2), (64, 16, 16, 4, 2),
)  # fmt: skip
_SPLITS = (0, 1, 2, 4, 8, 16)  # 0 is what is predicted to be best.


def candidates(problem):
    """The configurations worth timing for a problem, the library's among them."""
    tiles = [(tile, False) for tile in _SCATTERED_TILES if problem.scattered]
    if not problem.scattered:
        tiles = [(tile, True) for tile in _DESCRIPTOR_TILES]
        tiles += [(tile, False) for tile in _POINTER_TILES]
    found = []
    for (m, n, k, warps, stages), descriptors in tiles:
        shared = (m + n) * k * problem.itemsize * stages
        too_wide = n > max(16, 2 * problem.columns - 1) or m > max(64, 2 * problem.rows - 1)
        if not too_wide and shared <= _SHARED_BYTES:
            found.append(GemmConfig(m, n, k, warps, stages, descriptors))
    if problem.operation == "wgrad":
        found = [replace(config, splits=n) for config in found for n in _SPLITS]
    return [*found, LIBRARY]


def main():
    deadline = deadline_of_arguments(__doc__)
    device = torch.device("cuda")
    torch.backends.cudnn.benchmark = True
    table = Table(RESULTS / "tuning.csv", COLUMNS, digest_of("tuning"))
    architecture = start.architecture(torch.empty(1, device=device))
    problems = {}
    for model, batch_size in WORKLOADS:
        problems |= dict.fromkeys(of_training(model, batch_size, device))
    missing = [p for p in problems if {"problem": named(p), "chosen": 1} not in table]
    print(f"{len(problems)} products, {len(missing)} to tune", flush=True)
    _ship(table, architecture)
    finished = _tune(missing, architecture, table, deadline)
    _summarise(table)
    return 0 if finished else MORE_TO_DO


def _tune(problems, architecture, table, deadline):
    """Whether there was time for all of them."""
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        bar = tqdm(total=len(problems), desc="tuning", mininterval=5)
        for start in range(0, len(problems), _CHUNK):
            if deadline.left < 60:
                return False
            chunk = problems[start : start + _CHUNK]
            jobs = [[pool.submit(check, p, config) for config in candidates(p)] for p in chunk]
            errors = [[job.result() for job in of_problem] for of_problem in jobs]
            for problem, of_problem in zip(chunk, errors, strict=True):
                for row in time_all(problem, of_problem, torch.device("cuda")):
                    table.add(row | {"architecture": architecture})
                bar.update()
            _ship(table, architecture)  # Whoever runs out of time ends the process.
    return True


def check(problem, config, device="cuda"):
    """Compile a configuration for a problem, run it, and compare.

    Returns:
        The relative error beside the library's result; or why it is out, a string: it does not
        run, or spills.
    """
    launch_small = replace(problem, images=min(problem.images, 256))
    try:
        torch.manual_seed(0)
        function = call(launch_small, device)
        with rounding(problem), forced(LIBRARY):
            expected = _product(function()).float()
        with rounding(problem), forced(config), _compiled() as kernels:
            result = _product(function()).float()
        spills = max((kernel.n_spills for kernel in kernels), default=0)
        if spills:
            return f"{spills} registers spilled"
        return ((result - expected).norm() / expected.norm()).item()
    except Exception as error:  # Whatever a compiler says, the tile is out.
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:200]


@contextmanager
def _compiled():
    """Within, collect the matrix products that are started, as Triton compiled them."""
    kernels = []
    run = start.kernel

    def starting(kernel, grid, **arguments):
        compiled = run(kernel, grid, **arguments)
        if compiled is not None and "BLOCK_K" in arguments:
            kernels.append(compiled)

    with mock.patch.object(start, "kernel", starting):
        yield kernels


def time_all(problem, errors, device):
    """Rows of the table for one problem: each configuration's time, the fastest right one chosen.

    Args:
        problem: a `Problem`.
        errors: of `candidates(problem)`, as `check` gives them.
        device: a `torch.device`.
    """
    moved, flops = bytes_and_flops(problem)
    copies = max(1, min(8, math.ceil(_CACHE_BYTES / moved)))
    calls = [call(problem, device) for _ in range(copies)]
    rows = []
    for config, error in zip(candidates(problem), errors, strict=True):
        us = float("inf")
        if not isinstance(error, str) and error <= _MOST_ERROR[problem.itemsize]:
            with rounding(problem), forced(config):
                us = microseconds(calls)
        rows.append({"config": json.dumps(asdict(config)), "us": us, "error": error})
    best = min(rows, key=lambda row: row["us"])
    library = next((row["us"] for row in rows if '"library": true' in row["config"]), "")
    for row in rows:
        row |= {
            "problem": named(problem),
            "chosen": int(row is best and best["us"] < float("inf")),
            "tflops": f"{flops / row['us'] * 1e-6:.1f}",
            "library_us": library,
            "us": f"{row['us']:.2f}",
        }
    return sorted(rows, key=lambda row: -row["chosen"])


def named(problem):
    """A `Problem` as text."""
    return json.dumps(asdict(problem))


def _product(result):
    return result[0] if isinstance(result, tuple) else result


def _ship(table, architecture):
    """Write the chosen configurations into tuned.csv, beside those of other architectures."""
    rows = []
    for row in table.rows:
        if row["chosen"] == "1":
            facts = {
                k: tuple(v) if isinstance(v, list) else v
                for k, v in json.loads(row["problem"]).items()
            }
            config = GemmConfig(**json.loads(row["config"]))
            rows.append((row["architecture"], tiles.Problem(**facts), config))
    others = [row for row in tiles.read_tuned() if row[0] != architecture]
    tiles.write_tuned(sorted([*others, *rows], key=lambda row: (row[0], row[1].key)))


def _summarise(table):
    chosen = [row for row in table.rows if row["chosen"] == "1"]
    by_library = sum('"library": true' in row["config"] for row in chosen)
    ratios = [float(r["library_us"]) / float(r["us"]) for r in chosen if r["library_us"]]
    failed = sum(row["us"] == "inf" for row in table.rows)
    if ratios:
        print(f"median speed beside the library's: {statistics.median(ratios):.2f}")
    print(
        f"{len(chosen)} products tuned, the library is chosen for {by_library}; "
        f"{failed} of {len(table.rows)} candidates do not run or are wrong"
    )


if __name__ == "__main__":
    sys.exit(main())
