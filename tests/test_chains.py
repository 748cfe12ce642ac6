"""Blocks that execute as one chain: results, gradients, and what is kept for them."""

import copy

import pytest
import torch
from oracle import assert_module
from torch import nn
from torch.autograd import gradgradcheck
from torch.func import functional_call

from genfast.launch import start
from genfast.models import DCGANDiscriminator, DCGANGenerator
from genfast.nn import DiscriminatorBlock, FusedSequential, GeneratorBlock, statistics_groups

pytestmark = pytest.mark.kernels


def generator():
    return nn.Sequential(
        nn.ConvTranspose2d(6, 10, 2, 1, 0, bias=False),
        nn.BatchNorm2d(10),
        nn.ReLU(),
        nn.ConvTranspose2d(10, 8, 4, 2, 1, bias=False),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(0.1),
        nn.ConvTranspose2d(8, 3, 4, 2, 1),
        nn.Tanh(),
    )


def discriminator():
    return nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 16, 4, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.LeakyReLU(0.2),
        nn.Conv2d(16, 2, (3, 2), 1, 0),
    )


def mixed():
    """Biases before and without batch norm, each activation inside, no activation, odd sizes."""
    return nn.Sequential(
        nn.Conv2d(2, 7, 3, 2, 1),
        nn.Sigmoid(),
        nn.ConvTranspose2d(7, 6, (3, 2), (2, 1), 1, (1, 0)),
        nn.Tanh(),
        nn.Conv2d(6, 4, 2),
        nn.BatchNorm2d(4, affine=False),
        nn.ConvTranspose2d(4, 5, 3, 1, 1),
        nn.BatchNorm2d(5, track_running_stats=False),
        nn.Sigmoid(),
        nn.Conv2d(5, 3, 1),
        nn.LeakyReLU(0.3),
    )


NETWORKS = {generator: (2, 6, 1, 1), discriminator: (4, 3, 12, 8), mixed: (2, 2, 5, 6)}
CONVOLUTIONS = nn.Conv2d, nn.ConvTranspose2d
EACH = pytest.mark.parametrize(
    ("network", "shape"), NETWORKS.items(), ids=lambda value: getattr(value, "__name__", "")
)


def fused(stock):
    return FusedSequential(*copy.deepcopy(stock))


def chains(y):
    """The blocks of each chain in y's graph."""
    found, waiting, seen = [], [y.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "_ChainBackward":
            found.append(len(node.kinds))
        waiting.extend(following for following, _ in node.next_functions)
    return sorted(found)


@pytest.mark.one_in(2)
@EACH
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_chain_is_what_its_blocks_are(network, shape, training, memory_format, device):
    stock = network().to(device, memory_format=memory_format).train(training)
    ours = fused(stock)
    x = torch.randn(shape, device=device).to(memory_format=memory_format)
    y = ours(x)
    assert chains(y) == [sum(isinstance(m, CONVOLUTIONS) for m in stock)]
    assert y.stride() == stock(x).stride()
    assert_module(fused(stock), stock, x)


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(network, shape, dtype, device):
    """With smooth activations: where one has a kink, a rounding may turn a derivative over."""
    kinks = nn.ReLU, nn.LeakyReLU
    layers = [nn.Tanh() if isinstance(m, kinks) else m for m in network()]
    stock = nn.Sequential(*layers).to(device, dtype)
    assert_module(fused(stock), stock, torch.randn(shape, device=device, dtype=dtype))


@pytest.mark.float64
@pytest.mark.one_in(2)
@pytest.mark.parametrize("network", [discriminator, mixed])
def test_second_derivatives(network, device):
    model, shape = fused(network()).to(device, torch.float64), NETWORKS[network]
    parameters = dict(model.named_parameters())
    shapes = [p.shape for p in parameters.values()]

    def run(x, flat):
        """All parameters in one tensor: each further one costs several passes."""
        values = flat.split([shape.numel() for shape in shapes])
        state = {name: v.view(s) for name, v, s in zip(parameters, values, shapes, strict=True)}
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        return functional_call(model, (state, buffers), x)

    x = torch.randn(2, *shape[1:], dtype=torch.float64, device=device, requires_grad=True)
    flat = torch.cat([p.detach().flatten() for p in parameters.values()]).requires_grad_()
    assert gradgradcheck(run, (x, flat), fast_mode=True, check_undefined_grad=False)


@pytest.mark.float64
@EACH
def test_gradients_of_a_penalty(network, shape, device):
    """By running statistics, as some add it; the derivatives above are by the batch's."""
    stock = network().to(device, torch.float64).eval()
    found = []
    for model in (fused(stock), stock):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        x = x.to(device).requires_grad_()
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), (x, *model.parameters())))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)


