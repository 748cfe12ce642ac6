"""The fused blocks against float64: output, gradients and running statistics."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from cases import ACTIVATIONS, DTYPES, GEOMETRIES, LAYOUTS, VECTORS, Case, Geometry, pairwise
from oracle import assert_block, assert_stable_statistics, evaluate, upstream_gradient

from genfast import functional, use_backend
from genfast.launch import conv, memory, norm, passes, start, tiles

pytestmark = pytest.mark.kernels

CASES = [
    Case(**row)
    for row in pairwise(
        dict(
            transposed=[False, True],
            geometry=GEOMETRIES,
            channels=[(3, 5), (5, 3), (1, 17), (17, 1)],
            dtype=DTYPES,
            mode=["training", "evaluation", "plain"],
            activation=ACTIVATIONS,
            negative_slope=[0.2, 0.05],
            bias=[False, True],
            affine=[True, False],
            tracking=[True, False],
            momentum=[0.1, 1.0, torch.tensor(1 / 3)],
            eps=[1e-5, 1e-2],
            norm_in_float32=[False, True],
            layout=["contiguous", "channels_last", "sliced", "transposed", "permuted"],
            weight_layout=["contiguous", "channels_last", "transposed"],
            dy_layout=["contiguous", "channels_last", "sliced"],
        )
    )
]


@pytest.mark.one_in(2)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_block(case, device):
    assert_block(case, device)


# Channels and pixels that fill at least two tiles each way, the last one in part.
ALIGNED = (
    Case(False, Geometry(2, 1, 1, (5, 6), (6, 7)), (36, 68)),
    Case(True, Geometry(2, 1, 1, (5, 6), (6, 7)), (68, 36), mode="plain", activation="tanh"),
    Case(False, Geometry(4, 2, 1, (8, 8), (4, 4)), (64, 40), 5, torch.bfloat16, "plain"),
    Case(True, Geometry(4, 2, 1, (8, 8), (4, 4)), (40, 64), 5, torch.bfloat16),
    # Rows of 200 bytes, which no descriptor can address: of one operand alone.
    Case(True, Geometry(4, 1, 0, (4, 4), (1, 1)), (100, 12), 70, torch.bfloat16),
    Case(False, Geometry(4, 1, 0, (4, 4), (1, 1)), (12, 100), 70),
)
RAGGED = (
    Case(False, Geometry((2, 3), 2, 1, (7, 9), (4, 5)), (37, 70), 4, torch.float16),
    Case(True, Geometry((3, 2), 2, 1, (7, 9), (4, 5)), (70, 37), 4, activation="leaky_relu"),
    Case(False, Geometry(4, 2, 1, (12, 10), (6, 5)), (3, 70), bias=True, activation="leaky_relu"),
    Case(True, Geometry(4, 2, 1, (12, 10), (6, 5)), (70, 3), dtype=torch.float16, mode="plain"),
    # Enough pixels for the reduction of the weight gradient to be split, unevenly.
    Case(False, Geometry(1, 1, 0, (11, 10), (11, 10)), (2, 3), activation="sigmoid"),
    Case(True, Geometry(2, 2, 0, (22, 20), (11, 10)), (3, 2), mode="plain"),
)


@pytest.fixture(params=["descriptors", "pointers", "library"])
def loader(request, monkeypatch):
    """Run a test with each way to load operands, and with PyTorch's convolution in their place."""
    used = set()
    choose, describe, run = tiles.gemm_config, memory.descriptor, start.kernel
    asked_for = {
        "descriptors": dict(descriptors=True),
        "pointers": dict(descriptors=False),
        "library": dict(library=True),
    }

    def choose_loader(*args, **kwargs):
        return replace(choose(*args, **kwargs), **asked_for[request.param])

    def describing(*args, **kwargs):
        used.add("descriptors")
        return describe(*args, **kwargs)

    def starting(kernel, *args, **kwargs):
        if kernel.__name__ in ("fprop", "dgrad", "wgrad") and not kwargs["DESCRIPTORS"]:
            used.add("pointers")
        run(kernel, *args, **kwargs)

    monkeypatch.setattr(tiles, "gemm_config", choose_loader)
    monkeypatch.setattr(memory, "descriptor", describing)
    monkeypatch.setattr(start, "kernel", starting)
    yield
    if request.param == "descriptors":
        assert "descriptors" in used
    else:
        assert used == {request.param} - {"library"}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", ALIGNED, ids=str)
