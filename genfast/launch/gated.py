"""The kernels of a norm with a gated linear unit; `launch.norm` prepares what they are given."""

from typing import Any

from genfast.backend import triton
from genfast.launch import tape

if triton is not None:
    from genfast.kernels import gated as kernels


def normalize(grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """y of z: half of the channels."""
    tape.start(kernels.gated_normalize, grid, **arguments)


def backward_reduce(grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """The sums of the gradient at the norm's output, part by part."""
    tape.start(kernels.gated_backward_reduce, grid, **arguments)


def backward(grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
    """dz of all channels, and what else `norm.norm_backward` returns."""
    tape.start(kernels.gated_backward, grid, **arguments)
