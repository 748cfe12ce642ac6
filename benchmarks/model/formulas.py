"""What a kernel's arguments say: how often its loops run, and what product it computes.

One entry of `FORMULAS` a kernel. Machine code holds loops but not how often they run.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace


@dataclass(frozen=True)
class Formula:
    """Of one kernel; each function is given the launch's arguments as attributes.

    Beside the arguments these are `grid`, padded to three axes, and `tensors`, shapes by name.

    passes: how often each loop runs in one program, {"function.variable": times}; the function is
        the one whose source holds the loop, which may be a helper in another file of kernels/.
        A mean where programs differ.
    flops: of the mathematical product, without padding; None if it is none.
    layer: of a product, which layer it belongs to, whatever the batch.
    about: a few words on all other shapes.
    """

    passes: Callable = lambda a: {}
    flops: Callable = lambda a: 0
    layer: Callable = lambda a: ""
    about: Callable = lambda a: ""


def formula(launch):
    """The `Formula` of a `recording.Launch`, and the launch's arguments for its functions.

    Raises:
        LookupError: there is none for this kernel.
    """
    if launch.name not in FORMULAS:
        raise LookupError(
            "expected each kernel to have an entry in benchmarks/model/formulas.py that says how "
            f"often its loops run, got the kernel {launch.name} without one"
        )
    grid = (*launch.grid, 1, 1, 1)[:3]
    arguments = SimpleNamespace(**launch.arguments, grid=grid, tensors=launch.tensors)
    return FORMULAS[launch.name], arguments


def _ceil(a, b):
    return -(-a // b)


def _fprop_passes(a):
    taps = a.KH * a.KW
    if a.PACKED:
        return {"fprop.k0": _ceil(taps * a.C_big, a.BLOCK_K)}
    return {"fprop.step": _ceil(a.C_big, a.BLOCK_K) * taps}


def _dgrad_passes(a):
    taps = _ceil(a.KH, a.STRIDE_H) * _ceil(a.KW, a.STRIDE_W)
    return {"dgrad.step": _ceil(a.C_small, a.BLOCK_K) * taps}


def _images(a):
    """Of fprop and dgrad, of all groups; N counts one group's."""
    to_big = "small" in a.tensors
    rows, phases = (a.C_big, a.STRIDE_H * a.STRIDE_W) if to_big else (a.C_small, 1)
    return a.N * (a.grid[0] // (_ceil(rows, a.BLOCK_M) * phases * a.tiles_per_group))


def _conv_flops(images):
    def flops(a):
        taps = a.TAPS if hasattr(a, "TAPS") else a.KH * a.KW
        return 2 * images(a) * a.H_small * a.W_small * a.C_small * taps * a.C_big

    return flops


def _small_to_big(a):
    return f"{a.C_small}->{a.C_big} ch {a.H_small}x{a.W_small}->{a.H_big}x{a.W_big}"


def _big_to_small(a):
    return f"{a.C_big}->{a.C_small} ch {a.H_big}x{a.W_big}->{a.H_small}x{a.W_small}"


def _about_images(images):
    return lambda a: f"n {images(a)}"


def _rows_about(a):
    return f"{a.channels} channels, {a.grid[2]} x {a.rows} rows"


def _all_images(a):
    return a.N


def _about_padded(a):
    n, height, width, _ = a.tensors["padded_ptr"]
    return f"n {n}, padded {height}x{width}"


def _tiles_of_image(a):
    return a.tiles_per_program * a.grid[1] + a.one_more


def _flops_of_image(a, pixels):
    return 2 * pixels * 8 * a.eighths * a.KH * a.KW * a.C_BIG


def _flops_of_both(a):
    _, height, width, _ = a.tensors["small"]
    product = height * width * a.KH * a.KW * a.C_small
    image = a.H_big * a.W_big * a.IMAGE_KH * a.IMAGE_KW * a.C_IMAGE
    return 2 * a.N * a.C_big * (product + image)


def _small_size(a):
    _, height, width, _ = a.tensors["small"]
    return f"{height}x{width}"


def _other_groups(end, group_rows, step_rows, steps, splits):
    """How often a mean step of `normalized_rows` meets another group than its program's first.

    end: rows of the batch. group_rows: of each group. step_rows: of a step. steps: of a program.
    splits: programs that share the rows.
    """
    met = 0
    for split in range(splits):
        group = min(split * steps * step_rows, end - 1) // group_rows
        for first in range(split * steps * step_rows, (split + 1) * steps * step_rows, step_rows):
            last = (min(first + step_rows, end) - 1) // group_rows
            met += max(last + 1 - max(group + 1, first // group_rows), 0)
    return met / (splits * steps)


def _images_of_logits(a):
    """Of all groups; N counts one group's."""
    return a.N * (a.grid[0] // (a.tiles_n * a.tiles_k))


FORMULAS = {
    "fprop": Formula(_fprop_passes, _conv_flops(_images), _big_to_small, _about_images(_images)),
    "dgrad": Formula(_dgrad_passes, _conv_flops(_images), _small_to_big, _about_images(_images)),
    "wgrad": Formula(
        lambda a: {"wgrad.step": a.tiles_per_split},
        _conv_flops(_all_images),
        _big_to_small,
        _about_images(_all_images),
    ),
    "pad_image": Formula(about=_about_padded),
    "join_images": Formula(about=_about_padded),
    "fprop_image": Formula(
        lambda a: {
            "fprop_image.step": _tiles_of_image(a) / a.grid[1],
            "fprop_image.k0": _ceil(a.KH * a.KW * 4, a.BLOCK_K),
        },
        lambda a: _flops_of_image(a, a.pixels * _tiles_of_image(a) / a.tiles_per_group),
        lambda a: f"{a.C_BIG}->{8 * a.eighths} ch image",
        _about_padded,
    ),
    "norm_sums_image": Formula(
        lambda a: {"norm_sums_image.step": _tiles_of_image(a) / a.grid[1]},
        # The gradient counts where it is stored.
        lambda a: _flops_of_image(a, a.pixels) if a.HAS_WGRAD else 0,
        lambda a: f"{a.C_BIG}->{8 * a.eighths} ch image",
        _about_padded,
    ),
    "wgrad_image": Formula(
        lambda a: {
            "wgrad_image.step": a.tiles_per_split,
            "normalized_rows.other": _other_groups(
                a.pixels, a.group_pixels, a.BLOCK_K, a.tiles_per_split, a.grid[2]
            ),
        },
        lambda a: _flops_of_image(a, a.pixels),
        lambda a: f"{a.C_BIG}->{8 * a.eighths} ch image",
        _about_padded,
    ),
    "dgrad_wgrad_image": Formula(
        lambda a: {
            "dgrad_wgrad_image.tile": a.tiles_per_program + a.one_more / a.grid[1],
            "dgrad_wgrad_image.step": _dgrad_passes(a)["dgrad.step"],
        },
        _flops_of_both,
        lambda a: (
            f"{a.C_small}->{a.C_big} ch {_small_size(a)}->{a.H_big}x{a.W_big}, "
            f"{a.C_IMAGE}->{a.C_big} ch image"
        ),
        lambda a: f"n {a.N}",
    ),
    "to_image": Formula(
        lambda a: {
            "to_image.step": a.steps_per_segment + _ceil(a.KH - a.STRIDE_H, a.STRIDE_H),
            "to_image.c0": _ceil(a.C_small, a.BLOCK_C),
            "normalized_rows.other": _other_groups(
                a.N, a.group_images, a.BLOCK_N, 1, _ceil(a.N, a.BLOCK_N)
            ),
        },
        lambda a: 2 * a.N * a.H_small * a.W_small * a.C_small * a.KH * a.KW * a.C_BIG,
        lambda a: f"{a.C_small}->{a.C_BIG} ch {a.H_small}x{a.W_small}->{a.H_big}x{a.W_big}",
        lambda a: f"n {a.N}",
    ),
    "logits_fprop": Formula(
        lambda a: {"logits_fprop.k0": _ceil(a.K, a.BLOCK_K)},
        lambda a: 2 * a.grid[0] * a.K * a.C_SMALL,
        lambda a: f"{a.K}->{a.C_SMALL} ch logits",
        lambda a: f"n {a.grid[0]}",
    ),
    "logits_dgrad": Formula(
        lambda a: {},
        lambda a: 2 * _images_of_logits(a) * a.K * a.C_SMALL if a.STORES else 0,
        lambda a: f"{a.C_SMALL}->{a.K} ch logits",
        lambda a: f"n {_images_of_logits(a)}",
    ),
    "logits_wgrad": Formula(
        lambda a: {
            "logits_wgrad.step": a.steps_per_split,
            "normalized_rows.other": _other_groups(
                a.N, a.group_images, a.REPEATS * a.BLOCK_N, a.steps_per_split, a.grid[1]
            ),
        },
        lambda a: 2 * a.N * a.K * a.C_SMALL,
        lambda a: f"{a.K}->{a.C_SMALL} ch logits",
        lambda a: f"n {a.N}",
    ),
    "sum_partials": Formula(
        lambda a: {"sum_partials.first": _ceil(min(a.chunk, a.parts), a.BLOCK_P)},
        about=lambda a: f"{a.parts} parts of {a.rows * a.row_length}, {a.grid[1]} groups",
    ),
    "tile_statistics": Formula(
        lambda a: {"tile_statistics.step": a.tiles_per_part}, about=_rows_about
    ),
    "combine_statistics": Formula(
        lambda a: {"_combine.start": _ceil(min(a.chunk, a.parts), a.BLOCK_P)},
        about=lambda a: f"{a.channels} channels, {a.grid[2]} x {a.parts} parts",
    ),
    "batch_statistics": Formula(
        lambda a: {
            "batch_statistics.group": a.groups,
            "_combine.start": _ceil(a.parts, a.BLOCK_P),
        },
        about=lambda a: f"{a.channels} channels, {a.groups * a.grid[1]} x {a.parts} parts",
    ),
    "shared_statistics": Formula(
        lambda a: {
            "shared_statistics.start": _ceil(a.parts * a.span, a.BLOCK),
            "shared_statistics.first": _ceil(a.span, a.BLOCK_C),
        },
        about=lambda a: f"{a.channels} channels by {a.span}, {a.grid[1]} x {a.parts} parts",
    ),
    "shared_sums": Formula(
        lambda a: {
            "shared_sums.start": _ceil(a.parts * a.span, a.BLOCK),
            "shared_sums.first": _ceil(a.span, a.BLOCK_C),
        },
        about=lambda a: f"{a.channels} channels by {a.span}, {a.grid[1]} x {a.parts} parts",
    ),
    "known_statistics": Formula(about=lambda a: f"{a.channels} channels"),
    "normalize_activate": Formula(about=_rows_about),
    "norm_backward_reduce": Formula(
        lambda a: {"norm_backward_reduce.step": a.tiles_per_part}, about=_rows_about
    ),
    # Only the first program of a tile of channels adds up the other groups.
    "norm_backward": Formula(
        lambda a: {
            "_store_total.other": a.groups / (a.grid[0] * a.grid[2]),
            "_sums_of_parts.first": _ceil(a.parts, a.BLOCK_P),
        },
        about=_rows_about,
    ),
    "gated_normalize": Formula(about=_rows_about),
    "gated_backward_reduce": Formula(
        lambda a: {"gated_backward_reduce.step": a.tiles_per_part}, about=_rows_about
    ),
    "gated_backward": Formula(
        lambda a: {
            "_store_total.other": a.groups / (a.grid[0] * a.grid[2]),
            "_sums_of_parts.first": _ceil(a.parts, a.BLOCK_P),
        },
        about=_rows_about,
    ),
    "adam": Formula(about=lambda a: f"{a.grid[0]} chunks of {a.BLOCK}"),
    "activation_backward_from_output": Formula(about=lambda a: f"{a.rows * a.row_length} elements"),
    "reparameterize": Formula(
        lambda a: {"reparameterize.step": a.tiles_per_part}, about=lambda a: f"{a.N} x {a.D}"
    ),
    "reparameterize_backward": Formula(
        lambda a: {"reparameterize_backward.step": a.tiles_per_part},
        about=lambda a: f"{a.N} x {a.D}",
    ),
    "importance_samples": Formula(
        lambda a: {"importance_samples.step": a.tiles_per_part},
        about=lambda a: f"{a.N} x {a.samples} x {a.D}",
    ),
    "importance_samples_backward": Formula(
        lambda a: {"importance_samples_backward.first": _ceil(a.samples, a.BLOCK_K)},
        about=lambda a: f"{a.N} x {a.samples} x {a.D}",
    ),
    "logit_loss": Formula(
        lambda a: {"logit_loss.step": a.tiles_per_part},
        about=lambda a: f"{a.rows * a.row_length} logits",
    ),
    "logit_loss_backward": Formula(about=lambda a: f"{a.rows * a.row_length} logits"),
}
