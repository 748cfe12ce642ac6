"""One autograd Function per fused operation: what it saves, and its gradients.

fprop, dgrad and wgrad are each other's gradients, so the plain convolutions differentiate any
number of times through the same kernels, and blocks without batch norm with them. Where a graph of
the gradient is asked for (`create_graph=True`) through batch norm, sampling or a loss, it is
taken through PyTorch instead, which can differentiate its own.
"""

import torch
from torch.autograd import Function

from genfast import reference
from genfast.launch import conv, losses, norm, sampling
from genfast.launch.conv import Epilogue
from genfast.launch.from_image import Padded
from genfast.launch.operand import Operand, operand


def block(
    x, weight, bias, geometry, transposed, *, batch_norm, activation, negative_slope, inplace
):
    """`functional.block` on the kernels: `conv_transpose_block` if `transposed`.

    The arguments have been checked; x and weight are channels_last, and so is the output.
    """
    act = activation, negative_slope
    if batch_norm is None:
        return _ConvActivation.apply(x, weight, bias, geometry, transposed, *act, inplace)
    inputs = (x, weight, bias, batch_norm.weight, batch_norm.bias)
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    if batch_norm.by_batch or wanted:
        return _ConvNormActivation.apply(*inputs, batch_norm, geometry, transposed, *act)
    # By known statistics and for no gradient, batch norm is an epilogue: z is never stored.
    epilogue = Epilogue(
        bias=bias,
        vectors=_vectors(batch_norm, x.dtype),
        activation=activation,
        negative_slope=negative_slope,
    )
    return _convolve(x, weight, geometry, transposed, epilogue)[0]


def reparameterize(mu, logvar, seed):
    """`functional.reparameterize` on the kernels, with noise keyed by `seed`."""
    return _Reparameterize.apply(mu, logvar, seed, False)[0]


def reparameterize_with_kl(mu, logvar, seed):
    """`functional.reparameterize_with_kl` on the kernels, with noise keyed by `seed`."""
    return _Reparameterize.apply(mu, logvar, seed, True)


def logistic_loss(logits, targets, scale):
    """`functional.logistic_loss` on the kernels: contiguous logits, and targets of their shape."""
    return _LogisticLoss.apply(logits, targets, scale)


class _Convolution(Function):
    """conv2d (transposed False: fprop) or conv_transpose2d (dgrad), nothing else."""

    @staticmethod
    def forward(ctx, x, weight, geometry, transposed):
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.transposed = geometry, transposed
        return _convolve(x, weight, geometry, transposed)[0]

    @staticmethod
    def backward(ctx, dz):
        x, weight = ctx.saved_tensors
        dx, dw = _convolution_backward(
            dz, x, weight, ctx.geometry, ctx.transposed, ctx.needs_input_grad
        )
        return dx, dw, None, None


class _WeightGradient(Function):
    """wgrad of the geometry's big and small sides."""

    @staticmethod
    def forward(ctx, big, small, geometry):
        ctx.save_for_backward(big, small)
        ctx.geometry = geometry
        return conv.wgrad(big, small, geometry)

    @staticmethod
    def backward(ctx, ddw):
        big, small = ctx.saved_tensors
        dbig = dsmall = None
        if ctx.needs_input_grad[0]:
            dbig = _Convolution.apply(small, ddw, ctx.geometry, True)
        if ctx.needs_input_grad[1]:
            dsmall = _Convolution.apply(big, ddw, ctx.geometry, False)
        return dbig, dsmall, None


class _ActivationGradient(Function):
    """du = dy * act'(u), from the output y."""

    @staticmethod
    def forward(ctx, dy, y, activation, negative_slope):
        ctx.save_for_backward(dy, y)
        ctx.activation, ctx.negative_slope = activation, negative_slope
        return norm.activation_backward(dy, y, activation, negative_slope)

    @staticmethod
    def backward(ctx, ddu):
        dy, y = ctx.saved_tensors
        ddy = _ActivationGradient.apply(ddu, y, ctx.activation, ctx.negative_slope)
        # d act'(u) / dy, act' being a function of y: 1 - y^2 for tanh, y - y^2 for sigmoid.
        if ctx.activation == "tanh":
            return ddy, -2 * ddu * dy * y, None, None
        if ctx.activation == "sigmoid":
            return ddy, ddu * dy * (1 - 2 * y), None, None
        return ddy, None, None, None


