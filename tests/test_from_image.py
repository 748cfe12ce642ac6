"""fprop and wgrad over padded images against float64, and what machine code they become."""

from dataclasses import dataclass

import dependent_launch
import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, DTYPES, LAYOUTS, pairwise
from oracle import DRAWS, assert_close, assert_stable_statistics

from genfast import reference
from genfast.backend import INTERPRETING
from genfast.geometry import ConvGeometry
from genfast.launch import from_image, norm, start
from genfast.launch.epilogue import PLAIN, Epilogue

kernels = pytest.mark.kernels

# (kernel, stride, padding, size of the image): windows that end inside and at the edge, that
# overlap, touch and leave gaps, that lie in the border alone, and more than one step of them.
GEOMETRIES = (
    ((4, 4), (2, 2), (1, 1), (10, 12)),
    ((4, 4), (2, 2), (1, 1), (9, 7)),
    ((4, 4), (1, 1), (0, 0), (7, 6)),
    ((3, 3), (1, 1), (1, 1), (5, 6)),
    ((3, 3), (2, 2), (1, 1), (8, 7)),
    ((5, 5), (2, 2), (2, 2), (9, 7)),
    ((7, 7), (1, 1), (3, 3), (5, 4)),
    ((5, 5), (3, 3), (1, 1), (10, 8)),
    ((2, 1), (3, 3), (0, 0), (7, 9)),
    ((2, 2), (1, 1), (3, 3), (4, 3)),
    ((3, 4), (2, 1), (0, 2), (7, 5)),
    ((1, 6), (1, 2), (0, 1), (4, 9)),
)


@dataclass(frozen=True)
class Case:
    """One convolution of an image, and what rides on it."""

    geometry: tuple
    c_big: int = 3
    c_small: int = 40
    batch: int = 4
    dtype: torch.dtype = torch.float32
    activation: str = "identity"
    bias: bool = False
    norm: bool = False
    layout: str = "contiguous"
    from_float32: bool = False

    def __str__(self):
        kernel, stride, padding, size = (
            "x".join(map(str, dict.fromkeys(pair))) for pair in self.geometry
        )
        dtype = str(self.dtype).removeprefix("torch.")
        extras = ("bias" * self.bias, "norm" * self.norm, "widened" * self.from_float32)
        channels = f"{self.batch}x{self.c_big}x{self.c_small}"
        parts = (f"k{kernel}-s{stride}-p{padding}-{size}", channels, dtype, self.activation)
        return "-".join(filter(None, (*parts, *extras)))

    @property
    def conv(self):
        kernel, stride, padding, size = self.geometry
        return ConvGeometry.conv(size, kernel, stride, padding)

    def tensors(self, device):
        """x, weight, dy, y, and bias and vectors or None; y is what the activation puts out."""
        conv, dtype = self.conv, self.dtype

        def normal(*shape):
            return torch.randn(shape, dtype=torch.float64)

        small = (self.batch, self.c_small, *conv.small)
        y = reference.activate(normal(*small), self.activation, 0.2)
        x = (normal(self.batch, self.c_big, *conv.big) + 0.3).to(dtype)
        bias = normal(self.c_small).to(device, dtype) if self.bias else None
        vectors = None
        if self.norm:
            acc = torch.float64 if dtype == torch.float64 else torch.float32
            vectors = (1 + 0.3 * normal(1, 5, self.c_small)).to(device, acc)
        gain = (self.c_big * conv.taps) ** -0.5
        return dict(
            x=LAYOUTS[self.layout](x.to(device, torch.float32 if self.from_float32 else dtype)),
            weight=(gain * normal(self.c_small, self.c_big, *conv.kernel_size)).to(device, dtype),
            dy=normal(*small).to(device, dtype),
            y=y.to(device, dtype),
            bias=bias,
            vectors=vectors,
        )


CASES = [
    Case(**row)
    for row in pairwise(
        dict(
            geometry=GEOMETRIES,
            dtype=DTYPES,
            c_big=[3, 1, 4, 2],
            c_small=[40, 8, 16],
            batch=[4, 1, 7],
            activation=ACTIVATIONS,
            bias=[False, True],
            norm=[False, True],
            layout=["contiguous", "channels_last", "sliced"],
            from_float32=[False, True],
        )
    )
]


