"""Calls one after another: of callables of all kinds, those that can execute together do."""

import functools
import operator
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from genfast import folding, functional, opening
from genfast.backend import kernels_run_on_cpu
from genfast.nn import (
    FusedBlock,
    FusedSequential,
    Run,
    activates_sums,
    begins_run,
    has_hook,
    has_no_state,
    is_activation,
    is_norm,
    line_of,
    may_begin_on,
    may_lead_to_run,
    runs_undisturbed,
    why_follower_stays_out,
    why_not_fused,
)

# The activations as functions; those as modules take the same further arguments.
_MODULE_OF: dict[Any, type[nn.Module]] = {
    F.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    F.leaky_relu: nn.LeakyReLU,
    F.tanh: nn.Tanh,
    torch.tanh: nn.Tanh,
    F.sigmoid: nn.Sigmoid,
    torch.sigmoid: nn.Sigmoid,
    F.relu6: nn.ReLU6,
    F.hardtanh: nn.Hardtanh,
    F.elu: nn.ELU,
    F.selu: nn.SELU,
    torch.selu: nn.SELU,
    F.softplus: nn.Softplus,
    F.silu: nn.SiLU,
    F.gelu: nn.GELU,
    F.mish: nn.Mish,
    F.hardswish: nn.Hardswish,
    F.glu: nn.GLU,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}
# What becomes part of a convolution, likewise; only where it does so, a module stands in.
_RESAMPLING = {
    F.interpolate: nn.Upsample,
    F.avg_pool2d: nn.AvgPool2d,
    F.pixel_shuffle: nn.PixelShuffle,
}
_MODULE_OF |= _RESAMPLING


def run(links, x, *later):
    """Call one after another, each with what the one before returned; what can run fused does.

    Args:
        links: callables.
        x: what the first takes.
        *later: functions that return further links. They are called in order, and not before all
            that could have an effect on them has run.

    Returns:
        What the last one returns.
    """
    # Else there is no chain that could go on across a module's border, or somebody traces calls.
    opens = isinstance(x, torch.Tensor) and (kernels_run_on_cpu() or not x.is_cpu)
    flow = _in_order(links, later, _opened_with_sums if opens else iter)
    link = next(flow, _END)
    while link is not _END:
        first = _first_of_run(link)
        if first is not None and _may_fuse(first, x):
            layers, link = _stretch(first, flow)
            x, link = _forward_of(line_of(layers), x, link, flow)
        else:
            x = link(x)
            link = next(flow, _END)
    return x


def run_after(outer, first, links, x, *later):
    """As `run`, of `links`, then the `Sum` that is `FIRST`, of `first`, then the `outer` links.

    The order of the arguments is that in which Python evaluates outer(first + links(x)).
    """
    return run((*links, Sum(first, "other + x"), *outer), x, *later)


FIRST = "first + x"
_END = object()


def _forward_of(line, x, link, flow):
    """What a line of layers gives, with the sum and activation after it if they can be part of it.

    Args:
        line: a `FusedSequential` of layers that run without an effect on what is looked up.
        x: its input.
        link: what follows.
        flow: an iterator over what follows that.

    Returns:
        The output, and what is next.
    """
    if type(link) is not Sum or not link.is_plain or torch.compiler.is_compiling():
        return line.forward(x), link
    following = _next(flow)
    then = None if following is _END else layer_of(following)
    if then is not None and not (runs_undisturbed(then) and activates_sums(then)):
        then = None
    y, is_whole = line.forward_adding(x, link.other, then, link.leads)
    if not is_whole:
        return link(y), following
    return y, following if then is None else _next(flow)


def _next(flow):
    """What is called next; if looking that up fails, what says so once it is called."""
    try:
        return next(flow, _END)
    except Exception as error:
        return functools.partial(_fail, error)


def _fail(error, x):
    raise error


def opened(links, x, *later):
    """What `run` would call, as layers where they are known, for a module that does only that."""
    flow = _in_order(links, later, iter)
    while (link := _next(flow)) is not _END:
        yield layer_of(link) or link


def _in_order(links, later, each):
    yield from map(_now, each(links))
    for more in later:
        yield from map(_now, each(more()))


def _now(link):
    return link.now() if type(link) is LateCall else link


def _first_of_run(link):
    """The layer that a link is, if layers that execute together may begin with it; else None."""
    if begins_run(link):
        return link
    if isinstance(link, Call | nn.Module | functools.partial):
        layer = layer_of(link)
        return layer if may_lead_to_run(layer) else None
    return None


def _opened_with_sums(links):
    return opening.in_order(_with_sums(links))


def _stays_whole(link):
    return isinstance(link, FusedSequential) and not opening.opens(link)


def _with_sums(links):
    """The links, a container that does not open and the sum after it being one."""
    if type(links) is not tuple:
        yield from links  # What gives them may be anybody's.
        return
    before = _END
    for link in links:
        if type(link) is Sum and _stays_whole(before):
            before = _SummedContainer(before, link)
            continue
        if before is not _END:
            yield before
        before = link
    if before is not _END:
        yield before


