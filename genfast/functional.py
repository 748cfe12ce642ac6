"""The public functions: check the arguments, choose Triton or PyTorch, and be able to say why.

Shapes are PyTorch's (N, C, H, W) whatever the memory format. The kernels work on channels_last
memory and copy what is not; tensors and weights kept so cost no copy.
"""

import functools
from typing import NamedTuple

import torch

from genfast import autograd, cpu, layout, operators, reference
from genfast.backend import INTERPRETING, selected_backend, why_device_cannot_run_triton
from genfast.geometry import ConvGeometry, pair
from genfast.launch import from_image

# Half precision needs fp32 accumulation and float64 an fp64 matrix product, which GPUs' tensor
# cores offer too unevenly for one kernel; the interpreter does not care.
_COMPILED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_INTERPRETED_DTYPES = (*_COMPILED_DTYPES, torch.float64)


def conv_block(
    x,
    weight,
    bias=None,
    stride=1,
    padding=0,
    *,
    norm=False,
    norm_weight=None,
    norm_bias=None,
    running_mean=None,
    running_var=None,
    num_batches_tracked=None,
    training=True,
    momentum=0.1,
    eps=1e-5,
    activation="identity",
    negative_slope=0.2,
    statistics_groups=1,
    inplace=False,
    memory_format=None,
):
    """`conv2d`, then batch norm (if `norm`), then an activation: a discriminator block.

    Args:
        x: (N, in_channels, H, W), float32, bfloat16 or float16 (float64 when interpreted).
        weight: (out_channels, in_channels, kh, kw), as `nn.Conv2d` keeps it; dtype of `x`.
        bias: (out_channels,) or None; dtype of `x`.
        stride, padding: an int or (height, width), in pixels.
        norm: whether to batch-normalise. The five arguments that follow are
            `torch.nn.functional.batch_norm`'s and mean nothing without it.
        norm_weight, norm_bias: (out_channels,) gamma and beta, or None for 1 and 0.
        running_mean, running_var: (out_channels,), or both None. In training they move in place
            towards the batch's mean and unbiased variance; in evaluation they are the statistics.
        num_batches_tracked: an int64 scalar tensor or None. In training it grows in place by the
            number of `statistics_groups` where there are running statistics.
        training: normalise by the batch's statistics. Without running statistics that is always so.
        momentum: the weight of the new statistics, a float or a tensor: a scalar, or one value for
            each of the `statistics_groups`.
        eps: added to the variance.
        activation: "identity", "relu", "leaky_relu", "tanh" or "sigmoid".
        negative_slope: of "leaky_relu".
        statistics_groups: in training, normalise that many equal parts of the batch by statistics
            of their own; running statistics move once for each part, in order. The result is that
            of as many calls, one a part.
        inplace: of "leaky_relu", as in `nn.LeakyReLU`: the caller promises that nothing changes the
            result in place before backward, which then may take it for its own. (The gradients of
            the other activations are made from the result, in PyTorch too.)
        memory_format: of the output: `torch.channels_last`, the kernels' own, or None for the one
            PyTorch would give: channels_last if `x` or `weight` is, else contiguous. Gradients of
            `x` and `weight` have the format of the tensor they belong to.

    Returns:
        (N, out_channels, Ho, Wo) with Ho = (H + 2 padding - kh) // stride + 1, likewise Wo. Under
        autocast the dtype is autocast's, as `conv2d`'s is.

    Raises:
        ValueError: a wrong rank, size, channel count or activation, devices that differ, or one
            value a channel in training.
        TypeError: a tensor that is not floating point, or dtypes that differ.
        RuntimeError: the backend "triton" was asked for and cannot run.
    """
    batch_norm = None
    if norm:
        batch_norm = reference.Norm(
            norm_weight, norm_bias, running_mean, running_var, num_batches_tracked, training,
            momentum, eps, statistics_groups,
        )  # fmt: skip
    block = Block(
        weight, bias, stride, padding, None, batch_norm, activation, negative_slope, inplace
    )
    return chain(x, [block], memory_format)


