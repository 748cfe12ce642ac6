"""What the networks compute in. Weights, optimizers and losses stay in float32."""

from contextlib import ExitStack
from typing import Literal, get_args

import torch

from genfast import autograd, cpu, losses
from genfast.training.steps import half_weights
from genfast.training.steps.product_settings import products_in
from genfast.training.steps.updates import Update

PrecisionName = Literal["auto", "fp32", "tf32", "bf16", "fp16"]
PRECISIONS: tuple[PrecisionName, ...] = get_args(PrecisionName)
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_precision(precision, device):
    """What "auto" means on this device: "bf16" where it is both supported and faster, else "fp32".

    Args:
        precision: "fp32" (every product in float32), "tf32" (products of float32 rounded to TF32:
            NVIDIA GPUs from Ampere on), "bf16" and "fp16" (autocast; fp16 scales its losses, so
            that small gradients do not vanish), or "auto".
        device: a `torch.device`.

    Raises:
        ValueError: there is no such precision, or the device has none of it.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"expected a precision among {PRECISIONS}, got {precision!r}")
    if precision == "tf32" and not _is_from_ampere_on(device):
        raise ValueError(f"expected tf32 on an NVIDIA GPU from Ampere on, got it on {device}")
    if precision != "auto":
        return precision
    fast = False
    if device.type == "cuda":
        fast = _is_from_ampere_on(device) or torch.version.hip is not None
    if device.type == "cpu":
        # Measured on 2 cores with AVX-512 BF16: a step of a DCGAN-64 takes 0.58 of its time in
        # fp32, of the DCGAN for digits 0.7. Without these instructions bf16 would be emulated.
        fast = cpu.has_bfloat16()
    return "bf16" if fast else "fp32"


class Precision:
    """A precision on a device: contexts for its forward passes, backward passes and updates.

    Args:
        precision: see `resolve_precision`.
        device: a `torch.device`.
        networks: a dict of the networks that will be trained.
        optimizers: the optimizer of each, by the same names.
        weights_reused: whether a step takes a network's weights more than once.
        clip_grad: the largest norm of a network's gradients at an update: larger ones are scaled
            down to it. None: any.
        skipped: a `finite.Skipped`; then updates whose gradients are not finite are passed over.

    Attributes:
        name: the precision, resolved.
        scalers: for "fp16", and to pass over updates, a `torch.amp.GradScaler` for each optimizer,
            by its name; else empty.
        half_weights: the `HalfWeights` of each network by its name; empty if there are none.
        updates: the `Update` of each optimizer by its name.
    """

    def __init__(
        self,
        precision,
        device,
        networks,
        optimizers,
        weights_reused=True,
        clip_grad=None,
        skipped=None,
        spread=None,
    ):
        self._spread = spread
        self._clip_grad, self._passed_over = clip_grad, skipped
        self.name = resolve_precision(precision, device)
        self._device = device
        self._optimizers = optimizers
        # Elsewhere losses are scaled by 1: a scaler passes over what is not finite.
        self._scale = None if self.name == "fp16" else 1.0
        scaled = optimizers if self.name == "fp16" or skipped else ()
        initial = {} if self._scale is None else {"init_scale": self._scale}
        self.scalers = {name: torch.amp.GradScaler(device.type, **initial) for name in scaled}
        self._networks = networks
        self.half_weights = {}
        self._why_no_half_weights = None
        if self.name not in _AUTOCAST:
            self._why_no_half_weights = f"{self.name} converts no weights"
        elif not weights_reused and device.type == "cpu":
            # Weights converted just before their only use still lie in a CPU's cache: all of them
            # together made a VAE's step 2 % slower there, and that of a GAN of MLPs 15 % faster.
            self._why_no_half_weights = "a weight is used once, and on a CPU converted just before"
        elif _share_parameters(networks.values()):
            self._why_no_half_weights = "the networks share parameters"
        else:
            dtype = _AUTOCAST[self.name]
            self.half_weights = {
                name: half_weights.HalfWeights(network, dtype) for name, network in networks.items()
            }

        self.updates = {
            name: Update(optimizer, self.half_weights.get(name))
            for name, optimizer in optimizers.items()
        }

    @property
    def why_not_adam_kernel(self):
        """Why PyTorch's own `step` updates a network, in words; None if of none."""
        if self._passed_over:
            return "updates that are not finite are passed over, and PyTorch's own step knows how"
        if self.scalers:
            return "fp16 scales its losses, and PyTorch's own step knows how"
        reasons = {name: update.why_not for name, update in self.updates.items()}
        return "; ".join(f"the {name}: {why}" for name, why in reasons.items() if why) or None

    @property
    def why_no_half_weights(self):
        """Why autocast converts the weights of a network at each use, in words; None if of none."""
        if self._why_no_half_weights:
            return self._why_no_half_weights
        reasons = {name: half_weights.why_not_copied(n) for name, n in self._networks.items()}
        return "; ".join(f"the {name}: {why}" for name, why in reasons.items() if why) or None

    def products(self):
        """Within, products of float32 round as the precision says: around a whole step.

        PyTorch's settings of that, old and new, can be read within and are put back afterwards.
        """
        if self.name not in ("fp32", "tf32"):
            return ExitStack()
        return self._rounding("tf32" if self.name == "tf32" else "ieee")

    def exact_products(self):
        """Within, products of float32 are in float32 whatever the precision is."""
        return self._rounding("ieee")

    def _rounding(self, wanted):
        return products_in(wanted) if self._device.type == "cuda" else ExitStack()

    def weights(self):
        """Within, the networks hold half-precision copies of weights, if the precision is half."""
        return half_weights.in_use(*self.half_weights.values())

    def autocast(self):
        """Around forward passes."""
        if self.name not in _AUTOCAST:
            return ExitStack()
        return torch.autocast(self._device.type, _AUTOCAST[self.name])

    def backward(self, loss, optimizer, inputs=None, again=False):
        """Backward of a loss that the optimizer of that name minimises.

        Args:
            loss: the loss.
            optimizer: the name.
            inputs: the parameters that get a gradient; None for all that took part.
            again: whether another loss follows on the same graph.
        """
        scaler = self.scalers.get(optimizer)
        loss = scaler.scale(loss) if scaler else loss
        # Where autograd starts: not made by one more kernel at each step.
        one = autograd.one(loss) if loss.dim() == 0 else None
        if self._spread:
            one = self._spread.weight.to(loss.dtype)
        half = self.half_weights.get(optimizer)
        kept = half and not scaler and self.updates[optimizer].takes_half
        if kept:  # Gradients of an earlier backward pass: their sum is in float32.
            half.hand_over_gradients()
        loss.backward(one, retain_graph=again, inputs=inputs)
        if half and not kept:
            half.hand_over_gradients()

    def gradient(self, outputs, inputs, optimizer):
        """The gradient of the sum of outputs by the inputs, to be differentiated itself.

        In fp16 the sum is scaled as that optimizer's losses are, and the gradient back again.

        Args:
            outputs: a tensor with a graph.
            inputs: the tensor, in float32 or wider, by which it is differentiated.
            optimizer: the name.
        """
        scaler = self.scalers.get(optimizer)
        total = losses.widen(outputs).sum()
        scale = scaler.scale(autograd.one(total)) if scaler else None
        total = scaler.scale(total) if scaler else total
        (found,) = torch.autograd.grad(total, inputs, create_graph=True)
        return found / scale if scaler else found

    def update(self, optimizer, refresh=False):
        """Step the optimizer of that name.

        Args:
            optimizer: the name.
            refresh: whether its network runs once more within `weights`.
        """
        scaler = self.scalers.get(optimizer)
        if self._spread:
            if optimizer in self.half_weights:
                self.half_weights[optimizer].hand_over_gradients()
            self._spread.sum_gradients([p.grad for p in self._with_gradients(optimizer)])
        if self._clip_grad is not None:
            self._clip(optimizer, scaler)
        if scaler is None:
            self.updates[optimizer].step(refresh)
            return
        if self._passed_over:
            self._passed_over.add_unless_finite([p.grad for p in self._with_gradients(optimizer)])
        scaler.step(self._optimizers[optimizer])
        scaler.update(self._scale)
        if refresh:
            self.refresh(optimizer)

    def _with_gradients(self, optimizer):
        groups = self._optimizers[optimizer].param_groups
        return [p for group in groups for p in group["params"] if p.grad is not None]

    def _clip(self, optimizer, scaler):
        if optimizer in self.half_weights:
            self.half_weights[optimizer].hand_over_gradients()
        if scaler:
            scaler.unscale_(self._optimizers[optimizer])
        torch.nn.utils.clip_grad_norm_(self._with_gradients(optimizer), self._clip_grad)

    def refresh(self, optimizer):
        """Within `weights`, let half-precision copies be what that one's network is now."""
        if optimizer in self.half_weights:
            half_weights.refresh(self.half_weights[optimizer])


def _share_parameters(networks):
    ids = [id(p) for network in networks for p in network.parameters()]
    return len(set(ids)) < len(ids)


def _is_from_ampere_on(device):
    """Whether a device is an NVIDIA GPU whose matrix units take bfloat16 and TF32."""
    if device.type != "cuda" or torch.version.hip:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
