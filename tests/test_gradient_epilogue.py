"""Products that finish a gradient: times the derivative of the layer below, with its sums.

g = product * act'(u) is held to the rule of `oracle`, its sums to the float64 sums of g as stored.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from cases import ACTIVATIONS, DTYPES, pairwise
from oracle import DRAWS, assert_close

from genfast import reference
from genfast.geometry import ConvGeometry
from genfast.launch import conv, norm, start, tiles, to_image
from genfast.launch.epilogue import Epilogue
from genfast.launch.operand import Output

pytest.importorskip("triton", reason="it is about Triton kernels")
pytestmark = pytest.mark.kernels

SLOPE = 0.2
BATCH = 6  # of 1, 2 or 3 groups
BOTH = dict(DESCRIPTORS=True, STORE_DESCRIPTOR=True)
NEITHER = dict(DESCRIPTORS=False, STORE_DESCRIPTOR=False)
LOADS = dict(DESCRIPTORS=True, STORE_DESCRIPTOR=False)


@dataclass(frozen=True)
class Route:
    """A product, and how it must be computed.

    channels: of the small and of the big side.
    kernel: that is started first; with these constants, and in groups GROUPED or not.
    """

    operation: str
    geometry: ConvGeometry
    channels: tuple[int, int]
    kernel: str
    constants: dict | None = None
    grouped: bool = False
    library: bool = False


def conv_of(size, kernel, stride, padding):
    return ConvGeometry.conv(size, (kernel,) * 2, (stride,) * 2, (padding,) * 2)


WHOLE = conv_of((4, 4), 4, 1, 0)
# The interpreter's tile has 64 rows and 32 columns: ragged in rows, in columns, or in neither.
ROUTES = {
    "boxes": Route("fprop", conv_of((8, 8), 3, 1, 1), (80, 32), "fprop", BOTH),
    "ragged boxes": Route("fprop", conv_of((5, 6), 3, 1, 1), (16, 32), "fprop", BOTH),
    "boxes of images": Route("fprop", conv_of((4, 4), 3, 1, 1), (16, 32), "fprop", BOTH, True),
    "phases": Route("dgrad", conv_of((16, 16), 4, 2, 1), (32, 64), "dgrad", BOTH),
    "phases of images": Route("dgrad", conv_of((8, 8), 4, 2, 1), (32, 64), "dgrad", BOTH, True),
    "stride 1 to images": Route("dgrad", conv_of((3, 4), 3, 1, 1), (32, 24), "dgrad", BOTH, True),
    "narrow phases": Route("dgrad", conv_of((10, 6), 4, 2, 1), (32, 64), "dgrad", None),
    "mixed phases": Route("dgrad", conv_of((8, 8), 4, 2, 1), (32, 40), "dgrad", LOADS),
    "mixed": Route("fprop", conv_of((8, 8), 3, 1, 1), (5, 32), "fprop", LOADS),
    "pointers": Route("fprop", conv_of((9, 7), 3, 2, 1), (5, 6), "fprop", NEITHER),
    "pointers to phases": Route("dgrad", conv_of((9, 7), 3, 2, 1), (6, 5), "dgrad", NEITHER),
    "no taps": Route("dgrad", conv_of((7, 6), 1, 2, 0), (6, 5), "dgrad", NEITHER),
    "latents": Route("dgrad", WHOLE, (20, 12), "dgrad", None),
    "pointwise": Route("dgrad", conv_of((2, 3), 1, 1, 0), (20, 5), "dgrad", None),
    "product": Route("fprop", WHOLE, (24, 3), "fprop", None),
    "few products": Route("fprop", WHOLE, (3, 8), "fprop", None),
    "logits": Route("dgrad", WHOLE, (1, 24), "logits_dgrad"),
    "ragged logits": Route("dgrad", WHOLE, (3, 9), "logits_dgrad"),
    "image": Route("fprop", conv_of((10, 14), 4, 2, 1), (40, 3), "pad_image"),
    "to few channels": Route("dgrad", conv_of((9, 7), 3, 2, 1), (8, 3), "dgrad", NEITHER),
    "library fprop": Route("fprop", conv_of((9, 7), 3, 2, 1), (5, 6), "", library=True),
    "library dgrad": Route("dgrad", conv_of((9, 7), 3, 2, 1), (6, 5), "", library=True),
    "library product": Route("dgrad", WHOLE, (20, 12), "", library=True),
}
# Of each route the norm of each number of groups, and y alone; all values with all others.
CASES = [
    dict(route=route, below=below, dtype=dtype, activation=activation)
    for row in pairwise(
        dict(
            route=list(ROUTES),
            below=[1, 3, "sums", "y"],
            dtype=DTYPES,
            activation=ACTIVATIONS,
        )
    )
    for route, below, dtype, activation in [row.values()]
]


def tensors_of(case, device):
    """x, weight, and of the layer below z and vectors, or y in place of z."""
    route = ROUTES[case["route"]]
    geometry, (c_small, c_big), dtype = route.geometry, route.channels, case["dtype"]
    to_small = route.operation == "fprop"
    source, channels = ((c_big, geometry.big), c_small) if to_small else ((c_small, geometry.small),
                                                                          c_big)  # fmt: skip
    size = geometry.small if to_small else geometry.big
    z = torch.randn(BATCH, channels, *size, dtype=torch.float64)
    vectors = None
    if isinstance(case["below"], int):
        vectors = torch.randn(case["below"], 5, channels, dtype=torch.float64)
        vectors[:, norm.RSTD] = 0.5 + torch.rand(case["below"], channels)
        vectors[:, norm.SCALE] *= vectors[:, norm.RSTD]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        vectors = vectors.to(device, wide)
    else:
        z = reference.activate(z, case["activation"], SLOPE)
    gain = (source[0] * geometry.taps) ** -0.5
    return dict(
        x=torch.randn(BATCH, source[0], *source[1]).to(device, dtype),
        weight=(gain * torch.randn(c_small, c_big, *geometry.kernel_size)).to(device, dtype),
        z=z.to(device, dtype).to(memory_format=torch.channels_last),
        vectors=vectors,
    )


def by_groups(z, vectors, row):
    """A row of each group's vectors, for each pixel of that group's images."""
    return vectors[:, row].repeat_interleave(len(z) // len(vectors), 0)[:, :, None, None]


BACKWARD = {
    "identity": lambda dy, y: dy,
    "relu": lambda dy, y: torch.ops.aten.threshold_backward(dy, y, 0),
    "leaky_relu": lambda dy, y: torch.ops.aten.leaky_relu_backward(dy, y, SLOPE, True),
    "tanh": torch.ops.aten.tanh_backward,
    "sigmoid": torch.ops.aten.sigmoid_backward,
}


def plain(case, tensors):
    """g by PyTorch, in the dtype of the tensors."""
    route = ROUTES[case["route"]]
    x, weight, y, vectors = tensors.values()
    geometry = route.geometry
    strides = geometry.stride, geometry.padding
    if route.operation == "fprop":
        dy = F.conv2d(x, weight, None, *strides)
    else:
        dy = F.conv_transpose2d(x, weight, None, *strides, geometry.output_padding)
    if vectors is not None:
        mean, scale, shift = (by_groups(y, vectors, i) for i in (norm.MEAN, norm.SCALE, norm.SHIFT))
        u = ((y - mean) * scale + shift).to(y.dtype)
        y = reference.activate(u, case["activation"], SLOPE)
    return BACKWARD[case["activation"]](dy, y)


def sums_of(g, z, vectors):
    """The sums over each group's pixels of g and of g * xhat, or of g alone."""
    if vectors is None:
        return {"gradient of bias": g.sum((0, 2, 3))[None]}
    xhat = (z - by_groups(z, vectors, norm.MEAN)) * by_groups(z, vectors, norm.RSTD)
    each = (len(vectors), -1, *g.shape[1:])
    return {
        "gradient of beta": g.view(each).sum((1, 3, 4)),
        "gradient of gamma": (g * xhat).view(each).sum((1, 3, 4)),
    }


