"""Trained networks as files that other programs read."""

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import genfast
from genfast.backend import use_backend
from genfast.training.errors import BadInput, require
from genfast.training.files import replacing
from genfast.training.runs.trained import drawing_step, opened

# What is exported of a model; the first one unless another is asked for.
GAN_PARTS = ("generator", "discriminator")
VAE_PARTS = ("decoder", "encoder")
PARTS = (*GAN_PARTS, *VAE_PARTS)


class Part(NamedTuple):
    """A trained network with what a file says of it.

    module: in evaluation, float32, on the CPU: takes `inputs` and gives `outputs`.
    network: the one whose weights it runs; its `state_dict` has the keys of PyTorch's own layers.
    example: an input of one image or latent.
    inputs, outputs: the names, in order.
    notes: a dict of strings.
    labels: of a conditional network, an example of what comes second; else None.
    """

    module: nn.Module
    network: nn.Module
    example: torch.Tensor
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    notes: dict
    labels: torch.Tensor | None = None

    def examples(self, count):
        """Inputs of `count` images or latents: a tuple."""
        given = (self.example,) if self.labels is None else (self.example, self.labels)
        return tuple(t.expand(count, *t.shape[1:]).contiguous() for t in given)


class _Drawn(nn.Module):
    """Latents (N, *latent_shape), and labels (N,), to images (N, C, H, W) in [0, 1]."""

    def __init__(self, network, image_shape, low, high):
        super().__init__()
        self.network, self.image_shape, self.low, self.high = network, image_shape, low, high

    def forward(self, z, *labels):
        decode = getattr(self.network, "decode", self.network)
        images = decode(z, *labels).reshape(-1, *self.image_shape)
        return ((images - self.low) / (self.high - self.low)).clamp(0, 1)


class _Encoded(nn.Module):
    """Images (N, C, H, W) in [0, 1], and labels (N,), to mean and log-variance of their latents."""

    def __init__(self, network, low, high):
        super().__init__()
        self.network, self.low, self.high = network, low, high

    def forward(self, images, *labels):
        encode = getattr(self.network, "encode", self.network)
        if (self.low, self.high) != (0, 1):
            images = images * (self.high - self.low) + self.low
        mean, logvar = encode(images, *labels)
        return mean, logvar


class _Judged(nn.Module):
    """Images (N, C, H, W) in [0, 1], and labels (N,), to logits, one an image."""

    def __init__(self, network, low, high):
        super().__init__()
        self.network, self.low, self.high = network, low, high

    def forward(self, images, *labels):
        return self.network(images * (self.high - self.low) + self.low, *labels)


def load_part(path, part=None, *, ema=True):
    """One network of a checkpoint, a `Part`.

    Args:
        path: the checkpoint, the folder of its run, or weights of one network of PyTorch's public
            DCGAN example.
        part: one of `PARTS` that the model has. None: the generator or the decoder.
        ema: whether the average generator is taken where the run kept one.

    Raises:
        BadInput: the checkpoint cannot be read, holds weights that are not finite, or its model has
            no such part.
    """
    file = opened(path)
    config = replace(file.config, precision="fp32")
    step = drawing_step(file._replace(config=config), torch.device("cpu"))
    for module in step.modules.values():
        module.eval().requires_grad_(False)
    has = VAE_PARTS if "model" in step.modules else GAN_PARTS
    if "encoder" in step.modules:  # A VAE/GAN.
        has = (*VAE_PARTS, "discriminator")
    if file.alone:
        has = (file.alone,)
    part = part or has[0]
    if part not in has:
        raise BadInput(f"expected --part {' or '.join(has)} of {config.model}, got {part}")
    shape = config.image_shape
    low, high = step.pixel_range
    notes = {"genfast": genfast.__version__, "model": config.model, "part": part}
    latent, images = torch.zeros(1, *step.latent_shape), torch.zeros(1, *shape)
    labels, second = None, ()
    if config.conditional:
        labels, second = torch.zeros(1, dtype=torch.int64), ("labels",)
        notes["classes"] = json.dumps(config.classes)
    if part in ("generator", "decoder"):
        if part == "decoder":
            network = step.modules.get("model") or step.decoder
        else:
            network = step.average.module if step.average and ema else step.generator
            notes["ema"] = str(bool(step.average and ema))
        module = _Drawn(network, shape, low, high)
        return Part(module, network, latent, ("z", *second), ("images",), notes, labels)
    given = ("images", *second)
    if part == "encoder":
        network = step.modules.get("model") or step.encoder
        module = _Encoded(network, low, high)
        return Part(module, network, images, given, ("mean", "logvar"), notes, labels)
    module = _Judged(step.discriminator, low, high)
    return Part(module, step.discriminator, images, given, ("logits",), notes, labels)


