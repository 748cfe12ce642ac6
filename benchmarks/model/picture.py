"""What the model says of a step, as a picture: a bar for each kind of launch, its floor marked."""

from collections import Counter

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.model.report import NOTE, totals

_COLOURS = {
    "issue": "#d1495b",
    "tensor": "#2e86ab",
    "memory": "#8d99ae",
    "latency": "#edae49",
}
_WORDS = {
    "issue": "issuing instructions",
    "tensor": "tensor cores",
    "memory": "moving memory",
    "latency": "waiting for memory",
}
_MOST_BARS = 22


def draw(costs, eager, gpu, title, path):
    """Write `figure` of these arguments into a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure(costs, eager, gpu, title).savefig(path, dpi=130)


def figure(costs, eager, gpu, title):
    """A matplotlib figure of a step.

    Args:
        costs: a list of `cost.Cost`. Products of one kernel and layer are one bar; so are all other
            launches of one kernel.
        eager: those of PyTorch's own step, for the title; or None.
        gpu: the `cost.GPU`.
        title: what was predicted.
    """
    bars = _bars(costs)
    drawn = Figure(figsize=(11, 2.0 + 0.29 * len(bars)), layout="constrained")
    axes = drawn.subplots()
    for i, bar in enumerate(bars):
        axes.barh(i, bar["us"], color=_COLOURS[bar["bound"]], height=0.72)
        axes.plot([bar["floor"]] * 2, [i - 0.42, i + 0.42], color="black", linewidth=2)
        label = f"{bar['us']:,.0f}"
        if bar["floor"] >= 1:
            label += f"  ({bar['us'] / bar['floor']:.1f}x floor)"
        axes.annotate(
            label, (max(bar["us"], bar["floor"]), i), (5, 0), textcoords="offset points",
            va="center", size=8,
        )  # fmt: skip
    axes.set_yticks(range(len(bars)), [bar["label"] for bar in bars], fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_xlim(0, 1.18 * max(bar["us"] for bar in bars))
    axes.set_xlabel(f"microseconds of a step, all launches of a bar together ({NOTE})")
    axes.set_title(f"{title}\n{_sums(costs, eager, gpu)}", fontsize=10)
    used = [term for term in _COLOURS if any(bar["bound"] == term for bar in bars)]
    handles = [Patch(color=_COLOURS[term]) for term in used]
    (floor,) = axes.plot([], [], color="black", linewidth=2)
    axes.legend(
        [*handles, floor],
        [*(f"bound by {_WORDS[term]}" for term in used), "no kernel can do better"],
        loc="center right",
    )
    axes.spines[["top", "right"]].set_visible(False)
    return drawn


def _sums(costs, eager, gpu):
    sums = totals(costs, gpu)
    text = f"genfast {sums.predicted:.2f} ms in {len(costs)} launches"
    if eager:
        text += f", PyTorch eager {totals(eager, gpu).predicted:.2f} ms in {len(eager)}"
    return f"{text} ({NOTE})\nits products alone at the datasheet's rate: {sums.arithmetic:.2f} ms"


def _bars(costs):
    """Label, microseconds, floor and bound of each bar, the longest first and the rest as one."""
    groups = {}
    for cost in costs:
        who = "PyTorch " if cost.code is None else ""
        groups.setdefault(f"{who}{cost.launch.name} {cost.layer}".strip(), []).append(cost)
    bars = [_bar(label, group) for label, group in groups.items()]
    bars.sort(key=lambda bar: -bar["us"])
    shown, rest = bars[:_MOST_BARS], bars[_MOST_BARS:]
    if rest:
        shown.append(_bar("all else", [cost for bar in rest for cost in bar["costs"]]))
    return shown


def _bar(label, costs):
    by_bound = Counter()
    for cost in costs:
        by_bound[cost.bound] += cost.predicted
    return {
        "label": f"{label}  ({len(costs)}x)" if len(costs) > 1 else label,
        "us": sum(cost.predicted for cost in costs),
        "floor": sum(cost.floor for cost in costs),
        "bound": by_bound.most_common(1)[0][0],
        "costs": costs,
    }
