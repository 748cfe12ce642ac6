"""Drop-in modules: blocks, a sequential container that fuses what it holds, and a sampler.

The children of every module here are PyTorch's own layers, so parameters, state_dict keys and
optimizers are what they were; only the execution changes. No class name holds "Conv" or
"BatchNorm", because the customary `weights_init` of DCGANs looks for those and a `.weight`.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from genfast import cpu, folding, functional, layout, own_glu, processes, reference
from genfast.backend import kernels_run_on_cpu, selected_backend
from genfast.opening import DROPOUT, has_hook, in_order, may_open

__all__ = [
    "DiscriminatorBlock",
    "FusedSequential",
    "GaussianSampler",
    "GeneratorBlock",
    "statistics_groups",
]

_ACTIVATIONS = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.ReLU6: "relu6",
    nn.Hardtanh: "hardtanh",
    nn.ELU: "elu",
    nn.SELU: "selu",
    nn.Softplus: "softplus",
    nn.SiLU: "silu",
    nn.GELU: "gelu",
    nn.Mish: "mish",
    nn.Hardswish: "hardswish",
    nn.PReLU: "prelu",
    nn.GLU: "glu",
}
# The settings that the kernels know, of activations that they know with one alone.
_SETTINGS = {
    nn.Hardtanh: {"min_val": -1, "max_val": 1},
    nn.ReLU6: {"min_val": 0, "max_val": 6},
    nn.ELU: {"alpha": 1},
    nn.Softplus: {"beta": 1, "threshold": 20},
    nn.GLU: {"dim": 1},
}
_APPROXIMATIONS = {"none": "gelu", "tanh": "gelu_tanh"}
_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
# What may follow a convolution; and what may begin a run, of tensors of so many dimensions.
_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d, nn.GroupNorm)
_DIMENSIONS = {
    nn.BatchNorm1d: (2, 3),
    nn.BatchNorm2d: (4,),
    nn.InstanceNorm1d: (3,),
    nn.SyncBatchNorm: (2, 3, 4),
    nn.InstanceNorm2d: (4,),
    nn.GroupNorm: (2, 3, 4),
}
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d)
_FUSED = {*_CONVOLUTIONS, *_DIMENSIONS, *_ACTIVATIONS, *folding.LAYERS}
_TRAILING = tuple(folding.TRAILING)
# Forward pre-hooks of PyTorch's own that set a weight and look at nothing else.
_WEIGHT_SETTERS = {SpectralNorm, WeightNorm}


def _kind_of(layer: object) -> type:
    """The class of a layer; `nn.GLU` for what is one by another name: see `own_glu`."""
    kind = type(layer)
    return nn.GLU if own_glu.is_found(kind) else kind


def block_of(
    conv: Any,
    norm: nn.Module | None,
    activation: str,
    negative_slope: float | torch.Tensor,
    inplace: bool = False,
    leading: Sequence[nn.Module] = (),
    trailing: Sequence[nn.Module] = (),
) -> functional.Block:
    """A stock convolution, an optional stock norm and an activation: a `functional.Block`.

    A weight that is made anew for each forward, as spectral norm does, is made here, once.

    Args:
        conv: `nn.Conv2d` or `nn.ConvTranspose2d` without groups or dilation.
        norm: `nn.BatchNorm2d`, whose statistics and counter move as in its own forward,
            `nn.InstanceNorm2d`, `nn.GroupNorm` or None.
        activation, negative_slope, inplace: as in `functional.conv_block`.
        leading, trailing: layers before and after the convolution that are to be a part of it, as
            `folding.leads` and `folding.trails` allow.
    """
    transposed = isinstance(conv, nn.ConvTranspose2d)
    for set_weight in conv._forward_pre_hooks.values():
        set_weight(conv, ())
    return functional.Block(
        conv.weight,
        conv.bias,
        conv.stride,
        conv.padding if transposed else folding.padding_of(conv, leading),
        conv.output_padding if transposed else None,
        None if norm is None else _norm_of(norm, _groups_of(norm)),
        activation,
        negative_slope,
        inplace,
        None if transposed else folding.around(conv, leading, trailing),
    )


def why_not_fused(module: nn.Module) -> str | None:
    """Say why a layer or a block cannot execute together with others; None if it can.

    A layer is a convolution, a norm or an activation, a block a `FusedBlock`.
    """
    if isinstance(module, FusedBlock):
        if type(module).forward is not FusedBlock.forward or "forward" in vars(module):
            return "its forward is replaced"
        return "it has a hook" if has_hook(module) else module.why_not_fused()
    kind = _kind_of(module)
    if kind not in _FUSED:
        if parametrize.is_parametrized(module):  # Then it is of a class of its own.
            # Its weight is read once a forward, here as in the layer's own.
            kind = parametrize.type_before_parametrizations(module)
            if kind not in _CONVOLUTIONS:
                return "it has a parametrisation"
        if kind not in _FUSED:
            return f"{type(module).__name__} is not one of PyTorch's own layers that fuse"
    if has_hook(module) and not _only_sets_its_weight(module):
        return "it has a hook"
    if nn.modules.module._has_any_global_hook():
        return "it has a hook"
    forward = vars(module).get("forward")
    if forward is not None and type(forward) is not _ForwardByGroups:
        return "its forward is replaced"
    if isinstance(module, _CONVOLUTIONS):
        return _why_conv_not_fused(module)
    if isinstance(module, _INSTANCE_NORMS) and module.track_running_stats:
        return "it keeps running statistics"
    if isinstance(module, nn.LeakyReLU) and module.negative_slope < 0:
        return f"its negative slope {module.negative_slope} is below 0"
    if kind in _ACTIVATIONS:
        return _why_activation_not_fused(module)
    return None


def why_follower_stays_out(layer: object, modules: Iterable[nn.Module]) -> str:
    """Why a layer of a kind that people would see fused is no part of what it follows; else "".

    modules: what runs together before it.
    """
    if type(layer) in DROPOUT:
        # Masks of a kernel would be others: a seed must give what it gives on PyTorch's layers.
        return "its random numbers are PyTorch's own"
    if type(layer) is nn.PixelShuffle and any(map(is_norm, modules)):
        return "the norm before it has statistics for each of its channels, here pixels of one"
    return ""


def _why_activation_not_fused(module: nn.Module) -> str | None:
    for name, known in _SETTINGS.get(type(module), {}).items():
        if getattr(module, name) != known:
            return f"its {name} is {getattr(module, name)}, not {known}"
    if isinstance(module, nn.GELU) and module.approximate not in _APPROXIMATIONS:
        return f"its approximation is {module.approximate!r}"
    return None


def _is_image(x: object) -> bool:
    # Complex numbers are for PyTorch's layers, which take them.
    return isinstance(x, torch.Tensor) and x.dim() == 4 and not x.is_complex()


def _fits_norm(module: object, x: object) -> bool:
    """Whether a module is a norm for such a tensor, and run by itself where it follows whatever."""
    if type(module) not in _DIMENSIONS or torch.compiler.is_compiling():
        return False  # A compiler makes one pass of PyTorch's own norm and activation too.
    return isinstance(x, torch.Tensor) and x.dim() in _DIMENSIONS[type(module)]


def _only_sets_its_weight(module: nn.Module) -> bool:
    """Whether a convolution's hooks are the older spectral norm and weight norm of PyTorch."""
    others = module._forward_hooks or module._backward_hooks or module._backward_pre_hooks
    if others or not isinstance(module, _CONVOLUTIONS):
        return False
    return all(type(hook) in _WEIGHT_SETTERS for hook in module._forward_pre_hooks.values())


