"""A step whose batch is spread over processes, each with a copy of the networks.

The networks come wrapped in `DistributedDataParallel`, which gives all copies the same weights and
names the processes. Of its ways with gradients a step uses none: a GAN's discriminator runs more
than once in an update, and only the whole of its gradient is worth an exchange. It is summed over
the processes once an update, a few large sums at a time, before anybody reads it.

A process's loss counts by its part of all images, and goes into the backward pass so: then the sums
of synchronised batch norms, which mix what comes from all processes, are those of one large batch.
"""

from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from genfast import processes

# Bytes of gradients that are summed together: enough for a network to be busy with.
_BUCKET = 2**25


def unwrapped(networks):
    """Networks without `DistributedDataParallel`, and the process group of all of them.

    Args:
        networks: a dict of modules by name.

    Returns:
        (a dict of modules, the group or None where they are not wrapped).

    Raises:
        ValueError: only some are wrapped, they have different groups, or one is wrapped otherwise.
    """
    for name, network in networks.items():
        if _is_sharded(network):
            raise ValueError(
                f"expected a {name} that each process has whole, as DistributedDataParallel has "
                f"it, got one whose parameters are sharded ({type(network).__name__})"
            )
    wrapped = {n: m for n, m in networks.items() if isinstance(m, DistributedDataParallel)}
    if not wrapped:
        return networks, None
    if len(wrapped) < len(networks):
        alone = next(name for name in networks if name not in wrapped)
        raise ValueError(
            f"expected all networks in DistributedDataParallel or none, got the {alone} without"
        )
    groups = [network.process_group for network in wrapped.values()]
    if any(group is not groups[0] for group in groups):
        raise ValueError("expected networks of one process group, got several")
    return {name: network.module for name, network in wrapped.items()}, groups[0]


def _is_sharded(network):
    if any("fsdp" in type(m).__module__ for m in network.modules()):
        return True
    return any(type(p).__name__ == "DTensor" for p in network.parameters())


class Spread:
    """What the processes of a group do together in a step.

    Args:
        group: the `torch.distributed` group.
        sums: whether a loss is a sum over images, and not their mean.

    Attributes:
        weight: by which a process's loss is multiplied, a scalar on the device, of this step.
    """

    def __init__(self, group, sums=False):
        self._group, self._sums = group, sums
        self.weight = self._part = None

    @property
    def why_not_captured(self):
        """Why a graph cannot hold what processes exchange; None if it can."""
        engine = dist.get_backend(self._group)
        return None if engine == "nccl" else f"no graph holds what {engine} exchanges"

    @contextmanager
    def apart(self, networks):
        """Within, synchronised batch norms of these networks take this process's images alone.

        How often a trial runs a network depends on what it sees, which is another part of the
        batch in each process: none may then wait for another.
        """
        norms = [m for n in networks for m in n.modules() if isinstance(m, nn.SyncBatchNorm)]
        before = [norm.process_group for norm in norms]
        # No other process has to come here for a group of one.
        own = dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
        for norm in norms:
            norm.process_group = own
        try:
            yield
        finally:
            for norm, group in zip(norms, before, strict=True):
                norm.process_group = group
            dist.destroy_process_group(own)

    def begin(self, images):
        """Begin a step with these images, this process's part of the batch."""
        # Filled, not copied there: a graph may be recorded.
        count = torch.full((), float(len(images)), device=images.device)
        self._part = count / processes.summed(count, self._group)
        self.weight = torch.ones_like(self._part) if self._sums else self._part

    @torch.no_grad()
    def give_to_all(self, tensors):
        """Let each tensor be as the first process has it, as the wrapper did with the networks."""
        first = dist.get_global_rank(self._group, 0)
        for tensor in tensors:
            dist.broadcast(tensor, first, group=self._group)

    @torch.no_grad()
    def sum_gradients(self, gradients):
        """Let each gradient be the sum of those of all processes."""
        bucket, size = [], 0
        for i, gradient in enumerate(gradients):
            bucket.append(gradient)
            size += gradient.nbytes
            if size >= _BUCKET or i == len(gradients) - 1:
                self._sum(bucket)
                bucket, size = [], 0

    def _sum(self, gradients):
        flat = torch.cat([g.float().flatten() for g in gradients])
        flat = processes.summed(flat, self._group)
        parts = flat.split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view(gradient.shape))

    def means(self, values):
        """Scalars of a step, each a mean over images here: those over all images."""
        together = processes.summed(torch.stack(list(values)) * self._part, self._group)
        return tuple(together.unbind())

    def any(self, here):
        """Whether something holds in one of the processes."""
        flag = torch.tensor(float(here), device=self._device)
        return bool(processes.summed(flag, self._group) > 0)

    @property
    def _device(self):
        nccl = dist.get_backend(self._group) == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
