"""What `accelerate` alone changes in networks of other people: python -m benchmarks.dropin.

Timed is forward + backward, input gradient included, of a stock network, of a copy under
`torch.compile` and of an accelerated copy, in turns in one run. In float32 the network and its
input are contiguous, as most people have them; in bfloat16, which is timed where it is fast,
channels_last under autocast. The table also says how many convolutions and norms the report of
`accelerate` calls fused, and why none of them runs on the kernels where none does.
"""

import argparse
import copy
import csv
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

import genfast
from benchmarks import machine, plot_dropin, timing
from benchmarks.networks import NETWORKS
from genfast.training.steps.vae import missing_compiler

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "network", "batch_size", "shape", "precision", "memory_format",
    "convolutions", "convolutions_fused", "norms", "norms_fused", "not_on_kernels",
    "stock_images_per_s", "accelerated_images_per_s", "ratio", "p20", "p80",
    "compiled_images_per_s", "compiled_ratio", "compiled_p20", "compiled_p80", "compile_seconds",
    "not_compiled", "turns", "machine", "torch", "triton", "python", "date",
)  # fmt: skip
TURN_SECONDS = 0.3
# What torch.compile may be off, as it adds in other orders than PyTorch's layers.
_OFF_COMPILED = {"fp32": 1e-4, "bf16": 0.1}
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm2d, nn.GroupNorm)


def measure(network, precision, device, seconds, backend="inductor", left_out=""):
    """One row of the table: a dict by the names in `COLUMNS` that describe no machine.

    A ratio is that to the stock network's speed in the same round, with its percentiles. Where
    `torch.compile` fails or computes something else, its figures are None and `not_compiled` says
    so: a graph that breaks counts as a failure, because PyTorch would run the rest uncompiled.

    Args:
        network: a `benchmarks.networks.Network`.
        precision: "fp32" or "bf16".
        device: a `torch.device`.
        seconds: how long to time.
        backend: of `torch.compile`.
        left_out: why `torch.compile` is left out; empty if it is not.

    Raises:
        AssertionError: the accelerated network gives other outputs or gradients.
    """
    torch.manual_seed(0)
    network = network.on(device)
    memory_format = torch.channels_last if precision == "bf16" else torch.contiguous_format
    stock = network.build().to(device, memory_format=memory_format)
    accelerated, compiled, exact = (copy.deepcopy(stock) for _ in range(3))
    report = genfast.accelerate(accelerated)
    x = torch.randn(network.batch_size, *network.shape, device=device)
    if x.dim() == 4:
        x = x.contiguous(memory_format=memory_format)
    steps = {
        "stock": _forward_and_backward(stock, precision),
        "accelerated": _forward_and_backward(accelerated, precision),
    }
    check = _Check(exact, steps["stock"], x, precision)
    wrong = check(steps["accelerated"])
    assert not wrong, f"the accelerated network's {wrong}"
    compile_seconds, reason = None, left_out
    if not left_out:
        started = time.perf_counter()
        step = _forward_and_backward(_compile(compiled, backend), precision)
        reason = missing_compiler(device) if backend == "inductor" else None
        reason = f"there is no {reason}" if reason else _why_not_compiled(check, step, precision)
        compile_seconds = round(time.perf_counter() - started, 1)
        if not reason:
            steps["compiled"] = step
    rates = timing.interleaved(steps, x, seconds, TURN_SECONDS)
    return {
        "network": network.name,
        "batch_size": network.batch_size,
        "shape": "x".join(map(str, network.shape)),
        "precision": precision,
        "memory_format": str(memory_format).removeprefix("torch.").removesuffix("_format"),
        **_shares(stock, report),
        "stock_images_per_s": round(timing.summary(rates["stock"])[0], 2),
        **_compared("accelerated", rates, ""),
        **_compared("compiled", rates, "compiled_"),
        "compile_seconds": compile_seconds,
        "not_compiled": reason or "",
        "turns": len(rates["stock"]),
    }


