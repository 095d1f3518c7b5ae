"""What `train --use_peft` leaves is trained further, generated from and merged, from wherever the command is started."""

import json

import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bco_fast import cli

PROMPTS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """proj/models/m and proj/runs/out, an adapter of rank 4 on it, trained from proj."""
    proj = tmp_path_factory.mktemp("proj")
    tiny.model().save_pretrained(proj / "models" / "m")
    tiny.build_tokenizer().save_pretrained(proj / "models" / "m")
    tiny.write(proj / "data.jsonl", tiny.rows(8))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(proj)
        assert _train("models/m", "runs/out", "--use_peft", "true", "--lora_r", "4") == 0
    return proj


def _train(model, output_dir, *more):
    arguments = "--data data.jsonl --use_cpu true --max_steps 2 --eval_fraction 0 --save_strategy no --max_length 48 --cache_dir cache --learning_rate 1e-2 --per_device_train_batch_size 4 --disable_tqdm true --report_to none"  # fmt: skip
    return cli.main(["train", "--model", str(model), "--output_dir", str(output_dir), *arguments.split(), *more])


def _logits(model):
    with torch.no_grad():
        return model.eval()(PROMPTS).logits


@pytest.mark.slow
def test_training_goes_on_with_the_adapter_from_any_folder(world, tmp_path, monkeypatch, caplog, capfd):
    from peft import PeftModel

    base = AutoModelForCausalLM.from_pretrained(world / "models" / "m")
    monkeypatch.chdir(tmp_path)  # its base was named relative to another folder
    tiny.write(tmp_path / "data.jsonl", tiny.rows(8))
    with caplog.at_level("INFO", logger="bco_fast"):
        assert _train(world / "runs" / "out", tmp_path / "more", "--learning_rate", "0", "--cache_dir", str(world / "cache")) == 0  # fmt: skip
    assert f"is an adapter on {world / 'models' / 'm'}; without it, the base is the reference" in caplog.text
    assert "rewards do not start at 0" in caplog.text
    summary = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert summary["cache_computed"] == 0, "the reference is the base again"
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (world / "runs" / "out", tmp_path / "more"))  # fmt: skip
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first), "a rate of 0 leaves the adapter as it was"
    config = json.loads((tmp_path / "more" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, str(world / "models" / "m"))
    assert not torch.equal(_logits(base), _logits(PeftModel.from_pretrained(base, tmp_path / "more")))

    assert _train(world / "runs" / "out", tmp_path / "trained", "--cache_dir", str(world / "cache")) == 0
    third = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    assert any(not torch.equal(first[name], third[name]) for name in first)


def test_options_of_another_adapter_are_refused(world, monkeypatch, capfd):
    monkeypatch.chdir(world)
    assert _train("runs/out", "runs/other", "--use_peft", "true", "--lora_r", "8") == 2
    assert "--lora_r: the adapter that is trained further has 4, not 8; leave it out" in capfd.readouterr().err
    assert not (world / "runs" / "other").exists()


def test_merge_computes_what_the_adapter_does(world, tmp_path, capfd):
    from peft import PeftModel

    assert cli.main(["merge", "--model", str(world / "runs" / "out"), "--output_dir", str(tmp_path / "whole")]) == 0
    summary = json.loads(capfd.readouterr().out.strip().splitlines()[-1])
    assert (summary["dtype"], summary["base"]) == ("float32", str(world / "models" / "m"))
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "run.json"} <= names
    assert not {name for name in names if name.startswith("adapter")}
    base = AutoModelForCausalLM.from_pretrained(world / "models" / "m")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    before = _logits(base)
    torch.testing.assert_close(_logits(whole), _logits(PeftModel.from_pretrained(base, world / "runs" / "out")))
    assert not torch.allclose(_logits(whole), before, atol=1e-3)


@pytest.mark.slow
def test_generate_reads_an_adapter(world, tmp_path):
    tiny.write(tmp_path / "prompts.jsonl", [{"prompt": tiny.rows(1)[0]["prompt"]}])
    options = ["--prompts", str(tmp_path / "prompts.jsonl"), "--max_new_tokens", "4", "--temperature", "0"]
    assert cli.main(["merge", "--model", str(world / "runs" / "out"), "--output_dir", str(tmp_path / "whole")]) == 0
    said = []
    for model in (world / "runs" / "out", tmp_path / "whole"):
        assert cli.main(["generate", "--model", str(model), "--output", str(tmp_path / "said"), *options]) == 0
        said.append(json.loads((tmp_path / "said").read_text())["completion"])
    assert said[0] == said[1]


def test_what_cannot_be_merged_is_refused(world, tmp_path, capfd):
    def refused(model, output_dir):
        assert cli.main(["merge", "--model", str(model), "--output_dir", str(output_dir)]) == 2
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("bco-fast: error: ")
        return error

    assert "no adapter there" in refused(world / "models" / "m", tmp_path / "whole")
    assert "is not empty" in refused(world / "runs" / "out", world / "runs" / "out")
    lost = tmp_path / "lost"
    lost.mkdir()
    (lost / "adapter_config.json").write_text('{"base_model_name_or_path": "some/where/else", "peft_type": "LORA"}')
    assert "must be in safetensors" in refused(lost, tmp_path / "whole")
    (lost / "adapter_model.safetensors").touch()
    assert "the adapter's base some/where/else is not there" in refused(lost, tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
