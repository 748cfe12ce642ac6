"""The source of a method, and methods like it made of other source."""

import __future__

import ast
import functools
import inspect
from types import CellType, CodeType, FunctionType


class NoSource(Exception):
    """The source of a method is not at hand; the message says why."""


def source_of(function, given):
    """The syntax tree of a method, and a function that makes a method like it of another tree.

    Args:
        function: a method as a class holds it.
        given: objects by the names that the other tree may use beside the method's own.

    Raises:
        NoSource: there is no source, or it is not what runs.
    """
    name = getattr(function, "__qualname__", repr(function))
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        raise NoSource(f"{name} is no plain Python function")
    code = function.__code__
    if code.co_flags & (inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR):
        raise NoSource(f"{name} is a generator or a coroutine")
    try:
        whole, _ = inspect.findsource(code)
        lines, first = inspect.getsourcelines(code)
        indented = lines[0][:1].isspace()
        tree = ast.parse("".join(["class _:\n"] * indented + lines))
        imported = _imported("".join(whole))
    except Exception as error:  # A file that has changed since may hold anything.
        raise NoSource(f"the source of {name} is not at hand") from error
    node = tree.body[0].body[0] if indented else tree.body[0]
    if not isinstance(node, ast.FunctionDef) or node.decorator_list:
        raise NoSource(f"{name} is decorated or made in an expression")
    ast.increment_lineno(tree, first - 1 - indented)
    if not _same_code(_compiled(function, node, imported, given), code):
        raise NoSource(f"the source of {name} is not what runs")
    return node, functools.partial(_build, function, imported, given)


SCOPES = (
    ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.ListComp, ast.SetComp,
    ast.DictComp, ast.GeneratorExp,
)  # fmt: skip


@functools.lru_cache(maxsize=16)
def _imported(source):
    """The names that a file imports at its top; Python compiles a call of `F.relu` by them."""
    found, todo = set(), [ast.parse(source)]
    while todo:
        for node in ast.iter_child_nodes(todo.pop()):
            if isinstance(node, ast.Import | ast.ImportFrom):
                found |= {(a.asname or a.name).partition(".")[0] for a in node.names}
            elif isinstance(node, ast.stmt | ast.ExceptHandler) and not isinstance(node, SCOPES):
                todo.append(node)
    return frozenset(found - {"*"})


def _compiled(function, node, imported, given):
    """The code of a method by its tree, with the names around it that the function has.

    imported: the names that the file imports.
    given: further names from around it.
    """
    code = function.__code__
    owner = f"_.{function.__qualname__}".split(".")[-2]
    owner = owner if owner.isidentifier() else "_"
    free = {*code.co_freevars, *given} - {"__class__"}
    arguments = ast.arguments([], [ast.arg(name) for name in sorted(free)], None, [], [], None, [])
    holder = ast.ClassDef(owner, [], [], [node], [])
    # Else its own name would be a variable of what is around it.
    unbound = [] if owner in free else [ast.Global([owner])]
    outer = ast.FunctionDef("_", arguments, [*unbound, holder], [], None)
    for made in (holder, outer):
        made.type_params = []
    imports = [ast.Import([ast.alias(name)]) for name in sorted(imported)]
    tree = ast.fix_missing_locations(ast.Module([*imports, outer], []))
    future = code.co_flags & __future__.annotations.compiler_flag
    inner = compile(tree, code.co_filename, "exec", flags=future, dont_inherit=True)
    for name in ("_", owner, node.name):
        found = (c for c in inner.co_consts if isinstance(c, CodeType) and c.co_name == name)
        inner = next(found, None)
        if inner is None:
            raise NoSource(f"{function.__qualname__} is no plain Python function")
    return inner


def _same_code(ours, theirs):
    """Whether two code objects do the same, wherever they stand."""
    alike = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars")
    if any(getattr(ours, name) != getattr(theirs, name) for name in alike):
        return False
    if (ours.co_flags ^ theirs.co_flags) & ~inspect.CO_NESTED:
        return False
    if len(ours.co_consts) != len(theirs.co_consts):
        return False
    for a, b in zip(ours.co_consts, theirs.co_consts, strict=True):
        if type(a) is not type(b):
            return False
        if isinstance(a, CodeType):
            same = _same_code(a, b)
        elif isinstance(a, str):  # Python 3.10 keeps the full names of functions within.
            same = a.rpartition(".<locals>.")[2] == b.rpartition(".<locals>.")[2]
        else:
            same = repr(a) == repr(b)
        if not same:
            return False
    return True


def _build(function, imported, given, node):
    """A function like this one, by another tree."""
    code = _compiled(function, node, imported, given)
    if hasattr(code, "co_qualname"):
        code = code.replace(co_qualname=function.__code__.co_qualname)
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    cells |= {name: CellType(value) for name, value in given.items()}
    closure = tuple(cells[name] for name in code.co_freevars)
    made = FunctionType(
        code, function.__globals__, function.__name__, function.__defaults__, closure
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return functools.update_wrapper(made, function)
