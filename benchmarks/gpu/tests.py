"""The test suite on the GPU, kernels compiled; tests that have passed are not run again."""

import json
import os
import subprocess
import sys

from benchmarks.gpu.clock import deadline_of_arguments
from benchmarks.gpu.stages import MORE_TO_DO, RESULTS, ROOT, fingerprint_of

_WORKERS = min(14, os.cpu_count() or 1)


def main():
    deadline = deadline_of_arguments(__doc__)
    fingerprint = fingerprint_of("tests")
    passed = RESULTS / "passed.json"
    seen = json.loads(passed.read_text()) if passed.exists() else {}
    if seen.get("fingerprint") != fingerprint:
        passed.write_text(json.dumps({"fingerprint": fingerprint, "passed": []}))
    command = [
        sys.executable, "-m", "pytest", "-q", "-n", str(_WORKERS), "--dist", "worksteal",
        "-p", "no:cacheprovider", "-p", "benchmarks.gpu.only_missing", "--tb=short", "-rfEs",
        "--ignore=tests/test_ahead_of_time.py", "--ignore=tests/test_packaging.py", "tests",
    ]  # fmt: skip
    # Compiled kernels are few enough to share a core with each other.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GENFAST_PASSED": str(passed)}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=deadline.left)
    except subprocess.TimeoutExpired:
        print(f"{len(json.loads(passed.read_text())['passed'])} tests have passed so far")
        return MORE_TO_DO
    return 0 if done.returncode in (0, 5) else 1  # 5: none was left to run.


if __name__ == "__main__":
    sys.exit(main())
