"""What is timed at a product's first use: the choice, when there is one, its file, and no trace."""

import itertools
import os
import re
import subprocess
import sys
import threading
import time
import warnings
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_configurations import problem

from benchmarks.cold_start import caches
from benchmarks.gpu.problems import forced, recorded
from genfast import cli, functional
from genfast.geometry import ConvGeometry
from genfast.launch import conv, first_use, start, tape, tiles, timings
from genfast.launch.epilogue import PLAIN, Epilogue
from genfast.launch.operand import Output
from genfast.nn import FusedSequential

pytest.importorskip("triton", reason="it is about Triton kernels")
pytestmark = pytest.mark.kernels

ROOT = Path(__file__).parents[1]
TILES = tuple(
    tiles.GemmConfig(m, n, 32, 4, 2, descriptors)
    for m, n, descriptors in ((64, 32, True), (32, 32, True), (64, 32, False), (32, 64, True))
)
GEOMETRY = ConvGeometry.conv((6, 6), (4, 4), (2, 2), (1, 1))


@pytest.fixture
def on(monkeypatch, tmp_path):
    """First uses are timed here, without a GPU too; the folder of their file."""
    monkeypatch.setattr(first_use, "why_no_clock", lambda device: None)
    monkeypatch.setattr(first_use, "_found", {})
    monkeypatch.setattr(timings, "_warned", set())
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(tiles, "shipped", lambda *_: TILES)
    monkeypatch.setattr(tiles, "TUNED", tmp_path / "tuned.csv")
    monkeypatch.delenv("GENFAST_AUTOTUNE", raising=False)
    monkeypatch.setenv("GENFAST_CACHE_DIR", str(tmp_path / "cache"))
    torch.use_deterministic_algorithms(False)
    cached = (tiles.tuned, tiles.gemm_config, tiles.ranked)
    for function in cached:
        function.cache_clear()
    yield tmp_path / "cache"
    for function in cached:
        function.cache_clear()


@pytest.fixture
def clock(on, monkeypatch):
    """What each configuration takes, 50 if nothing is said here; or an error."""
    times = {}

    def read(call, device):
        taken = times.get(call.args[-1], 50.0)
        if isinstance(taken, Exception):
            raise taken
        return taken

    monkeypatch.setattr(first_use, "microseconds", read)
    return times


class Runs(list):
    """Notes the configurations that run."""

    def __call__(self, config):
        self.append(config)

    @property
    def timed(self):
        return len(self) > 0


def choose(images=128, run=None, epilogue=PLAIN, architecture="sm_90", **changes):
    run = Runs() if run is None else run
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    asked = problem(images, **changes)
    return first_use.config(architecture, asked, epilogue, run, device)


def candidates_of(images=128):
    """What is timed, the model's first."""
    best = tiles.ranked("sm_90", problem(images))
    return *best[:3], tiles.LIBRARY


def restart():
    """As a new process: what is in memory is gone."""
    first_use._found.clear()


@pytest.mark.parametrize("winner", range(4))
def test_the_fastest_is_taken(winner, clock):
    fastest = candidates_of()[winner]
    clock[fastest] = 49.0
    runs = Runs()
    assert choose(run=runs) == fastest
    assert tuple(runs) == candidates_of()
    again = Runs()
    assert choose(run=again) == fastest
    assert not again.timed


def test_the_model_keeps_what_is_as_fast(clock):
    assert choose() == tiles.gemm_config("sm_90", problem(128))


def test_the_median_decides(on, monkeypatch):
    expected, other, *_ = candidates_of()
    samples = {
        expected: itertools.cycle([10.0, 10.0, 10.0, 900.0, 900.0]),
        other: itertools.cycle([9.0, 11.0, 11.0, 11.0, 1.0]),
    }
    slow = itertools.repeat(20.0)
    monkeypatch.setattr(
        first_use, "microseconds", lambda call, device: next(samples.get(call.args[-1], slow))
    )
    assert choose() == expected


def test_float32_without_tensor_cores_is_timed_too(clock):
    runs = Runs()
    clock[TILES[0]] = 49.0
    assert choose(run=runs, precision="ieee") == TILES[0]
    assert runs == [tiles.LIBRARY, *TILES[:2]]


def test_what_a_table_says_is_not_timed(clock):
    tiles.write_tuned([("sm_90", problem(1024), TILES[3])])
    runs = Runs()
    assert choose(run=runs) == TILES[3]
    assert not runs.timed
    choose(run=runs, operation="dgrad")
    assert runs.timed


