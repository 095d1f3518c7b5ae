"""Where each row of a cache is: sorted 128-bit keys, found by bisection, a million of them in half a second.

Rows arrive a shard at a time. Each arrival is a sorted run, and a run is merged with the one before it unless that is
more than twice as long; so there are few runs, adding costs log(rows) per row, and nothing is ever sorted twice at the
same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_KEYS_AT_ONCE = 1 << 16  # looked up together: bounds the memory a lookup takes


@dataclass(frozen=True)
class _Run:
    """Sorted by (high, low); all [n]."""

    high: np.ndarray  # uint64, the first eight bytes of the key
    low: np.ndarray  # uint64, the others
    places: np.ndarray  # int64
    sums: np.ndarray  # float64

    def keep(self, rows: np.ndarray) -> _Run:
        """Only these."""
        return _Run(self.high[rows], self.low[rows], self.places[rows], self.sums[rows])

    def find(self, high: np.ndarray, low: np.ndarray) -> np.ndarray:
        """Position of each key in this run, -1 where it is not."""
        found = np.full(len(high), -1)
        at = np.searchsorted(self.high, high)
        open_ = np.arange(len(high))
        while len(open_):  # again only for keys whose first half several rows share
            open_ = open_[at[open_] < len(self.high)]
            open_ = open_[self.high[at[open_]] == high[open_]]
            equal = self.low[at[open_]] == low[open_]
            found[open_[equal]] = at[open_[equal]]
            open_ = open_[~equal]
            at[open_] += 1
        return found


def _sorted_run(high: list, low: list, places: list, sums: list) -> _Run:
    """One run of many pieces; of equal keys the first is kept. Empties the lists, so that memory peaks low."""

    def joined(pieces: list) -> np.ndarray:
        whole = np.concatenate(pieces)
        pieces.clear()
        return whole

    high, low = joined(high), joined(low)
    order = np.lexsort((low, high))
    high = high[order]
    low = low[order]
    run = _Run(high, low, joined(places)[order], joined(sums)[order])
    fresh = np.ones(len(order), dtype=bool)
    fresh[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
    return run if fresh.all() else run.keep(fresh)


class KeyIndex:
    """Rows by key. A key that is added twice stays where it was first."""

    def __init__(self):
        self._runs: list[_Run] = []

    def __len__(self) -> int:
        return sum(len(run.high) for run in self._runs)

    def add(
        self,
        keys: Sequence[np.ndarray],  # [n, 2] uint64 each: keys as pairs of big-endian integers
        places: Sequence[np.ndarray],  # [n] int64 each, >= 0
        sums: Sequence[np.ndarray],  # [n] float64 each
    ) -> None:
        """Add rows, given in pieces."""
        if not keys:
            return
        new = _sorted_run([k[:, 0] for k in keys], [k[:, 1] for k in keys], list(places), list(sums))
        if self._runs:
            known = self._find(new.high, new.low)[0] >= 0
            new = new.keep(~known)
        self._runs.append(new)
        del new
        while len(self._runs) > 1 and len(self._runs[-2].high) <= 2 * len(self._runs[-1].high):
            self._merge_last_two()

    def compact(self) -> None:
        """One run, for many lookups."""
        while len(self._runs) > 1:
            self._merge_last_two()

    def _merge_last_two(self) -> None:
        second, first = self._runs.pop(), self._runs.pop()
        columns = [[getattr(first, name), getattr(second, name)] for name in ("high", "low", "places", "sums")]
        del first, second  # so that each column is freed when it has been merged
        self._runs.append(_sorted_run(*columns))

    def find(self, keys: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:  # [K] int64, [K] float64
        """(place, sum) of each key; (-1, NaN) where it is not known."""
        if any(len(key) != 16 for key in keys):
            raise ValueError("a key has 16 bytes")
        places, sums = np.empty(len(keys), dtype=np.int64), np.empty(len(keys))
        for first in range(0, len(keys), _KEYS_AT_ONCE):
            some = slice(first, first + _KEYS_AT_ONCE)
            pairs = np.frombuffer(b"".join(keys[some]), ">u8").reshape(-1, 2).astype(np.uint64)
            places[some], sums[some] = self._find(pairs[:, 0], pairs[:, 1])
        return places, sums

    def _find(self, high: np.ndarray, low: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places, sums = np.full(len(high), -1), np.full(len(high), np.nan)
        for run in self._runs:
            at = run.find(high, low)
            here = at >= 0
            places[here], sums[here] = run.places[at[here]], run.sums[at[here]]
        return places, sums
