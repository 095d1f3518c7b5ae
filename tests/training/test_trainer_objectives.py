"""One trainer, one data path, every objective: its loss, its step, its balance, its ranks."""

import math

import numpy as np
import pytest
import ranks
import tiny
import torch
from small_runs import TOKENIZER, reward_error, slow_but
from small_runs import config as _config
from small_runs import parameters as _parameters

from bco_fast import FeedbackTrainer, losses
from bco_fast.data.batch import collate
from bco_fast.data.tokenize import load_feedback
from bco_fast.losses import OBJECTIVES
from bco_fast.losses.sequence import sequence_logps
from bco_fast.models.patch import forward_logps
from bco_fast.training.step import completion_sums, mean_log_ratio


def _trainer(tmp_path, loss_type, rows=32, data=None, ref_model=None, **options):
    return FeedbackTrainer(
        tiny.model(),
        _config(tmp_path, loss_type=loss_type, **options),
        tiny.feedback_for(loss_type, rows) if data is None else data,
        tiny.feedback_for(loss_type, 21, seed=5),
        processing_class=TOKENIZER,
        ref_model=ref_model,
    )


def _elsewhere(loss_type):
    """A reference far from the policy, so that no reward is rounding noise around 0."""
    return tiny.model(seed=1) if OBJECTIVES[loss_type].reference else None


def _losses(trainer):
    return [e["loss"] for e in trainer.state.log_history if "loss" in e]


EXTRA = {"kto": {"desirable_weight": "1.5", "undesirable_weight": 0.5}, "ipo": {"length_normalized": True}}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_of_a_batch_is_the_objectives(tmp_path, name):
    """What the trainer computes, put together again from the public functions."""
    trainer = _trainer(tmp_path, name, **EXTRA.get(name, {}))
    batch = collate([trainer.train_dataset[i] for i in range(6)], 1)
    model, args = trainer.model, trainer.args
    with torch.no_grad():  # away from the reference, where every reward is 0
        for p in model.parameters():
            p.mul_(1.05)
    loss = trainer.compute_loss(model, batch)
    token_logps, entropy, _ = forward_logps(model, batch, return_entropy=True)
    cu = batch["cu_completions"]
    logps, lengths = sequence_logps(token_logps, cu_seqlens=cu), cu.diff()
    ref, labels, scores = batch["ref_logps"], batch["label"], batch["score"]
    w, l, rw, rl = logps[:6], logps[6:], ref[:6], ref[6:]
    by = {"chosen_lengths": lengths[:6], "rejected_lengths": lengths[6:]}
    kl = {k[3:]: v for k, v in batch.items() if k.startswith("kl_")}
    expected = {
        "bco": lambda f: f(logps, ref, labels, beta=0.1),
        "bce": lambda f: f(logps, ref, labels, beta=0.1),
        "kto": lambda f: f(
            logps, ref, labels, kl=(completion_sums(model, kl) - kl["ref_logps"]).mean(),
            desirable_weight=1.5, undesirable_weight=0.5,
        ),
        "una_binary_mse": lambda f: f(logps, ref, labels, beta=0.01),
        "una_binary_bce": lambda f: f(logps, ref, labels, beta=0.01),
        "una_score": lambda f: f(logps, ref, scores, beta=0.03),
        "una_reward": lambda f: f(logps, ref, scores, beta=0.03),
        "bnf": lambda f: f(token_logps, batch["ref_token_logps"], labels, cu_seqlens=cu, entropy=entropy),
        "sft": lambda f: f(logps, labels, lengths),
        "una_pair": lambda f: f(w, l, rw, rl, beta=0.03),
        "dpo": lambda f: f(w, l, rw, rl, beta=0.1),
        "ipo": lambda f: f(w, l, rw, rl, beta=0.1, **by),
        "slic": lambda f: f(w, l, delta=1.0),
        "simpo": lambda f: f(w, l, beta=2.0, gamma=1.0, **by),
        "orpo": lambda f: f(w, l, lam=0.1, **by),
        "rdpo": lambda f: f(w, l, rw, rl, beta=0.1, alpha=0.01, **by),
        "sigmoid_norm": lambda f: f(w, l, rw, rl, beta=0.1, **by),
        "cpo": lambda f: f(w, l, beta=0.1, nll_weight=1.0, **by),
        "exo_pair": lambda f: f(w, l, rw, rl, beta=0.1, epsilon=0.001),
        "discopop": lambda f: f(w, l, rw, rl, beta=0.1, tau=0.05),
        "apo_zero_unpaired": lambda f: f(logps, ref, labels, beta=0.1),
        **dict.fromkeys(
            ("nca", "robust", "sppo_hard", "bco_pair", "apo_zero", "apo_down", "hinge", "aot", "aot_unpaired"),
            lambda f: f(w, l, rw, rl, beta=0.1),
        ),
    }[name](OBJECTIVES[name].loss)  # fmt: skip
    assert torch.allclose(loss, expected.loss, rtol=1e-6, atol=reward_error(float(logps.detach().abs().max())))
    assert args.beta == OBJECTIVES[name].beta
    ours, theirs = (torch.autograd.grad(x, model.get_output_embeddings().weight)[0] for x in (loss, expected.loss))
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()
    assert theirs.norm() > 0


