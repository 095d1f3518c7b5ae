"""The benchmark programs run, and their counts are right."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.fixture
def suite(tmp_path, monkeypatch, capsys):
    import gpu_suite

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["gpu_suite.py", "--smoke", "--out", str(tmp_path), *flags])
        gpu_suite.main()
        return json.loads((tmp_path / "gpu_suite.json").read_text()), capsys.readouterr().out

    return run


def _known(row):
    """What may be missing on the CPU."""
    return (
        row["error"].startswith(("missing: No module named", "no environment .venv-peers-"))
        or row["error"] == "NotImplementedError: F.linear_cross_entropy has no softcap"
    )


@pytest.mark.slow
def test_the_gpu_suite_runs_small_on_the_cpu(suite, tmp_path):
    result, shown = suite("--only", "head")
    assert result["environment"]["torch"]
    failed = [r for r in result["rows"] if "error" in r]
    assert all(_known(r) for r in failed), failed
    assert all(r["case"] in shown and r["error"][:20] in shown for r in failed)
    rows = [r for r in result["rows"] if "error" not in r]
    assert {(r["mode"], r["case"]) for r in rows} >= {
        (m, c) for m in ("forward", "trainable", "frozen") for c in ("plain", "torch")
    }
    assert all(r["logp_rms_error"] < 1e-5 and r["median_s"] > 0 for r in rows)
    assert all(r["share_of_limit"] > 0 for r in rows)
    ours = [r for r in rows if r["case"] == "torch"]
    assert all(r.get("d_hidden_vs_plain", 0) < 1e-4 for r in ours)

    unfinished = {**result["rows"][0], "part": "head, smoke softcap", "unfinished": True}
    kept = [r for r in result["rows"] if r["part"] != unfinished["part"]]
    (tmp_path / "gpu_suite.json").write_text(json.dumps({**result, "rows": [*kept, unfinished]}))
    again, _ = suite("--only", "head")
    assert again["rows"][: len(kept)] == kept  # not measured again
    assert {r["case"] for r in again["rows"] if r["part"] == unfinished["part"]} >= {"plain", "torch"}
    assert not any(r.get("unfinished") for r in again["rows"])


@pytest.mark.slow
def test_a_part_over_its_time_limit_is_a_row(tmp_path):
    import argparse

    import gpu_suite

    options = argparse.Namespace(out=tmp_path, smoke=True)
    (row,) = gpu_suite.run_part("head, smoke", 0.05, options)
    assert row["unfinished"]
    assert "limit" in row["error"]
    (row,) = gpu_suite.run_part("no such part", 60, options)
    assert "KeyError" in row["error"]


@pytest.mark.slow
def test_the_whole_suite_runs_small_on_the_cpu(suite):
    rows = suite()[0]["rows"]
    assert {"growth", "context"} <= {r["part"] for r in rows}
    once, repeated = (r for r in rows if r["part"] == "shared")
    assert once["extra_mb"] < repeated["extra_mb"]
    assert [r for r in rows if "error" in r and not _known(r)] == []
    (context,) = [r for r in rows if r["part"] == "context"]
    assert context["predicted_mb"] / 2 < context["extra_mb"] < context["predicted_mb"] * 1.3


@pytest.mark.slow
def test_the_benchmarks_run_under_pytest_benchmark(tmp_path):
    options = ["-k", "Llama and frozen", "--benchmark-max-time=0.1", "--benchmark-min-rounds=1", "-p", "no:xdist"]
    command = [sys.executable, "-m", "pytest", "benchmarks/", *options, f"--benchmark-json={tmp_path / 'out.json'}"]
    env = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }  # a worker measures nothing
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    measured = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert {m["extra_info"]["contender"] for m in measured} == {"bco_fast", "PyTorch"}
    assert all(m["extra_info"]["share_of_limit"] > 0 for m in measured)


def test_counted_parameters_are_those_of_the_published_models():
    from counts import MODELS

    published = {"Qwen2.5-0.5B": 494.0, "Llama-3.2-1B": 1235.8, "Llama-3-8B": 8030.3, "Qwen3-8B": 8190.7}
    published |= {
        "Gemma-2-2B": 2614.3,
        "Gemma-2-9B": 9241.7,
        "Mistral-7B": 7248.0,
        "Llama-3.2-3B": 3212.7,
        "Qwen3-14B": 14768.3,
    }
    assert set(published) == set(MODELS)
    for name, millions in published.items():
        assert MODELS[name].parameters() / 1e6 == pytest.approx(millions, rel=1e-4), name


def test_a_share_of_the_limit_is_work_over_time():
    from counts import head_bytes, head_flops, share_of_limit, slope

    limits = {"limit_gflops": 100.0, "limit_gb_s": 10.0}
    assert head_flops("trainable", 10, 20, 30) == 3 * 2 * 10 * 20 * 30
    assert head_bytes("frozen", 10, 20, 30, 4) == 4 * (2 * 10 * 20 + 20 * 30) + 12 * 10
    assert share_of_limit(50e9, 1e9, 1.0, limits) == 0.5  # the matmul is what limits
    assert share_of_limit(1e9, 8e9, 1.0, limits) == 0.8  # the memory is
    assert slope([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_predicted_memory_is_near_the_measured_one():
    """Within 1.2 of the longest context measured on the CPU, counted again from the row."""
    from long_context import SHAPES, counted

    rows = json.loads((RESULTS / "long_context.json").read_text())["rows"]
    measured = [r for r in rows if "predicted_mb" in r]
    assert {r["lora"] for r in measured} == {True, False}
    for row in measured:
        memory = counted(SHAPES[row["shape"]], row["longest"], lora=row["lora"], device="cpu", **row["switches"])
        assert memory.total / 1e6 == pytest.approx(row["predicted_mb"], abs=0.1)
        assert 1 / 1.2 < row["predicted_mb"] / row["peak_mb"] < 1.2, row["case"]
    for row in rows:
        assert row["predicted"] == row["case"].startswith("predicted: ")


def test_the_gpus_that_a_model_needs_are_those_of_the_result():
    import sharding

    rows = json.loads((RESULTS / "sharding.json").read_text())["rows"]
    assert sharding.markdown(rows) in (ROOT / "docs/scale.md").read_text()
    for row in rows:
        config, lora = sharding.MODELS[row["model"]], row["trained"] == "LoRA"
        layer = config.hidden_size * (2 * config.num_attention_heads + 16) * 128 + 3 * config.hidden_size * config.intermediate_size  # fmt: skip
        weights = config.num_hidden_layers * layer + 2 * config.vocab_size * config.hidden_size
        state = row["rank_gb"]["1"] - row["activations_gb"]
        assert (2e-9 if lora else 15.98e-9) * weights < state < (3e-9 if lora else 16.02e-9) * weights
        smaller = [int(gpus) for gpus, size in row["rank_gb"].items() if size > 72]
        assert all(gpus < (row["gpus"] or 128) for gpus in smaller)
        assert row["activations_gb"] > 2e-9 * config.num_hidden_layers * config.hidden_size * sharding.CONTEXTS[row["context"]] or row["long"]  # fmt: skip


@pytest.mark.slow
def test_pytest_takes_the_sizes_of_bench():
    sizes = "--tokens 64 --hidden 32 --vocab 500 --benchmark-disable -q -n 0".split()  # noqa: SIM905
    done = subprocess.run([sys.executable, "-m", "pytest", "benchmarks/", *sizes], cwd=ROOT, capture_output=True, text=True, check=False)  # fmt: skip
    assert "6 passed" in done.stdout, done.stdout
    done = subprocess.run([sys.executable, "-m", "pytest", "benchmarks/", *sizes[2:], "--tokens", "0"], cwd=ROOT, capture_output=True, text=True, check=False)  # fmt: skip
    assert "--tokens must be at least 1, not 0" in done.stdout
