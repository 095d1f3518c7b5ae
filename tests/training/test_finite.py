"""A run that diverges stops before it writes or deletes a checkpoint, and says where it was last good."""

import json
import math

import pytest
import tiny
import torch
from small_runs import TOKENIZER, config, slow_but

from bco_fast import FeedbackTrainer, cli
from bco_fast.head import dispatch
from bco_fast.losses import checks, paired, unpaired
from bco_fast.training.finite import FiniteWatch, TrainingDiverged


@pytest.fixture
def unchecked(monkeypatch):
    """Values are not looked at, as on a GPU."""
    real = checks.check_vectors

    def silent(*, like, **vectors):
        real(like=like, **{name: None if v is None else v.detach().nan_to_num() for name, v in vectors.items()})

    for module in (checks, paired, unpaired):
        if hasattr(module, "check_vectors"):
            monkeypatch.setattr(module, "check_vectors", silent)
    for module in (dispatch, *(m for m in _importers("check_values"))):
        monkeypatch.setattr(module, "check_values", lambda *args, **kwargs: None)


def _importers(name):
    import sys

    return [m for n, m in list(sys.modules.items()) if n.startswith("bco_fast.") and hasattr(m, name)]


def _trainer(folder, **options):
    defaults = {
        "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "max_steps": 12, "logging_steps": 100,
        "max_grad_norm": 0.0001,
    }  # fmt: skip
    return FeedbackTrainer(
        tiny.model(), config(folder, **defaults | options), tiny.rows(40), processing_class=TOKENIZER
    )


def _poison(trainer, step, what):
    """From optimizer step `step` on, the loss or the gradient of the weights is NaN."""
    real = trainer.training_step

    def training_step(model, *args, **kwargs):
        if trainer.state.global_step + 1 == step and what == "loss":
            with torch.no_grad():
                next(p for p in model.parameters() if p.dim() > 1).fill_(math.nan)
        loss = real(model, *args, **kwargs)
        if trainer.state.global_step + 1 == step and what == "gradient":
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.inf)
        return loss

    trainer.training_step = training_step


def _good(folder):
    from safetensors.torch import load_file

    found = sorted(path.name for path in (folder / "out").glob("checkpoint-*"))
    for name in found:
        weights = load_file(folder / "out" / name / "model.safetensors")
        assert all(tensor.isfinite().all() for tensor in weights.values()), name
    return found


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("step", slow_but([5, 6], (6,)))
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(tmp_path, unchecked, what, step):
    trainer = _trainer(tmp_path)
    _poison(trainer, step, what)
    with pytest.raises(TrainingDiverged, match=rf"step {step}: the {what} is not finite") as error:
        trainer.train()
    assert trainer.state.global_step == 6  # the next save
    assert _good(tmp_path) == ["checkpoint-4"]
    assert "last good checkpoint is " in str(error.value)
    assert "checkpoint-4." in str(error.value)
    assert "learning_rate (it is 0.01)" in str(error.value)
    assert ("for rows " in str(error.value)) is (what == "loss")


def test_it_stops_at_a_log_line_and_at_the_end_too(tmp_path, unchecked):
    for name, options, last in (("log", {"logging_steps": 3}, 6), ("end", {}, 12)):
        trainer = _trainer(tmp_path / name, save_strategy="no", **options)
        _poison(trainer, 5, "loss")
        with pytest.raises(TrainingDiverged, match=r"step 5: .* has no checkpoint"):
            trainer.train()
        assert trainer.state.global_step == last


def test_on_the_cpu_the_message_is_the_same_and_comes_at_once(tmp_path):
    trainer = _trainer(tmp_path)
    _poison(trainer, 5, "loss")
    with pytest.raises(TrainingDiverged, match=r"step 5: the loss is not finite for rows .*checkpoint-4"):
        trainer.train()
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("loss_type", slow_but(["bco", "kto", "dpo", "bnf", "simpo"], ("bco",)))
def test_an_absurd_learning_rate_stops_every_objective(tmp_path, unchecked, loss_type):
    options = {"learning_rate": 1e30, "loss_type": loss_type, "logging_steps": 1, "max_grad_norm": 0.0}
    trainer = FeedbackTrainer(
        tiny.model(), config(tmp_path, **options), tiny.feedback_for(loss_type, 24), processing_class=TOKENIZER
    )
    with pytest.raises(TrainingDiverged):
        trainer.train()


