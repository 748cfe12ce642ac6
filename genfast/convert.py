"""Swap fused execution into a model that exists, and out again."""

import functools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, SupportsIndex

import torch
from torch import nn

from genfast import calls, functional, networks, opening, own_glu
from genfast.backend import selected_backend
from genfast.launch import start
from genfast.nn import FusedBlock, FusedSequential, Run, begins_run


@dataclass(frozen=True)
class ReportEntry:
    """One convolution of a model, or norm that follows none, with what runs together with it.

    name: the dotted path of the convolution or norm, as `named_modules` gives it.
    layers: the layers, such as "ConvTranspose2d + BatchNorm2d + ReLU".
    fused: whether they run as one operation.
    reason: why not, or why a batch norm or activation that follows stays out; else empty.
    container: the path of the module that must be called for that, where that is not seen in the
        `forward` of another one; else empty.
    multiply_adds: what an output pixel of the convolution takes, 0 if unknown and for a norm.
    is_norm: whether it is a norm that runs with no convolution.
    """

    name: str
    layers: str
    fused: bool
    reason: str
    container: str = ""
    multiply_adds: float = 0.0
    is_norm: bool = False

    def __str__(self) -> str:
        return f"{self.name}: {self.layers}: {self.how}"

    @property
    def how(self) -> str:
        """How the layers run, in words."""
        if not self.fused:
            return f"PyTorch: {self.reason}"
        fused = f"fused when {self.container} is called" if self.container else "fused"
        return f"{fused}; {self.reason}" if self.reason else fused


