"""Where the operators are registered. A package for the Hub has a namespace of its own (see `integrations.hub`)."""

import torch

ops = torch.ops.bco_fast


def add_op_namespace_prefix(name: str) -> str:
    return f"bco_fast::{name}"
