"""What a person at the command line is told in one sentence, instead of a traceback."""

import importlib

# The extra "train" of setup.py, by the names that pip knows.
TRAIN = ("pillow", "scikit-learn", "tqdm")


class BadInput(ValueError):
    """Something given from outside cannot be used: the message says what was expected and came."""


class Diverged(RuntimeError):
    """The losses are no longer finite."""


def require(module, package):
    """Import a module of an optional package; BadInput says how to install it if it is absent.

    Args:
        module: the name to import, such as "PIL.Image".
        package: the name pip knows, such as "pillow".
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise BadInput(
            f"expected {package}, which this needs, but it could not be imported ({error}): "
            f"install what training needs with python -m pip install {' '.join(TRAIN)}"
        ) from error
