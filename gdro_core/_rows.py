"""Rows of ids: strings and tuples by a dict, integers by sorted arrays without a Python loop."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from itertools import compress, count, repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gdro_core._validate import Ints


class RowIndex:
    """Row of each id, in the order of first observation; equal ids are one, as in a dict.

    While all ids fit int64 they lie in sorted runs, each over 8 times as long as the next (log N searches, O(log N)
    merges of a key); the first other id moves them into a dict for good.
    """

    def __init__(self) -> None:
        self.size = 0
        self._runs: list[tuple[Ints, Ints]] = []  # sorted keys and their rows
        self._dict: dict[Hashable, int] = {}
        self._last: tuple[list[Hashable], Ints] = [], np.empty(0, dtype=np.int64)  # latest batch

    def find(self, ids: Iterable[Hashable] | NDArray[Any]) -> tuple[Ints | list[Hashable], Ints]:
        """The ids as int64 or as a list, and (N,) their rows; −1 if new."""
        if isinstance(ids, str | bytes):
            raise ValueError(f"ids must be a sequence of ids, got the single string {ids!r}")
        listed: NDArray[Any] | list[Any] = np.asarray(ids) if hasattr(ids, "__array__") else list(ids)
        if isinstance(listed, np.ndarray) and listed.ndim != 1:
            raise ValueError(f"ids must have shape (N,), got {listed.shape}")
        if not self._dict:
            keys = int64_ids(listed)
            if keys is not None:
                return keys, self._search(keys)
            self._dict, self._runs = dict(zip(np.asarray(self.ids()).tolist(), count())), []
            self._last = [], np.empty(0, dtype=np.int64)
        names = listed.tolist() if isinstance(listed, np.ndarray) else listed
        if names != self._last[0]:  # a step asks for the same ids three times: a comparison is quicker than a look-up
            self._last = names, np.fromiter(map(self._dict.get, names, repeat(-1)), np.int64, len(names))
        return self._last

    def add(self, names: Ints | list[Hashable], rows: Ints, wanted: NDArray[np.bool_]) -> Ints:
        """Give the next rows, in place, to the wanted names that have none (what `find` returned); return all rows."""
        new = wanted & (rows < 0)
        new_names = where(names, new)
        if not len(new_names):
            return rows
        rows[new] = np.arange(self.size, self.size + len(new_names))
        if isinstance(new_names, list):
            self._dict.update(zip(new_names, count(self.size)))
        else:
            order = new_names.argsort()
            self._runs.append((new_names[order], rows[new][order]))
            while len(self._runs) > 1 and self._runs[-2][0].size <= 8 * self._runs[-1][0].size:
                (keys, at), (more, at_more) = self._runs[-2:]
                place = keys.searchsorted(more)
                self._runs[-2:] = [(np.insert(keys, place, more), np.insert(at, place, at_more))]
        self.size += len(new_names)
        return rows

    def ids(self) -> Ints | list[Hashable]:
        """All ids in the order of their rows, as int64 if they fit."""
        if self._dict:
            names = list(self._dict)
            keys = int64_ids(names)
            return names if keys is None else keys
        ids = np.empty(self.size, dtype=np.int64)
        for keys, rows in self._runs:
            ids[rows] = keys
        return ids

    def _search(self, keys: Ints) -> Ints:
        order = keys.argsort()  # in sorted order: memory is read from end to end
        sorted_keys, sorted_rows = keys[order], np.full(keys.size, -1)
        for known, rows in self._runs:
            at = np.minimum(known.searchsorted(sorted_keys), known.size - 1)
            sorted_rows = np.where(known[at] == sorted_keys, rows[at], sorted_rows)
        result = np.empty_like(sorted_rows)
        result[order] = sorted_rows
        return result


def int64_ids(ids: NDArray[Any] | list[Any]) -> Ints | None:
    """The ids as int64, if they are integers that fit."""
    if not len(ids):
        return np.empty(0, dtype=np.int64)
    if isinstance(ids, list):
        if not set(map(type, ids)) <= {int, bool, np.int64, np.int32}:
            return None
        ids = np.array(ids)
    return ids.astype(np.int64) if ids.dtype.kind in "biu" and not (ids > 2**63 - 1).any() else None


def where(names: Ints | list[Hashable], mask: NDArray[np.bool_]) -> Ints | list[Hashable]:
    if not mask.any():
        return names[:0]
    return list(compress(names, mask.tolist())) if isinstance(names, list) else names[mask]


def repeats(names: Ints | list[Hashable]) -> bool:
    if isinstance(names, list):
        return len(set(names)) < len(names)
    ordered = np.sort(names)
    return bool((ordered[1:] == ordered[:-1]).any())
