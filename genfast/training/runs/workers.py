"""The processes of a run: one, or several that share each batch, as `torchrun` starts them.

What happens within a step is spread.py's. Here is what happens around it: who speaks and writes,
what is decided together, and how an end of one process ends all.

Decisions go over a group of their own, by gloo in CPU memory, so that a GPU is never waited for.
"""

import itertools
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from genfast.training import progress
from genfast.training.errors import BadInput, Elsewhere, LostWorker
from genfast.training.runs.devices import as_device
from genfast.training.runs.rules import shown
from genfast.training.started import are_several, is_first_here, number, processes_here

T = TypeVar("T")
# Within a step nobody is longer behind the others than a disk, the network or a compiler may stall
# the reading of a batch: who is, is gone.
STEP_TIMEOUT = timedelta(minutes=10)
MEETING_TIMEOUT = timedelta(minutes=10)  # Imports may take long, and machines start one by one.
# Around it the first may take its time: a picture, a validation, a slow disk. A process that ends
# closes its connections, which is noticed at once, whatever the time limit.
WAIT_TIMEOUT = timedelta(days=7)
# How long who has nothing to say waits for who has: imports may take the one that much longer.
SPEAKING_SECONDS = 30
# Errors of NCCL and of stores have types of their own. Gloo's are plain RuntimeErrors: they begin
# with the line of its source that gave up on reading from or writing to another process, but for
# those after a time limit that had passed before.
_GLOO_GAVE_UP = re.compile(
    r"\[(?!enforce)[^\]]*\bgloo[/\\]transport[/\\][^\]]*:\d+\]"
    r"|Application timeout caused pair closure"
)

_meetings = itertools.count()  # How often this process met the others.


class Alone:
    """The one process of a run, and what `Several` do otherwise.

    Attributes:
        count: how many processes there are.
        rank: the number of this one, from 0.
    """

    count, rank = 1, 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0

    def any(self, *flags: object) -> tuple[bool, ...]:
        """For each flag, whether it is set in any of the processes: a tuple of bools."""
        return tuple(map(bool, flags))

    @contextmanager
    def first_alone(self) -> Iterator[bool]:
        """A context that the others leave when the first does, as which it is known by its value.

        Raises:
            Elsewhere: in the others, where an error ended it in the first.
        """
        yield True

    def together(self, act: Callable[[], T]) -> T:
        """What `act()` gives here, once it has come to its end in each process.

        Raises:
            Elsewhere: it raised an error in another process; or in several, this one among them,
                of which the first tells.
        """
        return act()

    @contextmanager
    def entered_by_first(self, context: AbstractContextManager) -> Iterator[None]:
        """A context that the first process alone is in, while all are in this one."""
        with ExitStack() as stack:
            with self.first_alone() as is_here:
                if is_here:
                    stack.enter_context(context)
            yield

    def gathered(self, value: T) -> list[T]:
        """What each process has, in the order of the ranks: a list. Plain values and tensors."""
        return [value]

    def check_same(self, values: dict) -> None:
        """BadInput unless all processes have the same dict of values."""

    def shared(self, network: nn.Module) -> nn.Module:
        """The network as the step of a spread batch takes it: see `GANStep`."""
        return network

    def seed(self, seed: int, *more: int) -> None:
        """Let random numbers from here on be this process's own, by the seed and its rank."""

    def is_lost(self, error: Exception) -> bool:
        """Whether an error says that another process cannot be reached."""
        return False


ALONE = Alone()


