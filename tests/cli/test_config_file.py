"""`bco-fast train --config FILE.yaml`: flags win, nothing is ignored, and a recipe of configs/ trains."""

import json
import re
from pathlib import Path

import pytest
import tiny
import yaml

from bco_fast import cli
from bco_fast.cli.train import parse
from bco_fast.losses import OBJECTIVES
from bco_fast.training.config import FeedbackConfig

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
REQUIRED = {"model": "m", "data": "d.jsonl", "output_dir": "out"}


def _parse(tmp_path, text, *flags):
    path = tmp_path / "c.yaml"
    path.write_text(text if isinstance(text, str) else yaml.safe_dump(REQUIRED | text))
    return parse(["--config", str(path), *flags])


def test_values_of_the_file_arrive(tmp_path):
    options, config = _parse(
        tmp_path,
        "model: m\ndata: d.jsonl\neval_fraction: 0.2\noutput_dir: out\n"
        "learning-rate: 5e-7\nmax_steps: 7\nshift_balanced: false\nbf16: no\nsave_strategy: no\neval_strategy: steps\n"
        "desirable_weight: 2\nbeta: null\nuse_cpu: true\nreport_to: [none]\nlr_scheduler_kwargs: {num_cycles: 2}\n"
        "lr_scheduler_type: cosine_with_restarts\n",
    )
    assert (options.model, options.data, options.eval_fraction) == ("m", "d.jsonl", 0.2)
    assert (config.learning_rate, config.max_steps, config.shift_balanced, config.bf16) == (5e-7, 7, False, False)
    assert (config.save_strategy, config.eval_strategy) == ("no", "steps")
    assert (config.desirable_weight, config.beta) == (2.0, 0.1)
    assert config.lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize(("text", "steps"), [("010", 10), ("0x10", 16), ("0o10", 8), ("1_000", 1000), ("+7", 7)])
def test_numbers_are_those_of_yaml_1_2(tmp_path, text, steps):
    assert (
        _parse(tmp_path, f"model: m\ndata: d\noutput_dir: o\nuse_cpu: true\nmax_steps: {text}\n")[1].max_steps == steps
    )
    _, config = _parse(tmp_path, "model: m\ndata: d\noutput_dir: o\nuse_cpu: true\ngradient_checkpointing_kwargs: {a: 1, b: 1.5, c: 2e3, d: 1:30}\n")  # fmt: skip
    assert config.gradient_checkpointing_kwargs == {"a": 1, "b": 1.5, "c": 2000.0, "d": "1:30"}


def test_flags_win_over_the_file(tmp_path):
    options, config = _parse(
        tmp_path, {"beta": 0.3, "bf16": False, "shift_balanced": True, "use_cpu": True},
        "--beta", "0.5", "--data", "other.jsonl", "--no_shift_balanced", "--max-steps=3",
    )  # fmt: skip
    assert (config.beta, config.shift_balanced, config.max_steps) == (0.5, False, 3)
    assert (options.model, options.data) == ("m", "other.jsonl")