OF_A_STEP = [name for name, objective in OBJECTIVES.items() if not objective.batchwise]
"""Whose loss does not depend on how a step is split."""


@pytest.mark.parametrize("name", slow_but(OF_A_STEP, ("bco",)))
def test_accumulation_changes_nothing(tmp_path, name):
    """8x1 = 3x3: micro-batches of 3, 3 and 2 rows make the step of 8 rows, whatever each of them holds."""
    options = {"kto": {"desirable_weight": "auto"}, "bce": {"reduction": "class_mean"}, "bco": {"reduction": "class_mean"}}  # fmt: skip
    results = []
    for size, accumulation in ((8, 1), (3, 3)):
        trainer = _trainer(
            tmp_path, name, rows=8, max_steps=3, per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=1e-3, max_grad_norm=0.0,
            ref_model=_elsewhere(name), **options.get(name, {}),
        )  # fmt: skip
        trainer.train()
        results.append((_parameters(trainer), _losses(trainer), trainer.delta))
    (whole, loss, delta), (parts, part_loss, part_delta) = results
    assert len(loss) == 3
    assert np.allclose(loss, part_loss, rtol=1e-5)
    assert abs(delta - part_delta) <= reward_error(logps=50)
    start = {n: p.detach() for n, p in tiny.model().named_parameters()}
    moved = 0.0
    for name_, tensor in whole.items():
        assert torch.allclose(parts[name_], tensor, rtol=1e-4, atol=1e-6), name_
        moved = max(moved, float((tensor - start[name_]).abs().max()))
    assert moved > 1e-5


def test_kto_logs_its_reference_point_over_the_whole_step(tmp_path):
    trainer = _trainer(tmp_path, "kto", rows=8, max_steps=3, num_train_epochs=3, gradient_accumulation_steps=2, per_device_train_batch_size=4)  # fmt: skip
    trainer.train()
    lines = [e for e in trainer.state.log_history if "loss" in e]
    assert lines[0]["kl"] <= reward_error(logps=30, beta=1.0)  # policy = reference
    assert math.isclose(lines[0]["loss"], 0.5, rel_tol=1e-4)
    # one dataset in one step: z_ref of the next step is the mean over all mismatched rows after this one
    second = FeedbackTrainer(tiny.model(), _config(tmp_path, loss_type="kto", max_steps=1, per_device_train_batch_size=8), tiny.rows(8), processing_class=TOKENIZER)  # fmt: skip
    second.train()
    batch = collate([second.train_dataset[i] for i in range(8)], 1)
    kl = float(mean_log_ratio(second.model, [batch]))
    halves = [mean_log_ratio(second.model, [collate([second.train_dataset[i] for i in part], 1)]) for part in (range(3), range(3, 8))]  # fmt: skip
    error = reward_error(logps=30, beta=1.0)
    assert abs(kl - (3 * float(halves[0]) + 5 * float(halves[1])) / 8) <= error
    assert abs(kl) > 100 * error


@pytest.mark.parametrize("name", slow_but(OF_A_STEP))
def test_evaluation_is_the_loss_of_the_whole_set(tmp_path, name):
    """21 rows in batches of 8, 8 and 5: no mean of means."""
    trainer = _trainer(tmp_path, name, max_steps=2, per_device_eval_batch_size=8, **EXTRA.get(name, {}))
    trainer.train()
    metrics = trainer.evaluate()
    whole = collate([trainer.eval_dataset[i] for i in range(21)], 1)
    with torch.no_grad():
        expected = float(trainer.compute_loss(trainer.model, whole))
    assert math.isclose(metrics["eval_loss"], expected, rel_tol=1e-5)
    assert 0 <= metrics["eval_rewards/auc"] <= 1


