"""What a compiled kernel executes: its SASS as straight code and loops, and what each holds.

A GPU's instructions are read with nvdisasm, which ships with Triton. Blocks and loops come from the
branches: a loop is the target of a branch that its target dominates, and all that can reach that
branch without passing the target. So neither padding after the end nor the code of a wait that
lies elsewhere and jumps back is taken for one.
"""

import ast
import dataclasses
import functools
import hashlib
import re
import subprocess
import tempfile
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

_KERNELS = Path(__file__).parents[2] / "kernels"
_INSTRUCTION = re.compile(
    r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
)
_LABEL = re.compile(r"^([.$]\S+):\s*$")
_SOURCE = re.compile(r'^\s*//## File "(.*)", line (\d+)')
_TARGET = re.compile(r"`\((\S+)\)")
# CPython 3.11 fails where two threads parse at once (python/cpython issue 106905).
_PARSING = threading.Lock()
_LAYOUT_CHANGES = ("local_load", "local_store", "convert_layout")


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction.

    opcode: with its modifiers, "HGMMA.64x128x16.F32.BF16".
    operands: as nvdisasm writes them.
    conditional: whether a predicate guards it.
    source: (file name, line) of the Python code it was compiled from, or None.
    """

    opcode: str
    operands: str
    conditional: bool
    source: tuple[str, int] | None

    @property
    def name(self):
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class Listing:
    """instructions: of a kernel and the functions it calls. labels: index by label."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


@dataclass(frozen=True)
class Region:
    """The straight code of a kernel, or one loop without the loops inside it.

    instructions: that one pass executes, called functions included.
    opcodes: how many of each.
    source: the loop's variable as "function.variable", None for straight code or if unknown.
    line: of the loop in its file.
    parent: index in `Code.regions` of the loop around it; 0, the straight code, if there is none.
    unroll: passes of the source's loop that one pass stands for.
    """

    instructions: int
    opcodes: Counter
    source: str | None
    line: int | None
    parent: int
    unroll: int = 1

    def count(self, *opcodes):
        """How many instructions have one of these opcodes, with whatever modifiers follow."""
        starts = tuple(f"{opcode}." for opcode in opcodes)
        return sum(n for opcode, n in self.opcodes.items() if f"{opcode}.".startswith(starts))

    def widths(self, opcode):
        """{bytes of a thread that one instruction moves: how many of these there are}.

        Args:
            opcode: "LDG", "LDGSTS" or "STG", with whatever modifiers follow.
        """
        found = Counter()
        for each, n in self.opcodes.items():
            name, _, modifiers = each.partition(".")
            if name == opcode:
                bits = re.search(r"\b[SU]?(8|16|64|128)\b", modifiers)
                found[int(bits[1]) // 8 if bits else 4] += n
        return dict(found)

    @property
    def multiplications(self):
        """Matrix instructions: {opcode: how many}."""
        names = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "QMMA")
        return {op: n for op, n in self.opcodes.items() if op.partition(".")[0] in names}

    @property
    def waits_inside(self):
        """Whether the products of a pass wait for one another instead of for the pass before."""
        return self.count("WARPGROUP.DEPBAR") > 1

    @property
    def loads(self):
        """How a pass reads memory: "waiting" for it, "asynchronous", or None if it does not.

        A load into registers is used in the pass that issued it; asynchronous ones fill shared
        memory for a later pass.
        """
        if self.count("LDG"):
            return "waiting"
        return "asynchronous" if self.count("LDGSTS", "UTMALDG", "UBLKCP") else None


@dataclass(frozen=True)
class Code:
    """A kernel's machine code.

    regions: straight code first, then the loops, outer before inner.
    registers: of a thread. spills: bytes of a thread's stack and local memory.
    layout_changes: loads from and stores to shared memory and conversions of layout that Triton
        put into loops.
    """

    regions: tuple[Region, ...]
    registers: int
    spills: int
    layout_changes: int


def read(compiled):
    """The `Code` of a `recording.Compiled` of NVIDIA's."""
    return Code(
        regions=regions(disassembled(compiled)),
        layout_changes=layout_changes_in_loops(compiled.ttgir),
        **resources(compiled),
    )


def disassembled(compiled):
    """The `Listing` of a `recording.Compiled` of NVIDIA's."""
    from triton.knobs import nvidia

    command = nvidia.nvdisasm.path, "-c", "-g", "-ndf"
    return parse(_printed(compiled.binary, "listing.sass", *command))


def resources(compiled):
    """{"registers": of a thread, "spills": as in `Code`} of a `recording.Compiled`.

    This needs no disassembler, and `read` does. AMD's spills are registers.
    """
    if found := dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", compiled.assembly)):
        return dict(registers=int(found["vgpr_count"]), spills=int(found["vgpr_spill_count"]))
    from triton.knobs import nvidia

    usage = _printed(compiled.binary, "usage.txt", nvidia.cuobjdump.path, "-res-usage")
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return dict(registers=numbers["REG"], spills=numbers["STACK"] + numbers["LOCAL"])


