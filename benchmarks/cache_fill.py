"""The reference cache: how fast it is filled, opened, read, and repaired after a crash.

    python benchmarks/cache_fill.py --data feedback.jsonl                       a few minutes on two cores
    python benchmarks/cache_fill.py ... --peer-python .venv-peers-trl-1.16/bin/python      and against TRL's precompute

Filling: a Llama of 20M parameters with V = 32000 in float32, real feedback of at most 512 tokens; the time is that of
`fill` on an empty cache, shards synced to the disk. TRL computes the same token ids in an environment of its own, and
takes turns with ours; tokens are those of prompt and completion without padding. Reading: a cache of a million rows.
Results in results/cache.json.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
from common import in_own_process, peak_rss, reset_peak_rss, save, summary, table

PEER = Path(__file__).with_name("peer_precompute.py")
ROWS, MAX_LENGTH = 96, 512
STORED_ROWS, STORED_TOKENS, STORED_ROWS_PER_SHARD = 1_000_000, 40, 512


class Peer:
    """TRL in its own environment, answering one precompute at a time."""

    def __init__(self, python: str, folder: Path):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [python, PEER, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "peer.log").open("w"),
            text=True,
            env=environment,
        )
        self.version = self._answer(folder)["trl"]
        self.folder = folder

    def _answer(self, folder: Path) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the peer failed:\n{(folder / 'peer.log').read_text()[-3000:]}")
        return json.loads(line)

    def precompute(self, batch_size: int) -> dict:
        self.process.stdin.write(f"{batch_size}\n")
        self.process.stdin.flush()
        return self._answer(self.folder)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)


def fill_rows(data: Path, rounds: int, peer_python: str | None) -> list[dict]:
    """Tokens a second of `fill`, and of TRL's precompute at its default and at larger batches."""
    from train_step import VOCABULARY, build_model

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from tiny import byte_pair_tokenizer

    from bco_fast.data.tokenize import load_feedback
    from bco_fast.models.patch import patch_model
    from bco_fast.reference.cache import ReferenceCache
    from bco_fast.reference.fill import fill
    from bco_fast.reference.identity import reference_id

    tokenizer = byte_pair_tokenizer(data, VOCABULARY)
    records = [json.loads(line) for line in data.read_text().splitlines()[:ROWS]]
    examples = load_feedback(records, tokenizer, max_length=MAX_LENGTH).examples
    examples = list({example.key: example for example in examples}.values())
    model = build_model()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        model.save_pretrained(folder / "model")
        tokenizer.save_pretrained(folder / "model")
        split = [
            (e.input_ids[: e.completion_start].tolist(), e.input_ids[e.completion_start :].tolist()) for e in examples
        ]
        (folder / "rows.json").write_text(json.dumps(split))
        patch_model(model)
        name = reference_id(model)
        sums: dict[str, np.ndarray] = {}

        def ours() -> float:
            shutil.rmtree(folder / "cache", ignore_errors=True)
            cache = ReferenceCache(folder / "cache", name)
            report = fill(cache, examples, model, progress=False)
            sums["ours"] = cache.sums([example.key for example in examples])
            return report.seconds

        cases = {"ours": ours}
        if peer_python:
            peer = Peer(peer_python, folder)

            def precompute(batch_size: int, case: str) -> float:
                answer = peer.precompute(batch_size)
                sums[case] = np.array(answer["sums"])
                return answer["seconds"]

            for batch_size in (8, 32):
                case = f"TRL {peer.version}, batches of {batch_size}"
                cases[case] = lambda batch_size=batch_size, case=case: precompute(batch_size, case)
        times: dict[str, list[float]] = {case: [] for case in cases}
        for turn in range(rounds + 1):
            for case, measure in cases.items():
                seconds = measure()
                if turn:  # the first is a warm-up
                    times[case].append(seconds)
        if peer_python:
            peer.close()
    tokens = sum(map(len, examples))
    medians = {case: summary(seconds)["median_s"] for case, seconds in times.items()}
    return [
        {
            "benchmark": "cache_fill",
            "case": case,
            **{"rows": len(examples), "tokens": tokens, "V": VOCABULARY, "max_length": MAX_LENGTH},
            **summary(seconds),
            "tokens_per_s": round(tokens / medians[case]),
            # of turns next to each other, because a shared machine is not equally fast for minutes
            "speed_of_ours": round(statistics.median(a / b for a, b in zip(seconds, times["ours"], strict=True)), 3),
            "speed_of_ours_at_best": round(min(seconds) / min(times["ours"]), 3),
            "largest_difference_of_sums": float(np.abs(sums[case] - sums["ours"]).max()),
        }
        for case, seconds in times.items()
    ]


def _reference():
    from bco_fast.reference.cache import ReferenceId

    return ReferenceId("benchmark", "c", "float32", "sdpa")


def write_million(folder: Path) -> None:
    """A cache of a million rows of a few random values each."""
    from bco_fast.reference.cache import ReferenceCache

    rng = np.random.default_rng(0)
    cache = ReferenceCache(folder, _reference())
    with mock.patch.object(os, "fsync"):  # waiting for a disk is not what is measured
        for first in range(0, STORED_ROWS, STORED_ROWS_PER_SHARD):
            rows = min(STORED_ROWS_PER_SHARD, STORED_ROWS - first)
            values = rng.normal(-2, 1, (rows, STORED_TOKENS)).astype(np.float32)
            cache.write_shard(stored_keys(first, rows), list(values))
        cache.settle()


