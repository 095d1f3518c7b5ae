"""The README's example runs as written."""

import re
from pathlib import Path

import torch

TEXT = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_drop_in_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line and not line.startswith(("import", "from"))]) <= 10
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - our own page
    assert names["out"].loss.isfinite()
    for leaf in (names["hidden"], names["lm_head"]):
        assert leaf.grad.isfinite().all()
        assert leaf.grad.any()
    assert float(names["shift"].value) != 0.0
    assert isinstance(names["out"].loss, torch.Tensor)


def test_the_trainer_example_runs(tmp_path, monkeypatch):
    import tiny

    from bco_fast import FeedbackConfig, FeedbackTrainer

    code = next(block for block in re.findall(r"```\n(.*?)```", TEXT, flags=re.DOTALL) if "FeedbackTrainer(" in block)
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
