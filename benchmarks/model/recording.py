"""The launches of one training step, recorded on a machine without the GPU they are meant for.

A real step runs on CPU tensors with every start of a kernel replaced by compiling it for the
architecture asked for. No kernel executes, so the memory they would have written holds whatever it
held and costs nothing; PyTorch's own operations run and are written down with the bytes they touch.
(Fake tensors would spare those too, but have no addresses, from which descriptors and the
compiler's alignment follow.)

Triton cannot both interpret and compile in one process, so the recording runs in one of its own.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
# The workload of each, and the size of its images.
MODELS = {
    "dcgan": ("dcgan", 64),
    "dcgan-128": ("dcgan", 128),
    "dcgan-96x64": ("dcgan", "96x64"),
    "conv-vae": ("conv-vae", 64),
}
WAYS = ("genfast", "eager")
_LAUNCHES = "launches.json"


@dataclass(frozen=True)
class Launch:
    """One kernel that a step starts.

    name: of the kernel, or of PyTorch's operation.
    bytes: of its distinct tensors, each counted once; of what it reaches by addresses in memory, as
        for PyTorch's operation, what it reads and what it writes.
    grid: programs along each axis; () for PyTorch's operation.
    arguments: by name, what is neither tensor nor descriptor: numbers, constants, compiler options.
    tensors: by name, the shapes of tensors and of what descriptors describe.
    dtype: of its first floating-point tensor; "" without one and for PyTorch's operation.
    flops: of PyTorch's operation where it is a product. Those of a kernel are in its `Formula`.
    compiled: what names the machine code in the recording's `code`; "" for PyTorch's operation.
    """

    name: str
    bytes: int
    grid: tuple[int, ...] = ()
    arguments: dict = None
    tensors: dict = None
    dtype: str = ""
    flops: int = 0
    compiled: str = ""

    @property
    def programs(self):
        return math.prod(self.grid)


@dataclass(frozen=True)
class Compiled:
    """One kernel as Triton compiled it.

    warps, shared: of a program; shared memory in bytes.
    binary: the ELF file: NVIDIA's cubin or AMD's.
    assembly: NVIDIA's PTX, or what AMD's assembler reads.
    ttgir: Triton's GPU dialect, the last stage in which layouts have names.
    """

    name: str
    warps: int
    shared: int
    binary: bytes
    assembly: str
    ttgir: str


@dataclass(frozen=True)
class Recording:
    """launches: in the order of the step. code: each launch's `Compiled` by its `compiled`."""

    launches: tuple[Launch, ...]
    code: dict[str, Compiled]


def record(model, batch_size, architecture, way="genfast"):
    """The `Recording` of one step in bf16.

    Args:
        model: one of `MODELS`, at 64 x 64 pixels.
        batch_size: images of a step.
        architecture: a key of `driver.TARGETS` of NVIDIA's.
        way: "genfast", or "eager" for the step of `recipes.Recipe` that PyTorch runs alone.

    Raises:
        RuntimeError: the step failed; the message ends in what the process wrote.
    """
    # Whoever interprets kernels, as the tests do, still gets compiled ones from the new process.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "benchmarks.model.recording", model, str(batch_size)]
        command += [architecture, way, str(folder)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"expected to record a step of {model}, got:\n{done.stderr[-3000:]}")
        return _read(folder)


def _read(folder):
    facts = json.loads((folder / _LAUNCHES).read_text(encoding="utf-8"))
    launches = tuple(Launch(**f | {"grid": tuple(f["grid"])}) for f in facts["launches"])
    code = {
        key: Compiled(
            binary=(folder / f"{key}.binary").read_bytes(),
            assembly=(folder / f"{key}.assembly").read_text(encoding="utf-8"),
            ttgir=(folder / f"{key}.ttgir").read_text(encoding="utf-8"),
            **f,
        )
        for key, f in facts["code"].items()
    }
    return Recording(launches, code)


