"""Nothing that was trained before is lost or rewritten, unless the user says so."""

import json

import pytest
import tiny
from small_runs import TOKENIZER, trainer

from bco_fast import cli
from bco_fast.evaluation.run_reading import load_run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny.model().save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    tiny.write(folder / "data.jsonl", tiny.rows(40))
    assert _train(folder) == 0
    return folder


def _train(folder, output="out", **options):
    options = {
        "model": folder / "model", "data": folder / "data.jsonl", "output_dir": folder / output, "max_steps": 3,
        "cache_dir": folder / "cache", "max_length": 64, "save_steps": 2, "use_cpu": "true", "disable_tqdm": "true",
    } | options  # fmt: skip
    return cli.main(["train", *(f"--{name}={value}" for name, value in options.items())])


def _contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def _error(capfd):
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("bco-fast: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_the_same_folder_again_is_refused_with_the_two_ways_to_go(world, capfd):
    before = _contents(world / "out")
    assert _train(world, beta=0.3) == 2
    error = _error(capfd)
    for word in ("holds a finished run", "--resume_from_checkpoint true", "--overwrite_output_dir true"):
        assert word in error
    assert _contents(world / "out") == before


def test_resuming_with_other_options_is_refused_and_rewrites_nothing(world, capfd):
    before = _contents(world / "out")
    assert _train(world, resume_from_checkpoint="true", beta=0.3, learning_rate=1e-3, max_steps=2) == 2
    error = _error(capfd)
    for word in ("beta was 0.1 and is 0.3", "learning_rate was 5e-06 and is 0.001", "max_steps was 3 and is 2"):
        assert word in error
    assert _contents(world / "out") == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("checkpoint-7/trainer_state.json", "an interrupted run, up to checkpoint-7"),
        ("rounds/round-00000.jsonl", "rounds of an online run"),
        ("model.safetensors", "a model (model.safetensors)"),
        ("adapter_model.safetensors", "a model (adapter_model.safetensors)"),
    ],
)
def test_whatever_is_there_is_named(world, tmp_path, capfd, name, words):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    assert _train(world, output=tmp_path) == 2
    assert words in _error(capfd)
    assert path.read_text() == "x"


def test_a_folder_with_other_files_is_used(world, tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    assert _train(world, output=tmp_path, max_steps=1) == 0


def test_overwriting_leaves_nothing_of_the_earlier_run(world, tmp_path, capfd):
    assert _train(world, output=tmp_path, save_steps=1, max_steps=4, beta=0.5) == 0
    (tmp_path / "notes.txt").write_text("x")
    assert _train(world, output=tmp_path, overwrite_output_dir="true", save_steps=3) == 0
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {"checkpoint-3"}
    assert json.loads((tmp_path / "run.json").read_text())["beta"] == 0.1
    assert (tmp_path / "notes.txt").is_file()
    assert load_run(tmp_path).history[-1]["step"] == 3


def test_a_mistake_overwrites_nothing(world, capfd):
    before = _contents(world / "out")
    assert _train(world, overwrite_output_dir="true", beta=-1) == 2
    assert _train(world, overwrite_output_dir="true", model="./nowhere") == 2
    assert _train(world, overwrite_output_dir="true", max_length=65) == 2
    assert _contents(world / "out") == before


def test_a_run_from_python_is_whole(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=3)
    run.train()
    run.save_model()
    found = load_run(tmp_path / "out")
    assert not [note for note in found.left_out if "interrupted" in note]
    assert found.history[-1]["step"] == 4
    run.evaluate()
    assert load_run(tmp_path / "out").last("eval_rewards/auc") is not None


def test_an_interrupted_run_from_python_is_said_to_be_one(tmp_path):
    run = trainer(tmp_path, save_strategy="steps", save_steps=2)
    real = run.training_step

    def training_step(*args, **kwargs):
        if run.state.global_step == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    run.training_step = training_step
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert "checkpoint-2: the run has not ended, or was interrupted" in " ".join(load_run(tmp_path / "out").left_out)


def test_python_is_warned(tmp_path, caplog):
    trainer(tmp_path).train()
    trainer(tmp_path).train()
    assert [r.message for r in caplog.records if "holds a finished run, which this run replaces" in r.message]
