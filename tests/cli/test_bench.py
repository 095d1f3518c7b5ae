"""`bco-fast bench`: a model's own sizes, measured against plain PyTorch, on one screen."""

import json

import pytest
import tiny

from bco_fast import cli
from bco_fast.cli import bench


def test_bench_reads_a_config_and_prints_what_is_saved(tmp_path, capfd):
    tiny.model().config.save_pretrained(tmp_path)  # no weights, no tokenizer
    assert cli.main(["bench", "--model", str(tmp_path), "--tokens", "96"]) == 0
    *shown, last = capfd.readouterr().out.strip().splitlines()
    found, config = json.loads(last), tiny.model().config
    assert (found["hidden"], found["vocabulary"]) == (config.hidden_size, config.vocab_size)
    assert found["tokens"] == 96
    for mode in ("frozen", "trained"):
        assert min(found[mode]["plain_s"], found[mode]["ours_s"]) > 0
    assert any("frozen (LoRA)" in line for line in shown)
    assert any(f"{16384 * 4 * config.vocab_size / 1e9:.1f} GB" in line for line in shown)


@pytest.mark.slow
def test_bench_sees_the_memory_of_the_logits(capfd):
    assert cli.main(["bench", "--hidden", "64", "--vocab", "20000", "--tokens", "256"]) == 0
    frozen = json.loads(capfd.readouterr().out.strip().splitlines()[-1])["frozen"]
    logits = 256 * 20000 * 4 / 1e6
    assert frozen["plain_mb"] > logits
    assert frozen["ours_mb"] < logits


def test_bench_keeps_to_its_time_and_memory(monkeypatch):
    size = bench.HeadSize("x", 64, 1000)
    monkeypatch.setattr(bench, "_seconds", lambda case, device: 0.064)  # a millisecond a token
    assert bench._affordable_tokens(lambda n: None, size, 16.0, "cpu") == 960  # 1000, in steps of 64
    monkeypatch.setattr(bench, "_free_memory", lambda: 200 * 4 * 4 * 1000 / bench.MEMORY_SHARE)
    assert bench._affordable_tokens(lambda n: None, size, 16.0, "cpu") == 192
    assert bench._affordable_tokens(lambda n: None, size, 1e-9, "cpu") == bench.FEWEST_TOKENS


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--model", "/nowhere/at/all"], "--model /nowhere/at/all"),
        (["--model", ".", "--hidden", "64"], "--hidden and --vocab cannot be combined with --model"),
        (["--tokens", "0"], "--tokens must be > 0, not 0"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
    ],
)
def test_bench_complains_in_one_line(arguments, complaint, capfd):
    assert cli.main(["bench", *arguments]) == 2
    error = capfd.readouterr().err.strip()
    assert complaint in error
    assert len(error.splitlines()) == 1
