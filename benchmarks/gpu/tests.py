"""The test suite on the GPU, kernels compiled; tests that have passed are not run again."""

import json
import os
import subprocess
import sys

from benchmarks.gpu.clock import deadline_of_arguments
from benchmarks.gpu.stages import MORE_TO_DO, RESULTS, ROOT, digest_of

_WORKERS = min(14, os.cpu_count() or 1)
SUITE = ("--ignore=tests/test_ahead_of_time.py", "--ignore=tests/test_packaging.py", "tests")
# A test that needs tens of GiB has the GPU for itself: it runs after the workers of the others have
# ended, in one process.
PARTS = (
    ("-m", "not large_memory", "-n", str(_WORKERS), "--dist", "worksteal"),
    ("-m", "large_memory", "-n", "0"),
)
_NONE_LEFT = 5  # pytest's exit status where there was no test to run.


def main():
    deadline = deadline_of_arguments(__doc__)
    digest = digest_of("tests")
    passed = RESULTS / "passed.json"
    seen = json.loads(passed.read_text()) if passed.exists() else {}
    if seen.get("digest") != digest:
        passed.write_text(json.dumps({"digest": digest, "passed": []}))
    # Compiled kernels are few enough to share a core with each other.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GENFAST_PASSED": str(passed)}
    status = 0
    for part in PARTS:
        command = [
            sys.executable, "-m", "pytest", "--exhaustive", "-q", *part, "-p", "no:cacheprovider",
            "-p", "benchmarks.gpu.only_missing", "--tb=short", "-rfEs", *SUITE,
        ]  # fmt: skip
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, timeout=deadline.left)
        except subprocess.TimeoutExpired:
            print(f"{len(json.loads(passed.read_text())['passed'])} tests have passed so far")
            return MORE_TO_DO
        if done.returncode not in (0, _NONE_LEFT):
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
