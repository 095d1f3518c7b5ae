"""What runs on a rented GPU runs here first, small: a typo may not cost minutes there."""

import json
import os
import re
import subprocess
import sys
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
            shape, mode, logits = [*names, "flat"][:3]
            head = {"benchmark": "gpu_suite", "part": part, "shape": shape, "mode": mode, "logits": logits}
            for case in ("plain", "triton fold", "torch"):
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
def test_what_the_sanitizer_runs_runs_here_and_launches_every_kernel(monkeypatch, tmp_path):
    """On the CPU, interpreted: with the device replaced, and each launch noted."""
    sys.path.insert(0, str(ROOT / "tests" / "head"))
    import test_gpu

    launched = tmp_path / "launched"
    program = test_gpu.SANITIZED.replace('"cuda"', '"cpu"').replace("torch.bfloat16", "torch.float16")
    noted = (
        "import bco_fast.head.backends.launching as l, bco_fast.head.backends.triton as t, bco_fast.head.sparse.triton as s\n"
        "real = l.launch\n"
        f"names = open({str(launched)!r}, 'a')\n"
        "def launch(kernel, *args, **options):\n"
        "    print(kernel.fn.__name__, file=names, flush=True)\n"
        "    real(kernel, *args, **options)\n"
        "t.launch = s.launch = launch\n"
    )
    command = [sys.executable, "-c", program.replace("from heads import", f"{noted}from heads import", 1)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert sorted(set(launched.read_text().split())) == test_gpu.OUR_KERNELS


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


PROBE = """
import gpu_probe
gpu_probe.SHAPE, gpu_probe.WIDTHS, gpu_probe.FROZEN = (64, 48, 600, None), (61, 60, 56, 48), ((64, 96), (16, 384))
rows = [row for name, work in gpu_probe.parts(False, "triton").items() if name != "bias" for row in work()]
assert {row["part"] for row in rows} == {"matmul", "kernels", "frozen", "choice"}
"""
STEP = """
import tempfile
from pathlib import Path
import long_context
from tiny import build_tokenizer
long_context.SHAPES["Llama-3-8B"] = long_context.SHAPES["small"]
with tempfile.TemporaryDirectory() as folder:
    build_tokenizer().save_pretrained(Path(folder) / "tokenizer")
    job = {"case": "bco_fast, LoRA", "shape": "Llama-3-8B", "device": "cuda", "tokens": 64, "budget": 1 << 37}
    long_context.trial(job, Path(folder))
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", [PROBE, STEP], ids=["probe", "step"])
def test_what_says_cuda_runs_where_the_cpu_plays_the_gpu(program):
    paths = ":".join(str(ROOT / folder) for folder in (".", "tests", "benchmarks"))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    command = [sys.executable, "-c", f"import cuda_on_cpu\ncuda_on_cpu.install()\n{program}"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert program == PROBE or '"fits": true' in run.stdout
