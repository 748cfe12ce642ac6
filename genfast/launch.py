"""The only file that starts a kernel: layouts, allocation, descriptors, grids, the device guard.

Tensors come and go as PyTorch's (N, C, H, W); inside, activations are dense NHWC memory and weights
dense [C_small, kh, kw, C_big], which is what `torch.channels_last` makes of both. `channels_last`
input is taken as it is, anything else is copied into that layout first.
"""

import contextlib
import math
from dataclasses import dataclass

import torch

from genfast import library, reference
from genfast.backend import INTERPRETING, triton
from genfast.geometry import ConvGeometry

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from genfast.kernels import configs, conv, losses, norm, sampling

# Rows of the matrix `vectors` of batch-norm quantities, one column a channel: see kernels/norm.py.
MEAN, UNBIASED_VAR, RSTD, SCALE, SHIFT = range(5)

# One program of `combine_statistics` combines this many tiles; more tiles take another round.
_STATISTICS_CHUNK = 512
# Every program of `norm_backward` adds up to this many parts of two sums itself; for more of them
# a kernel of their own is less work.
_PARTS_ADDED_BY_ALL = 64
# About how many programs keep a GPU busy with passes over memory: the H200 has 132 multiprocessors.
_BUSY_PROGRAMS = 264
# Values of a tile of a loss, and how many tiles one program sums before others help: the logits of
# a GAN are few, and a second kernel to add two sums would cost more than it saves.
_LOSS_TILE = 1024
_LOSS_TILES_ALONE = 4


@dataclass(frozen=True)
class Epilogue:
    """What a convolution does to its accumulator before it stores it, in this order.

    bias: (channels,) added, or None.
    groups: to return each tile's batch statistics, where no tile holds images of two of so many
        equal parts of the batch; 0 for no statistics.
    vectors: (1, 5, channels) to normalise by, or None.
    activation, negative_slope: as in `functional.conv_block`.
    """

    bias: torch.Tensor | None = None
    groups: int = 0
    vectors: torch.Tensor | None = None
    activation: str = "identity"
    negative_slope: float = 0.0


@dataclass(frozen=True)
class TileStatistics:
    """Count, mean and sum of squared deviations of each tile of a convolution's output.

    count: (tiles,); mean and m2: (tiles * repeat, channels), `repeat` of whose rows share a count.
    The first group's tiles come first, and so on for all `groups`, which have as many.
    """

    count: torch.Tensor
    mean: torch.Tensor
    m2: torch.Tensor
    repeat: int
    groups: int


PLAIN = Epilogue()
_FLAT = ConvGeometry((1, 1), (1, 1), (1, 1), (1, 1), (0, 0))


def fprop(big, weight, geometry, epilogue=PLAIN):
    """`conv2d`, or the input gradient of `conv_transpose2d`.

    Args:
        big: (N, C_big, H, W) of `geometry.big`.
        weight: (C_small, C_big, kh, kw).
        geometry: a `ConvGeometry`.
        epilogue: an `Epilogue` over C_small channels.

    Returns:
        (N, C_small, Ho, Wo) of `geometry.small`, channels_last, and its `TileStatistics` or None.
    """
    return _conv("fprop", big, weight, geometry, epilogue)


def dgrad(small, weight, geometry, epilogue=PLAIN):
    """`conv_transpose2d`, or the input gradient of `conv2d`.

    As `fprop` with the sides swapped: (N, C_small, ...) of `geometry.small` in,
    (N, C_big, ...) of `geometry.big` out, the epilogue over C_big channels.
    """
    return _conv("dgrad", small, weight, geometry, epilogue)


