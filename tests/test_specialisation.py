"""A batch of another size is the same kernels: the last one of an epoch compiles nothing.

Triton compiles a kernel for each type, constant and divisibility of its arguments, and takes an
integer of 1 for a constant. Those keys are made here as Triton makes them, for sm_90; nothing is
compiled or started.
"""

from functools import partial

import pytest
import torch

from genfast.geometry import ConvGeometry
from genfast.launch import conv, from_image, losses, norm, sampling, start, sums, to_image
from genfast.launch import logits as logit_products
from genfast.launch.epilogue import PLAIN, Epilogue
from genfast.launch.operand import Output
from genfast.models import DCGANDiscriminator, DCGANGenerator
from genfast.training import GANStep

pytest.importorskip("triton", reason="makes Triton's keys")
pytestmark = pytest.mark.kernels


class Keys:
    """Collects (name, key) of the kernels that would be compiled."""

    def __init__(self):
        from triton.backends.compiler import GPUTarget
        from triton.compiler.compiler import make_backend

        self.found = {}
        self._backend = make_backend(GPUTarget("cuda", 90, 32))
        self._binders = {}

    def add(self, kernel, grid, *, reads=(), writes=(), **arguments):
        name = kernel.__name__
        if name not in self._binders:
            self._binders[name] = self._binder(kernel)
        _, specialization, options = self._binders[name](**arguments)
        self.found.setdefault((name, str(specialization), str(options)), arguments)

    def _binder(self, kernel):
        from triton.runtime.jit import JITFunction, create_function_from_signature

        if not isinstance(kernel, JITFunction):  # Decorated for the interpreter.
            kernel = JITFunction(kernel.fn, **kernel.kwargs)
        return create_function_from_signature(kernel.signature, kernel.params, self._backend)


@pytest.fixture
def keys(monkeypatch):
    collected = Keys()
    monkeypatch.setattr(start, "architecture", lambda tensor: "sm_90")
    monkeypatch.setattr(start, "kernel", collected.add)
    # The tiles of a GPU, where those of the interpreter are smaller.
    monkeypatch.setattr("genfast.launch.passes.INTERPRETING", False)
    torch.use_deterministic_algorithms(False)  # Filling memory with NaN takes time here.
    return collected


def assert_no_new(keys, known):
    new = {key: keys.found[key] for key in keys.found if key not in known}
    numbers = [
        (name, {k: v for k, v in arguments.items() if isinstance(v, int)})
        for (name, *_), arguments in new.items()
    ]
    assert not new, f"{len(new)} new kernels: {numbers}"


def test_steps_of_a_gan_on_smaller_and_larger_batches(keys, device):
    step = GANStep(
        DCGANGenerator().to(device),
        DCGANDiscriminator().to(device),
        precision="bf16",
        capture=False,
        output="logits",  # Nothing is computed, so there is nothing to check.
    )
    image = torch.zeros(1, 3, 64, 64, device=device).to(memory_format=torch.channels_last)
    known = None
    for batch_size in (128, 97, 61, 32, 1000):
        step(image.expand(batch_size, 3, 64, 64))
        if known is None:
            known = set(keys.found)
            assert len({name for name, *_ in known}) >= 7  # Each kind that a step starts.
        assert_no_new(keys, known)


def images(batch, channels, size):
    empty = torch.empty(batch, channels, size, size, dtype=torch.bfloat16)
    return empty.to(memory_format=torch.channels_last)


def norms(batch):
    z = images(batch, 64, 15)  # an odd number of rows an image
    vectors = norm.batch_statistics(norm.statistics_of(z, 1), None, None, 1e-5)
    norm.normalize_activate(z, vectors, "relu", 0.0)
    for training in (False, True):
        options = dict(training=training, need_dz=True, activation="relu", negative_slope=0.0)
        norm.norm_backward(z, z, vectors, **options)
    norm.normalize_activate(z, vectors, "glu", 0.0)
    gated = dict(training=True, need_dz=True, activation="glu", negative_slope=0.0)
    norm.norm_backward(images(batch, 32, 15), z, vectors, **gated)


def norms_of_images(batch, span, memory_format):
    for size in (40, 15, 4):  # The first in parts, fewer of each of more images.
        z = images(batch, 64, size).contiguous(memory_format=memory_format)
        statistics = norm.statistics_of(z, batch)
        vectors = norm.batch_statistics(statistics, None, None, 1e-5, span=span)
        norm.normalize_activate(z, vectors, "relu", 0.0)
        options = dict(training=True, need_dz=True, activation="relu", negative_slope=0.0)
        norm.norm_backward(z, z, vectors, span=span, **options)


def contiguous_batches(batch):
    z = images(batch, 64, 15).contiguous()
    vectors = norm.batch_statistics(norm.statistics_of(z, 1), None, None, 1e-5)
    norm.normalize_activate(z, vectors, "relu", 0.0)
    options = dict(training=True, need_dz=True, activation="relu", negative_slope=0.0)
    norm.norm_backward(z, z, vectors, **options)


def normalising(batch, groups):
    """The products that normalise as they read."""
    n = batch * groups
    normalization = dict(vectors=torch.empty(groups, 5, 8), activation="relu")
    k4s2 = ConvGeometry.conv((50, 50), (4, 4), (2, 2), (1, 1))
    weight = torch.empty(8, 3, 4, 4, dtype=torch.bfloat16)
    small = images(n, 8, 25)
    to_image.dgrad(small, weight, k4s2, PLAIN, **normalization)
    from_image.wgrad(from_image.padded(images(n, 3, 50), k4s2), small, **normalization)
    whole = ConvGeometry.conv((4, 4), (4, 4), (1, 1), (0, 0))
    big, logit = images(n, 8, 4).float(), images(n, 1, 1).float()
    logit_products.fprop(big, big[:1], whole, PLAIN, **normalization)
    logit_products.wgrad(big, logit, whole, **normalization)


