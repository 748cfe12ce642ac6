"""Starts kernels on a GPU that is not here, up to Triton's last call, and compares two ways there.

    python tests/started_again.py      a JSON object for each start that an earlier one tells of

The driver is stood in for, so what would reach it is seen: once as `start.Known` hands it over, and
once as Triton finds it from the arguments. With another Triton first on PYTHONPATH, it is that one.
Not for TRITON_INTERPRET=1.
"""

import json
from unittest import mock

import torch
import triton
from triton.compiler.compiler import CompiledKernel

from benchmarks.model.driver import AbsentDriver
from genfast import functional, use_backend
from genfast.launch import start
from genfast.nn import DiscriminatorBlock, FusedSequential, GeneratorBlock

# Of what reaches the driver, the compiled kernel first: the profiler's description, made anew.
_DESCRIPTION = 7


def main():
    reached, compared = [], []
    learn, again = start.Known.learn, start.Known.start

    def learning(self, kernel, grid, constants, arguments, compiled):
        learn(self, kernel, grid, constants, arguments, compiled)
        self.told = kernel, grid, constants

    def starting(self, arguments):
        kernel, grid, constants = self.told
        del reached[:]
        again(self, arguments)
        kernel[grid](**constants, **arguments, launch_pdl=True)
        ours, tritons = reached
        differ = [
            i
            for i, (a, b) in enumerate(zip(ours, tritons, strict=True))
            if i != _DESCRIPTION and not (a is b or (isinstance(a, int | float | str) and a == b))
        ]
        compared.append({"kernel": kernel.__name__, "arguments": len(ours), "differ": differ})

    triton.runtime.driver.set_active(AbsentDriver("sm_90"))
    with (
        mock.patch.object(CompiledKernel, "_init_handles", lambda self: None),
        mock.patch.object(CompiledKernel, "run", property(lambda self: _reaching(self, reached))),
        mock.patch.object(CompiledKernel, "function", None, create=True),
        mock.patch.object(functional, "why_device_cannot_run_triton", lambda device: None),
        mock.patch.object(start, "architecture", lambda tensor: "sm_90"),
        mock.patch.object(start, "starts_early", lambda function, device: True),
        mock.patch.object(start.Known, "learn", learning),
        mock.patch.object(start.Known, "start", starting),
        use_backend("triton"),
    ):
        network = FusedSequential(
            GeneratorBlock(16, 32), DiscriminatorBlock(32, 16), GeneratorBlock(16, 3, norm=False)
        ).to(torch.bfloat16)
        for _ in range(5):  # Run, recorded, replayed; known from the first replay on.
            x = torch.randn(4, 16, 8, 8, dtype=torch.bfloat16).requires_grad_()
            network(x.to(memory_format=torch.channels_last)).sum().backward()
    for facts in compared:
        print(json.dumps(facts))


def _reaching(compiled, reached):
    return lambda *arguments: reached.append((compiled, *arguments))


if __name__ == "__main__":
    main()
