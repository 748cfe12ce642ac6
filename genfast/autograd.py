"""One autograd Function per fused operation: what it saves, and its gradients.

fprop, dgrad and wgrad are each other's gradients, so the plain convolutions differentiate any
number of times through the same kernels, and blocks without batch norm with them. Where a graph of
the gradient is asked for (`create_graph=True`) through batch norm, sampling or a loss, it is
taken through PyTorch instead, which can differentiate its own.
"""

import itertools
import threading
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.autograd import Function

from genfast import layout, reference
from genfast.geometry import ConvGeometry
from genfast.launch import (
    conv,
    dgrad_wgrad,
    first_use,
    from_image,
    losses,
    norm,
    phases,
    sampling,
    start,
    tape,
)
from genfast.launch.epilogue import PLAIN, Epilogue
from genfast.launch.operand import Operand, Output


class Kind(NamedTuple):
    """What a block does, but for its tensors.

    geometry: of the convolution; None where there is none.
    transposed: whether it is `conv_transpose2d`.
    by_batch: whether the norm takes the batch's own statistics; None without a norm.
    eps: of the norm.
    activation, negative_slope: as in `functional.conv_block`.
    groups: the equal parts of a batch that have statistics of their own: for instance norm and
        group norm the images.
    moves: whether a batch moves the running statistics.
    momentum: with which, where that is a number.
    span: how many channels in a row share statistics: more than 1 for group norm.
    dtype: of what comes out, where that is not the dtype of what is normalised. Inside a chain it
        means nothing.
    process_group: over which the batch that is normalised is spread; None: it is all here.
    """

    geometry: ConvGeometry | None
    transposed: bool
    by_batch: bool | None
    eps: float
    activation: str
    negative_slope: float
    groups: int = 1
    moves: bool = False
    momentum: float = 0.0
    span: int = 1
    dtype: torch.dtype | None = None
    process_group: object = None

    def takes_away(self, bias):
        """Whether what is added before the norm is lost in it: a constant of each channel is."""
        return self.by_batch and self.span == 1 and bias.dim() == 1

    @property
    def activates_in_passes(self):
        """Whether no epilogue of a product knows the activation."""
        return reference.ACTIVATION[self.activation].in_passes


class Link(NamedTuple):
    """A block of a chain: its `Kind`, and its tensors, None where absent.

    weight, bias: of the convolution; None where there is none. The bias is (channels,), or of a
        transposed convolution (phases, channels).
    gamma, beta, running_mean, running_var, counter: of the batch norm, counter being
        `num_batches_tracked`.
    slope: of "prelu", (1,) or (channels,).
    momentum: with which running statistics move, where that is a tensor.
    """

    kind: Kind
    weight: torch.Tensor | None
    bias: torch.Tensor | None = None
    gamma: torch.Tensor | None = None
    beta: torch.Tensor | None = None
    slope: torch.Tensor | None = None
    running_mean: torch.Tensor | None = None
    running_var: torch.Tensor | None = None
    counter: torch.Tensor | None = None
    momentum: torch.Tensor | None = None

    @property
    def activation(self):
        """Its name and slope, as `norm.normalize_activate` takes them."""
        return self.kind.activation, self.kind.negative_slope if self.slope is None else self.slope


# The tensors of a link that may want a gradient come first: weight, bias, gamma, beta, slope.
_PARAMETERS = 5
TENSORS = len(Link._fields) - 1


def chain(x, kinds, tensors, inplace, look=None, added=None):
    """Blocks, one after the other, on the kernels: `functional.chain`.

    Args:
        x: (N, C, H, W), channels_last or as `from_image.joined` gives it.
        kinds: a tuple with the `Kind` of each `Link`.
        tensors: a list of the tensors of one link after the other, checked, with weights in
            channels_last.
        look: hashable, stands for how x and the tensors look; or None: see `tape.run`.
        inplace: of the last link's "leaky_relu", as in `functional.conv_block`.
        added: as in `functional.chain`, channels_last, and `look` stands for it too; or None.

    Returns:
        The last link's output, channels_last.
    """
    wanted = (t is not None and t.requires_grad for t in (x, added, *tensors))
    if torch.is_grad_enabled() and any(wanted):
        return _Chain.apply(x, kinds, inplace, tensors, look, added, *_parameters(tensors))
    return _run_forward(x, kinds, tensors, look, added, keep=False)[-1]


