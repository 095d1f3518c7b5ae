"""Killed, out of disk or raced by others: a cache ends with the same bytes as one that was built in peace (C2, C3, C4)."""

import collections
import errno
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from cache_writers import REFERENCE, build, content, rows

from bco_fast import CacheError, ReferenceCache, files

WRITERS = Path(__file__).with_name("cache_writers.py")


@pytest.fixture
def folder():
    """In memory where possible: it is processes that die here, not machines, and a disk would only make us wait."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as path:  # noqa: S108
        yield Path(path)


def _trials(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, WRITERS, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1000, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""  # a warning of a torn shard, or a child's exception
    return [json.loads(line) for line in run.stdout.splitlines()]


def _assert_whole(trials):
    for trial in trials:
        assert trial["torn"] == [], trial
        assert trial["second"] == 0, trial
        assert trial["same"], trial


def test_killed_at_every_step_of_five_commits(folder):
    trials = _trials("steps", folder, 5, 1)
    _assert_whole(trials)
    assert {trial["first"] for trial in trials} == {-9}
    assert {trial["recomputed"] for trial in trials} == {0, 1}
    steps = collections.Counter(trial["step"] for trial in trials)
    assert sum(count >= 5 for count in steps.values()) >= 10, steps


@pytest.mark.parametrize("moments", [40, pytest.param(200, marks=pytest.mark.slow)])
def test_killed_at_random_moments(folder, moments):
    trials = _trials("moments", folder, moments)
    _assert_whole(trials)
    assert len(trials) == moments
    assert sum(trial["first"] == -9 for trial in trials) >= moments / 2
    assert max(trial["recomputed"] for trial in trials) <= 1


def test_four_processes_fill_one_cache_and_one_is_killed(folder):
    trials = _trials("together", folder, 20)
    _assert_whole(trials)
    assert len(trials) == 20
    assert all(trial["others"] == [0, 0, 0] for trial in trials)
    assert sum(trial["first"] == -9 for trial in trials) >= 10
    # Writers that know of one another repeat little; those that do not may all compute the same, but never wait.
    repeated = {split: [t["recomputed"] for t in trials if t["split"] == split] for split in (True, False)}
    assert np.mean(repeated[True]) < np.mean(repeated[False]) / 1.5, repeated


class FaultyDisk:
    """`os`, except that the k-th of the calls that write fails, or writes less than it was asked to."""

    def __init__(self, call, fault):
        self.calls, self.call, self.fault, self.written = 0, call, fault, set()

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in ("open", "write", "fsync", "close", "replace"):
            return real

        def counted(*arguments):
            reading = name == "open" and not arguments[1] & os.O_WRONLY and not os.path.isdir(arguments[0])
            if reading or (name == "close" and arguments[0] not in self.written):
                return real(*arguments)
            self.calls += 1
            if self.calls == self.call and not (self.fault == "short" and name != "write"):
                if self.fault == "short":
                    return real(arguments[0], arguments[1][:3])
                if name == "close":
                    real(*arguments)  # the descriptor is gone, as on Linux
                if name == "write":
                    real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise OSError(self.fault, os.strerror(self.fault))
            result = None if name == "fsync" else real(*arguments)
            if name == "open":
                self.written.add(result)
            return result

        return counted


def _build_on(disk, folder, monkeypatch):
    """-> what a build on this disk complains of, None if it does not."""
    monkeypatch.setattr(files, "os", disk)
    try:
        build(folder, 20)
    except CacheError as error:
        return str(error)
    finally:
        monkeypatch.undo()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, "short"], ids=["no space", "IO error", "short write"])
def test_a_failing_disk_leaves_old_or_new_and_no_temporary_file(folder, monkeypatch, fault):
    build(folder / "whole", 20)
    whole = content(folder / "whole")
    for call in range(1, 51):
        place = folder / f"call{call}"
        build(place, 20, only=8)
        old = content(place)
        disk = FaultyDisk(call, fault)
        complaint = _build_on(disk, place, monkeypatch)
        if fault == "short":
            assert complaint is None
            assert content(place) == whole
        else:
            assert os.strerror(fault) in complaint
            assert "free space or choose another cache_dir" in complaint
            assert disk.calls >= call
        there = content(place, temporary=True)
        assert not [name for name in there if name.endswith(".tmp")]
        assert set(old) <= set(there)
        assert all(whole.get(name) == data for name, data in there.items() if name.startswith("shard-"))
        build(place, 20)
        assert content(place) == whole


def test_a_shard_is_on_the_disk_before_its_name_is(folder, monkeypatch):
    """What survives a crash of the machine, which no test can cause: the order in which the disk is told."""
    said = []

    class Recorder:
        def __getattr__(self, name):
            real = getattr(os, name)
            if name not in ("write", "fsync", "replace"):
                return real
            return lambda *arguments: (said.append((name, *map(_named, arguments[:1]))), real(*arguments))[1]

    def _named(target):
        return Path(os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else target).name

    monkeypatch.setattr(files, "os", Recorder())
    path = ReferenceCache(folder / "new", REFERENCE).write_shard(rows(1), [np.ones(2, np.float32)])
    temporary = said[2][1]
    assert path.name in temporary
    assert said == [
        *(("fsync", folder.name), ("fsync", "new")),  # the names of new folders
        *(("write", temporary), ("fsync", temporary), ("replace", temporary), ("fsync", REFERENCE.digest)),
    ]


def test_a_full_disk_at_the_first_shard_is_an_error_with_a_remedy(folder, monkeypatch):
    cache = ReferenceCache(folder, REFERENCE)
    monkeypatch.setattr(files, "os", FaultyDisk(2, errno.ENOSPC))
    with pytest.raises(CacheError, match=r"No space left on device.*free space or choose another cache_dir"):
        cache.write_shard(rows(3), [np.ones(2, np.float32)] * 3)
    monkeypatch.undo()
    assert len(cache) == 0
    cache.write_shard(rows(3), [np.ones(2, np.float32)] * 3)
    assert len(cache) == 3