@pytest.mark.one_in(2)
@kernels
@pytest.mark.parametrize("case", CASES, ids=str)
def test_products(case, device):
    tensors = case.tensors(device)
    samples = [(_plain(case, tensors), _plain(case, _exact(tensors)))]
    for _ in range(DRAWS - 1):
        others = case.tensors(device)
        samples.append((_plain(case, others), _plain(case, _exact(others))))
    if case.dtype == torch.float64:
        samples = [(_plain(case, _exact(tensors, torch.float32)), samples[0][1])]
    assert_close(_ours(case, tensors), _plain(case, _exact(tensors)), samples)


def _ours(case, tensors):
    activation = dict(activation=case.activation, negative_slope=0.2)
    assert from_image.why_not(case.conv, case.c_small, case.c_big, case.batch) is None
    image = from_image.padded(tensors["x"], case.conv, case.dtype)
    epilogue = Epilogue(bias=tensors["bias"], vectors=tensors["vectors"], **activation)
    small, statistics = from_image.fprop(image, tensors["weight"], epilogue)
    assert statistics is None
    assert small.is_contiguous(memory_format=torch.channels_last)
    return {
        "output": small,
        "gradient of weight": from_image.wgrad(image, tensors["dy"]),
        "gradient of weight, from y": from_image.wgrad(
            image, tensors["dy"], tensors["y"], **activation
        ),
        "gradient of u": _unpad(from_image.padded(
            tensors["dy"][:, :3], _around(case), y=tensors["y"][:, :3], **activation
        )),
    }  # fmt: skip


def _plain(case, tensors):
    """The same by PyTorch, in the dtype of the tensors."""
    conv = case.conv
    dy, weight = tensors["dy"], tensors["weight"]
    x = tensors["x"].to(weight.dtype)
    u = F.conv2d(x, weight, tensors["bias"], conv.stride, conv.padding)
    if case.norm:
        vectors = tensors["vectors"][0, :, :, None, None]
        u = ((u - vectors[norm.MEAN]) * vectors[norm.SCALE] + vectors[norm.SHIFT]).to(u.dtype)
    du = BACKWARD[case.activation](dy, tensors["y"])
    return {
        "output": reference.activate(u, case.activation, 0.2),
        "gradient of weight": _weight_gradient(x, dy, weight, conv),
        "gradient of weight, from y": _weight_gradient(x, du, weight, conv),
        "gradient of u": du[:, :3],
    }


BACKWARD = {
    "identity": lambda dy, y: dy,
    "relu": lambda dy, y: torch.ops.aten.threshold_backward(dy, y, 0),
    "leaky_relu": lambda dy, y: torch.ops.aten.leaky_relu_backward(dy, y, 0.2, True),
    "tanh": torch.ops.aten.tanh_backward,
    "sigmoid": torch.ops.aten.sigmoid_backward,
}


def _weight_gradient(x, dy, weight, conv):
    return torch.ops.aten.convolution_backward(
        dy, x, weight, None, conv.stride, conv.padding, (1, 1), False, (0, 0), 1,
        (False, True, False),
    )[1]  # fmt: skip


def _exact(tensors, dtype=torch.float64):
    return {name: t if t is None else t.to(dtype) for name, t in tensors.items()}


def _around(case):
    """The geometry of some convolution whose big side is the case's small one."""
    return ConvGeometry.conv(case.conv.small, (4, 3), (2, 1), (2, 1))


def _unpad(image):
    (top, left), (height, width) = image.geometry.padding, image.geometry.big
    inside = image.data[:, top : top + height, left : left + width, : image.c_big]
    assert image.data.count_nonzero() == inside.count_nonzero()
    return inside.permute(0, 3, 1, 2)