def normalize(x, kind, gamma, beta, slope, statistics, look=None):
    """A norm and an activation after it, on the kernels: `functional.norm_block`.

    Args:
        x: (N, C, H, W), contiguous or channels_last.
        kind: a `Kind` without a geometry.
        gamma, beta: (C,), or None.
        slope: of "prelu", or None.
        statistics: the other tensors of a `Link`, or None.
        look: as in `chain`.

    Returns:
        The output, in x's memory format.
    """
    wanted = (t is not None and t.requires_grad for t in (x, gamma, beta, slope))
    if torch.is_grad_enabled() and any(wanted):
        return _Normalization.apply(x, gamma, beta, slope, kind, statistics, look)
    given = [x, gamma, beta, slope, *statistics]
    return _run(_normalization_forward, given, kind, look=look)[0]


def reparameterize(mu, logvar, seed):
    """`functional.reparameterize` on the kernels, with noise keyed by `seed`."""
    return _Reparameterize.apply(mu, logvar, seed, False)[0]


def reparameterize_with_kl(mu, logvar, seed):
    """`functional.reparameterize_with_kl` on the kernels, with noise keyed by `seed`."""
    return _Reparameterize.apply(mu, logvar, seed, True)


def importance_samples(mu, logvar, samples, seed):
    """`functional.importance_samples` on the kernels, with noise keyed by `seed`."""
    return _ImportanceSamples.apply(mu, logvar, samples, seed)


def logit_loss(logits, targets, scale, kind="logistic", paired=False):
    """`reference.logit_loss` on the kernels: contiguous logits, and targets of their shape."""
    # Labels are those of a GAN's logits, which are few: their gradient takes no time beside them.
    wanted = isinstance(targets, int) and torch.is_grad_enabled() and logits.requires_grad
    return _LogitLoss.apply(logits, targets, scale, kind, paired, wanted)


def one(loss):
    """A gradient of 1 to begin the backward pass of a loss with: a scalar, the same at each call.

    What comes to a loss as this very tensor is known to be 1 without a look at the device.
    """
    kind = loss.dtype, loss.device
    if kind in _ones:
        return _ones[kind]
    made = torch.ones((), dtype=loss.dtype, device=loss.device)
    # What is made in a capture has no value before that graph is replayed.
    if not first_use.is_captured(loss.device):
        _ones[kind] = made
    return made


_ones: dict[Any, torch.Tensor] = {}


def _is_one(dloss):
    known = _ones.get((dloss.dtype, dloss.device))
    return known is not None and known.data_ptr() == dloss.data_ptr() and known._version == 0


class _Promised(threading.local):
    inputs_first = False


_promised = _Promised()


@contextmanager
def inputs_first():
    """Within, forward passes whose first gradient is asked for by their inputs alone.

    Where a graph of the gradient is asked for, as a gradient penalty does it, chains then leave out
    the gradients of parameters, which autograd would throw away: it does not tell a Function. The
    gradients of what is made of that gradient are whole, as long as no graph of these is asked for
    too. Holds for parameters that are leaves; what else a weight was computed from might be the
    input.
    """
    before, _promised.inputs_first = _promised.inputs_first, True
    try:
        yield
    finally:
        _promised.inputs_first = before


class _Convolution(Function):
    """conv2d (transposed False: fprop) or conv_transpose2d (dgrad), nothing else."""

    @staticmethod
    def forward(ctx, x, weight, geometry, transposed):
        ctx.save_for_backward(x, weight)
        ctx.geometry, ctx.transposed = geometry, transposed
        convolve = conv.dgrad if transposed else conv.fprop
        return convolve(x, weight, geometry)[0]

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
        slope_by_output = reference.ACTIVATION[ctx.activation].slope_by_output
        if slope_by_output is None:
            return ddy, None, None, None
        return ddy, ddu * dy * slope_by_output(y), None, None


