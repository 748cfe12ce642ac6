"""The public functions: check the arguments, choose Triton or PyTorch, and be able to say why.

Shapes are PyTorch's (N, C, H, W) whatever the memory format. The kernels work on channels_last
memory and copy what is not; tensors and weights kept so cost no copy.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from genfast import autograd, cpu, folding, layout, operators, reference
from genfast.backend import (
    INTERPRETING,
    is_exporting,
    selected_backend,
    why_device_cannot_run_triton,
)
from genfast.geometry import ConvGeometry, pair
from genfast.launch import from_image, tape
from genfast.reference import NormName

__all__ = [
    "conv_block",
    "conv_transpose_block",
    "importance_samples",
    "norm_block",
    "reparameterize",
    "reparameterize_with_kl",
    "why_not_triton",
]

# Half precision needs fp32 accumulation and float64 an fp64 matrix product, which GPUs' tensor
# cores offer too unevenly for one kernel; the interpreter does not care.
_COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRETED_DTYPES = (*_COMPILED_DTYPES, torch.float64)


def conv_block(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    *,
    norm: bool | NormName = False,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    num_batches_tracked: torch.Tensor | None = None,
    training: bool = True,
    momentum: float | torch.Tensor = 0.1,
    eps: float = 1e-5,
    activation: str = "identity",
    negative_slope: float | torch.Tensor = 0.2,
    norm_groups: int = 1,
    statistics_groups: int = 1,
    inplace: bool = False,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    """`conv2d`, then a norm (if `norm`), then an activation: a discriminator block.

    Args:
        x: (N, in_channels, H, W), float32, bfloat16 or float16 (float64 when interpreted).
        weight: (out_channels, in_channels, kh, kw), as `nn.Conv2d` keeps it; dtype of `x`.
        bias: (out_channels,) or None; dtype of `x`.
        stride, padding: an int or (height, width), in pixels.
        norm: False; True or "batch" for batch norm, "instance" for instance norm (Ulyanov et al.,
            2016), "group" for group norm (Wu and He, 2018). The latter two normalise each image by
            itself and take nothing of what follows but norm_weight, norm_bias, eps and norm_groups.
        norm_weight, norm_bias: (out_channels,) gamma and beta, or None for 1 and 0.
        running_mean, running_var: (out_channels,), or both None. In training they move in place
            towards the batch's mean and unbiased variance; in evaluation they are the statistics.
        num_batches_tracked: an int64 scalar tensor or None. In training it grows in place by the
            number of `statistics_groups` where there are running statistics.
        training: normalise by the batch's statistics. Without running statistics that is always so.
        momentum: the weight of the new statistics, a float or a tensor: a scalar, or one value for
            each of the `statistics_groups`.
        eps: added to the variance.
        activation: one of `reference.ACTIVATIONS`: "identity", "relu", "leaky_relu", "tanh",
            "sigmoid", "relu6", "hardtanh" (between -1 and 1), "elu" (alpha 1), "selu", "softplus"
            (beta 1, threshold 20), "silu", "gelu", "gelu_tanh" (its approximation), "mish",
            "hardswish", "prelu" or "glu", which multiplies the first half of the channels by a
            sigmoid of the second and gives half as many.
        negative_slope: of "leaky_relu" a number; of "prelu" a tensor, (1,) or (out_channels,).
        norm_groups: of "group": the equal parts of the channels that share mean and variance.
        statistics_groups: in training, normalise that many equal parts of the batch by statistics
            of their own; running statistics move once for each part, in order. The result is that
            of as many calls, one a part.
        inplace: as in `nn.LeakyReLU`: the caller promises that nothing changes the result in place
            before backward, which then may take it for its own. (The gradients of "relu", "tanh"
            and "sigmoid" are made from the result, in PyTorch too.)
        memory_format: of the output: `torch.channels_last`, the kernels' own, or None for the one
            PyTorch would give: channels_last if `x` or `weight` is, else contiguous. Gradients of
            `x` and `weight` have the format of the tensor they belong to.

    Returns:
        (N, out_channels, Ho, Wo) with Ho = (H + 2 padding - kh) // stride + 1, likewise Wo. Under
        autocast the dtype is autocast's, as `conv2d`'s is.

    Raises:
        ValueError: a wrong rank, size, channel count, norm or activation, devices that differ, or
            one value a channel in training.
        TypeError: a tensor that is not floating point, or dtypes that differ.
        RuntimeError: the backend "triton" was asked for and cannot run.

    Example:
        >>> x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 4, 4)
        >>> y = conv_block(x, weight, stride=2, padding=1, norm=True, activation="leaky_relu")
        >>> y.shape
        torch.Size([2, 4, 4, 4])
    """
    batch_norm = _norm_of(
        norm, norm_weight, norm_bias, running_mean, running_var, num_batches_tracked, training,
        momentum, eps, norm_groups, statistics_groups,
    )  # fmt: skip
    block = Block(
        weight, bias, stride, padding, None, batch_norm, activation, negative_slope, inplace
    )
    return chain(x, [block], memory_format)


def conv_transpose_block(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] = 0,
    output_padding: int | tuple[int, int] = 0,
    *,
    norm: bool | NormName = False,
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    num_batches_tracked: torch.Tensor | None = None,
    training: bool = True,
    momentum: float | torch.Tensor = 0.1,
    eps: float = 1e-5,
    activation: str = "identity",
    negative_slope: float | torch.Tensor = 0.2,
    norm_groups: int = 1,
    statistics_groups: int = 1,
    inplace: bool = False,
    memory_format: torch.memory_format | None = None,
) -> torch.Tensor:
    """`conv_transpose2d`, then a norm (if `norm`), then an activation: a generator block.

    As `conv_block`, but for these:

    Args:
        weight: (in_channels, out_channels, kh, kw), as `nn.ConvTranspose2d` keeps it.
        output_padding: rows and columns added at the bottom and right, fewer than the stride.

    Returns:
        (N, out_channels, Ho, Wo) with Ho = (H - 1) stride - 2 padding + kh + output_padding.

    Example:
        >>> x, weight = torch.randn(2, 4, 4, 4), torch.randn(4, 3, 4, 4)
        >>> conv_transpose_block(x, weight, stride=2, padding=1, activation="tanh").shape
        torch.Size([2, 3, 8, 8])
    """
    batch_norm = _norm_of(
        norm, norm_weight, norm_bias, running_mean, running_var, num_batches_tracked, training,
        momentum, eps, norm_groups, statistics_groups,
    )  # fmt: skip
    block = Block(
        weight, bias, stride, padding, output_padding, batch_norm, activation, negative_slope,
        inplace,
    )  # fmt: skip
    return chain(x, [block], memory_format)


def norm_block(
    x: torch.Tensor,
    *,
    norm: NormName = "batch",
    norm_weight: torch.Tensor | None = None,
    norm_bias: torch.Tensor | None = None,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    num_batches_tracked: torch.Tensor | None = None,
    training: bool = True,
    momentum: float | torch.Tensor = 0.1,
    eps: float = 1e-5,
    activation: str = "identity",
    negative_slope: float | torch.Tensor = 0.2,
    norm_groups: int = 1,
    statistics_groups: int = 1,
) -> torch.Tensor:
    """A norm, then an activation, of whatever comes: what follows no convolution.

    As `conv_block`, but for these:

    Args:
        x: (N, C), (N, C, L) or (N, C, H, W), float32, bfloat16 or float16 (float64 when
            interpreted), contiguous or channels_last; anything else is copied.
        norm: "batch", "instance" or "group".

    Returns:
        A tensor of x's shape, in the memory format that PyTorch's layer gives it. The gradient of x
        has the format of x.

    Example:
        >>> y = norm_block(torch.randn(2, 4, 8, 8), norm="group", norm_groups=2, activation="silu")
        >>> y.shape
        torch.Size([2, 4, 8, 8])
    """
    n = _norm_of(
        norm, norm_weight, norm_bias, running_mean, running_var, num_batches_tracked, training,
        momentum, eps, norm_groups, statistics_groups,
    )  # fmt: skip
    if n is None:
        raise ValueError(f"expected a norm among {reference.NORMS}, got {norm!r}")
    return normalize(x, Normalization(n, activation, negative_slope))


class Normalization(NamedTuple):
    """A `reference.Norm` and an activation after it: the arguments of `norm_block`."""

    norm: reference.Norm
    activation: str
    negative_slope: float | torch.Tensor


def normalize(x: torch.Tensor, block: Normalization, as_x: bool = False) -> torch.Tensor:
    """As `norm_block`, by a `Normalization`.

    as_x: the output may be channels_last where x is, also where that of PyTorch's layer is not.
    """
    n, slopes = block.norm, _slopes(block)
    plan = _normalization_plan_of(x, block)
    if plan is None:
        y = reference.normalize(x, n)
        inplace = reference.activates_in_place(block.activation)
        return reference.activate(y, block.activation, block.negative_slope, inplace=inplace)
    if _activates_otherwise(block, n, x):
        y = normalize(x, block._replace(activation="identity", negative_slope=0.0), as_x)
        return reference.activate(y, block.activation, block.negative_slope)
    images = x if x.dim() == 4 else x.reshape(*x.shape[:2], 1, -1)
    if plan.enters is not None:
        images = layout.enter(images, inside=plan.enters)
    gamma, beta, *statistics = _tensors_of_norm(n)
    y = autograd.normalize(images, plan.kind, gamma, beta, slopes, statistics, plan.look)
    if x.dim() != 4:
        return layout.contiguous(y).view(x.shape[0], -1, *x.shape[2:])
    keeps = plan.keeps or (as_x and plan.channels_last)
    return layout.channels_last(y) if keeps else layout.contiguous(y)


class _NormalizationPlan(NamedTuple):
    """What is decided about a norm that runs on the kernels before anything is computed.

    kind: its `autograd.Kind`.
    enters: what brings x, as images, into a memory format of the kernels; None if it is in one.
    channels_last: whether x is.
    keeps: whether the output of PyTorch's layer then is, too.
    look: as of a `_Plan`.
    """

    kind: autograd.Kind
    enters: Callable | None
    channels_last: bool
    keeps: bool
    look: object = None


def _normalization_plan_of(x: torch.Tensor, block: Normalization) -> _NormalizationPlan | None:
    """The `_NormalizationPlan` of a norm, made or known; None where PyTorch runs it.

    Raises:
        As `norm_block`.
    """
    # A compiler makes one pass of PyTorch's operations too.
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _normalization_plan(x, block)
    n = block.norm
    slopes = _slopes(block)
    key = (
        Normalization, block.activation, block.negative_slope if slopes is None else None,
        selected_backend(), torch._C._are_functorch_transforms_active(), *_settings_of(n, x),
        *_looks((x, slopes, *_tensors_of_norm(n))),
    )  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        plan = _normalization_plan(x, block)
        if plan is not None:
            plan = plan._replace(look=object())
            tape.keep(_plans, key, plan, _MOST_PLANS)
    return plan


def _normalization_plan(x: torch.Tensor, block: Normalization) -> _NormalizationPlan | None:
    n = block.norm
    _check_normalization(x, block)
    vectors = n.weight, n.bias, n.running_mean, n.running_var, _slopes(block)
    way = implementation(
        x, *vectors, activation=block.activation, negative_slope=block.negative_slope
    )
    if way != "triton" or torch.compiler.is_compiling() or _too_many_images(n, x.shape[0]):
        return None
    images = x if x.dim() == 4 else x.reshape(*x.shape[:2], 1, -1)
    last = layout.is_channels_last(images)
    enters = None
    if not (layout.is_fresh_channels_last(images) or images.is_contiguous()):
        enters = layout.channels_last if last else layout.contiguous
    slope = 0.0 if isinstance(block.negative_slope, torch.Tensor) else block.negative_slope
    kind = _kind_of_norm(n, None, False, block.activation, slope, x.shape, x)
    keeps = last and x.dim() == 4 and _keeps_channels_last(n, x, x.shape[1], x.shape[2:])
    return _NormalizationPlan(kind, enters, last, keeps)


def _norm_of(
    norm: bool | NormName,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    counter: torch.Tensor | None,
    training: bool,
    momentum: float | torch.Tensor,
    eps: float,
    channel_groups: int,
    groups: int,
) -> reference.Norm | None:
    """The `reference.Norm` of the arguments of a block; None for none."""
    if not norm:
        return None
    kind = "batch" if norm is True else norm
    if kind not in reference.NORMS:
        raise ValueError(f"expected a norm among {reference.NORMS}, got {norm!r}")
    if kind != "batch":
        return reference.Norm.by_image(kind, weight, bias, eps, channel_groups)
    return reference.Norm(
        weight, bias, running_mean, running_var, counter, training, momentum, eps, groups
    )


class Block(NamedTuple):
    """A block of a `chain`: the arguments of `conv_block` that belong to it.

    With an `output_padding` it is a `conv_transpose_block`. `batch_norm` is a `reference.Norm`, or
    None for none. `around` is a `folding.Around` of a `conv_block`, then with a pair as padding.
    With a `shuffle` above 1 it stands for a convolution and `F.pixel_shuffle` by that, and its bias
    is (shuffle * shuffle, channels): see `folding.shuffled`.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: int | tuple[int, int]
    padding: int | tuple[int, int]
    output_padding: int | tuple[int, int] | None
    batch_norm: reference.Norm | None
    activation: str
    negative_slope: float | torch.Tensor
    inplace: bool = False
    around: folding.Around | None = None
    shuffle: int = 1

    @property
    def vectors(self) -> dict[str, torch.Tensor | None]:
        """Its tensors of one value a channel, by name; None where absent."""
        found, n = {"bias": self.bias}, self.batch_norm
        if n is not None:
            found |= {
                "norm_weight": n.weight,
                "norm_bias": n.bias,
                "running_mean": n.running_mean,
                "running_var": n.running_var,
            }
        return found


