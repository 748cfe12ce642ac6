"""Where the tests run: kernels compiled on a CUDA GPU, or interpreted by Triton on the CPU."""

import math
import os
import signal
import zlib

import interpreter
import pytest
import torch

# Triton settles this when a kernel is decorated, so it must be known before genfast is imported.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"
# cuBLAS asks for this where algorithms must be deterministic.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

from genfast import functional
from genfast.backend import INTERPRETING, triton, use_backend
from genfast.launch import tape

if INTERPRETING:
    interpreter.make_faster()
# Whoever starts the tests in the background may have them ignore interrupts, and so all that they
# start, which some tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Float32 means float32: TF32 would make PyTorch's own error, the yardstick, too large.
torch.backends.cudnn.allow_tf32 = False
# The tests are many and small, and the workers of pytest-xdist fill the cores.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--exhaustive",
        action="store_true",
        help="run every case; without it those marked `exhaustive` are left out, and all but one "
        "in n of those marked `one_in(n)`, unless a test is named",
    )
    parser.addoption(
        "--left-out", action="store_true", help="run the cases that --exhaustive would add"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "kernels: runs on the Triton kernels, and on nothing else")
    config.addinivalue_line(
        "markers",
        "float64: runs kernels in float64, which only the interpreter takes; so does a test with a "
        "parameter of that dtype",
    )
    config.addinivalue_line("markers", "exhaustive: takes long, and differs little from others")
    config.addinivalue_line("markers", "one_in(n): of a test's cases so many are exhaustive")
    config.addinivalue_line(
        "markers",
        "large_memory(gibibytes): needs so much free GPU memory that no other test may run beside",
    )


def pytest_collection_modifyitems(config, items):
    named = any("::" in argument for argument in config.args)
    if not (named or config.getoption("exhaustive")):
        chosen = chosen_cases(items)
        if config.getoption("left_out"):
            chosen = set(items) - chosen
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]


def chosen_cases(items):
    """The test items that run when not every case does."""
    by_test = {}
    for item in items:
        by_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    chosen = set()
    for cases in by_test.values():
        one_in = cases[0].get_closest_marker("one_in")
        if one_in:
            # By a checksum of their names, so that no value goes with another alone.
            cases = sorted(cases, key=lambda item: zlib.crc32(item.nodeid.encode()))
            cases = cases[: math.ceil(len(cases) / one_in.args[0])]
        chosen.update(item for item in cases if not item.get_closest_marker("exhaustive"))
    return chosen


def runs_float64(item):
    """Whether a test item is marked so, or has a parameter of that dtype."""
    called = getattr(item, "callspec", None)
    values = called.params.values() if called else ()
    given = any(getattr(value, "dtype", value) is torch.float64 for value in values)
    return given or item.get_closest_marker("float64") is not None


def pytest_report_header():
    if triton is None:
        return "genfast: Triton is not installed, so tests of the kernels are skipped"
    if INTERPRETING:
        return "genfast: kernels run in Triton's interpreter on the CPU"
    return f"genfast: kernels compiled for {torch.cuda.get_device_name()}"


@pytest.fixture(scope="session")
def device():
    """The device that kernels run on here."""
    return torch.device("cpu" if INTERPRETING else "cuda")


@pytest.fixture(autouse=True)
def environment(request, monkeypatch):
    """Tests marked `kernels` cannot fall back to PyTorch; the others never meet the interpreter."""
    torch.manual_seed(0)
    if not request.node.get_closest_marker("kernels"):
        name = "reference" if INTERPRETING else "auto"
        monkeypatch.setenv("GENFAST_BACKEND", name)  # for processes that the test starts
        with use_backend(name):
            yield
        return
    if triton is None:
        pytest.skip("Triton is not installed")
    if not runs_float64(request.node):  # What a GPU would refuse is refused here too.
        monkeypatch.setattr(functional, "_INTERPRETED_DTYPES", functional._COMPILED_DTYPES)
    elif not INTERPRETING:
        pytest.skip("compiled kernels take no float64")
    # PyTorch then also fills what torch.empty gives with NaN: a kernel must write every element.
    torch.use_deterministic_algorithms(True)
    tape.forget()  # Tests change what kernels are chosen by.
    functional._plans.clear()
    with use_backend("triton"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def round_convolutions():
    """Call it with "ieee", "tf32" or "none", and so do convolutions of float32 from then on.

    The setting is no attribute that pytest's monkeypatch can put back, from its version 9.2 on.
    """
    setting = torch.backends.cudnn.conv
    before = setting.fp32_precision

    def choose(precision):
        setting.fp32_precision = precision

    yield choose
    choose(before)


@pytest.fixture
def started(monkeypatch):
    """The names of the kernels that are started, in order."""
    from genfast.launch import start

    names, run = [], start.kernel

    def starting(kernel, grid, **arguments):
        names.append(kernel.__name__)
        return run(kernel, grid, **arguments)

    monkeypatch.setattr(start, "kernel", starting)
    return names


class _Recorder:
    """Stands in for a graph: replaying runs the function."""

    def __init__(self, device):
        self.device = device

    def warm_up(self, function, times):
        for _ in range(times):
            function()

    def record(self, function):
        return function


@pytest.fixture
def capture_anyway(monkeypatch):
    """Call it, and steps made from then on are captured without a GPU too."""
    from genfast.training.steps import base

    def switch_on():
        monkeypatch.setattr(base, "why_not_captured", lambda device, optimizers: None)
        monkeypatch.setattr(base, "CUDARecorder", _Recorder)

    return switch_on
