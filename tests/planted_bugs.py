"""Show that the tests notice: plant one bug at a time in a copy and run tests that should fail.

    python tests/planted_bugs.py            all of them, a few minutes
    python tests/planted_bugs.py tap slope  those with one of these words in their name

Ends with status 1 if a bug survives, and if the code has changed so that a bug no longer fits it.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("benchmarks", "genfast", "kernels", "tests", "pyproject.toml")


class Bug(NamedTuple):
    """`old`, which stands once in `file`, becomes `new`; some test of `tests` must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


STRIDED = "test_blocks.py::test_gradient_of_a_sum"
TILES = "test_blocks.py::test_ragged_tiles"
LOADERS = "test_blocks.py::test_ragged_tiles_with_either_loader"
REDUCTIONS = "test_blocks.py::test_few_programs_share_long_reductions"
SAMPLING = "test_sampling.py"
FROM_IMAGE = "test_from_image.py::test_products"
DGRAD_WGRAD = "test_dgrad_wgrad.py::test_bits_are_those_of_two_kernels"
LOSSES = "test_losses.py"
EXTENSIONS = "test_gan_extensions.py::test_a_step_is_that_of_a_plain_loop"
PENALTIES = "test_gan_extensions.py::test_penalties_of_a_linear_discriminator"
ADAM = "test_adam.py::test_updates_are_pytorchs"
NORMALIZING = "test_normalizing.py::test_bits_are_those_of_the_pass_and_the_product"
GRADIENT = "test_gradient_epilogue.py::test_gradient_of_the_layer_below"
OVERLAP = "test_overlap.py"
REWRITING = "test_rewriting.py::test_what_runs_together"
DATA_SETS = "test_datasets.py::test_batches_depend_on_seed_and_position_alone"
NORMS = "test_norms.py::test_alone"

