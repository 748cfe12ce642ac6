"""What this GPU can do at best: bandwidth of a copy, rate of a large matrix product."""

import torch

from benchmarks import machine
from benchmarks.gpu.clock import deadline_of_arguments, microseconds
from benchmarks.gpu.stages import RESULTS
from benchmarks.gpu.table import Table

_BYTES = 4 * 2**30  # Of the copied tensor: far more than any cache.
_SIDE = 8192
COLUMNS = ("what", "value", "unit", "machine", "torch", "triton", "python", "date")


def main():
    deadline_of_arguments(__doc__)
    device = torch.device("cuda")
    table = Table(RESULTS / "ceilings.csv", COLUMNS, "")
    about = machine.describe(device)
    rate = 2 * _BYTES / _copy_microseconds(device) * 1e-6
    table.add(dict(what="copy", value=f"{rate:.3f}", unit="TB/s") | about)
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("tf32", torch.float32)):
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        # Random values: zeros draw less power and run faster.
        a, b = (torch.randn(_SIDE, _SIDE, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        us = microseconds([lambda a=a, b=b, out=out: torch.mm(a, b, out=out)], seconds=0.3)
        rate = 2 * _SIDE**3 / us * 1e-6
        table.add(dict(what=f"matrix product {name}", value=f"{rate:.0f}", unit="TFLOP/s") | about)
    for row in table.rows:
        print(row["what"], row["value"], row["unit"])


def _copy_microseconds(device):
    source = torch.randn(_BYTES // 4, device=device)
    target = torch.empty_like(source)
    return microseconds([lambda: target.copy_(source)], seconds=0.2)


if __name__ == "__main__":
    main()