def _forward_and_backward(network, precision):
    """A function of a batch; it returns output, input gradient and all weights' gradients, flat.

    With a `seed` it draws the same noise as any other network that gets it.
    """
    parameters = list(network.parameters())

    def step(x, seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        x = x.detach().requires_grad_()
        for p in parameters:
            p.grad = None
        half = precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16) if half else nullcontext():
            y = network(x)
        outputs = [
            t if t.dtype == torch.float64 else t.float()
            for t in (y if isinstance(y, tuple) else (y,))
        ]
        sum(t.square().mean() for t in outputs).backward()
        if seed is None:  # Timed: nobody looks.
            return None
        weights = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        return *(t.detach() for t in outputs), x.grad, weights

    return step


def _compile(network, backend):
    # Noise as without the compiler, or a VAE's results could not be compared.
    options = {"fallback_random": True} if backend == "inductor" else None
    torch._dynamo.reset()
    return torch.compile(network, fullgraph=True, backend=backend, options=options)


def _why_not_compiled(check, step, precision):
    """Why a compiled step is not timed; None if it computes what it should."""
    try:
        return check(step, _OFF_COMPILED[precision])
    except Exception as exception:
        lines = [line.strip() for line in str(exception).splitlines() if line.strip()]
        return f"{type(exception).__name__}: {lines[0] if lines else 'without a message'}"


class _Check:
    """Holds a step's output and gradients to those of a float64 network, as stock PyTorch's are.

    In norm, each may be twice as far off as stock's in the same precision, a gradient three times,
    and by one rounding: the rule of the tests.
    """

    def __init__(self, exact, stock, x, precision):
        self.x = x
        self.rounding = torch.finfo(torch.bfloat16 if precision == "bf16" else torch.float32).eps
        self.exact = _forward_and_backward(exact.double(), "fp64")(x.double(), seed=0)
        self.errors = self._errors(stock)

    def __call__(self, step, allowed=0.0):
        """What is wrong, in words; None if nothing is. Errors up to `allowed` never are."""
        errors = self._errors(step)
        names = [f"output {i}" for i in range(len(errors) - 2)] + ["input gradient", "gradients"]
        for name, error, of_stock in zip(names, errors, self.errors, strict=True):
            most = 2 if name.startswith("output") else 3
            if not error <= max(most * of_stock + self.rounding, allowed):
                return f"{name} {error:.2g} off, stock PyTorch's {of_stock:.2g}"
        return None

    def _errors(self, step):
        """The differences of outputs and gradients, each relative to its norm."""
        return [
            ((ours.double() - exact).norm() / exact.norm()).item()
            for ours, exact in zip(step(self.x, seed=0), self.exact, strict=True)
        ]


def _shares(stock, report):
    """How many convolutions and norms there are, and how many the report calls fused."""
    modules = list(stock.modules())
    return {
        "convolutions": sum(isinstance(m, _CONVOLUTIONS) for m in modules),
        "convolutions_fused": sum(entry.fused for entry in report),
        "norms": sum(isinstance(m, _NORMS) for m in modules),
        "norms_fused": report.norms_fused,
        "not_on_kernels": report.device_reason,
    }


def _compared(name, rates, prefix):
    """The speed of a variant and its ratio to stock; Nones if it was not timed."""
    columns = (f"{name}_images_per_s", f"{prefix}ratio", f"{prefix}p20", f"{prefix}p80")
    if name not in rates:
        return dict.fromkeys(columns)
    speed = round(timing.summary(rates[name])[0], 2)
    ratios = [a / b for a, b in zip(rates[name], rates["stock"], strict=True)]
    return dict(zip(columns, (speed, *(round(v, 3) for v in timing.summary(ratios))), strict=True))


