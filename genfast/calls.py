"""Calls one after another: of callables of all kinds, those that can execute together do."""

import functools
from types import BuiltinFunctionType, FunctionType

import torch
import torch.nn.functional as F
from torch import nn

from genfast import functional
from genfast.nn import (
    FusedBlock,
    Run,
    begins_run,
    is_activation,
    is_norm,
    line_of,
    may_begin_on,
    runs_undisturbed,
    why_not_fused,
)

# The activations as functions; those as modules take the same further arguments.
_MODULE_OF = {
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
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


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
    flow = _in_order(links, later)
    link = next(flow, _END)
    while link is not _END:
        if begins_run(link) and _may_fuse(link, x):
            layers, link = _stretch(link, flow)
            x = line_of(layers).forward(x)
        else:
            x = link(x)
            link = next(flow, _END)
    return x


_END = object()


def _next(flow):
    """What is called next; if looking that up fails, what says so once it is called."""
    try:
        return next(flow, _END)
    except Exception as error:
        return functools.partial(_fail, error)


def _fail(error, x):
    raise error


def _in_order(links, later):
    yield from links
    for more in later:
        yield from more()


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
        if not is_activation(layer) and any(layer is other for other in layers.values()):
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
    flow = iter(links)
    link = _next(flow)
    while link is not _END:
        if not begins_run(link):
            link = _next(flow)
            continue
        reason = why_not_fused(link)
        if reason:
            yield Run((name_of(link),), (link,), False, reason)
            link = _next(flow)
            continue
        layers, link = _stretch(link, flow)
        *runs, last = line_of(layers).plan()
        reason = ""
        if is_activation(link) or is_norm(link):
            why = why_not_fused(link) or "it was called before"
            reason = f"{type(link).__name__} {name_of(link)!r} stays out: {why}"
        yield from runs
        yield last._replace(reason=last.reason or reason)


class Call:
    """A callable with what it is given besides the one value."""

    def __init__(self, function, *arguments, **named):
        self.function, self.arguments, self.named = function, arguments, named

    def __call__(self, x):
        return self.function(x, *self.arguments, **self.named)


class Method:
    """A method of a value, by name."""

    def __init__(self, name):
        self.name = name

    def __call__(self, x):
        return getattr(x, self.name)()


def layer_of(link):
    """The module that does what a link does: itself or an activation; None if there is none."""
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
    if not all(isinstance(value, bool | int | float | str) for value in values):
        return None
    # torch.compile looks through the cache, and would warn that it does.
    make = _stand_in.__wrapped__ if torch.compiler.is_compiling() else _stand_in
    return make(link, arguments, named)


@functools.lru_cache(typed=True)
def _stand_in(function, arguments, named):
    try:
        return _MODULE_OF[function](*arguments, **dict(named))
    except TypeError:  # PyTorch's function will say what is wrong.
        return None
