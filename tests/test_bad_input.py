"""Bad arguments end in one sentence that says what was expected and what came."""

import pytest
import torch

from genfast import functional, use_backend
from genfast.launch import start
from genfast.nn import DiscriminatorBlock, GeneratorBlock

pytestmark = pytest.mark.kernels


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


X, WEIGHT, SQUARE = ones(2, 3, 8, 8), ones(5, 3, 4, 4), ones(3, 3, 4, 4)
NORM = dict(norm=True, norm_weight=ones(5), norm_bias=ones(5))


def meta(t):
    return t.to("meta")


# Of `conv_block`: arguments, keyword arguments, the error, and what its message names.
BLOCK = {
    "rank of x": ((ones(3, 8, 8), WEIGHT), {}, ValueError, r"\(N, C, H, W\).*\(3, 8, 8\)"),
    "rank of weight": ((X, ones(5, 3, 4)), {}, ValueError, r"weight.*\(5, 3, 4\)"),
    "channels": ((ones(2, 4, 8, 8), WEIGHT), {}, ValueError, r"3 channels.*4"),
    "integers": ((X.to(torch.uint8), WEIGHT), {}, TypeError, r"floating point.*uint8"),
    "complex": ((X.cfloat(), WEIGHT.cfloat()), {}, TypeError, r"floating point.*complex"),
    "dtypes": ((X.bfloat16(), WEIGHT), {}, TypeError, r"weight.*bfloat16.*float32"),
    "dtype of bias": ((X, WEIGHT, ones(5).half()), {}, TypeError, r"bias.*float32.*float16"),
    "devices": ((X, meta(WEIGHT)), {}, ValueError, r"weight.*device cpu.*meta"),
    "float counter": (
        (X, WEIGHT),
        NORM | {"num_batches_tracked": torch.tensor(0.0)},
        TypeError,
        "int64 scalar.*float32",
    ),
    "device of gamma": ((X, WEIGHT), NORM | {"norm_weight": meta(ones(5))}, ValueError, "meta"),
    "bias": ((X, WEIGHT, ones(3)), {}, ValueError, r"bias of shape \(5,\).*\(3,\)"),
    "gamma": ((X, WEIGHT), NORM | {"norm_weight": ones(3)}, ValueError, r"norm_weight.*\(3,\)"),
    "beta": ((X, WEIGHT), NORM | {"norm_bias": ones(5, 1)}, ValueError, r"norm_bias.*\(5, 1\)"),
    "running_mean alone": (
        (X, WEIGHT),
        NORM | {"running_mean": ones(5)},
        ValueError,
        "running_var",
    ),
    "running_var": (
        (X, WEIGHT),
        NORM | {"running_mean": ones(5), "running_var": ones(4)},
        ValueError,
        r"running_var.*\(4,\)",
    ),
    "groups": ((X, WEIGHT), NORM | {"statistics_groups": 3}, ValueError, "2 images and 3 groups"),
    "no groups": ((X, WEIGHT), NORM | {"statistics_groups": 0}, ValueError, "0 groups"),
    "one value in a group": (
        (ones(2, 3, 4, 4), WEIGHT),
        NORM | {"statistics_groups": 2},
        ValueError,
        "more than 1 value.*1 x 1 x 1",
    ),
    "activation": ((X, WEIGHT), {"activation": "swish"}, ValueError, "relu.*'swish'"),
    "a number's slope": ((X, WEIGHT), {"activation": "prelu"}, TypeError, "a tensor, got 0.2"),
    "slopes": (
        (X, WEIGHT),
        {"activation": "prelu", "negative_slope": ones(4)},
        ValueError,
        r"negative_slope.*\(5,\), got \(4,\)",
    ),
    "stride 0": ((X, WEIGHT, None, 0), {}, ValueError, "stride.*0"),
    "three strides": ((X, WEIGHT, None, (1, 2, 3)), {}, ValueError, r"stride.*\(1, 2, 3\)"),
    "padding below 0": ((X, WEIGHT, None, 1, -1), {}, ValueError, "padding.*-1"),
    "too small an image": ((ones(2, 3, 3, 8), WEIGHT), {}, ValueError, r"\(3, 8\)"),
    "one value a channel": ((ones(1, 3, 4, 4), WEIGHT), NORM, ValueError, "more than 1 value"),
}


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize("name", BLOCK)
def test_conv_block(name, backend, monkeypatch):
    arguments, options, error, message = BLOCK[name]
    monkeypatch.setattr(start, "kernel", _no_start)
    with use_backend(backend), pytest.raises(error, match=message) as raised:
        functional.conv_block(*arguments, **options)
    assert "\n" not in str(raised.value)


