"""Every fused operation in plain PyTorch: the definition, the test oracle and the fallback.

Nothing here imports the rest of genfast. Evaluated in float64 these functions are what the kernels
are compared with; in the caller's dtype they are what runs wherever the kernels do not.
"""

import torch
import torch.nn.functional as F

ACTIVATIONS = ("identity", "relu", "leaky_relu", "tanh", "sigmoid")


def activate(x, activation, negative_slope=0.2):
    """Apply the named activation (one of `ACTIVATIONS`) elementwise."""
    if activation == "identity":
        return x
    if activation == "relu":
        return F.relu(x)
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    if activation == "tanh":
        return torch.tanh(x)
    if activation == "sigmoid":
        return torch.sigmoid(x)
    raise ValueError(f"expected an activation among {ACTIVATIONS}, got {activation!r}")


def batch_norm_by_groups(
    z, running_mean, running_var, weight, bias, training, momentum, eps, groups
):
    """`F.batch_norm` of each of `groups` equal parts of the batch, by statistics of its own.

    Running statistics move once for each part, in order. `momentum` is a number, or a tensor
    (groups,) of one for each part.
    """
    if isinstance(momentum, torch.Tensor):
        momenta = momentum.expand(groups).tolist()
    else:
        momenta = [momentum] * groups
    parts = [
        F.batch_norm(part, running_mean, running_var, weight, bias, training, momentum, eps)
        for part, momentum in zip(z.chunk(groups), momenta, strict=True)
    ]
    return parts[0] if groups == 1 else torch.cat(parts)


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
    return activate(z, activation, negative_slope)


def conv_block(x, weight, bias, stride, padding, **norm_and_activation):
    """`conv2d`, then batch norm (optional), then an activation. Arguments as in `functional`."""
    z = F.conv2d(x, weight, bias, stride, padding)
    return _normalize_and_activate(z, **norm_and_activation)


def conv_transpose_block(x, weight, bias, stride, padding, output_padding, **norm_and_activation):
    """`conv_transpose2d`, then batch norm (optional), then an activation."""
    z = F.conv_transpose2d(x, weight, bias, stride, padding, output_padding)
    return _normalize_and_activate(z, **norm_and_activation)


def reparameterize(mu, logvar, eps):
    """z = mu + exp(logvar / 2) * eps (Kingma and Welling, 2014, section 2.4)."""
    return mu + torch.exp(0.5 * logvar) * eps


def kl_divergence(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, 1)) summed over all but the first dimension: shape (N,).

    Kingma and Welling (2014), appendix B: 1/2 * sum(mu^2 + exp(logvar) - 1 - logvar).
    """
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1)
