"""Half-precision copies of weights, made once a step instead of at every use.

Autocast converts each weight in every forward pass and its gradient in every backward pass, one
small kernel a weight. Here the layers hold persistent copies while a step runs, converted together;
so are their gradients. What is computed is the same, to the last bit.
"""

from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize

from genfast.nn import has_hook
from genfast.training.steps import layers


def why_not_copied(network):
    """Say why the network's layers keep their weights; None if copies may stand in.

    They may where every reader of a weight is known. A `forward` of somebody's own, and a hook, may
    read a weight otherwise than autocast does, or leave autocast.
    """
    for name, module in network.named_modules():
        where = f"its layer {name}" if name else "it"
        if layers.is_distributed(module):
            return f"{where}, a {type(module).__name__}, is distributed over devices"
        if layers.is_replaced(module) or not layers.reads_no_others_weights(module):
            return f"{where}, a {type(module).__name__}, has a forward of its own"
        if has_hook(module):
            return f"{where} has a hook"
    return None


class HalfWeights:
    """The copies of one network's weights; its float32 parameters stay what an optimizer updates.

    Args:
        network: a `nn.Module`.
        dtype: of the copies: bfloat16 or float16.
    """

    def __init__(self, network, dtype):
        self._network, self._dtype = network, dtype
        self._copies, self._gradients = {}, {}  # By parameter.

    @property
    def copies(self):
        """The copies by the parameters they stand in for."""
        return self._copies

    @property
    def recorded(self):
        """The memory that a graph reads and writes which is recorded now."""
        return self._copies, self._gradients

    def set_aside(self):
        """Begin anew, without copies; returns a function that takes those of now back."""
        before = self._copies, self._gradients
        self._copies, self._gradients = {}, {}

        def take_back():
            self._copies, self._gradients = before

        return take_back

    @contextmanager
    def _in_place(self):
        places = list(_places(self._network))
        self._copies = {p: self._copy_of(p) for _, _, p in places}
        self._gradients = {p: self._gradients.get(p) for p in self._copies}
        for layer, name, parameter in places:
            layer._parameters[name] = self._copies[parameter]
        try:
            yield
        finally:
            for layer, name, parameter in places:
                layer._parameters[name] = parameter
            for copy in self._copies.values():
                copy.grad = None

    @torch.no_grad()
    def hand_over_gradients(self):
        """Give the parameters the gradients that their copies got since the last time."""
        found = {p: copy for p, copy in self._copies.items() if copy.grad is not None}
        if not found:
            return
        gradients = [self._gradient_of(p) for p in found]
        torch._foreach_copy_(gradients, [copy.grad for copy in found.values()])
        for (parameter, copy), gradient in zip(found.items(), gradients, strict=True):
            copy.grad = None
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)

    def _copy_of(self, parameter):
        copy = self._copies.get(parameter)
        if copy is None:
            copy = nn.Parameter(torch.empty_like(parameter, dtype=self._dtype))
        return copy.requires_grad_(parameter.requires_grad)

    def _gradient_of(self, parameter):
        """Memory for it: the same at each step, as fresh memory of this size costs page faults."""
        kept = self._gradients[parameter]
        if kept is None or kept is parameter.grad:
            kept = self._gradients[parameter] = torch.empty_like(parameter)
        return kept


@contextmanager
def in_use(*networks):
    """Within, the layers of these networks, `HalfWeights`, hold the copies, fresh on entry.

    A parameter that somebody watches stays itself, waiting for gradients to arrive there, as do
    all of a network for which `why_not_copied` has a reason.
    """
    with ExitStack() as stack:
        for network in networks:
            stack.enter_context(network._in_place())
        refresh(*networks)
        yield


@torch.no_grad()
def refresh(*networks):
    """Within `in_use`, let the copies be what the parameters are now."""
    pairs = [pair for network in networks for pair in network._copies.items()]
    if pairs:
        parameters, copies = zip(*pairs, strict=True)
        torch._foreach_copy_(list(copies), list(parameters))


def _places(network):
    """(layer, name, parameter) wherever a copy may stand in."""
    if why_not_copied(network):
        return
    for layer in network.modules():
        if type(layer) not in layers.CONVERTED or parametrize.is_parametrized(layer):
            continue
        for name, parameter in layer._parameters.items():
            if parameter is not None and _is_plain(parameter):
                yield layer, name, parameter


def _is_plain(parameter):
    watched = parameter._backward_hooks or parameter._post_accumulate_grad_hooks
    return type(parameter) is nn.Parameter and parameter.dtype == torch.float32 and not watched
