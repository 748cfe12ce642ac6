"""From a step or a single launch to what each kernel would cost on a GPU that is not here."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

from benchmarks.model.cost import GPUS, kernel_cost, library_cost
from benchmarks.model.machine_code import read
from benchmarks.model.recording import Recorder, record


def recorded(model, batch_size, architecture, way="genfast"):
    """A step's `Recording` and the machine code in it, {`compiled`: `Code`}; made once a process.

    Args:
        model, batch_size, architecture, way: as for `recording.record`.
    """
    return _recorded(model, batch_size, architecture, way)


@functools.cache
def _recorded(model, batch_size, architecture, way):
    recording = record(model, batch_size, architecture, way)
    return recording, _codes(recording.code)


def predict(model, batch_size, gpu, way="genfast"):
    """The `cost.Cost` of each launch of one training step in bf16, in order.

    Args:
        model: "dcgan" or "conv-vae".
        batch_size: images of a step.
        gpu: a key of `cost.GPUS`.
        way: "genfast", or "eager": PyTorch alone with autocast, fused Adam and channels_last, its
            kernels started as closely as a CUDA graph starts them. A library's product is assumed
            to take `cost.LIBRARY_OVERHEAD` of its time at the datasheet's rate, and all else to
            move each of its tensors once.
    """
    card = GPUS[gpu]
    recording, codes = recorded(model, batch_size, card.architecture, way)
    return [_cost(launch, recording.code, codes, card) for launch in recording.launches]


def predict_launch(kernel, grid, gpu, **arguments):
    """The `cost.Cost` of one launch, in a process that does not interpret kernels.

    Args:
        kernel: a Triton kernel. Unless its name is in `formulas.FORMULAS`, add it there first.
        grid, arguments: as for `genfast.launch.start.kernel`; tensors lie on the CPU.
        gpu: a key of `cost.GPUS`.
    """
    card = GPUS[gpu]
    recorder = Recorder(card.architecture)
    recorder.start(kernel, grid, **arguments)
    return _cost(recorder.launches[0], recorder.code, _codes(recorder.code), card)


def _codes(compiled):
    # Each waits for a disassembler, which is a process of its own.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(compiled, pool.map(read, compiled.values()), strict=True))


def _cost(launch, compiled, codes, card):
    if not launch.compiled:
        return library_cost(launch, card)
    facts = compiled[launch.compiled]
    return kernel_cost(launch, codes[launch.compiled], facts.warps, facts.shared, card)
