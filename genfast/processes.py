"""Sums and lists over the processes of a group, which each hold a part of a batch.

By `torch.distributed`, whose engine is gloo on CPUs and NCCL on GPUs. Each process must come here
as often as the others and in the same order.
"""

import torch
import torch.distributed as dist
from torch.autograd import Function


def group_of(module):
    """The process group over which a `nn.SyncBatchNorm` shares its statistics now; None if none.

    As its own forward decides: in training, among more than one process.
    """
    if not (module.training and dist.is_available() and dist.is_initialized()):
        return None
    group = module.process_group or dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def gathered(t, group):
    """(processes, *shape): what each of them has."""
    everyones = t.new_empty((dist.get_world_size(group), *t.shape))
    dist.all_gather(list(everyones.unbind()), t.contiguous(), group=group)
    return everyones


def summed(t, group):
    """The sum of what each process has. Differentiable, any number of times.

    The loss that its gradient belongs to is the sum of the losses of all processes.
    """
    return _Sum.apply(t, group)


class _Sum(Function):
    @staticmethod
    def forward(ctx, t, group):
        ctx.group = group
        total = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return _Sum.apply(gradient, ctx.group), None
