"""Liger's kernels in the layers: who gets them, and that they compute the same, in Triton's interpreter without a GPU."""

import importlib
import importlib.metadata
import json

import families
import pytest
import tiny
import torch
from small_runs import TOKENIZER, config

from bco_fast import FeedbackTrainer, patch_model
from bco_fast.models.liger import use_liger
from bco_fast.models.patch import completion_logps

CPU = torch.device("cpu")


@pytest.fixture
def installed(monkeypatch):
    """Where Triton's interpreter falls short of Liger's kernels: scalars are Python floats without `.to`, and libdevice's
    rsqrt is not there."""
    pytest.importorskip("liger_kernel", reason="needs liger-kernel: pip install 'bco_fast[gpu]'")
    import liger_kernel.ops.rms_norm as norms
    from triton.runtime import interpreter

    class Scalar(float):
        def to(self, dtype):
            return self

    convert = interpreter._implicit_cvt
    monkeypatch.setattr(interpreter, "_implicit_cvt", lambda a: Scalar(a) if type(a) is float else convert(a))
    monkeypatch.setattr(norms, "rsqrt", lambda x: 1.0 / norms.tl.sqrt(x))
    for kind in ("llama", "gemma3"):  # Liger replaces functions of these modules for good
        module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
        for name in [n for n in vars(module) if n.startswith("apply_") or n.endswith(("RMSNorm", "MLP"))]:
            monkeypatch.setattr(module, name, getattr(module, name))


def _batch():
    return {"input_ids": torch.arange(2, 14)[None], "targets": torch.arange(12)[None]}


def test_off_by_default_without_a_gpu_and_by_flag():
    model = tiny.model()
    for wanted, device in (("auto", CPU), ("false", torch.device("cuda"))):
        assert use_liger(model, wanted, None, device) == []


def test_what_is_missing_is_said(monkeypatch, caplog):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ValueError, match="liger: liger-kernel is not installed"):
        use_liger(tiny.model(), "true", None, CPU)
    caplog.set_level("INFO", logger="bco_fast")
    assert use_liger(tiny.model(), "auto", None, torch.device("cuda")) == []
    assert "Liger: off, liger-kernel is not installed" in caplog.text
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.7.9")
    with pytest.raises(ValueError, match=r"liger-kernel 0.7.9 is older than 0.8"):
        use_liger(tiny.model(), "true", None, CPU)


def test_config_of_ligers_head_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: object())  # as where liger-kernel is installed
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    args = config(tmp_path, use_liger_kernel=True, liger_kernel_config={"rope": False})
    assert (args.liger, args.use_liger_kernel, args.liger_kernel_config) == ("true", False, {"rope": False})
    with pytest.raises(ValueError, match="the head is bco_fast's own"):
        config(tmp_path, liger_kernel_config={"fused_linear_cross_entropy": True})
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="liger needs a GPU"):
        config(tmp_path, liger="true")


@pytest.mark.parametrize(("family", "options"), [("llama", None), ("gemma3", {"geglu": False})])
def test_layers_are_replaced_and_compute_the_same(family, options, installed):
    model = patch_model(tiny.model() if family == "llama" else families.multimodal(family))
    results = []
    for wanted in ("false", "true"):
        model.zero_grad()
        replaced = use_liger(model, wanted, options, CPU)
        logps = completion_logps(model, _batch())
        logps.sum().backward()
        results.append([logps.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert {"rms_norm", "rope"} <= set(replaced)
    text = model.get_decoder()
    assert "Liger" in text.layers[0].input_layernorm._get_name()
    assert not any("Liger" in m._get_name() for name, m in model.named_modules() if "vision" in name)
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(ours.abs().max()))


def test_what_computes_otherwise_is_refused(installed, monkeypatch):
    import liger_kernel.transformers.monkey_patch as liger

    def missing(model):
        raise ImportError("no such name")

    def broken(model, rms_norm=True):
        model.model.norm.weight.data.mul_(2.0)

    monkeypatch.setitem(liger.MODEL_TYPE_TO_APPLY_LIGER_FN, "llama", broken)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM computes other log-probabilities.*set liger=false"):
        use_liger(patch_model(tiny.model()), "true", None, CPU)
    with pytest.raises(ValueError, match="Liger has no nope for llama"):
        use_liger(patch_model(tiny.model()), "true", {"nope": True}, CPU)
    monkeypatch.setitem(liger.MODEL_TYPE_TO_APPLY_LIGER_FN, "llama", missing)
    with pytest.raises(ValueError, match="does not import: no such name"):
        use_liger(patch_model(tiny.model()), "true", None, CPU)


def test_a_run_records_what_it_used(installed, tmp_path):
    chosen = {"rms_norm": False}  # hundreds of rows, each a program of the interpreter
    args = config(
        tmp_path,
        liger="true",
        liger_kernel_config=chosen,
        max_steps=1,
        mlp_chunk_tokens=8,
        per_device_train_batch_size=2,
    )
    trainer = FeedbackTrainer(tiny.model(), args, tiny.rows(2), processing_class=TOKENIZER)
    trainer.train()
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["liger"] == ["rope"]  # MLPs run in chunks and stay what they are
    assert record["attention"] == "sdpa"
    assert record["versions"]["liger_kernel"] == importlib.metadata.version("liger-kernel")
