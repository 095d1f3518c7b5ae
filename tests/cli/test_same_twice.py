"""One command given twice, with the same seed: the same weights and the same log, bit for bit."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file
from small_runs import TOKENIZER, config, slow_but

from bco_fast import FeedbackTrainer, cli

REWARD = "def length(prompts, completions, **columns):\n    return [min(len(c.split()), 4) / 4 for c in completions]\n"
LORA = {"use_peft": "true", "lora_r": 4}
RUNS = {
    "full": {},
    "lora": LORA,
    "lora with dropout": LORA | {"lora_dropout": 0.2},
    "full with dropout": {"model": "dropout"},
    "a token budget": {"tokens_per_batch": 200},
    "stratified": {"batch_composition": "stratified", "oversample": "true"},
}
ONLINE = {"full": {}, "lora": LORA}
TIMES = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second")  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("same_twice")
    for name, options in {"plain": {}, "dropout": {"attention_dropout": 0.2}}.items():
        tiny.model(**options).save_pretrained(folder / name)
        TOKENIZER.save_pretrained(folder / name)
    tiny.write(folder / "feedback.jsonl", tiny.rows(40))
    tiny.write(folder / "prompts.jsonl", [{"prompt": row["prompt"]} for row in tiny.rows(20)])
    (folder / "reward_of_same_twice.py").write_text(REWARD)
    return folder


def _run(command, cache, stray_seed, **options):
    """What a fresh process would do; `stray_seed` is whatever state its random generators begin in."""
    shutil.rmtree("out", ignore_errors=True)
    torch.manual_seed(stray_seed)
    options = {
        "model": "plain", "output_dir": "out", "cache_dir": cache, "max_length": 32, "max_steps": 3, "learning_rate": 1e-2,
        "logging_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none", "use_cpu": "true",
        "disable_tqdm": "true", "seed": 7,
    } | options  # fmt: skip
    if "tokens_per_batch" in options:
        del options["per_device_train_batch_size"]
    assert cli.main([command, *(f"--{name}={value}" for name, value in options.items())]) == 0
    (weights,) = [load_file(path) for path in (*_files("adapter_model"), *_files("model"))]
    log = json.loads(Path("out/trainer_state.json").read_text())["log_history"]
    return weights, [{name: value for name, value in line.items() if name not in TIMES} for line in log]


def _files(stem):
    return Path("out").glob(f"{stem}.safetensors")


def _same(a, b):
    assert a[1] == b[1]
    assert a[0].keys() == b[0].keys()
    for name in a[0]:
        assert torch.equal(a[0][name], b[0][name]), name


@pytest.mark.parametrize("name", slow_but(RUNS, ["lora with dropout"]))
def test_train_twice(world, monkeypatch, tmp_path, capsys, name):
    monkeypatch.chdir(world)
    options = {"data": "feedback.jsonl"} | RUNS[name]
    first = _run("train", tmp_path / "cache", 1, **options)
    _same(first, _run("train", tmp_path / "cache", 2, **options))  # the cache is full now
    other = _run("train", tmp_path / "cache", 1, **options | {"seed": 8})
    assert any(not torch.equal(first[0][name], other[0][name]) for name in first[0])


@pytest.mark.parametrize("name", slow_but(ONLINE, ("lora",)))
def test_online_twice(world, monkeypatch, tmp_path, capsys, name):
    monkeypatch.chdir(world)
    own = {"prompts": "prompts.jsonl", "reward": "reward_of_same_twice:length", "max_new_tokens": 5}
    own |= {"steps_per_round": 1, "samples_per_prompt": 2}
    runs = [_run("online", tmp_path / "cache", seed, **own, **ONLINE[name]) for seed in (1, 2)]
    _same(*runs)


def test_the_trainer_seeds_an_adapter_on_a_model_object(tmp_path):
    def adapter(stray_seed):
        model = tiny.model()
        torch.manual_seed(stray_seed)
        args = config(tmp_path, use_peft=True, lora_r=4)
        trained = FeedbackTrainer(model, args, tiny.rows(20), processing_class=TOKENIZER).model
        return {name: p.detach().clone() for name, p in trained.named_parameters() if "lora_" in name}

    first, second = adapter(1), adapter(2)
    assert all(torch.equal(first[name], second[name]) for name in first)
