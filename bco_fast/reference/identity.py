"""Which reference model a cache belongs to: a digest of what decides the numbers it computes."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..models.attention import PREFIX
from ..models.load import refuse_sharded
from .cache import ReferenceId

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_NOT_COMPUTED = re.compile(
    r"_name_or_path|transformers_version|use_cache|architectures|torch_dtype|dtype|tokenizer_class|"
    r"(pad|bos|eos|sep|cls|unk|decoder_start)_token_(id|index)|"
    r"initializer_\w+|init_\w+|\w*(dropout|pdrop|layerdrop)\w*|"
    r"id2label|label2id|num_labels|problem_type|finetuning_task|task_specific_params|"
    r"output_(attentions|hidden_states|router_logits)|return_dict|use_return_dict|router_(aux_loss_coef|jitter_noise)"
)
"""Keys of a config that decide nothing a reference computes: it runs in eval mode, on tokens that are given."""
_LIMITS = ("max_position_embeddings", "n_positions")
"""They bound a row and, unless rotary positions are scaled by them, compute nothing; learned positions have them in their shape."""
_HASHED_PIECE = 32 << 20  # bytes; several threads hash the pieces of one tensor


def reference_id(model: nn.Module, *, autocast: str = "no", adapter: bool = False) -> ReferenceId:
    """Identify a reference by what it computes: weights, config, dtype, attention backend.

    Weights are hashed in memory, because files of the same name may have been edited, converted or merged since they
    were loaded. Threads share the work, 1 to 2 GB a second per core.

    Args:
        autocast: "no", or the dtype that training and `fill` compute in.
        adapter: for a PEFT model, include its active adapters; otherwise its base model is identified. See `fill`.

    Raises:
        ValueError: a weight is not in memory (meta device, or sharded by ZeRO-3 while loading), or an adapter is merged
            into the base weights in place.
    """
    refuse_sharded(model)
    weights = _weights(model, adapter)
    config = _computed(model.config, _source(model))
    if adapter and hasattr(model, "peft_config"):
        config["adapters"] = {name: adapter_settings(model.peft_config[name]) for name in model.active_adapters}
    text = json.dumps(config, sort_keys=True, default=_plain)
    return ReferenceId(
        weights=_digest(weights),
        config=hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        dtype=f"{next(model.parameters()).dtype}, autocast {autocast}",
        attention=str(getattr(model.config, "_attn_implementation", "default")).removeprefix(PREFIX),
    )


def _computed(config: PretrainedConfig, source: str | None) -> dict:
    """What of a config decides what the model computes.

    Args:
        source: of the model, None if nobody has it. A key that the config's class does not know counts only if it is
            mentioned there.
    """
    try:
        known = type(config)().to_dict()
    except Exception:  # a class without defaults; all of its keys count then
        known = config.to_dict()
    scaled = not _plain_positions(config)
    found = {}
    for key, value in config.to_dict().items():
        part = getattr(config, key, None)
        if (
            (key in known or source is None or key in source)
            and not _NOT_COMPUTED.fullmatch(key)
            and (scaled or key not in _LIMITS)
        ):
            found[key] = _computed(part, source) if hasattr(part, "model_type") else value
    return found


def _source(model: nn.Module) -> str | None:
    modules = {type(part).__module__ for part in model.modules()} | {
        "transformers.masking_utils",
        "transformers.modeling_rope_utils",
        "transformers.modeling_utils",
    }
    try:
        return "".join(inspect.getsource(sys.modules[name]) for name in modules if not name.startswith("torch."))
    except (OSError, TypeError, KeyError):  # written in a notebook, say
        return None


def _plain_positions(config: PretrainedConfig) -> bool:
    """Whether no rotary positions depend on the longest row."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kinds = (
        [rope] if "rope_type" in rope or "type" in rope else [part for part in rope.values() if isinstance(part, dict)]
    )
    return all(
        kind.get("rope_type", kind.get("type", "default")) in ("default", "linear", "proportional") for kind in kinds
    )


def adapter_settings(peft_config) -> dict:
    """What a PEFT config says of its adapter, without where its base comes from."""
    return {k: v for k, v in vars(peft_config).items() if k not in ("base_model_name_or_path", "revision")}


def _plain(value) -> object:
    """For JSON. A set is sorted, because its order differs between processes."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _weights(model: nn.Module, adapter: bool) -> dict[str, Tensor]:
    """Tensors by name. Without adapters these are the base model's names and tensors, so that both find one cache.

    Buffers that no checkpoint holds, such as the frequencies of rotary positions, count too.
    """
    tensors = dict(model.named_buffers(remove_duplicate=False)) | model.state_dict()
    if not hasattr(model, "peft_config"):
        return tensors
    layers = [(name, module) for name, module in model.named_modules() if _holds_adapter(module)]
    if not hasattr(model, "get_base_model"):
        if not layers:  # PEFT 0.17 leaves its config on a model that it has merged and unloaded
            return tensors
        if not adapter:
            raise ValueError("an adapter was added to the model in place: wrap it with peft.get_peft_model instead")
    if any(getattr(layer, "merged", False) for _, layer in layers):
        raise ValueError(
            "an adapter is merged into the weights of its base model in place: call unmerge_adapter() first, or "
            "merge_and_unload() to make the merged model the reference"
        )
    if adapter:
        return tensors
    base = next(f"{name}." for name, module in model.named_modules() if module is model.get_base_model())
    # PEFT keeps the module that it wraps under one of two names; what else it puts beside it is the adapter's.
    wrapped = {
        f"{name}.": f"{name}.{inner}."
        for name, layer in layers
        for inner in ("base_layer", "original_module")
        if inner in dict(layer.named_children())
    }
    found = {}
    for name, tensor in tensors.items():
        for outside, inside in reversed(wrapped.items()):  # inner modules first: their names contain the outer ones
            if name.startswith(inside):
                name = outside + name.removeprefix(inside)
            elif name.startswith(outside):
                break
        else:
            if name.startswith(base):
                found[name.removeprefix(base)] = tensor
    return found


def _holds_adapter(module: nn.Module) -> bool:
    """Whether PEFT has put this module in another's place. PEFT 0.17 names the adapters of LoRA's layers only."""
    return hasattr(module, "adapter_layer_names") or "original_module" in dict(module.named_children())


def _digest(weights: Mapping[str, Tensor]) -> str:
    """Hash of names, dtypes, shapes and bytes. Threads share the pieces; tied weights are hashed once."""
    for name, tensor in weights.items():
        if not isinstance(tensor, Tensor) or tensor.is_meta:
            raise ValueError(
                f"{name} of the reference model has no values in memory, so the model cannot be identified"
            )
    views = {(t.data_ptr(), t.dtype, t.shape, t.stride(), t.device): t for t in weights.values()}
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        pieces = {
            view: pool.map(_sha256, tensor.detach().contiguous().reshape(-1).view(torch.uint8).split(_HASHED_PIECE))
            for view, tensor in views.items()
        }
        hashes = {view: b"".join(found) for view, found in pieces.items()}
    whole = hashlib.sha256()
    for name, t in sorted(weights.items(), key=lambda item: item[0]):
        whole.update(f"{name}|{t.dtype}|{tuple(t.shape)}|".encode())
        whole.update(hashes[t.data_ptr(), t.dtype, t.shape, t.stride(), t.device])
    return whole.hexdigest()[:32]


def _sha256(piece: Tensor) -> bytes:
    return hashlib.sha256(piece.cpu().numpy()).digest()
