"""Optimizers with small or paged states, of packages that users install themselves: make test-ranks has them."""

import pytest
import small_runs
import tiny

from bco_fast import FeedbackTrainer

PACKAGES = {"adamw_torch_8bit": "torchao", "adamw_8bit": "bitsandbytes", "paged_adamw_32bit": "bitsandbytes"}


def _train(folder, optim):
    args = small_runs.config(folder, optim=optim, max_steps=3, learning_rate=1e-3)
    model = tiny.model(hidden_size=64, intermediate_size=256)
    trainer = FeedbackTrainer(model, args, tiny.rows(24), processing_class=small_runs.TOKENIZER)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("optim", PACKAGES)
def test_an_optimizer_with_small_or_paged_states_trains_as_adamw_does(tmp_path, optim):
    pytest.importorskip(PACKAGES[optim], reason="needs that package: make test-ranks")
    expected = _train(tmp_path / "adamw", "adamw_torch")
    found = _train(tmp_path / optim, optim)
    assert len(set(expected)) == 3
    assert found == pytest.approx(expected, abs=1e-6 if "32bit" in optim else 1e-3)
