"""What `Precision.products` sets can be read, old settings and new ones, and is put back."""

import pytest
import torch
from torch import nn
from torch.backends import _FP32Precision

from genfast.training.steps import precision as precisions
from genfast.training.steps.precision import Precision

PLACES = [
    ("generic", "all"), ("cuda", "all"), ("cuda", "conv"), ("cuda", "rnn"), ("cuda", "matmul"),
    ("mkldnn", "all"), ("mkldnn", "matmul"),
]  # fmt: skip


def _old_settings():
    return (
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        torch.get_float32_matmul_precision(),
    )


def _settings():
    return [_FP32Precision(*place).fp32_precision for place in PLACES]


def _set(place, value):
    _FP32Precision(*place).fp32_precision = value


@pytest.fixture(autouse=True)
def settings_are_put_back():
    yield
    for place in PLACES:
        _set(place, "none")
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    _set(("mkldnn", "matmul"), "none")
    _set(("cuda", "matmul"), "none")


def _precision(name, monkeypatch):
    """On a GPU, which need not be there for its settings to be."""
    monkeypatch.setattr(precisions, "_is_from_ampere_on", lambda device: True)
    return Precision(name, torch.device("cuda"), {"model": nn.Linear(1, 1)}, {})


def _untouched():
    pass


def _cudnn_not_allowed():
    torch.backends.cudnn.allow_tf32 = False


def _all_allowed():
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = True


def _none_allowed():
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def _high():
    torch.set_float32_matmul_precision("high")


def _medium():
    torch.set_float32_matmul_precision("medium")


BEFORE = [_untouched, _cudnn_not_allowed, _all_allowed, _none_allowed, _high, _medium]


@pytest.mark.parametrize("before", BEFORE, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16", "fp16"])
def test_products_leave_old_settings_readable(name, before, monkeypatch):
    before()
    precision = _precision(name, monkeypatch)
    old, new = _old_settings(), _settings()
    with precision.products():
        rounds = name == "tf32"
        if name in ("fp32", "tf32"):
            assert _old_settings()[:2] == (rounds, rounds)
            assert {_FP32Precision("cuda", op).fp32_precision for op in ("conv", "matmul")} == {
                "tf32" if rounds else "ieee"
            }
        else:
            assert (_old_settings(), _settings()) == (old, new)
        with precision.exact_products():
            assert _old_settings() == (False, False, "highest")
    assert (_old_settings(), _settings()) == (old, new)


@pytest.mark.parametrize("name", ["fp32", "tf32"])
@pytest.mark.parametrize("above", [("generic", "all"), ("cuda", "all")], ids=lambda p: p[0])
@pytest.mark.parametrize("value", ["ieee", "tf32"])
def test_settings_that_follow_another_still_do(value, above, name, monkeypatch):
    _cudnn_not_allowed()
    _set(above, value)
    precision, before = _precision(name, monkeypatch), _settings()
    with precision.products():
        assert isinstance(_old_settings(), tuple)
    assert _settings() == before
    _set(above, "none")
    assert set(_settings()) == {"none"}


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("matmul", ["highest", "high", "medium"])
@pytest.mark.parametrize("name", ["fp32", "tf32"])
def test_settings_that_disagreed_before_are_put_back(name, matmul, allowed, monkeypatch):
    torch.backends.cudnn.allow_tf32 = allowed
    torch.set_float32_matmul_precision(matmul)
    precision = _precision(name, monkeypatch)
    disagreeing = {
        ("cuda", "conv"): "ieee" if allowed else "tf32",
        ("cuda", "matmul"): "tf32" if matmul == "highest" else "ieee",
        ("mkldnn", "matmul"): "ieee" if matmul == "medium" else "bf16",
    }
    for place, value in disagreeing.items():
        _set(place, value)
    before = _settings()
    with precision.products():
        assert _old_settings()[:2] == (name == "tf32", name == "tf32")
    assert _settings() == before
    with pytest.raises(RuntimeError, match="mix of the legacy and new"):
        _old_settings()
    # The old ones are what they were, as reads once the new ones agree with them again.
    _set(("cuda", "conv"), "tf32" if allowed else "none")
    _set(("cuda", "matmul"), "ieee" if matmul == "highest" else "tf32")
    _set(("mkldnn", "matmul"), {"high": "tf32", "medium": "bf16"}.get(matmul, "ieee"))
    assert _old_settings() == (allowed, matmul != "highest", matmul)
