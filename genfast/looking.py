"""Expressions that only look at things, and what they give for one module."""

import ast
import functools
from typing import NamedTuple

# Builtins that look at things and change nothing.
_LOOKS = {"enumerate", "getattr", "hasattr", "isinstance", "len", "range", "reversed", "str", "zip"}
_LISTINGS = {"children", "items", "keys", "named_children", "values"}
_MOST_TURNS = 256


UNKNOWN = object()  # What only a call shows.


_LOOKING = (
    ast.Constant, ast.Name, ast.Attribute, ast.Subscript, ast.Slice, ast.UnaryOp, ast.BinOp,
    ast.BoolOp, ast.Compare, ast.IfExp, ast.Tuple, ast.List, ast.JoinedStr, ast.FormattedValue,
    ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop,
)  # fmt: skip


def is_look(node):
    """Whether an expression only looks at things, so that when it is evaluated hardly matters."""
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name):
            looks = node.func.id in _LOOKS
        else:
            looks = isinstance(node.func, ast.Attribute) and node.func.attr in _LISTINGS
            looks = looks and is_look(node.func.value)
        return looks and all(map(is_look, [*node.args, *(k.value for k in node.keywords)]))
    return isinstance(node, _LOOKING) and all(map(is_look, ast.iter_child_nodes(node)))


class Part(NamedTuple):
    """Calls that one statement of a chain makes.

    links: expressions of what is called; of one that gives many, if `many`.
    condition: what that depends on, or None.
    otherwise: as `links`, where the condition does not hold.
    """

    links: list
    many: bool = False
    condition: ast.expr | None = None
    otherwise: tuple | list = ()


class Chain:
    """Calls one after another in a method.

    parts: `Part`s, in order.
    loops: pairs of target and iterable of the loops around them, from the outermost.
    local: the names that are variables of the method, first that of the module.
    """

    def __init__(self, parts, loops, local):
        self.parts, self.loops, self.local = parts, loops, local

    def resolved(self, function, module, values):
        """A list of links for each turn of the loops around."""
        variables = {self.local[0]: module} if self.local else {}
        look = functools.partial(self._look, function.__globals__, values)
        turns = [variables]
        for target, iterable in self.loops:
            turns = [
                turn | _bound(target, value)
                for turn in turns
                for value in self._items(look, iterable, turn)
            ][:_MOST_TURNS]
        for turn in turns:
            yield list(self._links(look, turn))

    def _links(self, look, variables):
        for part in self.parts:
            expressions = part.links
            if part.condition is not None and not _is_true(look(part.condition, variables)):
                expressions = part.otherwise
            for expression in expressions:
                if part.many:
                    yield from self._items(look, expression, variables)
                else:
                    yield look(expression, variables)

    def _items(self, look, expression, variables):
        """What a loop would see; nothing if that is not known."""
        try:
            return list(look(expression, variables))[:_MOST_TURNS] if is_look(expression) else []
        except TypeError:
            return []

    def _look(self, names, values, expression, variables):
        """The value of an expression that only looks at things; `UNKNOWN` where it takes more."""
        used = {node.id for node in ast.walk(expression) if isinstance(node, ast.Name)}
        if used & set(self.local) - set(variables):
            return UNKNOWN
        code = compile(ast.Expression(expression), "<genfast>", "eval")
        try:
            return eval(code, names, values | variables)
        except Exception:  # What is not there now may be there when the method runs.
            return UNKNOWN


def _is_true(value):
    """Whether a condition holds, or may hold."""
    try:
        return bool(value)
    except Exception:
        return True


def _bound(target, value):
    if isinstance(target, ast.Name):
        return {target.id: value}
    if not isinstance(target, ast.Tuple | ast.List) or not isinstance(value, tuple | list):
        return {}
    pairs = zip(target.elts, value, strict=False)
    return {k: v for t, part in pairs for k, v in _bound(t, part).items()}
