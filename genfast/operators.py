"""The fused operations as operators of PyTorch, for `torch.compile` to put into its graphs.

A trace cannot look into the launches of kernels, so there each fused operation is one opaque node,
`genfast::chain` for example, of which PyTorch knows shapes, strides and the gradient. The operators
run what eager calls run, the functions of `autograd`, and change nothing in place: what moves
running statistics is part of the trace. Eager calls do not come here.

An operator takes tensors, numbers and text. What else a chain is made of travels as one string:
`_encoded` writes it while tracing, `_decoded` reads it when the operator runs.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from genfast import autograd, layout, reference
from genfast.geometry import ConvGeometry, pair
from genfast.launch import losses, norm, sampling, start, tape

# How a tensor that goes into a chain lies in memory: as the kernels read it; or to be copied, its
# gradient then being due in the tensor's own format.
_AS_READ, _COPIED, _COPIED_CONTIGUOUS = "as_read", "channels_last", "contiguous"
# The fields of `_Parameters` that may want a gradient, and how many these are.
_WEIGHT, _BIAS, _GAMMA, _BETA = range(4)
_WANTING = 4


class _Block(NamedTuple):
    """A block of a chain, but for its tensors and the size of its images.

    stride, padding, output_padding: pairs; the last is of zeros where it means nothing.
    moves: whether somebody moves running statistics by the batch's.
    has_bias, has_gamma, has_beta: whether there are such tensors.
    weight_lies: one of the three words above.
    groups: as in `autograd.Kind`; 0 where each image is one.
    channel_groups: the equal parts of the channels that share statistics; 0 where none do.
    Other fields: as in `autograd.Kind`.
    """

    transposed: bool
    stride: tuple[int, int]
    padding: tuple[int, int]
    output_padding: tuple[int, int]
    by_batch: bool | None
    eps: float
    activation: str
    negative_slope: float
    groups: int
    moves: bool
    has_bias: bool
    has_gamma: bool
    has_beta: bool
    weight_lies: str
    channel_groups: int = 0

    def geometry(self, size, kernel_size):
        """The `ConvGeometry` for an input of this (height, width)."""
        if self.transposed:
            return ConvGeometry.conv_transpose(
                size, kernel_size, self.stride, self.padding, self.output_padding
            )
        return ConvGeometry.conv(size, kernel_size, self.stride, self.padding)

    def output_of(self, size, weight):
        """Channels, and (height, width), of its output for an input of this (height, width)."""
        geometry = self.geometry(size, tuple(weight.shape[2:]))
        if self.transposed:
            return weight.shape[1], geometry.big
        return weight.shape[0], geometry.small

    def kind(self, geometry, images, weight):
        """Its `autograd.Kind`, which moves no running statistics, for so many images."""
        span = 1
        if self.channel_groups:
            span = weight.shape[1 if self.transposed else 0] // self.channel_groups
        return autograd.Kind(
            geometry, self.transposed, self.by_batch, self.eps, self.activation,
            self.negative_slope, self.groups or images, span=span,
        )  # fmt: skip

    @property
    def keeps_output(self):
        """Whether backward needs the output itself, if it is the last block."""
        return self.by_batch is None and self.activation != "identity"


class _Parameters(NamedTuple):
    """The tensors of a block, None where absent; the first four may want a gradient."""

    weight: Tensor
    bias: Tensor | None
    gamma: Tensor | None
    beta: Tensor | None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None


def chain(x, blocks):
    """`functional.chain`, for a trace.

    Args:
        x: (N, in_channels, H, W).
        blocks: `functional.Block`s, checked.

    Returns:
        The last block's output, channels_last.
    """
    norms = [b.batch_norm for b in blocks]
    tensors = []
    for b, n in zip(blocks, norms, strict=True):
        tensors += [b.weight, b.bias]
        if n is not None:
            tensors += [n.weight, n.bias]
            if not n.by_batch:
                tensors += [n.running_mean, n.running_var]
    tensors = [t for t in tensors if t is not None]
    keep = torch.is_grad_enabled() and any([t.requires_grad for t in (x, *tensors)])
    # What the chain returns may be changed in place. Backward reads the outputs of the other
    # activations, in PyTorch too; but its leaky ReLU, and others, do so only where they are in
    # place themselves. Else such a one is an operation of its own here, which a compiler fuses with
    # what follows.
    last = blocks[-1]
    keeps_input = reference.ACTIVATION[last.activation].keeps_input
    apart = keep and last.batch_norm is None and keeps_input and not last.inplace
    activations = [b.activation for b in blocks]
    if apart:
        activations[-1] = "identity"
    spec = [_lies(x), *[_encoded(b, a) for b, a in zip(blocks, activations, strict=True)]]
    outputs = torch.ops.genfast.chain(x, tensors, ";".join(spec), keep)
    y = outputs[0]
    have_vectors = [n for n in norms if n is not None and (keep or n.moves)]
    with torch.no_grad():
        first = len(outputs) - len(have_vectors)
        for n, vectors in zip(have_vectors, outputs[first:], strict=True):
            if n.moves:
                _move(n, vectors)
    return reference.activate(y, last.activation, last.negative_slope) if apart else y


def _move(batch_norm, vectors):
    """Move running statistics and the counter, as the kernel does that combines statistics."""
    n = batch_norm
    if n.num_batches_tracked is not None:
        n.num_batches_tracked.add_(n.groups)
    for running, row in ((n.running_mean, norm.MEAN), (n.running_var, norm.UNBIASED_VAR)):
        if isinstance(n.momentum, Tensor):
            for group, weight in enumerate(n.momentum.expand(n.groups).unbind()):
                running.lerp_(vectors[group, row].to(running.dtype), weight)
            continue
        moved = running.to(vectors.dtype)
        for group in range(n.groups):
            moved = moved * (1.0 - n.momentum) + vectors[group, row] * n.momentum
        running.copy_(moved)


def _lies(t):
    if layout.is_fresh_channels_last(t):
        return _AS_READ
    return _COPIED if layout.is_channels_last(t) else _COPIED_CONTIGUOUS


def _encoded(block, activation):
    """A `functional.Block` but for its tensors as text, from which `_decoded` makes a `_Block`."""
    b, n = block, block.batch_norm
    transposed = b.output_padding is not None
    by_batch, eps, groups, moves, gamma, beta = None, 0.0, 1, False, None, None
    channel_groups = 0
    if n is not None:
        by_batch, eps, moves, gamma, beta = n.by_batch, n.eps, n.moves, n.weight, n.bias
        groups = n.groups if n.by_batch else 1
        if n.kind != "batch":
            groups, channel_groups = 0, n.channel_groups if n.kind == "group" else 0
    pairs = (
        *pair(b.stride, "stride"),
        *pair(b.padding, "padding"),
        *pair(b.output_padding if transposed else 0, "output_padding"),
    )
    flags = transposed, by_batch, moves, b.bias is not None, gamma is not None, beta is not None
    others = f"{float(eps)},{float(b.negative_slope)},{groups},{activation},{_lies(b.weight)}"
    return ",".join([str(v) for v in (*pairs, *flags)]) + f",{others},{channel_groups}"


@lru_cache(maxsize=1024)
def _decoded(spec):
    """How x lies in memory, and the `_Block`s, of what `chain` has written."""
    x_lies, *texts = spec.split(";")
    known = {"True": True, "False": False, "None": None}
    blocks = []
    for text in texts:
        fields = text.split(",")
        sh, sw, ph, pw, oh, ow = map(int, fields[:6])
        transposed, by_batch, moves, bias, gamma, beta = (known[f] for f in fields[6:12])
        eps, negative_slope, groups, activation, weight_lies, channel_groups = fields[12:]
        blocks.append(
            _Block(
                transposed, (sh, sw), (ph, pw), (oh, ow), by_batch, float(eps), activation,
                float(negative_slope), int(groups), moves, bias, gamma, beta, weight_lies,
                int(channel_groups),
            )
        )  # fmt: skip
    return x_lies, tuple(blocks)


def _parameters(blocks, tensors):
    """A list of tensors as `_Parameters`, one a block."""
    tensors, found = iter(tensors), []
    for b in blocks:
        weight = next(tensors)
        bias, gamma, beta = (
            next(tensors) if has else None for has in (b.has_bias, b.has_gamma, b.has_beta)
        )
        known = (next(tensors), next(tensors)) if b.by_batch is False else ()
        found.append(_Parameters(weight, bias, gamma, beta, *known))
    return found


def _present(tensors):
    return [t for t in tensors if t is not None]


def _kinds(blocks, x, parameters):
    """The `autograd.Kind` of each block, for an input x (N, C, H, W)."""
    kinds, size = [], tuple(x.shape[2:])
    for b, p in zip(blocks, parameters, strict=True):
        geometry = b.geometry(size, tuple(p.weight.shape[2:]))
        kinds.append(b.kind(geometry, x.shape[0], p.weight))
        _, size = b.output_of(size, p.weight)
    return tuple(kinds)


@torch.library.custom_op("genfast::chain", mutates_args=())
def _chain(x: Tensor, tensors: list[Tensor], spec: str, keep: bool) -> list[Tensor]:
    """`functional.chain` without moving running statistics.

    Args:
        x: (N, in_channels, H, W).
        tensors: of each block, where present: weight, bias, gamma, beta; and running mean and
            variance where they are what normalises.
        spec: see `_decoded`.
        keep: whether backward needs what lies between.

    Returns:
        The last block's output, channels_last. With `keep` copies of x and of the weights in
        channels_last, where these are not; what backward needs of each block, but for the output
        itself; and the vectors of each batch norm. Without it the vectors of those that move.
    """
    x_lies, blocks = _decoded(spec)
    parameters = _parameters(blocks, tensors)
    inside, copies = [], []
    for t, lies in zip([x, *(p.weight for p in parameters)], _lie(x_lies, blocks), strict=True):
        inside.append(layout.channels_last(t))
        if keep and lies != _AS_READ:
            if inside[-1].data_ptr() == t.data_ptr():  # Strides at sizes of 1 may have changed.
                inside[-1] = inside[-1].clone()
            copies.append(inside[-1])
    kinds = _kinds(blocks, x, parameters)
    x, *weights = inside
    given = [x, None, None]
    for weight, kind, p in zip(weights, kinds, parameters, strict=True):
        given += autograd.Link(kind, **p._replace(weight=weight)._asdict())[1:]
    made = tape.run(autograd._forward, given, kinds, keep)
    values = made[: _values(blocks)] if keep else []
    vectors = [
        v for v, b in zip(made[-1 - len(blocks) : -1], blocks, strict=True) if _returns(b, keep)
    ]
    return [layout.channels_last(made[-1]), *copies, *values, *vectors]


def _lie(x_lies, blocks):
    """How x and the weights lie in memory."""
    return [x_lies, *(b.weight_lies for b in blocks)]


def _returns(block, keep):
    """Whether `genfast::chain` returns the vectors of a block."""
    return block.by_batch is not None if keep else block.moves


def _values(blocks):
    """How many values `genfast::chain` keeps: one a block, but for one that is the output."""
    return len(blocks) - (blocks[-1].by_batch is None)


@_chain.register_fake
def _(x, tensors, spec, keep):
    x_lies, blocks = _decoded(spec)
    parameters = _parameters(blocks, tensors)
    size, values, vectors = tuple(x.shape[2:]), [], []
    acc_dtype = start.acc_dtype(x.dtype)
    for b, p in zip(blocks, parameters, strict=True):
        channels, size = b.output_of(size, p.weight)
        values.append(_empty_channels_last((x.shape[0], channels, *size), x))
        if _returns(b, keep):
            vectors.append(x.new_empty((b.groups or x.shape[0], 5, channels), dtype=acc_dtype))
    y, copies = torch.empty_like(values[-1]), []
    if keep:
        for t, lies in zip([x, *(p.weight for p in parameters)], _lie(x_lies, blocks), strict=True):
            if lies != _AS_READ:
                copies.append(_empty_channels_last(t.shape, t))
    return [y, *copies, *values[: _values(blocks) if keep else 0], *vectors]


def _empty_channels_last(shape, like):
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _keep_for_backward(ctx, inputs, output):
    x, tensors, spec, keep = inputs
    x_lies, blocks = _decoded(spec)
    ctx.spec, ctx.keep = spec, keep
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    if not keep:
        return
    y, *kept = output
    parameters = _parameters(blocks, tensors)
    inside = [
        t if lies == _AS_READ else kept.pop(0)
        for t, lies in zip([x, *(p.weight for p in parameters)], _lie(x_lies, blocks), strict=True)
    ]
    x, *weights = inside
    parameters = [
        t for w, p in zip(weights, parameters, strict=True) for t in _present((w, *p[1:_WANTING]))
    ]
    values, vectors = kept[: _values(blocks)], kept[_values(blocks) :]
    if blocks[-1].keeps_output:
        values.append(y)
    ctx.parameters, ctx.values = len(parameters), len(values)
    ctx.save_for_backward(x, *parameters, *values, *vectors)


def _chain_gradients(ctx, gradients):
    _, blocks = _decoded(ctx.spec)
    need_x, all_needs, *_ = ctx.needs_input_grad
    found, dy = [None] * len(all_needs), gradients[0]
    # The number of each tensor in the list that was given, which holds known statistics too.
    numbers = _parameters(blocks, range(len(all_needs)))
    needs = [i is not None and all_needs[i] for p in numbers for i in p[:_WANTING]]
    if dy is None or not (need_x or any(needs)):
        return None, found, None, None
    if not ctx.keep:
        raise RuntimeError("expected a chain that keeps what backward needs, got keep=False")
    x, *saved = ctx.saved_tensors
    end = ctx.parameters
    parameters, values, vectors = saved[:end], saved[end:][: ctx.values], saved[end + ctx.values :]
    made = torch.ops.genfast.chain_backward(
        dy, x, parameters, values, vectors, ctx.spec, need_x, needs
    )
    dx = made.pop(0) if need_x else None
    for (block, fields), gradient in zip(_due(needs), made, strict=True):
        rows = [gradient] if len(fields) == 1 else gradient.unbind()
        for field, row in zip(fields, rows, strict=True):
            found[numbers[block][field]] = row
    return dx, found, None, None


_chain.register_autograd(_chain_gradients, setup_context=_keep_for_backward)


@torch.library.custom_op("genfast::chain_backward", mutates_args=())
def _chain_backward(
    dy: Tensor,
    x: Tensor,
    parameters: list[Tensor],
    values: list[Tensor],
    vectors: list[Tensor],
    spec: str,
    need_x: bool,
    needs: list[bool],
) -> list[Tensor]:
    """The gradients of `genfast::chain`.

    Args:
        dy: of the output.
        x: channels_last.
        parameters: of each block, where present: weight, channels_last, bias, gamma, beta.
        values: of each block what backward needs; of the last the output or nothing.
        vectors: of each batch norm.
        spec: that of the chain.
        need_x: whether x needs a gradient.
        needs: whether weight, bias, gamma and beta of each block do; False where absent.

    Returns:
        The gradients that are needed, in the order of the arguments, in the memory format of the
        tensor they belong to. Where gamma and beta both need one, as (2, C): first that of beta.
    """
    x_lies, blocks = _decoded(spec)
    links = _parameters([b._replace(by_batch=None) for b in blocks], parameters)
    kinds = _kinds(blocks, x, links)
    values = [*values, *[None] * (len(blocks) - len(values))]
    vectors = iter(vectors)
    vectors = [None if b.by_batch is None else next(vectors) for b in blocks]
    # With a slope of PReLU each, which a trace leaves to PyTorch.
    given = [t for p in links for t in (*p[:_WANTING], None)]
    needed = [n for i in range(len(links)) for n in (*needs[_WANTING * i :][:_WANTING], False)]
    given = [dy, x, None, *given, *values, *vectors]
    dx, *found = tape.run(autograd._backward, given, kinds, need_x, tuple(needed))
    results = [_as_lay(dx, x_lies)] if need_x else []
    for block, fields in _due(needs):
        of_block = [found[(_WANTING + 1) * block + field] for field in fields]
        if fields == (_WEIGHT,):
            results.append(_as_lay(of_block[0], blocks[block].weight_lies))
        else:
            results.append(_rows(*of_block) if len(fields) > 1 else _whole(of_block[0]))
    return results


def _due(needs):
    """What `genfast::chain_backward` returns after dx: (block, its fields in a tensor) of each."""
    found = []
    for block in range(len(needs) // _WANTING):
        weight, bias, gamma, beta = needs[_WANTING * block :][:_WANTING]
        alone = [_WEIGHT] * weight + [_BIAS] * bias
        if not (gamma and beta):
            alone += [_GAMMA] * gamma + [_BETA] * beta
        found += [(block, (field,)) for field in alone]
        if gamma and beta:
            found.append((block, (_BETA, _GAMMA)))
    return found


def _as_lay(gradient, lies):
    """A gradient in the memory format of the tensor it belongs to."""
    if lies == _COPIED_CONTIGUOUS:
        return layout.contiguous(gradient)
    return layout.channels_last(gradient)


def _rows(dbeta, dgamma):
    """Both as one tensor: an operator's results must not share memory, and these mostly do."""
    if dbeta.untyped_storage().data_ptr() == dgamma.untyped_storage().data_ptr():
        return dbeta.as_strided((2, len(dbeta)), (len(dbeta), 1))
    return torch.stack([dbeta, dgamma])


