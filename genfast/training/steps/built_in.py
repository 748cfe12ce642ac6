"""What a CUDA graph has built into it: all that a replay does not read anew."""

from itertools import chain
from operator import attrgetter, is_

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from genfast.backend import selected_backend

_VALUES = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_OPENED = (nn.Module, Optimizer, torch.amp.GradScaler)
_BASES = {object, nn.Module, Optimizer}
_GLOBAL_HOOKS = [
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
]
# Of a module, what no step reads.
_UNREAD = {
    "_load_state_dict_post_hooks",
    "_load_state_dict_pre_hooks",
    "_non_persistent_buffers_set",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
}
_gradient = attrgetter("requires_grad", "_backward_hooks", "_post_accumulate_grad_hooks")


class BuiltIn:
    """What a graph that was captured just now has built into it, of these objects.

    That is every attribute of the modules, optimizers and gradient scalers, of their classes and of
    modules they hold: numbers, strings and the like by value, also within lists, tuples, dicts and
    sets; tensors by their place in memory, whether they require gradients and their hooks; all else
    by identity, as functions are. And the settings of PyTorch and genfast that choose kernels.

    Not seen: what is inside other objects, what a function reads from elsewhere, hooks on nodes of
    autograd, and an activation that a forward pass kept as an attribute.

    Args:
        objects: a list of modules, optimizers and gradient scalers.
        device: the `torch.device` of the graph.
    """

    def __init__(self, objects, device):
        self._objects, self._device = objects, device
        self._seen = {}  # By id, which holds as long as the object is kept.
        self._containers, self._views, self._tensors = [], [], []
        self._settings = _settings(device)
        self._description = [self._describe(thing) for thing in (*objects, *_GLOBAL_HOOKS)]
        self._keep()

    def holds(self):
        """Whether all of it is as it was: replaying the graph is making a step."""
        if self._settings != _settings(self._device):
            return False
        if self._is_untouched():
            return True
        # Something was replaced, maybe by its like.
        now = BuiltIn(self._objects, self._device)
        if now._description != self._description:
            return False
        vars(self).update(vars(now))
        return True

    def _keep(self):
        self._lengths = list(map(len, self._containers))
        self._contents = list(chain.from_iterable(self._views))
        self._opened = [thing for thing in self._seen.values() if isinstance(thing, _OPENED)]
        self._types = list(map(type, self._opened))
        self._places = list(map(torch.Tensor.data_ptr, self._tensors))
        self._leaves = [t for t in self._tensors if isinstance(t, nn.Parameter) or t.requires_grad]
        self._gradients = list(map(_gradient, self._leaves))

    def _is_untouched(self):
        """Whether the same objects are in the same places: this runs at every step."""
        return (
            list(map(len, self._containers)) == self._lengths
            and all(map(is_, chain.from_iterable(self._views), self._contents))
            and all(map(is_, map(type, self._opened), self._types))
            and list(map(torch.Tensor.data_ptr, self._tensors)) == self._places
            and list(map(_gradient, self._leaves)) == self._gradients
        )

    def _describe(self, thing):
        """It as something that equals what is built in alike."""
        if isinstance(thing, _VALUES):
            return thing
        if isinstance(thing, tuple):
            return tuple(map(self._describe, thing))
        known = id(thing) in self._seen
        self._seen[id(thing)] = thing
        if known:
            return "seen", id(thing)
        if isinstance(thing, torch.Tensor):
            return self._describe_tensor(thing)
        if isinstance(thing, _OPENED):
            return self._describe_opened(thing)
        if isinstance(thing, dict):
            return self._describe_dict(thing)
        if isinstance(thing, list | set):
            self._watch(thing, thing)
            described = map(self._describe, thing)
            return list(described) if isinstance(thing, list) else set(described)
        return type(thing).__name__, id(thing)

    def _describe_tensor(self, tensor):
        if tensor.grad_fn is not None:
            # What a forward pass left, as that of PyTorch's older spectral norm leaves a weight.
            return "computed"
        try:
            place = tensor.data_ptr()
        except RuntimeError:  # Sparse ones are in more than one place.
            return "tensor", id(tensor)
        self._tensors.append(tensor)
        gradient = [self._describe(value) for value in _gradient(tensor)]
        return "tensor", id(tensor), place, gradient

    def _describe_opened(self, thing):
        kinds = [kind for kind in type(thing).__mro__ if kind not in _BASES]
        if not type(thing).__module__.startswith("torch."):
            self._views.append(vars(thing).keys())  # Its own code may ask which there are.
        return (
            type(thing).__name__,
            id(thing),
            id(type(thing)),
            self._describe_dict(vars(thing)),
            [self._describe_class(kind) for kind in kinds],
        )

    def _describe_dict(self, thing):
        self._watch(thing, thing.values())
        # In order: it is that of a container's layers, or of hooks.
        items = [(k, v) for k, v in thing.items() if not (isinstance(k, str) and k in _UNREAD)]
        return [(self._describe_key(k), self._describe(v)) for k, v in items]

    def _describe_key(self, key):
        return key if isinstance(key, _VALUES) else (type(key).__name__, id(key))

    def _describe_class(self, kind):
        if id(kind) in self._seen:
            return id(kind)
        self._seen[id(kind)] = kind
        attributes = vars(kind)
        self._watch(attributes, attributes.values())
        # Python itself sets special ones when they are first asked for.
        return id(kind), [
            (name, self._describe(value))
            for name, value in attributes.items()
            if not name.startswith("__")
        ]

    def _watch(self, container, view):
        self._containers.append(container)
        if container:  # Most are empty, as dicts of hooks: their length tells enough.
            self._views.append(view)


def _settings(device):
    """The settings of PyTorch and genfast that choose kernels, in this thread."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    return (
        selected_backend(),
        cudnn.conv.fp32_precision,
        cudnn.rnn.fp32_precision,
        matmul.fp32_precision,
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.is_autocast_cache_enabled(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )
