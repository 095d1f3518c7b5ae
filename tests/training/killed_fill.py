"""Fills a cache with shards of ten rows; one rank may be killed in the middle of its third shard."""

import json
import os
import signal
import sys
from pathlib import Path

import tiny
import torch.distributed as dist
from small_runs import TOKENIZER

from bco_fast import patch_model
from bco_fast.data.tokenize import load_feedback
from bco_fast.reference import fill as filling
from bco_fast.reference.cache import ReferenceCache, ReferenceId

folder, name = Path(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo")
filling.ROWS_PER_SHARD = 10
calls, forward = 0, filling.token_logps


def counted(*args):
    global calls
    calls += 1
    if os.environ.get("KILLED_RANK") == str(dist.get_rank()) and calls > 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(*args)


filling.token_logps = counted
cache = ReferenceCache(folder / name, ReferenceId("0" * 32, "0" * 32, "float32", "sdpa"))
examples = load_feedback(str(folder / "rows.jsonl"), TOKENIZER).examples
report = filling.fill(cache, examples, patch_model(tiny.model()), tokens_per_batch=20, progress=False, lockstep=True)
computed = [None] * dist.get_world_size()
dist.all_gather_object(computed, report.computed)
if dist.get_rank() == 0:
    (folder / "computed.json").write_text(json.dumps(sum(computed)))
dist.destroy_process_group()
