"""Sums over parts, of few and of many."""

import pytest
import torch

from genfast.launch import sums

pytestmark = pytest.mark.kernels


@pytest.mark.parametrize("of_batch", [False, True])
@pytest.mark.parametrize("parts", [1, 65, 512, 513, 1100])
@pytest.mark.parametrize("groups", [(), (3,)], ids=str)
def test_sums(groups, parts, of_batch, device, monkeypatch):
    monkeypatch.setattr(sums, "_CHUNK", 8 * sums._CHUNK // 64)
    partials = torch.randn(*groups, parts, 70, device=device)
    out = torch.empty(*groups, 10, 7, device=device)
    sums.sum_partials(partials, out, of_batch=of_batch and not groups)
    exact = partials.double().sum(-2).view(out.shape)
    # Each addition rounds once: sums of this many terms of size 1.
    assert (out - exact).abs().max() < torch.finfo(torch.float32).eps * parts
    again = torch.empty_like(out)
    sums.sum_partials(partials, again, of_batch=of_batch and not groups)
    assert torch.equal(out, again)


@pytest.mark.parametrize(("parts", "length", "kernels"), [(2048, 1, 1), (2049, 1, 2), (513, 64, 2)])
def test_few_sums_of_many_parts_are_one_kernel(parts, length, kernels, device, started):
    out = torch.empty(length, device=device)
    sums.sum_partials(torch.ones(parts, length, device=device), out)
    assert (out == parts).all() and started == ["sum_partials"] * kernels