def _stretch(link, flow):
    """Layers that run without an effect on what the user's code looks up: a dict, and what follows.

    Args:
        link: the first of them.
        flow: an iterator over what follows it.
    """
    layers = {"0": link}
    while (link := _next(flow)) is not _END:
        layer = layer_of(link)
        if layer is None or not runs_undisturbed(layer):
            return layers, link
        # The second time, a batch norm that averages cumulatively has counted the first.
        if not has_no_state(layer) and any(layer is other for other in layers.values()):
            return layers, link
        layers[str(len(layers))] = layer
    return layers, _END


def _may_fuse(layer, x):
    if not may_begin_on(layer, x) or not runs_undisturbed(layer):
        return False
    if nn.modules.module._has_any_global_hook():
        return False
    return functional.implementation(x) != "reference"


def convolution_of(layer):
    """That of a block, or the layer itself."""
    return layer.conv if isinstance(layer, FusedBlock) else layer


def planned(links, name_of):
    """The `Run`s of the convolutions and norms among links.

    Args:
        links: callables in the order of their calls; `looking.UNKNOWN` for what only a call shows.
        name_of: a function of a module that gives its name.
    """
    flow = opening.in_order(links)
    link = _next(flow)
    while link is not _END:
        first = _first_of_run(link)
        if first is None:
            link = _next(flow)
            continue
        reason = why_not_fused(first)
        if reason and not begins_run(first):
            link = _next(flow)
            continue
        if reason:
            yield Run((name_of(link),), (link,), False, reason)
            link = _next(flow)
            continue
        layers, link = _stretch(first, flow)
        *runs, last = line_of(layers).plan()
        if is_activation(link) or is_norm(link):
            why = why_not_fused(link) or "it was called before"
        else:
            why = why_follower_stays_out(link, last.modules)
        reason = f"{type(link).__name__} {name_of(link)!r} stays out: {why}" if why else ""
        yield from runs
        yield last._replace(reason=last.reason or reason)


class Call:
    """A callable with what it is given besides the one value."""

    def __init__(self, function, *arguments, **named):
        self.function, self.arguments, self.named = function, arguments, named

    def __call__(self, x):
        return self.function(x, *self.arguments, **self.named)


class LateCall:
    """A `Call` whose further arguments are looked up when it is reached.

    given: a function of no arguments that returns their tuple and their dict.
    """

    def __init__(self, function, given):
        self.function, self.given = function, given

    def now(self):
        """The `Call`."""
        arguments, named = self.given()
        return Call(self.function, *arguments, **named)


class Sum:
    """The addition of a value: x + other, other + x or x += other.

    how: "x + other", "other + x" or "x += other"; `FIRST` for the second where `run_after` makes
        it.
    """

    def __init__(self, other, how):
        self.other, self.how = other, how

    def __call__(self, x):
        if self.how == "x += other":
            return operator.iadd(x, self.other)
        return self.other + x if self.how == "other + x" else x + self.other

    @property
    def leads(self):
        """Whether the variable is the first operand."""
        return self.how == "other + x"

    @property
    def is_plain(self):
        """Whether nothing but PyTorch's addition of tensors is asked for."""
        return type(self.other) in (torch.Tensor, nn.Parameter)


class _SummedContainer:
    """A `FusedSequential` and a `Sum` of what it gives."""

    def __init__(self, container, added):
        self.container, self.added = container, added

    def __call__(self, x):
        c = self.container
        on_kernels = isinstance(x, torch.Tensor) and not (x.is_cpu and not kernels_run_on_cpu())
        if not (
            on_kernels
            and not torch.compiler.is_compiling()
            and self.added.is_plain
            and type(c).forward is FusedSequential.forward
            and "forward" not in vars(c)
            and c._compiled_call_impl is None
            and not has_hook(c)
            and not nn.modules.module._has_any_global_hook()
        ):
            return self.added(c(x))
        y, is_whole = c.forward_adding(x, self.added.other, leads=self.added.leads)
        return y if is_whole else self.added(y)


class Method:
    """A method of a value, by name."""

    def __init__(self, name):
        self.name = name

    def __call__(self, x):
        return getattr(x, self.name)()


def layer_of(link):
    """The module that does what a link does: itself or one without state; None if there is none."""
    if isinstance(link, nn.Module):
        return link
    arguments = named = ()
    if isinstance(link, Method):
        link = link.name
    else:
        if isinstance(link, functools.partial) and not link.args:
            link = Call(link.func, **link.keywords)
        if isinstance(link, Call):
            arguments, named, link = link.arguments, tuple(link.named.items()), link.function
        if not isinstance(link, FunctionType | BuiltinFunctionType):
            return None
    if link not in _MODULE_OF:
        return None
    values = *arguments, *(value for _, value in named)
    plain = bool | int | float | str
    if link in _RESAMPLING:
        plain |= None
        values = [v for value in values for v in (value if type(value) is tuple else (value,))]
    if not all(isinstance(value, plain) for value in values):
        return None
    # torch.compile looks through the cache, and would warn that it does.
    make = _stand_in.__wrapped__ if torch.compiler.is_compiling() else _stand_in
    return make(link, arguments, named)


@functools.lru_cache(typed=True)
def _stand_in(function, arguments, named):
    try:
        layer = _MODULE_OF[function](*arguments, **dict(named))
    except (TypeError, ValueError):  # PyTorch's function will say what is wrong.
        return None
    may_be_part = folding.upsampling(layer) or folding.pooling(layer) or folding.shuffling(layer)
    if function in _RESAMPLING and not may_be_part:
        return None
    return layer
