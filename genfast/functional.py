"""The public functions: check the arguments, choose Triton or PyTorch, and be able to say why.

Shapes are PyTorch's (N, C, H, W) whatever the memory format. The kernels work on channels_last
memory and copy what is not; tensors and weights kept so cost no copy.
"""

import torch

from genfast import autograd, cpu, layout, reference
from genfast.backend import INTERPRETING, selected_backend, why_device_cannot_run_triton
from genfast.geometry import ConvGeometry, pair

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
    return block(
        x, weight, bias, stride, padding, batch_norm=batch_norm, activation=activation,
        negative_slope=negative_slope, inplace=inplace, memory_format=memory_format,
    )  # fmt: skip


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
    return block(
        x, weight, bias, stride, padding, output_padding, batch_norm=batch_norm,
        activation=activation, negative_slope=negative_slope, inplace=inplace,
        memory_format=memory_format,
    )  # fmt: skip


def block(
    x, weight, bias, stride, padding, output_padding=None, *, batch_norm=None, activation,
    negative_slope, inplace=False, memory_format=None,
):  # fmt: skip
    """Both blocks, `conv_transpose_block` where there is an `output_padding`.

    `batch_norm` is a `reference.Norm`, or None for none; the other arguments are those of the two.
    """
    transposed = output_padding is not None
    stride, padding = pair(stride, "stride"), pair(padding, "padding")
    x, weight, bias = _autocast(x, weight, bias)
    vectors = {"bias": bias}
    if batch_norm is not None:
        vectors |= {
            "norm_weight": batch_norm.weight,
            "norm_bias": batch_norm.bias,
            "running_mean": batch_norm.running_mean,
            "running_var": batch_norm.running_var,
        }
    _check_tensors(x, weight, vectors, batch_norm, transposed, activation)
    kernel_size = tuple(weight.shape[2:])
    if transposed:
        output_padding = pair(output_padding, "output_padding")
        _check_output_padding(output_padding, stride)
        geometry = ConvGeometry.conv_transpose(
            tuple(x.shape[2:]), kernel_size, stride, padding, output_padding
        )
        size = geometry.big
    else:
        geometry = ConvGeometry.conv(tuple(x.shape[2:]), kernel_size, stride, padding)
        size = geometry.small
    _check_output(x, size, batch_norm)

    act = dict(activation=activation, negative_slope=negative_slope)
    runs = implementation(x, weight, *vectors.values(), **act)
    if runs == "triton":
        y = autograd.block(
            layout.enter(x), layout.enter(weight), bias, geometry, transposed,
            batch_norm=batch_norm, inplace=inplace, **act,
        )  # fmt: skip
        memory_format = memory_format or _pytorchs_format(y, x, weight, batch_norm)
    else:
        y = reference.block(
            x, weight, bias, stride, padding, output_padding, batch_norm=batch_norm,
            inplace=inplace, convolutions=cpu if runs == "cpu" else torch.nn.functional, **act,
        )  # fmt: skip
    if memory_format is None:  # PyTorch's own operations have chosen.
        return y
    as_asked = layout.channels_last if memory_format == torch.channels_last else layout.contiguous
    return as_asked(y)


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
        mu, logvar, leave = _in_order(mu, logvar)
        z, kl = autograd.reparameterize_with_kl(mu, logvar, _draw_seed(mu, generator))
        return leave(z), kl
    z = reference.reparameterize(mu, logvar, _draw_noise(mu, generator))
    wide = torch.promote_types(mu.dtype, torch.float32)
    return z, reference.kl_divergence(mu.to(wide), logvar.to(wide))


def why_not_triton(*tensors, activation="identity", negative_slope=0.2):
    """Say why an operation on these tensors would run through PyTorch; None if kernels run it."""
    first = tensors[0]
    if torch.compiler.is_compiling():
        return "torch.compile traces PyTorch's own operations"
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
            if torch._C._functorch.is_functorch_wrapped_tensor(t):
                return "the kernels do not run inside a torch.func transform"
            if t.numel() == 0:
                return "there is nothing to compute in an empty tensor"
    return None


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


def _pytorchs_format(y, x, weight, batch_norm):
    """The memory format that PyTorch's layers would give the output `y`."""
    # Of 1 channel, or 1 x 1 pixels: batch norm then makes it so.
    if batch_norm is not None and y.is_contiguous():
        return torch.contiguous_format
    channels_last = layout.is_channels_last(x) or layout.is_channels_last(weight)
    return torch.channels_last if channels_last else torch.contiguous_format


def _autocast(x, weight, bias):
    """Cast as autocast casts the arguments of a convolution (float64 stays as it is)."""
    if x.dtype != weight.dtype and torch.float64 in (x.dtype, weight.dtype):
        raise TypeError(f"expected x of the weight's dtype {weight.dtype}, got {x.dtype}")
    device = x.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return x, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in (x, weight, bias)
    )


def _check_tensors(x, weight, vectors, batch_norm, transposed, activation):
    in_dim, out_dim = (0, 1) if transposed else (1, 0)
    if activation not in reference.ACTIVATIONS:
        raise ValueError(
            f"expected an activation among {reference.ACTIVATIONS}, got {activation!r}"
        )
    if x.dim() != 4:
        raise ValueError(f"expected x of shape (N, C, H, W), got shape {tuple(x.shape)}")
    if weight.dim() != 4:
        raise ValueError(f"expected weight of 4 dimensions, got shape {tuple(weight.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"expected x to be floating point, got {x.dtype}")
    if x.shape[1] != weight.shape[in_dim]:
        raise ValueError(
            f"expected x with {weight.shape[in_dim]} channels for a weight of shape "
            f"{tuple(weight.shape)}, got {x.shape[1]}"
        )
    for name, t in (("weight", weight), ("bias", vectors["bias"])):
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


def _check_output(x, size, batch_norm):
    if min(size) < 1:
        raise ValueError(
            f"expected an input large enough for one output pixel, got {tuple(x.shape[2:])}, "
            f"which gives an output of {size}"
        )
    if batch_norm is None or not batch_norm.by_batch:
        return
    n, groups = x.shape[0], batch_norm.groups
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