class _Chain(Function):
    """Blocks, one after the other.

    Keeps its input and one tensor a block: what the convolution put out where batch norm follows,
    else the block's output. The normalised inputs of weights' gradients are made again, by the pass
    that reads the former for a batch norm's gradient anyway.

    PyTorch's leaky ReLU, and others, keep their input instead of their output, so that what they
    return may be changed in place, unless they are themselves in place. The last block's output
    then is looked at only as long as nobody has changed it, else computed again.

    The tensors are those of the links, one after the other. Autograd sees the `parameters` among
    them, which are all that may want a gradient.

    What is `added` before the last activation is not kept. Its gradient, which is that of what the
    activation takes, is made of the output, and goes into the last block as that of its own output.
    """

    @staticmethod
    def forward(ctx, x, kinds, inplace, tensors, look, added, *parameters):
        n, last = len(kinds), kinds[-1]
        made = _run_forward(x, kinds, tensors, look, added, keep=True)
        y = made.pop()
        ctx.changeable = ctx.after_sum = None
        of_sum = None
        if added is not None and last.activation != "identity":
            ctx.after_sum, of_sum = (last.activation, last.negative_slope), y
            last = last._replace(activation="identity")
            kinds = (*kinds[:-1], last)
        if last.by_batch is None:
            if reference.ACTIVATION[last.activation].keeps_input and not inplace:
                ctx.changeable = y.detach(), y._version
            if last.activation == "identity" or ctx.changeable:
                made[n - 1] = None
        ctx.kinds, ctx.inputs_first = kinds, _promised.inputs_first
        ctx.save_for_backward(x, *parameters, *made, of_sum)
        return y

    @staticmethod
    def backward(ctx, dy):
        kinds, (x, *tensors, of_sum) = ctx.kinds, ctx.saved_tensors
        need_x, _, _, _, _, need_added, *needs = ctx.needs_input_grad
        if of_sum is not None:
            dy = _ActivationGradient.apply(dy, of_sum, *ctx.after_sum)
        dadded = dy if need_added else None
        if not need_x and not any(needs):
            return None, None, None, None, None, dadded, *[None] * len(needs)
        value = len(kinds) * (_PARAMETERS + 1) - 1
        if tensors[value] is None and kinds[-1].activation != "identity":
            tensors[value] = _Chain._put_back_output(ctx, x, tensors)
        if torch.is_grad_enabled():
            if ctx.inputs_first:  # `tensors` begin with the parameters.
                pairs = zip(needs, tensors, strict=False)
                needs = [need and not tensor.is_leaf for need, tensor in pairs]
            dx, *found = _differentiable_backward(dy, x, kinds, tensors, need_x, needs)
        else:
            given = [dy, x, _image_of(x, kinds[0]), *tensors]
            dx, *found = _run(_backward, given, kinds, need_x, tuple(needs))
        return dx, None, None, None, None, dadded, *found

    @staticmethod
    def _put_back_output(ctx, x, tensors):
        """The last block's output as it was made, where it was not kept."""
        kinds, last = ctx.kinds, ctx.kinds[-1]
        # Let go, as backward lets go of what was saved; a second backward computes it again.
        (y, version), ctx.changeable = ctx.changeable or (None, None), None
        if y is not None and y._version == version:
            return y
        parameters, outputs = _saved(kinds, tensors)
        weight, bias, *_ = parameters[-1]
        epilogue = Epilogue(
            bias=bias, activation=last.activation, negative_slope=last.negative_slope
        )
        source = outputs[-2] if len(kinds) > 1 else Operand(x)
        with torch.no_grad():
            return _convolve(source, weight, last, epilogue)[0]


class _Normalization(Function):
    """A norm and an activation after it. Keeps its input, and what that is normalised by."""

    @staticmethod
    def forward(ctx, x, gamma, beta, slope, kind, statistics, look):
        given = [x, gamma, beta, slope, *statistics]
        y, vectors = _run(_normalization_forward, given, kind, look=look)
        ctx.kind = kind
        ctx.save_for_backward(x, gamma, beta, slope, vectors)
        return y

    @staticmethod
    def backward(ctx, dy):
        kind, needs = ctx.kind, ctx.needs_input_grad[:4]
        x, gamma, beta, slope, vectors = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = [t if t is None else t.view_as(t) for t in (x, gamma, beta, slope)]
            *normed, slope = inputs
            y = _differentiable_norm(*normed, vectors, kind)
            y = _differentiable_activation(y, kind, slope)
            found = _gradients_where(needs, y, inputs, dy)
        else:
            given = [dy, x, gamma, beta, slope, vectors]
            found = _run(_normalization_backward, given, kind, needs)
        dx, *found = found
        return dx if dx is None else layout.like(dx, x), *found, None, None, None


