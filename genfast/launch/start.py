"""The only file that starts a kernel: the device guard, the interpreter, dtypes.

Everything else in this package prepares: layouts, allocation, descriptors, grids.
"""

import functools

import torch

from genfast.backend import INTERPRETING, triton

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor

# NVIDIA's first GPUs on which a kernel may start before the one before it has ended.
LEAST_TO_START_EARLY = (9, 0)


class Known:
    """What Triton compiled for arguments of one kind, for who starts a kernel with such again.

    Triton otherwise looks at each argument to find the code that fits: 10 to 30 us of Python a
    start, beside 3 for the start itself.

    Attributes:
        run: starts it with all arguments in the kernel's order; None as long as none was started.
    """

    run = None

    def learn(self, kernel, grid, constants, arguments, compiled):
        """Take note of a first start."""
        names = kernel.arg_names
        if compiled is None or not constants.keys() | arguments.keys() >= set(names):
            return  # One that a kernel has by default: Triton knows it.
        self._places = {name: i for i, name in enumerate(names)}
        self._arguments = [constants.get(name) for name in names]
        self.run = compiled[(*grid, 1, 1)[:3]]

    def start(self, arguments):
        """Start it with other tensors; all else is as it was."""
        given = self._arguments.copy()
        for name, value in arguments.items():
            given[self._places[name]] = value
        self.run(*given)


def kernel(
    kernel, grid, *, constants=None, device=None, known=None, reads=(), writes=(), **arguments
):
    """Start a kernel on the device its tensors are on (Triton starts on the current device).

    Args:
        constants: a dict of more arguments, none of them a tensor.
        device: where, if the caller knows it.
        known: a `Known` of earlier starts with the same grid and constants, and with tensors of the
            same dtypes and alignment on the same device; or None.
        reads, writes: the tensors that it reaches by addresses which it finds in memory, for
            whoever counts bytes; one that is read and written is in both.
        arguments: the kernel's own.

    Returns what Triton compiled; None where it interprets, and where it is `known`.
    """
    constants = constants or {}
    if INTERPRETING:
        return _interpret(kernel, grid, constants | arguments)
    if device is None:
        device = next(a.device for a in arguments.values() if isinstance(a, torch.Tensor))
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _start(kernel, grid, constants, arguments, device, known)
    with torch.cuda.device(device):
        return _start(kernel, grid, constants, arguments, device, known)


def _start(kernel, grid, constants, arguments, device, known):
    if known is not None and known.run is not None:
        return known.start(arguments)
    options = dict(launch_pdl=True) if starts_early(kernel.fn, device) else {}
    compiled = kernel[grid](**constants, **arguments, **options)
    if known is not None:
        known.learn(kernel, grid, constants, arguments, compiled)
    return compiled


@functools.cache
def starts_early(function, device):
    """Whether a kernel of this Python function may start before the one before it has ended.

    Only one that waits for that itself, first of all: see kernels/overlap.py. Another would read
    what is not written yet.
    """
    if device.type != "cuda" or torch.version.hip:
        return False
    if torch.cuda.get_device_capability(device) < LEAST_TO_START_EARLY:
        return False
    # Globals and attributes in the order in which they are first used: no load goes without one.
    return function.__code__.co_names[:1] == ("wait_for_previous",)


def _interpret(kernel, grid, arguments):
    # The interpreter multiplies the raw bits of bfloat16 and truncates where a GPU rounds. So half
    # precision travels as float32 copies, and PyTorch rounds what the kernel stored.
    copies = {}

    def widen(a):
        if isinstance(a, TensorDescriptor):
            return TensorDescriptor(widen(a.base), a.shape, a.strides, a.block_shape)
        if not isinstance(a, torch.Tensor) or a.element_size() != 2:
            return a
        if a.data_ptr() not in copies:
            copies[a.data_ptr()] = a, _as_float32(a)
        return copies[a.data_ptr()][1]

    kernel[grid](**{name: widen(a) for name, a in arguments.items()})
    for half, wide in copies.values():
        rounded = wide.to(half.dtype)
        # What the kernel only read stays untouched: autograd counts every writing.
        if not torch.equal(rounded.view(torch.int16), half.view(torch.int16)):
            half.copy_(rounded)


def _as_float32(t):
    """A copy with the strides of t, whatever lies between its elements."""
    span = 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((span,), (1,)).float().as_strided(t.shape, t.stride(), 0)


def architecture(tensor):
    if INTERPRETING:
        return "interpreter"
    properties = torch.cuda.get_device_properties(tensor.device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def threads_of_a_warp(tensor):
    return 64 if architecture(tensor).startswith("gfx9") else 32


def precision(tensor):
    """How float32 products round: to TF32 where PyTorch's convolutions may use it."""
    if tensor.dtype != torch.float32 or torch.version.hip:
        return "ieee"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def arithmetic(tensor):
    """The constants of a product of such tensors: what it adds in, and how float32 rounds."""
    return dict(ACC_DTYPE=tl_dtype(acc_dtype(tensor.dtype)), PRECISION=precision(tensor))


def acc_dtype(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def tl_dtype(dtype):
    return getattr(triton.language, str(dtype).removeprefix("torch."))
