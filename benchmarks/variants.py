"""Everything that is compared, by name: how to build it, and why it may not run here."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.machine import half_is_fast
from benchmarks.recipes import Recipe
from genfast import functional, use_backend
from genfast.training import GANStep, VAEStep
from genfast.training.steps.vae import missing_compiler


@dataclass(frozen=True)
class Variant:
    """One way to make a training step.

    build: (workload, dropout) to a function of a batch that returns its losses.
    half: whether its networks compute in half precision where that is fast.
    ours, fused: whether it is genfast, and with its kernels where they run.
    needs: "cuda" or "compiler", or "" if it runs anywhere.
    models: "gan", "vae" or "", the kind it is for.
    """

    build: Callable
    half: bool
    ours: bool = False
    fused: bool = True
    needs: str = ""
    models: str = ""

    def rounds_coarsely(self, workload):
        """Whether its products are rounded to bfloat16, or on a GPU, by PyTorch's default, to TF32.

        genfast's fp32 is float32 everywhere.
        """
        on_gpu = workload.device.type == "cuda"
        return (self.half and half_is_fast(workload.device)) or (on_gpu and not self.ours)

    def precision(self, workload):
        """What its products are rounded to, as a name of `genfast.training.steps.precision`."""
        if self.half and half_is_fast(workload.device):
            return "bf16"
        return "tf32" if self.rounds_coarsely(workload) else "fp32"

    def draws_own_noise(self, workload):
        """Whether its sampler draws other noise than `torch.randn` from the same seed."""
        kernels = functional.why_not_triton(torch.empty(1, device=workload.device)) is None
        return self.ours and self.fused and workload.is_vae and kernels


def _genfast(backend="auto", **options):
    def build(workload, dropout=True):
        networks = workload.networks(dropout)
        if workload.is_vae:
            (vae,) = networks
            adam = torch.optim.Adam(
                vae.parameters(), 1e-3, fused=True, capturable=workload.device.type == "cuda"
            )
            settings = {k: v for k, v in options.items() if k != "merge"}
            step = VAEStep(vae, optimizer=adam, **settings)
        else:
            latent = networks[0].latent_shape
            step = GANStep(*networks, latent_shape=latent, **options)

        def run(images):
            with use_backend(backend):
                result = step(images)
            return (result.loss,) if workload.is_vae else tuple(result)

        return run

    return build


VARIANTS = {
    "example": Variant(Recipe().build, half=False),
    "amp": Variant(Recipe(amp=True).build, half=True),
    "amp-frozen": Variant(Recipe(amp=True, frozen=True).build, half=True, models="gan"),
    "compile": Variant(
        Recipe(amp=True, frozen=True, compile_mode="default").build, half=True, needs="compiler"
    ),
    "compile-graphs": Variant(
        Recipe(amp=True, frozen=True, compile_mode="reduce-overhead").build,
        half=True,
        needs="cuda",
    ),
    "compile-max": Variant(
        Recipe(amp=True, frozen=True, compile_mode="max-autotune").build,
        half=True,
        needs="compiler",
    ),
    "graphed": Variant(Recipe(amp=True, frozen=True, graph=True).build, half=True, needs="cuda"),
    "genfast": Variant(_genfast(), half=True, ours=True),
    # The compiler traces PyTorch's operations, not genfast's kernels.
    "genfast/compiled": Variant(
        _genfast(compile=True),
        half=True,
        ours=True,
        fused=False,
        needs="compiler",
        models="vae",
    ),
    "genfast/no-merge": Variant(_genfast(merge=False), half=True, ours=True, models="gan"),
    "genfast/no-fused": Variant(_genfast("reference"), half=True, ours=True, fused=False),
    "genfast/no-graph": Variant(_genfast(capture=False), half=True, ours=True, needs="cuda"),
    "genfast/fp32": Variant(_genfast(precision="fp32"), half=False, ours=True),
}


def why_not_run(name, workload, asked_for=True):
    """Say why a variant does not run for a workload on this machine; None if it does.

    Without `asked_for`, that it would take too long is a reason too.
    """
    variant = VARIANTS[name]
    if name == "compile-max" and workload.device.type == "cpu" and not asked_for:
        return "it compiles for minutes on a CPU; ask for it with --only"
    if variant.models == "gan" and workload.is_vae:
        return "there is no discriminator"
    if variant.models == "vae" and not workload.is_vae:
        return "only the step of a VAE takes it"
    if variant.needs == "cuda" and workload.device.type != "cuda":
        return "there is no GPU"
    if variant.needs == "compiler" and missing_compiler(workload.device):
        return "torch.compile finds no C++ compiler"
    return None
