"""examples/ms_swift_bco.py inside ms-swift 4.6, in an environment that has it: `swift rlhf` on a CPU."""

import math

import pytest
from hosts import results_inside

pytestmark = [pytest.mark.slow, pytest.mark.timeout(700)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_inside("ms-swift", "peers_ms_swift.py", tmp_path_factory.mktemp("ms-swift"), timeout=600)


def test_its_own_kto_on_the_fused_head_is_the_same_over_three_steps(results):
    kto = results["kto"]
    assert kto["theirs"][0] != kto["theirs"][2]
    assert kto["fused"] == pytest.approx(kto["theirs"], rel=1e-6)
    assert kto["apart"] < 5e-6  # of what the weights moved


@pytest.mark.parametrize("name", ["bco", "bco lora"])
def test_bco_trains(results, name):
    first, *later = results[name]
    up = 12 * (first / math.log(2) - 1)  # rewards start at 0, and thumbs up count twice
    assert up == pytest.approx(round(up), abs=1e-4)
    assert 0 < round(up) < 12
    assert max(later) < first
    assert results["adapters"] > 0