def _as_onnx(part, path):
    """A graph with a free batch size."""
    for name in ("onnx", "onnxscript"):
        require(name, name, extra="export")
    batch = torch.export.Dim("batch", min=1)
    first, *labels = part.examples(2)  # An exporter takes a batch of 1 for a constant.
    with _quiet_exporter():
        program = torch.onnx.export(
            part.module,
            (first, *labels),
            dynamo=True,
            input_names=list(part.inputs),
            output_names=list(part.outputs),
            # One entry for what comes first, and one, a tuple, for all that follows.
            dynamic_shapes=({0: batch}, ({0: batch},)) if labels else ({0: batch},),
            verbose=False,
        )
    for key, value in part.notes.items():
        program.model.metadata_props[key] = value
    program.save(str(path), external_data=False)


@contextmanager
def _quiet_exporter():
    """Within, the parts of the exporter do not warn about each other."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _as_torchscript(part, path):
    with warnings.catch_warnings():
        # That TorchScript will go one day: who asks for it knows.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(part.module, part.examples(1))
        torch.jit.save(traced, str(path), _extra_files={"genfast.json": json.dumps(part.notes)})


def _as_safetensors(part, path):
    safetensors = require("safetensors.torch", "safetensors", extra="export")
    weights = {name: t.contiguous() for name, t in part.network.state_dict().items()}
    safetensors.save_file(weights, str(path), metadata=part.notes)


def _as_state_dict(part, path):
    weights = {name: t.contiguous() for name, t in part.network.state_dict().items()}
    torch.save(weights, path)


class Format(NamedTuple):
    """A kind of file: what writes it, the suffix of its name, and what it is."""

    write: Callable
    suffix: str
    text: str


FORMATS = {
    "onnx": Format(_as_onnx, ".onnx", "a graph that ONNX runtimes execute"),
    "torchscript": Format(_as_torchscript, ".pt", "a program that PyTorch runs without genfast"),
    "safetensors": Format(_as_safetensors, ".safetensors", "weights"),
    "state-dict": Format(_as_state_dict, ".pth", "weights, by PyTorch's keys, for `torch.load`"),
}


def export(path, out, form, *, part=None, ema=True):
    """Write a network of a checkpoint into a new file.

    Args:
        path: the checkpoint, or the folder of its run.
        out: the name of the file.
        form: one of `FORMATS`. The first two hold a function: of latents to images in [0, 1], of
            images in [0, 1] to a mean and a log-variance, or to logits, for batches of any size in
            float32; those of a conditional run take labels, int64 (N,), too. The others hold the
            network's `state_dict`.
        part, ema: as in `load_part`.

    Raises:
        BadInput: as `load_part`; there is something of that name, its folder does not exist, or
            the suffix belongs to another form; or an extra is not installed.
    """
    if form not in FORMATS:
        raise BadInput(f"expected --format to be one of {', '.join(FORMATS)}, got {form!r}")
    target = _new_file(out, form)
    loaded = load_part(path, part, ema=ema)
    # Whatever writes a file writes it elsewhere first: half a file would pass for one.
    with tempfile.TemporaryDirectory() as folder, use_backend("reference"):
        made = Path(folder, "made")
        with torch.no_grad():
            FORMATS[form].write(loaded, made)
        with replacing(target) as file:
            file.write(made.read_bytes())


def _new_file(out, form):
    target = Path(out)
    suffix = FORMATS[form].suffix
    if target.suffix.lower() != suffix:
        raise BadInput(f"expected --out to end in {suffix} for --format {form}, got {out}")
    if not target.parent.is_dir():
        raise BadInput(f"expected --out in a folder that exists, got {out}")
    if os.path.lexists(target):
        raise BadInput(f"expected --out to be new, got {out}, which stays as it is")
    return target
