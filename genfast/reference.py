"""Every fused operation in plain PyTorch: the definition, the test oracle and the fallback.

Nothing here imports the rest of genfast. Evaluated in float64 these functions are what the kernels
are compared with; in the caller's dtype they are what runs wherever the kernels do not.
"""

import torch
import torch.nn.functional as F

ACTIVATIONS = ("identity", "relu", "leaky_relu", "tanh", "sigmoid")


def activate(x, activation, negative_slope=0.2, *, inplace=False):
    """Apply the named activation (one of `ACTIVATIONS`) elementwise."""
    if activation == "identity":
        return x
    if activation == "relu":
        return F.relu(x, inplace)
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope, inplace and negative_slope >= 0)
    if activation == "tanh":
        return x.tanh_() if inplace else x.tanh()
    if activation == "sigmoid":
        return x.sigmoid_() if inplace else x.sigmoid()
    raise ValueError(f"expected an activation among {ACTIVATIONS}, got {activation!r}")


def batch_norm_by_groups(
    z, running_mean, running_var, weight, bias, training, momentum, eps, groups
):
    """`F.batch_norm` of each of `groups` equal parts of the batch, by statistics of its own.

    Running statistics move once for each part, in order. `momentum` is a number, or a tensor
    (groups,) of one for each part.
    """
    if not training or running_mean is None:  # Nothing moves.
        momenta = [0.0] * groups
    elif isinstance(momentum, torch.Tensor):
        momenta = momentum.expand(groups).tolist()
    else:
        momenta = [momentum] * groups
    parts = [
        F.batch_norm(part, running_mean, running_var, weight, bias, training, momentum, eps)
        for part, momentum in zip(z.chunk(groups) if groups > 1 else [z], momenta, strict=True)
    ]
    return torch.cat(parts) if groups > 1 else parts[0]


def _normalize_and_activate(
    z, *, norm, norm_weight, norm_bias, running_mean, running_var, training, momentum, eps,
    activation, negative_slope, statistics_groups,
):  # fmt: skip
    if norm:
        training = training or running_mean is None
        groups = statistics_groups if training else 1
        z = batch_norm_by_groups(
            z, running_mean, running_var, norm_weight, norm_bias, training, momentum, eps, groups
        )
    # In place: nobody else has z, and neither batch norm nor convolution needs it for backward.
    return activate(z, activation, negative_slope, inplace=True)


def conv_block(x, weight, bias, stride, padding, *, convolve=F.conv2d, **norm_and_activation):
    """`conv2d`, then batch norm (optional), then an activation. Arguments as in `functional`.

    `convolve` may be another implementation of `conv2d`.
    """
    z = convolve(x, weight, bias, stride, padding)
    return _normalize_and_activate(z, **norm_and_activation)


def conv_transpose_block(
    x, weight, bias, stride, padding, output_padding, *, convolve=F.conv_transpose2d,
    **norm_and_activation,
):  # fmt: skip
    """`conv_transpose2d`, then batch norm (optional), then an activation."""
    z = convolve(x, weight, bias, stride, padding, output_padding)
    return _normalize_and_activate(z, **norm_and_activation)


def reparameterize(mu, logvar, eps):
    """z = mu + exp(logvar / 2) * eps (Kingma and Welling, 2014, section 2.4)."""
    return mu + torch.exp(0.5 * logvar) * eps


def kl_divergence(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, 1)) summed over all but the first dimension: shape (N,).

    Kingma and Welling (2014), appendix B: 1/2 * sum(mu^2 + exp(logvar) - 1 - logvar).
    """
    # Near the prior, exp(logvar) - 1 as written would leave no digit in float32.
    return 0.5 * (mu.square() + logvar.expm1() - logvar).flatten(1).sum(1)
