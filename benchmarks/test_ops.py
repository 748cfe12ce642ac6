"""Each block and the sampler alone, forward and backward: pytest benchmarks/.

"stock" is PyTorch's layers in channels_last and bfloat16 autocast (float32 where that is not fast),
"genfast" the same layers in a `FusedSequential`. On the CPU the batches are small.
"""

import copy

import pytest
import torch
from torch import nn

from genfast.functional import reparameterize_with_kl
from genfast.nn import FusedSequential
from genfast.reference import kl_divergence, reparameterize
from genfast.training.steps.precision import resolve_precision

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 128 if DEVICE.type == "cuda" else 8
LATENTS = 2**26 if DEVICE.type == "cuda" else 2**16
HALF = resolve_precision("auto", DEVICE) == "bf16"


def _up(c_in, c_out, stride=2, padding=1):
    return [
        nn.ConvTranspose2d(c_in, c_out, 4, stride, padding, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(True),
    ]


def _down(c_in, c_out):
    return [
        nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False),
        nn.BatchNorm2d(c_out),
        nn.LeakyReLU(0.2, True),
    ]


# The layers of a DCGAN-64, with the size of their input.
LAYERS = {
    "g 100-512, 1": (_up(100, 512, 1, 0), 1),
    "g 512-256, 4": (_up(512, 256), 4),
    "g 256-128, 8": (_up(256, 128), 8),
    "g 128-64, 16": (_up(128, 64), 16),
    "g 64-3, 32": ([nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False), nn.Tanh()], 32),
    "d 3-64, 64": ([nn.Conv2d(3, 64, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, True)], 64),
    "d 64-128, 32": (_down(64, 128), 32),
    "d 128-256, 16": (_down(128, 256), 16),
    "d 256-512, 8": (_down(256, 512), 8),
    "d 512-1, 4": ([nn.Conv2d(512, 1, 4, bias=False)], 4),
}


def _timed(benchmark, function):
    def run():
        function()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=10, warmup_rounds=3)


@pytest.mark.parametrize("container", [nn.Sequential, FusedSequential], ids=["stock", "genfast"])
@pytest.mark.parametrize("layer", LAYERS)
def test_block(benchmark, layer, container):
    layers, size = LAYERS[layer]
    benchmark.group = layer
    block = container(*copy.deepcopy(layers)).to(DEVICE, memory_format=torch.channels_last)
    x = torch.randn(BATCH, layers[0].in_channels, size, size, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()

    def forward_and_backward():
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=HALF):
            y = block(x)
        y.sum().backward()

    _timed(benchmark, forward_and_backward)


def _stock_sampling(mu, logvar):
    return reparameterize(mu, logvar, torch.randn_like(mu)), kl_divergence(mu, logvar)


@pytest.mark.parametrize(
    "sample", [_stock_sampling, reparameterize_with_kl], ids=["stock", "genfast"]
)
def test_sampling(benchmark, sample):
    benchmark.group = "sampling and KL"
    mu, logvar = torch.randn(2, LATENTS // 128, 128, device=DEVICE).unbind()
    mu, logvar = mu.clone().requires_grad_(), logvar.clone().requires_grad_()

    def forward_and_backward():
        z, kl = sample(mu, logvar)
        (z.sum() + kl.sum()).backward()

    _timed(benchmark, forward_and_backward)
