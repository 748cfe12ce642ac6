"""Instance norm, group norm, and norms that follow no convolution, against float64."""

import copy
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, DTYPES, LAYOUTS, pairwise
from oracle import (
    BEND_MARGIN,
    DRAWS,
    assert_close,
    assert_module,
    assert_stable_statistics,
    largest_error,
)
from test_chains import assert_groups_are_calls, chains, fused
from test_layout import Watched
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from genfast import functional, reference, use_backend
from genfast.launch import conv, norm, passes, start, tape
from genfast.nn import FusedSequential
from genfast.training.steps import joining
from genfast.training.steps.layers import treats_images_one_by_one

pytestmark = pytest.mark.kernels

PARAMETERS = ("x", "weight", "bias", "norm_weight", "norm_bias")
STATISTICS = ("running_mean", "running_var")
# Convolutions of 3 x 3 with padding: a `conv2d` of stride 2, a `conv_transpose2d` of stride 1.
STRIDES = {"conv": 2, "transposed": 1}


@dataclass(frozen=True)
class Case:
    """One call of `norm_block`, or of a convolution's block with such a norm.

    shape: of x; with a convolution (N, C, H, W).
    convolution: None, or a key of `STRIDES`.
    channels: what is normalised, and with a convolution its output's.
    norm_groups: of "group".
    tracking: whether batch norm has running statistics.
    groups: the batch norm's statistics groups.
    widens: whether group norm gives float32, as under CUDA's autocast.
    """

    norm: str
    shape: tuple[int, ...]
    convolution: str | None = None
    channels: int = 6
    norm_groups: int = 1
    activation: str = "relu"
    dtype: torch.dtype = torch.float32
    affine: bool = True
    bias: bool = False
    norm_in_float32: bool = False
    layout: str = "contiguous"
    dy_layout: str = "contiguous"
    eps: float = 1e-5
    training: bool = True
    tracking: bool = True
    groups: int = 1
    widens: bool = False

    def __str__(self):
        dtype = str(self.dtype).removeprefix("torch.")
        size = "x".join(map(str, (*self.shape, self.channels)))
        mode = "training" if self.training else "evaluation"
        of = f"{self.norm}{self.norm_groups if self.norm == 'group' else ''}"
        parts = (of, self.convolution, size, dtype, self.activation, self.layout, mode)
        return "-".join(str(part) for part in parts if part)

    def tensors(self, device):
        """The tensor arguments by name, contiguous."""
        c, values = self.channels, dict.fromkeys((*PARAMETERS, *STATISTICS))
        values["x"] = torch.randn(self.shape) + 0.3
        if self.convolution:
            c_in = self.shape[1]
            shape = (c, c_in, 3, 3) if self.convolution == "conv" else (c_in, c, 3, 3)
            weight = torch.randn(shape)
            # No channel may nearly vanish: a norm would blow up its rounding errors.
            values["weight"] = (weight + weight.sign() / 2) * (9 * c_in) ** -0.5
            values["bias"] = torch.randn(c) if self.bias else None
        if self.affine:
            values["norm_weight"] = 1 + 0.3 * torch.randn(c)
            values["norm_bias"] = 0.3 * torch.randn(c)
        if self.norm == "batch" and self.tracking:
            values["running_mean"] = 0.3 * torch.randn(c)
            values["running_var"] = 0.5 + torch.rand(c)
        vectors = (*PARAMETERS[3:], *STATISTICS)
        return {
            n: t if t is None else t.to(device, self._dtype_of(n in vectors))
            for n, t in values.items()
        }

    def _dtype_of(self, is_vector):
        return torch.float32 if is_vector and self.norm_in_float32 else self.dtype

    @property
    def options(self):
        return dict(
            norm=self.norm,
            eps=self.eps,
            activation=self.activation,
            negative_slope=0.2,
            norm_groups=self.norm_groups,
        ) | (
            dict(training=self.training, momentum=0.3, statistics_groups=self.groups)
            if self.norm == "batch"
            else {}
        )

    def run(self, tensors):
        """The function under test."""
        tensors = dict(tensors)
        if self.convolution is None:
            del tensors["weight"], tensors["bias"]
            return functional.norm_block(tensors.pop("x"), **tensors, **self.options)
        block = functional.conv_block
        if self.convolution == "transposed":
            block = functional.conv_transpose_block
        first = [tensors.pop(name) for name in PARAMETERS[:3]]
        return block(*first, STRIDES[self.convolution], 1, **tensors, **self.options)

    def convolved(self, t):
        if self.convolution is None:
            return t["x"]
        convolve = F.conv2d if self.convolution == "conv" else F.conv_transpose2d
        return convolve(t["x"], t["weight"], t["bias"], STRIDES[self.convolution], 1)

    def eager(self, t):
        """PyTorch's layers."""
        z = self.convolved(t)
        affine = t["norm_weight"], t["norm_bias"]
        if self.norm == "instance":
            u = F.instance_norm(z, None, None, *affine, eps=self.eps)
        elif self.norm == "group":
            if self.widens:
                z, *affine = (t if t is None else t.float() for t in (z, *affine))
            u = F.group_norm(z, self.norm_groups, *affine, self.eps)
        else:
            by_batch = self.training or not self.tracking
            running = t["running_mean"], t["running_var"]
            u = torch.cat([
                F.batch_norm(part, *running, *affine, by_batch, 0.3, self.eps)
                for part in z.chunk(self.groups if by_batch else 1)
            ])  # fmt: skip
        return reference.activate(u, self.activation, 0.2)

    def exact(self, t):
        """The formulas."""
        z = self.convolved(t)
        if self.norm == "batch":
            u = self._exact_batch_norm(z, t)
        else:
            n, c = z.shape[:2]
            parts = self.norm_groups if self.norm == "group" else c
            values = z.reshape(n, parts, -1)
            var, mean = torch.var_mean(values, 2, correction=0, keepdim=True)
            u = ((values - mean) * (var + self.eps).rsqrt()).reshape(z.shape)
        per_channel = (-1, *[1] * (z.dim() - 2))
        if t["norm_weight"] is not None:
            u = u * t["norm_weight"].view(per_channel) + t["norm_bias"].view(per_channel)
        slopes = {"relu": 0.0, "leaky_relu": 0.2, "identity": 1.0}
        if self.activation in slopes:
            return torch.where(u > 0, u, slopes[self.activation] * u)
        return {"tanh": torch.tanh, "sigmoid": torch.sigmoid}[self.activation](u)

    def _exact_batch_norm(self, z, t):
        dims, shape = (0, *range(2, z.dim())), (1, -1, *[1] * (z.dim() - 2))
        if not self.training and self.tracking:
            mean, var = (t[name].view(shape) for name in STATISTICS)
            return (z - mean) * (var + self.eps).rsqrt()
        found = []
        for part in z.chunk(self.groups):
            var, mean = torch.var_mean(part, dims, correction=0, keepdim=True)
            found.append((part - mean) * (var + self.eps).rsqrt())
            if self.tracking:
                unbiased = part.detach().var(dims, correction=1)
                for name, new in zip(STATISTICS, (mean.detach().flatten(), unbiased), strict=True):
                    t[name].lerp_(new, 0.3)
        return torch.cat(found)


