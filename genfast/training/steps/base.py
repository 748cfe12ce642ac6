"""What the steps share: precision, capture, checks, their state, and the default optimizer."""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Real
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from genfast.training import image_range as ranges
from genfast.training import pixels
from genfast.training.parts import FORMS, images_and_labels
from genfast.training.steps.capture import (
    CapturedStep,
    CapturedTurns,
    CUDARecorder,
    why_not_captured,
)
from genfast.training.steps.finite import Skipped, kept_finite
from genfast.training.steps.labels import Labels
from genfast.training.steps.precision import Precision, PrecisionName
from genfast.training.steps.spread import Spread

# See `training.parts`.
Batch = torch.Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
Result = TypeVar("Result")


def adam(
    module: nn.Module, lr: float = 2e-4, betas: tuple[float, float] = (0.5, 0.999)
) -> torch.optim.Adam:
    """Adam as fast as PyTorch has it where the module is: fused, and on a GPU fit for a graph.

    Example:
        >>> adam(nn.Linear(2, 1), lr=1e-3).param_groups[0]["betas"]
        (0.5, 0.999)
    """
    on_gpu = _device_of(module).type == "cuda"
    return torch.optim.Adam(module.parameters(), lr, betas, fused=True, capturable=on_gpu)


def _device_of(module: nn.Module) -> torch.device:
    parameter = next(module.parameters(), None)
    if parameter is None:
        raise ValueError(f"expected a network with parameters, got a {type(module).__name__}")
    return parameter.device


