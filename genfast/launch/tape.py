"""What a function of this package does with tensors, kept to be done again without the Python.

The functions here decide about grids, tiles, memory and constants by the shapes, strides, dtypes
and alignment of tensors and by numbers, never by values. Where all of these are as before, so is
all that is decided. A `Tape` then takes memory and starts kernels as it was told:

    dz, sums = tape.run(function, tensors, *settings)       function(tensors, *settings)

The first call with such tensors is a plain one: kernels are compiled, and a shape that never comes
back costs nothing. The second is recorded, later ones are replays. A function must not look at
anything else that may change, such as what tensor an address belongs to.
"""

import functools
import threading
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from genfast.backend import triton
from genfast.launch import start as starting

if triton is not None:
    from triton.tools.tensor_descriptor import TensorDescriptor

# Of so many shapes; the oldest is forgotten.
_LIMIT = 1024
_SEEN = object()
_tapes: dict[Any, Any] = {}
_thread = threading.local()
_EMPTY = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}


def start(kernel, grid, **arguments):
    """`start.kernel`, and again at each replay of what is being recorded."""
    recorder = getattr(_thread, "recorder", None)
    if recorder is None:
        return starting.kernel(kernel, grid, **arguments)
    recorder.note_start(kernel, grid, arguments)
    with unnoticed():  # What the interpreter does inside is no part of it.
        return starting.kernel(kernel, grid, **arguments)


@contextmanager
def unnoticed():
    """Within, nothing is recorded: for what is done once, on tensors that nobody else sees."""
    recorder = getattr(_thread, "recorder", None)
    if recorder is None:
        yield
        return
    _thread.recorder, recorder.paused = None, True
    try:
        yield
    finally:
        _thread.recorder, recorder.paused = recorder, False


def run(function, tensors, *settings, look=None):
    """function(tensors, *settings), from a `Tape` where there is one.

    Args:
        function: gives a list of tensors and Nones.
        tensors: a list of tensors and Nones, the first a tensor that says how products round.
        settings: hashable; all else that the function depends on.
        look: hashable, stands for the shapes, strides, dtypes and device of all the tensors, for a
            caller who knows them already.
    """
    first = tensors[0]
    if look is None:
        kinds = [None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors]
        look = first.device, *kinds
    places = [None if t is None else t.data_ptr() % 16 for t in tensors]
    key = function, settings, starting.precision(first), _modes(), look, *places
    known = _tapes.get(key)
    if isinstance(known, Tape):
        return known.play(tensors)
    if known is None:
        keep(_tapes, key, _SEEN, _LIMIT)
    if known is not _SEEN or getattr(_thread, "recorder", None) is not None:
        return function(tensors, *settings)
    recorder = Recorder(tensors)
    _thread.recorder = recorder
    try:
        with recorder:
            results = function(tensors, *settings)
    finally:
        _thread.recorder = None
    keep(_tapes, key, recorder.tape(results), _LIMIT)
    return results


def _modes():
    """What decides whether configurations are those that a first use has found: see `first_use`."""
    return torch.backends.cudnn.benchmark, torch.are_deterministic_algorithms_enabled()


def forget():
    """Forget all tapes: for who changes what functions decide by."""
    _tapes.clear()


def keep(cache, key, value, most):
    """Put a value into a dict of at most so many; the oldest is forgotten."""
    if key not in cache and len(cache) >= most:
        cache.pop(next(iter(cache)), None)
    cache[key] = value


class Tape:
    """Steps, each a function of a list of slots: the tensors given, then those that are made."""

    def __init__(self, steps, made, results):
        self._steps, self._made = steps, (None,) * made
        self._results = [place for i, place in enumerate(results) if place not in results[:i]]
        self._order = [self._results.index(place) for place in results]

    def play(self, tensors):
        """As the function that was recorded, of tensors of the same kinds."""
        slots = [*tensors, *self._made]
        for step in self._steps:
            step.do(slots)
            for slot in step.releases:
                slots[slot] = None
        results = [None if place is None else place.tensor(slots) for place in self._results]
        return [results[i] for i in self._order]


