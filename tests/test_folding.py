"""Upsampling, padding and average pooling as part of the convolutions beside them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_module, assert_same_losses
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from genfast import accelerate, backend, folding, functional, padding, use_backend
from genfast.launch import start
from genfast.layout import is_channels_last
from genfast.training import GANStep

kernels = pytest.mark.kernels
# Kernel, padding, scale, size: even and odd, high and wide, padding up to what a kernel allows.
GEOMETRIES = (
    ((3, 3), (1, 1), 2, (3, 4)),
    ((3, 3), (1, 1), 4, (2, 3)),
    ((1, 1), (0, 0), 2, (4, 3)),
    ((5, 4), (2, 0), 2, (5, 4)),
    ((4, 3), (3, 2), 2, (1, 2)),
)
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture
def gaining(monkeypatch):
    """As if everything gained, whatever the sizes; the forms that blocks are given."""
    forms, form, gains = [], folding.form, folding._gains

    def noting(*args):
        forms.append(form(*args))
        return forms[-1]

    monkeypatch.setattr(folding, "_gains", lambda *given: gains(*given) or True)
    monkeypatch.setattr(folding, "form", noting)
    return forms


@pytest.fixture
def on_cpu(monkeypatch):
    """Run as where no kernel can."""
    monkeypatch.setattr(functional, "why_not_triton", lambda *_, **__: "no kernels here")
    monkeypatch.setattr(backend, "INTERPRETING", False)
    with use_backend("auto"):
        yield


def no_least(monkeypatch):
    """As if a CPU gained whatever the sizes."""
    for name in ("_LEAST_MACS", "_LEAST_PIXELS", "_LEAST_VALUES", "_LEAST_PADDED"):
        monkeypatch.setattr(folding, name, 0)


def whole(forms):
    """Whether all that was around became part of the convolutions."""
    return [form.before is form.after is None for form in forms]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_weights(geometry, layout):
    kernel, padding, scale, size = geometry
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    weight = torch.randn(4, 3, *kernel, dtype=torch.float64).to(memory_format=layout)
    large = F.interpolate(x, scale_factor=scale)

    up = folding.upsampled(weight, scale)
    rest = [k - 1 - p for k, p in zip(kernel, padding, strict=True)]
    y = F.conv_transpose2d(x, up, None, scale, rest)
    torch.testing.assert_close(y, F.conv2d(large, weight, None, 1, padding))

    mean = folding.averaged(weight, scale)
    odd = large[:, :, :-1] + torch.randn_like(large[:, :, :-1])
    y = F.conv2d(odd, mean, None, scale, padding)
    torch.testing.assert_close(y, F.avg_pool2d(F.conv2d(odd, weight, None, 1, padding), scale))
    if kernel != (1, 1):
        assert all(w.is_contiguous(memory_format=layout) for w in (up, mean))


def test_weights_are_summed_in_float32_and_rounded_once():
    for dtype in (torch.bfloat16, torch.float32):
        weight = torch.randn(4, 3, 3, 3, dtype=dtype)
        shifts = [(i, 1 - i, j, 1 - j) for i in (0, 1) for j in (0, 1)]
        exact = sum(F.pad(weight.double(), shift) for shift in shifts)
        with torch.autocast("cpu", torch.bfloat16):
            up, mean = folding.upsampled(weight, 2), folding.averaged(weight, 2)
        turned = up.transpose(0, 1).flip(2, 3)
        one_rounding = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(turned.double(), exact, rtol=one_rounding, atol=2e-7)
        torch.testing.assert_close(mean.double(), exact / 4, rtol=one_rounding, atol=2e-7)


def ups():
    return nn.Sequential(
        nn.Upsample(scale_factor=2), nn.Conv2d(3, 4, 3, 1, 1), nn.BatchNorm2d(4), nn.ReLU(),
        nn.UpsamplingNearest2d(scale_factor=(2, 2)), nn.ZeroPad2d((0, 0, 1, 1)),
        nn.Conv2d(4, 2, (3, 2), padding="valid"), nn.Tanh(),
    )  # fmt: skip


def downs():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding="same"), nn.AvgPool2d(2), nn.LeakyReLU(0.2),
        nn.ZeroPad2d(1), nn.Conv2d(4, 6, 3, 1, 0), nn.AvgPool2d((2, 2), 2), nn.BatchNorm2d(6),
        nn.ReLU(), nn.ZeroPad2d(2), nn.Conv2d(6, 2, 4, 2, 1),
    )  # fmt: skip


def fours():
    return nn.Sequential(nn.Upsample(scale_factor=4.0), nn.Conv2d(2, 3, 1), nn.InstanceNorm2d(3))


def normalised():
    return nn.Sequential(
        nn.Upsample(scale_factor=2), spectral_norm(nn.Conv2d(3, 4, 3, 1, 1)), nn.ReLU(),
        parametrizations.spectral_norm(nn.Conv2d(4, 3, 3, 1, 1)), nn.AvgPool2d(2), nn.Sigmoid(),
    )  # fmt: skip


def padded():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 1, (1, 2), padding_mode="reflect"), nn.ReLU(),
        nn.ReflectionPad2d((2, 0, 1, 2)), nn.Conv2d(4, 4, 3, 1, (1, 0)), nn.InstanceNorm2d(4),
        nn.Conv2d(4, 4, 3, 1, (0, 2), padding_mode="replicate"), nn.AvgPool2d(2), nn.Tanh(),
    )  # fmt: skip


def both():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, 1, 1), nn.AvgPool2d(2), nn.Tanh(), nn.Upsample(scale_factor=2),
        nn.Conv2d(3, 2, 3, 1, 1), nn.BatchNorm2d(2),
    )  # fmt: skip


# The input, and how many blocks the chains have where all that gains is part of a convolution.
NETWORKS = {
    ups: ((2, 3, 2, 3), [2]),
    downs: ((2, 3, 9, 6), [3]),
    fours: ((1, 2, 2, 1), [1]),
    normalised: ((2, 3, 2, 2), [2]),
    padded: ((2, 3, 4, 5), [1, 1, 1]),
    both: ((2, 2, 4, 5), [2]),
}
each = pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__)


@kernels
@pytest.mark.parametrize(
    ("make", "layout"),
    [
        (ups, torch.contiguous_format),
        (downs, torch.channels_last),
        (fours, torch.channels_last),
        (normalised, torch.contiguous_format),
        (padded, torch.contiguous_format),
        (both, torch.channels_last),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_one_chain(make, layout, device, gaining, monkeypatch):
    # On a GPU PyTorch's gradients of reflection are added up by atomics.
    torch.use_deterministic_algorithms(True, warn_only=True)
    shape, sizes = NETWORKS[make]
    stock = make().to(device, memory_format=layout)
    model, chained, chain = copy.deepcopy(stock), [], functional._chain

    def noting(x, blocks, memory_format=None):
        chained.append(len(blocks))
        return chain(x, blocks, memory_format)

    monkeypatch.setattr(functional, "_chain", noting)
    assert all(entry.fused for entry in accelerate(model))
    assert_module(model, stock, torch.randn(shape, device=device).to(memory_format=layout))
    assert chained == sizes
    x = torch.randn(shape, device=device).to(memory_format=layout).requires_grad_()
    y = model(x)
    assert y.stride() == stock(x).stride()
    assert torch.autograd.grad(y.sum(), x)[0].stride() == x.stride()


@kernels
def test_what_gains_nothing_runs_as_pytorch_does_it(device, monkeypatch):
    monkeypatch.setattr(folding, "_gains", lambda *_: False)
    monkeypatch.setattr(folding, "upsampled", None)
    monkeypatch.setattr(folding, "averaged", None)
    stock = both().to(device)
    model = copy.deepcopy(stock)
    accelerate(model)
    assert_module(model, stock, torch.randn(NETWORKS[both][0], device=device))


@kernels
def test_half_precision(device, gaining):
    stock = both().to(device, torch.bfloat16)
    model = copy.deepcopy(stock)
    accelerate(model)
    x = torch.randn(NETWORKS[both][0], device=device, dtype=torch.bfloat16)
    assert_module(model, stock, x)
    assert all(whole(gaining))


@pytest.mark.float64
@kernels
def test_second_derivatives(device, gaining):
    stock = both().to(device, torch.float64).eval()
    model = copy.deepcopy(stock)
    accelerate(model)
    x = torch.randn(NETWORKS[both][0], dtype=torch.float64, device=device, requires_grad=True)
    found = []
    for network in (model, stock):
        (dx,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), (x, *network.parameters())))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)
    assert all(whole(gaining))


class Written(nn.Module):
    """Calls of layers and functions in a forward of its own."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 3, 3, 1, 1)
        self.shortcut, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(4)
        self.up, self.pool = nn.Upsample(scale_factor=2), nn.AvgPool2d(2)

    def forward(self, x):
        y = self.shortcut(F.interpolate(x, None, 2))
        x = torch.sin(x)
        h = F.interpolate(x, scale_factor=2, mode="nearest")
        h = self.norm(self.conv1(h)).relu()
        return F.avg_pool2d(self.conv2(self.up(h)), kernel_size=2) + y


