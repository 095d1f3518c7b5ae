"""What is checked about the processes of a run before anything is computed."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path

from ..data.dataset import FeedbackDataset
from ..reference.fill import SHARED_FOLDER_SECONDS
from ..reference.ranks import gather_objects, number_of_ranks, own_rank
from .config import FeedbackConfig
from .record import package_versions

_OF_A_RANK = ("local_rank", "logging_dir", "run_name")


class RanksDisagree(ValueError):
    """The ranks of one run were started differently. Every rank raises it, with the same message."""

    of_all_ranks = True
    """One rank's message is enough."""


def check_processes(args: FeedbackConfig) -> None:
    """Refuse threads in place of processes, and a device on which log-probabilities cannot be summed.

    Raises:
        ValueError: says what to do instead.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs are visible to one process, which would drive them by threads (nn.DataParallel). Start one "
            f"process per GPU: accelerate launch --num_processes {args.n_gpu} -m bco_fast.cli train ..., or torchrun "
            f"--nproc_per_node {args.n_gpu} SCRIPT. For a single GPU, set CUDA_VISIBLE_DEVICES=0"
        )
    if args.device.type == "mps":
        raise ValueError(
            "an Apple GPU (mps) has no float64, which the sums of log-probabilities need: pass use_cpu=True"
        )


def check_ranks(datasets: Sequence[FeedbackDataset], args: FeedbackConfig, cache_dir: str | None) -> None:
    """Refuse ranks that were started with other data, options or library versions, or that see another cache folder.

    Args:
        cache_dir: of the reference; None if the objective reads none.

    Raises:
        RanksDisagree: on every rank, naming what differs and where.
    """
    if number_of_ranks() == 1:
        return
    rows = b"".join(example.key for dataset in datasets for example in dataset.examples)
    options = {name: str(value) for name, value in args.to_dict().items() if name not in _OF_A_RANK}
    facts = {"data": {"rows": hashlib.sha256(rows).hexdigest()}, "options": options, "versions": package_versions()}
    every = gather_objects(facts)
    for rank, found in enumerate(every):
        for kind, mine in every[0].items():
            for name in mine:
                if found[kind].get(name) != mine[name]:
                    raise RanksDisagree(
                        f"rank {rank} was started with other {kind} than rank 0: {name} is {found[kind].get(name)} there, "
                        f"{mine[name]} on rank 0"
                    )
    if cache_dir is not None:
        _check_common_folder(Path(cache_dir).expanduser())


def _check_common_folder(folder: Path) -> None:
    """Rank 0 writes a file that the others must find."""
    first, token = gather_objects((str(folder), os.urandom(8).hex()))[0]
    mark, problem = folder / f".ranks-{token}", None
    if own_rank() == 0:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            problem = f"rank 0 cannot write cache_dir: {error}"
    problem = gather_objects(problem)[0]
    if problem is not None:
        raise RanksDisagree(problem)
    deadline = time.monotonic() + SHARED_FOLDER_SECONDS
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
        with contextlib.suppress(OSError):
            os.listdir(folder)  # makes NFS look again
    seen = gather_objects(mark.exists())
    if own_rank() == 0:
        mark.unlink()
    if not all(seen):
        raise RanksDisagree(
            f"rank {seen.index(False)} does not see what rank 0 writes into cache_dir {first}: give all ranks one folder on "
            "a shared file system"
        )
