"""dgrad to an image of few channels, by the rule of `oracle`, and what it compiles to."""

import dependent_launch
import pytest
import torch
import torch.nn.functional as F
from cases import DTYPES, LAYOUTS, pairwise
from oracle import DRAWS, assert_close

from genfast import reference
from genfast.geometry import ConvGeometry
from genfast.launch import to_image
from genfast.launch.epilogue import Epilogue

SLOPE, Y_SLOPE = 0.3, 0.2
ACTIVATIONS = ("identity", "relu", "leaky_relu", "tanh", "sigmoid")

# Kernel, stride, padding, output padding and the size of small. Some rows are longer than the
# interpreter's tile of 16 pixels; some tiles have several images, side by side where a row is a
# power of two long.
GEOMETRIES = (
    ((4, 4), (2, 2), (1, 1), (0, 0), (4, 4)),
    ((4, 4), (2, 2), (1, 1), (0, 0), (2, 18)),
    ((3, 3), (1, 1), (1, 1), (0, 0), (3, 6)),
    ((3, 3), (1, 1), (1, 1), (0, 0), (2, 33)),
    ((7, 7), (1, 1), (3, 3), (0, 0), (4, 5)),
    ((7, 7), (1, 1), (3, 3), (0, 0), (1, 17)),
    ((3, 3), (2, 2), (1, 1), (1, 1), (3, 5)),
    ((5, 5), (2, 2), (2, 2), (1, 0), (2, 18)),
    ((2, 2), (2, 2), (0, 0), (0, 0), (2, 17)),
    ((2, 2), (1, 1), (2, 2), (0, 0), (4, 5)),  # more padding than kernel
    ((3, 4), (2, 1), (0, 2), (1, 0), (2, 17)),
    ((5, 5), (3, 3), (1, 1), (2, 2), (2, 3)),
    ((4, 4), (1, 1), (0, 0), (0, 0), (2, 1)),
)
CASES = pairwise(
    dict(
        geometry=GEOMETRIES,
        c_big=(1, 2, 3, 4),
        c_small=(3, 16, 40),  # 40 are more than the interpreter's chunk of channels
        batch=(1, 3),
        dtype=DTYPES,
        # The image's, and that of small.
        activations=tuple(zip(ACTIVATIONS, (*ACTIVATIONS[1:], "identity"), strict=True)),
        bias=(False, True),
        layout=("contiguous", "channels_last", "sliced"),
    )
)


def case_id(case):
    kernel, stride, _, _, size = case["geometry"]
    dtype = str(case["dtype"]).removeprefix("torch.")
    rest = [v for k, v in case.items() if k not in ("geometry", "dtype")]
    return "-".join(map(str, (f"k{kernel[0]}s{stride[0]}w{size[1]}", dtype, *rest)))


def tensors_of(case, device):
    """small, weight, bias and the y of which small is the gradient; None what the case lacks."""
    kernel, *_, size = case["geometry"]
    shape = case["batch"], case["c_small"], *size
    gain = (case["c_small"] * kernel[0] * kernel[1]) ** -0.5
    values = dict(
        small=torch.randn(shape),
        weight=gain * torch.randn(case["c_small"], case["c_big"], *kernel),
        bias=torch.randn(case["c_big"]) if case["bias"] else None,
        y=None,
    )
    if case["activations"][1] != "identity":
        values["y"] = reference.activate(torch.randn(shape), case["activations"][1], Y_SLOPE)
    return {k: None if v is None else v.to(device, case["dtype"]) for k, v in values.items()}


def expected(case, tensors, dtype):
    """The formula in a dtype, with PyTorch."""
    t = {name: None if v is None else v.to(dtype) for name, v in tensors.items()}
    _, stride, padding, output_padding, _ = case["geometry"]
    small = t["small"]
    if t["y"] is not None:
        small = derivative(small, t["y"], case["activations"][1])
    u = F.conv_transpose2d(small, t["weight"], t["bias"], stride, padding, output_padding)
    return {"output": reference.activate(u, case["activations"][0], SLOPE)}