def _whole(gradient):
    """A gradient that is no part of a larger tensor."""
    return gradient.clone() if gradient.storage_offset() else gradient


@_chain_backward.register_fake
def _(dy, x, parameters, values, vectors, spec, need_x, needs):
    x_lies, blocks = _decoded(spec)
    links = _parameters([b._replace(by_batch=None) for b in blocks], parameters)
    results = [_empty_as_lay(x, x_lies)] if need_x else []
    for block, fields in _due(needs):
        of_block = [links[block][field] for field in fields]
        if fields == (_WEIGHT,):
            results.append(_empty_as_lay(of_block[0], blocks[block].weight_lies))
        elif len(fields) == 1:
            results.append(torch.empty_like(of_block[0], memory_format=torch.contiguous_format))
        else:
            dtype = torch.promote_types(*(t.dtype for t in of_block))
            results.append(of_block[0].new_empty((2, len(of_block[0])), dtype=dtype))
    return results


def _empty_as_lay(t, lies):
    last = lies != _COPIED_CONTIGUOUS
    memory_format = torch.channels_last if last else torch.contiguous_format
    return torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=memory_format)


@torch.library.custom_op("genfast::reparameterize", mutates_args=())
def reparameterize(mu: Tensor, logvar: Tensor, seed: Tensor) -> Tensor:
    """`functional.reparameterize` with noise keyed by `seed`, (1,) int64."""
    z, _ = sampling.reparameterize(_in_order(mu), _in_order(logvar), seed, with_kl=False)
    return _like(z, mu)