COMPILED = "test_compile.py::test_compiled_networks_are_the_eager_ones"
WORKERS = "test_workers.py::test_runs_of_two_processes_go_on_stop_and_fail_together"
JOINT = "test_workers.py::test_processes_train_as_one_with_the_joint_batch"
TWICE = "test_computed_twice.py::test_the_gradients_below"
BUGS = (
    Bug(
        "the gradient at a norm's input, computed again, forgets rstd",
        "kernels/product.py",
        "tilt = scale * rstd * (",
        "tilt = scale * (",
        TWICE,
    ),
    Bug(
        "pixels beyond the end count in sums of a gradient that is not stored",
        "kernels/from_image.py",
        "acc = zero_beyond(dot(weight, window.T, acc, PRECISION), exists, count)",
        "acc = dot(weight, window.T, acc, PRECISION)",
        TWICE,
    ),
    Bug(
        "pixels beyond the end count in a weight's gradient beside those sums",
        "kernels/from_image.py",
        "y = as_stored(y, exists[None, :], z.dtype, STORED_DTYPE)",
        "y = as_stored(y, (column >= 0)[None, :], z.dtype, STORED_DTYPE)",
        TWICE,
    ),
    Bug(
        "a channel of a map before logits has as many values as images",
        "kernels/logits.py",
        "C_big, N * (K // C_big), vectors_ptr",
        "C_big, N, vectors_ptr",
        TWICE,
    ),
    Bug(
        "gradients computed twice have the first group's gamma and beta",
        "genfast/launch/norm.py",
        "sums.sum_partials(each.flatten(0, 1), total)",
        "sums.sum_partials(each[0], total)",
        TWICE,
    ),
    Bug(
        "what a function is given beside a sum is looked up before it",
        "genfast/rewriting.py",
        "list(map(self._late, links[i + 1 :]))",
        "links[i + 1 :]",
        "test_residual.py::test_what_takes_a_sum_is_looked_up_as_python_does",
    ),
    Bug(
        "a sum leaves out what is around a convolution",
        "genfast/functional.py",
        "    if any([block.around is not None for block in blocks]):\n        x, blocks",
        "    if any([]):\n        x, blocks",
        "test_residual.py::test_what_is_around_a_convolution_counts",
    ),
    Bug(
        "a sum within the second of two calls takes the place of theirs",
        "genfast/rewriting.py",
        " and any(_adds_first(e) for e, *_ in links)",
        " and False",
        "test_residual.py::test_lists_within_one_another_keep_their_order",
    ),
    Bug(
        "every process takes the images of the first",
        "genfast/training/data/batches.py",
        "slice(rank * batch_size, (rank + 1) * batch_size)",
        "slice(0, batch_size)",
        JOINT,
    ),
    Bug(
        "trials of a network wait for those of other processes",
        "genfast/training/steps/spread.py",
        "norm.process_group = own",
        "pass",
        JOINT,
    ),
    Bug(
        "processes begin with weights that are not the same",
        "genfast/training/runs/loop.py",
        "crc = zlib.crc32(values.view(torch.uint8).numpy(), crc)",
        "crc = 0",
        WORKERS,
    ),
    Bug(
        "a trained VAE/GAN encodes images of another range",
        "genfast/training/runs/trained.py",
        "return brought(images.float(), (0.0, 1.0), self._step.pixel_range)",
        "return images.float()",
        "test_vae_gan.py::test_a_trained_one_encodes_images_from_0_to_1",
    ),
    Bug(
        "all processes draw the same noise",
        "genfast/training/runs/workers.py",
        "np.random.SeedSequence([seed, self.rank, *more])",
        "np.random.SeedSequence([seed, *more])",
        WORKERS,
    ),
    Bug(
        "all processes go on with the random numbers of the first",
        "genfast/training/runs/checkpoint.py",
        'content["together"]["rng"][rank] if rank else content["rng"]',
        'content["rng"]',
        WORKERS,
    ),
    Bug(
        "every process says what is wrong with all of them",
        "genfast/training/runs/workers.py",
        "if error is None or self.rank != failed[0]:",
        "if error is None:",
        WORKERS,
    ),
    Bug(
        "a gate's derivative is its opening",
        "kernels/gated.py",
        "dy * u * slope",
        "dy * u * open_",
        "test_gated.py::test_every_magnitude",
    ),
    Bug(
        "gates get the other half's statistics",
        "kernels/gated.py",
        "vectors_ptr, 2 * channels, c + channels, in_c, offset,",
        "vectors_ptr, 2 * channels, c, in_c, offset,",
        "test_gated.py::test_alone",
    ),
    Bug(
        "all phases of a shuffled convolution get the first one's bias",
        "kernels/conv.py",
        "bias_ptr += phase * bias_step",
        "bias_ptr += 0 * bias_step",
        "test_pixel_shuffle.py::test_chain",
    ),
    Bug(
        "a norm takes the bias of a phase away",
        "genfast/autograd.py",
        "self.by_batch and self.span == 1 and bias.dim() == 1",
        "self.by_batch and self.span == 1",
        "test_pixel_shuffle.py::test_a_norm_takes_no_bias_of_phases_away",
    ),
    Bug(
        "a public function does not say what it takes",
        "genfast/losses.py",
        "def gan_loss(name: str) -> GANLoss:",
        "def gan_loss(name) -> GANLoss:",
        "test_types.py::test_public_names_have_types",
    ),
    Bug(
        "a public name's example is no example",
        "genfast/losses.py",
        '>>> gan_loss("wgan").generator',
        'gan_loss("wgan").generator',
        "test_docstrings.py::test_all_have_an_example",
    ),
    Bug(
        "a process's loss counts as much as that of one with more images",
        "genfast/training/steps/spread.py",
        "self._part = count / processes.summed(count, self._group)",
        "self._part = 1 / processes.summed(count.sign(), self._group)",
        "test_spread.py::test_processes_train_as_one",
    ),
    Bug(
        "the sums of a synchronised batch norm's backward stay in their process",
        "genfast/launch/norm.py",
        'partials = _sums_of_all_processes(partials, common["rows"], process_group)',
        "pass",
        "test_sync_norm.py::test_parts_give_what_the_whole_gives",
    ),
    Bug(
        "the weight that upsamples first is not turned",
        "genfast/folding.py",
        "summed.transpose(0, 1).flip(2, 3)",
        "summed.transpose(0, 1)",
        "test_folding.py::test_weights",
    ),
    Bug(
        "the gradient of a reflection forgets the corners",
        "genfast/padding.py",
        "for to, given in zip([*columns, dx], [*places, dy[..., left : left + w]], strict=True):",
        "for to, given in zip([dx], [dy[..., left : left + w]], strict=True):",
        "test_folding.py::test_reflection",
    ),
    Bug(
        "an average with a hook becomes part of the convolution before it",
        "genfast/nn.py",
        "return fits and not self._why_not_fused(names[after], modules[after])",
        "return fits",
        "test_folding.py::test_left_to_pytorch",
    ),
    Bug(
        "a container with a hook opens",
        "genfast/opening.py",
        "has_hook(module)\n        or ",
        "",
        "test_reach.py::test_a_border_that_is_watched_is_kept",
    ),
    Bug(
        "a forward that looks at its argument opens",
        "genfast/rewriting.py",
        "return x.id == names[1] and not any(_mentions(e, {x.id}) for e in (links, *later))",
        "return x.id == names[1]",
        "test_reach.py::test_which_forwards_open",
    ),
    Bug(
        "a norm is checked once whatever its settings",
        "genfast/functional.py",
        "torch._C._are_functorch_transforms_active(), *_settings_of(n, x),",
        "torch._C._are_functorch_transforms_active(), n.kind,",
        "test_reach.py::test_a_norm_is_checked_once_for_what_looks_alike",
    ),
    Bug(
        "every group of contiguous images starts with the first",
        "kernels/norm.py",
        "image = tl.cast(group, tl.int64) * images + in_bounds(image, image < images)",
        "image = in_bounds(image, image < images).to(tl.int64)",
        NORMS,
    ),
    Bug(
        "pixels beyond a channel's last count",
        "kernels/norm.py",
        "exists = row < tl.where(image < images, tl.minimum(pixels - first, BLOCK_R), 0)",
        "exists = row < tl.where(image < images, BLOCK_R, 0)",
        NORMS,
    ),
    Bug(
        "shared statistics leave out how channels' means differ",
        "kernels/norm.py",
        "squares += tl.load(m2_ptr + offset, mask=exists, other=0.0) + n * deviation * deviation",
        "squares += tl.load(m2_ptr + offset, mask=exists, other=0.0)",
        NORMS,
    ),
    Bug(
        "the gradient of group norm forgets that channels weigh differently",
        "kernels/norm.py",
        "sum_g_xhat += scale * tl.load(sums_ptr + channels + offset, mask=exists, other=0.0)",
        "sum_g_xhat += tl.load(sums_ptr + channels + offset, mask=exists, other=0.0)",
        NORMS,
    ),
    Bug(
        "a bias before group norm gets no gradient",
        "genfast/autograd.py",
        "return self.by_batch and self.span == 1",
        "return self.by_batch",
        "test_norms.py::test_after_a_convolution",
    ),
    Bug(
        "the output of instance norm stays channels_last",
        "genfast/functional.py",
        'return norm.kind == "batch" or (norm.kind == "group" and x.device.type == "cpu")',
        "return True",
        "test_norms.py::test_outputs_and_gradients_have_pytorchs_strides",
    ),
    Bug(
        "Adam's second moment keeps its bias",
        "kernels/adam.py",
        "root2 = tl.sqrt(_one_minus_exp(t * log_beta2))",
        "root2 = 1.0",
        ADAM,
    ),
    Bug(
        "Adam's chunks count from the first weight",
        "kernels/adam.py",
        "first = (chunk - tl.load(row + FIRST_CHUNK)) * BLOCK",
        "first = chunk * BLOCK",
        ADAM,
    ),
    Bug(
        "Adam rounds the corrections of a beta close to 1",
        "kernels/adam.py",
        "return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))",
        "return 1.0 - tl.exp(x)",
        "test_adam.py::test_early_and_late_updates_correct_the_bias",
    ),
    Bug(
        "gradients of two backward passes are added in half precision",
        "genfast/training/steps/precision.py",
        "if kept:  # Gradients of an earlier backward pass: their sum is in float32.",
        "if False:",
        "test_adam.py::test_two_backward_passes_of_a_step_add_in_float32",
    ),
    Bug(
        "compiled, running statistics move by the first group's alone",
        "genfast/operators.py",
        "+ vectors[group, row] * n.momentum",
        "+ vectors[0, row] * n.momentum",
        f"{COMPILED}[discriminator-groups]",
    ),
    Bug(
        "compiled, the gradient of a contiguous weight is channels_last",
        "genfast/operators.py",
        "return layout.contiguous(gradient)",
        "return layout.channels_last(gradient)",
        f"{COMPILED}[accelerated]",
    ),
    Bug(
        "compiled, the gradients of gamma and beta change places",
        "genfast/operators.py",
        "found.append((block, (_BETA, _GAMMA)))",
        "found.append((block, (_GAMMA, _BETA)))",
        f"{COMPILED}[generator]",
    ),
    Bug(
        "compiled, a changed output is taken for leaky ReLU's",
        "genfast/operators.py",
        "keeps_input and not last.inplace",
        "False",
        "test_compile.py::test_an_output_may_be_changed_in_place_where_pytorchs_may",
    ),
    Bug(
        "an exported model holds operators of ours",
        "genfast/functional.py",
        "if is_exporting():",
        "if False:",
        "test_compile.py::test_transforms_and_exports_are_traced_as_pytorchs_layers",
    ),
    Bug(
        "fprop drops the last tap",
        "kernels/conv.py",
        "range(0, tl.cdiv(C_big, BLOCK_K) * TAPS)",
        "range(0, tl.cdiv(C_big, BLOCK_K) * TAPS - 1)",
        TILES,
    ),
    Bug(
        "a phase of dgrad takes another phase's taps",
        "kernels/conv.py",
        "ky = (py + PAD_H) % STRIDE_H",
        "ky = (px + PAD_H) % STRIDE_H",
        STRIDED,
    ),
    Bug(
        "pixels beyond the right edge are read",
        "kernels/conv.py",
        "inside = in_range(Y, H) & in_range(X, W)\n    row",
        "inside = in_range(Y, H) & (X >= 0)\n    row",
        STRIDED,
    ),
    Bug(
        "a pixel carried to the next row keeps its place in big",
        "kernels/conv.py",
        "pixel + (STRIDE_H * W_big - W_small * STRIDE_W), pixel)",
        "pixel - W_small * STRIDE_W, pixel)",
        STRIDED,
    ),
    Bug(
        "a pixel carried to the next image keeps its row",
        "kernels/conv.py",
        "Y = tl.where(beyond, Y - H_small * STRIDE_H, Y)",
        "Y = tl.where(beyond, Y, Y)",
        STRIDED,
    ),
    Bug(
        "a tap beyond the kernel counts",
        "kernels/conv.py",
        "in_kernel = (ky < KH) & (kx < KW)",
        "in_kernel = ky < KH",
        STRIDED,
    ),
    Bug(
        "a folded column is taken for its neighbour",
        "kernels/conv.py",
        "parity_x * C + c0]",
        "c0]",
        LOADERS,
    ),
    Bug(
        "a descriptor's weight loses its tap",
        "kernels/conv.py",
        "weight.load([cs0, tap * C_big + cb0])",
        "weight.load([cs0, cb0])",
        LOADERS,
    ),
    Bug(
        "each run of pixels is the first",
        "kernels/conv.py",
        "small.load([tile * PIXELS, c0])",
        "small.load([0, c0])",
        LOADERS,
    ),
    Bug(
        "the gradient of a pixel beyond the edge is summed",
        "kernels/product.py",
        "        acc = tl.where(exists[None, :], acc, 0.0)",
        "        acc = tl.where(exists[None, :], acc, acc)",
        GRADIENT,
    ),
    Bug(
        "sums of a gradient are of what is not stored",
        "kernels/product.py",
        "g = rounded(g, STORED_DTYPE)",
        "g = g",
        GRADIENT,
    ),
    Bug(
        "all groups' gradients take the first group's vectors",
        "kernels/product.py",
        "    if HAS_NORM:\n        mean, scale, shift = load_vectors(vectors_ptr, group,",
        "    if HAS_NORM:\n        mean, scale, shift = load_vectors(vectors_ptr, 0,",
        GRADIENT,
    ),
    Bug(
        "a group's gradient is stored in the next one's images",
        "genfast/launch/conv.py",
        "apart = groups if boxed and",
        "apart = groups if not boxed and",
        GRADIENT,
    ),
    Bug(
        "a phase's gradient takes the layer below at another phase",
        "kernels/conv.py",
        "values = below.load([n0, y0, py, x0,",
        "values = below.load([n0, y0, px, x0,",
        GRADIENT,
    ),
    Bug(
        "pixels of the layer below lose their channel",
        "kernels/conv.py",
        "offset = run_in_bounds(row, row < C)[:, None] + first",
        "offset = in_bounds(row, row < 0)[:, None] + first",
        GRADIENT,
    ),
    Bug(
        "an image's gradient takes the first group's vectors",
        "kernels/from_image.py",
        "acc, below, column < count, count, tile, group, cs,",
        "acc, below, column < count, count, tile, 0, cs,",
        GRADIENT,
    ),
    Bug(
        "groups of logits overlap",
        "kernels/logits.py",
        "n = (group * N + n0)",
        "n = (0 * N + n0)",
        GRADIENT,
    ),
    Bug(
        "tiles of an image that are shared unevenly overlap",
        "kernels/from_image.py",
        "first = program * tiles_per_program + tl.minimum(program, one_more)",
        "first = program * tiles_per_program",
        FROM_IMAGE,
    ),
    Bug(
        "the last pixel of an image counts again",
        "kernels/from_image.py",
        "inside = (p < pixels)[:, None]",
        "inside = (p >= 0)[:, None]",
        FROM_IMAGE,
    ),
    Bug(
        "the border of real images is what level 0 becomes",
        "kernels/from_image.py",
        "value = tl.where(inside, value * scale + shift, 0.0)",
        "value = value * scale + shift",
        "test_joining.py::test_what_is_joined_is_what_cat_makes",
    ),
    Bug(
        "part of a joined batch is taken for all of it",
        "genfast/launch/from_image.py",
        "    return geometry, x.dtype, x.shape, x.stride(), x.storage_offset()",
        "    return geometry, x.dtype, x.shape[1:], x.stride(), x.storage_offset()",
        "test_joining.py::test_only_the_whole_batch_is_taken",
    ),
    Bug(
        "rows of an image lose the taps of the row before",
        "kernels/to_image.py",
        "rows[ky] + carry[ky] if ky < CARRIED else rows[ky]",
        "rows[ky]",
        "test_to_image.py::test_borders",
    ),
    Bug(
        "pixels beyond what is normalised are the activation of a shift",
        "kernels/to_image.py",
        "on_map = (exists & ((step >= 0) & (step < H_small)))[:, None]",
        "on_map = (n >= 0)[:, None]",
        NORMALIZING,
    ),
    Bug(
        "pixels after the last that is normalised count",
        "kernels/from_image.py",
        "small = as_stored(normal, inside, small.dtype, STORED_DTYPE)",
        "small = as_stored(normal, inside | (p >= 0)[:, None], small.dtype, STORED_DTYPE)",
        NORMALIZING,
    ),
    Bug(
        "a logit is normalised by the first group's vectors",
        "kernels/logits.py",
        "group = tl.program_id(0) // group_images",
        "group = tl.program_id(0) * 0",
        NORMALIZING,
    ),
    Bug(
        "a logit's weight gradient is of what is not rounded",
        "kernels/logits.py",
        "big = tl.where((n < N)[:, None], rounded(big, STORED_DTYPE), 0.0)",
        "big = tl.where((n < N)[:, None], big, 0.0)",
        NORMALIZING,
    ),
    Bug(
        "a step with images of two groups normalises all like the last",
        "kernels/normalizing.py",
        "y = tl.where((row >= other * group_rows)[:, None], others, y)",
        "y = others",
        NORMALIZING,
    ),
    Bug(
        "splits of a logit's weight gradient overlap",
        "kernels/logits.py",
        "n = (split * steps_per_split + step) * ROWS",
        "n = (split + step) * ROWS",
        "test_logits.py::test_split_weight_gradient",
    ),
    Bug(
        "packed taps lose their column",
        "kernels/conv.py",
        "kx = tap % KW\n    Y = Y0",
        "kx = tap // KW\n    Y = Y0",
        TILES,
    ),
    Bug(
        "the last partial sum is dropped",
        "kernels/sums.py",
        "in_p = p < end",
        "in_p = p < tl.maximum(end - 1, 1)",
        "test_sums.py",
    ),
    Bug(
        "the last part of the gradient of a norm is dropped",
        "kernels/norm.py",
        "exists = p < parts",
        "exists = p < tl.maximum(parts - 1, 1)",
        STRIDED,
    ),
    Bug(
        "masked lanes address what lies beyond a tensor",
        "kernels/loading.py",
        "return tl.where(exists, index, 0)",
        "return index",
        "test_masked_lanes.py",
    ),
    Bug(
        "masked lanes of a vector address what lies beyond a tensor",
        "kernels/loading.py",
        "tl.multiple_of(tl.where(exists, index, 0), ALIGNED)",
        "tl.multiple_of(index, ALIGNED)",
        "test_masked_lanes.py",
    ),
    Bug(
        "a number of rows makes a kernel of its own",
        "kernels/norm.py",
        '@triton.jit(do_not_specialize=["rows"])\ndef normalize_activate(',
        "@triton.jit\ndef normalize_activate(",
        "test_specialisation.py",
    ),
    Bug(
        "padded rows count in the statistics",
        "kernels/product.py",
        "deviation = tl.where(exists[None, :], acc - mean[:, None], 0.0)",
        "deviation = acc - mean[:, None]",
        STRIDED,
    ),
    Bug(
        "the statistics are of values that are not rounded yet",
        "kernels/product.py",
        "acc = rounded(acc, STORED_DTYPE)",
        "acc += 0.0",
        "test_stored_values.py::test_statistics_are_of_what_is_stored",
    ),
    Bug(
        "tiles' means are not compared when statistics combine",
        "kernels/norm.py",
        "squares += n[:, None] * deviation * deviation",
        "squares += 0 * deviation",
        REDUCTIONS,
    ),
    Bug(
        "the groups swap their statistics",
        "kernels/norm.py",
        """eps)
        out = vectors_ptr + tl.cast(group, tl.int64) * 5 * channels + c""",
        """eps)
        out = vectors_ptr + (2 * first_group + groups - 1 - group) * 5 * channels + c""",
        "test_blocks.py::test_groups",
    ),
    Bug(
        "the running variance divides by n",
        "kernels/norm.py",
        """m2 / tl.maximum(count - 1.0, 1.0)
        rstd""",
        """m2 / count
        rstd""",
        STRIDED,
    ),
    Bug(
        "eps is forgotten",
        "kernels/norm.py",
        """m2 / count + eps)
        out = vectors_ptr""",
        """m2 / count)
        out = vectors_ptr""",
        STRIDED,
    ),
    Bug(
        "the gradient keeps its mean",
        "kernels/norm.py",
        "g = g - (sum_g / rows)[None, :] - xhat",
        "g = g - xhat",
        TILES,
    ),
    Bug(
        "leaky relu's gradient has another slope",
        "kernels/activation.py",
        "du = tl.where(y > 0, dy, dy * negative_slope)",
        "du = tl.where(y > 0, dy, dy * 0.01)",
        TILES,
    ),
    Bug(
        "PReLU's slopes get gradients from above 0",
        "kernels/norm.py",
        "tl.where(inside & (u <= 0), dy * u, 0.0)",
        "tl.where(inside, dy * u, 0.0)",
        "test_activations.py::test_after_norms[prelu]",
    ),
    Bug(
        "elu loses the digits of small values",
        "kernels/activation.py",
        "tl.where(u > -0.5, u * series, tl.exp(u) - 1.0)",
        "tl.exp(u) - 1.0",
        "test_activations.py::test_every_magnitude[elu]",
    ),
    Bug(
        "the derivative of gelu forgets its density",
        "kernels/activation.py",
        "du = dy * (_normal_cdf(y) + y * density)",
        "du = dy * (_normal_cdf(y) + 0 * density)",
        "test_activations.py::test_every_magnitude[gelu]",
    ),
    Bug(
        "a convolution forgets what is added",
        "kernels/product.py",
        "acc += added.to(acc.dtype)",
        "acc += 0 * added.to(acc.dtype)",
        "test_residual.py::test_sums_run_with_blocks[alone-]",
    ),
    Bug(
        "an activation after a sum lets its whole gradient through",
        "genfast/autograd.py",
        "dy = _ActivationGradient.apply(dy, of_sum, *ctx.after_sum)",
        "dy = dy + 0 * of_sum",
        "test_residual.py::test_sums_run_with_blocks[without_norm-]",
    ),
    Bug(
        "a container adds although somebody hooks it",
        "genfast/calls.py",
        "            and not has_hook(c)\n",
        "",
        "test_residual.py::test_hooks_see_the_container",
    ),
    Bug(
        "tanh loses the digits of small values",
        "kernels/activation.py",
        "near = tl.abs(u) < 0.5",
        "near = tl.abs(u) < 0.0",
        "test_edge_values.py::test_tanh_keeps_its_digits_at_every_magnitude",
    ),
    Bug(
        "every GPU has the grids of one",
        "genfast/launch/passes.py",
        "predict.chip(start.architecture(tensor)).multiprocessors",
        "132",
        "test_grids.py",
    ),
    Bug(
        "relu swallows NaN",
        "kernels/activation.py",
        "tl.where(u <= 0, 0.0, u)",
        "tl.where(u > 0, u, 0.0)",
        "test_edge_values.py::test_special_pixel",
    ),
    Bug(
        "momentum weighs the old statistics",
        "kernels/norm.py",
        "running_mean * (1.0 - momentum) + mean * momentum",
        "running_mean * momentum + mean * (1.0 - momentum)",
        STRIDED,
    ),
    Bug(
        "a tile's right pixels exist where its left ones do",
        "kernels/product.py",
        "_sum_squared_deviations(right, right_exists, mean)",
        "_sum_squared_deviations(right, left_exists, mean)",
        "test_configurations.py::test_shipped_tile",
    ),
    Bug(
        "the KL divergence has a sign wrong",
        "kernels/sampling.py",
        "_expm1(logvar) - logvar",
        "_expm1(logvar) + logvar",
        SAMPLING,
    ),
    Bug(
        "the labels of a loss are the wrong way round",
        "kernels/losses.py",
        "wrong = tl.where(is_real, -x, x)",
        "wrong = tl.where(is_real, x, -x)",
        LOSSES,
    ),
    Bug(
        "the gradient of a loss forgets the targets",
        "kernels/losses.py",
        "slope = sigmoid(x) - tl.load(",
        "slope = sigmoid(x) - 0 * tl.load(",
        LOSSES,
    ),
    Bug(
        "an average follows half-precision copies",
        "genfast/training/steps/gan.py",
        """        losses = super()._step_in_precision(images)
        # By now the generator holds its own weights again.
        if self._average and self._turn().generator_trains:
            self._average.update()
        return losses
""",
        """        with self._precision.weights():
            losses = self._step(images)
            if self._average:
                self._average.update()
        return losses
""",
        "test_average.py",
    ),
    Bug(
        "an average forgets batch norm's statistics",
        "genfast/training/steps/average.py",
        "return [*module.parameters(), *module.buffers()]",
        "return [*module.parameters()]",
        "test_average.py",
    ),
    Bug(
        "the penalty of wgan-gp wants gradients of 0",
        "genfast/training/steps/penalties.py",
        "(norms - self.norm).square()",
        "norms.square()",
        PENALTIES,
    ),
    Bug(
        "the penalty r1 is twice as large",
        "genfast/training/steps/penalties.py",
        '"r1": Penalty((_real,), norm=0.0, weight=10.0, factor=0.5)',
        '"r1": Penalty((_real,), norm=0.0, weight=10.0, factor=1.0)',
        PENALTIES,
    ),
    Bug(
        "the penalty r1-r2 is that of real images twice",
        "genfast/training/steps/penalties.py",
        "Penalty((_real, _fake),",
        "Penalty((_real, _real),",
        EXTENSIONS,
    ),
    Bug(
        "a penalty now and then has no larger weight",
        "genfast/training/steps/gan.py",
        'above_0("penalty_weight", weight) * self._penalty_every',
        'above_0("penalty_weight", weight)',
        EXTENSIONS,
    ),
    Bug(
        "a resumed step counts its calls from 0",
        "genfast/training/steps/base.py",
        'self.calls = state.get("counters", {"calls": 0})["calls"]',
        "self.calls = 0",
        "test_gan_extensions.py::test_a_run_and_its_resume",
    ),
    Bug(
        "an average moves at calls that leave the generator",
        "genfast/training/steps/gan.py",
        "if self._average and self._turn().generator_trains:",
        "if self._average:",
        "test_gan_extensions.py::test_an_average_moves_when_the_generator_does",
    ),
    Bug(
        "spectral norm makes an iteration at every pass",
        "genfast/training/steps/spectral.py",
        "                norm.training = False\n",
        "                norm.training = True\n",
        EXTENSIONS,
    ),
    Bug(
        "a turn's graph reads memory that the next recording lets go",
        "genfast/training/steps/capture.py",
        "self._read = [part.recorded for part in (*self._half_weights, *self._updates)]",
        "self._read = None",
        "test_gan_extensions.py::test_memory_that_a_graph_reads_outlives_the_next_recording",
    ),
    Bug(
        "a penalty's gradient in fp16 stays scaled",
        "genfast/training/steps/precision.py",
        "return found / scale if scaler else found",
        "return found",
        "test_gan_extensions.py::test_gradients_of_scaled_losses_are_scaled_back",
    ),
    Bug(
        "a translated image's gradient is not moved back",
        "genfast/training/steps/augment.py",
        "_Moved.apply(gradient, -down, -right)",
        "_Moved.apply(gradient, down, right)",
        "test_augment.py",
    ),
    Bug(
        "saturation has the brightness of one channel for grey",
        "genfast/training/steps/augment.py",
        "grey = images.mean(1, keepdim=True)",
        "grey = images[:, :1]",
        "test_augment.py",
    ),
    Bug(
        "updates that were passed over leave their statistics",
        "genfast/training/steps/finite.py",
        "buffer.copy_(torch.where(finite, buffer, value))",
        "pass",
        "test_finite_updates.py",
    ),
    Bug(
        "gradients in fp16 are clipped while they are scaled",
        "genfast/training/steps/precision.py",
        "            scaler.unscale_(self._optimizers[optimizer])\n",
        "            pass\n",
        "test_finite_updates.py",
    ),
    Bug(
        "a penalty computes gradients that are thrown away",
        "genfast/autograd.py",
        "needs = [need and not tensor.is_leaf for need, tensor in pairs]",
        "needs = [need for need, tensor in pairs]",
        "test_gan_extensions.py::test_a_penalty_computes_no_gradient_that_is_thrown_away",
    ),
    Bug(
        "a critic that cannot tell has won",
        "genfast/training/runs/loop.py",
        'won = loss_log.lost >= len(batches) and config.loss != "wgan"',
        "won = loss_log.lost >= len(batches)",
        "test_gan_extensions.py::test_a_critic_that_cannot_tell_has_not_won",
    ),
    Bug(
        "least squares pull generated images to the label 1 too",
        "kernels/losses.py",
        "slope = tl.where(is_real, x - 1.0, x)",
        "slope = x - 1.0",
        "test_losses.py::test_gan_losses",
    ),
    Bug(
        "a hinge has no end",
        "kernels/losses.py",
        "slope = tl.where(margin <= 0, 0.0, tl.where(is_real, -1.0, 1.0))",
        "slope = tl.where(is_real, -1.0, 1.0)",
        "test_losses.py::test_gan_losses",
    ),
    Bug(
        "a critic's loss forgets the labels",
        "kernels/losses.py",
        "value = tl.where(is_real, -x, x)",
        "value = x",
        "test_losses.py::test_gan_losses",
    ),
    Bug(
        "of a pair only the real image gets a gradient",
        "kernels/losses.py",
        "tl.store(dlogits_ptr + terms + i, -dx, mask=exists)",
        "tl.store(dlogits_ptr + terms + i, 0.0 * dx, mask=exists)",
        "test_losses.py::test_gan_losses",
    ),
    Bug(
        "a minimax generator minimises what it should maximise",
        "genfast/losses.py",
        "return _loss(logits, 0, -logits.numel(), self.generator_kind)",
        "return _loss(logits, 0, logits.numel(), self.generator_kind)",
        "test_losses.py::test_gan_losses",
    ),
    Bug(
        "the gradient of a loss is taken for any factor",
        "genfast/autograd.py",
        "elif dlogits is None or not _is_one(dloss):",
        "elif dlogits is None:",
        "test_losses.py::test_the_gradient_for_a_dloss_of_one_is_there_already",
    ),
    Bug(
        "generated images are found although somebody changed them",
        "genfast/launch/from_image.py",
        "if (x._version, copy.data._version) != (copy.images_version, copy.data_version):",
        "if False:",
        "test_joining.py::test_generated_images_are_not_found_where_either_changed",
    ),
    Bug(
        "a tape is replayed for tensors of any alignment",
        "genfast/launch/tape.py",
        "t.data_ptr() % 16 for t",
        "0 for t",
        "test_tape.py::test_tensors_of_other_kinds_are_not_replayed",
    ),
    Bug(
        "a replayed view begins where its memory does",
        "genfast/launch/tape.py",
        "t.as_strided(size, stride, t.storage_offset() + offset)",
        "t.as_strided(size, stride, t.storage_offset())",
        "test_tape.py",
    ),
    Bug(
        "a kernel that is started again gets its arguments in the caller's order",
        "genfast/launch/start.py",
        "given[self._places[name]] = value",
        "given[list(arguments).index(name)] = value",
        "test_tape.py::test_what_starts_again_reaches_the_driver_as_triton_would_have_it",
    ),
    Bug(
        "a replay lets go of what it gives",
        "genfast/launch/tape.py",
        "step.releases = sorted(step.slots - needed - given)",
        "step.releases = sorted(step.slots - given)",
        "test_tape.py",
    ),
    Bug(
        "a recording takes a stranger's memory for its own",
        "genfast/launch/tape.py",
        'self._why = "two of the tensors share memory"',
        "pass",
        "test_tape.py::test_tensors_that_share_memory_are_not_recorded",
    ),
    Bug(
        "every row gets the same noise",
        "kernels/sampling.py",
        "n[:, None].to(tl.int64) * quarter + i[None, :]",
        "n[:, None].to(tl.int64) * 0 + i[None, :]",
        SAMPLING,
    ),
    Bug(
        "backward draws other noise",
        "kernels/sampling.py",
        "            noise = _normals(seed,",
        "            noise = _normals(seed + 1,",
        SAMPLING,
    ),
    Bug(
        "what hides under transparent pixels is trained on",
        "genfast/training/data/decoding.py",
        'canvas.paste(part.convert("RGB"), box, alpha)',
        'canvas.paste(part.convert("RGB"), box)',
        "test_transparency.py",
    ),
    Bug(
        "a run removes checkpoints of others that lie among its own",
        "genfast/training/runs/kept.py",
        "for path in in_folder(self._folder) if self._is_own(path)]",
        "for path in in_folder(self._folder)]",
        "test_run_outputs.py::test_pruning_removes_no_file_of_others",
    ),
    Bug(
        "a short run leaves no picture",
        "genfast/training/runs/loop.py",
        "if step == self._total or (self._every and step % self._every == 0):",
        "if self._every and step % self._every == 0:",
        "test_run_outputs.py::test_pictures_of_epochs_and_of_the_last_step",
    ),
    Bug(
        "single pictures take the place of what came there meanwhile",
        "genfast/training/runs/samples.py",
        'with open(path, "xb") as file:',
        'with open(path, "wb") as file:',
        "test_looking.py::test_a_picture_that_comes_meanwhile_stays",
    ),
    Bug(
        "the way between two seeds is straight",
        "genfast/training/runs/latents.py",
        "if sine < 1e-6:",
        "if True:",
        "test_looking.py::test_the_way_between_two_latents",
    ),
    Bug(
        "a run trains on its own sample pictures",
        "genfast/training/data/folders.py",
        "        return identity != self._run\n",
        "        return True\n",
        "test_data_folders.py",
    ),
    Bug(
        "each process on a machine takes all of its memory for its own",
        "genfast/training/memory.py",
        "*_free_in_cgroups()]) // processes_here()",
        "*_free_in_cgroups()])",
        "test_hostile_data.py::test_processes_on_one_machine_share_its_memory",
    ),
    Bug(
        "a claim of pixels is believed",
        "genfast/training/data/arrays.py",
        "    require_memory(count, what)\n",
        "",
        "test_hostile_data.py",
    ),
    Bug(
        "a gradient leaves in the kernels' memory format",
        "genfast/layout.py",
        "return _Border.apply(gradient, ctx.outside, ctx.inside), None, None",
        "return gradient, None, None",
        "test_layout.py::test_outputs_and_gradients_have_pytorchs_strides",
    ),
    Bug(
        "an output that was changed in place is taken for what it was",
        "genfast/autograd.py",
        "if y is not None and y._version == version:",
        "if y is not None:",
        "test_layout.py::test_what_follows_leaky_relu_may_change_it_in_place",
    ),
    Bug(
        "batch norm on a CPU gets memory that it sums less exactly",
        "genfast/cpu.py",
        "return layout.channels_last(y) if channels_last else layout.contiguous(y)",
        "return layout.channels_last(y)",
        "test_cpu.py::test_batch_norm_is_as_exact_as_pytorchs",
    ),
    Bug(
        "where bfloat16 pays, float32 layers too go through the checks of a block",
        "genfast/cpu.py",
        "bfloat16_pays = has_bfloat16() and _bfloat16_pays(autocast_dtype(x))",
        "bfloat16_pays = has_bfloat16()",
        "test_cpu.py::test_layers_that_gain_nothing_are_called_themselves",
    ),
    Bug(
        "channels_last is not brought to the weights",
        "genfast/convert.py",
        "t.to(memory_format=torch.channels_last) if t.dim() == 4 else t",
        "t",
        "test_modules.py::test_channels_last_on_request",
    ),
    Bug(
        "both ways agree as they are, so no other weights are tried",
        "genfast/training/steps/merging.py",
        "for seed in (None, 1, 2):",
        "for seed in (None,):",
        "test_discriminators.py::test_merging_a_forward_of_ones_own_is_found_out",
    ),
    Bug(
        "what 1 - sigmoid makes counts as a final Sigmoid",
        "genfast/training/steps/judge.py",
        "    return bool((widen(slopes).flatten() - expected).abs().max() <= tolerance)",
        "    return True",
        "test_discriminators.py::test_other_probabilities_are_refused",
    ),
    Bug(
        "a VAE that ends in tanh is asked for images in [0, 1]",
        "genfast/training/steps/vae.py",
        "            images = 2 * images - 1\n        reconstruction, kl",
        "            images = 1 * images\n        reconstruction, kl",
        "test_vae_step.py::test_the_step_is_the_plain_one",
    ),
    Bug(
        "a checkpoint of NaN replaces the last good one",
        "genfast/training/runs/loop.py",
        "if saving or drawing:\n                            _check_weights(step, done)",
        "if saving and drawing:\n                            _check_weights(step, done)",
        "test_finite_weights.py",
    ),
    Bug(
        "a first use is timed into a graph",
        "genfast/launch/first_use.py",
        "if is_captured(device):",
        "if False:",
        "test_first_use.py::test_nothing_is_timed_into_a_graph",
    ),
    Bug(
        "who times a first use writes over what others have found meanwhile",
        "genfast/launch/timings.py",
        "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        "test_first_use.py::test_processes_that_write_at_once",
    ),
    Bug(
        "two runs share a folder's lock",
        "genfast/training/runs/lock.py",
        "fcntl.LOCK_EX | fcntl.LOCK_NB",
        "fcntl.LOCK_SH | fcntl.LOCK_NB",
        "test_run_folder.py::test_many_take_turns_and_never_two_at_once",
    ),
    Bug(
        "a kernel does not wait for the one before it",
        "kernels/sums.py",
        "    wait_for_previous()\n",
        "",
        OVERLAP,
    ),
    Bug(
        "a kernel waits too late",
        "kernels/logits.py",
        "    wait_for_previous()\n    n = tl.program_id(0).to(tl.int64)\n    big_ptr += n * K\n",
        "    n = tl.program_id(0).to(tl.int64)\n    big_ptr += n * K\n    wait_for_previous()\n",
        OVERLAP,
    ),
    Bug(
        "kernels that do not wait start early",
        "genfast/launch/start.py",
        'return function.__code__.co_names[:1] == ("wait_for_previous",)',
        "return True",
        OVERLAP,
    ),
    Bug(
        "no kernel starts early",
        "genfast/launch/start.py",
        "dict(launch_pdl=True) if starts_early(kernel.fn, device) else {}",
        "{}",
        OVERLAP,
    ),
    Bug(
        "the next kernel is let in only when this one has ended",
        "kernels/overlap.py",
        "        tl.extra.cuda.gdc_launch_dependents()\n",
        "",
        OVERLAP,
    ),
    Bug(
        "kernels wait on GPUs that cannot",
        "kernels/overlap.py",
        "if tl.target_info.cuda_capability_geq(9, 0):",
        "if True:",
        OVERLAP,
    ),
    Bug(
        "a value that others read too is fused away",
        "genfast/rewriting.py",
        "if target not in (None, name) and self._loads[name] != 1:",
        "if False:",
        REWRITING,
    ),
    Bug(
        "what a handler of an exception reads is fused away",
        "genfast/rewriting.py",
        "merging = merging and not isinstance(node, ast.Try)",
        "pass",
        REWRITING,
    ),
    Bug(
        "what comes later is looked up before a hook may change it",
        "genfast/calls.py",
        "if layer is None or not runs_undisturbed(layer):",
        "if layer is None:",
        "test_rewriting.py::test_what_a_layer_does_to_its_owner_is_seen_by_the_next_statement",
    ),
    Bug(
        "a method whose source is not what runs is rewritten",
        "genfast/source.py",
        "if not _same_code(_compiled(",
        "if not _compiled and not _same_code(_compiled(",
        "test_rewriting.py::test_what_is_left_alone",
    ),
    Bug(
        "spectral norm moves twice a forward",
        "genfast/nn.py",
        "        set_weight(conv, ())\n",
        "        set_weight(conv, ())\n        set_weight(conv, ())\n",
        "test_modules.py::test_spectral_norm_moves_once_a_forward",
    ),
    Bug(
        "export the newest generator for the average",
        "genfast/training/runs/exporting.py",
        "network = step.average.module if step.average and ema else step.generator",
        "network = step.generator",
        "test_export.py::test_the_newest_generator_on_request",
    ),
    Bug(
        "generated images are judged for another image's class",
        "genfast/training/steps/labels.py",
        "if each else self._current.repeat(times)",
        "if not each else self._current.repeat(times)",
        "test_conditional.py::test_a_step_is_that_of_a_plain_loop",
    ),
    Bug(
        "labels that are not in the graph's memory",
        "genfast/training/steps/labels.py",
        "        return place.copy_(labels)",
        "        return labels.clone()",
        "test_conditional.py::test_a_captured_step_reads_the_labels_of_each_batch",
    ),
    Bug(
        "an image that was skipped leaves its label",
        "genfast/training/data/sources.py",
        "    return images[:, :1].contiguous() if grey else images, values",
        "    return images[:, :1].contiguous() if grey else images, names[:count]",
        "test_labels.py::test_folders_are_classes",
    ),
    Bug(
        "batches gathered ahead have the labels of later ones",
        "genfast/training/data/batches.py",
        "labels = self.labels.index_select(0, ahead.popleft())",
        "labels = self.labels.index_select(0, ahead.pop())",
        "test_labels.py::test_batches_hold_the_labels_of_their_images",
    ),
    Bug(
        "transforms of a data set draw the same in every epoch",
        "genfast/training/data/datasets.py",
        "_seed_all(seed, epoch, number)",
        "_seed_all(seed, number)",
        DATA_SETS,
    ),
    Bug(
        "reading a data set uses up a random number of the training",
        "genfast/training/data/datasets.py",
        "generator=torch.Generator(),",
        "",
        DATA_SETS,
    ),
    Bug(
        "a GAN's step trains on floats from 0 to 1",
        "genfast/training/image_range.py",
        "low < 0 <= found_low < found_high",
        "low == 0 <= found_low < found_high",
        "test_loaders_batches.py::test_floats_from_0_to_1_are_no_floats_from_minus_1_on",
    ),
    Bug(
        "levels that a wide range has rounded tell how far images go in it",
        "genfast/training/data/datasets.py",
        "lightest - darkest <= 1 + NARROW * 255",
        "0 < lightest - darkest < NARROW",
        "test_datasets.py::test_a_range_far_wider_than_the_images_is_told",
    ),
    Bug(
        "names of classes of a run's beginning are counted and not read",
        "genfast/training/runs/beginning.py",
        "        if other != name:\n",
        "        if False:\n",
        "test_example_weights.py::test_labels_of_the_weights_mean_what_those_of_the_images_do",
    ),
    Bug(
        "a run does not note its beginning",
        "genfast/training/runs/loop.py",
        "config = replace(config, init_from=init_from.paths)",
        "pass",
        "test_example_weights.py::test_a_run_begins_with_another",
    ),
    Bug(
        "any error that speaks of gloo is a lost process",
        "genfast/training/runs/workers.py",
        '    r"|Application timeout caused pair closure"\n',
        '    r"|Application timeout caused pair closure|gloo"\n',
        "test_workers.py::test_errors_of_a_lost_process",
    ),
    Bug(
        "a run goes on with any number of processes until there are too few images",
        "genfast/training/runs/api.py",
        "resume_from, out, processes)",
        "resume_from, out)",
        "test_workers.py::test_a_run_goes_on_with_no_more_processes_than_its_batches_are_for",
    ),
    Bug(
        "a script's processes all tell why one of them ends",
        "genfast/training/runs/workers.py",
        "    if not isinstance(error, Elsewhere):\n        before",
        "    if True:\n        before",
        "test_workers.py::test_one_process_tells_why_a_script_ends",
    ),
    Bug(
        "a script's first mistake is told by each process at once",
        "genfast/training/runs/workers.py",
        "error.needs_time = not is_first_here()",
        "error.needs_time = False",
        "test_workers.py::test_one_process_tells_why_a_script_ends",
    ),
    Bug(
        "projection of features that are not summed over pixels",
        "genfast/models/dcgan.py",
        "features.sum((2, 3), dtype=wide)",
        "features.mean((2, 3), dtype=wide)",
        "test_conditional.py::test_a_step_is_that_of_a_plain_loop",
    ),
    Bug(
        "importance samples: log q lacks the log-variance",
        "kernels/sampling.py",
        "kl += shift * (2.0 * noise + shift) - logvar",
        "kl += shift * (2.0 * noise + shift)",
        "test_importance_samples.py::test_samples_and_gradients",
    ),
    Bug(
        "importance samples: only the first tile of samples is drawn again",
        "kernels/sampling.py",
        "row = n * samples + first + tl.arange(0, BLOCK_K)",
        "row = n * samples + 0 * first + tl.arange(0, BLOCK_K)",
        "test_importance_samples.py::test_samples_and_gradients",
    ),
    Bug(
        "importance samples: the mean of logarithms, not the logarithm of the mean",
        "genfast/losses.py",
        "return (math.log(kl.shape[1]) - log_weights.logsumexp(1)).sum()",
        "return -log_weights.mean(1).sum()",
        "test_importance_samples.py::test_the_bound_of_a_model_whose_likelihood_is_known",
    ),
    Bug(
        "beta: the warm-up begins at once with all of it",
        "genfast/training/steps/kl_weight.py",
        "(self.steps / self._warmup)",
        "(self.steps / 1)",
        "test_vae_family.py::test_a_step_is_that_of_a_plain_loop",
    ),
    Bug(
        "measuring held-out images uses up random numbers",
        "genfast/training/runs/held_out.py",
        'with torch.random.fork_rng([device] if device.type == "cuda" else []):',
        "for device in [device]:",
        "test_vae_family.py::test_a_run_with_images_kept_aside_and_its_resume",
    ),
    Bug(
        "VAE/GAN: the encoder's loss trains the decoder too",
        "genfast/training/steps/vae_gan.py",
        'inputs=self._trained("encoder"), again=True',
        "again=True",
        "test_vae_gan.py::test_a_step_is_that_of_a_plain_loop",
    ),
    Bug(
        "an image is its own nearest neighbour",
        "genfast/training/evaluation/sets.py",
        "            block.fill_diagonal_(torch.inf)\n",
        "            pass\n",
        "test_metrics.py::test_neighbours",
    ),
    Bug(
        "the kernel distance compares images with themselves",
        "genfast/training/evaluation/kernel_distance.py",
        "k.sum() - k.diagonal().sum()",
        "k.sum()",
        "test_metrics.py::test_kernel_distance",
    ),
    Bug(
        "samples are measured in another range of pixels",
        "genfast/training/evaluation/measuring.py",
        ", step.pixel_range) for",
        ", (0, 1)) for",
        "test_evaluate.py::test_what_is_measured",
    ),
    Bug(
        "the base of oblong images has height for width",
        "genfast/models/sizes.py",
        "(height >> halvings, width >> halvings)",
        "(width >> halvings, height >> halvings)",
        "test_sizes.py::test_the_smaller_side_is_halved_to_4_to_7",
    ),
    Bug(
        "pictures of a folder have the shape asked for on its side",
        "genfast/training/data/decoding.py",
        "image_ops.fit(opaque, size[::-1],",
        "image_ops.fit(opaque, size,",
        "test_sizes.py::test_oblong_images_of_files_and_arrays",
    ),
    Bug(
        "arrays are cropped to the shape asked for on its side",
        "genfast/training/data/sources.py",
        "    (height, width), (h, w) = found, size",
        "    (height, width), (w, h) = found, size",
        "test_sizes.py::test_oblong_images_of_files_and_arrays",
    ),
    Bug(
        "an average begins with random weights beside a generator that does not",
        "genfast/training/runs/beginning.py",
        'if average and "generator" in self.modules:',
        'if average and "average" in self.modules:',
        "test_example_weights.py::test_a_run_begins_with_both_networks",
    ),
    Bug(
        "names of the example's weights keep the prefix of parallel training",
        "genfast/training/runs/example_weights.py",
        "str(name).removeprefix(_PREFIX)",
        "str(name)",
        "test_example_weights.py::test_a_generator_draws_what_the_example_draws",
    ),
    Bug(
        "a terminal that lacks a letter ends a command",
        "genfast/cli/streams.py",
        "except UnicodeEncodeError:",
        "except UnicodeDecodeError:",
        "test_sentences.py::test_a_terminal_that_lacks_letters",
    ),
    Bug(
        "a conditional gan's generator without batch norm",
        "genfast/training/runs/config.py",
        'settings |= kind.with_labels if given.get("conditional") else {}',
        'settings |= kind.with_labels if given.get("labelled") else {}',
        "test_conditional.py::test_the_perceptrons_have_batch_norm_where_a_run_is_conditional",
    ),
    Bug(
        "what a layer is given beside is looked up before all calls",
        "genfast/rewriting.py",
        "return [*links[:1], *map(self._late, links[1:])]",
        "return links",
        "test_residual.py::test_what_a_layer_is_given_beside_is_looked_up_when_it_is_called",
    ),
    Bug(
        "a sum that reflection parts from its chain keeps the kernels' memory format",
        "genfast/functional.py",
        "if decides or seen == layout.is_channels_last(x):",
        "if True:",
        "test_residual.py::test_blocks_that_reflect_add_too",
    ),
    Bug(
        "a gate of the first half of the channels is taken for GLU's",
        "genfast/own_glu.py",
        "([_SECOND], {}), _GATE)",
        "(values, {}), _GATE)",
        "test_own_glu.py",
    ),
    Bug(
        "a class that was changed since still counts as GLU",
        "genfast/own_glu.py",
        'kind in _found and getattr(kind, "forward", None) is _found[kind]',
        "kind in _found",
        "test_own_glu.py",
    ),
    Bug(
        "a gradient that is stored nowhere is not rounded either",
        "kernels/dgrad_wgrad.py",
        "as_stored(acc, True, window.dtype, STORED_DTYPE)",
        "acc.to(window.dtype)",
        DGRAD_WGRAD,
    ),
    Bug(
        "what lies beyond the edge of a box meets windows",
        "kernels/dgrad_wgrad.py",
        "zero_beyond(acc, exists, count), y,",
        "acc, y,",
        DGRAD_WGRAD,
    ),
    Bug(
        "all rows of phases meet the windows of the first",
        "kernels/dgrad_wgrad.py",
        "(y0 * STRIDE_H + py) * row_step",
        "y0 * STRIDE_H * row_step",
        DGRAD_WGRAD,
    ),
    Bug(
        "an image's own gradient is left out where its weight's comes with the one above",
        "genfast/autograd.py",
        "if i == 1 and not need_x and needs[0][0]:",
        "if i == 1 and needs[0][0]:",
        "test_dgrad_wgrad.py::test_where_it_runs",
    ),
)


