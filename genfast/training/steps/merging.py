"""Whether a discriminator may see real and generated images in one pass.

The pass runs within `genfast.nn.statistics_groups`, which keeps batch norm apart; every other layer
must treat images one by one, and nobody may be watching.
"""

from contextlib import ExitStack

import torch
from torch.nn.utils import parametrize

from genfast.nn import has_hook, statistics_groups
from genfast.training.memory import missing_memory
from genfast.training.steps import layers
from genfast.training.steps.trial import redrawn, undone, without_dropout

# How far the two ways may differ, as a part of the norm. In float32, rounding made less than 1e-6
# of public discriminators' logits and less than 3e-5 of their gradients; one channel among 129 that
# holds the batch's deviation made 3e-3 of the logits, a batch norm written by hand a half.
_TOLERANCES = {"logits": 3e-5, "buffers": 3e-5, "counters": 0, "gradients": 1e-2}
_COMPARED = (torch.float32, torch.float64)


def why_two_passes(discriminator, steady=()):
    """Say why one pass is out of the question; None if it is not.

    Args:
        discriminator: the network.
        steady: those of its layers whose parametrisation is known not to change at a pass.
    """
    for name, module in discriminator.named_modules():
        where = f"its layer {name}" if name else "it"
        if layers.is_distributed(module):
            return f"{where}, a {type(module).__name__}, is distributed over devices"
        if layers.is_replaced(module):
            return f"{where} has its forward replaced"
        if parametrize.is_parametrized(module) and module not in steady:
            return f"{where} has a parametrisation, which may change at each pass"
        if has_hook(module):
            return f"{where} has a hook, which would see one batch for two"
    return None


def why_unknown(discriminator):
    """Say which layer is not known to treat images one by one; None if all are."""
    for name, module in discriminator.named_modules():
        where = f"its layer {name}" if name else "it"
        if "parametrizations" in name.split("."):
            continue  # It is given weights, never images.
        if not layers.treats_images_one_by_one(module):
            return f"{where}, a {type(module).__name__}, may treat a batch as a whole"
    return None


def why_they_differ(judge, discriminator, loss, reals, fakes):
    """Run one batch both ways and say what differs; None if nothing does but by rounding.

    Compared are logits, buffers and the gradients of the discriminator's loss, with the weights as
    they are and with others: a function that agrees for weights drawn at random is the same one.
    PyTorch's dropout layers are off, as one pass draws other numbers than two. The discriminator
    and the random numbers are afterwards what they were.

    Args:
        judge: images to logits by the discriminator.
        discriminator: the network.
        loss: a `GANLoss`.
        reals, fakes: (N, C, H, W), in the precision of its weights.
    """
    wanted = {p.dtype for p in discriminator.parameters()}
    if not wanted <= set(_COMPARED):
        return "its weights are too coarse to tell by trying"
    for seed in (None, 1, 2):
        outcomes = []
        for passes in (_two_passes, _one_pass):
            with ExitStack() as stack:
                stack.enter_context(undone(discriminator, reals.device))
                stack.enter_context(without_dropout(discriminator))
                if seed is not None:
                    stack.enter_context(redrawn(discriminator, seed))
                try:
                    outcomes.append(_outcome(passes, judge, discriminator, loss, reals, fakes))
                except Exception as error:  # A stranger's code: of two batches it may raise any.
                    if missing_memory(error):
                        raise
                    reason = str(error).partition("\n")[0]
                    return f"trying raised {type(error).__name__}: {reason}"
        for name, tolerance in _TOLERANCES.items():
            two, one = (outcome[name] for outcome in outcomes)
            if one.shape != two.shape or not _close(one, two, tolerance):
                return f"one pass gave other {name} than two"
    return None


def converts_its_input(discriminator):
    """Whether a discriminator of known layers takes its images in autocast's precision.

    Its first layer then makes the same of an image, whether it was converted before or not.
    """
    leaves = (m for m in discriminator.modules() if not list(m.children()))
    first = next((m for m in leaves if type(m) not in layers.IDLE), None)
    return type(first) in layers.CONVERTED


def _two_passes(judge, discriminator, loss, reals, fakes):
    logits = torch.cat([judge(reals), judge(fakes)])
    return logits, loss.discriminator(logits)


def _one_pass(judge, discriminator, loss, reals, fakes):
    with statistics_groups(discriminator, 2):
        logits = judge(torch.cat([reals, fakes]))
    return logits, loss.discriminator(logits)


def _outcome(passes, judge, discriminator, loss, reals, fakes):
    """What a pass or two leave, a vector of each."""
    logits, loss = passes(judge, discriminator, loss, reals, fakes)
    parameters = [p for p in discriminator.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True) if parameters else ()
    buffers = list(discriminator.buffers())
    return {
        "logits": _vector([logits]),
        "buffers": _vector(b for b in buffers if b.is_floating_point()),
        "counters": _vector(b for b in buffers if not b.is_floating_point()),
        "gradients": _vector(g for g in gradients if g is not None),
    }


def _vector(tensors):
    parts = [t.detach().double().flatten() for t in tensors if not t.is_complex()]
    return torch.cat(parts) if parts else torch.zeros(0)


def _close(ours, expected, tolerance):
    """Whether the two agree; NaN agrees with nothing."""
    return bool((ours - expected).norm() <= tolerance * expected.norm())
