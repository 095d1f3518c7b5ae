"""One table of bad input x every backend: the same class and message, before any launch."""

import math

import pytest
import torch

from bco_fast import fused_bco_loss

V, D = 7, 4
NAN_ROW = torch.tensor([[[0.0, 1, math.nan, 0]] * 3] * 2)


def _good():
    g = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(2, 3, D, generator=g),
        "lm_head_weight": torch.randn(V, D, generator=g),
        "targets": torch.tensor([[-100, 1, 6], [-100, 2, -100]]),
        "labels": torch.tensor([True, False]),
        "ref_logps": torch.tensor([-4.0, -2.0]),
    }


def _targets(*values, **options):
    return {"targets": torch.tensor([values, [-100, 1, 2]], **options)}


BAD = {
    "empty batch": ({"hidden": torch.zeros(0, 3, D), "targets": torch.zeros(0, 3, dtype=torch.long), "labels": torch.zeros(0, dtype=torch.bool), "ref_logps": torch.zeros(0)}, ValueError, "the batch is empty"),
    "target V": (_targets(0, V, 1), IndexError, r"targets\[1\] is 7: outside the vocabulary \[0, 7\)"),
    "target -5": (_targets(-5, 0, 1), IndexError, r"targets\[0\] is -5"),
    "target 2^63 - 1": (_targets(0, 0, 2**63 - 1), IndexError, r"targets\[2\] is 9223372036854775807"),
    "float targets": (_targets(0.0, 1.0, 2.0), TypeError, "targets must be int64 or int32"),
    "int8 targets": ({"targets": torch.zeros(2, 3, dtype=torch.int8)}, TypeError, "targets must be int64 or int32"),
    "NaN in hidden": ({"hidden": NAN_ROW}, ValueError, "hidden has a value that is not finite, first in row 1"),
    "Inf in hidden": ({"hidden": torch.full((2, 3, D), math.inf)}, ValueError, "hidden has a value that is not finite"),
    "NaN in weight": ({"lm_head_weight": torch.full((V, D), math.nan)}, ValueError, "weight has a value that is not finite"),
    "-Inf in weight": ({"lm_head_weight": torch.full((V, D), -math.inf)}, ValueError, "weight has a value that is not finite"),
    "NaN in ref": ({"ref_logps": torch.tensor([0.0, math.nan])}, ValueError, r"ref_logps\[1\] is nan"),
    "Inf in ref": ({"ref_logps": torch.tensor([math.inf, 0.0])}, ValueError, r"ref_logps\[0\] is inf"),
    "dtype mix": ({"hidden": torch.zeros(2, 3, D, dtype=torch.bfloat16)}, TypeError, "hidden is torch.bfloat16 and weight torch.float32"),
    "a layer as weight": ({"lm_head_weight": torch.nn.Linear(D, V)}, TypeError, r"weight must be a tensor, not Linear: pass its \.weight"),
    "a list as hidden": ({"hidden": [0.0]}, TypeError, "hidden must be a tensor, not list"),
    "D mismatch": ({"hidden": torch.zeros(2, 3, D + 1)}, ValueError, "disagree about D"),
    "integer hidden": ({"hidden": torch.zeros(2, 3, D, dtype=torch.long)}, TypeError, "hidden must be float32"),
    "int labels": ({"labels": torch.tensor([1, 0])}, TypeError, "labels must be a bool tensor"),
    "float labels": ({"labels": torch.tensor([1.0, 0.0])}, TypeError, "labels must be a bool tensor"),
    "str labels": ({"labels": ["up", "down"]}, TypeError, "labels must be a bool tensor.*list"),
    "beta 0": ({"beta": 0.0}, ValueError, "beta must be > 0"),
    "beta -1": ({"beta": -1.0}, ValueError, "beta must be > 0"),
    "beta NaN": ({"beta": math.nan}, ValueError, "beta must be > 0"),
    "reference with gradient": ({"ref_logps": torch.zeros(2, requires_grad=True)}, ValueError, "ref_logps requires grad"),
    "ref of another length": ({"ref_logps": torch.zeros(3)}, ValueError, "must both be"),
    "different devices": ({"lm_head_weight": torch.zeros(V, D, device="meta")}, ValueError, "hidden is on cpu and weight on meta"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("kind", BAD)
def test_bad_input(kind, backend):
    changes, error, message = BAD[kind]
    with pytest.raises(error, match=message) as raised:
        fused_bco_loss(**(_good() | changes), backend=backend)
    assert "\n" not in str(raised.value)


GOOD = {
    "an empty completion": {"targets": torch.tensor([[-100, 1, 6], [-100, -100, -100]])},
    "all ignored": {"targets": torch.full((2, 3), -100)},
    "not contiguous": {"hidden": torch.randn(3, 2, D).transpose(0, 1)},
    "expanded": {"hidden": torch.randn(1, 1, D).expand(2, 3, D)},
    "zero stride": {"lm_head_weight": torch.randn(1, D).expand(V, D), "targets": torch.zeros(1, 1, dtype=torch.long).expand(2, 3)},
    "int32 targets": {"targets": torch.tensor([[0, 1, 2], [3, 4, 5]], dtype=torch.int32)},
}  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "triton", "reference"])
@pytest.mark.parametrize("kind", GOOD)
def test_odd_but_good_input(kind, backend):
    """A sum over no token is 0: an empty completion is legal where nothing is divided by its length."""
    arguments = _good() | GOOD[kind]
    out = fused_bco_loss(**arguments, backend=backend)
    truth = fused_bco_loss(**arguments, backend="reference")
    assert torch.allclose(out.per_example, truth.per_example, rtol=1e-5)
    assert out.loss.isfinite()
