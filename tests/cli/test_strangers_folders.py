"""A model's folder may come from a stranger: no code of it runs, no question is asked, no pickle is opened."""

import json
import shutil

import pytest
import tiny
import torch
from small_runs import TOKENIZER, config
from transformers import AutoModelForSequenceClassification, LlamaConfig

from bco_fast import FeedbackTrainer, cli

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

Path({marker!r}).touch()

class Config(LlamaConfig):
    model_type = "stranger"

class Model(LlamaForCausalLM):
    config_class = Config

class Reward(LlamaForSequenceClassification):
    config_class = Config

class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
CLASSES = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model", "AutoModelForSequenceClassification": "code.Reward"}  # fmt: skip


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on standard input"))
    tiny.model().save_pretrained("plain")
    TOKENIZER.save_pretrained("plain")
    torch.manual_seed(0)
    reward = AutoModelForSequenceClassification.from_config(
        LlamaConfig(vocab_size=len(TOKENIZER), num_labels=1, **tiny.TINY)
    )
    for name, model in {"policy": tiny.model(), "reward": reward}.items():
        _hostile(tmp_path / name, model, tmp_path / "it_ran")
    shutil.copytree("plain", "words")
    _hostile_tokenizer(tmp_path / "words", tmp_path / "it_ran")
    tiny.write(tmp_path / "feedback.jsonl", tiny.rows(30))
    answers = [{"prompt": row["prompt"], "completion": row["completion"]} for row in tiny.rows(4)]
    tiny.write(tmp_path / "a.jsonl", answers)
    tiny.write(tmp_path / "b.jsonl", [row | {"completion": "yes"} for row in answers])
    name = f"rules_{tmp_path.name}"  # modules are imported once in a process
    (tmp_path / f"{name}.py").write_text(
        "def length(prompts, completions, **_):\n    return list(map(len, completions))\n"
    )
    return tmp_path


def _hostile(folder, model, marker):
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "stranger", "auto_map": CLASSES}
    (folder / "config.json").write_text(json.dumps(config))
    _hostile_tokenizer(folder, marker)


def _hostile_tokenizer(folder, marker):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Tokenizer", "auto_map": {"AutoTokenizer": [None, "code.Tokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(
        f"from pathlib import Path\nPath({str(marker)!r}).touch()\n\ndef generate(model, *inputs, **options):\n    return type(model).generate(model, *inputs, **options)\n"
    )


TRAIN = "train --data feedback.jsonl --output_dir out --max_length 32 --max_steps 1 --use_cpu true --save_strategy no --report_to none --model"  # fmt: skip
CALLS = {
    "train": f"{TRAIN} policy",
    "train, the tokenizer": f"{TRAIN} words",
    "online": "online --prompts a.jsonl --reward reward --output_dir out --max_steps 1 --use_cpu true --model plain",
    "cache build": "cache build --data feedback.jsonl --max_length 32 --model policy",
    "generate": "generate --prompts a.jsonl --output c.jsonl --max_new_tokens 2 --model policy",
    "shifts": "shifts --ref_model plain --data feedback.jsonl --output_dir out --max_length 32 --model policy",
    "judge": "judge a.jsonl b.jsonl --reward reward",
    "judge, the tokenizer": "judge a.jsonl b.jsonl --reward RULES:length --tokenizer words",
    "udm": "udm --data feedback.jsonl --output d.jsonl --embedder policy",
    "bench": "bench --model policy",
}


def _words(command, world):
    return command.replace("RULES", f"rules_{world.name}").split()


@pytest.mark.parametrize("command", CALLS.values(), ids=CALLS)
def test_no_code_of_a_folder_runs(world, capsys, command):
    code = cli.main(_words(command, world))
    assert not (world / "it_ran").exists()
    if code:  # a tokenizer of a known kind is read without the folder's code
        assert code == 2
        assert len([line for line in capsys.readouterr().err.splitlines() if "error" in line]) == 1


@pytest.mark.parametrize("command", [CALLS["judge, the tokenizer"], CALLS["generate"]], ids=["judge", "generate"])
def test_the_flag_runs_it_and_is_echoed(world, caplog, command):
    assert cli.main([*_words(command, world), "--trust_remote_code"]) == 0
    assert (world / "it_ran").exists()
    assert "trust_remote_code: Python code of" in caplog.text


@pytest.mark.parametrize(
    ("folder", "command"),
    [("plain", f"{TRAIN} plain"), ("reward_of_tensors", "judge a.jsonl b.jsonl --reward reward_of_tensors")],
)
def test_weights_are_read_from_safetensors_only(world, capsys, folder, command):
    if folder != "plain":
        shutil.copytree("reward", folder)
        _drop(world / folder / "config.json", "auto_map", model_type="llama")
        _drop(world / folder / "tokenizer_config.json", "auto_map", tokenizer_class="PreTrainedTokenizerFast")
    (world / folder / "model.safetensors").unlink()
    torch.save({}, world / folder / "pytorch_model.bin")
    assert cli.main(command.split()) == 2
    assert "safetensors" in capsys.readouterr().err.splitlines()[-1]


def _drop(path, name, **changes):
    content = json.loads(path.read_text())
    content.pop(name)
    path.write_text(json.dumps(content | changes))


def test_a_path_given_to_the_trainer_runs_no_code(world):
    with pytest.raises(ValueError, match="trust_remote_code"):
        FeedbackTrainer("policy", config(world), tiny.rows(20), processing_class=TOKENIZER)
    assert not (world / "it_ran").exists()
