"""Signals, closed pipes, ASCII terminals and full disks: one line, the right exit code, and a way to go on."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from small_runs import TOKENIZER

from bco_fast import cli
from bco_fast.files import atomic_path, final_name

RUN = ["train", "--model", "m", "--data", "f.jsonl", "--output_dir", "out", "--cache_dir", "cache", "--max_length", "32", "--max_steps", "6", "--save_strategy", "steps", "--save_steps", "2", "--use_cpu", "true", "--report_to", "none", "--disable_tqdm", "true"]  # fmt: skip


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.model().save_pretrained("m")
    TOKENIZER.save_pretrained("m")
    tiny.write(tmp_path / "f.jsonl", tiny.rows(30))
    tiny.write(tmp_path / "p.jsonl", [{"prompt": row["prompt"]} for row in tiny.rows(4)])
    tiny.write(tmp_path / "pairs.jsonl", tiny.pairs(4))
    for name in ("a", "b"):
        tiny.write(tmp_path / f"{name}.jsonl", [{"prompt": r["prompt"], "completion": name} for r in tiny.rows(4)])
    return tmp_path


# Where each command does its work, and a signal arrives.
COMMANDS = {
    "train": (RUN, "transformers.Trainer.training_step"),
    "train, loading": (RUN, "bco_fast.models.load.load_model"),
    "train, the reference": (RUN, "bco_fast.reference.fill.token_logps"),
    "generate": (["generate", "--model", "m", "--prompts", "p.jsonl", "--output", "c.jsonl", "--max_new_tokens", "2"], "bco_fast.evaluation.generate.draw"),
    "judge": (["judge", "a.jsonl", "b.jsonl", "--reward", "m"], "bco_fast.online.rewards.load_reward"),
    "shifts": (["shifts", "--model", "m", "--ref_model", "m", "--data", "f.jsonl", "--output_dir", "s", "--max_length", "32"], "bco_fast.evaluation.shifts.collate"),
    "cache build": (["cache", "build", "--model", "m", "--data", "f.jsonl", "--max_length", "32"], "bco_fast.reference.fill.token_logps"),
    "convert": (["convert", "--data", "pairs.jsonl", "--recipe", "pairs", "--to", "pairs", "--output", "c.jsonl"], "bco_fast.data.convert.convert"),
    "udm": (["udm", "--data", "f.jsonl", "--embedder", "tfidf", "--output", "c.jsonl"], "bco_fast.data.density_ratio.make_embedder"),
    "bench": (["bench", "--hidden", "8", "--vocab", "16", "--tokens", "8", "--seconds", "1"], "bco_fast.cli.bench._seconds"),
    "demo": (["demo", "--output_dir", "d"], "bco_fast.cli.demo.build_model"),
    "report": (["report", "out"], "bco_fast.evaluation.report.write_report"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
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


def test_an_interrupted_run_says_how_to_continue_and_does(world, monkeypatch, capfd):
    from transformers import Trainer

    real, steps = Trainer.training_step, []

    def third(self, *arguments, **options):
        steps.append(0)
        if len(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "training_step", third)
    assert cli.main(RUN) == 143
    assert "continue from out/checkpoint-2 with --resume_from_checkpoint true" in capfd.readouterr().err
    assert cli.main([*RUN, "--resume_from_checkpoint", "true"]) == 0
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["steps"] == 6
    assert len(steps) == 3 + 1 + 4


def _shell(line, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONIOENCODING"}
    command = line.replace("bco-fast", f"{shlex.quote(sys.executable)} -m bco_fast.cli")
    return subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, env=kept | environment, timeout=300)  # fmt: skip


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
    ended = subprocess.run([sys.executable, "-c", FULL, json.dumps(runs)], capture_output=True, text=True, timeout=600)
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
