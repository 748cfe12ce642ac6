"""`make demo`: train a DCGAN on digits, then compare its speed with the usual PyTorch recipe."""

import statistics
import time

import torch
from torch import nn

from genfast.models import DCGANDiscriminator, DCGANGenerator
from genfast.training.data import Batches, normalize
from genfast.training.runs.config import prepare
from genfast.training.runs.loop import cudnn_setting, train
from genfast.training.runs.models import build_step
from genfast.training.steps.stock import StockGANStep

TRAINING_SECONDS = 110
COMPARING_SECONDS = 25
WARMUP_STEPS = 3
ROUNDS = 20
STEPS_A_TURN = 4
# No verdict where the middle half of the rounds' quotients spreads by more than this factor: with
# 20 rounds their median is then known to some 5 %. Nor where there are too few rounds to say.
STEADY = 1.25
ENOUGH_ROUNDS = 4


def demo(out, device):
    """Train into the folder `out`, measure, and print the last picture's name and both speeds.

    Training stops after `TRAINING_SECONDS` on a machine too slow for all epochs. What an earlier
    demo left in the folder goes; BadInput if another run lies there.

    Returns:
        Whether it came to its end; False after an interrupt.
    """
    config, images = prepare("dcgan", "digits", {})
    outcome = train(config, images, out, device=device, max_seconds=TRAINING_SECONDS, demo=True)
    if outcome.interrupted:
        return False
    if not outcome.finished:
        print(
            f"training stopped after {TRAINING_SECONDS} s, before its last epoch: the demo is short"
        )
    step, stock_step = build_step(config, device), build_stock_step(config, device)
    batches = Batches(images, config.batch_size, config.seed, device).stream()
    rates, stock_rates = compare((step, stock_step), batches, step.pixel_range, device)
    print(f"the digits your DCGAN drew last: {outcome.picture}")
    print(f"the stock PyTorch recipe, float32: {statistics.median(stock_rates):.0f} images/s")
    print(
        f"genfast, {step.precision}: {statistics.median(rates):.0f} images/s, "
        f"{verdict(rates, stock_rates)}"
    )
    return True


def compare(steps, batches, pixel_range, device):
    """Time training steps in turns: whatever else the machine does then slows all of them.

    Args:
        steps: callables that take float images.
        batches: an iterator of uint8 batches of one size.
        pixel_range: what the steps expect of the images.
        device: where they run.

    Returns:
        For each step a list of its images a second in every round: `ROUNDS` of them, or as many as
        fit into `COMPARING_SECONDS`.
    """
    rates = [[] for _ in steps]
    ends = time.monotonic() + COMPARING_SECONDS
    with cudnn_setting("benchmark", True):  # As the public example has it.
        for step in steps:
            _rate(step, batches, pixel_range, device, WARMUP_STEPS)
        for i in range(ROUNDS):
            order = list(zip(steps, rates, strict=True))
            for step, turns in order[::-1] if i % 2 else order:  # Nobody is always the first.
                turns.append(_rate(step, batches, pixel_range, device, STEPS_A_TURN))
            if time.monotonic() > ends:
                break
    return rates


def verdict(rates, others):
    """In words, how many times as fast: by the quotients of the turns of the same round."""
    quotients = [a / b for a, b in zip(rates, others, strict=True)]
    if len(quotients) < ENOUGH_ROUNDS:
        return f"no verdict: only {len(quotients)} rounds fitted into {COMPARING_SECONDS} s"
    low, middle, high = statistics.quantiles(quotients, n=4, method="inclusive")
    if high > STEADY * low:
        return (
            f"no verdict: the machine was too busy, {low:.2f} to {high:.2f} times as many in the "
            f"middle half of {len(quotients)} rounds"
        )
    return f"{middle:.2f} times as many"


def _rate(step, batches, pixel_range, device, count):
    images = [normalize(next(batches), pixel_range) for _ in range(count)]
    _synchronize(device)
    started = time.perf_counter()
    for batch in images:
        step(batch)
    _synchronize(device)
    return sum(map(len, images)) / (time.perf_counter() - started)


def _synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def build_stock_step(config, device):
    """The step of PyTorch's public DCGAN example: float32, NCHW, nothing left out.

    The layers are the stock ones of genfast's own models, in a plain `nn.Sequential`.
    """
    channels, *size = config.image_shape
    generator = DCGANGenerator(config.nz, config.ngf, channels, size).main
    discriminator = DCGANDiscriminator(channels, config.ndf, size).main
    generator = nn.Sequential(*generator)
    discriminator = nn.Sequential(*discriminator, nn.Sigmoid())
    for network in (generator, discriminator):
        network.to(device, memory_format=torch.contiguous_format)
    optimizers = [
        torch.optim.Adam(network.parameters(), lr=config.lr, betas=(config.beta1, 0.999))
        for network in (generator, discriminator)
    ]
    return StockGANStep(generator, discriminator, optimizers, latent_shape=(config.nz, 1, 1))