class Several(Alone):
    """One of several processes, in the default process group of `torch.distributed`.

    Each comes to each of these functions as often as the others, and in the same order.
    """

    def __init__(self):
        self.count, self.rank = dist.get_world_size(), dist.get_rank()
        self._group = dist.new_group(backend="gloo", timeout=WAIT_TIMEOUT)

    def any(self, *flags: object) -> tuple[bool, ...]:
        tensor = torch.tensor(flags, dtype=torch.int32)
        with self._reached():
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return tuple(map(bool, tensor.tolist()))

    @contextmanager
    def first_alone(self) -> Iterator[bool]:
        failed = torch.zeros((), dtype=torch.int32)
        try:
            yield self.is_first
        except Exception:
            if self.is_first:
                failed.fill_(1)
                self._tell(failed)
            raise
        self._tell(failed)
        if failed:
            raise Elsewhere("the first process has failed")

    def _tell(self, flag):
        with self._reached():
            dist.broadcast(flag, 0, group=self._group)

    def together(self, act: Callable[[], T]) -> T:
        result: Any = None
        error: Exception | None = None
        try:
            result = act()
        except Exception as raised:
            if self.is_lost(raised):
                raise
            error = raised
        failed = [rank for rank, bad in enumerate(self.gathered(error is not None)) if bad]
        if not failed:
            return result
        if error is None or self.rank != failed[0]:
            raise Elsewhere(f"process {failed[0]} has failed") from error
        if isinstance(error, BadInput) and self.rank:
            raise BadInput(f"{error}; so says {self}") from error
        raise error

    def gathered(self, value: T) -> list[T]:
        everyones: list[Any] = [None] * self.count
        with self._reached():
            dist.all_gather_object(everyones, value, group=self._group)
        return everyones

    def check_same(self, values: dict) -> None:
        first, *others = self.gathered(values)
        for rank, theirs in enumerate(others, 1):
            different = [name for name, value in first.items() if theirs[name] != value]
            if different and self.rank:
                raise Elsewhere("the first process says it")
            if different:
                name = different[0]
                raise BadInput(
                    f"expected the same {name} in all processes, got {shown(theirs[name])} in "
                    f"process {rank} and {shown(first[name])} in the first"
                )

    def shared(self, network: nn.Module) -> nn.Module:
        return DistributedDataParallel(network)

    def seed(self, seed: int, *more: int) -> None:
        entropy = np.random.SeedSequence([seed, self.rank, *more])
        torch.manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))

    def is_lost(self, error: Exception) -> bool:
        ours = LostWorker, dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError
        if isinstance(error, ours):
            return True
        return isinstance(error, RuntimeError) and bool(_GLOO_GAVE_UP.search(str(error)))

    @contextmanager
    def _reached(self):
        try:
            yield
        except RuntimeError as error:
            raise lost() from error

    def __str__(self):
        return f"process {self.rank} of {self.count}, on {socket.gethostname()}"


def lost(what_is_left: str = "") -> LostWorker:
    """The `LostWorker` of a run, which goes on to say what there is to go on from."""
    return LostWorker(
        "expected all processes of the run to go on, but one has ended or cannot be reached"
        + what_is_left
    )


def convert_batch_norms(network: nn.Module) -> nn.Module:
    """Let batch norms share their statistics over all processes, in place; the network."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)


def refuse_several(command: str) -> None:
    """BadInput where several processes were started for a command that is one process's."""
    if are_several():
        raise BadInput(
            f"expected one process for genfast {command}, as train alone spreads over several, got "
            f"{number('WORLD_SIZE', 1)}: start it without torchrun"
        )


@contextmanager
def before_they_meet() -> Iterator[None]:
    """Within, one process a machine shows things and says what is wrong, for all of them.

    They were given the same command, and do not know of one another yet.
    """
    if is_first_here():
        yield
        return
    try:
        with _silence():
            yield
    except BadInput as error:
        raise Elsewhere("the first process says it") from error
    except SystemExit as leaving:  # As argparse leaves, whose word is not said here.
        if leaving.code:
            let_speak()
        raise


def let_speak() -> None:
    """Wait until another process has said why all of them end.

    When one ends, torchrun ends the others, be it before they have said a word.
    """
    time.sleep(SPEAKING_SECONDS)


@contextmanager
def alike_in_all() -> Iterator[None]:
    """Within, a `BadInput` most likely is that of all processes: a script's, as of a command.

    Others than the first of a machine let that tell it before. They do not know of one another yet.
    """
    try:
        yield
    except BadInput as error:
        error.needs_time = not is_first_here()
        raise


@contextmanager
def ending_in_turn() -> Iterator[None]:
    """Within, an error that nothing catches is told by the process it is about, not by the others.

    They wait until torchrun ends them, as it does when the first has ended; else they end as a
    process that has failed.
    """
    try:
        yield
    except (BadInput, Elsewhere):
        if are_several():
            sys.excepthook = partial(_tell_in_turn, sys.excepthook)
        raise


def _tell_in_turn(before, kind, error, traceback):
    if isinstance(error, BadInput | Elsewhere) and error.needs_time:
        error.needs_time = False
        with suppress(KeyboardInterrupt):
            let_speak()
    if not isinstance(error, Elsewhere):
        before(kind, error, traceback)