class Pooling(Written):
    """Two layers that are called twice; one of them between a convolution and its norm."""

    def forward(self, x):
        h = self.norm(self.pool(self.conv1(x)))
        h = F.relu(h)
        h = self.pool(self.conv2(h))
        y = self.shortcut(x)
        y = F.avg_pool2d(y, 2)
        return self.up(h) + y


@kernels
@pytest.mark.parametrize(
    ("make", "layers", "parts"),
    [
        (Written, ["Upsample + Conv2d + BatchNorm2d + ReLU", "Upsample + Conv2d"] * 2, [1, 1, 1]),
        (Pooling, ["Conv2d + AvgPool2d + BatchNorm2d + ReLU", "Conv2d + AvgPool2d"] * 2, [1] * 3),
    ],
)
def test_forwards_of_their_own(make, layers, parts, device, gaining):
    stock = make().to(device)
    model = copy.deepcopy(stock)
    report = accelerate(model)
    assert [(e.layers, e.how) for e in report] == [(name, "fused") for name in layers[:2]] + [
        (layers[3], "fused")
    ]
    assert_module(model, stock, torch.randn(2, 3, 4, 5, device=device))
    assert whole(gaining) == parts


def between(*layers):
    return [nn.Conv2d(3, 3, 1), *layers, nn.Conv2d(3, 3, 3, 1, 1)]