def chain(
    x: torch.Tensor, blocks: Sequence[Block], memory_format: torch.memory_format | None = None
) -> torch.Tensor:
    """Blocks, each of what the one before puts out, as one operation.

    Nobody sees what lies between two blocks. On the kernels it stays channels_last there, and what
    is kept for backward is one tensor a block.

    Args:
        x: (N, in_channels, H, W) of the first block.
        blocks: `Block`s, at least one.
        memory_format: of the output, as in `conv_block`.

    Returns:
        The last block's output.

    Raises:
        As `conv_block`, before anything is computed; but blocks with something around are looked at
        in their turn.
    """
    if all([block.around is None for block in blocks]):
        return _chain(x, blocks, memory_format)
    x, line, seen = _up_to_the_last_line(x, blocks)
    return _chain_seen(x, line, seen) if line else x


def _up_to_the_last_line(
    x: torch.Tensor, blocks: Sequence[Block]
) -> tuple[torch.Tensor, list[Block], bool]:
    """What `chain` begins with: what is around a convolution, and no part of it, parts the chain.

    Within, memory stays channels_last on the kernels, whatever PyTorch's layers would make of it.

    Returns:
        What the last line takes, its blocks, which have nothing around, and whether PyTorch's
        layers would see that as channels_last.
    """
    line: list[Block] = []
    seen = layout.is_channels_last(x)  # As those layers see x.
    for block in blocks:
        if block.around is None:
            line.append(block)
            continue
        way, (before, block, after) = form_of(x, line, block)
        if before is not None:
            if line and way == "triton":
                seen = _pytorchs_format(x, line, _geometries(x, line), seen) == torch.channels_last
                x = _chain(x, line, torch.channels_last)
            elif line:
                x = _chain_seen(x, line, seen)
                seen = layout.is_channels_last(x)
            x, line = before(x), []
        if after is None:
            line.append(block)
            continue
        plain = block._replace(
            batch_norm=None, activation="identity", negative_slope=0.0, inplace=False
        )
        x = after(_chain_seen(x, [*line, plain], seen))
        line, seen = [], layout.is_channels_last(x)
        if block.batch_norm is not None:
            n = Normalization(block.batch_norm, block.activation, block.negative_slope)
            x = normalize(x, n)
        elif block.activation != "identity":
            x = reference.activate(
                x, block.activation, block.negative_slope,
                inplace=block.inplace or reference.activates_in_place(block.activation),
            )  # fmt: skip
    return x, line, seen