def derivative(dy, y, activation):
    if activation in ("relu", "leaky_relu"):
        return torch.where(y > 0, dy, dy * (Y_SLOPE if activation == "leaky_relu" else 0))
    return dy * (1 - y * y) if activation == "tanh" else dy * (1 - y) * y


def geometry_of(case):
    kernel, stride, padding, output_padding, size = case["geometry"]
    return ConvGeometry.conv_transpose(size, kernel, stride, padding, output_padding)


@pytest.mark.one_in(2)
@pytest.mark.kernels
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_to_image(case, device):
    geometry = geometry_of(case)
    tensors = tensors_of(case, device)
    narrow = torch.float32 if case["dtype"] == torch.float64 else case["dtype"]

    def sample(some):
        some = {k: None if v is None else v.to(narrow) for k, v in some.items()}
        return expected(case, some, narrow), expected(case, some, torch.float64)

    activation, y_activation = case["activations"]
    epilogue = Epilogue(bias=tensors["bias"], activation=activation, negative_slope=SLOPE)
    assert to_image.fits(geometry, case["c_small"], case["c_big"], epilogue)
    layout = LAYOUTS[case["layout"]]
    y = tensors["y"]
    output = to_image.dgrad(
        layout(tensors["small"]),
        layout(tensors["weight"]),
        geometry,
        epilogue,
        y=None if y is None else layout(y),
        activation=y_activation,
        negative_slope=Y_SLOPE,
    )
    assert output.is_contiguous(memory_format=torch.channels_last)
    samples = [sample(tensors)] + [sample(tensors_of(case, device)) for _ in range(DRAWS - 1)]
    oracle = expected(case, tensors, torch.float64)
    assert_close({"output": output}, oracle, samples)


@pytest.mark.kernels
@pytest.mark.parametrize("geometry", GEOMETRIES[:6], ids=str)
def test_borders(geometry, device):
    """Every pixel of small reaches the elements that it touches, one by one, and no other."""
    case = dict(geometry=geometry)
    kernel, stride, padding, _, (height, width) = geometry
    weight = torch.arange(1.0, 2 * kernel[0] * kernel[1] + 1).view(1, 2, *kernel).to(device)
    middle = width // 2
    bottom, right = height - 1, width - 1
    for n, y, x in ((1, 0, 0), (0, 0, middle - 1), (1, bottom, middle), (0, bottom, right)):
        small = torch.zeros(2, 1, height, width, device=device)
        small[n, 0, y, x] = 1
        image = to_image.dgrad(small, weight, geometry_of(case), Epilogue())
        assert torch.equal(image, F.conv_transpose2d(small, weight, None, stride, padding))


@pytest.mark.kernels
@pytest.mark.parametrize("geometry", GEOMETRIES[:6], ids=str)
def test_nan_stays_where_it_is_read(geometry, device):
    """What a tile holds beside the pixels that an element meets does not reach it."""
    case = dict(geometry=geometry)
    kernel, stride, padding, _, size = geometry
    for x in (0, size[1] - 1):
        small = torch.randn(3, 5, *size, device=device)
        small[1, 2, 0, x] = float("nan")
        weight = torch.randn(5, 3, *kernel, device=device)
        image = to_image.dgrad(small, weight, geometry_of(case), Epilogue())
        ones = torch.ones_like(weight)
        touched = F.conv_transpose2d(small.isnan().float(), ones, None, stride, padding)
        assert torch.equal(image.isnan(), touched > 0)


