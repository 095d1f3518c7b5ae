"""Our plugin inside axolotl 0.19, in an environment that has it: YAML, loading, data formats and training are axolotl's."""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-peers-axolotl" / "bin" / "python"


@pytest.fixture(scope="module")
def results():
    if not PYTHON.exists():
        pytest.skip("needs the environment of tests/peers/axolotl.txt: make .venv-peers-axolotl/.made")
    script = ROOT / "tests" / "integrations" / "peers_axolotl.py"
    done = subprocess.run([PYTHON, script], capture_output=True, text=True, timeout=230, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("name", ["bco", "bco lora", "rdpo"])
def test_a_yaml_trains_with_our_trainer(results, name):
    run = results[name]
    assert run["trainer"] == "_Trainer"
    assert run["args"]["loss_type"] == name.split()[0]
    assert len(run["losses"]) == 3
    assert all(map(math.isfinite, run["losses"]))
    start = 4 * run["losses"][0] / math.log(2)  # rewards start at 0: four rows, thumbs up of "bco" count twice
    assert start == pytest.approx(round(start) if name == "bco" else 4, abs=0.1)
    assert 4 <= round(start) <= 8
    assert run["losses"][2] != run["losses"][0]


def test_options_of_the_yaml_arrive(results):
    expected = {"max_length": 64, "beta": 0.2, "desirable_weight": 2.0, "learning_rate": 0.01}
    assert {name: results["bco"]["args"][name] for name in expected} == expected
    assert results["bco"]["text"].count("</s>") <= 1


def test_the_first_loss_of_kto_is_that_of_its_own_trainer(results):
    """Policy and reference are one at that step, so this compares rows, class weights and the mean, but no tokens."""
    losses = results["kto"]
    assert losses["ours"] != 0.5  # what it would be without a class weight
    assert losses["ours"] == pytest.approx(losses["theirs"], rel=1e-6)