@EACH
def test_no_gradient_that_nobody_wants(network, shape, device):
    """Whatever is frozen, the gradients that are left are the same, bit for bit.

    That of a weight at an image is summed in another order where x needs none.
    """
    model, x = fused(network()).to(device), torch.randn(shape, device=device)
    y = model(x.requires_grad_())
    dy = torch.randn_like(y)
    y.backward(dy)
    expected = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad}
    convolutions = [name for name, m in model.named_children() if isinstance(m, CONVOLUTIONS)]
    for trained in (None, *convolutions):
        need_x = trained is None
        leaf = x.detach().clone().requires_grad_(need_x)
        for name, p in model.named_parameters():
            p.grad = None
            # A batch norm is trained with the convolution before it.
            of = max((c for c in convolutions if int(c) <= int(name.partition(".")[0])), key=int)
            p.requires_grad_(of == trained)
        model(leaf).backward(dy)
        found = {name: p.grad for name, p in model.named_parameters()} | {"x": leaf.grad}
        for name, gradient in found.items():
            wanted = need_x if name == "x" else dict(model.named_parameters())[name].requires_grad
            assert (gradient is not None) == wanted, (name, trained)
            if network is discriminator and name == "0.weight" and wanted and not need_x:
                torch.testing.assert_close(gradient, expected[name])
            else:
                assert gradient is None or torch.equal(gradient, expected[name]), (name, trained)


def assert_groups_are_calls(network, shape, device):
    """Hold a pass over two groups to be two passes, one a group."""
    model = fused(network()).to(device, torch.float64)
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    x = torch.randn(2 * shape[0], *shape[1:], dtype=torch.float64, device=device)
    with statistics_groups(one, 2):
        together = one(x)
    dy = torch.randn_like(together)
    together.backward(dy)
    parts = [other(part) for part in x.chunk(2)]
    torch.cat(parts).backward(dy)
    torch.testing.assert_close(together, torch.cat(parts))
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    for (name, p), q in zip(one.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


@pytest.mark.float64
@EACH
def test_groups_are_calls(network, shape, device):
    assert_groups_are_calls(network, shape, device)


def kept_bytes(model, x):
    """What a forward keeps for backward, beside parameters, buffers and its input."""
    known = {t.untyped_storage().data_ptr() for t in (x, *model.parameters(), *model.buffers())}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(x)
    return sum(kept.values())


@pytest.mark.parametrize(
    ("model", "shape", "most"),
    [(DCGANGenerator, (2, 100, 1, 1), 0.55), (DCGANDiscriminator, (2, 3, 64, 64), 0.70)],
)
def test_one_tensor_a_block_is_kept(model, shape, most, device, monkeypatch):
    """Beside PyTorch's layers with activations in place, which keep what batch norm returns too."""
    ours = model().to(device)
    stock = nn.Sequential(*copy.deepcopy(ours.main))
    for module in stock:
        if hasattr(module, "inplace"):
            module.inplace = True
    x = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
    # What is kept does not depend on what is computed.
    monkeypatch.setattr(start, "kernel", lambda *_, **__: None)
    found, stocks = kept_bytes(ours, x), kept_bytes(stock, x)
    assert 0.5 * stocks < found <= most * stocks, f"{found / stocks:.3f}"


@EACH
def test_backward_as_often_as_one_likes(network, shape, device):
    model, x = fused(network()).to(device), torch.randn(shape, device=device)
    y = model(x)
    dy = torch.randn_like(y)
    first, second = (
        torch.autograd.grad(y, list(model.parameters()), dy, retain_graph=True) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
    with torch.autograd.graph.save_on_cpu():  # Which hands out copies of what was saved.
        y = model(x)
    third = torch.autograd.grad(y, list(model.parameters()), dy)
    assert all(map(torch.equal, first, third))


@EACH
def test_the_output_may_be_changed(network, shape, device):
    """PyTorch forbids it after tanh alone."""
    stock = network().to(device, memory_format=torch.channels_last)
    ours = fused(stock)
    x = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
    y = stock(x).clone().mul_(2)
    expected = torch.autograd.grad(y.square().sum(), list(stock.parameters()))
    y = ours(x)
    y.mul_(2)
    if network is generator:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.square().sum().backward()
        return
    found = torch.autograd.grad(y.square().sum(), list(ours.parameters()))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_a_chain_breaks_where_somebody_looks(device):
    model, x = fused(generator()).to(device), torch.randn(2, 6, 1, 1, device=device)
    expected = model.eval()(x)
    assert chains(expected) == [3]
    seen = []
    handle = model[4].register_forward_hook(lambda *found: seen.append(found[-1]))
    torch.testing.assert_close(model(x), expected)
    assert len(seen) == 1 and chains(model(x)) == [1, 2]
    handle.remove()
    assert chains(model(x)) == [3]
    del model[3:6]  # The middle taken out.
    model[3] = nn.ConvTranspose2d(10, 3, 4, 2, 1, device=device)
    assert chains(model(x)) == [2]


def test_blocks_are_links_of_a_chain(device):
    blocks = FusedSequential(GeneratorBlock(3, 8, 4, 1, 0), DiscriminatorBlock(8, 5, 3, 1, 1))
    layers = nn.Sequential(
        nn.ConvTranspose2d(3, 8, 4, 1, 0, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 5, 3, 1, 1, bias=False), nn.BatchNorm2d(5), nn.LeakyReLU(0.2),
    )  # fmt: skip
    for mine, stock in zip(blocks, (layers[:3], layers[3:]), strict=True):
        mine.conv.load_state_dict(stock[0].state_dict())
    x = torch.randn(4, 3, 1, 1, device=device)
    y = blocks.to(device)(x)
    assert chains(y) == [2]
    torch.testing.assert_close(y, layers.to(device)(x))
    blocks[0].norm.register_forward_hook(lambda *_: None)
    assert chains(blocks(x)) == [1]