def _why_conv_not_fused(conv: nn.Conv2d | nn.ConvTranspose2d) -> str | None:
    if conv.groups != 1:
        return f"it has {conv.groups} groups"
    if conv.dilation != (1, 1):
        return f"it has dilation {conv.dilation}"
    if conv.padding_mode != "zeros":
        # Of a circular pad PyTorch makes contiguous memory, whatever it was.
        circular = conv.padding_mode == "circular"
        return "it pads with circular" if circular else None
    if conv.padding == "same" and any(k % 2 == 0 for k in conv.kernel_size):
        return "it pads one side more than the other"
    return None


@contextmanager
def statistics_groups(module: nn.Module, groups: int) -> Iterator[None]:
    """Within, the batch norms of `module` see the batch as that many equal parts.

    In training each part is normalised by statistics of its own, and running statistics and
    counters move once for each part, in order: one call of the module then stands for as many, one
    a part, as long as its other layers treat images one by one.

        >>> discriminator = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten())
        >>> reals, fakes = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)
        >>> with statistics_groups(discriminator, 2):
        ...     logits = discriminator(torch.cat([reals, fakes]))
        >>> logits.abs().max().item()  # Each part alone is the same everywhere.
        0.0

    It holds for PyTorch's own batch norms, fused or not, wherever in the module they are, and not
    for one whose forward somebody has replaced.
    """
    forwards = _BatchNorm.forward, nn.SyncBatchNorm.forward
    stock = (m for m in module.modules() if type(m).forward in forwards)
    norms = [m for m in stock if "forward" not in vars(m)]
    for norm in norms:
        norm.forward = _ForwardByGroups(norm, groups)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


