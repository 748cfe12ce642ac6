"""Binary cross entropy of logits, and its gradient."""

import torch

from genfast.backend import triton
from genfast.launch import passes, start, sums, tape, tiles

if triton is not None:
    from genfast.kernels import losses as kernels

# Values of a tile of a loss, and how many tiles one program sums before others help: the logits of
# a GAN are few, and a second kernel to add two sums would cost more than it saves.
_LOSS_TILE = 1024
_LOSS_TILES_ALONE = 4


def logistic_loss(logits, targets, scale, with_gradient=False):
    """scale * sum(softplus(logits) - targets * logits): a scalar, float32 or wider.

    Args:
        logits: of any shape, contiguous.
        targets: alike; or a number of labels 1, which come first and labels 0 after them.
        scale: a number.
        with_gradient: whether the gradient of the logits is wanted too.

    Returns:
        The loss, and what `logistic_loss_backward` gives for a dloss of 1, None if not wanted.
    """
    dlogits = torch.empty_like(logits) if with_gradient else None
    acc_dtype = start.acc_dtype(logits.dtype)
    loss = torch.empty((), dtype=acc_dtype, device=logits.device)
    count = tiles.ceil_div(logits.numel(), _LOSS_TILE)
    parts = 1 if count <= _LOSS_TILES_ALONE else min(count, passes.programs(logits, 8))
    tiles_per_part = tiles.ceil_div(count, parts)
    parts = tiles.ceil_div(count, tiles_per_part)
    partials = loss
    if parts > 1:
        partials = torch.empty(parts, dtype=acc_dtype, device=logits.device)
    tape.start(
        kernels.logistic_loss,
        (parts,),
        out_ptr=partials,
        dlogits_ptr=dlogits if with_gradient else logits,
        tiles_per_part=tiles_per_part,
        HAS_GRADIENT=with_gradient,
        **_logits_and_targets(logits, targets, scale),
    )
    if parts > 1:
        sums.sum_partials(partials[:, None], loss)
    return loss, dlogits


def logistic_loss_backward(dloss, logits, targets, scale):
    """The gradient of the logits, in their dtype. dloss is a scalar tensor."""
    dlogits = torch.empty_like(logits)
    tape.start(
        kernels.logistic_loss_backward,
        (tiles.ceil_div(logits.numel(), _LOSS_TILE),),
        dloss_ptr=dloss,
        dlogits_ptr=dlogits,
        **_logits_and_targets(logits, targets, scale),
    )
    return dlogits


def _logits_and_targets(logits, targets, scale):
    has_targets = isinstance(targets, torch.Tensor)
    rows, row_length = passes.rows(logits)
    return dict(
        logits_ptr=logits,
        targets_ptr=targets if has_targets else logits,
        rows=rows,
        row_length=row_length,
        ones=0 if has_targets else targets,
        scale=float(scale),
        ACC_DTYPE=start.tl_dtype(start.acc_dtype(logits.dtype)),
        HAS_TARGETS=has_targets,
        BLOCK=_LOSS_TILE,
    )
