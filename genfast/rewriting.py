"""Networks with a `forward` of their own: layers called one after another there run fused.

`F.relu(self.bn1(self.conv1(x)))` is looked for in the source of every method, and only such calls
are rewritten, to a call of `run` with the same layers: all else stays the user's own code. Two
other designs were weighed:

- Tracing with `torch.fx` and executing the graph freezes what the trace did not see as a tensor:
  training mode, attributes, globals, defaults, random numbers, `isinstance(x, Tensor)`. It drops
  autocast and no_grad, counters, prints, and the backward of an `autograd.Function` it traces
  through, most of that silently; and no network that branches on data has a graph.
- The user's forward on convolutions that compute when somebody looks: what enters C++ past
  `__torch_function__`, as an `autograd.Function` or an extension does, would see no value there.

A sum with a variable is one of the calls, `x + self.block(x)` or `out += x`: which tensor a
variable holds is the same before and after the layers run. Of a sum of two calls, as in
`self.skip(x) + self.block(x)`, the second chain is the one that adds: all of the first operand is
evaluated before anything of it, as Python does.

Here nothing is frozen and nothing is late: which layers, hooks and modes there are is looked up at
each call, when the user's code would, and layers that do not fuse are called as they were. It takes
the source: a method counts only if its source compiles to the very code that it has.
"""

import ast
from collections import Counter
from typing import NamedTuple

import torch

from genfast.calls import FIRST, Call, LateCall, Method, Sum, opened, run, run_after
from genfast.looking import Chain, Part, is_look
from genfast.source import SCOPES, source_of

# How functions and methods of tensors that layers fuse with are written; what a name is, a call
# looks up. The leading ones are part of a convolution that is called with their result.
_LEADING = {"interpolate"}
_FUNCTIONS = {
    "relu", "leaky_relu", "tanh", "sigmoid", "relu6", "hardtanh", "elu", "selu", "softplus", "silu",
    "gelu", "mish", "hardswish", "glu", "avg_pool2d", "pixel_shuffle",
    *_LEADING,
}  # fmt: skip
_METHODS = {"relu", "tanh", "sigmoid"}
_RUN, _CALL, _METHOD = "__genfast_run__", "__genfast_call__", "__genfast_method__"
_OPENED, _SUM, _RUN_AFTER = "__genfast_opened__", "__genfast_sum__", "__genfast_run_after__"
_LATE_CALL = "__genfast_late_call__"
_GIVEN = {
    _RUN: run, _CALL: Call, _METHOD: Method, _OPENED: opened, _SUM: Sum, _RUN_AFTER: run_after,
    _LATE_CALL: LateCall,
}  # fmt: skip


class Rewritten:
    """A method with its chains of calls rewritten.

    Args:
        function: a method as a class holds it.

    Attributes:
        function: the rewritten one.
        chains: the `Chain`s in it; without any, `function` is the method as it was.
        opened: where the method does nothing but call one chain on its one argument, a method of
            that argument that gives what it calls, as `calls.opened` does; else None.

    Raises:
        NoSource: its source is not at hand or not what runs.
    """

    def __init__(self, function):
        tree, build = source_of(function, _GIVEN)
        rewriter = _Rewriter(tree, function.__code__)
        rewriter.rewrite()
        self.original, self.function, self.chains = function, function, rewriter.chains
        self.opened = None
        if self.chains:
            self.function = build(rewriter.tree)
            if _is_one_chain(rewriter.tree):
                self.opened = build(_Renamed(_RUN, _OPENED).visit(rewriter.tree))

    def links(self, module):
        """Lists of what is called one after another in a method of this module, as far as known."""
        names = self.original.__code__.co_freevars
        free = {}
        for name, cell in zip(names, self.original.__closure__ or (), strict=True):
            try:
                free[name] = cell.cell_contents
            except ValueError:  # Empty: a class that is not made yet.
                continue
        values = free | _GIVEN
        for chain in self.chains:
            yield from chain.resolved(self.original, module, values)


class _Step(NamedTuple):
    """How a statement goes on with a variable's value.

    part: the `Part` of a chain that it makes.
    name: the variable that takes the result; None if the statement ends in another way.
    chain: then, the expression that is the result.
    around: then, the expressions of the statement beside it.
    """

    part: Part
    name: str | None
    chain: ast.expr | None = None
    around: tuple = ()

    @property
    def expressions(self):
        """All that it evaluates besides the variable."""
        part = self.part
        found = (part.condition, *part.links, *part.otherwise, *self.around)
        return [e for e in found if e is not None]


