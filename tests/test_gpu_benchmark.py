"""The parts of `python -m benchmarks.gpu` that a machine without a GPU can try."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="it is about Triton kernels")

from benchmarks.gpu import blocks, each_kernel, overlap, problems, profile, steps, tests, tuning
from benchmarks.gpu.stages import STAGES
from benchmarks.gpu.table import Table
from genfast import use_backend
from genfast.backend import INTERPRETING
from genfast.launch import start, tape

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(not INTERPRETING, reason="tries kernels on the CPU")


def test_a_table_continues_where_it_was_left(tmp_path):
    path = tmp_path / "table.csv"
    first = Table(path, ("name", "value"), "a")
    first.add({"name": "x", "value": 1})
    first.add({"name": "y, z", "value": 2.5})
    again = Table(path, ("name", "value"), "a")
    assert {"name": "y, z"} in again and {"name": "y, z", "value": 2} not in again
    assert [row["value"] for row in again.rows] == ["1", "2.5"]


def test_a_table_drops_what_other_sources_gave(tmp_path):
    Table(tmp_path / "t.csv", ("name",), "a").add({"name": "x"})
    assert {"name": "x"} not in Table(tmp_path / "t.csv", ("name",), "b")


def test_stages_know_their_sources():
    digests = {stage.name: stage.digest for stage in STAGES}
    assert digests["tuning"] != digests["tests"]
    for stage in STAGES:
        missing = {p for p in stage.sources if not list(ROOT.glob(p))}
        assert missing <= {"genfast/launch/tuned.csv"}, stage


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode and "expected a CUDA or ROCm GPU" in done.stderr


def test_profile_adds_up():
    rows = profile.rows_of([("a", 0, 10), ("b", 12, 20), ("a", 20, 30), ("b", 30, 40)], 2)
    found = {row["kernel"]: (float(row["count"]), float(row["us"])) for row in rows}
    assert found == {"a": (1, 10), "b": (1, 9), "(gaps)": (0, 1), "(all)": (2, 20)}
    assert rows[0]["kernel"] == "(all)" and rows[0]["share"] == "1.0000"


def collected(*options):
    """The ids of the tests that pytest would run."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    return [line for line in done.stdout.splitlines() if "::" in line]


@pytest.mark.exhaustive
def test_both_parts_of_the_suite_are_the_suite():
    """Tests that need a GPU's memory for themselves run apart, in one process; none is left out."""
    assert tests.SUITE[-1] == "tests"
    # Two files stand for all, which take a minute to collect.
    some = ("tests/test_gpu.py", "tests/test_stored_values.py")
    beside, alone = (collected(*part, *some) for part in tests.PARTS)
    assert sorted(beside + alone) == sorted(collected(*some))
    assert not set(beside) & set(alone)
    assert {name.partition("[")[0] for name in alone} == {
        f"tests/test_gpu.py::{name}"
        for name in (
            "test_convolutions_beyond_2_to_the_31",
            "test_weight_gradient_beyond_2_to_the_31",
            "test_batch_norm_beyond_2_to_the_31",
            "test_sampling_beyond_2_to_the_31",
        )
    }
    assert tests.PARTS[1][-2:] == ("-n", "0")


