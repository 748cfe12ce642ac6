"""What a launch would cost on a GPU: four terms, of which the largest is taken.

It is a model, not a measurement: it ranks kernels and forbids some, and proves no speed. It knows
nothing of how long an instruction's result takes, of caches, or of kernels that overlap.
"""

import math
import re
from dataclasses import dataclass

from benchmarks.model.formulas import formula


@dataclass(frozen=True)
class GPU:
    """One card, from its maker's datasheet and CUDA's programming guide ("compute capabilities").

    clock: GHz while it computes.
    bandwidth: of its memory, TB/s.
    bf16: its dense bfloat16 products with float32 sums, TFLOP/s.
    macs: such multiply-adds of one multiprocessor in a cycle.
    shared: bytes of shared memory of a multiprocessor.
    warps, blocks: that a multiprocessor holds at most.
    """

    name: str
    architecture: str
    multiprocessors: int
    clock: float
    bandwidth: float
    bf16: float
    macs: int
    shared: int
    warps: int
    blocks: int


GPUS = {
    "h100": GPU("H100 SXM", "sm_90", 132, 1.755, 3.35, 989.4, 2048, 228 << 10, 64, 32),
    "h200": GPU("H200 SXM", "sm_90", 132, 1.755, 4.8, 989.4, 2048, 228 << 10, 64, 32),
    "a100": GPU("A100 SXM 80 GB", "sm_80", 108, 1.41, 2.039, 312, 1024, 164 << 10, 64, 32),
    "rtx4090": GPU("RTX 4090", "sm_89", 128, 2.52, 1.008, 165.2, 256, 100 << 10, 48, 24),
}

REGISTERS = 64 << 10  # Of a multiprocessor, on all of these.
SCHEDULERS = 4  # Each issues one instruction a cycle.
RESERVED_SHARED = 1 << 10  # Bytes a program takes beside its own, from compute capability 8.0 on.
# What streaming kernels reach of a datasheet's bandwidth: 3.0 of an H100's 3.35 TB/s.
REACHED_BANDWIDTH = 0.9
# A product's ramps and address arithmetic, assumed; and what waiting inside a K step costs.
TENSOR_OVERHEAD = 1.15
WAITING_OVERHEAD = 1.5
# What a warp's own instructions reach of a warpgroup's rate on an H100: Luo et al. (2024,
# arXiv:2402.13499) measured 63 %.
SYNCHRONOUS_ON_HOPPER = 0.63
# From a load to its value, out of an H100's memory or far L2: microbenchmarks say 500 to 700.
MEMORY_LATENCY_CYCLES = 600
LAUNCH_US = 1.5  # Between two kernels of one CUDA graph, with the ramp of the second.
# How far the products of cuDNN and cuBLAS stay from the datasheet, assumed for PyTorch's own.
LIBRARY_OVERHEAD = 1.25

TERMS = ("issue", "tensor", "memory", "latency")


@dataclass(frozen=True)
class Cost:
    """One launch. Times are in microseconds.

    launch: the `recording.Launch`.
    layer, about: what it works on, in words; `layer` alone says it whatever the batch.
    code: its `machine_code.Code`; None for PyTorch's operation, of which all up to `issue` is 0.
    shared: bytes of shared memory of a program.
    resident: programs that fit a multiprocessor at once.
    waves: rounds in which the GPU takes all programs.
    instructions: executed by all warps.
    tensor_cycles: of the tensor cores of one multiprocessor, for all its programs.
    issue, tensor, memory, latency: the four terms.
    flops: of the product in the launch.
    floor: no kernel can do better: the product at the datasheet's rate or each tensor moved once.
    """

    launch: object
    layer: str
    about: str
    code: object
    shared: int
    resident: int
    waves: int
    instructions: int
    tensor_cycles: float
    issue: float
    tensor: float
    memory: float
    latency: float
    flops: int
    floor: float

    @property
    def bound(self):
        """The name of the largest term."""
        return max(TERMS, key=lambda term: getattr(self, term))

    @property
    def shape(self):
        """On what it works, in words."""
        return f"{self.layer} {self.about}".strip()

    @property
    def predicted(self):
        return getattr(self, self.bound) + LAUNCH_US


def kernel_cost(launch, code, warps, shared, gpu):
    """The `Cost` of a launch of one of genfast's kernels.

    Args:
        launch: a `recording.Launch`.
        code: its `machine_code.Code`.
        warps, shared: of a program; shared memory in bytes.
        gpu: a `GPU`.

    Raises:
        LookupError: `formulas.FORMULAS` does not know the kernel or one of its loops.
    """
    kernel, arguments = formula(launch)
    flops = kernel.flops(arguments)
    runs = passes(code, kernel.passes(arguments), launch.name)
    resident = programs_per_multiprocessor(gpu, code.registers, warps, shared)
    busiest = math.ceil(launch.programs / gpu.multiprocessors)
    waves = math.ceil(launch.programs / (gpu.multiprocessors * resident))
    executed = sum(r.instructions * times for r, times in zip(code.regions, runs, strict=True))
    tensor_cycles = busiest * sum(
        _tensor_cycles(region, warps, gpu) * times
        for region, times in zip(code.regions, runs, strict=True)
    )
    waiting = sum(
        _latency_cycles(region, launch.arguments.get("num_stages", 1)) * times
        for region, times in zip(code.regions[1:], runs[1:], strict=True)
    )
    microseconds = 1 / (gpu.clock * 1e3)
    return Cost(
        launch=launch,
        layer=kernel.layer(arguments),
        about=kernel.about(arguments),
        code=code,
        shared=shared,
        resident=resident,
        waves=waves,
        instructions=round(launch.programs * warps * executed),
        tensor_cycles=tensor_cycles,
        issue=busiest * warps * executed / SCHEDULERS * microseconds,
        tensor=tensor_cycles * microseconds,
        memory=memory_us(launch.bytes, gpu),
        latency=waves * waiting * microseconds,
        flops=flops,
        floor=max(arithmetic_us(flops, gpu), memory_us(launch.bytes, gpu)),
    )