class NoTape:
    """In a tape's place, where there can be none; `why` says why."""

    def __init__(self, why):
        self.why = why


class _Place(NamedTuple):
    """Where a tensor is found: in a slot, and where it is a view of that, which.

    view: (size, stride, offset), the last in elements from the first of the slot's tensor; or None.
    """

    slot: int
    view: tuple | None

    def tensor(self, slots):
        t = slots[self.slot]
        if self.view is None:
            return t
        size, stride, offset = self.view
        return t.as_strided(size, stride, t.storage_offset() + offset)


class _Base:
    """What is known of a slot's tensor, without holding it."""

    def __init__(self, tensor):
        self.dtype = tensor.dtype
        self._size, self._stride = tensor.shape, tensor.stride()
        self._offset = tensor.storage_offset()

    def place(self, slot, tensor):
        """The `_Place` of a tensor that shares the slot's memory."""
        size, stride = tensor.shape, tensor.stride()
        offset = tensor.storage_offset() - self._offset
        if (size, stride, offset) == (self._size, self._stride, 0):
            return _Place(slot, None)
        return _Place(slot, (size, stride, offset))

    def address(self, slot, tensor):
        """As `place`, for who asks for the address: a view of the same elements is the same."""
        place = self.place(slot, tensor)
        if place.view and place.view[2] == 0 and _elements(*place.view[:2]) == self._elements:
            return _Place(slot, None)
        return place

    @property
    def _elements(self):
        return _elements(self._size, self._stride)


def _elements(size, stride):
    """Those of a tensor, as [step, number] in the order of memory, in as few as possible."""
    found = []
    for step, n in sorted((step, n) for n, step in zip(size, stride, strict=True) if n != 1):
        if found and step == found[-1][0] * found[-1][1]:
            found[-1][1] *= n
        else:
            found.append([step, n])
    return found


class _Allocate:
    """Take memory."""

    def __init__(self, slot, tensor):
        self.slots, self._slot = {slot}, slot
        self._take = functools.partial(
            torch.empty_strided, tensor.shape, tensor.stride(), dtype=tensor.dtype,
            device=tensor.device,
        )  # fmt: skip

    def do(self, slots):
        slots[self._slot] = self._take()


class _Start:
    """Start a kernel."""

    def __init__(self, kernel, grid, constants, places, descriptors):
        self._kernel, self._grid, self._constants = kernel, grid, constants
        self._known = starting.Known()
        self._whole = [(name, place.slot) for name, place in places if place.view is None]
        self._views = [(name, place) for name, place in places if place.view]
        self._descriptors = descriptors
        self.slots = {place.slot for _, place, *_ in (*places, *descriptors)}
        self._on = min(self.slots)

    def do(self, slots):
        arguments = {name: slots[slot] for name, slot in self._whole}
        for name, place in self._views:
            arguments[name] = place.tensor(slots)
        for name, place, fields in self._descriptors:
            # Of the same sizes and alignment as one that was checked.
            described = object.__new__(TensorDescriptor)
            described.__dict__ = fields | {"base": place.tensor(slots)}
            arguments[name] = described
        starting.kernel(
            self._kernel,
            self._grid,
            constants=self._constants,
            device=slots[self._on].device,
            known=self._known,
            **arguments,
        )


class _Call:
    """Let PyTorch compute something."""

    def __init__(self, function, args, kwargs):
        self.function, self._args, self._kwargs = function, args, kwargs
        self.makes, self.gives_many = [], False
        self._used = {place.slot for place in _places_of((args, kwargs))}

    @property
    def slots(self):
        return self._used | {slot for _, slot in self.makes}

    def do(self, slots):
        args, kwargs = (_filled(a, slots) for a in (self._args, self._kwargs))
        result = self.function(*args, **kwargs)
        for i, slot in self.makes:
            slots[slot] = result[i] if self.gives_many else result


def _places_of(arguments):
    if isinstance(arguments, _Place):
        yield arguments
    elif isinstance(arguments, tuple | list | dict):
        values = arguments.values() if isinstance(arguments, dict) else arguments
        for value in values:
            yield from _places_of(value)