@pytest.mark.parametrize("at", ["compiling", "timing"])
def test_who_fails_is_out(at, clock):
    first, second, third, library = candidates_of()
    clock |= {first: 1.0, second: 2.0, third: 3.0}
    if at == "timing":
        clock[first] = RuntimeError("too many registers")
    tried = Runs()

    def run(config):
        tried.append(config)
        if at == "compiling" and config == first:
            raise RuntimeError("too many registers")

    assert choose(run=run) == second
    assert choose(run=run) == second
    assert tried == [first, second, third, library]
    restart()
    assert choose(run=run) == second  # From the file.
    assert len(tried) == 4


def test_want_of_memory_is_not_for_ever(clock):
    first, second, *_ = candidates_of()
    clock |= {first: torch.OutOfMemoryError("none left"), second: 2.0}
    assert choose() == second
    assert choose() == second
    restart()
    clock[first] = 1.0
    assert choose() == first


def test_where_all_fail_the_caller_meets_the_error(clock, on, device, monkeypatch):
    clock |= dict.fromkeys(candidates_of(), RuntimeError("no"))
    assert choose() == candidates_of()[0]
    assert not on.exists()

    def fail(*_, **__):
        raise RuntimeError("the kernels are broken")

    monkeypatch.setattr(start, "kernel", fail)
    monkeypatch.setattr(conv.library, "wgrad", fail)
    x, _, dy = operands(device)
    with pytest.raises(RuntimeError, match="the kernels are broken"):
        conv.wgrad(x, dy, GEOMETRY)


def test_an_interrupt_is_no_failure(clock):
    def run(config):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        choose(run=run)
    runs = Runs()
    choose(run=runs)
    assert runs.timed


def test_batches_about_as_large_share(clock):
    choose(128)
    for images, timed in ((97, False), (64, False), (256, False), (63, True), (1024, True)):
        runs = Runs()
        choose(images, run=runs)
        assert runs.timed == timed, images


def test_what_rides_on_a_product_is_part_of_it(clock, device):
    z = torch.zeros(2, 4, 3, 3, device=device)
    vectors = torch.zeros(2, 5, 4, device=device)
    epilogues = (
        PLAIN,
        Epilogue(bias=vectors[0, 0]),
        Epilogue(groups=1),
        Epilogue(groups=2),
        Epilogue(vectors=vectors[:1]),
        Epilogue(activation="relu"),
        Epilogue(activation="tanh"),
        Epilogue(output=Output(z, None, "relu", 0.0)),
        Epilogue(output=Output(z, None, "relu", 0.0), sums=True),
        Epilogue(output=Output(z, vectors, "relu", 0.0)),
        Epilogue(output=Output(z, vectors[:1], "relu", 0.0)),
    )
    for epilogue in epilogues:
        runs = Runs()
        choose(epilogue=epilogue, run=runs)
        assert runs.timed, epilogue
    assert len({first_use.words(epilogue) for epilogue in epilogues}) == len(epilogues)
    restart()
    for epilogue in epilogues:
        runs = Runs()
        choose(epilogue=epilogue, run=runs)
        assert not runs.timed, epilogue


@pytest.mark.parametrize(
    ("benchmark", "asked", "deterministic", "reason"),
    [
        (True, None, False, None),
        (True, "", False, None),
        (True, "1", False, None),
        (False, "1", False, None),
        (False, None, False, "cudnn.benchmark is off, and GENFAST_AUTOTUNE is not 1"),
        (False, "0", False, "GENFAST_AUTOTUNE is 0"),
        (True, "0", False, "GENFAST_AUTOTUNE is 0"),
        (True, None, True, "use_deterministic_algorithms is on"),
        (True, "1", True, "use_deterministic_algorithms is on"),
    ],
)
def test_when_it_is_on(benchmark, asked, deterministic, reason, clock, monkeypatch, device):
    fastest = candidates_of()[1]
    clock[fastest] = 1.0
    assert choose() == fastest  # Known, which counts only where it is on.
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", benchmark)
    if asked is not None:
        monkeypatch.setenv("GENFAST_AUTOTUNE", asked)
    torch.use_deterministic_algorithms(deterministic)
    why = first_use.why_off(device)
    assert why is None if reason is None else reason in why
    runs = Runs()
    for images in (128, 1024):
        expected = tiles.gemm_config("sm_90", problem(images)) if reason else fastest
        assert choose(images, run=runs) == expected
    assert runs.timed == (reason is None)