def library_cost(launch, gpu):
    """The `Cost` of an operation of PyTorch: its bytes, and its product as a library would."""
    arithmetic, memory = arithmetic_us(launch.flops, gpu), memory_us(launch.bytes, gpu)
    return Cost(
        launch=launch,
        layer="",
        about="PyTorch",
        code=None,
        shared=0,
        resident=0,
        waves=0,
        instructions=0,
        tensor_cycles=0.0,
        issue=0.0,
        tensor=arithmetic * LIBRARY_OVERHEAD,
        memory=memory,
        latency=0.0,
        flops=launch.flops,
        floor=max(arithmetic, memory),
    )


def arithmetic_us(flops, gpu):
    """Microseconds for a product at the datasheet's rate."""
    return flops / (gpu.bf16 * 1e6)


def memory_us(moved, gpu):
    """Microseconds to move so many bytes at the bandwidth that kernels reach."""
    return moved / (gpu.bandwidth * REACHED_BANDWIDTH * 1e6)


def programs_per_multiprocessor(gpu, registers, warps, shared):
    """How many programs of so many registers a thread, warps and shared bytes fit at once.

    Registers are given to warps in units of 256, to each scheduler's warps out of its quarter.
    """
    each = max(256, math.ceil(registers * 32 / 256) * 256)
    by_registers = REGISTERS // SCHEDULERS // each * SCHEDULERS // warps
    by_shared = gpu.shared // (math.ceil((shared + RESERVED_SHARED) / 128) * 128)
    return max(1, min(by_registers, by_shared, gpu.warps // warps, gpu.blocks))


def passes(code, times, name):
    """How often each region of the code runs in one program.

    Args:
        code: a `machine_code.Code`.
        times: by the loop's "function.variable", for each time that the loop is entered.
        name: of the kernel, for the error.

    Raises:
        LookupError: the machine code has a loop that `times` does not know.
    """
    found = [1]
    for region in code.regions[1:]:
        if region.source not in times:
            raise LookupError(
                f"expected the formula of {name} to say how often {region.source or 'a loop'} "
                f"runs, got one that knows {sorted(times)}"
            )
        total = times[region.source]
        widest = max(r.unroll for r in code.regions if r.line == region.line)
        if region.unroll > 1:
            total = total // region.unroll
        elif widest > 1:
            total = total % widest
        found.append(found[region.parent] * total)
    return found


def _tensor_cycles(region, warps, gpu):
    """Cycles that the tensor cores of a multiprocessor need for one pass of one program."""
    slowed = 0.0
    for opcode, count in region.multiplications.items():
        reached = SYNCHRONOUS_ON_HOPPER if "sm_90:HMMA" in f"{gpu.architecture}:{opcode}" else 1.0
        slowed += count * multiply_adds(opcode, warps) / rate(opcode) / reached
    waiting = WAITING_OVERHEAD if region.waits_inside else 1.0
    return slowed / gpu.macs * TENSOR_OVERHEAD * waiting


def multiply_adds(opcode, warps):
    """Of one matrix instruction in all warps of a program.

    A warpgroup of four warps computes an HGMMA together, a warp an HMMA alone.
    """
    return _shape(opcode) * warps // (4 if "GMMA" in opcode else 1)


def _shape(opcode):
    """Of one matrix instruction: of HGMMA.64x128x16 64 * 128 * 16, of HMMA.16816 16 * 8 * 16."""
    if wide := re.search(r"\.(\d+)x(\d+)x(\d+)", opcode):
        return math.prod(map(int, wide.groups()))
    shapes = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "16832": 16 * 8 * 32, "1684": 16 * 8 * 4}
    shape = re.search(r"\.(\d+)", opcode)
    if not shape or shape[1] not in shapes:
        raise LookupError(f"expected a matrix instruction of a known shape, got {opcode}")
    return shapes[shape[1]]


def rate(opcode):
    """How many times faster than on bfloat16 a matrix instruction is on its own dtype."""
    if "TF32" in opcode:
        return 0.5
    return 2.0 if opcode.startswith(("QGMMA", "IGMMA", "IMMA", "QMMA")) else 1.0


def _latency_cycles(region, stages):
    """Cycles that one pass of a loop cannot go below, because it waits for memory.

    A load into registers is waited for in the same pass. Of asynchronous loads as many passes are
    on their way as the pipeline has stages beyond the one in use.
    """
    if region.loads == "waiting":
        return MEMORY_LATENCY_CYCLES
    if region.loads == "asynchronous":
        return MEMORY_LATENCY_CYCLES / max(1, stages - 1)
    return 0.0