def _printed(cubin, name, *command):
    """What a tool prints of a cubin, kept in Triton's cache under a name: it can take a second."""
    from triton.runtime.cache import get_cache_manager

    cache = get_cache_manager(hashlib.sha256(cubin).hexdigest())
    kept = cache.get_file(name)
    if kept is None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "kernel.cubin"
            file.write_bytes(cubin)
            done = subprocess.run([*command, file], capture_output=True, text=True, check=True)
        kept = cache.put(done.stdout, name, binary=False)
    return Path(kept).read_text(encoding="utf-8")


def parse(text):
    """The `Listing` that nvdisasm printed."""
    instructions, labels, source = [], {}, None
    for line in text.splitlines():
        if found := _LABEL.match(line):
            labels[found[1]] = len(instructions)
        elif found := _SOURCE.match(line):
            source = Path(found[1]).name, int(found[2])
        elif found := _INSTRUCTION.match(line):
            predicate, opcode, operands = found.groups()
            instructions.append(Instruction(opcode, operands.strip(), bool(predicate), source))
    return Listing(tuple(instructions), labels)


def regions(listing):
    """The `Region`s of a kernel: what nothing reaches is in none of them."""
    graph = _Graph(listing, 0)
    skipped = graph.waits() | graph.slow_divisions()
    loops = [(header, body) for header, body in graph.loops() if header not in skipped]
    # Outer before inner: a loop holds the headers of those inside it.
    loops.sort(key=lambda loop: -len(loop[1]))
    bodies = [set(graph.blocks), *(body for _, body in loops)]
    inside = [[k for k, other in enumerate(bodies) if other < body] for body in bodies]
    own = []
    for body, inner in zip(bodies, inside, strict=True):
        blocks = body.difference(skipped, *(bodies[k] for k in inner))
        own.append([i for block in sorted(blocks) for i in graph.blocks[block]])
    sources = _sources(own, inside)
    found = []
    for index, (body, instructions) in enumerate(zip(bodies, own, strict=True)):
        source = sources[index]
        parent = max(k for k in range(index) if body <= bodies[k]) if index else 0
        called = sum(_length(listing, i) for i in instructions if i.name == "CALL")
        found.append(
            Region(
                instructions=len(instructions) + called,
                opcodes=Counter(i.opcode for i in instructions),
                source=source and source[1],
                line=source and source[0],
                parent=parent,
            )
        )
    return _with_unrolling(found)


def _sources(own, inside):
    """What `_source_loop` says of each body but the first, which is straight code: None.

    The compiler moves the first loads of a pipelined loop before it, into the loop around it, but
    that one is a loop of its own.

    Args:
        own: each body's instructions, outer bodies before inner ones, without those of
        inside: the bodies within it, by their places.
    """
    sources = [None] * len(own)
    for index in reversed(range(1, len(own))):
        sources[index] = _source_loop(own[index], {sources[k] for k in inside[index]})
    return sources


def _length(listing, call):
    """Instructions of the function that is called."""
    target = listing.labels[_TARGET.search(call.operands)[1]]
    return sum(map(len, _Graph(listing, target).blocks.values()))


def _with_unrolling(found):
    """Mark loops that take several passes of the source's at once, beside one for what is left."""
    least = {}
    for region in found:
        amount = _work(region)
        least[region.line] = min(amount, least.get(region.line, amount))
    marked = []
    for region in found:
        passes, odd = divmod(_work(region), least[region.line]) if region.line else (1, 0)
        marked.append(dataclasses.replace(region, unroll=1 if odd else passes))
    return tuple(marked)


def _work(region):
    """What grows with every pass of the source's loop that a pass of this one stands for."""
    return region.count("LDG", "LDGSTS", "UTMALDG", "HGMMA", "HMMA") or region.instructions


