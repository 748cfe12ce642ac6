"""What `accelerate` alone changes in networks of other people: python -m benchmarks.dropin.

Timed is forward + backward, input gradient included, of a stock network and of an accelerated copy
of it, in turns in one run. In float32 the network and its input are contiguous, as most people have
them; in bfloat16, which is timed where it is fast, channels_last under autocast.
"""

import argparse
import copy
import csv
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm import tqdm

import genfast
from benchmarks import machine, timing
from benchmarks.networks import NETWORKS

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "network", "batch_size", "precision", "memory_format", "stock_images_per_s",
    "accelerated_images_per_s", "ratio", "p20", "p80", "turns",
    "machine", "torch", "triton", "python", "date",
)  # fmt: skip
TURN_SECONDS = 0.3


def measure(network, precision, device, seconds):
    """One row of the table: a dict by the names in `COLUMNS` that describe no machine.

    Args:
        network: a `benchmarks.networks.Network`.
        precision: "fp32" or "bf16".
        device: a `torch.device`.
        seconds: how long to time.

    Raises:
        AssertionError: the accelerated network gives other images or gradients.
    """
    torch.manual_seed(0)
    memory_format = torch.channels_last if precision == "bf16" else torch.contiguous_format
    stock = network.build().to(device, memory_format=memory_format)
    accelerated = copy.deepcopy(stock)
    genfast.accelerate(accelerated)
    x = torch.randn(network.batch_size, *network.shape, device=device)
    x = x.contiguous(memory_format=memory_format)
    steps = {
        "stock": _forward_and_backward(stock, precision),
        "accelerated": _forward_and_backward(accelerated, precision),
    }
    _check(*(step(x) for step in steps.values()), 1e-4 if precision == "fp32" else 0.1)
    rates = timing.interleaved(steps, x, seconds, TURN_SECONDS)
    ratios = [a / b for a, b in zip(rates["accelerated"], rates["stock"], strict=True)]
    ratio, p20, p80 = timing.summary(ratios)
    return {
        "network": network.name,
        "batch_size": network.batch_size,
        "precision": precision,
        "memory_format": str(memory_format).removeprefix("torch.").removesuffix("_format"),
        "stock_images_per_s": round(timing.summary(rates["stock"])[0], 2),
        "accelerated_images_per_s": round(timing.summary(rates["accelerated"])[0], 2),
        "ratio": round(ratio, 3),
        "p20": round(p20, 3),
        "p80": round(p80, 3),
        "turns": len(ratios),
    }


def _forward_and_backward(network, precision):
    parameters = list(network.parameters())

    def step(x):
        x = x.detach().requires_grad_()
        for p in parameters:
            p.grad = None
        half = precision == "bf16"
        with torch.autocast(x.device.type, torch.bfloat16) if half else nullcontext():
            y = network(x)
        y.float().square().mean().backward()
        return y.detach().float(), x.grad

    return step


def _check(stock, accelerated, tolerance):
    """Hold output and input gradient to be the same, relative to their norms."""
    for expected, ours in zip(stock, accelerated, strict=True):
        error = ((ours - expected).norm() / expected.norm()).item()
        assert error <= tolerance, f"the accelerated network is {error:.2g} off"


def table(rows):
    """The rows as text."""
    lines = [f"{'network':24}{'batch':>6}{'precision':>11}{'stock':>10}{'genfast':>10}{'ratio':>8}"]
    for row in rows:
        lines.append(
            f"{row['network']:24}{row['batch_size']:6}{row['precision']:>11}"
            f"{row['stock_images_per_s']:10.1f}{row['accelerated_images_per_s']:10.1f}"
            f"{row['ratio']:8.2f}"
        )
    return "\n".join(lines)


def main(arguments=None):
    """Time all networks, print the table and write it as CSV; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="a row (default: 20)")
    parser.add_argument("--out", help="the CSV (default: one in benchmarks/results)")
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precisions = ["fp32", "bf16"] if machine.half_is_fast(device) else ["fp32"]
    print(f"forward + backward on {machine.name(device)}, PyTorch {torch.__version__}", flush=True)
    todo = [(network, precision) for precision in precisions for network in NETWORKS]
    rows = [
        measure(network, precision, device, args.seconds)
        for network, precision in tqdm(todo, "networks", leave=False)
    ]
    print(table(rows))
    if len(precisions) == 1:
        print("bf16 is not timed: this processor has no instructions for it")
    path = Path(args.out or RESULTS / f"dropin_{machine.slug(device)}.csv")
    about = machine.describe(device)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row | about for row in rows)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
