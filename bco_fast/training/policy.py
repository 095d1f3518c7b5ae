"""From what the trainer is given to the model that it trains."""

from __future__ import annotations

import logging
import os

import torch
from torch import nn

from ..data.sources import one_line
from ..head.types import HeadStats
from ..models.adapters import check_options
from ..models.groups import group_layers
from ..models.liger import use_liger
from ..models.load import add_adapter, load_model, load_tokenizer
from ..models.multimodal import freeze_other_modules
from ..models.patch import patch_model
from ..models.tiles import tile_layers, tile_mlps
from .checks import check_positions
from .config import FeedbackConfig
from .memory_watch import turn_on_what_fits

logger = logging.getLogger("bco_fast")


def tokenizer_of(model: nn.Module | str, args: FeedbackConfig):
    """The tokenizer that lies beside the model's weights.

    Raises:
        ValueError: the model was not loaded from a checkpoint, or no tokenizer is there.
    """
    path = model if isinstance(model, (str, os.PathLike)) else getattr(model.config, "_name_or_path", "")
    if not path:
        raise ValueError("processing_class is missing: pass the tokenizer, because the model has no checkpoint")
    try:
        return load_tokenizer(path, args.trust_remote_code)
    except (OSError, ValueError) as error:
        reason = one_line(error)[:200]
        raise ValueError(
            f"processing_class is missing: pass the tokenizer, because {path} has none ({reason})"
        ) from None


def prepare_policy(model: nn.Module | str, args: FeedbackConfig, peft_config=None, *, stats: HeadStats) -> nn.Module:
    """Load the model if it is a path, adapt it, and patch it to return log-probabilities.

    Args:
        peft_config: of the adapter, in place of the one that `args` describes.
        stats: filled in by a sparse backward.

    Raises:
        ValueError: the model is cut by tensor parallelism; `args` describes another adapter than the model's; or of
            `patch_model`.
    """
    if isinstance(model, (str, os.PathLike)):
        model = load_model(model, args)
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError(
            f"the model is cut by tensor parallelism over {model._tp_size} ranks, and the trainer gives every rank other "
            "rows: load it without a tp_plan and shard it by FSDP2 or ZeRO-3 (docs/scale.md). patch_model takes it in a "
            "training loop that gives all ranks the same rows"
        )
    if hasattr(model, "peft_config"):
        check_options(model, args)
    elif args.use_peft or peft_config is not None:
        model = add_adapter(model, args, peft_config)
    else:
        freeze_other_modules(model)
    if args.disable_dropout:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    check_positions(model, args.max_length)
    if args.long_context == "auto":
        turn_on_what_fits(model, args)
    patch_model(
        model,
        backend=args.backend,
        workspace_bytes=args.workspace_bytes,
        sparse_tolerance=args.sparse_tolerance,
        stats=stats if args.sparse_tolerance else None,
    )
    if args.mlp_chunk_tokens is not None:
        tiled = tile_mlps(model, args.mlp_chunk_tokens)
        logger.info("%d MLPs run over %d tokens at a time", tiled, args.mlp_chunk_tokens)
    if args.layer_chunk_tokens is not None:
        tiled = tile_layers(model, args.layer_chunk_tokens)
        logger.info("%d norms, projections and MLPs run over %d tokens at a time", tiled, args.layer_chunk_tokens)
    if args.layer_checkpoints is not None:
        sizes = group_layers(model, args.layer_checkpoints, offloaded=args.activation_offloading)
        logger.info("checkpoints over groups of %s layers", ", ".join(map(str, sizes)))
    return model


def replace_layers(model: nn.Module, args: FeedbackConfig, *, sharded: bool) -> list[str]:
    """Put Liger's kernels into the layers where `args` says so. The model is on its device, unless it is sharded."""
    autocast = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    chunked = args.mlp_chunk_tokens is not None
    how = {"autocast": autocast, "chunked": chunked, "sharded": sharded}
    return use_liger(model, args.liger, args.liger_kernel_config, args.device, **how)
