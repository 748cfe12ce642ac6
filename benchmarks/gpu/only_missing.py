"""A pytest plugin: run only tests that have not passed yet, and note those that do.

The file that GENFAST_PASSED names is {"digest": ..., "passed": [ids]}. It is written every few
tests, as the run may be stopped at any time.
"""

import json
import os
from pathlib import Path

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

    def pytest_sessionfinish(self):
        if "PYTEST_XDIST_WORKER" not in os.environ:
            self._write()

    def _write(self):
        self._content["passed"] = sorted(self._passed)
        partial = self._path.with_suffix(".part")
        partial.write_text(json.dumps(self._content, indent=0))
        partial.replace(self._path)
        self._unwritten = 0


def pytest_configure(config):
    """Called by pytest."""
    config.pluginmanager.register(OnlyMissing(Path(os.environ["GENFAST_PASSED"])))
