"""The classes and functions that users are to call, by the module that they import them from."""

import importlib
import types

HOMES = (
    "genfast",
    "genfast.functional",
    "genfast.losses",
    "genfast.models",
    "genfast.nn",
    "genfast.training",
    "genfast.training.data",
    "genfast.training.errors",
    "genfast.training.evaluation",
    "genfast.training.runs.loop",
    "genfast.training.runs.trained",
    "genfast.training.steps",
)


def _names_of(home):
    module = importlib.import_module(home)
    found = {name: getattr(module, name) for name in module.__all__}
    return {name: v for name, v in found.items() if isinstance(v, type | types.FunctionType)}


PUBLIC = {home: _names_of(home) for home in HOMES}
