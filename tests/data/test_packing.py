"""Packed batches are padded batches without the padding, and a token budget is kept."""

import itertools
import math

import numpy as np
import pytest
import tiny
import torch
from families import FAMILIES
from small_runs import TOKENIZER, slow_but
from small_runs import config as _config
from small_runs import parameters as _parameters
from torch import nn

from bco_fast import FeedbackTrainer, patch_model
from bco_fast.data.batch import collate
from bco_fast.data.dataset import Example, Item
from bco_fast.data.samplers import TokenBudgetSampler
from bco_fast.losses import OBJECTIVES
from bco_fast.training.checks import check_layout
from bco_fast.training.step import completion_sums


def _items(rows=4):
    rng = np.random.default_rng(0)
    lengths = [12, 5, 9, 6][:rows]
    return [
        Item(Example(rng.integers(2, 60, n), 3, i % 2 == 0, 1.0), -1.0 * i, rng.normal(size=n - 3).astype(np.float32))
        for i, n in enumerate(lengths)
    ]


def _of_lengths(lengths):
    return [[Example(np.zeros(length, np.int32), 1, True, 1.0)] for length in lengths]


def test_a_packed_batch_is_the_padded_one_end_to_end():
    items = _items()
    packed, padded = collate(items, layout="packed"), collate(items)
    assert packed["input_ids"].shape == (1, 12 + 5 + 9 + 6)
    assert packed["cu_seq_lens_q"].tolist() == [0, 12, 17, 26, 32]
    assert packed["max_length_q"] == 12
    assert packed["position_ids"][0, 12:17].tolist() == [0, 1, 2, 3, 4]
    for name in ("targets", "cu_completions", "label", "weight", "ref_logps", "ref_token_logps", "counts"):
        assert torch.equal(packed[name], padded[name]), name
    assert padded["targets"].tolist() == [t for item in items for t in item.example.input_ids[3:]]
    for batch in (packed, padded):  # the position that predicts a token is the one before it
        assert torch.equal(batch["input_ids"].flatten()[batch["rows"] + 1], batch["targets"])


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "cohere", "granite", "phi2", "gpt_neox", "mixtral"])  # fmt: skip
def test_packed_log_probabilities_are_the_padded_ones(family):
    config_class, options = FAMILIES[family]
    model = patch_model(tiny.model(config_class, **options)).eval()
    check_layout(model, [item.example for item in _items()], 1, "packed")


def test_a_model_that_looks_across_sequences_is_refused():
    class Leaky(nn.Module):
        """Averages over everything to its left, whatever the positions say."""

        def __init__(self, model):
            super().__init__()
            self.inner = model

        def forward(self, hidden):
            steps = torch.arange(1, hidden.shape[1] + 1)[None, :, None]
            return self.inner(hidden + hidden.cumsum(1) / steps)

    model = tiny.model().eval()
    model.model.norm = Leaky(model.model.norm)
    with pytest.raises(ValueError, match="does not keep packed sequences apart"):
        check_layout(patch_model(model), [item.example for item in _items()], 1, "packed")


@pytest.mark.parametrize("name", slow_but(OBJECTIVES, ("bco",)))
def test_padding_free_training_is_padded_training(tmp_path, name):
    """Loss, gradients and three steps, to 1e-5; far from the reference, so that no AUC ranks rounding noise."""
    results = []
    for packed in (False, True):
        trainer = FeedbackTrainer(
            tiny.model(),
            _config(tmp_path, loss_type=name, padding_free=packed, max_steps=3, per_device_train_batch_size=6, optim="sgd", learning_rate=1e-3, max_grad_norm=0.0),
            tiny.feedback_for(name, 24),
            tiny.feedback_for(name, 10, seed=3),
            processing_class=TOKENIZER,
            ref_model=tiny.model(seed=1) if OBJECTIVES[name].reference else None,
        )  # fmt: skip
        trainer.train()
        losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
        results.append((losses, _parameters(trainer), trainer.evaluate()))
    (losses, parameters, metrics), (packed_losses, packed_parameters, packed_metrics) = results
    assert np.allclose(losses, packed_losses, rtol=1e-5)
    for key, tensor in parameters.items():
        assert torch.allclose(packed_parameters[key], tensor, rtol=1e-5, atol=1e-6), key
    for key in ("eval_loss", "eval_rewards/auc", "eval_logps/chosen"):
        assert math.isclose(metrics[key], packed_metrics[key], rel_tol=1e-5, abs_tol=1e-6), key


