"""Losses of logits, and their gradient."""

import torch

from genfast.backend import triton
from genfast.launch import passes, start, sums, tape, tiles

if triton is not None:
    from genfast.kernels import losses as kernels

# Values of a tile of a loss, and how many tiles one program sums before others help: the logits of
# a GAN are few, and a second kernel to add two sums would cost more than it saves.
_LOSS_TILE = 1024
_LOSS_TILES_ALONE = 4


def logit_loss(logits, targets, scale, kind="logistic", paired=False, with_gradient=False):
    """scale * sum(f(logits, targets)): a scalar, float32 or wider.

    Args:
        logits: of any shape, contiguous.
        targets: alike, for "logistic"; or a number of labels 1, which come first and labels 0 after
            them.
        scale: a number.
        kind: a row of the table in kernels/losses.py.
        paired: whether the terms are the logits' first half minus the second.
        with_gradient: whether the gradient of the logits is wanted too.

    Returns:
        The loss, and what `logit_loss_backward` gives for a dloss of 1, None if not wanted.
    """
    dlogits = torch.empty_like(logits) if with_gradient else None
    acc_dtype = start.acc_dtype(logits.dtype)
    loss = torch.empty((), dtype=acc_dtype, device=logits.device)
    count = tiles.ceil_div(logits.numel() // (1 + paired), _LOSS_TILE)
    parts = 1 if count <= _LOSS_TILES_ALONE else min(count, passes.programs(logits, 8))
    tiles_per_part = tiles.ceil_div(count, parts)
    parts = tiles.ceil_div(count, tiles_per_part)
    partials = loss
    if parts > 1:
        partials = torch.empty(parts, dtype=acc_dtype, device=logits.device)
    tape.start(
        kernels.logit_loss,
        (parts,),
        out_ptr=partials,
        dlogits_ptr=dlogits if with_gradient else logits,
        tiles_per_part=tiles_per_part,
        HAS_GRADIENT=with_gradient,
        **_arguments(logits, targets, scale, kind, paired),
    )
    if parts > 1:
        sums.sum_partials(partials[:, None], loss)
    return loss, dlogits


def logit_loss_backward(dloss, logits, targets, scale, kind="logistic", paired=False):
    """The gradient of the logits, in their dtype. dloss is a scalar tensor."""
    dlogits = torch.empty_like(logits)
    tape.start(
        kernels.logit_loss_backward,
        (tiles.ceil_div(logits.numel() // (1 + paired), _LOSS_TILE),),
        dloss_ptr=dloss,
        dlogits_ptr=dlogits,
        **_arguments(logits, targets, scale, kind, paired),
    )
    return dlogits


def _arguments(logits, targets, scale, kind, paired):
    has_targets = isinstance(targets, torch.Tensor)
    rows, row_length = passes.rows(logits)
    return dict(
        logits_ptr=logits,
        targets_ptr=targets if has_targets else logits,
        rows=rows // (1 + paired),
        row_length=row_length,
        ones=0 if has_targets else targets,
        scale=float(scale),
        ACC_DTYPE=start.tl_dtype(start.acc_dtype(logits.dtype)),
        LOSS=kind,
        HAS_TARGETS=has_targets,
        PAIRED=paired,
        BLOCK=_LOSS_TILE,
    )
