"""Two processes are one: FSDP2's sharded step and an evaluation spread over ranks."""

import math
from pathlib import Path

import numpy as np
import pytest
import ranks
import tiny
import torch
import yaml
from small_runs import TOKENIZER, reward_error
from small_runs import config as _config

from bco_fast import FeedbackTrainer, RewardShift, bco_loss, patch_model
from bco_fast.data.batch import collate
from bco_fast.data.tokenize import load_feedback
from bco_fast.losses.sequence import sequence_logps
from bco_fast.models.patch import completion_logps

CONFIGS = Path(__file__).parents[2] / "accelerate_configs"


def _fsdp(rank, world):
    """Three steps of BCO on a model sharded by fully_shard; -> losses, δ, and the full gradients of the last step."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = patch_model(tiny.model())
    if world > 1:
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
    dataset = load_feedback(tiny.rows(24), TOKENIZER, max_length=64)
    shift, optimizer = RewardShift(), torch.optim.SGD(model.parameters(), lr=1e-2)
    losses = []
    for step in range(3):
        rows = list(range(8 * step, 8 * step + 8))[rank::world]
        batch = collate([dataset[i] for i in rows])
        logps = sequence_logps(completion_logps(model, batch), cu_seqlens=batch["cu_completions"])
        refs = torch.full_like(logps, -20.0)
        out = bco_loss(logps, refs, batch["label"], beta=0.1, delta=shift)
        shift.observe(out.rewards, batch["label"])
        optimizer.zero_grad()
        out.loss.backward()  # FSDP averages over the ranks, which hold as many rows each
        optimizer.step()
        shift.step()
        total = out.loss.detach() / world
        if world > 1:
            torch.distributed.all_reduce(total)
        losses.append(float(total))
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grads[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).double().numpy()
    return losses, float(shift.value), grads


def _evaluation_and_fsdp(rank, world, folder):
    trainer = FeedbackTrainer(tiny.model(), _config(folder, per_device_eval_batch_size=4), tiny.rows(8), tiny.rows(23, seed=5), processing_class=TOKENIZER)  # fmt: skip
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(1.05)
    metrics = trainer.evaluate()
    metrics = {k: v for k, v in metrics.items() if not k.endswith(("runtime", "per_second", "preparation_time"))}
    return {"metrics": metrics, "fsdp": _fsdp(rank, world)}


@pytest.fixture(scope="session")
def worlds(tmp_path_factory):
    """What one process finds, and what rank 0 of two finds."""
    folder = tmp_path_factory.mktemp("worlds")
    two, _ = ranks.run(_evaluation_and_fsdp, 2, folder / "ranks", folder / "2")
    return {1: _evaluation_and_fsdp(0, 1, folder / "1"), 2: two}


def test_fsdp2_on_two_ranks_is_one_process(worlds):
    (losses, delta, grads), (shard_losses, shard_delta, shard_grads) = worlds[1]["fsdp"], worlds[2]["fsdp"]
    error = reward_error(logps=20)
    assert np.allclose(losses, shard_losses, rtol=0, atol=error)
    assert abs(delta) > 1000 * error
    assert abs(delta - shard_delta) <= error
    for name, grad in grads.items():
        assert np.linalg.norm(shard_grads[name] - grad) <= 1e-5 * np.linalg.norm(grad), name


def test_evaluation_over_ranks_is_exact(worlds):
    """23 rows on two ranks, so the last batch is padded with repeated rows: AUC, loss and margins are those of 23."""
    alone, both = (worlds[world]["metrics"] for world in (1, 2))
    assert 0 < alone["eval_rewards/auc"] < 1
    assert alone["eval_rewards/auc"] == both["eval_rewards/auc"]
    assert alone.keys() == both.keys()
    for name, value in alone.items():
        assert math.isclose(both[name], value, rel_tol=1e-5, abs_tol=reward_error(alone["eval_logps/chosen"])), name


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2_offload", "zero3", "zero3_offload"])
def test_shipped_configs_are_ones_accelerate_reads(name):
    from accelerate.commands.config.config_args import ClusterConfig

    text = (CONFIGS / f"{name}.yaml").read_text()
    config = ClusterConfig.from_yaml_file(CONFIGS / f"{name}.yaml")
    assert (
        config.distributed_type
        == {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero3": "DEEPSPEED"}[name.removesuffix("_offload")]
    )
    assert name.endswith("_offload") is any(line in text for line in ("offload_params: true", "param_device: cpu"))
    assert set(yaml.safe_load(text)) <= set(ClusterConfig.__dataclass_fields__)