def test_ragged_tiles_with_either_loader(case, device, loader):
    assert_block(case, device)


@pytest.mark.parametrize("case", RAGGED, ids=str)
def test_ragged_tiles(case, device):
    assert_block(case, device)


# Parts of the batch with statistics of their own. A box counts images of one group only: with 3
# images a group of 4 x 4 pixels it holds some of the next one.
GROUPED_ALIGNED = (
    Case(False, Geometry(4, 2, 1, (8, 8), (4, 4)), (64, 40), 8, torch.bfloat16, groups=2),
    Case(True, Geometry(4, 2, 1, (8, 8), (4, 4)), (40, 64), 9, groups=3),
    Case(False, Geometry(4, 2, 1, (8, 8), (4, 4)), (64, 40), 6, groups=2),
    Case(True, Geometry(4, 1, 0, (4, 4), (1, 1)), (100, 12), 140, groups=2),
)
GROUPED_RAGGED = (
    Case(False, Geometry(3, 2, 1, (15, 13), (8, 7)), (3, 70), 4, groups=4, activation="tanh"),
    Case(True, Geometry(3, 2, 1, (15, 13), (8, 7)), (70, 3), 4, torch.float16, groups=2),
    Case(False, Geometry(3, 1, 1, (5, 6), (5, 6)), (4, 9), 6, groups=3, mode="evaluation"),
    Case(True, Geometry(3, 1, 1, (5, 6), (5, 6)), (4, 9), 6, groups=2, tracking=False),
    Case(True, Geometry(4, 2, 1, (10, 8), (5, 4)), (4, 9), 6, groups=3, momentum=torch.tensor(0.3)),
)


@pytest.mark.one_in(3)
@pytest.mark.parametrize("case", GROUPED_ALIGNED, ids=str)
def test_groups_with_either_loader(case, device, loader):
    assert_block(case, device)


@pytest.mark.parametrize("case", GROUPED_RAGGED, ids=str)
def test_groups(case, device):
    assert_block(case, device)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("added_by_all", [1, 64])
def test_many_tiles_of_many_groups(added_by_all, device, monkeypatch):
    """More tiles than one program combines: two rounds, which keep the groups apart.

    So do the sums of backward, whether a kernel of their own adds their parts or every program.
    """
    monkeypatch.setattr(norm, "_STATISTICS_CHUNK", 2)
    monkeypatch.setattr(norm, "_PARTS_ADDED_BY_ALL", added_by_all)
    assert_block(Case(True, Geometry(4, 2, 1, (16, 16), (8, 8)), (5, 9), 9, groups=3), device)


@pytest.mark.parametrize("transposed", [False, True])
def test_few_programs_share_long_reductions(transposed, device, monkeypatch):
    # As on a GPU with large tensors: each program reduces several tiles, in several rounds.
    monkeypatch.setattr(passes, "programs", lambda tensor, each: 1)
    monkeypatch.setattr(norm, "_PARTS_ADDED_BY_ALL", 1)
    monkeypatch.setattr(norm, "_STATISTICS_CHUNK", 3)
    choose = tiles.gemm_config
    monkeypatch.setattr(tiles, "gemm_config", lambda *args: replace(choose(*args), splits=1))
    geometry = Geometry(1, 1, 0, (26, 27), (26, 27))
    assert_block(Case(transposed, geometry, (2, 3), batch=1, activation="leaky_relu"), device)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mode", ["training", "evaluation", "plain"])
def test_autocast(transposed, mode, device):
    case = Case(
        transposed,
        Geometry(4, 2, 1, (8, 6), (4, 3)),
        dtype=torch.bfloat16,
        mode=mode,
        bias=True,
        autocast=True,
    )
    assert assert_block(case, device).dtype == torch.bfloat16


INFERENCE = [
    Case(mode="evaluation", geometry=Geometry(4, 2, 1, (8, 6), (4, 3)), **row)
    for row in pairwise(
        dict(
            transposed=[False, True],
            activation=ACTIVATIONS,
            dtype=DTYPES,
            bias=[False, True],
            affine=[True, False],
        )
    )
]