def converted(tensors, dtype):
    return {name: t if t is None else t.to(dtype) for name, t in tensors.items()}


def ours(case, tensors, monkeypatch):
    """g and the sums, and what was started: a list of names and arguments."""
    route, below = ROUTES[case["route"]], case["below"]
    x, weight, z, vectors = tensors.values()
    output = Output(z, vectors, case["activation"], SLOPE)
    started, run = [], start.kernel
    with monkeypatch.context() as patch:
        if route.library:
            patch.setattr(tiles, "gemm_config", lambda *_: tiles.LIBRARY)
        patch.setattr(
            start,
            "kernel",
            lambda k, grid, **a: (started.append((k.__name__, a)), run(k, grid, **a)),
        )
        epilogue = Epilogue(output=output, sums=below == "sums")
        g, sums = getattr(conv, route.operation)(x, weight, route.geometry, epilogue)
    return g, sums, started


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_gradient_of_the_layer_below(case, device, monkeypatch):
    route, below = ROUTES[case["route"]], case["below"]
    tensors = tensors_of(case, device)
    g, sums, started = ours(case, tensors, monkeypatch)
    if below == 3:
        again, sums_again, _ = ours(case, tensors, monkeypatch)
        assert torch.equal(g, again) and torch.equal(sums, sums_again)
    assert g.dtype == case["dtype"] and g.is_contiguous(memory_format=torch.channels_last)
    if device.type == "cpu" and not route.library:  # Of the GPUs some have no descriptors.
        name, arguments = started[0]
        assert name == route.kernel and len(started) == 1 + (name == "pad_image")
        for constant, value in (route.constants or {}).items():
            assert arguments[constant] == value, constant
        if route.constants:
            assert arguments["GROUPED"] == (route.grouped and below == 3)

    narrow = torch.float32 if case["dtype"] == torch.float64 else case["dtype"]
    draws = [tensors] + [tensors_of(case, device) for _ in range(DRAWS - 1)]
    draws = [converted(t, narrow) | {"vectors": widened(t["vectors"])} for t in draws]
    samples = [
        ({"gradient": plain(case, t)}, {"gradient": plain(case, converted(t, torch.float64))})
        for t in draws
    ]
    exact = converted(tensors, torch.float64)
    assert_close({"gradient": g}, {"gradient": plain(case, exact)}, samples)

    if below == "y":
        assert sums is None
        return
    vectors = tensors["vectors"]
    rows = 1 if vectors is None else 2
    groups = 1 if vectors is None else len(vectors)
    assert sums.dtype == start.acc_dtype(g.dtype) and len(sums) == groups
    totals = sums.double().sum(1).view(groups, rows, -1).unbind(1)
    expected = sums_of(g.double(), exact["z"], exact["vectors"])
    found = {name: t.to(sums.dtype) for name, t in zip(expected, totals, strict=True)}
    # By PyTorch in float32, of gradients as large as these.
    samples = [
        (sums_of(s.float(), t["z"].float(), t["vectors"]),
         sums_of(s.double(), t["z"].double(), converted(t, torch.float64)["vectors"]))
        for t in draws
        for s in [plain(case, t)]
    ]  # fmt: skip
    assert_close(found, expected, samples)


