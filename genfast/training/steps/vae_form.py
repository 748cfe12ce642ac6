"""What a VAE that is not genfast's takes and gives, found out by running it once."""

from collections.abc import Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

# Names under which public models return these: PyTorch's example and its kin, pythae's encoders
# and decoders, diffusers' distributions.
_MEANS = ("mu", "mean", "z_mean", "embedding")
_LOGVARS = ("logvar", "log_var", "z_logvar", "z_log_var", "log_variance", "log_covariance")
_RECONSTRUCTIONS = ("reconstruction", "recon", "recon_x", "x_recon", "sample")

# Autograd's names of operations that only move values or convert them.
_MOVES = {
    "Alias", "AsStrided", "Clone", "Expand", "Permute", "PixelShuffle", "ReshapeAlias", "Select",
    "Slice", "Split", "SplitWithSizes", "Squeeze", "T", "ToCopy", "Transpose", "Unbind",
    "UnsafeView", "Unsqueeze", "View",
}  # fmt: skip
# Operations that tell in what range their results lie: never below 0, and without any bound,
# wherever those of one batch happen to lie.
_PROBABILITIES = {"Hardsigmoid", "Sigmoid", "Softmax"}
_POSITIVE = {"Abs", "Exp", "Relu", "Softplus", "Sqrt", "Square", *_PROBABILITIES}
_CLIPPING = {"Clamp", "ClampMax", "ClampMin", "Hardtanh"}
_OPEN = {
    "Addmm", "Baddbmm", "Bmm", "Convolution", "CudnnBatchNorm", "LeakyRelu",
    "MkldnnConvolution", "Mm", "NativeBatchNorm", "NativeGroupNorm", "NativeLayerNorm",
    "UpsampleBilinear2D", "UpsampleNearest2D",
}  # fmt: skip


class Decoder(NamedTuple):
    """What a decoder's images are.

    end: "unit" for probabilities, "tanh" for other values from -1 to 1 as far as they are bounded,
        "positive" for other values from 0 up, else "open".
    sigmoid: the module whose result they are, where that is a `nn.Sigmoid` that runs once.
    """

    end: str
    sigmoid: nn.Sigmoid | None = None


def coders(model):
    """The names of a model's functions that encode and decode, or None where it has not both.

    Those are its methods, or the modules `encoder` and `decoder` of one without a `forward` of its
    own, as `nn.ModuleDict` is: what else a `forward` does between the two, nobody can tell.
    """
    names = [("encode", "decode")]
    if getattr(type(model), "forward", None) is nn.Module.forward:
        names.append(("encoder", "decoder"))
    return next((n for n in names if all(callable(getattr(model, part, None)) for part in n)), None)


def posterior(result):
    """The mean and log-variance in what `encode` gave; ValueError unless they are there."""
    pair = _named(result, _MEANS), _named(result, _LOGVARS)
    if any(t is None for t in pair) and isinstance(result, tuple | list) and len(result) == 2:
        pair = tuple(result)
    if not (_are_tensors(pair) and pair[0].shape == pair[1].shape and pair[0].dim() > 1):
        raise ValueError(
            "expected encode to give a mean and a log-variance of one shape (N, ...), got "
            f"{describe(result)}; an adapter can give them"
        )
    return pair


def decoded(result):
    """The images in what `decode` gave; ValueError unless they are there."""
    found = result if isinstance(result, torch.Tensor) else _named(result, _RECONSTRUCTIONS)
    if found is None:
        raise ValueError(f"expected decode to give images, got {describe(result)}")
    return found


def adapted(result):
    """(reconstruction, mu, logvar), what an adapter gave; ValueError unless it is that."""
    right = isinstance(result, tuple | list) and len(result) == 3 and _are_tensors(result)
    if not right or result[1].shape != result[2].shape or result[1].dim() < 2:
        raise ValueError(
            "expected the adapter to give (reconstruction, mu, logvar), the last two of one shape "
            f"(N, ...), got {describe(result)}"
        )
    return tuple(result)


def as_they_are(images):
    """Images (N, C, H, W), channels_last."""
    return images


def contiguous(images):
    """For encoders that `view` them, or what their layers make of them, as rows."""
    return images.contiguous()


def rows(images):
    """(N, C * H * W)."""
    return images.flatten(1)


def presentation(function, images):
    """How a function wants its images, one of the three above, and what it gave.

    Raises:
        ValueError: it takes them in none of these forms.
    """
    first = None
    for present in (as_they_are, contiguous, rows):
        try:
            return present, function(present(images))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            first = first or error
    raise ValueError(
        f"expected a model that takes images of shape {tuple(images.shape)} or rows of pixels, got "
        f"{_words(first)}"
    ) from first


def decode(function, z):
    """`decoded` of what `decode` makes of latents; ValueError if it does not take them."""
    try:
        result = function(z)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ValueError(
            f"expected decode to take latents of shape {tuple(z.shape)}, got {_words(error)}"
        ) from error
    return decoded(result)