def _chain_seen(x: torch.Tensor, blocks: Sequence[Block], seen: bool) -> torch.Tensor:
    """`_chain` of what PyTorch's layers would see as channels_last, or not, in its stead."""
    if seen == layout.is_channels_last(x):
        return _chain(x, blocks)
    return _chain(x, blocks, _pytorchs_format(x, blocks, _geometries(x, blocks), seen))


def _geometries(x: torch.Tensor, blocks: Sequence[Block]) -> list[ConvGeometry]:
    """The `ConvGeometry` of each block, one after the other."""
    size, found = tuple(x.shape[2:]), []
    for block in blocks:
        geometry, size = _geometry_of(block, size)
        found.append(geometry)
    return found


def _geometry_of(block: Block, size: Sequence[int]) -> tuple[ConvGeometry, tuple[int, int]]:
    """The `ConvGeometry` of a block that takes images of this size, and the size that it gives."""
    stride, padding = pair(block.stride, "stride"), pair(block.padding, "padding")
    given = tuple(size), tuple(block.weight.shape[2:]), stride, padding
    if block.output_padding is None:
        geometry = ConvGeometry.conv(*given)
        return geometry, geometry.small
    geometry = ConvGeometry.conv_transpose(*given, pair(block.output_padding, "output_padding"))
    return geometry, geometry.big


def form_of(x: torch.Tensor, line: Sequence[Block], block: Block) -> tuple[str, folding.Form]:
    """What runs a block that follows those of a line, which takes x; and its `folding.Form`."""
    way = implementation(
        x, block.weight, *block.vectors.values(), activation=block.activation,
        negative_slope=block.negative_slope,
    )  # fmt: skip
    size = tuple(x.shape[2:])
    if line:
        transposed, last = line[-1].output_padding is not None, _geometries(x, line)[-1]
        size = last.big if transposed else last.small
    shuffles = block.around is not None and block.around.shuffle > 1
    if shuffles and (torch.compiler.is_compiling() or len(x) > _MOST_IMAGES):
        way = "reference"  # A compiler makes one pass of it and what follows.
    dtype = x.dtype if x.dtype == torch.float64 else autocast_dtype(x.device) or x.dtype
    return way, folding.form(block, way, x, dtype, size)


def _chain(
    x: torch.Tensor, blocks: Sequence[Block], memory_format: torch.memory_format | None = None
) -> torch.Tensor:
    """`chain` of blocks with nothing around."""
    x, blocks = _autocast(x, blocks)
    return _run(x, blocks, _plan_of(x, blocks, memory_format))


