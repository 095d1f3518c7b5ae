"""What every benchmark needs: who measured, how long, how much memory, and a file that says so."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import fcntl
import importlib.metadata as metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def environment() -> dict:
    """Machine, versions, commit and date of a measurement."""

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    cpu = next((line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if "model name" in line), "")
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": git.stdout.strip() or None,
        "cpu": cpu or platform.processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "transformers", "numpy")},
    }


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def interleaved(cases: dict[str, Callable[[], object]], repeats: int, *, cuda: bool = False) -> dict[str, list[float]]:
    """Seconds of each call, the cases taking turns, so that a drifting machine slows them all alike. One warm-up turn."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(repeats + 1):
        for name, case in cases.items():
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            case()
            if cuda:
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def summary(seconds: list[float]) -> dict:
    return {
        "median_s": round(statistics.median(seconds), 5),
        "min_s": round(min(seconds), 5),
        "max_s": round(max(seconds), 5),
        "runs": len(seconds),
    }


def reset_peak_rss() -> int:
    """Forget the peak resident memory of this process (Linux with glibc); -> resident bytes now."""
    ctypes.CDLL(None).malloc_trim(0)  # or a call would find for nothing what the one before it freed
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_rss() -> int:
    """Largest resident memory since `reset_peak_rss`, bytes."""
    return _status("VmHWM")


def _status(field: str) -> int:
    line = next(line for line in _read("/proc/self/status").splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def in_own_process(script: str, *arguments: str, python: str | Path = sys.executable) -> dict:
    """Run `python script --case ...` and read the JSON of its last line: memory is measured from a clean start."""
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "TRL_EXPERIMENTAL_SILENCE": "1"}
    if python != sys.executable:  # a peer's environment, which must not find us
        environment.pop("PYTHONPATH", None)
    run = subprocess.run([python, script, *arguments], capture_output=True, text=True, env=environment)
    if run.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{run.stderr[-2000:]}")
    return json.loads(run.stdout.strip().splitlines()[-1])


class Worker:
    """A case in its own process, which waits until it is its turn: lines of JSON that begin with @ are its answers."""

    def __init__(self, name: str, command: list, log: Path, **environment: str | None):
        self.name, self.log = name, log.open("w+")
        variables = {**os.environ, "PYTHONWARNINGS": "ignore"} | environment
        self.process = subprocess.Popen(
            [*map(str, command)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env={name: value for name, value in variables.items() if value is not None},
        )

    def answer(self):
        """What the process says next."""
        for line in self.process.stdout:
            if line.startswith("@"):
                return json.loads(line[1:])
        self.log.seek(0)
        raise RuntimeError(f"{self.name} failed:\n{self.log.read()[-3000:]}")

    def turn(self, message: str = ""):
        """Let it go on; -> its answer."""
        with contextlib.suppress(BrokenPipeError):  # a dead process has said why in its log
            self.process.stdin.write(message + "\n")
            self.process.stdin.flush()
        return self.answer()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def say(answer) -> None:
    """The worker's side: one answer to the parent."""
    print("@" + json.dumps(answer), flush=True)


def peers_python(package: str) -> Path:
    """The interpreter of a peer's own environment; this one, where its wheels were installed beside ours."""
    name, _, wanted = package.partition("-")
    with contextlib.suppress(metadata.PackageNotFoundError):
        if wanted and metadata.version(name).startswith(wanted):
            return Path(sys.executable)
    folder = ROOT / f".venv-peers-{package}"
    if not (folder / ".made").is_file():
        raise FileNotFoundError(f"no environment {folder.name}: run `make venv-peers`")
    return folder / "bin" / "python"


def save(name: str, rows: list[dict], *, folder: Path = RESULTS, keys: tuple[str, ...] = ()) -> Path:
    """Write rows with their environment; committed files of this kind are what the README may quote.

    With `keys`, rows already in the file stay unless one of these has the same values there; as not all rows then are
    of one run, each says its date, commit and processor. Processes may save to one file at the same time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, now = folder / f"{name}.json", environment()
    if keys:
        rows = [{**row, "measured": {k: now[k] for k in ("date", "commit", "cpu")}} for row in rows]
    new = {tuple(row.get(k) for k in keys) for row in rows}
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        earlier = json.loads(path.read_text())["rows"] if keys and path.exists() else []
        rows = [row for row in earlier if tuple(row.get(k) for k in keys) not in new] + rows
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({"environment": now, "rows": rows}, indent=1) + "\n")
        os.replace(temporary, path)
    finally:
        os.close(lock)
    return path


def table(rows: list[dict], columns: list[str]) -> str:
    """Rows as aligned text."""

    def show(value) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)

    cells = [columns, *([show(row.get(c)) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in cells)