class _Known(Function):
    """A convolution, bias and activation whose output is known: only its gradients are computed."""

    @staticmethod
    def forward(ctx, x, weight, bias, kind, activation, known, wanted):
        y = known.detach()
        ctx.save_for_backward(x, weight, y)
        ctx.kind, ctx.activation, ctx.wanted = kind, activation, wanted
        ctx.bias_dim = 0 if bias is None else bias.dim()
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, y = ctx.saved_tensors
        kind, du, needs = ctx.kind, dy, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():  # Of the weight and the bias what was wanted of the chain.
            needs = [need and wanted for need, wanted in zip(needs, ctx.wanted, strict=True)]
        if ctx.activation != "identity":
            du = _ActivationGradient.apply(dy, y, ctx.activation, kind.negative_slope)
        geometry, transposed = kind.geometry, kind.transposed
        dx, dw = _convolution_backward(du, x, weight, geometry, transposed, needs)
        dbias = _bias_gradient(du, ctx.bias_dim, geometry) if needs[2] else None
        return dx, dw, dbias, None, None, None, None


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


class _ImportanceSamples(Function):
    """Several z an image and log q - log p of each. Saves inputs and seed, not the noise."""

    @staticmethod
    def forward(ctx, mu, logvar, samples, seed):
        ctx.save_for_backward(mu, logvar, seed)
        ctx.samples = samples
        ctx.set_materialize_grads(False)
        return sampling.importance_samples(mu, logvar, samples, seed)

    @staticmethod
    def backward(ctx, dz, dkl):
        mu, logvar, seed = ctx.saved_tensors
        if dz is None and dkl is None:
            return None, None, None, None
        if torch.is_grad_enabled():
            zeros = torch.zeros_like(mu)
            eps = sampling.importance_samples(zeros, zeros, ctx.samples, seed)[0]
            found = reference.importance_samples_gradients(dz, dkl, mu, logvar, eps)
        else:
            found = sampling.importance_samples_backward(dz, dkl, mu, logvar, ctx.samples, seed)
        return *found, None, None


class _LogitLoss(Function):
    """Saves the logits, the targets and, `with_gradient`, the gradient for a dloss of `one`.

    Only the logits get a gradient.
    """

    @staticmethod
    def forward(ctx, logits, targets, scale, kind, paired, with_gradient):
        labelled = isinstance(targets, int)
        loss, dlogits = losses.logit_loss(logits, targets, scale, kind, paired, with_gradient)
        ctx.save_for_backward(logits, None if labelled else targets, dlogits)
        ctx.ones, ctx.how = targets if labelled else None, (scale, kind, paired)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        logits, targets, dlogits = ctx.saved_tensors
        labels = ctx.ones if targets is None else targets
        if torch.is_grad_enabled():
            dlogits = reference.logit_loss_gradient(dloss, logits, labels, *ctx.how)
        elif dlogits is None or not _is_one(dloss):
            dlogits = losses.logit_loss_backward(dloss, logits, labels, *ctx.how)
        return dlogits, None, None, None, None, None


def _image_of(x, kind):
    """The padded memory that x lies in or was copied to, if the first block's kernels read that."""
    if kind.transposed:
        return None
    image = from_image.found(x, kind.geometry)
    return None if image is None else image.data


def _parameters(tensors):
    """Those of the tensors of links that may want a gradient."""
    if len(tensors) == TENSORS:
        return tensors[:_PARAMETERS]
    return [t for i in range(0, len(tensors), TENSORS) for t in tensors[i : i + _PARAMETERS]]


def _operand(x, image, kind):
    """x as an operand of the first block."""
    if image is None:
        return Operand(x)
    return Operand(x, image=from_image.Padded(image, kind.geometry, x.shape[1]))


def _run_forward(x, kinds, tensors, look, added, keep):
    image = _image_of(x, kinds[0])
    # An image is one more tensor, of which `look` does not tell.
    look = look if image is None else None
    return _run(_forward, [x, image, added, *tensors], kinds, keep, look=look)


def _run(function, tensors, kinds, *settings, look=None):
    """`tape.run`, but for what other processes have a part in: no recording knows of those."""
    alone = all(k.process_group is None for k in ((kinds,) if isinstance(kinds, Kind) else kinds))
    if not alone:
        return function(tensors, kinds, *settings)
    return tape.run(function, tensors, kinds, *settings, look=look)


