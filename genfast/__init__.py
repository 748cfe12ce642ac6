"""Fast training of GANs and VAEs: fused Triton kernels behind drop-in PyTorch modules."""

from genfast import functional, models, nn
from genfast.backend import use_backend
from genfast.convert import accelerate, restore

__version__ = "0.1.0"
__all__ = ["accelerate", "functional", "models", "nn", "restore", "use_backend"]
