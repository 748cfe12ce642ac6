"""A pytest plugin: run only tests that have not passed yet, and note those that do.

The file that GENFAST_PASSED names is {"digest": ..., "passed": [ids]}. It is written every few
tests, as the run may be stopped at any time.

A kernel that reaches memory which is not its own ends its process's use of the GPU: every call
after it fails. A worker of pytest-xdist then ends, and another process takes its place; else the
first such test would make all of its worker's later ones fail, and as these fail fast, most tests.
"""

import json
import os
import sys
from pathlib import Path

import pytest

_EVERY = 20


class OnlyMissing:
    """Knows what has passed. With pytest-xdist, workers deselect and the controller notes."""

    def __init__(self, path):
        self._path = path
        self._content = json.loads(path.read_text())
        self._passed = set(self._content["passed"])
        self._unwritten = 0

    def pytest_collection_modifyitems(self, config, items):
        done = [item for item in items if item.nodeid in self._passed]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item.nodeid not in self._passed]

    def pytest_runtest_logreport(self, report):
        # What was skipped, for want of memory say, is tried again.
        if "PYTEST_XDIST_WORKER" in os.environ or report.when != "call" or not report.passed:
            return
        self._passed.add(report.nodeid)
        self._unwritten += 1
        if self._unwritten >= _EVERY:
            self._write()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        result = yield
        if "PYTEST_XDIST_WORKER" in os.environ and _has_lost_the_gpu():
            os._exit(1)
        return result

    def pytest_sessionfinish(self):
        if "PYTEST_XDIST_WORKER" not in os.environ:
            self._write()

    def _write(self):
        self._content["passed"] = sorted(self._passed)
        partial = self._path.with_suffix(".part")
        partial.write_text(json.dumps(self._content, indent=0))
        partial.replace(self._path)
        self._unwritten = 0


def _has_lost_the_gpu():
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def pytest_configure(config):
    """Called by pytest."""
    config.pluginmanager.register(OnlyMissing(Path(os.environ["GENFAST_PASSED"])))