def widened(vectors):
    return vectors if vectors is None else vectors.float()


@pytest.mark.parametrize("operation", ["fprop", "dgrad"])
def test_masked_gradients_count_nowhere(operation, device):
    """What lies beyond the edge of a ragged box is a gradient too: of no pixel."""
    geometry = conv_of((5, 6), 3, 1, 1)
    x, weight = torch.ones(2, 16, 5, 6), torch.ones(16, 16, 3, 3)
    vectors = torch.ones(2, 5, 16)
    vectors[:, norm.MEAN] = 0
    output = Output(torch.ones(2, 16, 5, 6), vectors, "identity", 0.0)
    g, sums = getattr(conv, operation)(
        x.to(device), weight.to(device), geometry, Epilogue(output=converted_output(output, device))
    )
    totals = sums.sum(1).view(2, 2, 16)
    assert torch.equal(totals[:, 0], g.sum((2, 3))) and torch.equal(totals[:, 0], totals[:, 1])


def converted_output(output, device):
    return Output(output.value.to(device), output.vectors.to(device), "identity", 0.0)


def test_an_image_has_no_layer_below():
    geometry = ConvGeometry.conv_transpose((4, 4), (4, 4), (2, 2), (1, 1), (0, 0))
    output = Output(torch.zeros(1, 3, 8, 8), None, "relu", 0.0)
    assert to_image.why_not(geometry, 8, 3, Epilogue()) is None
    assert "no layer's output" in to_image.why_not(geometry, 8, 3, Epilogue(output=output))


