"""FlashAttention is handed the right lengths: a plain function stands in for the package, which needs a GPU."""

import base64
import hashlib
import importlib.util
import inspect
import json

import numpy as np
import pytest
import tiny
import torch
import transformers.modeling_flash_attention_utils as flash
from families import FAMILIES
from small_runs import TOKENIZER, config

from bco_fast import FeedbackTrainer, patch_model
from bco_fast.data.batch import collate
from bco_fast.data.dataset import Example, Item
from bco_fast.models.attention import is_flash, knows_segments, use_segments
from bco_fast.models.load import flash_attention
from bco_fast.models.patch import completion_logps
from bco_fast.training.step import mismatched_log_ratios

CALLS = []


def varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, deterministic=False,
):  # fmt: skip
    """`flash_attn.flash_attn_varlen_func` as its documentation has it: causal to the lower right."""
    for x, cu, longest in ((q, cu_seqlens_q, max_seqlen_q), (k, cu_seqlens_k, max_seqlen_k)):
        assert cu.dtype == torch.int32
        assert cu[0] == 0
        assert cu[-1] == len(x)
        assert longest == int(cu.diff().max())
        assert cu.diff().min() > 0
    assert causal
    CALLS.append((cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()))
    outputs = []
    for a, b, c, d in zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:], strict=False):
        groups = q.shape[1] // k.shape[1]
        own, keys, values = q[a:b], *(x[c:d].repeat_interleave(groups, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", own, keys) * (softmax_scale or q.shape[-1] ** -0.5)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at, to = torch.arange(b - a)[:, None] + (d - c) - (b - a), torch.arange(d - c)[None]
        hidden = to > at
        if window_size[0] >= 0:
            hidden |= to < at - window_size[0]
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values))
    return torch.cat(outputs)


def dense(q, k, v, **options):
    rows, length = q.shape[:2]
    cu = torch.arange(0, (rows + 1) * length, length, dtype=torch.int32)
    flat = varlen(*(x.flatten(0, 1) for x in (q, k, v)), cu, cu, length, length, **options)
    return flat.view(rows, length, *flat.shape[1:])


@pytest.fixture
def package(monkeypatch):
    """transformers finds FlashAttention loaded."""
    functions = {
        "_flash_fn": dense,
        "_flash_varlen_fn": varlen,
        "_flash_with_kvcache_fn": dense,
        "_pad_fn": None,
        "_unpad_fn": None,
    }
    kwargs = flash._lazy_define_process_function(varlen)
    functions |= {"_process_flash_kwargs_fn": kwargs, "_process_with_kvcache_kwargs_fn": kwargs}
    for name, value in functions.items():
        assert hasattr(flash, name)
        monkeypatch.setattr(flash, name, value)
    monkeypatch.setattr(flash, "_loaded_implementation", "flash_attention_2")
    CALLS.clear()


def _items():
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 60, n).astype(np.int32) for n in (14, 6)]
    made = []
    for prompt, tokens in ((0, 7), (1, 5), (0, 4), (0, 9)):
        both = [np.concatenate([prompts[prompt], rng.integers(2, 60, n).astype(np.int32)]) for n in (tokens, 3)]
        example, other = (Example(ids, len(prompts[prompt]), True, 1.0) for ids in both)
        made.append(Item(example, 0.0, mismatched=Item(other, -1.0)))
    return made


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {}), ("mistral", {"sliding_window": 5}), ("gemma2", {"sliding_window": 6})],
    ids=["llama", "mistral-window", "gemma2-softcap"],
)
def test_it_computes_what_the_other_attentions_compute(package, family, options):
    config_class, more = FAMILIES[family]
    plain = "eager" if family == "gemma2" else "sdpa"
    model = patch_model(tiny.model(config_class, **more | options, attn_implementation=plain)).eval()
    found = []
    for attention, layout in ((plain, "padded"), ("flash_attention_2", "packed"), ("flash_attention_2", "shared")):
        model.config._attn_implementation = attention
        if layout == "shared":
            use_segments(model)
            assert is_flash(model.config)
            assert knows_segments(model.config)
        model.zero_grad()
        CALLS.clear()
        batch = collate(_items(), 1, layout=layout, continued=True)
        logps = completion_logps(model, batch)
        calls = list(CALLS)
        with torch.no_grad():
            ratios = mismatched_log_ratios(model, batch)
        logps.sum().backward()
        found.append((logps.detach(), ratios, torch.cat([p.grad.flatten() for p in model.parameters()])))
        lengths = {
            "padded": [],
            "packed": [([21, 11, 18, 23], [21, 11, 18, 23])] * 2,
            "shared": [([14, 7, 4, 9, 11], [14, 21, 18, 23, 11])] * 2,
        }
        assert calls == lengths[layout]
        if layout == "shared":
            assert CALLS[2:] == [([4, 4, 4, 4], [17, 9, 17, 17])] * 2
            assert model.config._attn_implementation == "segments|flash_attention_2"
    (expected, expected_ratios, gradient), *others = found
    for logps, ratios, other in others:
        assert (logps - expected).abs().max() <= 1e-5
        assert (ratios - expected_ratios).abs().max() <= 2e-5
        assert (other - gradient).norm() <= 1e-5 * gradient.norm()