@pytest.mark.parametrize("padded", [False, True])
def test_the_budget_is_kept_and_every_row_comes_once(padded):
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 60, 200).tolist()
    order = rng.permutation(200).tolist()
    sampler = TokenBudgetSampler(_of_lengths(lengths), order, 128, layout="padded" if padded else "packed", seed=1)
    batches = list(sampler)
    assert [i for batch in batches for i in batch] == order
    sizes = [max(lengths[i] for i in b) * len(b) if padded else sum(lengths[i] for i in b) for b in batches]
    assert max(sizes) <= 128
    for batch, following in itertools.pairwise(batches):  # greedy: the next row would not have fitted
        grown = [*batch, following[0]]
        assert (max(lengths[i] for i in grown) * len(grown) if padded else sum(lengths[i] for i in grown)) > 128
    assert len(sampler) == len(batches)
    sampler.set_epoch(1)
    later = list(sampler)
    assert later != batches
    assert sorted(map(tuple, later)) == sorted(map(tuple, batches))
    assert list(sampler) == later


def test_a_long_row_is_a_batch_by_itself():
    sampler = TokenBudgetSampler(_of_lengths([10, 300, 10, 10]), range(4), 30, layout="packed")
    assert list(sampler) == [[0], [1], [2, 3]]


@pytest.mark.parametrize("packed", [False, True])
def test_training_by_tokens_is_the_mean_over_rows(tmp_path, packed):
    """Batches of unequal size in one optimizer step: the loss is that of all its rows."""
    rows = tiny.rows(24)
    trainer = FeedbackTrainer(
        tiny.model(), _config(tmp_path, loss_type="bce", padding_free=packed, tokens_per_batch=40, gradient_accumulation_steps=50, max_steps=2, num_train_epochs=2, optim="sgd", learning_rate=1e-3, max_grad_norm=0.0),
        rows, processing_class=TOKENIZER,
    )  # fmt: skip
    whole = FeedbackTrainer(
        tiny.model(), _config(tmp_path, loss_type="bce", per_device_train_batch_size=24, max_steps=2, num_train_epochs=2, optim="sgd", learning_rate=1e-3, max_grad_norm=0.0),
        rows, processing_class=TOKENIZER,
    )  # fmt: skip
    for t in (trainer, whole):
        t.train()
    sizes = {len(batch) for batch in trainer.get_train_dataloader().batch_sampler}
    assert len(sizes) > 1
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (trainer, whole)]
    assert np.allclose(*losses, rtol=1e-5)
    expected = _parameters(whole)
    for key, tensor in _parameters(trainer).items():
        assert torch.allclose(tensor, expected[key], rtol=1e-4, atol=1e-6), key


def test_budgeted_training_resumes_bitwise(tmp_path):
    options = {"tokens_per_batch": 50, "padding_free": True, "max_steps": 9, "num_train_epochs": 3, "save_strategy": "steps", "save_steps": 7, "learning_rate": 1e-3}  # fmt: skip

    def build(folder):
        return FeedbackTrainer(tiny.model(), _config(tmp_path / folder, **options), tiny.rows(20), processing_class=TOKENIZER)  # fmt: skip

    whole = build("a")
    whole.train()
    assert whole.state.epoch > 1
    resumed = build("b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/out/checkpoint-7"))
    expected = _parameters(whole)
    for name, tensor in _parameters(resumed).items():
        assert torch.equal(tensor, expected[name]), name


def test_packed_log_probabilities_of_one_sequence_are_its_own():
    model = patch_model(tiny.model()).eval()
    items = _items()
    sums = completion_sums(model, collate(items, layout="packed"))
    for item, value in zip(items, sums, strict=True):
        assert torch.allclose(completion_sums(model, collate([item], layout="packed"))[0], value, atol=1e-4)


def test_a_packed_reference_is_the_padded_one(tmp_path, monkeypatch):
    """To rounding; and FlashAttention, which needs no mask for it, packs by itself."""
    import bco_fast.reference.fill as references
    from bco_fast import ReferenceCache, load_feedback
    from bco_fast.reference.identity import reference_id

    model = patch_model(tiny.model()).eval()
    examples = load_feedback(tiny.rows(30), TOKENIZER, max_length=64).examples
    sums = []
    for layout in ("padded", "packed"):
        cache = ReferenceCache(tmp_path / layout, reference_id(model))
        references.fill(cache, examples, model, pad_token_id=1, tokens_per_batch=100, progress=False, layout=layout)
        sums.append(cache.sums([e.key for e in examples]))
    assert np.allclose(*sums, rtol=1e-5, atol=1e-4)
    made = []
    real = references.collate_tokens
    monkeypatch.setattr(references, "collate_tokens", lambda *a, layout: made.append(layout) or real(*a, layout=layout))
    for attention, expected in (("sdpa", "padded"), ("flash_attention_2", "packed")):
        model.config._attn_implementation_internal = "sdpa"
        monkeypatch.setattr(type(model.config), "_attn_implementation", attention, raising=False)
        cache = ReferenceCache(tmp_path / attention, reference_id(model))
        monkeypatch.setattr(references, "completion_logps", lambda m, batch: torch.zeros(batch["targets"].shape))
        references.fill(cache, examples[:3], model, pad_token_id=1, progress=False)
        assert made == [expected]
        made.clear()