def wgrad(big, small, geometry):
    """The weight gradient of `conv2d` and `conv_transpose2d`: (C_small, C_big, kh, kw)."""
    config = _config("wgrad", big, geometry, small.shape[1], big.shape[1])
    if config.library:
        return library.wgrad(big, small, geometry)
    big, small = nhwc(big), nhwc(small)
    dweight = _channels_last((small.shape[3], *geometry.kernel_size, big.shape[3]), big)
    big, small, geometry = _collapse(big, small, geometry)
    n, h_small, w_small, c_small = small.shape
    _, h_big, w_big, c_big = big.shape

    packed = c_big < config.block_n and geometry.taps > 1
    # The reduction is over pixels: what a descriptor moves is a box of block_k of them.
    box = _box(config.block_k, h_small, w_small)
    boxed = (
        config.descriptors
        and not packed
        and h_small % box[1] == w_small % box[2] == 0  # A ragged box would pair zeros with pixels.
        and _descriptors_fit(geometry, big, small)
    )
    k_tiles = _pixel_tiles((n, h_small, w_small), config.block_k, box if boxed else None)
    columns = geometry.taps * c_big if packed else c_big
    mn_tiles = _ceil_div(c_small, config.block_m) * _ceil_div(columns, config.block_n)
    taps = 1 if packed else geometry.taps
    splits = min(_ceil_div(config.programs, mn_tiles * taps), _ceil_div(k_tiles, 4))
    tiles_per_split = _ceil_div(k_tiles, splits)
    splits = _ceil_div(k_tiles, tiles_per_split)

    acc_dtype = _acc_dtype(big.dtype)
    target = dweight
    if splits > 1:
        target = torch.empty((splits, dweight.numel()), dtype=acc_dtype, device=big.device)
    _start(
        conv.wgrad,
        (mn_tiles, taps, splits),
        big=_big_descriptor(big, geometry, box, config.block_n) if boxed else big,
        small=_descriptor(small, [*box, config.block_m]) if boxed else small,
        out_ptr=target,
        N=n,
        H_big=h_big,
        W_big=w_big,
        C_big=c_big,
        H_small=h_small,
        W_small=w_small,
        C_small=c_small,
        tiles_per_split=tiles_per_split,
        KW=geometry.kernel_size[1],
        TAPS=geometry.taps,
        **_stride_and_padding(geometry),
        **_arithmetic(big),
        DESCRIPTORS=boxed,
        PACKED=packed,
        **_tile(config, box),
    )
    if splits > 1:
        sum_partials(target, dweight)
    return dweight


