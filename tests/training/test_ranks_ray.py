"""examples/ray_train.py on two local workers, one of which dies. Needs ray: make test-ranks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from small_runs import TOKENIZER

TESTS = Path(__file__).parents[1]
SCRIPT = """
import os, signal, sys
import ray, ray_train, transformers
from bco_fast import FeedbackTrainer

folder = sys.argv[1]
plain = ray_train.train_one_worker

def dying(settings):
    class Die(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3 and args.process_index == 1 and not os.path.exists(f"{folder}/died"):
                open(f"{folder}/died", "w").close()
                os.kill(os.getpid(), signal.SIGKILL)

    class Dying(FeedbackTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.add_callback(Die())

    plain.__globals__["FeedbackTrainer"] = Dying  # of the copy that Ray has sent to this worker
    plain(settings)

ray_train.train_one_worker = dying
ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20)
result = ray_train.main(["--model", f"{folder}/model", "--data", f"{folder}/rows.jsonl", "--output_dir", f"{folder}/out", "--max_length", "64", "--max_steps", "4", "--save_steps", "1"])
assert result.error is None
assert result.checkpoint is not None
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_run_whose_worker_dies_goes_on(tmp_path):
    pytest.importorskip("ray", reason="needs Ray: make test-ranks")
    tiny.model().save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    tiny.write(tmp_path / "rows.jsonl", tiny.rows(40))
    (tmp_path / "run.py").write_text(SCRIPT)
    paths = [str(TESTS.parent / "examples"), str(TESTS), str(TESTS.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(tmp_path / "run.py"), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=380)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "died").exists()
    assert (tmp_path / "out/checkpoint-4/manifest.json").exists()
    assert (tmp_path / "out/final/model.safetensors").exists()