def hooked(layer):
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    return layer


LEFT = {
    "bilinear": between(nn.UpsamplingBilinear2d(scale_factor=2)),
    "size": between(nn.Upsample(size=(4, 6))),
    "by 3": between(nn.Upsample(scale_factor=3)),
    "by 2 and 4": between(nn.Upsample(scale_factor=(2, 4))),
    "by 2.5": between(nn.Upsample(scale_factor=2.5)),
    "exact": between(nn.Upsample(scale_factor=2, mode="nearest-exact")),
    "computed again": between(nn.Upsample(scale_factor=2, recompute_scale_factor=True)),
    "upsampling with a hook": between(hooked(nn.Upsample(scale_factor=2))),
    "pooling with a hook": between(hooked(nn.AvgPool2d(2))),
    "of 3": between(nn.AvgPool2d(3)),
    "of 2 and 1": between(nn.AvgPool2d((2, 1))),
    "at each pixel": between(nn.AvgPool2d(2, 1)),
    "padded pool": between(nn.AvgPool2d(2, 2, 1)),
    "ceil": between(nn.AvgPool2d(2, ceil_mode=True)),
    "divisor": between(nn.AvgPool2d(2, divisor_override=3)),
    "max": between(nn.MaxPool2d(2)),
    "pool first": [nn.AvgPool2d(2), nn.Conv2d(3, 3, 1)],
    "one side": between(nn.ZeroPad2d((1, 0, 1, 0))),
    "cut": between(nn.ZeroPad2d(-1)),
    "stride": [nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 3, 2, 1), nn.AvgPool2d(2)],
    "much padding": [nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 2, 1, 2)],
    "reflection": [
        nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 3, 1, 1, padding_mode="reflect"),
    ],
    "groups": [nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 3, 1, 1, groups=3), nn.AvgPool2d(2)],
    "transposed": [
        nn.Upsample(scale_factor=2), nn.ConvTranspose2d(3, 3, 3, 1, 1), nn.AvgPool2d(2),
    ],
    "twice": [nn.Upsample(scale_factor=2), nn.Upsample(scale_factor=2), nn.MaxPool2d(2)],
}  # fmt: skip


@kernels
@pytest.mark.parametrize("name", LEFT)
def test_left_to_pytorch(name, device):
    stock = nn.Sequential(*LEFT[name]).to(device)
    model = copy.deepcopy(stock)
    accelerate(model)
    assert all(len(run.modules) == 1 for run in model.plan())
    x = torch.randn(2, 3, 4, 6, device=device)
    torch.testing.assert_close(model(x), stock(x))


def test_upsampling_by_size_and_scale_is_pytorchs_error():
    assert not folding.upsampling(nn.Upsample(size=(4, 6), scale_factor=2))


@kernels
def test_a_map_too_small_to_pool_is_pytorchs_error(device):
    model = nn.Sequential(nn.Conv2d(3, 3, 3), nn.AvgPool2d(2))
    accelerate(model)
    with pytest.raises(RuntimeError, match="Output size is too small"):
        model.to(device)(torch.randn(1, 3, 3, 4, device=device))


