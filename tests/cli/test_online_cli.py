"""`bco-fast online`: a model, prompts and a reward in; a policy, rounds and one line of JSON out."""

import json

import pytest
import tiny
import torch
from small_runs import TOKENIZER

from bco_fast import cli
from bco_fast.cli import demo
from bco_fast.data.rows import read_rows
from bco_fast.online.config import OnlineConfig

REWARD = """
def long_enough(prompts, completions, **columns):
    return [min(len(c.split()), 4) / 4 for c in completions]

def broken(prompts, completions, **columns):
    raise RuntimeError("no judge today")
"""


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.model(std=0.05).save_pretrained("start")
    TOKENIZER.save_pretrained("start")
    tiny.write(tmp_path / "prompts.jsonl", [{"prompt": p} for p in demo.all_prompts()[:40]])
    tiny.write(tmp_path / "held_out.jsonl", [{"prompt": p} for p in demo.all_prompts()[:40][:8]])
    name = f"judge_{tmp_path.name.replace('-', '_')}"  # modules are imported once in a process
    (tmp_path / f"{name}.py").write_text(REWARD)
    return name


def _run(reward, *options, capsys=None):
    small = (
        "--max_length 32 --max_new_tokens 5 --max_steps 4 --steps_per_round 2 --samples_per_prompt 2 --logging_steps 1"
    )
    small += " --per_device_train_batch_size 8 --save_steps 2 --report_to none --use_cpu true --disable_tqdm true"
    return cli.main(
        ["online", "--model", "start", "--prompts", "prompts.jsonl", "--reward", reward, "--output_dir", "out",
         *small.split(), *options]
    )  # fmt: skip


def test_online_trains_saves_and_resumes(world, tmp_path, capsys):
    assert _run(f"{world}:long_enough", "--eval_prompts", "held_out.jsonl", "--learning-rate", "1e-3") == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["steps"], summary["rounds"]) == (4, 2)
    assert 0 <= summary["held_out_reward"] <= 1
    rounds = sorted((tmp_path / "out" / "rounds").glob("*.jsonl"))
    assert len(rounds) == 2
    rows = read_rows(rounds[0], on_bad_row="skip")
    assert {row.prompt for row in rows} <= set(demo.all_prompts()[:40])
    trained = type(tiny.model()).from_pretrained(tmp_path / "out").state_dict()
    start = tiny.model(std=0.05).state_dict()
    assert any(not torch.equal(start[name], trained[name]) for name in start)
    assert (
        _run(f"{world}:long_enough", "--max_steps", "6", "--resume_from_checkpoint", "true", "--learning-rate", "1e-3")
        == 0
    )
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 6


def test_options_may_stand_in_a_file(world, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(
        f"reward: {world}:long_enough\nmodel: start\nprompts: prompts.jsonl\noutput_dir: out\nmax_steps: 2\n"
        "steps_per_round: 2\nsamples_per_prompt: 2\nmax_length: 32\nmax_new_tokens: 5\nreward_scale: minmax\nuse_cpu: true\n"
        "report_to: none\nper_device_train_batch_size: 4\nsave_strategy: no\n"
    )
    assert cli.main(["online", "--config", "run.yaml", "--disable_tqdm", "true"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rounds"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("--prompts", "none.jsonl"), "--prompts none.jsonl: no such file"),
        (("--reward", "nowhere:judge"), "nowhere:judge: importing nowhere raised ModuleNotFoundError"),
        (("--loss_type", "dpo"), "dpo needs pairs"),
        (("--samples_per_promt", "2"), "did you mean '--samples_per_prompt'?"),
        (("--generator", "tgi"), "invalid choice: 'tgi'"),
        (("--model", "./nowhere"), "--model ./nowhere: no such folder"),
        (("--chat_template", "nowhere.jinja"), "--chat_template nowhere.jinja: neither a template nor a file"),
        (("--eval_strategy", "steps"), "--eval_strategy steps needs --eval_prompts"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_what_is_wrong_is_said_in_one_line(world, tmp_path, capsys, change, message):
    assert _run(f"{world}:long_enough", *change) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("bco-fast: error: ")
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_broken_reward_names_the_prompt_and_the_checkpoint(world, tmp_path, capsys):
    assert _run(f"{world}:broken") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "no judge today" in error
    assert "resume from checkpoint-0" in error
    assert _run(f"{world}:long_enough", "--resume_from_checkpoint", "true") == 0


def test_help_names_every_option_of_the_config(capsys):
    with pytest.raises(SystemExit):
        cli.main(["online", "--help-all"])
    text = capsys.readouterr().out
    for name in OnlineConfig.__dataclass_fields__:
        if OnlineConfig.__dataclass_fields__[name].init and OnlineConfig.__dataclass_fields__[name].metadata:
            assert f"--{name} " in text, name
    for name in ("--model", "--prompts", "--reward", "--eval_prompts", "--config", "--output_dir"):
        assert f"{name} " in text
