"""What runs on a rented GPU runs here first, small: a typo may not cost minutes there."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.slow)])
def test_every_part_of_the_probe_has_its_rows(backend):
    import gpu_probe

    rows = [row for work in gpu_probe.parts(True, backend).values() for row in work()]
    cases = {part: {row["case"] for row in rows if row["part"] == part} for part in gpu_probe.parts(True, backend)}
    assert {name.partition(",")[0] for name in cases["matmul"]} == {"mm", "addmm", "dz.T"}
    assert len(cases["matmul"]) == 3 * len(gpu_probe.WIDTHS)
    assert {name.partition(",")[0] for name in cases["kernels"]} == {"fold", "dlogits"}
    assert cases["bias"] == ({"fold", "fused"} if backend == "triton" else {"torch"}) | {"PyTorch"}
    assert len(cases["frozen"]) == 2
    assert all(row["ms"] > 0 for row in rows if row["part"] != "bias")
    assert all(abs(row["bias_nats"]) < 1e-6 < 1e3 * row["rms_nats"] for row in rows if row["part"] == "bias")
    assert all(0 < row["kept_fraction"] < 1 for row in rows if row["part"] == "choice")


def test_a_part_that_fails_does_not_cost_the_others(monkeypatch, tmp_path, capsys):
    import gpu_probe

    def broken():
        raise RuntimeError("no kernel image")

    good = {"part": "bias", "case": "torch", "bias_nats": 0.0}
    monkeypatch.setattr(gpu_probe, "parts", lambda *_: {"matmul": broken, "bias": lambda: [good]})
    monkeypatch.setattr(sys, "argv", ["gpu_probe.py", "--tiny", "--out", str(tmp_path)])
    gpu_probe.main()
    failed, rest = json.loads((tmp_path / "gpu_probe.json").read_text())["rows"]
    assert failed == {"part": "matmul", "case": "-", "error": "RuntimeError: no kernel image"}
    assert rest == good
    assert "no kernel image" in capsys.readouterr().out


def test_a_part_over_its_limit_ends_with_all_it_started(monkeypatch, tmp_path):
    """A trial that lived on would keep the GPU's memory from the parts after it."""
    import argparse

    import gpu_suite

    part, trial = tmp_path / "part.sh", tmp_path / "trial"
    part.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {trial}\nwait\n")
    part.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(part))
    (row,) = gpu_suite.run_part("step", 0.5, argparse.Namespace(out=tmp_path, smoke=False))
    assert row["error"] == "over its limit of 0 s"
    status = Path(f"/proc/{trial.read_text().strip()}/status")
    until = time.monotonic() + 20
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < until, "it lives on"