def results(run, tensors, dy, frozen=()):
    """Output, gradients and running statistics by name; the tensors do not change."""
    given = {n: t if t is None else t.detach() for n, t in tensors.items()}
    given |= {n: given[n].clone() for n in STATISTICS if given[n] is not None}
    leaves = {
        n: given[n].requires_grad_() for n in PARAMETERS if given[n] is not None and n not in frozen
    }
    y = run(given)
    found = {"output": y.detach(), **{n: given[n] for n in STATISTICS}}
    gradients = torch.autograd.grad(y, list(leaves.values()), dy.to(y.dtype))
    return found | {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}


def laid(t, name):
    return LAYOUTS[name](t) if t.dim() == 4 else t


def upstream(case, tensors):
    """A gradient for the output, 0 next to the bend of an activation."""
    linear = Case(**vars(case) | dict(activation="identity"))
    with torch.no_grad():
        eager, exact = linear.eager(_copies(tensors, _narrow)), linear.exact(_doubles(tensors))
    clear = exact.abs() > BEND_MARGIN * largest_error(eager, exact)
    assert clear.double().mean() > 0.5, "too few values are left to compare gradients at"
    return torch.randn_like(eager) * clear


def _narrow(t):
    return t.float() if t.dtype == torch.float64 else t.clone()


def _copies(tensors, convert):
    return {n: t if t is None else convert(t) for n, t in tensors.items()}


def _doubles(tensors):
    return _copies(_copies(tensors, _narrow), lambda t: t.double())


def assert_case(case, device):
    """By the rule of tests/oracle.py. Eager PyTorch gets contiguous memory: see genfast/layout."""
    tensors = case.tensors(device)
    dy = upstream(case, tensors)
    lying = tensors | {"x": laid(tensors["x"], case.layout)}
    ours = results(case.run, lying, laid(dy, case.dy_layout))
    exact = results(case.exact, _copies(tensors, torch.Tensor.double), dy)
    samples = []
    for draw in range(DRAWS):
        others = tensors if draw == 0 else case.tensors(device)
        of = dy if draw == 0 else upstream(case, others)
        eager = results(case.eager, _copies(others, _narrow), of)
        samples.append((eager, results(case.exact, _doubles(others), of)))
    assert_close(ours, exact, samples)
    return ours


