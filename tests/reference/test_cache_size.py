"""Reading costs nothing: a million rows are found in two seconds and 100 MB."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark_module(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import cache_fill

    yield cache_fill
    for name in ("cache_fill", "common"):
        sys.modules.pop(name, None)


def test_the_benchmark_of_the_cache_runs_small(benchmark_module, monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark_module, "STORED_ROWS", 2_000)
    benchmark_module.write_million(tmp_path)
    read = benchmark_module.read_million(tmp_path)
    assert (read["rows"], read["shards"]) == (2_000, 4)
    recovery = benchmark_module.recover_million(tmp_path)
    assert 0 < recovery["rows_to_compute"] <= 512
    assert benchmark_module.hash_weights(0.01)["gb_per_s"] > 0


@pytest.mark.slow
def test_a_million_rows_are_opened_and_found_in_two_seconds_and_100_mb(benchmark_module, tmp_path):
    benchmark_module.write_million(tmp_path)
    read = benchmark_module.in_own_process(str(BENCHMARKS / "cache_fill.py"), "--case", "read", str(tmp_path))
    print(read)
    assert read["peak_mb"] <= 100
    assert read["cpu_s"] <= 2  # of the process: other programs on this machine do not count
    assert read["token_reads_per_s"] > 1_000


@pytest.mark.slow
def test_adding_a_shard_to_a_million_rows_takes_milliseconds():
    """Computing a shard takes seconds, so adding it to the sorted index must not show."""
    import time

    import numpy as np

    from bco_fast.reference.key_index import KeyIndex

    rng, index = np.random.default_rng(0), KeyIndex()
    index.add(rng.bytes(16_000_000))
    pieces = [rng.bytes(16 * 512) for _ in range(20)]
    start = time.process_time()
    for keys in pieces:
        index.add(keys)
    assert (time.process_time() - start) / len(pieces) < 0.1
    assert len(index) == 1_000_000 + 20 * 512