def _record_genfast(model, batch_size, architecture):
    """Launches and code of genfast's step, in a process that does not interpret."""
    import torch

    from genfast import functional
    from genfast.backend import use_backend
    from genfast.training import GANStep, VAEStep

    with contextlib.ExitStack() as stack:
        recorder = stack.enter_context(compiling(architecture))
        launches = recorder.launches
        for owner, attribute, value in (
            (functional, "why_device_cannot_run_triton", lambda device: None),
            # On a CPU a VAE's step converts each weight where it is used, on a GPU all at once.
            (VAEStep, "weights_reused", True),
        ):
            stack.enter_context(mock.patch.object(owner, attribute, value))
        stack.enter_context(use_backend("triton"))
        workload = _workload(model, batch_size)
        if workload.is_vae:
            step = VAEStep(*workload.networks(), precision="bf16", capture=False)
        else:
            # Nothing is computed, so what the discriminator returns cannot be checked.
            step = GANStep(*workload.networks(), precision="bf16", capture=False, output="logits")
        images = torch.zeros(batch_size, *workload.image_shape)
        images = images.to(memory_format=torch.channels_last)
        step(images)  # The first step also makes what later ones reuse.
        launches.clear()
        with _operations(launches):
            step(images)
    return launches, recorder.code


def _workload(model, batch_size):
    import torch

    from benchmarks.workloads import Workload

    name, image_size = MODELS[model]
    return Workload(name, batch_size, image_size, torch.device("cpu"))