def conv_transpose_block(
    x,
    weight,
    bias=None,
    stride=1,
    padding=0,
    output_padding=0,
    *,
    norm=False,
    norm_weight=None,
    norm_bias=None,
    running_mean=None,
    running_var=None,
    num_batches_tracked=None,
    training=True,
    momentum=0.1,
    eps=1e-5,
    activation="identity",
    negative_slope=0.2,
    statistics_groups=1,
    inplace=False,
    memory_format=None,
):
    """`conv_transpose2d`, then batch norm (if `norm`), then an activation: a generator block.

    As `conv_block`, but for these:

    Args:
        weight: (in_channels, out_channels, kh, kw), as `nn.ConvTranspose2d` keeps it.
        output_padding: rows and columns added at the bottom and right, fewer than the stride.

    Returns:
        (N, out_channels, Ho, Wo) with Ho = (H - 1) stride - 2 padding + kh + output_padding.
    """
    batch_norm = None
    if norm:
        batch_norm = reference.Norm(
            norm_weight, norm_bias, running_mean, running_var, num_batches_tracked, training,
            momentum, eps, statistics_groups,
        )  # fmt: skip
    block = Block(
        weight, bias, stride, padding, output_padding, batch_norm, activation, negative_slope,
        inplace,
    )  # fmt: skip
    return chain(x, [block], memory_format)


class Block(NamedTuple):
    """A block of a `chain`: the arguments of `conv_block` that belong to it.

    With an `output_padding` it is a `conv_transpose_block`. `batch_norm` is a `reference.Norm`, or
    None for none.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    stride: int | tuple[int, int]
    padding: int | tuple[int, int]
    output_padding: int | tuple[int, int] | None
    batch_norm: reference.Norm | None
    activation: str
    negative_slope: float
    inplace: bool = False

    @property
    def vectors(self):
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


def chain(x, blocks, memory_format=None):
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
        As `conv_block`, before anything is computed.
    """
    x, blocks = _autocast(x, blocks)
    plan = _plan_of(x, blocks, memory_format)
    if len(plan.ways) > 1:
        for block in blocks:
            x = chain(x, [block])
    elif plan.ways == {"triton"} and torch.compiler.is_compiling():
        x = operators.chain(x, blocks)
    elif plan.ways == {"triton"}:
        tensors = [t for block in blocks for t in _tensors_of(block)]
        for i in plan.weights_enter:
            tensors[i] = layout.enter(tensors[i])
        if plan.x_enters and not _lies_padded(x, plan.kinds[0]):
            x = layout.enter(x)
        x = autograd.chain(x, plan.kinds, tensors, blocks[-1].inplace, plan.look)
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
    x_enters, weights_enter: whether x, and which of the tensors of all blocks, are brought into the
        memory format of the kernels.
    look: stands for how all the tensors then look, for `tape.run`.
    """

    ways: set
    kinds: tuple
    memory_format: torch.memory_format | None
    x_enters: bool = True
    weights_enter: tuple[int, ...] = ()
    look: object = None


# Of chains on the kernels, by all that was checked and decided by: on a GPU the checks of a block
# could take longer than its kernels. So many; the oldest is forgotten.
_plans = {}
_MOST_PLANS = 1024


def _plan_of(x, blocks, memory_format):
    """The `_Plan` of a chain, made or known.

    Raises:
        As `chain`.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return _plan(x, blocks, memory_format)
    key = _key_of(x, blocks, memory_format)
    try:
        plan = _plans.get(key)
    except TypeError:  # A list in the place of a pair.
        return _plan(x, blocks, memory_format)
    if plan is None:
        plan = _plan(x, blocks, memory_format)
        if plan.ways == {"triton"}:
            if len(_plans) >= _MOST_PLANS:
                _plans.pop(next(iter(_plans)), None)
            plan = _plans[key] = plan._replace(look=object())
    return plan


def _key_of(x, blocks, memory_format):
    """All that `_plan` looks at."""
    found = [selected_backend(), memory_format, torch._C._are_functorch_transforms_active()]
    tensors = [x]
    for block in blocks:
        _, _, stride, padding, output_padding, n, activation, negative_slope, inplace = block
        found += stride, padding, output_padding, activation, negative_slope, inplace
        if n is not None:
            momentum = None if isinstance(n.momentum, torch.Tensor) else n.momentum
            found += n.training, momentum, n.eps, n.groups
        tensors += _tensors_of(block)
    found += [
        None if t is None else (type(t), t.shape, t.stride(), t.dtype, t.device) for t in tensors
    ]
    return tuple(found)


def _lies_padded(x, kind):
    few = x.shape[1] <= from_image.CHANNELS and not kind.transposed
    return few and from_image.lies_padded(x, kind.geometry)


def _tensors_of(block):
    """Those of an `autograd.Link`, in its order."""
    n = block.batch_norm
    if n is None:
        return block.weight, block.bias, None, None, None, None, None, None
    momentum = n.momentum if isinstance(n.momentum, torch.Tensor) else None
    return (
        block.weight, block.bias, n.weight, n.bias, n.running_mean, n.running_var,
        n.num_batches_tracked, momentum,
    )  # fmt: skip


