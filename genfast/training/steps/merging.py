"""Whether a discriminator may see real and generated images in one pass."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from genfast.models import DCGANDiscriminator, GANDiscriminator
from genfast.models.gan import Maxout
from genfast.nn import FusedBlock, FusedSequential
from genfast.training.steps.half_weights import CONVERTED_LAYERS

# Modules that treat images one by one, and batch norms, whose statistics are kept apart. Modules
# count as these if they run the same forward.
_ACTIVATIONS = (
    nn.ELU, nn.GELU, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.Mish, nn.PReLU, nn.ReLU, nn.ReLU6,
    nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Tanh,
)  # fmt: skip
_RESHAPING = (
    nn.Flatten, nn.Identity, nn.PixelShuffle, nn.PixelUnshuffle, nn.Unflatten, nn.Upsample,
    nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.AvgPool2d, nn.MaxPool2d, nn.ReflectionPad2d,
    nn.ReplicationPad2d, nn.ZeroPad2d,
)  # fmt: skip
_WEIGHTED = (
    nn.Bilinear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d,
    nn.ConvTranspose3d, nn.GroupNorm, nn.LayerNorm, nn.Linear, Maxout,
)  # fmt: skip
# Of these, layers that leave an image as it is.
_IDLE = (nn.Flatten, nn.Identity, nn.Unflatten)
_DROPOUT = (nn.AlphaDropout, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_CONTAINERS = (nn.Sequential, FusedSequential, FusedBlock, DCGANDiscriminator, GANDiscriminator)
_ONE_BY_ONE = {
    kind.forward
    for kind in (*_ACTIVATIONS, *_RESHAPING, *_WEIGHTED, *_DROPOUT, *_CONTAINERS, _BatchNorm)
}


def why_not_merged(discriminator):
    """Say why real and generated images need two passes; None if one pass gives the same.

    The pass runs within `genfast.nn.statistics_groups`, which keeps batch norm apart; every other
    layer must treat images one by one, and nobody may be watching.
    """
    for name, module in discriminator.named_modules():
        where = f"its layer {name}" if name else "it"
        if type(module).forward not in _ONE_BY_ONE:
            return f"{where}, a {type(module).__name__}, may treat a batch as a whole"
        if "forward" in vars(module):
            return f"{where} has its forward replaced"
        if parametrize.is_parametrized(module):
            return f"{where} has a parametrisation, which may change at each pass"
        if _has_hook(module):
            return f"{where} has a hook, which would see one batch for two"
    return None


def converts_its_input(discriminator):
    """Whether a discriminator that may be merged takes its images in autocast's precision.

    Its first layer then makes the same of an image, whether it was converted before or not.
    """
    layers = (m for m in discriminator.modules() if not list(m.children()))
    first = next((m for m in layers if type(m) not in _IDLE), None)
    return type(first) in CONVERTED_LAYERS


def _has_hook(module):
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return any(hooks)
