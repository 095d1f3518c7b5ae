"""A training step reads no number back from the device, searches nothing there, and copies nothing to it but the batch.

The whole step of every objective runs on the meta device under a dispatch mode that raises on what would make a GPU wait:
meta tensors have shapes and devices but no values. The transformer is a stand-in, because a library's own masks wait.
"""

import contextlib

import pytest
import tiny
import torch
from small_runs import FIRST, TOKENIZER, config, slow_but
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bco_fast import FeedbackTrainer
from bco_fast.losses import OBJECTIVES
from bco_fast.models.patch import HeadOutput

WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "item", "masked_select", "unique", "_unique2"}


class Watch(TorchDispatchMode):
    """Raises where a step on a GPU would wait for a number, or copy one to it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        on_device = any(a.is_meta for a in tensors)
        masked = name == "index" and any(getattr(i, "dtype", None) == torch.bool for i in args[1])
        if on_device and (name in WAITS or masked):
            raise AssertionError(f"{func} makes the host wait")
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.is_meta and name in ("_to_copy", "copy_"):
            assert all(a.is_meta for a in tensors), f"{func} copies from the CPU"
        return out


def test_the_watch_sees_what_it_must():
    values = torch.ones(3, device="meta")
    for wait in (
        lambda: values.nonzero(),
        lambda: values[values > 0],
        lambda: values.sum().item(),
        lambda: bool(values.any()),
        lambda: torch.ones(3).to("meta"),
        lambda: values.copy_(torch.ones(3)),
    ):
        with Watch(), pytest.raises((AssertionError, RuntimeError)):
            wait()
    with Watch():  # numbers of the host, and scalars that kernels take as arguments
        torch.where(values > 0, 1.0, 2.0).sum()
        values * torch.tensor(2.0)
        float(torch.ones(3).sum())


class Trunk(nn.Module):
    """Stands in for a transformer: its head is ours, everything before it an embedding."""

    def __init__(self, vocabulary):
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocabulary, 16), nn.Linear(16, vocabulary, bias=False)

    def run(self, batch, return_entropy=False):
        from bco_fast import fused_linear_logps

        hidden = self.embedding(batch["input_ids"]).flatten(0, 1).index_select(0, batch["rows"])
        out = fused_linear_logps(hidden, self.head.weight, batch["targets"], ignore_index=None, return_entropy=return_entropy)  # fmt: skip
        return HeadOutput(out[0], out[1].detach(), None) if return_entropy else HeadOutput(out, None, None)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("name", slow_but(OBJECTIVES, (*FIRST, "bnf", "una_score", "aot", "simpo")))
def test_a_step_waits_for_nothing(name, packed, tmp_path, monkeypatch):
    by_tokens = packed and not OBJECTIVES[name].batchwise
    options = {
        "padding_free": packed,
        **({"tokens_per_batch": 32} if by_tokens else {"per_device_train_batch_size": 4}),
    }
    trainer = FeedbackTrainer(
        tiny.model(),
        config(tmp_path, loss_type=name, gradient_accumulation_steps=2, **options),
        tiny.feedback_for(name, 24),
        processing_class=TOKENIZER,
    )
    trunk = Trunk(len(TOKENIZER)).to("meta")
    for module in ("bco_fast.training.trainer.forward_logps", "bco_fast.models.patch.forward_logps"):
        monkeypatch.setattr(module, lambda model, batch, **options: trunk.run(batch, **options))
    monkeypatch.setattr(type(trainer.args), "device", torch.device("meta"))
    monkeypatch.setattr(trainer, "compute_loss_context_manager", contextlib.nullcontext)
    loader = iter(trainer.get_train_dataloader())
    optimizer = torch.optim.SGD(trunk.parameters(), lr=0.1)
    for watch in (contextlib.nullcontext(), Watch(), Watch()):  # the first step moves δ to its device, once
        batches = [trainer._prepare_input(batch) for batch in (next(loader), next(loader))]  # the batch's own transfer
        assert all(value.is_meta for batch in batches for value in batch.values() if isinstance(value, torch.Tensor))
        with watch:
            batches, step = trainer.get_batch_samples(iter(batches), 2, trainer.args.device)
            for batch in batches:
                loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=step)
                assert loss.is_meta
                loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(trunk.parameters(), 1.0)
            trainer.finite.gradient(norm, 1)
            optimizer.step()
            optimizer.zero_grad()
            trainer.feedback.on_step_end(trainer.args, trainer.state, trainer.control)
    assert trainer.feedback._sums.is_meta
    with Watch():
        _, columns, labels = trainer.prediction_step(trainer.model, batch, prediction_loss_only=False)
    assert columns.is_meta
    assert labels.is_meta
