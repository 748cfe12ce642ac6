"""What a person at the command line is told in one sentence, instead of a traceback."""

import importlib


class BadInput(ValueError):
    """Something given from outside cannot be used: the message says what was expected and came."""


class Diverged(RuntimeError):
    """The losses are no longer finite."""


def require(module, package):
    """Import a module of an optional package; BadInput names the extra to install if it is absent.

    Args:
        module: the name to import, such as "PIL.Image".
        package: the name pip knows, such as "pillow".
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BadInput(
            f"this needs {package}, which could not be imported ({error}): "
            'install it with pip install "genfast[train]"'
        ) from error