def _record_eager(model, batch_size):
    """Launches of PyTorch's own step, on tensors without memory: nothing there needs an address."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    from benchmarks import recipes

    launches = []
    workload = _workload(model, batch_size)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(recipes, "half_is_fast", lambda device: True))
        # It would put memory into another format, of which there is none; bytes are the same.
        stack.enter_context(mock.patch.object(torch.nn.Module, "to", lambda self, *a, **k: self))
        stack.enter_context(FakeTensorMode())
        recipe = recipes.Recipe(amp=True, frozen=not workload.is_vae)
        step = recipe.build(workload)
        images = torch.zeros(batch_size, *workload.image_shape)
        step(images)  # Makes the optimizers' states.
        with _operations(launches):
            step(images)
    return launches


def _write(folder, launches, compiled_by_key):
    code = {}
    for key, compiled in compiled_by_key.items():
        (folder / f"{key}.binary").write_bytes(compiled.binary)
        (folder / f"{key}.assembly").write_text(compiled.assembly, encoding="utf-8")
        (folder / f"{key}.ttgir").write_text(compiled.ttgir, encoding="utf-8")
        code[key] = dict(name=compiled.name, warps=compiled.warps, shared=compiled.shared)
    facts = {"launches": [asdict(launch) for launch in launches], "code": code}
    (folder / _LAUNCHES).write_text(json.dumps(facts), encoding="utf-8")


@contextlib.contextmanager
def compiling(architecture):
    """Within, what genfast would start is compiled; yields the `Recorder`, whose notes apply."""
    from genfast.launch import start

    recorder = Recorder(architecture)
    with (
        mock.patch.object(start, "kernel", recorder.start),
        mock.patch.object(start, "architecture", lambda tensor: architecture),
    ):
        yield recorder


def rounding(precision):
    """A context in which products of float32 round so, whatever PyTorch's settings.

    Args:
        precision: "ieee" or "tf32".
    """
    import torch

    from genfast.launch import start

    def chosen(tensor):
        return precision if tensor.dtype == torch.float32 else "ieee"

    return mock.patch.object(start, "precision", chosen)


class Recorder:
    """Compiles kernels for an architecture instead of starting them.

    Only in a process without TRITON_INTERPRET, and it makes the GPU that is not here the active
    one there.

    Attributes:
        launches: a list of `Launch`, in order.
        code: each launch's `Compiled` by its `compiled`.
    """

    def __init__(self, architecture):
        import triton

        from benchmarks.model.driver import AbsentDriver

        triton.runtime.driver.set_active(AbsentDriver(architecture))
        self.launches, self.code = [], {}

    def start(self, kernel, grid, *, constants=None, device=None, reads=(), writes=(), **arguments):
        """In place of `genfast.launch.start.kernel`: note the launch; returns what was compiled."""
        arguments = (constants or {}) | arguments
        compiled = kernel.warmup(**arguments, grid=grid)
        if compiled.hash not in self.code:
            nvidia = "cubin" in compiled.asm
            self.code[compiled.hash] = Compiled(
                name=kernel.__name__,
                warps=compiled.metadata.num_warps,
                shared=compiled.metadata.shared,
                binary=compiled.asm["cubin" if nvidia else "hsaco"],
                assembly=compiled.asm["ptx" if nvidia else "amdgcn"],
                ttgir=compiled.asm["ttgir"],
            )
        moved = _distinct_bytes(reads) + _distinct_bytes(writes)
        self.launches.append(_launch(kernel.__name__, grid, arguments, compiled.hash, moved))
        return compiled


def _launch(name, grid, arguments, compiled, moved):
    import torch

    tensors = {k: getattr(v, "base", v) for k, v in arguments.items()}
    tensors = {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)}
    plain = {k: v for k, v in arguments.items() if k not in tensors}
    dtypes = (str(v.dtype) for v in tensors.values() if v.is_floating_point())
    return Launch(
        name=name,
        grid=tuple(grid),
        arguments={k: v if isinstance(v, int | float | str) else str(v) for k, v in plain.items()},
        tensors={k: list(v.shape) for k, v in tensors.items()},
        dtype=next(dtypes, "").removeprefix("torch."),
        # Absent tensors are stood in for by others, which the same address gives away.
        bytes=moved + sum({v.data_ptr(): v.nbytes for v in tensors.values()}.values()),
        compiled=compiled,
    )


# Beside views: operations that take memory without writing to it, and the profiler's marks.
_START_NOTHING = (
    "_record_function_enter_new", "_record_function_exit", "detach", "empty", "empty_like",
    "empty_strided", "new_empty", "new_empty_strided", "device", "promote_types",
)  # fmt: skip
# They write the tensor they are called on without reading it.
_OVERWRITE = ("copy_", "fill_", "zero_", "normal_", "_foreach_copy_", "_foreach_zero_")


def _operations(launches):
    """A context in which each of PyTorch's operations that starts a kernel is appended."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            packet = function.overloadpacket
            name = packet.__name__
            result = function(*args, **kwargs)
            if not function.is_view and name not in _START_NOTHING:
                flops = 0
                if packet in flop_registry:
                    flops = flop_registry[packet](*args, **kwargs, out_val=result)
                moved = _bytes_moved(function, args, kwargs, result)
                launches.append(Launch(name, moved, arguments={}, tensors={}, flops=flops))
            return result

    return Operations()


def _bytes_moved(function, args, kwargs, result):
    """Bytes that an operation reads and those that it writes."""
    from torch.utils._pytree import tree_leaves

    given, written = [], []
    for i, parameter in enumerate(function._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(parameter.name)
        alias = parameter.alias_info
        writes = alias is not None and alias.is_write
        if writes:
            written.append(value)
        if not (writes and function.overloadpacket.__name__ in _OVERWRITE):
            given.append(value)
    return sum(_distinct_bytes(tree_leaves(v)) for v in (given, [written, result]))


def _distinct_bytes(values):
    import torch

    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    places = {(t.untyped_storage()._cdata, t.storage_offset(), t.nbytes) for t in tensors}
    return sum(nbytes for *_, nbytes in places)


def main():
    """Record into a folder: for `record`, which calls this in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("batch_size", type=int)
    parser.add_argument("architecture")
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    if args.way == "eager":
        _write(args.folder, _record_eager(args.model, args.batch_size), {})
    else:
        recorded = _record_genfast(args.model, args.batch_size, args.architecture)
        _write(args.folder, *recorded)


if __name__ == "__main__":
    main()
