"""A function of one's own becomes a loss_type, with everything that the trainer does for the others."""

import math
import runpy
from pathlib import Path

import pytest
import tiny
import torch
from small_runs import TOKENIZER, config, trainer

from bco_fast import FeedbackTrainer, losses, register_objective
from bco_fast.cli.common import UsageError, load_objectives
from bco_fast.cli.train import parse
from bco_fast.losses import OBJECTIVES

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "my_objective.py"


@pytest.fixture(autouse=True)
def _forget():
    before = dict(OBJECTIVES)
    yield
    OBJECTIVES.clear()
    OBJECTIVES.update(before)


def test_the_example_is_a_margin_loss_and_the_page_shows_it():
    assert EXAMPLE.read_text() in (ROOT / "docs" / "objectives.md").read_text()
    runpy.run_path(str(EXAMPLE))
    logps, ref, labels = torch.tensor([-5.0, -4.0]), torch.tensor([-8.0, -20.0]), torch.tensor([True, False])
    out = OBJECTIVES["margin"].loss(logps, ref, labels, beta=0.1)
    assert torch.allclose(out.per_example, torch.tensor([0.7, 2.6]))
    assert torch.allclose(out.loss, torch.tensor(1.65))
    assert torch.allclose(out.rewards, torch.tensor([0.3, 1.6]))
    assert out.metrics["rewards/accuracies"] == 0.5


def test_dpo_written_by_a_user_trains_as_dpo_does(tmp_path):
    def mine(w, l, ref_w, ref_l, *, beta):
        return -torch.nn.functional.logsigmoid(beta * (w - ref_w - l + ref_l))

    register_objective("mine", mine, data="pairs")
    found = []
    for name in ("dpo", "mine"):
        rows = tiny.pairs(8)
        made = FeedbackTrainer(tiny.model(), config(tmp_path, loss_type=name, max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2), rows, rows, processing_class=TOKENIZER)  # fmt: skip
        made.train()
        found.append(
            [line["loss"] for line in made.state.log_history if "loss" in line] + [made.evaluate()["eval_loss"]]
        )
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(*found, strict=True))
    assert len(set(found[0])) == 3


def test_scores_and_no_reference():
    register_objective("likely", lambda logps, scores, *, beta: -scores * logps, data="scores", reference=False)
    out = OBJECTIVES["likely"].loss(torch.tensor([-2.0, -3.0]), torch.tensor([0.9, 0.2]), beta=0.5)
    assert torch.allclose(out.per_example, torch.tensor([1.8, 0.6]))
    assert out.labels.tolist() == [True, False]
    assert torch.allclose(out.rewards, torch.tensor([-1.0, -1.5]))
    register_objective("likely", lambda logps, labels, *, beta: logps, reference=False)  # the later one counts
    assert OBJECTIVES["likely"].data == "labels"


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="dpo is an objective of bco_fast"):
        register_objective("dpo", losses.dpo_loss)
    with pytest.raises(ValueError, match="lower case letters"):
        register_objective("My loss", losses.dpo_loss)
    with pytest.raises(ValueError, match="data must be"):
        register_objective("mine", losses.dpo_loss, data="rows")
    register_objective("scalar", lambda logps, ref, labels, *, beta: (logps - ref).mean())
    with pytest.raises(
        TypeError, match=r"objective scalar must return the cost of each row, a float tensor \[8\], not \[\]"
    ):
        trainer(tmp_path, loss_type="scalar", max_steps=1).train()


def test_the_command_line_runs_the_file_first(tmp_path, caplog):
    base = ["--model", "m", "--data", "d", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(UsageError, match="margin"):
        parse([*base, "--loss_type", "margin"])
    _, made = parse([*base, "--objective-file", str(EXAMPLE), "--loss_type", "margin"])
    assert made.loss_type == "margin"
    assert math.isclose(made.beta, 0.1)
    OBJECTIVES.pop("margin")
    yaml = tmp_path / "run.yaml"
    yaml.write_text(f"objective_file: {EXAMPLE}\nloss_type: margin\n")
    _, made = parse(["--config", str(yaml), *base])
    assert made.loss_type == "margin"
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    for path, reason in ((broken, "division by zero"), (tmp_path / "none.py", "no such file"), (tmp_path, "a folder")):
        with pytest.raises(UsageError, match=f"--objective_file {path}: {reason}"):
            load_objectives(["--objective_file", str(path)])