def table(rows):
    """The rows as text: images a second, ratios to stock, what fuses, what was not compiled."""
    lines = [
        f"{'network':22}{'batch':>6}{'precision':>11}{'stock':>9}{'compiled':>10}{'genfast':>9}"
        f"{'compiled':>10}{'genfast (20 % to 80 %)':>24}{'fused':>9}"
    ]
    for row in rows:
        compiled = row["compiled_ratio"] is not None
        layers = row["convolutions"] + row["norms"]
        fused = row["convolutions_fused"] + row["norms_fused"]
        lines.append(
            f"{row['network']:22}{row['batch_size']:6}{row['precision']:>11}"
            f"{row['stock_images_per_s']:9.1f}"
            + (f"{row['compiled_images_per_s']:10.1f}" if compiled else f"{'-':>10}")
            + f"{row['accelerated_images_per_s']:9.1f}"
            + (f"{row['compiled_ratio']:9.2f}x" if compiled else f"{'-':>10}")
            + f"{row['ratio']:9.3f}x ({row['p20']:.2f} to {row['p80']:.2f})"
            + f"{f'{fused}/{layers}':>9}"
        )
    lines += [
        f"{row['network']}, {row['precision']}: not compiled: {row['not_compiled']}"
        for row in rows
        if row["not_compiled"]
    ]
    reasons = sorted({row["not_on_kernels"] for row in rows} - {""})
    lines += [f"what fuses runs through PyTorch here: {reason}" for reason in reasons]
    return "\n".join(lines)


def markdown_table(rows):
    """The table of a CSV's rows in docs/benchmarks.md: a list of lines."""
    lines = [
        "| network | batch | precision | PyTorch, images/s | `accelerate` | `torch.compile` |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        compiled = f"{float(row['compiled_ratio']):.2f}x" if row["compiled_ratio"] else "not timed"
        lines.append(
            f"| {row['network']} | {row['batch_size']} of {row['shape']} | {row['precision']} "
            f"| {float(row['stock_images_per_s']):.1f} | {float(row['ratio']):.2f}x "
            f"({float(row['p20']):.2f} to {float(row['p80']):.2f}) | {compiled} |"
        )
    return lines


def main(arguments=None):
    """Time all networks, print the table, write and draw it; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=100.0, help="of timing (default: 100)")
    parser.add_argument(
        "--compile-seconds", type=float, default=150.0,
        help="after so many, no further network is compiled; what was stays on disk for the next "
        "run (default: 150)",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="NETWORK", help="networks, by their names")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="one of them alone")
    parser.add_argument("--markdown", action="store_true", help="print docs/benchmarks.md's table")
    parser.add_argument("--out", help="the CSV (default: one in benchmarks/results)")
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precisions = ["fp32", "bf16"] if machine.half_is_fast(device) else ["fp32"]
    if args.precision:
        precisions = [args.precision]
    names = [network.name for network in NETWORKS]
    unknown = set(args.only or ()) - set(names)
    if unknown:
        parser.error(f"expected networks among {', '.join(names)}, got {', '.join(unknown)}")
    print(f"forward + backward on {machine.name(device)}, PyTorch {torch.__version__}", flush=True)
    todo = [
        (network, precision)
        for precision in precisions
        for network in NETWORKS
        if not args.only or network.name in args.only
    ]
    rows, compiling = [], 0.0
    for network, precision in tqdm(todo, "networks", leave=False):
        left_out = ""
        if compiling >= args.compile_seconds:
            left_out = f"left out after {compiling:.0f} s of compiling"
        seconds = args.seconds / len(todo)
        rows.append(measure(network, precision, device, seconds, left_out=left_out))
        compiling += rows[-1]["compile_seconds"] or 0.0
    print(table(rows))
    if not args.precision and len(precisions) == 1:
        print("bf16 is not timed: this processor has no instructions for it")
    path = Path(args.out or RESULTS / f"dropin_{machine.slug(device)}.csv")
    about = machine.describe(device)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | about for row in rows)
    print(path)
    print(plot_dropin.plot(path))
    if args.markdown:
        print("\n".join(markdown_table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
