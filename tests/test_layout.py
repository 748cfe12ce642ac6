"""Memory formats where a fused run borders on anything else, and what may be changed in place."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_module
from torch import nn

from genfast import functional, layout, use_backend
from genfast.launch import conv
from genfast.nn import DiscriminatorBlock, FusedSequential

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
formats = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS)


@pytest.fixture(params=[pytest.param("kernels", marks=pytest.mark.kernels), "cpu"])
def device(request, monkeypatch):
    """Run a test on the kernels, and as where no kernel can run."""
    if request.param == "kernels":
        yield torch.device("cpu" if functional.INTERPRETING else "cuda")
        return
    monkeypatch.setattr(functional, "why_not_triton", lambda *_, **__: "no kernels here")
    with use_backend("auto"):
        yield torch.device("cpu")


class Watched(torch.autograd.Function):
    """Hands on a tensor as it is, and notes the strides of its gradient."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        ctx.seen.append(dx.stride())
        return dx, None


SHAPES = {
    "map": (nn.Conv2d(3, 4, 3, 1, 1), (2, 3, 5, 4)),
    "upsampling": (nn.ConvTranspose2d(3, 4, 4, 2, 1), (2, 3, 5, 4)),
    "grey": (nn.Conv2d(1, 4, 3, 1, 1), (2, 1, 5, 4)),
    "to grey": (nn.ConvTranspose2d(3, 1, 4, 2, 1), (2, 3, 5, 4)),
    "latent": (nn.ConvTranspose2d(3, 4, 4), (2, 3, 1, 1)),
    "logit": (nn.Conv2d(3, 1, 4), (2, 3, 4, 4)),
}


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (2, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("cut", ["whole", "sliced", "expanded"])
@formats
def test_formats_are_told_as_pytorch_tells_them(shape, cut, fmt):
    """By an operation of PyTorch that makes its output in the format it takes its input for."""
    n, c, h, w = shape
    t = torch.empty(shape, memory_format=fmt)
    if cut == "sliced":
        t = torch.empty((2 * n, 2 * c, h, w), memory_format=fmt)[::2, ::2]
    if cut == "expanded":
        t = torch.empty((1, 1, h, w), memory_format=fmt).expand(shape)
    grown = F.interpolate(t, scale_factor=2)
    assert layout.is_channels_last(t) == (grown.stride() == layout.channels_last(grown).stride())


@formats
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("norm", [False, True])
def test_outputs_and_gradients_have_pytorchs_strides(name, norm, fmt, device):
    layer, shape = SHAPES[name]
    layers = [copy.deepcopy(layer), nn.BatchNorm2d(layer.out_channels)][: 1 + norm]
    stock = nn.Sequential(*layers, nn.LeakyReLU(0.2, True)).to(device, memory_format=fmt)
    ours = FusedSequential(*copy.deepcopy(stock))
    x = torch.randn(shape, device=device).contiguous(memory_format=fmt).requires_grad_()
    seen = []
    outputs = [module(Watched.apply(x, seen)) for module in (stock, ours)]
    assert outputs[1].stride() == outputs[0].stride()
    for y in outputs:
        y.backward(torch.randn_like(y))
    # On the CPU it is PyTorch's own backward, but for products, that has the last word.
    assert seen[1] == x.stride() or (functional.implementation(x) == "cpu" and seen[1] == seen[0])
    for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
        assert p.grad.stride() == p.stride() == q.grad.stride()


@pytest.mark.parametrize("weight_format", FORMATS.values(), ids=FORMATS)
@formats
def test_a_gradient_is_as_the_tensor_it_belongs_to(fmt, weight_format, device):
    """Whatever the others are; also of a weight that was computed."""
    x = torch.randn(2, 3, 6, 5, device=device).contiguous(memory_format=fmt).requires_grad_()
    weight = torch.randn(4, 3, 3, 3, device=device).contiguous(memory_format=weight_format)
    weight.requires_grad_()
    of_x, of_weight = [], []
    y = functional.conv_block(
        Watched.apply(x, of_x), Watched.apply(weight, of_weight), norm=True, activation="relu"
    )
    for dy_format in FORMATS.values():
        y.backward(torch.randn_like(y).contiguous(memory_format=dy_format), retain_graph=True)
    if functional.implementation(x) == "triton":  # On the CPU it is PyTorch's own backward.
        assert of_x == [x.stride()] * 2
        assert of_weight == [weight.stride()] * 2
    z, kl = functional.reparameterize_with_kl(Watched.apply(x, of_x), x)
    (z.square().sum() + kl.sum()).backward()
    assert z.stride() == of_x[-1] == x.stride()


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(8, 4, 3, 1, 1), nn.Conv2d(8, 1, 8), nn.ConvTranspose2d(8, 3, 4, 2, 1)]
)
def test_instance_norm_before_a_convolution(layer, device):
    """Its backward on a CPU is wrong for one contiguous image and a channels_last gradient."""
    stock = nn.Sequential(nn.InstanceNorm2d(8), copy.deepcopy(layer)).to(device)
    ours = FusedSequential(*copy.deepcopy(stock))
    assert_module(ours, stock, torch.randn(1, 8, 8, 8, device=device))


