"""Every wrong flag ends in one line that names it, with exit code 2, and before a model is loaded where that is possible."""

import importlib.util
import json

import pytest
import tiny
from small_runs import TOKENIZER
from wrong_flags import LATE, TABLE

from bco_fast import cli

CPU = "--max_length 32 --max_steps 2 --use_cpu true --report_to none --disable_tqdm true --save_strategy no"
USUAL = {
    "train": f"--model m --data f.jsonl --output_dir out {CPU}",
    "online": f"--model m --prompts p.jsonl --reward REWARD:r --output_dir out --max_new_tokens 4 --steps_per_round 1 {CPU}",
    "generate": "--model m --prompts p.jsonl --output c.jsonl --max_new_tokens 2",
    "judge": "a.jsonl b.jsonl --reward REWARD:r",
    "shifts": "--model m --ref_model m --data f.jsonl --output_dir out --max_length 32",
    "cache build": "--model m --data f.jsonl --max_length 32",
    "convert": "--data pairs.jsonl --recipe pairs --to pairs --output c.jsonl",
    "udm": "--data f.jsonl --embedder tfidf --output c.jsonl",
    "report": "out",
    "bench": "--seconds 1",
    "demo": "",
    "check": "f.jsonl --model m --max_length 32",
    "sweep": "--model m --data f.jsonl --output_dir out --use_cpu true --report_to none",
    "merge": "--model lora --output_dir out",
    "export": "--model lora --output_dir out",
    "plan": "--model m --max_length 32 --gpu_memory 1",
    "reproduce": "bco_fig1_ultrafeedback",
    "reward": "--model m --data pairs.jsonl --output_dir out --use_cpu true --report_to none",
    "recipes": "",
    "cache inspect": "",
    "cache verify": "",
    "cache export": "--output c.parquet",
    "cache prune": "",
}
CASES = [
    (command, flag, value) for command, flags in TABLE.items() for flag, values in flags.items() for value in values
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong_flags")
    tiny.model().save_pretrained(folder / "m")
    TOKENIZER.save_pretrained(folder / "m")
    (folder / "lora").mkdir()
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(folder / "m")}
    (folder / "lora/adapter_config.json").write_text(json.dumps(adapter))
    (folder / "lora/adapter_model.safetensors").touch()
    tiny.write(folder / "f.jsonl", tiny.rows(30))
    tiny.write(folder / "pairs.jsonl", tiny.pairs(5))
    for name, completion in {"p": None, "a": "a b", "b": "c"}.items():
        rows = [{"prompt": row["prompt"]} | ({"completion": completion} if completion else {}) for row in tiny.rows(6)]
        tiny.write(folder / f"{name}.jsonl", rows)
    (folder / "reward_of_wrong_flags.py").write_text(
        "def r(prompts, completions, **_):\n    return [0.5] * len(prompts)\n"
    )
    (folder / "rw.py").write_text("print()\n")
    return folder


def test_every_command_has_wrong_flags():
    assert {command.split()[0] for command in TABLE} == set(cli.COMMANDS)
    assert USUAL.keys() == TABLE.keys()


def _given(flag, value):
    first, _, second = flag.partition(" ")  # a flag that needs another one before it
    return [f"--{first}", f"{second}={value}"] if second else [f"--{first}={value}"]


@pytest.mark.parametrize(("command", "flag", "value"), CASES, ids=[f"{c} --{f}={v[:20]!r}" for c, f, v in CASES])
def test_a_wrong_flag_is_named_in_one_line(world, monkeypatch, tmp_path, capfd, command, flag, value):
    value, _, package = value.partition(" [")
    if package and importlib.util.find_spec(package.removesuffix("]")) is not None:
        pytest.skip("the package is installed, so the flag is right")
    monkeypatch.chdir(world)
    monkeypatch.setenv("BCO_FAST_CACHE", str(tmp_path / "cache"))
    if flag == "backend":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if (command, flag) not in LATE:
        monkeypatch.setattr("bco_fast.models.load.load_model", lambda *_: pytest.fail("a model is loaded"))
    before = sorted(world.rglob("*"))
    usual = USUAL[command].replace("REWARD", "reward_of_wrong_flags").split()
    assert cli.main([*command.split(), *usual, *_given(flag, value)]) == 2
    *above, line = capfd.readouterr().err.splitlines()
    assert line.startswith("bco-fast: error: ")
    assert f"--{flag.rpartition('--')[2]}" in line
    assert not any("Traceback" in other or "error" in other for other in above)
    assert len(line) < 800
    made = {path.name for path in set(world.rglob("*")) - set(before)} - {"__pycache__"}
    allowed = {"out"} if (command, flag) in LATE else set()  # the Trainer makes it
    assert {name for name in made if not name.endswith(".pyc")} <= allowed