class _Replaced(ast.NodeTransformer):
    """Replaces a node by another one, or by a name that stands for it, and back."""

    def __init__(self, node, other=None):
        self.node, self.other = node, other

    def visit(self, node):
        stands = isinstance(node, ast.Name) and node.id == _HELD
        if node is self.node or stands:
            return self.other or ast.copy_location(ast.Name(_HELD, ast.Load()), node)
        return self.generic_visit(node)


_HELD = "__genfast_held__"


def _is_one_chain(method):
    """Whether a rewritten method gives its first argument to one call of `run` and does no more."""
    *body, last = method.body
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        body = body[1:]  # What it says of itself.
    if body:
        # The result may have a name first.
        if len(body) > 1 or not isinstance(body[0], ast.Assign) or len(body[0].targets) > 1:
            return False
        names = [body[0].targets[0], getattr(last, "value", None)]
        if not all(isinstance(n, ast.Name) for n in names) or names[0].id != names[1].id:
            return False
    call = body[0].value if body else getattr(last, "value", None)
    if not isinstance(last, ast.Return) or not _is_call_of(call, _RUN):
        return False
    links, x, *later = call.args
    given = method.args
    names = [a.arg for a in (*given.posonlyargs, *given.args)]
    required = len(names) - len(given.defaults)
    if required != 2 or None in given.kw_defaults or not isinstance(x, ast.Name):
        return False
    return x.id == names[1] and not any(_mentions(e, {x.id}) for e in (links, *later))


def _is_call_of(node, name):
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


class _Renamed(ast.NodeTransformer):
    """Replaces a name by another one."""

    def __init__(self, name, other):
        self.name, self.other = name, other

    def visit_Name(self, node):
        if node.id != self.name:
            return node
        return ast.copy_location(ast.Name(self.other, node.ctx), node)


def _evaluated_first(node):
    """The part of an expression that is evaluated before what else it does; None for none."""
    if isinstance(node, ast.BinOp):
        return node.left
    if isinstance(node, ast.Attribute | ast.Subscript):
        return node.value
    if isinstance(node, ast.Call):
        if node.args and is_look(node.func):
            return node.args[0]
        return node.func
    return None


def _around(node, part):
    """The expressions that lie in a node beside a part of it."""
    beside = []
    while node is not part:
        first = _evaluated_first(node)
        beside += [n for n in ast.iter_child_nodes(node) if n is not first]
        node = first
    return tuple(beside)


def _mentions(expression, names):
    return any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(expression))