@pytest.mark.parametrize(
    "others",
    [
        dict(bias=torch.zeros(3)),
        dict(groups=1),
        dict(vectors=torch.zeros(1, 5, 3)),
        dict(activation="relu"),
    ],
    ids=lambda others: "".join(others),
)
def test_an_output_stands_alone(others):
    output = Output(torch.zeros(1, 3, 8, 8), None, "relu", 0.0)
    with pytest.raises(ValueError, match="expected an epilogue with an output to have neither"):
        Epilogue(output=output, **others)


def test_sums_are_of_a_gradient():
    with pytest.raises(ValueError, match="expected sums only of a gradient"):
        Epilogue(sums=True)


def test_another_shape_below_is_refused(device):
    geometry = conv_of((5, 6), 3, 1, 1)
    x, weight = torch.ones(2, 16, 5, 6), torch.ones(16, 16, 3, 3)
    output = Output(torch.ones(2, 16, 6, 5), None, "relu", 0.0)
    with pytest.raises(ValueError, match="expected the output of the layer below to be"):
        conv.fprop(x.to(device), weight.to(device), geometry, Epilogue(output=output))


# The layers of a DCGAN-64 with a batch norm below them, of D's two groups and of G's one:
# (operation, channels of the small and of the big side, size of the big side, groups, activation).
LAYERS = (
    ("fprop", 128, 64, 32, 1, "relu"),
    ("fprop", 256, 128, 16, 1, "relu"),
    ("fprop", 512, 256, 8, 1, "relu"),
    ("dgrad", 256, 128, 16, 2, "leaky_relu"),
    ("dgrad", 512, 256, 8, 2, "leaky_relu"),
    ("dgrad", 512, 256, 8, 1, "tanh"),
)


def compile_layers():
    """Print as JSON what the layers become on sm_90: for a process that does not interpret."""
    from benchmarks.model.machine_code import read
    from benchmarks.model.recording import Recorder

    recorder = Recorder("sm_90")

    def image(channels, size):
        empty = torch.empty(64, channels, *size, dtype=torch.bfloat16)
        return empty.to(memory_format=torch.channels_last)

    with (
        mock.patch.object(start, "kernel", recorder.start),
        mock.patch.object(start, "architecture", lambda tensor: "sm_90"),
    ):
        for operation, c_small, c_big, size, groups, activation in LAYERS:
            geometry = conv_of((size, size), 4, 2, 1)
            sides = [(c_big, geometry.big), (c_small, geometry.small)]
            source, result = sides if operation == "fprop" else sides[::-1]
            vectors = torch.empty(groups, 5, result[0])
            output = Output(image(*result), vectors, activation, SLOPE)
            weight = torch.empty(c_small, c_big, 4, 4, dtype=torch.bfloat16)
            getattr(conv, operation)(image(*source), weight, geometry, Epilogue(output=output))
    for launch in recorder.launches:
        code = read(recorder.code[launch.compiled])
        (loop,) = (region for region in code.regions[1:] if region.count("HGMMA"))
        facts = {name: launch.arguments[name] for name in ("num_warps", "STORE_DESCRIPTOR")}
        facts |= dict(registers=code.registers, spills=code.spills, loads=loop.loads)
        facts |= dict(layout_changes=code.layout_changes, waits=loop.waits_inside)
        facts |= dict(shuffles=sum(region.count("SHFL") for region in code.regions))
        print(json.dumps(facts))


def test_machine_code_on_hopper():
    """Two programs share a multiprocessor, and sums are made within threads."""
    here = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (here.parent, here)))
    code = "import test_gradient_epilogue; test_gradient_epilogue.compile_layers()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(LAYERS) and any(facts["num_warps"] == 8 for facts in found)
    for layer, facts in zip(LAYERS, found, strict=True):
        assert facts["STORE_DESCRIPTOR"] and facts["spills"] == facts["layout_changes"] == 0, layer
        assert facts["registers"] <= (128 if facts["num_warps"] == 8 else 168), (layer, facts)
        assert facts["loads"] == "asynchronous" and not facts["waits"], layer
        assert facts["shuffles"] == 8, layer  # of 4 threads, for two rows and two sums
