"""Points of a latent space whose prior is N(0, 1): at random, between two, around, on a grid."""

import math

import torch


def draws(num, shape, seed):
    """Yield (num, *shape) from N(0, 1) for ever, in CPU memory: the same for every device."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(num, *shape, generator=generator)


def between(start, end, num):
    """Points on the way from one latent to another, spherically interpolated.

    Nearly all of N(0, 1) in many dimensions lies near a sphere, whose inside the straight way would
    cross (White, 2016, arXiv:1609.04468). With the angle w between the two, the point at t is
    (sin((1 - t) w) start + sin(t w) end) / sin(w), after Shoemake (1985).

    Args:
        start, end: of one shape.
        num: how many, both ends included; 1 gives the start.

    Returns:
        (num, *shape). Where the two lie on one line through 0, with no angle between them to go
        through, the straight way.
    """
    a, b = start.double().flatten(), end.double().flatten()
    t = torch.linspace(0, 1, num, dtype=torch.float64)[:, None]
    cosine = torch.dot(a, b) / (a.norm() * b.norm()).clamp(min=torch.finfo(torch.float64).tiny)
    angle = torch.acos(cosine.clamp(-1, 1))
    sine = torch.sin(angle)
    if sine < 1e-6:
        points = (1 - t) * a + t * b
    else:
        points = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / sine
    return points.to(start.dtype).reshape(num, *start.shape)


def around(first, second, num):
    """Points on a closed way through the latent space, where the first follows the last.

    cos(p) first + sin(p) second, for evenly spaced p from 0 to below 2 pi: of two independent draws
    from N(0, 1) each point again is one.

    Args:
        first, second: of one shape.

    Returns:
        (num, *shape), beginning with `first`.
    """
    p = torch.arange(num, dtype=torch.float64) * (2 * math.pi / num)
    p = p.reshape(num, *(1,) * first.dim())
    return (torch.cos(p) * first + torch.sin(p) * second).to(first.dtype)


def quantiles(side):
    """A grid over a latent plane, each of whose side x side cells holds as much of N(0, 1).

    The coordinates are the normal distribution's quantiles at (i + 0.5) / side, as in figure 4 of
    Kingma and Welling (2014).

    Returns:
        (side * side, 2), row by row: the first coordinate grows to the right, the second upwards.
    """
    values = torch.special.ndtri((torch.arange(side, dtype=torch.float64) + 0.5) / side).float()
    y, x = torch.meshgrid(values.flip(0), values, indexing="ij")
    return torch.stack([x, y], 2).reshape(-1, 2)
