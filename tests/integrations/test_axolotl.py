"""Our plugin inside axolotl 0.19, in an environment that has it: YAML, loading, data formats and training are axolotl's."""

import math

import pytest
from hosts import results_inside

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return results_inside("axolotl", "peers_axolotl.py", tmp_path_factory.mktemp("axolotl"), timeout=900)


@pytest.mark.parametrize("name", ["bco", "bco lora", "rdpo"])
def test_a_yaml_trains_with_our_trainer(results, name):
    run = results[name]
    assert run["trainer"] == "_Trainer"
    assert run["args"]["loss_type"] == name.split()[0]
    assert len(run["losses"]) == 3
    assert all(map(math.isfinite, run["losses"]))
    start = 4 * run["losses"][0] / math.log(2)  # rewards start at 0: four rows, thumbs up of "bco" count twice
    assert start == pytest.approx(round(start) if name == "bco" else 4, abs=0.1)
    assert 4 <= round(start) <= 8
    assert run["losses"][2] != run["losses"][0]


def test_options_of_the_yaml_arrive(results):
    expected = {"max_length": 64, "beta": 0.2, "desirable_weight": 2.0, "learning_rate": 0.01}
    assert {name: results["bco"]["args"][name] for name in expected} == expected
    assert results["bco"]["text"].count("</s>") <= 1


def test_one_step_of_kto_is_that_of_its_own_trainer(results):
    """Tokens, loss, gradient and weights. Policy and reference are one at that step, so z_ref is 0 in both."""
    kto = results["kto"]
    assert kto["ours"]["tokens"] == kto["theirs"]["tokens"]
    assert kto["ours"]["loss"] != 0.5  # what it would be without a class weight
    assert kto["ours"]["loss"] == pytest.approx(kto["theirs"]["loss"], rel=1e-6)
    assert kto["ours"]["grad_norm"] == pytest.approx(kto["theirs"]["grad_norm"], rel=1e-6)
    assert kto["ours"]["grad_norm"] > 1  # so it was clipped
    assert kto["apart"] < 1e-6


def test_without_a_space_its_own_trainer_loses_the_first_word(results):
    """It reads prompt and completion as one text, and takes the tokens after the prompt's. Ours reads them one by one."""
    tokens, joined = results["kto"]["ours"]["tokens"], results["kto without a space"]
    assert [len(row) for row in sorted(tokens, key=lambda row: row[:6])] == [
        len(row) + 1 for row in sorted(joined, key=lambda row: row[:6])
    ]