class _Rewriter:
    """Rewrites the tree of one method."""

    def __init__(self, tree, code):
        self.tree, self.chains = tree, []
        self._local = code.co_varnames + code.co_cellvars
        self._self = code.co_varnames[0] if code.co_argcount else None
        self._loops = []
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        changed = [node.target for node in ast.walk(tree) if isinstance(node, ast.AugAssign)]
        self._loads = Counter(n.id for n in names if isinstance(n.ctx, ast.Load) or n in changed)
        # Names whose values others than the statements in order may look at.
        self._watched = {n.id for n in names if isinstance(n.ctx, ast.Del)} | set(code.co_cellvars)
        for node in ast.walk(tree):
            if isinstance(node, ast.Global | ast.Nonlocal):
                self._watched |= set(node.names)
        self._seen_by_all = not {"locals", "vars", "dir", "eval", "exec"}.isdisjoint(self._loads)

    def rewrite(self):
        self.tree.body = self._block(self.tree.body, not self._seen_by_all)

    def _block(self, statements, merging):
        """Statements in order; where one goes on with the value of the one before, they merge."""
        made, first = [], 0
        while first < len(statements):
            end, merged = self._merged(statements, first) if merging else (first, None)
            if merged is None:
                made.append(self._inside(statements[first], merging))
                end = first + 1
            else:
                made.append(merged)
            first = end
        return made

    def _inside(self, node, merging=False):
        """A node with the chains in it rewritten."""
        if isinstance(node, SCOPES):
            return node
        if isinstance(node, ast.Call | ast.BinOp):
            links, inner = self._links(node)
            if links:
                self._note([Part(links)])
                return self._call_of_run(node, links, self._inside(inner), [])
        # What a handler of an exception finds in a variable must be what it would have been.
        merging = merging and not isinstance(node, ast.Try)
        loop = isinstance(node, ast.For)
        for name, value in ast.iter_fields(node):
            if loop and name == "body":
                self._loops.append((node.target, node.iter))
            if isinstance(value, ast.AST):
                setattr(node, name, self._inside(value))
            elif isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                setattr(node, name, self._block(value, merging))
            elif isinstance(value, list):
                value[:] = [
                    self._inside(v, merging) if isinstance(v, ast.AST) else v for v in value
                ]
            if loop and name == "body":
                self._loops.pop()
        return node

    def _merged(self, statements, first):
        """Where the statements that merge with this one end, and the one that stands for them."""
        start, parts, later = statements[first], [], []
        if isinstance(start, ast.Assign) and self._is_variable(start.targets):
            links, inner = self._links(start.value, goes_on=True)
            if not links:
                return first, None
            parts.append(Part(links))
            name, end, location = start.targets[0].id, first + 1, start.value
        else:
            name, links, end, location = self._name_in_loop(start), [], first, start
            if name is None:
                return first, None
            inner = ast.copy_location(ast.Name(name, ast.Load()), start)
        names, last = {name}, None
        while end < len(statements) and (last is None or last.name is not None):
            found = self._continued(statements[end], name if last is None else last.name)
            if found is None or any(_mentions(e, names) for e in found.expressions):
                break
            before = parts[-1] if parts else None
            if before and _is_sum(found.part) and not (before.many or before.condition):
                before.links.extend(found.part.links)  # A variable's value: no matter when.
            else:
                later.append((statements[end], found.part))
                parts.append(found.part)
            names.add(found.name)
            last, end = found, end + 1
        if last is None:
            return first, None
        self._note(parts)
        later = [self._later(*both) for both in later]
        call = self._call_of_run(location, links, self._inside(inner), later)
        if last.name is not None:
            made = ast.Assign([ast.Name(last.name, ast.Store())], call)
            ast.copy_location(made, start)
            return end, ast.fix_missing_locations(made)
        made = _Replaced(last.chain, call).visit(
            self._inside(_Replaced(last.chain).visit(statements[end - 1]))
        )
        return end, ast.fix_missing_locations(made)

    def _continued(self, statement, name):
        """How a statement goes on with the value of this variable, a `_Step`; None if not."""
        if isinstance(statement, ast.For):
            same = self._name_in_loop(statement) == name
            return _Step(Part([statement.iter], many=True), name) if same else None
        if isinstance(statement, ast.If):
            return self._choice(statement, name)
        if isinstance(statement, ast.AugAssign):
            return self._sum_in_place(statement, name)
        target = None
        if isinstance(statement, ast.Assign) and self._is_variable(statement.targets):
            target = statement.targets[0].id
        elif not isinstance(statement, ast.Return) or statement.value is None:
            return None
        if target not in (None, name) and self._loads[name] != 1:
            return None  # The value has another reader.
        chain = statement.value
        while chain is not None:
            part = self._part(chain, name)
            if part is not None:
                break
            chain = _evaluated_first(chain)
        else:
            return None
        if chain is statement.value and target is not None:
            return _Step(part, target)
        # The rest of the statement takes the chain's value, and none of the variables before it.
        return _Step(part, None, chain, _around(statement.value, chain))

    def _sum_in_place(self, statement, name):
        """The `_Step` of `name += other`."""
        target = statement.target
        if not isinstance(target, ast.Name) or target.id != name:
            return None
        if not isinstance(statement.op, ast.Add) or not self._is_other(statement.value):
            return None
        return _Step(Part([_sum(statement.value, "x += other", statement)]), name)

    def _choice(self, statement, name):
        """The `_Step` of an if whose branches change this variable and nothing else."""
        branches = []
        for body in (statement.body, statement.orelse or None):
            if body is None:
                branches.append(ast.Name(name, ast.Load()))
                continue
            (*others, only) = body
            if others or not isinstance(only, ast.Assign) or not self._is_variable(only.targets):
                return None
            if only.targets[0].id != name:
                return None
            branches.append(only.value)
        part = self._part(ast.IfExp(statement.test, *branches), name)
        return None if part is None else _Step(part, name)

    def _part(self, expression, name):
        """The `Part` that an expression is, of what is done with this variable; None if not."""
        if isinstance(expression, ast.IfExp):
            branches = [self._done(e, name) for e in (expression.body, expression.orelse)]
            if None in branches or not is_look(expression.test) or not any(branches):
                return None
            links, otherwise = branches
            return Part(links, False, expression.test, otherwise)
        links = self._done(expression, name)
        return Part(links) if links else None

    def _done(self, expression, name):
        """The links of a chain of calls on this variable, none for itself; else None."""
        links, inner = self._links(expression, name)
        return links if isinstance(inner, ast.Name) and inner.id == name else None

    def _name_in_loop(self, statement):
        """The x of `for layer in layers: x = layer(x)`; None for other statements."""
        if not isinstance(statement, ast.For) or statement.orelse or len(statement.body) != 1:
            return None
        layer, body = statement.target, statement.body[0]
        if not isinstance(body, ast.Assign) or not isinstance(layer, ast.Name):
            return None
        call = body.value
        if not self._is_variable(body.targets) or not isinstance(call, ast.Call) or call.keywords:
            return None
        name = body.targets[0].id
        if [ast.dump(e) for e in (call.func, *call.args)] != [
            ast.dump(ast.Name(n, ast.Load())) for n in (layer.id, name)
        ]:
            return None
        if layer.id == name or layer.id in self._watched or self._is_used_elsewhere(layer.id):
            return None
        return name if is_look(statement.iter) else None

    def _is_used_elsewhere(self, name):
        """Whether a variable of loops is looked at outside of them."""
        within = Counter()
        loops = [node for node in ast.walk(self.tree) if isinstance(node, ast.For)]
        for loop in loops:
            if isinstance(loop.target, ast.Name) and loop.target.id == name:
                for statement in loop.body:
                    if any(node in loops for node in ast.walk(statement)):
                        return True  # Loops in one another: too much to tell.
                    within += Counter(n.id for n in ast.walk(statement) if isinstance(n, ast.Name))
        return within[name] != self._loads[name]

    def _links(self, node, name=None, goes_on=False):
        """The links of a chain of calls, the first one first, and what that one takes.

        name: of the variable, where the chain goes on with layers before it that gave its value, so
            that functions alone count.
        goes_on: whether layers may follow, so that a leading function alone counts.
        """
        links = []
        while True:
            link, carried = self._link(node, name)
            # What is evaluated before all else can be that of one sum.
            if link is None or (_adds_first(link[0]) and any(_adds_first(e) for e, *_ in links)):
                break
            links.append(link)
            node = carried
        inner, links = node, links[::-1]
        if name is not None:
            return [expression for expression, _, _ in links], inner
        # PyTorch's functions alone are no chain, and before a layer most are none of its.
        while links and not links[0][1] and not self._leads(links, goes_on):
            inner = links.pop(0)[2]
        return [expression for expression, _, _ in links], inner

    def _leads(self, links, goes_on):
        """Whether the first of these links is a function that may be part of a layer after it."""
        (_, _, call), *others = links
        if not isinstance(call, ast.Call) or _last_name(call.func) not in _LEADING:
            return False
        return others[0][1] if others else goes_on

    def _link(self, node, name=None):
        """(expression of the callable, whether it may be a layer, the call), and what it takes."""
        nothing = None, None
        if isinstance(node, ast.BinOp):
            return self._link_of_sum(node, name)
        if not isinstance(node, ast.Call):
            return nothing
        function, arguments, named = node.func, node.args, node.keywords
        if not arguments:
            if not isinstance(function, ast.Attribute) or function.attr not in _METHODS or named:
                return nothing
            method = ast.Call(ast.Name(_METHOD, ast.Load()), [ast.Constant(function.attr)], [])
            return (_placed(method, node), False, node), function.value
        looks = [function, *arguments[1:], *(k.value for k in named)]
        if any(k.arg is None for k in named) or not all(map(is_look, looks)):
            return nothing
        if any(isinstance(n, ast.NamedExpr) for n in ast.walk(node)):
            return nothing
        if isinstance(arguments[0], ast.Starred):
            return nothing
        may_be_layer = self._may_be_layer(function)
        if not may_be_layer and _last_name(function) not in _FUNCTIONS:
            return nothing
        link = function
        if arguments[1:] or named:
            called = ast.Name(_CALL, ast.Load())
            link = _placed(ast.Call(called, [function, *arguments[1:]], named), node)
        return (link, may_be_layer, node), arguments[0]

    def _link_of_sum(self, node, name):
        """As `_link`, of what is done with this variable, or with what is none.

        The other operand is a variable, whose value is the same whenever it is looked at; or, where
        a call comes second, any expression before it, which the link holds.
        """
        nothing = None, None
        if not isinstance(node.op, ast.Add):
            return nothing
        if any(isinstance(n, ast.NamedExpr) for n in ast.walk(node)):
            return nothing
        for carried, other, how in (
            (node.left, node.right, "x + other"), (node.right, node.left, "other + x"),
        ):  # fmt: skip
            goes_on = not isinstance(carried, ast.Name) or carried.id == name
            if goes_on and self._is_other(other) and other.id != name:
                return (_sum(other, how, node), False, node), carried
        if name is None and isinstance(node.right, ast.Call):
            return (_sum(node.left, FIRST, node), False, node), node.right
        return nothing

    def _in_time(self, links, x=None):
        """The links, such that each has its further arguments looked up when Python would.

        That is after all before it has been called, and may matter. x: what the first one takes,
        unless it is a variable.
        """
        if x is None or isinstance(x, ast.Name):
            return [*links[:1], *map(self._late, links[1:])]
        return list(map(self._late, links))

    def _late(self, link):
        """A link, looking up its further arguments late unless they are the same at all times."""
        if not _is_call_of(link, _CALL):
            return link
        function, *given = link.args
        named = {k.arg: k.value for k in link.keywords}
        if all(isinstance(e, ast.Constant) or self._is_other(e) for e in [*given, *named.values()]):
            return link
        names = ast.Dict([ast.Constant(name) for name in named], list(named.values()))
        value = ast.Tuple([ast.Tuple(given, ast.Load()), names], ast.Load())
        late = ast.Name(_LATE_CALL, ast.Load())
        return _placed(ast.Call(late, [function, _function_of(value)], []), link)

    def _is_other(self, node):
        """Whether it is a variable, of what `_link_of_sum` adds."""
        return (
            isinstance(node, ast.Name) and node.id in self._local and node.id not in self._watched
        )

    def _may_be_layer(self, function):
        root = function
        while isinstance(root, ast.Attribute | ast.Subscript | ast.Call):
            if isinstance(root, ast.Call):
                if not isinstance(root.func, ast.Name) or root.func.id != "getattr":
                    return False
                root = root.args[0] if root.args else None
            else:
                root = root.value
        if not isinstance(root, ast.Name) or root.id not in self._local:
            return False
        if not isinstance(function, ast.Attribute):
            return function is not root or root.id != self._self
        of_self = isinstance(function.value, ast.Name) and function.value.id == self._self
        return of_self or not hasattr(torch.Tensor, function.attr)

    def _is_variable(self, targets):
        if len(targets) != 1 or not isinstance(targets[0], ast.Name):
            return False
        return targets[0].id in self._local and targets[0].id not in self._watched

    def _later(self, statement, part):
        """A function of no arguments that gives the links of a statement."""
        links = part.links if part.many else self._in_time(part.links)
        value = links[0] if part.many else ast.Tuple(links, ast.Load())
        if part.condition is not None:
            otherwise = ast.Tuple(self._in_time(part.otherwise), ast.Load())
            value = ast.IfExp(part.condition, value, otherwise)
        return _placed(_function_of(value), statement)

    def _call_of_run(self, location, links, inner, later):
        function, before = _RUN, []
        for i, link in enumerate(links):
            if _adds_first(link):
                outer, links = list(map(self._late, links[i + 1 :])), links[:i]
                function = _RUN_AFTER
                before = [ast.Tuple(outer, ast.Load()), self._inside(link.args[0])]
                break
        arguments = [*before, ast.Tuple(self._in_time(links, inner), ast.Load()), inner, *later]
        return _placed(ast.Call(ast.Name(function, ast.Load()), arguments, []), location)

    def _note(self, parts):
        parts = [p._replace(links=[_without_value(e) for e in p.links]) for p in parts]
        self.chains.append(Chain(parts, tuple(self._loops), self._local_from_self()))

    def _local_from_self(self):
        return (self._self, *self._local) if self._self else ()


def _function_of(value):
    """The expression of a function of no arguments that returns the value of one."""
    return ast.Lambda(ast.arguments([], [], None, [], [], None, []), value)


def _sum(other, how, at):
    """The expression of a `Sum`."""
    return _placed(ast.Call(ast.Name(_SUM, ast.Load()), [other, ast.Constant(how)], []), at)


def _is_sum_link(expression):
    called = expression.func if isinstance(expression, ast.Call) else None
    return isinstance(called, ast.Name) and called.id == _SUM


def _adds_first(expression):
    """Whether a link adds what is to be evaluated before all links."""
    return _is_sum_link(expression) and expression.args[1].value == FIRST


def _is_sum(part):
    """Whether a `Part` only adds."""
    return not part.many and part.condition is None and all(map(_is_sum_link, part.links))


def _without_value(expression):
    """A link as it can be looked at when the method does not run: of a `Sum` the kind alone."""
    if not _is_sum_link(expression):
        return expression
    return _sum(ast.Constant(None), expression.args[1].value, expression)


def _last_name(function):
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else None


def _placed(node, at):
    """The node at the place of another one, for tracebacks."""
    return ast.fix_missing_locations(ast.copy_location(node, at))
