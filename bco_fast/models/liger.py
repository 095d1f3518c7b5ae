"""Liger's kernels in the layers: RMSNorm, rotary positions, SwiGLU and GeGLU. The head stays ours."""

from __future__ import annotations

import importlib.metadata
import inspect
import logging

import torch
from torch import Tensor, nn

from .multimodal import is_multimodal
from .patch import TARGETS, logp_budget

logger = logging.getLogger("bco_fast")

LAYERS = ("rope", "rms_norm", "swiglu", "geglu")
LEAST = (0, 8)
"""Version of liger-kernel; 0.8.5 is the one that is tested."""


def use_liger(
    model: nn.Module,
    wanted: str,
    options: dict[str, bool] | None,
    device: torch.device,
    *,
    autocast: torch.dtype | None = None,
    chunked: bool = False,
    sharded: bool = False,
) -> list[str]:
    """Let Liger replace parts of a patched model's layers, and check that it computes the same.

    Args:
        wanted: "true", "false", or "auto": on a GPU, where liger-kernel is installed and knows the family.
        options: of Liger's function for the family, over our choice of `LAYERS`.
        device: where the model will train.
        autocast: what training computes in, if not in the dtype of the weights.
        chunked: its MLPs run in chunks (`mlp_chunk_tokens`) and must stay what they are.
        sharded: the model is not on its device yet, so nothing can be compared.

    Returns:
        What was replaced, in Liger's words.

    Raises:
        ValueError: wanted is "true" and Liger cannot do it, or the log-probabilities are no longer the model's.
    """
    if wanted == "false" or (wanted == "auto" and device.type != "cuda"):
        return []
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    text = base.get_decoder() if is_multimodal(base.config) else base  # towers are left alone
    family = text.config.model_type
    apply, reason = _liger_function(family)
    if apply is None:
        if wanted == "true":
            raise ValueError(f"liger: {reason}")
        logger.info("Liger: off, %s", reason)
        return []
    known = [name for name in inspect.signature(apply).parameters if name != "model"]
    chosen = {name: name in LAYERS and not (chunked and name.endswith("glu")) for name in known}
    if unknown := set(options or {}) - set(known) - {"cross_entropy", "fused_linear_cross_entropy"}:
        raise ValueError(f"liger_kernel_config: Liger has no {', '.join(sorted(unknown))} for {family}")
    chosen |= {name: on for name, on in (options or {}).items() if name in known}
    before = None if sharded else _logps(model, autocast)
    try:
        apply(model=text, **chosen)
    except ImportError as error:  # this version of Liger was written for another transformers
        if wanted == "true":
            raise ValueError(f"liger: Liger's module for {family} does not import: {error}") from None
        logger.info("Liger: off, its module for %s does not import: %s", family, error)
        return []
    if before is not None and not (worst := float((_logps(model, autocast) - before).abs().max())) <= logp_budget(
        model, autocast=autocast is not None
    ):
        raise ValueError(
            f"liger: with liger-kernel {importlib.metadata.version('liger-kernel')} {type(base).__name__} computes other "
            f"log-probabilities, by up to {worst:.2g} nats: set liger=false"
        )
    replaced = sorted(name for name, on in chosen.items() if on)
    logger.info("Liger: %s", ", ".join(replaced))
    return replaced


def _liger_function(family: str):
    """(Liger's function for a family, None), or (None, why there is none)."""
    try:
        version = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return None, "liger-kernel is not installed (pip install 'bco_fast[gpu]')"
    if tuple(int(part) for part in version.split(".")[:2]) < LEAST:
        return None, f"liger-kernel {version} is older than {LEAST[0]}.{LEAST[1]}"
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    apply = MODEL_TYPE_TO_APPLY_LIGER_FN.get(family)
    return apply, None if apply else f"liger-kernel {version} has no kernels for {family}"


@torch.no_grad()
def _logps(model: nn.Module, autocast: torch.dtype | None) -> Tensor:
    """Of 16 tokens, through all layers; dropout is off."""
    training, device = model.training, next(model.parameters()).device
    tokens = torch.arange(1, 17, device=device)[None] % model.get_input_embeddings().weight.shape[0]
    model.eval()
    try:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            return model(input_ids=tokens, use_cache=False, **{TARGETS: tokens.roll(-1)}).logits
    finally:
        model.train(training)
