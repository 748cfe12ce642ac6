"""What a person at the command line is told in one sentence, instead of a traceback."""

import importlib

# The extra "train" of setup.py, by the names that pip knows.
TRAIN = ("pillow", "scikit-learn", "tqdm")


class BadInput(ValueError):
    """Something given from outside cannot be used: the message says what was expected and came."""


class Diverged(RuntimeError):
    """The losses are no longer finite."""


def require(module, package, install=TRAIN):
    """Import a module of an optional package; BadInput says how to install it if it is absent.

    Args:
        module: the name to import, such as "PIL.Image".
        package: the name pip knows, such as "pillow".
        install: what is to be installed then, by those names.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        what = "what training needs" if install is TRAIN else "it"
        raise BadInput(
            f"expected {package}, which this needs, but it could not be imported ({error}): "
            f"install {what} with python -m pip install {' '.join(install)}"
        ) from error
