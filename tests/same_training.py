"""Train a step a little, and hold all that this changed to be the same bits in another training."""

import torch

# Exact in float32, in which a captured step keeps it on the device.
LEARNING_RATE = 2.0**-12
SEED = 3


def train(step, shape, steps=6, images=None):
    """Make steps on images in [0, 1] of that shape, the same ones each time.

    Args:
        step: a `GANStep` or `VAEStep`, whose learning rates become LEARNING_RATE.
        shape: (N, C, H, W) of the batch.
        steps: how many.
        images: the batch, in place of one of that shape.

    Returns:
        What came out and what changed, by name: the losses of each step; every entry of the step's
        state (weights, statistics, counters, moments, scales); the random numbers that follow.
    """
    for optimizer in step.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE
    torch.manual_seed(SEED)
    if images is None:
        low, high = step.pixel_range
        images = torch.rand(shape, device=step.device) * (high - low) + low
    losses = torch.stack([torch.stack(tuple(step(images))) for _ in range(steps)])
    following = torch.randn(3, device=step.device)
    return {"losses": losses, **dict(_entries(step.state_dict(), "")), "random numbers": following}


def _entries(value, name):
    """(dotted name, tensor or plain value) of all that dictionaries and sequences hold."""
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, (list, tuple)):
        inside = enumerate(value)
    else:
        yield name, value.clone() if isinstance(value, torch.Tensor) else value
        return
    for key, entry in inside:
        yield from _entries(entry, f"{name}.{key}".lstrip("."))


def assert_same_bits(ours, theirs):
    """Hold two results of `train` to be the same, every bit of every tensor."""
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    problems = [
        f"{name}: {_difference(ours[name], theirs[name])}"
        for name in ours
        if not _same(ours[name], theirs[name])
    ]
    assert not problems, f"{len(problems)} of {len(ours)} differ: {'; '.join(problems[:10])}"


def _same(a, b):
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and a == b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    # As bytes, a NaN equals itself and zeros of two signs differ.
    return torch.equal(*(t.contiguous().flatten().view(torch.uint8) for t in (a, b)))


def _difference(a, b):
    both = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    if both and a.shape == b.shape:
        return f"up to {(a.double() - b.double()).abs().max().item():.3g}"
    return f"{a!r}, expected {b!r}"
