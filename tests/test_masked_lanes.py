"""Every lane of every load addresses an element of a tensor, masked or not.

A mask alone does not keep an address from being read: see kernels/loading.py. The interpreter reads
no masked lane, so here it is made to look at the addresses of all.
"""

import bisect

import pytest
import torch

from genfast.backend import INTERPRETING, triton
from genfast.geometry import ConvGeometry
from genfast.launch import (
    conv,
    dgrad_wgrad,
    from_image,
    logits,
    losses,
    norm,
    passes,
    sampling,
    sums,
    tiles,
    to_image,
)
from genfast.launch.epilogue import Epilogue
from genfast.launch.operand import Output

if triton is not None:
    from triton.runtime import interpreter

pytestmark = [
    pytest.mark.kernels,
    pytest.mark.skipif(not INTERPRETING, reason="looks at addresses in the interpreter"),
]


class Lanes:
    """Checks the addresses of the loads of each started kernel; counts its masked-off lanes."""

    def __init__(self):
        self.masked = {}
        self._kernel = None
        self._starts, self._ends = [], []

    def begin(self, kernel, arguments):
        """The arguments are what the kernel gets: for half precision, copies in float32."""
        self._kernel = kernel
        self.masked.setdefault(kernel, 0)
        spans = sorted(
            (t.data_ptr(), t.data_ptr() + _elements(t) * t.element_size())
            for t in arguments
            if isinstance(t, torch.Tensor)
        )
        self._starts, self._ends = zip(*spans, strict=True)

    def check(self, addresses, mask):
        """All lanes of a load lie in one tensor: two may be neighbours in memory."""
        # A mask computed by a select is numbers there, not booleans.
        self.masked[self._kernel] += mask.size - int(mask.astype(bool).sum())
        low, high = int(addresses.min()), int(addresses.max())
        # Of several arguments that begin there, such as stand-ins, the longest comes last.
        i = bisect.bisect_right(self._starts, low) - 1
        assert i >= 0 and high < self._ends[i], (
            f"{self._kernel}: a lane lies outside of every tensor, or lanes of one load in two"
        )


def _elements(tensor):
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


@pytest.fixture
def lanes(monkeypatch):
    found = Lanes()
    call = interpreter.GridExecutor.__call__
    load = interpreter.InterpreterBuilder.create_masked_load

    def calling(executor, *args, **kwargs):
        found.begin(executor.fn.__name__, [*args, *kwargs.values()])
        return call(executor, *args, **kwargs)

    def loading(builder, pointers, mask, *args, **of_descriptor):
        if not of_descriptor:  # In hardware it reads nothing outside of its tensor.
            found.check(pointers.data, mask.data)
        return load(builder, pointers, mask, *args, **of_descriptor)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", calling)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", loading)
    # More than one tile for each program, so that the last program has tiles beyond the end.
    monkeypatch.setattr(passes, "programs", lambda tensor, each: 1)
    return found


def image(batch, channels, size, dtype=torch.float32):
    return torch.randn(batch, channels, *size).to(dtype).to(memory_format=torch.channels_last)


def norm_forward(channels, batch, size, groups, dtype):
    z = image(batch, channels, size, dtype)
    statistics = norm.statistics_of(z, groups)
    vector = torch.rand(channels)
    running = torch.zeros(channels), torch.ones(channels), 0.1
    counter = torch.zeros((), dtype=torch.int64)
    vectors = norm.batch_statistics(statistics, vector, vector, 1e-5, *running, counter)
    norm.normalize_activate(z, vectors, "relu", 0.0)
    return z, vectors


def norm_backward(channels, batch, size, groups, dtype, need_dz=True, training=True):
    z, vectors = norm_forward(channels, batch, size, groups, dtype)
    options = dict(activation="leaky_relu", negative_slope=0.2)
    norm.norm_backward(z, z, vectors, training=training, need_dz=need_dz, **options)


def norm_of_images(channels, batch, size, span, dtype, contiguous):
    """Of each image by itself, every `span` channels sharing statistics, forward and backward."""
    z = image(batch, channels, size, dtype)
    z = z.contiguous() if contiguous else z
    vector = torch.rand(channels)
    statistics = norm.statistics_of(z, batch)
    vectors = norm.batch_statistics(statistics, vector, vector, 1e-5, span=span)
    norm.normalize_activate(z, vectors, "relu", 0.0)
    options = dict(training=True, need_dz=True, activation="relu", negative_slope=0.0, span=span)
    norm.norm_backward(z, z, vectors, **options)