def test_aot_says_that_it_sorts_micro_batches_and_takes_no_weights(tmp_path, caplog):
    trainer = _trainer(
        tmp_path, "aot", rows=8, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1
    )
    assert "aot sorts the 4 pairs of each micro-batch" in caplog.text
    trainer.train()
    assert math.isclose(_losses(trainer)[0], math.log(2), rel_tol=1e-5)
    weighted = [{**pair, "weight": 0.5} for pair in tiny.pairs(8)]
    with pytest.raises(ValueError, match="its costs belong to no row: leave out the weights"):
        _trainer(tmp_path, "aot", data=weighted)


def test_f_divergence_reaches_the_loss(tmp_path):
    options = {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.2}
    trainer = _trainer(tmp_path, "dpo", rows=8, ref_model=_elsewhere("dpo"), **options)
    batch = collate([trainer.train_dataset[i] for i in range(4)], 1)
    sums = completion_sums(trainer.model, batch).chunk(2)
    expected = losses.dpo_loss(*sums, *batch["ref_logps"].chunk(2), divergence="alpha_divergence", divergence_alpha=0.2)
    assert torch.allclose(trainer.compute_loss(trainer.model, batch), expected.loss, rtol=1e-5)
    assert not torch.allclose(expected.loss, losses.dpo_loss(*sums, *batch["ref_logps"].chunk(2)).loss, rtol=1e-2)


def test_pairs_train_unpaired_objectives_too(tmp_path):
    pairs = tiny.pairs(200)
    both = load_feedback(pairs, TOKENIZER, max_length=64)
    assert [e.label for e in both.examples[:4]] == [True, False, True, False]
    half = load_feedback(pairs, TOKENIZER, max_length=64, pairing_ratio=0.5)
    assert 270 < len(half) < 330  # 100 of 200 pairs lose a side: 300, with a deviation of 7
    none = load_feedback(pairs, TOKENIZER, max_length=64, pairing_ratio=0.0)
    assert len(none) == 200
    assert 75 < sum(e.label for e in none.examples) < 125
    assert {e.key for e in none.examples} <= {e.key for e in half.examples} <= {e.key for e in both.examples}
    again = load_feedback(pairs[::-1], TOKENIZER, max_length=64, pairing_ratio=0.5)
    assert {e.key for e in again.examples} == {e.key for e in half.examples}
    trainer = FeedbackTrainer(tiny.model(), _config(tmp_path, pairing_ratio=0.5), pairs, pairs[:20], processing_class=TOKENIZER)  # fmt: skip
    assert len(trainer.train_dataset) == len(half)
    assert len(trainer.eval_dataset) == 40
    with pytest.raises(ValueError, match=r"pairing_ratio 0.5 leaves out sides of pairs, and the data has none"):
        load_feedback(tiny.rows(8), TOKENIZER, max_length=64, pairing_ratio=0.5)


def test_the_sides_of_a_pair_keep_one_prompt():
    pair = {"prompt": "pack two fruit for anna :", "chosen": "apple", "rejected": "apple pear plum cherry"}
    dataset = load_feedback([pair], TOKENIZER, needs="pairs", max_length=8)
    chosen, rejected = dataset.examples
    assert chosen.completion_start == rejected.completion_start == 4
    assert np.array_equal(chosen.input_ids[:4], rejected.input_ids[:4])
    assert (len(chosen), len(rejected)) == (6, 8)
    assert len(dataset) == 1
    batch = collate([dataset[0]], 1)
    assert batch["label"].tolist() == [True, False]


@pytest.mark.parametrize("loss_type", ["bco", "kto"])
def test_balanced_training(tmp_path, loss_type):
    rows = [{**row, "label": i % 4 == 0} for i, row in enumerate(tiny.rows(32))]
    trainer = _trainer(tmp_path, loss_type, data=rows, desirable_weight="auto")
    assert trainer.class_weights == (3.0, 1.0)
    balanced = _trainer(tmp_path, loss_type, data=rows, oversample=True)
    assert len(balanced.train_dataset) == 48
    batch = collate([trainer.train_dataset[i] for i in range(8)], 1)
    kl = {"kl": 0.0} if loss_type == "kto" else {}
    costs = OBJECTIVES[loss_type].loss(completion_sums(trainer.model, batch), batch["ref_logps"], batch["label"], beta=0.1, **kl).per_example  # fmt: skip
    expected = (costs * torch.where(batch["label"], 3.0, 1.0)).mean()
    assert torch.allclose(trainer.compute_loss(trainer.model, batch), expected, rtol=1e-4)


