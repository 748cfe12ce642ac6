"""Every fused operation in plain PyTorch: the definition, the test oracle and the fallback.

Nothing here imports the rest of genfast but what speaks to other processes. Evaluated in float64
these functions are what the kernels are compared with; in the caller's dtype they are what runs
wherever the kernels do not.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F

from genfast import processes


class Activation(NamedTuple):
    """An activation, as PyTorch has it and as kernels/activation.py does.

    of: act(x, negative_slope).
    in_place: the same into x, or None where PyTorch would keep a copy of x for it.
    keeps_input: whether PyTorch's backward reads x and not act(x), so that the result may be
        changed in place unless it was itself made so.
    from_input: whether the kernels' backward needs x too: act(x) does not tell act'(x).
    slope_by_output: the derivative of act'(x) by act(x), a function of act(x), where act'(x) is
        another function of that than a step; else None.
    halves: whether it takes (N, 2 * C, ...) and gives (N, C, ...).
    in_passes: whether passes of the norm alone know it, and no epilogue of a product.
    """

    of: Callable
    in_place: Callable | None = None
    keeps_input: bool = True
    from_input: bool = False
    slope_by_output: Callable | None = None
    halves: bool = False
    in_passes: bool = False


def _ignoring(function):
    """A function of x alone that takes a slope too."""
    return lambda x, negative_slope: function(x)


def _from_input(function):
    return Activation(_ignoring(function), from_input=True)


_of_result = partial(Activation, keeps_input=False)
# By name. Adding one takes a row here, one in kernels/activation.py, and one for its layer and one
# for its function in nn.py and calls.py.
ACTIVATION = {
    "identity": _of_result(_ignoring(lambda x: x), _ignoring(lambda x: x)),
    "relu": _of_result(_ignoring(F.relu), _ignoring(torch.relu_)),
    "leaky_relu": Activation(F.leaky_relu, F.leaky_relu_),
    "tanh": _of_result(
        _ignoring(torch.tanh), _ignoring(torch.tanh_), slope_by_output=lambda y: -2 * y
    ),
    "sigmoid": _of_result(
        _ignoring(torch.sigmoid), _ignoring(torch.sigmoid_), slope_by_output=lambda y: 1 - 2 * y
    ),
    "relu6": Activation(_ignoring(F.relu6), _ignoring(partial(F.relu6, inplace=True))),
    "hardtanh": Activation(_ignoring(F.hardtanh), _ignoring(F.hardtanh_)),
    "elu": Activation(
        _ignoring(F.elu), _ignoring(F.elu_), slope_by_output=lambda y: (y <= 0).to(y.dtype)
    ),
    "selu": Activation(
        _ignoring(F.selu), _ignoring(F.selu_), slope_by_output=lambda y: (y <= 0).to(y.dtype)
    ),
    "softplus": Activation(
        _ignoring(F.softplus), slope_by_output=lambda y: torch.exp(-y) * (y <= 20)
    ),
    "silu": _from_input(F.silu),
    "gelu": _from_input(F.gelu),
    "gelu_tanh": _from_input(partial(F.gelu, approximate="tanh")),
    "mish": _from_input(F.mish),
    "hardswish": _from_input(F.hardswish),
    "prelu": Activation(F.prelu, from_input=True, in_passes=True),
    "glu": Activation(
        _ignoring(partial(F.glu, dim=1)), from_input=True, halves=True, in_passes=True
    ),
}
ACTIVATIONS = tuple(ACTIVATION)


NormName = Literal["batch", "instance", "group"]
NORMS: tuple[NormName, ...] = get_args(NormName)


class Norm(NamedTuple):
    """A norm: tensors and settings, as `functional.conv_block` describes them.

    weight, bias: (channels,), or None for 1 and 0.
    running_mean, running_var: (channels,), or both None.
    num_batches_tracked: an int64 scalar, or None.
    momentum: a float, or a tensor: a scalar or (groups,).
    groups: the equal parts of a batch that have statistics of their own.
    kind: one of `NORMS`. Of "instance" and "group" each image is normalised by statistics of its
        own, and only weight, bias and eps mean anything beside.
    channel_groups: of "group", the equal parts of the channels that share statistics.
    process_group: of "batch", the `torch.distributed` group over which the batch is spread: its
        statistics are those of all its parts. None: this process has all of it.
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    num_batches_tracked: torch.Tensor | None
    training: bool
    momentum: float | torch.Tensor
    eps: float
    groups: int
    kind: str = "batch"
    channel_groups: int = 1
    process_group: object = None

    @classmethod
    def by_image(cls, kind, weight, bias, eps, channel_groups=1):
        """An instance or group norm."""
        return cls(weight, bias, None, None, None, True, 0.0, eps, 1, kind, channel_groups)

    @property
    def by_batch(self):
        """Whether a batch is normalised by its own statistics."""
        return self.training or self.running_mean is None

    @property
    def moves(self):
        """Whether a batch moves the running statistics and is counted."""
        return self.training and self.running_mean is not None

    def span(self, channels):
        """How many of so many channels in a row share statistics."""
        return channels // self.channel_groups if self.kind == "group" else 1