def test_the_stand_in_has_the_arguments_that_transformers_looks_for(package):
    """Of those that a causal language model asks for; without one of them a window or a softcap would be left out."""
    assert {"dropout_p", "window_size", "softcap", "deterministic", "max_seqlen_q", "max_seqlen_k"} <= set(inspect.signature(varlen).parameters)  # fmt: skip
    made = flash._process_flash_kwargs_fn(5, 9, True, sliding_window=4, softcap=2.0, softmax_scale=0.5)
    assert made["window_size"][0] == 3
    assert made["softcap"] == 2.0


@pytest.mark.parametrize(
    ("installed", "capability", "expected"),
    [
        ({"flash_attn", "kernels"}, (9, 0), "flash_attention_2"),
        ({"kernels"}, (9, 0), "kernels-community/vllm-flash-attn3"),
        ({"kernels"}, (8, 0), "kernels-community/flash-attn2"),
        ({"kernels"}, (12, 0), "kernels-community/flash-attn2"),
        (set(), (9, 0), "pip install"),
        ({"kernels"}, (7, 5), "sm_80"),
        ({"kernels"}, None, "sm_80"),
    ],
)
def test_flash_is_that_of_the_card(monkeypatch, installed, capability, expected):
    find = importlib.util.find_spec
    known = {"flash_attn", "kernels"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name in installed or None if name in known else find(name)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    if "/" in expected or "_attention" in expected:
        assert flash_attention(True) == expected
        assert "flash" in expected  # which the layouts ask for
        with pytest.raises(ValueError, match="16 bits"):
            flash_attention(False)
    else:
        with pytest.raises((ImportError, ValueError), match=expected):
            flash_attention(True)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The functions above as a package of the Hub, for the CPU, in place of kernels-community/flash-attn2."""
    pytest.importorskip("kernels", reason="needs the kernels library: pip install 'bco_fast[gpu]'")
    from transformers.utils import is_kernels_available

    if not is_kernels_available():
        pytest.skip("this transformers needs another version of kernels")
    source = f"import torch\n\nCALLS = []\n\n{inspect.getsource(varlen)}\n\n{inspect.getsource(dense)}"
    source = source.replace("def varlen", "def flash_attn_varlen_func").replace("varlen(*", "flash_attn_varlen_func(*")
    source = source.replace("def dense", "def flash_attn_func") + "\nflash_attn_with_kvcache = flash_attn_func\n"
    folder = tmp_path / "kernel" / "torch-cpu"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(source)
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    metadata = {
        "id": "_flash_attn2_in_python", "name": "flash-attn2", "version": 4, "license": "Apache-2.0", "python-depends": [],
        "backend": {"type": "cpu"}, "digest": {"algorithm": "sha256", "files": {"__init__.py": digest}},
    }  # fmt: skip
    (folder / "metadata.json").write_text(json.dumps(metadata))
    monkeypatch.setenv("LOCAL_KERNELS", f"kernels-community/flash-attn2={tmp_path / 'kernel'}")
    for name in (
        "_loaded_implementation",
        "_flash_fn",
        "_flash_varlen_fn",
        "_flash_with_kvcache_fn",
        "_pad_fn",
        "_unpad_fn",
    ):
        monkeypatch.setattr(flash, name, None)  # back to what they are, afterwards
    for name in ("_process_flash_kwargs_fn", "_process_with_kvcache_kwargs_fn"):
        monkeypatch.setattr(flash, name, None)
    return "kernels-community/flash-attn2"


def test_flash_attention_of_the_hub_trains(hub, tmp_path, monkeypatch):
    """transformers and kernels load it by its name; every layout computes what SDPA does, and run.json has its name."""
    tiny.model().save_pretrained(tmp_path / "model")
    rows = [{**row, "completion": f"{row['completion']} {end}"} for row in tiny.rows(6) for end in ("list", "four")]
    found = {}
    for name, options in {
        "sdpa": {"attn_implementation": "sdpa", "share_prompts": "false"},
        "padded": {"attn_implementation": hub, "share_prompts": "false"},
        "packed": {"attn_implementation": hub, "share_prompts": "false", "padding_free": True},
        "shared": {"attn_implementation": hub, "share_prompts": "true"},
    }.items():
        args = config(
            tmp_path / name,
            max_steps=2,
            per_device_train_batch_size=12,
            model_dtype="float32",
            cache_dir=str(tmp_path / f"c-{name}"),
            **options,
        )
        run = FeedbackTrainer(str(tmp_path / "model"), args, rows, processing_class=TOKENIZER)
        assert run.layout == {"sdpa": "padded"}.get(name, name)
        run.train()
        found[name] = [line["loss"] for line in run.state.log_history if "loss" in line]
        record = json.loads((tmp_path / name / "out" / "run.json").read_text())
        assert record["attention"] == ("sdpa" if name == "sdpa" else hub)
        assert "kernels" in record["versions"]
    assert flash._loaded_implementation == hub
    for name in ("padded", "packed", "shared"):
        assert found[name] == pytest.approx(found["sdpa"], abs=1e-5)