class Step(Generic[Result]):
    """What steps share: precision, capture, and the checks of a batch.

    Subclasses have `_step(images) -> tuple of scalar tensors`, whose images may be uint8 (`_floats`
    converts them), the attributes `pixel_range`, `latent_shape` and `weights_reused` (whether a
    network takes part in more than one pass), and `_draw(z)`, their images in `pixel_range`. They
    may have `_look(images)`, which learns from a first batch of floats what the steps need to know,
    and leaves no other trace; and `_turn()`, which tells apart calls that do not the same. Networks
    that take labels are given those of `_labels`.
    """

    # Which call is the first with an update by an optimizer, by its name, where that is not call 1.
    first_updates: Mapping[str, int] = MappingProxyType({})

    _labels = Labels()
    pixel_range: tuple[float, float]
    weights_reused: bool
    result_fields: tuple[str, ...]
    _result: Callable[..., Result]
    _step: Callable[..., tuple[torch.Tensor, ...]]
    _draw: Callable[..., torch.Tensor]

    def __init__(
        self,
        modules: dict[str, nn.Module],
        optimizers: dict[str, torch.optim.Optimizer],
        precision: PrecisionName,
        capture: bool | None,
        followers: dict[str, nn.Module] | None = None,
        *,
        clip_grad: float | None = None,
        skip_nonfinite: bool = False,
        spread: Spread | None = None,
        image_range: Sequence[float] | None = None,
    ) -> None:
        self._spread = spread
        self._image_range = ranges.checked(image_range)
        # Followers are networks that a step changes and no optimizer trains.
        self.modules: dict[str, Any] = modules | (followers or {})
        self.optimizers = optimizers
        _check_optimizers(modules, optimizers)
        clip_grad = None if clip_grad is None else above_0("clip_grad", clip_grad)
        self._looked = False
        self.calls = 0
        network = next(iter(modules.values()))
        self.device, self._dtype = _device_of(network), next(network.parameters()).dtype
        self._passed_over = Skipped(self.device) if skip_nonfinite else None
        if self._passed_over is not None:
            self.modules["skipped"] = self._passed_over
        self._precision = Precision(
            precision,
            self.device,
            modules,
            optimizers,
            self.weights_reused,
            clip_grad,
            self._passed_over,
            spread,
        )
        reason = "it was switched off"
        if capture is not False:
            reason = why_not_captured(self.device, optimizers.values())
            if reason is None and spread:
                reason = spread.why_not_captured
            if reason is None and skip_nonfinite:
                reason = _why_waiting(optimizers.values())
        if capture and reason:
            raise ValueError(f"expected a step that can be captured, but {reason}")
        self.why_not_captured: str | None = reason
        self._run = self._step_in_precision
        if reason is None:
            recorder = CUDARecorder(self.device)
            self._run = CapturedTurns(
                lambda: CapturedStep(
                    self._step_in_precision,
                    list(self.modules.values()),
                    list(optimizers.values()),
                    list(self.scalers.values()),
                    recorder,
                    list(self._precision.half_weights.values()),
                    list(self._precision.updates.values()),
                ),
                self._turn,
            )

    @property
    def precision(self) -> str:
        """The name of the precision, never "auto"."""
        return self._precision.name

    @property
    def scalers(self) -> dict[str, torch.amp.GradScaler]:
        """The gradient scalers of fp16 by their optimizer's name."""
        return self._precision.scalers

    @property
    def why_no_half_weights(self) -> str | None:
        """Why autocast converts the weights of a network at each use, in words; None if of none."""
        return self._precision.why_no_half_weights

    @property
    def why_not_adam_kernel(self) -> str | None:
        """Why an optimizer's own `step` makes an update, in words; None if of no network.

        Elsewhere one kernel does, and leaves no `grad` of weights with half-precision copies.
        """
        return self._precision.why_not_adam_kernel

    def __call__(self, batch: Batch) -> Result:
        """Make one step: of images, of a list or tuple that begins with them, or of a dict of them.

        Where the networks take labels, these come second, or in the dict: int64 (N,). See
        `training.parts`. Of uint8 images, level p is low + p * (high - low) / 255 in `pixel_range`
        = (low, high). What is in CPU memory is copied to the networks' device.
        """
        images, labels = self._checked(batch)
        with self._precision.products(), self._labels.of_batch(labels, images):
            self._look_once(images)
            result = self._result(*self._run(images))
        self.calls += 1
        return result

    def _checked(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The images of a batch as the networks take them, or uint8, and its labels or None."""
        images, labels = _parts_of(batch)
        images = _checked_images(images, self.device, self._dtype)
        # A range from 0 on is checked by the step that has it.
        suspected = self._image_range or self.pixel_range[0] < 0
        if suspected and not self._looked and images.is_floating_point():
            ranges.check_first(images, self._image_range, self.pixel_range)
        return self._brought(images), labels

    def _brought(self, images: torch.Tensor) -> torch.Tensor:
        """Images as they were given, floats in `pixel_range`."""
        if images.dtype == torch.uint8:
            return images
        return ranges.brought(images, self._image_range, self.pixel_range)

    def _look_once(self, images: torch.Tensor) -> None:
        """Learn from the first images there are; of uint8 or as the networks take them."""
        if not self._looked:
            self._look(self._floats(images))
            self._looked = True

    def _look(self, images: torch.Tensor) -> None:
        pass

    def _turn(self) -> Hashable:
        """What the next call does, hashable: one graph replays all calls of a turn."""

    def _floats(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 images in `pixel_range` and the networks' dtype; others are that already."""
        if images.dtype != torch.uint8:
            return images
        wide = torch.promote_types(self._dtype, torch.float32)
        return pixels.normalize(images, self.pixel_range, wide).to(self._dtype)

    def state_dict(self) -> dict[str, Any]:
        """What the step has learnt: networks, optimizers, its calls, in fp16 scalers of losses.

        Together with the random numbers' state it is what a loop needs to go on as if it had never
        stopped. `torch.load` reads it with `weights_only=True`.
        """
        return {
            "modules": {name: m.state_dict() for name, m in self.modules.items()},
            "optimizers": {name: _plain(o.state_dict()) for name, o in self.optimizers.items()},
            "scalers": {name: s.state_dict() for name, s in self.scalers.items()},
            "counters": {"calls": self.calls},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave, of a step of the same networks and optimizers."""
        for part, parts in (("modules", self.modules), ("optimizers", self.optimizers)):
            missing = parts.keys() - state.get(part, {}).keys()
            if missing:
                raise ValueError(
                    f"expected the state of a {type(self).__name__}, it lacks the {min(missing)} "
                    f"among its {part}"
                )
        for name, module in self.modules.items():
            module.load_state_dict(state["modules"][name])
        for name, optimizer in self.optimizers.items():
            # Whether it fits a captured graph depends on where it runs now.
            capturable = [group.get("capturable") for group in optimizer.param_groups]
            optimizer.load_state_dict(state["optimizers"][name])
            for group, value in zip(optimizer.param_groups, capturable, strict=True):
                if value is not None:
                    group["capturable"] = value
        for name in self.scalers.keys() & state.get("scalers", {}).keys():
            self.scalers[name].load_state_dict(state["scalers"][name])
        # Of before there were counters, none made a difference.
        self.calls = state.get("counters", {"calls": 0})["calls"]

    @property
    def skipped(self) -> int:
        """How many updates were passed over as they were not finite; waits for the device."""
        return int(self._passed_over.count) if self._passed_over else 0

    def _step_in_precision(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        modules = list(self.modules.values()) if self._passed_over else []
        if self._spread:
            self._spread.begin(images)
        with kept_finite(modules), self._precision.weights():
            results = self._step(images)
        return self._spread.means(results) if self._spread else results

    @torch.no_grad()
    def sample(self, z: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Images in `pixel_range` for this noise, by the running statistics of batch norms.

        labels: int64 (N,), for networks that take them.
        """
        with (
            self._precision.products(),
            self._precision.autocast(),
            self._labels.given(labels, z),
        ):
            return self._draw(z).float()


def above_0(name: str, number: Any) -> float:
    """The number as a float; ValueError unless it is one above 0 and below infinity."""
    if isinstance(number, Real) and not isinstance(number, bool) and 0 < float(number) < math.inf:
        return float(number)
    raise ValueError(f"expected {name} to be a number above 0, got {number!r}")


def _why_waiting(optimizers: Iterable[torch.optim.Optimizer]) -> str | None:
    """Why the host has to look at the device to pass over an update; None if it has not."""
    for optimizer in optimizers:
        if not all(group.get("fused") for group in optimizer.param_groups):
            return "skip_nonfinite decides on the host for optimizers without fused=True"
    return None


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's state with its learning rates, which a captured step keeps on the device."""
    groups = [group | {"lr": float(group["lr"])} for group in state["param_groups"]]
    return state | {"param_groups": groups}


def _check_optimizers(
    modules: Mapping[str, nn.Module], optimizers: Mapping[str, torch.optim.Optimizer]
) -> None:
    """ValueError unless each optimizer holds parameters of its own network and of no other."""
    for name, optimizer in optimizers.items():
        if not hasattr(optimizer, "param_groups"):
            raise ValueError(
                f"expected an optimizer of the {name}'s parameters, got a "
                f"{type(optimizer).__name__}"
            )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        own = _ids(modules[name])
        for other, module in modules.items():
            if held & (_ids(module) - own):
                raise ValueError(
                    f"expected the {name}'s optimizer to hold the {name}'s parameters, got one "
                    f"that holds parameters of the {other}"
                )
        if not held & own:
            raise ValueError(
                f"expected the {name}'s optimizer to hold the {name}'s parameters, got one that "
                "holds none of them"
            )


def _ids(module: nn.Module) -> set[int]:
    return {id(p) for p in module.parameters()}


def _may_be_images(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 4


def _parts_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The images and labels of a batch: see `images_and_labels`."""
    images, labels = images_and_labels(batch, _may_be_images)
    if not isinstance(images, torch.Tensor):
        came = f"a {type(batch).__name__}"
        if images is not batch and images is not None:
            came += f" that begins with a {type(images).__name__}"
        raise TypeError(f"expected a tensor of images, {FORMS}, got {came}")
    return images, labels


def _checked_images(images: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The images in the memory format of the kernels; an error unless a step can take them."""
    if images.dim() != 4:
        raise ValueError(f"expected images of shape (N, C, H, W), got shape {tuple(images.shape)}")
    if not len(images):
        raise ValueError(f"expected at least one image, got shape {tuple(images.shape)}")
    if not (images.is_floating_point() or images.dtype == torch.uint8):
        raise TypeError(f"expected floating-point or uint8 images, got {images.dtype}")
    if images.dtype == torch.float64 != dtype:
        raise TypeError(f"expected images of the networks' dtype {dtype}, got {images.dtype}")
    if images.device != device:
        if not images.is_cpu:
            raise ValueError(
                f"expected images on the networks' device {device}, got {images.device}"
            )
        # The host waits only where the memory is not pinned.
        images = images.to(device, non_blocking=True)
    return images.contiguous(memory_format=torch.channels_last)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in module.modules()]  # A part may be in evaluation for good.
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Let no gradient of the module's own parameters be computed, only those that flow through."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)
