"""`bco-fast reproduce`: stages in order, each once; a stopped experiment goes on; a table over seeds."""

import json
import statistics
import subprocess
from pathlib import Path

import pytest
import tiny
import yaml

from bco_fast import cli
from bco_fast.cli import reproduce
from bco_fast.cli.run_options import way_on

ROOT = Path(__file__).parents[2]
EXPERIMENT = {
    "output_dir": "runs/e", "prepare": ["convert --data d --output c"], "sft": "sft.yaml",
    "align": {"BCO": "bco.yaml", "DPO": "dpo.yaml"}, "generate": "--prompts p.jsonl --max_new_tokens 4", "judge": "--reward m",
    "against": "sft",
}  # fmt: skip


def _write(**changes):
    for name in ("sft", "bco", "dpo"):
        Path(f"{name}.yaml").write_text("loss_type: bco\n")
    Path("e.yaml").write_text(yaml.safe_dump({k: v for k, v in (EXPERIMENT | changes).items() if v is not None}))


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands that would run; a judge's win rate depends on method and seed."""
    monkeypatch.chdir(tmp_path)
    ran, fails = [], []

    def run(command, **options):
        arguments = command[command.index("bco_fast.cli") + 1 :]
        ran.append(arguments)
        if fails and fails[0] in " ".join(arguments):
            return subprocess.CompletedProcess(command, 3, "")
        if arguments[0] == "train":
            Path(arguments[arguments.index("--output_dir") + 1]).mkdir(parents=True, exist_ok=True)
        summary = {"mean_tokens": 3.0} if arguments[0] == "generate" else {}
        if arguments[0] == "judge":
            seed = int(arguments[1].split("seed-")[1][0])
            summary = {"win_rate": (0.6 if "BCO" in arguments[1] else 0.5) + 0.01 * seed, "reward_a": 1.0}
        return subprocess.CompletedProcess(command, 0, "a table\n" + json.dumps(summary) + "\n")

    monkeypatch.setattr(reproduce.subprocess, "run", run)
    return ran, fails


def test_stages_run_in_order_with_seed_and_start(commands):
    ran, _ = commands
    _write()
    assert cli.main(["reproduce", "e.yaml", "--seeds", "0", "1"]) == 0
    assert [c[0] for c in ran] == ["convert", *(["train"] * 3 + ["generate"] * 3 + ["judge"] * 2) * 2]
    assert ran[1] == ["train", "--config", "sft.yaml", "--seed", "0", "--output_dir", "runs/e/seed-0/SFT"]
    assert ran[2][:5] == ["train", "--config", "bco.yaml", "--model", "runs/e/seed-0/SFT"]
    assert ran[5][-4:] == ["--prompts", "p.jsonl", "--max_new_tokens", "4"]
    assert ran[8] == ["judge", "runs/e/seed-0/DPO.jsonl", "runs/e/seed-0/SFT.jsonl", "--reward", "m"]
    rows = json.loads(Path("runs/e/results.json").read_text())
    assert [row["method"] for row in rows] == ["SFT", "BCO", "DPO"]
    assert rows[1]["win_rate"]["values"] == [0.6, 0.61]
    assert rows[1]["win_rate"]["sd"] == statistics.stdev([0.6, 0.61])
    assert "win_rate" not in rows[0]
    assert "| BCO | 60.5 ± 0.7 % | 1.000 ± 0.000 | 3.0 ± 0.0 |" in Path("runs/e/results.md").read_text()


def test_a_stopped_experiment_goes_on_where_it_stopped(commands, capsys):
    ran, fails = commands
    _write()
    fails.append("--output_dir runs/e/seed-1/BCO")
    assert cli.main(["reproduce", "e.yaml", "--seeds", "0", "1"]) == 2
    assert "seed-1-train-BCO ended with exit code 3" in capsys.readouterr().err
    before = len(ran)
    fails.clear()
    Path("runs/e/seed-1/BCO").mkdir(parents=True)  # it had begun, without a whole checkpoint
    assert cli.main(["reproduce", "e.yaml", "--seeds", "0", "1"]) == 0
    assert ran[before][-2:] == ["--overwrite_output_dir", "true"]
    assert len(ran) == before + 7  # BCO and DPO of seed 1, three times generate, two judges
    assert cli.main(["reproduce", "e.yaml", "--seeds", "0", "1"]) == 0
    assert len(ran) == before + 7
    _write(judge="--reward other")
    assert cli.main(["reproduce", "e.yaml", "--seeds", "0"]) == 2
    assert "the experiment has changed" in capsys.readouterr().err


