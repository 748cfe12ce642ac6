"""dgrad and the wgrad below it in one kernel: cases of ahead_of_time.py, for sm_90 alone."""

from functools import partial

import torch

from benchmarks.model.recording import rounding
from genfast.geometry import ConvGeometry
from genfast.launch import dgrad_wgrad, from_image
from genfast.launch.operand import Output


def cases(architecture, few):
    """(name, what to call); the few for whoever looks at one kernel."""
    half = torch.bfloat16
    yield "leaky relu", partial(_gradient, half)
    yield "bias", partial(_gradient, half, sums=True)
    # The last batch of an epoch, and images of another size: nothing new to compile.
    yield "leaky relu", partial(_gradient, half, batch=97, size=(96, 48))
    yield "bias", partial(_gradient, half, batch=1, sums=True)
    if few:
        return
    yield "tf32", partial(_gradient, torch.float32)
    yield "3x3", partial(_gradient, torch.float16, kernel=3)
    for activation in ("identity", "relu", "tanh", "sigmoid", "elu", "selu", "relu6"):
        yield activation, partial(_gradient, half, activation=activation, sums=True)
    for c_big in (8, 32, 72):
        yield f"{c_big} channels", partial(_gradient, half, channels=(128, c_big))
    yield "tf32 with a bias", partial(_gradient, torch.float32, sums=True)


def _gradient(
    dtype, batch=64, size=(64, 64), kernel=4, channels=(128, 64), activation="leaky_relu",
    sums=False,
):  # fmt: skip
    c_small, c_big = channels
    lower = ConvGeometry.conv(size, (kernel, kernel), (2, 2), (1, 1))
    upper = ConvGeometry.conv(lower.small, (4, 4), (2, 2), (1, 1))
    padded = (batch, *from_image.padded_size(lower), from_image.CHANNELS)
    image = from_image.Padded(torch.empty(padded, dtype=dtype), lower, 3)
    dz, weight, y = (
        torch.empty(n, c, *sides, dtype=dtype).to(memory_format=torch.channels_last)
        for n, c, sides in (
            (batch, c_small, upper.small), (c_small, c_big, (4, 4)), (batch, c_big, lower.small)
        )
    )  # fmt: skip
    with rounding("tf32"):
        below = Output(y, None, activation, 0.2)
        dgrad_wgrad.dgrad_wgrad(dz, weight, upper, below, image, sums)
