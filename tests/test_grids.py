"""Kernels whose programs share work fill any GPU: their grids follow its multiprocessors."""

import math
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="prepares Triton's launches")

from genfast.geometry import ConvGeometry
from genfast.launch import (
    dgrad_wgrad,
    from_image,
    logits,
    losses,
    norm,
    predict,
    sampling,
    start,
    to_image,
)
from genfast.launch.epilogue import Epilogue
from genfast.launch.operand import Output

K4S2 = ConvGeometry.conv((64, 64), (4, 4), (2, 2), (1, 1))
WHOLE = ConvGeometry.conv((4, 4), (4, 4), (1, 1), (0, 0))


def _image(batch, channels, size):
    x = torch.empty(batch, channels, *size, dtype=torch.bfloat16)
    return x.contiguous(memory_format=torch.channels_last)


def _padded():
    size = (256, *from_image.padded_size(K4S2), from_image.CHANNELS)
    return from_image.Padded(torch.empty(size, dtype=torch.bfloat16), K4S2, 3)


def _below_image():
    below = Output(_image(256, 64, (32, 32)), torch.empty(1, 5, 64), "relu", 0.0)
    return _weight(64, 3, 4, 4), below


def _weight(*shape):
    return torch.empty(shape, dtype=torch.bfloat16)


def _norm_backward():
    z, vectors = _image(256, 64, (32, 32)), torch.empty(1, 5, 64)
    options = dict(training=True, need_dz=False, activation="relu", negative_slope=0.0)
    norm.norm_backward(z, z, vectors, **options)


def _reparameterize():
    mu = torch.empty(8, 2**17)
    sampling.reparameterize(mu, mu, torch.empty(1, dtype=torch.int64), with_kl=True)


def _importance_samples():
    mu = torch.empty(2, 2**17)
    sampling.importance_samples(mu, mu, 4, torch.empty(1, dtype=torch.int64))


def _dgrad_wgrad():
    upper = ConvGeometry.conv((32, 32), (4, 4), (2, 2), (1, 1))
    below = Output(_image(256, 64, (32, 32)), None, "relu", 0.0)
    dz, weight = _image(256, 128, (16, 16)), _weight(128, 64, 4, 4)
    dgrad_wgrad.dgrad_wgrad(dz, weight, upper, below, _padded(), False)


# The kernel that shares, what starts it, and how many programs it has on each multiprocessor.
CASES = {
    "fprop_image": (
        lambda: from_image.fprop(_padded(), _weight(64, 3, 4, 4), Epilogue(groups=2)),
        3,
    ),
    "norm_sums_image": (lambda: from_image.norm_sums(_padded(), *_below_image(), True), 3),
    "wgrad_image": (lambda: from_image.wgrad(_padded(), _image(256, 64, (32, 32))), 2),
    "dgrad_wgrad_image": (_dgrad_wgrad, 3),
    # One multiprocessor with one program waits about as long as with two.
    "to_image": (
        lambda: to_image.dgrad(_image(4, 64, (32, 32)), _weight(64, 3, 4, 4), K4S2, Epilogue()),
        2,
    ),
    "logits_wgrad": (lambda: logits.wgrad(_image(2**15, 16, (4, 4)), _logit(2**15), WHOLE), 1),
    "tile_statistics": (lambda: norm.statistics_of(_image(256, 64, (32, 32)), 1), 4),
    "norm_backward_reduce": (_norm_backward, 4),
    "logit_loss": (lambda: losses.logit_loss(torch.empty(2**22), 0, 1.0), 8),
    "reparameterize": (_reparameterize, 16),
    "importance_samples": (_importance_samples, 16),
}


def _logit(batch):
    return _weight(batch, 1, 1, 1)


@pytest.fixture
def programs(monkeypatch):
    """A function of a kernel's name and a number of multiprocessors: how many programs it has."""
    grids = {}
    monkeypatch.setattr(start, "architecture", lambda tensor: "sm_90")
    monkeypatch.setattr(
        start, "kernel", lambda kernel, grid, **arguments: grids.update({kernel.__name__: grid})
    )
    h100 = predict.chip("sm_90")

    def count(kernel, multiprocessors):
        chip = replace(h100, multiprocessors=multiprocessors)
        monkeypatch.setitem(predict.CHIPS, "sm_90", chip)
        CASES[kernel][0]()
        return math.prod(grids[kernel])

    return count


@pytest.mark.parametrize("multiprocessors", [20, 41, 60])
@pytest.mark.parametrize("kernel", CASES)
def test_programs_that_share_work_fill_the_gpu(kernel, multiprocessors, programs):
    found, most = programs(kernel, multiprocessors), CASES[kernel][1] * multiprocessors
    assert most / 2 <= found <= most  # Parts are whole tiles, and so fewer.
