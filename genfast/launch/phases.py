"""A bias that differs by phase, (py, px) for the pixels (y * stride + py, x * stride + px).

The kernel of a dgrad computes phase by phase and adds it there; these are passes of their own.
"""

from torch import Tensor


def add_bias(z: Tensor, bias: Tensor, stride: tuple[int, int]) -> None:
    """Add it in place.

    Args:
        z: (N, C, H, W), the stride (vertical, horizontal) dividing H and W.
        bias: (phases, C), px running faster than py.
        stride: a pair.
    """
    sh, sw = stride
    z = z.unflatten(3, (-1, sw)).unflatten(2, (-1, sh))
    z += bias.view(sh, 1, sw, -1).permute(3, 1, 0, 2).unsqueeze(3)


def bias_gradient(dz: Tensor, stride: tuple[int, int]) -> Tensor:
    """The sums of dz (N, C, H, W) over the pixels of each phase: (phases, C)."""
    sh, sw = stride
    phases = dz.unflatten(3, (-1, sw)).unflatten(2, (-1, sh)).sum((0, 2, 4))
    return phases.permute(1, 2, 0).reshape(sh * sw, -1)
