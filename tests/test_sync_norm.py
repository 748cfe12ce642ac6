"""Batch norm over processes: the parts of a batch give what one process gives for all of it."""

import copy

import pytest
import torch
from oracle import DRAWS, assert_close
from process_group import run
from torch import nn

import genfast
from genfast.backend import use_backend
from genfast.nn import FusedSequential, statistics_groups


def _network(seed=0, layers=FusedSequential):
    """Batch norms after both convolutions, one that follows a pooling, and one among vectors."""
    torch.manual_seed(seed)
    network = layers(
        nn.Conv2d(3, 5, 4, 2, 1), nn.BatchNorm2d(5), nn.LeakyReLU(0.2),
        nn.ConvTranspose2d(5, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4, momentum=None), nn.ReLU(),
        nn.AvgPool2d(2), nn.BatchNorm2d(4, affine=False), nn.Tanh(),
        nn.Conv2d(4, 2, 3), nn.Flatten(),
    )  # fmt: skip
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0.3, 0.5)
    return network


def _images(counts, seed=0):
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randn(n, 3, 6, 6, generator=generator, dtype=torch.float64) for n in counts]


def _ran(network, images, groups, weights):
    """Outputs, gradients, second derivatives and running statistics of one process's images."""
    x = images.to(next(network.parameters()).dtype).requires_grad_()
    parameters = dict(network.named_parameters())
    with statistics_groups(network, groups):
        y = network(x)
    loss = (y * weights.to(y.dtype)).sum()
    dx, *gradients = torch.autograd.grad(loss, [x, *parameters.values()], create_graph=True)
    found = {"output": y.detach(), "gradient of x": dx.detach()}
    found |= {f"gradient of {n}": g.detach() for n, g in zip(parameters, gradients, strict=True)}
    second = torch.autograd.grad(dx.square().sum(), [x, *parameters.values()], allow_unused=True)
    for name, g in zip(["x", *parameters], second, strict=True):
        found[f"gradient, second, of {name}"] = torch.zeros(1) if g is None else g.detach()
    return found | {n: b.clone() for n, b in network.named_buffers()}


def _weights(count):
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 2, generator=generator, dtype=torch.float64)


def _part(rank, backend, counts, groups):
    """What one process makes of its part."""
    with use_backend(backend):
        network = nn.SyncBatchNorm.convert_sync_batchnorm(_network())
        return _ran(
            network, _images(counts)[rank], groups, _weights(sum(counts)).split(counts)[rank]
        )


def _whole(dtype, counts, groups, seed=0):
    """What PyTorch makes of all of it: the images of a group are those of all processes."""
    network = _network(layers=nn.Sequential).to(dtype)
    parts = [images.chunk(groups) for images in _images(counts, seed)]
    weights = [w.chunk(groups) for w in _weights(sum(counts)).split(counts)]
    order = [(rank, group) for group in range(groups) for rank in range(len(counts))]
    return _ran(
        network,
        torch.cat([parts[rank][group] for rank, group in order]),
        groups,
        torch.cat([weights[rank][group] for rank, group in order]),
    )


def _joined(results, counts, groups):
    """Results of processes as those of the whole: gradients of parameters add up."""
    joined = {}
    for name, first in results[0].items():
        every = [result[name] for result in results]
        if name == "output" or name.endswith(" of x"):
            chunks = [t.chunk(groups) for t in every]
            joined[name] = torch.cat([c[g] for g in range(groups) for c in chunks])
        elif name.startswith("gradient"):
            joined[name] = sum(every)
        else:
            assert all(torch.equal(first, other) for other in every), name
            joined[name] = first
    return joined


@pytest.mark.parametrize(
    ("backend", "counts", "groups"),
    [
        ("triton", (3, 2), 1),
        ("triton", (4, 2), 2),
        ("reference", (4, 2), 2),
        ("reference", (1, 2, 1, 3), 1),
    ],
    ids=str,
)
def test_parts_give_what_the_whole_gives(backend, counts, groups, tmp_path):
    if backend == "triton":
        pytest.importorskip("triton", reason="interprets kernels")
    draws = range(DRAWS)
    oracle, *others = (_whole(torch.float64, counts, groups, seed) for seed in draws)
    eager = [_whole(torch.float32, counts, groups, seed) for seed in draws]
    results = run(_part, len(counts), tmp_path, backend, counts, groups)
    samples = list(zip(eager, [oracle, *others], strict=True))
    assert_close(_joined(results, counts, groups), oracle, samples)


def _accelerated(rank):
    """Whether a converted network fuses, converted before or after, and comes back whole."""
    before = nn.SyncBatchNorm.convert_sync_batchnorm(_network(layers=nn.Sequential))
    report = genfast.accelerate(before)
    after = _network(layers=nn.Sequential)
    genfast.accelerate(after)
    after = nn.SyncBatchNorm.convert_sync_batchnorm(after)
    x = _images([3, 2])[rank].float()
    same = torch.equal(before(x), copy.deepcopy(after)(x))
    return same, [(entry.layers, entry.fused) for entry in report]


def test_conversion_before_and_after(tmp_path):
    for same, report in run(_accelerated, 2, tmp_path):
        assert same
        assert report[0] == ("Conv2d + SyncBatchNorm + LeakyReLU", True)


def test_alone_it_is_an_ordinary_batch_norm():
    network = nn.SyncBatchNorm.convert_sync_batchnorm(_network())
    x = _images([3])[0].float()
    torch.testing.assert_close(network(x), _network()(x))
