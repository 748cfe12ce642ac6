"""Kernels that make images and logits: cases of ahead_of_time.py."""

from functools import partial

import torch

from benchmarks.model.recording import rounding
from genfast.geometry import ConvGeometry
from genfast.launch import logits, to_image
from genfast.launch.epilogue import Epilogue
from genfast.launch.operand import Output


def cases(architecture, few):
    """(name, what to call): the same for all architectures, and few."""
    half, full = torch.bfloat16, torch.float32
    k4, k3, k7 = (4, 2, 1), (3, 1, 1), (7, 1, 3)
    yield "generator", partial(_image, 128, 64, 3, 32, k4, half)
    yield "discriminator", partial(_image, 128, 64, 3, 32, k4, half, backward=True)
    yield "generator of z", partial(_image, 128, 64, 3, 32, k4, half, normalized="relu")
    leaky = dict(normalized="leaky_relu")
    yield "k3 of z", partial(_image, 64, 128, 3, 64, k3, torch.float16, **leaky)
    tanh = dict(normalized="tanh", groups=2)
    yield "k7 of z of 256", partial(_image, 1, 256, 3, 64, k7, half, **tanh)
    relu = dict(normalized="relu")
    yield "k7 tf32 of z", partial(_image, 1, 64, 3, 64, k7, full, precision="tf32", **relu)
    yield "float32 of z", partial(_image, 64, 64, 3, 32, k4, full, **relu)
    yield "one channel", partial(_image, 128, 64, 1, 14, k4, torch.float16)
    yield "wide", partial(_image, 16, 64, 4, 128, k4, half, backward=True)
    yield "k3", partial(_image, 64, 128, 3, 64, k3, half)
    yield "k3 of 256", partial(_image, 64, 256, 3, 32, k3, half, backward=True)
    yield "k7", partial(_image, 1, 64, 3, 256, k7, half)
    yield "k7 of 256", partial(_image, 1, 256, 3, 64, k7, half, backward=True)
    yield "k7 tf32", partial(_image, 1, 128, 3, 64, k7, full, backward=True, precision="tf32")
    yield "k7 tf32 of 64", partial(_image, 1, 64, 3, 64, k7, full, backward=True, precision="tf32")
    yield "k7 float32", partial(_image, 1, 64, 3, 256, k7, full, backward=True)
    yield "float32", partial(_image, 64, 64, 3, 32, k4, full, backward=True)
    yield "float32 of 128", partial(_image, 64, 128, 3, 32, k3, full)
    yield "tf32", partial(_image, 64, 64, 3, 32, k4, full, backward=True, precision="tf32")
    yield "ragged", partial(_image, 64, 24, 3, 15, k4, half)
    yield from _logit_cases("logit", 1, 512, half)
    yield from _logit_cases("four logits", 4, 64, full)


def _image(
    n, c_small, c_big, size, kernel, dtype, backward=False, precision="ieee", normalized=None,
    groups=1,
):  # fmt: skip
    k, s, p = kernel
    geometry = ConvGeometry.conv_transpose((size,) * 2, (k,) * 2, (s,) * 2, (p,) * 2, (0, 0))
    small = torch.empty(n, size, size, c_small, dtype=dtype).permute(0, 3, 1, 2)
    weight = torch.empty(c_small, c_big, k, k, dtype=dtype)
    epilogue = Epilogue(bias=torch.empty(c_big, dtype=dtype), activation="tanh")
    options = dict(y=small, activation="leaky_relu", negative_slope=0.2)
    with rounding(precision):
        if normalized:
            epilogue = Epilogue(activation="tanh")
            of_z = _of_z(c_small, normalized, groups)
            to_image.dgrad(small, weight, geometry, epilogue, **of_z)
        elif backward:
            to_image.dgrad(small, weight, geometry, Epilogue(), **options)
        else:
            to_image.dgrad(small, weight, geometry, epilogue)


def _of_z(channels, activation, groups):
    vectors = torch.empty(groups, 5, channels)
    return dict(vectors=vectors, activation=activation, negative_slope=0.2)


def _logit_cases(name, c_small, c_big, dtype):
    geometry = ConvGeometry((4, 4), (1, 1), (4, 4), (1, 1), (0, 0))
    big = torch.empty(256, 4, 4, c_big, dtype=dtype).permute(0, 3, 1, 2)
    weight = torch.empty(c_small, c_big, 4, 4, dtype=dtype)
    small = torch.empty(256, c_small, 1, 1, dtype=dtype)
    yield f"{name} fprop", partial(logits.fprop, big, weight, geometry, Epilogue())
    yield f"{name} dgrad", partial(logits.dgrad, small, weight, geometry, Epilogue())
    yield f"{name} wgrad", partial(logits.wgrad, big, small, geometry)
    z = _of_z(c_big, "leaky_relu", 1)
    yield f"{name} fprop of z", partial(logits.fprop, big, weight, geometry, Epilogue(), **z)
    yield f"{name} wgrad of z", partial(logits.wgrad, big, small, geometry, **z)
    below, sums = Output(big, **z), torch.empty(1, 1, 2 * c_big)
    yield f"{name} sums", partial(logits.norm_sums, small, weight, geometry, below)
    at_input = Epilogue(output=below, at_input=sums)
    yield f"{name} dgrad at input", partial(logits.dgrad, small, weight, geometry, at_input)
    two = _of_z(c_big, "leaky_relu", 2)
    yield f"{name} wgrad of z of two", partial(logits.wgrad, big, small, geometry, **two)
