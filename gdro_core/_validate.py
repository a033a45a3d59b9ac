"""Checks at the entrances: each error names the argument, the rule and the value that broke it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
_LARGEST = float(np.finfo(np.float64).max)


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """`value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def choice(name: str, value: str, allowed: Sequence[str]) -> str:
    """`value`, if it is one of `allowed`."""
    check_choice(name, value, allowed)
    return value


def integer(name: str, value: int, low: int) -> int:
    """`value` as an int, if it is a whole number and at least `low`."""
    if isinstance(value, bool) or not float(value).is_integer() or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
    return int(value)


def check_number(name: str, value: float, low: float, high: float = np.inf, *, open_low: bool = False) -> None:
    """`value` is finite and lies in [low, high], or in (low, high] with `open_low`."""
    if not np.isfinite(value) or not low <= value <= high or (open_low and value == low):
        raise ValueError(f"{name} must lie in {'(' if open_low else '['}{low:g}, {high:g}], got {value!r}")


def number(name: str, value: float, low: float, high: float = np.inf, *, open_low: bool = False) -> float:
    """`value` as a float, if it is finite and lies in [low, high], or in (low, high] with `open_low`."""
    check_number(name, value, low, high, open_low=open_low)
    return float(value)


def check_shape(name: str, array: Floats | Ints, shape: tuple[int, ...]) -> None:
    """The array has `shape` (−1 = any length)."""
    if array.ndim != len(shape) or any(want not in (-1, got) for want, got in zip(shape, array.shape, strict=True)):
        raise ValueError(f"{name} must have shape {shape} (-1: any length), got {array.shape}")


def check_entries(name: str, array: Floats, low: float = -np.inf, high: float = np.inf) -> None:
    """All entries are finite and lie in [low, high]."""
    if not array.size:
        return
    least, most = array.min(), array.max()  # nan if any is
    if max(low, -_LARGEST) <= least and most <= min(high, _LARGEST):
        return
    bad = ~np.isfinite(array) | (array < low) | (array > high)
    rule = "finite numbers" if (low, high) == (-np.inf, np.inf) else f"finite numbers in [{low:g}, {high:g}]"
    raise ValueError(f"{name} must hold {rule}, got {array[bad].flat[0]}")


def check_whole(name: str, array: Floats) -> None:
    """All entries are whole numbers."""
    fractions = array[array != np.floor(array)]
    if fractions.size:
        raise ValueError(f"{name} must hold integers, got {fractions[0]}")


def floats(name: str, value: ArrayLike, shape: tuple[int, ...], low: float = -np.inf, high: float = np.inf) -> Floats:
    """`value` as a float64 array of `shape` (−1 = any length) with finite entries in [low, high]."""
    array = np.asarray(value, dtype=np.float64)
    check_shape(name, array, shape)
    check_entries(name, array, low, high)
    return array


def integers(name: str, value: ArrayLike, shape: tuple[int, ...], low: int, high: int) -> Ints:
    """`value` as an int64 array of `shape` (−1 = any length) with entries in low..high."""
    if isinstance(value, np.ndarray) and value.dtype == np.int64:
        check_shape(name, value, shape)
        if not value.size or (low <= value.min() and value.max() <= high):
            return value.copy()
    array = floats(name, value, shape, low, high)
    check_whole(name, array)
    return array.astype(np.int64)


def check_unique(ids: Sequence[Hashable]) -> None:
    """There is at least one id, and no id occurs twice."""
    if not ids:
        raise ValueError("ids must hold at least one id, got none")
    if len(set(ids)) != len(ids):
        seen: set[Hashable] = set()
        repeated = next(i for i in ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise ValueError(f"ids must be unique within a batch, got {repeated!r} twice")


def unique_ids(ids: Sequence[Hashable]) -> list[Hashable]:
    """`ids` as a list, if it is not empty and no id occurs twice."""
    if isinstance(ids, str):
        raise ValueError(f"ids must be a sequence of ids, got the single string {ids!r}")
    listed = list(ids)
    check_unique(listed)
    return listed


def check_state(name: str, saved: Mapping[str, Any], expected: Mapping[str, Any], memory: Sequence[str]) -> None:
    """`saved` has the values of `expected` (a version, a shape, a setting) and the keys of `memory`."""
    for key in (*expected, *memory):
        if key not in saved:
            raise ValueError(f"state of {name} lacks {key!r}")
        if key in expected and saved[key] != expected[key]:
            raise ValueError(f"state of {name} has {key} = {saved[key]!r}, this one needs {expected[key]!r}")


def dials(variant: Any) -> dict[str, Any]:
    """Name and dials of a frozen dataclass, as a saved state holds them."""
    return {"name": type(variant).__name__, **asdict(variant)}


class _Part(Protocol):
    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, saved: Mapping[str, Any]) -> None: ...


def load_parts(name: str, parts: Mapping[str, _Part | None], saved: Mapping[str, Any]) -> None:
    """Load the state of every part, or of none; both sides must have the same parts."""
    for key, part in parts.items():
        if (part is None) != (saved[key] is None):
            raise ValueError(f"state of {name} {'has' if part is None else 'lacks'} {key}, this one does not")
    before = {key: part.state_dict() for key, part in parts.items() if part is not None}
    try:
        for key, part in parts.items():
            if part is not None:
                part.load_state_dict(saved[key])
    except BaseException:
        for key, part in parts.items():
            if part is not None:
                part.load_state_dict(before[key])
        raise
