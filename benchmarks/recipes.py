"""Training steps as PyTorch's users write them: the baselines.

Every step takes a batch and returns its losses as tensors: (d_loss, g_loss), or (loss,) in nats an
image. Besides the public examples' recipe there are the improvements that users know, one after
another, up to a whole step in a CUDA graph.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.machine import half_is_fast
from benchmarks.workloads import stock
from genfast.training.steps.capture import CapturedStep, CUDARecorder
from genfast.training.steps.stock import StockGANStep, loss_of_logits


@dataclass(frozen=True)
class Recipe:
    """What a baseline does beyond PyTorch's public examples.

    amp: bfloat16 autocast where that is fast, channels_last memory, fused Adam, losses from logits.
    frozen: no gradient of the discriminator's weights in the generator's update.
    compile_mode: of `torch.compile`, over each loss with its forward passes; None for eager.
    graph: the whole step captured in a CUDA graph.
    """

    amp: bool = False
    frozen: bool = False
    compile_mode: str | None = None
    graph: bool = False

    def build(self, workload, dropout=True):
        """The step of a `Workload`'s model."""
        networks = [stock(network) for network in workload.networks(dropout)]
        for network in networks:
            network.to(memory_format=torch.channels_last if self.amp else torch.contiguous_format)
        build = _vae_step if workload.is_vae else _gan_step
        return build(self, workload, *networks)

    def autocast(self, device):
        """What to call for a context around forward passes."""
        # Asked here, as the compiler cannot look into the question.
        if self.amp and half_is_fast(device):
            return partial(torch.autocast, device.type, torch.bfloat16)
        return nullcontext

    def adam(self, network, lr, betas=(0.9, 0.999)):
        """The examples' Adam; with amp the fused one."""
        options = dict(fused=True, capturable=self.graph) if self.amp else {}
        return torch.optim.Adam(network.parameters(), lr=lr, betas=betas, **options)

    def compiled(self, function):
        """The function, compiled if the recipe compiles."""
        if self.compile_mode is None:
            return function
        # fullgraph: an error where a graph break or too many recompilations would slow it down.
        return torch.compile(function, mode=self.compile_mode, dynamic=False, fullgraph=True)

    def begin_step(self):
        """Tell the compiler's CUDA graphs that a step begins.

        Left to guess, they take the pass after the first backward for a new step, and free what the
        generator's backward still needs.
        """
        if self.compile_mode is not None:
            torch.compiler.cudagraph_mark_step_begin()


def _gan_step(recipe, workload, generator, discriminator):
    """PyTorch's DCGAN example: real and generated images one after the other, then the generator.

    The losses are copies: the compiler's CUDA graphs write over their own at the next step.
    """
    optimizers = [recipe.adam(n, 2e-4, (0.5, 0.999)) for n in (generator, discriminator)]
    stock_step = StockGANStep(
        generator,
        discriminator,
        optimizers,
        latent_shape=(100, 1, 1) if workload.model == "dcgan" else (100,),
        criterion=_loss_of_half_logits if recipe.amp else loss_of_logits,
        autocast=recipe.autocast(workload.device),
        frozen=recipe.frozen,
        compiler=recipe.compiled if recipe.compile_mode else None,
    )

    def step(images):
        if recipe.amp:
            images = images.contiguous(memory_format=torch.channels_last)
        recipe.begin_step()
        return tuple(loss.clone() for loss in stock_step(images))

    return _captured(recipe, step, workload, [generator, discriminator], optimizers)


def _loss_of_half_logits(logits, labels):
    return F.binary_cross_entropy_with_logits(logits.float(), labels)


def _vae_step(recipe, workload, vae):
    """PyTorch's VAE example: cross entropy and KL, summed over the batch."""
    device, autocast = workload.device, recipe.autocast(workload.device)
    optimizer = recipe.adam(vae, 1e-3)

    def loss_of(images, noise):
        with autocast():
            mu, logvar = vae.encode(images)
        mu, logvar = mu.float(), logvar.float()
        z = mu + noise * torch.exp(0.5 * logvar)
        with autocast():
            decoded = vae.decode_logits(z) if recipe.amp else vae.decode(z)
        criterion = F.binary_cross_entropy_with_logits if recipe.amp else F.binary_cross_entropy
        reconstruction = criterion(decoded.float().flatten(1), images.flatten(1), reduction="sum")
        return reconstruction - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())

    loss_of = recipe.compiled(loss_of)

    def step(images):
        recipe.begin_step()
        optimizer.zero_grad()
        # Drawn outside: compiled code has a random number generator of its own.
        loss = loss_of(images, torch.randn(len(images), vae.latent_dim, device=device))
        loss.backward()
        optimizer.step()
        return (loss.detach() / len(images),)

    return _captured(recipe, step, workload, [vae], [optimizer])


def _captured(recipe, step, workload, networks, optimizers):
    if not recipe.graph:
        return step
    return CapturedStep(step, networks, optimizers, [], CUDARecorder(workload.device))
