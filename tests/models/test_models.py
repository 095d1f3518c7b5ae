"""A patched model returns the log-probabilities of its own logits, and is otherwise the model it was."""

import copy
import warnings

import numpy as np
import pytest
import tiny
import torch
from families import FAMILIES
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

from bco_fast import CacheError, ReferenceCache, load_feedback, patch_model
from bco_fast.data.batch import collate
from bco_fast.data.dataset import Example
from bco_fast.models.patch import completion_logps, forward_logps
from bco_fast.reference.fill import fill
from bco_fast.reference.identity import reference_id


def _batch(vocabulary=70, rows=3):
    rng = np.random.default_rng(0)
    examples = [Example(rng.integers(2, vocabulary, 12 - 2 * i), 4, True, 1.0) for i in range(rows)]
    return collate([(e, 0.0) for e in examples], 1), examples


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_the_logits(family):
    config_class, options = FAMILIES[family]
    model = tiny.model(config_class, **options).eval()
    batch, _ = _batch()
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.log_softmax(logits.double(), -1).flatten(0, 1)[batch["rows"], batch["targets"]]
    names, keys = list(dict(model.named_parameters())), set(model.state_dict())
    assert patch_model(model) is model
    ours = completion_logps(model, batch)
    assert torch.allclose(ours.double(), expected, rtol=1e-5, atol=2e-5)
    targets = torch.full(batch["input_ids"].shape, -100)  # the form of other people's loops
    targets.flatten()[batch["rows"]] = batch["targets"]
    whole = completion_logps(model, {**{k: batch[k] for k in ("input_ids", "attention_mask")}, "targets": targets})
    assert torch.allclose(whole.flatten()[batch["rows"]], ours, rtol=1e-5, atol=2e-5)
    assert not whole[targets < 0].any()
    assert list(dict(model.named_parameters())) == names
    assert set(model.state_dict()) == keys
    after = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(after, logits)  # softcap and scale are back


def test_gradients_reach_every_parameter():
    batch, _ = _batch()
    grads = []
    for patched in (False, True):
        model = tiny.model()
        if patched:
            completion_logps(patch_model(model), batch).sum().backward()
        else:
            log_probs = torch.log_softmax(
                model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits, -1
            )
            log_probs.flatten(0, 1)[batch["rows"], batch["targets"]].sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, expected in grads[0].items():
        assert torch.allclose(grads[1][name], expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())), name


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_saving_and_reloading_are_untouched(tmp_path, family):
    config_class, options = FAMILIES[family]
    model = tiny.model(config_class, **options).eval()
    prompt = torch.tensor([[5, 6, 7]])
    before = model.generate(prompt, do_sample=False, max_new_tokens=5)
    patch_model(model)
    assert torch.equal(model.generate(prompt, do_sample=False, max_new_tokens=5), before)
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded.get_output_embeddings()) is nn.Linear
    for name, tensor in model.state_dict().items():
        assert torch.equal(reloaded.state_dict()[name], tensor)


def test_the_biased_heads_have_their_bias():
    for family in ("gptj", "phi2"):
        config_class, options = FAMILIES[family]
        assert tiny.model(config_class, **options).get_output_embeddings().bias is not None


def test_the_load_balancing_loss_of_a_mixture_is_kept():
    config_class, options = FAMILIES["mixtral"]
    model = tiny.model(config_class, **options).eval()
    batch, _ = _batch()
    own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).aux_loss
    out = forward_logps(patch_model(model), batch)
    assert torch.equal(out.aux_loss, own)
    assert float(own.detach()) > 0
    assert forward_logps(patch_model(tiny.model()), batch).aux_loss is None


def test_a_stock_trainer_can_use_a_patched_model(tmp_path):
    """No FeedbackTrainer: `logp_targets` is a column, and the loss reads log-probabilities where logits used to be."""
    model = patch_model(tiny.model())
    batch, _ = _batch(rows=1)
    targets = torch.full_like(batch["input_ids"][0], -100).index_copy(0, batch["rows"], batch["targets"])
    row = {"input_ids": batch["input_ids"][0], "logp_targets": targets, "labels": targets}
    with torch.no_grad():
        expected = -float(completion_logps(model, batch).sum())
    trainer = Trainer(
        model,
        TrainingArguments(str(tmp_path), max_steps=1, use_cpu=True, report_to="none", save_strategy="no", remove_unused_columns=False),
        train_dataset=[row],
        compute_loss_func=lambda outputs, labels, num_items_in_batch=None: -outputs.logits.sum(),
    )  # fmt: skip
    trainer.train()
    assert np.isclose(trainer.state.log_history[-1]["train_loss"], expected, rtol=1e-5)


def test_patching_twice_updates_the_options():
    model = patch_model(tiny.model())
    patch_model(model, backend="reference", workspace_bytes=1 << 20)
    options = model.lm_head.bco_fast.options
    assert (options.backend, options.workspace_bytes) == ("reference", 1 << 20)
    assert len(model._forward_pre_hooks) == 1


def test_an_error_in_the_forward_leaves_the_model_whole():
    model = patch_model(tiny.model(Gemma2Config, head_dim=8, final_logit_softcapping=2.0)).eval()
    batch, _ = _batch()
    clean = model(input_ids=batch["input_ids"]).logits
    with pytest.raises(IndexError):
        completion_logps(model, {**batch, "targets": batch["targets"] + 10_000})
    assert torch.equal(model(input_ids=batch["input_ids"]).logits, clean)


