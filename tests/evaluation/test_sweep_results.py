"""The tables and plots of a sweep: means and intervals over seeds, units kept apart, failures by name."""

import csv
import json
import math
import statistics

import pytest

from bco_fast.evaluation.sweep import Planned, interval, write_results


def test_the_interval_is_students():
    values = [0.6, 0.7, 0.65]
    assert interval(values) == pytest.approx(4.303 * statistics.stdev(values) / math.sqrt(3))
    assert interval([0.6]) is None
    assert interval([0.0, 1.0] * 50) == pytest.approx(2.042 * statistics.stdev([0.0, 1.0] * 50) / 10)


def _run(folder, loss_type="bco", beta=0.1, auc=0.7, margin=0.5, loss=0.6):
    folder.mkdir()
    held_out = {"eval_rewards/auc": auc, "eval_rewards/margins": margin, "eval_loss": loss}
    log = [{"step": 4, "loss": 9.0, "rewards/margins": 77.0}, {"step": 4, **held_out}]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log, "global_step": 4}))
    record = {
        "model": "m", "loss_type": loss_type, "beta": beta, "reference": True, "step": 4, "held_out": held_out,
        "options": {"learning_rate": 1e-3, "seed": 0},
        "data": {"train": {"rows": 40, "up": 20, "down": 20, "source": "f.jsonl"}, "held_out": {"rows": 8, "up": 4, "down": 4}},
    }  # fmt: skip
    (folder / "run.json").write_text(json.dumps(record))


@pytest.fixture
def planned(tmp_path):
    made = []
    for beta in ("0.05", "0.1"):
        for seed in (0, 1):
            folder = tmp_path / f"{beta}-{seed}"
            _run(folder, beta=float(beta), auc=0.6 + 0.1 * seed, margin=10 * float(beta))
            made.append(Planned(folder.name, folder, {"beta": beta}, seed))
    made.append(Planned("0.1-2", tmp_path / "0.1-2", {"beta": "0.1"}, 2, problem="cannot write | (disk full)"))
    return made


def _read(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_files_of_a_sweep(tmp_path, planned):
    table, runs = write_results(tmp_path, planned)
    assert list(runs) == [plan.name for plan in planned[:4]]
    rows = _read(tmp_path / "results.csv")
    assert [row["state"] for row in rows] == ["done"] * 4 + ["failed"]
    assert rows[4]["problem"] == "cannot write | (disk full)"
    assert {"model", "data", "learning_rate", "seed", "auc_low", "margin_nats", "loss of bco"} <= rows[0].keys()
    assert [row["margin_nats"] for row in rows[:4]] == ["10.0"] * 4
    low, high = _read(tmp_path / "settings.csv")
    assert (low["beta"], low["done"], high["done"], high["runs"]) == ("0.05", "2", "2", "3")
    assert float(low["auc"]) == pytest.approx(0.65)
    assert float(low["auc ±"]) == pytest.approx(12.706 * statistics.stdev([0.6, 0.7]) / math.sqrt(2))
    assert "| 0.05 | 2 | 0.650 ± 0.64 | 0.5 ± 0 | 10 ± 0 | 0.6 ± 0 |" in table
    assert "| 0.1 | 2 of 3 |" in table
    assert "| 0.1-2 | cannot write \\| (disk full) |" in table
    assert "model m; data f.jsonl; loss type bco; learning rate 0.001; trained rows 40" in table
    plots = {path.name for path in (tmp_path / "plots").iterdir()}
    assert plots == {f"{name}.{form}" for name in ("auc", "margin_nats", "loss") for form in ("pdf", "svg")}
    assert (tmp_path / "plots/auc.pdf").read_bytes().startswith(b"%PDF")


def test_losses_of_different_objectives_are_never_in_one_column(tmp_path):
    planned = []
    for loss_type in ("bco", "kto"):
        _run(tmp_path / loss_type, loss_type=loss_type)
        planned.append(Planned(loss_type, tmp_path / loss_type, {"loss_type": loss_type}, 0))
    table, _ = write_results(tmp_path, planned)
    assert "| loss_type | runs | AUC | margin, reward units | margin, nats | loss of bco | loss of kto |" in table
    assert "| bco | 1 | 0.700 | 0.5 | 5 | 0.6 | n/a |" in table
    assert "| kto | 1 | 0.700 | 0.5 | 5 | n/a | 0.6 |" in table
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"auc", "margin_nats"}
