"""Public names say what they take and give; `make lint` checks that it is so."""

import ast
import inspect
import re
import typing
from pathlib import Path

import pytest
from public_names import PUBLIC

from genfast import backend, losses, reference
from genfast.training.steps import precision

ROOT = Path(__file__).parents[1]


def functions_of(value):
    """A function; or of a class the functions a user calls, those of its own."""
    if inspect.isfunction(value):
        yield value.__qualname__, value
        return
    if not inspect.isclass(value):
        return
    for name, member in vars(value).items():
        member = member.fget if isinstance(member, property) else member
        member = inspect.unwrap(getattr(member, "__func__", member))
        called = not name.startswith("_") or name in ("__init__", "__call__", "__len__")
        # A NamedTuple's and a dataclass's are made of their fields, which have types.
        if called and inspect.isfunction(member) and member.__code__.co_filename != "<string>":
            yield f"{value.__qualname__}.{name}", member


@pytest.mark.parametrize("home", PUBLIC)
def test_public_names_have_types(home):
    for value in PUBLIC[home].values():
        for name, function in functions_of(value):
            signature = inspect.signature(function)
            parameters = [p for p in signature.parameters.values() if p.name not in ("self", "cls")]
            without = [p.name for p in parameters if p.annotation is p.empty]
            assert not without, f"{home}: {name} does not say what {without} may be"
            assert signature.return_annotation is not signature.empty, f"{home}: {name} returns?"
            # All of them are known where the function is, and not strings that name nothing.
            typing.get_type_hints(function)


def test_names_and_what_is_checked_are_the_same():
    assert typing.get_args(backend.BackendName) == backend.BACKENDS
    assert typing.get_args(reference.NormName) == reference.NORMS
    assert typing.get_args(losses.LikelihoodName) == losses.LIKELIHOODS
    assert typing.get_args(precision.PrecisionName) == precision.PRECISIONS


def test_lint_checks_the_package_and_a_users_program():
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nlint:")[2]
    assert "-m mypy" in recipe.partition("\n\n")[0]
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[tool.mypy]")[2]
    assert 'files = ["genfast", "tests/typed_use.py"]' in settings
    assert "warn_unused_ignores = true" in settings  # Else what is wrong there would prove nothing.
    program = ast.parse((ROOT / "tests/typed_use.py").read_text(encoding="utf-8"))
    wrong = next(f for f in program.body if getattr(f, "name", "") == "wrong")
    lines = (ROOT / "tests/typed_use.py").read_text(encoding="utf-8").splitlines()
    for statement in wrong.body:
        assert re.search(r"# type: ignore\[[a-z-]+\]$", lines[statement.end_lineno - 1])
