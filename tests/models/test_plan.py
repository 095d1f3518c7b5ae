"""The plan: what is switched on, how long a context fits, and what a run says of its memory."""

import json
import logging
import os
import sys
from types import SimpleNamespace

import pytest
import small_runs
import torch
from transformers import LlamaConfig

from bco_fast.cli import main
from bco_fast.cli.common import UsageError
from bco_fast.cli.run_options import run
from bco_fast.models import plan
from bco_fast.models.count import Memory, count_step
from bco_fast.training import memory_watch

SHAPE = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


@pytest.mark.slow
def test_switches_are_turned_on_in_order_until_a_step_fits(tmp_path):
    args = small_runs.config(tmp_path, max_length=8192, per_device_train_batch_size=1)
    config = LlamaConfig(**SHAPE)
    whole = count_step(config, args, 8192).total
    made = list(plan.stages(config, args, 8192, 0.0))
    names = [stage.switch and stage.switch.option for stage, _ in made]
    assert names == [None, "gradient_checkpointing", "layer_chunk_tokens", "activation_offloading"]
    totals = [stage.memory.total for stage, _ in made]
    assert totals == sorted(totals, reverse=True)
    assert totals[0] == whole
    assert made[-1][0].memory.host > 0 == made[-2][0].memory.host
    assert args.layer_chunk_tokens is None  # the options that were given stay
    assert [stage.switch for stage, _ in plan.stages(config, args, 8192, whole)] == [None]
    memory_watch.turn_on_what_fits(SimpleNamespace(config=config), args, (totals[0] + totals[1]) / 2)
    assert args.activation_checkpointing
    assert (args.layer_chunk_tokens, args.activation_offloading) == (None, False)


@pytest.mark.parametrize("slope", [10.0, 999.0, 70_000.0])
def test_the_longest_context_is_found_and_never_beyond_the_budget(monkeypatch, slope):
    def count(config, options, tokens, **where):
        bent = max(5e6 + slope * tokens, 2e7 + 0.4 * slope * tokens)
        return Memory("layer", {"layer": bent}, 0.0)

    monkeypatch.setattr(plan, "count_step", count)
    budget = 4e9
    found = plan.longest(None, None, budget)
    truth = min((budget - 5e6) / slope, plan.MOST)
    assert truth * (1 - 1 / 32) - plan.STEP <= found <= truth
    assert plan.longest(None, None, 1e6) == 0


@pytest.mark.slow
def test_too_little_host_memory_makes_checkpoints_fewer(tmp_path):
    args = small_runs.config(tmp_path, max_length=8192, per_device_train_batch_size=1)
    config = LlamaConfig(**SHAPE | {"num_hidden_layers": 12})
    made = list(plan.stages(config, args, 8192, 0.0, 1e6))
    assert [stage.switch.option for stage, _ in made[1:]] == [
        "gradient_checkpointing", "layer_chunk_tokens", "layer_checkpoints"
    ]  # fmt: skip
    (before, _), (least, options) = made[-2:]
    hidden = 8192 * 64 * 4
    assert (least.switch.value, options.layer_checkpoints) == (4, 4)
    assert "two more forwards" in least.switch.cost
    assert least.memory.host == 0
    assert before.memory.total - least.memory.total == pytest.approx(
        (12 - 4 + 1) * hidden, rel=0.02
    )  # and the first is looked up
    *_, (stage, _) = plan.stages(config, args, 8192, least.memory.total + 3.5 * hidden, 1e6)
    assert stage.switch.value == 7  # three more fit
    assert "one more forward " in stage.switch.cost
    *_, (stage, _) = plan.stages(config, args, 8192, before.memory.total - 0.5 * hidden, 1e6)
    assert (stage.switch.value, stage.switch.cost[:7]) == (12, "nothing")
    options.layer_checkpoints, options.activation_offloading = None, True
    whole = count_step(config, options, 8192)
    options.layer_checkpoints = 4
    fewer = count_step(config, options, 8192)
    assert fewer.host / whole.host == pytest.approx((4 - 1 + 1) / (12 + 1), rel=0.01)  # and what follows the layers
    assert fewer.total - whole.total == pytest.approx(2 * hidden, rel=0.1)