BAD = {
    "an unknown key": ({"lerning_rate": 1}, "unknown key 'lerning_rate'; did you mean 'learning_rate'?"),
    "the file in itself": ({"config": "x.yaml"}, "unknown key 'config'"),
    "text for a number": ({"learning_rate": "fast"}, "invalid float value: 'fast'"),
    "a fraction for a count": ({"max_steps": 1.5}, "invalid int value: '1.5'"),
    "a number in base 60": ("model: m\ndata: d\noutput_dir: o\nmax_steps: 1:30\n", "invalid int value: '1:30'"),
    "text for a switch": ({"bf16": "maybe"}, "got maybe but expected one of"),
    "a switch for text": ({"cache_dir": True}, "cache_dir cannot be True"),
    "a switch for a number": ({"beta": True}, "beta cannot be True"),
    "a list": ({"max_length": [1, 2]}, "max_length cannot be a list"),
    "a nested key": ({"train": {"beta": 1}}, "unknown key 'train'"),
    "a nested value": ({"beta": {"value": 1}}, "beta cannot be a mapping"),
    "nothing": ({"max_length": None}, "max_length is empty"),
    "a flag in a list": ({"label_names": ["--model", "x"]}, "label_names cannot be a list"),
    "a wrong choice": ({"loss_type": "bcp"}, "invalid choice: 'bcp'"),
    "a value out of range": ({"beta": -1}, "beta must be > 0"),
    "a key twice": ("model: m\nbeta: 0.1\nbeta: 0.2\n", "beta is given twice"),
    "a list at the top": ("- beta\n", "expected lines of `option: value`, found list"),
    "an empty file": ("", "found NoneType"),
    "no YAML": ("beta: [0.1\n", "not YAML"),
    "bytes": ("beta: \x00\n", "not YAML"),
    "a number for a key": ("1: 2\n", "key 1 is not the name of an option"),
    "a bomb of aliases": (
        "a: &a [x, x]\n"
        + "".join(
            f"{c}: &{c} [*{b}, *{b}]\n"
            for b, c in zip("abcdefghijklmnopqrstuvw", "bcdefghijklmnopqrstuvwx", strict=True)
        ),
        "unknown key 'a'",
    ),
    "too deep": ("beta: " + "[" * 100_000, "not"),
    "too large": ("#" + "x" * (1 << 20) + "\n", "larger than"),
    "an object": ("beta: !!python/object/apply:os.system ['touch pwned']\n", "not YAML"),
    "no model": ("data: d\noutput_dir: out\n", "required: --model"),
    "nothing required": ("beta: 0.1\n", "required: --model, --data, --output_dir"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, capfd, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    text, message = BAD[kind]
    Path("c.yaml").write_text(text if isinstance(text, str) else yaml.safe_dump(REQUIRED | text))
    assert cli.main(["train", "--config", "c.yaml"]) == 2
    streams = capfd.readouterr()
    (line,) = streams.err.strip().splitlines()
    assert message in line
    if "required" not in message and "out of range" not in kind:
        assert line.startswith("bco-fast: error: --config c.yaml: ")
    assert streams.out == ""
    assert not Path("pwned").exists()


def test_a_missing_file(capfd):
    assert cli.main(["train", "--config", "nowhere.yaml"]) == 2
    assert "--config nowhere.yaml: No such file or directory" in capfd.readouterr().err


def test_a_recipe_trains(tmp_path, capfd):
    tiny.model().save_pretrained(tmp_path / "m")
    tiny.build_tokenizer().save_pretrained(tmp_path / "m")
    data = tiny.write(tmp_path / "d.jsonl", tiny.rows(24))
    recipe = next(path for path in CONFIGS if path.stem == "bco_helpsteer2_fig2")
    small = {
        "model": tmp_path / "m", "data": data, "output_dir": tmp_path / "out", "max_length": 64, "bf16": "false",
        "max_prompt_length": 32, "max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1,
        "use_cpu": "true", "save_strategy": "no", "max_completion_length": 8,
    }  # fmt: skip
    assert cli.main(["train", "--config", str(recipe), *(f"--{k}={v}" for k, v in small.items())]) == 0
    summary = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert (summary["steps"], summary["held_out_rows"]) == (2, 0)


UNITS = r"nats?\b|reward unit|per |[Tt]oken|[Bb]yte|step|Share|\[0, 1|alpha / r|Weight of|λ that multiplies|dimensions|Probability|Temperature"


def test_help_says_default_and_unit_of_every_option_of_ours(capfd):
    from transformers import TrainingArguments

    with pytest.raises(SystemExit):
        parse(["--help-all"])
    text = capfd.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    entries = dict(
        re.findall(r"^  --(\w+)(.*?)(?=^  --|^\S|\Z)", text, flags=re.DOTALL | re.MULTILINE)
    )  # option -> its help
    for name, option in FeedbackConfig.__dataclass_fields__.items():
        assert not option.init or name in entries, name
        if name in TrainingArguments.__dataclass_fields__:
            continue
        entry = " ".join(entries[name].split())
        default = option.default
        if default in (None, "") or isinstance(default, bool):
            assert re.search(r"[Dd]efault: \S+", entry), name
        else:
            assert f"(default: {default})" in entry.replace("- ", "-"), name
        if isinstance(default, (int, float)) and not isinstance(default, bool):
            assert re.search(UNITS, entry), f"{name} has no unit"
    for name in ("config", "model", "data", "eval_data", "eval_fraction", "output_dir"):
        assert re.search(r"default|required", entries[name]), name
    assert all(loss in entries["loss_type"] for loss in OBJECTIVES)
