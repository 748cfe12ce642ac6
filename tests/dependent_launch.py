"""Reads in PTX whether a kernel waits for the one before it, before it reaches any memory."""

import re

WAIT = "griddepcontrol.wait"
LAUNCH_DEPENDENTS = "griddepcontrol.launch_dependents"
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(r"\.entry\s+[\w$]+\s*\([^)]*\)[^{]*\{")
_LOCATION = re.compile(r"^\s*\.loc\b[^\n]*", re.MULTILINE)  # Ends with its line.
_LABEL = re.compile(r"([\w$%]+):(?!:)")
_BETWEEN = "{} \t\n"  # Instructions, where braces are scopes; those of operands come later.
_STATEMENT = re.compile(r"(@!?%?[\w$]+\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
# Whatever reaches memory that other kernels see, and calls, behind which anything may happen.
_MEMORY = {
    "ld", "ldu", "st", "atom", "red", "cp", "multimem", "tex", "tld4", "suld", "sust", "sured",
    "tensormap", "call",
}  # fmt: skip
# What a load or a store reaches there is a program's or a thread's own, or never changes.
_OWN = {"param", "shared", "shared::cta", "local", "const"}
_BRANCHES = {"bra", "brx", "call", "ret", "exit", "trap"}


def facts_of(assembly):
    """What the one entry function of some assembly does about the kernels before and after it.

    Returns a dictionary:
        griddepcontrol: how many such instructions there are.
        waits: whether every thread waits: in the first basic block, under no condition.
        reached_before: the opcodes that reach memory before it waits; all, if it does not wait so.
        lets_in: whether every thread then lets the next kernel in, in the first basic block too.
    For AMD's, which has no such instructions, the first alone.
    """
    facts = {"griddepcontrol": len(re.findall(r"griddepcontrol\.", assembly))}
    if not re.search(r"^\.target sm_", assembly, re.MULTILINE):
        return facts
    first_block, every = _instructions(_body(assembly))
    waits = WAIT in first_block
    before = first_block[: first_block.index(WAIT)] if waits else every
    return facts | {
        "waits": waits,
        "reached_before": [opcode for opcode in before if _reaches_memory(opcode)],
        "lets_in": waits and LAUNCH_DEPENDENTS in first_block[len(before) :],
    }


def check(facts, architecture):
    """Assert of the facts of launches that they begin as kernels for that architecture must.

    Args:
        facts: dictionaries, each with at least what `facts_of` gives.
        architecture: a key of `benchmarks.model.driver.TARGETS`.
    """
    family, _, number = architecture.rpartition("sm_")
    waits = not family and number.isdecimal() and int(number) >= 90
    for f in facts:
        assert f["griddepcontrol"] == (2 if waits else 0), f
        if waits:
            assert f["waits"] and f["lets_in"] and not f["reached_before"], f


def _body(ptx):
    """What stands between the entry function's braces."""
    ptx = _LOCATION.sub("", _COMMENT.sub("", ptx))
    (entry,) = _ENTRY.finditer(ptx)
    depth, end = 1, entry.end()
    while depth:
        depth += {"{": 1, "}": -1}.get(ptx[end], 0)
        end += 1
    return ptx[entry.end() : end - 1]


def _instructions(body):
    """Opcodes of the first basic block, of those that every thread executes; and of all."""
    targets = set(re.findall(r"\bbra(?:\.uni)?\s+([\w$%]+)", body))
    # Any label may be the target of an indirect branch.
    targets |= set(_LABEL.findall(body)) if "brx" in body else set()
    first_block, every, in_first = [], [], True
    for piece in body.split(";"):
        piece = piece.lstrip(_BETWEEN)
        while label := _LABEL.match(piece):
            in_first &= label[1] not in targets
            piece = piece[label.end() :].lstrip(_BETWEEN)
        if not piece or piece.startswith("."):
            continue  # A directive, such as the declaration of registers.
        found = _STATEMENT.fullmatch(piece)
        if not found:
            raise ValueError(f"expected an instruction of PTX, got {piece!r}")
        condition, opcode, _ = found.groups()
        every.append(opcode)
        if in_first and (not condition or _reaches_memory(opcode)):
            first_block.append(opcode)
        in_first &= opcode.partition(".")[0] not in _BRANCHES
    return first_block, every


def _reaches_memory(opcode):
    name, *modifiers = opcode.split(".")
    if name == "cp":  # Of what is copied asynchronously, not of waiting for it.
        return not {"commit_group", "wait_group", "wait_all"} & set(modifiers)
    return name in _MEMORY and not _OWN & set(modifiers)
