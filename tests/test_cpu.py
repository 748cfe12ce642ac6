"""The CPU's convolutions beside PyTorch's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_close, assert_module
from torch import nn

from genfast import backend, cpu, functional, use_backend
from genfast.layout import is_channels_last
from genfast.nn import FusedSequential

# Kernel, stride, padding, output_padding, small side, C_small, C_big. Each way that `cpu` takes
# beside oneDNN's, and geometries next to them.
PRODUCT = (4, 1, 0, 0, (1, 1), 7, 5)
PHASES = (4, 2, 1, 0, (5, 6), 7, 3)
UNFOLDED = (4, 2, 1, 0, (4, 4), 24, 16)
SHAPES = (
    PRODUCT,
    PHASES,
    UNFOLDED,
    (4, 1, 0, 0, (1, 2), 7, 5),
    (3, 2, 1, 1, (4, 5), 6, 2),
    (5, 2, 2, 1, (4, 4), 6, 3),
    (2, 2, 0, 0, (3, 5), 4, 4),
    (6, 2, 2, 0, (3, 4), 4, 3),
    (3, 3, 0, 0, (3, 3), 4, 1),
    (5, 3, 1, 0, (4, 3), 3, 1),
    (7, 1, 3, 0, (4, 5), 3, 2),
    ((3, 4), (2, 1), (1, 0), (1, 0), (3, 2), 4, 3),
)
by_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
directions = pytest.mark.parametrize("transposed", [False, True])
layouts = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


@pytest.fixture
def every_way(monkeypatch):
    """Take each way, in whatever dtype and on whatever processor."""
    monkeypatch.setattr(cpu, "_bfloat16_pays", lambda _: True)
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: True)


@pytest.fixture
def on_cpu(monkeypatch):
    """Run as where no kernel can."""
    monkeypatch.setattr(functional, "why_not_triton", lambda *_, **__: "no kernels here")
    with use_backend("auto"):
        yield


def pairs(shape):
    return [v if isinstance(v, tuple) else (v, v) for v in shape[:4]]


def tensors(shape, transposed, dtype, layout, bias):
    kernel, stride, padding, output_padding = pairs(shape)
    *_, small, c_small, c_big = shape
    big = [
        (n - 1) * s - 2 * p + k + o
        for n, s, p, k, o in zip(small, stride, padding, kernel, output_padding, strict=True)
    ]
    x = torch.randn(3, *((c_small, *small) if transposed else (c_big, *big)), dtype=dtype)
    weight = torch.randn(c_small, c_big, *kernel, dtype=dtype)
    inputs = [t.contiguous(memory_format=layout).requires_grad_() for t in (x, weight)]
    channels = c_big if transposed else c_small
    return [*inputs, torch.randn(channels, dtype=dtype, requires_grad=True) if bias else None]


def convolve(convolutions, shape, transposed, x, weight, bias=None):
    _, stride, padding, output_padding = pairs(shape)
    if transposed:
        return convolutions.conv_transpose2d(x, weight, bias, stride, padding, output_padding)
    return convolutions.conv2d(x, weight, bias, stride, padding)


@by_shape
@directions
@layouts
@pytest.mark.parametrize("bias", [False, True])
def test_float64(shape, transposed, layout, bias, every_way):
    inputs = tensors(shape, transposed, torch.float64, layout, bias)
    wanted = [t for t in inputs if t is not None]
    ours = convolve(cpu, shape, transposed, *inputs)
    plain = convolve(F, shape, transposed, *inputs)
    dy = torch.randn_like(plain)
    results = ours, *torch.autograd.grad(ours, wanted, dy)
    expected = plain, *torch.autograd.grad(plain, wanted, dy)
    torch.testing.assert_close(results, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shape", [PRODUCT, PHASES, UNFOLDED], ids=["product", "phases", "unfold"])
@directions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding(shape, transposed, dtype, every_way):
    """By the rule that the kernels are held to: errors at most 2 or 3 times PyTorch's own."""

    def evaluate(convolutions, inputs, dy):
        y = convolve(convolutions, shape, transposed, *inputs)
        dx, dweight = torch.autograd.grad(y, inputs, dy)
        return {"output": y.detach(), "gradient of x": dx, "gradient of weight": dweight}

    samples = []
    for draw in range(16):
        inputs = tensors(shape, transposed, dtype, torch.channels_last, False)[:2]
        dy = torch.randn_like(convolve(F, shape, transposed, *inputs))
        wide = [t.detach().double().requires_grad_() for t in inputs]
        exact = evaluate(F, wide, dy.double())
        samples.append((evaluate(F, inputs, dy), exact))
        if draw == 0:
            ours, oracle = evaluate(cpu, inputs, dy), exact
    assert_close(ours, oracle, samples)


@pytest.mark.parametrize("shape", [PRODUCT, PHASES, UNFOLDED], ids=["product", "phases", "unfold"])
@directions
def test_second_derivatives(shape, transposed, every_way):
    small = (*shape[:5], 2, 2)
    inputs = tensors(small, transposed, torch.float64, torch.contiguous_format, False)[:2]
    inputs = [t[:1].detach().requires_grad_() for t in inputs[:1]] + inputs[1:]
    assert torch.autograd.gradgradcheck(lambda *t: convolve(cpu, small, transposed, *t), inputs)


