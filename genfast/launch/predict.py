"""How long a product would take, by a model: it chooses tiles and splits where nothing was timed.

A launch costs the largest of what its programs issue, multiply and load, on the multiprocessor that
has most of them, and what the whole GPU moves. The instructions are those counted in machine code,
by descriptors for sm_90 and by pointers for sm_80; `python -m benchmarks.model` counts them anew
for each launch and tests/test_predict.py holds these numbers to that. It is a model: it ranks
tiles, it proves no speed.
"""

import math
from dataclasses import dataclass

SCHEDULERS = 4  # Of a multiprocessor; each issues one instruction a cycle.
# Bytes of L2 a multiprocessor can take in a cycle: 5120 for the 108 of an A100 (NVIDIA's white
# paper). Without it small tiles would look as good as large ones, which load less.
L2_BYTES = 5120 / 108
# A product's ramps, assumed.
TENSOR_OVERHEAD = 1.15
# Until a wave's first loads have come, and what another launch costs, in cycles.
LATENCY = 600
LAUNCH = 2600


@dataclass(frozen=True)
class Chip:
    """multiprocessors; multiply-adds of half precision and bytes of memory in a cycle.

    macs: of one multiprocessor, dense, with float32 sums. bandwidth: of all together, of which
    streaming kernels reach nine tenths. Datasheets: multiply-adds a second / (multiprocessors x
    boost clock), and bytes a second / boost clock.
    """

    multiprocessors: int
    macs: int
    bandwidth: int


CHIPS = {
    "interpreter": Chip(5, 1024, 1000),  # So few that a test's few tiles are several a program.
    "sm_80": Chip(108, 1024, 1300),  # A100
    "sm_86": Chip(82, 256, 500),  # RTX 3090
    "sm_89": Chip(128, 256, 360),  # RTX 4090
    "sm_90": Chip(132, 2048, 1700),  # H100
    "sm_100": Chip(148, 4096, 3900),  # B200
    "sm_120": Chip(170, 256, 670),  # RTX 5090
    "gfx942": Chip(304, 1024, 2270),  # MI300X
}


def chip(architecture):
    """The `Chip` of an architecture; a relative's where it is not in the table."""
    if architecture in CHIPS:
        return CHIPS[architecture]
    return CHIPS["gfx942" if architecture.startswith("gfx") else "sm_86"]


def cycles(config, problem, chip):
    """The predicted cycles of a product by this configuration, splits included."""
    steps, programs = _shape(config, problem)
    if problem.operation != "wgrad":
        return _cycles(config, problem, chip, steps, programs)
    parts = config.splits or splits(config, problem, chip)
    return _split_cycles(config, problem, chip, steps, programs, parts)


def splits(config, problem, chip):
    """In how many parts to cut wgrad's reduction: what is predicted to take least time."""
    steps, programs = _shape(config, problem)
    most = max(1, steps // 4)
    ways = {min(most, n << k) for n in (1, 3) for k in range(12)}
    return min(sorted(ways), key=lambda n: _split_cycles(config, problem, chip, steps, programs, n))


def _split_cycles(config, problem, chip, steps, programs, parts):
    total = _cycles(config, problem, chip, math.ceil(steps / parts), programs * parts)
    if parts > 1:  # Written and read again, by a kernel of its own.
        elements = problem.c_small * problem.c_big * problem.taps
        total += LAUNCH + 8 * parts * elements / chip.bandwidth
    return total


def _cycles(config, problem, chip, steps, programs):
    issued = config.num_warps * _instructions(config, problem, steps) / SCHEDULERS
    macs = chip.macs if problem.precision == "half" else chip.macs / 2
    volume = config.block_m * config.block_n * config.block_k
    multiplied = TENSOR_OVERHEAD * steps * volume / macs
    surface = (config.block_m + config.block_n) * config.block_k
    loaded = steps * surface * problem.itemsize / L2_BYTES
    busiest = math.ceil(programs / chip.multiprocessors)
    stages = max(config.num_stages, 1) * surface * problem.itemsize
    waves = math.ceil(busiest / max(1, min(4, (200 << 10) // stages)))
    working = busiest * max(issued, multiplied, loaded) + waves * LATENCY
    return max(working, problem.bytes / chip.bandwidth)


def _instructions(config, problem, steps):
    """What a warp executes."""
    threads = 32 * config.num_warps
    values = config.block_m * config.block_n // threads  # Of a thread.
    wgrad = problem.operation == "wgrad"
    if config.descriptors:
        step, fixed, each = (170, 250, 10) if wgrad else (105, 230, 4)
    else:
        surface = (config.block_m + config.block_n) * config.block_k
        loads = surface * problem.itemsize / (16 * threads)  # Of 16 bytes.
        loading = 28 + (24 if wgrad else 19.5) * loads
        products = config.block_m * config.block_n * config.block_k / (2048 * config.num_warps)
        step = loading + 1.1 * products
        # All but one stage are filled before the loop.
        fixed, each = 250 + (config.num_stages - 1) * loading, 8
    if problem.statistics:
        each += 6
    return step * steps + fixed + each * values


def _shape(config, problem):
    """Steps of K of one program, unsplit, and programs."""
    k = config.block_k
    if problem.operation == "wgrad":
        pixels = problem.images * math.prod(problem.small)
        rows = _ceil_div(problem.c_small, config.block_m)
        columns = problem.taps * _ceil_div(problem.c_big, config.block_n)
        if problem.c_big < 16:  # Taps and channels are one axis of columns.
            columns = _ceil_div(problem.taps * problem.c_big, config.block_n)
        return _ceil_div(pixels, k), rows * columns
    taps, phases, depth = problem.taps, 1, problem.c_big
    if problem.operation == "dgrad":
        pairs = zip(problem.kernel_size, problem.stride, strict=True)
        taps, phases = math.prod(_ceil_div(*pair) for pair in pairs), math.prod(problem.stride)
        depth = problem.c_small
    programs = _ceil_div(problem.rows, config.block_m) * _ceil_div(problem.columns, config.block_n)
    return taps * _ceil_div(depth, min(k, max(depth, 16))), programs * phases


def _ceil_div(a, b):
    return -(-a // b)
