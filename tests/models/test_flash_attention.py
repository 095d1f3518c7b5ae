"""FlashAttention is handed the right lengths: a plain function stands in for the package, which needs a GPU."""

import inspect

import numpy as np
import pytest
import tiny
import torch
import transformers.modeling_flash_attention_utils as flash
from families import FAMILIES

from bco_fast import patch_model
from bco_fast.data.batch import collate
from bco_fast.data.dataset import Example, Item
from bco_fast.models.attention import is_flash, knows_segments, use_segments
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
