"""Which forwards of people's own are a gated linear unit over the channels, as `nn.GLU(1)` is.

Many networks that draw images of a text, and others after them, bring a class of their own that
halves the channels by slices or chunks and multiplies by a sigmoid. A forward counts if its source
says just that: it is followed step by step with names in the place of values.
"""

import ast
import functools
from collections.abc import Iterable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F

from genfast.looking import is_look
from genfast.source import NoSource, source_of

# The classes that are one, each with the forward that it had when it was looked at.
_found: dict[type, Any] = {}

# What a value is: the input, its number of channels, half of it, as a float too, the two halves of
# the input, the second one's sigmoid, and the result.
_X, _CHANNELS, _HALF, _HALF_AS_FLOAT = "x", "channels", "half", "half as float"
_FIRST, _SECOND, _GATE, _RESULT = "first", "second", "gate", "result"
_HALVES = (_FIRST, _SECOND)


def find(classes: Iterable[type]) -> None:
    """Look at classes, some of which may have a forward of this kind, for `is_found`."""
    for kind in set(classes):
        forward = getattr(kind, "forward", None)
        if kind.__module__.startswith("torch.") or not isinstance(forward, FunctionType):
            continue
        if _is_glu(forward):
            _found[kind] = forward


def is_found(kind: type) -> bool:
    """Whether a class is one of those that `find` found, and still as it was."""
    return kind in _found and getattr(kind, "forward", None) is _found[kind]


@functools.lru_cache(maxsize=1024)  # Models are accelerated again, and share classes.
def _is_glu(forward: FunctionType) -> bool:
    """Whether a method does what `nn.GLU(1)` does with an even number of channels.

    Args:
        forward: as a class holds it.
    """
    try:
        method, _ = source_of(forward, {})
    except NoSource:
        return False
    given = method.args
    names = [a.arg for a in (*given.posonlyargs, *given.args)]
    if len(names) != 2 or given.vararg or given.kwarg or given.kwonlyargs or given.defaults:
        return False
    try:
        return _Followed(forward, names[1]).result(method.body) == _RESULT
    except _Unknown:
        return False


class _Unknown(Exception):
    """Something else than a gated linear unit takes."""


