"""The key of a row in the reference cache: what the reference model sees of it, and nothing else."""

from __future__ import annotations

import hashlib

import numpy as np

KEY_BYTES = 16


def row_key(
    token_ids: np.ndarray,  # [T] integers
    completion_mask: np.ndarray,  # [T] bool
) -> bytes:
    """128-bit content hash of one row: the ids after truncation, and which of them are completion."""
    ids = np.ascontiguousarray(token_ids, dtype="<i8")
    mask = np.asarray(completion_mask, dtype=bool)
    if ids.ndim != 1 or ids.shape != mask.shape:
        raise ValueError(f"token_ids {ids.shape} and completion_mask {mask.shape} must both be [T]")
    content = hashlib.blake2b(len(ids).to_bytes(8, "little"), digest_size=KEY_BYTES, person=b"bco_fast.row.v1")
    content.update(ids.tobytes())
    content.update(np.packbits(mask).tobytes())
    return content.digest()