def activate(x, activation, negative_slope=0.2, *, inplace=False):
    """Apply the named activation (one of `ACTIVATIONS`), all but "glu" elementwise.

    negative_slope: of "leaky_relu" a number; of "prelu" a tensor, (1,) or (C,).
    "glu" takes (N, 2 * C, ...) and gives (N, C, ...).
    """
    if activation not in ACTIVATION:
        raise ValueError(f"expected an activation among {ACTIVATIONS}, got {activation!r}")
    row = ACTIVATION[activation]
    if activation == "leaky_relu":
        inplace = inplace and negative_slope >= 0  # PyTorch could not tell from the result.
    return (row.in_place if inplace and row.in_place else row.of)(x, negative_slope)


def normalize(z, norm):
    """`F.batch_norm`, `F.instance_norm` or `F.group_norm` by a `Norm`: (N, C, ...) to the same."""
    if norm.kind == "instance":
        return F.instance_norm(z, weight=norm.weight, bias=norm.bias, eps=norm.eps)
    if norm.kind == "group":
        return F.group_norm(z, norm.channel_groups, norm.weight, norm.bias, norm.eps)
    return batch_norm_by_groups(z, norm)


def batch_norm_by_groups(z, batch_norm):
    """`F.batch_norm` by a `Norm`: of each group of the batch, by statistics of its own.

    Running statistics move once for each group, in order; the counter grows by their number.
    """
    n = batch_norm
    groups = n.groups if n.by_batch else 1
    momenta = [0.0] * groups
    if n.moves:
        varies = isinstance(n.momentum, torch.Tensor)
        momenta = n.momentum.expand(groups).tolist() if varies else [n.momentum] * groups
        if n.num_batches_tracked is not None:
            n.num_batches_tracked.add_(groups)
    norm = _batch_norm if n.process_group is None else _batch_norm_of_processes
    parts = [
        norm(part, n, momentum)
        for part, momentum in zip(z.chunk(groups) if groups > 1 else [z], momenta, strict=True)
    ]
    return torch.cat(parts) if groups > 1 else parts[0]


def _batch_norm(z, n, momentum):
    return F.batch_norm(
        z, n.running_mean, n.running_var, n.weight, n.bias, n.by_batch, momentum, n.eps
    )