def chain_and_sum(
    x: torch.Tensor,
    blocks: Sequence[Block],
    added: Any,
    leads: bool,
    then: tuple[str, float | torch.Tensor, bool] | None = None,
) -> tuple[torch.Tensor, bool]:
    """As `chain`, with a tensor added to the last output, where kernels do that as they go.

    Args:
        x, blocks: as in `chain`; the last block has no activation.
        added: whatever is to be added.
        leads: whether it is the first operand, whose memory format then is the sum's.
        then: the activation of the sum, its slope and whether it is in place; None for none.

    Returns:
        The output; and True, or False where the sum and its activation are left to PyTorch: of
        another shape, dtype or memory format than the output, where something is behind the last
        convolution, or where no kernel runs.
    """
    if not _may_be_added(x, added):
        return chain(x, blocks), False
    blocks, seen = list(blocks), layout.is_channels_last(x)
    if any([block.around is not None for block in blocks]):
        x, blocks, seen = _up_to_the_last_line(x, blocks)
        if not blocks:
            return x, False
    # Of 1 channel, or 1 x 1 pixels, memory is both.
    decides = leads and added.shape[1] > 1 and added.shape[2:] != (1, 1)
    if decides or seen == layout.is_channels_last(x):
        line = blocks
        if then is not None:
            name, slope, inplace = then
            last = blocks[-1]._replace(activation=name, negative_slope=slope, inplace=inplace)
            line = [*blocks[:-1], last]
        given, line = _autocast(x, line)
        plan = _plan_of(given, line, torch.channels_last if decides else None, added)
        if plan.adds:
            return _run(given, line, plan, added), True
    return _chain_seen(x, blocks, seen), False


def _may_be_added(x: torch.Tensor, added: Any) -> bool:
    """Whether kernels may add this to the output of a chain that takes x."""
    if type(added) not in (torch.Tensor, torch.nn.Parameter) or torch.compiler.is_compiling():
        return False
    dtype = autocast_dtype(x.device) or x.dtype
    if added.dim() != 4 or added.dtype != dtype or added.device != x.device:
        return False
    return layout.is_fresh_channels_last(added)


def sums_may_go_into(activation: str, inplace: bool) -> bool:
    """Whether an activation after a sum may be the last block's in `chain_and_sum`.

    Backward then reads the result, and nothing that PyTorch's own would read instead. `inplace`:
    of the activation.
    """
    row = reference.ACTIVATION[activation]
    return not row.from_input and (inplace or not row.keeps_input)


def _run(
    x: torch.Tensor, blocks: Sequence[Block], plan: "_Plan", added: torch.Tensor | None = None
) -> torch.Tensor:
    """A chain by its `_Plan`; `added`: see `chain_and_sum`."""
    if len(plan.ways) > 1:
        for block in blocks:
            x = chain(x, [block])
    elif plan.activates_apart is not None:
        # The activation after this block is PyTorch's own.
        last = blocks[plan.activates_apart]
        linear = last._replace(activation="identity", negative_slope=0.0)
        head = [*blocks[: plan.activates_apart], linear]
        z = chain(x, head, torch.channels_last)
        x = reference.activate(z, last.activation, last.negative_slope)
        if rest := blocks[len(head) :]:
            x = chain(x, rest, plan.memory_format)
    elif plan.ways == {"triton"} and torch.compiler.is_compiling():
        x = operators.chain(x, blocks).to(plan.kinds[-1].dtype or x.dtype)
    elif plan.ways == {"triton"}:
        tensors = [t for block in blocks for t in _tensors_of(block)]
        for i in plan.weights_enter:
            tensors[i] = layout.enter(tensors[i])
        first = plan.kinds[0]
        if plan.x_enters and (first.transposed or not from_image.lies_padded(x, first.geometry)):
            x = layout.enter(x)
        x = autograd.chain(x, plan.kinds, tensors, blocks[-1].inplace, plan.look, added)
    else:
        convolutions = cpu if plan.ways == {"cpu"} else torch.nn.functional
        for b, kind in zip(blocks, plan.kinds, strict=True):
            x = reference.block(
                x, b.weight, b.bias, kind.geometry.stride, kind.geometry.padding, b.output_padding,
                batch_norm=b.batch_norm, activation=b.activation, negative_slope=b.negative_slope,
                inplace=b.inplace or b is not blocks[-1], convolutions=convolutions,
            )  # fmt: skip
    if plan.memory_format is None:  # PyTorch's own operations have chosen.
        return x
    channels_last = plan.memory_format == torch.channels_last
    return layout.channels_last(x) if channels_last else layout.contiguous(x)


class _Plan(NamedTuple):
    """What is decided about a chain before anything is computed.

    ways: a set of what runs its blocks, as `implementation` names it.
    kinds: the `autograd.Kind` of each block.
    memory_format: of the output; None for whatever the last operation gives.
    activates_apart: the number of the first block whose activation is no part of the kernels; or
        None: see `_activates_apart`.
    x_enters, weights_enter: whether x, and which of the tensors of all blocks, are brought into the
        memory format of the kernels.
    look: stands for how all the tensors then look, for `tape.run`.
    adds: whether what is to be added is added by the kernels: see `chain_and_sum`.
    """

    ways: set
    kinds: tuple
    memory_format: torch.memory_format | None
    activates_apart: int | None = None
    x_enters: bool = True
    weights_enter: tuple[int, ...] = ()
    look: object = None
    adds: bool = False


# Of what runs on the kernels, by all that was checked and decided by: on a GPU the checks could
# take longer than the kernels. So many; the oldest is forgotten.
_plans: dict[Any, Any] = {}
_MOST_PLANS = 1024
# CUDA's limit of a grid's second and third axes.
_MOST_IMAGES = 65535


