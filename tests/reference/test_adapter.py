"""A reference that is another adapter on the same base: its log-probabilities, its cache, and its absence from training."""

import json
import math
import weakref

import numpy as np
import peft
import pytest
import tiny
import torch
from small_runs import TOKENIZER, config

from bco_fast import FeedbackTrainer, cli, patch_model
from bco_fast.data.batch import collate
from bco_fast.reference.adapter import load_reference_adapter
from bco_fast.reference.identity import reference_id
from bco_fast.training import references
from bco_fast.training.config import FeedbackConfig
from bco_fast.training.model_card import model_card
from bco_fast.training.step import completion_sums


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base m, two adapters a and b on it, and c on a base with other weights."""
    folder = tmp_path_factory.mktemp("world")
    TOKENIZER.save_pretrained(folder / "m")
    for name, base, seed in (("a", "m", 0), ("b", "m", 0), ("c", "n", 1)):
        model = tiny.model(seed=seed)
        model.save_pretrained(folder / base)
        torch.manual_seed(ord(name))
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))  # fmt: skip
        for key, p in adapted.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(p, std=0.5)
        adapted.peft_config["default"].base_model_name_or_path = str(folder / base)
        adapted.save_pretrained(folder / name)
    tiny.write(folder / "data.jsonl", tiny.rows(8))
    return folder


def _trainer(world, folder, model="m", **options):
    options = {"max_steps": 1, "ref_adapter": str(world / "a")} | options
    return FeedbackTrainer(str(world / model), config(folder, **options), tiny.rows(8), processing_class=TOKENIZER)


@pytest.mark.parametrize("options", [{}, {"use_peft": True, "lora_r": 2}], ids=["all weights", "LoRA"])
def test_the_reference_is_the_base_with_that_adapter_and_leaves(world, tmp_path, monkeypatch, options):
    loaded = []
    real = references.load_reference_adapter
    monkeypatch.setattr(references, "load_reference_adapter", lambda *a: loaded.append(weakref.ref(m := real(*a))) or m)
    trainer = _trainer(world, tmp_path, **options)
    assert loaded[0]() is None, "it takes no memory in training"
    expected = peft.PeftModel.from_pretrained(tiny.model(), world / "a").merge_and_unload()
    batch = collate([trainer.train_dataset[i] for i in range(8)], 1)
    with torch.no_grad():
        sums = completion_sums(patch_model(expected.eval()), batch)
        own = completion_sums(trainer.model.eval(), batch)
    assert np.allclose(trainer.train_dataset.ref_logps, sums, atol=1e-3)
    assert (own - sums).abs().max() > 0.1
    trainer.train()
    assert "the reference is the base with another adapter" in model_card(trainer.recorder.record)
    names = trainer.model.state_dict()
    assert {"default" in name for name in names if "lora_" in name} == ({True} if options else set())


def test_an_adapter_that_is_its_own_reference_starts_with_rewards_of_0(world, tmp_path):
    trainer = _trainer(world, tmp_path, model="a", loss_type="bce")
    trainer.train()
    line = trainer.state.log_history[0]
    assert abs(line["rewards/margins"]) < 1e-4
    assert math.isclose(line["loss"], math.log(2), rel_tol=1e-4)


def test_its_identity_is_the_adapters_not_the_hosts(world, tmp_path):
    def identity(model, adapter):
        policy = peft.PeftModel.from_pretrained(tiny.model(), world / model) if model != "m" else tiny.model()
        options = FeedbackConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
        return reference_id(load_reference_adapter("ref_adapter", world / adapter, policy, options), adapter=True)

    assert identity("m", "a") == identity("b", "a")
    assert identity("m", "a") != identity("m", "b")
    assert identity("m", "a") != reference_id(tiny.model())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ref_adapter": "m"}, "ref_adapter .*m: no adapter there"),
        ({"ref_adapter": "c"}, "ref_adapter .*c: its base, .*n, has other weights than the base of the model"),
        ({"loss_type": "sft"}, "sft does not read ref_adapter"),
    ],
    ids=str,
)
def test_what_is_refused(world, tmp_path, options, message):
    if "ref_adapter" in options:
        options = {"ref_adapter": str(world / options["ref_adapter"])}
    with pytest.raises(ValueError, match=message):
        _trainer(world, tmp_path, **options)


def test_two_references_and_online_training_are_refused(world, tmp_path):
    from bco_fast import OnlineConfig

    with pytest.raises(ValueError, match="ref_adapter and ref_model are two references"):
        FeedbackTrainer(tiny.model(), config(tmp_path, ref_adapter="a"), tiny.rows(8), processing_class=TOKENIZER, ref_model=tiny.model())  # fmt: skip
    with pytest.raises(ValueError, match="ref_adapter: online training"):
        OnlineConfig(output_dir=str(tmp_path), max_steps=1, ref_adapter="a", use_cpu=True, report_to="none")


@pytest.mark.slow
def test_what_build_computes_train_finds(world, tmp_path, capfd):
    data, cache = ["--data", str(world / "data.jsonl")], ["--cache_dir", str(tmp_path / "cache"), "--max_length", "48"]
    base = ["--model", str(world / "m"), *data, *cache]
    assert cli.main(["cache", "build", *base, "--adapter", str(world / "a")]) == 0
    train = ["train", *base, *["--use_cpu", "true", "--use_peft", "true", "--max_steps", "1", "--eval_fraction", "0", "--disable_tqdm", "true", "--report_to", "none"]]  # fmt: skip
    computed = []
    for number, reference in enumerate((["--ref_adapter", str(world / "a")], ["--ref_adapter", str(world / "b")], [])):
        capfd.readouterr()
        assert cli.main([*train, *reference, "--output_dir", str(tmp_path / f"out{number}")]) == 0
        computed.append(json.loads(capfd.readouterr().out.strip().splitlines()[-1])["cache_computed"])
    assert computed == [0, 8, 8]
    for command, option in ((["cache", "build", *base], "--adapter"), ([*train, "--output_dir", str(tmp_path / "no")], "--ref_adapter")):  # fmt: skip
        assert cli.main([*command, option, str(world / "m")]) == 2
        lines = capfd.readouterr().err.strip().splitlines()
        assert f"{option} {world / 'm'}: no adapter there" in lines[-1]