def _forward(tensors, kinds, keep):
    """The forward pass of a chain.

    Args:
        tensors: x, its padded image or None, what is added before the last activation or None, and
            those of each `Link`.
        kinds: of the links.
        keep: whether backward needs what lies between.

    Returns:
        With `keep` the value of each link's `Output`; the vectors of each; and the output.
    """
    x, image, added, *tensors = tensors
    source = _operand(x, image, kinds[0])
    links = [Link(kind, *tensors[TENSORS * i :][:TENSORS]) for i, kind in enumerate(kinds)]
    values, vectors = [], []
    for link in links:
        output = _output(source, link, keep, added if link is links[-1] else None)
        source.release()
        source = output
        vectors.append(output.vectors)
        if keep:
            values.append(output.value)
    return [*values, *vectors, source.tensor(kinds[-1].dtype)]


def _output(source, link, keep, added):
    """The `Output` of a link. With `keep` it is what backward needs.

    added: None, or what is added before the activation.
    """
    kind, act = link.kind, link.activation
    vectors = None
    if kind.by_batch is None:
        epilogue = Epilogue(link.bias, 0, None, *act, added=added)
    elif kind.by_batch:
        apart = _sums_apart(source, link.weight, kind, kind, kind.transposed, False)
        epilogue = Epilogue(link.bias, groups=0 if apart else kind.groups)
    else:
        vectors = _vectors(link, source.value.dtype)
        epilogue = Epilogue(link.bias)
        # Batch norm is an epilogue then: its input is never stored.
        if not keep and not kind.activates_in_passes:
            epilogue = Epilogue(link.bias, 0, vectors, *act, added=added)
            vectors = None
    z, statistics = _convolve(source, link.weight, kind, epilogue)
    if kind.by_batch:
        if statistics is None:
            statistics = norm.statistics_of(z, kind.groups)
        vectors = _batch_statistics(statistics, link)
    return Output(z, vectors, *act, added)


def _normalization_forward(tensors, kind):
    """The output of a norm with activation, and the vectors that it was normalised by.

    Args:
        tensors: x, and the tensors of a `Link` from gamma on.
        kind: its `Kind`.
    """
    x, *tensors = tensors
    link = Link(kind, None, None, *tensors)
    if kind.by_batch:
        vectors = _batch_statistics(norm.statistics_of(x, kind.groups), link)
    else:
        vectors = _vectors(link, x.dtype)
    return [norm.normalize_activate(x, vectors, *link.activation, kind.dtype), vectors]


def _normalization_backward(tensors, kind, needs):
    """The gradients of x, gamma, beta and slope, None where not needed.

    Args:
        tensors: dy, and what `_Normalization` keeps.
        kind: its `Kind`.
        needs: of these four.
    """
    dy, x, gamma, beta, slope, vectors = tensors
    need_x, *need_parameters = needs
    dx, sums, _ = norm.norm_backward(
        dy,
        x,
        vectors,
        training=kind.by_batch,
        need_dz=need_x,
        activation=kind.activation,
        negative_slope=kind.negative_slope if slope is None else slope,
        need_total=any(need_parameters),
        span=kind.span,
        process_group=kind.process_group,
    )
    return [dx, *_of_sums(sums, (gamma, beta, slope), need_parameters)]


def _of_sums(sums, parameters, needs):
    """The gradients of gamma, beta and slope of `norm.norm_backward`'s sums, None if not needed."""
    gamma, beta, slope = parameters
    need_gamma, need_beta, need_slope = needs
    dslope = None
    if need_slope:
        dslope = sums[2] if len(slope) > 1 else sums[2].sum().view(1)
        dslope = dslope.to(slope.dtype)
    return [
        sums[1].to(gamma.dtype) if need_gamma else None,
        sums[0].to(beta.dtype) if need_beta else None,
        dslope,
    ]


def _saved(kinds, tensors):
    """The parameters of each link, and each one's `Output`, of what a chain saved beside x."""
    n = len(kinds)
    parameters = [tensors[_PARAMETERS * i :][:_PARAMETERS] for i in range(n)]
    values, vectors = tensors[_PARAMETERS * n :][:n], tensors[_PARAMETERS * n + n :]
    outputs = [
        Output(value, of, *Link(kind, *tensors_of).activation)
        for value, of, kind, tensors_of in zip(values, vectors, kinds, parameters, strict=True)
    ]
    return parameters, outputs