class _Followed:
    """The variables of a method while it is followed, from its input on."""

    def __init__(self, function, x):
        self.globals, self.values = function.__globals__, {x: _X}
        self.builtin = "int" not in self.globals

    def result(self, body):
        """What the method returns."""
        for statement in body:
            if isinstance(statement, ast.Return) and statement.value is not None:
                return self.value(statement.value)
            if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                self.assign(statement.targets[0], self.value(statement.value))
            elif isinstance(statement, ast.Assert):
                if not self.holds_for_even(statement.test):
                    raise _Unknown
                if statement.msg is not None and not is_look(statement.msg):
                    raise _Unknown
            elif not self.is_docstring(statement):
                raise _Unknown
        raise _Unknown

    def is_docstring(self, statement):
        return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)

    def holds_for_even(self, test):
        """Whether it asks for an even number of channels and no more."""
        if not isinstance(test, ast.Compare) or len(test.ops) != 1:
            return False
        remainder, zero = test.left, test.comparators[0]
        return (
            isinstance(test.ops[0], ast.Eq)
            and isinstance(remainder, ast.BinOp)
            and isinstance(remainder.op, ast.Mod)
            and self.value(remainder.left) == _CHANNELS
            and self.value(remainder.right) == 2
            and self.value(zero) == 0
        )

    def assign(self, target, value):
        """Follow an assignment to a variable, or of several values to as many."""
        if isinstance(target, ast.Name):
            self.values[target.id] = value
            return
        several = isinstance(target, ast.Tuple) and isinstance(value, tuple)
        if not several or len(target.elts) != len(value):
            raise _Unknown
        for element, one in zip(target.elts, value, strict=True):
            self.assign(element, one)

    def value(self, node):
        """What an expression gives."""
        kind = type(node)
        if kind is ast.Constant and type(node.value) is int:
            return node.value
        if kind is ast.Tuple:
            return tuple(map(self.value, node.elts))
        if kind is ast.Name and node.id in self.values:
            return self.values[node.id]
        if kind is ast.Subscript:
            return self.subscript(node)
        if kind is ast.BinOp:
            return self.operation(type(node.op), self.value(node.left), self.value(node.right))
        if kind is ast.Attribute and node.attr == "shape" and self.value(node.value) == _X:
            return "shape"
        if kind is ast.Call:
            return self.call(node)
        raise _Unknown

    def operation(self, operator, left, right):
        """Of a number of channels, or of halves."""
        if (left, right) == (_CHANNELS, 2):
            if operator is ast.FloorDiv:
                return _HALF
            if operator is ast.Div:
                return _HALF_AS_FLOAT
        if operator is ast.Mult and {left, right} == {_FIRST, _GATE}:
            return _RESULT
        raise _Unknown

    def subscript(self, node):
        """`x.shape[1]`, one of two halves by its number, or a slice of the input's channels."""
        value = self.value(node.value)
        if value == "shape":
            return self.expect(self.value(node.slice), 1, _CHANNELS)
        if value == _HALVES:
            number = self.value(node.slice)
            if number not in (0, 1):
                raise _Unknown
            return value[number]
        if value != _X or not isinstance(node.slice, ast.Tuple):
            raise _Unknown
        images, channels, *others = node.slice.elts
        if not all(map(self.is_all, (images, *others))) or not isinstance(channels, ast.Slice):
            raise _Unknown
        lower, upper, step = (
            None if bound is None else self.value(bound)
            for bound in (channels.lower, channels.upper, channels.step)
        )
        if step not in (None, 1):
            raise _Unknown
        if lower in (None, 0) and upper == _HALF:
            return _FIRST
        if lower == _HALF and upper in (None, _CHANNELS):
            return _SECOND
        raise _Unknown

    def is_all(self, index):
        if isinstance(index, ast.Constant) and index.value is ...:
            return True
        whole = isinstance(index, ast.Slice)
        return whole and index.lower is None and index.upper is None and index.step is None

    def expect(self, value, expected, result):
        if value != expected:
            raise _Unknown
        return result

    def call(self, node):
        """Of a function of PyTorch's, a method of a tensor, or `int`."""
        if any(isinstance(a, ast.Starred) for a in node.args):
            raise _Unknown
        if any(k.arg is None for k in node.keywords):
            raise _Unknown
        function, arguments = self.function(node.func), list(node.args)
        if function is None:  # A method's first argument is its tensor.
            function, arguments = node.func.attr, [node.func.value, *arguments]
        values = [self.value(a) for a in arguments]
        named = {k.arg: self.value(k.value) for k in node.keywords}
        if function is int and values == [_HALF_AS_FLOAT] and not named:
            return _HALF
        if function == "size" and not named:
            if values == [_X]:
                return "shape"
            return self.expect(values, [_X, 1], _CHANNELS)
        if function in ("sigmoid", torch.sigmoid, F.sigmoid):
            return self.expect((values, named), ([_SECOND], {}), _GATE)
        if function in ("mul", torch.mul) and not named and len(values) == 2:
            return self.operation(ast.Mult, *values)
        if not values or values[0] != _X:
            raise _Unknown
        given = values[1:]
        if function in ("chunk", torch.chunk):
            return self.expect(self.ordered(given, named, "chunks"), [2, 1], _HALVES)
        if function in ("split", torch.split):
            size = "split_size" if function == "split" else "split_size_or_sections"
            return self.expect(self.ordered(given, named, size), [_HALF, 1], _HALVES)
        if function is F.glu and [*given, *named.items()] in ([1], [("dim", 1)]):
            return _RESULT
        raise _Unknown

    def ordered(self, given, named, first):
        """The values of two arguments, of which the second one is called dim."""
        names = (first, "dim")[len(given) :]
        if len(given) > 2 or set(named) != set(names):
            raise _Unknown
        return [*given, *(named[name] for name in names)]

    def function(self, node):
        """The function that an expression names; None for a method of a variable's value."""
        if isinstance(node, ast.Name) and node.id not in self.values:
            if node.id == "int" and self.builtin:
                return int
            return self.globals.get(node.id, _Unknown)
        parts, root = [], node
        while isinstance(root, ast.Attribute):
            parts.append(root.attr)
            root = root.value
        if isinstance(root, ast.Name) and root.id not in self.values:
            found = self.globals.get(root.id)
            for part in reversed(parts):
                found = getattr(found, part, None)
            if found is None:
                raise _Unknown
            return found
        if not isinstance(node, ast.Attribute):
            raise _Unknown
        return None