def _plan(x, blocks, memory_format):
    geometries, shape = [], x.shape
    for block in blocks:
        geometry, shape = _check_block(block, x, shape)
        geometries.append(geometry)
    ways = {
        implementation(
            x, b.weight, *b.vectors.values(), activation=b.activation,
            negative_slope=b.negative_slope,
        )
        for b in blocks
    }  # fmt: skip
    kinds = tuple(map(_kind, blocks, geometries))
    if ways != {"triton"}:
        return _Plan(ways, kinds, memory_format)
    return _Plan(
        ways,
        kinds,
        memory_format or _pytorchs_format(x, blocks, geometries),
        not layout.is_fresh_channels_last(x),
        tuple(
            i * autograd.TENSORS
            for i, block in enumerate(blocks)
            if not layout.is_fresh_channels_last(block.weight)
        ),
    )


def _kind(block, geometry):
    """The `autograd.Kind` of a block."""
    n = block.batch_norm
    of_norm = dict(by_batch=None, eps=0.0)
    if n is not None:
        momentum = 0.0 if isinstance(n.momentum, torch.Tensor) else n.momentum
        of_norm = dict(
            by_batch=n.by_batch, eps=n.eps, groups=n.groups, moves=n.moves, momentum=momentum
        )
    return autograd.Kind(
        geometry,
        transposed=block.output_padding is not None,
        activation=block.activation,
        negative_slope=block.negative_slope,
        **of_norm,
    )


def reparameterize(mu, logvar, *, generator=None):
    """Sample z = mu + exp(logvar / 2) * eps with eps ~ N(0, 1) (Kingma and Welling, 2014).

    Args:
        mu, logvar: the mean and log-variance, of one shape (N, ...), dtype and device.
        generator: a `torch.Generator` of that device, or None for PyTorch's default one.

    Returns:
        z, of the shape and dtype of `mu`. The noise is a function of the generator's state: the
        same seed gives the same z on the same backend (the two backends draw different noise).

    Raises:
        ValueError, TypeError: `mu` and `logvar` do not match or are not floating point.
    """
    _check_latent(mu, logvar)
    if implementation(mu, logvar) == "triton":
        if torch.compiler.is_compiling():
            return operators.reparameterize(mu, logvar, _draw_seed(mu, generator))
        mu, logvar, leave = _in_order(mu, logvar)
        return leave(autograd.reparameterize(mu, logvar, _draw_seed(mu, generator)))
    return reference.reparameterize(mu, logvar, _draw_noise(mu, generator))


def reparameterize_with_kl(mu, logvar, *, generator=None):
    """As `reparameterize`, with the KL divergence from N(0, 1) in the same pass.

    Returns:
        (z, kl): kl has shape (N,), summed over the latent (every dimension but the first), and
        dtype float32 (float64 for float64 inputs): a sum in half precision would not be worth much.
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


def why_not_triton(*tensors, activation="identity", negative_slope=0.2):
    """Say why an operation on these tensors would run through PyTorch; None if kernels run it."""
    first = tensors[0]
    if torch.compiler.is_exporting():
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


def _why_not_plain(tensors):
    for t in tensors:
        if t is not None:
            if type(t) not in (torch.Tensor, torch.nn.Parameter):
                return f"the kernels take plain tensors, got a {type(t).__name__}"
            if _is_transformed(t):
                return "the kernels do not run inside a torch.func transform"
            if t.numel() == 0:
                return "there is nothing to compute in an empty tensor"
    return None


def _is_transformed(t):
    if torch.compiler.is_compiling():  # A trace can be asked for the transforms around it alone.
        return torch._C._functorch.get_dynamic_layer_stack_depth() > 0
    return torch._C._functorch.is_functorch_wrapped_tensor(t)


def implementation(*tensors, **settings):
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


def autocast_dtype(device):
    """The dtype that autocast converts to on a device now; None where it does not."""
    kind = device.type
    if _has_autocast(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


_has_autocast = functools.cache(torch.amp.is_autocast_available)


def _pytorchs_format(x, blocks, geometries):
    """The memory format that PyTorch's layers would give the output of the last block."""
    channels_last = layout.is_channels_last(x)
    for block, geometry in zip(blocks, geometries, strict=True):
        channels_last |= layout.is_channels_last(block.weight)
        transposed = block.output_padding is not None
        channels = block.weight.shape[1 if transposed else 0]
        size = geometry.big if transposed else geometry.small
        # Of 1 channel, or 1 x 1 pixels, memory is both: batch norm then makes it contiguous.
        if block.batch_norm is not None and (channels == 1 or size == (1, 1)):
            channels_last = False
    return torch.channels_last if channels_last else torch.contiguous_format