def run_what_is_missing(folder, passed, *options):
    """The tests of a folder that the file `passed` does not name, in a pytest of their own."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
    # Where workers run this test too, it would take itself for one of theirs.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(
        [*command, "-p", "benchmarks.gpu.only_missing", *options, folder],
        cwd=folder,
        env=environment | {"GENFAST_PASSED": str(passed), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_only_what_has_passed_is_not_run_again(tmp_path):
    names = ("passes", "fails", "skips")
    (tmp_path / "test_three.py").write_text(
        "import pytest\n"
        "def test_passes(): pass\n"
        "def test_fails(): assert False\n"
        "def test_skips(): pytest.skip('too little memory')\n"
    )
    passed = tmp_path / "passed.json"
    passed.write_text(json.dumps({"passed": []}))
    for workers, again in (("0", names), ("2", names[1:])):
        done = run_what_is_missing(tmp_path, passed, "-v", "-n", workers)
        ran = set(re.findall(r"test_three\.py::test_(\w+)", done.stdout))
        assert ran == set(again), done.stdout
        assert json.loads(passed.read_text())["passed"] == ["test_three.py::test_passes"]


def test_a_worker_that_lost_its_gpu_is_replaced(tmp_path):
    (tmp_path / "test_three.py").write_text(
        "import sys, types\n"
        "lost = []\n"
        "def synchronize():\n"
        "    if lost: raise RuntimeError('CUDA error: an illegal memory access')\n"
        "cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)\n"
        "sys.modules['torch'] = types.SimpleNamespace(cuda=cuda)\n"
        "def test_loses_it(): lost.append(1); synchronize()\n"
        "def test_after_it(): synchronize()\n"
        "def test_last(): synchronize()\n"
    )
    passed = tmp_path / "passed.json"
    passed.write_text(json.dumps({"passed": []}))
    done = run_what_is_missing(tmp_path, passed, "-n", "1", "--dist", "worksteal")
    assert "an illegal memory access" in done.stdout
    names = [name.partition("::")[2] for name in json.loads(passed.read_text())["passed"]]
    assert names == ["test_after_it", "test_last"], done.stdout


@interpreted
def test_products_of_training_are_tuned_and_shipped(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning.tiles, "TUNED", tmp_path / "tuned.csv")
    with use_backend("triton"):
        found = problems.of_training("dcgan", 2, CPU, image_size=16, width=4)
    operations = {problem.operation for problem in found}
    assert operations == {"fprop", "dgrad", "wgrad"} and len(found) == len(set(found))
    table = Table(tmp_path / "tuning.csv", tuning.COLUMNS, "a")
    monkeypatch.setattr(tuning, "_SCATTERED_TILES", tuning._SCATTERED_TILES[-4:])
    for problem in found[1:3]:
        tiles = tuning.candidates(problem)
        assert tuning.LIBRARY in tiles and len(tiles) == len(set(tiles))
        errors = [tuning.check(problem, tile, "cpu") for tile in tiles]
        assert max(errors) < 1e-2
        errors[0] = "CompilationError: too large"
        errors[1] = 0.5
        rows = tuning.time_all(problem, errors, CPU)
        assert [row["chosen"] for row in rows] == [1] + [0] * (len(rows) - 1)
        assert sum(row["us"] == "inf" for row in rows) == 2
        for row in rows:
            table.add(row | {"architecture": "interpreter"})
    tuning._ship(table, "interpreter")
    shipped = tuning.tiles.read_tuned()
    assert [problem for _, problem, _ in shipped] == sorted(found[1:3], key=lambda p: p.key)
    chosen = [json.loads(r["config"]) for r in table.rows if r["chosen"] == "1"]
    assert sorted(map(str, chosen)) == sorted(str(vars(config)) for _, _, config in shipped)


@interpreted
def test_a_tile_that_is_wrong_or_does_not_run_is_noticed(monkeypatch):
    with use_backend("triton"):
        problem, *_ = problems.of_training("dcgan", 2, CPU, image_size=16, width=4)
    tile = tuning.candidates(problem)[0]
    assert isinstance(tuning.check(problem, replace(tile, block_m=48), "cpu"), str)

    def call(*_):
        library = tuning.tiles.gemm_config(None, None).library
        return lambda: torch.tensor([3.0, 4.0]) if library else torch.tensor([3.0, 4.5])

    def called(*args):
        return lambda: call(*args)()

    monkeypatch.setattr(tuning, "call", called)
    assert tuning.check(problem, tile, "cpu") == pytest.approx(0.1)


@interpreted
@pytest.mark.exhaustive  # Other tests run each kernel too; this one is slow, as it runs all.
def test_each_kernel_runs(monkeypatch):
    started = set()
    run = tuning.start.kernel

    def recording(kernel, grid, **arguments):
        started.add(kernel.__name__)
        run(kernel, grid, **arguments)

    monkeypatch.setattr(tuning.start, "kernel", recording)
    # Of each kind of layer that is there, the smallest.
    images = (False, 3, 8, (6, 6), 4, 2, 1), (True, 8, 3, (3, 3), 4, 2, 1)
    images += ((False, 8, 1, (4, 4), 4, 1, 0),)
    with use_backend("triton"):
        each_kernel.main("cpu", [*images, *each_kernel.LAYERS[-2:]], [torch.float32, torch.float16])
    kernels = {
        name
        for path in (ROOT / "genfast" / "launch").glob("*.py")
        for name in re.findall(r"\bkernels\.(\w+),", path.read_text())
    }
    rounds_of_many = {"combine_statistics"}
    assert started == kernels - rounds_of_many


@interpreted
def test_layers_are_timed_beside_eager(tmp_path, monkeypatch):
    monkeypatch.setitem(blocks.LAYERS, "tiny", ([torch.nn.Conv2d(8, 1, 4)], 4))
    table = Table(tmp_path / "blocks.csv", blocks.COLUMNS, "a")
    with use_backend("triton"):
        blocks.time_layer(table, "tiny", 2, CPU, compiled=False)
        blocks.time_sampling(table, CPU, 2048)
    found = [(row["layer"], row["variant"]) for row in table.rows]
    layers = ("tiny", "sampling and KL")
    assert found == [(layer, variant) for layer in layers for variant in ("eager", "genfast")]
    assert all(float(row["us"]) > 0 and float(row["host_us"]) > 0 for row in table.rows)


@pytest.mark.parametrize("is_written", [True, False])
def test_a_run_without_one_variant_is_not_made_again(is_written, tmp_path, monkeypatch):
    ran = []

    def run(command, **_):
        model, batch_size = (
            command[command.index(name) + 1] for name in ("--model", "--batch-size")
        )
        ran.append(model)
        assert command[-1] == "--no-cold-start"
        if is_written:
            (tmp_path / f"throughput_{model}_batch{batch_size}_cuda-x.csv").write_text("")
        return subprocess.CompletedProcess(command, 1)

    (tmp_path / "gpu").mkdir()
    monkeypatch.setattr(steps, "RESULTS", tmp_path)
    monkeypatch.setattr(steps.subprocess, "run", run)
    monkeypatch.setattr(steps.machine, "name", lambda device: "a GPU")
    monkeypatch.setattr(sys, "argv", ["steps"])
    runs = [model for model, *_ in steps.RUNS]
    assert steps.main() == 1 and ran == runs
    assert steps.main() == 0 if is_written else 1
    assert ran == runs if is_written else runs * 2


def test_steps_are_timed_with_and_without_overlap(monkeypatch):
    """Both are the same step, of which what was made first asked for no early start.

    Neither replays what was recorded with the other.
    """
    asked, tapes = [], {"of before": None}
    monkeypatch.setattr(tape, "_tapes", tapes)

    def build(workload):
        assert not tapes
        early = start.starts_early(None, workload.device)
        tapes["of a step"] = early
        return lambda images: (asked.append(early), images.sum() + torch.rand(()))[1:]

    class Workload:
        device = CPU

        def images(self):
            return torch.ones(3)

    monkeypatch.setattr(start, "starts_early", lambda function, device: True)
    monkeypatch.setitem(
        overlap.VARIANTS, "genfast", replace(overlap.VARIANTS["genfast"], build=build)
    )
    row = overlap.compared(Workload(), 0.0, steps=5)
    assert set(row) < set(overlap.COLUMNS) and row["same_bits"]
    assert asked[:10] == [False] * 5 + [True] * 5
    assert float(row["speedup"]) > 0
