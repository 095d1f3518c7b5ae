"""Several processes of one job, forked from a server that has imported everything: an import costs seconds, a fork none."""

import gc
import os
import pickle

import torch

IMPORTS = [
    "pytest",
    "torch.distributed.fsdp",
    "transformers",
    "peft",
    "bco_fast.training.trainer",
    "tiny",
    "small_runs",
    "heads",
]


def run(function, world, folder, *args):
    """What `function(rank, world, *args)` returns on each of `world` ranks of a gloo group, in their order.

    It and the arguments are pickled; an exception on any rank is raised here. The ranks run one thread each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTS)
    arguments = (function, world, str(folder), dict(os.environ), args)
    # as daemons: ranks that hang until the test's time is up end with this process
    torch.multiprocessing.start_processes(_rank, arguments, world, daemon=True, start_method="forkserver")
    results = []
    for rank in range(world):
        with open(folder / f"rank{rank}.pickle", "rb") as file:
            results.append(pickle.load(file))  # noqa: S301 - our own
    return results


def _rank(rank, function, world, folder, environment, args):
    os.environ.clear()  # the server has the environment of the test that started it
    os.environ.update(environment)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    result = function(rank, world, *args)
    with open(f"{folder}/rank{rank}.pickle", "wb") as file:
        pickle.dump(result, file)
    gc.collect()  # DDP's reducer must go before its process group
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
