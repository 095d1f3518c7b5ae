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
    assert f"is an adapter on {world / 'models' / 'm'}" in caplog.text
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
    card = (tmp_path / "whole" / "README.md").read_text()
    assert "a LoRA adapter, merged into its base" in card
    assert "library_name: transformers" in card
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


CONVERTER = """
import sys
model, outfile, outtype = sys.argv[1], sys.argv[3], sys.argv[5]
assert open(model + "/config.json").read() and sys.argv[2::2] == ["--outfile", "--outtype"]
open(outfile, "wb").write(b"GGUF" + outtype.encode())
"""


@pytest.fixture
def export(tmp_path, capfd, monkeypatch):
    """Run `export` without a converter on PATH; -> exit code, output lines, last line of the errors."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "convert.py").write_text(CONVERTER)

    def run(model, *more, output_dir=tmp_path / "exported"):
        code = cli.main(["export", "--model", str(model), "--output_dir", str(output_dir), *more])
        out, err = capfd.readouterr()
        return code, out.strip().splitlines(), (err.strip().splitlines() or [""])[-1]

    return run


def test_export_merges_an_adapter_and_prints_what_serves_it(world, tmp_path, export):
    code, lines, _ = export(world / "runs" / "out", "--converter", str(tmp_path / "convert.py"), "--gguf", "q8_0", "--name", "my model")  # fmt: skip
    assert code == 0
    whole, gguf = tmp_path / "exported" / "model", tmp_path / "exported" / "my model.gguf"
    assert gguf.read_bytes() == b"GGUFq8_0"
    assert (whole / "model.safetensors").is_file()
    assert not (whole / "adapter_config.json").exists()
    assert sorted(path.name for path in gguf.parent.iterdir()) == ["model", "my model.gguf"], "nothing else is left"
    text = "\n".join(lines)
    assert f"vllm serve {whole} --served-model-name 'my model'" in text
    assert "v1/completions" in text, "it was trained on text"
    assert f"llama-server -m '{gguf}'" in text
    assert f"hf upload YOUR_NAME/'my model' {whole} . --private" in text
    assert json.loads(lines[-1]) == {"model": str(whole), "merged": True, "gguf": str(gguf), "output_dir": str(tmp_path / "exported")}  # fmt: skip


def test_export_leaves_a_whole_model_where_it_is(world, tmp_path, export):
    model = world / "models" / "m"
    code, lines, _ = export(model)
    assert code == 0
    assert json.loads(lines[-1])["gguf"] is None
    assert not (tmp_path / "exported").exists()
    assert f"    vllm serve {model} --served-model-name m" in lines
    assert (
        f"    hf upload YOUR_NAME/m {model} . --private --exclude 'checkpoint-*' --exclude training_args.bin" in lines
    )
    # a converter on PATH is used without being named
    (tmp_path / "bin").mkdir()
    found = tmp_path / "bin" / "convert_hf_to_gguf.py"
    found.write_text("#!/usr/bin/env python3" + CONVERTER)
    found.chmod(0o755)
    assert export(model)[0] == 0
    assert (tmp_path / "exported" / "m.gguf").read_bytes() == b"GGUFauto"


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("raise SystemExit('Model Foo is not supported')", "Model Foo is not supported"),
        ("import no_such_module", "pip install no_such_module"),
        ("pass", "it wrote no GGUF file"),
        ("import sys; open(sys.argv[3], 'wb').write(b'half')", "it wrote no GGUF file"),
    ],
)
def test_a_converter_that_fails_is_one_error(world, tmp_path, export, program, said):
    (tmp_path / "convert.py").write_text(program)
    code, _, error = export(world / "models" / "m", "--converter", str(tmp_path / "convert.py"))
    assert code == 2
    assert error.startswith(f"bco-fast: error: --converter {tmp_path / 'convert.py'} failed (exit code ")
    assert said in error
    assert not [path for path in tmp_path.rglob("*.gguf*") if path.is_file()]


def test_what_cannot_be_exported_is_refused_before_anything_is_loaded(world, tmp_path, export):
    model = world / "models" / "m"
    for arguments, said in [
        ([tmp_path / "none"], "no such folder"),
        ([tmp_path], "neither a model (config.json) nor an adapter"),
        ([model, "--gguf", "f16"], "--gguf f16 needs llama.cpp's convert_hf_to_gguf.py, which is not on PATH"),
        ([model, "--converter", str(tmp_path)], "convert_hf_to_gguf.py is not there"),
        ([model, "--gguf", "none", "--converter", "x"], "leave one out"),
    ]:
        code, _, error = export(*arguments)
        assert (code, error.startswith("bco-fast: error: ")) == (2, True)
        assert said in error
    code, _, error = export(model, output_dir=model)
    assert (code, "is not empty" in error) == (2, True)


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
