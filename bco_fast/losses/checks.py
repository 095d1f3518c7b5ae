"""What the objectives refuse. Shapes and dtypes always; values where `readable`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..head.types import NotFiniteError


def readable(values: Tensor) -> bool:
    """Values are looked at on the CPU only: on a GPU that would stall the stream, and in a compiled graph break it."""
    return values.device.type == "cpu" and not torch.compiler.is_compiling()


def first(bad: Tensor) -> int:
    """Index of the first True of a vector."""
    return int(bad.nonzero()[0])


def check_vectors(*, like: str, **vectors: Tensor | None) -> None:
    """Every vector is floating point, [B] like the one named `like`, on one device and finite; B > 0."""
    model = vectors[like]
    if not isinstance(model, Tensor) or model.dim() != 1:
        raise ValueError(
            f"{like} must be a [B] tensor, not {list(getattr(model, 'shape', [])) or type(model).__name__}"
        )
    if len(model) == 0:
        raise ValueError("the batch is empty")
    for name, vector in vectors.items():
        if vector is None:
            continue
        if not isinstance(vector, Tensor) or not vector.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, not {getattr(vector, 'dtype', type(vector).__name__)}")
        if vector.shape != model.shape:
            raise ValueError(f"{name} {list(vector.shape)} and {like} {list(model.shape)} must both be [B]")
        if vector.device != model.device:
            raise ValueError(f"{name} is on {vector.device} and {like} on {model.device}")
        if readable(vector) and not vector.isfinite().all():
            row = first(~vector.isfinite())
            raise NotFiniteError(f"{name}[{row}] is {float(vector[row])}: not finite")


def check_labels(labels: Tensor, shape: torch.Size, device: torch.device, like: str = "logps") -> None:
    if not isinstance(labels, Tensor) or labels.dtype != torch.bool:
        kind = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"labels must be a bool tensor (True for thumbs up), not {kind}")
    if labels.shape != shape:
        raise ValueError(f"{like} {list(shape)} and labels {list(labels.shape)} must both be [B]")
    if labels.device != device:
        raise ValueError(f"{like} is on {device} and labels on {labels.device}")


def check_reference(**references: Tensor) -> None:
    for name, reference in references.items():
        if reference.requires_grad:
            raise ValueError(f"{name} requires grad: the reference is constant, detach it")


def check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"{name} must be > 0, not {number}")


def check_not_negative(**numbers: float) -> None:
    for name, number in numbers.items():
        if not (math.isfinite(number) and number >= 0):
            raise ValueError(f"{name} must be >= 0, not {number}")


def check_finite(**numbers: float) -> None:
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ValueError(f"{name} must be finite, not {number}")


def check_fraction(below: float, **numbers: float) -> None:
    for name, number in numbers.items():
        if not 0 <= number < below:
            raise ValueError(f"{name} must be in [0, {below:g}), not {number}")


def check_weight(sample_weight: Tensor | None) -> None:
    if sample_weight is not None and readable(sample_weight) and (sample_weight < 0).any():
        row = first(sample_weight < 0)
        raise ValueError(f"sample_weight[{row}] is {float(sample_weight[row])}: negative")


def check_lengths(shape: torch.Size, **lengths: Tensor) -> None:
    """Token counts are integers, [B], and at least 1: a mean over no token would poison every gradient."""
    for name, length in lengths.items():
        if not isinstance(length, Tensor) or length.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"{name} must be an integer tensor, not {getattr(length, 'dtype', type(length).__name__)}")
        if length.shape != shape:
            raise ValueError(f"{name} {list(length.shape)} must be [B] like the log-probabilities {list(shape)}")
        if readable(length) and (length < 1).any():
            row = first(length < 1)
            raise ValueError(f"{name}[{row}] is {int(length[row])}: an empty completion has no mean log-probability")
