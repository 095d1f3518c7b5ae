"""The same runs started as a user starts them: torchrun and accelerate launch, on two and four processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import ranked
import tiny
from small_runs import TOKENIZER
from test_ranks import same

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
SHAPES = [f"{shape}-{accumulation}-{weights}" for shape in ("padded", "packed", "tokens", "shared") for accumulation, weights in ((1, "full"), (3, "lora"))]  # fmt: skip
LOSSES = ("bco", "kto", "bnf", "una_score", "dpo", "sft")


def _launch(command, tmp_path, names, **environment):
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([*command, str(HERE / "ranked.py"), str(tmp_path / "small_runs"), *names], env=environment, capture_output=True, text=True, timeout=500)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp_path / "small_runs" / "found.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("world", [2, 4])
def test_torchrun_is_one_process(tmp_path, world, shape):
    names = [f"{loss}-{shape}-{rows}" for loss, rows in zip(LOSSES, (21, 16, 13, 9, 3, 1), strict=True)]
    found = _launch([*TORCHRUN, str(world)], tmp_path, names)
    for name in names:
        same(ranked.run(name, 1, tmp_path / "alone", scale=world), found[name], name)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [2, 4])
def test_torchrun_with_fsdp2_is_one_process(tmp_path, world):
    names = [f"{loss}-{shape}" for loss in LOSSES for shape in ("padded-1-full-21", "packed-3-lora-13")]
    found = _launch([*TORCHRUN, str(world)], tmp_path, names, FSDP_ON_CPU="1")
    for name in names:
        same(ranked.run(name, 1, tmp_path / "alone", scale=world), found[name], name)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_accelerate_launch_is_one_process(tmp_path):
    names = ["bco-padded-1-full-21", "kto-tokens-3-lora-13"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
    found = _launch(command, tmp_path, names)
    for name in names:
        same(ranked.run(name, 1, tmp_path / "alone", scale=2), found[name], name)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_killed_rank_ends_the_run_by_name_and_the_restart_computes_little(tmp_path):
    """A rank is killed while the reference is computed: a shard per rank is lost at most."""
    tiny.model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    tiny.write(tmp_path / "rows.jsonl", tiny.rows(200))
    script = HERE / "killed_fill.py"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]), "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [*TORCHRUN, "2", str(script), str(tmp_path)]
    killed = subprocess.run(command, env=environment | {"KILLED_RANK": "1"}, capture_output=True, text=True, timeout=150)  # fmt: skip
    assert killed.returncode != 0
    assert f"rank      : 1 (local_rank: 1)\n  exitcode  : -{int(signal.SIGKILL)}" in killed.stderr
    before = len(list((tmp_path / "cache").rglob("*.safetensors")))
    assert before >= 2
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert again.returncode == 0, again.stderr[-2000:]
    computed = json.loads((tmp_path / "computed.json").read_text())
    assert computed == 200 - 10 * before