@kernels
@pytest.mark.parametrize(
    ("channels", "layout"), [(1, "sliced"), (3, "contiguous"), (3, "channels_last"), (4, "sliced")]
)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_padded_images_hold_the_image_and_zeros(geometry, channels, layout, device):
    kernel, stride, padding, size = geometry
    conv = ConvGeometry.conv(size, kernel, stride, padding)
    x = LAYOUTS[layout](torch.randn(3, channels, *size, device=device))
    height, width = from_image.padded_size(conv)
    whole = torch.full((5, height, width, 4), float("nan"), dtype=torch.float16, device=device)
    image = from_image.padded(x, conv, out=whole[1:4])
    bottom, right = height - size[0] - padding[0], width - size[1] - padding[1]
    assert min(bottom, right) >= 0
    borders = (0, 4 - channels, padding[1], right, padding[0], bottom)
    expected = F.pad(x.permute(0, 2, 3, 1), borders).half()
    assert torch.equal(image.data, expected)
    assert whole[0].isnan().all() and whole[4].isnan().all()


@kernels
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_nothing_outside_is_read(geometry, device):
    case = Case(geometry)
    x, weight, dy, *_ = case.tensors(device).values()
    data = _amid_nan(from_image.padded(x, case.conv).data)
    image = from_image.Padded(data, case.conv, case.c_big)
    dy = _amid_nan(dy.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
    assert from_image.fprop(image, weight, PLAIN)[0].isfinite().all()
    assert from_image.wgrad(image, dy).isfinite().all()


def _amid_nan(t):
    guard = 4096
    larger = torch.full((t.numel() + 2 * guard,), float("nan"), dtype=t.dtype, device=t.device)
    larger[guard:-guard] = t.flatten()
    return larger[guard:-guard].view(t.shape)


@kernels
@pytest.mark.skipif(not INTERPRETING, reason="looks at the interpreter's addresses")
@pytest.mark.parametrize("geometry", GEOMETRIES[:6], ids=str)
def test_masked_lanes_have_valid_addresses(geometry, device, monkeypatch):
    # A pipelined load may become a copy without a predicate.
    from triton.runtime.interpreter import InterpreterBuilder

    run, load = start.kernel, InterpreterBuilder.create_masked_load
    outside, loads, tensors = [], [], []

    def starting(kernel, grid, **arguments):
        tensors[:] = [a for a in arguments.values() if isinstance(a, torch.Tensor)]
        run(kernel, grid, **arguments)

    def loading(self, ptrs, *args):
        address = torch.from_numpy(ptrs.data.astype("int64"))
        inside = torch.zeros_like(address, dtype=torch.bool)
        for t in tensors:
            inside |= (t.data_ptr() <= address) & (address < t.data_ptr() + t.nbytes)
        loads.append(address)
        outside.append(not inside.all())
        return load(self, ptrs, *args)

    monkeypatch.setattr(start, "kernel", starting)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", loading)
    case = Case(geometry, activation="tanh", bias=True, norm=True)
    _ours(case, case.tensors(device))
    assert len(loads) > 20 and not any(outside)


@kernels
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_an_infinite_pixel_reaches_only_the_windows_that_contain_it(geometry, device):
    case = Case(geometry)
    x, weight, *_ = case.tensors(device).values()
    x[1, 0, 2, 2] = float("inf")
    ours, _ = from_image.fprop(from_image.padded(x, case.conv), weight, PLAIN)
    plain = F.conv2d(x, weight, None, case.conv.stride, case.conv.padding)
    assert torch.equal(ours.isfinite(), plain.isfinite())


@kernels
@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_of_what_is_stored(groups, dtype, device):
    conv = ConvGeometry.conv((10, 14), (4, 4), (2, 2), (1, 1))  # 35 pixels: a tile and a bit
    x = (torch.randn(6, 3, 10, 14) + 1).to(device, dtype)
    weight = (0.1 * torch.randn(40, 3, 4, 4) + 0.4).to(device, dtype)
    bias = torch.randn(40).to(device, dtype)
    image = from_image.padded(x, conv)
    z, statistics = from_image.fprop(image, weight, Epilogue(bias=bias, groups=groups))
    assert statistics.groups == groups
    pixels = 6 // groups * 35
    assert statistics.count.view(groups, -1).sum(1).tolist() == groups * [pixels]
    vectors = norm.batch_statistics(statistics, None, None, 1e-20)
    for group, values in enumerate(z.float().chunk(groups)):
        for channel in range(40):
            mean, var, rstd, *_ = vectors[group, :, channel]
            one = values[:, channel].flatten()
            assert_stable_statistics(one, mean, var, (one - mean) * rstd)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (dict(c_big=5), "expected 1 to 4 channels on the big side, got 5"),
        (dict(c_small=12), "expected a multiple of 8 channels on the small side, got 12"),
        (dict(kernel=(32, 16), size=(32, 16)), "expected windows that move over the image"),
        (dict(images=0), "expected at least one image, got 0"),
        (dict(images=2**22), "pixels, got"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(changed, sentence):
    def why_not(kernel=(4, 4), size=(32, 32), c_small=64, c_big=3, images=4):
        conv = ConvGeometry.conv(size, kernel, (1, 1), (0, 0))
        assert from_image.fits(conv, c_small, c_big, images) == (
            from_image.why_not(conv, c_small, c_big, images) is None
        )
        return from_image.why_not(conv, c_small, c_big, images)

    assert why_not() is None
    assert sentence in why_not(**changed)


def test_multiplications_divide_exactly():
    divisors = [*range(1, 300), *(2**k + d for k in range(9, 30) for d in (-1, 0, 1))]
    for divisor in divisors:
        magic, shift = from_image._magic(divisor)
        assert magic < 2**31
        last = (2**30 - 1) // divisor * divisor
        for n in (0, divisor - 1, divisor, last - 1, last, 2**30 - 1):
            assert (4 * n * magic >> 32) >> shift == n // divisor


# Instructions of the longest loop, for each tile: of 128 pixels in fprop, of 64 where it has sums,
# and in the others. These loops include what only a group's last, ragged tile executes.
LOOPS = {
    ("fprop_image", "leaky relu"): 620,
    ("fprop_image", "statistics"): 750,
    ("fprop_image", "stride 1"): 480,
    ("wgrad_image", "plain"): 200,
    ("wgrad_image", "leaky relu"): 450,
    ("wgrad_image", "of z"): 480,
    ("norm_sums_image", "twice"): 850,
    ("fprop_image", "twice"): 690,
}

# Of `join_images`, with the loads of both kinds, of which a program executes one.
MOST_TO_PAD = {"pad_image": 320, "join_images": 520}


def test_hopper_instructions():
    pytest.importorskip("triton", reason="compiles Triton kernels")
    from ahead_of_time import facts_of

    launches = facts_of("sm_90", "--few", "--code", of="from_image")
    padding = ("pad_image", "join_images")
    dependent_launch.check(launches, "sm_90")
    facts = [f for f in launches if f["kernel"].endswith(("_image", "_images"))]
    for f in facts:
        assert f["spills"] == 0, f
        _, _, kind = f["case"].partition(" ")  # after the dtype
        if f["kernel"] in padding:
            assert f["stores"] == {"8": 4}, f  # a pixel's four channels at once
            assert f["instructions"] <= MOST_TO_PAD[f["kernel"]], f
            # Levels of uint8 are rounded as by PyTorch's operations, after each.
            assert f["fma"] == 0, f
            continue
        assert f["wgmma"] > 0, f
        # Windows and the small side arrive without passing through registers.
        assert set(f["copies"]) == ({"8"} if kind == "stride 1" else {"16"}), f
        assert 0 < f["loop"]["instructions"] <= LOOPS[f["kernel"], kind], f
        assert f["registers"] <= 168, f  # three programs of 128 threads
        if f["kernel"] == "fprop_image":
            assert f["stores"]["16"] == f["tile"][1] // 16, f
    # A batch or an image of another size compiles nothing anew.
    hashes = {}
    for f in facts:
        hashes.setdefault((f["kernel"], f["case"]), set()).add(f["hash"])
    assert len(facts) == 2 * 18 and len(hashes) == 2 * 11
    assert all(len(found) == 1 for found in hashes.values()), hashes
