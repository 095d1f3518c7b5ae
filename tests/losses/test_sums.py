"""A sum of objectives is the sum of its objectives, and equals TRL 1.16's DPOTrainer with several loss types."""

import math

import pytest
import tiny
import torch
from small_runs import TOKENIZER, config, parameters
from test_golden_trl_preference import GOLDEN, LENGTHS, PAIRS, close

from bco_fast import FeedbackTrainer, RewardShift, losses
from bco_fast.cli.common import UsageError
from bco_fast.cli.train import parse
from bco_fast.data.batch import collate
from bco_fast.losses.sums import find_objective
from bco_fast.training.model_card import SOURCES, model_card
from bco_fast.training.step import completion_sums

OURS = {"sigmoid": "dpo"}
MPO = {"loss_type": ["dpo", "bco", "sft"], "loss_weights": [0.8, 0.2, 1.0]}


def _batch():
    """The recorded completions, and token log-probabilities of theirs that carry the gradient."""
    cu = torch.nn.functional.pad(LENGTHS.cumsum(0), (1, 0))
    tokens = (torch.tensor(GOLDEN["logps"]).double() / LENGTHS).repeat_interleave(LENGTHS).requires_grad_()
    labels = torch.arange(2 * PAIRS) < PAIRS
    counts = torch.tensor([PAIRS, 0, int(LENGTHS[:PAIRS].sum())])
    return tokens, {"cu_completions": cu, "label": labels, "weight": torch.ones(2 * PAIRS), "counts": counts,
                    "ref_logps": torch.tensor(GOLDEN["ref_logps"]).double()}  # fmt: skip


@pytest.mark.parametrize("golden", GOLDEN["sums"], ids=lambda g: "+".join(g["loss_types"]))
@pytest.mark.parametrize("quality", ["bco_pair", "bco"])  # bco without a shift, on both sides of a pair
def test_dpo_trainer_with_several_loss_types(golden, quality):
    tokens, batch = _batch()
    names = [{"bco_pair": quality}.get(name, OURS.get(name, name)) for name in golden["loss_types"]]
    objective = find_objective("+".join(names), golden["loss_weights"])
    settings = {name: {} if name == "sft" else {"beta": golden["beta"]} for name in names}
    if "aot" in names:
        settings["aot"]["label_smoothing"] = 0.1
    out = objective.run(tokens, batch, settings, shift=RewardShift("fixed"))
    loss = (out.per_example * objective.weights(batch, batch["counts"])).sum()
    close(loss.float(), golden["loss"])
    close(out.loss.float(), golden["loss"])
    (gradient,) = torch.autograd.grad(loss, tokens)
    close(gradient[batch["cu_completions"][:-1]].float(), golden["gradient"])
    close(out.metrics["rewards/margins"].float(), golden["rewards/margins"])


def _trainer(tmp_path, rows=8, **options):
    return FeedbackTrainer(
        tiny.model(),
        config(tmp_path, optim="sgd", learning_rate=1e-3, max_grad_norm=0.0, **options),
        tiny.pairs(rows), tiny.pairs(7, seed=5), processing_class=TOKENIZER, ref_model=tiny.model(seed=1),
    )  # fmt: skip


def test_a_step_of_mpo_is_made_of_its_three_losses_with_delta(tmp_path):
    trainer = _trainer(tmp_path, max_steps=1, **MPO)
    assert trainer.args.loss_type == "dpo+bco+sft"
    trainer.feedback.shift = RewardShift("fixed", initial=0.7)
    batch = collate([trainer.train_dataset[i] for i in range(5)], 1)
    sums, ref, lengths = completion_sums(trainer.model, batch), batch["ref_logps"], batch["cu_completions"].diff()
    dpo = losses.dpo_loss(*sums.chunk(2), *ref.chunk(2)).loss
    bco = 2 * losses.bco_loss(sums, ref, batch["label"], delta=0.7).loss  # both sides of a pair
    sft = losses.sft_loss(sums, batch["label"], lengths).loss
    loss, out = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    torch.testing.assert_close(loss, 0.8 * dpo + 0.2 * bco + sft, rtol=1e-6, atol=1e-6)
    assert float(out.metrics["delta"]) == pytest.approx(0.7)


