"""Several ranks are one process: the same data, loss, δ, z_ref, logged values, evaluation and weights."""

import math

import numpy as np
import pytest
import ranked
import ranks
from runs import reward_error

SMALL = [
    "bco-padded-1-full-21",  # batches of 4, 4, 4, 4, 4, 1: the second rank has none at the end of an epoch
    "kto-packed-3-lora-22",
    "bnf-tokens-1-full-9",
    "una_score-shared-1-lora-10",
    "dpo-padded-3-full-13",
    "sft-tokens-3-full-1",  # fewer rows than ranks
]


def same(alone, several, name):
    assert alone["layout"] == several["layout"]
    error = reward_error(logps=max(abs(line.get("logps/chosen", 20.0)) for line in alone["lines"]), beta=0.1)
    assert len(alone["lines"]) == 5
    for one, other in zip([*alone["lines"], alone["metrics"]], [*several["lines"], several["metrics"]], strict=True):
        assert one.keys() == other.keys(), name
        for key in one.keys() - {"epoch"}:  # the Trainer's, in which a short last step counts otherwise
            assert math.isclose(one[key], other[key], rel_tol=1e-5, abs_tol=error), (name, key, one[key], other[key])
    assert alone["weights"].keys() == several["weights"].keys()
    for key, values in alone["weights"].items():
        assert np.linalg.norm(np.subtract(values, several["weights"][key])) <= 1e-5 * np.linalg.norm(values), (
            name,
            key,
        )


@pytest.mark.timeout(120)
def test_two_ranks_are_one_process(tmp_path):
    two, _ = ranks.run(ranked.of_ranks, 2, tmp_path / "ranks", tmp_path / "2", SMALL, {})
    for name in SMALL:
        same(ranked.run(name, 1, tmp_path / "1", scale=2), two[name], name)