def test_unfolding_is_taken(monkeypatch):
    """The bfloat16 weight gradient of a 4 x 4 map; nothing else unfolds."""
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: True)
    unfolded = []
    unfold = cpu._unfold
    monkeypatch.setattr(cpu, "_unfold", lambda *a: unfolded.append(1) or unfold(*a))
    for dtype, shape in (
        (torch.bfloat16, UNFOLDED),
        (torch.float32, UNFOLDED),
        (torch.bfloat16, PHASES),
    ):
        inputs = tensors(shape, False, dtype, torch.channels_last, False)[:2]
        convolve(cpu, shape, False, *inputs).sum().backward()
    assert len(unfolded) == 1


@by_shape
@directions
@layouts
@pytest.mark.parametrize("fast", [False, True], ids=["emulated", "bfloat16"])
def test_float32_is_pytorchs_own_but_for_products(shape, transposed, layout, fast, monkeypatch):
    """The same bits from the same calls; so is bfloat16 on a processor that only emulates it."""
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: fast)
    if shape == PRODUCT:
        return
    for dtype in (torch.float32,) if fast else (torch.float32, torch.bfloat16):
        inputs = tensors(shape, transposed, dtype, layout, True)
        y, plain = (convolve(convolutions, shape, transposed, *inputs) for convolutions in (cpu, F))
        assert type(y.grad_fn) is type(plain.grad_fn)
        assert torch.equal(y, plain)


@by_shape
@directions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fast", [False, True], ids=["emulated", "bfloat16"])
def test_the_look_at_a_layer_says_what_its_convolution_takes(
    shape, transposed, dtype, fast, monkeypatch
):
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: fast)
    kernel, stride, padding, output_padding = pairs(shape)
    inputs = tensors(shape, transposed, dtype, torch.contiguous_format, True)
    y, plain = (convolve(convolutions, shape, transposed, *inputs) for convolutions in (cpu, F))
    gains = type(y.grad_fn) is not type(plain.grad_fn)
    *_, c_small, c_big = shape
    if transposed:
        layer = nn.ConvTranspose2d(c_small, c_big, kernel, stride, padding, output_padding)
    else:
        layer = nn.Conv2d(c_big, c_small, kernel, stride, padding)
    assert cpu.may_gain(layer, inputs[0]) == gains


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("interpreting", [False, True])
def test_layers_that_gain_nothing_are_called_themselves(
    precision, interpreting, on_cpu, monkeypatch
):
    """In float32 on a processor that multiplies bfloat16 too, where other layers do gain."""
    monkeypatch.setattr(backend, "INTERPRETING", interpreting)
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: True)
    taken = []
    chain = functional.chain
    monkeypatch.setattr(functional, "chain", lambda x, blocks: taken.append(1) or chain(x, blocks))
    network = FusedSequential(
        nn.Conv2d(16, 24, 4, 2, 1), nn.BatchNorm2d(24), nn.ReLU(),
        nn.ConvTranspose2d(24, 16, 4, 2, 1), nn.ReLU(),
        nn.Conv2d(16, 4, 3, 1, 1), nn.Conv2d(4, 2, (8, 8)),
    )  # fmt: skip
    x = torch.randn(2, 16, 8, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        network(x)
    # A map of 4 x 4 pixels is unfolded in bfloat16 alone; the last layer is a product.
    assert len(taken) == (1 if precision == "fp32" else 3)


def test_where_no_kernel_can_run_nobody_asks_for_each_container(on_cpu, monkeypatch):
    """That takes as long as a small layer; networks of residual blocks have dozens of them."""
    monkeypatch.setattr(backend, "INTERPRETING", False)
    asked = []
    monkeypatch.setattr(functional, "implementation", lambda x: asked.append(1) or "reference")
    block = FusedSequential(nn.ReflectionPad2d(1), nn.Conv2d(4, 4, 3), nn.ReLU())
    network = FusedSequential(nn.Conv2d(3, 4, 3), block, block)
    network(torch.randn(2, 3, 8, 8))
    assert not asked
    monkeypatch.setattr(backend, "INTERPRETING", True)
    network(torch.randn(2, 3, 8, 8))
    assert asked


@pytest.mark.parametrize("fast", [False, True], ids=["emulated", "bfloat16"])
def test_a_trace_holds_pytorchs_own_layers(fast, monkeypatch):
    monkeypatch.setattr(backend, "INTERPRETING", False)
    monkeypatch.setattr(cpu, "has_bfloat16", lambda: fast)
    network = FusedSequential(
        nn.ConvTranspose2d(5, 6, 4), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 1, 4)
    )
    stock = nn.Sequential(*copy.deepcopy(network))
    x = torch.randn(2, 5, 1, 1)
    with use_backend("auto"), torch.autocast("cpu", torch.bfloat16):
        torch._dynamo.reset()
        assert torch.equal(torch.compile(network, fullgraph=True, backend="eager")(x), stock(x))