def test_accumulation_logs_and_evaluation_of_a_sum(tmp_path):
    """8x1 = 3x3 as for any objective; the parts are logged by name, and add up to the loss."""
    runs = []
    for size, accumulation in ((8, 1), (3, 3)):
        trainer = _trainer(tmp_path, max_steps=2, per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, per_device_eval_batch_size=3, **MPO)  # fmt: skip
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        runs.append((parameters(trainer), [*lines, trainer.evaluate()]))
    (whole, lines), (parts, part_lines) = runs
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-6)
    for line, part_line, prefix in zip(lines, part_lines, ("", "", "eval_"), strict=True):
        found = [line[f"{prefix}loss/{name}"] for name in ("dpo", "bco", "sft")]
        assert math.isclose(0.8 * found[0] + 0.2 * found[1] + found[2], line[f"{prefix}loss"], rel_tol=1e-6)
        assert all(
            math.isclose(line[key], part_line[key], rel_tol=1e-4, abs_tol=1e-5) for key in line if "loss" in key or "delta" in key
        )  # fmt: skip
    assert lines[1]["delta"] != 0


def test_thumbs_train_on_a_sum_too(tmp_path):
    """bco and sft, with the weights of the classes in the first alone."""
    made = FeedbackTrainer(tiny.model(), config(tmp_path, loss_type=["bco", "sft"], desirable_weight="2"), tiny.rows(8), processing_class=TOKENIZER)  # fmt: skip
    batch = collate([made.train_dataset[i] for i in range(8)], 1)
    sums, labels = completion_sums(made.model, batch), batch["label"]
    weight = torch.where(labels, 2.0, 1.0)
    bco = losses.bco_loss(sums, batch["ref_logps"], labels, sample_weight=weight).loss
    sft = losses.sft_loss(sums, labels, batch["cu_completions"].diff()).loss
    torch.testing.assert_close(made.compute_loss(made.model, batch), bco + sft, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ["dpo", "una_score"]}, "one kind of data, and dpo reads pairs, una_score reads scores"),
        ({"loss_type": ["kto", "sft"]}, "kto cannot be part of a sum"),
        ({"loss_type": ["bco", "una_binary_mse"]}, "one δ, and bco and una_binary_mse have one each"),
        ({"loss_type": ["dpo", "dpo"]}, "twice"),
        ({"loss_type": ["dpo", "sigmoid"]}, "loss_type must be one or several of bco, .*, not 'sigmoid'"),
        ({"loss_type": ["dpo", "sft"], "loss_weights": [1.0]}, "one number for each, not 1 for 2"),
        ({"loss_type": "dpo", "loss_weights": [1.0]}, "loss_weights needs several loss_types"),
        ({"loss_type": ["dpo", "sft"], "loss_weights": [1.0, 0.0]}, "loss_weights must be > 0, not 1, 0"),
        ({"loss_type": ["dpo", "bco"], "oversample": True}, r"dpo\+bco does not read oversample"),
        ({"loss_type": ["dpo", "bco"], "gamma": 2.0}, r"dpo\+bco does not read gamma"),
        ({"loss_type": ["dpo", "nca"], "f_divergence_type": "forward_kl"}, "not defined for nca, a part of"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_go_together(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_a_sum_of_pairs_refuses_thumbs(tmp_path):
    with pytest.raises(ValueError, match="row 0: column 'chosen' is missing"):
        FeedbackTrainer(tiny.model(), config(tmp_path, **MPO), tiny.rows(8), processing_class=TOKENIZER)


def test_options_and_card_of_a_sum(tmp_path):
    base = ["--model", "m", "--data", "d", "--output_dir", str(tmp_path / "out")]
    _, flags = parse([*base, "--loss_type", "ipo", "sft", "--loss_weights", "0.5", "2", "--length_normalized", "true"])
    yaml = tmp_path / "run.yaml"
    yaml.write_text("loss_type: [ipo, sft]\nloss_weights: [0.5, 2]\nlength_normalized: true\n")
    _, made = parse(["--config", str(yaml), *base])
    for config_ in (flags, made):
        assert (config_.loss_type, config_.loss_weights) == ("ipo+sft", [0.5, 2.0])
        assert config_.objective.parts["ipo"].lengths is True
        assert config_.settings == {"ipo": config_.settings["ipo"], "sft": {}}
    assert parse(base)[1].loss_type == "bco"
    with pytest.raises(UsageError, match="loss_weights"):
        parse([*base, "--loss_type", "dpo", "sft", "--loss_weights", "1"])
    card = model_card({"loss_type": "ipo+sft", "data": {}, "options": {"loss_weights": [0.5, 2.0]}})
    (ipo, _), (sft, _) = SOURCES["ipo"], SOURCES["sft"]
    assert f"0.5 · [{ipo}] + 2 · [{sft}]" in card
    assert "arxiv.org/abs/2310.12036" in card
    assert "arxiv.org/abs/2404.04656" in card