@pytest.mark.slow
def test_plan_reads_a_config_and_prints_json(tmp_path, capsys):
    LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "m")
    path = str(tmp_path / "m" / "config.json")
    flags = ["--max_length", "8192", "--gpu_memory", "0.12", "--bf16", "true", "--plot", str(tmp_path / "p.svg")]
    assert main(["plan", "--model", path, *flags]) == 0
    text = capsys.readouterr().out.strip().splitlines()
    found = json.loads(text[-1])
    assert found["fits"]
    assert found["longest"] >= 8192
    assert found["switches"][0]["option"] == "gradient_checkpointing"
    assert sum(found["parts_gb"].values()) == pytest.approx(found["step_gb"], abs=0.003)
    assert "--bf16 true" in found["command"]
    assert found["command"] in "\n".join(text)
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_wrong_flags_of_plan_are_one_line(tmp_path, capsys):
    LlamaConfig(**SHAPE).save_pretrained(tmp_path / "m")
    path = str(tmp_path / "m" / "config.json")
    for wrong, flag in (
        (["--model", path, "--gpu_memory", "-1"], "--gpu_memory"),
        (["--model", "./nowhere", "--gpu_memory", "1"], "--model"),
        (["--model", path, "--gpu_memory", "1", "--max_length", "0"], "--max_length"),
    ):
        assert main(["plan", *wrong]) == 2
        assert flag in capsys.readouterr().err


def test_the_command_of_a_plan_names_what_was_turned_on(tmp_path, capsys, monkeypatch):
    """With a count that needs no run: 1 KB a token, 100 times as much without checkpoints."""
    LlamaConfig(**SHAPE).save_pretrained(tmp_path / "m")

    def count(config, options, tokens, **where):
        return Memory(
            "layer", {"weights": 1e6, "layer": 1e3 * tokens * (1 if options.gradient_checkpointing else 100)}, 0.0
        )

    monkeypatch.setattr(plan, "count_step", count)
    assert main(["plan", "--model", str(tmp_path / "m"), "--max_length", "4096", "--gpu_memory", "0.01"]) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert found["fits"]
    assert [switch["option"] for switch in found["switches"]] == ["gradient_checkpointing"]
    assert "--gradient_checkpointing true" in found["command"]
    assert found["switches"][0]["saves_gb"] == pytest.approx(99 * 4.096e6 / 1e9, abs=1e-3)
    assert 8192 - 1024 <= found["longest"] <= 8500


def test_a_run_says_what_it_expects_and_what_it_took(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(memory_watch, "WORTH_COUNTING", 0.0)
    with caplog.at_level(logging.INFO, "bco_fast"):
        small_runs.trainer(tmp_path, max_steps=2, per_device_train_batch_size=2).train()
    assert "a step is expected to take" in caplog.text
    assert "a step took" in caplog.text


def test_log_lines_of_a_gpu_say_what_is_allocated_and_reserved(monkeypatch):
    for name, size in (("max_memory_allocated", 3e9), ("max_memory_reserved", 4.5e9)):
        monkeypatch.setattr(torch.cuda, name, lambda size=size: size)
    for kind, logged in (("cuda", {"memory/allocated_gb": 3.0, "memory/reserved_gb": 4.5}), ("cpu", {})):
        trainer = SimpleNamespace(args=SimpleNamespace(device=torch.device(kind)))
        assert memory_watch.MemoryWatch(trainer).log() == logged


@pytest.mark.skipif(sys.platform != "linux", reason="expandable segments exist on Linux only")
def test_segments_of_the_gpus_memory_expand_unless_the_variable_says_otherwise(monkeypatch, capsys):
    for given, wanted in (("", "expandable_segments:True"), ("max_split_size_mb:64", "max_split_size_mb:64")):
        monkeypatch.setenv("PYTORCH_ALLOC_CONF", given)
        if not given:
            monkeypatch.delenv("PYTORCH_ALLOC_CONF")
        assert main(["train", "--help"]) == 0
        assert os.environ["PYTORCH_ALLOC_CONF"] == wanted


def test_out_of_memory_ends_with_advice(tmp_path, monkeypatch):
    trainer = small_runs.trainer(tmp_path, rows=6)
    monkeypatch.setattr(trainer, "train", lambda **_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    monkeypatch.setattr(memory_watch, "usable_bytes", lambda device: 9e6)
    with pytest.raises(UsageError, match=r"out of memory at 8 x 64 tokens.*(--long_context auto|--max_length)"):
        run(trainer, None)
    monkeypatch.setattr(trainer, "train", lambda **_: (_ for _ in ()).throw(RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        run(trainer, None)


@pytest.mark.slow
def test_auto_trains_the_same_adapter(tmp_path, monkeypatch):
    losses = []
    for choice in ("off", "auto"):
        monkeypatch.setattr(memory_watch, "usable_bytes", lambda device: 0.0)
        monkeypatch.setitem(vars(plan.SWITCHES[1]), "value", 7)  # tokens, so that rows of 20 have tiles
        options = {"use_peft": True, "lora_r": 4, "per_device_train_batch_size": 2, "long_context": choice}
        trainer = small_runs.trainer(tmp_path / choice, **options)
        trainer.train()
        assert trainer.args.layer_chunk_tokens == (7 if choice == "auto" else None)
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
        embeddings = trainer.model.get_input_embeddings()
        assert not embeddings(torch.zeros(1, 1, dtype=torch.int64)).requires_grad
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert len(set(losses[0])) > 1
