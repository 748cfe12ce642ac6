"""Weights of PyTorch's public DCGAN example, such as netG_epoch_24.pth and netD_epoch_24.pth.

Each file is the `state_dict` of one network, which holds the same layers as `DCGANGenerator` or
`DCGANDiscriminator` by the same names. Their shapes tell everything about the network. Training
with `nn.DataParallel` puts "module." before each name, and versions of PyTorch before 0.4.1 did not
count batches.
"""

from typing import Any, NamedTuple

import torch

from genfast.models import DCGANDiscriminator, DCGANGenerator
from genfast.models.sizes import plain
from genfast.training.errors import BadInput
from genfast.training.runs.checkpoint import mismatch
from genfast.training.runs.config import Config
from genfast.training.runs.models import MODELS

_FIRST = "main.0.weight"
_PREFIX = "module."
# What a `Config` has to have, where nobody knows it.
UNKNOWN = dict(data="unknown", num_images=1, checksum=0)


class ExampleWeights(NamedTuple):
    """One network's weights.

    network: "generator" or "discriminator".
    settings: those that give it its shape, a dict: nz and ngf, or ndf, and image_size.
    channels: of its images.
    state: its `state_dict`, by the names of `DCGANGenerator` or `DCGANDiscriminator`.
    """

    network: str
    settings: dict[str, Any]
    channels: int
    state: dict[str, torch.Tensor]

    def config(self) -> Config:
        """The settings of a run that could have made them; what is `UNKNOWN` stands for nothing."""
        settings = MODELS["dcgan"].defaults | self.settings
        return Config(model="dcgan", channels=self.channels, **UNKNOWN, **settings)


def are_example_weights(content: object) -> bool:
    """Whether what a file holds looks like such weights."""
    return isinstance(content, dict) and (_FIRST in content or _PREFIX + _FIRST in content)


def example_weights(content: dict[str, Any], path: object) -> ExampleWeights:
    """The weights that a file holds; BadInput if they are those of another architecture."""
    state = {str(name).removeprefix(_PREFIX): value for name, value in content.items()}
    kernels = _kernels(state, path)
    # The generator's second layer is a batch norm; the discriminator's has no weights.
    network = "generator" if "main.1.weight" in state else "discriminator"
    first, last = kernels[0], kernels[-1]
    base = (first if network == "generator" else last)[2:]
    height, width = (side << (len(kernels) - 1) for side in base)
    size = height, width
    try:
        with torch.device("meta"):  # Nothing but names and shapes.
            if network == "generator":
                nz, (ngf, channels, *_) = first[0], last
                known = dict(nz=nz, ngf=ngf)
                expected = DCGANGenerator(nz, ngf, channels, size)
            else:
                ndf, channels, *_ = first
                known = dict(ndf=ndf)
                expected = DCGANDiscriminator(channels, ndf, size)
    except ValueError as error:
        raise BadInput(f"{error}, by the shapes of the weights in {path}") from None
    for name, value in expected.state_dict().items():
        if name.endswith("num_batches_tracked"):
            state.setdefault(name, torch.zeros((), dtype=value.dtype))
    wrong = mismatch(expected.state_dict(), state)
    if wrong:
        raise BadInput(
            f"expected the weights of a DCGAN's {network}, as PyTorch's public example saves them, "
            f"in {path}, but {wrong}"
        )
    return ExampleWeights(network, known | dict(image_size=plain(*size)), channels, state)


def _kernels(state, path):
    """The shapes of the convolutions' weights, in order: two at least."""
    found = {}
    for name, value in state.items():
        _, _, rest = name.partition("main.")
        number = rest.removesuffix(".weight")
        if number.isdecimal() and isinstance(value, torch.Tensor) and value.dim() == 4:
            found[int(number)] = tuple(value.shape)
    shapes = [found[number] for number in sorted(found)]
    if len(shapes) < 2 or not all(map(all, shapes)):
        raise BadInput(
            f"expected the weights of a DCGAN, as PyTorch's public example saves them, in {path}, "
            f"got {len(shapes)} convolutions"
        )
    return shapes
