"""Which shards this machine has written or checked, so that shards from elsewhere are checked in proportion, once.

    <cache_dir>/<reference digest>.seen    {"shard-....safetensors": [inode, time of change in ns], ...}

The file lies beside the reference's folder. Copying a shard gives it another inode and time of change, so a copied folder
counts as unseen even if this file was copied along. Losing the file costs one check.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from .. import files

LIMIT = 64 << 20  # bytes; half a million shards


class SeenShards:
    """Reads the list of a reference's folder; anything wrong with it makes it empty."""

    def __init__(self, folder: Path):
        self.path = folder.with_name(f"{folder.name}.seen")
        self._seen: dict = {}
        with contextlib.suppress(OSError, ValueError, RecursionError):
            if self.path.stat().st_size <= LIMIT:
                seen = json.loads(self.path.read_bytes())
                self._seen = seen if isinstance(seen, dict) else {}

    def __contains__(self, shard: Path) -> bool:
        return self._seen.get(shard.name) == _state(shard)

    def add(self, shards: Iterable[Path]) -> None:
        """On a disk that cannot be written, the next run checks again."""
        new = {shard.name: state for shard in shards if (state := _state(shard)) != self._seen.get(shard.name)}
        if new:
            latest = SeenShards(self.path.with_suffix(""))  # with what others have added meanwhile
            self._seen = latest._seen | self._seen | new
            with contextlib.suppress(OSError):
                files.write_bytes(self.path, json.dumps(self._seen).encode())


def _state(shard: Path) -> list[int] | None:
    try:
        status = os.stat(shard, follow_symlinks=False)
    except OSError:
        return None
    return [status.st_ino, status.st_ctime_ns]