class _ForwardByGroups:
    """Stands in for a batch norm's forward."""

    def __init__(self, norm: Any, groups: int) -> None:
        self.norm, self.groups = norm, groups

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.norm
        norm._check_input_dim(x)
        if (norm.training or norm.running_mean is None) and len(x) % self.groups:
            raise ValueError(
                f"expected a batch that the groups divide evenly, got {len(x)} images and "
                f"{self.groups} groups"
            )
        return reference.batch_norm_by_groups(x, _norm_of(norm, self.groups))


def _groups_of(norm: nn.Module) -> int:
    forward = vars(norm).get("forward")
    return forward.groups if forward else 1


def _norm_of(norm: Any, groups: int) -> reference.Norm:
    """A stock norm's arguments, as its own forward decides on them: a `reference.Norm`."""
    if isinstance(norm, _INSTANCE_NORMS):
        return reference.Norm.by_image("instance", norm.weight, norm.bias, norm.eps)
    if isinstance(norm, nn.GroupNorm):
        return reference.Norm.by_image("group", norm.weight, norm.bias, norm.eps, norm.num_groups)
    running_mean, running_var = norm.running_mean, norm.running_var
    if norm.training and not norm.track_running_stats:
        running_mean = running_var = None
    momentum, counter = 0.0, None
    if norm.training and running_mean is not None:
        momentum, counter = norm.momentum, norm.num_batches_tracked
        if counter is None:
            momentum = momentum or 0.0
        elif momentum is None:  # A cumulative average: the n-th batch weighs 1/n.
            numbers = counter + torch.arange(1, groups + 1, device=counter.device)
            momentum = numbers.to(running_mean.dtype).reciprocal()
    spread = isinstance(norm, nn.SyncBatchNorm)
    return reference.Norm(
        norm.weight, norm.bias, running_mean, running_var, counter, norm.training, momentum,
        norm.eps, groups, process_group=processes.group_of(norm) if spread else None,
    )  # fmt: skip