@reparameterize.register_fake
def _(mu, logvar, seed):
    return _empty_like(mu)


@torch.library.custom_op("genfast::reparameterize_with_kl", mutates_args=())
def reparameterize_with_kl(mu: Tensor, logvar: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """`functional.reparameterize_with_kl` with noise keyed by `seed`, (1,) int64."""
    z, kl = sampling.reparameterize(_in_order(mu), _in_order(logvar), seed, with_kl=True)
    return _like(z, mu), kl


@reparameterize_with_kl.register_fake
def _(mu, logvar, seed):
    return _empty_like(mu), mu.new_empty(mu.shape[:1], dtype=start.acc_dtype(mu.dtype))


@torch.library.custom_op("genfast::reparameterize_backward", mutates_args=())
def _reparameterize_backward(
    dz: Tensor | None, dkl: Tensor | None, mu: Tensor, logvar: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of mu and logvar; dz or dkl is None where nothing flows back."""
    dz = None if dz is None else dz.contiguous()
    gradients = sampling.reparameterize_backward(dz, dkl, _in_order(mu), _in_order(logvar), seed)
    return _like(gradients[0], mu), _like(gradients[1], logvar)


@_reparameterize_backward.register_fake
def _(dz, dkl, mu, logvar, seed):
    return _empty_like(mu), _empty_like(logvar)


def _is_images(t):
    return t.dim() == 4 and layout.is_channels_last(t)


def _in_order(t):
    """Contiguous: in the order of its shape, in which noise is numbered."""
    return layout.contiguous(t) if t.dim() == 4 else t.contiguous()


def _like(result, t):
    """What was computed of `t` in its memory format."""
    return layout.channels_last(result) if _is_images(t) else result


def _empty_like(t):
    memory_format = torch.channels_last if _is_images(t) else torch.contiguous_format
    return torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=memory_format)


def _keep_latent(ctx, inputs, output):
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _latent_gradients(ctx, dz, dkl=None):
    if dz is None and dkl is None:
        return None, None, None
    return *torch.ops.genfast.reparameterize_backward(dz, dkl, *ctx.saved_tensors), None


for _operator in (reparameterize, reparameterize_with_kl):
    _operator.register_autograd(_latent_gradients, setup_context=_keep_latent)


@torch.library.custom_op("genfast::importance_samples", mutates_args=())
def importance_samples(
    mu: Tensor, logvar: Tensor, samples: int, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """`functional.importance_samples` with noise keyed by `seed`, (1,) int64."""
    return sampling.importance_samples(_in_order(mu), _in_order(logvar), samples, seed)


@importance_samples.register_fake
def _(mu, logvar, samples, seed):
    z = mu.new_empty((mu.shape[0], samples, *mu.shape[1:]))
    return z, mu.new_empty(z.shape[:2], dtype=start.acc_dtype(mu.dtype))


@torch.library.custom_op("genfast::importance_samples_backward", mutates_args=())
def _importance_samples_backward(
    dz: Tensor | None, dkl: Tensor | None, mu: Tensor, logvar: Tensor, samples: int, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of mu and logvar; dz or dkl is None where nothing flows back."""
    mu_in_order, logvar_in_order = _in_order(mu), _in_order(logvar)
    gradients = sampling.importance_samples_backward(
        dz, dkl, mu_in_order, logvar_in_order, samples, seed
    )
    return _like(gradients[0], mu), _like(gradients[1], logvar)


@_importance_samples_backward.register_fake
def _(dz, dkl, mu, logvar, samples, seed):
    return _empty_like(mu), _empty_like(logvar)


def _keep_latents(ctx, inputs, output):
    mu, logvar, ctx.samples, seed = inputs
    ctx.save_for_backward(mu, logvar, seed)
    ctx.set_materialize_grads(False)


def _importance_samples_gradients(ctx, dz, dkl):
    if dz is None and dkl is None:
        return None, None, None, None
    mu, logvar, seed = ctx.saved_tensors
    found = torch.ops.genfast.importance_samples_backward(dz, dkl, mu, logvar, ctx.samples, seed)
    return *found, None, None


importance_samples.register_autograd(_importance_samples_gradients, setup_context=_keep_latents)


def logit_loss(logits, targets, count, kind, paired):
    """`autograd.logit_loss` with a scale of 1 / count, for a trace.

    A count may be unknown while tracing; of a scale that is, there would be a graph for each value.
    """
    labelled = not isinstance(targets, Tensor)
    ones = targets if labelled else 0
    targets = None if labelled else targets
    return torch.ops.genfast.logit_loss(logits, targets, ones, count, kind, paired)


@torch.library.custom_op("genfast::logit_loss", mutates_args=())
def _logit_loss(
    logits: Tensor, targets: Tensor | None, ones: int, count: int, kind: str, paired: bool
) -> Tensor:
    """sum(f(logits, targets)) / count: see `launch.losses.logit_loss`.

    Args:
        logits: contiguous.
        targets: alike, or None: the labels are `ones` times 1, then 0.
        ones, count: numbers.
        kind, paired: as there.
    """
    targets = ones if targets is None else targets
    return losses.logit_loss(logits, targets, 1 / count, kind, paired)[0]


@_logit_loss.register_fake
def _(logits, targets, ones, count, kind, paired):
    return logits.new_empty((), dtype=start.acc_dtype(logits.dtype))


@torch.library.custom_op("genfast::logit_loss_backward", mutates_args=())
def _logit_loss_backward(
    dloss: Tensor,
    logits: Tensor,
    targets: Tensor | None,
    ones: int,
    count: int,
    kind: str,
    paired: bool,
) -> Tensor:
    """The gradient of the logits."""
    targets = ones if targets is None else targets
    return losses.logit_loss_backward(dloss, logits, targets, 1 / count, kind, paired)


@_logit_loss_backward.register_fake
def _(dloss, logits, targets, ones, count, kind, paired):
    return torch.empty_like(logits)


def _keep_logits(ctx, inputs, output):
    logits, targets, *ctx.how = inputs
    ctx.save_for_backward(logits, targets)


def _logits_gradient(ctx, dloss):
    logits, targets = ctx.saved_tensors
    dlogits = torch.ops.genfast.logit_loss_backward(dloss, logits, targets, *ctx.how)
    return dlogits, None, None, None, None, None


_logit_loss.register_autograd(_logits_gradient, setup_context=_keep_logits)
