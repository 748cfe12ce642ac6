"""Kernels whose big side is an image: cases of ahead_of_time.py."""

from functools import partial

import torch

from benchmarks.model.recording import rounding
from genfast.geometry import ConvGeometry
from genfast.launch import from_image
from genfast.launch.epilogue import Epilogue
from genfast.launch.operand import Output

K4S2 = ConvGeometry.conv((64, 64), (4, 4), (2, 2), (1, 1))
OTHER = ConvGeometry.conv((66, 38), (4, 4), (2, 2), (1, 1))
K3S1 = ConvGeometry.conv((28, 28), (3, 3), (1, 1), (1, 1))
K4S1 = ConvGeometry.conv((28, 28), (4, 4), (1, 1), (1, 1))
K5S2 = ConvGeometry.conv((28, 28), (5, 5), (2, 2), (2, 2))
K7S1 = ConvGeometry.conv((28, 28), (7, 7), (1, 1), (3, 3))


def cases(architecture, few):
    """(name, what to call); the few are what the tests look at."""
    for dtype in (torch.bfloat16, torch.float16):
        for name, case in _cases(dtype, few):
            yield f"{str(dtype).removeprefix('torch.')} {name}", case
    if few:
        return
    for precision in ("ieee", "tf32"):
        for name, case in _cases(torch.float32, few):
            yield f"{precision} {name}", partial(_rounded, precision, case)


def _rounded(precision, case):
    with rounding(precision):
        case()


def _cases(dtype, few):
    leaky = dict(activation="leaky_relu", negative_slope=0.2)
    yield "leaky relu", lambda: _fprop(K4S2, dtype, 64, Epilogue(**leaky))
    yield "statistics", lambda: _fprop(K4S2, dtype, 64, Epilogue(groups=2))
    yield "plain", lambda: _wgrad(K4S2, dtype, 64)
    yield "leaky relu", lambda: _wgrad(K4S2, dtype, 64, y=True, **leaky)
    yield "of z", lambda: _wgrad(K4S2, dtype, 64, groups=1, activation="relu")
    yield "plain", lambda: from_image.padded(_image(3, K4S2.big, torch.float32), K4S2, dtype)
    yield "uint8", lambda: _joined(K4S2, torch.uint8, dtype)
    yield "float", lambda: _joined(K4S2, torch.float32, dtype)
    yield "stride 1", lambda: _fprop(K4S1, dtype, 64, Epilogue())
    yield "twice", lambda: _twice(K4S2, dtype, 64)
    # The last batch of an epoch, and images of another size: nothing new to compile.
    yield "leaky relu", lambda: _fprop(OTHER, dtype, 64, Epilogue(**leaky), batch=97)
    yield "plain", lambda: _wgrad(OTHER, dtype, 64, batch=1)
    yield "plain", lambda: from_image.padded(_image(3, OTHER.big, torch.float32, 97), OTHER, dtype)
    yield "uint8", lambda: _joined(OTHER, torch.uint8, dtype, 97)
    yield "float", lambda: _joined(OTHER, torch.float32, dtype, 97)
    yield "twice", lambda: _twice(OTHER, dtype, 64, batch=97)
    if few:
        return
    image = _image(3, K4S2.big, dtype)
    yield "tanh", lambda: from_image.padded(image, K4S2, y=image, activation="tanh")
    bias, vectors = torch.empty(64, dtype=dtype), torch.empty(1, 5, 64)
    every = Epilogue(bias=bias, vectors=vectors, activation="tanh")
    yield "bias, norm, tanh", lambda: _fprop(K4S2, dtype, 64, every)
    for groups in (1, 2):
        for c_small in (128, 64, 40):
            of_z = dict(groups=groups, **leaky)
            yield f"{c_small} channels of z", lambda c=c_small, z=of_z: _wgrad(K4S2, dtype, c, **z)
    yield "7x7 of z", lambda: _wgrad(K7S1, dtype, 64, groups=1, activation="tanh")
    for c_small in (128, 32, 16, 40):
        yield f"{c_small} channels", lambda c=c_small: _fprop(K4S2, dtype, c, Epilogue(**leaky))
        yield f"{c_small} channels", lambda c=c_small: _fprop(K4S2, dtype, c, Epilogue(groups=1))
        yield f"{c_small} channels", lambda c=c_small: _wgrad(K4S2, dtype, c)
    for c_small in (128, 40):
        yield f"{c_small} channels twice", lambda c=c_small: _twice(K4S2, dtype, c)
    yield "twice, no weight", lambda: _twice(K4S2, dtype, 64, want_dweight=False)
    for name, geometry in (("3x3", K3S1), ("5x5/2", K5S2), ("7x7", K7S1)):
        yield name, lambda g=geometry: _fprop(g, dtype, 64, Epilogue(**leaky))
        yield name, lambda g=geometry: _wgrad(g, dtype, 64)


def _image(channels, size, dtype, batch=64):
    x = torch.empty(batch, channels, *size, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last)


def _joined(geometry, real_dtype, dtype, batch=64):
    reals, fakes = (_image(3, geometry.big, of, batch) for of in (real_dtype, dtype))
    scale = (2 / 255, -1.0) if real_dtype == torch.uint8 else ()
    from_image.joined(reals, fakes, geometry, dtype, *scale)


def _padded(geometry, dtype, batch):
    data = torch.empty((batch, *from_image.padded_size(geometry), from_image.CHANNELS), dtype=dtype)
    return from_image.Padded(data, geometry, 3)


def _fprop(geometry, dtype, c_small, epilogue, batch=64):
    weight = torch.empty(c_small, 3, *geometry.kernel_size, dtype=dtype)
    from_image.fprop(_padded(geometry, dtype, batch), weight, epilogue)


def _wgrad(geometry, dtype, c_small, batch=64, y=False, groups=0, **activation):
    small = _image(c_small, geometry.small, dtype, batch)
    other = torch.empty_like(small) if y else None
    vectors = torch.empty(groups, 5, c_small) if groups else None
    from_image.wgrad(_padded(geometry, dtype, batch), small, other, vectors, **activation)


def _twice(geometry, dtype, c_small, batch=64, want_dweight=True):
    """The gradient at a norm's input, where it is computed twice."""
    image = _padded(geometry, dtype, batch)
    weight = torch.empty(c_small, 3, *geometry.kernel_size, dtype=dtype)
    z = _image(c_small, geometry.small, dtype, batch)
    below = Output(z, torch.empty(1, 5, c_small), "relu", 0.0)
    if from_image.has_norm_sums(geometry, image.data, below):
        sums, _ = from_image.norm_sums(image, weight, below, want_dweight)
        from_image.fprop(image, weight, Epilogue(output=below, at_input=sums))
