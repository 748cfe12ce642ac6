"""Classes of networks, and the classes that do the same, fused where that can be."""

import copyreg
import functools
from types import FunctionType

import torch

from genfast.backend import is_exporting, selected_backend
from genfast.rewriting import Rewritten
from genfast.source import NoSource


class Network:
    """What a class of a network is rewritten to.

    Attributes:
        rewritten: the class that does the same, fused where it can be; None if there is none.
        methods: the `Rewritten` methods that hold chains, by name.
        reasons: why methods were not rewritten, by name.
    """

    def __init__(self, cls):
        self.methods, self.reasons, self.rewritten = {}, {}, None
        for name, function in _methods(cls):
            try:
                found = Rewritten(function)
            except NoSource as error:
                self.reasons[name] = str(error)
                continue
            if found.chains:
                self.methods[name] = found
        if not self.methods:
            return
        members = {name: _dispatching(cls, name, m) for name, m in self.methods.items()}
        members |= {
            "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__,
            "__reduce_ex__": _reduce, "_genfast_rewritten_from": cls,
        }  # fmt: skip
        if "forward" in self.methods and self.methods["forward"].opened:
            members["_genfast_calls"] = _calls(self.methods["forward"], members["forward"])
        try:
            self.rewritten = type(cls)(cls.__name__, (cls,), members)
        except Exception as error:  # A class may say what becomes of its subclasses.
            self.reasons["forward"] = f"{cls.__name__} allows no subclass: {error}"


@functools.cache
def network_of(cls):
    """The `Network` of a class."""
    return Network(cls)


def original_of(cls):
    """The class that a rewritten class stands for; None for others."""
    return vars(cls).get("_genfast_rewritten_from")


def _methods(cls):
    """The functions that people wrote for a class or for those it is made of, by name."""
    seen = set()
    for owner in cls.__mro__:
        if owner is object or owner.__module__.partition(".")[0] in ("torch", "genfast"):
            continue
        for name, function in vars(owner).items():
            if name in seen:
                continue
            seen.add(name)
            if isinstance(function, FunctionType) and not name.startswith("__"):
                yield name, function


def _dispatching(cls, name, method):
    """The method that chooses, at each call, between the rewritten one and the user's own."""
    original, rewritten = method.original, method.function

    @functools.wraps(original)
    def choose(self, *args, **kwargs):
        found = getattr(cls, name, original)
        if found is original and not (
            is_exporting() or torch.jit.is_tracing() or selected_backend() == "reference"
        ):
            found = rewritten
        return found(self, *args, **kwargs)

    # torch.compile counts its compilations by code object, and 8 of one are its limit.
    choose.__code__ = choose.__code__.replace(co_name=name)
    return choose


def _calls(method, forward):
    """A method that says what a module calls in order: see `opening.may_open`.

    method: the `Rewritten` forward.
    forward: what the class has in its place.
    """

    def calls(self):
        cls = type(self)
        if cls.forward is not forward or cls._genfast_rewritten_from.forward is not method.original:
            return None
        try:
            return method.opened(self, None)
        except Exception:  # Called itself, it will say so when it is its turn.
            return None

    return calls


def _reduce(module, protocol):
    # Pickle finds a class by its name, and one made here has none: so store what it is made of.
    cls = type(module)
    original = cls._genfast_rewritten_from
    reduced = super(cls, module).__reduce_ex__(max(protocol, 2))
    if not isinstance(reduced, tuple):
        return reduced
    function, arguments, *state = reduced
    arguments = tuple(original if a is cls else a for a in arguments)
    if function is copyreg.__newobj__:
        function = _new
    return original if function is cls else function, arguments, *state


def _new(original, *arguments):
    cls = network_of(original).rewritten or original
    return cls.__new__(cls, *arguments)
