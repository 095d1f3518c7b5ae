"""Our objectives inside TRL 1.16's KTOTrainer, in the environment that `make venv-peers` builds."""

import math

import pytest
from hosts import results_inside


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    return results_inside("trl-1.16", "peers_integration.py", tmp_path_factory.mktemp("trl"), timeout=1000)


def test_kto_is_trls_own(results):
    kto = results["against trl"]
    assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(kto["losses"], kto["our_losses"], strict=True))
    assert kto["apart"] < 1e-3 * kto["moved"]


@pytest.mark.parametrize("objective", ["bco", "bce", "una_binary_mse", "una_binary_bce", "bnf", "bco precomputed", "bce precomputed"])  # fmt: skip
def test_objectives_train_inside_trl(results, objective):
    assert all(map(math.isfinite, results[objective]["losses"]))
    assert results[objective]["moved"] > 0
    assert {"rewards/chosen", "rewards/rejected", "rewards/margins", "logps/chosen"} <= set(results[objective]["names"])


def test_a_precomputed_reference_changes_nothing(results):
    for objective in ("bco", "una_binary_mse"):
        alive, stored = results[objective]["losses"], results[f"{objective} precomputed"]["losses"]
        assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(alive, stored, strict=True))