CONVOLVED = [
    Case(**row)
    for row in pairwise(
        dict(
            convolution=list(STRIDES),
            norm=["instance", "group"],
            shape=[(3, 4, 7, 9), (1, 3, 13, 11), (2, 5, 3, 4)],
            channels=[6, 18],
            norm_groups=[1, 2, 3, 6],
            activation=ACTIVATIONS,
            dtype=DTYPES,
            affine=[True, False],
            bias=[False, True],
            norm_in_float32=[False, True],
            layout=["contiguous", "channels_last", "sliced"],
            dy_layout=["contiguous", "channels_last", "sliced"],
            eps=[1e-5, 1e-2],
        )
    )
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", CONVOLVED, ids=str)
def test_after_a_convolution(case, device):
    assert_case(case, device)


ALONE = [
    Case(**row | dict(channels=row["shape"][1]))
    for row in pairwise(
        dict(
            norm=["batch", "instance", "group"],
            shape=[(3, 6, 7, 9), (4, 12, 9), (2, 18, 3, 5), (1, 6, 11, 8), (6, 30, 4, 4)],
            norm_groups=[1, 2, 6],
            activation=ACTIVATIONS,
            dtype=DTYPES,
            affine=[True, False],
            norm_in_float32=[False, True],
            layout=["contiguous", "channels_last", "sliced", "permuted"],
            dy_layout=["contiguous", "channels_last", "sliced"],
            eps=[1e-5, 1e-2],
            training=[True, False],
            tracking=[True, False],
        )
    )
] + [
    Case("batch", (9, 5), channels=5, activation="leaky_relu"),
    Case("batch", (9, 40), channels=40, dtype=torch.bfloat16, activation="tanh"),
    Case("batch", (9, 5), channels=5, training=False, dtype=torch.float16),
    Case("group", (3, 12), channels=12, norm_groups=3),
    Case("group", (2, 40, 3, 3), channels=40, norm_groups=1),
    Case("batch", (6, 5, 4, 7), channels=5, groups=3),
    Case("batch", (6, 5, 4, 7), channels=5, groups=3, layout="channels_last"),
    Case("batch", (6, 5), channels=5, groups=2),
    Case("batch", (8, 3, 5), channels=3, groups=2, tracking=False),
    # More than one tile of the pixels of a channel, the last in part.
    Case("batch", (2, 3, 9, 19), channels=3),
    Case("instance", (2, 20, 9, 19), channels=20, dtype=torch.bfloat16),
]  # fmt: skip


@pytest.mark.parametrize("case", ALONE, ids=str)
def test_alone(case, device):
    assert_case(case, device)


@pytest.mark.parametrize("of", ["instance", "group", "batch"])
@pytest.mark.parametrize("convolution", [None, "conv"])
def test_few_programs_share_long_sums(of, convolution, device, monkeypatch):
    # As on a GPU with large tensors: programs sum several tiles, in several rounds.
    monkeypatch.setattr(passes, "programs", lambda tensor, each: 1)
    monkeypatch.setattr(norm, "_PARTS_ADDED_BY_ALL", 1)
    monkeypatch.setattr(norm, "_STATISTICS_CHUNK", 3)
    monkeypatch.setattr(norm, "_SHARED_CHUNK", 4)
    shape = (2, 4, 21, 23) if convolution else (2, 6, 21, 23)
    for layout in ("contiguous", "channels_last"):
        assert_case(Case(of, shape, convolution, norm_groups=3, layout=layout), device)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("of", ["instance", "group"])
def test_sums_with_the_product_or_by_a_pass(apart, of, device, started, monkeypatch):
    """In a chain: forward's statistics, and the sums of the gradient of the layer below."""
    monkeypatch.setattr(conv, "sums_apart", lambda *_: apart)
    layers = [nn.Conv2d(3, 8, 3, 1, 1), norm_layer(of, 8), nn.LeakyReLU(0.2)]
    layers += [nn.ConvTranspose2d(8, 6, 4, 2, 1), norm_layer(of, 6), nn.Tanh()]
    stock = nn.Sequential(*layers, nn.Conv2d(6, 2, 3)).to(device)
    x = torch.randn(3, 3, 3, 4, device=device)
    assert_module(fused(stock), stock, x)
    started.clear()
    fused(stock)(x).sum().backward()
    for kernel in ("tile_statistics", "norm_backward_reduce"):
        assert started.count(kernel) == (2 if apart else 0), kernel


def test_small_images_are_summed_by_a_pass(monkeypatch):
    """By the model, as on an H100: a tile of 64 pixels holds one image of 16 and nothing else."""
    monkeypatch.setattr(start, "architecture", lambda tensor: "sm_90")
    weight = torch.empty(256, 256, 3, 3, dtype=torch.bfloat16)

    def apart(size, images):
        geometry = functional.ConvGeometry.conv((size, size), (3, 3), (1, 1), (1, 1))
        x = torch.empty(images, 256, size, size, dtype=torch.bfloat16)
        return [
            conv.sums_apart(operation, x, weight, geometry, reads)
            for operation, reads in (("fprop", False), ("dgrad", True))
        ]

    assert apart(4, 64) == [True, True]
    assert apart(64, 16) == apart(16, 16) == [False, False]
    assert apart(4, 1) == [False, False]
    assert all(apart(8, 33) == apart(8, images) for images in (32, 97, 2000))


def norm_layer(of, channels, **options):
    if of == "group":
        return nn.GroupNorm(2, channels, **options)
    return {"instance": nn.InstanceNorm2d, "batch": nn.BatchNorm2d}[of](channels, **options)


def randomized(module):
    """With parameters of norms that are not 1 and 0."""
    for m in module.modules():
        if not isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            for p in m.parameters(recurse=False):
                p.data.add_(0.3 * torch.randn_like(p))
    return module


def residual_branch():
    """Of a CycleGAN's generator, twice instance norm, in part affine."""
    return nn.Sequential(
        nn.Conv2d(5, 8, 3, 1, 1),
        nn.InstanceNorm2d(8),
        nn.ReLU(True),
        nn.Conv2d(8, 6, 3, 2, 1),
        nn.InstanceNorm2d(6, affine=True),
        nn.LeakyReLU(0.2, True),
    )


def diffusion_like():
    """Group norm before and after convolutions."""
    return nn.Sequential(
        nn.GroupNorm(5, 5),
        nn.ReLU(),
        nn.Conv2d(5, 12, 3, 1, 1),
        nn.GroupNorm(3, 12),
        nn.Sigmoid(),
        nn.ConvTranspose2d(12, 4, 4, 2, 1),
        nn.GroupNorm(1, 4, affine=False),
    )


def preactivation():
    """Batch norm before each convolution, pooled at the end, then with a linear layer."""
    return nn.Sequential(
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 6, 3, 1, 1),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(0.3),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(6, momentum=None),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, 7),
        nn.BatchNorm1d(7),
        nn.ReLU(),
        nn.Linear(7, 3, bias=False),
        nn.BatchNorm1d(3, affine=False),
    )


