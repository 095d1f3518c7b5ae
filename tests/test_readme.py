"""The README's examples run as written, and what it names exists."""

import re
from pathlib import Path

import torch

import bco_fast
from bco_fast.losses import OBJECTIVES

TEXT = (Path(__file__).parents[1] / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return [
        code for kind, code in re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE) if kind == language
    ]


def test_the_drop_in_gives_the_loss_and_gradients_of_the_code_it_replaces():
    blocks = {code.splitlines()[0].split()[1]: code for code in _blocks("python")}
    torch.manual_seed(0)
    batch, tokens, hidden_size, vocabulary = 4, 16, 32, 1000
    results = {}
    hidden, lm_head = torch.randn(batch, tokens, hidden_size), torch.randn(vocabulary, hidden_size) / 8
    targets = torch.randint(0, vocabulary, (batch, tokens)).index_fill(1, torch.arange(6), -100)
    for which in ("before:", "after:"):
        names = {
            "torch": torch,
            "F": torch.nn.functional,
            "fused_bco_loss": bco_fast.fused_bco_loss,
            "hidden": hidden.clone().requires_grad_(),
            "lm_head": lm_head.clone().requires_grad_(),
            "targets": targets,
            "labels": torch.tensor([True, False, False, True]),
            "ref_logps": torch.full((batch,), -70.0),
            "delta": 0.3,
        }
        code = blocks[which]
        assert len(code.splitlines()) <= 5, "the page promises a few lines"
        exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - our own page
        names["loss"].backward()
        results[which] = (names["loss"], names["hidden"].grad, names["lm_head"].grad)
    for before, after in zip(*results.values(), strict=True):
        assert before.abs().max() > 0
        torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-6)


def test_the_import_for_scripts_of_trl_works():
    (code,) = [code for code in _blocks("python") if "BCOTrainer" in code]
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - our own page
    assert issubclass(names["BCOTrainer"], bco_fast.FeedbackTrainer)


def test_every_objective_is_named():
    section = TEXT.partition("## Objectives")[2].partition("\n## ")[0]
    assert set(re.findall(r"`([a-z_]+)`", section)) - {"label", "score"} == set(OBJECTIVES)


def test_the_trainer_example_runs(tmp_path, monkeypatch):
    import tiny

    from bco_fast import FeedbackConfig, FeedbackTrainer

    code = next(block for block in _blocks("") if "FeedbackTrainer(" in block)
    monkeypatch.chdir(tmp_path)
    tiny.write(tmp_path / "feedback.jsonl", tiny.rows(8))

    def config(**options):
        small = {"max_length": 64, "max_steps": 1, "report_to": "none", "save_strategy": "no", "use_cpu": True}
        return FeedbackConfig(**options, **small)

    names = {
        "FeedbackTrainer": FeedbackTrainer,
        "FeedbackConfig": config,
        "model": tiny.model(),
        "tokenizer": tiny.build_tokenizer(),
    }
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - our own page
    assert names["trainer"].state.global_step == 1


def test_every_linked_file_exists():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", TEXT):
        assert (Path(__file__).parents[1] / target).exists(), target
