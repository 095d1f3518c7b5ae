"""The same runs started as a user starts them, by torchrun and accelerate launch, on two and four processes.

Each case is one launch with several runs, because a launch costs more than a run. Every objective meets every shape of a
batch, both numbers of micro-batches and both kinds of weights in one of them, or in test_ranks.py.
"""

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
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip
ZERO3 = ["--config_file", str(HERE.parents[1] / "accelerate_configs/zero3.yaml")]

DDP = [
    "bco-padded-3-full-21",
    "bco-shared-1-lora-3",  # fewer rows than ranks from here to bnf
    "kto-tokens-1-full-3",
    "bnf-packed-3-lora-3",
    "kto-shared-3-lora-13",
    "bnf-padded-1-full-9",
    "una_score-tokens-3-full-16",
    "una_score-packed-1-lora-13",
    "dpo-packed-1-full-9",
    "dpo-tokens-3-lora-13",
    "sft-padded-1-lora-1",
    "sft-shared-3-full-13",
]
SHARDED = [
    "bco-padded-1-full-21",
    "kto-packed-3-lora-13",
    "bnf-tokens-3-full-3",
    "una_score-packed-1-full-9",
    "dpo-padded-3-lora-13",
    "sft-tokens-1-lora-3",
]


def _environment(**more):
    paths = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **more}


def _equal_to_one(command, world, tmp_path, names, limit=480, **environment):
    out = tmp_path / "small_runs"
    out.mkdir()
    done = subprocess.run([*command, str(HERE / "ranked.py"), str(out), *names], env=_environment(**environment), capture_output=True, text=True, timeout=limit)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((out / "found.json").read_text())
    for name in names:
        same(ranked.run(name, 1, tmp_path / "alone", scale=world), found[name], name)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_torchrun_on_four_processes_is_one_process(tmp_path):
    _equal_to_one([*TORCHRUN, "4"], 4, tmp_path, DDP)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_fsdp2_on_four_processes_is_one_process(tmp_path):
    """As in accelerate_configs/fsdp2.yaml, one rank reads the weights."""
    _equal_to_one([*TORCHRUN, "4"], 4, tmp_path, SHARDED, FSDP_ON_CPU="1", FSDP_CPU_RAM_EFFICIENT_LOADING="true")


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_fsdp2_with_its_shards_in_host_memory_is_one_process(tmp_path):
    """With the policy of accelerate_configs/fsdp2_offload.yaml, but for pinned memory, which takes a GPU."""
    names = ["bco-padded-1-full-21", "kto-packed-3-lora-13"]
    _equal_to_one([*TORCHRUN, "2"], 2, tmp_path, names, FSDP_ON_CPU="1", FSDP_OFFLOAD_PARAMS="true")


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_accelerate_launch_is_one_process(tmp_path):
    _equal_to_one([*ACCELERATE, "--multi_gpu", "--num_processes", "2"], 2, tmp_path, ["kto-tokens-3-lora-13"])


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("stage", ["2", "3"])
def test_deepspeed_is_one_process(tmp_path, stage):
    """With accelerate_configs/zero3.yaml."""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: make test-ranks")
    command = [*ACCELERATE, *ZERO3, "--zero_stage", stage, "--num_processes", "2"]
    _equal_to_one(command, 2, tmp_path, SHARDED, DS_ACCELERATOR="cpu")


@pytest.mark.slow
@pytest.mark.timeout(1500)  # DeepSpeed compiles its optimizer at the first start
def test_zero3_with_weights_and_optimizer_in_host_memory_is_one_process(tmp_path, monkeypatch):
    """With accelerate_configs/zero3_offload.yaml; accelerate makes DeepSpeed's CPU Adam of any optimizer."""
    pytest.importorskip("deepspeed", reason="needs DeepSpeed: make test-ranks")
    monkeypatch.setenv("RANKED_OPTIM", "adamw_torch")
    config = HERE.parents[1] / "accelerate_configs/zero3_offload.yaml"
    command = [*ACCELERATE, "--config_file", str(config), "--num_processes", "2"]
    _equal_to_one(command, 2, tmp_path, ["bco-padded-1-full-21"], limit=1400, DS_ACCELERATOR="cpu")


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_killed_rank_ends_the_run_by_name_and_the_restart_computes_little(tmp_path):
    """A rank is killed while the reference is computed. Each rank loses a shard at most, and the restart ends with the
    bytes of a cache that one process filled."""
    tiny.model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    tiny.write(tmp_path / "rows.jsonl", tiny.rows(200))

    def fill(ranks, **environment):
        command = [*TORCHRUN, ranks, str(HERE / "killed_fill.py"), str(tmp_path), f"of {ranks}"]
        return subprocess.run(command, env=_environment(**environment), capture_output=True, text=True, timeout=200)

    def shards(ranks):
        return sorted(path.name for path in (tmp_path / f"of {ranks}").rglob("*.safetensors"))

    killed = fill("2", KILLED_RANK="1")
    assert killed.returncode != 0
    assert f"rank      : 1 (local_rank: 1)\n  exitcode  : -{int(signal.SIGKILL)}" in killed.stderr
    before = len(shards("2"))
    assert before >= 2
    again = fill("2")
    assert again.returncode == 0, again.stderr[-2000:]
    assert json.loads((tmp_path / "computed.json").read_text()) == 200 - 10 * before
    assert fill("1").returncode == 0
    assert shards("2") == shards("1")  # named by the hash of their content
