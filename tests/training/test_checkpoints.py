"""Checkpoints: damage is found and named, a kill loses one save at most, and no file of them is run."""

import gc
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import Trainer

from bco_fast import FeedbackConfig, FeedbackTrainer, files
from bco_fast.training import checkpoints
from bco_fast.training.checkpoints import CheckpointError, begin, candidates, choose, commit, examine, rotate

TOKENIZER = tiny.build_tokenizer()
STATE_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")


class StockTrainer(FeedbackTrainer):
    """Saves and resumes as the Trainer does."""

    train = Trainer.train
    _save_checkpoint = Trainer._save_checkpoint
    _load_callback_state = Trainer._load_callback_state


def _trainer(folder, name="run", trainer_class=FeedbackTrainer, **options):
    config = FeedbackConfig(
        **{
            "output_dir": str(folder / name),
            "cache_dir": str(folder / "cache"),
            "max_length": 64,
            "max_steps": 4,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        | options
    )
    evaluation = tiny.rows(8, seed=5) if config.eval_strategy != "no" else None
    return trainer_class(
        tiny.model(attention_dropout=0.2), config, tiny.rows(24), evaluation, processing_class=TOKENIZER
    )


def _parameters(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def _equal(a, b):
    return all(torch.equal(tensor, b[name]) for name, tensor in a.items())


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(folder of a run of 4 steps with all its checkpoints, its parameters)"""
    folder = tmp_path_factory.mktemp("finished")
    trainer = _trainer(folder)
    trainer.train()
    return folder, _parameters(trainer)


@pytest.fixture
def run(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    return tmp_path / "run"


def _truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def _delete(path):
    path.unlink()


DAMAGE = [(name, damage) for name in STATE_FILES for damage in (_delete, _truncate)]


def _resume(folder, wanted, **options):
    """-> the trainer after training on from `wanted`, and the RuntimeWarnings it gave"""
    trainer = _trainer(folder, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.train(resume_from_checkpoint=wanted)
    return trainer, [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]


# ---- damage


@pytest.mark.parametrize(
    ("name", "damage"),
    [*DAMAGE[:2], *(pytest.param(*d, marks=pytest.mark.slow) for d in DAMAGE[2:])],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_damaged_checkpoint_gives_way_to_the_newest_whole_one(run, finished, name, damage):
    damage(run / "checkpoint-3" / name)
    shutil.rmtree(run / "checkpoint-4")
    trainer, told = _resume(run.parent, True)
    assert len(told) == 1
    assert f"checkpoint-3: {name} {'is missing' if damage is _delete else 'has'}" in told[0]
    assert "resuming from" in told[0]
    assert "checkpoint-2:" in told[0]
    assert _equal(_parameters(trainer), finished[1])


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [True, "checkpoint-4"])
@pytest.mark.parametrize(("name", "damage"), DAMAGE, ids=lambda x: getattr(x, "__name__", x))
def test_several_damaged_checkpoints(run, finished, name, damage, wanted):
    for step in (4, 2):
        damage(run / f"checkpoint-{step}" / name)
    _truncate(run / "checkpoint-3" / "manifest.json")
    trainer, told = _resume(run.parent, wanted if wanted is True else str(run / wanted))
    assert len(told) == 1
    for step in (4, 3, 2):
        assert f"checkpoint-{step}: " in told[0]
    assert _equal(_parameters(trainer), finished[1])


@pytest.mark.slow
def test_the_stock_trainer_resumes_silently_wrong(run, finished):
    """What this module is for: of the same damage, missing state files pass without a word."""
    silent = []
    for name in STATE_FILES:
        folder = run.with_name(f"without {name}")
        shutil.copytree(run / "checkpoint-2", folder / "checkpoint-2")
        (folder / "checkpoint-2" / name).unlink()
        trainer = _trainer(run.parent, folder.name, StockTrainer)
        try:
            trainer.train(resume_from_checkpoint=True)
        except (OSError, ValueError):
            continue
        silent.append(name)
        assert not _equal(_parameters(trainer), finished[1]), name
    assert silent == ["optimizer.pt", "scheduler.pt", "rng_state.pth"]


def test_one_flipped_bit_is_found_in_every_file(run):
    folder = run / "checkpoint-4"
    assert examine(folder) == (None, True)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        at = len(data) // 2
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        problem = examine(folder).problem
        assert problem is not None, path.name
        if path.name != "manifest.json":
            assert path.name in problem or "manifest.json" in problem
        path.write_bytes(data)
    assert examine(folder) == (None, True)


def _flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_one_flipped_bit_is_found_in_a_large_archive_without_a_checksum(run, monkeypatch):
    """`torch.save` gave its records checksums; what is between the records is padding that nobody reads."""
    folder = run / "checkpoint-4"
    monkeypatch.setattr(checkpoints, "ARCHIVE_SIZE", 0)
    commit(folder)
    described = json.loads((folder / "manifest.json").read_text())["files"]
    assert {name for name, file in described.items() if "crc32" not in file} >= {"optimizer.pt", "rng_state.pth"}
    assert "crc32" in described["model.safetensors"]
    assert examine(folder) == (None, True)
    path = folder / "optimizer.pt"
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = [(record.header_offset, record.file_size) for record in archive.infolist() if record.file_size]
    rng = np.random.default_rng(0)
    for start, size in records:
        header = 30 + sum(int.from_bytes(whole[start + at : start + at + 2], "little") for at in (26, 28))
        _flip(path, start + header + int(rng.integers(size)))
        assert "optimizer.pt was altered" in examine(folder).problem
        path.write_bytes(whole)
    path.write_bytes(whole[:-1])
    assert "optimizer.pt has" in examine(folder).problem


def test_a_manifest_of_the_version_before_is_read(run):
    """Schema 1 had the SHA-256 of every file."""
    folder = run / "checkpoint-4"
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, file in manifest["files"].items():
        assert re.fullmatch("[0-9a-f]{8}", file.pop("crc32"))  # they are small, so all have one
        file["sha256"] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest | {"schema": 1}))
    assert examine(folder) == (None, True)
    _flip(folder / "optimizer.pt", 5000)
    assert "optimizer.pt was altered" in examine(folder).problem
    (folder / "manifest.json").write_text(json.dumps(manifest | {"schema": 3}))
    assert "this version reads 1 and 2" in examine(folder).problem


def test_a_file_that_the_manifest_does_not_know(run):
    """A note may lie there; an adapter or a scaler from elsewhere would be loaded."""
    (run / "checkpoint-4/notes.txt").write_text("best so far")
    assert examine(run / "checkpoint-4") == (None, True)
    shutil.copy(run / "checkpoint-4/scheduler.pt", run / "checkpoint-4/scaler.pt")
    assert "scaler.pt does not belong to it" in examine(run / "checkpoint-4").problem


def test_a_folder_that_is_named_is_not_overtaken_by_a_later_one(run):
    _delete(run / "checkpoint-3/optimizer.pt")
    path, told = choose(candidates(str(run / "checkpoint-3"), run))
    assert path == run / "checkpoint-2"
    assert "checkpoint-3: optimizer.pt is missing" in told
    assert choose(candidates(str(run / "checkpoint-2"), run)) == (run / "checkpoint-2", None)


def test_no_whole_checkpoint_is_an_error_that_names_each(run):
    for step in range(1, 5):
        _truncate(run / f"checkpoint-{step}/model.safetensors")
    trainer = _trainer(run.parent)
    before = _parameters(trainer)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-4: model\.safetensors has .*checkpoint-1: model\.safetensors"
    ):
        trainer.train(resume_from_checkpoint=True)
    assert _equal(before, _parameters(trainer))
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        _trainer(run.parent, "empty").train(resume_from_checkpoint=True)
    with pytest.raises(CheckpointError, match="nowhere: there is no such folder"):
        trainer.train(resume_from_checkpoint=str(run.parent / "nowhere"))


def test_weights_without_a_state_cannot_be_resumed(tmp_path):
    _trainer(tmp_path, save_only_model=True, max_steps=1).train()
    assert examine(tmp_path / "run/checkpoint-1") == ("optimizer.pt is missing", True)


# ---- checkpoints without a manifest


def test_a_checkpoint_of_the_stock_trainer_is_taken_with_a_warning(tmp_path, finished):
    _trainer(tmp_path, trainer_class=StockTrainer, max_steps=2).train()
    assert not (tmp_path / "run/checkpoint-2/manifest.json").exists()
    _trainer(tmp_path, "whole").train()
    state = json.loads((tmp_path / "run/checkpoint-1/trainer_state.json").read_text())
    del state["stateful_callbacks"]["FeedbackState"]  # as a Trainer without our callback leaves it
    (tmp_path / "run/checkpoint-1/trainer_state.json").write_text(json.dumps(state))
    trainer, told = _resume(tmp_path, str(tmp_path / "run/checkpoint-1"))
    assert len(told) == 1
    assert "checkpoint-1 has no manifest.json: it looks complete, but it cannot be verified" in told[0]
    assert trainer.state.global_step == 4
    assert examine(tmp_path / "run/checkpoint-4") == (None, True)


@pytest.mark.parametrize(("name", "damage"), DAMAGE, ids=lambda x: getattr(x, "__name__", x))
def test_damage_is_found_without_a_manifest_too(run, name, damage):
    _delete(run / "checkpoint-4/manifest.json")
    assert examine(run / "checkpoint-4") == (None, False)
    damage(run / "checkpoint-4" / name)
    assert f"{name} {'is missing' if damage is _delete else 'cannot be read'}" in examine(run / "checkpoint-4").problem


# ---- hostile checkpoints


class _Bomb:
    def __reduce__(self):
        return Path.touch, (Path(os.environ["BOMB"]),)


def _bomb(path):
    torch.save({"state": _Bomb()}, path)


def _raw_bomb(path):
    import pickle

    path.write_bytes(pickle.dumps(_Bomb()))


def _zip_bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(50_000_000))


def _touched(path):
    path.touch()
    return path


HOSTILE = {
    f"{name}, {kind.__name__}": (name, kind)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    for kind in (_bomb, _raw_bomb)
} | {
    "zip": ("optimizer.pt", _zip_bomb),
    "nested": ("trainer_state.json", lambda path: path.write_text('{"global_step": ' + "[" * 100_000)),
    "header": ("model.safetensors", lambda path: path.write_bytes((2**63).to_bytes(8, "little") + bytes(64))),
    "huge manifest": ("manifest.json", lambda path: os.truncate(_touched(path), 200 << 20)),
    "nested manifest": ("manifest.json", lambda path: path.write_text("[" * 100_000)),
    "fifo": ("optimizer.pt", lambda path: (path.unlink(), os.mkfifo(path))),
}


@pytest.mark.parametrize("committed", [False, True], ids=["no manifest", "with a manifest of its own"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_nothing_in_a_checkpoint_is_run(run, monkeypatch, kind, committed):
    name, make = HOSTILE[kind]
    monkeypatch.setenv("BOMB", str(run / "it went off"))
    folder = run / "checkpoint-4"
    _delete(folder / "manifest.json")
    make(folder / name)
    if committed and name not in ("manifest.json", "model.safetensors") and kind != "fifo":
        commit(folder)
    tracemalloc.start()
    try:
        problem = examine(folder).problem
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert problem is not None
    assert name in problem
    assert not (run / "it went off").exists()


def test_a_pickle_bomb_does_not_go_off_when_training_goes_on(run, finished, monkeypatch):
    """training_args.bin and what else lies there are never unpickled."""
    monkeypatch.setenv("BOMB", str(run / "it went off"))
    for step, name in ((4, "optimizer.pt"), (3, "rng_state.pth"), (2, "training_args.bin")):
        _delete(run / f"checkpoint-{step}/manifest.json")
        _bomb(run / f"checkpoint-{step}" / name)
    trainer, told = _resume(run.parent, True)
    assert "checkpoint-2 has no manifest.json" in told[0]
    assert _equal(_parameters(trainer), finished[1])
    assert not (run / "it went off").exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../outside", "..\\outside", "a\0b"])
def test_a_manifest_does_not_reach_outside(run, name):
    (run / "outside").write_text("x")
    path = run / "checkpoint-4/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    path.write_text(json.dumps(manifest))
    assert "is outside the checkpoint" in examine(path.parent).problem


# ---- saving


def test_the_manifest_covers_every_file_of_every_rank_and_any_folder(tmp_path):
    """What PEFT, FSDP or several ranks leave is whatever lies there."""
    folder = tmp_path / "checkpoint-7"
    begin(folder)
    for name in ("adapter_model.safetensors", "rng_state_0.pth", "rng_state_1.pth", "optimizer_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata"):  # fmt: skip
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(name.encode())
    assert examine(folder).problem == "manifest.json is missing, because its save was cut short"
    commit(folder)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(files) == {"adapter_model.safetensors", "rng_state_0.pth", "rng_state_1.pth", "optimizer_0/__0_0.distcp", "pytorch_model_fsdp_0/.metadata"}  # fmt: skip
    assert files["rng_state_1.pth"]["bytes"] == len("rng_state_1.pth")
    assert {p.name for p in folder.iterdir() if p.name.startswith(".")} == set()
    (folder / "rng_state_1.pth").unlink()
    assert examine(folder).problem == "rng_state_1.pth is missing"


def test_everything_is_on_the_disk_before_the_manifest(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-1"
    begin(folder)
    (folder / "model.safetensors").write_bytes(b"x" * 3_000_000)
    (folder / "sub").mkdir()
    (folder / "sub/part").write_bytes(b"y")
    synced, replace = [], os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name))
    monkeypatch.setattr(os, "replace", lambda a, b: (synced.append("REPLACE"), replace(a, b)))
    commit(folder)
    before, after = synced[: synced.index("REPLACE")], synced[synced.index("REPLACE") + 1 :]
    assert {"model.safetensors", "part", "sub"} <= set(before)
    assert before[-1].endswith(".tmp")
    assert after == ["checkpoint-1"]


def test_rotation_leaves_the_new_one_and_the_best(tmp_path):
    def make(step, whole=True):
        begin(tmp_path / f"checkpoint-{step}")
        if whole:
            commit(tmp_path / f"checkpoint-{step}")

    def left():
        return {int(p.name.split("-")[1]) for p in tmp_path.iterdir()}

    for step in (9, 1, 2):  # 9 is of an older run: the time of the commit counts
        make(step)
    make(3, whole=False)
    make(4)
    rotate(tmp_path, None, [tmp_path / "checkpoint-4"])
    assert left() == {1, 2, 3, 4, 9}
    rotate(tmp_path, 4, [tmp_path / "checkpoint-4"])
    assert left() == {1, 2, 4, 9}
    rotate(tmp_path, 3, [tmp_path / "checkpoint-4"])
    assert left() == {1, 2, 4}
    rotate(tmp_path, 1, [tmp_path / "checkpoint-4", tmp_path / "checkpoint-1"])
    assert left() == {1, 4}


@pytest.mark.slow
def test_a_limit_of_one_never_leaves_less_than_one_whole_checkpoint(tmp_path, monkeypatch):
    seen = []

    def look(name):
        folders = [p for p in (tmp_path / "run").iterdir() if p.name.startswith("checkpoint-")]
        seen.append((name, sum(p.suffix != ".deleted" and examine(p).problem is None for p in folders)))

    limits, save = [], Trainer._save
    monkeypatch.setattr(
        Trainer, "_save", lambda self, *a, **k: (limits.append(self.args.save_total_limit), save(self, *a, **k))
    )
    monkeypatch.setattr(files, "failpoint", look)
    trainer = _trainer(tmp_path, save_total_limit=1)
    trainer.train()
    first = next(i for i, (name, _) in enumerate(seen) if name == "committed")
    assert all(whole >= 1 for _, whole in seen[first:])
    assert {p.name for p in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-4"}
    assert limits == [1] * 4  # what training_args.bin holds
    assert trainer.args.save_total_limit == 1


def test_a_checkpoint_is_replaced_only_by_a_whole_one(run, monkeypatch):
    """A run that starts again in the same folder: until the new checkpoint-1 is whole, the old one can be found."""
    for step in (2, 3, 4):
        shutil.rmtree(run / f"checkpoint-{step}")
    begin(run / "checkpoint-1")
    assert choose(candidates(True, run))[0].name == "checkpoint-1.replaced"
    begin(run / "checkpoint-1")  # and again after a kill
    assert choose(candidates(True, run))[0].name == "checkpoint-1.replaced"
    trainer, told = _resume(run.parent, True)
    assert "checkpoint-1: manifest.json is missing" in told[0]
    assert trainer.state.global_step == 4
    assert {p.name for p in run.glob("checkpoint-*")} >= {"checkpoint-2", "checkpoint-3", "checkpoint-4"}


class _BestAtStep2(FeedbackTrainer):
    def _eval_metrics(self, prediction):
        return super()._eval_metrics(prediction) | {"distance": abs(self.state.global_step - 2)}


def _best_at_step_2(tmp_path):
    return _trainer(
        tmp_path, trainer_class=_BestAtStep2, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="eval_distance", greater_is_better=False, save_total_limit=1,
    )  # fmt: skip


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    trainer = _best_at_step_2(tmp_path)
    trainer.train()
    best = tmp_path / "run/checkpoint-2"
    assert Path(trainer.state.best_model_checkpoint) == best
    assert examine(best) == (None, True)
    saved = load_file(best / "model.safetensors")
    for name, tensor in _parameters(trainer).items():
        assert name not in saved or torch.equal(tensor, saved[name]), name


def test_a_damaged_best_model_is_neither_loaded_nor_preferred(tmp_path, monkeypatch):
    trainer = _best_at_step_2(tmp_path)
    last, finalize = {}, trainer._finalize_training

    def damage(*args):
        last.update(_parameters(trainer))
        path = tmp_path / "run/checkpoint-2/model.safetensors"
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
        return finalize(*args)

    monkeypatch.setattr(trainer, "_finalize_training", damage)
    with pytest.warns(RuntimeWarning, match=r"model\.safetensors was altered.*stays that of the last step"):
        trainer.train()
    assert _equal(_parameters(trainer), last)
    assert examine(tmp_path / "run/checkpoint-4") == (None, True)  # the Trainer would have kept the damaged one alone


# ---- kills

DRIVER = """
import json, os, random, signal, sys, time
import torch
torch.set_num_threads(1)
sys.path[:0] = ["tests", "tests/training"]
import test_checkpoints as here
from bco_fast import files
from bco_fast.training import checkpoints
from pathlib import Path

folder, kills = Path(sys.argv[1]), json.loads(sys.argv[2])

def forked(work, meanwhile=None):
    ready, go = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
        try:
            work(go)
            code = 0
        except BaseException:
            import traceback; traceback.print_exc()
        finally:
            os._exit(code)
    os.close(go)
    if meanwhile:
        meanwhile(ready, child)
    status = os.waitpid(child, 0)[1]
    os.close(ready)
    return os.waitstatus_to_exitcode(status)

def digest(trainer):
    import hashlib
    content = hashlib.sha256()
    for name, parameter in sorted(trainer.model.named_parameters()):
        content.update(parameter.detach().numpy().tobytes())
    for state in trainer.optimizer.state_dict()["state"].values():
        content.update(state["exp_avg"].numpy().tobytes() + state["exp_avg_sq"].numpy().tobytes())
    return content.hexdigest()

OPTIONS = {"save_total_limit": 2}

def finish(name, resume):
    def work(go):
        trainer = here._trainer(folder, name, **OPTIONS)
        trainer.train(resume_from_checkpoint=resume)
        (folder / f"{name}.digest").write_text(digest(trainer))
    assert forked(work) == 0
    return (folder / f"{name}.digest").read_text()

expected = finish("whole", None)
for index, kill in enumerate(kills):
    name = f"run {index}"

    def work(go):
        calls = 0
        def at(point):
            nonlocal calls
            if point == "set aside":
                calls += 1
                if calls == kill["save"]:
                    os.write(go, b"x")
            if calls == kill["save"] and point == kill.get("point"):
                os.kill(os.getpid(), signal.SIGKILL)
        files.failpoint = at
        here._trainer(folder, name, **OPTIONS).train()

    def meanwhile(ready, child):
        if "after" in kill and os.read(ready, 1):
            time.sleep(kill["after"])
            os.kill(child, signal.SIGKILL)

    code = forked(work, meanwhile)
    found = [p for p in checkpoints.candidates(True, folder / name)]
    whole = [checkpoints._step(p) for p in found if checkpoints.examine(p).problem is None]
    import warnings
    warnings.simplefilter("ignore")
    final = finish(name, True if whole else None)
    left = sorted(p.name for p in (folder / name).glob("checkpoint-*"))
    print("RESULT", json.dumps({"kill": kill, "code": code, "whole": whole, "same": final == expected, "left": left}), flush=True)
"""

POINTS = ("set aside", "begun", "files on disk", "manifest half written", "manifest written", "committed", "renamed for deletion", "one deleted")  # fmt: skip


def _killed(tmp_path, kills):
    run = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path), json.dumps(kills)],
        capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=1000, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    results = [json.loads(line.split(" ", 1)[1]) for line in run.stdout.splitlines() if line.startswith("RESULT ")]
    assert len(results) == len(kills)
    for result in results:
        save = result["kill"]["save"]
        assert result["same"], result
        assert result["code"] == -signal.SIGKILL or "after" in result["kill"], result
        if result["code"] != 0:  # at most the save that was cut short is lost
            assert max(result["whole"], default=0) >= save - 1, result
        assert result["left"] == ["checkpoint-3", "checkpoint-4"], result
    return results


def _killed_at(tmp_path, points):
    results = _killed(tmp_path, [{"save": 3, "point": point} for point in points])
    newest = {result["kill"]["point"]: max(result["whole"]) for result in results}
    assert newest == {point: 2 if POINTS.index(point) < POINTS.index("manifest written") else 3 for point in points}


@pytest.mark.slow
def test_a_kill_at_every_step_of_a_save(tmp_path):
    _killed_at(tmp_path, POINTS)


@pytest.mark.slow
def test_50_kills_at_random_moments_of_a_save(tmp_path):
    import random

    rng = random.Random(0)  # noqa: S311
    kills = [{"save": rng.randint(1, 4), "after": rng.uniform(0, 0.03)} for _ in range(50)]
    results = _killed(tmp_path, kills)
    cut = sum(result["code"] == -signal.SIGKILL for result in results)
    assert cut >= 45  # the others had finished
    assert len({tuple(result["whole"]) for result in results}) > 3


# ---- ranks


def _rank(rank, port, folder, results):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
    torch.set_num_threads(1)
    options = {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    whole = _trainer(folder, **options)
    whole.train()
    expected = _parameters(whole)
    del whole
    gc.collect()  # DDP's reducer must go before its process group
    torch.distributed.barrier()
    if rank == 0:
        _truncate(folder / "run/checkpoint-4/rng_state_1.pth")
        _delete(folder / "run/checkpoint-3/rng_state_0.pth")
    torch.distributed.barrier()
    trainer, told = _resume(folder, True, **options)
    results[rank] = json.dumps({"same": _equal(expected, _parameters(trainer)), "told": told})
    torch.distributed.barrier()
    for step in range(1, 5):
        (folder / f"run/checkpoint-{step}/optimizer.pt").unlink(missing_ok=True)
    torch.distributed.barrier()
    try:
        trainer.train(resume_from_checkpoint=True)
    except CheckpointError as error:
        results[f"error {rank}"] = str(error)
    del trainer
    gc.collect()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_agree_on_the_checkpoint(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with torch.multiprocessing.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_rank, args=(port, tmp_path, results), nprocs=2)
        results = dict(results)
    first, second = json.loads(results[0]), json.loads(results[1])
    assert first["same"]
    assert second["same"]
    assert second["told"] == []
    assert len(first["told"]) == 1
    assert "checkpoint-4: rng_state_1.pth has" in first["told"][0]
    assert "checkpoint-3: rng_state_0.pth is missing" in first["told"][0]
    assert results["error 0"] == results["error 1"]
    files = json.loads((tmp_path / "run/checkpoint-2/manifest.json").read_text())["files"]
    assert {"rng_state_0.pth", "rng_state_1.pth", "model.safetensors", "optimizer.pt"} <= set(files)


def test_another_number_of_processes_is_told(run):
    folder = run / "checkpoint-4"
    begin(run / "checkpoint-5")
    shutil.copytree(folder, run / "checkpoint-5", dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
    os.replace(run / "checkpoint-5/rng_state.pth", run / "checkpoint-5/rng_state_0.pth")
    shutil.copy(run / "checkpoint-5/rng_state_0.pth", run / "checkpoint-5/rng_state_1.pth")
    commit(run / "checkpoint-5")
    _, told = _resume(run.parent, True)
    assert len(told) == 1
    assert "saved by another number of processes than 1" in told[0]