@pytest.mark.slow
def test_stratified_batches_hold_both_classes_and_resume(tmp_path):
    rows = [{**row, "label": i < 10} for i, row in enumerate(tiny.rows(40))]  # class-blocked, as files often are
    options = {"batch_composition": "stratified", "max_steps": 8, "save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3}  # fmt: skip
    whole = _trainer(tmp_path / "a", "bco", data=rows, **options)
    seen = []
    real = whole.get_batch_samples
    whole.get_batch_samples = lambda *a: seen.append(real(*a)) or seen[-1]
    whole.train()
    assert [int(step.counts[0]) for _, step in seen] == [2] * 8
    resumed = _trainer(tmp_path / "b", "bco", data=rows, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/out/checkpoint-3"))
    expected = _parameters(whole)
    for name, tensor in _parameters(resumed).items():
        assert torch.equal(tensor, expected[name]), name


def test_the_reference_is_skipped_where_nobody_reads_it(tmp_path):
    assert _trainer(tmp_path, "simpo").reference_report.rows == 0
    assert _trainer(tmp_path, "dpo").reference_report.computed > 0
    kto = _trainer(tmp_path, "kto", rows=16)
    assert kto.reference_report.rows == 2 * (16 + 21)  # each row and its mismatch
    again = _trainer(tmp_path, "kto", rows=16, learning_rate=1e-6)
    assert again.reference_report.computed == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "dpo", "oversample": True}, "dpo does not read oversample"),
        ({"loss_type": "dpo", "reduction": "class_mean"}, "dpo does not read reduction"),
        ({"loss_type": "sft", "reduction": "class_mean"}, "sft does not read reduction"),
        ({"loss_type": "dpo", "gamma": 0.5}, "dpo does not read gamma"),
        ({"loss_type": "simpo", "gamma": -0.5}, "gamma must be >= 0"),
        ({"loss_type": "nca", "f_divergence_type": "forward_kl"}, "nca does not read f_divergence_type"),
        ({"loss_type": "dpo", "f_divergence_type": "kl"}, "f_divergence_type must be one of reverse_kl, forward_kl"),
        (
            {"loss_type": "dpo", "f_alpha_divergence_coef": 0.3},
            "is for f_divergence_type alpha_divergence, not reverse_kl",
        ),
        ({"loss_type": "dpo", "f_alpha_divergence_coef": math.nan}, "f_alpha_divergence_coef must be finite"),
        ({"loss_type": "aot", "per_device_train_batch_size": 1}, "aot sorts the pairs of a micro-batch"),
        ({"loss_type": "aot", "tokens_per_batch": 64}, "aot sorts the pairs of a micro-batch"),
        ({"loss_type": "kto", "shift_mode": "ema"}, "kto does not read shift_mode"),
        ({"loss_type": "bnf", "beta": 0.1}, "bnf has no beta"),
        ({"loss_type": "slic", "slic_delta": 0.0}, "slic_delta must be > 0"),
        ({"desirable_weight": "much"}, "a number or 'auto'"),
        ({"desirable_weight": "-1"}, "desirable_weight must be >= 0"),
        ({"desirable_weight": "auto", "undesirable_weight": 2.0}, "sets both"),
        ({"pairing_ratio": 1.5}, "pairing_ratio"),
        ({"loss_type": "una_score", "pairing_ratio": 0.5}, "una_score does not read pairing_ratio"),
    ],
    ids=str,
)
def test_config_refuses_what_the_objective_would_ignore(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        _config(tmp_path, **options)


@pytest.mark.parametrize(
    ("needs", "row", "message"),
    [
        ("scores", {"prompt": "a", "completion": "b", "score": 1.2}, r"score must be a number in \[0, 1\], not 1.2"),
        ("scores", {"prompt": "a", "completion": "b", "score": "high"}, "score must be a number"),
        ("scores", {"prompt": "a", "completion": "b", "label": True}, "column 'score' is missing"),
        ("rewards", {"prompt": "a", "completion": "b", "score": math.nan}, "score must be a number"),
        ("pairs", {"prompt": "a", "completion": "b", "label": True}, "column 'chosen' is missing"),
        ("pairs", {"prompt": "a", "chosen": "b"}, "column 'rejected' is missing"),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": " "}, "rejected is empty"),
        ("pairs", {"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ("labels", {"prompt": "a", "chosen": "b", "rejected": 3}, "rejected must be a string"),
        ("labels", {"prompt": "a", "completion": "b", "score": 0.5}, "column 'label' is missing"),
    ],
    ids=str,
)
def test_rows_of_the_wrong_kind_are_named(needs, row, message):
    with pytest.raises(ValueError, match=f"row 0: {message}"):
        load_feedback([row], TOKENIZER, needs=needs)


def test_una_reward_takes_any_scale_and_its_shift_is_the_mean_of_r_minus_reward(tmp_path):
    """UNA section 7.3: c = -δ; pooled over the classes, which a reward does not have."""
    rows = [{**row, "score": 40.0 * row["score"] - 7} for row in tiny.scored(16)]
    trainer = _trainer(tmp_path, "una_reward", data=rows, shift_mode="batch", per_device_train_batch_size=16, max_steps=2, num_train_epochs=2)  # fmt: skip
    assert trainer.feedback.shift.balanced is False
    trainer.train()
    first = trainer.feedback.shift
    scores = np.array([row["score"] for row in rows])
    assert math.isclose(_losses(trainer)[0], float((scores**2).mean()), rel_tol=1e-4)  # r = 0, δ = 0
    # the second step saw δ = mean(0 - score)
    assert math.isclose(_losses(trainer)[1], float(((scores - scores.mean()) ** 2).mean()), rel_tol=0.05)
    assert abs(float(first.value) + scores.mean()) < 0.05 * abs(scores.mean())
    with pytest.raises(ValueError, match=r"score must be a number in \[0, 1\]"):
        _trainer(tmp_path, "una_score", data=rows)


def test_a_dataset_of_the_wrong_kind_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dpo reads pairs"):
        _trainer(tmp_path, "dpo", data=load_feedback(tiny.rows(4), TOKENIZER, max_length=64))


# ---- ranks

RANKED = {
    "bco": {"reduction": "class_mean"},
    "kto": {"desirable_weight": "auto"},
    "sft": {},
    "bnf": {},
    "simpo": {},
}


def _ranked_runs(rank, world, folder):
    results = {}
    for name, options in RANKED.items():
        trainer = _trainer(
            folder, name, rows=24, max_steps=3, per_device_train_batch_size=6 // world, gradient_accumulation_steps=2,
            optim="sgd", learning_rate=1e-3, max_grad_norm=0.0, batch_composition="random", seed=3,
            ref_model=_elsewhere(name), **options,
        )  # fmt: skip
        trainer.train()
        lines = [e for e in trainer.state.log_history if "loss" in e]
        keep = ("loss", "delta", "kl", "rewards/margins", "rewards/accuracies", "logps/chosen")
        results[name] = {
            "lines": [{k: e[k] for k in keep if k in e} for e in lines],
            "sum": {n: float(p.double().sum()) for n, p in _parameters(trainer).items()},
            "moved": float(sum((p.detach() - q.detach()).abs().sum() for p, q in zip(trainer.model.parameters(), tiny.model().parameters(), strict=True))),
        }  # fmt: skip
    return results


@pytest.mark.slow  # test_ranks.py has other objectives and layouts in the fast suite
def test_two_ranks_are_one_process(tmp_path):
    """Loss, δ, z_ref, metrics and parameters of three steps, to 1e-5: class sizes and z_ref are those of all ranks."""
    two, _ = ranks.run(_ranked_runs, 2, tmp_path / "ranks", tmp_path / "2")
    for name, alone in _ranked_runs(0, 1, tmp_path / "1").items():
        both = two[name]
        assert alone["moved"] > 1e-3, name
        for a, b in zip(alone["lines"], both["lines"], strict=True):
            assert a.keys() == b.keys()
            for key in a:
                assert math.isclose(a[key], b[key], rel_tol=1e-5, abs_tol=reward_error(a["logps/chosen"])), (name, key)
        for parameter, total in alone["sum"].items():
            assert math.isclose(total, both["sum"][parameter], rel_tol=1e-5, abs_tol=1e-5), (name, parameter)


def test_gradients_flow_only_from_the_policy(tmp_path):
    """z_ref carries none: the gradient is that of kto_loss with the number itself."""
    trainer = _trainer(tmp_path, "kto")
    batch = collate([trainer.train_dataset[i] for i in range(4)], 1)
    assert not mean_log_ratio(trainer.model, [batch]).requires_grad
    assert losses.kto_loss(torch.zeros(2, requires_grad=True), torch.zeros(2), torch.tensor([True, False]), kl=torch.ones((), requires_grad=True)).loss.requires_grad  # fmt: skip