@contextmanager
def joined(device_name: str | torch.device) -> Iterator[tuple[Alone, str | torch.device]]:
    """Meet the other processes where torchrun started several, and part at the end.

    Within, the first alone shows and prints things.

    Args:
        device_name: "auto", "cpu", "cuda" or "cuda:N", or a `torch.device`, as all of them were
            given it.

    Yields:
        (`Several` or `ALONE`, the name of this process's device). Of several processes on a machine
        with GPUs each has its own. They meet by gloo on CPUs and by NCCL on GPUs.

    Raises:
        BadInput: the device is none that each of them can have.
        LostWorker: another process ended. One of those that are left raises it.
        Elsewhere: another process says what is wrong.
    """
    if not are_several():
        yield ALONE, device_name
        return
    try:
        store, device, workers = _met(device_name)
    except RuntimeError as error:
        raise lost(": " + str(error).partition("\n")[0]) from error
    on_gpu = device.type == "cuda"
    clean = False
    try:
        with nullcontext() if workers.is_first else _silence():
            yield workers, str(device)
        clean = True
    except LostWorker:
        # By now torchrun ends who is left: not before the word is said.
        in_main_thread = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN) if in_main_thread else None
        if _is_first_to_tell(store):
            raise
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)
        told = Elsewhere("another process tells of it")
        told.needs_time = False
        raise told from None
    finally:
        # After an error NCCL would wait for those that have gone.
        if clean or not on_gpu:
            dist.destroy_process_group()


def _met(device_name):
    """A store of plain values that all processes share, this one's device, and `Several`."""
    with alike_in_all():
        _check_can_meet()
    store, rank, count = next(dist.rendezvous("env://", timeout=MEETING_TIMEOUT))
    # The store may be that of those before: torchrun's, which outlives them, after a failure, or
    # another run's in the same script.
    meeting = f"genfast {number('TORCHELASTIC_RESTART_COUNT', 0)} {next(_meetings)}"
    store = dist.PrefixStore(meeting, store)
    device = _agreed_device(device_name, store, rank, count)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=dist.PrefixStore("group", store),
        rank=rank,
        world_size=count,
        timeout=STEP_TIMEOUT,
    )
    return store, device, Several()


def _check_can_meet():
    if dist.is_initialized():
        raise BadInput(
            "expected no process group yet, as training makes its own, got one: destroy it before, "
            "or train by a step in a loop of your own"
        )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise BadInput(
            f"expected {missing[0]}, as torchrun sets it beside RANK and WORLD_SIZE, got none"
        )


def _is_first_to_tell(store):
    """Whether no other process has come here; True too where that cannot be told any more."""
    try:
        return store.add("lost", 1) == 1
    except RuntimeError:
        return True


def _agreed_device(name, store, rank, count):
    try:
        device = _own_device(name)
        said = f"on {device.type}"
    except BadInput as error:
        device, said = error, f"not {error}"
    store.set(f"device {rank}", said)
    everyones = [store.get(f"device {other}").decode() for other in range(count)]
    failed = [other for other, said in enumerate(everyones) if said.startswith("not ")]
    if failed and rank == failed[0]:
        raise device
    if failed:
        raise Elsewhere(f"process {failed[0]} has failed")
    other = next((other for other in range(count) if everyones[other] != everyones[0]), None)
    if other is not None and rank:
        raise Elsewhere("the first process says it")
    if other is not None:
        raise BadInput(
            f"expected all processes on GPUs or all on CPUs, got process {other} {everyones[other]}"
            f" and the first {everyones[0]}: give --device cpu"
        )
    return device


def _own_device(name):
    """The device of this process among those of its machine, by the name that all were given."""
    device = as_device(name)
    if device.type == "cpu":
        return device
    if device.index is not None:
        raise BadInput(
            f"expected --device auto, cuda or cpu for several processes, each of which takes a GPU "
            f"of its own, got {name}"
        )
    return as_device(f"cuda:{number('LOCAL_RANK', 0)}")


def command_again() -> list[str]:
    """How processes like these are started, as words before a command's own."""
    if not are_several():
        return ["python", "-m", "genfast"]
    here, machines = processes_here(), number("GROUP_WORLD_SIZE", 1)
    nodes = ["--nnodes", str(machines)] if machines > 1 else []
    return ["torchrun", *nodes, "--nproc-per-node", str(here), "-m", "genfast"]


@contextmanager
def _silence():
    with (
        open(os.devnull, "w") as null,
        redirect_stdout(null),
        redirect_stderr(null),
        progress.hidden(),
    ):
        yield
