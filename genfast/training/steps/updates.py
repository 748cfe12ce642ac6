"""What an optimizer does around its arithmetic, left out where it cannot matter.

`Adam.step` checks and sorts its parameters anew at every step, as long as a small network's update
itself takes on a CPU. A CUDA graph leaves all of that out anyway.
"""

import torch
from torch.optim import Adam, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks


def update(optimizer):
    """What `optimizer.step()` does."""
    calls = _fused_calls(optimizer)
    if calls is None:
        optimizer.step()
        return
    with torch.no_grad():
        for steps, tensors, settings in calls:
            torch._foreach_add_(steps, 1)
            torch._fused_adam_(*tensors, [], steps, amsgrad=False, **settings)


def clear_gradients(optimizer):
    """What `optimizer.zero_grad()` does."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad or "zero_grad" in vars(optimizer):
        optimizer.zero_grad(set_to_none=True)
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


def _fused_calls(optimizer):
    """For each group (counts of steps, parameters and their states, settings) of fused Adam.

    None where `step` is to be called: of any other optimizer than a plain fused Adam on a CPU, if
    somebody watches the step or replaced it (as PyTorch's schedulers do, to count), at the first
    step, and where a gradient or its parameter is not as usual.
    """
    if type(optimizer) is not Adam or "step" in vars(optimizer) or _is_watched(optimizer):
        return None
    calls = []
    for group in optimizer.param_groups:
        special = ("amsgrad", "differentiable", "decoupled_weight_decay")
        if not group["fused"] or any(group[name] for name in special):
            return None
        rows = []
        for p in group["params"]:
            gradient, state = p.grad, optimizer.state.get(p)
            if gradient is None:
                continue
            usual = p.device.type == "cpu" and p.dtype == gradient.dtype == torch.float32
            if not usual or gradient.layout != torch.strided or not state:
                return None
            rows.append((p, gradient, state["exp_avg"], state["exp_avg_sq"], state["step"]))
        if not rows:
            continue
        *tensors, steps = (list(column) for column in zip(*rows, strict=True))
        beta1, beta2 = group["betas"]
        settings = {name: group[name] for name in ("lr", "weight_decay", "eps", "maximize")}
        if any(isinstance(value, torch.Tensor) for value in (beta1, beta2, *settings.values())):
            return None
        calls.append((steps, tensors, dict(settings, beta1=beta1, beta2=beta2)))
    return calls


def _is_watched(optimizer):
    return (
        optimizer._optimizer_step_pre_hooks
        or optimizer._optimizer_step_post_hooks
        or _global_optimizer_pre_hooks
        or _global_optimizer_post_hooks
    )