# The blocks of each chain, and how many norms follow no convolution.
NETWORKS = {residual_branch: ([2], 0), diffusion_like: ([2], 1), preactivation: ([1], 4)}
EACH = pytest.mark.parametrize("network", NETWORKS, ids=lambda f: f.__name__)
SHAPE = (3, 5, 4, 4)


def alone(y):
    """How many norms that follow no convolution are in y's graph."""
    found, waiting, seen = 0, [y.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += node.name() == "_NormalizationBackward"
        waiting.extend(following for following, _ in node.next_functions)
    return found


@pytest.mark.one_in(3)
@EACH
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_networks(network, training, memory_format, device):
    stock = randomized(network()).to(device, memory_format=memory_format).train(training)
    x = torch.randn(SHAPE, device=device).to(memory_format=memory_format).requires_grad_()
    y = fused(stock)(x)
    assert (chains(y), alone(y)) == NETWORKS[network]
    assert y.stride() == copy.deepcopy(stock)(x).stride()
    assert_module(fused(stock), stock, x.detach())


@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_networks_in_half_precision(network, dtype, device):
    """With smooth activations: where one has a kink, a rounding may turn a derivative over."""
    kinks = nn.ReLU, nn.LeakyReLU, nn.MaxPool2d
    smooth = {nn.ReLU: nn.Tanh, nn.LeakyReLU: nn.Tanh, nn.MaxPool2d: lambda: nn.AvgPool2d(2)}
    layers = [smooth[type(m)]() if isinstance(m, kinks) else m for m in network()]
    stock = randomized(nn.Sequential(*layers)).to(device, dtype)
    assert_module(fused(stock), stock, torch.randn(SHAPE, device=device, dtype=dtype))


@pytest.mark.one_in(3)
@EACH
def test_no_gradient_that_nobody_wants(network, device):
    """Whatever is frozen, the gradients that are left are the same, bit for bit."""
    model, x = fused(randomized(network())).to(device), torch.randn(SHAPE, device=device)
    y = model(x.requires_grad_())
    dy = torch.randn_like(y)
    y.backward(dy)
    expected = {name: p.grad for name, p in model.named_parameters()} | {"x": x.grad}
    for trained in [*expected][::2] + ["x"]:
        leaf = x.detach().clone().requires_grad_(trained == "x")
        for name, p in model.named_parameters():
            p.grad = None
            p.requires_grad_(name == trained)
        model(leaf).backward(dy)
        found = {name: p.grad for name, p in model.named_parameters()} | {"x": leaf.grad}
        for name, gradient in found.items():
            assert (gradient is not None) == (name == trained), (name, trained)
            assert gradient is None or torch.equal(gradient, expected[name]), (name, trained)


@pytest.mark.float64
@pytest.mark.one_in(3)
@EACH
def test_groups_are_calls(network, device):
    assert_groups_are_calls(network, SHAPE, device)


@pytest.mark.one_in(3)
@EACH
def test_again_and_again(network, device, monkeypatch):
    """Run, recorded and replayed: the same bits, and those of no tape."""
    stock = randomized(network()).to(device)
    draws = [torch.randn(SHAPE, device=device) for _ in range(3)]

    def train():
        model, found = fused(stock), []
        for x in draws:
            x = x.clone().requires_grad_()
            y = model(x)
            gradients = torch.autograd.grad(y.square().sum(), [x, *model.parameters()])
            found += [y.detach(), *gradients, *(b.clone() for b in model.buffers())]
        return found

    ours = train()
    assert any(isinstance(value, tape.Tape) for value in tape._tapes.values())
    monkeypatch.setattr(tape, "run", lambda function, tensors, *s, **_: function(tensors, *s))
    for mine, theirs in zip(ours, train(), strict=True):
        assert torch.equal(mine, theirs) and mine.stride() == theirs.stride()


TWICE = [
    Case("instance", (2, 2, 3, 3), "conv", 3, activation="tanh", bias=True, dtype=torch.float64),
    Case("group", (2, 2, 2, 2), "transposed", 4, 2, "sigmoid", bias=True, dtype=torch.float64),
    Case("batch", (3, 2, 2, 3), None, 2, activation="leaky_relu", dtype=torch.float64),
    Case("batch", (4, 3), None, 3, activation="tanh", dtype=torch.float64, tracking=False),
    Case("batch", (2, 3, 4), None, 3, training=False, dtype=torch.float64, activation="sigmoid"),
    Case("batch", (4, 2, 3), None, 2, tracking=False, groups=2, dtype=torch.float64),
    Case("instance", (1, 3, 2, 3), None, 3, dtype=torch.float64, activation="tanh"),
    Case("group", (2, 4, 2, 2), None, 4, 2, dtype=torch.float64, layout="channels_last"),
]


@pytest.mark.one_in(3)
@pytest.mark.float64
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("case", TWICE, ids=str)
def test_derivatives(case, check, device):
    tensors = case.tensors(device)
    tensors["x"] = laid(tensors["x"], case.layout)
    names = [n for n in PARAMETERS if tensors[n] is not None]
    inputs = [tensors[n].requires_grad_() for n in names]

    def run(*inputs):
        # A function that is checked has no side effects.
        running = {n: t if t is None else t.clone() for n, t in tensors.items() if n in STATISTICS}
        return case.run(tensors | dict(zip(names, inputs, strict=True)) | running)

    # A gradient that nobody gave is looked at once.
    options = {} if check is gradcheck else dict(check_undefined_grad=False)
    assert check(run, inputs, fast_mode=True, **options)


LONE = {
    "batch 4-d": (nn.BatchNorm2d(6), (3, 6, 4, 5)),
    "batch 3-d": (nn.BatchNorm1d(6), (3, 6, 5)),
    "batch 2-d": (nn.BatchNorm1d(6), (3, 6)),
    "instance": (nn.InstanceNorm2d(6), (3, 6, 4, 5)),
    "group": (nn.GroupNorm(2, 6), (3, 6, 4, 5)),
    "one channel": (nn.BatchNorm2d(1), (3, 1, 4, 5)),
    "one pixel": (nn.BatchNorm2d(6), (3, 6, 1, 1)),
}
FORMATS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize(
    ("name", "layout", "convolved"),
    [
        (name, layout, convolved)
        for name, (_, shape) in LONE.items()
        for layout in FORMATS
        for convolved in (False, True)
        # Convolutions and formats are of images.
        if len(shape) == 4 or (layout == "contiguous" and not convolved)
    ],
)
def test_outputs_and_gradients_have_pytorchs_strides(name, layout, convolved, device):
    layer, shape = LONE[name]
    layers = [nn.Conv2d(shape[1], shape[1], 1)] if convolved else []
    stock = nn.Sequential(*layers, copy.deepcopy(layer), nn.ReLU()).to(device)
    x = FORMATS[layout](torch.randn(shape, device=device)).requires_grad_()
    ours, expected = fused(stock)(x), stock(x)
    assert ours.stride() == expected.stride()
    for given in FORMATS if len(shape) == 4 else ("contiguous",):
        seen = []
        y = fused(stock)(Watched.apply(x, seen))
        y.backward(FORMATS[given](torch.randn(shape, device=device)))
        assert seen == [x.stride()], given


class Copies(TorchDispatchMode):
    """Notes the operations that move elements elsewhere."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("clone", "copy_", "_to_copy", "contiguous", "cat"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        (name, layout)
        for name in ("batch 4-d", "batch 3-d", "batch 2-d", "instance", "group")
        for layout in FORMATS
        # PyTorch's instance norm makes it contiguous, and others are no images.
        if layout == "contiguous" or name in ("batch 4-d", "group")
    ],
)
def test_nothing_is_transposed(name, layout, device, monkeypatch):
    """Neither way, for contiguous memory and for channels_last."""
    layer, shape = LONE[name]
    x = FORMATS[layout](torch.randn(shape, device=device)).requires_grad_()
    dy = FORMATS[layout](torch.randn(shape, device=device))
    # What the interpreter does inside is no part of it.
    monkeypatch.setattr(start, "kernel", lambda *_, **__: None)
    model = fused([layer, nn.ReLU()]).to(device)
    with Copies() as copies:
        model(x).backward(dy)
    assert copies.found == []
    with Copies() as copies:
        x.detach().transpose(-1, -2).contiguous()
    assert copies.found == ["clone"]


def test_what_only_a_convolution_sees_stays_channels_last(device, monkeypatch):
    """Where the output of PyTorch's instance norm would be contiguous."""
    layers = nn.InstanceNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU()
    stock = nn.Sequential(*layers).to(device, memory_format=torch.channels_last)
    x = FORMATS["channels_last"](torch.randn(3, 4, 5, 5, device=device)).requires_grad_()
    ours, theirs = fused(stock)(x), stock(x)
    torch.testing.assert_close(ours, theirs)
    assert ours.stride() == theirs.stride()
    monkeypatch.setattr(start, "kernel", lambda *_, **__: None)
    model, dy = fused(stock), torch.randn_like(theirs)
    with Copies() as copies:
        model(x).backward(dy)
    assert copies.found == []
    # Contiguous weights leave the format to what comes in: there it must be PyTorch's.
    contiguous = nn.Sequential(nn.InstanceNorm2d(4), nn.Conv2d(4, 6, 3)).to(device)
    assert fused(contiguous)(x).stride() == contiguous(x).stride()


def test_norms_of_images_are_not_summed_in_turn(device, monkeypatch):
    """No program goes through hundreds of images."""
    launches, run = {}, start.kernel

    def starting(kernel, grid, **arguments):
        launches[kernel.__name__] = grid, arguments
        return run(kernel, grid, **arguments)

    monkeypatch.setattr(start, "kernel", starting)
    x = torch.randn(9, 3, 2, 3, device=device, requires_grad=True)
    layer = nn.InstanceNorm2d(3, affine=True).to(device)
    fused([layer, nn.ReLU()])(x).sum().backward()
    grid, arguments = launches["batch_statistics"]
    assert grid[1] == 9 and arguments["groups"] == 1
    _, arguments = launches["norm_backward"]
    assert not arguments["WRITES_TOTAL"] and "sum_partials" in launches


def test_nobody_sums_what_nobody_wants(device, started):
    x = torch.randn(9, 3, 2, 3, device=device, requires_grad=True)
    fused([nn.InstanceNorm2d(3), nn.ReLU()])(x).sum().backward()
    assert started == [
        "tile_statistics", "batch_statistics", "normalize_activate", "norm_backward_reduce",
        "norm_backward",
    ]  # fmt: skip
    started.clear()
    layer = nn.BatchNorm2d(3, affine=False).to(device).eval()
    fused([layer, nn.ReLU()])(x).sum().backward()
    assert started == ["known_statistics", "normalize_activate", "norm_backward"]


@pytest.mark.parametrize("layout", FORMATS)
def test_shared_statistics_are_stable(layout, device, monkeypatch):
    """A thousand deviations from 0, of channels whose means differ, in parts of several tiles."""
    monkeypatch.setattr(passes, "programs", lambda tensor, each: 1)
    z = FORMATS[layout](torch.randn(2, 6, 18, 19, device=device) + 1000)
    z += torch.arange(6.0, device=device)[:, None, None] / 8
    vectors = norm.batch_statistics(norm.statistics_of(z, 2), None, None, 1e-9, span=3)
    for image, (mean, var, rstd, *_) in zip(z, vectors, strict=True):
        for c in (0, 3):
            part = image[c : c + 3]
            assert all(len(row[c : c + 3].unique()) == 1 for row in (mean, var, rstd))
            assert_stable_statistics(part, mean[c], var[c], (part - mean[c]) * rstd[c])


X = torch.ones(2, 4, 3, 3)
WEIGHT = torch.ones(4, 4, 3, 3)
ERRORS = {
    "norm": (dict(norm="layer"), X, ValueError, r"\('batch', 'instance', 'group'\), got 'layer'"),
    "rank": ({}, torch.ones(4), ValueError, r"\(N, C\), .*got shape \(4,\)"),
    "integers": ({}, X.int(), TypeError, "floating point, got torch.int32"),
    "activation": (dict(activation="swish"), X, ValueError, "activation among .*'swish'"),
    "gamma": (dict(norm_weight=torch.ones(3)), X, ValueError, r"norm_weight of shape \(4,\).*3"),
    "device": (dict(norm_bias=torch.ones(4, device="meta")), X, ValueError, "norm_bias.*meta"),
    "running_mean alone": (dict(running_mean=torch.ones(4)), X, ValueError, "only one of them"),
    "counter": (dict(num_batches_tracked=torch.tensor(0.0)), X, TypeError, "int64 scalar"),
    "one value": ({}, X[:1, :, :1, :1], ValueError, "more than 1 value per channel.*1 x 1 x 1"),
    "no norm": (dict(norm=False), X, ValueError, "expected a norm among .*, got False"),
    "one row": ({}, torch.ones(1, 4), ValueError, "more than 1 value per channel.*1 x 1 pixels"),
    "groups": (dict(statistics_groups=3), X, ValueError, "2 images and 3 groups"),
    "channels": (dict(norm="group", norm_groups=3), X, ValueError, "4 channels and 3 groups"),
    "no groups": (dict(norm="group", norm_groups=0), X, ValueError, "4 channels and 0 groups"),
    "one pixel": (
        dict(norm="instance"), X[:, :, :1, :1], ValueError,
        "more than 1 spatial element.*2 x 1 x 1",
    ),
    "one value of a group": (
        dict(norm="group", norm_groups=4), X[:1, :, :1, :1], ValueError,
        "more than 1 value per group of channels.*1 x 1 x 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("name", ERRORS)
def test_bad_input(name, backend, monkeypatch):
    options, x, error, message = ERRORS[name]
    monkeypatch.setattr(start, "kernel", mock.Mock(side_effect=AssertionError("started")))
    with use_backend(backend), pytest.raises(error, match=message) as raised:
        functional.norm_block(x, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("of", ["instance", "group"])
def test_one_pixel_after_a_convolution(of, device):
    """Raises where PyTorch does."""
    x, weight = torch.ones(2, 4, 3, 3, device=device), WEIGHT.to(device)
    if of == "instance":
        with pytest.raises(ValueError, match="more than 1 spatial element.*2 x 1 x 1"):
            functional.conv_block(x, weight, norm=of)
        with pytest.raises(ValueError, match="more than 1 spatial element"):
            F.instance_norm(F.conv2d(x, weight))
        return
    # A group of one value has a variance of 0.
    ours = functional.conv_block(x, weight, norm=of, norm_groups=4)
    torch.testing.assert_close(ours, F.group_norm(F.conv2d(x, weight), 4))
    with pytest.raises(ValueError, match="more than 1 value per group"):
        functional.conv_block(x[:1], weight, norm=of, norm_groups=4)
    with pytest.raises(ValueError, match="more than 1 value"):
        F.group_norm(F.conv2d(x[:1], weight), 4)


def test_what_fuses():
    tracking = nn.InstanceNorm2d(4, track_running_stats=True)
    hooked = nn.GroupNorm(2, 4)
    hooked.register_forward_hook(lambda *_: None)
    model = FusedSequential(
        nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4), nn.Tanh(),
        nn.Conv2d(4, 4, 3), tracking, nn.ReLU(), nn.Conv2d(4, 4, 3), hooked, nn.BatchNorm2d(4),
        nn.LeakyReLU(-1.0), nn.LayerNorm(4), nn.BatchNorm1d(4), nn.Sigmoid(),
    )  # fmt: skip
    found = [(run.layers, run.fused, run.reason) for run in model.plan()]
    assert found == [
        ("Conv2d + InstanceNorm2d + ReLU", True, ""),
        ("GroupNorm + Tanh", True, ""),
        ("Conv2d", True, "InstanceNorm2d '6' stays out: it keeps running statistics"),
        ("InstanceNorm2d", False, "it keeps running statistics"),
        ("ReLU", False, ""),
        ("Conv2d", True, "GroupNorm '9' stays out: it has a hook"),
        ("GroupNorm", False, "it has a hook"),
        ("BatchNorm2d", True, "LeakyReLU '11' stays out: its negative slope -1.0 is below 0"),
        ("LeakyReLU", False, ""),
        ("LayerNorm", False, ""),
        ("BatchNorm1d + Sigmoid", True, ""),
    ]


def test_what_is_no_batch_of_images_is_pytorchs(device):
    """Images without a batch, and the errors of PyTorch's own layers."""
    layer = nn.InstanceNorm2d(4)
    x = torch.randn(4, 3, 3, device=device)
    torch.testing.assert_close(FusedSequential(layer)(x), layer(x))
    with pytest.raises(ValueError, match="expected 4D input"):
        FusedSequential(nn.BatchNorm2d(4))(x)


@EACH
def test_pytorchs_own_layers_where_there_are_no_kernels(network, monkeypatch):
    """On a CPU, and with the backend "reference": the same bits, and none of our functions."""
    monkeypatch.setattr(functional, "why_not_triton", lambda *_, **__: "no kernels here")
    monkeypatch.setattr(functional, "normalize", mock.Mock(side_effect=AssertionError("ours")))
    stock, x = randomized(network()), torch.randn(SHAPE)
    for backend in ("auto", "reference"):
        models = fused(stock), copy.deepcopy(stock)
        with use_backend(backend):
            ours, expected = (model(x) for model in models)
        assert torch.equal(ours, expected)
        for mine, theirs in zip(*(m.buffers() for m in models), strict=True):
            assert torch.equal(mine, theirs)


def test_functional_where_there_are_no_kernels():
    x = torch.randn(3, 4, 5, 5)
    with use_backend("reference"):
        for of, options in (("instance", {}), ("group", dict(norm_groups=2)), ("batch", {})):
            y = functional.norm_block(x, norm=of, activation="leaky_relu", **options)
            expected = {
                "instance": F.instance_norm(x),
                "group": F.group_norm(x, 2),
                "batch": F.batch_norm(x, None, None, training=True),
            }[of]
            assert torch.equal(y, F.leaky_relu(expected, 0.2))


@pytest.mark.parametrize("of", reference.NORMS)
def test_a_weight_without_a_bias(of, device):
    x, gamma = torch.randn(3, 4, 5, 5, device=device), torch.rand(4, device=device)
    y = functional.norm_block(x, norm=of, norm_weight=gamma, norm_groups=2)
    with use_backend("reference"):
        expected = functional.norm_block(x, norm=of, norm_weight=gamma, norm_groups=2)
    torch.testing.assert_close(y, expected)
    assert not torch.allclose(y, functional.norm_block(x, norm=of, norm_groups=2))


def test_a_changed_input_is_noticed(device):
    """The input is what is kept, so that changing it before backward is an error, as in PyTorch."""
    x = torch.randn(3, 4, 5, 5, device=device, requires_grad=True)
    z = x * 2
    y = functional.norm_block(z)
    z.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
    # What comes out may be changed.
    y = functional.norm_block(x, activation="leaky_relu")
    y.add_(1)
    y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("convolution", [None, "conv"])
def test_group_norm_widens_as_under_cudas_autocast(convolution, dtype, device, monkeypatch):
    """Its output is float32 there, whatever goes in."""
    monkeypatch.setattr(functional, "_widens", lambda norm, x: norm.kind == "group")
    shape = (2, 4, 7, 9) if convolution else (2, 6, 5, 4)
    case = Case("group", shape, convolution, norm_groups=2, dtype=dtype, widens=True)
    assert assert_case(case, device)["output"].dtype == torch.float32


def test_who_treats_images_one_by_one():
    assert treats_images_one_by_one(nn.InstanceNorm2d(4, affine=True))
    assert treats_images_one_by_one(nn.GLU(1)) and not treats_images_one_by_one(nn.GLU(0))
    assert not treats_images_one_by_one(nn.InstanceNorm2d(4, track_running_stats=True))


def test_images_join_in_no_norm():
    """A norm has no padded memory to read, where a convolution has."""
    convolution = nn.Conv2d(3, 64, 4, 2, 1)
    assert joining._first_block(FusedSequential(convolution)).weight is convolution.weight
    assert joining._first_block(FusedSequential(nn.BatchNorm2d(3), convolution)) is None


def test_norms_alone_are_traced_as_pytorchs(device, started):
    """A compiler makes one pass of a norm and an activation itself."""
    layers = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.GroupNorm(2, 4), nn.Tanh()).to(device)
    ours = fused(layers)
    x = torch.randn(3, 4, 5, 5, device=device)
    y = torch.compile(ours, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(y, layers(x))
    torch.testing.assert_close(dict(ours.named_buffers()), dict(layers.named_buffers()))
    functional_norm = torch.compile(functional.norm_block, backend="eager", fullgraph=True)
    y = functional_norm(x, norm="instance", activation="relu")
    torch.testing.assert_close(y, F.instance_norm(x).relu())
    assert started == []
