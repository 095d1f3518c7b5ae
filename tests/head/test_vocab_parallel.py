"""A vocabulary sharded over ranks gives what one process gives: outputs, and the gradients of every shard."""

import pytest
import ranks
import torch
import torch.distributed as dist
from heads import OPTIONS, Case, case, fused_call, relative_error, run

SHARDS = {2: [600, 400], 3: [300, 1, 699]}


def _run(made: Case, weight, bias, backend, group):
    leaves = {"hidden": made.hidden.float(), "weight": weight.float(), "bias": None if bias is None else bias.float()}
    leaves = {k: t.clone().requires_grad_() for k, t in leaves.items() if t is not None}
    on_rank = Case(leaves["hidden"], leaves["weight"], made.targets, leaves.get("bias"), options=made.options)
    entropy = made.upstream_entropy is not None
    out = fused_call(on_rank, backend, entropy, process_group=group, workspace_bytes=200_000)
    results = {"logps": out[0], "entropy": out[1]} if entropy else {"logps": out}
    total = (results["logps"] * made.upstream).sum()
    if entropy:
        total = total + (results["entropy"] * made.upstream_entropy).sum()
    total.backward()
    return {k: t.detach() for k, t in results.items()} | {f"d_{k}": t.grad for k, t in leaves.items()}


def _cases():
    for options in OPTIONS:
        yield case(40, 1000, 24, bias=options == "everything", entropy=options == "everything", options=options)
    masked = case(40, 1000, 24, bias=True, entropy=True)
    masked.bias[:650] = float("-inf")  # whole shards of it
    masked.targets[masked.targets >= 0] = 650 + masked.targets[masked.targets >= 0] % 350
    yield masked
    yield case(5, 1000, 24, ignored=1.1)
    yield case(5, 1000, 24, zeros=1.1)


def _results_of_rank(rank, world):
    found = {}
    first = sum(SHARDS[world][:rank])
    own = slice(first, first + SHARDS[world][rank])
    for backend in ("torch", "triton", "triton fold"):
        for number, made in enumerate(_cases()):
            bias = None if made.bias is None else made.bias[own]
            results = _run(made, made.weight[own], bias, backend, dist.group.WORLD)
            found[f"{backend} {number}"] = results
    errors = []
    for targets in ([3, 1000], [-5, 3]):
        try:
            fused_call(
                Case(torch.ones(2, 4), torch.ones(own.stop - own.start, 4), torch.tensor(targets)),
                "torch",
                False,
                process_group=dist.group.WORLD,
            )
        except IndexError as error:
            errors.append(str(error))
    return found, errors


@pytest.mark.parametrize("world", SHARDS)
def test_ranks_equal_one_process(tmp_path, world):
    per_rank = ranks.run(_results_of_rank, world, tmp_path)
    truths = [run(made, "reference", torch.float64) for made in _cases()]
    for _, errors in per_rank:
        assert "targets[1] is 1000: outside the vocabulary [0, 1000)" in errors[0]
        assert "targets[0] is -5" in errors[1]
    for backend in ("torch", "triton", "triton fold"):
        for number, truth in enumerate(truths):
            shards = [found[f"{backend} {number}"] for found, _ in per_rank]
            for name, expected in truth.items():
                if name in ("d_weight", "d_bias"):
                    assert relative_error(torch.cat([p[name] for p in shards]), expected) < 3e-6, (
                        backend,
                        number,
                        name,
                    )
                    continue
                for p in shards:
                    assert relative_error(p[name], expected) < 3e-6, (backend, number, name)
                    assert torch.equal(p[name], shards[0][name])


def test_the_reference_backend_takes_no_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="holds the whole vocabulary"):
            run(case(2, 5, 4), "reference", torch.float32, process_group=dist.group.WORLD)
        alone = run(case(9, 50, 8, entropy=True), "torch", torch.float32, process_group=dist.group.WORLD)
        plain = run(case(9, 50, 8, entropy=True), "torch", torch.float32)
        for name, tensor in plain.items():
            assert relative_error(alone[name], tensor) < 1e-6, name
    finally:
        dist.destroy_process_group()
