"""`bco-fast reproduce`: a paper's experiment from one YAML file, over seeds: fine-tune, align, generate, judge, and a table.

    output_dir: runs/fig1
    prepare:                        # commands of bco-fast, once
      - convert --data ... --output chosen.jsonl
    sft: configs/sft_x.yaml         # a recipe, for each seed; leave it out where a recipe names its model
    align:                          # name -> recipe, for each seed
      BCO: configs/bco_x.yaml
    generate: --prompts prompts.jsonl --max_new_tokens 512
    judge: --reward PATH            # options of `bco-fast judge`
    against: baseline.jsonl         # what completions are compared with: a file, or sft

Every stage is a command of its own process. A finished one leaves a record in output_dir/stages; the same call goes on with the
first stage that has none, and a training that was stopped resumes from its last whole checkpoint.
"""

from __future__ import annotations

import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files import atomic_text
from .common import Parser, UsageError, check_writable, nearest, usage_errors
from .config_file import load_mapping, recipe_path
from .run_options import own_process, way_on

KEYS = ("output_dir", "prepare", "sft", "align", "generate", "judge", "against")
METRICS = {
    "win_rate": "win rate",
    "lc_win_rate": "length-controlled",
    "reward_a": "reward",
    "mean_tokens": "tokens",
}
"""Number of a judge's or generator's summary -> head of its column; of those that the summaries have."""
FINE_TUNED = "SFT"


@dataclass(frozen=True)
class Stage:
    name: str
    command: tuple[str, ...]
    """Of bco-fast."""
    folder: str = ""
    """A training's output_dir."""


@dataclass(frozen=True)
class Experiment:
    output_dir: Path
    prepare: Sequence[str]
    sft: str | None
    align: Mapping[str, str]
    generate: str
    judge: str
    against: str

    def stages(self, seeds: Sequence[int]) -> Iterator[Stage]:
        """Everything to run, in order."""
        for number, command in enumerate(self.prepare, 1):
            yield Stage(f"prepare-{number}", tuple(shlex.split(command)))
        for seed in seeds:
            yield from self._of_seed(seed)

    def _of_seed(self, seed: int) -> Iterator[Stage]:
        folder = self.output_dir / f"seed-{seed}"
        trained = {} if self.sft is None else {FINE_TUNED: (self.sft, ())}
        start = ("--model", str(folder / FINE_TUNED)) if trained else ()
        trained |= {name: (recipe, start) for name, recipe in self.align.items()}
        for name, (recipe, model) in trained.items():
            out = str(folder / name)
            command = ("train", "--config", recipe, *model, "--seed", str(seed), "--output_dir", out)
            yield Stage(f"seed-{seed}-train-{name}", command, out)
        for name in trained:
            written = ("--model", str(folder / name), "--output", str(folder / f"{name}.jsonl"), "--seed", str(seed))
            yield Stage(f"seed-{seed}-generate-{name}", ("generate", *written, *shlex.split(self.generate)))
        baseline = str(folder / f"{FINE_TUNED}.jsonl") if self.against == "sft" else self.against
        for name in trained:
            completions = str(folder / f"{name}.jsonl")
            if completions != baseline:
                yield Stage(f"seed-{seed}-judge-{name}", ("judge", completions, baseline, *shlex.split(self.judge)))


def read_experiment(path: str) -> Experiment:
    """Raises `ValueError`: names the key that is missing, unknown or of the wrong kind."""
    given = load_mapping(path)
    for key in given:
        if key not in KEYS:
            raise ValueError(f"unknown key {key!r}{nearest(key, KEYS)}")
    for key in ("output_dir", "align", "generate", "judge", "against"):
        if not given.get(key):
            raise ValueError(f"{key} is missing")
    align, prepare, sft = given["align"], given.get("prepare") or [], given.get("sft")
    if not isinstance(align, dict) or not all(isinstance(text, str) for pair in align.items() for text in pair):
        raise ValueError("align must map names to recipes")
    if any(name == FINE_TUNED or Path(name).name != name or not name for name in align):
        raise ValueError(f"align: a name must fit a folder and not be {FINE_TUNED}")
    if not isinstance(prepare, list) or not all(isinstance(command, str) for command in prepare):
        raise ValueError("prepare must be a list of commands")
    texts = {key: given[key] for key in ("output_dir", "generate", "judge", "against")}
    for key, value in (texts | ({} if sft is None else {"sft": sft})).items():
        if not isinstance(value, str):
            raise ValueError(f"{key} must be text, not {type(value).__name__}")
    if given["against"] == "sft" and sft is None:
        raise ValueError("against: sft needs the stage sft")
    for recipe in [*align.values(), *([] if sft is None else [sft])]:
        if not Path(recipe_path(recipe)).is_file():
            raise ValueError(f"no such recipe: {recipe}")
    return Experiment(
        Path(given["output_dir"]), prepare, sft, align, given["generate"], given["judge"], given["against"]
    )