def _batch_norm_of_processes(z, n, momentum):
    """Batch norm by the mean and variance of all processes' parts of the batch, as `_batch_norm`.

    Statistics are taken in two passes, in at least float32, and exchanged after each.
    """
    x = z.to(torch.promote_types(z.dtype, torch.float32))
    over = [0, *range(2, z.dim())]
    shape = (1, -1, *[1] * (z.dim() - 2))
    count = processes.summed(x.new_tensor(x.numel() // x.shape[1]), n.process_group)
    mean = processes.summed(x.sum(over), n.process_group) / count
    deviation = x - mean.view(shape)
    var = processes.summed(deviation.square().sum(over), n.process_group) / count
    if n.moves:
        with torch.no_grad():
            unbiased = var * (count / (count - 1))
            for running, now in ((n.running_mean, mean), (n.running_var, unbiased)):
                running.lerp_(now.to(running.dtype), momentum)
    y = deviation * torch.rsqrt(var + n.eps).view(shape)
    if n.weight is not None:
        y = y * n.weight.view(shape)
    if n.bias is not None:
        y = y + n.bias.view(shape)
    return y.to(z.dtype)


def block(
    x, weight, bias, stride, padding, output_padding=None, *, batch_norm, activation,
    negative_slope, inplace=False, convolutions=F,
):  # fmt: skip
    """`conv2d`, then a norm (a `Norm`, or None for none), then an activation.

    With an `output_padding` it is `conv_transpose2d`. `convolutions` has both functions. The other
    arguments are those of `functional`.
    """
    if output_padding is None:
        z = convolutions.conv2d(x, weight, bias, stride, padding)
    else:
        z = convolutions.conv_transpose2d(x, weight, bias, stride, padding, output_padding)
    if batch_norm is not None:
        z = normalize(z, batch_norm)
    return activate(
        z, activation, negative_slope, inplace=inplace or activates_in_place(activation)
    )


def activates_in_place(activation):
    """Whether it may be made of what a norm or a convolution gives, which nobody else has and
    neither needs for backward, in that memory without being asked to.

    Those whose backward then reads the result instead, as leaky ReLU's, may not: the caller may
    change it where it is told nothing else.
    """
    return not ACTIVATION[activation].keeps_input


def reparameterize(mu, logvar, eps):
    """z = mu + exp(logvar / 2) * eps (Kingma and Welling, 2014, section 2.4)."""
    return mu + torch.exp(0.5 * logvar) * eps


def kl_divergence(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, 1)) summed over all but the first dimension: shape (N,).

    Kingma and Welling (2014), appendix B: 1/2 * sum(mu^2 + exp(logvar) - 1 - logvar).
    """
    # Near the prior, exp(logvar) - 1 as written would leave no digit in float32.
    return 0.5 * (mu.square() + logvar.expm1() - logvar).flatten(1).sum(1)


def reparameterize_gradients(dz, dkl, mu, logvar, eps):
    """The gradients of mu and logvar from those of z and of the KL divergence; None stands for 0.

    In PyTorch's own operations, which can be differentiated again. dkl has shape (N,).
    """
    dmu = dlogvar = torch.zeros_like(mu)
    if dz is not None:
        dmu = dmu + dz
        dlogvar = dlogvar + 0.5 * dz * eps * torch.exp(0.5 * logvar)
    if dkl is not None:
        dkl = dkl.to(mu.dtype).view(-1, *[1] * (mu.dim() - 1))
        dmu = dmu + dkl * mu
        dlogvar = dlogvar + 0.5 * dkl * torch.expm1(logvar)
    return dmu, dlogvar


def importance_samples(mu, logvar, eps):
    """z = mu + exp(logvar / 2) * eps of several draws an image, and log q(z | image) - log p(z).

    Args:
        mu, logvar: (N, ...).
        eps: (N, samples, ...), from N(0, 1).

    Returns:
        z, of the shape of `eps`; and 1/2 * sum(z^2 - eps^2 - logvar), (N, samples), in at least
        float32: of q = N(mu, exp(logvar)) and p = N(0, 1) the difference of the logarithms at z
        (Burda et al., 2016, section 3), whose mean over draws is the KL divergence.
    """
    mu, logvar = mu.unsqueeze(1), logvar.unsqueeze(1)
    z = reparameterize(mu, logvar, eps)
    wide = torch.promote_types(mu.dtype, torch.float32)
    mu, logvar, eps = mu.to(wide), logvar.to(wide), eps.to(wide)
    # z^2 - eps^2 by the difference z - eps, which near the prior is small and has all its digits.
    shift = mu + torch.expm1(0.5 * logvar) * eps
    terms = shift * (2 * eps + shift) - logvar
    return z, 0.5 * terms.reshape(*z.shape[:2], -1).sum(2)


def importance_samples_gradients(dz, dkl, mu, logvar, eps):
    """The gradients of mu and logvar from those of `importance_samples`; None stands for 0.

    In PyTorch's own operations, which can be differentiated again.
    """
    scaled = torch.exp(0.5 * logvar).unsqueeze(1) * eps
    d = torch.zeros_like(eps) if dz is None else dz
    dlogvar = 0
    if dkl is not None:
        dkl = dkl.to(mu.dtype).view(*dkl.shape, *[1] * (mu.dim() - 1))
        d = d + dkl * (mu.unsqueeze(1) + scaled)
        dlogvar = dkl
    return d.sum(1), 0.5 * (d * scaled - dlogvar).sum(1)


def logit_loss(logits, targets, scale, kind="logistic", paired=False):
    """scale * sum(f(logits, targets)), in at least float32: a scalar.

    Args:
        logits: flat; with targets of any shape.
        targets: of the shape of the logits, for "logistic", binary cross entropy of
            sigmoid(logits); or a number of labels 1, which come first and labels 0 after them.
        scale: a number.
        kind: a row of the table in kernels/losses.py.
        paired: whether the terms are the logits' first half minus the second.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if isinstance(targets, torch.Tensor):
        loss = F.binary_cross_entropy_with_logits(x, targets.to(x.dtype), reduction="sum")
        return loss if scale == 1 else scale * loss  # Forward and backward, 1 costs 50 us on a CPU.
    if paired:
        x = torch.sub(*x.chunk(2))
    real, fake = x[:targets], x[targets:]
    if kind == "least-squares":
        return scale / 2 * ((real - 1).square().sum() + fake.square().sum())
    if kind == "hinge":
        return scale * (F.relu(1 - real).sum() + F.relu(1 + fake).sum())
    if kind == "linear":
        return scale * (fake.sum() - real.sum())
    # Not F.softplus, which takes the line x for itself where it is near: too coarse in float64.
    return -scale * (F.logsigmoid(real).sum() + F.logsigmoid(-fake).sum())


def logit_loss_gradient(dloss, logits, targets, scale, kind="logistic", paired=False):
    """The gradient of the logits, f'(logits) * scale * dloss, in their dtype.

    In PyTorch's own operations, which can be differentiated again.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if paired:
        x = torch.sub(*x.chunk(2))
    if not isinstance(targets, torch.Tensor):
        targets = torch.arange(len(x), device=x.device) < targets
    targets = targets.to(x.dtype)
    signs = 1 - 2 * targets
    slopes = {
        "logistic": lambda: x.sigmoid() - targets,
        "least-squares": lambda: x - targets,
        "hinge": lambda: signs * (1 + signs * x > 0),
        "linear": lambda: signs,
    }
    dx = slopes[kind]() * (scale * dloss)
    return (torch.cat([dx, -dx]) if paired else dx).to(logits.dtype)
