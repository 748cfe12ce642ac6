"""How a discriminator is run, and what of that which it returns are its logits."""

import warnings
from contextlib import contextmanager

import torch
from torch import nn

from genfast.losses import widen
from genfast.nn import FusedBlock
from genfast.training.memory import missing_memory
from genfast.training.steps.labels import Labels
from genfast.training.steps.layers import runs_as
from genfast.training.steps.trial import redrawn, undone

_EXPECTED = (
    "expected a discriminator that returns logits, one an image as (N,) or (N, 1), or a map of "
    "them as (N, 1, h, w)"
)
_CHOOSE = 'output= takes a function that picks the logits, or "logits" for all of it as it is'
# How often weights are drawn before what lies in [0, 1] counts as bound to. Drawn logits lie there
# less often than every third time, so chance gets as far as this once in 10 million.
_DRAWS = 16


class Judge:
    """Runs a discriminator and gives its logits.

    Args:
        discriminator: the network.
        output: None, "logits" or a function, as in `GANStep`.
        labels: the `Labels` that it takes beside images.

    Attributes:
        sigmoid: the name of the Sigmoid in which the discriminator ends and whose input is taken
            for the logits; None if there is none.

    Raises:
        ValueError: `output` is something else.
    """

    def __init__(self, discriminator, output=None, labels=None):
        if output not in (None, "logits") and not callable(output):
            raise ValueError(f'expected output=None, "logits" or a function, got {output!r}')
        self._discriminator, self._output = discriminator, output
        self._labels = labels or Labels()
        self._contiguous = False
        self.sigmoid = None

    def __call__(self, images):
        """The logits of images (N, C, H, W); an error where it returns something else."""
        images = images.contiguous() if self._contiguous else images
        if self.sigmoid is None:
            return self._taken(self._run(images), images)
        with _inputs_of(dict(_sigmoids(self._discriminator)), [self.sigmoid]) as inputs:
            self._run(images)
        if self.sigmoid not in inputs:
            raise RuntimeError(
                f"expected a discriminator that ends in {self.sigmoid} at every call, and in this "
                "one it did not run"
            )
        return inputs[self.sigmoid]

    def _run(self, images):
        return self._discriminator(images, *self._labels(len(images)))

    def look(self, images):
        """Find out from a first batch how the discriminator is to be run and read.

        A final Sigmoid is found by what becomes of its output. The discriminator and the random
        numbers are afterwards what they were.

        Raises:
            ValueError, TypeError: it cannot be run on images alone, it returns something else than
                logits, or its outputs are bound to lie in [0, 1] and no Sigmoid is the reason.
        """
        self.sigmoid = None
        places = dict(_sigmoids(self._discriminator))
        with undone(self._discriminator, images.device), _inputs_of(places, places) as inputs:
            outputs = self._taken(self._first_run(images), images)
        if self._output == "logits":
            return
        ends = (name for name, logits in inputs.items() if _makes(logits, outputs))
        self.sigmoid = next(ends, None)
        if self.sigmoid is not None:
            warnings.warn(
                f"genfast: the discriminator ends in a Sigmoid, {self.sigmoid or 'itself'}: what "
                "goes into it is taken for the logits",
                stacklevel=5,
            )
        elif _within_0_and_1(outputs) and self._is_bound(images):
            raise ValueError(
                "expected a discriminator that returns logits, got one whose outputs lie in "
                "[0, 1] whatever its weights are, as probabilities do: end it before its sigmoid, "
                'or pass output="logits" to take them all the same'
            )

    def _first_run(self, images):
        try:
            return self._run(images)
        except Exception as error:  # It is somebody's own code.
            if missing_memory(error):
                raise
            failure = error
        if isinstance(failure, RuntimeError) and not images.is_contiguous():
            # A forward that takes a `view` of its images needs them as loaders give them.
            self._contiguous = True
            try:
                return self._first_run(images.contiguous())
            except ValueError:
                self._contiguous = False
                raise
        raise ValueError(
            "expected a discriminator that takes images alone, but for images of shape "
            f"{tuple(images.shape)} it raised {type(failure).__name__}: "
            + str(failure).partition("\n")[0]
        ) from failure

    def _taken(self, returned, images):
        if callable(self._output):
            returned = self._output(returned)
        if not isinstance(returned, torch.Tensor) or not returned.is_floating_point():
            raise TypeError(f"{_EXPECTED}, got {describe(returned)}; {_CHOOSE}")
        shape, count = returned.shape, len(images)
        if self._output is not None:
            fits = returned.dim() > 0 and len(returned) % count == 0
        else:
            fits = returned.dim() > 0 and len(returned) == count and shape[1:2] in ((), (1,))
        if self._output is None and shape == images.shape and shape[2:].numel() > 1:
            raise ValueError(
                f"{_EXPECTED}, got {describe(returned)}, the shape of its images, as an "
                f"autoencoder returns it; {_CHOOSE}"
            )
        if not fits:
            raise ValueError(f"{_EXPECTED}, got {describe(returned)} for {count} images; {_CHOOSE}")
        return returned

    @torch.no_grad()
    def _is_bound(self, images):
        """Whether its outputs lie in [0, 1] for other weights too."""
        images = images.contiguous() if self._contiguous else images
        network = self._discriminator
        for seed in range(_DRAWS):
            with undone(network, images.device), redrawn(network, seed):
                try:
                    outputs = self._taken(self._run(images), images)
                except Exception as error:
                    if missing_memory(error):
                        raise
                    return False  # With weights that its owner would not give it: no verdict.
            if not _within_0_and_1(outputs):
                return False
        return True