def run_stage(stage: Stage, records: Path, launcher: Sequence[str]) -> dict:
    """Run a stage, or read its record if it is done; -> the summary that its command printed."""
    record = records / f"{stage.name}.json"
    if record.is_file():
        done = json.loads(record.read_text())
        if done["command"] != list(stage.command):
            raise UsageError(
                f"{record} is of another command ({shlex.join(done['command'])}): the experiment has changed; choose another "
                "output_dir, or remove what depends on the change"
            )
        return done["summary"]
    command = [*stage.command, *(way_on(stage.folder) if stage.folder else ())]
    print(f"[{stage.name}] bco-fast {shlex.join(command)}", file=sys.stderr, flush=True)
    arguments = [*own_process(launcher if stage.folder else ()), *command]
    run = subprocess.run(arguments, stdout=subprocess.PIPE, text=True)  # noqa: S603 - the user's own experiment, no shell
    if run.returncode:
        raise UsageError(
            f"{stage.name} ended with exit code {run.returncode}; mend what it says above, then run this again"
        )
    lines = run.stdout.strip().splitlines()
    summary = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    records.mkdir(parents=True, exist_ok=True)
    with atomic_text(record) as file:
        file.write(json.dumps({"command": list(stage.command), "summary": summary}, indent=1) + "\n")
    return summary


def results(summaries: Mapping[str, dict], experiment: Experiment, seeds: Sequence[int]) -> list[dict]:
    """One row for each method: every number of `METRICS` by seed, with its mean and sample deviation."""
    rows = []
    for name in [*([] if experiment.sft is None else [FINE_TUNED]), *experiment.align]:
        row: dict = {"method": name, "seeds": list(seeds)}
        for metric in METRICS:
            stages = (f"seed-{seed}-{kind}-{name}" for seed in seeds for kind in ("generate", "judge"))
            values = [summaries[stage][metric] for stage in stages if metric in summaries.get(stage, {})]
            if len(values) == len(seeds) and None not in values:
                deviation = statistics.stdev(values) if len(values) > 1 else None
                row[metric] = {"values": values, "mean": statistics.mean(values), "sd": deviation}
        rows.append(row)
    return rows


def as_table(rows: Sequence[Mapping]) -> str:
    """Markdown: mean ± sample deviation over the seeds."""
    metrics = [metric for metric in METRICS if any(metric in row for row in rows)]

    def cell(row: Mapping, metric: str) -> str:
        found = row.get(metric)
        if found is None:
            return ""
        scale, digits, unit = (100, 1, " %") if "rate" in metric else (1, 3 if metric == "reward_a" else 1, "")
        spread = "" if found["sd"] is None else f" ± {scale * found['sd']:.{digits}f}"
        return f"{scale * found['mean']:.{digits}f}{spread}{unit}"

    lines = ["| | " + " | ".join(METRICS[metric] for metric in metrics) + " |", "|---" * (1 + len(metrics)) + "|"]
    lines += ["| " + " | ".join([row["method"], *(cell(row, metric) for metric in metrics)]) + " |" for row in rows]
    return "\n".join(lines)


def reproduce(arguments: list[str]) -> dict:
    parser = Parser(prog="bco-fast reproduce", description="Run a paper's experiment over seeds, from one YAML file.")
    parser.add_argument("name", help="the file, or the name of one in configs/experiments")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one whole run each")
    parser.add_argument("--output_dir", metavar="DIR", help="folder of the results (default: the file's)")
    parser.add_argument("--launcher", default="", help="starts training, as in 'accelerate launch --num_processes 8'")
    options = parser.parse_args(arguments)
    path = recipe_path(options.name, "experiments")
    with usage_errors(ValueError, prefix=f"{path}: "):
        experiment = read_experiment(path)
    if len(set(options.seeds)) < len(options.seeds) or min(options.seeds) < 0:
        raise UsageError(f"--seeds must be different numbers >= 0, not {options.seeds}")
    if options.output_dir is not None:
        experiment = Experiment(**{**vars(experiment), "output_dir": Path(options.output_dir)})
    check_writable("--output_dir", experiment.output_dir)
    launcher = shlex.split(options.launcher)
    records = experiment.output_dir / "stages"
    summaries = {s.name: run_stage(s, records, launcher) for s in experiment.stages(options.seeds)}
    rows = results(summaries, experiment, options.seeds)
    with atomic_text(experiment.output_dir / "results.json") as file:
        file.write(json.dumps(rows, indent=1) + "\n")
    with atomic_text(experiment.output_dir / "results.md") as file:
        file.write(as_table(rows) + "\n")
    print(as_table(rows), flush=True)
    return {"stages": len(summaries), "seeds": options.seeds, "results": str(experiment.output_dir / "results.json")}
