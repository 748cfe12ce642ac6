"""Functions that run in several processes of one `torch.distributed` group, on this machine."""

import multiprocessing
import os
import traceback

import interpreter
import torch
import torch.distributed as dist

from genfast.backend import INTERPRETING

# What the processes have imported when they are forked from their server: that takes seconds.
_PRELOADED = ["torch.distributed", "torch._dynamo", "genfast.training.runs.loop", "genfast.cli"]
_SECONDS = 120


def run(function, count, folder, *arguments):
    """[function(rank, *arguments) of each process], in the order of the ranks.

    Args:
        function: of a module that the processes can import.
        count: how many processes.
        folder: an empty `Path` for the files by which they find one another.
        arguments: what can be pickled.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    started = [
        context.Process(target=_process, args=(function, rank, count, str(folder), arguments))
        for rank in range(count)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join(_SECONDS)
        if process.exitcode is None:
            process.kill()
    results = []
    for rank in range(count):
        path = folder / f"result_{rank}"
        result = torch.load(path, weights_only=False) if path.exists() else "it was killed"
        assert not isinstance(result, str), f"process {rank}: {result}"
        results.append(result)
    return results


def _process(function, rank, count, folder, arguments):
    torch.set_num_threads(1)
    if INTERPRETING:
        interpreter.make_faster()
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    store = dist.FileStore(f"{folder}/store", count)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count)
    try:
        result = function(rank, *arguments)
    except Exception:
        result = traceback.format_exc()
    torch.save(result, f"{folder}/result_{rank}.unfinished")
    os.replace(f"{folder}/result_{rank}.unfinished", f"{folder}/result_{rank}")
    dist.destroy_process_group()