@pytest.mark.parametrize("case", INFERENCE, ids=str)
def test_evaluation_without_gradients(case, device):
    assert_block(case, device, gradients=False)


@pytest.mark.parametrize("transposed", [False, True])
def test_mean_a_thousand_times_the_deviation(transposed, device):
    # A kernel of one 1 leaves the pixels as they are.
    x, weight = torch.randn(4, 1, 18, 19, device=device) + 1000, torch.ones(1, 1, 1, 1).to(device)
    mean, var = torch.zeros(1, device=device), torch.ones(1, device=device)
    block = functional.conv_transpose_block if transposed else functional.conv_block
    y = block(x, weight, norm=True, running_mean=mean, running_var=var, momentum=1.0)
    assert_stable_statistics(x, mean, var, y)


@pytest.mark.parametrize("groups", [1, 2])
def test_statistics_by_a_pass_of_their_own_are_stable(groups, device, monkeypatch):
    # So that a part is several tiles.
    monkeypatch.setattr(passes, "programs", lambda tensor, each: 1)
    z = torch.randn(4, 3, 18, 19, device=device) + 1000
    vectors = norm.batch_statistics(norm.statistics_of(z, groups), None, None, 1e-9)
    for part, (mean, var, rstd, *_) in zip(z.chunk(groups), vectors, strict=True):
        for c in range(3):
            normalized = (part[:, c] - mean[c]) * rstd[c]
            assert_stable_statistics(part[:, c], mean[c], var[c], normalized)


def test_difference_of_mean_squares_is_not_stable(device):
    x = torch.randn(4, 1, 18, 19, device=device) + 1000
    var, mean = torch.var_mean(x, correction=0)
    assert_stable_statistics(x, mean, var, (x - mean) / var.sqrt(), correction=0)
    naive = x.square().mean() - x.mean().square()
    with pytest.raises(AssertionError, match="variance"):
        assert_stable_statistics(x, mean, naive, (x - mean) / var.sqrt(), correction=0)


REPEATED = (
    Case(False, Geometry(1, 1, 0, (11, 10), (11, 10)), (2, 3)),
    Case(True, Geometry(4, 2, 1, (8, 8), (4, 4)), (40, 64), 5, torch.bfloat16),
    Case(True, Geometry(5, 2, 2, (9, 7), (4, 5)), mode="plain", bias=True),
)


@pytest.mark.parametrize("case", REPEATED, ids=str)
def test_repeated_runs_are_bit_identical(case, device):
    tensors = case.tensors(device)
    dy = upstream_gradient(case, tensors)
    first, second = (evaluate(case.fused, case, tensors, dy, case.dtype) for _ in range(2))
    for name, result in first.items():
        assert result is None or torch.equal(result, second[name]), name


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mode", ["training", "evaluation", "plain"])
def test_gradient_of_a_sum(transposed, mode, device):
    # It reaches the block as one number expanded to the output's shape.
    geometry = Geometry(3, 2, 1, (7, 8), (4, 5), output_padding=1)
    case = Case(transposed, geometry, mode=mode, activation="sigmoid", dy_layout="expanded")
    assert_block(case, device)


@pytest.fixture
def started(monkeypatch):
    """Counts the convolution kernels that run."""
    counts = Counter()

    def counting(name, start):
        def run(*args, **kwargs):
            counts[name] += 1
            return start(*args, **kwargs)

        return run

    for name in ("fprop", "dgrad", "wgrad"):
        monkeypatch.setattr(conv, name, counting(name, getattr(conv, name)))
    return counts


@pytest.mark.one_in(2)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("frozen", "mode"),
    [
        (frozen, mode)
        for frozen in (
            ("x",),
            ("weight",),
            ("norm_weight", "norm_bias"),
            ("x", "weight"),
            ("x", "norm_weight"),
            ("x", "weight", "bias"),
        )
        for mode in ("training", "evaluation", "plain")
        # Else nothing is left to differentiate.
        if mode != "plain" or frozen != ("x", "weight", "bias")
    ],
)
def test_only_wanted_gradients_are_computed(transposed, mode, frozen, device, started):
    case = Case(transposed, Geometry(3, 1, 1, (5, 4), (5, 4)), mode=mode, bias=True)
    tensors = case.tensors(device)
    dy = upstream_gradient(case, tensors)
    every = evaluate(case.fused, case, tensors, dy, case.dtype)
    started.clear()
    some = evaluate(case.fused, case, tensors, dy, case.dtype, frozen=frozen)
    forward, input_gradient = ("dgrad", "fprop") if transposed else ("fprop", "dgrad")
    wanted = {forward: 1, input_gradient: "x" not in frozen, "wgrad": "weight" not in frozen}
    assert started == Counter({name: n for name, n in wanted.items() if n})
    assert some.keys() == every.keys() - {f"gradient of {name}" for name in frozen}
    for name, result in some.items():
        assert result is None or torch.equal(result, every[name]), name