def _backward(tensors, kinds, need_x, needs):
    """dx and the gradients of each link's parameters, None where not needed: a list.

    Args:
        tensors: dy, x, its padded image or None, the parameters of each link, and the value and
            then the vectors of each link's `Output`.
        kinds: of the links.
        need_x, needs: whether x, and the parameters one link after the other, need a gradient.
    """
    dy, x, image, *tensors = tensors
    needs = [needs[_PARAMETERS * i :][:_PARAMETERS] for i in range(len(kinds))]
    parameters, outputs = _saved(kinds, tensors)
    x = _operand(x, image, kinds[0])
    found = [[None] * _PARAMETERS for _ in kinds]
    lowest = 0 if need_x else next(i for i, need in enumerate(needs) if any(need))
    dx = waiting = None  # `waiting`: a dz, for what the gradient of its link's weight reads.
    # Of the last link's output. Inside the chain it comes multiplied by act'(u), with its sums; or
    # only these, and what computes the rest again.
    gradient, partials, again = dy, None, None
    for i in reversed(range(lowest, len(kinds))):
        kind, output = kinds[i], outputs[i]
        weight, bias, *of_norm = parameters[i]
        need_weight, need_bias, *need_of_norm = needs[i]
        passes_on = need_x or i > lowest
        if kind.by_batch is None:
            dz = Operand(gradient)
            if i == len(kinds) - 1 and kind.activation != "identity":
                dz = Operand(gradient, output.value, kind.activation, kind.negative_slope)
            if need_bias:
                if partials is None:
                    total = _bias_gradient(dz.tensor(), bias.dim(), kind.geometry)
                else:
                    total = partials.sum((0, 1))
                found[i][1] = total.to(bias.dtype)
        else:
            need_dz = passes_on or need_weight or (need_bias and not kind.takes_away(bias))
            wanted = need_dz, any(need_of_norm)
            if again is not None:
                dz, sums = _norm_backward_again(again, partials, output, kind, wanted)
            else:
                made = waiting is not None and _wgrad_makes(
                    output, kinds[i + 1], parameters[i + 1][0]
                )
                want_y = waiting is not None and not made
                dz, sums = _norm_backward(gradient, partials, output, kind, wanted, want_y)
            if need_bias:
                # A channel's own mean takes any constant away again: then the sum is exactly 0.
                if kind.takes_away(bias):
                    found[i][1] = torch.zeros_like(bias)
                else:
                    found[i][1] = _bias_gradient(dz, bias.dim(), kind.geometry)
            found[i][2:] = _of_sums(sums, of_norm, need_of_norm)
            dz = Operand(dz)
        if waiting is not None:
            found[i + 1][0] = _weight_gradient(output, waiting, kinds[i + 1])
            output.release()
        # That of a layer at an image may be there already, with the gradient it is made of.
        waiting, again = dz if need_weight and found[i][0] is None else None, None
        if i > lowest and _is_computed_twice(dz, weight, kind, outputs[i - 1], kinds[i - 1]):
            partials, dweight = conv.norm_sums(
                _product_of_gradient(kind), dz, weight, kind.geometry, outputs[i - 1], need_weight
            )
            if dweight is not None:
                found[i][0], waiting = dweight, None
            again = partial(_input_gradient, dz, weight, kind)
        elif i > lowest:
            # A tile here has pixels of all phases there.
            sums = kinds[i - 1].by_batch is None and needs[i - 1][1]
            sums = sums and parameters[i - 1][1].dim() == 1
            if i == 1 and not need_x and needs[0][0]:
                both = _with_weight_gradient(dz, weight, kinds, outputs[0], x, bool(sums))
                if both is not None:
                    (found[0][0], partials), gradient = both, None
                    continue
            epilogue = Epilogue(output=outputs[i - 1], sums=sums)
            if kinds[i - 1].activates_in_passes or _sums_apart(
                dz, weight, kind, kinds[i - 1], not kind.transposed, True
            ):
                epilogue = PLAIN  # Then the gradient is that of the output, without sums.
            gradient, partials = _input_gradient(dz, weight, kind, epilogue)
        elif need_x:
            dx, _ = _input_gradient(dz, weight, kind)
    if waiting is not None:
        source = outputs[lowest - 1] if lowest else x
        found[lowest][0] = _weight_gradient(source, waiting, kinds[lowest])
    return [dx, *itertools.chain.from_iterable(found)]


