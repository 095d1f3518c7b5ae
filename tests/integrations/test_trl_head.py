"""Our head in the place of TRL's: the operator alone here; TRL's trainers in `make venv-peers`' environment."""

import functools
import json
import math
import os
import subprocess
import types
from pathlib import Path

import pytest
import torch

from bco_fast.head.types import HeadOptions
from bco_fast.integrations.trl_head import COMPACT, OPERATOR, Operator, use_fused_head

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-peers-trl-1.16" / "bin" / "python"
ALL = ("log_probs", "entropy", "mean_logits", "is_top1")


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("trained", [False, True])
def test_the_operator_answers_as_trls_does(softcap, trained):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*s, generator=generator) for s in ((40, 16), (300, 16), (300,)))
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    scale, temperature = 0.7, 1.3
    logits = (hidden @ weight.T + bias) * scale
    logits = (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature
    targets = torch.randint(0, 300, (40,), generator=generator)
    targets[:20] = logits[:20].argmax(1)
    expected = logits.log_softmax(-1)
    entropy = -(expected.exp() * expected).sum(1)
    found = Operator(HeadOptions()).apply(hidden, weight, bias, targets, temperature, 64, softcap, scale, ALL)
    logps, h, nothing, mean, top1 = found
    assert nothing is None
    assert torch.allclose(logps, expected.gather(1, targets[:, None])[:, 0], atol=1e-5)
    assert torch.allclose(h, entropy, atol=1e-5)
    assert torch.allclose(mean, logits.mean(1), atol=1e-5)
    assert torch.equal(top1, targets == logits.argmax(1))
    assert 20 <= top1.sum() < 40
    leaves = [hidden, *([weight] if trained else [])]
    up = torch.randn(40, generator=generator)
    ours = torch.autograd.grad(logps @ up + h.sum(), leaves)
    theirs = torch.autograd.grad(expected.gather(1, targets[:, None])[:, 0] @ up + entropy.sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()
    alone = Operator(HeadOptions()).apply(hidden, weight, bias, targets, temperature, 64, softcap, scale, ALL[:1])
    assert torch.equal(alone[0], logps)
    assert alone[1:] == (None,) * 4


def test_float32_rows_under_a_lower_head():
    """`cast_lm_head_to_fp32`: TRL casts the hidden states and expects the weight to follow."""
    hidden, weight = torch.randn(6, 8), torch.randn(50, 8).bfloat16()
    logps, *_ = Operator(HeadOptions()).apply(hidden, weight, None, torch.arange(6), 1.0, 64, None, 1.0, ALL[:1])
    expected = (hidden @ weight.float().T).log_softmax(-1)[range(6), range(6)]
    assert torch.allclose(logps, expected, atol=1e-5)


def _trl_model(outputs):
    """A model whose forward looks up its operator as TRL's does, with a wrapper around it as accelerate's."""

    def forward(self):
        return _ChunkedLogProbFunction, _use_triton(None), outputs  # noqa: F821 - globals of its own

    scope = {OPERATOR: "TRL's", COMPACT: lambda device: False}
    inner = types.FunctionType(forward.__code__, scope, closure=forward.__closure__)

    @functools.wraps(inner)
    def autocast(self):
        return inner(self)

    model = torch.nn.Linear(1, 1)
    model.forward = types.MethodType(autocast, model)
    return model


def _trainer(model):
    return types.SimpleNamespace(model=model, accelerator=types.SimpleNamespace(unwrap_model=lambda m: m))


def test_one_trainer_changes_and_others_stay():
    one, other = _trl_model(ALL), _trl_model(ALL)
    use_fused_head(_trainer(one), workspace_bytes=1 << 20)
    operator, compact, outputs = one.forward()
    assert isinstance(operator, Operator)
    assert operator.options.workspace_bytes == 1 << 20
    assert compact
    assert outputs == ALL
    assert other.forward() == ("TRL's", False, ALL)
    with pytest.raises(ValueError, match=r"no fused head of TRL 1\.16 in its Linear, or bco_fast's already"):
        use_fused_head(_trainer(one))


def test_what_it_cannot_do_is_refused():
    with pytest.raises(ValueError, match="leave use_weighting out"):
        use_fused_head(_trainer(_trl_model((*ALL, "log_sum_sq_probs"))))
    with pytest.raises(ValueError, match="no fused head"):
        use_fused_head(_trainer(torch.nn.Linear(1, 1)))


@pytest.mark.slow
def test_trls_trainers_compute_what_they_computed():
    if not PYTHON.exists():
        pytest.skip("make venv-peers builds the environment of TRL 1.16")
    script = ROOT / "tests" / "integrations" / "peers_integration.py"
    done = subprocess.run([PYTHON, script, "heads"], capture_output=True, text=True, timeout=900, check=False, env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.strip().splitlines()[-1])
    assert {"kto", "dpo", "dpo adapter", "dpo bf16"} <= set(results)
    for name, found in results.items():
        assert found["start_apart"] == 0.0
        assert "already" in found["refused"], name
        assert found["moved"] > 1e-3
        lower = "bf16" in name  # where TRL rounds its logits
        assert found["apart"] <= (0.05 if lower else 5e-5) * found["moved"], name
        assert len(found["lines"]) == 3
        for theirs, ours in zip(found["lines"], found["our_lines"], strict=True):
            assert theirs.keys() == ours.keys(), name
            for key in ("loss", "grad_norm"):
                assert math.isclose(theirs[key], ours[key], rel_tol=5e-3 if lower else 1e-6), (name, key)
            for key in theirs.keys() & {"entropy", "logps/chosen", "logits/chosen", "logits/rejected"}:
                assert math.isclose(theirs[key], ours[key], rel_tol=2e-2 if lower else 1e-5), (name, key)
            assert lower or theirs.get("mean_token_accuracy") == ours.get("mean_token_accuracy"), name


def test_at_the_size_of_qwen_our_gradient_is_nearer_to_float64_than_trls():
    """As measured: a step in float32 has an error above 1e-6 there with either head."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "trl_heads.json").read_text())["rows"]
    errors = {
        row["case"].removeprefix("error, kto, LoRA, "): row["gradient_error"]
        for row in rows
        if "error, kto" in row["case"]
    }
    theirs = errors.pop("TRL 1.16")
    assert set(errors) == {"use_fused_head", "FeedbackKTOTrainer"}
    assert max(errors.values()) <= theirs < 3e-6
