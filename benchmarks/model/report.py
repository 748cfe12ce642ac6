"""What the model says of a step, as a table for a terminal and as CSV."""

import csv
from dataclasses import dataclass

from benchmarks.model.cost import arithmetic_us

NOTE = "model, not a measurement"


@dataclass(frozen=True)
class Totals:
    """Of a step, in milliseconds.

    predicted: the sum over its launches. arithmetic: its products at the datasheet's rate.
    by_bound: the prediction by the term that is largest.
    """

    predicted: float
    arithmetic: float
    by_bound: dict[str, float]


def totals(costs, gpu):
    """The `Totals` of a list of `cost.Cost` on a `cost.GPU`."""
    by_bound = {}
    for cost in costs:
        by_bound[cost.bound] = by_bound.get(cost.bound, 0.0) + cost.predicted / 1e3
    return Totals(
        predicted=sum(cost.predicted for cost in costs) / 1e3,
        arithmetic=arithmetic_us(sum(cost.flops for cost in costs), gpu) / 1e3,
        by_bound=by_bound,
    )


def row(index, cost):
    """One launch as a dictionary: the columns of the CSV."""
    launch, code = cost.launch, cost.code
    return {
        "launch": index,
        "kernel": launch.name,
        "shape": cost.shape,
        "grid": "x".join(map(str, launch.grid)),
        "programs_per_multiprocessor": cost.resident,
        "waves": cost.waves,
        "registers": code.registers if code else "",
        "spills": code.spills if code else "",
        "shared_bytes": cost.shared if code else "",
        "warp_instructions": cost.instructions,
        "tensor_cycles": round(cost.tensor_cycles),
        "bytes": launch.bytes,
        "gflop": round(cost.flops / 1e9, 3),
        "issue_us": _us(cost.issue),
        "tensor_us": _us(cost.tensor),
        "memory_us": _us(cost.memory),
        "latency_us": _us(cost.latency),
        "bound": cost.bound,
        "predicted_us": _us(cost.predicted),
        "floor_us": _us(cost.floor),
        "waits_inside": _any_loop(code, "waits_inside"),
        "layout_changes_in_loops": code.layout_changes if code else "",
        "note": NOTE,
    }


def _us(value):
    return round(value, 3)


def _any_loop(code, name):
    return int(any(getattr(region, name) for region in code.regions[1:])) if code else ""


def write_csv(costs, path):
    """Write one line a launch."""
    rows = [row(index, cost) for index, cost in enumerate(costs)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# Column, width, and how to write it; times in microseconds.
_COLUMNS = (
    ("kernel", 24, lambda r: r["kernel"][:24]),
    ("shape", 36, lambda r: r["shape"][:36]),
    ("grid", 11, lambda r: r["grid"]),
    ("per SM", 6, lambda r: r["programs_per_multiprocessor"] or ""),
    ("waves", 5, lambda r: r["waves"] or ""),
    ("regs", 4, lambda r: r["registers"]),
    ("shared", 6, lambda r: r["shared_bytes"]),
    ("Minst", 7, lambda r: f"{r['warp_instructions'] / 1e6:.2f}"),
    ("MB", 6, lambda r: f"{r['bytes'] / 1e6:.1f}"),
    *(
        (term, 7, lambda r, term=term: f"{r[f'{term}_us']:.1f}")
        for term in ("issue", "tensor", "memory", "latency")
    ),
    ("us", 7, lambda r: f"{r['predicted_us']:.1f}"),
    ("floor", 6, lambda r: f"{r['floor_us']:.1f}"),
    ("by", 7, lambda r: r["bound"]),
)
_LEFT = ("kernel", "shape", "by")


def table(costs, gpu, title):
    """The launches of one step, or some of them, and their sum as text."""
    lines = [f"{title}: {NOTE}", _line(name for name, _, _ in _COLUMNS)]
    for index, cost in enumerate(costs):
        facts = row(index, cost)
        lines.append(_line(write(facts) for _, _, write in _COLUMNS))
    return "\n".join([*lines, summary(costs, gpu, "genfast")])


def summary(costs, gpu, who):
    """A line: the sum of a step by whoever runs it, and by what it is bound."""
    sums = totals(costs, gpu)
    shares = ", ".join(f"{bound} {ms:.3f}" for bound, ms in sorted(sums.by_bound.items()))
    return (
        f"{who}: {sums.predicted:.3f} ms in {len(costs)} launches ({NOTE}), bound by {shares}; "
        f"its products at the datasheet's rate: {sums.arithmetic:.3f} ms"
    )


def _line(values):
    cells = []
    for (name, width, _), value in zip(_COLUMNS, values, strict=True):
        cells.append(f"{value:<{width}}" if name in _LEFT else f"{value:>{width}}")
    return "  ".join(cells).rstrip()
