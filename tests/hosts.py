"""Programs that train with bco_fast inside another trainer's environment, and what their tests compare."""

import json
import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]


def results_inside(host, script, folder, *, timeout):
    """The last line of JSON of a script of tests/integrations/, run in the host's environment; without it, a skip."""
    import pytest  # here, because the programs import this file too, where there may be none

    python = ROOT / f".venv-peers-{host}" / "bin" / "python"
    if not python.exists():
        pytest.skip(f"needs the environment of tests/peers/{host}.txt: make .venv-peers-{host}/.made")
    done = subprocess.run([python, ROOT / "tests" / "integrations" / script], capture_output=True, text=True, timeout=timeout, check=False, cwd=folder, env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def apart(a, b):
    """Norm of the difference of two sets of weights, by name."""
    import torch

    return float(torch.cat([(a[name] - b[name]).flatten() for name in a]).norm())
