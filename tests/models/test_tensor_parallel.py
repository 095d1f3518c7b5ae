"""A model cut by transformers' tensor parallelism gives the log-probabilities and gradients of one process."""

import pytest
import ranks
import tiny
import torch
from heads import relative_error
from small_runs import TOKENIZER, config
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, CohereConfig, LlamaConfig
from transformers.distributed import DistributedConfig

from bco_fast import FeedbackTrainer, patch_model
from bco_fast.data.batch import collate
from bco_fast.data.tokenize import load_feedback
from bco_fast.models.patch import forward_logps

MODELS = {
    "gathered logits": (LlamaConfig, {}, None),
    "sharded logits": (LlamaConfig, {}, {"lm_head": "colwise"}),
    "tied": (LlamaConfig, {"tie_word_embeddings": True}, None),
    "cut across the hidden units": (CohereConfig, {"tie_word_embeddings": False, "logit_scale": 0.3}, {"lm_head": "rowwise_split_input"}),
}  # fmt: skip


def _results(model):
    examples = load_feedback(tiny.rows(6), TOKENIZER).examples
    batch = collate([(example, 0.0) for example in examples], 1)
    patch_model(model)
    found = forward_logps(model, batch, return_entropy=True)
    weights = torch.linspace(-1, 1, len(found.logps))
    (found.logps * weights).sum().backward()
    with torch.no_grad():
        again = forward_logps(model, batch).logps
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    grads = {n: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for n, p in model.named_parameters()}
    found = {"logps": found.logps, "entropy": found.entropy, "again": again, "logits": logits, **grads}
    return {name: tensor.detach() for name, tensor in found.items()}


def _of_rank(rank, world, folder):
    found = {}
    for name, (_, _, plan) in MODELS.items():
        distributed = DistributedConfig(tp_size=world, tp_plan=plan or "auto")
        model = AutoModelForCausalLM.from_pretrained(folder / name, distributed_config=distributed)
        found[name] = _results(model) | {"cut": model.lm_head.weight.placements[0].dim}
    return found


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_two_ranks_are_one(tmp_path):
    expected = {}
    for name, (config_class, options, _) in MODELS.items():
        model = tiny.model(config_class, **options)
        model.save_pretrained(tmp_path / name)
        expected[name] = _results(AutoModelForCausalLM.from_pretrained(tmp_path / name))
    for found in ranks.run(_of_rank, 2, tmp_path / "ranks", tmp_path):
        for name, alone in expected.items():
            assert found[name]["cut"] == (name == "cut across the hidden units")
            for key, value in alone.items():
                if key == "logits" and name == "sharded logits":
                    continue  # each rank has its own, as the plan says
                assert relative_error(found[name][key], value) < 1e-5, (name, key)


def test_the_trainer_refuses_it_with_the_way_on(tmp_path):
    model = tiny.model()
    model._tp_size = 2
    with pytest.raises(ValueError, match=r"cut by tensor parallelism over 2 ranks.*FSDP2 or ZeRO-3"):
        FeedbackTrainer(model, config(tmp_path), tiny.rows(8), processing_class=TOKENIZER)
