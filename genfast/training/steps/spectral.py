"""Spectral norm on a discriminator: each weight divided by its largest singular value.

Miyato et al. (2018). The layers get PyTorch's own parametrisation, whose singular vectors are found
by power iteration. Here it makes one iteration an update of the discriminator, and none in other
passes: so real and generated images meet the same weights, in one pass or in two.
"""

from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm, spectral_norm

from genfast.training.steps.layers import CONVERTED

_NORMALISED = (*CONVERTED, nn.Bilinear, nn.Embedding)


class SpectralNorm:
    """Spectral norm on every weight of the layers of a network.

    Their parameters stay the same objects, under the names that PyTorch gives them: `weight` is
    `parametrizations.weight.original`.

    Args:
        network: a `nn.Module`, which changes.

    Raises:
        ValueError: a layer has a parametrisation already, or none has a weight.
    """

    def __init__(self, network):
        layers = [(name, m) for name, m in network.named_modules() if isinstance(m, _NORMALISED)]
        if not layers:
            raise ValueError(
                "expected a discriminator with layers that spectral norm is for, got a "
                f"{type(network).__name__} without"
            )
        for name, layer in layers:
            if parametrize.is_parametrized(layer):
                raise ValueError(
                    "expected a discriminator that spectral norm can be put on, got one whose "
                    f"layer {name} has a parametrisation already"
                )
        self.layers = [spectral_norm(layer) for _, layer in layers]
        self._norms = [
            part
            for layer in self.layers
            for part in layer.parametrizations.weight
            if isinstance(part, _SpectralNorm)
        ]

    def buffers(self):
        """The singular vectors, tensors."""
        return [buffer for norm in self._norms for buffer in norm.buffers()]

    @torch.no_grad()
    def iterate(self):
        """Make one power iteration for each weight."""
        for layer, norm in zip(self.layers, self._norms, strict=True):
            if norm.training:
                norm(layer.parametrizations.weight.original)

    @contextmanager
    def steady(self):
        """Within, no iteration is made."""
        modes = [norm.training for norm in self._norms]
        try:
            for norm in self._norms:
                norm.training = False
            yield
        finally:
            for norm, mode in zip(self._norms, modes, strict=True):
                norm.training = mode

    @contextmanager
    def one_pass(self):
        """Within, the weights are computed once, in float32, and no iteration is made.

        For one forward pass: its graph holds how they were computed.
        """
        with self.steady(), parametrize.cached():
            with torch.autocast(self._device_type, enabled=False):
                for layer in self.layers:
                    layer.weight  # noqa: B018  Read once, it is kept.
            yield

    @property
    def _device_type(self):
        return self.layers[0].parametrizations.weight.original.device.type
