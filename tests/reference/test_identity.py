"""What of a model decides which cache it reads: everything that computes, and nothing else. Tested per family."""

import copy

import pytest
import tiny
import torch
from families import FAMILIES
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from bco_fast.reference.identity import _LIMITS, _NOT_COMPUTED, _plain_positions, reference_id

VALUES = {
    bool: lambda v: not v,
    int: lambda v: v + 3,
    float: lambda v: v + 0.37,
    dict: lambda v: {0: "a", 1: "b", 2: "c"},
}
# what has no value of another kind, or only another form of the output
FIXED = {
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "return_dict",
    "tokenizer_class",
}
FIXED |= {"output_attentions", "output_hidden_states", "problem_type", "num_labels", "label2id"}


def _family(name):
    kind, options = FAMILIES[name]
    return tiny.model(kind, **options).eval()


def _like(model, **changes):
    """The same weights under another config."""
    config = copy.deepcopy(model.config)
    for key, value in changes.items():
        setattr(config, key, value)
    made = AutoModelForCausalLM.from_config(config).eval()
    made.load_state_dict(model.state_dict())
    return made


def _changes(config):
    """Another value for every key that is said to compute nothing."""
    changes = {"my_note": "hello", "another_unknown_key": 3}
    plain = getattr(config, "rope_parameters", None) is not None and _plain_positions(config)
    for key, value in config.to_dict().items():
        if key in FIXED or not (_NOT_COMPUTED.fullmatch(key) or (key in _LIMITS and plain)):
            continue
        changes[key] = VALUES[type(value)](value) if type(value) in VALUES else 3
    return changes


@torch.no_grad()
def _logits(model):
    return model(input_ids=torch.arange(5, 25)[None]).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_what_computes_nothing_changes_neither_logits_nor_identity(name):
    model = _family(name)
    changes = _changes(model.config)
    assert {"pad_token_id", "bos_token_id", "eos_token_id", "id2label", "initializer_range"} <= set(changes)
    base, logits = reference_id(model), _logits(model)
    for key, value in changes.items():
        changed = _like(model, **{key: value})
        assert getattr(changed.config, key) == value or key == "id2label", key
        assert reference_id(changed) == base, key
        assert torch.equal(_logits(changed), logits), key


def test_a_buffer_that_no_checkpoint_holds_counts():
    model, other = tiny.model(), tiny.model()
    assert reference_id(model) == reference_id(other)
    other.model.rotary_emb.inv_freq.mul_(0.5)
    assert reference_id(model) != reference_id(other)
    peft = pytest.importorskip("peft")
    adapter = peft.LoraConfig(r=2, target_modules=["q_proj"])
    assert reference_id(peft.get_peft_model(copy.deepcopy(other), adapter)) == reference_id(other)


SCALED = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
}


@pytest.mark.parametrize("kind", SCALED)
def test_positions_that_are_scaled_by_the_longest_row_keep_it_in_the_identity(kind):
    models = [tiny.model(LlamaConfig, max_position_embeddings=n, rope_parameters=SCALED[kind]) for n in (16, 64)]
    assert reference_id(models[0]) != reference_id(models[1])


def test_what_computes_still_misses():
    base = tiny.model(Qwen2Config)
    for changes in ({"sliding_window": 8, "use_sliding_window": True}, {"rms_norm_eps": 1e-3}, {"hidden_act": "gelu"}):
        assert reference_id(_like(base, **changes)) != reference_id(base), changes


def test_a_key_that_the_model_reads_counts_though_its_class_does_not_know_it():
    base = tiny.model()
    assert reference_id(_like(base, attention_chunk_size=4)) != reference_id(base)  # read by transformers' masks