def _no_start(*args, **kwargs):
    raise AssertionError("a kernel started before the arguments were checked")


@pytest.mark.parametrize("output_padding", [2, -1, (0, 2)])
def test_output_padding(output_padding):
    with pytest.raises(ValueError, match="output_padding"):
        functional.conv_transpose_block(X, SQUARE, None, 2, 1, output_padding)


def test_transposed_channels():
    with pytest.raises(ValueError, match="5 channels.*3"):
        functional.conv_transpose_block(X, WEIGHT)


def test_one_value_a_channel_is_enough_in_evaluation(device):
    vectors = dict.fromkeys(("norm_weight", "norm_bias", "running_mean", "running_var"))
    vectors = {name: torch.ones(5, device=device) for name in vectors}
    x, weight = ones(1, 3, 4, 4).to(device), WEIGHT.to(device)
    y = functional.conv_block(x, weight, norm=True, training=False, **vectors)
    torch.testing.assert_close(y, torch.full_like(y, 48.0), rtol=1e-4, atol=0)


SAMPLING = {
    "shapes": (ones(2, 3), ones(2, 4), ValueError, r"\(2, 3\).*\(2, 4\)"),
    "dtypes": (ones(2, 3), ones(2, 3).half(), TypeError, "float32.*float16"),
    "integers": (ones(2, 3).int(), ones(2, 3).int(), TypeError, "floating.*int32"),
    "devices": (ones(2, 3), meta(ones(2, 3)), ValueError, "cpu.*meta"),
}


@pytest.mark.parametrize("sampling", [functional.reparameterize, functional.reparameterize_with_kl])
@pytest.mark.parametrize("name", SAMPLING)
def test_sampling(name, sampling):
    mu, logvar, error, message = SAMPLING[name]
    with pytest.raises(error, match=message):
        sampling(mu, logvar)


def test_kl_of_a_scalar():
    with pytest.raises(ValueError, match="scalar"):
        functional.reparameterize_with_kl(ones(), ones())


@pytest.mark.parametrize("block", [GeneratorBlock, DiscriminatorBlock])
def test_unknown_activation_of_a_module(block):
    with pytest.raises(ValueError, match="leaky_relu.*'swish'"):
        block(3, 4, activation="swish")


@pytest.mark.parametrize("block", [GeneratorBlock, DiscriminatorBlock])
def test_wrong_channels_of_a_module(block, device):
    with pytest.raises(ValueError, match="3 channels.*4"):
        block(3, 5).to(device)(torch.ones(2, 4, 8, 8, device=device))


def test_unknown_backend():
    with pytest.raises(ValueError, match="'auto', 'triton', 'reference'.*'cuda'"):
        use_backend("cuda")


def test_triton_where_it_cannot_run(device):
    x, weight = (t.to(device, torch.float8_e5m2) for t in (X, WEIGHT))
    with pytest.raises(RuntimeError, match="'triton' was asked for and cannot run: .*float8"):
        functional.conv_block(x, weight)


def test_meta_tensors():
    # Not bad input: shapes can be inferred as with PyTorch's layers.
    with use_backend("auto"):
        assert functional.conv_block(meta(X), meta(WEIGHT)).shape == (2, 5, 5, 5)