@kernels
def test_compiled(device, gaining):
    conv, pool, _, up, *others = both()
    stock = nn.Sequential(conv, pool, up, others[0]).to(device)
    model = copy.deepcopy(stock)
    accelerate(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(NETWORKS[both][0], device=device)
    torch.testing.assert_close(compiled(x), stock(x))
    assert all(whole(gaining))


UP, DOWN = folding.Around(upsample=2), folding.Around(pool=2)


@pytest.mark.parametrize(
    ("around", "channels", "sizes", "architecture", "gains"),
    [
        (UP, 256, (64, 16, 16), "sm_90", True),  # SNGAN's last block
        (UP, 256, (1, 4, 4), "sm_90", False),
        (UP, 16, (4, 8, 8), "sm_90", False),  # Less than a few launches take.
        (UP, 64, (16, 32, 32), "sm_80", True),
        (DOWN, 128, (64, 16, 16), "sm_90", True),
        (DOWN, 128, (10**6, 1, 4), "sm_90", False),  # PyTorch's error.
        (UP, 256, (16, 8, 8), "a CPU", True),
        (UP, 256, (1, 16, 16), "a CPU", False),  # 256 pixels pay for no weight.
        (UP, 16, (16, 8, 8), "a CPU", False),
        (DOWN, 8, (16, 32, 32), "a CPU", True),
        (DOWN, 8, (8, 32, 32), "a CPU", False),
    ],
)
def test_where_it_gains(around, channels, sizes, architecture, gains, monkeypatch):
    monkeypatch.setattr(start, "architecture", lambda _: architecture)
    images, *size = sizes
    x = torch.empty(images, 1, device="meta")
    way, dtype = "triton", torch.bfloat16
    if architecture == "a CPU":
        way, dtype = "cpu", torch.float32
    given = (around, x, dtype, way, size, channels, channels, (3, 3), (1, 1))
    assert folding._gains(*given) == gains


@kernels
def test_reflection_is_the_kernels_own_format(device, monkeypatch):
    model = padded().to(device)
    accelerate(model)
    made, reflected = [], folding.reflected

    def noting(x, **given):
        made.append(is_channels_last(x))
        return reflected(x, **given)

    monkeypatch.setattr(folding, "reflected", noting)
    model(torch.randn(NETWORKS[padded][0], device=device))
    assert made == [False, True]  # What the user gave, and what a chain put out.


@each
@pytest.mark.parametrize("large", [False, True])
def test_on_a_cpu(make, large, on_cpu, monkeypatch):
    """Large enough to gain, it is other calls of PyTorch's; else the very same."""
    if large:
        no_least(monkeypatch)
    stock = make()
    model = copy.deepcopy(stock)
    accelerate(model)
    x = torch.randn(NETWORKS[make][0])
    if large:
        assert_module(model, stock, x)
    else:
        assert torch.equal(model(x), stock(x))


@pytest.mark.parametrize("make", [Written, Pooling])
def test_forwards_of_their_own_on_a_cpu(make, on_cpu, monkeypatch):
    stock = make()
    model = copy.deepcopy(stock)
    accelerate(model)
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(copy.deepcopy(model)(x), copy.deepcopy(stock)(x))
    no_least(monkeypatch)
    forms, form = [], folding.form
    monkeypatch.setattr(folding, "form", lambda *a: forms.append(form(*a)) or forms[-1])
    assert_module(model, stock, x)
    assert len(forms) == 3


@kernels
def test_a_step_trains_as_the_stock_layers_do(device, gaining, started):
    """Its images are joined for a first layer that averages too."""
    torch.manual_seed(0)
    generator = nn.Sequential(
        nn.ConvTranspose2d(4, 8, 4), nn.ReLU(), nn.Upsample(scale_factor=2),
        nn.Conv2d(8, 3, 3, 1, 1), nn.Tanh(),
    )  # fmt: skip
    discriminator = nn.Sequential(
        nn.Conv2d(3, 8, 3, 1, 1), nn.AvgPool2d(2), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4)
    )
    pair = generator.to(device), discriminator.to(device)
    reals = torch.rand(2, 3, 8, 8, device=device) * 2 - 1
    losses = []
    for accelerated in (False, True):
        networks = copy.deepcopy(pair)
        if accelerated:
            for network in networks:
                accelerate(network)
        step = GANStep(
            *networks, latent_shape=(4, 1, 1), precision="fp32", capture=False, output="logits"
        )
        torch.manual_seed(1)
        result = step(reals)
        losses.append([(result.d_loss.item(), result.g_loss.item())])
    assert gaining
    assert all(whole(gaining))
    assert "join_images" in started
    assert_same_losses(*reversed(losses))


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 0, 1, 3)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_reflection(sizes, layout):
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    y = padding.reflected(x, sizes, torch.float32)
    assert torch.equal(y, F.pad(x, sizes, mode="reflect").float())
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.autograd.grad(y.sum(), x)[0].stride() == x.stride()

    def run(t):
        return padding.reflected(t, sizes, torch.float64)

    small = x.detach()[:1, :1].requires_grad_()
    assert torch.autograd.gradcheck(run, small)
    assert torch.autograd.gradgradcheck(run, small)
