"""Training with the sparse backward: the same path as with the exact one, its share of cells in the log."""

import pytest
import tiny
import torch
from small_runs import TOKENIZER
from small_runs import parameters as _parameters
from small_runs import trainer as _trainer

from bco_fast import FeedbackConfig, HeadStats, fused_linear_logps, patch_model
from bco_fast.head.dispatch import load_backend, load_sparse

TAU = 2.0**-7


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """Blocks narrow enough for a small vocabulary, and the sparse backward however many are kept."""
    monkeypatch.setattr(load_backend("torch"), "MASS_TILE", 8)
    monkeypatch.setattr(load_sparse("torch"), "break_even", lambda dtype: 1.1)


def _path(tau: float, seed: int, steps: int = 64):
    """Losses of an SFT run, and at every step what the exact backward would have done to rows that ours left at 0."""
    torch.manual_seed(0)
    n, d, v, classes = 96, 24, 512, 40
    body = torch.nn.Sequential(torch.nn.Embedding(classes, d), torch.nn.Linear(d, d), torch.nn.Tanh())
    head = torch.nn.Linear(d, v, bias=False)
    likely = torch.randint(0, v, (classes, 3))
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=0.02)
    g = torch.Generator().manual_seed(seed)
    losses, rho, starved, bound = [], [], torch.zeros(v), 0.0
    moved = torch.zeros(v, dtype=torch.bool)
    for _ in range(steps):
        inputs = torch.randint(0, classes, (n,), generator=g)
        targets = likely[inputs, torch.randint(0, 3, (n,), generator=g)]
        hidden, stats = body(inputs), HeadStats()
        logps = fused_linear_logps(hidden, head.weight, targets, sparse_tolerance=tau, stats=stats)
        loss = -logps.mean()
        optimizer.zero_grad()
        loss.backward()
        p = (hidden.detach() @ head.weight.detach().T).softmax(1)
        dz = (p - torch.nn.functional.one_hot(targets, v)) / n
        exact = (dz.T @ hidden.detach()).norm(dim=1)
        left = head.weight.grad.norm(dim=1) == 0
        assert exact[left].sum() <= tau * dz.abs().sum() * hidden.detach().norm(dim=1).max() * 1.001
        moved |= ~left
        starved += exact
        bound += float(tau * dz.abs().sum() * hidden.detach().norm(dim=1).max())
        optimizer.step()
        losses.append(loss.item())
        rho.append(stats.kept_fraction)
    return torch.tensor(losses), rho, starved[~moved].sum(), bound


@pytest.mark.slow
def test_64_steps_within_the_noise_of_two_seeds():
    dense, _, _, _ = _path(0.0, seed=0)
    other, _, _, _ = _path(0.0, seed=1)
    sparse, rho, starved, bound = _path(TAU, seed=0)
    assert dense[0] > 6.0
    assert dense[-1] < 1.3  # it does learn: three targets a class are 1.1 nats
    assert min(rho) < 0.5, "nothing was left out"
    noise = (dense - other).abs()
    assert (sparse - dense).abs().mean() < 0.2 * noise.mean()
    assert starved <= bound


def test_the_log_says_what_the_head_left_out(tmp_path):
    trainer = _trainer(tmp_path, sparse_tolerance=0.05, max_steps=4, logging_steps=2)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    for line in lines:
        assert 0.0 < line["head/rho"] < 1.0
        assert 0.0 < line["head/certified"] <= 0.05


def test_an_exact_run_says_nothing_of_it(tmp_path):
    trainer = _trainer(tmp_path, max_steps=1, logging_steps=1)
    trainer.train()
    assert not any("head/rho" in line for line in trainer.state.log_history)


def test_resume_in_the_middle_of_a_window(tmp_path):
    options = {"sparse_tolerance": 0.05, "max_steps": 6, "logging_steps": 3, "save_strategy": "steps", "save_steps": 2}
    whole = _trainer(tmp_path / "whole", **options)
    whole.train()
    cut = _trainer(tmp_path / "whole", **options)
    cut.train(resume_from_checkpoint=str(tmp_path / "whole" / "out" / "checkpoint-4"))
    expected = _parameters(whole)
    for name, tensor in _parameters(cut).items():
        assert torch.equal(tensor, expected[name]), name
    last = [[line for line in t.state.log_history if "loss" in line][-1] for t in (whole, cut)]
    assert last[0]["head/rho"] == last[1]["head/rho"]
    assert last[0]["head/certified"] == last[1]["head/certified"]


def test_an_entropy_that_is_only_read_does_not_make_the_backward_exact():
    """BNF reads the entropy for its loss's value alone."""
    stats = HeadStats()
    model = patch_model(tiny.model(std=1.0), sparse_tolerance=0.1, stats=stats)
    tokens = torch.randint(2, len(TOKENIZER), (2, 12))
    out = model(input_ids=tokens, logp_targets=tokens.roll(-1, 1), logp_entropy=True, use_cache=False).logits
    logps, entropy = out.unbind(-1)
    (logps.sum() + 0.0 * entropy.sum()).backward()
    assert stats.kept_fraction < 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparse_tolerance": 1.0}, "sparse_tolerance must be in"),
        ({"sparse_tolerance": -1e-3}, "sparse_tolerance must be in"),
    ],
)
def test_bad_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        FeedbackConfig(output_dir=str(tmp_path), **options)
