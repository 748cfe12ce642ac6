"""One update of one network: by its optimizer's own `step`, or by a kernel that does the same.

PyTorch's fused Adam reads gradients in float32 and writes weights in float32; half-precision copies
of both are converted by kernels of their own, before and after. The kernel of `genfast.launch.adam`
takes a gradient as it is and writes the copy too.
"""

from contextlib import ExitStack, contextmanager

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from genfast import functional
from genfast.backend import INTERPRETING, selected_backend
from genfast.launch import adam, first_use
from genfast.training.steps import half_weights

_STATE = {"step", "exp_avg", "exp_avg_sq"}
_VARIANTS = ("amsgrad", "maximize", "differentiable", "decoupled_weight_decay")


class Update:
    """Steps the optimizer of one network.

    By the kernel wherever `why_not` has no reason. The state is what PyTorch makes, so either can
    go on after the other. Parameters whose gradient was in half precision have no `grad` after an
    update by the kernel.

    Args:
        optimizer: a `torch.optim.Optimizer`.
        half: the network's `HalfWeights`, or None.
    """

    def __init__(self, optimizer, half=None):
        self._optimizer, self._half = optimizer, half
        self._told = self._why_not_the_last = None
        # By group: what the table holds, and the table; memory for one that a graph reads; what a
        # recording put into such memory, and those that are in a graph.
        self._tables, self._spare, self._recorded, self._in_graph = {}, {}, None, ()

    @property
    def why_not(self):
        """Why the optimizer's own `step` updates its network, in words; None if the kernel does."""
        return _why_not(self._optimizer) or self._why_not_the_last

    @property
    def takes_half(self):
        """Whether gradients of half-precision copies may stay there until the update."""
        return _why_not(self._optimizer) is None

    @property
    def recorded(self):
        """The memory that the graph recorded last reads."""
        return self._in_graph

    def step(self, refresh=False):
        """Make the update.

        Args:
            refresh: whether the half-precision copies are to be what the parameters become.
        """
        groups = self._ready_groups(refresh) if self.takes_half else None
        if groups is None:
            if self._half:
                self._half.hand_over_gradients()
            self._optimizer.step()
            if refresh and self._half:
                half_weights.refresh(self._half)
            return
        self._tell_scheduler()
        for group, (weights, table) in groups:
            torch._foreach_add_([w.step for w in weights], 1)
            adam.adam(
                table,
                weights,
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
            for p in group["params"]:
                if p in self._copies:
                    self._copies[p].grad = None
        if self._half:  # Of weights that the optimizer does not hold.
            self._half.hand_over_gradients()

    @property
    def _copies(self):
        return self._half.copies if self._half else {}

    def _ready_groups(self, refresh):
        """[(group, (weights, table))] for the kernel, or None."""
        self._why_not_the_last = None
        copies, groups = self._copies, self._optimizer.param_groups
        parameters = [p for group in groups for p in group["params"]]
        if any(p.grad is not None and _gradient(copies.get(p)) is not None for p in parameters):
            self._half.hand_over_gradients()  # Sums of gradients are in float32.
        ready = []
        for i, group in enumerate(groups):
            weights = []
            for p in group["params"]:
                copy = copies.get(p)
                gradient = p.grad if _gradient(copy) is None else copy.grad
                if gradient is None:
                    continue
                if gradient.layout != torch.strided or type(gradient) is not torch.Tensor:
                    self._why_not_the_last = "a gradient is no dense tensor"
                    return None
                state = self._optimizer.state[p]
                if not state:
                    state.update(_made_state(p))
                given = (state["exp_avg"], state["exp_avg_sq"], state["step"], gradient)
                weights.append(adam.Weight(p, *given, copy if refresh else None))
            if weights:
                _lay_out(weights)
                table = self._table(i, weights)
                if table is None:
                    self._why_not_the_last = "a CUDA graph records that is not the step's own"
                    return None
                ready.append((group, (weights, table)))
        return ready

    def _tell_scheduler(self):
        """Let a learning-rate scheduler know of an update: it wraps `step`, and warns without."""
        step = _own_step(self._optimizer)
        if step is None or step is self._told:
            return
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        gradients = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        self._optimizer.step()  # Which changes nothing without a gradient.
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        self._told = step

    def _table(self, i, weights):
        """The table of group i on the device; None if a graph could not read it."""
        host = adam.table(weights)
        device = weights[0].p.device
        if device.type == "cpu" and not first_use.is_captured(device):
            return host
        if first_use.is_captured(device):
            # Nothing can be copied to the device now, and memory taken now may be another's earlier
            # in each replay. So it goes into memory from before, when the recording is over.
            spare = self._spare.get(i)
            if self._recorded is None or spare is None or len(spare) < len(host):
                return None
            del self._spare[i]
            self._recorded.append((spare, host))
            return spare
        known, table = self._tables.get(i, (None, None))
        if known is None or not torch.equal(known, host):
            table = host.to(device)
            self._tables[i] = host, table
        if i not in self._spare:
            self._spare[i] = torch.empty_like(table)
        return table

    @contextmanager
    def _recording(self):
        self._recorded = []
        try:
            yield
            for table, host in self._recorded:
                table[: len(host)].copy_(host)
            self._in_graph = self._recorded
        finally:
            self._recorded = None


@contextmanager
def recording(*updates):
    """Within, a graph is recorded with these in it; `recorded` is then what it reads of them."""
    with ExitStack() as stack:
        for update in updates:
            stack.enter_context(update._recording())
        yield


def _own_step(optimizer):
    """What stands in for the class's `step` in this instance; None if nothing."""
    return vars(optimizer).get("step")


def _why_not(optimizer):
    """Why the kernel cannot do what this optimizer does, whatever the gradients."""
    if selected_backend() == "reference":
        return "the backend is PyTorch"
    if type(optimizer) is not torch.optim.Adam:
        return f"the kernel is Adam's, got {type(optimizer).__name__}"
    own = _own_step(optimizer)
    if own is not None and not _is_schedulers(own, optimizer):
        return "the optimizer's step was replaced"
    hooks = (
        optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks, _global_optimizer_post_hooks,
    )  # fmt: skip
    if any(hooks):
        return "the optimizer has a hook"
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    devices = {p.device for p in parameters}
    if len(devices) != 1:
        return "the parameters are on more than one device"
    (device,) = devices
    if INTERPRETING and device.type != "cpu":
        return "the interpreter reaches no address on a GPU"
    for group in optimizer.param_groups:
        reason = _why_not_group(group, device)
        if reason:
            return reason
    for p in parameters:
        reason = functional.why_not_triton(p)
        if reason:
            return reason
        reason = _why_not_parameter(p, optimizer.state.get(p))
        if reason:
            return f"of a parameter of shape {tuple(p.shape)}: {reason}"
    return None


def _made_state(p):
    """What PyTorch's fused Adam begins with."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=p.device),
        "exp_avg": torch.zeros_like(p, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(p, memory_format=torch.preserve_format),
    }


def _is_schedulers(step, optimizer):
    """Whether this is what a learning-rate scheduler wraps an optimizer's own `step` in."""
    wraps = getattr(step, "__wrapped__", None) is type(optimizer).step
    return wraps and getattr(step, "_wrapped_by_lr_sched", False)


def _why_not_group(group, device):
    for name in _VARIANTS:
        if group.get(name):
            return f"the kernel has no {name}"
    if not (group["fused"] or group["capturable"]):
        return "step counters are on the CPU without fused=True or capturable=True"
    if any(isinstance(beta, torch.Tensor) for beta in group["betas"]):
        return "the betas are tensors"
    lr = group["lr"]
    if isinstance(lr, torch.Tensor) and lr.device != device:
        return f"the learning rate is on {lr.device}, the parameters on {device}"
    return None


def _why_not_parameter(p, state):
    if p.dtype != torch.float32:
        return f"the kernel takes float32, got {p.dtype}"
    if not state:
        return adam.why_not(p)
    if state.keys() != _STATE or not all(isinstance(t, torch.Tensor) for t in state.values()):
        return "its state is not Adam's"
    if state["step"].device != p.device:
        return "its step counter is on another device"
    if any(t.dtype != torch.float32 or t.device != p.device for t in state.values()):
        return "its state is not in float32 on its device"
    return adam.why_not(p, state["exp_avg"], state["exp_avg_sq"])


def _gradient(copy):
    return None if copy is None else copy.grad


@torch.no_grad()
def _lay_out(weights):
    """Copy gradients that do not lie like their parameters, such as halves of one odd tensor."""
    misfits = [i for i, w in enumerate(weights) if adam.why_not(w.p, w.gradient)]
    if misfits:
        fitting = [torch.empty_like(weights[i].p) for i in misfits]
        torch._foreach_copy_(fitting, [weights[i].gradient for i in misfits])
        for i, gradient in zip(misfits, fitting, strict=True):
            weights[i].p.grad = gradient
            weights[i] = weights[i]._replace(gradient=gradient)
