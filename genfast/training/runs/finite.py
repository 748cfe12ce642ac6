"""Whether weights are finite: what is not neither replaces a checkpoint nor draws a picture."""

import math

from torch.nn.utils import get_total_norm

from genfast.training.errors import BadInput


def first_not_finite(modules):
    """The name of a parameter or buffer that holds NaN or infinity, or None.

    Waits for the device once.

    Args:
        modules: a dict of modules.
    """
    tensors = {
        f"{name}.{key}": tensor
        for name, module in modules.items()
        for key, tensor in module.state_dict().items()
        if tensor.is_floating_point() and tensor.numel()
    }
    # The largest magnitude is finite where all are; a sum could overflow.
    if get_total_norm(tensors.values(), math.inf).isfinite():
        return None
    return next(name for name, tensor in tensors.items() if not tensor.isfinite().all())


def refuse_not_finite(modules, path):
    """BadInput if the weights read from the checkpoint at `path` are not finite."""
    name = first_not_finite(modules)
    if name:
        raise BadInput(
            f"expected finite weights in {path}, got NaN or infinity in {name}: the training had "
            f"diverged"
        )
