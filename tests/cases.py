"""What the fused blocks are tested on: calls that differ in everything a caller can vary."""

import random
from dataclasses import dataclass
from itertools import combinations, product

import torch

from genfast import functional, reference
from genfast.backend import INTERPRETING


@dataclass(frozen=True)
class Geometry:
    """A kernel and the sizes it meets: a `conv2d` takes `big`, a `conv_transpose2d` `small`."""

    kernel_size: int | tuple[int, int]
    stride: int | tuple[int, int]
    padding: int | tuple[int, int]
    big: tuple[int, int]
    small: tuple[int, int]
    output_padding: int | tuple[int, int] = 0

    def __str__(self):
        parts = (self.kernel_size, self.stride, self.padding)
        k, s, p = (str(v).replace(", ", "x").strip("()") for v in parts)
        return f"k{k}-s{s}-p{p}"


# What blocks are tested with in every way; the others are in test_activations.py.
ACTIVATIONS = ("identity", "relu", "leaky_relu", "tanh", "sigmoid")

# Odd sizes leave the phases of a stride with unequal numbers of pixels.
GEOMETRIES = (
    Geometry(4, 2, 1, big=(9, 6), small=(5, 3)),
    Geometry(4, 1, 0, big=(7, 6), small=(3, 4)),
    Geometry(3, 1, 1, big=(5, 6), small=(5, 6)),
    Geometry(3, 2, 1, big=(7, 8), small=(4, 5), output_padding=1),
    Geometry(5, 2, 2, big=(9, 7), small=(4, 5), output_padding=(1, 0)),
    Geometry(2, 2, 0, big=(6, 9), small=(3, 5)),
    Geometry(1, 1, 0, big=(5, 7), small=(5, 7)),
    Geometry(7, 1, 3, big=(5, 4), small=(5, 4)),
    Geometry(5, 3, 1, big=(10, 8), small=(4, 3), output_padding=2),
    Geometry(1, 2, 0, big=(7, 6), small=(4, 3), output_padding=1),  # phases without a tap
    Geometry(2, 1, 2, big=(4, 5), small=(5, 6)),  # more padding than kernel
    Geometry((3, 4), (2, 1), (0, 2), big=(7, 5), small=(3, 5), output_padding=(1, 0)),
    Geometry(4, 1, 0, big=(4, 4), small=(1, 1)),  # a latent to a 4x4 map, and that to a logit
)


def plain_block(
    *arguments, norm, norm_weight, norm_bias, running_mean, running_var, training, momentum, eps,
    statistics_groups, **activation,
):  # fmt: skip
    """`reference.block` with the arguments of the fused functions."""
    batch_norm = None
    if norm:
        batch_norm = reference.Norm(
            norm_weight, norm_bias, running_mean, running_var, None, training, momentum, eps,
            statistics_groups,
        )  # fmt: skip
    return reference.block(*arguments, batch_norm=batch_norm, **activation)


