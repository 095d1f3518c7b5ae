"""Reading the folder of a run, finished or still training."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..losses.metrics import auc_interval

LARGEST = 1e30
MAX_BYTES = 256 << 20  # of a log; a million lines
MAX_LINE, MAX_ROWS = 1 << 16, 1 << 22  # of held_out.jsonl
MAX_SAMPLES = 16 << 20  # bytes of samples.jsonl


class ReportError(ValueError):
    """A folder that is not a run, or a report that cannot be written."""


@dataclass
class Run:
    """The log, record and held-out rows of a run."""

    folder: Path
    name: str
    history: list[dict]
    """Log lines; each has a step."""
    record: dict
    """run.json, or empty."""
    rows: dict[str, np.ndarray] | None = None
    """Held-out completions of the last evaluation: label bool, reward, logp (nats), tokens."""
    rows_step: int = 0
    samples: list[dict] = field(default_factory=list)
    """Completions of sample prompts: step, prompt (text or messages) and completion."""
    left_out: list[str] = field(default_factory=list)

    def series(self, key: str, scale: float = 1.0) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, finite ones only."""
        lines = [(line["step"], line[key]) for line in self.history if is_finite(line.get(key)) and "step" in line]
        return [step for step, _ in lines], [value * scale for _, value in lines]

    def last(self, key: str) -> float | None:
        values = self.series(key)[1]
        return values[-1] if values else None

    @property
    def loss_type(self) -> str:
        return str(self.record.get("loss_type", "unknown objective"))

    @property
    def nats(self) -> float | None:
        """The factor from rewards to log-ratios to the reference, in nats; None without a reference."""
        if not self.record.get("reference"):
            return None
        beta = self.record.get("beta")
        return 1 / beta if is_finite(beta) and beta > 1 / LARGEST else 1.0

    @property
    def data_name(self) -> str | None:
        """Of the file or the Hub's dataset of the training rows."""
        found = ((self.record.get("data") or {}).get("train") or {}).get("source")
        return found if isinstance(found, str) else None

    def auc_bounds(self, auc: float | None) -> tuple[float, float] | None:
        """95 % interval of a held-out AUC; None where the number of rows of each class is unknown."""
        counts = (self.record.get("data") or {}).get("held_out")
        up, down = (counts.get(side) if isinstance(counts, dict) else None for side in ("up", "down"))
        if not (is_finite(auc) and 0 <= auc <= 1 and is_finite(up) and is_finite(down) and min(up, down) >= 1):
            return None
        return auc_interval(auc, int(up), int(down))

    @property
    def reward_unit(self) -> str:
        plain = {"bnf": "nats", "slic": "nats", "sft": "nats per token", "orpo": "nats per token"}
        return plain.get(self.loss_type, "reward units")


def is_finite(value) -> bool:
    """A number that can be drawn: of 1e30 and more, an axis shows nothing, and its arithmetic overflows."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


def load_run(folder: str | os.PathLike) -> Run:
    """A run from its folder, finished or not, or from the folder of one checkpoint.

    Raises:
        ReportError: there is no such folder, or no log in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ReportError(f"{folder}: {'not a folder' if folder.exists() else 'no such folder'}")
    states = []
    for file in [folder / "trainer_state.json", *folder.glob("checkpoint-*/trainer_state.json")]:
        state = _json(file)
        if isinstance(state, dict) and isinstance(state.get("log_history"), list):
            step = state.get("global_step")
            states.append((step if is_finite(step) else 0, file.parent == folder, state["log_history"], file))
    if not states:
        raise ReportError(f"{folder}: not a run, it has no readable trainer_state.json and no checkpoint with one")
    _, whole, history, file = max(states, key=lambda state: state[:2])
    history = [line for line in history if isinstance(line, dict) and is_finite(line.get("step"))]
    home = folder if (folder / "run.json").is_file() or not folder.name.startswith("checkpoint-") else folder.parent
    record = _json(home / "run.json")
    run = Run(folder, folder.resolve().name, history, _parts(record))
    if not whole:
        run.left_out.append(f"The log is that of {file.parent.name}: the run has not ended, or was interrupted.")
    if not run.record:
        run.left_out.append("No run.json: objective, β, memory and time are unknown, and there is no log-ratio plot.")
    _read_rows(run, home / "held_out.jsonl")
    _read_samples(run, home / "samples.jsonl")
    return run


def _parts(record) -> dict:
    """run.json without parts of another form than ours."""
    record = dict(record) if isinstance(record, dict) else {}
    for key in ("options", "versions", "data"):
        if not isinstance(record.get(key, {}), dict):
            del record[key]
    if not isinstance(record.get("data", {}).get("train", {}), dict):
        del record["data"]
    return record


def _json(path: Path):
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ReportError(f"{path}: larger than {MAX_BYTES >> 20} MiB, not the log of a run")
        return json.loads(path.read_text(encoding="utf-8"))
    except ReportError:
        raise
    except (OSError, ValueError, RecursionError):
        return None


def _read_rows(run: Run, path: Path) -> None:
    if not path.is_file():
        run.left_out.append("No held_out.jsonl (no evaluation yet): reward histogram and length plot are left out.")
        return
    rows = []
    try:
        with path.open(encoding="utf-8") as file:
            while line := file.readline(MAX_LINE + 1):
                if len(line) > MAX_LINE or len(rows) == MAX_ROWS:
                    raise ValueError("too long")
                row = json.loads(line)
                values = (row[name] for name in ("label", "reward", "logp", "tokens"))
                rows.append([math.nan if value is None else float(value) for value in values])
                run.rows_step = int(row["step"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        run.left_out.append(f"held_out.jsonl cannot be read (line {len(rows) + 1}): its plots are left out.")
        return
    columns = np.array(rows, dtype=np.float64).reshape(-1, 4)
    columns = columns[(np.abs(columns) < LARGEST).all(1)]
    if not len(columns):
        run.left_out.append("held_out.jsonl has no finite row: its plots are left out.")
        return
    label, reward, logp, tokens = columns.T
    run.rows = {"label": label.astype(bool), "reward": reward, "logp": logp, "tokens": tokens}


def _read_samples(run: Run, path: Path) -> None:
    if not path.is_file():
        return
    try:
        if path.stat().st_size > MAX_SAMPLES:
            raise ValueError("too long")
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            prompt, completion = row["prompt"], row["completion"]
            text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            if not (is_finite(row["step"]) and isinstance(text, str) and isinstance(completion, str)):
                raise ValueError("of another form")
            run.samples.append({"step": int(row["step"]), "prompt": prompt, "text": text, "completion": completion})
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError):
        run.left_out.append("samples.jsonl cannot be read: the completions of sample prompts are left out.")
        run.samples = []