def test_nothing_else_can_be_asked(on, monkeypatch, device):
    monkeypatch.setenv("GENFAST_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="expected GENFAST_AUTOTUNE to be 0 or 1, got 'yes'"):
        first_use.why_off(device)


def test_what_is_interpreted_is_not_timed():
    assert "device cpu" in first_use.why_no_clock(torch.device("cpu"))
    if os.environ["TRITON_INTERPRET"] == "1":
        assert "interpreted" in first_use.why_no_clock(torch.device("cuda"))
    else:
        assert first_use.why_no_clock(torch.device("cuda")) is None


def test_nothing_is_timed_into_a_graph(clock, monkeypatch):
    clock[candidates_of()[1]] = 1.0
    capturing = True
    monkeypatch.setattr(first_use, "is_captured", lambda device: capturing)
    runs = Runs()
    assert choose(run=runs) == candidates_of()[0]
    assert not runs.timed
    capturing = False
    assert choose(run=runs) == candidates_of()[1]
    capturing = True
    assert choose(run=runs) == candidates_of()[1]  # What the warm-up found.
    assert len(runs) == 4


def test_who_forces_a_configuration_gets_it(clock, device):
    x, weight, _ = operands(device)
    runs = Runs()
    with forced(TILES[3]):
        assert choose(run=runs) == TILES[3]
    with recorded() as problems:
        conv.fprop(x, weight, GEOMETRY)
    assert len(problems) == 1
    assert not runs.timed and not first_use._found
    choose(run=runs)
    assert runs.timed


def test_benchmarks_of_a_first_step_time_its_first_uses(monkeypatch, tmp_path):
    for name, value in caches(str(tmp_path)).items():
        monkeypatch.setenv(name, value)
    assert timings.path().is_relative_to(tmp_path)


# The file.


def test_a_file_keeps_it(clock, on):
    fastest, library = candidates_of()[2:]
    clock |= {fastest: 12.5, library: 67.875}
    choose()
    text = (on / timings.NAME).read_text()
    assert ",12.50,67.88," in text and torch.__version__ in text
    restart()
    runs = Runs()
    assert choose(run=runs) == fastest
    assert not runs.timed


def test_another_gpu_or_version_is_timed_anew(clock, on, monkeypatch):
    where = first_use.where
    choose()
    for place in (("other GPU", "same"), ("other GPU", "newer")):
        monkeypatch.setattr(first_use, "where", lambda device, place=place: place)
        runs = Runs()
        choose(run=runs)
        assert runs.timed
    monkeypatch.setattr(first_use, "where", where)
    restart()
    runs = Runs()
    choose(run=runs)
    assert not runs.timed
    assert len(timings.read(on / timings.NAME)[0]) == 3


def test_versions_name_what_decides(on, monkeypatch, device):
    from genfast.backend import triton

    _, versions = first_use.where(device)
    for word in (torch.__version__, triton.__version__, "genfast", "driver", "cudnn"):
        assert word in versions
    assert versions.endswith(" benchmark")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    assert "benchmark" not in first_use.where(device)[1]


def test_another_kernel_is_another_version(monkeypatch, tmp_path):
    (tmp_path / "conv.py").write_text("1")
    monkeypatch.setattr(first_use.kernels, "__path__", [str(tmp_path)])
    before = first_use._digest()
    assert first_use._digest() == before
    (tmp_path / "conv.py").write_text("2")
    assert first_use._digest() != before


def test_only_what_would_be_timed_is_taken_from_a_file(clock, on):
    choose()
    path = on / timings.NAME
    (timing,), _ = timings.read(path)
    path.unlink()
    timings.add(replace(timing, config=tiles.GemmConfig(7, 7, 7, 3, 9, False)))
    restart()
    runs = Runs()
    assert choose(run=runs) == candidates_of()[0]
    assert runs.timed
    assert timings.read(path) == ([timing], 0)


def test_where_the_file_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.delenv("GENFAST_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert timings.path() == Path("/home/somebody/.cache/genfast", timings.NAME)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert timings.path() == Path("/home/somebody/.cache/genfast", timings.NAME)
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert timings.path() == Path("/caches/genfast", timings.NAME)
    monkeypatch.setenv("GENFAST_CACHE_DIR", "/mine")
    assert timings.path() == Path("/mine", timings.NAME)


WRITE = """
import sys
from test_first_use import timing_of
from genfast.launch import timings

name = sys.argv[1]
print("ready", flush=True)
sys.stdin.read()
for images in range(1, 31):
    timings.add(timing_of(images, name))
"""


def timing_of(images, gpu):
    return timings.Timing(gpu, "v", "", problem(images), TILES[0], "1.00", "")


def test_processes_that_write_at_once(on):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE, name], env=environment, cwd=ROOT,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name in ("one", "two", "three")
    ]  # fmt: skip
    for writer in writers:
        assert writer.stdout.readline() == "ready\n", writer.stderr.read()
    for writer in writers:
        writer.stdin.close()
    path = on / timings.NAME
    seen = 0
    while any(writer.poll() is None for writer in writers):
        found, bad = timings.read(path)
        assert bad == 0
        assert len(found) >= seen  # No line goes once it was there.
        seen = len(found)
        time.sleep(0.002)
    errors = [(writer.wait(), writer.stderr.read()) for writer in writers]
    assert errors == [(0, "")] * 3
    found, bad = timings.read(path)
    expected = {(name, n) for name in ("one", "two", "three") for n in range(1, 31)}
    assert ({(t.gpu, t.problem.images) for t in found}, len(found), bad) == (expected, 90, 0)
    assert {p.name for p in on.iterdir()} == {timings.NAME, timings.NAME + ".lock"}