def check_latent(images, mu, logvar):
    """ValueError unless there is one mean an image and the log-variance can be one.

    If that ends in an operation that makes it positive, it is a scale or a parameter of another
    distribution.
    """
    if len(mu) != len(images):
        raise ValueError(f"expected one latent for each of {len(images)} images, got {len(mu)}")
    operation, _ = _last_operation(logvar, past_constants=True)
    if operation in _POSITIVE:
        raise ValueError(
            "expected a mean and a log-variance, which may be below 0, got a second tensor that "
            f"ends in {operation.lower()}; an adapter can give its logarithm"
        )


def check_reconstruction(images, reconstruction):
    """ValueError unless these can be reconstructions of the images (N, C, H, W)."""
    n, c, h, w = images.shape
    if reconstruction.shape in ((n, c, h, w), (n, c * h * w)) or (
        c == 1 and reconstruction.shape == (n, h, w)
    ):
        return
    raise ValueError(
        f"expected reconstructions of the images' shape, {(n, c, h, w)}, or rows of {c * h * w} "
        f"values, got shape {tuple(reconstruction.shape)}"
    )


def watched(model, run):
    """What `run()` gives, which ends in a decoder's images, and the `Decoder` that gave them.

    run: returns (images, ...); gradients must be wanted, for what is found is autograd's record.
    """
    ran = []
    sigmoids = [m for m in model.modules() if type(m) is nn.Sigmoid and not m._forward_hooks]
    hooks = [
        m.register_forward_hook(lambda module, _, result: ran.append((module, result.grad_fn)))
        for m in sigmoids
    ]
    try:
        images, *others = run()
    finally:
        for hook in hooks:
            hook.remove()
    operation, node = _last_operation(images)
    last = [module for module, its_node in ran if its_node is node and node is not None]
    alone = last and sum(module is last[0] for module, _ in ran) == 1
    decoder = Decoder(_end(operation, node, images), last[0] if alone else None)
    return (images, *others), decoder


@contextmanager
def skipped(module):
    """Within, the module gives what it takes, and a list grows at each time; None is no module."""
    skips = []
    if module is None:
        yield skips
        return

    def skip(module, inputs, _):
        skips.append(module)
        return inputs[0]

    hook = module.register_forward_hook(skip)
    try:
        yield skips
    finally:
        hook.remove()


def unused_parameters(model, *results):
    """The names of trainable parameters that took no part in these results."""
    nodes = [t.grad_fn for t in results if t.grad_fn is not None]
    seen, used = set(nodes), set()
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            used.add(id(node.variable))
        following = {n for n, _ in node.next_functions if n is not None} - seen
        seen |= following
        nodes += following
    trained = ((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return [name for name, p in trained if id(p) not in used]


def describe(result):
    """What somebody's function returned, in a few words."""
    kind = type(result).__name__
    article = "an" if kind[:1].lower() in "aeiou" else "a"
    if isinstance(result, torch.Tensor):
        return f"one tensor of shape {tuple(result.shape)}"
    if isinstance(result, Mapping):
        return f"{article} {kind} of {', '.join(map(str, result)) or 'nothing'}"
    if isinstance(result, tuple | list):
        parts = [
            f"{tuple(part.shape)}" if isinstance(part, torch.Tensor) else type(part).__name__
            for part in result
        ]
        return f"{article} {kind} of {len(parts)}: {', '.join(parts)}"
    return f"{article} {kind}"


def _words(error):
    """An error in one line."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _named(result, names):
    """The tensor that an object or a mapping holds under one of these names, or None."""
    if isinstance(result, torch.Tensor):
        return None
    get = result.get if isinstance(result, Mapping) else lambda name: getattr(result, name, None)
    found = (get(name) for name in names)
    return next((t for t in found if isinstance(t, torch.Tensor)), None)


def _are_tensors(values):
    return all(isinstance(t, torch.Tensor) and t.is_floating_point() for t in values)


def _last_operation(t, past_constants=False):
    """The name of the operation that made the values of a tensor, and its node; or (None, None).

    past_constants: whether adding a constant does not count.
    """
    return _operation_at(t.grad_fn, past_constants)


def _operation_at(node, past_constants=False):
    while node is not None:
        name = node.name().partition("Backward")[0]
        parents = [n for n, _ in node.next_functions if n is not None]
        passes = name in _MOVES or (past_constants and name == "Add" and len(parents) == 1)
        if not passes or len(parents) != 1:
            return name, node
        node = parents[0]
    return None, None


def _end(operation, node, images):
    low, high = (v.item() for v in images.detach().aminmax())
    if operation in _CLIPPING:
        # Values that were clipped have no gradient, and a likelihood of 0 or 1 if not normal.
        before, _ = _operation_at(node.next_functions[0][0])
        if before not in _PROBABILITIES:
            return "positive" if low >= 0 else "tanh"
        return "unit"
    if operation in _PROBABILITIES:
        return "unit"
    if operation == "Tanh":
        return "tanh"
    if operation in _POSITIVE:
        return "positive"
    # All zeros come from weights that are zero, and say nothing.
    return "unit" if operation not in _OPEN and low >= 0 and 0 < high <= 1 else "open"