@pytest.mark.kernels
def test_a_chain_crosses_the_border_once(monkeypatch):
    crossed = []
    apply = layout._Border.apply
    monkeypatch.setattr(layout._Border, "apply", lambda *a: crossed.append(a[0].shape) or apply(*a))
    ours = FusedSequential(
        nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2, True),
        nn.Conv2d(4, 5, 4, 2, 1), nn.BatchNorm2d(5), nn.LeakyReLU(0.2, True),
        nn.Conv2d(5, 1, 3), nn.Sigmoid(),
    )  # fmt: skip
    device = torch.device("cpu" if functional.INTERPRETING else "cuda")
    ours.to(device, memory_format=torch.channels_last)
    x = torch.randn(2, 3, 12, 12, device=device)
    for fmt, borders in ((torch.channels_last, 0), (torch.contiguous_format, 2)):
        crossed.clear()
        ours(x.contiguous(memory_format=fmt).requires_grad_()).sum().backward()
        assert crossed == [x.shape] * borders  # forward and backward


@pytest.mark.float64
def test_second_derivatives_cross_the_border(device):
    x, weight = (
        torch.randn(shape, dtype=torch.float64, device=device, requires_grad=True)
        for shape in ((1, 2, 3, 3), (1, 2, 2, 2))
    )

    def fused(x, weight):
        return functional.conv_block(x, weight, activation="tanh")

    assert torch.autograd.gradgradcheck(fused, (x, weight), fast_mode=True)


CHANGES = {
    "added to": lambda y, x: y.add_(x),
    "dropout": lambda y, x: nn.Dropout2d(0.5, inplace=True)(y),
    "a view of it": lambda y, x: y[:, 1:].mul_(2),
    "nothing": lambda y, x: y,
}


@formats
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_what_follows_leaky_relu_may_change_it_in_place(change, norm, bias, fmt, device):
    layers = [nn.Conv2d(3, 3, 3, 1, 1, bias=bias), nn.BatchNorm2d(3)][: 1 + norm]
    stock = nn.Sequential(*layers, nn.LeakyReLU(0.2)).to(device, memory_format=fmt)
    gradients = []
    x = torch.randn(2, 3, 5, 4, device=device).contiguous(memory_format=fmt)
    for model in (stock, FusedSequential(*copy.deepcopy(stock))):
        torch.manual_seed(3)
        y = CHANGES[change](model(x), x)
        wanted = list(model.parameters())
        for retain in (True, False):  # A second backward makes the same of the graph.
            gradients.append(torch.autograd.grad(y.square().sum(), wanted, retain_graph=retain))
    for found in gradients[1:]:
        torch.testing.assert_close(found, gradients[0], rtol=1e-4, atol=1e-4)


def test_blocks_say_whether_they_are_in_place(device):
    x = torch.randn(2, 3, 8, 8, device=device)
    for inplace in (False, True):
        block = DiscriminatorBlock(3, 4, norm=False, inplace=inplace).to(device)
        y = block(x)
        y += 1
        if inplace:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
        else:
            y.sum().backward()


@pytest.mark.kernels
def test_an_output_nobody_changed_is_not_computed_again(monkeypatch):
    started = []
    fprop = conv.fprop
    monkeypatch.setattr(conv, "fprop", lambda *a: started.append(1) or fprop(*a))
    device = torch.device("cpu" if functional.INTERPRETING else "cuda")
    model = FusedSequential(nn.Conv2d(3, 4, 3), nn.LeakyReLU(0.2))
    model.to(device, memory_format=torch.channels_last)
    x = torch.randn(2, 3, 5, 4, device=device)
    y = model(x)
    y.sum().backward()
    assert len(started) == 1
    y = model(x)
    y += 1
    y.sum().backward()
    assert len(started) == 3
