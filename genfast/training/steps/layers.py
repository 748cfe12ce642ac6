"""The layers whose ways are known: what they do with a batch, and who reads their weights.

A network that consists of them may run otherwise than its owner wrote it. Modules count as one of
these if they run the same forward.
"""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrizations, parametrize

from genfast.models import VAE, ConvVAE, DCGANDiscriminator, DCGANGenerator
from genfast.models.gan import GANDiscriminator, GANGenerator, Maxout
from genfast.models.vae_gan import VAEGANDiscriminator, VAEGANEncoder
from genfast.nn import FusedBlock, FusedSequential

# Layers whose weights autocast converts, and which use them for nothing else.
CONVERTED = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
# Layers that leave an image as it is.
IDLE = (nn.Flatten, nn.Identity, nn.Unflatten)
DROPOUT = (nn.AlphaDropout, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)

_ACTIVATIONS = (
    nn.ELU, nn.GELU, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6,
    nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Tanh,
)  # fmt: skip
_RESHAPING = (
    nn.PixelShuffle, nn.PixelUnshuffle, nn.Upsample, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    nn.AvgPool2d, nn.MaxPool2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ZeroPad2d,
)  # fmt: skip
_WEIGHTED = (nn.Bilinear, nn.Embedding, nn.GroupNorm, nn.LayerNorm, Maxout)
_CONTAINERS = (
    nn.Sequential, FusedSequential, FusedBlock, DCGANDiscriminator, DCGANGenerator,
    GANDiscriminator, GANGenerator, VAEGANDiscriminator, VAEGANEncoder,
)  # fmt: skip
_ONE_BY_ONE = {
    kind.forward
    for kinds in (CONVERTED, IDLE, DROPOUT, _ACTIVATIONS, _RESHAPING, _WEIGHTED, _CONTAINERS)
    for kind in kinds
}
# Called by more than their forward: only the classes themselves, no subclass, are known.
_MODELS = (VAE, ConvVAE)
_CALLED = {"forward", "encode", "decode", "decode_logits"}


def runs_as(module, kind):
    """Whether it runs the forward of this class."""
    return _forward_of(module) is kind.forward


def treats_images_one_by_one(module):
    """Whether it is known to; a batch norm does within `genfast.nn.statistics_groups`."""
    if runs_as(module, _InstanceNorm):
        return not module.track_running_stats
    if runs_as(module, nn.GLU):
        return module.dim == 1  # Of what may be the batch's, from behind, nothing is known.
    batch_norms = _BatchNorm.forward, nn.SyncBatchNorm.forward
    return _forward_of(module) in batch_norms or _forward_of(module) in _ONE_BY_ONE


def reads_no_others_weights(module):
    """Whether it is known to leave the weights of its children to them."""
    if treats_images_one_by_one(module) or type(module) in _MODELS:
        return True
    home = type(module).__module__
    if isinstance(module, parametrize.ParametrizationList) or home == parametrizations.__name__:
        return True  # What they read is no layer's parameter any more.
    if isinstance(module, nn.ModuleDict | nn.ModuleList):
        return home == nn.ModuleList.__module__  # Which are never called.
    return home.startswith("torch.nn.modules.") and not any(module.children())


def is_replaced(module):
    """Whether this module alone runs something else than its class."""
    called = _CALLED if type(module) in _MODELS else {"forward"}
    return not vars(module).keys().isdisjoint(called)


def is_distributed(module):
    """Whether it is spread over devices."""
    spread = ("torch.nn.parallel", "torch.distributed")
    return type(module).__module__.startswith(spread)


def _forward_of(module):
    # The class of a TorchScript module has none that could be asked for.
    return None if isinstance(module, torch.jit.ScriptModule) else type(module).forward
