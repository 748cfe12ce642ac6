"""Modules that only call others in order: what these compute may run together across the border.

Such a module opens, which is to say that what it calls is called in its place, where nobody can
tell: no hook, own `__call__` or own compilation sees what goes in and comes out. That is looked up
when the module is reached, after all before it has run that could have an effect on it.
"""

import torch
from torch import nn

from genfast.backend import is_exporting

# PyTorch's layers of random numbers, which in evaluation give what they take.
DROPOUT = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def has_hook(module):
    """Whether somebody sees what goes through this module, alone."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def may_open(link):
    """Whether a callable may open, by its class.

    A class that may has a method `_genfast_calls`, which gives an iterable of what an instance
    calls in order, or None where it is to be called itself. Layers that do nothing, or nothing in
    evaluation, open to nothing.
    """
    kind = type(link)
    return hasattr(kind, "_genfast_calls") or kind is nn.Identity or kind in DROPOUT


def in_order(links):
    """The callables one after another, and in the place of one that opens what it calls."""
    for link in links:
        inner = _inner(link)
        if inner is None:
            yield link
        else:
            yield from in_order(inner)


def opens(link):
    """Whether a callable opens now."""
    return _inner(link) is not None


def _inner(link):
    if not may_open(link) or _is_seen(link):
        return None
    if type(link) in DROPOUT:
        return None if link.training else ()
    return () if type(link) is nn.Identity else link._genfast_calls()


def _is_seen(module):
    """Whether somebody sees that the module itself is called."""
    return (
        has_hook(module)
        or "forward" in vars(module)
        or type(module).__call__ is not nn.Module.__call__
        or module._compiled_call_impl is not None
        or nn.modules.module._has_any_global_hook()
        # Both write down which module calls which.
        or is_exporting()
        or torch.jit.is_tracing()
    )
