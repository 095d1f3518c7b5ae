"""Several ranks are one process: the same data, loss, δ, z_ref, logged values, evaluation and weights."""

import math

import numpy as np
import pytest
import ranked
import ranks
from small_runs import reward_error

SMALL = [
    "bco-padded-1-full-21",  # batches of 4, 4, 4, 4, 4, 1: the second rank has none at the end of an epoch
    "kto-packed-3-lora-22",
    "bnf-tokens-1-full-9",
    "una_score-shared-1-lora-10",
    "kto-shared-1-full-9",  # ranks continue prompts with the mismatched completions; one process, of two batches, does not
    "dpo-padded-3-full-13",
    "sft-tokens-3-full-1",  # fewer rows than ranks
]


def same(alone, several, name):
    assert alone["layout"] == several["layout"]
    assert (several["layout"] == "shared") is ("-shared-" in name)
    error = reward_error(logps=max(abs(line.get("logps/chosen", 20.0)) for line in alone["lines"]), beta=0.1)
    assert len(alone["lines"]) == 5
    both = zip([*alone["lines"], alone["metrics"]], [*several["lines"], several["metrics"]], strict=True)
    for step, (one, other) in enumerate(both):
        assert one.keys() == other.keys(), name
        left_out = {"epoch"}  # the Trainer's, which counts a short last step otherwise
        if step == 0:
            left_out |= {"rewards/accuracies"}  # all rewards are 0, but for rounding
        for key in one.keys() - left_out:
            assert math.isclose(one[key], other[key], rel_tol=1e-5, abs_tol=error), (name, key, one[key], other[key])
    assert alone["weights"].keys() == several["weights"].keys()
    for key, values in alone["weights"].items():
        assert np.linalg.norm(np.subtract(values, several["weights"][key])) <= 1e-5 * np.linalg.norm(values), (
            name,
            key,
        )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One process whose micro-batches stand in for so many ranks."""
    folder, found = tmp_path_factory.mktemp("alone"), {}

    def run(name, world):
        if (name, world) not in found:
            found[name, world] = ranked.run(name, 1, folder / str(world), scale=world)
        return found[name, world]

    return run


def _several(tmp_path, alone, world, names, fsdp=False):
    several = ranks.run(ranked.of_ranks, world, tmp_path / "ranks", tmp_path / "small_runs", names, {}, fsdp)
    for found in several:
        for name in names:
            same(alone(name, world), found[name], name)


@pytest.mark.timeout(180)
def test_two_ranks_are_one_process(tmp_path, alone):
    _several(tmp_path, alone, 2, SMALL)


@pytest.mark.timeout(180)
def test_two_ranks_of_fsdp2_are_one_process(tmp_path, alone):
    """The weights are sharded by the Trainer, the reference is computed by the sharded model."""
    _several(tmp_path, alone, 2, [SMALL[0], SMALL[1], "sft-tokens-1-full-9"], fsdp=True)
