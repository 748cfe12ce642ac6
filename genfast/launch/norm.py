"""Batch, instance and group norm: statistics, normalise + activate, and the backward.

Tensors are channels_last, which the kernels around them read, or contiguous as PyTorch's are; what
is made of one lies as it does. Any other is copied into channels_last.
"""

from dataclasses import dataclass

import torch

from genfast import processes, reference
from genfast.backend import triton
from genfast.launch import gated, memory, passes, start, sums, tape, tiles

if triton is not None:
    from genfast.kernels import norm as kernels

# Rows of the matrix `vectors` of batch-norm quantities, one column a channel: see kernels/norm.py.
MEAN, UNBIASED_VAR, RSTD, SCALE, SHIFT = range(5)

# One program of `combine_statistics` combines this many tiles; more tiles take another round.
_STATISTICS_CHUNK = 512
# Every program of `norm_backward` adds up to this many parts of two sums itself; for more of them
# a kernel of their own is less work.
_PARTS_ADDED_BY_ALL = 64
# One of them also adds the sums of so many groups, one after the other; for more a kernel does.
_GROUPS_IN_TURN = 4
# One program of `shared_statistics` combines so many parts of channels, some at a time.
_SHARED_CHUNK = 2**14


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


def batch_statistics(
    statistics,
    gamma,
    beta,
    eps,
    running_mean=None,
    running_var=None,
    momentum=0.0,
    counter=None,
    *,
    span=1,
):
    """Combine `TileStatistics` into `vectors` (groups, 5, channels), for normalising by the batch.

    Running statistics, where given, move in place by `momentum`, once for each group in turn; the
    counter of batches, an int64 scalar on the device, by the number of groups.

    With a `span` above 1 every so many channels in a row share statistics, and nothing moves.
    """
    if span > 1:
        return _shared_statistics(statistics, gamma, beta, eps, span)
    statistics = _combine_chunks(statistics, _STATISTICS_CHUNK)
    parts, channels, groups = _parts(statistics)
    vectors = statistics.mean.new_empty((groups, 5, channels))
    # The kernel steps through memory one by one; what it wrote into a copy goes back.
    running = [memory.dense(t, vectors) for t in (running_mean, running_var)]
    # What moves does so in the order of the groups, which else are as many programs.
    in_turn = groups if running_mean is not None or counter is not None else 1
    tape.start(
        kernels.batch_statistics,
        (tiles.ceil_div(channels, _statistics_block(channels)), groups // in_turn),
        vectors_ptr=vectors,
        running_mean_ptr=running[0],
        running_var_ptr=running[1],
        counter_ptr=counter if counter is not None else vectors,
        groups=in_turn,
        parts=parts,
        channels=channels,
        eps=eps,
        momentum=momentum,
        **_tiles(statistics),
        **_affine(gamma, beta, vectors),
        HAS_RUNNING=running_mean is not None,
        HAS_COUNTER=counter is not None,
        BLOCK_P=128 if groups <= _GROUPS_IN_TURN else 32,  # An image has few parts.
        BLOCK_C=_statistics_block(channels),
    )
    for given, dense in zip((running_mean, running_var), running, strict=True):
        if given is not None and given is not dense:
            given.copy_(dense)
    return vectors


def of_all_processes(statistics, process_group):
    """The `TileStatistics` of a batch that is spread over processes: a tile for each of them."""
    one = _combine_chunks(statistics, 1)
    here = torch.cat([one.count.view(-1, 1), one.mean, one.m2], 1)
    # (processes, groups, ...), of which the groups come first in memory.
    everyones = processes.gathered(here, process_group).transpose(0, 1).flatten(0, 1)
    channels = one.mean.shape[1]
    count, mean, m2 = (t.contiguous() for t in everyones.split([1, channels, channels], 1))
    return TileStatistics(count.view(-1), mean, m2, 1, one.groups)


def _shared_statistics(statistics, gamma, beta, eps, span):
    statistics = _combine_chunks(statistics, max(1, _SHARED_CHUNK // span))
    parts, channels, groups = _parts(statistics)
    vectors = statistics.mean.new_empty((groups, 5, channels))
    tape.start(
        kernels.shared_statistics,
        (channels // span, groups),
        vectors_ptr=vectors,
        parts=parts,
        channels=channels,
        span=span,
        eps=eps,
        **_tiles(statistics),
        **_affine(gamma, beta, vectors),
        **_shared_blocks(span),
    )
    return vectors


def _shared_blocks(span):
    """The tile of parts and channels that share statistics. The number of parts has no say."""
    # A span of few channels is little work for a program, and there are many of them.
    block, warps = (256, 1) if span <= 32 else (1024, 4)
    return dict(BLOCK=block, BLOCK_C=min(256, tiles.power_of_two(span)), num_warps=warps)


def known_statistics(running_mean, running_var, gamma, beta, eps, dtype):
    """`vectors` (1, 5, channels) of a dtype, as `batch_statistics` gives them, of known ones."""
    channels = len(running_mean)
    vectors = torch.empty((1, 5, channels), dtype=dtype, device=running_mean.device)
    tape.start(
        kernels.known_statistics,
        (tiles.ceil_div(channels, 128),),
        running_mean_ptr=running_mean.contiguous(),
        running_var_ptr=running_var.contiguous(),
        vectors_ptr=vectors,
        channels=channels,
        eps=eps,
        **_affine(gamma, beta, vectors),
        BLOCK_C=128,
    )
    return vectors


def _combine_chunks(statistics, most):
    """The same statistics in at most so many parts of each group."""
    parts, channels, groups = _parts(statistics)
    while parts > most:
        chunks = tiles.ceil_div(parts, _STATISTICS_CHUNK)
        mean, m2 = (statistics.mean.new_empty((groups * chunks, channels)) for _ in range(2))
        count = statistics.mean.new_empty(groups * chunks)
        tape.start(
            kernels.combine_statistics,
            (tiles.ceil_div(channels, _statistics_block(channels)), chunks, groups),
            out_count_ptr=count,
            out_mean_ptr=mean,
            out_m2_ptr=m2,
            parts=parts,
            channels=channels,
            chunk=_STATISTICS_CHUNK,
            **_tiles(statistics),
            BLOCK_P=128,
            BLOCK_C=_statistics_block(channels),
        )
        statistics, parts = TileStatistics(count, mean, m2, 1, groups), chunks
    return statistics


def _tiles(statistics):
    """`TileStatistics` as arguments."""
    return dict(
        count_ptr=statistics.count,
        mean_ptr=statistics.mean,
        m2_ptr=statistics.m2,
        parts_per_count=statistics.repeat,
    )


def _affine(gamma, beta, stand_in):
    """gamma and beta, or None, as arguments."""
    return dict(
        gamma_ptr=memory.dense(gamma, stand_in),
        beta_ptr=memory.dense(beta, stand_in),
        HAS_GAMMA=gamma is not None,
        HAS_BETA=beta is not None,
    )


def _parts(statistics):
    """Parts of a group, channels, groups."""
    parts, channels = statistics.mean.shape
    return parts // statistics.groups, channels, statistics.groups


def _statistics_block(channels):
    return min(32, tiles.power_of_two(channels))


def _halves(activation: str) -> bool:
    """Whether it gives half of the channels. Passes of such have kernels of their own."""
    return reference.ACTIVATION[activation].halves


def _activation(activation, negative_slope, stand_in):
    """An activation as arguments; the slopes of "prelu" are a tensor, (1,) or (channels,)."""
    if _halves(activation):
        return {}  # Its kernels know no other.
    learnt = isinstance(negative_slope, torch.Tensor)
    return dict(
        slope_ptr=memory.dense(negative_slope if learnt else None, stand_in),
        slope_step=int(learnt and len(negative_slope) > 1),
        negative_slope=0.0 if learnt else negative_slope,
        ACTIVATION=activation,
    )


def normalize_activate(z, vectors, activation, negative_slope, dtype=None, added=None):
    """act((z - mean) * scale + shift + added): (N, C, H, W) to the same; for "glu" to half of C.

    negative_slope: a number; for "prelu" a tensor, (1,) or (C,).
    dtype: of the result; None for z's.
    added: None, or like z; None for "glu".
    """
    z, planes = _as_read(z)
    halved = _halves(activation)
    y = _empty_like(z, planes, dtype, halved)
    grid, matrix = _matrix(y if planes else memory.nhwc(y), vectors, planes, halved)
    if halved:
        gated.normalize(grid, dict(z_ptr=z, vectors_ptr=vectors, y_ptr=y) | matrix)
        return y
    if added is not None:
        added = added.contiguous() if planes else memory.nhwc(added)
    tape.start(
        kernels.normalize_activate,
        grid,
        z_ptr=z,
        vectors_ptr=vectors,
        y_ptr=y,
        added_ptr=vectors if added is None else added,
        HAS_ADDED=added is not None,
        **_activation(activation, negative_slope, vectors),
        **matrix,
    )
    return y


def _as_read(z):
    """z (N, C, H, W) as kernels read it, dense: NHWC, or NCHW; and whether that."""
    # Of one channel, or one pixel, both are the same memory. Offsets in an image are 32-bit.
    planes = (
        z.is_contiguous()
        and not z.is_contiguous(memory_format=torch.channels_last)
        and z.numel() < z.shape[0] * 2**31
    )
    return (z, True) if planes else (memory.nhwc(z), False)


def _empty_like(z, planes, dtype=None, halved=False):
    """(N, C, H, W) that lies as z does, which `_as_read` gave; with `halved` of half of C."""
    if not planes:
        *rest, c = z.shape
        return memory.channels_last((*rest, c // 2 if halved else c), z, dtype)
    n, c, *size = z.shape
    return z.new_empty((n, c // 2 if halved else c, *size), dtype=dtype)


def _matrix(x, vectors, planes, halved):
    """`passes.elementwise` of what comes out of a norm and its activation, as it lies."""
    return passes.elementwise(x, vectors.shape[0], planes, 2 if halved else 1)


def reading(source, vectors):
    """Of kernels that can normalise `source` as they read it: the groups, and arguments.

    Args:
        source: dense, what they read.
        vectors: (groups, 5, channels), or None to take it as it is.
    """
    groups = 1 if vectors is None else vectors.shape[0]
    return groups, dict(
        vectors_ptr=source if vectors is None else vectors,
        HAS_NORM=vectors is not None,
        STORED_DTYPE=start.tl_dtype(source.dtype),
    )


def norm_backward(
    dy,
    z,
    vectors,
    *,
    training,
    need_dz,
    activation,
    negative_slope,
    partials=None,
    want_y=False,
    need_total=True,
    span=1,
    process_group=None,
):
    """The backward of `normalize_activate` and, in training, of the statistics in `vectors`.

    Args:
        dy: (N, C, H, W), for "glu" of half of C, the gradient of y; with `partials` that of u.
        z, vectors, activation, negative_slope: as given to `normalize_activate`.
        training: whether `vectors` came from z itself.
        need_dz: whether dz is wanted.
        partials: (groups, parts, 2 * C): the sums over parts of each group of g, the gradient of
            u, and of g * xhat; or None, as for "glu": a pass of its own computes them.
        want_y: whether y is wanted too, which takes a writing less than another pass; needs
            `need_dz`.
        need_total: whether the gradients of beta and gamma are wanted.
        span: as in `batch_statistics`, in training.
        process_group: over which the batch is spread, in training. The gradients of beta and gamma
            are those of this process's part.

    Returns:
        dz (N, C, H, W), None unless `need_dz`; (2, C): the gradients of beta and of gamma, None
        unless `need_total`, for "prelu" (3, C), the third being those of each channel's slope; and
        y, None unless `want_y`.
    """
    grid, common, (lies, planes) = _backward(dy, z, vectors, activation, negative_slope)
    at_norm = partials is not None
    slope_partials = None
    if not at_norm and (need_total or (need_dz and training)):
        partials, slope_partials = _backward_sums(grid, common)
    groups, _, channels = vectors.shape
    rows = 2 if slope_partials is None else 3
    total = vectors.new_empty((rows, channels)) if need_total else None
    if need_total and slope_partials is not None:
        sums.sum_partials(slope_partials, total[2])
    # What a pass over all groups adds up it does so in turn.
    together = process_group is None
    alone = need_total and (not need_dz or groups > _GROUPS_IN_TURN or span > 1 or not together)
    if alone:
        sums.sum_partials(partials.flatten(0, 1), total[:2])
    if not need_dz:
        return None, total, None
    if partials is None:  # Nobody reads sums.
        partials = vectors.view(groups, 1, -1)
    elif training and not together:
        partials = _sums_of_all_processes(partials, common["rows"], process_group)
    elif span > 1:
        partials = _shared_sums(partials, vectors, common["rows"], span)
    else:
        # Tiles of contiguous memory have fewer channels, so that more programs add the same.
        partials = sums.in_fewer_parts(partials, max(1, _PARTS_ADDED_BY_ALL >> planes))
    dz = _empty_like(lies, planes)
    y = _empty_like(common["dy_ptr"], planes, dz.dtype) if want_y else None
    given = dict(
        sums_ptr=partials,
        total_ptr=total if need_total else vectors,
        dz_ptr=dz,
        y_ptr=y if want_y else dz,
        parts=partials.shape[1],
        groups=groups,
        TRAINING=training,
        SHARED=span > 1,
        WRITES_Y=want_y,
        WRITES_TOTAL=need_total and not alone,
        BLOCK_P=16,
        **common,
    )
    if _halves(activation):
        gated.backward(grid, given)
    else:
        tape.start(kernels.norm_backward, grid, AT_NORM=at_norm, **given)
    return dz, total, y


def total_sums(partials, rows, need_total, process_group=None):
    """Of the `partials` of `norm_backward`, for who computes dz elsewhere: what that is made of.

    Args:
        partials: (groups, parts, 2 * C), as there.
        rows: the values of a channel in each group.
        need_total, process_group: as there.

    Returns:
        (groups, 1, 2 * C): the sums over parts; and (2, C): the gradients of beta and of gamma,
        None unless `need_total`.
    """
    each = sums.in_fewer_parts(partials, 1)
    total = None
    if need_total:
        total = each.view(len(each) * 2, -1)
        if len(each) > 1:
            total = each.new_empty((2, each.shape[2] // 2))
            sums.sum_partials(each.flatten(0, 1), total)
    if process_group is not None:
        each = _sums_of_all_processes(each, rows, process_group)
    return each, total


def _sums_of_all_processes(partials, rows, process_group):
    """(groups, 1, 2 * channels): their sums over processes, times the part of the values here.

    So what divides them by the number of values here gives means over all.
    """
    here = sums.in_fewer_parts(partials, 1)
    values = here.new_full((len(here), 1, 1), rows)
    total = processes.summed(torch.cat([here, values], 2), process_group)
    return total[..., :-1] * (rows / total[..., -1:])


def _shared_sums(partials, vectors, rows, span):
    """(groups, 1, 2 * channels): see `kernels.norm.shared_sums`."""
    groups, _, channels = vectors.shape
    partials = sums.in_fewer_parts(partials, max(1, _SHARED_CHUNK // span))
    out = vectors.new_empty((groups, 1, 2 * channels))
    tape.start(
        kernels.shared_sums,
        (channels // span, groups),
        sums_ptr=partials,
        vectors_ptr=vectors,
        out_ptr=out,
        rows=rows,
        parts=partials.shape[1],
        channels=channels,
        span=span,
        **_shared_blocks(span),
    )
    return out


def backward_sums(g, z, vectors):
    """The sums of a gradient g at a norm's output and of g * xhat, (groups, parts, 2 * channels).

    Args:
        g, z: (N, C, H, W); z is what the norm took.
        vectors: (groups, 5, channels).
    """
    grid, common, _ = _backward(g, z, vectors, "identity", 0.0)
    return _backward_sums(grid, common)[0]


def _backward_sums(grid, common):
    """Part by part, those of `norm_backward_reduce`; and for "prelu", else None, of the slopes."""
    vectors, activation = common["vectors_ptr"], common.get("ACTIVATION")
    channels = vectors.shape[2]
    tiles_per_part = tiles.ceil_div(grid[0], passes.parts_of_pass(common["z_ptr"], grid))
    parts = tiles.ceil_div(grid[0], tiles_per_part)
    partials = vectors.new_empty((grid[2], parts, 2 * channels))
    slope_partials = None
    given = dict(partials_ptr=partials, tiles_per_part=tiles_per_part, **common)
    if activation is None:
        gated.backward_reduce((parts, *grid[1:]), given)
        return partials, None
    if activation == "prelu":
        slope_partials = vectors.new_empty((grid[2] * parts, channels))
    tape.start(
        kernels.norm_backward_reduce,
        (parts, *grid[1:]),
        slope_partials_ptr=partials if slope_partials is None else slope_partials,
        **given,
    )
    return partials, slope_partials


def _backward(dy, z, vectors, activation, negative_slope):
    """The grid of a pass over a gradient and z, the arguments that passes share, and `_as_read`."""
    z, planes = _as_read(z)
    dy = dy.contiguous() if planes else memory.nhwc(dy)
    grid, matrix = _matrix(dy, vectors, planes, _halves(activation))
    common = dict(
        dy_ptr=dy,
        z_ptr=z,
        vectors_ptr=vectors,
        **_activation(activation, negative_slope, vectors),
        **matrix,
    )
    return grid, common, (z, planes)


def activation_backward(dy, y, activation, negative_slope):
    """dy * act'(u), computed from the output y = act(u): (N, C, H, W), channels_last."""
    dy, y = memory.nhwc(dy), memory.nhwc(y)
    du = memory.channels_last(y.shape, y)
    rows, row_length = passes.rows(y)
    tape.start(
        kernels.activation_backward_from_output,
        (tiles.ceil_div(y.numel(), 1024),),
        dy_ptr=dy,
        y_ptr=y,
        du_ptr=du,
        rows=rows,
        row_length=row_length,
        negative_slope=negative_slope,
        ACC_DTYPE=start.tl_dtype(start.acc_dtype(y.dtype)),
        ACTIVATION=activation,
        BLOCK=1024,
    )
    return du


def statistics_of(z, groups):
    """`TileStatistics` of a tensor (N, C, H, W), by a pass over it."""
    z, planes = _as_read(z)
    grid, matrix = passes.elementwise(z, groups, planes)
    channels = matrix["channels"]
    tiles_per_part = tiles.ceil_div(grid[0], passes.parts_of_pass(z, grid))
    parts = tiles.ceil_div(grid[0], tiles_per_part)
    dtype = start.acc_dtype(z.dtype)
    mean, m2 = torch.empty((2, groups * parts, channels), dtype=dtype, device=z.device)
    count = torch.empty(groups * parts, dtype=dtype, device=z.device)
    tape.start(
        kernels.tile_statistics,
        (parts, *grid[1:]),
        z_ptr=z,
        count_ptr=count,
        mean_ptr=mean,
        m2_ptr=m2,
        tiles_per_part=tiles_per_part,
        **matrix,
    )
    return TileStatistics(count, mean, m2, 1, groups)