def gated_norm(channels, batch, size, dtype, contiguous):
    """Of twice as many channels, forward and backward."""
    z = image(batch, 2 * channels, size, dtype)
    dy = image(batch, channels, size, dtype)
    z, dy = (t.contiguous() if contiguous else t for t in (z, dy))
    vectors = torch.rand(1, 5, 2 * channels)
    norm.normalize_activate(z, vectors, "glu", 0.0)
    options = dict(training=True, need_dz=True, activation="glu", negative_slope=0.0)
    norm.norm_backward(dy, z, vectors, want_y=True, **options)


def known_norm(channels):
    vector = torch.rand(channels)
    norm.known_statistics(vector, vector, vector, vector, 1e-5, torch.float32)


def many_parts(parts, channels, groups, repeat):
    """Statistics in more parts than one program combines."""
    count = torch.ones(groups * parts // repeat)
    mean, m2 = torch.rand(2, groups * parts, channels)
    norm.batch_statistics(norm.TileStatistics(count, mean, m2, repeat, groups), None, None, 1e-5)


def reparameterized(shape, dtype, with_kl):
    mu, logvar = torch.randn(2, *shape).to(dtype)
    seed = torch.zeros(1, dtype=torch.int64)
    z, kl = sampling.reparameterize(mu, logvar, seed, with_kl=with_kl)
    sampling.reparameterize_backward(z, kl, mu, logvar, seed)


def several_samples(shape, dtype, samples):
    mu, logvar = torch.randn(2, *shape).to(dtype)
    seed = torch.zeros(1, dtype=torch.int64)
    z, kl = sampling.importance_samples(mu, logvar, samples, seed)
    sampling.importance_samples_backward(z, kl, mu, logvar, samples, seed)


def logistic(shape, labels, dtype):
    logits = torch.randn(shape).to(dtype)
    targets = torch.rand(shape).to(dtype) if labels is None else labels
    for paired in (False, True) if labels is not None and logits.numel() > 1 else (False,):
        for with_gradient in (False, True):
            losses.logit_loss(logits, targets, 0.5, "logistic", paired, with_gradient)
        losses.logit_loss_backward(torch.ones(()), logits, targets, 0.5, "logistic", paired)


def summed(groups, parts, out_shape, of_batch=False):
    out = torch.empty(out_shape)
    shape = (groups, parts, out.numel() // groups) if groups else (parts, out.numel())
    sums.sum_partials(torch.rand(shape), out, of_batch=of_batch)


HALF, FLOAT, DOUBLE = torch.bfloat16, torch.float32, torch.float64
# The kernels that must meet masked lanes, and the call.
NORM = {"tile_statistics", "batch_statistics", "normalize_activate"}
BACKWARD = NORM | {"norm_backward_reduce", "norm_backward"}
# Vectors are made by another kernel, and so are the sums that a program reads.
SHARED = (BACKWARD - {"batch_statistics"}) | {"shared_statistics", "shared_sums"}
GATED = {"gated_normalize", "gated_backward_reduce", "gated_backward"}
SAMPLING = {"reparameterize", "reparameterize_backward"}
SAMPLES = {"importance_samples", "importance_samples_backward"}
LOSS = {"logit_loss", "logit_loss_backward"}
CASES = (
    (NORM, norm_forward, (5, 3, (7, 9), 1, FLOAT)),
    (NORM, norm_forward, (70, 4, (5, 7), 2, HALF)),
    (BACKWARD, norm_backward, (5, 3, (7, 9), 1, FLOAT)),
    (BACKWARD, norm_backward, (70, 6, (5, 7), 3, HALF)),
    (BACKWARD, norm_backward, (3, 1, (1, 2), 1, DOUBLE)),
    (BACKWARD, norm_backward, (24, 2, (9, 9), 2, FLOAT, True, False)),
    (BACKWARD - {"norm_backward"}, norm_backward, (5, 3, (9, 9), 1, FLOAT, False)),
    (BACKWARD, norm_of_images, (5, 3, (7, 9), 1, FLOAT, True)),
    (BACKWARD, norm_of_images, (70, 2, (3, 5), 1, HALF, True)),
    (SHARED, norm_of_images, (6, 3, (7, 9), 3, FLOAT, True)),
    (SHARED, norm_of_images, (70, 2, (9, 9), 35, HALF, False)),
    (GATED, gated_norm, (5, 3, (7, 9), FLOAT, True)),
    (GATED, gated_norm, (70, 2, (3, 5), HALF, False)),
    ({"known_statistics"}, known_norm, (70,)),
    ({"combine_statistics", "batch_statistics"}, many_parts, (601, 3, 2, 1)),
    ({"combine_statistics", "batch_statistics"}, many_parts, (1026, 40, 1, 3)),
    ({"activation_backward_from_output"}, lambda y: norm.activation_backward(y, y, "tanh", 0.0),
     (image(3, 5, (7, 9)),)),
    ({"activation_backward_from_output"}, lambda y: norm.activation_backward(y, y, "relu", 0.0),
     (image(1, 1, (1, 1), HALF),)),
    (SAMPLING, reparameterized, ((5, 7), FLOAT, True)),
    (SAMPLING, reparameterized, ((1, 1), HALF, True)),
    (SAMPLING, reparameterized, ((300, 3), HALF, False)),
    (SAMPLING, reparameterized, ((3, 1037), DOUBLE, True)),
    (SAMPLES, several_samples, ((3, 5), HALF, 3)),
    (SAMPLES, several_samples, ((1, 523), FLOAT, 5)),
    (LOSS, logistic, ((6, 1), 3, FLOAT)),
    (LOSS, logistic, ((1,), 1, HALF)),
    (LOSS, logistic, ((7, 781), None, HALF)),
    (LOSS, logistic, ((8, 781), 0, DOUBLE)),
    ({"sum_partials"}, summed, (0, 3, (5, 7))),
    ({"sum_partials"}, summed, (0, 70, (3, 50))),
    ({"sum_partials"}, summed, (2, 67, (2, 2, 35))),
    ({"sum_partials"}, summed, (0, 11, (3, 2**16 // 3 + 7))),
    ({"sum_partials"}, summed, (0, 1030, ())),
    ({"sum_partials"}, summed, (0, 3, (7,), True)),
)  # fmt: skip


def describe(value):
    if callable(value) and not isinstance(value, torch.dtype):
        return value.__name__.strip("<>")
    return None if isinstance(value, tuple) else "-".join(sorted(value)[:1])


@pytest.mark.parametrize(("kernels", "call", "arguments"), CASES, ids=describe)
def test_masked_lanes_stay_inside(kernels, call, arguments, lanes):
    call(*arguments)
    assert kernels <= {name for name, masked in lanes.masked.items() if masked}


def convolutions(geometry, c_small, c_big, batch, dtype, groups):
    """The three products with statistics, and gradients of the layer below, by pointers."""
    big = image(batch, c_big, geometry.big, dtype)
    small = image(batch, c_small, geometry.small, dtype)
    weight = torch.randn(c_small, c_big, *geometry.kernel_size).to(dtype)
    conv.fprop(big, weight, geometry, Epilogue(bias=torch.ones(c_small), groups=groups))
    conv.dgrad(small, weight, geometry, Epilogue(bias=torch.ones(c_big), groups=groups))
    conv.wgrad(big, small, geometry)
    for tensor, convolve, other in ((small, conv.fprop, big), (big, conv.dgrad, small)):
        output = Output(tensor, torch.rand(groups, 5, tensor.shape[1]), "relu", 0.0)
        convolve(other, weight, geometry, Epilogue(output=output))


K4S2 = ConvGeometry((10, 6), (5, 3), (4, 4), (2, 2), (1, 1))
ODD = ConvGeometry((9, 7), (5, 4), (3, 3), (2, 2), (1, 1))
MIXED = ConvGeometry((7, 5), (3, 6), (3, 4), (2, 1), (0, 2))
WITHOUT_TAPS = ConvGeometry((7, 6), (4, 3), (1, 1), (2, 2), (0, 0))
WHOLE = ConvGeometry((4, 4), (1, 1), (4, 4), (1, 1), (0, 0))
# Geometry, channels of small and of big, batch, dtype, groups.
CONV_CASES = (
    (K4S2, 40, 24, 4, FLOAT, 2),
    (K4S2, 9, 3, 3, HALF, 1),  # packed
    (ODD, 70, 5, 2, HALF, 2),
    (ODD, 24, 40, 3, FLOAT, 1),
    (MIXED, 3, 35, 2, FLOAT, 1),
    (WITHOUT_TAPS, 5, 33, 1, HALF, 1),
    (WHOLE, 6, 12, 5, HALF, 1),
    (WHOLE, 12, 3, 1, FLOAT, 1),
)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", CONV_CASES, ids=str)
def test_masked_lanes_of_the_products_stay_inside(case, lanes, monkeypatch):
    tile = tiles.GemmConfig(32, 32, 32, num_warps=4, num_stages=2, descriptors=False, splits=4)
    monkeypatch.setattr(tiles, "gemm_config", lambda *_: tile)
    convolutions(*case)
    products = {"fprop", "dgrad", "wgrad"}
    assert products <= {name for name, masked in lanes.masked.items() if masked}


@pytest.mark.parametrize("c_small", [3, 40], ids="{} channels".format)
@pytest.mark.parametrize(("size", "kernel"), [((3, 3), 4), ((2, 18), 4), ((3, 5), 3)], ids=str)
def test_to_image(lanes, size, kernel, c_small):
    stride = 2 if kernel == 4 else 1
    geometry = ConvGeometry.conv_transpose(size, (kernel,) * 2, (stride,) * 2, (1, 1), (0, 0))
    small = image(3, c_small, size)
    epilogue = Epilogue(bias=torch.randn(3))
    to_image.dgrad(
        small, image(c_small, 3, (kernel,) * 2), geometry, epilogue, y=small, activation="relu"
    )
    assert lanes.masked["to_image"] > 0
    to_image.dgrad(
        small, image(c_small, 3, (kernel,) * 2), geometry, epilogue, **normalization(c_small)
    )


@pytest.mark.parametrize("geometry", [K4S2, ODD, MIXED], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_join_images(lanes, channels, geometry):
    reals = torch.randint(256, (3, channels, *geometry.big), dtype=torch.uint8)
    fakes = image(3, channels, geometry.big, HALF)
    from_image.joined(reals, fakes, geometry, HALF, 2 / 255, -1.0)
    assert lanes.masked["join_images"] > 0


def test_logits(lanes):
    geometry = ConvGeometry.conv((3, 3), (3, 3), (1, 1), (0, 0))
    big, weight, small = image(19, 9, (3, 3)), image(3, 9, (3, 3)), image(19, 3, (1, 1))
    logits.fprop(big, weight, geometry, Epilogue(bias=torch.randn(3)))
    logits.dgrad(small, weight, geometry, Epilogue(bias=torch.randn(9)))
    logits.wgrad(big, small, geometry)
    output = Output(big[:18], torch.rand(2, 5, 9), "relu", 0.0)
    logits.dgrad(small[:18], weight, geometry, Epilogue(output=output))
    sums, _ = norm.total_sums(logits.norm_sums(small[:18], weight, geometry, output), 81, True)
    logits.dgrad(small[:18], weight, geometry, Epilogue(output=output, at_input=sums))
    for kernel in ("logits_fprop", "logits_dgrad", "logits_wgrad"):
        assert lanes.masked[kernel] > 0


def normalization(channels, groups=3):
    return dict(vectors=torch.rand(groups, 5, channels), activation="sigmoid")


@pytest.mark.parametrize(("size", "channels"), [((3, 3), 9), ((1, 3), 16)], ids=str)
def test_logits_of_what_is_normalised(lanes, size, channels):
    geometry = ConvGeometry.conv(size, size, (1, 1), (0, 0))
    big, weight = image(21, channels, size), image(3, channels, size)
    logits.fprop(big, weight, geometry, Epilogue(), **normalization(channels))
    logits.wgrad(big, image(21, 3, (1, 1)), geometry, **normalization(channels))
    assert lanes.masked["logits_fprop"] > 0 and lanes.masked["logits_wgrad"] > 0


def test_wgrad_of_an_image_and_what_is_normalised(lanes):
    geometry = ConvGeometry.conv((9, 7), (3, 3), (2, 2), (1, 1))
    padded = from_image.padded(image(6, 3, geometry.big), geometry)
    from_image.wgrad(padded, image(6, 40, geometry.small), **normalization(40))
    assert lanes.masked["wgrad_image"] > 0


def test_gradients_at_an_image(lanes):
    """The last box reaches beyond the last image, and windows of 3 x 3 leave elements over."""
    lower = ConvGeometry.conv((11, 7), (3, 3), (2, 2), (1, 1))
    upper = ConvGeometry.conv(lower.small, (4, 4), (2, 2), (1, 1))
    below = Output(image(3, 16, lower.small), None, "relu", 0.0)
    padded = from_image.padded(image(3, 3, lower.big), lower)
    dz, weight = image(3, 8, upper.small), image(8, 16, (4, 4))
    dgrad_wgrad.dgrad_wgrad(dz, weight, upper, below, padded, True)
    assert lanes.masked["dgrad_wgrad_image"] > 0


def test_gradient_below_an_image(lanes):
    geometry = ConvGeometry.conv((10, 14), (4, 4), (2, 2), (1, 1))
    padded = from_image.padded(image(4, 3, (10, 14)), geometry)
    output = Output(image(4, 40, (5, 7)), torch.rand(2, 5, 40), "relu", 0.0)
    weight = image(40, 3, (4, 4))
    from_image.fprop(padded, weight, Epilogue(output=output))
    output = Output(output.value, output.vectors[:1], "relu", 0.0)
    sums, _ = from_image.norm_sums(padded, weight, output, True)
    at_input, _ = norm.total_sums(sums, 4 * 35, True)
    from_image.fprop(padded, weight, Epilogue(output=output, at_input=at_input))
    assert lanes.masked["fprop_image"] > 0 and lanes.masked["norm_sums_image"] > 0