def sum_partials(partials, out):
    """out = partials.sum(-2), in an order that depends on the shape alone.

    Args:
        partials: (parts, length) or (groups, parts, length), dense.
        out: of any dtype and shape with that many elements, dense.
    """
    *groups, parts, length = partials.shape
    block_p = min(64, _power_of_two(parts))
    block = max(64, min(1024, 4096 // block_p))
    _start(
        conv.sum_partials,
        (_ceil_div(length, block), *groups),
        partials_ptr=partials,
        out_ptr=out,
        length=length,
        parts=parts,
        BLOCK_P=block_p,
        BLOCK=block,
    )


def batch_statistics(
    statistics, gamma, beta, eps, running_mean=None, running_var=None, momentum=0.0, counter=None
):
    """Combine `TileStatistics` into `vectors` (groups, 5, channels), for normalising by the batch.

    Running statistics, where given, move in place by `momentum`, once for each group in turn; the
    counter of batches, an int64 scalar on the device, by the number of groups.
    """
    statistics = _combine_chunks(statistics)
    parts, channels, groups = _parts(statistics)
    vectors = statistics.mean.new_empty((groups, 5, channels))
    # The kernel steps through memory one by one; what it wrote into a copy goes back.
    running = [_dense(t, vectors) for t in (running_mean, running_var)]
    _start(
        norm.batch_statistics,
        (_ceil_div(channels, _statistics_block(channels)),),
        count_ptr=statistics.count,
        mean_ptr=statistics.mean,
        m2_ptr=statistics.m2,
        vectors_ptr=vectors,
        gamma_ptr=_dense(gamma, vectors),
        beta_ptr=_dense(beta, vectors),
        running_mean_ptr=running[0],
        running_var_ptr=running[1],
        counter_ptr=counter if counter is not None else vectors,
        groups=groups,
        parts=parts,
        channels=channels,
        parts_per_count=statistics.repeat,
        eps=eps,
        momentum=momentum,
        HAS_GAMMA=gamma is not None,
        HAS_BETA=beta is not None,
        HAS_RUNNING=running_mean is not None,
        HAS_COUNTER=counter is not None,
        BLOCK_P=128,
        BLOCK_C=_statistics_block(channels),
    )
    for given, dense in zip((running_mean, running_var), running, strict=True):
        if given is not None and given is not dense:
            given.copy_(dense)
    return vectors


def _dense(vector, stand_in):
    """The vector with its elements side by side; for None another tensor, which nobody reads."""
    return stand_in if vector is None else vector.contiguous()


def _combine_chunks(statistics):
    """The same statistics in few enough parts for one program to combine."""
    parts, channels, groups = _parts(statistics)
    while parts > _STATISTICS_CHUNK:
        chunks = _ceil_div(parts, _STATISTICS_CHUNK)
        mean, m2 = statistics.mean.new_empty((2, groups * chunks, channels))
        count = statistics.mean.new_empty(groups * chunks)
        _start(
            norm.combine_statistics,
            (_ceil_div(channels, _statistics_block(channels)), chunks, groups),
            count_ptr=statistics.count,
            mean_ptr=statistics.mean,
            m2_ptr=statistics.m2,
            out_count_ptr=count,
            out_mean_ptr=mean,
            out_m2_ptr=m2,
            parts=parts,
            channels=channels,
            parts_per_count=statistics.repeat,
            chunk=_STATISTICS_CHUNK,
            BLOCK_P=128,
            BLOCK_C=_statistics_block(channels),
        )
        statistics, parts = TileStatistics(count, mean, m2, 1, groups), chunks
    return statistics


def _parts(statistics):
    """Parts of a group, channels, groups."""
    parts, channels = statistics.mean.shape
    return parts // statistics.groups, channels, statistics.groups


def _statistics_block(channels):
    return min(32, _power_of_two(channels))


def normalize_activate(z, vectors, activation, negative_slope):
    """act((z - mean) * scale + shift): (N, C, H, W) to the same, channels_last."""
    z = nhwc(z)
    y = _channels_last(z.shape, z)
    grid, rows, tile = _elementwise(z, vectors.shape[0])
    _start(
        norm.normalize_activate,
        grid,
        z_ptr=z,
        vectors_ptr=vectors,
        y_ptr=y,
        rows=rows,
        channels=z.shape[3],
        negative_slope=negative_slope,
        ACTIVATION=activation,
        **tile,
    )
    return y


def norm_backward(dy, z, vectors, *, training, need_dz, activation, negative_slope):
    """The backward of `normalize_activate` and, in training, of the statistics in `vectors`.

    Returns:
        dz (N, C, H, W), None unless `need_dz`; and (2, C): the gradients of beta and of gamma.
    """
    dy, z = nhwc(dy), nhwc(z)
    channels, groups = z.shape[3], vectors.shape[0]
    grid, rows, tile = _elementwise(z, groups)
    common = dict(
        dy_ptr=dy,
        z_ptr=z,
        vectors_ptr=vectors,
        rows=rows,
        channels=channels,
        negative_slope=negative_slope,
        ACTIVATION=activation,
    )
    tiles_per_part = _ceil_div(grid[0], _parts_of_pass(grid))
    parts = _ceil_div(grid[0], tiles_per_part)
    partials = vectors.new_empty((groups, parts, 2 * channels))
    _start(
        norm.norm_backward_reduce,
        (parts, *grid[1:]),
        partials_ptr=partials,
        tiles_per_part=tiles_per_part,
        **common,
        **tile,
    )
    total = vectors.new_empty((2, channels))
    if not need_dz:
        sum_partials(partials.flatten(0, 1), total)
        return None, total
    if parts > _PARTS_ADDED_BY_ALL:
        sums = vectors.new_empty((groups, 2, channels))
        sum_partials(partials, sums)
        partials, parts = sums, 1
    dz = _channels_last(z.shape, z)
    _start(
        norm.norm_backward,
        grid,
        sums_ptr=partials,
        total_ptr=total,
        dz_ptr=dz,
        parts=parts,
        groups=groups,
        TRAINING=training,
        BLOCK_P=_power_of_two(parts),
        **common,
        **tile,
    )
    return dz, total


def activation_backward(dy, y, activation, negative_slope):
    """dy * act'(u), computed from the output y = act(u): (N, C, H, W), channels_last."""
    dy, y = nhwc(dy), nhwc(y)
    du = _channels_last(y.shape, y)
    _start(
        norm.activation_backward_from_output,
        (_ceil_div(y.numel(), 1024),),
        dy_ptr=dy,
        y_ptr=y,
        du_ptr=du,
        length=y.numel(),
        negative_slope=negative_slope,
        ACC_DTYPE=_tl_dtype(_acc_dtype(y.dtype)),
        ACTIVATION=activation,
        BLOCK=1024,
    )
    return du


def reparameterize(mu, logvar, seed, *, with_kl):
    """z = mu + exp(logvar / 2) * eps and, if `with_kl`, the KL divergence of each row, else None.

    Args:
        mu, logvar: (N, ...), of one shape and dtype.
        seed: (1,) int64 on the device: the key of the noise.
    """
    mu, logvar = mu.contiguous(), logvar.contiguous()
    z = torch.empty_like(mu)
    grid, sizes = _sampling_grid(mu)
    rows, parts = sizes["N"], grid[1]
    acc_dtype = _acc_dtype(mu.dtype)
    kl = partials = None
    if with_kl:
        kl = partials = torch.empty(rows, dtype=acc_dtype, device=mu.device)
        if parts > 1:
            partials = torch.empty((parts, rows), dtype=acc_dtype, device=mu.device)
    _start(
        sampling.reparameterize,
        grid,
        mu_ptr=mu,
        logvar_ptr=logvar,
        seed_ptr=seed,
        z_ptr=z,
        kl_ptr=partials if with_kl else z,
        ACC_DTYPE=_tl_dtype(acc_dtype),
        HAS_KL=with_kl,
        **sizes,
    )
    if with_kl and parts > 1:
        sum_partials(partials, kl)
    return z, kl


def reparameterize_backward(dz, dkl, mu, logvar, seed):
    """The gradients of mu and logvar; dz or dkl is None where nothing flows back."""
    mu, logvar = mu.contiguous(), logvar.contiguous()
    dmu, dlogvar = torch.empty_like(mu), torch.empty_like(logvar)
    grid, sizes = _sampling_grid(mu)
    _start(
        sampling.reparameterize_backward,
        grid,
        dz_ptr=mu if dz is None else dz.contiguous(),
        dkl_ptr=mu if dkl is None else dkl.contiguous(),
        mu_ptr=mu,
        logvar_ptr=logvar,
        seed_ptr=seed,
        dmu_ptr=dmu,
        dlogvar_ptr=dlogvar,
        ACC_DTYPE=_tl_dtype(_acc_dtype(mu.dtype)),
        HAS_DZ=dz is not None,
        HAS_DKL=dkl is not None,
        **sizes,
    )
    return dmu, dlogvar


def logistic_loss(logits, targets, scale):
    """scale * sum(softplus(logits) - targets * logits): a scalar, float32 or wider.

    Args:
        logits: of any shape, contiguous.
        targets: alike; or a number of labels 1, which come first and labels 0 after them.
        scale: a number.
    """
    acc_dtype = _acc_dtype(logits.dtype)
    loss = torch.empty((), dtype=acc_dtype, device=logits.device)
    tiles = _ceil_div(logits.numel(), _LOSS_TILE)
    parts = 1 if tiles <= _LOSS_TILES_ALONE else min(tiles, max(1, 4 * _BUSY_PROGRAMS))
    tiles_per_part = _ceil_div(tiles, parts)
    parts = _ceil_div(tiles, tiles_per_part)
    partials = loss
    if parts > 1:
        partials = torch.empty(parts, dtype=acc_dtype, device=logits.device)
    _start(
        losses.logistic_loss,
        (parts,),
        out_ptr=partials,
        tiles_per_part=tiles_per_part,
        **_logits_and_targets(logits, targets, scale),
    )
    if parts > 1:
        # Not `sum_partials`, which would take many more steps to add a single column.
        _start(
            losses.sum_parts,
            (1,),
            parts_ptr=partials,
            out_ptr=loss,
            parts=parts,
            ACC_DTYPE=_tl_dtype(acc_dtype),
            BLOCK=_LOSS_TILE,
        )
    return loss


def logistic_loss_backward(dloss, logits, targets, scale):
    """The gradient of the logits, in their dtype. dloss is a scalar tensor."""
    dlogits = torch.empty_like(logits)
    _start(
        losses.logistic_loss_backward,
        (_ceil_div(logits.numel(), _LOSS_TILE),),
        dloss_ptr=dloss,
        dlogits_ptr=dlogits,
        **_logits_and_targets(logits, targets, scale),
    )
    return dlogits


def nhwc(x):
    """(N, C, H, W) as dense (N, H, W, C) memory; no copy where it is channels_last already."""
    return x.permute(0, 2, 3, 1).contiguous()


def _channels_last(nhwc_shape, like):
    """An empty (N, C, H, W) tensor; no view of another, so that callers may change it in place."""
    n, h, w, c = nhwc_shape
    return torch.empty(
        (n, c, h, w), dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def _conv(direction, source, weight, geometry, epilogue):
    to_small = direction == "fprop"
    statistics = epilogue.groups > 0
    config = _config(direction, source, geometry, *weight.shape[:2], statistics)
    if config.library:
        return _through_library(direction, source, weight, geometry, epilogue)
    source, weight = nhwc(source), nhwc(weight)
    c_small, c_big = weight.shape[0], weight.shape[3]
    channels = c_small if to_small else c_big
    n, groups = source.shape[0], max(epilogue.groups, 1)
    out_size = geometry.small if to_small else geometry.big
    result = _channels_last((n, *out_size, channels), source)
    out = nhwc(result)

    # From here on, in the terms of the matrix product that runs.
    big, small = (source, out) if to_small else (out, source)
    big, small, geometry = _collapse(big, small, geometry)
    c_big = big.shape[3]
    weight = weight.view(c_small, geometry.taps, c_big)
    columns = c_small if to_small else c_big
    phases = 1 if to_small else math.prod(geometry.stride)
    # Phase 0 has the most pixels; the descriptors' phases are all alike.
    m_size = small.shape[1:3]
    if not to_small:
        m_size = tuple(map(_ceil_div, big.shape[1:3], geometry.stride))

    packed = to_small and c_big < config.block_k and geometry.taps > 1
    box = _box(config.block_m, *m_size)
    block_big, block_small = (
        (config.block_k, config.block_n) if to_small else (config.block_n, config.block_k)
    )
    boxed = (
        config.descriptors
        and not packed
        and _descriptors_fit(geometry, big, small, weight)
        # A pixel's neighbour follows it in the folded view of a strided side: no reach into it.
        and (geometry.stride[1] == 1 or c_big % block_big == 0)
        and (to_small or _stride_divides_kernel(geometry))
        and (groups == 1 or n // groups % box[0] == 0)  # A box has images of one group only.
    )
    tiles_per_group = _pixel_tiles((n // groups, *m_size), config.block_m, box if boxed else None)
    tiles = groups * tiles_per_group
    statistics = None
    if epilogue.groups:
        acc_dtype = _acc_dtype(source.dtype)
        empty = torch.empty((2, tiles * phases, columns), dtype=acc_dtype, device=source.device)
        repeat = columns // channels
        mean, m2 = empty.view(2, tiles * phases * repeat, channels)
        count = torch.empty(tiles * phases, dtype=acc_dtype, device=source.device)
        statistics = TileStatistics(count, mean, m2, repeat, groups)

    if boxed:
        big = _big_descriptor(big, geometry, box, block_big)
        small = _descriptor(small, [*box, block_small])
        weight = _descriptor(weight, [block_small, 1, block_big])
    tile_grid = (tiles * _ceil_div(columns, config.block_n), phases)
    shared = dict(
        weight=weight,
        bias_ptr=_dense(epilogue.bias, out),
        vectors_ptr=epilogue.vectors if epilogue.vectors is not None else out,
        count_ptr=statistics.count if statistics else out,
        mean_ptr=statistics.mean if statistics else out,
        m2_ptr=statistics.m2 if statistics else out,
        N=n // groups,
        H_big=geometry.big[0],
        W_big=geometry.big[1],
        C_big=c_big,
        H_small=geometry.small[0],
        W_small=geometry.small[1],
        C_small=c_small,
        channels=channels,
        tiles_per_group=tiles_per_group,
        negative_slope=epilogue.negative_slope,
        KH=geometry.kernel_size[0],
        KW=geometry.kernel_size[1],
        **_stride_and_padding(geometry),
        HAS_BIAS=epilogue.bias is not None,
        HAS_NORM=epilogue.vectors is not None,
        HAS_STATISTICS=statistics is not None,
        ACTIVATION=epilogue.activation,
        **_arithmetic(source),
        DESCRIPTORS=boxed,
        **_tile(config, box),
    )
    if to_small:
        _start(conv.fprop, tile_grid[:1], big=big, out=small, PACKED=packed, **shared)
    else:
        _start(conv.dgrad, tile_grid, small=small, out=big, **shared)
    return result, statistics


def _through_library(direction, source, weight, geometry, epilogue):
    """As `_conv`, with PyTorch's convolution and the epilogue as passes of their own."""
    convolve = library.fprop if direction == "fprop" else library.dgrad
    z = convolve(source, weight, geometry, epilogue.bias)
    z = z.contiguous(memory_format=torch.channels_last)
    statistics = _statistics_of(z, epilogue.groups) if epilogue.groups else None
    activation = epilogue.activation, epilogue.negative_slope
    if epilogue.vectors is not None:
        z = normalize_activate(z, epilogue.vectors, *activation)
    else:
        z = reference.activate(z, *activation, inplace=True)
    return z, statistics


def _statistics_of(z, groups):
    """`TileStatistics` of a channels_last tensor, by a pass over it."""
    z = nhwc(z)
    channels = z.shape[3]
    grid, rows, tile = _elementwise(z, groups)
    tiles_per_part = _ceil_div(grid[0], _parts_of_pass(grid))
    parts = _ceil_div(grid[0], tiles_per_part)
    dtype = _acc_dtype(z.dtype)
    mean, m2 = torch.empty((2, groups * parts, channels), dtype=dtype, device=z.device)
    count = torch.empty(groups * parts, dtype=dtype, device=z.device)
    _start(
        norm.tile_statistics,
        (parts, *grid[1:]),
        z_ptr=z,
        count_ptr=count,
        mean_ptr=mean,
        m2_ptr=m2,
        rows=rows,
        channels=channels,
        tiles_per_part=tiles_per_part,
        **tile,
    )
    return TileStatistics(count, mean, m2, 1, groups)


def _parts_of_pass(grid):
    """In how many parts a reduction over the tiles of `_elementwise` keeps a GPU busy."""
    tiles, *others = grid
    return min(tiles, max(1, 2 * _BUSY_PROGRAMS // math.prod(others)))


def _config(operation, operand, geometry, c_small, c_big, statistics=False):
    if geometry.is_product:
        geometry, c_big = _FLAT, c_big * geometry.taps
    problem = configs.Problem(
        operation=operation,
        itemsize=operand.element_size(),
        statistics=statistics,
        c_small=c_small,
        c_big=c_big,
        small=geometry.small,
        big=geometry.big,
        kernel_size=geometry.kernel_size,
        stride=geometry.stride,
        images=operand.shape[0],
    )
    return configs.gemm_config(_architecture(operand), problem)


def _collapse(big, small, geometry):
    """See an unpadded kernel that covers its whole input at once as the matrix product it is.

    Latents (1 x 1) to 4 x 4 and 4 x 4 to one logit: the big side's pixels become channels, in
    memory the same array, and no tap is multiplied by padding.
    """
    if not geometry.is_product:
        return big, small, geometry
    return big.view(big.shape[0], 1, 1, -1), small, _FLAT


def _box(pixels, height, width):
    """[n, h, w] powers of two with product `pixels`, no wider and higher than an image needs."""
    w = min(pixels, _power_of_two(width))
    h = min(pixels // w, _power_of_two(height))
    return pixels // (h * w), h, w


def _pixel_tiles(size, block, box):
    if box is None:
        return _ceil_div(math.prod(size), block)
    return math.prod(map(_ceil_div, size, box))


def _descriptors_fit(geometry, *tensors):
    """Whether tensor descriptors can address these tensors and a strided side folds evenly."""
    aligned = (t.shape[-1] * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 for t in tensors)
    folds = all(n % s == 0 for n, s in zip(geometry.big, geometry.stride, strict=True))
    return folds and all(aligned) and max(t.shape[0] for t in tensors) < 2**31


def _stride_divides_kernel(geometry):
    return all(k % s == 0 for k, s in zip(geometry.kernel_size, geometry.stride, strict=True))


def _descriptor(tensor, block_shape):
    # Dense strides, spelled out: PyTorch leaves any stride on a dimension of size 1.
    strides = [math.prod(tensor.shape[i + 1 :]) for i in range(tensor.dim())]
    return TensorDescriptor(tensor, list(tensor.shape), strides, block_shape)


def _big_descriptor(big, geometry, box, block_channels):
    """big as [N, H / sh, sh, W / sw, sw * C]: a tap's or a phase's pixels are a box of it."""
    n, h, w, c = big.shape
    sh, sw = geometry.stride
    folded = big.view(n, h // sh, sh, w // sw, sw * c)
    return _descriptor(folded, [box[0], box[1], 1, box[2], block_channels])


def _stride_and_padding(geometry):
    return dict(
        STRIDE_H=geometry.stride[0],
        STRIDE_W=geometry.stride[1],
        PAD_H=geometry.padding[0],
        PAD_W=geometry.padding[1],
    )


def _arithmetic(tensor):
    return dict(
        ACC_DTYPE=_tl_dtype(_acc_dtype(tensor.dtype)),
        PRECISION=_precision(tensor),
    )


def _tile(config, box):
    return dict(
        BOX_N=box[0],
        BOX_H=box[1],
        BOX_W=box[2],
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _elementwise(x, groups):
    """Grid, rows of a group and tile for one pass over an NHWC tensor as groups of [rows, C]."""
    channels = x.shape[3]
    block_c = min(64, _power_of_two(channels))
    block_r = 64 if INTERPRETING else 4096 // block_c
    rows = x.numel() // (channels * groups)
    grid = (_ceil_div(rows, block_r), _ceil_div(channels, block_c), groups)
    return grid, rows, dict(BLOCK_R=block_r, BLOCK_C=block_c)


def _sampling_grid(mu):
    """Grid and sizes for sampling, mu seen as a matrix of its first dimension and the rest."""
    rows = mu.shape[0] if mu.dim() else 1
    columns = mu.numel() // rows
    quarter = _ceil_div(columns, 4)
    block_q = min(256, _power_of_two(quarter))
    block_n = min(256 // block_q, _power_of_two(rows))
    row_tiles, column_tiles = _ceil_div(rows, block_n), _ceil_div(quarter, block_q)
    # A row is cut where there are too few of them to fill a GPU, and at the grid's limit.
    parts = min(column_tiles, max(1, 8 * _BUSY_PROGRAMS // row_tiles))
    tiles_per_part = _ceil_div(column_tiles, parts)
    sizes = dict(
        N=rows, D=columns, quarter=quarter, tiles_per_part=tiles_per_part,
        BLOCK_N=block_n, BLOCK_Q=block_q,
    )  # fmt: skip
    return (row_tiles, _ceil_div(column_tiles, tiles_per_part)), sizes


def _logits_and_targets(logits, targets, scale):
    has_targets = isinstance(targets, torch.Tensor)
    return dict(
        logits_ptr=logits,
        targets_ptr=targets if has_targets else logits,
        length=logits.numel(),
        ones=0 if has_targets else targets,
        scale=float(scale),
        ACC_DTYPE=_tl_dtype(_acc_dtype(logits.dtype)),
        HAS_TARGETS=has_targets,
        BLOCK=_LOSS_TILE,
    )


def _start(kernel, grid, **arguments):
    """Start a kernel on the device its tensors are on (Triton starts on the current device).

    Returns what Triton compiled; None where it interprets.
    """
    if INTERPRETING:
        return _interpret(kernel, grid, arguments)
    device = next(a.device for a in arguments.values() if isinstance(a, torch.Tensor))
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with guard:
        return kernel[grid](**arguments)


def _interpret(kernel, grid, arguments):
    # The interpreter multiplies the raw bits of bfloat16 and truncates where a GPU rounds. So half
    # precision travels as float32 copies, and PyTorch rounds what the kernel stored.
    copies = {}

    def widen(a):
        if isinstance(a, TensorDescriptor):
            return TensorDescriptor(widen(a.base), a.shape, a.strides, a.block_shape)
        if not isinstance(a, torch.Tensor) or a.element_size() != 2:
            return a
        return copies.setdefault(a.data_ptr(), (a, a.float()))[1]

    kernel[grid](**{name: widen(a) for name, a in arguments.items()})
    for half, wide in copies.values():
        rounded = wide.to(half.dtype)
        # What the kernel only read stays untouched: autograd counts every writing.
        if not torch.equal(rounded.view(torch.int16), half.view(torch.int16)):
            half.copy_(rounded)


def _architecture(tensor):
    if INTERPRETING:
        return "interpreter"
    properties = torch.cuda.get_device_properties(tensor.device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def _precision(tensor):
    """How float32 products round: to TF32 where PyTorch's convolutions may use it."""
    if tensor.dtype != torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def _acc_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _tl_dtype(dtype):
    return getattr(triton.language, str(dtype).removeprefix("torch."))


def _ceil_div(a, b):
    return -(-a // b)


def _power_of_two(n):
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()
