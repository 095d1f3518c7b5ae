"""Processes that fill a reference cache and are killed at it; run by test_cache_crash.py.

    python cache_writers.py steps FOLDER SHARDS EVERY         killed at every EVERY-th step of a build
    python cache_writers.py moments FOLDER TRIALS             killed after a random time
    python cache_writers.py together FOLDER ROUNDS            four at once, one of them killed

Prints one JSON object a trial. Children are forks of a process without torch: a trial costs milliseconds. "Model outputs"
are a function of the key alone, so that every build of the same rows must end with the same files.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import numpy as np

from bco_fast import files
from bco_fast.reference.cache import ReferenceCache, ReferenceId

REFERENCE = ReferenceId("w", "c", "float32", "sdpa")
ROWS_PER_SHARD = 4
# Where builds finish before they are killed, kill sooner: a machine is not always as fast as when we measured it.
ADAPT = {-9: 1.1, 0: 0.8}
files._PIECE = 512  # a shard is written in several pieces, so that there is a middle to be killed in


def rows(count):
    rng = np.random.default_rng(0)
    return sorted(rng.bytes(16) for _ in range(count))


def build(folder, count, seconds=0.0, share=(0, 1), only=None):
    """A build of all rows, or of the first ones; appends a byte to `folder.log` for every shard that is computed."""

    def compute(keys):
        with open(f"{folder}.log", "ab") as log:
            log.write(b".")
        time.sleep(seconds)
        return [np.random.default_rng(list(key)).normal(-2, 1, 40).astype(np.float32) for key in keys]

    opened = ReferenceCache(folder, REFERENCE)
    keys = rows(count)[:only]
    missing = [key for key, shard in zip(keys, opened.find(keys)[:, 0], strict=True) if shard < 0]
    if missing:
        plan = opened.make_plan(keys, rows_per_shard=ROWS_PER_SHARD, tokens_per_batch=64)
        opened.build(missing, compute, rows_per_shard=plan.rows_per_shard, share=share)
    opened.settle()
    assert not np.isnan(opened.sums(keys)).any()
    for key in keys:
        opened.token_logps(key)


def child(work, *arguments, **options):
    pid = os.fork()
    if pid:
        return pid
    try:
        work(*arguments, **options)
        os._exit(0)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def status(pid):
    """-9 for a process that was killed, else its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def content(folder, temporary=False):
    files = (folder / REFERENCE.digest).glob("*") if folder.exists() else []
    return {p.name: p.read_bytes().hex() for p in files if temporary or not p.name.startswith(".")}


def computed(folder):
    log = Path(f"{folder}.log")
    return log.stat().st_size if log.exists() else 0


def dying(folder, count, step):
    """Build, killed at the step-th failpoint (0: never); the names of the steps go to `folder.steps`."""
    passed = []

    def failpoint(name):
        passed.append(name)
        if len(passed) == step:
            Path(f"{folder}.steps").write_text(json.dumps(passed))
            os.kill(os.getpid(), signal.SIGKILL)

    files.failpoint = failpoint
    build(folder, count)
    Path(f"{folder}.steps").write_text(json.dumps(passed))


def trial(folder, whole, shards, first, **facts):
    """After one build was interrupted (its exit status is `first`), what is there, and what does the next one make of it?"""
    torn = [name for name, data in content(folder).items() if name.startswith("shard-") and whole.get(name) != data]
    second = status(child(build, folder, shards * ROWS_PER_SHARD))
    print(json.dumps({
        **facts, "first": first, "second": second, "torn": torn,
        "same": content(folder) == whole, "recomputed": computed(folder) - shards,
    }))  # fmt: skip


def uninterrupted(folder, shards):
    begin = time.perf_counter()
    if status(child(dying, folder, shards * ROWS_PER_SHARD, 0)):
        raise SystemExit("the uninterrupted build failed")
    return content(folder), json.loads(Path(f"{folder}.steps").read_text()), time.perf_counter() - begin


def steps(root, shards, every):
    whole, names, _ = uninterrupted(root / "whole", shards)
    for step in range(1, len(names) + 1, every):
        folder = root / f"step{step}"
        first = status(child(dying, folder, shards * ROWS_PER_SHARD, step))
        trial(folder, whole, shards, first, step=names[step - 1])


def moments(root, trials):
    shards, rng = 5, random.Random(0)  # noqa: S311
    whole, _, _ = uninterrupted(root / "whole", shards)
    begin = time.perf_counter()
    status(child(build, root / "timed", shards * ROWS_PER_SHARD, 0.001))
    duration = time.perf_counter() - begin
    for number in range(trials):
        folder = root / f"moment{number}"
        pid = child(build, folder, shards * ROWS_PER_SHARD, 0.001)
        time.sleep(rng.uniform(0, duration))
        os.kill(pid, signal.SIGKILL)
        first = status(pid)
        duration *= ADAPT[first]
        trial(folder, whole, shards, first)


def together(root, rounds):
    shards, processes, rng = 8, 4, random.Random(0)  # noqa: S311
    whole, _, duration = uninterrupted(root / "whole", shards)
    for number in range(rounds):
        folder = root / f"round{number}"
        shares = [(rank, processes) if number % 2 else (0, 1) for rank in range(processes)]
        pids = [child(build, folder, shards * ROWS_PER_SHARD, 0.002, share=share) for share in shares]
        time.sleep(rng.uniform(0, duration))
        victim = pids.pop(rng.randrange(processes))
        os.kill(victim, signal.SIGKILL)
        first, others = status(victim), [status(pid) for pid in pids]
        duration *= ADAPT[first]
        trial(folder, whole, shards, first, others=others, split=number % 2 == 1)


if __name__ == "__main__":
    warnings.simplefilter("error")  # a torn shard would be a warning
    {"steps": steps, "moments": moments, "together": together}[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:]))