@pytest.mark.parametrize("interpreting", [False, True])
def test_a_container_may_leave_the_cpu(interpreting, on_cpu, monkeypatch):
    class Move(nn.Module):
        def forward(self, x):
            return x.to("meta")

    monkeypatch.setattr(backend, "INTERPRETING", interpreting)
    network = FusedSequential(
        nn.Conv2d(3, 4, 3), Move(), nn.Conv2d(4, 5, 3, device="meta"), nn.ReLU()
    )
    y = network(torch.randn(2, 3, 8, 8))
    assert y.device.type == "meta"
    assert y.shape == (2, 5, 4, 4)


@pytest.mark.parametrize("shape", [PRODUCT, PHASES, UNFOLDED], ids=["product", "phases", "unfold"])
@directions
@pytest.mark.parametrize("x_layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weight_layout", [torch.contiguous_format, torch.channels_last])
def test_memory_formats(shape, transposed, x_layout, weight_layout, every_way):
    """An output's is PyTorch's, a gradient's that of its tensor."""
    inputs = tensors(shape, transposed, torch.float32, torch.contiguous_format, True)
    for i, layout in enumerate((x_layout, weight_layout)):
        inputs[i] = inputs[i].detach().contiguous(memory_format=layout).requires_grad_()
    y, plain = (convolve(convolutions, shape, transposed, *inputs) for convolutions in (cpu, F))
    _, stride, padding, output_padding = pairs(shape)
    options = dict(bias=inputs[2], stride=stride, padding=padding)
    if transposed:
        fused = functional.conv_transpose_block(
            *inputs[:2], output_padding=output_padding, **options
        )
    else:
        fused = functional.conv_block(*inputs[:2], **options)
    assert fused.stride() == plain.stride()
    if type(y.grad_fn) is type(plain.grad_fn):
        return  # PyTorch's own backward, with PyTorch's own formats.
    for dy_layout in (torch.contiguous_format, torch.channels_last):
        dy = torch.randn_like(plain).contiguous(memory_format=dy_layout)
        gradients = torch.autograd.grad(y, inputs[:2], dy, retain_graph=True)
        for gradient, tensor in zip(gradients, inputs[:2], strict=True):
            assert is_channels_last(gradient) == is_channels_last(tensor)


BATCH_NORMED = {
    "phases": (lambda: nn.ConvTranspose2d(8, 4, 4, 2, 1), (48, 8, 32, 32)),
    "product": (lambda: nn.ConvTranspose2d(12, 8, 4), (96, 12, 1, 1)),
    "one of many": (lambda: nn.Conv2d(8, 8, 3, 1, 1), (8, 8, 16, 16)),
}


@pytest.mark.parametrize("name", BATCH_NORMED)
def test_batch_norm_is_as_exact_as_pytorchs(name, on_cpu, every_way):
    """It sums channels_last memory less exactly, so contiguous memory must stay so before it."""
    build, shape = BATCH_NORMED[name]
    layer = build()
    ours = FusedSequential(layer, nn.BatchNorm2d(layer.out_channels), nn.ReLU())
    x = torch.randn(shape)
    assert functional.implementation(x) == "cpu"
    assert_module(ours, nn.Sequential(*copy.deepcopy(ours)), x)


def test_fused_sequential_runs_on_the_cpu(monkeypatch):
    """As where no kernel can run: the same numbers, formats and in-place safety as PyTorch."""
    monkeypatch.setattr(functional, "why_not_triton", lambda *_, **__: "no kernels here")
    ours = FusedSequential(
        nn.ConvTranspose2d(5, 6, 4, 1, 0, bias=False), nn.BatchNorm2d(6), nn.ReLU(True),
        nn.ConvTranspose2d(6, 3, 4, 2, 1), nn.Tanh(),
        nn.Conv2d(3, 4, 4, 2, 1), nn.LeakyReLU(0.2, True), nn.Conv2d(4, 1, 4),
    )  # fmt: skip
    stock = nn.Sequential(*copy.deepcopy(ours))
    z = torch.randn(3, 5, 1, 1)
    with use_backend("auto"):
        assert functional.implementation(z) == "cpu"
        y = ours(z).clone().add_(1)
    expected = stock(z).add_(1)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    assert y.stride() == expected.stride()
    y.sum().backward()
    expected.sum().backward()
    for p, q in zip(ours.parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    with use_backend("auto"):
        negative = functional.conv_block(
            z, torch.ones(2, 5, 1, 1), activation="leaky_relu", negative_slope=-0.5
        )
    torch.testing.assert_close(negative, F.leaky_relu(F.conv2d(z, torch.ones(2, 5, 1, 1)), -0.5))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_values_that_are_not_finite_stay_where_pytorch_has_them(value, every_way):
    x, weight = torch.randn(2, 8, 5, 5), torch.randn(8, 3, 4, 4)
    x[1, 2, 3, 3] = value
    y = cpu.conv_transpose2d(x, weight, None, (2, 2), (1, 1), (0, 0))
    expected = F.conv_transpose2d(x, weight, None, 2, 1)
    torch.testing.assert_close(y, expected, equal_nan=True)