@pytest.mark.kernels
def test_segments_of_a_column_agree(device, monkeypatch):
    small, weight = torch.randn(2, 3, 9, 5, device=device), torch.randn(3, 3, 3, 3, device=device)
    geometry = ConvGeometry.conv_transpose((9, 5), (3, 3), (1, 1), (1, 1), (0, 0))
    images = []
    for segments in (1, 3, 9):
        monkeypatch.setattr(to_image, "_segments", lambda *_, n=segments: n)
        images.append(to_image.dgrad(small, weight, geometry, Epilogue()))
    assert torch.equal(images[0], images[1])
    assert torch.equal(images[0], images[2])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(c_big=5), "1 to 4 channels"),
        (dict(kernel=9), "2 to 8 wide"),
        (dict(kernel=1), "2 to 8 wide"),
        (dict(kernel=2, stride=3), "2 to 8 wide"),
        (dict(size=1, padding=0, kernel=4), "matrix product"),
        (dict(epilogue=Epilogue(groups=1)), "not normalised"),
        (dict(epilogue=Epilogue(vectors=torch.ones(1, 5, 3))), "not normalised"),
    ],
    ids=str,
)
def test_what_is_declined(change, reason):
    p = dict(c_big=3, kernel=4, stride=1, padding=1, size=8, epilogue=Epilogue()) | change
    sizes = [(p[name],) * 2 for name in ("size", "kernel", "stride", "padding")]
    geometry = ConvGeometry.conv_transpose(*sizes, (0, 0))
    problem = geometry, 64, p["c_big"], p["epilogue"]
    assert reason in to_image.why_not(*problem)
    assert not to_image.fits(*problem)


# What a step of a tile of 64 pixels took when this was written, and a tenth: at 550 instructions
# the issue of a DCGAN's last layer takes as long as its memory.
INSTRUCTIONS_OF_A_STEP = {
    "generator": 545, "generator of z": 870, "discriminator": 540,
    "k3": 390, "k3 of z": 1150, "k7": 280,
}  # fmt: skip


def compile_for(architecture, *options):
    """The facts of each kernel by the name of its case."""
    pytest.importorskip("triton", reason="compiles Triton kernels")
    from ahead_of_time import facts_of

    found = facts_of(architecture, *options, of="outputs")
    facts = {f["case"]: f for f in found}
    assert len(facts) == len(found)
    dependent_launch.check(found, architecture)
    return facts


def test_compiles_well_for_hopper():
    facts = compile_for("sm_90", "--code")
    for name, f in facts.items():
        # A few bytes of stack cost nothing beside the products of float32.
        assert f["spills"] <= (24 if "32" in name else 0), (name, f)
        assert f["shared"] <= 227 * 1024, (name, f)
    for name, most in INSTRUCTIONS_OF_A_STEP.items():
        f = facts[name]
        assert f["wgmma"] > 0, (name, f)
        assert 0 < f["loop"]["instructions"] <= most, (name, f)
        # All of small arrives in vectors, and while other steps compute.
        assert f["loop"]["copies"].keys() == {"16"} and not f["loop"]["loads"], (name, f)
    for name in ("logit fprop", "logit wgrad"):
        assert facts[name]["loads"]["16"] >= 8, facts[name]
        assert 0 < facts[name]["loop"]["instructions"] <= 370, facts[name]
    # Normalising what is read costs some 9 instructions an element, and no load is narrower. A step
    # of wgrad with two groups may have to do so twice.
    for name, most in (("fprop of z", 570), ("wgrad of z", 1010), ("wgrad of z of two", 1330)):
        f = facts[f"logit {name}"]
        assert f["loads"]["16"] >= 11, f
        assert 0 < f["loop"]["instructions"] <= most, f
    for name in ("logit dgrad", "logit dgrad at input"):
        assert facts[name]["stores"]["16"] >= 2, facts[name]
    assert facts["logit sums"]["loads"]["16"] >= 2, facts["logit sums"]
    # Nothing but sums, of a thread's channels two each.
    assert facts["logit sums"]["stores"].keys() <= {"4", "8"}, facts["logit sums"]
    # With this many, as many programs share a multiprocessor as the model of `_segments` assumes.
    assert facts["generator"]["registers"] <= 128 >= facts["discriminator"]["registers"]
    assert facts["generator of z"]["registers"] <= 168  # three programs


@pytest.mark.exhaustive
@pytest.mark.parametrize(("architecture", "shared"), [("sm_80", 99), ("gfx942", 64)])
def test_compiles_for_other_gpus(architecture, shared):
    facts = compile_for(architecture)
    assert max(f["shared"] for f in facts.values()) <= shared * 1024, facts
    assert max(f["spills"] for f in facts.values()) <= 24, facts