def test_the_rows_are_those_that_are_not_finite():
    watch, args = FiniteWatch(), config_of_nothing()
    watch.loss(torch.tensor([1.0, 2.0]), torch.tensor([5, 9]), 1)
    watch.gradient(torch.tensor(3.0), 1)
    watch.check(args)
    watch.loss(torch.tensor([1.0, math.nan, math.inf, 2.0]), torch.tensor([5, 9, 7, 3]), 2)
    watch.loss(torch.tensor([math.nan]), torch.tensor([11]), 3)
    watch.gradient(torch.tensor(math.inf), 3)
    with pytest.raises(TrainingDiverged, match=r"step 2: the loss is not finite for rows 7, 9 of"):
        watch.check(args)


def config_of_nothing():
    from bco_fast import FeedbackConfig

    return FeedbackConfig(output_dir="nowhere", use_cpu=True, report_to="none")


def test_exit_code_3_and_one_line(tmp_path, capfd, monkeypatch):
    tiny.model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    data = tiny.write(tmp_path / "data.jsonl", tiny.rows(40))
    options = {
        "model": tmp_path / "model", "data": data, "output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache",
        "max_length": 64, "max_steps": 6, "save_steps": 1, "save_total_limit": 1, "use_cpu": "true", "learning_rate": 1e30,
        "max_grad_norm": 0, "optim": "sgd", "disable_tqdm": "true",
    }  # fmt: skip
    assert cli.main(["train", *(f"--{name}={value}" for name, value in options.items())]) == 3
    out, err = capfd.readouterr()
    assert next(line for line in err.splitlines() if "error" in line).startswith("bco-fast: error: step ")
    assert "Traceback" not in err
    assert "{" not in out
    assert not (tmp_path / "out" / "model.safetensors").exists()


def _strict(path):
    return json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in {path}"))


def test_what_is_written_is_json_with_infinities_too(tmp_path):
    trainer = FeedbackTrainer(
        tiny.model(),
        config(tmp_path, save_strategy="steps", save_steps=2, logging_steps=3, max_steps=4),
        tiny.rows(24),
        tiny.rows(8, seed=5),
        processing_class=TOKENIZER,
    )
    real = trainer.feedback.add

    def add(loss, sums, *args, **kwargs):
        real(loss, sums + sums.new_tensor([0] * 7 + [math.inf, 0]), *args, **kwargs)  # E[exp(-r)] overflows

    trainer.feedback.add = add
    trainer.train()
    trainer.log({"eval_something": math.nan, "eval_other": -math.inf})
    trainer.save_model()
    trainer.save_state()
    for path in (tmp_path / "out").rglob("*.json"):
        _strict(path)
    line = next(line for line in trainer.state.log_history if "error_term" in line)
    assert line["error_term"] is None
    resumed = FeedbackTrainer(
        tiny.model(),
        config(tmp_path, logging_steps=3, max_steps=4),
        tiny.rows(24),
        processing_class=TOKENIZER,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    again = next(line for line in resumed.state.log_history if "error_term" in line)
    assert again == line


def _watch_of_a_rank(rank, world):
    args, watch = config_of_nothing(), FiniteWatch()
    args.device  # noqa: B018 - joins the group
    watch.loss(torch.tensor([1.0]), torch.tensor([4]), 1)
    watch.check(args)
    watch.loss(torch.tensor([math.nan if rank else 1.0]), torch.tensor([5 + rank]), 2)
    try:
        watch.check(args)
    except TrainingDiverged as error:
        return str(error)


def test_every_rank_stops_for_the_same_reason(tmp_path):
    import ranks

    first, second = ranks.run(_watch_of_a_rank, 2, tmp_path)
    assert first == second
    assert "step 2: the loss is not finite for rows 6 of" in first