def test_the_commands_of_the_page_exist():
    """Scripts, their options, tests and make targets that gpu_run.md names."""
    page = (ROOT / "benchmarks" / "gpu_run.md").read_text()
    commands = [line for block in re.findall(r"```\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    assert len(commands) >= 5
    for line in commands:
        for name in re.findall(r"[\w/]+\.(?:py|txt|md|json)\b", line):
            if not name.startswith("out"):
                assert (ROOT / name).is_file(), line
        for script in re.findall(r"benchmarks/\w+\.py", line):
            source = (ROOT / script).read_text()
            options = re.findall(r"(--[a-z][\w-]*)", line.split(script)[1])
            assert all(f'"{option}"' in source for option in options), line
    timed = [float(minutes) for minutes in re.findall(r"(\d+(?:\.\d+)?) min", page)]
    assert sum(timed) <= 30
    assert max(timed) <= 8


def test_every_planned_time_has_its_row():
    """8192 tokens of an 8B Llama: without a gradient, frozen, trained and sparse; and the shape of trl issue 7244."""
    import gpu_suite

    parts = list(gpu_suite.parts(smoke=False))
    assert gpu_suite.SHAPES["Llama-3-8B"] == (8192, 4096, 128256, None)
    assert gpu_suite.SHAPES["Qwen3-8B"] == (8192, 4096, 151936, None)
    wanted = [f"head, {shape}, {mode}" for shape in ("Llama-3-8B", "Qwen3-8B") for mode in gpu_suite.MODES]
    assert set(wanted) | {"head, Llama-3-8B, trainable, likely", "step", "shared", "context"} <= set(parts)
    assert parts[0] == "head, Llama-3-8B, frozen"
    assert all("compiled" in name for name in parts[-6:]), "what may take minutes is lost last"
    cases = gpu_suite.contenders(True, "trainable", "likely")
    assert {"triton fused", "triton fold", "sparse 2^-5", "sparse 2^-11"} <= set(cases)
    assert "TRL 1.16 ChunkedLogProb" in gpu_suite.contenders(True, "frozen", "flat")


@pytest.mark.slow
def test_likely_tokens_keep_what_both_ways_of_a_sparse_backward_are_for(monkeypatch):
    """Of 128,256 tokens, in blocks of the Triton backend: about a tenth, and more than from where dh is one matmul."""
    import contenders
    import gpu_suite
    import torch

    from bco_fast.head.backends import torch as chunked
    from bco_fast.head.backends import triton as triton_backend
    from bco_fast.head.sparse import torch as sparse
    from bco_fast.head.sparse import triton as sparse_triton
    from bco_fast.kernels.configs import scattered_from

    monkeypatch.setattr(chunked, "MASS_TILE", triton_backend.MASS_TILE)
    monkeypatch.setattr(sparse, "break_even", lambda dtype: 1.1)
    head, kept = contenders.Head((256, 1024, 128256, None), "cpu", torch.float32, logits="likely"), []
    for power in gpu_suite.TOLERANCES["likely"]:
        head.step(contenders.ours(head, backend="torch", sparse_tolerance=2.0**-power), "trainable")
        kept.append(head.stats.kept_fraction)
    low, high = kept
    assert 0.05 < low < scattered_from(2, 4096)
    assert scattered_from(2, 4096) < high < sparse_triton.break_even(torch.bfloat16)


def test_a_result_of_a_gpu_gets_its_section_and_without_one_there_is_none(monkeypatch, tmp_path):
    import charts
    import publish

    monkeypatch.setattr(charts, "RESULTS", tmp_path)
    assert list(publish.gpu_section()) == []
    head = {"benchmark": "gpu_suite", "shape": "Qwen3-8B", "mode": "frozen", "logits": "flat"}
    rows = [
        {**head, "case": "triton fold", "median_s": 0.0331, "derived_s": 0.0318, "extra_mb": 350.4},
        {**head, "case": "Liger fused linear CE", "error": "missing: No module named 'liger_kernel'"},
        {
            "benchmark": "step",
            "shape": "Llama-3-8B",
            "mode": "LoRA",
            "case": "bco_fast, LoRA",
            "fits": False,
            "why": "over 100 s",
        },
        {"benchmark": "growth", "shape": "growth along N", "mode": "frozen", "case": "one point"},
        {"benchmark": "growth", "case": "frozen, along N", "time_exponent": 0.99, "memory_exponent": 0.02},
        {"part": "context", "case": "-", "shape": "context", "unfinished": True, "error": "over its limit of 150 s"},
    ]
    environment = {"gpu": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-11-21"}
    (tmp_path / "gpu_suite.json").write_text(json.dumps({"environment": environment, "rows": rows}))
    page = "\n".join(publish.gpu_section())
    assert "NVIDIA H200, PyTorch 2.11.0" in page
    assert "| triton fold | 33.1 | 31.8 | 350 MB |" in page
    assert "| Liger fused linear CE | [1] |  |  |" in page
    assert "1. Liger fused linear CE: `missing: No module named 'liger_kernel'`" in page
    assert "| bco_fast, LoRA | did not fit: over 100 s |  |  |" in page
    assert "| frozen, along N | 0.99 | 0.02 |" in page
    assert "2. -: `over its limit of 150 s`" in page
    assert "one point" not in page


def test_every_part_of_the_suite_is_on_a_page(monkeypatch, tmp_path):
    """With rows of the form that each part writes: docs/results.md has all, the README its two shapes and the step."""
    import charts
    import figures
    import gpu_rows
    import gpu_suite
    import publish

    monkeypatch.setattr(charts, "RESULTS", tmp_path)
    readme = (ROOT / "README.md").read_text()
    assert gpu_rows.placed(readme) == readme
    rows, milliseconds = [], 30
    for part in gpu_suite.parts(smoke=False):
        kind, *names = part.split(", ")
        if kind == "head":
            shape, mode, *more = names
            logits = "likely" if more == ["likely"] else "flat"
            head = {"benchmark": "gpu_suite", "part": part, "shape": shape, "mode": mode, "logits": logits}
            for case in ["PyTorch, compiled"] if more == ["compiled"] else ["plain", "triton fold", "torch"]:
                milliseconds += 1
                rows.append(
                    {**head, "case": case, "median_s": milliseconds / 1e3, "derived_s": 0.0299, "extra_mb": 300.0}
                )
        elif kind == "growth":
            rows.append(
                {
                    "benchmark": kind,
                    "part": part,
                    "case": "frozen, along V",
                    "time_exponent": 1.01,
                    "memory_exponent": 0.0,
                }
            )
        else:
            for shape, case, tokens in gpu_suite.STEPS if kind == "step" else gpu_suite.CONTEXTS:
                milliseconds += 1
                row = {"benchmark": kind, "part": part, "shape": shape, "mode": "LoRA", "case": case, "tokens": tokens}
                rows.append(row | {"median_s": milliseconds / 1e3, "extra_mb": 4000.0})
    environment = {"gpu": "NVIDIA H200", "torch": "2.11.0", "triton": "3.6.0", "date": "2026-11-21"}
    (tmp_path / "gpu_suite.json").write_text(json.dumps({"environment": environment, "rows": rows}))
    page = "\n".join(publish.gpu_section())
    for row in rows:
        derived = "29.9" if "derived_s" in row else ""
        if row["benchmark"] != "growth":
            assert f"| {row['case']} | {1e3 * row['median_s']:.1f} | {derived} | {row['extra_mb']:.0f} MB |" in page, (
                row
            )
    assert "| frozen, along V | 1.01 | 0.00 |" in page
    measured = gpu_rows.placed(readme)
    lines = gpu_rows.lines()
    assert len(lines) == 3 + 2 + 1
    assert all(line in measured for line in lines)
    head, numbers = lines[0].split("`, ")
    assert head == "| H200: lm-head of Llama-3-8B, frozen (LoRA), `triton fold"
    assert re.findall(r"[\d.]+", numbers) == ["29.9", "31.0", "32.0", "1.03", "300", "300"]
    assert "No GPU time has been measured yet" not in measured
    assert figures.unquoted(measured, figures.README + [(line, []) for line in lines]) == []
    assert gpu_rows.placed(measured) == measured
    (tmp_path / "gpu_suite.json").unlink()
    assert gpu_rows.placed(measured) == readme


@pytest.mark.slow
def test_the_gpu_tests_are_collected_without_packages_of_the_trainer(tmp_path):
    """The machine has neither datasets nor trl; the operator's tests need torch, triton and pytest."""
    blocked = "datasets", "trl", "peft", "transformers", "accelerate", "sklearn", "matplotlib"
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({blocked!r}))  # None: importing one raises ImportError\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "gpu",
        "--collect-only",
        "-p",
        "no:xdist",
        "tests/head/test_gpu.py",
    ]
    environment = {"PYTHONPATH": f"{tmp_path}:{ROOT}", "PATH": "/usr/bin:/bin"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "test_real_shapes" in run.stdout


def _played(*command, **variables):
    """A process of Python in which the CPU plays the GPU; nothing of its environment but what the page asks for."""
    paths = ":".join(str(ROOT / folder) for folder in (".", "tests", "tests/benchmarks", "benchmarks"))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths, **variables}
    run = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout


def _missing(row):
    return row["error"].startswith(("missing: No module named", "no environment .venv-peers-"))


@pytest.mark.slow
def test_the_probe_runs_where_the_cpu_plays_the_gpu(tmp_path):
    import gpu_probe

    _played(ROOT / "tests/benchmarks/on_a_played_gpu.py", "gpu_probe.py", "--out", tmp_path)
    result = json.loads((tmp_path / "gpu_probe.json").read_text())
    assert result["environment"]["gpu"] == "NVIDIA H200"
    assert {row["part"] for row in result["rows"]} == set(gpu_probe.parts(True, "triton"))
    assert not [row for row in result["rows"] if "error" in row]


@pytest.mark.slow
def test_the_tuner_runs_where_the_cpu_plays_the_gpu():
    shown = _played(ROOT / "tests/benchmarks/on_a_played_gpu.py", "tune.py")
    assert "matmul" in shown
    assert "fold" in shown
    assert "(64, 64, 32, 4, 2)" in shown
    assert "Error" not in shown
    late = _played(ROOT / "tests/benchmarks/on_a_played_gpu.py", "tune.py", "--seconds", "0")
    assert "3 others" in late
    assert "fold" in late


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_part_of_the_suite_runs_where_the_cpu_plays_the_gpu(tmp_path):
    """The compiler and the peers' kernels apart."""
    import gpu_suite

    _played(ROOT / "tests/benchmarks/on_a_played_gpu.py", "gpu_suite.py", "--out", tmp_path, "--minutes", "60")
    rows = json.loads((tmp_path / "gpu_suite.json").read_text())["rows"]
    failed = [row for row in rows if "error" in row and not _missing(row)]
    assert not failed, failed
    found = {row["part"] for row in rows}
    shapes = {name.split(", ")[1] for name in gpu_suite.parts(smoke=False) if name.startswith("head")}
    assert found == {
        name
        for name in gpu_suite.parts(smoke=False)
        if not any(f", {shape}," in name for shape in shapes - {"Llama-3-8B"})
    }
    ours = [row for row in rows if row["case"].startswith(("torch", "triton", "sparse"))]
    assert all(row["derived_s"] > 0 and row["same_bits"] for row in ours)
    (few,) = (row for row in ours if row["case"] == "sparse 2^-5")
    assert 0 < few["rho"] < 1
    assert {row["case"] for row in rows if row["part"] == "shared"} == {"prompt once", "prompt repeated"}
    assert all(row["median_s"] > 0 for row in rows if row["part"] == "context")


SMALL = {
    "300, 50257, 896": "65, 600, 40", "512, 32000, 2304": "70, 500, 72", "200, 5000, 320": "70, 600, 40", "1000, 20000, 512": "70, 600, 40",
    "range(50)": "range(2)", "32768, 512": "8192, 48", "(2048, 512": "(64, 48", "32768, (2048,)": "8192, (64,)", "randn(2048,": "randn(64,",
    "512**0.5": "48**0.5", "(32768, 896, 151_936), (8192, 2304, 262_144), (8192, 4096, 128_256)": "(96, 40, 700)",
}  # fmt: skip
"""Sizes of test_gpu.py, and smaller ones for the interpreter."""


@pytest.fixture
def small_gpu_tests(tmp_path):
    source = (ROOT / "tests/head/test_gpu.py").read_text()
    for real, small in SMALL.items():
        assert real in source, real
        source = source.replace(real, small)
    source = source.replace("Path(__file__).parents[2]", f"Path({str(ROOT)!r})")
    (tmp_path / "played_gpu.py").write_text("import cuda_on_cpu\ncuda_on_cpu.install()\n")
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu: on a GPU\ntimeout = 240\n")
    path = tmp_path / "test_gpu_small.py"
    path.write_text(source)
    return path


def _played_tests(path, select, **variables):
    options = ("-q", "-m", "gpu", "-p", "no:xdist", "-p", "no:cacheprovider", "-p", "played_gpu", "-k", select)
    paths = ":".join(map(str, (path.parent, ROOT, ROOT / "tests")))
    return _played("-m", "pytest", *options, path, PYTHONPATH=paths, **variables)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_gpu_tests_pass_where_the_cpu_plays_the_gpu(small_gpu_tests):
    """But for the two that are of a GPU only: more than 2^31 elements, and targets that a CPU refuses."""
    shown = _played_tests(small_gpu_tests, "not sanitizer and not past_two and not foreign")
    assert re.search(r"\b\d\d passed", shown), shown
    assert "skipped" not in shown
    assert "failed" not in shown


TOOL = """#!{python}
import subprocess, sys
at = sys.argv.index("-c")
options, (python, program) = sys.argv[1 : at - 1], (sys.argv[at - 1], sys.argv[at + 1])
known = {{"--tool": 0, "--error-exitcode": 0, "--report-api-errors": 0, "--launch-timeout": 0, "--kernel-name": 0}}
for name in options[::2]:
    known[name] += 1
assert min(known.values()) == 1, known
first = "import cuda_on_cpu; cuda_on_cpu.install()\\n" + {noted!r}
sys.exit(subprocess.run([python, "-c", first + program]).returncode)
"""
NOTED = """
import bco_fast.head.backends.launching as l, bco_fast.head.backends.triton as t, bco_fast.head.sparse.triton as s
real, names = l.launch, open({launched!r}, "a")
def launch(kernel, *args, **options):
    print(kernel.fn.__name__, file=names, flush=True)
    real(kernel, *args, **options)
t.launch = s.launch = launch
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_the_sanitizer_runs_launches_every_kernel(small_gpu_tests, tmp_path):
    """The whole test, with a sanitizer that only looks at its options."""
    sys.path.insert(0, str(ROOT / "tests" / "head"))
    import test_gpu

    launched, tool = tmp_path / "launched", tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text(TOOL.format(python=sys.executable, noted=NOTED.format(launched=str(launched))))
    tool.chmod(0o755)
    shown = _played_tests(small_gpu_tests, "sanitizer and memcheck", PATH=f"{tool.parent}:{os.environ['PATH']}")
    assert "1 passed" in shown
    assert sorted(set(launched.read_text().split())) == test_gpu.OUR_KERNELS
