"""The processes of a sweep: at most so many at a time, each with its log, and a record once it is finished."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..files import atomic_text
from .common import UsageError, logger
from .run_options import own_process, way_on

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class SweepRun:
    name: str
    folder: Path
    command: tuple[str, ...]
    """Of bco-fast."""
    options: Mapping[str, str]
    """Those with several values."""
    seed: int
    reference: tuple[str, ...]
    """Runs of which this is equal have the same reference."""
    config: Mapping[str, object]
    """What --config says."""

    @property
    def record(self) -> Path:
        return self.folder.parent / "records" / f"{self.name}.json"

    @property
    def log(self) -> Path:
        return self.folder.parent / "logs" / f"{self.name}.log"

    @property
    def identity(self) -> dict:
        return {"command": list(self.command), "config": json.loads(json.dumps(self.config, default=str))}

    @property
    def done(self) -> bool:
        """Whether it is finished. Raises `UsageError` if what is there was trained otherwise."""
        if not self.record.is_file():
            return False
        found = json.loads(self.record.read_text(encoding="utf-8"))
        if found != self.identity:
            raise UsageError(
                f"--output_dir: {self.name} was trained with other options ({shlex.join(found['command'])}); choose another "
                f"folder, or delete {self.folder} and {self.record}"
            )
        return True

    @property
    def has_reference(self) -> bool:
        """run.json is written when training begins, after the reference."""
        return (self.folder / "run.json").is_file()


@dataclass
class Pool:
    """Starts runs and watches them.

    Of runs with the same reference one goes first; the others start once it has computed it, and read it from the cache.
    """

    jobs: int
    launcher: Sequence[str]
    total: int
    running: dict[int, tuple[SweepRun, subprocess.Popen, float]] = field(default_factory=dict)
    leaders: dict[tuple, SweepRun] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    started: int = 0

    def fill(self, waiting: list[SweepRun]) -> None:
        for slot in range(self.jobs):
            if slot not in self.running:
                run = next((run for run in waiting if self._may_start(run)), None)
                if run is None:
                    return
                waiting.remove(run)
                self.leaders.setdefault(run.reference, run)
                self.started += 1
                logger.info("[%d of %d] %s: started, log in %s", self.started, self.total, run.name, run.log)
                self.running[slot] = run, self._start(run, slot), time.monotonic()

    def _may_start(self, run: SweepRun) -> bool:
        leader = self.leaders.get(run.reference)
        return leader is None or leader.has_reference

    def _start(self, run: SweepRun, slot: int) -> subprocess.Popen:
        environment = dict(os.environ)
        if self.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // self.jobs)))
        gpus = [] if self.launcher else visible_gpus()
        if len(gpus) > 1:
            environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
        command = [*own_process(self.launcher), *run.command, *way_on(run.folder)]
        with run.log.open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)  # noqa: S603 - the user's own options, no shell

    def reap(self) -> None:
        for slot, (run, process, start) in list(self.running.items()):
            if (code := process.poll()) is None:
                continue
            del self.running[slot]
            if code == 0:
                with atomic_text(run.record) as file:
                    json.dump(run.identity, file, indent=1)
                logger.info("%s: finished in %.0f s", run.name, time.monotonic() - start)
                continue
            self.problems[run.name] = _last_error(run.log) or f"exit code {code}"
            logger.warning("%s: failed (%s)", run.name, self.problems[run.name])
            if self.leaders.get(run.reference) is run and not run.has_reference:
                del self.leaders[run.reference]

    def stop(self) -> None:
        """Let every run end its step and save a checkpoint. One that has had the terminal's Ctrl-C takes this for the same."""
        for _, process, _ in self.running.values():
            process.terminate()
        for _, process, _ in self.running.values():
            process.wait()


def run_all(runs: Sequence[SweepRun], jobs: int, launcher: Sequence[str]) -> dict[str, str]:
    """Run what is not finished; -> why runs failed, by name.

    Raises:
        KeyboardInterrupt: after every run has saved a checkpoint.
    """
    waiting = [run for run in runs if not run.done]
    pool = Pool(jobs, launcher, len(waiting))
    for run in runs:
        if run not in waiting:
            pool.leaders.setdefault(run.reference, run)
    if len(waiting) < len(runs):
        logger.info("%d of %d runs are finished already", len(runs) - len(waiting), len(runs))
    try:
        while waiting or pool.running:
            pool.fill(waiting)
            pool.reap()
            if pool.running:
                time.sleep(POLL_SECONDS)
    except KeyboardInterrupt as stop:
        pool.stop()
        stop.args = ("the same call continues",)
        raise
    return pool.problems


def visible_gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


def _last_error(log: Path) -> str:
    """What a run said last: its error, else its last line."""
    lines = list(_tail(log))
    errors = [line for line in lines if line.startswith("bco-fast: ")]
    return (errors or lines or [""])[-1].removeprefix("bco-fast: ").removeprefix("error: ")[:400]


def _tail(log: Path, most: int = 1 << 16) -> Iterator[str]:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - most))
        text = file.read().decode("utf-8", "replace")
    yield from (line.strip() for line in re.split(r"[\r\n]+", text) if line.strip())