class _ConvActivation(Function):
    """Convolution, bias and activation in one kernel. Saves its inputs and its output.

    PyTorch's leaky ReLU keeps its input instead, so that what it returns may be changed in place,
    unless it is itself in place. The output then is looked at only as long as nobody has changed
    it, else computed again.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, geometry, transposed, activation, negative_slope, inplace):
        epilogue = Epilogue(bias=bias, activation=activation, negative_slope=negative_slope)
        source = Operand(x)
        y, _ = _convolve(source, weight, geometry, transposed, epilogue)
        changeable = activation == "leaky_relu" and not inplace
        saved = None if activation == "identity" or changeable else y
        image = _kept_image(ctx, source)
        ctx.save_for_backward(x, weight, saved, bias if changeable else None, image)
        ctx.changeable = None
        if changeable and any(ctx.needs_input_grad):
            ctx.changeable = y.detach(), y._version
        ctx.geometry, ctx.transposed = geometry, transposed
        ctx.activation, ctx.negative_slope = activation, negative_slope
        return y

    @staticmethod
    def _output(ctx):
        """The output as it was made; None if the activation has no need of it."""
        x, weight, y, bias, _ = ctx.saved_tensors
        if y is not None or ctx.activation == "identity":
            return y
        # Let go, as backward lets go of what was saved; a second backward computes it again.
        (y, version), ctx.changeable = ctx.changeable or (None, None), None
        if y is None or y._version != version:
            epilogue = Epilogue(
                bias=bias, activation=ctx.activation, negative_slope=ctx.negative_slope
            )
            with torch.no_grad():
                y, _ = _convolve(x, weight, ctx.geometry, ctx.transposed, epilogue)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, *_, image = ctx.saved_tensors
        y = _ConvActivation._output(ctx)
        if torch.is_grad_enabled():
            du = dy
            if y is not None:
                du = _ActivationGradient.apply(dy, y, ctx.activation, ctx.negative_slope)
            source = x
        else:
            du = Operand(dy)
            if y is not None:
                du = Operand(dy, y, ctx.activation, ctx.negative_slope)
            source = _source(ctx, x, image)
        dx, dw = _convolution_backward(
            du, source, weight, ctx.geometry, ctx.transposed, ctx.needs_input_grad
        )
        dbias = None
        if ctx.needs_input_grad[2]:
            dbias = operand(du).tensor().sum((0, 2, 3))
        return dx, dw, dbias, *[None] * 5


class _ConvNormActivation(Function):
    """Convolution, batch norm and activation.

    Saves the convolution's output and the batch norm's `vectors` beside the inputs; everything else
    in backward is computed from them. Gradients go to `gamma` and `beta`, which are the tensors of
    `batch_norm`: autograd sees those alone that are arguments themselves.
    """

    @staticmethod
    def forward(
        ctx, x, weight, bias, gamma, beta, batch_norm, geometry, transposed, activation,
        negative_slope,
    ):  # fmt: skip
        by_batch = batch_norm.by_batch
        epilogue = Epilogue(bias=bias, groups=batch_norm.groups if by_batch else 0)
        source = Operand(x)
        z, statistics = _convolve(source, weight, geometry, transposed, epilogue)
        if by_batch:
            vectors = _batch_statistics(statistics, batch_norm)
        else:
            vectors = _vectors(batch_norm, x.dtype)
        y = norm.normalize_activate(z, vectors, activation, negative_slope)
        image = _kept_image(ctx, source)
        ctx.save_for_backward(x, weight, bias, gamma, beta, z, vectors, image)
        ctx.geometry, ctx.transposed = geometry, transposed
        ctx.by_batch, ctx.eps = by_batch, batch_norm.eps
        ctx.activation, ctx.negative_slope = activation, negative_slope
        return y

    @staticmethod
    def backward(ctx, dy):
        if torch.is_grad_enabled():
            return _ConvNormActivation._differentiable_backward(ctx, dy)
        x, weight, bias, gamma, beta, z, vectors, image = ctx.saved_tensors
        need_x, need_w, need_bias, need_gamma, need_beta = ctx.needs_input_grad[:5]
        dz, sums = norm.norm_backward(
            dy,
            z,
            vectors,
            training=ctx.by_batch,
            need_dz=need_x or need_w or need_bias,
            activation=ctx.activation,
            negative_slope=ctx.negative_slope,
        )
        source = _source(ctx, x, image)
        dx, dw = _convolution_backward(
            dz, source, weight, ctx.geometry, ctx.transposed, (need_x, need_w)
        )
        dbias = None
        if need_bias:
            # The batch's own mean takes any constant away again, so then the sum is exactly 0.
            dbias = torch.zeros_like(bias) if ctx.by_batch else dz.sum((0, 2, 3))
        dbeta = sums[0].to(beta.dtype) if need_beta else None
        dgamma = sums[1].to(gamma.dtype) if need_gamma else None
        return dx, dw, dbias, dgamma, dbeta, *[None] * 5

    @staticmethod
    def _differentiable_backward(ctx, dy):
        *inputs, _, vectors, _ = ctx.saved_tensors
        # Aliases: the gradient stops at them, also where one input was computed from another.
        inputs = [t if t is None else t.view_as(t) for t in inputs]
        x, weight, bias, gamma, beta = inputs
        z = _Convolution.apply(x, weight, ctx.geometry, ctx.transposed)
        if bias is not None:
            z = z + bias[:, None, None]
        mean = var = None
        if not ctx.by_batch:
            mean, var = vectors[0, norm.MEAN], vectors[0, norm.RSTD] ** -2 - ctx.eps
        groups = [
            torch.nn.functional.batch_norm(
                part, mean, var, gamma, beta, training=ctx.by_batch, momentum=0.0, eps=ctx.eps
            )
            for part in z.chunk(vectors.shape[0])
        ]
        y = reference.activate(torch.cat(groups), ctx.activation, ctx.negative_slope)
        wanted = [i for i in range(5) if ctx.needs_input_grad[i]]
        found = torch.autograd.grad(y, [inputs[i] for i in wanted], dy, create_graph=True)
        gradients = [None] * 10
        for i, gradient in zip(wanted, found, strict=True):
            gradients[i] = gradient
        return tuple(gradients)


class _Reparameterize(Function):
    """z and, with `with_kl`, the KL divergence. Saves its inputs and the seed, not the noise."""

    @staticmethod
    def forward(ctx, mu, logvar, seed, with_kl):
        ctx.save_for_backward(mu, logvar, seed)
        ctx.set_materialize_grads(False)
        return sampling.reparameterize(mu, logvar, seed, with_kl=with_kl)

    @staticmethod
    def backward(ctx, dz, dkl):
        mu, logvar, seed = ctx.saved_tensors
        if dz is None and dkl is None:
            return None, None, None, None
        if not torch.is_grad_enabled():
            dmu, dlogvar = sampling.reparameterize_backward(dz, dkl, mu, logvar, seed)
            return dmu, dlogvar, None, None
        zeros = torch.zeros_like(mu)
        eps = sampling.reparameterize(zeros, zeros, seed, with_kl=False)[0]
        dmu, dlogvar = reference.reparameterize_gradients(dz, dkl, mu, logvar, eps)
        return dmu, dlogvar, None, None


class _LogisticLoss(Function):
    """Saves the logits and the targets; only the logits get a gradient."""

    @staticmethod
    def forward(ctx, logits, targets, scale):
        labelled = isinstance(targets, int)
        ctx.save_for_backward(logits, None if labelled else targets)
        ctx.ones, ctx.scale = targets if labelled else None, scale
        return losses.logistic_loss(logits, targets, scale)

    @staticmethod
    def backward(ctx, dloss):
        logits, targets = ctx.saved_tensors
        gradient = losses.logistic_loss_backward
        if torch.is_grad_enabled():
            gradient = reference.logistic_loss_gradient
        labels = ctx.ones if targets is None else targets
        return gradient(dloss, logits, labels, ctx.scale), None, None


def _convolve(x, weight, geometry, transposed, epilogue=conv.PLAIN):
    convolve = conv.dgrad if transposed else conv.fprop
    return convolve(x, weight, geometry, epilogue)


def _convolution_backward(dz, x, weight, geometry, transposed, needs_input_grad):
    """dx and dweight of a convolution, each None if not needed.

    Differentiable themselves where gradients are enabled; elsewhere dz and x may be `Operand`s.
    """
    differentiable = torch.is_grad_enabled()
    dx = dw = None
    if needs_input_grad[0]:
        if differentiable:
            dx = _Convolution.apply(dz, weight, geometry, not transposed)
        else:
            dx, _ = _convolve(dz, weight, geometry, not transposed)
    if needs_input_grad[1]:
        big, small = (dz, x) if transposed else (x, dz)
        wgrad = _WeightGradient.apply if differentiable else conv.wgrad
        dw = wgrad(big, small, geometry)
    return dx, dw


def _kept_image(ctx, source):
    """The padded copy that a forward made of its input, if the weight's gradient will read it."""
    if source.image is None or not ctx.needs_input_grad[1]:
        return None
    return source.image.data