def test_a_training_resumes_from_its_whole_checkpoint(tmp_path):
    checkpoint = tmp_path / "out" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    assert way_on(tmp_path / "out") == ["--overwrite_output_dir", "true"]
    (checkpoint / "manifest.json").write_text("{}")
    assert way_on(tmp_path / "out") == ["--resume_from_checkpoint", "true"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"align": None}, "align is missing"),
        ({"sft": None}, "against: sft needs the stage sft"),
        ({"align": {"BCO": "nowhere.yaml"}}, "no such recipe: nowhere.yaml"),
        ({"align": {"a/b": "bco.yaml"}}, "align: a name must fit a folder"),
        ({"aline": "x"}, "unknown key 'aline'; did you mean 'align'?"),
        ({"prepare": "convert"}, "prepare must be a list"),
        ({"judge": 3}, "judge must be text, not int"),
    ],
)
def test_a_bad_file_is_named(commands, capsys, changes, message):
    _write(**changes)
    assert cli.main(["reproduce", "e.yaml"]) == 2
    assert f"e.yaml: {message}" in capsys.readouterr().err
    assert cli.main(["reproduce", "e.yaml", "--seeds", "1", "1"]) == 2


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_papers_experiments_are_whole(path, monkeypatch):
    """Their recipes exist, files that are read are written by a step before, and options are those of the commands."""
    monkeypatch.chdir(ROOT)
    experiment = reproduce.read_experiment(str(path))
    written = {words[words.index("--output") + 1] for words in (command.split() for command in experiment.prepare)}
    read = {
        recipe["data"]
        for recipe in (yaml.safe_load(Path(r).read_text()) for r in (experiment.sft, *experiment.align.values()))
    }
    assert {name for name in read if name.endswith(".jsonl")} | {experiment.against} <= written
    source = "".join(file.read_text() for file in (ROOT / "bco_fast" / "cli").glob("*.py"))
    for stage in experiment.stages([0]):
        for word in stage.command:
            if word.startswith("--") and stage.command[0] != "train":
                assert f'"{word}"' in source, word
    assert f"bco-fast reproduce {path.stem} --seeds 0 1 2" in path.read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_experiment_on_the_tiny_model(tmp_path, monkeypatch):
    """Real commands from end to end, and again without running anything."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    tiny.model().save_pretrained("m")
    tiny.build_tokenizer().save_pretrained("m")
    tiny.write(tmp_path / "pairs.jsonl", tiny.pairs(24))
    tiny.write(tmp_path / "prompts.jsonl", [{"prompt": p} for p in tiny.all_prompts()[:6]])
    Path("rule.py").write_text(
        "def words(prompts, completions, **_):\n    return [float(len(c.split())) for c in completions]\n"
    )
    common = {
        "max_steps": 2, "max_length": 48, "per_device_train_batch_size": 4, "eval_fraction": 0, "use_cpu": True,
        "save_strategy": "no", "report_to": "none", "learning_rate": 0.01, "cache_dir": "cache", "output_dir": "unused",
    }  # fmt: skip
    recipes = {"sft": {"model": "m", "data": "chosen.jsonl"}, "bco": {"data": "pairs.jsonl"}}
    for name, own in recipes.items():
        Path(f"{name}.yaml").write_text(
            yaml.safe_dump({"model": "from the experiment", **common, **own, "loss_type": name})
        )
    prepare = ["convert --data pairs.jsonl --recipe pairs --to chosen --output chosen.jsonl"]
    generate = "--prompts prompts.jsonl --max_new_tokens 4 --batch_size 6"
    own = {"align": {"BCO": "bco.yaml"}, "prepare": prepare, "generate": generate, "judge": "--reward rule:words"}
    Path("e.yaml").write_text(yaml.safe_dump(EXPERIMENT | own))
    assert cli.main(["reproduce", "e.yaml", "--seeds", "3"]) == 0
    (_, row) = json.loads(Path("runs/e/results.json").read_text())
    assert 0 <= row["win_rate"]["mean"] <= 1
    assert row["win_rate"]["sd"] is None
    records = {path: path.stat().st_mtime_ns for path in Path("runs/e/stages").glob("*.json")}
    assert len(records) == 1 + 2 + 2 + 1
    assert cli.main(["reproduce", "e.yaml", "--seeds", "3"]) == 0
    assert records == {path: path.stat().st_mtime_ns for path in Path("runs/e/stages").glob("*.json")}