def stored_keys(first: int, rows: int) -> list[bytes]:
    return [hashlib.blake2b(n.to_bytes(8, "little"), digest_size=16).digest() for n in range(first, first + rows)]


def read_million(folder: Path) -> dict:
    """Seconds and resident memory of opening the cache and of looking up every row in random order."""
    from bco_fast.reference.cache import ReferenceCache

    reference, rng = _reference(), np.random.default_rng(0)
    keys = [stored_keys(n, 1)[0] for n in rng.permutation(STORED_ROWS).tolist()]
    before = reset_peak_rss()
    start, cpu = time.perf_counter(), time.process_time()
    cache = ReferenceCache(folder, reference)
    opened = time.perf_counter()
    cache_rss = peak_rss() - before
    sums = cache.sums(keys)
    looked_up, cpu = time.perf_counter(), time.process_time() - cpu
    if np.isnan(sums).any():
        raise RuntimeError("a row is missing")
    peak = peak_rss() - before
    some = keys[:20_000]
    for key in some:
        cache.token_logps(key)
    read = time.perf_counter()
    del sums
    return {
        "rows": STORED_ROWS,
        "shards": len(cache.shards),
        "open_s": round(opened - start, 3),
        "lookup_s": round(looked_up - opened, 3),
        "open_and_lookup_s": round(looked_up - start, 3),
        "cpu_s": round(cpu, 3),
        "peak_open_mb": round(cache_rss / 1e6, 1),
        "peak_mb": round(peak / 1e6, 1),
        "resident_mb": round((reset_peak_rss() - before) / 1e6, 1),
        "token_reads_per_s": round(len(some) / (read - looked_up)),
    }


def recover_million(folder: Path) -> dict:
    """Seconds from the start of a process until it computes again, after a crash tore a shard and lost the manifest."""
    import warnings

    from bco_fast.reference.cache import MANIFEST, ReferenceCache

    place = folder / _reference().digest
    torn = next(place.glob("shard-*"))
    torn.write_bytes(torn.read_bytes()[:-100])
    (place / MANIFEST).unlink()
    warnings.simplefilter("ignore")
    keys = stored_keys(0, STORED_ROWS)
    start = time.perf_counter()
    cache = ReferenceCache(folder, _reference())
    opened = time.perf_counter()
    cache.drop_damaged(keys)
    verified = time.perf_counter()
    missing = int((cache.find(keys)[:, 0] < 0).sum())
    cache.make_plan(keys, rows_per_shard=STORED_ROWS_PER_SHARD, tokens_per_batch=8192)
    done = time.perf_counter()
    return {
        "rows": STORED_ROWS,
        "rows_to_compute": missing,
        "open_s": round(opened - start, 3),
        "verify_every_value_s": round(verified - opened, 3),
        "recovery_s": round(done - start, 3),
    }


def hash_weights(gigabytes: float = 2.0) -> dict:
    """Speed of `reference_id` on weights in memory."""
    import torch

    from bco_fast.reference.identity import _digest

    weights = {str(i): torch.randn(int(gigabytes * 1e9 / 4 / 8)) for i in range(8)}
    start = time.perf_counter()
    _digest(weights)
    seconds = time.perf_counter() - start
    return {"gb": gigabytes, "seconds": round(seconds, 3), "gb_per_s": round(gigabytes / seconds, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).parents[2] / "shared" / "data" / "alpaca_eval_feedback.jsonl"
    parser.add_argument("--data", type=Path, default=default, help="feedback, JSONL")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-python", help="interpreter of an environment with TRL; left out without it")
    parser.add_argument("--case", nargs=2, metavar=("NAME", "FOLDER"), help="one case in this process; print its JSON")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    if options.case:
        name, folder = options.case
        print(json.dumps({"read": read_million, "recover": recover_million}[name](Path(folder))))
        return
    if not options.data.is_file():
        parser.error(f"--data {options.data}: no such file")
    rows = fill_rows(options.data, options.rounds, options.peer_python)
    with tempfile.TemporaryDirectory() as root:
        write_million(Path(root))
        rows.append(
            {"benchmark": "cache_read", "case": "a million rows", **in_own_process(__file__, "--case", "read", root)}
        )
        rows.append(
            {
                "benchmark": "cache_recovery",
                "case": "after a crash",
                **in_own_process(__file__, "--case", "recover", root),
            }
        )
    rows.append({"benchmark": "reference_id", "case": "hash of the weights", **hash_weights()})
    print(f"\n{save('cache', rows)}")
    print(
        table(
            [r for r in rows if "tokens_per_s" in r],
            ["case", "median_s", "min_s", "max_s", "tokens_per_s", "speed_of_ours", "speed_of_ours_at_best"],
        )
    )
    for row in rows:
        if "tokens_per_s" not in row:
            print(json.dumps(row))


if __name__ == "__main__":
    main()
