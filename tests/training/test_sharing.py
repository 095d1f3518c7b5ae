"""Every prompt token once: a shared prompt changes nothing but the time."""

import functools
import itertools
import logging
import math

import numpy as np
import pytest
import tiny
import torch
from families import FAMILIES
from small_runs import TOKENIZER, config, parameters, slow_but

from bco_fast import FeedbackTrainer, ReferenceCache, load_feedback, patch_model
from bco_fast.data.batch import collate, collate_tokens, layout_tokens
from bco_fast.data.dataset import Example, Item
from bco_fast.data.samplers import GroupedSampler, token_batches
from bco_fast.losses import OBJECTIVES
from bco_fast.models.attention import _Gathered, knows_segments, use_segments
from bco_fast.models.patch import completion_logps
from bco_fast.reference.fill import fill
from bco_fast.reference.identity import reference_id
from bco_fast.training.checks import check_layout
from bco_fast.training.step import mismatched_log_ratios

EXACT = [name for name in FAMILIES if name != "gptj"]  # which takes no attention interface


def _examples(seed=0, vocabulary=60):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, vocabulary, n) for n in (14, 6, 9)]
    made = []
    for i, (prompt, tokens) in enumerate(((0, 7), (1, 5), (0, 4), (2, 6), (0, 9), (1, 1))):
        ids = np.concatenate([prompts[prompt], rng.integers(2, vocabulary, tokens)]).astype(np.int32)
        made.append(Example(ids, len(prompts[prompt]), i % 2 == 0, 1.0))
    return made


def _several(loss_type, prompts=6, completions=3):
    """Rows of the kind an objective reads, several of each prompt."""
    rows = []
    for i in range(completions):
        for row in tiny.feedback_for(loss_type, prompts * 8, seed=i):
            rows.append(row)
    by_prompt: dict = {}
    for row in rows:
        by_prompt.setdefault(row["prompt"], []).append(row)
    chosen = sorted(by_prompt.values(), key=len, reverse=True)[:prompts]
    return [row for group in chosen for row in group]


def test_the_form_of_a_shared_batch():
    examples = _examples()
    items = [Item(e, -1.0 * i, np.full(len(e) - e.completion_start, i, np.float32)) for i, e in enumerate(examples)]
    shared, padded = collate(items, layout="shared"), collate(items)
    for name in ("targets", "cu_completions", "label", "weight", "ref_logps", "ref_token_logps", "counts"):
        assert torch.equal(shared[name], padded[name]), name
    ids, positions = shared["input_ids"][0], shared["position_ids"][0]
    assert len(ids) == layout_tokens(examples, "shared") == 14 + 6 + 9 + 7 + 5 + 4 + 6 + 9 + 1
    rows, cu = shared["rows"].tolist(), shared["cu_completions"].tolist()
    for b, example in enumerate(examples):
        own = rows[cu[b] : cu[b + 1]]
        assert positions[own].tolist() == list(range(example.completion_start - 1, len(example) - 1))
        assert ids[own].tolist() == example.input_ids[example.completion_start - 1 : -1].tolist()
    assert rows.count(13) == 3  # the last token of the first prompt predicts three first tokens
    assert [s.prompt for s in shared["segments"].parts] == [
        None,
        (0, 14),
        (0, 14),
        (0, 14),
        None,
        (34, 40),
        (34, 40),
        None,
    ]


WINDOWED = ("mistral", "gemma2", "gemma3", "phi3", "mixtral", "gpt_oss")
CASES = [
    pytest.param(family, attention, window, id=f"{family}-{attention}{'-window' if window else ''}")
    for family in EXACT
    for attention in ("sdpa", "eager")
    for window in (None, 5)
    if not (attention == "sdpa" and family in ("gemma2", "gpt_oss"))  # which have no SDPA
    if not window or family in WINDOWED
]


def _mismatched(examples):
    """Each with the completion of another prompt; one prompt was cut, so the batch does not have it."""
    turned = [np.concatenate([a.input_ids[: a.completion_start], b.input_ids[b.completion_start :]]) for a, b in zip(examples, [*examples[1:], examples[0]], strict=True)]  # fmt: skip
    others = [Example(ids, e.completion_start, False, 1.0) for ids, e in zip(turned, examples, strict=True)]
    others[3] = Example(others[3].input_ids[2:], others[3].completion_start - 2, False, 1.0)
    return [Item(e, 0.0, mismatched=Item(other, -1.0)) for e, other in zip(examples, others, strict=True)]


