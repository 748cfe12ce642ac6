"""Fast training of GANs and VAEs: fused Triton kernels behind drop-in PyTorch modules."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from genfast import functional, models, nn
    from genfast.backend import use_backend
    from genfast.convert import accelerate, restore
    from genfast.training.runs.api import train
    from genfast.training.runs.trained import load

__version__ = "0.2.0"
__all__ = ["accelerate", "functional", "load", "models", "nn", "restore", "train", "use_backend"]

_HOMES = {
    "accelerate": "convert",
    "load": "training.runs.trained",
    "restore": "convert",
    "train": "training.runs.api",
    "use_backend": "backend",
}


if not TYPE_CHECKING:  # A checker would take every name for one that is there.

    def __getattr__(name):
        # Late, as this runs before the command line can catch an interrupt, and PyTorch takes
        # seconds.
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = import_module(f"{__name__}.{_HOMES.get(name, name)}")
        value = globals()[name] = getattr(module, name) if name in _HOMES else module
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
