"""What a type checker says of a user's program: nothing where it is right, one error a line where it is wrong."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import bco_fast

ROOT = Path(__file__).parents[1]
PROGRAM = """\
import torch
from torch import Tensor

from bco_fast import FeedbackConfig, FeedbackTrainer, RewardShift, bco_loss, fused_bco_loss, fused_linear_logps, load_feedback, patch_model

hidden, weight, targets = torch.randn(1, 4, 8), torch.randn(10, 8), torch.zeros(1, 4, dtype=torch.int64)
labels, ref_logps = torch.tensor([True]), torch.zeros(1)
logps: Tensor = fused_linear_logps(hidden, weight, targets)
logps, entropy = fused_linear_logps(hidden, weight, targets, return_entropy=True)
loss: Tensor = fused_bco_loss(hidden, weight, targets, labels, ref_logps, delta=RewardShift()).loss
rewards: Tensor = bco_loss(logps.sum(1), ref_logps, labels, beta=0.1).rewards
trainer = FeedbackTrainer("model", FeedbackConfig(output_dir="out", beta=0.1), "feedback.jsonl")
trainer.train()

fused_linear_logps("hidden", weight, targets)  # wrong
fused_linear_logps(hidden, weight, targets, return_entropy=True).sum()  # wrong
fused_bco_loss(hidden, weight, targets, labels, ref_logps, betta=0.1)  # wrong
bco_loss(logps, ref_logps, labels, delta="auto")  # wrong
FeedbackConfig(output_dir="out", beta="high")  # wrong
FeedbackTrainer("model", 3)  # wrong
patch_model(3)  # wrong
load_feedback(3)  # wrong
"""
WRONG = {number for number, line in enumerate(PROGRAM.splitlines(), 1) if line.endswith("# wrong")}


def test_the_stub_has_every_public_name_and_no_other():
    stub = (ROOT / "bco_fast/__init__.pyi").read_text()
    found = {}
    for home, names in re.findall(r"^from \.([\w.]+) import (\([^)]*\)|.*)$", stub, re.MULTILINE):
        found |= dict.fromkeys(re.findall(r"\w+", names), home)
    assert found == bco_fast._HOMES
    assert re.findall(r'"(\w+)"', stub[stub.index("__all__") :]) == bco_fast.__all__


def _mypy(program):
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--no-error-summary", "--cache-dir", str(program.parent / "cache"), str(program)]  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.stderr == ""
    return {int(number) for number in re.findall(r"program\.py:(\d+): error", ended.stdout)}


def _pyright(program):
    settings = {"include": [program.name], "extraPaths": [str(ROOT)]}
    (program.parent / "pyrightconfig.json").write_text(json.dumps(settings))
    command = ["pyright", "--project", str(program.parent), "--pythonpath", sys.executable, "--outputjson"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)["generalDiagnostics"]
    return {1 + error["range"]["start"]["line"] for error in found if error["severity"] == "error"}


@pytest.mark.slow
@pytest.mark.parametrize("check", [_mypy, _pyright], ids=["mypy", "pyright"])
def test_a_users_program_is_checked(check, tmp_path):
    if check is _pyright and not shutil.which("pyright"):
        pytest.skip("pip install 'pyright[nodejs]'")
    if check is _mypy:
        pytest.importorskip("mypy")
    (tmp_path / "program.py").write_text(PROGRAM)
    assert check(tmp_path / "program.py") == WRONG