def describe(returned):
    """What a network returned, in a few words."""
    if isinstance(returned, torch.Tensor):
        kind = "" if returned.is_floating_point() else f" and dtype {returned.dtype}"
        return f"a tensor of shape {tuple(returned.shape)}{kind}"
    if isinstance(returned, dict):
        return f"a dict of {', '.join(map(repr, returned))}"
    if isinstance(returned, tuple | list):
        return f"a {type(returned).__name__} of {len(returned)}"
    return f"a {type(returned).__name__}"


def _sigmoids(network):
    """(name, (module, of its output)) for each Sigmoid.

    The Sigmoid's input is what the module takes or, `of its output`, what it gives.
    """
    for name, module in network.named_modules():
        if runs_as(module, nn.Sigmoid):
            yield name, (module, False)
        elif isinstance(module, FusedBlock) and module.activation == "sigmoid":
            yield name, (list(module.children())[-1], True)


@contextmanager
def _inputs_of(places, names):
    """Within, what went into each of these Sigmoids last: a dict by name."""
    inputs = {}

    def keep(name, of_output):
        def hook(module, args, named, output):
            inputs[name] = output if of_output else (*args, *named.values())[0]

        return hook

    handles = []
    for name in names:
        module, of_output = places[name]
        handles.append(module.register_forward_hook(keep(name, of_output), with_kwargs=True))
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def _makes(logits, outputs):
    """Whether the outputs are the sigmoids of these logits, one by one, and nothing more."""
    if logits.numel() != outputs.numel():
        return False
    probabilities = widen(logits.detach()).sigmoid().flatten()
    tolerance = 8 * max(torch.finfo(t.dtype).eps for t in (logits, outputs))
    if (widen(outputs.detach()).flatten() - probabilities).abs().max() > tolerance:
        return False
    if not outputs.requires_grad:
        return True
    if not logits.requires_grad:  # Checkpointed, as it is called: no loss of these would train.
        return False
    # At 0 the values alone would not tell 1 - sigmoid from sigmoid.
    (slopes,) = torch.autograd.grad(outputs.sum(), logits, allow_unused=True)
    if slopes is None:
        return False
    expected = probabilities * (1 - probabilities)
    return bool((widen(slopes).flatten() - expected).abs().max() <= tolerance)


def _within_0_and_1(outputs):
    return bool(((outputs >= 0) & (outputs <= 1)).all())