def _plan_of(
    x: torch.Tensor,
    blocks: Sequence[Block],
    memory_format: torch.memory_format | None,
    added: torch.Tensor | None = None,
) -> _Plan:
    """The `_Plan` of a chain, made or known.

    Raises:
        As `chain`.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _plan(x, blocks, memory_format, added)
    key = _key_of(x, blocks, memory_format, added)
    try:
        plan = _plans.get(key)
    except TypeError:  # A list in the place of a pair.
        return _plan(x, blocks, memory_format, added)
    if plan is None:
        plan = _plan(x, blocks, memory_format, added)
        if plan.ways == {"triton"}:
            plan = plan._replace(look=object())
            tape.keep(_plans, key, plan, _MOST_PLANS)
    return plan


def _key_of(
    x: torch.Tensor,
    blocks: Sequence[Block],
    memory_format: torch.memory_format | None,
    added: torch.Tensor | None,
) -> tuple[Any, ...]:
    """All that `_plan` looks at."""
    found: list[Any] = [
        selected_backend(),
        memory_format,
        torch._C._are_functorch_transforms_active(),
    ]
    tensors = [x, added]
    for block in blocks:
        _, _, stride, padding, output_padding, n, activation, negative_slope, *others = block
        inplace, _, shuffle = others
        if _slopes(block) is not None:
            negative_slope = None  # It is among the tensors.
        found += stride, padding, output_padding, activation, negative_slope, inplace, shuffle
        if activation in _DEPENDING:
            found += _activates_apart(block, x, blocks), autocast_dtype(x.device)
        if n is not None:
            found += _settings_of(n, x)
        tensors += _tensors_of(block)
    return *found, *_looks(tensors)


def _settings_of(n: reference.Norm, x: torch.Tensor) -> tuple[Any, ...]:
    """All of a norm but its tensors."""
    momentum = None if isinstance(n.momentum, torch.Tensor) else n.momentum
    return (
        n.training, momentum, n.eps, n.groups, n.kind, n.channel_groups, n.process_group,
        _widens(n, x),
    )  # fmt: skip


def _looks(tensors: Iterable[torch.Tensor | None]) -> list[tuple[Any, ...] | None]:
    return [
        None if t is None else (type(t), t.shape, t.stride(), t.dtype, t.device) for t in tensors
    ]


def _tensors_of(block: Block) -> tuple[torch.Tensor | None, ...]:
    """Those of an `autograd.Link`, in its order."""
    n, slopes = block.batch_norm, _slopes(block)
    if n is None:
        return block.weight, block.bias, None, None, slopes, None, None, None, None
    gamma, beta, *statistics = _tensors_of_norm(n)
    return block.weight, block.bias, gamma, beta, slopes, *statistics


def _tensors_of_norm(n: reference.Norm) -> tuple[torch.Tensor | None, ...]:
    """Those of an `autograd.Link` that belong to a norm, in its order."""
    momentum = n.momentum if isinstance(n.momentum, torch.Tensor) else None
    return (
        n.weight, n.bias, n.running_mean, n.running_var, n.num_batches_tracked, momentum,
    )  # fmt: skip


def _slopes(block: Block | Normalization) -> torch.Tensor | None:
    """The tensor that is the slope of "prelu"; None for other activations."""
    return block.negative_slope if isinstance(block.negative_slope, torch.Tensor) else None


# Activations of which it depends whether they are a part of the kernels.
_DEPENDING = {name for name, row in reference.ACTIVATION.items() if row.from_input} | {"softplus"}


def _activates_apart(block: Block, x: torch.Tensor, blocks: Sequence[Block]) -> bool:
    """Whether PyTorch applies the activation of a block in a chain of x, not the kernels.

    So where no norm comes before, and a gradient by the activation's input is wanted: backward
    needs that input, and what follows the output. To write both takes the memory that PyTorch
    takes, and to keep the input alone and make the output again takes a pass forward, as PyTorch's
    own activation does, and a pass more backward. With a norm before, its input tells both.
    """
    n = block.batch_norm
    if block.activation not in _DEPENDING:
        return False
    row = reference.ACTIVATION[block.activation]
    if row.in_passes and (n is None or torch.compiler.is_compiling()):
        return True
    if _activates_otherwise(block, n, x):
        return True
    if n is not None or not row.from_input:
        return False
    return torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, *(t for b in blocks for t in _tensors_of(b)))
    )


def _activates_otherwise(
    block: Block | Normalization, norm: reference.Norm | None, x: torch.Tensor
) -> bool:
    """Whether autocast gives the activation of a norm of x, or without one of x, another dtype."""
    dtype = autocast_dtype(x.device)
    if dtype is None or x.dtype == torch.float64:
        return False
    if block.activation == "prelu":  # In autocast's dtype.
        return x.dtype != dtype or (norm is not None and _widens(norm, x))
    # In float32.
    return block.activation == "softplus" and x.device.type == "cuda" and x.dtype != torch.float32


def _plan(
    x: torch.Tensor,
    blocks: Sequence[Block],
    memory_format: torch.memory_format | None,
    added: torch.Tensor | None,
) -> _Plan:
    geometries, shape = [], x.shape
    for block in blocks:
        geometry, shape = _check_block(block, x, shape)
        geometries.append(geometry)
    ways = {
        implementation(
            x, b.weight, *b.vectors.values(), _slopes(b), activation=b.activation,
            negative_slope=b.negative_slope,
        )
        for b in blocks
    }  # fmt: skip
    if any(b.batch_norm is not None and _too_many_images(b.batch_norm, x.shape[0]) for b in blocks):
        ways = {"reference"}
    kinds = tuple(_kind(b, g, x) for b, g in zip(blocks, geometries, strict=True))
    if ways != {"triton"}:
        return _Plan(ways, kinds, memory_format)
    memory_format = memory_format or _pytorchs_format(x, blocks, geometries)
    apart = next((i for i, b in enumerate(blocks) if _activates_apart(b, x, blocks)), None)
    adds = (
        added is not None
        and added.shape == shape
        and added.dtype == (kinds[-1].dtype or x.dtype)
        and memory_format == torch.channels_last
        and apart is None
        and _why_not_plain([added]) is None
    )
    return _Plan(
        ways,
        kinds,
        memory_format,
        apart,
        not layout.is_fresh_channels_last(x),
        tuple(
            i * autograd.TENSORS
            for i, block in enumerate(blocks)
            if not layout.is_fresh_channels_last(block.weight)
        ),
        adds=adds,
    )


def _kind(block: Block, geometry: ConvGeometry, x: torch.Tensor) -> autograd.Kind:
    """The `autograd.Kind` of a block of a chain whose input is x."""
    transposed = block.output_padding is not None
    n = block.batch_norm
    slope = 0.0 if isinstance(block.negative_slope, torch.Tensor) else block.negative_slope
    act = block.activation, slope
    if n is None:
        return autograd.Kind(geometry, transposed, None, 0.0, *act)
    channels = block.weight.shape[1 if transposed else 0]
    return _kind_of_norm(n, geometry, transposed, *act, (x.shape[0], channels), x)


def _kind_of_norm(
    norm: reference.Norm,
    geometry: ConvGeometry | None,
    transposed: bool,
    activation: str,
    negative_slope: float,
    shape: Sequence[int],
    x: torch.Tensor,
) -> autograd.Kind:
    """The `autograd.Kind` of what ends in a norm and an activation.

    shape: (N, C, ...), of what is normalised; x: any tensor on its device.
    """
    n = norm
    return autograd.Kind(
        geometry,
        transposed,
        n.by_batch,
        n.eps,
        activation,
        negative_slope,
        n.groups if n.kind == "batch" else shape[0],
        n.moves,
        0.0 if isinstance(n.momentum, torch.Tensor) else n.momentum,
        n.span(shape[1]),
        torch.float32 if _widens(n, x) else None,
        n.process_group if n.by_batch else None,
    )


def _widens(norm: reference.Norm, x: torch.Tensor) -> bool:
    """Whether PyTorch's norm now gives float32 of any dtype: CUDA's autocast has it so."""
    return norm.kind == "group" and x.device.type == "cuda" and autocast_dtype(x.device) is not None


def _too_many_images(norm: reference.Norm, images: int) -> bool:
    """Whether there are more than a grid has programs in an axis, each with an image."""
    return norm.kind != "batch" and images > _MOST_IMAGES


def reparameterize(
    mu: torch.Tensor, logvar: torch.Tensor, *, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Sample z = mu + exp(logvar / 2) * eps with eps ~ N(0, 1) (Kingma and Welling, 2014).

    Args:
        mu, logvar: the mean and log-variance, of one shape (N, ...), dtype and device.
        generator: a `torch.Generator` of that device, or None for PyTorch's default one.

    Returns:
        z, of the shape and dtype of `mu`. The noise is a function of the generator's state: the
        same seed gives the same z on the same backend (the two backends draw different noise).

    Raises:
        ValueError, TypeError: `mu` and `logvar` do not match or are not floating point.

    Example:
        >>> mu, logvar = torch.zeros(2, 3), torch.zeros(2, 3)
        >>> z = reparameterize(mu, logvar, generator=torch.Generator().manual_seed(0))
        >>> torch.equal(z, reparameterize(mu, logvar, generator=torch.Generator().manual_seed(0)))
        True
    """
    _check_latent(mu, logvar)
    if implementation(mu, logvar) == "triton":
        if torch.compiler.is_compiling():
            return operators.reparameterize(mu, logvar, _draw_seed(mu, generator))
        mu, logvar, leave = _in_order(mu, logvar)
        return leave(autograd.reparameterize(mu, logvar, _draw_seed(mu, generator)))
    return reference.reparameterize(mu, logvar, _draw_noise(mu, generator))