def _autocast(x, blocks):
    """Cast as autocast casts the arguments of convolutions (float64 stays as it is)."""
    for block in blocks:
        if x.dtype != block.weight.dtype and torch.float64 in (x.dtype, block.weight.dtype):
            raise TypeError(f"expected x of the weight's dtype {block.weight.dtype}, got {x.dtype}")
    dtype = autocast_dtype(x.device)
    if dtype is None:
        return x, blocks

    def cast(t):
        if t is None or not t.is_floating_point() or t.dtype == torch.float64:
            return t
        return t.to(dtype)

    blocks = [b._replace(weight=cast(b.weight), bias=cast(b.bias)) for b in blocks]
    return cast(x), blocks


def _check_block(block, x, shape):
    """The `ConvGeometry` of a block, and the shape of its output.

    Args:
        block: a `Block`.
        x: what goes into the chain, of the dtype and on the device that the block meets too.
        shape: of what goes into the block.
    """
    transposed = block.output_padding is not None
    stride, padding = pair(block.stride, "stride"), pair(block.padding, "padding")
    _check_tensors(block, x, shape, transposed)
    kernel_size, pixels = tuple(block.weight.shape[2:]), tuple(shape[2:])
    if transposed:
        output_padding = pair(block.output_padding, "output_padding")
        _check_output_padding(output_padding, stride)
        geometry = ConvGeometry.conv_transpose(pixels, kernel_size, stride, padding, output_padding)
        channels, size = block.weight.shape[1], geometry.big
    else:
        geometry = ConvGeometry.conv(pixels, kernel_size, stride, padding)
        channels, size = block.weight.shape[0], geometry.small
    _check_output(shape, size, block.batch_norm)
    return geometry, (shape[0], channels, *size)


def _check_tensors(block, x, shape, transposed):
    weight, vectors, batch_norm = block.weight, block.vectors, block.batch_norm
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    if block.activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"expected an activation among {reference.ACTIVATIONS}, got {block.activation!r}"
        )
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
    if batch_norm is not None:
        if (batch_norm.running_mean is None) != (batch_norm.running_var is None):
            raise ValueError("expected running_mean and running_var together, got only one of them")
        _check_counter(batch_norm.num_batches_tracked, x.device)
    channels = weight.shape[out_dim]
    for name, t in vectors.items():
        if t is not None and tuple(t.shape) != (channels,):
            raise ValueError(f"expected {name} of shape ({channels},), got {tuple(t.shape)}")
    for name, t in (("weight", weight), *vectors.items()):
        if t is not None and t.device != x.device:
            raise ValueError(f"expected {name} on x's device {x.device}, got {t.device}")


def _check_counter(counter, device):
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


def _check_output_padding(output_padding, stride):
    if any(o < 0 or o >= s for o, s in zip(output_padding, stride, strict=True)):
        raise ValueError(
            f"expected output_padding to be at least 0 and smaller than the stride {stride}, "
            f"got {output_padding}"
        )


def _check_output(shape, size, batch_norm):
    if min(size) < 1:
        raise ValueError(
            f"expected an input large enough for one output pixel, got {tuple(shape[2:])}, "
            f"which gives an output of {size}"
        )
    if batch_norm is None or not batch_norm.by_batch:
        return
    n, groups = shape[0], batch_norm.groups
    if groups < 1 or n % groups:
        raise ValueError(
            f"expected a batch that statistics_groups divides evenly, got {n} images and "
            f"{groups} groups"
        )
    if n // groups * size[0] * size[1] == 1:
        raise ValueError(
            "expected more than 1 value per channel when training with batch norm, got an output "
            f"of {n // groups} x {size[0]} x {size[1]} pixels"
        )


def _check_latent(mu, logvar):
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


def _in_order(mu, logvar):
    """Both in the order of their shape, in which noise is numbered, and what puts z as mu was."""
    if mu.dim() != 4 or not layout.is_channels_last(mu):
        return mu, logvar, lambda z: z
    mu, logvar = (layout.enter(t, inside=layout.contiguous) for t in (mu, logvar))
    return mu, logvar, layout.channels_last


def _draw_seed(mu, generator):
    # Drawn on the device: nothing waits for the host, and a replayed graph draws a new one.
    return torch.randint(2**63 - 1, (1,), device=mu.device, generator=generator)


def _draw_noise(mu, generator):
    return torch.randn(mu.shape, dtype=mu.dtype, device=mu.device, generator=generator)
