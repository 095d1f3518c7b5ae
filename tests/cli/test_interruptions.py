"""Signals, closed pipes, ASCII terminals and full disks: one line, the right exit code, and a way to go on."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import small_runs
import tiny
from small_runs import command_folder

from bco_fast import cli
from bco_fast.cli.common import Terminated
from bco_fast.cli.stopping import StopAfterStep
from bco_fast.files import atomic_path, final_name
from bco_fast.training.checkpoints import examine

RUN = ["train", "--model", "m", "--data", "f.jsonl", "--output_dir", "out", "--cache_dir", "cache", "--max_length", "32", "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "2", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"]  # fmt: skip

ONLINE = ["online", "--model", "m", "--prompts", "p.jsonl", "--reward", "builtins:len", "--output_dir", "out", "--max_length", "32", "--max_steps", "1", "--use_cpu", "true", "--report_to", "none"]  # fmt: skip


@pytest.fixture
def world(tmp_path, monkeypatch):
    command_folder(tmp_path, monkeypatch, 30)
    tiny.write(tmp_path / "p.jsonl", [{"prompt": row["prompt"]} for row in tiny.rows(4)])
    tiny.write(tmp_path / "pairs.jsonl", tiny.pairs(4))
    Path("lora").mkdir()
    Path("lora/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "m"}))
    Path("lora/adapter_model.safetensors").touch()
    for name in ("a", "b"):
        tiny.write(tmp_path / f"{name}.jsonl", [{"prompt": r["prompt"], "completion": name} for r in tiny.rows(4)])
    return tmp_path


# Where each command does its work, and a signal arrives.
COMMANDS = {
    "train, before the first step": (RUN, "bco_fast.training.trainer.FeedbackTrainer._check_start"),
    "train, loading": (RUN, "bco_fast.models.load.load_model"),
    "train, the reference": (RUN, "bco_fast.reference.fill.token_logps"),
    "online": (ONLINE, "bco_fast.online.rewards.load_reward"),
    "generate": (["generate", "--model", "m", "--prompts", "p.jsonl", "--output", "c.jsonl", "--max_new_tokens", "2"], "bco_fast.evaluation.generate.draw"),
    "judge": (["judge", "a.jsonl", "b.jsonl", "--reward", "m"], "bco_fast.online.rewards.load_reward"),
    "shifts": (["shifts", "--model", "m", "--ref_model", "m", "--data", "f.jsonl", "--output_dir", "s", "--max_length", "32"], "bco_fast.evaluation.shifts.collate"),
    "cache build": (["cache", "build", "--model", "m", "--data", "f.jsonl", "--max_length", "32"], "bco_fast.reference.fill.token_logps"),
    "convert": (["convert", "--data", "pairs.jsonl", "--recipe", "pairs", "--to", "pairs", "--output", "c.jsonl"], "bco_fast.data.convert.convert"),
    "udm": (["udm", "--data", "f.jsonl", "--embedder", "tfidf", "--output", "c.jsonl"], "bco_fast.data.density_ratio.make_embedder"),
    "bench": (["bench", "--hidden", "8", "--vocab", "16", "--tokens", "8", "--seconds", "1"], "bco_fast.cli.bench._seconds"),
    "demo": (["demo", "--output_dir", "d"], "bco_fast.cli.demo.build_model"),
    "report": (["report", "out"], "bco_fast.evaluation.report.write_report"),
    "check": (["check", "f.jsonl", "--model", "m", "--max_length", "32"], "bco_fast.data.check.examine"),
    "sweep": (["sweep", "--output_dir", "s", "--model", "m", "--data", "f.jsonl", "--use_cpu", "true"], "bco_fast.cli.sweep.run_all"),
    "merge": (["merge", "--model", "lora", "--output_dir", "merged"], "bco_fast.cli.merge.load_model_and_tokenizer"),
    "export": (["export", "--model", "lora", "--output_dir", "exported", "--gguf", "none"], "bco_fast.cli.export.write_merged"),
    "plan": (["plan", "--model", "m", "--max_length", "32", "--gpu_memory", "1"], "bco_fast.cli.plan.model_config"),
    "reproduce": (["reproduce", "bco_fig1_ultrafeedback"], "bco_fast.cli.reproduce.read_experiment"),
    "reward": (["reward", "--model", "m", "--data", "pairs.jsonl", "--output_dir", "r", "--eval_fraction", "0", "--use_cpu", "true"], "bco_fast.cli.reward._model"),
    "recipes": (["recipes"], "bco_fast.cli.recipes._about"),
}  # fmt: skip


def test_every_command_is_interrupted():
    assert {command.partition(",")[0].split()[0] for command in COMMANDS} == set(cli.COMMANDS)


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), pytest.param(signal.SIGTERM, 143, "terminated", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_signal_is_one_line(world, monkeypatch, capfd, command, number, code, word):
    arguments, where = COMMANDS[command]
    monkeypatch.setattr(where, lambda *_, **__: os.kill(os.getpid(), number))
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(arguments) == code
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith(("INFO", "WARNING"))]
    assert lines[-1].startswith(f"bco-fast: {word}; ")
    assert not any("Traceback" in line for line in lines)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not list(world.rglob(".*.tmp"))


@pytest.fixture
def signals(monkeypatch):
    """Signals that arrive inside training steps: {step: numbers}, counted from 1 over all runs of a test."""
    from transformers import Trainer

    real, steps, sent = Trainer.training_step, [], {}

    def training_step(self, *arguments, **options):
        steps.append(0)
        for number in sent.get(len(steps), ()):
            os.kill(os.getpid(), number)
        return real(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    sent["steps"] = steps
    return sent


def _end_of(folder):
    """The weights, and the log without its times."""
    log = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "per_second", "train_loss")
    return (Path(folder) / "model.safetensors").read_bytes(), [
        {name: value for name, value in line.items() if not name.endswith(timed)} for line in log
    ]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_step_and_saves_a_checkpoint(world, signals, capfd, number, code):
    run = [*RUN, "--logging_steps", "2", "--save_steps", "5"]
    signals[3] = [number]
    assert cli.main(run) == code
    assert [path.name for path in Path("out").glob("checkpoint-*")] == ["checkpoint-3"]
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("bco-fast")]
    assert len(said) == 2
    assert "a checkpoint is saved at the end of this step" in said[0]
    assert said[1].endswith("; continue from out/checkpoint-3 with --resume_from_checkpoint true")
    if number == signal.SIGTERM:
        return
    assert cli.main(run) == 2  # the same command again
    said = capfd.readouterr().err
    assert "holds an interrupted run, up to checkpoint-3: continue it with --resume_from_checkpoint true" in said
    assert cli.main([*run, "--resume_from_checkpoint", "true"]) == 0
    assert len(signals["steps"]) == 6
    assert cli.main([*run, "--output_dir", "whole"]) == 0
    assert _end_of("out") == _end_of("whole")


def test_the_second_interrupt_stops_at_once(world, signals, capfd):
    """A SIGTERM between the two, as torchrun sends it, does not."""
    signals[4] = [signal.SIGINT, signal.SIGTERM, signal.SIGINT]
    assert cli.main(RUN) == 130
    assert sorted(path.name for path in Path("out").glob("checkpoint-*")) == ["checkpoint-2"]
    assert "continue from out/checkpoint-2 with --resume_from_checkpoint true" in capfd.readouterr().err


def test_a_run_without_resumable_checkpoints_stops_at_once(world, signals, capfd):
    signals[4] = [signal.SIGTERM]
    assert cli.main([*RUN, "--save_only_model", "true"]) == 143
    assert len(signals["steps"]) == 4
    assert not Path("out/checkpoint-4").exists()


def _interrupted_on_rank_1(rank, world, folder):
    made = small_runs.trainer(Path(folder), max_steps=6, save_strategy="no")
    real = made.training_step

    def training_step(*arguments, **options):
        if rank == 1 and made.state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    made.training_step = training_step
    try:
        with StopAfterStep(made):
            made.train()
    except Terminated:
        return made.state.global_step
    return None


@pytest.mark.slow
def test_ranks_stop_at_the_same_step(tmp_path):
    assert ranks.run(_interrupted_on_rank_1, 2, tmp_path, str(tmp_path)) == [3, 3]
    assert examine(tmp_path / "out/checkpoint-3").problem is None


LOADERS = """
import os, signal, sys
from bco_fast import cli
from transformers import Trainer