class Report(list[ReportEntry]):
    """The `ReportEntry` of each convolution, in the model's order; prints as a table.

    norms: a list with the entry of each norm that runs with no convolution.
    norms_total, norms_fused: how many norms there are, and how many of them run with a convolution
        or as one operation with their activation.
    device_reason: why nothing runs on the kernels where the model is now; empty if they run.
    notes: a list of sentences on what costs time where they run, and what to do about it.
    """

    def __init__(
        self,
        entries: Iterable[ReportEntry],
        device_reason: str,
        notes: Iterable[str] = (),
        norms_total: int = 0,
    ) -> None:
        self._rows = list(entries)
        super().__init__(entry for entry in self._rows if not entry.is_norm)
        self.norms = [entry for entry in self._rows if entry.is_norm]
        self.norms_total = norms_total
        self.norms_fused = norms_total - sum(not entry.fused for entry in self.norms)
        self.device_reason = device_reason
        self.notes = list(notes)

    @property
    def fused_share(self) -> float:
        """The part of the convolutions' multiply-adds that runs fused, from 0 to 1.

        Counted are those that one output pixel of each convolution takes: how many pixels there
        are is known only when the model runs.
        """
        total = sum(entry.multiply_adds for entry in self)
        return sum(e.multiply_adds for e in self if e.fused) / total if total else 0.0

    def __str__(self) -> str:
        title = "genfast: the model has no 2-d convolution"
        if self:
            title = f"genfast: {sum(e.fused for e in self)} of {len(self)} convolutions fuse"
        if not self._rows:
            return title
        if self.device_reason:
            title += f"; for now all run through PyTorch: {self.device_reason}"
        rows: list[tuple[str, ...]] = [
            ("layer", "runs with", "how"),
            *((e.name, e.layers, e.how) for e in self._rows),
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        rows.insert(1, tuple("-" * min(width, 40) for width in widths))
        lines = [f"  {n:<{widths[0]}}  {layers:<{widths[1]}}  {how}" for n, layers, how in rows]
        if any(entry.container for entry in self._rows):
            lines.append(
                "What is fused when another module is called runs through PyTorch where a forward "
                "takes its parts otherwise."
            )
        return "\n".join([title, *lines, *self.notes, self._shares()])

    def _shares(self) -> str:
        found = []
        if self:
            found.append(
                f"{self.fused_share:.0%} of the multiply-adds fuse (counted for one output pixel "
                "of each convolution)"
            )
        if self.norms_total:
            share = self.norms_fused / self.norms_total
            found.append(f"{share:.0%} of the norms{'' if self else ' fuse'}")
        return " and ".join(found)


def accelerate(model: nn.Module, *, channels_last: bool = False) -> Report:
    """Make the convolutions and norms of a model, the root included, run fused. Works in place.

    Parameters, state_dict keys, hooks, optimizers and results stay what they were: the class of
    `nn.Sequential`s changes, and that of modules that call convolutions in methods of their own
    (see `genfast.rewriting`), nothing else. Layers with a hook or with a setting that the kernels
    do not know run as PyTorch runs them, and so does a layer that appears at several places, if it
    is a child of an `nn.Sequential` and has parameters.

    Args:
        model: any `nn.Module`.
        channels_last: bring the weights to the kernels' memory format first, as
            `model.to(memory_format=torch.channels_last)` does. The values stay; `restore` leaves
            them in that format.

    Returns:
        A `Report`: print it, or iterate over its entries, to see what fuses, what does not and why.

    Raises:
        TypeError: `model` is no `nn.Module`.

    Example:
        >>> block = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        >>> model = nn.Sequential(*block, nn.Conv2d(8, 8, 3, groups=2))
        >>> for entry in accelerate(model):
        ...     print(entry)
        0: Conv2d + BatchNorm2d + ReLU: fused
        3: Conv2d: PyTorch: it has 2 groups
    """
    _check_module(model)
    if channels_last:
        # Not `model.to`, which refuses a model with 3-d convolutions.
        model._apply(lambda t: t.to(memory_format=torch.channels_last) if t.dim() == 4 else t)
    paths = _paths(model)
    # From the inside: what a module calls may open then.
    modules: list[Any] = list(model.modules())
    own_glu.find(map(type, modules))
    for module in reversed(modules):
        kind: type = type(module)
        if _can_swap(module):
            module._genfast_original = kind
            module.__class__ = _fused_class(kind)
        elif _calls_what_fuses(module, is_called=module is not model):
            # Not for a class whose instances are laid out otherwise, in C or by __slots__.
            with suppress(TypeError):
                module.__class__ = networks.network_of(kind).rewritten
        if isinstance(module, FusedSequential):
            module.unfusable = {
                name: f"it also appears as {_other(paths[id(child)])}"
                for name, child in module._modules.items()
                if len(paths[id(child)]) > len(paths[id(module)]) and begins_run(child)
            }
    entries, norms_total = _entries(model)
    reason = _why_nothing_runs(model)
    fused = [e.name for e in entries if e.fused and not e.is_norm]
    weights: dict[str, Any] = {name: model.get_submodule(name)._parameters for name in fused}
    weights = {name: p["weight"] for name, p in weights.items() if p.get("weight") is not None}
    return Report(entries, reason, [] if reason else _notes(weights), norms_total)


def restore(model: nn.Module) -> None:
    """Undo `accelerate`: every module gets its own class back. Works in place.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> report = accelerate(model)
        >>> restore(model)
        >>> type(model) is nn.Sequential
        True
    """
    _check_module(model)
    modules: list[Any] = list(model.modules())
    for module in modules:
        if isinstance(module, FusedSequential):
            vars(module).pop("unfusable", None)
        if "_genfast_original" in vars(module):
            module.__class__ = vars(module).pop("_genfast_original")
        elif networks.original_of(type(module)):
            module.__class__ = networks.original_of(type(module))


def _check_module(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")


def _can_swap(module: object) -> bool:
    if not isinstance(module, nn.Sequential) or isinstance(module, FusedSequential):
        return False
    return type(module).forward is nn.Sequential.forward and "forward" not in vars(module)


def _calls_what_fuses(module: Any, is_called: bool) -> bool:
    """Whether a module, not rewritten yet, is seen to call such layers in a method of its own.

    is_called: by another one, which what it calls may run together with.
    """
    kind: type = type(module)
    if isinstance(module, torch.jit.ScriptModule) or networks.original_of(kind):
        return False
    network = networks.network_of(kind)
    if network.rewritten is None:
        return False
    for links in _calls(module):
        if any(map(begins_run, links)) or any(map(_is_summed, links[:-1], links[1:])):
            return True
        # Alone, a container needs nobody else to run what it holds.
        if (is_called or len(links) > 1) and any(map(begins_run, opening.in_order(links))):
            return True
    return False


def _is_summed(link: object, following: object) -> bool:
    """Whether these are a container that fuses and what adds to its output."""
    fuses = isinstance(link, FusedSequential) or _can_swap(link)
    return fuses and isinstance(following, calls.Sum)


def _calls(module: Any) -> Iterator[list[Any]]:
    """Lists of what a module calls one after another in methods of its own, as far as seen."""
    if not isinstance(module, torch.jit.ScriptModule):
        cls: type = networks.original_of(type(module)) or type(module)
        for method in networks.network_of(cls).methods.values():
            yield from method.links(module)


@functools.cache
def _fused_class(cls: type[nn.Sequential]) -> type[FusedSequential]:
    """FusedSequential; for a subclass of nn.Sequential, the subclass with its forward and name."""
    if cls is nn.Sequential:
        return FusedSequential
    # Pickle finds a class by its name, and one made here has none: so store what it is made of.
    members = {"__module__": cls.__module__, "__reduce_ex__": _reduce}
    return type(cls.__name__, (FusedSequential, cls), members)


def _reduce(module: nn.Module, protocol: SupportsIndex) -> tuple[Any, ...]:
    cls = type(module)
    reduced: Any = super(cls, module).__reduce_ex__(protocol)
    _, (_, *arguments), *state = reduced
    return _new, (cls.__bases__[1], *arguments), *state


def _new(original: Any, *arguments: Any) -> FusedSequential:
    cls = _fused_class(original)
    return cls.__new__(cls, *arguments)


def _paths(model: nn.Module) -> dict[int, list[str]]:
    """Every dotted path at which a module of the model appears, by the module's id."""
    paths = defaultdict(list)
    for path, module in model.named_modules(remove_duplicate=False):
        paths[id(module)].append(path)
    return paths


def _other(paths: Sequence[str]) -> str:
    return " and ".join(repr(path) for path in paths[1:])


def _entries(model: nn.Module) -> tuple[list[ReportEntry], int]:
    """The `ReportEntry`s in the model's order, and how many norms there are."""
    paths = {id(module): path for path, module in model.named_modules()}
    planned, callers = _seen_calls(model, paths)
    held = _held_by_containers(model, paths)
    found: dict[str, ReportEntry] = {}
    with_others: set[int] = set()

    def note(path: str, module: nn.Module, **about: Any) -> None:
        parent_path, _, name = path.rpartition(".")
        parent = model.get_submodule(parent_path) if path else None
        seen, container = planned.get(id(module)), ""
        if isinstance(parent, FusedBlock) and not seen:
            reason = parent.why_not_fused() or ""
            layers, fused, together = parent.layers, not reason, parent.children()
        elif seen := seen or held.get(id(module)):
            owner, run = next((s for s in seen if not s[1].fused), seen[0])
            layers, fused, reason = run.layers, run.fused, run.reason
            together = (m for layer in run.modules for m in layer.modules())
            container = _called_by_others(model, owner, callers) if fused else ""
        else:
            layers, fused, together = type(module).__name__, False, ()
            reason = _why_not_seen(model, path, name)
        if fused:
            with_others.update(map(id, together))
        found[path] = ReportEntry(path, layers, fused, reason, container, **about)

    norms = {path: m for path, m in model.named_modules() if isinstance(m, _NORMS)}
    for path, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            note(path, module, multiply_adds=_multiply_adds(module))
    for path, norm in norms.items():
        if id(norm) not in with_others:
            note(path, norm, is_norm=True)
    return [found[path] for path in paths.values() if path in found], len(norms)


# Those of PyTorch, of all that normalise.
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)


def _held_by_containers(
    model: nn.Module, names: Mapping[int, str]
) -> dict[int, list[tuple[str, Run]]]:
    """Of each convolution and norm in `FusedSequential`s, what `_seen_calls` gives first."""
    held = defaultdict(list)
    for path, module in model.named_modules():
        if not isinstance(module, FusedSequential):
            continue
        if module.unfusable:
            runs = module.plan()
        else:
            runs = calls.planned(module._modules.values(), lambda m: names.get(id(m), ""))
        for run in runs:
            held[id(calls.convolution_of(run.main))].append((path, run))
    return held


def _seen_calls(
    model: nn.Module, names: Mapping[int, str]
) -> tuple[dict[int, list[tuple[str, Run]]], dict[int, str]]:
    """Of each convolution the pairs of a rewritten module's path and a `Run`; who calls what.

    Both by the id of the module that is called; the second gives the path of the caller.
    """
    planned: dict[int, list[tuple[str, Run]]] = defaultdict(list)
    callers: dict[int, str] = {}
    for path, module in model.named_modules():
        for links in _calls(module):
            for link in links:
                if id(link) in names:
                    callers.setdefault(id(link), path)
            if networks.original_of(type(module)):
                for run in calls.planned(links, lambda m: names.get(id(m), "")):
                    planned[id(calls.convolution_of(run.main))].append((path, run))
    return planned, callers


def _why_not_seen(model: nn.Module, path: str, name: str) -> str:
    """Why a convolution that no `nn.Sequential` holds does not fuse."""
    while path:
        path = path.rpartition(".")[0]
        owner: Any = model.get_submodule(path) if path else model
        cls: type = networks.original_of(type(owner)) or type(owner)
        if isinstance(owner, torch.jit.ScriptModule):
            return "TorchScript runs it"
        if not cls.__module__.startswith("torch."):
            network = networks.network_of(cls)
            if network.reasons:
                return network.reasons.get("forward") or next(iter(network.reasons.values()))
            return f"no call like self.{name}(x) is seen in the methods of {cls.__name__}"
    return "it is not a child of an nn.Sequential that runs its children in order"


def _multiply_adds(conv: nn.Conv2d | nn.ConvTranspose2d) -> float:
    """What an output pixel takes, on average: a transposed convolution's meet some taps each."""
    kh, kw = conv.kernel_size
    taps = kh * kw * conv.in_channels * conv.out_channels / conv.groups
    return taps / (conv.stride[0] * conv.stride[1]) if conv.transposed else taps


def _called_by_others(model: nn.Module, path: str, callers: Mapping[int, str]) -> str:
    """The outermost of the modules down to `path` that nobody is seen to call; empty if none."""
    while path:
        caller = callers.get(id(model.get_submodule(path)))
        above = path.rpartition(".")[0]
        if caller is not None and (not caller or path.startswith(f"{caller}.")):
            path = caller
        elif isinstance(model.get_submodule(above), FusedSequential):
            path = above
        else:
            return path
    return ""


def _why_nothing_runs(model: nn.Module) -> str:
    if selected_backend() == "reference":
        return "the backend 'reference' is selected"
    parameter = next(model.parameters(), None)
    return "" if parameter is None else functional.why_not_triton(parameter) or ""


def _notes(weights: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """What `Report` notes about the weights of the convolutions that fuse, by their names."""
    # Sizes of 1 aside, this is the memory that the kernels read and write.
    copied = [
        name
        for name, weight in weights.items()
        if not weight.is_contiguous(memory_format=torch.channels_last)
    ]
    if copied:
        some = ", ".join(copied[:3]) + (" ..." if len(copied) > 3 else "")
        yield (
            f"the weights of {len(copied)} of them ({some}) are not channels_last and are copied "
            "at each call, and their gradients too: accelerate(model, channels_last=True), or "
            "model.to(memory_format=torch.channels_last), saves that"
        )
    if any(map(_is_left_to_pytorch, weights.values())):
        yield (
            "float32 without TF32 is left to PyTorch's convolutions but at the networks' ends: "
            "TF32 (torch.backends.cudnn.conv.fp32_precision) and bfloat16 run on the kernels"
        )


def _is_left_to_pytorch(weight: torch.Tensor) -> bool:
    """Whether products with it, where channels are aligned, find no unit that multiplies so."""
    if weight.dtype != torch.float32 or start.precision(weight) != "ieee":
        return False
    return start.architecture(weight).startswith("sm_")
