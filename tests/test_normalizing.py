"""Products that normalise and activate what batch norm took, against the pass followed by them.

The same bits, and the rule of `oracle`.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, LAYOUTS, pairwise
from oracle import DRAWS, assert_close

from genfast import reference
from genfast.geometry import ConvGeometry
from genfast.launch import conv, logits, norm
from genfast.launch.epilogue import Epilogue
from genfast.launch.operand import Output

pytestmark = pytest.mark.kernels

SLOPE = 0.3
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Each with the channels of the side that is normalised. The interpreter's tiles are ragged there,
# and have images of one group, of two or of many. Channels of the maps divide a tile or do not.
IMAGES = (
    (ConvGeometry.conv_transpose((4, 3), (4, 4), (2, 2), (1, 1), (0, 0)), 24),
    (ConvGeometry.conv_transpose((2, 18), (4, 4), (2, 2), (1, 1), (0, 0)), 40),
    (ConvGeometry.conv_transpose((3, 6), (3, 3), (1, 1), (1, 1), (0, 0)), 8),
    (ConvGeometry.conv_transpose((1, 1), (5, 5), (3, 3), (1, 1), (2, 2)), 16),
)
MAPS = (
    (ConvGeometry.conv((4, 4), (4, 4), (1, 1), (0, 0)), 16),
    (ConvGeometry.conv((4, 5), (4, 5), (1, 1), (0, 0)), 9),
    (ConvGeometry.conv((2, 2), (2, 2), (1, 1), (0, 0)), 1),
    (ConvGeometry.conv((1, 3), (1, 3), (1, 1), (0, 0)), 40),
    (ConvGeometry.conv((1, 2), (1, 2), (1, 1), (0, 0)), 128),
)
VARIED = dict(
    few=(1, 3, 4),  # channels of the image or logits
    group=(1, 3, 5),  # images of each group
    groups=(1, 2, 3),
    dtype=DTYPES,
    activation=ACTIVATIONS,
    bias=(False, True),
    layout=("contiguous", "channels_last", "sliced"),
)


@dataclass(frozen=True)
class Case:
    """A product that reads the output of a layer with batch norm."""

    product: str
    problem: tuple
    few: int = 3
    group: int = 3
    groups: int = 2
    dtype: torch.dtype = torch.float32
    activation: str = "relu"
    bias: bool = False
    layout: str = "channels_last"

    def __str__(self):
        geometry, channels = self.problem
        own = geometry.small if self.reads_small else geometry.big
        size = "x".join(map(str, (*own, channels)))
        dtype = str(self.dtype).removeprefix("torch.")
        groups = f"{self.groups}x{self.group}"
        rest = (size, groups, self.few, dtype, self.activation, "bias" * self.bias, self.layout)
        return "-".join(map(str, (self.product, *filter(None, rest))))

    @property
    def geometry(self):
        return self.problem[0]

    @property
    def reads_small(self):
        return self.product in ("to_image", "wgrad_image")

    def tensors(self, device):
        """z of the normalised side, its vectors, the other side, the weight and the bias."""
        geometry, channels = self.problem
        n = self.group * self.groups
        sides = (geometry.small, geometry.big)
        own, other = sides if self.reads_small else sides[::-1]
        gain = (channels * geometry.taps) ** -0.5
        shape = (channels, self.few) if self.reads_small else (self.few, channels)
        # Each group has a mean, scale and shift of its own; act(shift - mean * scale) is not 0.
        vectors = torch.randn(self.groups, 5, channels)
        vectors[:, norm.SCALE] += 1
        tensors = dict(
            z=torch.randn(n, channels, *own) + 0.5,
            other=torch.randn(n, self.few, *other),
            weight=gain * torch.randn(*shape, *geometry.kernel_size),
            bias=torch.randn(self.few) if self.bias else None,
        )
        tensors = {k: None if t is None else t.to(device, self.dtype) for k, t in tensors.items()}
        return tensors | dict(vectors=vectors.to(device))

    def run(self, source, tensors):
        """The product of the normalised side, a tensor or an `Output`, and the rest."""
        epilogue = Epilogue(bias=tensors["bias"], activation="tanh")
        weight, other = (LAYOUTS[self.layout](tensors[name]) for name in ("weight", "other"))
        if self.product == "to_image":
            return conv.dgrad(source, weight, self.geometry, epilogue)[0]
        if self.product == "logits_fprop":
            return conv.fprop(source, weight, self.geometry, epilogue)[0]
        big, small = (other, source) if self.reads_small else (source, other)
        return conv.wgrad(big, small, self.geometry)


def cases(product):
    problems = IMAGES if product in ("to_image", "wgrad_image") else MAPS
    varied = dict(problem=problems) | VARIED
    if product != "to_image":
        varied["group"] = (1, 3, 13)  # programs that begin in one group and end in another
    return [Case(product, **row) for row in pairwise(varied)]


CASES = [c for p in ("to_image", "logits_fprop", "wgrad_image", "logits_wgrad") for c in cases(p)]


@pytest.fixture(autouse=True)
def whatever_the_activation(monkeypatch):
    """The kernels can do what would not pay."""
    made = property(lambda output: output.vectors is not None)
    monkeypatch.setattr(Output, "is_made_reading", made)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_bits_are_those_of_the_pass_and_the_product(case, device, started):
    tensors = case.tensors(device)
    z = LAYOUTS[case.layout](tensors["z"])
    output = Output(z, tensors["vectors"], case.activation, SLOPE)
    found = case.run(output, tensors)
    assert case.product in started and "normalize_activate" not in started
    assert torch.equal(found, case.run(output.tensor(), tensors))


@pytest.mark.parametrize("groups", [1, 3])
def test_splits_of_a_logits_weight_gradient(groups, device, monkeypatch):
    """Programs that begin with another group than the first."""
    monkeypatch.setattr(logits, "_splits", lambda steps, *_: min(steps, 4))
    rows = 5 * logits._ROWS // 3 + 1
    case = Case("logits_wgrad", MAPS[0], groups=groups, group=3 * rows // groups)
    tensors = case.tensors(device)
    output = Output(tensors["z"], tensors["vectors"], case.activation, SLOPE)
    assert torch.equal(case.run(output, tensors), case.run(output.tensor(), tensors))


@pytest.mark.parametrize("product", ["to_image", "logits_fprop", "wgrad_image", "logits_wgrad"])
def test_an_output_that_was_kept_as_it_is(product, device, started):
    case = Case(product, (IMAGES if product in ("to_image", "wgrad_image") else MAPS)[0])
    tensors = case.tensors(device)
    found = case.run(Output(tensors["z"], None, "relu", 0.0), tensors)
    assert torch.equal(found, case.run(tensors["z"], tensors))
    assert "normalize_activate" not in started


def test_other_products_get_what_the_pass_makes(device, started):
    geometry = ConvGeometry.conv((6, 6), (4, 4), (2, 2), (1, 1))
    z, vectors = torch.randn(2, 16, 6, 6, device=device), torch.rand(1, 5, 16, device=device)
    weight = torch.randn(8, 16, 4, 4, device=device)
    output = Output(z, vectors, "relu", 0.0)
    found, _ = conv.fprop(output, weight, geometry)
    assert torch.equal(found, conv.fprop(output.tensor(), weight, geometry)[0])
    assert started.count("normalize_activate") == 1


def exact(case, tensors, dtype):
    """The formula in a dtype, with PyTorch."""
    t = {name: None if v is None else v.to(dtype) for name, v in tensors.items()}
    vectors = tensors["vectors"].to(torch.float64 if dtype == torch.float64 else torch.float32)
    parts = []
    for z, vector in zip(t["z"].chunk(case.groups), vectors, strict=True):
        mean, scale, shift = (
            vector[row][:, None, None] for row in (norm.MEAN, norm.SCALE, norm.SHIFT)
        )
        u = (z.to(vectors.dtype) - mean) * scale + shift
        parts.append(reference.activate(u, case.activation, SLOPE).to(dtype))
    y, geometry = torch.cat(parts), case.geometry
    if case.product == "to_image":
        sizes = zip(geometry.big, geometry.small, geometry.kernel_size, geometry.stride,
                    geometry.padding, strict=True)  # fmt: skip
        extra = [big - (small - 1) * s - k + 2 * p for big, small, k, s, p in sizes]
        u = F.conv_transpose2d(y, t["weight"], t["bias"], geometry.stride, geometry.padding, extra)
        return {"output": torch.tanh(u)}
    if case.product == "logits_fprop":
        return {"output": torch.tanh(F.conv2d(y, t["weight"], t["bias"]))}
    big, small = (t["other"], y) if case.reads_small else (y, t["other"])
    weight = t["weight"].clone().requires_grad_()
    product = F.conv2d(big, weight, None, geometry.stride, geometry.padding)
    return {"gradient of weight": torch.autograd.grad(product, weight, small)[0]}


@pytest.mark.parametrize("case", CASES[::6], ids=str)
def test_rule(case, device):
    tensors = case.tensors(device)
    output = Output(tensors["z"], tensors["vectors"], case.activation, SLOPE)
    oracle = exact(case, tensors, torch.float64)
    draws = [tensors] + [case.tensors(device) for _ in range(DRAWS - 1)]
    samples = [(exact(case, t, case.dtype), exact(case, t, torch.float64)) for t in draws]
    name = next(iter(oracle))
    assert_close({name: case.run(output, tensors)}, oracle, samples)
