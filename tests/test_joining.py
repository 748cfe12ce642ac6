"""Real and generated images joined in padded memory, and uint8 images: the numbers of `cat`."""

import gc

import pytest
import torch
import torch.nn.functional as F
from cases import LAYOUTS
from same_training import assert_same_bits, train
from test_from_image import GEOMETRIES
from torch import nn

import genfast
from genfast import functional
from genfast.backend import use_backend
from genfast.geometry import ConvGeometry
from genfast.launch import from_image
from genfast.models import VAE, DCGANDiscriminator, DCGANGenerator
from genfast.nn import FusedSequential
from genfast.training import GANStep, VAEStep
from genfast.training.pixels import normalize, scale_and_shift
from genfast.training.steps import base, gan
from genfast.training.steps.joining import joined

kernels = pytest.mark.kernels
RANGE = (-1.0, 1.0)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
K4S2 = ConvGeometry.conv((10, 7), (4, 4), (2, 2), (1, 1))


def levels(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("geometry", [GEOMETRIES[i] for i in (0, 1, 3, 9, 10, 11)], ids=str)
def test_what_is_joined_is_what_cat_makes(geometry, dtype, device):
    kernel, stride, padding, size = geometry
    geometry = ConvGeometry.conv(size, kernel, stride, padding)
    half = torch.bfloat16 if dtype == torch.float32 else dtype
    # Channels; the dtype and the layout of real images and of generated ones.
    for channels, real_dtype, real_layout, fake_dtype, fake_layout in (
        (1, torch.uint8, "transposed", dtype, "sliced"),
        (3, torch.float32, "sliced", half, "channels_last"),
        (4, torch.uint8, "permuted", torch.float32, "contiguous"),
    ):
        reals, scale = levels(3, channels, *size).to(device), scale_and_shift(RANGE)
        floats = normalize(reals, RANGE)
        if real_dtype != torch.uint8:
            reals, scale = floats, ()
        fakes = torch.randn(3, channels, *size).to(device, fake_dtype)
        reals, fakes = LAYOUTS[real_layout](reals), LAYOUTS[fake_layout](fakes)
        expected = torch.cat([floats.to(dtype), fakes.to(dtype)])
        x = from_image.joined(reals, fakes, geometry, dtype, *scale)
        assert x.dtype == dtype and torch.equal(x, expected)
        # Fresh memory holds NaN here, so every zero was written.
        data = from_image.found(x, geometry).data
        assert data.data_ptr() == x.untyped_storage().data_ptr()
        assert torch.equal(data, from_image.padded(expected, geometry).data)


@kernels
def test_images_that_repeat(device):
    reals = levels(1, 3, 10, 7).to(device).expand(5, 3, 10, 7)
    fakes = torch.randn(5, 1, 10, 7).to(device, torch.bfloat16).expand(5, 3, 10, 7)
    x = from_image.joined(reals, fakes, K4S2, torch.bfloat16, *scale_and_shift(RANGE))
    assert torch.equal(x, torch.cat([normalize(reals, RANGE).bfloat16(), fakes]))


def join(device, dtype=torch.bfloat16, n=2, geometry=K4S2):
    reals, fakes = torch.randn(2, n, 3, *geometry.big).to(device)
    return from_image.joined(reals, fakes, geometry, dtype)


@kernels
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chain_reads_it_where_it_lies(dtype, device, started):
    x = join(device, dtype)
    weight = torch.randn(16, 3, 4, 4).to(device, dtype)
    results = []
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        w = weight.clone().requires_grad_()
        started.clear()
        out = functional.conv_block(given, w, stride=2, padding=1, activation="leaky_relu")
        (dw,) = torch.autograd.grad(out.sum(), w)
        results.append((out, dw, started.count("pad_image")))
    (ours, our_dw, none), (theirs, their_dw, two) = results
    assert (none, two) == (0, 2)
    assert torch.equal(ours, theirs) and torch.equal(our_dw, their_dw)


@kernels
def test_others_read_it_as_any_tensor(device):
    x = join(device, torch.float32)
    plain = x.contiguous()
    weight = torch.randn(16, 3, 3, 3, device=device)
    for padding in (0, 1, 2):  # Of other geometries than it was made for.
        ours = functional.conv_block(x, weight, padding=padding)
        assert torch.equal(ours, functional.conv_block(plain, weight, padding=padding))
    transposed = torch.randn(3, 8, 4, 4, device=device)
    ours = functional.conv_transpose_block(x, transposed, stride=2)
    assert torch.equal(ours, functional.conv_transpose_block(plain, transposed, stride=2))
    assert torch.equal(F.avg_pool2d(x, 2), F.avg_pool2d(plain, 2))


@kernels
def test_the_gradient_of_a_joined_batch_and_its_graph(device):
    x = join(device, torch.float32)
    weight = torch.randn(16, 3, 4, 4, device=device)
    found = []
    for given in (x.detach(), x.contiguous(memory_format=torch.channels_last)):
        given.requires_grad_()
        w = weight.clone().requires_grad_()
        out = functional.conv_block(given, w, stride=2, padding=1, activation="tanh")
        (dx,) = torch.autograd.grad(out.square().sum(), given, create_graph=True)
        found.append((out, dx, *torch.autograd.grad(dx.square().sum(), (given, w))))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


@kernels
def test_a_change_in_place_is_read(device):
    x = join(device)
    x.mul_(2)
    assert torch.equal(from_image.found(x, K4S2).data, from_image.padded(x.clone(), K4S2).data)
    weight = torch.randn(16, 3, 4, 4).to(device, x.dtype).requires_grad_()
    out = functional.conv_block(x, weight, stride=2, padding=1)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@kernels
def test_only_the_whole_batch_is_taken(device):
    x = join(device)
    assert from_image.found(x, K4S2) is not None
    assert from_image.found(x.detach(), K4S2) is not None
    others = (x[:2], x[2:], x[:, :2], x[:, :, 1:], x.flip(0), x.view(torch.float16), x.clone())
    for other in others:
        assert from_image.found(other, K4S2) is None
    # Of the same size, read by other windows.
    for kernel, stride, padding in (((4, 4), (2, 2), (1, 0)), ((4, 4), (2, 1), (1, 1))):
        geometry = ConvGeometry.conv(K4S2.big, kernel, stride, padding)
        assert from_image.found(x, geometry) is None


@kernels
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_generated_images_are_found_where_they_were_joined(layout, device, started):
    reals, fakes = torch.randn(2, 2, 3, 10, 7).to(device)
    fakes = LAYOUTS[layout](fakes).requires_grad_()
    weight = torch.randn(16, 3, 4, 4, device=device)

    def run(x):
        out = functional.conv_block(x, weight, stride=2, padding=1, activation="leaky_relu")
        (dx,) = torch.autograd.grad(out.square().sum(), x, retain_graph=True)
        return out, dx

    expected = run(fakes)
    joined = from_image.joined(reals, fakes.detach(), K4S2, torch.float32)
    copy = from_image.found(fakes, K4S2).data
    assert torch.equal(copy, from_image.padded(fakes.detach(), K4S2).data)
    assert copy.untyped_storage().data_ptr() == joined.untyped_storage().data_ptr()
    started.clear()
    found = run(fakes)
    # Of contiguous images the gradient is to be contiguous, so those enter as a copy.
    assert ("pad_image" in started) is (layout == "contiguous")
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs) and ours.stride() == theirs.stride()