def _norm_backward(gradient, partials, output, kind, wanted, want_y):
    """The gradient of what a norm took, and the sums that `_of_sums` takes; None if not wanted.

    Args:
        gradient, partials: of the link's output, or with its sums times act'(u).
        output: the `Output`, which remembers y if it is made too.
        kind: its `Kind`.
        wanted: whether the one, and whether the other is.
        want_y: whether y is wanted beside the gradient.
    """
    need_dz, need_total = wanted
    dz, sums, y = norm.norm_backward(
        gradient,
        output.value,
        output.vectors,
        training=kind.by_batch,
        need_dz=need_dz,
        activation=output.activation,
        negative_slope=output.negative_slope,
        partials=partials,
        want_y=need_dz and want_y,
        need_total=need_total,
        span=kind.span,
        process_group=kind.process_group,
    )
    output.remember(y)
    return dz, sums


def _norm_backward_again(again, partials, output, kind, wanted):
    """As `_norm_backward`, where the gradient is not stored: `again` computes it, up to dz."""
    need_dz, need_total = wanted
    rows = output.value.numel() // output.vectors[:, 0].numel()
    at_input, sums = norm.total_sums(partials, rows, need_total, kind.process_group)
    return again(Epilogue(output=output, at_input=at_input))[0] if need_dz else None, sums


def _differentiable_backward(dy, x, kinds, tensors, need_x, needs):
    """As `_backward`, differentiable itself: through a graph of the chain with its known values."""
    parameters, outputs = _saved(kinds, tensors)
    # Aliases: the gradient stops at them, also where one input was computed from another.
    x, *inputs = (
        t if t is None else t.view_as(t) for t in (x, *itertools.chain.from_iterable(parameters))
    )
    y = x
    for i, (kind, output) in enumerate(zip(kinds, outputs, strict=True)):
        weight, bias, gamma, beta, slope = inputs[_PARAMETERS * i :][:_PARAMETERS]
        # What is not kept is the result of an identity: nobody reads it, so dy may stand in for it.
        known = dy if output.value is None else output.value
        wanted = True, *needs[_PARAMETERS * i :][:2]
        if kind.by_batch is None:
            y = _Known.apply(y, weight, bias, kind, kind.activation, known, wanted)
            continue
        z = _Known.apply(y, weight, bias, kind, "identity", known, wanted)
        y = _differentiable_norm(z, gamma, beta, output.vectors, kind)
        y = _differentiable_activation(y, kind, slope)
    return _gradients_where([need_x, *needs], y, [x, *inputs], dy)


def _differentiable_activation(u, kind, slope):
    """The activation after a norm by PyTorch. `slope` is that of "prelu", else None."""
    return reference.activate(u, kind.activation, kind.negative_slope if slope is None else slope)


