"""compute-sanitizer over a small run of every kernel: no access out of bounds, no race."""

import os
import shutil
import subprocess
import sys

from benchmarks.gpu.clock import deadline_of_arguments
from benchmarks.gpu.stages import MORE_TO_DO, ROOT

TOOLS = ("memcheck", "racecheck", "synccheck")
_MOST_SECONDS = 150  # Of each.
_PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")


def main():
    deadline = deadline_of_arguments(__doc__)
    path = os.pathsep.join((os.environ.get("PATH", ""), *_PLACES))
    sanitizer = shutil.which("compute-sanitizer", path=path)
    if sanitizer is None:
        print("expected compute-sanitizer, of NVIDIA's CUDA toolkit, on the PATH: found none")
        return 1
    # PyTorch's allocator would hand out parts of large blocks, whose ends nobody could see.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = []
    # Alone first: that compiles 200 kernels, which would take a tool's time, and what fails then
    # is no tool's finding.
    for tool in ("no tool", *TOOLS):
        command = [sys.executable, "-m", "benchmarks.gpu.each_kernel"]
        if tool != "no tool":
            command = [
                sanitizer, "--tool", tool, "--error-exitcode", "3", "--kernel-name-exclude",
                "kernel_substring=at::", *command,
            ]  # fmt: skip
        print(f"== {tool}", flush=True)
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, timeout=min(_MOST_SECONDS, deadline.left)
            )
        except subprocess.TimeoutExpired:
            print(f"{tool} ran out of time", flush=True)
            return MORE_TO_DO
        if done.returncode:
            failed.append(tool)
    print(f"failed: {', '.join(failed)}" if failed else f"clean: {', '.join(TOOLS)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
