"""What a person at the command line is told in one sentence, instead of a traceback."""

import importlib
from typing import Any

__all__ = ["BadInput", "Diverged"]

# The extras of setup.py, by the names that pip knows, and what they are for.
EXTRAS = {
    "train": ("training", ("pillow", "scikit-learn", "tqdm")),
    "log": ("--log tensorboard", ("tensorboard",)),
    "evaluate": ("--features", ("onnxruntime", "torch-fidelity")),
    "export": ("exporting", ("onnx", "onnxscript", "safetensors")),
}


class BadInput(ValueError):
    """Something given from outside cannot be used: the message says what was expected and came.

    Example:
        >>> raise BadInput("expected --num from 1 on, got 0")
        Traceback (most recent call last):
        genfast.training.errors.BadInput: expected --num from 1 on, got 0

    needs_time: whether it is to be told after another process of a run may have told the same.
    """

    needs_time = False


class Diverged(RuntimeError):
    """The losses are no longer finite.

    Example:
        >>> raise Diverged("training diverged: d_loss of step 7 is nan")
        Traceback (most recent call last):
        genfast.training.errors.Diverged: training diverged: d_loss of step 7 is nan
    """


class LostWorker(RuntimeError):
    """Another process of a run has ended or cannot be reached, and so this one ends too."""


class Elsewhere(Exception):
    """Another process of a run has failed and says why: this one ends without a word.

    needs_time: whether it is to end after the other has said it.
    """

    needs_time = True


def require(module: str, package: str, extra: str = "train") -> Any:
    """Import a module of an optional package; BadInput says how to install it if it is absent.

    Args:
        module: the name to import, such as "PIL.Image".
        package: the name pip knows, such as "pillow".
        extra: the extra of setup.py that it belongs to.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        purpose, packages = EXTRAS[extra]
        raise BadInput(
            f"expected {package}, which this needs, but it could not be imported ({error}): "
            f"install what {purpose} needs with python -m pip install {' '.join(packages)}"
        ) from error
