"""`bco-fast sweep`: every setting with every seed, one reference, each run once; failures and interruptions lose nothing."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
from small_runs import command_folder

from bco_fast import cli
from bco_fast.cli import sweep_runs

ROOT = Path(__file__).parents[2]
TRAIN = "--model m --data f.jsonl --cache_dir cache --max_length 32 --max_steps 2 --use_cpu true --report_to none --save_strategy no --per_device_train_batch_size 4 --learning_rate 0.01"  # fmt: skip


@pytest.fixture
def world(tmp_path, monkeypatch):
    return command_folder(tmp_path, monkeypatch, 24)


class Process:
    """A run that takes a few polls and then leaves what `train` leaves."""

    def __init__(self, command, log, environment, world):
        self.command = command[command.index("bco_fast.cli") + 1 :]
        self.environment, self.world, self.polls, self.code = environment, world, 0, None
        self.folder = Path(self.command[self.command.index("--output_dir") + 1])
        self.name = self.folder.name
        self.log = log

    def poll(self):
        self.polls += 1
        if self.polls == 2:  # the reference is there
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write()
        if self.polls < 4:
            return None
        if self.code is None:
            self.world.running.discard(self.name)
            self.code = 3 if self.name in self.world.fails else 0
            if self.code:
                os.write(self.log.fileno(), b"a traceback\nbco-fast: error: the loss is not finite\n")
        return self.code

    def _write(self):
        words = dict(
            word.removeprefix("--").split("=") for word in self.command if word.startswith("--") and "=" in word
        )
        held_out = {"eval_rewards/auc": 0.6, "eval_rewards/margins": 0.2, "eval_loss": 0.5}
        state = {"log_history": [{"step": 2, **held_out}], "global_step": 2}
        (self.folder / "trainer_state.json").write_text(json.dumps(state))
        record = {"loss_type": "bco", "beta": float(words.get("beta", 0.1)), "reference": True, "held_out": held_out}
        (self.folder / "run.json").write_text(json.dumps(record))

    def terminate(self):
        self.world.terminated.append(self.name)

    def wait(self):
        self.world.waited.append(self.name)


class World:
    def __init__(self):
        self.started, self.running, self.fails = [], set(), set()
        self.terminated, self.waited, self.together, self.environments = [], [], [], {}

    def popen(self, command, stdout, stderr, env):
        process = Process(command, os.fdopen(os.dup(stdout.fileno()), "ab"), env, self)
        self.started.append(process.command)
        self.running.add(process.name)
        self.together.append(len(self.running))
        self.environments[process.name] = env
        return process


@pytest.fixture
def processes(world, monkeypatch):
    made = World()
    monkeypatch.setattr(sweep_runs.subprocess, "Popen", made.popen)
    monkeypatch.setattr(sweep_runs, "POLL_SECONDS", 0)
    monkeypatch.setattr("bco_fast.evaluation.sweep.draw", lambda _: {})
    monkeypatch.setattr("bco_fast.evaluation.report.write_report", lambda _, page, each: page.write_text(f"{each}"))
    return made


def _sweep(*words):
    return cli.main(["sweep", "--output_dir", "s", *TRAIN.split(), *words])


def test_every_setting_with_every_seed_after_the_reference(processes, capsys):
    processes.fails = {"beta=0.1,seed=1"}
    words = ("--beta", "0.05", "0.1", "--seeds", "0", "1", "--jobs", "3")
    assert _sweep(*words) == 2
    said = capsys.readouterr()
    assert "1 of 4 runs failed, the first beta=0.1,seed=1: the loss is not finite" in said.err
    assert "| beta=0.1,seed=1 | the loss is not finite |" in said.out
    names = [f"beta={beta},seed={seed}" for beta in ("0.05", "0.1") for seed in (0, 1)]
    assert [Path(command[command.index("--output_dir") + 1]).name for command in processes.started] == names
    assert processes.together[0] == 1  # alone, until the reference is there
    assert max(processes.together) == 3
    assert processes.started[2][-5:] == ["--beta=0.1", "--seed", "0", "--output_dir", "s/beta=0.1,seed=0"]
    assert processes.started[2][1:-5] == TRAIN.split()
    threads = {environment["OMP_NUM_THREADS"] for environment in processes.environments.values()}
    assert len(threads) == 1
    assert "margin, nats" in Path("s/results.md").read_text()
    assert Path("s/report.html").read_text() == "False"
    before = len(processes.started)
    processes.fails.clear()
    assert _sweep(*words) == 0  # the one that failed, from the start: it has no checkpoint
    assert [command[-2:] for command in processes.started[before:]] == [["--overwrite_output_dir", "true"]]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["runs"] == 4
    assert cli.main(["sweep", "--output_dir", "s", *TRAIN.replace("0.01", "0.02").split(), *words]) == 2
    assert "beta=0.05,seed=0 was trained with other options" in capsys.readouterr().err


def test_quoted_words_are_one_sum_of_objectives(processes):
    tiny.write(Path("f.jsonl"), tiny.pairs(24))
    assert _sweep("--loss_type", "dpo", "dpo sft", "--seeds", "0") == 0
    assert [command[-7:-4] for command in processes.started] == [
        ["0.01", "--loss_type", "dpo"],
        ["--loss_type", "dpo", "sft"],
    ]
    assert _sweep("--loss_type", "dpo sft", "--loss_weights", "1 1", "1 0.5", "--output_dir", "t", "--seeds", "0") == 0
    assert processes.started[2][-10:-4] == ["--loss_type", "dpo", "sft", "--loss_weights", "1", "1"]
    folders = {path.name for path in Path("t").iterdir()}
    assert folders >= {"loss_weights=1-1,seed=0", "loss_weights=1-0.5,seed=0"}


def test_gpus_are_dealt_out(processes, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert _sweep("--seeds", "0", "1", "2", "--jobs", "2") == 0
    assert {e["CUDA_VISIBLE_DEVICES"] for e in processes.environments.values()} == {"4", "7"}


def test_an_interruption_lets_the_runs_save(processes, monkeypatch, capsys):
    monkeypatch.setattr(sweep_runs.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGINT))
    assert _sweep("--seeds", "0", "1") == 130
    assert processes.terminated == processes.waited == ["seed=0"]
    assert "interrupted; the same call continues" in capsys.readouterr().err
    assert not Path("s/records/seed=0.json").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--beta 0.1 -1", "--beta must be > 0"),
        ("--nope 1 2", "unknown argument '--nope=1'"),
        ("--beta 0.1 0.1", "--beta has a value twice"),
        ("--loss_weights 1 1 0.5", 'quote the weights of one sum: "1 1 0.5"'),
        ("--beta 0.1 --beta 0.2", "--beta is given twice"),
        ("--seed 3", "--seed: use --seeds"),
        ("--resume_from_checkpoint true", "a sweep continues interrupted runs by itself"),
        ("--cache_dir a b", "--cache_dir"),
        ("--seeds 0 0", "--seeds must be different numbers"),
        ("--jobs 0", "--jobs must be at least 1"),
        ("--config nowhere.yaml", "--config nowhere.yaml: no such file"),
        ("--data nowhere.jsonl f.jsonl", "--data"),
    ],
)
def test_a_mistake_starts_nothing(processes, capsys, words, message):
    train = [] if words.startswith(("--data", "--cache_dir")) else TRAIN.split()
    base = train or ["--model", "m", "--use_cpu", "true", "--report_to", "none"]
    assert cli.main(["sweep", "--output_dir", "s", *base, *words.split()]) == 2
    assert message in capsys.readouterr().err
    assert not processes.started
    assert not Path("s").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_real_runs_share_a_reference_and_continue(world):
    """Two settings, two seeds, two at a time; interrupted in the middle, then continued; again nothing is run."""
    Path("run.yaml").write_text("model: m\ndata: f.jsonl\nmax_length: 32\nmax_steps: 60\nuse_cpu: true\nreport_to: none\n"
                                "save_strategy: steps\nsave_steps: 20\nper_device_train_batch_size: 4\ncache_dir: cache\n"
                                "learning_rate: 0.01\n")  # fmt: skip
    command = "-m bco_fast.cli sweep --config run.yaml --output_dir s --beta 0.05 0.1 --seeds 0 1 --jobs 2"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    first = subprocess.Popen([sys.executable, *shlex.split(command)], **options)
    while not list(Path("s").glob("*/checkpoint-*/manifest.json")) and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGINT)
    _, said = first.communicate(timeout=300)
    assert first.returncode == 130, said
    assert "the same call continues" in said
    done = subprocess.run([sys.executable, *shlex.split(command)], timeout=600, check=False, **options)
    assert done.returncode == 0, done.stderr
    rows = Path("s/results.csv").read_text().splitlines()
    assert len(rows) == 5
    records = {path: path.stat().st_mtime_ns for path in Path("s/records").glob("*.json")}
    assert len(records) == 4
    hits = [path.read_text() for path in Path("s/logs").glob("*.log")]
    assert sum(" 0 computed" in text for text in hits) >= 3
    assert subprocess.run([sys.executable, *shlex.split(command)], timeout=600, check=False, **options).returncode == 0
    assert records == {path: path.stat().st_mtime_ns for path in Path("s/records").glob("*.json")}
