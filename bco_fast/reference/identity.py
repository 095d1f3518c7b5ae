"""Which reference model a cache belongs to: a digest of what decides the numbers it computes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from ..models.attention import PREFIX
from .cache import ReferenceId

# Settings of a config that do not change the function it describes.
_VOLATILE = ("_name_or_path", "transformers_version", "use_cache", "architectures", "torch_dtype", "dtype")
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
    if any(hasattr(p, "ds_id") and not p.numel() for p in model.parameters()):
        raise ValueError(
            "ZeRO-3 has sharded the reference model while it was loaded, so its weights cannot be identified: set "
            "zero3_init_flag: false, so that it is sharded after loading"
        )
    weights = _weights(model, adapter)
    config = {key: value for key, value in model.config.to_dict().items() if key not in _VOLATILE}
    if adapter and hasattr(model, "peft_config"):
        config["adapters"] = {name: _settings(model.peft_config[name]) for name in model.active_adapters}
    text = json.dumps(config, sort_keys=True, default=_plain)
    return ReferenceId(
        weights=_digest(weights),
        config=hashlib.blake2b(text.encode(), digest_size=16).hexdigest(),
        dtype=f"{next(model.parameters()).dtype}, autocast {autocast}",
        attention=str(getattr(model.config, "_attn_implementation", "default")).removeprefix(PREFIX),
    )


def _settings(peft_config) -> dict:
    return {k: v for k, v in vars(peft_config).items() if k not in ("base_model_name_or_path", "revision")}


def _plain(value) -> object:
    """For JSON. A set is sorted, because its order differs between processes."""
    return sorted(map(str, value)) if isinstance(value, (set, frozenset)) else str(value)


def _weights(model: nn.Module, adapter: bool) -> dict[str, Tensor]:
    """Tensors by name. Without adapters these are the base model's names and tensors, so that both find one cache."""
    if not hasattr(model, "peft_config"):
        return model.state_dict()
    if not adapter and not hasattr(model, "get_base_model"):
        raise ValueError("an adapter was added to the model in place: wrap it with peft.get_peft_model instead")
    layers = [(name, module) for name, module in model.named_modules() if hasattr(module, "adapter_layer_names")]
    if any(getattr(layer, "merged", False) for _, layer in layers):
        raise ValueError(
            "an adapter is merged into the weights of its base model in place: call unmerge_adapter() first, or "
            "merge_and_unload() to make the merged model the reference"
        )
    if adapter:
        return model.state_dict()
    base = next(f"{name}." for name, module in model.named_modules() if module is model.get_base_model())
    # PEFT keeps the module that it wraps under one of two names; what else it puts beside it is the adapter's.
    wrapped = {
        f"{name}.": f"{name}.{inner}."
        for name, layer in layers
        for inner in ("base_layer", "original_module")
        if inner in dict(layer.named_children())
    }
    found = {}
    for name, tensor in model.state_dict().items():
        for outside, inside in reversed(wrapped.items()):  # inner modules first: their names contain the outer ones
            if name.startswith(inside):
                name = outside + name.removeprefix(inside)
            elif name.startswith(outside):
                break
        else:
            if name.startswith(base):
                found[name.removeprefix(base)] = tensor
    return found


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
