"""Imports run one way, the layers need torch, triton and numpy alone, and Triton may be absent."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From top to bottom. A module imports from lower lines, and from its own package.
LEVELS = (
    ("__main__",),
    ("cli",),
    ("training",),
    ("",),  # genfast itself gathers the public names
    ("losses", "models"),
    ("convert",),
    ("networks",),
    ("rewriting",),
    ("calls",),
    ("nn",),
    ("functional",),
    ("operators",),
    ("autograd", "folding"),
    ("cpu", "launch", "opening", "own_glu", "padding"),
    ("backend", "geometry", "kernels", "layout", "library", "looking", "reference", "source"),
    ("processes",),
)  # fmt: skip
RANK = {name: -depth for depth, names in enumerate(LEVELS) for name in names}
LAYERS = {name for name, rank in RANK.items() if rank < RANK["training"]}
REQUIRED = {"genfast", "numpy", "torch", "triton"}
EXTRAS = {
    "PIL", "matplotlib", "onnx", "onnxscript", "pandas", "safetensors", "scipy", "sklearn", "tqdm",
}  # fmt: skip


def _module_name(path):
    """The dotted name under which a file of `genfast/` or `kernels/` is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "kernels":
        parts = ("genfast", *parts)
    return ".".join(parts).removesuffix(".__init__")


FILES = sorted([*(ROOT / "genfast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
MODULES = {_module_name(path) for path in FILES}
by_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def _level(module):
    return f"{module}.".split(".")[1]


def _imports(source, package, modules):
    """The modules that Python source imports, at its top or inside a function.

    What a type checker alone reads is never imported.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                full = f"{origin}.{alias.name}"
                yield full if full in modules else origin


def _imports_of(path):
    module = _module_name(path)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return list(_imports(path.read_text(encoding="utf-8"), package, MODULES))


@pytest.mark.parametrize(
    ("source", "package", "imported"),
    [
        ("import genfast.nn", "genfast", "genfast.nn"),
        ("from genfast import nn", "genfast", "genfast.nn"),
        ("from genfast import accelerate", "genfast", "genfast"),
        ("from genfast.nn import FusedSequential", "genfast", "genfast.nn"),
        ("from . import nn", "genfast", "genfast.nn"),
        ("from .nn import FusedSequential", "genfast", "genfast.nn"),
        ("from ..nn import FusedSequential", "genfast.models", "genfast.nn"),
        ("def late():\n    from genfast import nn", "genfast", "genfast.nn"),
        ("if TYPE_CHECKING:\n    import genfast\nelse:\n    import torch", "genfast", "torch"),
    ],
)
def test_every_way_to_write_an_import_is_seen(source, package, imported):
    assert list(_imports(source, package, {"genfast", "genfast.nn"})) == [imported]


@by_file
def test_imports_run_one_way(path):
    level = _level(_module_name(path))
    assert level in RANK, f"{path.name} has no place in LEVELS"
    ours = {_level(name) for name in _imports_of(path) if name.partition(".")[0] == "genfast"}
    upwards = {other for other in ours - {level} if RANK[other] >= RANK[level]}
    assert not upwards, f"{level} imports {upwards}, which do not lie below it"


@by_file
def test_layers_import_only_what_the_package_requires(path):
    level = _level(_module_name(path))
    roots = {name.partition(".")[0] for name in _imports_of(path)} - sys.stdlib_module_names
    if level == "kernels":
        assert roots <= {"genfast", "triton"}
    elif level in LAYERS:
        assert roots <= REQUIRED


def _import_layers_without(absent):
    """Code that imports every layer as if the `absent` packages were not installed."""
    layers = sorted(name for name in MODULES if _level(name) in LAYERS - {"kernels"})
    return f"""
import json, sys
sys.modules.update(dict.fromkeys({sorted(absent)}))
import {", ".join(layers)}
"""


def _run(code):
    """Run code in the checkout, with genfast's settings at their defaults; the JSON it prints."""
    unset = {"TRITON_INTERPRET", "GENFAST_BACKEND"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in unset},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_layers_work_where_the_extras_are_absent():
    loaded = _run(_import_layers_without(EXTRAS) + "print(json.dumps(list(sys.modules)))")
    assert "genfast.functional" in loaded


def test_layers_work_where_triton_is_absent():
    result = _run(_import_layers_without({"triton"}) + TRY_A_BLOCK)
    assert result["shape"] == [2, 4, 8, 8]
    assert result["gradients_are_finite"]
    assert "Triton is not installed" in result["error"]


TRY_A_BLOCK = """
import torch
from genfast.backend import use_backend
from genfast.nn import GeneratorBlock

block = GeneratorBlock(3, 4)
x = torch.randn(2, 3, 4, 4, requires_grad=True)
y = block(x)
y.square().sum().backward()
error = ""
try:
    with use_backend("triton"):
        block(x)
except RuntimeError as raised:
    error = str(raised)
finite = bool(x.grad.isfinite().all() and block.conv.weight.grad.isfinite().all())
print(json.dumps(dict(shape=y.shape, gradients_are_finite=finite, error=error)))
"""