class _Graph:
    """The basic blocks that can be reached from an instruction, and the branches between them.

    blocks: {index of the first instruction: the block's instructions}.
    """

    def __init__(self, listing, entry):
        self._listing = listing
        code, labels = listing.instructions, listing.labels
        leaders = set(labels.values()) | {i + 1 for i, c in enumerate(code) if _ends_block(c)}
        starts = sorted(start for start in leaders | {0, entry} if start < len(code))
        ends = dict(zip(starts, [*starts[1:], len(code)], strict=True))
        # Where threads that a branch separated meet again: said by the last BSSY before.
        meetings, barriers = {}, {}
        for i, instruction in enumerate(code):
            if instruction.name == "BSSY":
                register = instruction.operands.partition(",")[0]
                barriers[register] = labels[_TARGET.search(instruction.operands)[1]]
            elif instruction.name == "BSYNC":
                meetings[i + 1] = barriers[instruction.operands]
        self.entry = entry
        self.blocks, self._next = {}, {}
        waiting = [entry]
        while waiting:
            start = waiting.pop()
            if start in self.blocks or start not in ends:
                continue
            self.blocks[start] = code[start : ends[start]]
            self._next[start] = self._successors(self.blocks[start][-1], ends[start], meetings)
            waiting.extend(self._next[start])
        self._before = {block: set() for block in self.blocks}
        for block, targets in self._next.items():
            for target in targets & self.blocks.keys():
                self._before[target].add(block)

    def _successors(self, last, following, meetings):
        if last.name in ("EXIT", "RET"):
            return {following} if last.conditional else set()
        if last.name == "BSYNC":
            return {meetings[following]}
        if last.name == "BRX" or last.name == "JMX":
            raise ValueError(f"expected branches to labels, got {last.opcode} {last.operands}")
        if last.name != "BRA":
            return {following}
        target = self._listing.labels[_TARGET.search(last.operands)[1]]
        # A second condition may be an operand: `BRA P1, (.L_x_2)`.
        is_conditional = last.conditional or "," in last.operands
        return {target, following} if is_conditional else {target}

    def loops(self):
        """(header, blocks) of each natural loop; loops with one header are one."""
        dominators = self._dominators()
        found = {}
        for block, targets in self._next.items():
            for header in targets & dominators[block]:
                body = found.setdefault(header, {header})
                waiting = [block]
                while waiting:
                    member = waiting.pop()
                    if member not in body:
                        body.add(member)
                        waiting.extend(self._before[member])
        return list(found.items())

    def _dominators(self):
        """{block: the blocks on every way to it, itself included}."""
        every = set(self.blocks)
        found = dict.fromkeys(every, every) | {self.entry: {self.entry}}
        changed = True
        while changed:
            changed = False
            for block in sorted(every - {self.entry}):
                ways = [found[b] for b in self._before[block]]
                new = set.intersection(*ways) | {block}
                if new != found[block]:
                    found[block], changed = new, True
        return found

    def waits(self):
        """Blocks that ask a barrier again and again: none where what they wait for is there."""
        return {
            block
            for block, code in self.blocks.items()
            if block in self._next[block] and any("TRYWAIT" in i.opcode for i in code)
        }

    def slow_divisions(self):
        """Blocks that call a 64-bit division where the numbers do not fit 32 bits.

        The other way of the branch before divides them as 32-bit numbers, and both ways meet again.
        """
        found = set()
        for block, code in self.blocks.items():
            if not any(i.name == "CALL" for i in code) or len(self._before[block]) != 1:
                continue
            (branch,) = self._before[block]
            others = self._next[branch] - {block}
            for other in others & self.blocks.keys():
                calls = any(i.name == "CALL" for i in self.blocks[other])
                if not calls and self._next[other] == self._next[block]:
                    found.add(block)
        return found


def _ends_block(instruction):
    return instruction.name in ("BRA", "BRX", "JMX", "EXIT", "RET", "BSYNC")


def _source_loop(instructions, others=()):
    """Line and "function.variable" of the innermost `for` most of these instructions come from.

    others: what was said of loops inside this one.
    """
    votes = Counter()
    for instruction in instructions:
        if instruction.source is None:
            continue
        name, line = instruction.source
        around = [loop for loop in _loops_of_source(name) if loop[0] <= line <= loop[1]]
        if around:
            votes[max(around)] += 1
    if not votes:
        return None
    found = ((line, what) for (line, _, what), _ in votes.most_common())
    return next((loop for loop in found if loop not in others), None)


@functools.cache
def _loops_of_source(name):
    """(first line, last line, "function.variable") of each loop of a file in kernels/."""
    path = _KERNELS / name
    if not path.exists():
        return ()
    with _PARSING:
        module = ast.parse(path.read_text(encoding="utf-8"))
    found = []
    for function in ast.walk(module):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.For) and "static_range" not in ast.unparse(node.iter):
                    what = f"{function.name}.{ast.unparse(node.target)}"
                    found.append((node.lineno, node.end_lineno, what))
    return tuple(found)


def layout_changes_in_loops(ttgir):
    """How many operations between shared memory and registers, or layouts, lie inside loops."""
    found, depth, loops = 0, 0, []
    for line in ttgir.splitlines():
        if "scf.for" in line or "scf.while" in line:
            loops.append(depth)
        elif loops:
            found += sum(f"ttg.{name} " in line for name in _LAYOUT_CHANGES)
        depth += line.count("{") - line.count("}")
        if loops and depth <= loops[-1]:
            loops.pop()
    return found
