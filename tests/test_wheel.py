"""The wheel holds the kernels, shadows nothing, and works once installed in a fresh environment."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_wheel_imports_in_a_fresh_environment(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in files:
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to(os.readlink(ROOT / name))
        elif (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", tmp_path, source]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("bco_fast-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "bco_fast/py.typed",
        "bco_fast/cli/help/train.txt",
        "bco_fast/configs/bco_ultrafeedback.yaml",
        "bco_fast/configs/experiments/bco_fig1_ultrafeedback.yaml",
        "bco_fast/accelerate_configs/zero3.yaml",
        "bco_fast/kernels/head_logps.py",
        "bco_fast/head/backends/triton.py",
    } <= names
    assert not any(
        n.startswith(("kernels/", "configs/", "accelerate_configs/", "tests/", "benchmarks/")) for n in names
    )

    venv.create(tmp_path / "fresh", with_pip=False)
    python = tmp_path / "fresh" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    site = next((tmp_path / "fresh" / "lib").glob("python*/site-packages"))
    # torch and transformers come from the environment of the tests; bco_fast must not
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    code = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if '__editable__' not in str(f)]\n"
        "import torch, bco_fast, bco_fast.kernels.head_logps as k; from transformers import LlamaForCausalLM\n"
        "from bco_fast.training.trainer import FeedbackTrainer; print(bco_fast.__file__, k.__file__)\n"
        "logps = bco_fast.fused_linear_logps(torch.eye(2, 3), torch.eye(4, 3), torch.tensor([0, 1]))\n"
        "assert torch.allclose(logps, 1 - torch.log(torch.tensor(torch.e + 3)))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    assert all(str(site) in path for path in run.stdout.split())
    command = [tmp_path / "fresh" / "bin" / "bco-fast", "recipes", "zero3"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert Path(run.stdout.strip()).is_relative_to(site), run.stderr
    assert "DEEPSPEED" in Path(run.stdout.strip()).read_text()
    command = [
        tmp_path / "fresh" / "bin" / "bco-fast",
        "train",
        "--config",
        "bco_ultrafeedback.yaml",
        "--data",
        "f.jsonl",
        "--use_cpu=true",
        "--bf16=false",
    ]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.stderr.splitlines()[-1] == "bco-fast: error: --data f.jsonl: no such file"
    command = [tmp_path / "fresh" / "bin" / "bco-fast", "--version"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert re.fullmatch(r"bco_fast \d+\.\d+\.\d+\S*\n", run.stdout), run.stderr