def test_who_holds_the_lock_for_ever_is_not_waited_for(clock, on, monkeypatch):
    monkeypatch.setattr(timings, "_LOCK_SECONDS", 0.02)
    on.mkdir()
    message = "is kept in this process only: another process holds"
    with timings._locked(on / f"{timings.NAME}.lock"), pytest.warns(UserWarning, match=message):
        choose()
    assert not (on / timings.NAME).exists()
    runs = Runs()
    choose(run=runs)
    assert not runs.timed


def test_lines_that_cannot_be_read(clock, on):
    clock[candidates_of()[1]] = 1.0
    choose()
    choose(operation="dgrad")
    path = on / timings.NAME
    whole = path.read_text()
    header, first, second = whole.splitlines()
    path.write_text("\n".join([header, first, "nonsense", "", first.replace("16x16", "16x")]))
    with open(path, "a") as file:
        file.write("\n" + second[: len(second) // 2])
    restart()
    runs = Runs()
    with pytest.warns(UserWarning, match=r"4 lines that cannot be read") as caught:
        assert choose(run=runs) == candidates_of()[1]
        assert not runs.timed
        choose(run=runs, operation="dgrad")
        restart()
        choose()
    assert runs.timed
    assert len(caught) == 1
    assert path.read_text() == whole  # It is ours: what nobody can read is gone.


@pytest.mark.parametrize(
    "content",
    [b"name,value\n1,2\n", b"\x00\xff\xfe\n", b"\0" * 512, b"a letter\n", None],
    ids=["other columns", "no text", "zeros", "letter", "folder"],
)
def test_what_is_not_ours_stays(content, clock, on):
    clock[candidates_of()[1]] = 1.0
    path = on / timings.NAME
    on.mkdir()
    path.mkdir() if content is None else path.write_bytes(content)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for operation in ("fprop", "dgrad", "wgrad") * 2:
            choose(operation=operation)
        restart()
        choose()
    messages = [str(w.message) for w in caught]
    assert len(messages) == 1, messages
    assert "what first uses find is kept in this process only" in messages[0]
    assert path.is_dir() if content is None else path.read_bytes() == content


def test_an_empty_file_is_filled(clock, on):
    on.mkdir()
    (on / timings.NAME).touch()
    choose()
    assert len(timings.read(on / timings.NAME)[0]) == 1


def test_a_folder_that_cannot_be_written(clock, on):
    on.write_text("a file where the folder would be")
    with pytest.warns(UserWarning, match="find is kept in this process only") as caught:
        for images in (1, 128):
            for _ in range(2):
                choose(images)
    assert len(caught) == 1
    runs = Runs()
    choose(run=runs)
    assert not runs.timed


def test_a_disk_that_is_full(clock, on, monkeypatch):
    choose()
    before = (on / timings.NAME).read_bytes()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.warns(UserWarning, match="No space left"):
            choose(operation="dgrad")
    assert (on / timings.NAME).read_bytes() == before
    assert {p.name for p in on.iterdir()} == {timings.NAME, timings.NAME + ".lock"}


def test_a_link_stays_one(clock, on, tmp_path):
    on.mkdir()
    (on / timings.NAME).symlink_to(tmp_path / "elsewhere.csv")
    choose()
    assert (on / timings.NAME).is_symlink()
    assert len(timings.read(tmp_path / "elsewhere.csv")[0]) == 1


# Through the products themselves.


def operands(device):
    """x (N, 16, 6, 6), weight (24, 16, 4, 4) and dy, of small integers: sums of them are exact."""
    return (
        torch.randint(-2, 3, shape, device=device).float().to(memory_format=torch.channels_last)
        for shape in ((2, 16, 6, 6), (24, 16, 4, 4), (2, 24, 3, 3))
    )


@pytest.mark.one_in(2)
@pytest.mark.parametrize("operation", ["fprop", "dgrad", "wgrad", "statistics", "gradient"])
@pytest.mark.parametrize("winner", range(4))
def test_whatever_is_taken_computes_the_same(operation, winner, clock, device, monkeypatch):
    candidates_of_problem = first_use._candidates

    def candidates(*facts):
        found = candidates_of_problem(*facts)
        clock[found[winner]] = 1.0
        return found

    monkeypatch.setattr(first_use, "_candidates", candidates)
    x, weight, dy = operands(device)
    output = Output(x, torch.ones(1, 5, 16, device=device), "relu", 0.0)
    product = {
        "fprop": lambda: conv.fprop(x, weight, GEOMETRY)[0],
        "dgrad": lambda: conv.dgrad(dy, weight, GEOMETRY)[0],
        "wgrad": lambda: conv.wgrad(x, dy, GEOMETRY),
        "statistics": lambda: conv.fprop(x, weight, GEOMETRY, Epilogue(groups=1))[0],
        "gradient": lambda: conv.dgrad(dy, weight, GEOMETRY, Epilogue(output=output))[0],
    }[operation]
    with first_use.switched_off():
        expected = product()
    assert torch.equal(product(), expected)
    assert torch.equal(product(), expected)
    (timing,) = timings.load()
    assert [timing.config] == list(clock)


def test_library_runs_where_it_is_faster(clock, device, started):
    x, weight, _ = operands(device)
    clock[tiles.LIBRARY] = 1.0
    conv.fprop(x, weight, GEOMETRY, Epilogue(groups=1))
    # Each candidate ran with its statistics, of which the library's are a pass of their own.
    assert started.count("fprop") == 3
    assert started.count("tile_statistics") == 2
    started.clear()
    conv.fprop(x, weight, GEOMETRY, Epilogue(groups=1))
    assert started == ["tile_statistics"]


def block(device):
    """A step of a block with batch norm: all that it returns and changes."""
    torch.manual_seed(0)
    x = torch.randn(4, 16, 6, 6, device=device).to(memory_format=torch.channels_last)
    weight = torch.randn(24, 16, 4, 4, device=device).to(memory_format=torch.channels_last)
    x.requires_grad_(), weight.requires_grad_()
    state = dict(
        running_mean=torch.zeros(24, device=device),
        running_var=torch.ones(24, device=device),
        num_batches_tracked=torch.tensor(0, device=device),
    )
    y = functional.conv_block(x, weight, None, 2, 1, norm=True, activation="relu", **state)
    y.square().sum().backward()
    versions = [t._version for t in (x, weight, *state.values())]
    generators = [torch.get_rng_state()]
    if device.type == "cuda":
        generators.append(torch.cuda.get_rng_state(device))
    return [y, x, weight, x.grad, weight.grad, *state.values(), *generators], versions


def test_nothing_of_the_user_changes(clock, device):
    with first_use.switched_off():
        expected, versions = block(device)
    assert not first_use._found
    found, changed = block(device)
    assert sum(map(len, first_use._found.values())) == 3
    assert changed == versions
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_one_result_at_a_time(clock):
    results = []

    def run(config):
        assert not [r for r in results if r() is not None]
        result = torch.empty(8)
        results.append(weakref.ref(result))
        return result

    choose(run=run)
    assert len(results) == 4


def test_no_graph_is_built(clock):
    weight = torch.ones(1, requires_grad=True)
    graphs = []
    choose(run=lambda config: graphs.append((weight * 2).requires_grad))
    assert graphs == [False] * 4
    assert torch.is_grad_enabled()


def test_threads_time_a_product_once(clock):
    runs = Runs()

    def run(config):
        time.sleep(0.002)
        runs.append(config)

    threads = [threading.Thread(target=choose, kwargs=dict(run=run)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(runs) == 4


@pytest.fixture
def layers(device):
    """A chain of one product."""
    chain = FusedSequential(torch.nn.Conv2d(16, 24, 4, 2, 1), torch.nn.ReLU())
    return chain.to(device, memory_format=torch.channels_last)


def test_a_tape_holds_none_of_it(layers, clock, device, started, monkeypatch):
    """Not even where the call that is recorded is the first that may be timed."""
    x, _, _ = operands(device)
    calls = []
    with torch.no_grad():
        for capturing in (True, False, False, False):
            monkeypatch.setattr(first_use, "is_captured", lambda device, so=capturing: so)
            started.clear()
            y = layers(x)
            calls.append((list(started), y))
    (plain, expected), (timed, _), *replays = calls
    assert len(timed) > len(plain) == 1
    assert any(isinstance(known, tape.Tape) for known in tape._tapes.values())
    for names, y in replays:
        assert names == plain
        assert torch.equal(y, expected)


def test_no_tape_outlives_the_settings(layers, clock, device, started, monkeypatch):
    clock[tiles.LIBRARY] = 1.0
    x, _, _ = operands(device)
    runs = []

    def call(times):
        for _ in range(times):
            started.clear()
            layers(x)
        runs.append(list(started))

    with torch.no_grad():
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
        call(3)
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
        call(1)  # Is timed.
        call(2)
        torch.use_deterministic_algorithms(True)
        call(1)
    ours, timed, librarys, deterministic = runs
    assert ours == deterministic == ["fprop"]
    assert len(timed) == 3
    assert librarys == []


# The clock.


class _Event:
    """Stands in for an event of a GPU that needs so many cycles of rest to be behind."""

    needed = 0
    waited = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        pass

    def query(self):
        return _Event.waited < _Event.needed

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 0.5


@pytest.mark.parametrize(("needed", "waits"), [(0, 1), (5 * 10**6, 2), (10**9, 3)])
def test_a_gpu_that_overtakes_the_host_waits_longer(needed, waits, monkeypatch):
    slept, calls = [], []

    def sleep(cycles):
        slept.append(cycles)
        _Event.waited = cycles

    monkeypatch.setattr(_Event, "needed", needed)
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    us = first_use._sample(lambda: calls.append(1), 5)
    assert us == 100.0
    assert slept == list(first_use._WAITS[:waits])
    assert len(calls) == 5 * waits


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_clock_of_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    a, b = (torch.randn(n, n, device=device) for n in (256, 4096))
    short, long = (first_use.microseconds(lambda m=m: m @ m, device) for m in (a, b))
    assert 0 < short < long
    assert not first_use.is_captured(device)
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        assert first_use.is_captured(device)
    with torch.cuda.stream(torch.cuda.Stream()):
        assert first_use.microseconds(lambda: b @ b, device) > 0


# genfast env.


def env(capsys):
    assert cli.main(["env", "--device", "cuda" if torch.cuda.is_available() else "cpu"]) == 0
    printed = capsys.readouterr().out
    return (re.search(rf"^{name} +(.*)$", printed, re.M)[1] for name in ("first use", "timings"))


def test_env_says_what_holds(clock, on, capsys, monkeypatch):
    state, file = env(capsys)
    path = on / timings.NAME
    assert state == "timed"
    assert file == f"{path}: 0 products for this GPU and versions, 0 in all"
    choose()
    choose(operation="wgrad")
    timings.add(timing_of(1, "another"))
    monkeypatch.setenv("GENFAST_AUTOTUNE", "0")
    state, file = env(capsys)
    assert state == "not timed, because GENFAST_AUTOTUNE is 0"
    assert file == f"{path}: 2 products for this GPU and versions, 3 in all"
    with open(path, "a") as written:
        written.write("nonsense\n")
    assert list(env(capsys))[1].endswith("3 in all, 1 lines that cannot be read")
    path.write_text("somebody else's\n")
    assert list(env(capsys))[1].startswith(f"not used, because expected {path} to have")


def test_env_creates_nothing(on, capsys):
    env(capsys)
    assert not on.exists()


def test_env_says_what_must_not_be_asked(on, capsys, monkeypatch):
    monkeypatch.setenv("GENFAST_AUTOTUNE", "on")
    assert cli.main(["env"]) == 1
    error = capsys.readouterr().err
    assert error == "genfast: error: expected GENFAST_AUTOTUNE to be 0 or 1, got 'on'\n"