def reparameterize_with_kl(
    mu: torch.Tensor, logvar: torch.Tensor, *, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reparameterize`, with the KL divergence from N(0, 1) in the same pass.

    Returns:
        (z, kl): kl has shape (N,), summed over the latent (every dimension but the first), and
        dtype float32 (float64 for float64 inputs): a sum in half precision would not be worth much.

    Example:
        >>> z, kl = reparameterize_with_kl(torch.ones(2, 4), torch.zeros(2, 4))
        >>> kl  # Of each latent mu^2 / 2, where the variance is 1.
        tensor([2., 2.])
    """
    _check_latent(mu, logvar)
    if mu.dim() == 0:
        raise ValueError("expected mu of shape (N, ...), got a scalar")
    if implementation(mu, logvar) == "triton":
        if torch.compiler.is_compiling():
            return operators.reparameterize_with_kl(mu, logvar, _draw_seed(mu, generator))
        mu, logvar, leave = _in_order(mu, logvar)
        z, kl = autograd.reparameterize_with_kl(mu, logvar, _draw_seed(mu, generator))
        return leave(z), kl
    z = reference.reparameterize(mu, logvar, _draw_noise(mu, generator))
    wide = torch.promote_types(mu.dtype, torch.float32)
    return z, reference.kl_divergence(mu.to(wide), logvar.to(wide))


def importance_samples(
    mu: torch.Tensor,
    logvar: torch.Tensor,
    samples: int,
    *,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Several samples of the latent an image, and how likely each is (Burda et al., 2016).

    mu and logvar are not copied for the samples.

    Args:
        mu, logvar, generator: as `reparameterize` takes them.
        samples: how many of each image, a whole number from 1.

    Returns:
        (z, kl): z = mu + exp(logvar / 2) * eps, of shape (N, samples, ...) and the dtype of mu; and
        log q(z | image) - log p(z), of shape (N, samples), summed over the latent, in float32
        (float64 for float64 inputs). p is N(0, 1). The mean of kl over draws is the KL divergence;
        with `rec` = -log p(image | z) of shape (N, samples), `losses.iwae_loss(rec, kl)` is the
        importance-weighted bound.

    Example:
        >>> z, kl = importance_samples(torch.zeros(2, 4), torch.zeros(2, 4), samples=5)
        >>> z.shape, kl.shape
        (torch.Size([2, 5, 4]), torch.Size([2, 5]))
    """
    _check_latent(mu, logvar)
    if mu.dim() == 0:
        raise ValueError("expected mu of shape (N, ...), got a scalar")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"expected samples to be a whole number from 1, got {samples!r}")
    if implementation(mu, logvar) == "triton":
        if torch.compiler.is_compiling():
            return operators.importance_samples(mu, logvar, samples, _draw_seed(mu, generator))
        mu, logvar, _ = _in_order(mu, logvar)
        return autograd.importance_samples(mu, logvar, samples, _draw_seed(mu, generator))
    shape = (mu.shape[0], samples, *mu.shape[1:])
    eps = torch.randn(shape, dtype=mu.dtype, device=mu.device, generator=generator)
    return reference.importance_samples(mu, logvar, eps)


def why_not_triton(
    *tensors: Any,
    activation: str = "identity",
    negative_slope: float | torch.Tensor = 0.2,
) -> str | None:
    """Say why an operation on these tensors would run through PyTorch; None if kernels run it.

    Example:
        >>> why_not_triton(torch.zeros(1, device="meta"))
        'Triton has no meta target (TRITON_INTERPRET=1 interprets kernels on the CPU)'
    """
    first = tensors[0]
    if is_exporting():
        return "torch.export traces PyTorch's own operations"
    if torch.jit.is_tracing():
        return "torch.jit.trace records PyTorch's own operations"
    reason = why_device_cannot_run_triton(first.device)
    if reason:
        return reason
    dtypes = _INTERPRETED_DTYPES if INTERPRETING else _COMPILED_DTYPES
    if first.dtype not in dtypes:
        return f"the kernels do not take {first.dtype}"
    if activation == "leaky_relu" and not negative_slope >= 0:
        return f"the kernels take no negative slope below 0, got {negative_slope}"
    return _why_not_plain(tensors)


def _why_not_plain(tensors: Iterable[torch.Tensor | None]) -> str | None:
    for t in tensors:
        if t is not None:
            if type(t) not in (torch.Tensor, torch.nn.Parameter):
                return f"the kernels take plain tensors, got a {type(t).__name__}"
            if _is_transformed(t):
                return "the kernels do not run inside a torch.func transform"
            if t.numel() == 0:
                return "there is nothing to compute in an empty tensor"
    return None


def _is_transformed(t: torch.Tensor) -> bool:
    if torch.compiler.is_compiling():  # A trace can be asked for the transforms around it alone.
        # PyTorch 2.11 cannot trace the question how many there are.
        innermost = torch._C._functorch.peek_interpreter_stack()
        return isinstance(innermost, torch._C._functorch.CInterpreter)
    return torch._C._functorch.is_functorch_wrapped_tensor(t)


def implementation(*tensors: Any, **settings: Any) -> Literal["triton", "cpu", "reference"]:
    """What runs an operation on these tensors: "triton", "cpu" or "reference".

    "reference" is PyTorch's own layers, "cpu" mostly too: see `genfast.cpu`.

    Raises:
        RuntimeError: the backend "triton" was asked for and cannot run.
    """
    backend = selected_backend()
    if backend == "reference":
        return "reference"
    reason = why_not_triton(*tensors, **settings)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise RuntimeError(f"the backend 'triton' was asked for and cannot run: {reason}")
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    on_cpu = tensors[0].device.type == "cpu" and not tracing
    return "cpu" if on_cpu and _why_not_plain(tensors) is None else "reference"


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast converts to on a device now; None where it does not."""
    kind = device.type
    # Where kernels run nobody need ask, which torch.compile of PyTorch 2.11 cannot trace.
    if (kind in ("cpu", "cuda") or _has_autocast(kind)) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


_has_autocast = functools.cache(torch.amp.is_autocast_available)


def _pytorchs_format(
    x: torch.Tensor,
    blocks: Sequence[Block],
    geometries: Sequence[ConvGeometry],
    seen: bool | None = None,
) -> torch.memory_format:
    """The memory format that PyTorch's layers would give the output of the last block.

    seen: whether they see x as channels_last, where that is not how it lies.
    """
    channels_last = layout.is_channels_last(x) if seen is None else seen
    for block, geometry in zip(blocks, geometries, strict=True):
        channels_last |= layout.is_channels_last(block.weight)
        transposed = block.output_padding is not None
        channels = block.weight.shape[1 if transposed else 0]
        size = geometry.big if transposed else geometry.small
        # PyTorch's shuffle gives contiguous memory on a GPU, on a CPU memory like its input.
        channels_last &= block.shuffle == 1 or x.device.type != "cuda"
        if block.batch_norm is not None:
            channels_last &= _keeps_channels_last(block.batch_norm, x, channels, size)
    return torch.channels_last if channels_last else torch.contiguous_format


def _keeps_channels_last(
    norm: reference.Norm, x: torch.Tensor, channels: int, size: Sequence[int]
) -> bool:
    """Whether PyTorch's norm of so many channels, and (H, W), gives channels_last for such memory.

    x: any tensor on its device.
    """
    # Of 1 channel, or 1 x 1 pixels, memory is both: a norm then makes it contiguous.
    if channels == 1 or tuple(size) == (1, 1):
        return False
    return norm.kind == "batch" or (norm.kind == "group" and x.device.type == "cpu")


def _autocast(x: torch.Tensor, blocks: Sequence[Block]) -> tuple[torch.Tensor, Sequence[Block]]:
    """Cast as autocast casts the arguments of convolutions (float64 stays as it is)."""
    for block in blocks:
        if x.dtype != block.weight.dtype and torch.float64 in (x.dtype, block.weight.dtype):
            raise TypeError(f"expected x of the weight's dtype {block.weight.dtype}, got {x.dtype}")
    dtype = autocast_dtype(x.device)
    if dtype is None:
        return x, blocks

    def cast(t: Any) -> Any:
        if t is None or not t.is_floating_point() or t.dtype == torch.float64:
            return t
        return t.to(dtype)

    blocks = [b._replace(weight=cast(b.weight), bias=cast(b.bias)) for b in blocks]
    return cast(x), blocks


def _check_block(
    block: Block, x: torch.Tensor, shape: Sequence[int]
) -> tuple[ConvGeometry, tuple[int, ...]]:
    """The `ConvGeometry` of a block, and the shape of its output.

    Args:
        block: a `Block`.
        x: what goes into the chain, of the dtype and on the device that the block meets too.
        shape: of what goes into the block.
    """
    transposed = block.output_padding is not None
    _check_tensors(block, x, shape, transposed)
    if transposed:
        output_padding = pair(block.output_padding, "output_padding")
        _check_output_padding(output_padding, pair(block.stride, "stride"))
    geometry, size = _geometry_of(block, shape[2:])
    channels = block.weight.shape[1 if transposed else 0]
    _check_output(shape, size)
    output = shape[0], channels, *size
    if block.batch_norm is not None:
        _check_values(block.batch_norm, output)
    return geometry, (shape[0], _channels_after(block, channels), *size)


def _channels_after(block: "Block | Normalization", channels: int) -> int:
    """How many channels the activation of a `Block` or `Normalization` gives of so many."""
    if not reference.ACTIVATION[block.activation].halves:
        return channels
    if channels % 2:
        raise ValueError(
            f"expected an even number of channels for {block.activation!r}, got {channels}"
        )
    return channels // 2


def _check_tensors(block: Block, x: torch.Tensor, shape: Sequence[int], transposed: bool) -> None:
    weight = block.weight
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    _check_activation(block)
    if len(shape) != 4:
        raise ValueError(f"expected x of shape (N, C, H, W), got shape {tuple(shape)}")
    if weight.dim() != 4:
        raise ValueError(f"expected weight of 4 dimensions, got shape {tuple(weight.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"expected x to be floating point, got {x.dtype}")
    if shape[1] != weight.shape[in_dim]:
        raise ValueError(
            f"expected x with {weight.shape[in_dim]} channels for a weight of shape "
            f"{tuple(weight.shape)}, got {shape[1]}"
        )
    for name, t in (("weight", weight), ("bias", block.bias)):
        if t is not None and t.dtype != x.dtype:
            raise TypeError(f"expected {name} of x's dtype {x.dtype}, got {t.dtype}")
    if weight.device != x.device:
        raise ValueError(f"expected weight on x's device {x.device}, got {weight.device}")
    vectors = block.vectors
    if block.shuffle > 1 and block.bias is not None:
        vectors["bias"] = block.bias[0]  # As `folding.shuffled` makes it.
    _check_vectors(vectors, block.batch_norm, weight.shape[out_dim], x.device)
    _check_slopes(block, weight.shape[out_dim], x)


def _check_activation(block: Block | Normalization) -> None:
    activation = block.activation
    if activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"expected an activation among {reference.ACTIVATIONS}, got {activation!r}"
        )
    learnt = isinstance(block.negative_slope, torch.Tensor)
    if learnt != (activation == "prelu"):
        wanted = "a tensor" if activation == "prelu" else "a number"
        got = "a tensor" if learnt else repr(block.negative_slope)
        raise TypeError(f"expected the negative_slope of {activation!r} to be {wanted}, got {got}")


def _check_slopes(block: Block | Normalization, channels: int, x: torch.Tensor) -> None:
    slopes = _slopes(block)
    if slopes is None:
        return
    if tuple(slopes.shape) not in ((1,), (channels,)):
        raise ValueError(
            f"expected negative_slope of shape (1,) or ({channels},), got {tuple(slopes.shape)}"
        )
    if slopes.device != x.device:
        raise ValueError(f"expected negative_slope on x's device {x.device}, got {slopes.device}")
    if slopes.dtype != x.dtype and autocast_dtype(x.device) is None:
        raise TypeError(f"expected negative_slope of x's dtype {x.dtype}, got {slopes.dtype}")


def _check_vectors(
    vectors: Mapping[str, torch.Tensor | None],
    norm: reference.Norm | None,
    channels: int,
    device: torch.device,
) -> None:
    """Tensors of one value a channel, by name, and what else a `reference.Norm` or None holds."""
    if norm is not None:
        if (norm.running_mean is None) != (norm.running_var is None):
            raise ValueError("expected running_mean and running_var together, got only one of them")
        _check_counter(norm.num_batches_tracked, device)
        if norm.kind == "group" and (norm.channel_groups < 1 or channels % norm.channel_groups):
            raise ValueError(
                f"expected channels that norm_groups divides evenly, got {channels} channels and "
                f"{norm.channel_groups} groups"
            )
    for name, t in vectors.items():
        if t is not None and tuple(t.shape) != (channels,):
            raise ValueError(f"expected {name} of shape ({channels},), got {tuple(t.shape)}")
    for name, t in vectors.items():
        if t is not None and t.device != device:
            raise ValueError(f"expected {name} on x's device {device}, got {t.device}")


def _check_counter(counter: torch.Tensor | None, device: torch.device) -> None:
    if counter is None:
        return
    if counter.dtype != torch.int64 or counter.dim() != 0:
        raise TypeError(
            "expected num_batches_tracked to be an int64 scalar, got "
            f"{counter.dtype} of shape {tuple(counter.shape)}"
        )
    if counter.device != device:
        raise ValueError(
            f"expected num_batches_tracked on x's device {device}, got {counter.device}"
        )


def _check_output_padding(output_padding: tuple[int, int], stride: tuple[int, int]) -> None:
    if any(o < 0 or o >= s for o, s in zip(output_padding, stride, strict=True)):
        raise ValueError(
            f"expected output_padding to be at least 0 and smaller than the stride {stride}, "
            f"got {output_padding}"
        )


def _check_output(shape: Sequence[int], size: Sequence[int]) -> None:
    if min(size) < 1:
        raise ValueError(
            f"expected an input large enough for one output pixel, got {tuple(shape[2:])}, "
            f"which gives an output of {size}"
        )


def _check_normalization(x: torch.Tensor, block: Normalization) -> None:
    _check_activation(block)
    if not 2 <= x.dim() <= 4:
        raise ValueError(
            f"expected x of shape (N, C), (N, C, L) or (N, C, H, W), got shape {tuple(x.shape)}"
        )
    if not x.is_floating_point():
        raise TypeError(f"expected x to be floating point, got {x.dtype}")
    n = block.norm
    vectors = dict(
        norm_weight=n.weight, norm_bias=n.bias, running_mean=n.running_mean,
        running_var=n.running_var,
    )  # fmt: skip
    _check_vectors(vectors, n, x.shape[1], x.device)
    _check_slopes(block, x.shape[1], x)
    _check_values(n, x.shape)
    _channels_after(block, x.shape[1])


def _check_values(norm: reference.Norm, shape: Sequence[int]) -> None:
    """Refuse what PyTorch refuses to normalise, (N, C, ...): a single value's variance is 0."""
    if not norm.by_batch:
        return
    n, channels, *size = shape
    pixels = math.prod(size)
    if norm.kind == "instance":
        if pixels == 1:
            raise ValueError(
                "expected more than 1 spatial element when training with instance norm, got an "
                f"output of {n} x {_times(size)} pixels"
            )
        return
    if norm.kind == "group":
        # PyTorch counts the values of all images, though each has statistics of its own.
        if n * norm.span(channels) * pixels == 1:
            raise ValueError(
                "expected more than 1 value per group of channels when training with group norm, "
                f"got an output of {n} x {_times(size)} pixels"
            )
        return
    if norm.groups < 1 or n % norm.groups:
        raise ValueError(
            f"expected a batch that statistics_groups divides evenly, got {n} images and "
            f"{norm.groups} groups"
        )
    if n // norm.groups * pixels == 1 and norm.process_group is None:
        raise ValueError(
            "expected more than 1 value per channel when training with batch norm, got an output "
            f"of {n // norm.groups} x {_times(size)} pixels"
        )


def _times(size: Sequence[int]) -> str:
    return " x ".join(map(str, size or (1,)))


def _check_latent(mu: torch.Tensor, logvar: torch.Tensor) -> None:
    if mu.shape != logvar.shape:
        raise ValueError(
            f"expected mu and logvar of one shape, got {tuple(mu.shape)} and {tuple(logvar.shape)}"
        )
    if mu.device != logvar.device:
        raise ValueError(
            f"expected mu and logvar on one device, got {mu.device} and {logvar.device}"
        )
    if not (mu.is_floating_point() and mu.dtype == logvar.dtype):
        raise TypeError(
            f"expected mu and logvar of one floating-point dtype, got {mu.dtype} and {logvar.dtype}"
        )


def _in_order(
    mu: torch.Tensor, logvar: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Both in the order of their shape, in which noise is numbered, and what puts z as mu was."""
    if mu.dim() != 4 or not layout.is_channels_last(mu):
        return mu, logvar, lambda z: z
    mu, logvar = (layout.enter(t, inside=layout.contiguous) for t in (mu, logvar))
    return mu, logvar, layout.channels_last


def _draw_seed(mu: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    # Drawn on the device: nothing waits for the host, and a replayed graph draws a new one.
    return torch.randint(2**63 - 1, (1,), device=mu.device, generator=generator)


def _draw_noise(mu: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    return torch.randn(mu.shape, dtype=mu.dtype, device=mu.device, generator=generator)