@kernels
def test_generated_images_are_not_found_where_either_changed(device):
    def join(dtype=torch.float32):
        reals, fakes = torch.randn(2, 2, 3, 10, 7).to(device)
        fakes = LAYOUTS["channels_last"](fakes)
        x = from_image.joined(reals, fakes, K4S2, dtype)
        return x, fakes

    x, fakes = join()
    for other in (fakes[:1], fakes[:, :2], fakes[:, :, 1:], fakes.clone(), fakes.flip(0)):
        assert from_image.found(other, K4S2) is None
    assert from_image.found(fakes, ConvGeometry.conv(K4S2.big, (4, 4), (2, 2), (1, 0))) is None
    assert from_image.found(fakes, K4S2) is not None
    x.mul_(2)
    assert from_image.found(fakes, K4S2) is None
    x, fakes = join()
    fakes.add_(1)
    assert from_image.found(fakes, K4S2) is None
    assert from_image.found(join(torch.bfloat16)[1], K4S2) is None  # Rounded, they are others.


@kernels
def test_a_strangers_memory_is_not_taken(device, started):
    x = join(device)
    stranger = torch.empty_like(from_image.found(x, K4S2).data)[:, 1:11, 1:8, :3]
    stranger = stranger.permute(0, 3, 1, 2).copy_(x)
    assert stranger.stride() == x.stride()
    assert stranger.storage_offset() == x.storage_offset()
    assert from_image.found(stranger, K4S2) is None
    started.clear()
    weight = torch.randn(16, 3, 4, 4).to(device, x.dtype)
    outputs = [functional.conv_block(t, weight, stride=2, padding=1) for t in (stranger, x)]
    assert torch.equal(*outputs)
    assert started == ["pad_image", "fprop_image", "fprop_image"]


@kernels
def test_memory_is_forgotten_with_its_last_view(device):
    gc.collect()
    before = len(from_image._written)
    x = join(device)
    weight = torch.randn(16, 3, 4, 4).to(device, x.dtype).requires_grad_()
    out = functional.conv_block(x, weight, stride=2, padding=1).sum()
    del x
    gc.collect()
    assert len(from_image._written) == before + 1  # Backward needs it.
    out.backward()
    del out
    gc.collect()
    assert len(from_image._written) == before
    # The next owner of the addresses, many times over.
    assert not any(join(device).clone().untyped_storage() in from_image._written for _ in range(9))


def networks(channels=1, seed=0):
    torch.manual_seed(seed)
    return DCGANGenerator(5, 8, channels, 16), DCGANDiscriminator(channels, 8, 16)