def run_tests(folder, tests):
    """pytest's exit status and the first test that failed, None if none did."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"tests/{tests}"], cwd=folder, env=environment, capture_output=True, text=True
    )
    failed = re.search(r"^FAILED tests/(\S+)", done.stdout, re.MULTILINE)
    return done.returncode, failed and failed.group(1)


def copy_of_the_project(folder):
    for name in COPIED:
        source, target = ROOT / name, Path(folder) / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)


def plant(bug):
    """(whether the bug was noticed, one line about it)."""
    with tempfile.TemporaryDirectory() as folder:
        copy_of_the_project(folder)
        file = Path(folder) / bug.file
        text = file.read_text(encoding="utf-8")
        if text.count(bug.old) != 1:
            return False, f"the code it changes stands {text.count(bug.old)} times in {bug.file}"
        file.write_text(text.replace(bug.old, bug.new), encoding="utf-8")
        status, failed = run_tests(folder, bug.tests)
    if status == 0:
        return False, f"SURVIVED {bug.tests}"
    # Status 1 means that tests failed; any other, that pytest itself could not run or died.
    return failed is not None, failed or f"pytest ended with status {status} and no failed test"


def check_that_tests_pass(selections, workers):
    """Without a bug every selection must pass, else its failures would prove nothing."""
    with tempfile.TemporaryDirectory() as folder:
        copy_of_the_project(folder)
        with ThreadPoolExecutor(workers) as pool:
            results = list(pool.map(lambda tests: run_tests(folder, tests), selections))
    for tests, (status, failed) in zip(selections, results, strict=True):
        if status:
            sys.exit(f"{tests} fails without any bug: {failed or f'status {status}'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="plant only bugs whose name has one of these")
    words = parser.parse_args().words
    bugs = [b for b in BUGS if not words or any(word in b.name for word in words)]
    if not bugs:
        sys.exit(f"expected words from the name of a bug, got {words}")
    workers = os.cpu_count() or 1
    check_that_tests_pass(sorted({bug.tests for bug in bugs}), workers)
    survivors = 0
    with ThreadPoolExecutor(workers) as pool:
        for bug, (noticed, line) in zip(bugs, pool.map(plant, bugs), strict=True):
            survivors += not noticed
            print(f"{'noticed' if noticed else 'MISSED '}  {bug.name:55} {line}", flush=True)
    print(f"{len(bugs) - survivors} passed, {survivors} failed")
    sys.exit(survivors > 0)


if __name__ == "__main__":
    main()