def activations(batch):
    y = images(batch, 3, 31)
    norm.activation_backward(y, y, "tanh", 0.0)


def chunks_of_statistics(batch):
    parts = 601 * batch
    mean, m2 = torch.empty(2, parts, 64)
    statistics = norm.TileStatistics(torch.empty(parts), mean, m2, 1, 1)
    norm.batch_statistics(statistics, None, None, 1e-5)


def gradients(batch, groups):
    """Of the layer below by each kernel that finishes them, for as many images in each group."""
    product = ConvGeometry.conv((4, 4), (4, 4), (1, 1), (0, 0))
    strided = ConvGeometry.conv((8, 8), (4, 4), (2, 2), (1, 1))
    n = groups * batch
    for operation, geometry, c_small, c_big in (
        (conv.fprop, strided, 128, 64),
        (conv.dgrad, strided, 128, 64),
        (conv.dgrad, strided, 128, 50),  # stored by pointers
        (conv.fprop, strided, 64, 3),
        (conv.dgrad, product, 1, 64),
    ):
        sides = [(c_big, geometry.big), (c_small, geometry.small)]
        source, result = sides if operation is conv.fprop else sides[::-1]
        x, value = (images(n, c, size[0]) for c, size in (source, result))
        weight = torch.empty(c_small, c_big, 4, 4, dtype=torch.bfloat16)
        output = Output(value, torch.empty(groups, 5, result[0]), "relu", 0.0)
        operation(x, weight, geometry, Epilogue(output=output))
        if conv.computed_twice(operation.__name__, x, weight, geometry, output):
            given = operation.__name__, x, weight, geometry, output
            at_input, _ = norm.total_sums(conv.norm_sums(*given, True)[0], n, True)
            operation(x, weight, geometry, Epilogue(output=output, at_input=at_input))


def latents(batch, width):
    mu = torch.empty(batch, width)
    seed = torch.zeros(1, dtype=torch.int64)
    _, kl = sampling.reparameterize(mu, mu, seed, with_kl=True)
    sampling.reparameterize_backward(mu, kl, mu, mu, seed)
    z, kl = sampling.importance_samples(mu, mu, 5, seed)
    sampling.importance_samples_backward(z, kl, mu, mu, 5, seed)


def logits(batch):
    reconstruction = torch.empty(batch, 784)
    for targets in (batch, reconstruction):
        losses.logit_loss(reconstruction, targets, 1.0, with_gradient=targets is batch)
        losses.logit_loss_backward(torch.empty(()), reconstruction, targets, 1.0)


def joins(batch, layout):
    size = 31 if batch % 2 else 64
    geometry = ConvGeometry.conv((size, size), (4, 4), (2, 2), (1, 1))
    reals = torch.empty(batch, 3, size, size, dtype=torch.uint8).to(memory_format=layout)
    fakes = reals.to(torch.bfloat16)
    from_image.joined(reals, fakes, geometry, torch.bfloat16, 2 / 255, -1.0)


def partial_sums(batch):
    for length in (20, 1024, 2**17):
        sums.sum_partials(torch.empty(batch, length), torch.empty(length))


@pytest.mark.parametrize(
    "call",
    [
        norms,
        contiguous_batches,
        partial(normalising, groups=1),
        partial(normalising, groups=2),
        activations,
        chunks_of_statistics,
        partial(latents, width=128),
        partial(latents, width=100),
        partial(latents, width=3),
        partial(latents, width=1037),  # wide enough for two programs a row
        logits,
        partial(joins, layout=torch.channels_last),
        partial(joins, layout=torch.contiguous_format),
        partial_sums,
    ],
    ids=lambda call: getattr(call, "__name__", None) or call.func.__name__,
)
def test_any_batch_is_the_same_kernels(call, keys):
    call(128)
    known = set(keys.found)
    assert known
    for batch in (97, 16, 2, 1, 1000):
        call(batch)
    assert_no_new(keys, known)


@pytest.mark.parametrize("span", [1, 4])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_any_batch_of_images_with_statistics_is_the_same_kernels(span, memory_format, keys):
    norms_of_images(128, span, memory_format)
    known = set(keys.found)
    for batch in (97, 16, 5, 1000):
        norms_of_images(batch, span, memory_format)
    assert_no_new(keys, known)


@pytest.mark.parametrize("groups", [1, 2])
def test_any_batch_of_a_tile_has_the_same_gradients(groups, keys):
    gradients(128, groups)
    known = set(keys.found)
    assert {name for name, *_ in known} >= {"fprop", "dgrad", "fprop_image", "logits_dgrad"}
    assert groups > 1 or "norm_sums_image" in {name for name, *_ in known}
    for batch in (97, 61, 33, 1000):
        gradients(batch, groups)
    assert_no_new(keys, known)


@pytest.mark.parametrize("channels", [50, 3, 1])
def test_channels_that_allow_no_vectors_are_kernels_of_their_own(channels, keys):
    """The keys tell what a kernel must know, so the tests above can fail."""
    for count in (64, 48, channels):
        z = images(2, count, 4)
        norm.normalize_activate(z, torch.empty(1, 5, count), "relu", 0.0)
    assert len(keys.found) == 2