def test_models_that_cannot_be_fused_are_refused_and_left_as_they_were():
    odd = tiny.model()
    odd.lm_head = nn.Sequential(odd.lm_head)
    with pytest.raises(TypeError, match="Sequential, not a plain"):
        patch_model(odd)
    with pytest.raises(ValueError, match="encoder-decoder"):
        patch_model(
            T5ForConditionalGeneration(
                T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
            )
        )
    secret = tiny.model()
    original = secret.forward

    def squared(*args, **kwargs):
        out = original(*args, **kwargs)
        out.logits = out.logits.square() if out.logits.dim() == 3 else out.logits
        return out

    secret.forward = squared
    with pytest.raises(ValueError, match="does something to its logits"):
        patch_model(secret)
    assert type(secret.lm_head) is nn.Linear
    assert not secret._forward_pre_hooks


def test_the_reference_id_is_what_the_model_computes():
    base = reference_id(tiny.model())
    assert reference_id(patch_model(tiny.model())) == base
    changed = tiny.model()
    with torch.no_grad():
        changed.lm_head.weight[0, 0] = torch.nextafter(changed.lm_head.weight[0, 0], torch.tensor(9.0))
    rope = tiny.model(rope_theta=5000.0)
    half = tiny.model().bfloat16()
    eager = tiny.model()
    eager.set_attn_implementation("eager")
    others = [reference_id(m) for m in (changed, rope, half, eager)] + [reference_id(tiny.model(), autocast="bf16")]
    assert len({r.digest for r in [base, *others]}) == 6
    renamed = tiny.model()
    renamed.config._name_or_path = "elsewhere"
    renamed.config.use_cache = False
    assert reference_id(renamed) == base


def _examples(n=40):
    return load_feedback(tiny.rows(n), tiny.build_tokenizer()).examples


def test_fill_computes_once_and_only_what_is_new(tmp_path):
    model, examples = patch_model(tiny.model()), _examples()
    name = reference_id(model)
    first = fill(ReferenceCache(tmp_path, name), examples[:30], model, progress=False)
    assert str(first) == "30 rows: 0 cached, 30 computed"
    again = fill(ReferenceCache(tmp_path, name), examples[:30][::-1], model, tokens_per_batch=17, progress=False)
    assert (again.hits, again.computed) == (30, 0)
    longer = fill(ReferenceCache(tmp_path, name), [*examples, examples[0]], model, progress=False)
    assert (longer.rows, longer.hits, longer.computed) == (40, 30, 10)


def test_cached_values_are_the_models(tmp_path):
    model, examples = patch_model(tiny.model()).eval(), _examples()
    cache = ReferenceCache(tmp_path, reference_id(model))
    fill(cache, examples, model, tokens_per_batch=64, progress=False)
    sums = cache.sums([e.key for e in examples])
    for example, stored in zip(examples, sums, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(example.input_ids)[None]).logits.double()
        log_probs = torch.log_softmax(logits, -1)[0]
        start = example.completion_start
        exact = sum(float(log_probs[t - 1, example.input_ids[t]]) for t in range(start, len(example)))
        assert abs(stored - exact) < 1e-4 * max(1, abs(exact))
        assert len(cache.token_logps(example.key)) == len(example) - start


def test_an_interrupted_fill_ends_with_the_same_bytes(tmp_path, monkeypatch):
    import bco_fast.reference.fill as module

    monkeypatch.setattr(module, "ROWS_PER_SHARD", 8)
    model, examples = patch_model(tiny.model()), _examples()
    name = reference_id(model)
    fill(ReferenceCache(tmp_path / "whole", name), examples, model, tokens_per_batch=64, progress=False)
    cache = ReferenceCache(tmp_path / "cut", name)
    real, written = cache.write_shard, []

    def interrupted(*args):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(real(*args))

    cache.write_shard = interrupted
    with pytest.raises(KeyboardInterrupt):
        fill(cache, examples, model, tokens_per_batch=64, progress=False)
    monkeypatch.setattr(module, "ROWS_PER_SHARD", 13)  # the plan in the manifest wins over new defaults
    resumed = fill(ReferenceCache(tmp_path / "cut", name), examples, model, tokens_per_batch=64, progress=False)
    assert (resumed.hits, resumed.computed) == (16, 24)

    def content(folder):
        return {p.name: p.read_bytes() for p in (tmp_path / folder / name.digest).iterdir()}

    assert content("cut") == content("whole")


def test_a_reference_that_disagrees_with_its_cache_is_refused(tmp_path):
    model, examples = patch_model(tiny.model()), _examples()
    name = reference_id(model)
    fill(ReferenceCache(tmp_path, name), examples, model, progress=False)
    other = patch_model(tiny.model(seed=1))
    with pytest.raises(CacheError, match="does not agree with the reference model"):
        fill(ReferenceCache(tmp_path, name), examples, other, progress=False)


def test_fill_leaves_the_training_mode_alone(tmp_path):
    model = patch_model(tiny.model()).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fill(ReferenceCache(tmp_path, reference_id(model)), _examples(4), model, progress=False)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_deep_copy_of_a_patched_model_answers_for_itself():
    model = patch_model(tiny.model()).eval()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.parameters():
            p.mul_(0.5)
    batch, _ = _batch()
    assert not torch.allclose(completion_logps(twin, batch), completion_logps(model, batch))