@pytest.mark.parametrize(("family", "attention", "window"), CASES)
def test_log_probabilities_and_gradients_of_every_family(family, attention, window):
    config_class, options = FAMILIES[family]
    options = options | ({"sliding_window": window} if window else {}) | {"attn_implementation": attention}
    model = patch_model(tiny.model(config_class, **options)).eval()
    found = []
    for layout in ("padded", "packed", "shared"):
        if layout != "padded":
            use_segments(model)
        model.zero_grad()
        batch = collate(_mismatched(_examples()), 1, layout=layout, continued=True)
        logps = completion_logps(model, batch)
        with torch.no_grad():
            ratios = mismatched_log_ratios(model, batch)
        logps.sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((logps.detach(), ratios, gradient))
    assert (
        batch["kl_input_ids"].shape[1] == sum(batch["kl_cu_completions"].diff()) + len(_examples()) + 6
    )  # the cut prompt
    (expected, ratios, gradient), *others = found
    for logps, other_ratios, other in others:
        assert (logps - expected).abs().max() <= 1e-5
        assert (other_ratios - ratios).abs().max() <= 2e-5
        assert (other - gradient).norm() <= 1e-5 * gradient.norm()
    use_segments(model, False)
    assert not knows_segments(model.config)


@pytest.mark.parametrize("name", slow_but(OBJECTIVES, ("bco",)))
def test_a_step_of_every_objective(tmp_path, name):
    """Loss, gradients and everything that is logged, of the same rows in the same micro-batches."""
    results = []
    rows = _several(name)
    for layout in ("padded", "shared"):
        trainer = FeedbackTrainer(
            tiny.model(),
            config(tmp_path, loss_type=name, share_prompts="true", max_steps=2, per_device_train_batch_size=5, gradient_accumulation_steps=2, optim="sgd", learning_rate=1e-3, max_grad_norm=0.0),
            rows, rows[:6], processing_class=TOKENIZER,
        )  # fmt: skip
        assert trainer.layout == "shared"
        trainer.get_train_dataloader()
        collator = trainer.data_collator
        if layout == "padded":  # the same order of rows
            trainer.data_collator = functools.partial(collate, pad_token_id=1)
        else:
            assert "segments" in collator([trainer.train_dataset[0]])
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        results.append((lines, parameters(trainer), trainer.evaluate()))
    (lines, weights, metrics), (shared_lines, shared_weights, shared_metrics) = results
    for line, shared_line in zip([*lines, metrics], [*shared_lines, shared_metrics], strict=True):
        assert line.keys() == shared_line.keys()
        for key in ("loss", "eval_loss", "logps/chosen", "eval_logps/chosen", "logps/rejected", "grad_norm"):
            if key in line:
                assert math.isclose(line[key], shared_line[key], rel_tol=2e-5, abs_tol=2e-6), key
        for key in (
            "delta",
            "kl",
            "rewards/chosen",
            "rewards/margins",
        ):  # differences of log-probabilities near 30 nats
            if key in line:
                assert math.isclose(line[key], shared_line[key], rel_tol=1e-4, abs_tol=1e-4), key
    for key, tensor in weights.items():
        assert (shared_weights[key] - tensor).norm() <= 1e-5 * tensor.norm(), key


@pytest.mark.parametrize("checkpointed", slow_but((False, True), (False,)))
def test_mismatched_completions_continue_the_prompts_of_the_batch(tmp_path, checkpointed):
    rows, found = _several("kto"), []
    for apart in (True, False):
        trainer = FeedbackTrainer(
            tiny.model(), config(tmp_path, loss_type="kto", share_prompts="true", max_steps=3, optim="sgd", learning_rate=3e-2, gradient_checkpointing=checkpointed), rows, rows[:6],
            processing_class=TOKENIZER,
        )  # fmt: skip
        trainer.get_train_dataloader()
        if apart:
            trainer.data_collator = functools.partial(collate, pad_token_id=1, layout="shared")
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
        assert (batch["kl_input_ids"].shape[1] < batch["kl_cu_completions"][-1] + 9) is not apart
        trainer.train()
        found.append((trainer.state.log_history, trainer.evaluate(), parameters(trainer)))
    (lines, metrics, weights), (other_lines, other_metrics, other_weights) = found
    assert lines[2]["kl"] > 0.01
    for line, other in zip([*lines, metrics], [*other_lines, other_metrics], strict=True):
        for key in line.keys() & {"loss", "grad_norm", "kl", "logps/chosen", "eval_loss", "eval_rewards/chosen"}:
            assert math.isclose(line[key], other[key], rel_tol=1e-4, abs_tol=1e-4), key
    for key, tensor in weights.items():
        assert (other_weights[key] - tensor).norm() <= 1e-5 * tensor.norm(), key


