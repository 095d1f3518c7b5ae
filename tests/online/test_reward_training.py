"""A reward model from pairs: Bradley-Terry's loss, learned by a tiny model, and read by what uses rewards."""

import json
import math

import pytest
import tiny
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

from bco_fast import cli
from bco_fast.data.rows import read_rows
from bco_fast.online.reward_training import bradley_terry_loss, encode_pairs
from bco_fast.online.rewards import SequenceReward, load_reward


def test_the_loss_by_hand():
    loss = bradley_terry_loss(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
    assert math.isclose(float(loss), (math.log1p(math.exp(-1)) + math.log(2)) / 2, rel_tol=1e-6)
    centred = bradley_terry_loss(torch.tensor([2.0]), torch.tensor([1.0]), center=0.1)
    assert math.isclose(float(centred), math.log1p(math.exp(-1)) + 0.9, rel_tol=1e-6)


def test_texts_are_encoded_as_the_reward_reads_them(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tiny.build_tokenizer()), **tiny.TINY, num_labels=1)
    reward = SequenceReward(AutoModelForSequenceClassification.from_config(config), tiny.build_tokenizer())
    (row,) = read_rows([tiny.pairs(1)[0]], needs="pairs")
    ((chosen, rejected),) = encode_pairs([row], reward)
    assert chosen == reward.encode(row.prompt, row.completions[0])[0]
    assert rejected != chosen


def test_the_command_learns_the_rule(tmp_path, capfd):
    tiny.model(std=0.05).save_pretrained(tmp_path / "m")
    tiny.build_tokenizer().save_pretrained(tmp_path / "m")
    data = tiny.write(tmp_path / "pairs.jsonl", tiny.pairs(120))
    arguments = [
        "reward", "--model", tmp_path / "m", "--data", data, "--output_dir", tmp_path / "r", "--max_steps", 40,
        "--per_device_train_batch_size", 16, "--learning_rate", 3e-3, "--use_cpu", "true", "--report_to", "none",
        "--save_strategy", "no", "--max_length", 48, "--seed", 1, "--disable_tqdm", "true",
    ]  # fmt: skip
    assert cli.main([str(argument) for argument in arguments]) == 0
    summary = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert (summary["steps"], summary["pairs"] + summary["held_out_pairs"]) == (40, 120)
    assert 0 <= summary["held_out_accuracy"] <= 1
    reward = load_reward(tmp_path / "r")
    pairs = tiny.pairs(120)
    prompts = [pair["prompt"] for pair in pairs]
    better, worse = (reward(prompts, [pair[side] for pair in pairs]) for side in ("chosen", "rejected"))
    assert sum(a > b for a, b in zip(better, worse, strict=True)) > 84  # an untrained one: 60, with a deviation of 5.5
    assert cli.main([str(argument) for argument in arguments]) == 2
    assert "--overwrite_output_dir" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "message"), [("center", "-1", "--center must be >= 0"), ("data", "nowhere.jsonl", "no such file")]
)
def test_wrong_flags(tmp_path, capfd, flag, value, message):
    options = {"model": "m", "data": "d.jsonl", "output_dir": str(tmp_path / "r"), "use_cpu": "true"} | {flag: value}
    assert cli.main(["reward", *(f"--{name}={word}" for name, word in options.items())]) == 2
    assert message in capfd.readouterr().err