real = Trainer.training_step

def training_step(self, *arguments, **options):
    if self.state.global_step == 2:
        os.killpg(0, int(sys.argv[1]))  # as a terminal or a scheduler does
    return real(self, *arguments, **options)

Trainer.training_step = training_step
sys.exit(cli.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_the_loaders_workers_too(world, number, code):
    command = [sys.executable, "-c", LOADERS, str(int(number)), *RUN, "--dataloader_num_workers", "2"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1000, start_new_session=True)
    assert ended.returncode == code, ended.stderr
    assert "continue from out/checkpoint-3 with --resume_from_checkpoint true" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.count("a checkpoint is saved") == 1


def _shell(line, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
    command = line.replace("bco-fast", f"{shlex.quote(sys.executable)} -m bco_fast.cli")
    return subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, env=kept | environment, timeout=1000)  # fmt: skip


def test_a_closed_pipe_is_no_error():
    ended = _shell("bco-fast train --help | head -n 1")
    assert (ended.returncode, ended.stderr) == (0, "")


def test_help_in_an_ascii_terminal():
    ended = _shell("bco-fast train --help", LC_ALL="C", LANG="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "--shift_mode" in ended.stdout


def test_a_full_standard_output_is_one_line():
    ended = _shell("bco-fast --help > /dev/full")
    assert ended.returncode == 2
    assert ended.stderr.splitlines() == ["bco-fast: error: cannot write (No space left on device)"]


FULL = """
import contextlib, io, json, resource, shutil, signal, sys
from pathlib import Path
from bco_fast import cli
from bco_fast.cli import train
from bco_fast.training import trainer

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
commit = None

def run(arguments, size, after_checkpoint=False):
    # no file grows beyond `size`: writes end as on a full disk
    def limit(*_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))

    if after_checkpoint:
        from bco_fast.training import checkpoints, resume

        def commit(folder):
            checkpoints.commit(folder)
            limit()

        resume.commit = commit
    else:
        limit()
    text = io.StringIO()
    try:
        with contextlib.redirect_stderr(text), contextlib.redirect_stdout(io.StringIO()):
            code = cli.main(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
        if after_checkpoint:
            resume.commit = checkpoints.commit
    left = [str(path) for path in Path().rglob(".*.tmp")]
    return code, text.getvalue(), left

found = []
for arguments, *how in json.loads(sys.argv[1]):
    code, text, left = run(arguments, *how)
    more = None
    if arguments[0] == "train":
        asked = "--resume_from_checkpoint" if "continue from" in text else "--overwrite_output_dir"
        resumed = [asked, "true"]
        more = cli.main([*arguments, *resumed])
        shutil.rmtree("out")
        shutil.rmtree("cache", ignore_errors=True)
    found.append([code, text, left, more])
print(json.dumps(found))
"""
"""In a process of its own: a limit on the size of files holds for the output of the tests too."""


def _on_a_full_disk(*runs):
    ended = subprocess.run([sys.executable, "-c", FULL, json.dumps(runs)], capture_output=True, text=True, timeout=1000)
    assert ended.returncode == 0, ended.stderr
    for code, text, left, more in json.loads(ended.stdout.splitlines()[-1]):
        line = text.splitlines()[-1]
        assert code == 2
        assert line.startswith("bco-fast: error: ")
        assert "cannot write" in line
        assert "Traceback" not in text
        assert not left
        assert more in (None, 0)
        yield line


@pytest.mark.slow
def test_a_full_disk_in_training_is_one_line(world):
    lines = list(_on_a_full_disk(*([RUN, size] for size in (0, 300, 4_000, 20_000, 60_000, 100_000))))
    assert len(lines) == 6


@pytest.mark.slow
def test_a_full_disk_after_a_checkpoint_names_it(world):
    (line,) = _on_a_full_disk([RUN, 1000, True])
    assert "continue from out/checkpoint-2 with --resume_from_checkpoint true" in line


@pytest.mark.slow
def test_a_full_disk_names_the_file(world):
    names = ("convert", "udm", "generate", "shifts")
    runs = [[COMMANDS[name][0], 10] for name in names]
    lines = list(_on_a_full_disk(*runs))
    assert all("cannot write" in line for line in lines)
    assert [("c.jsonl" in line, "shifts" in line) for line in lines] == [(True, False)] * 3 + [(False, True)]
    assert not Path("c.jsonl").exists()


def test_the_final_name_of_a_temporary_file(tmp_path):
    with atomic_path(tmp_path / "a.b.json") as temporary:
        temporary.touch()
        assert final_name(temporary) == str(tmp_path / "a.b.json")
    assert final_name("x/.hidden") == "x/.hidden"


def test_a_file_that_cannot_be_read_is_not_called_a_failed_write():
    from bco_fast.cli.common import write_failure

    assert write_failure(PermissionError(13, "Permission denied", "m/config.json")) is None
    assert write_failure(OSError(28, "No space left on device", "a")) == "cannot write a (No space left on device)"
