"""What the model says of a step, as a picture: a bar for each kind of launch, its floor marked."""

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
_MOST_BARS = 24


def draw(costs, gpu, title, path):
    """Draw a list of `cost.Cost` into a PNG: the launches of one kernel and shape are one bar."""
    bars = _bars(costs)
    figure = Figure(figsize=(11, 1.6 + 0.3 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for i, bar in enumerate(bars):
        axes.barh(i, bar["us"], color=_COLOURS.get(bar["bound"], "#cccccc"), height=0.72)
        axes.plot([bar["floor"]] * 2, [i - 0.42, i + 0.42], color="black", linewidth=2)
        axes.annotate(
            f"{bar['us']:.0f}", (max(bar["us"], bar["floor"]), i), (5, 0),
            textcoords="offset points", va="center", size=8,
        )  # fmt: skip
    axes.set_yticks(range(len(bars)), [bar["label"] for bar in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"microseconds of a step, all launches of a bar together ({NOTE})")
    sums = totals(costs, gpu)
    axes.set_title(
        f"{title}\n{NOTE}: {sums.predicted:.2f} ms in {len(costs)} launches; its products at the "
        f"datasheet's rate {sums.arithmetic:.2f} ms",
        fontsize=10,
    )
    used = [term for term in _COLOURS if any(bar["bound"] == term for bar in bars)]
    handles = [Patch(color=_COLOURS[term]) for term in used]
    (floor,) = axes.plot([], [], color="black", linewidth=2)
    axes.legend(
        [*handles, floor],
        [*(f"most time: {_WORDS[term]}" for term in used), "floor of the hardware"],
        loc="lower right",
    )
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def _bars(costs):
    """Label, microseconds, floor and bound of each bar, the longest first."""
    groups = {}
    for cost in costs:
        groups.setdefault((cost.launch.name, cost.about), []).append(cost)
    bars = [
        {
            "launches": len(group),
            "label": f"{name}  {about}" + (f"  ({len(group)}x)" if len(group) > 1 else ""),
            "us": sum(cost.predicted for cost in group),
            "floor": sum(cost.floor for cost in group),
            "bound": max(group, key=lambda cost: cost.predicted).bound,
        }
        for (name, about), group in groups.items()
    ]
    bars.sort(key=lambda bar: -bar["us"])
    shown, rest = bars[:_MOST_BARS], bars[_MOST_BARS:]
    if rest:
        launches = sum(bar["launches"] for bar in rest)
        shown.append(
            {
                "label": f"all else  ({launches} launches)",
                "us": sum(bar["us"] for bar in rest),
                "floor": sum(bar["floor"] for bar in rest),
                "bound": None,
            }
        )
    return shown