@pytest.mark.parametrize("backend", ["triton", "auto", "reference"])
@pytest.mark.parametrize("momentum", [0.1, torch.tensor([0.5, 0.25])], ids=["fixed", "varying"])
def test_batches_are_counted_in_training_alone(backend, momentum, device):
    x, weight = torch.randn(4, 3, 5, 5, device=device), torch.randn(70, 3, 3, 3, device=device)
    mean, var = torch.zeros(70, device=device), torch.ones(70, device=device)
    counter = torch.tensor(5, device=device)
    if isinstance(momentum, torch.Tensor):
        momentum = momentum.to(device)
    options = dict(norm=True, num_batches_tracked=counter, momentum=momentum)
    with use_backend(backend):
        functional.conv_block(
            x, weight, running_mean=mean, running_var=var, statistics_groups=2, **options
        )
        assert counter == 7
        functional.conv_block(
            x, weight, running_mean=mean, running_var=var, training=False, **options
        )
        functional.conv_block(x, weight, **options)
        functional.conv_block(x, weight, num_batches_tracked=counter)
    assert counter == 7


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["bias", *VECTORS])
def test_vectors_need_not_be_dense(name, training, device):
    x, weight = torch.randn(2, 3, 4, 5, device=device), torch.randn(5, 3, 3, 3, device=device)
    dense = {n: torch.rand(5, device=device) + 0.5 for n in ("bias", *VECTORS)}
    # NaN beside each element would show in what is read, and must survive what is written.
    pairs = torch.full((5, 2), float("nan"), device=device)
    pairs[:, 0] = dense[name]
    strided = dense | {name: pairs[:, 0]}
    y, expected = (
        functional.conv_block(x, weight, norm=True, training=training, **vectors)
        for vectors in (strided, dense)
    )
    assert torch.equal(y, expected)
    assert torch.equal(pairs[:, 0], dense[name])
    assert pairs[:, 1].isnan().all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mode", ["training", "evaluation", "plain"])
def test_empty_batch(transposed, mode, device):
    case = Case(transposed, Geometry(4, 2, 1, (8, 6), (4, 3)), batch=0, mode=mode)
    tensors = case.tensors(device)
    size = (8, 6) if transposed else (4, 3)
    dy = torch.zeros(0, 5, *size, device=device)
    with use_backend("auto"):
        ours = evaluate(case.fused, case, tensors, dy, case.dtype)
    stock = evaluate(case.plain, case, tensors, dy, case.dtype)
    assert ours["output"].shape == (0, 5, *size)
    for name, result in ours.items():
        torch.testing.assert_close(result, stock[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight_layout", ["contiguous", "channels_last"])
def test_memory_format_of_the_output(transposed, layout, weight_layout, device):
    case = Case(
        transposed,
        Geometry(2, 2, 0, (6, 4), (3, 2)),
        activation="identity",
        mode="plain",
        layout=layout,
        weight_layout=weight_layout,
    )
    y = evaluate(case.fused, case, case.tensors(device))["output"]
    last = "channels_last" in (layout, weight_layout)
    assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    x, weight, _, *_ = case.tensors(device).values()
    for memory_format in (torch.channels_last, torch.contiguous_format):
        y = case.fused(x, weight, None, 2, memory_format=memory_format)
        assert y.is_contiguous(memory_format=memory_format)


def test_integers_and_pairs_mean_the_same(device):
    x, weight = torch.randn(2, 3, 6, 6, device=device), torch.randn(5, 3, 3, 3, device=device)
    y = functional.conv_block(x, weight, None, 2, 1)
    assert torch.equal(y, functional.conv_block(x, weight, None, (2, 2), [1, 1]))
