"""Whether variants train the same: no speed counts that comes with other losses.

Training a GAN amplifies rounding: after 20 steps of a DCGAN, losses in float32 differ by a tenth
where nothing but the memory format changed. So a fixed tolerance would refuse everything or notice
nothing. What is allowed at each step is measured: how far the public recipe's own losses drift when
its initial weights are shaken by one rounding of the precision in question.
"""

from dataclasses import replace

import torch

STEPS = 20
SHAKES = 2
# A variant may drift this many times as far as the shaken recipe has until then, plus a floor, as a
# share of the largest loss so far, for the first steps, where that is luck.
FACTOR = 5.0
FLOORS = {False: 1e-4, True: 1e-3}
ROUNDINGS = {False: 2.0**-24, True: 2.0**-9}  # Of float32 and bfloat16.
# Where noise is drawn otherwise, the mean of the losses is compared: what 20 draws leave.
OTHER_NOISE = 5e-2


def first_losses(build, workload):
    """The losses of the first steps, (STEPS, losses), without dropout.

    Its masks would be drawn in another order where real and generated images share a pass. The
    seed is set before each step, so that all draw the same noise.
    """
    step, images = build(workload, dropout=False), workload.images()
    losses = []
    for i in range(STEPS):
        torch.manual_seed(i)
        losses.append(torch.stack(tuple(step(images))).float().cpu())
    return torch.stack(losses)


def allowance(build, workload, reference, half):
    """(STEPS, losses): how far from the reference's a variant's losses may be at each step.

    Args:
        build: the recipe to shake: the example, or for half precision its bfloat16 form.
        reference: the example's losses.
        half: whether the allowance is for half precision.
    """
    drift = torch.zeros_like(reference)
    for seed in range(SHAKES):
        shaken = replace(workload, shake=ROUNDINGS[half], shake_seed=seed)
        drift = drift.maximum((first_losses(build, shaken) - reference).abs())
    # Losses drift together: which of them is ahead is chance.
    drift = drift.amax(1, keepdim=True).cummax(0).values
    return FACTOR * drift + FLOORS[half] * reference.abs().cummax(0).values


def disagreement(losses, reference, allowed):
    """The largest difference as a share of what is allowed: fine up to 1."""
    share = ((losses - reference).abs() / allowed).max().item()
    return share if share == share else float("inf")


def disagreement_of_means(losses, reference):
    """The same where the noise is not the reference's."""
    losses, reference = losses.mean(0), reference.mean(0)
    return disagreement(losses, reference, OTHER_NOISE * reference.abs())