def _filled(arguments, slots):
    """The arguments with a tensor for each `_Place`."""
    if isinstance(arguments, _Place):
        return arguments.tensor(slots)
    if isinstance(arguments, tuple | list):
        return type(arguments)(_filled(value, slots) for value in arguments)
    if isinstance(arguments, dict):
        return {name: _filled(value, slots) for name, value in arguments.items()}
    return arguments


class Recorder(TorchDispatchMode):
    """Within, what happens becomes a `Tape`: `start` tells of kernels, PyTorch of the rest.

    It holds no memory: only as long as a tensor lives is it known what it is.
    """

    def __init__(self, tensors):
        super().__init__()
        self.paused, self._why, self._steps = False, None, []
        self._given = len(tensors)
        self._bases = [None if t is None else _Base(t) for t in tensors]
        # PyTorch keeps a storage's Python object as long as the storage.
        self._slots = WeakKeyDictionary()
        for slot, t in enumerate(tensors):
            if t is None:
                continue
            if t.untyped_storage() in self._slots:
                # Which of the two an address belongs to may be another at a replay.
                self._why = "two of the tensors share memory"
            self._slots[t.untyped_storage()] = slot

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.paused or self._why or function.is_view:
            return function(*args, **kwargs)
        if function in _EMPTY:
            result = function(*args, **kwargs)
            self._steps.append(_Allocate(self._make(result), result))
            return result
        places = self._places_in(args), self._places_in(kwargs)
        result = function(*args, **kwargs)
        if not self._why:
            self._note_call(_Call(function, *places), result)
        return result

    def note_start(self, kernel, grid, arguments):
        """A kernel is about to start."""
        constants, places, descriptors = {}, [], []
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor):
                places.append((name, self._place(value, address=True)))
            elif triton is not None and isinstance(value, TensorDescriptor):
                fields = {k: v for k, v in vars(value).items() if k != "base"}
                descriptors.append((name, self._place(value.base, address=True), fields))
            else:
                constants[name] = value
        if not self._why:
            self._steps.append(_Start(kernel, grid, constants, places, descriptors))

    def tape(self, results):
        """The `Tape` of what happened, that gives these results; or a `NoTape`."""
        places = [None if t is None else self._place(t) for t in results]
        if self._why:
            return NoTape(self._why)
        return Tape(self._with_releases(places), len(self._bases) - self._given, places)

    def _note_call(self, step, result):
        """PyTorch has computed something, maybe in place."""
        results = result if isinstance(result, tuple | list) else (result,)
        if not all(isinstance(t, torch.Tensor) for t in results) and result is not None:
            self._why = f"{step.function} gives more than tensors"
            return
        for i, t in enumerate(results if result is not None else ()):
            if t.untyped_storage() not in self._slots:
                step.makes.append((i, self._make(t)))
        step.gives_many = result is not results[0]
        self._steps.append(step)

    def _make(self, tensor):
        slot = len(self._bases)
        self._bases.append(_Base(tensor))
        self._slots[tensor.untyped_storage()] = slot
        return slot

    def _places_in(self, arguments):
        """Arguments of PyTorch's operation with a `_Place` for each tensor."""
        if isinstance(arguments, torch.Tensor):
            return self._place(arguments)
        if isinstance(arguments, tuple | list):
            return type(arguments)(map(self._places_in, arguments))
        if isinstance(arguments, dict):
            return {name: self._places_in(value) for name, value in arguments.items()}
        return arguments

    def _place(self, tensor, address=False):
        """The `_Place` of a tensor; `address`: for who asks for that alone."""
        slot = self._slots.get(tensor.untyped_storage())
        if slot is None or tensor.dtype != self._bases[slot].dtype:
            self._why = self._why or "a tensor comes from elsewhere"
            return None
        base = self._bases[slot]
        return base.address(slot, tensor) if address else base.place(slot, tensor)

    def _with_releases(self, results):
        """The steps, each of which lets go of what no later one needs."""
        needed = {place.slot for place in results if place is not None}
        given = set(range(self._given))
        for step in reversed(self._steps):
            step.releases = sorted(step.slots - needed - given)
            needed |= step.slots
        return self._steps