class FusedBlock(nn.Module):
    """What the two blocks share: a convolution, a batch norm and an activation."""

    def __init__(
        self,
        conv: nn.Conv2d | nn.ConvTranspose2d,
        norm: bool,
        activation: str,
        negative_slope: float,
        inplace: bool,
        eps: float,
        momentum: float | None,
    ) -> None:
        super().__init__()
        known = tuple(name for name in reference.ACTIVATIONS if name not in ("prelu", "glu"))
        if activation not in known:
            raise ValueError(f"expected an activation among {known}, got {activation!r}")
        # The kernels' own layout, so that no step repacks the weight; shapes and keys stay.
        self.conv = conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        channels = conv.out_channels
        self.norm = nn.BatchNorm2d(channels, eps=eps, momentum=momentum) if norm else None
        self.activation = activation
        self.negative_slope = negative_slope
        self.inplace = inplace

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run the block: (N, in_channels, H, W) to (N, out_channels, Ho, Wo)."""
        if self.why_not_fused():
            for child in self.children():
                x = child(x)
            return reference.activate(x, self.activation, self.negative_slope)
        return functional.chain(x, [self.block()])

    def block(self) -> functional.Block:
        """What it runs as: a `functional.Block`."""
        return block_of(self.conv, self.norm, self.activation, self.negative_slope, self.inplace)

    def why_not_fused(self) -> str | None:
        """Say why a child keeps the block from running as one operation; None if none does."""
        reasons = (why_not_fused(child) for child in self.children())
        return next((reason for reason in reasons if reason), None)

    @property
    def layers(self) -> str:
        """What the block is made of: "Conv2d + BatchNorm2d + relu"."""
        return " + ".join([*(type(child).__name__ for child in self.children()), self.activation])

    def extra_repr(self) -> str:
        slope = f", {self.negative_slope}" if self.activation == "leaky_relu" else ""
        return f"activation={self.activation}{slope}"


class GeneratorBlock(FusedBlock):
    """Transposed convolution, batch norm and activation: the block that doubles the resolution.

    Children: `conv`, a stock `nn.ConvTranspose2d`, and `norm`, a stock `nn.BatchNorm2d` or None.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, output_padding, bias: as in
            `nn.ConvTranspose2d`. The defaults double height and width (Radford et al., 2016).
        norm: whether to batch-normalise.
        activation: as in `functional.conv_block`, all but "prelu" and "glu".
        negative_slope, inplace: of "leaky_relu", as in `nn.LeakyReLU`.
        eps, momentum: as in `nn.BatchNorm2d`.

    Shape:
        (N, in_channels, H, W) to (N, out_channels, Ho, Wo), Ho = (H - 1) stride - 2 padding +
        kernel_size + output_padding, likewise Wo.

    Example:
        >>> GeneratorBlock(8, 4)(torch.randn(2, 8, 4, 4)).shape
        torch.Size([2, 4, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 4,
        stride: int | tuple[int, int] = 2,
        padding: int | tuple[int, int] = 1,
        output_padding: int | tuple[int, int] = 0,
        *,
        bias: bool = False,
        norm: bool = True,
        activation: str = "relu",
        negative_slope: float = 0.2,
        inplace: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        conv = nn.ConvTranspose2d(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, bias=bias
        )
        super().__init__(conv, norm, activation, negative_slope, inplace, eps, momentum)


class DiscriminatorBlock(FusedBlock):
    """Convolution, batch norm and leaky ReLU: the block that halves the resolution.

    Children: `conv`, a stock `nn.Conv2d`, and `norm`, a stock `nn.BatchNorm2d` or None.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, bias: as in `nn.Conv2d`. The
            defaults halve height and width (Radford et al., 2016).
        norm: whether to batch-normalise.
        activation: as in `functional.conv_block`, all but "prelu" and "glu".
        negative_slope, inplace: of "leaky_relu", as in `nn.LeakyReLU`.
        eps, momentum: as in `nn.BatchNorm2d`.

    Shape:
        (N, in_channels, H, W) to (N, out_channels, Ho, Wo), Ho = (H + 2 padding - kernel_size)
        // stride + 1, likewise Wo.

    Example:
        >>> DiscriminatorBlock(4, 8, norm=False)(torch.randn(2, 4, 8, 8)).shape
        torch.Size([2, 8, 4, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 4,
        stride: int | tuple[int, int] = 2,
        padding: int | tuple[int, int] = 1,
        *,
        bias: bool = False,
        norm: bool = True,
        activation: str = "leaky_relu",
        negative_slope: float = 0.2,
        inplace: bool = False,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
    ) -> None:
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, bias=bias)
        super().__init__(conv, norm, activation, negative_slope, inplace, eps, momentum)


_FIRST_OF_A_BLOCK = (*_CONVOLUTIONS, FusedBlock)
_BEGINNING = (*_FIRST_OF_A_BLOCK, *_DIMENSIONS)


def _convolution_of(module: Any) -> Any:
    """That of a block's first layer, or of a block."""
    return module.conv if isinstance(module, FusedBlock) else module


class Run(NamedTuple):
    """Consecutive children of a container that execute together.

    names, modules: of the children, in order.
    fused: whether they run as one operation.
    reason: why a convolution or norm does not fuse, or why the norm, the activation or another
        layer after it stays out; else empty.

    Nearest upsampling and zeros that become part of a convolution come before it, average pooling
    and the shuffle of pixels that do come after it: see `genfast.folding`.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    fused: bool
    reason: str = ""

    @property
    def layers(self) -> str:
        """The class names of the children: "Conv2d + BatchNorm2d + ReLU"."""
        return " + ".join(type(module).__name__ for module in self.modules)

    @property
    def norm(self) -> nn.Module | None:
        """Its norm, or None."""
        return next((m for m in self.modules if isinstance(m, tuple(_DIMENSIONS))), None)

    @property
    def main(self) -> Any:
        """Its convolution or block, else its norm, else its only module."""
        return self.modules[self._lead]

    @property
    def is_block(self) -> bool:
        """Whether it is that of a convolution; else, if it is fused, it begins with a norm."""
        return isinstance(self.main, _FIRST_OF_A_BLOCK)

    def block(self, inplace: bool = False) -> functional.Block:
        """What it runs as, a `functional.Block`. `inplace`: nobody but what runs next sees it."""
        lead, last = self._lead, self.modules[-1]
        conv, leading, following = self.modules[lead], self.modules[:lead], self.modules[lead + 1 :]
        if isinstance(conv, FusedBlock):
            block = conv.block()
            return block._replace(inplace=block.inplace or inplace)
        inplace = inplace or getattr(last, "inplace", False)
        trailing = tuple(m for m in following if isinstance(m, _TRAILING))
        return block_of(conv, self.norm, *self._activation, inplace, leading, trailing)

    def gains_on_cpu(self, x: torch.Tensor) -> bool:
        """Whether it gains on a CPU where no kernel runs, of a convolution that takes x."""
        conv, leading = self.main, self.modules[: self._lead]
        trailing = tuple(m for m in self.modules if isinstance(m, _TRAILING))
        if not leading and cpu.may_gain(_convolution_of(conv), x):
            return True
        if not leading and not trailing:
            return False
        found = folding.around(conv, leading, trailing)
        return folding.gains_on_cpu(conv, found, folding.padding_of(conv, leading), x)

    def normalization(self) -> functional.Normalization:
        """What it runs as where it begins with a norm: a `functional.Normalization`."""
        norm = self.modules[0]
        return functional.Normalization(_norm_of(norm, _groups_of(norm)), *self._activation)

    @property
    def _lead(self) -> int:
        """How many layers before its convolution are a part of it."""
        if len(self.modules) == 1:
            return 0
        return sum(type(module) in folding.LEADING for module in self.modules)

    @property
    def _activation(self) -> tuple[str, float | torch.Tensor]:
        return _activation_of(self.modules[-1])


def _activation_of(layer: Any) -> tuple[str, float | torch.Tensor]:
    """Its name and slope, as in `functional.conv_block`; of other layers "identity"."""
    name = _ACTIVATIONS.get(_kind_of(layer), "identity")
    if name == "gelu":
        name = _APPROXIMATIONS[layer.approximate]
    return name, layer.weight if name == "prelu" else getattr(layer, "negative_slope", 0.0)


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` that runs convolution + norm + activation as one operation.

    Children, parameters, state_dict keys and results are those of the `nn.Sequential` it stands
    for. Runs of `ConvTranspose2d`/`Conv2d`, then optionally `BatchNorm2d`, `InstanceNorm2d` or
    `GroupNorm`, then optionally an elementwise activation fuse, after a norm also `GLU` over the
    channels, and what follows one another of these and of blocks is one chain: see
    `functional.chain`. Nearest upsampling and `ZeroPad2d` before, and average pooling and
    `PixelShuffle` after a convolution become part of it where that gains: see `genfast.folding`.
    On the kernels one of these norms, `BatchNorm1d` or `InstanceNorm1d`, after whatever, fuses with
    the activation that follows. A child that only calls others in order, such as another container,
    opens: chains go on into it and out of it, see `genfast.opening`. Every
    other child, and one that has a hook, a parametrisation or a setting the kernels do not know,
    runs as PyTorch runs it. That is looked up at each call, so a hook registered later counts too.

    Example:
        >>> block = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        >>> network = FusedSequential(*block, nn.Flatten())
        >>> [(run.layers, run.fused) for run in network.plan()]
        [('Conv2d + BatchNorm2d + ReLU', True), ('Flatten', False)]
        >>> network(torch.randn(2, 3, 4, 4)).shape
        torch.Size([2, 32])
    """

    # Children that must not fuse, by name, and why; `genfast.accelerate` sets it.
    unfusable: dict[str, str] = {}

    def forward(self, x: torch.Tensor) -> Any:
        """Run the children in order, fused where they can be."""
        return self.forward_adding(x)[0]

    def forward_adding(
        self, x: Any, added: Any = None, then: nn.Module | None = None, leads: bool = False
    ) -> tuple[Any, bool]:
        """As `forward`, and what is added and activated afterwards, if it can be a part of that.

        Args:
            x: the input.
            added: what to add to the output, or None.
            then: the activation of the sum, one of which `activates_sums`, or None.
            leads: whether what is added is the sum's first operand.

        Returns:
            The output, and whether both were done.
        """
        backend = selected_backend()
        if backend == "reference":
            for module in self._modules.values():
                x = _called(module, x)
            return x, False
        # To ask for the implementation takes as long as a small layer: not where it is plain.
        plain = backend == "auto" and not kernels_run_on_cpu()
        # Else there is no chain that could go on across a border, or somebody traces calls.
        if not isinstance(x, torch.Tensor) or (plain and x.is_cpu):
            return self._run(x, plain, added, then, leads)
        is_whole = False
        for line in self._lines():
            # What opens has no sum in it: whether a line is the last is known only afterwards.
            sums = (added, then, leads) if line is self else ()
            x, is_whole = line._run(x, plain, *sums)
        return x, is_whole

    def _run(
        self,
        x: Any,
        plain: bool,
        added: Any = None,
        then: nn.Module | None = None,
        leads: bool = False,
    ) -> tuple[Any, bool]:
        """As `forward_adding`, of children that do not open."""
        modules = tuple(self._modules.values())
        known: dict[Any, str] = {}
        first = 0
        if plain and isinstance(x, torch.Tensor) and x.is_cpu:
            x, first = self._on_cpu(x, first)

        def way_of(x: torch.Tensor) -> str:
            kind = x.device, x.dtype  # What runs these is looked up once.
            return known.get(kind) or known.setdefault(kind, functional.implementation(x))

        while first < len(modules):
            way = "reference"
            if _may_begin_block(modules[first]) and _is_image(x):
                way = way_of(x)
                if way == "cpu":
                    x, first = self._on_cpu(x, first)
                    continue
            elif _fits_norm(modules[first], x) and way_of(x) == "triton":
                run = next(self._runs(first))
                if run.fused:
                    first += len(run.modules)
                    # Most are not, and what follows need not be looked up.
                    as_x = _is_image(x) and layout.is_channels_last(x)
                    as_x = as_x and self._goes_on_channels_last(first)
                    x = functional.normalize(x, run.normalization(), as_x)
                    continue
            runs = []
            if way != "reference":
                # No `takewhile`, which torch.compile of PyTorch 2.11 cannot trace.
                for run in self._runs(first):
                    if not (run.fused and run.is_block):
                        break
                    runs.append(run)
            if not runs:
                x = _called(modules[first], x)
                first += 1
                continue
            blocks = [run.block() for run in runs]
            first += sum(len(run.modules) for run in runs)
            if added is not None and first == len(modules) and blocks[-1].activation == "identity":
                after = None
                if then is not None:
                    after = (*_activation_of(then), getattr(then, "inplace", False))
                return functional.chain_and_sum(x, blocks, added, leads, after)
            x = functional.chain(x, blocks)
        return x, False

    def _genfast_calls(self) -> Iterable[Any] | None:
        """See `opening.may_open`."""
        opens = type(self).forward is FusedSequential.forward and not self.unfusable
        return self._modules.values() if opens else None

    def _lines(self) -> "Iterator[FusedSequential]":
        """Lines of layers that are together what the children do, those that open opened.

        Each is looked up when the one before has run. It ends where code of other people runs, in
        which anything may happen to what follows.
        """
        if self.unfusable or not any(may_open(child) for child in self._modules.values()):
            yield self
            return
        layers: dict[str, nn.Module] = {}
        for layer in in_order(self._modules.values()):
            # The second time, a batch norm that averages cumulatively has counted the first.
            if not has_no_state(layer) and any(layer is other for other in layers.values()):
                yield line_of(layers)
                layers = {}
            layers[str(len(layers))] = layer
            if not _runs_pytorchs_code(layer):
                yield line_of(layers)
                layers = {}
        if layers:
            yield line_of(layers)

    def _on_cpu(self, x: Any, first: int) -> tuple[Any, int]:
        """Run the children from this number on, as long as x is on a CPU where no kernel runs.

        All are called themselves but for blocks whose convolution may gain: each such block runs as
        one operation, not as a part of a chain.

        Returns:
            x, and the number of the first child that has not run.
        """
        names, modules = tuple(self._modules), tuple(self._modules.values())
        while first < len(modules):
            module = modules[first]
            if _may_begin_block(module) and isinstance(x, torch.Tensor):
                if not x.is_cpu:
                    break
                run = self._gaining_run(names, modules, first, x)
                if run is not None:
                    first += len(run.modules)
                    following = next(self._runs(first), None)
                    goes_on = following is not None and following.fused and following.is_block
                    x = functional.chain(x, [run.block(inplace=goes_on)])
                    continue
            x = _called(module, x)
            first += 1
        return x, first

    def _gaining_run(
        self, names: tuple[str, ...], modules: tuple[nn.Module, ...], first: int, x: torch.Tensor
    ) -> Run | None:
        """The run that begins with this child if it gains as one operation; else None."""
        if x.dim() != 4 or x.is_complex():
            return None
        layer, after = _convolution_of(modules[first]), first + 1
        leads = may_lead_to_run(layer)
        # Of most convolutions these looks are all.
        with_more = leads or (after < len(modules) and isinstance(modules[after], _TRAILING))
        may_gain = with_more and folding.may_gain_on_cpu(layer, x)
        if not may_gain and (leads or not cpu.may_gain(layer, x)):
            return None
        run = self._run_at(names, modules, first)
        if not run.fused or not run.is_block or functional.implementation(x) != "cpu":
            return None
        return run if run.gains_on_cpu(x) else None

    def _goes_on_channels_last(self, first: int) -> bool:
        """Whether the child of this number begins a run that is channels_last, whatever x is."""
        run = next(self._runs(first), None)
        if run is None or not (run.fused and run.is_block):
            return False
        return layout.is_channels_last(_convolution_of(run.main).weight)

    def _runs(self, first: int = 0) -> Iterator[Run]:
        """`plan` from the child of this number on, each `Run` looked up as it is asked for."""
        names, modules = tuple(self._modules), tuple(self._modules.values())
        while first < len(modules):
            run = self._run_at(names, modules, first)
            yield run
            first += len(run.modules)

    def plan(self) -> list[Run]:
        """The children as a list of `Run`s: what fuses, what does not, and why."""
        return list(self._runs())

    def _run_at(self, names: tuple[str, ...], modules: tuple[nn.Module, ...], first: int) -> Run:
        """The run that begins with this child."""
        main = self._main_of(names, modules, first)
        end, reason = main + 1, ""
        alone = isinstance(modules[main], tuple(_DIMENSIONS))
        begins = alone or isinstance(modules[main], _FIRST_OF_A_BLOCK)
        if begins:
            reason = self._why_not_fused(names[main], modules[main]) or ""
        fused = begins and not reason
        if fused and not isinstance(modules[main], FusedBlock):
            followers = (tuple(_ACTIVATIONS),) if alone else (_NORMS, tuple(_ACTIVATIONS))
            last = main
            if not alone and self._is_trailed(names, modules, first, main):
                last += 1
            end, reason = self._end_of_run(names, modules, last, followers)
        return Run(names[first:end], modules[first:end], fused, reason)

    def _main_of(self, names: tuple[str, ...], modules: tuple[nn.Module, ...], first: int) -> int:
        """The number of the child that the run of this one is named after, mostly itself.

        It is the convolution to which layers lead that become part of it.
        """
        main = first
        while main < len(modules) and type(modules[main]) in folding.LEADING:
            main += 1
        if main in (first, len(modules)) or not isinstance(modules[main], _CONVOLUTIONS):
            return first
        numbers = range(first, main + 1)
        if any(self._why_not_fused(names[i], modules[i]) for i in numbers):
            return first
        return main if folding.leads(modules[first:main], modules[main]) else first

    def _is_trailed(
        self, names: tuple[str, ...], modules: tuple[nn.Module, ...], first: int, main: int
    ) -> bool:
        """Whether the child after a convolution that fuses becomes part of it."""
        after = main + 1
        if after == len(modules) or not isinstance(modules[after], _TRAILING):
            return False
        if any(folding.upsampling(m) for m in modules[first:main]):
            return False
        fits = folding.trails(modules[after], modules[main], modules[first:main])
        return fits and not self._why_not_fused(names[after], modules[after])

    def _end_of_run(
        self,
        names: tuple[str, ...],
        modules: tuple[nn.Module, ...],
        first: int,
        followers: Sequence[tuple[type, ...]],
    ) -> tuple[int, str]:
        """Where what runs with this child ends; why a norm or activation stays out.

        followers: of each layer that may follow, the kinds.
        """
        end = first + 1
        for kinds in followers:
            if end < len(modules) and issubclass(_kind_of(modules[end]), kinds):
                reason = self._why_not_fused(names[end], modules[end])
                if _kind_of(modules[end]) is nn.GLU:
                    reason = reason or _why_gate_stays_out(modules[end - 1])
                if reason:
                    kind = type(modules[end]).__name__
                    return end, f"{kind} {names[end]!r} stays out: {reason}"
                end += 1
        if end < len(modules):
            reason = why_follower_stays_out(modules[end], modules[first:end])
            if reason:
                return end, f"{type(modules[end]).__name__} {names[end]!r} stays out: {reason}"
        return end, ""

    def _why_not_fused(self, name: str, module: nn.Module) -> str | None:
        return self.unfusable.get(name) or why_not_fused(module)


def _why_gate_stays_out(before: Any) -> str:
    """Why a `GLU` does not run with the layer before it; else ""."""
    if not is_norm(before):
        return "without a norm before it, PyTorch's pass is as good"
    channels = getattr(before, "num_features", None) or before.num_channels
    return "" if channels % 2 == 0 else f"{channels} channels have no halves"


def _called(module: nn.Module, x: Any) -> Any:
    """module(x); PyTorch's own `SyncBatchNorm` refuses to train on a CPU."""
    if type(module) is nn.SyncBatchNorm and isinstance(x, torch.Tensor) and x.is_cpu:
        with statistics_groups(module, _groups_of(module)):
            return module(x)
    return module(x)


def _may_begin_block(layer: object) -> bool:
    """Whether a run of a convolution may begin with this layer, by its kind."""
    return isinstance(layer, _FIRST_OF_A_BLOCK) or may_lead_to_run(layer)


def may_lead_to_run(layer: object) -> bool:
    """Whether it may become part of the convolution after it, by its kind."""
    return type(layer) in folding.LEADING


def begins_run(layer: object) -> bool:
    """Whether a run of layers that execute together may begin with this one, by its kind."""
    return isinstance(layer, _BEGINNING)


def may_begin_on(layer: Any, x: torch.Tensor) -> bool:
    """Whether a run that begins with this layer may run as one operation on this input."""
    # What has a type of its own is left to PyTorch; isinstance would take longer.
    if type(x) not in (torch.Tensor, nn.Parameter):
        return False
    convolves = _may_begin_block(layer)
    if not (x.dim() == 4 if convolves else _fits_norm(layer, x)):
        return False
    if x.is_cpu and not kernels_run_on_cpu():
        if not convolves:
            return False
        layer, leads = _convolution_of(layer), may_lead_to_run(layer)
        return folding.may_gain_on_cpu(layer, x) or (not leads and cpu.may_gain(layer, x))
    return True


def is_norm(layer: object) -> bool:
    """Whether it is a norm that fuses, by its kind."""
    return isinstance(layer, tuple(_DIMENSIONS))


def runs_undisturbed(layer: nn.Module) -> bool:
    """Whether a layer runs no code but PyTorch's and genfast's, but for global hooks."""
    held = vars(layer)
    if type(layer) in _FUSED and not (
        held["_forward_hooks"]
        or held["_forward_pre_hooks"]
        or held["_backward_hooks"]
        or held["_backward_pre_hooks"]
        or "forward" in held
    ):
        return True  # Most layers, at a fraction of the time.
    return not why_not_fused(layer)


def _runs_pytorchs_code(layer: object) -> bool:
    """As `runs_undisturbed`, of layers that do not fuse too."""
    if not isinstance(layer, nn.Module):
        return False
    if type(layer).__module__.startswith("torch.nn.modules.") and not layer._modules:
        return "forward" not in vars(layer) and (not has_hook(layer) or runs_undisturbed(layer))
    return runs_undisturbed(layer)


def line_of(layers: dict[str, nn.Module]) -> FusedSequential:
    """A `FusedSequential` of layers, by name, that belong to other modules: for one call.

    Args:
        layers: a dict of modules, in order.
    """
    # nn.Module's constructor would take longer than a layer's share of a call may.
    line = FusedSequential.__new__(FusedSequential)
    vars(line)["_modules"] = layers
    return line


def has_no_state(layer: object) -> bool:
    """Whether it is one of PyTorch's layers that fuse and hold nothing that a call changes."""
    return _kind_of(layer) in _ACTIVATIONS or type(layer) in folding.LAYERS


def is_activation(layer: object) -> bool:
    """Whether it is an activation that fuses; several places may share one."""
    return _kind_of(layer) in _ACTIVATIONS


def activates_sums(layer: Any) -> bool:
    """Whether it is an activation that may run with a block and a sum before it."""
    if not is_activation(layer) or why_not_fused(layer):
        return False
    inplace = getattr(layer, "inplace", False)
    return functional.sums_may_go_into(_activation_of(layer)[0], inplace)


def first_run(container: FusedSequential) -> Run:
    """The `Run` that a `FusedSequential`, not an empty one, begins with."""
    return next(container._runs())


class GaussianSampler(nn.Module):
    """Reparameterised sampling as a layer: `sampler(mu, logvar)` gives mu + exp(logvar/2) * eps.

    Example:
        >>> GaussianSampler()(torch.zeros(2, 3), torch.zeros(2, 3)).shape
        torch.Size([2, 3])
    """

    def forward(self, mu: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
        """Sample: (N, ...) and (N, ...) to (N, ...). See `functional.reparameterize`."""
        return functional.reparameterize(mu, logvar)
