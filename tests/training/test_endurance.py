"""Long runs and killed ones: memory stays, and a run killed again and again ends like one that was not.

In a plain `make test-all` fewer kills are tried; BCO_FAST_KILLS=40 tries as many of each kind.
"""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_runs
from transformers import TrainerCallback

KILLS = int(os.environ.get("BCO_FAST_KILLS", "0"))

DRIVER = """
import json, os, random, shutil, signal, sys, time
import torch
torch.set_num_threads(1)
sys.path[:0] = ["tests", "tests/training"]
import kills
from pathlib import Path

folder, kind, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])

def forked(name, resume, seconds=None):
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 1
        try:
            kills.train(folder / name, kind, resume)
            code = 0
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        try:
            os.kill(child, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

begin = time.perf_counter()
assert forked("whole", False) == 0
duration = time.perf_counter() - begin
whole, rng, killed, chains, wrong = kills.end(folder / "whole"), random.Random(0), 0, 0, []
while killed < count:
    name, chains = f"chain {chains}", chains + 1
    for _ in range(4):
        code = forked(name, kills.resumable(folder / name), rng.uniform(0, duration))
        assert code in (0, -signal.SIGKILL), code
        killed += code != 0
        if code == 0:
            break
    else:
        assert forked(name, kills.resumable(folder / name)) == 0
    if (problem := kills.differences(whole, kills.end(folder / name))):
        wrong.append([name, problem])
    shutil.rmtree(folder / name)
print(json.dumps({"killed": killed, "chains": chains, "wrong": wrong}))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["lora", "kto", "online"])
def test_killed_runs_end_like_one_that_was_not(tmp_path, kind, record_property):
    count = KILLS or (8 if kind == "online" else 12)
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path), kind, str(count)],
        capture_output=True, text=True, cwd=root, timeout=2500, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    record_property("figure", f"{found['killed']} kills in {found['chains']} chains")
    assert found["wrong"] == []
    assert found["killed"] >= count


@pytest.mark.slow
def test_2000_steps_leave_no_more_behind_than_500(tmp_path, record_property):
    """Objects and descriptors stay as many; what memory grows by is the allocator's, a few MB in all."""
    import psutil

    process, seen = psutil.Process(), {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % 500 == 0:
                gc.collect()
                seen[state.global_step] = len(gc.get_objects()), process.num_fds(), process.memory_info().rss

    options = {"save_strategy": "steps", "save_steps": 250, "save_total_limit": 1, "logging_steps": 2000}
    made = small_runs.trainer(tmp_path, max_steps=2000, learning_rate=1e-4, **options)
    made.add_callback(Watch())
    made.train()
    (objects, descriptors, _), (_, _, middle), (later_objects, later_descriptors, end) = (
        seen[step] for step in (500, 1000, 2000)
    )
    record_property("figure", f"{(end - middle) / 1000 / 1024:.1f} kB a step in the second half of 2,000")
    assert later_descriptors == descriptors
    assert abs(later_objects - objects) < 200
    assert end - middle < 16 << 20