def _differentiable_norm(z, gamma, beta, vectors, kind):
    """A norm by PyTorch, of what it took and the vectors it was normalised by."""
    groups, _, channels = vectors.shape
    if kind.process_group is not None:
        norm_of = reference.Norm(
            gamma, beta, None, None, None, True, 0.0, kind.eps, groups,
            process_group=kind.process_group,
        )  # fmt: skip
        return reference.batch_norm_by_groups(z, norm_of)
    if kind.by_batch and groups == len(z):  # Each image by itself.
        wide_z, *affine = (t if t is None else t.to(vectors.dtype) for t in (z, gamma, beta))
        u = torch.nn.functional.group_norm(wide_z, channels // kind.span, *affine, kind.eps)
        return u.to(kind.dtype or z.dtype)
    mean = var = None
    if not kind.by_batch:
        mean = vectors[0, norm.MEAN]
        var = vectors[0, norm.RSTD] ** -2 - kind.eps
    parts = [
        torch.nn.functional.batch_norm(
            part, mean, var, gamma, beta, training=kind.by_batch, momentum=0.0, eps=kind.eps
        )
        for part in z.chunk(groups)
    ]
    return torch.cat(parts)


def _gradients_where(needs, y, inputs, dy):
    """The gradients of the inputs that need one, with a graph; None for the others."""
    wanted = [t for t, need in zip(inputs, needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True) if wanted else ())
    return [next(found) if need else None for need in needs]


def _convolve(source, weight, kind, epilogue=PLAIN):
    convolve = conv.dgrad if kind.transposed else conv.fprop
    return convolve(source, weight, kind.geometry, epilogue)


def _input_gradient(dz, weight, kind, epilogue=PLAIN):
    convolve = conv.fprop if kind.transposed else conv.dgrad
    return convolve(dz, weight, kind.geometry, epilogue)


def _with_weight_gradient(dz, weight, kinds, below, x, sums):
    """The gradient of the first link's weight where that of its output is nowhere stored, or None.

    Args:
        dz, weight: of the second link: the gradient of its convolution's output.
        kinds: of the links.
        below, x: the first link's output and input.
        sums: whether the sums of that gradient are wanted too.

    Returns:
        What `dgrad_wgrad.dgrad_wgrad` does; None where two kernels are to be started.
    """
    lower, upper = kinds[:2]
    if lower.transposed or upper.transposed or lower.activates_in_passes:
        return None
    above = weight, upper.geometry, below
    if not dgrad_wgrad.gains(dz.value, *above, lower.geometry, x.channels, sums):
        return None
    return dgrad_wgrad.dgrad_wgrad(dz.tensor(), *above, x.padded(lower.geometry), sums)


def _product_of_gradient(kind):
    """The product that computes the gradient of a convolution's input."""
    return "fprop" if kind.transposed else "dgrad"


def _is_computed_twice(dz, weight, kind, output, below):
    """Whether the gradient of an `Output` is, as its norm's backward goes: see `norm_sums`.

    Args:
        dz: an `Operand`, which the product reads.
        weight, kind: of its link.
        output, below: of the link before it, and that one's `Kind`.
    """
    if not below.by_batch or below.span > 1:
        return False
    operation, geometry = _product_of_gradient(kind), kind.geometry
    return conv.computed_twice(operation, dz.value, weight, geometry, output)


def _sums_apart(source, weight, kind, summed, is_dgrad, output_is_read):
    """Whether a pass of its own sums each image's values, not the product that computes them.

    Args:
        source: an `Operand` or `Output`, which the product reads.
        weight, kind: of its link.
        summed: the `Kind` of the link whose norm needs the sums.
        is_dgrad: the product; else it is fprop.
        output_is_read: as in `conv.sums_apart`.
    """
    if not summed.by_batch or summed.groups != source.value.shape[0]:
        return False
    operation = "dgrad" if is_dgrad else "fprop"
    return conv.sums_apart(operation, source.value, weight, kind.geometry, output_is_read)


def _bias_gradient(dz, dim, geometry):
    """That of a bias of 1 dimension, (channels,), or of 2, (phases, channels); differentiable."""
    return dz.sum((0, 2, 3)) if dim == 1 else phases.bias_gradient(dz, geometry.stride)


def _wgrad_makes(output, kind, weight):
    """Whether the gradient of a weight makes what it needs of an `Output` itself, as it reads."""
    images = output.value.shape[0]
    possible = conv.wgrad_makes(not kind.transposed, weight, kind.geometry, images)
    return output.is_made_reading and possible


def _weight_gradient(source, dz, kind):
    big, small = (dz, source) if kind.transposed else (source, dz)
    return conv.wgrad(big, small, kind.geometry)


def _convolution_backward(dz, x, weight, geometry, transposed, needs_input_grad):
    """dx and dweight of a convolution, each None if not needed; differentiable themselves."""
    dx = dw = None
    if needs_input_grad[0]:
        dx = _Convolution.apply(dz, weight, geometry, not transposed)
    if needs_input_grad[1]:
        big, small = (dz, x) if transposed else (x, dz)
        dw = _WeightGradient.apply(big, small, geometry)
    return dx, dw


def _batch_statistics(statistics, link):
    """The vectors of the batch's own statistics; running statistics and the counter move."""
    kind = link.kind
    if kind.process_group is not None:
        statistics = norm.of_all_processes(statistics, kind.process_group)
    given = statistics, link.gamma, link.beta, kind.eps
    if not kind.moves:
        return norm.batch_statistics(*given, span=kind.span)
    mean, var = link.running_mean, link.running_var
    if link.momentum is None:
        return norm.batch_statistics(*given, mean, var, kind.momentum, link.counter)
    # A cumulative average: the weight of each group is on the device, to be read there.
    vectors = norm.batch_statistics(*given, counter=link.counter)
    for group, weight in zip(vectors, link.momentum.expand(len(vectors)), strict=True):
        mean.lerp_(group[norm.MEAN].to(mean.dtype), weight)
        var.lerp_(group[norm.UNBIASED_VAR].to(var.dtype), weight)
    return vectors


def _vectors(link, dtype):
    """Known statistics in the form that `norm.batch_statistics` gives the batch's."""
    return norm.known_statistics(
        link.running_mean, link.running_var, link.gamma, link.beta, link.kind.eps,
        start.acc_dtype(dtype),
    )  # fmt: skip
