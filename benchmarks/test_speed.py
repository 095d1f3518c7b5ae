"""The fused head and plain PyTorch under pytest-benchmark, whose options work as usual.

    pytest benchmarks/ --benchmark-columns=median,min,max --benchmark-group-by=param:mode,param:shape
    pytest benchmarks/ --tokens 1024 --hidden 896 --vocab 32000
    pytest benchmarks/ --benchmark-autosave, then --benchmark-compare --benchmark-compare-fail=median:10%

`make test` does not come here. What one process cannot hold (peak memory, peers in their own environments) has programs
of its own in this folder. `extra_info` of the JSON has useful FLOP and bytes, and the share of the measured limits.
"""

import functools

import pytest
import torch
from contenders import Head, ours, plain
from counts import MODELS, head_bytes, head_flops, measured_limits, share_of_limit

SHAPES = {  # N, D, V, softcap: a quarter of the models' D and V
    name: (256, MODELS[name].D // 4, MODELS[name].V // 4, MODELS[name].softcap)
    for name in ("Qwen2.5-0.5B", "Llama-3.2-1B", "Gemma-2-2B")
}
CONTENDERS = {"bco_fast": ours, "PyTorch": plain}


@pytest.fixture(scope="session")
def limits():
    return measured_limits("cpu", torch.float32)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("mode", ["forward", "frozen", "trainable"])
def test_head(benchmark, limits, shape, mode, contender):
    n, d, v, softcap = shape
    head = Head((n, d, v, softcap), "cpu", torch.float32, logits="peaked", workspace_bytes=32 << 20)
    out = benchmark(functools.partial(head.step, CONTENDERS[contender](head), mode))
    assert out["logps"].isfinite().all()  # noqa: S101 - pytest
    work = {"flops": head_flops(mode, n, d, v), "bytes": head_bytes(mode, n, d, v, 4)}
    benchmark.extra_info |= {"shape": [n, d, v], "mode": mode, "contender": contender} | work | limits
    if benchmark.stats is not None:  # none with --benchmark-disable
        median = benchmark.stats.stats.median
        benchmark.extra_info["share_of_limit"] = share_of_limit(*work.values(), median, limits)
