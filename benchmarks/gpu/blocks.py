"""Each layer of a DCGAN-64 alone, forward and backward, beside PyTorch eager and compiled.

All are timed as graphs, so kernels are compared with kernels; what a caller waits without a graph
is in the column host_us. Sampling and KL follow, in bytes a second.
"""

import copy
import math
import sys

import torch
from tqdm import tqdm

from benchmarks.gpu.clock import deadline_of_arguments, host_microseconds, microseconds
from benchmarks.gpu.stages import MORE_TO_DO, RESULTS, digest_of
from benchmarks.gpu.table import Table
from benchmarks.test_ops import LAYERS
from genfast.functional import reparameterize_with_kl
from genfast.nn import FusedSequential
from genfast.reference import kl_divergence, reparameterize

BATCHES = (128, 1024)
LATENTS = 2**26
COLUMNS = ("layer", "batch_size", "variant", "us", "host_us", "tb_per_s")
_COMPILE_SECONDS = 60  # Less time left than this, and a layer is not begun.


def main():
    deadline = deadline_of_arguments(__doc__)
    device = torch.device("cuda")
    torch.backends.cudnn.benchmark = True
    table = Table(RESULTS / "blocks.csv", COLUMNS, digest_of("blocks"))
    time_sampling(table, device, LATENTS)
    work = [(layer, batch) for batch in BATCHES for layer in LAYERS]
    for layer, batch in tqdm(work, "blocks", mininterval=5):
        if {"layer": layer, "batch_size": batch, "variant": "compiled"} in table:
            continue
        if deadline.left < _COMPILE_SECONDS:
            _summarise(table)
            return MORE_TO_DO
        time_layer(table, layer, batch, device)
    _summarise(table)
    return 0


def time_layer(table, layer, batch, device, compiled=True):
    """Add the layer's rows to the table."""
    layers, size = LAYERS[layer]
    x = torch.randn(batch, layers[0].in_channels, size, size, device=device)
    x = x.contiguous(memory_format=torch.channels_last).bfloat16()
    # The images need no gradient where they come from the data.
    x.requires_grad_(layer != "d 3-64, 64")
    variants = {"eager": torch.nn.Sequential, "genfast": FusedSequential}
    if compiled:
        variants["compiled"] = torch.nn.Sequential
    for name, container in variants.items():
        block = container(*copy.deepcopy(layers)).to(device, memory_format=torch.channels_last)
        if name == "compiled":
            torch._dynamo.reset()
            # Without graphs of its own: like the others it is captured whole.
            block = torch.compile(block, mode="max-autotune-no-cudagraphs", dynamic=False)
        call = _forward_and_backward(block, x)
        facts = {"layer": layer, "batch_size": batch, "variant": name}
        row = {"us": "failed", "host_us": ""}
        try:
            row = {"us": microseconds([call]), "host_us": host_microseconds(call)}
        except Exception as error:  # The others count all the same.
            print(f"{name}, {layer}, batch {batch}: {type(error).__name__}: {error}"[:500])
        table.add(facts | row | {"tb_per_s": ""})


def _forward_and_backward(block, x):
    with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16):
        dy = torch.randn_like(copy.deepcopy(block)(x))
    parameters = list(block.parameters())
    inputs = [x, *parameters] if x.requires_grad else parameters

    def call():
        with torch.autocast(x.device.type, torch.bfloat16):
            y = block(x)
        torch.autograd.grad(y, inputs, dy)

    return call


def time_sampling(table, device, latents):
    """Add the rows of sampling and KL, forward, to the table."""
    mu, logvar = torch.randn(2, latents // 1024, 1024, device=device)

    def stock():
        reparameterize(mu, logvar, torch.randn_like(mu)), kl_divergence(mu, logvar)

    def fused():
        reparameterize_with_kl(mu, logvar)

    moved = 3 * mu.numel() * mu.element_size()
    for name, call in (("eager", stock), ("genfast", fused)):
        facts = {"layer": "sampling and KL", "batch_size": latents, "variant": name}
        if facts not in table:
            us = microseconds([call], seconds=0.1)
            rate = f"{moved / us * 1e-6:.3f}"
            table.add(facts | {"us": us, "host_us": host_microseconds(call), "tb_per_s": rate})


def _summarise(table):
    times = {(r["layer"], r["batch_size"], r["variant"]): r["us"] for r in table.rows}
    for batch in map(str, BATCHES):
        for other in ("eager", "compiled"):
            ratios = {}
            for layer in LAYERS:
                ours, theirs = (times.get((layer, batch, v)) for v in ("genfast", other))
                if ours and theirs and "failed" not in (ours, theirs):
                    ratios[layer] = float(theirs) / float(ours)
            if ratios:
                mean = math.exp(sum(map(math.log, ratios.values())) / len(ratios))
                each = ", ".join(f"{layer} {ratio:.2f}" for layer, ratio in ratios.items())
                print(f"batch {batch}: {mean:.2f} times {other} ({each})")
    for row in table.rows:
        if row["tb_per_s"]:
            print(f"{row['layer']}, {row['variant']}: {row['tb_per_s']} TB/s")


if __name__ == "__main__":
    sys.exit(main())