def _source(ctx, x, image):
    """The `Operand` of a forward's input, with the padded copy that was kept of it, if any."""
    if image is None:
        return Operand(x)
    return Operand(x, image=Padded(image, ctx.geometry, x.shape[1]))


def _batch_statistics(statistics, batch_norm):
    """The vectors of the batch's own statistics; running statistics and the counter move."""
    n = batch_norm
    given = statistics, n.weight, n.bias, n.eps
    if not n.moves:
        return norm.batch_statistics(*given)
    mean, var, momentum, counter = n.running_mean, n.running_var, n.momentum, n.num_batches_tracked
    if not isinstance(momentum, torch.Tensor):
        return norm.batch_statistics(*given, mean, var, momentum, counter)
    # A cumulative average: the weight of each group is on the device, to be read there.
    vectors = norm.batch_statistics(*given, counter=counter)
    for group, weight in zip(vectors, momentum.expand(len(vectors)), strict=True):
        mean.lerp_(group[norm.MEAN].to(mean.dtype), weight)
        var.lerp_(group[norm.UNBIASED_VAR].to(var.dtype), weight)
    return vectors


def _vectors(batch_norm, dtype):
    """Known statistics in the form that `norm.batch_statistics` gives the batch's."""
    n = batch_norm
    dtype = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.no_grad():
        mean, var = n.running_mean.to(dtype), n.running_var.to(dtype)
        rstd = (var + n.eps).rsqrt()
        scale = rstd if n.weight is None else rstd * n.weight
        shift = torch.zeros_like(mean) if n.bias is None else n.bias.to(dtype)
        return torch.stack([mean, var, rstd, scale, shift])[None]
