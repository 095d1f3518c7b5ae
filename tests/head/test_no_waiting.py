"""A step on a GPU waits for no number and mixes no devices: everything of ours runs on the meta device, which has no numbers."""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bco_fast import RewardShift, fused_bco_loss, fused_bnf_loss
from bco_fast.head import dispatch
from bco_fast.head.backends import torch as chunked
from bco_fast.head.types import HeadInputs, HeadNeed, HeadSaved, HeadSpec, HeadWant


def test_reading_a_number_would_raise():
    with pytest.raises(RuntimeError, match="meta"):
        float(torch.ones(3, device="meta").sum())
    with pytest.raises(RuntimeError):
        torch.ones(3, device="meta") + torch.ones(3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_torch_backend(dtype):
    n, v, d = 64, 500, 32
    hidden, weight, bias = (torch.empty(s, device="meta", dtype=dtype) for s in ((n, d), (v, d), (v,)))
    targets = torch.empty(n, dtype=torch.int64, device="meta")
    for softcap, entropy, frozen in itertools.product((None, 30.0), (False, True), (False, True)):
        spec = HeadSpec(1.0, softcap, 1.0)
        inputs = HeadInputs(hidden, weight, targets, bias, spec)
        out = chunked.forward(inputs, HeadWant(entropy, frozen, mass=not frozen), 60_000)
        saved = HeadSaved(inputs, out.logps, out.row_max, out.row_sum, out.entropy, out.row_argmax)
        grads = chunked.backward(out.logps, out.entropy, saved, HeadNeed(True, True, True), 60_000)
        assert [g.dtype for g in grads] == [dtype] * 3
        assert all(g.is_meta for g in grads)


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_the_operator_without_an_ignore_index(frozen, entropy):
    """Every row counts, so none has to be found: no nonzero, no copy of the rows, no number read back."""

    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    seen: set[str] = set()
    hidden, weight = (torch.empty(s, device="meta") for s in ((8, 16), (50, 16)))
    targets = torch.empty(8, dtype=torch.int64, device="meta")

    def step(ignore_index):
        keep, inputs = dispatch.kept(targets, ignore_index), HeadInputs(hidden, weight, targets, None, HeadSpec())
        out = dispatch.forward("torch", inputs, keep, HeadWant(entropy, frozen), 1 << 20)
        saved = HeadSaved(inputs, out.logps, out.row_max, out.row_sum, out.entropy, out.row_argmax)
        return dispatch.backward(
            "torch", out.logps, out.entropy, saved, keep, HeadNeed(True, not frozen, False), 1 << 20
        )

    with Watched():
        assert step(None).hidden.is_meta
    assert "mm" in seen
    assert not seen & {"nonzero", "_local_scalar_dense", "index_select"}
    with pytest.raises(NotImplementedError, match="nonzero"):  # with rows to find it must look at the targets
        step(-100)


def test_the_drop_ins():
    shift = RewardShift()
    hidden, weight = (torch.empty(s, device="meta", requires_grad=True) for s in ((4, 9, 16), (50, 16)))
    targets, labels = (
        torch.empty(4, 9, dtype=torch.int64, device="meta"),
        torch.empty(4, dtype=torch.bool, device="meta"),
    )
    refs = torch.empty(4, device="meta")
    fused_bco_loss(hidden, weight, targets, labels, refs, delta=shift, ignore_index=None).loss.backward()
    token_refs = torch.empty(4, 9, device="meta")
    fused_bnf_loss(hidden, weight, targets, labels, token_refs, ignore_index=None).loss.backward()
    assert hidden.grad.is_meta
    assert weight.grad.is_meta