@pytest.mark.parametrize(
    "options",
    [{"gradient_checkpointing": True}, {"use_peft": True, "lora_r": 4}, {"mlp_chunk_tokens": 5}, {"layer_chunk_tokens": 5}, {"activation_offloading": True}, {"tokens_per_batch": 90}, {"padding_free": True}],
    ids=lambda options: next(iter(options)),
)  # fmt: skip
def test_it_goes_with_what_else_saves_memory(tmp_path, options):
    rows, found = _several("bco"), []
    for share in ("true", "false"):
        torch.manual_seed(0)
        trainer = FeedbackTrainer(tiny.model(), config(tmp_path, share_prompts=share, max_steps=1, **options), rows, processing_class=TOKENIZER)  # fmt: skip
        assert trainer.layout == ("shared" if share == "true" else "packed" if "padding_free" in options else "padded")
        batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(8)]))
        trainer.model.train()
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        found.append(
            (loss.detach(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]))
        )
    (loss, gradient), (expected, other) = found
    assert torch.allclose(loss, expected, rtol=1e-5)
    assert (gradient - other).norm() <= 1e-5 * other.norm()
    assert other.norm() > 0


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_completion_keeps_the_keys_of_its_prompt(attention):
    """Gathered for the backward, they would cost what prompts that are not repeated had saved."""
    model = patch_model(tiny.model(attn_implementation=attention)).train()
    use_segments(model)
    prompt = np.arange(2, 33, dtype=np.int32)
    examples = [Example(np.append(prompt, np.int32([i, i])), 31, True, 1.0) for i in range(2, 6)]
    kept: dict[int, tuple] = {}

    def packed(saved):
        for tensor in saved if isinstance(saved, tuple) else (saved,):
            if isinstance(tensor, torch.Tensor):
                kept[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return saved

    pack = _Gathered._pack
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Gathered, "_pack", lambda self, saved: packed(pack(self, saved)))
        with torch.autograd.graph.saved_tensors_hooks(packed, lambda saved: saved):
            logps = completion_logps(model, collate_tokens(examples, layout="shared"))
    size = model.config.hidden_size // model.config.num_attention_heads
    assert any(shape[-2:] == (2, size) for shape in kept.values()), "the completions' own queries"
    assert not [shape for shape in kept.values() if 33 in shape and size in shape]
    logps.sum().backward()


def test_the_cache_is_the_same_with_and_without(tmp_path):
    examples = load_feedback(_several("bco"), TOKENIZER, max_length=64).examples
    contents = []
    for layout in ("padded", "shared"):
        model = patch_model(tiny.model()).eval()
        if layout == "shared":
            use_segments(model)
        name = reference_id(model)
        cache = ReferenceCache(tmp_path / layout, name)
        report = fill(cache, examples, model, pad_token_id=1, tokens_per_batch=200, progress=False, layout=layout)
        assert report.computed == len({e.key for e in examples})
        contents.append((name, cache.sums([e.key for e in examples])))
        again = fill(ReferenceCache(tmp_path / layout, name), examples, patch_model(tiny.model()).eval(), pad_token_id=1, progress=False)  # fmt: skip
        assert again.computed == 0  # read by the other way, and its spot check agrees
    assert contents[0][0] == contents[1][0]
    assert np.allclose(contents[0][1], contents[1][1], rtol=1e-6, atol=1e-5)


def test_rows_of_a_prompt_come_together_and_every_row_once():
    groups = [i % 7 for i in range(40)]
    sampler = GroupedSampler(groups, seed=3)
    first = list(sampler)
    assert sorted(first) == list(range(40)) != first
    runs = [groups[i] for i in first]
    assert sum(a != b for a, b in itertools.pairwise(runs)) == 6
    sampler.set_epoch(1)
    assert list(sampler) != first
    examples = _examples()
    batches = list(token_batches([[e] for e in examples], [0, 2, 4, 1, 5, 3], 34, layout="shared"))
    assert batches == [[0, 2, 4], [1, 5, 3]]
    assert [layout_tokens([examples[i] for i in batch], "shared") for batch in batches] == [34, 27]


def test_what_cannot_share_says_why(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="bco_fast")
    rows = _several("bco")

    def layout(model, rows=rows, **options):
        caplog.clear()
        return FeedbackTrainer(model, config(tmp_path, **options), rows, processing_class=TOKENIZER).layout

    assert layout(tiny.model()) == "padded"
    assert "tokens a completion are too few" in caplog.text
    monkeypatch.setattr("bco_fast.training.sharing.FEWEST_TOKENS", 1)
    assert layout(tiny.model()) == "shared"
    assert "(shared prompts)" in caplog.text
    assert layout(tiny.model(), tiny.rows(20)) == "padded"
    assert "would save 0% of the tokens" in caplog.text
    assert layout(tiny.model(), batch_composition="stratified") == "padded"
    assert "stratified" in caplog.text
    mixture, options = FAMILIES["mixtral"]
    assert layout(tiny.model(mixture, **options)) == "padded"
    assert "load-balancing" in caplog.text
    old, options = FAMILIES["gptj"]
    assert layout(tiny.model(old, **options)) == "padded"
    assert "2 of its 2 layers mix tokens by other means" in caplog.text
    with pytest.raises(ValueError, match="share_prompts: GPTJForCausalLM does not keep shared"):
        layout(tiny.model(old, **options), share_prompts="true")
    with pytest.raises(ValueError, match="share_prompts must be auto, true or false"):
        config(tmp_path, share_prompts="maybe")


def test_a_model_that_looks_across_completions_is_refused():
    model = tiny.model().eval()
    norm = model.model.norm.forward
    model.model.norm.forward = lambda hidden: norm(hidden + hidden.mean(1, keepdim=True))
    patch_model(model)
    use_segments(model)
    with pytest.raises(ValueError, match="does not keep shared sequences apart: the log-probability per token differs"):
        check_layout(model, _examples(), 1, "shared")