@pytest.mark.one_in(2)
@kernels
@pytest.mark.parametrize(
    ("batch", "precision", "channels"),
    [("uint8", "fp32", 1), ("floats", "bf16", 3)],
)
def test_a_step_is_that_of_cat(batch, precision, channels, device, monkeypatch, started):
    images = levels(2, channels, 16, 16)
    images = (images if batch == "uint8" else normalize(images, RANGE)).to(device)
    settings = dict(precision=precision, capture=False, output="logits")
    results = []
    for by_cat in (False, True):
        if by_cat:
            monkeypatch.setattr(gan, "joined", lambda *_: None)
        started.clear()
        step = GANStep(*(network.to(device) for network in networks(channels)), **settings)
        results.append(train(step, None, 1, images))
        assert started.count("join_images") == (not by_cat)
    assert_same_bits(*results)


@pytest.mark.parametrize("merge", [None, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_uint8_images_are_those_floats_to_a_gan(precision, merge):
    images = levels(4, 1, 16, 16)
    results = []
    for given in (images, images.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
                  normalize(images, RANGE)):  # fmt: skip
        step = GANStep(*networks(), precision=precision, merge=merge)
        results.append(train(step, None, 2, given))
    assert_same_bits(results[0], results[2])
    assert_same_bits(results[1], results[2])


def test_a_captured_step_takes_uint8_images(monkeypatch, capture_anyway):
    first, second = levels(4, 1, 16, 16), levels(4, 1, 16, 16)
    losses, dtypes = [], []
    normalized = base.pixels.normalize

    def noting(images, *args):
        dtypes.append(images.dtype)
        return normalized(images, *args)

    for captured in (False, True):
        if captured:
            capture_anyway()
            monkeypatch.setattr(base.pixels, "normalize", noting)
        step = GANStep(*networks(), precision="fp32")
        torch.manual_seed(1)
        losses.append([t.item() for images in (first, second) for t in step(images)])
    assert losses[0] == losses[1]
    # The look at the first batch; three warm-ups and two replays, each of what was copied for it.
    assert dtypes == 6 * [torch.uint8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_uint8_images_are_those_floats_to_a_vae(dtype):
    images = levels(4, 1, 6, 5)
    results = []
    for given in (images, normalize(images, (0.0, 1.0), dtype)):
        torch.manual_seed(0)
        step = VAEStep(VAE(30, 8, 3).to(dtype), precision="fp32")
        results.append(train(step, None, 2, given))
    assert_same_bits(*results)


@kernels
def test_where_images_are_joined(device):
    fakes = torch.randn(2, 3, 10, 7, device=device)
    reals = levels(2, 3, 10, 7).to(device)

    def may(discriminator, reals=reals, fakes=fakes):
        return joined(discriminator.to(device), reals, fakes, RANGE) is not None

    def layers(*first):
        return FusedSequential(*first, nn.LeakyReLU(0.2), nn.Conv2d(16, 1, 3))

    conv = nn.Conv2d(3, 16, 4, 2, 1)
    assert may(layers(conv))
    assert may(nn.Sequential(nn.Sequential(layers(conv)), nn.Flatten()))
    assert may(FusedSequential(layers(conv)))
    accelerated = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    genfast.accelerate(accelerated)
    assert may(accelerated)
    assert may(layers(conv), reals.float(), fakes)
    assert may(layers(conv), reals.bfloat16(), fakes)

    assert not may(nn.Sequential(conv, nn.LeakyReLU(0.2)))
    assert not may(layers(nn.Conv2d(3, 16, 4, 2, 1, padding_mode="reflect")))
    assert not may(layers(nn.ConvTranspose2d(3, 16, 4, 2, 1)))
    assert not may(layers(nn.Identity(), conv))
    assert not may(layers(nn.Conv2d(3, 12, 4, 2, 1)))  # `from_image` takes multiples of 8.
    assert not may(layers(nn.Conv2d(3, 16, (10, 7))))
    assert not may(layers(nn.Conv2d(3, 16, 12)))
    assert not may(layers(nn.Conv2d(4, 16, 4, 2, 1)))
    assert not may(layers(conv), fakes=fakes.bfloat16())
    assert not may(layers(conv), reals.double(), fakes)
    assert not may(layers(nn.Conv2d(3, 16, 4, 2, 1)).double(), reals, fakes.double())
    watched = layers(nn.Conv2d(3, 16, 4, 2, 1))
    watched[0].register_forward_hook(lambda *_: None)
    assert not may(watched)
    with use_backend("reference"):
        assert not may(layers(conv))


@kernels
def test_unknown_layers_see_what_cat_makes(device, started):
    class Watching(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, images):
            return self.body(images)

    generator, discriminator = (network.to(device) for network in networks())
    settings = dict(precision="fp32", merge=True, capture=False, output="logits")
    step = GANStep(generator, Watching(discriminator), **settings)
    step(levels(2, 1, 16, 16).to(device))
    assert "join_images" not in started