@dataclass(frozen=True)
class Case:
    """One call of `functional.conv_block`, or of `conv_transpose_block` if `transposed`.

    mode: "plain" without batch norm, "training" or "evaluation" with it.
    norm_in_float32: keep the batch norm's tensors in float32 beside half-precision images.
    layout, weight_layout, dy_layout: how a tensor lies in memory, a key of `LAYOUTS`.
    autocast: whether to hand over float32 tensors under autocast to `dtype`.
    offset: the mean of x, whose standard deviation is 1.
    groups: the parts of the batch that have statistics of their own.
    """

    transposed: bool
    geometry: Geometry
    channels: tuple[int, int] = (3, 5)
    batch: int = 3
    dtype: torch.dtype = torch.float32
    mode: str = "training"
    activation: str = "relu"
    negative_slope: float = 0.2
    bias: bool = False
    affine: bool = True
    tracking: bool = True
    momentum: float = 0.1
    eps: float = 1e-5
    norm_in_float32: bool = False
    layout: str = "contiguous"
    weight_layout: str = "contiguous"
    dy_layout: str = "contiguous"
    autocast: bool = False
    offset: float = 0.3
    groups: int = 1

    def __str__(self):
        operation = "transposed" if self.transposed else "conv"
        dtype = str(self.dtype).removeprefix("torch.")
        size = "x".join(map(str, (self.batch, *self.channels)))
        groups = f"{self.groups}groups" if self.groups > 1 else ""
        extras = (self.layout, "bias" * self.bias, "autocast" * self.autocast, groups)
        parts = (operation, self.geometry, size, dtype, self.mode, self.activation, *extras)
        return "-".join(str(part) for part in parts if part)

    @property
    def arguments(self):
        """The positional arguments that follow the bias."""
        g = self.geometry
        if self.transposed:
            return g.stride, g.padding, g.output_padding
        return g.stride, g.padding

    @property
    def options(self):
        """The keyword arguments that are not tensors."""
        return dict(
            norm=self.mode != "plain",
            training=self.mode == "training",
            momentum=self.momentum,
            eps=self.eps,
            activation=self.activation,
            negative_slope=self.negative_slope,
            statistics_groups=self.groups,
        )

    @property
    def fused(self):
        """The function under test."""
        return functional.conv_transpose_block if self.transposed else functional.conv_block

    @property
    def plain(self):
        """The same in plain PyTorch."""
        return plain_block

    def tensors(self, device):
        """The tensor arguments by name, in the dtypes and layouts of the case."""
        c_in, c_out = self.channels
        height, width = self.geometry.small if self.transposed else self.geometry.big
        kernel = self.geometry.kernel_size
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        weight_shape = (c_in, c_out, *kernel) if self.transposed else (c_out, c_in, *kernel)
        # So that the convolution's output is about as large as its input, whatever the case.
        gain = (c_in * kernel[0] * kernel[1]) ** -0.5
        # No channel of the output may nearly vanish: batch norm would blow up its rounding errors.
        weight = torch.randn(weight_shape, dtype=torch.float64)
        values = dict(
            x=torch.randn(self.batch, c_in, height, width, dtype=torch.float64) + self.offset,
            weight=gain * (weight + weight.sign() / 2),
            bias=torch.randn(c_out, dtype=torch.float64) if self.bias else None,
        )
        values |= dict.fromkeys(VECTORS)
        if self.mode != "plain" and self.affine:
            values["norm_weight"] = 1 + 0.3 * torch.randn(c_out, dtype=torch.float64)
            values["norm_bias"] = 0.3 * torch.randn(c_out, dtype=torch.float64)
        if self.mode != "plain" and self.tracking:
            values["running_mean"] = 0.3 * torch.randn(c_out, dtype=torch.float64)
            values["running_var"] = 0.5 + torch.rand(c_out, dtype=torch.float64)
        layouts = dict(x=self.layout, weight=self.weight_layout)
        return {
            name: value
            if value is None
            else LAYOUTS[layouts.get(name, "contiguous")](value.to(device, self.dtype_of(name)))
            for name, value in values.items()
        }

    def dtype_of(self, name):
        """The dtype of a tensor argument."""
        if self.autocast or (self.norm_in_float32 and name in VECTORS):
            return torch.float32
        return self.dtype


VECTORS = ("norm_weight", "norm_bias", "running_mean", "running_var")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
if INTERPRETING:
    DTYPES.append(torch.float64)  # compiled, it runs through PyTorch


def _sliced(t):
    """Every second column of every channel but the first of a larger tensor: nothing is dense."""
    n, c, h, w = t.shape
    larger = torch.full((n, c + 1, h, 2 * w), float("nan"), dtype=t.dtype, device=t.device)
    view = larger[:, 1:, :, ::2]
    view.copy_(t)
    return view


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "sliced": _sliced,
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    # What the gradient of a sum is: one value, seen everywhere.
    "expanded": lambda t: t.flatten()[0].expand(t.shape),
}


def pairwise(factors, seed=0):
    """Rows in which every two values of every two factors meet, far fewer than all combinations.

    Args:
        factors: a list of values for each name.
        seed: of the order in which equally good rows are found.

    Returns:
        Dictionaries with one value for each name.
    """
    shuffle = random.Random(seed).shuffle
    names = list(factors)
    # Indices stand for values, which need not be hashable.
    missing = {
        ((a, i), (b, j))
        for a, b in combinations(names, 2)
        for i, j in product(range(len(factors[a])), range(len(factors[b])))
    }
    rows = []
    while missing:
        row = dict(min(missing, key=lambda pair: [names.index(pair[0][0]), pair]))
        for name in names:
            if name in row:
                continue
            choices = list(range(len(factors[name])))
            shuffle(choices)
            row[name] = max(
                choices, key=lambda i: len(missing & _pairs({**row, name: i}, names, name))
            )
        missing -= _pairs(row, names)
        rows.append({name: factors[name][row[name]] for name in names})
    return rows


def _pairs(row, names, only=None):
    chosen = [(name, row[name]) for name in names if name in row]
    return {pair for pair in combinations(chosen, 2) if only in (None, pair[0][0], pair[1][0])}
