"""Hashes by which a parameter is known without the checkpoint, in every floating-point format.

A parameter that is only moved has, in each format, one value for each element:
its float32 value rounded to nearest. The folded positional kernel is computed,
and another machine may compute the next float32. Its values are hashed on the
coarser grids of float16 and bfloat16, where that neighbour is the same number but
for the few values beside a boundary of the grid. Those are listed: they may be
either of two grid points, and are hashed as the one nearer to zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .naming import ROUNDED_LAYOUTS

#: formats that a parameter may be stored in
FORMATS = ("float32", "float16", "bfloat16")
#: formats whose values are float32's on a coarser grid
GRIDS = ("float16", "bfloat16")

#: units in the last place of float32 by which computed values are taken to differ at most:
#: each of two machines may be off by the units that ROUNDED_LAYOUTS allows
COMPUTED_ULPS = 2 * max(ROUNDED_LAYOUTS.values())

#: one parameter's entry in a recording: format -> SHA-256, and for a computed one ``either``
Fingerprint = Mapping[str, Any]


def rounded(exact: NDArray[Any], dtype: str) -> NDArray[Any]:
    """``exact`` rounded to nearest in ``dtype``; bfloat16 as float32."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return exact.astype(dtype)
    bits = np.ascontiguousarray(exact, np.float32).view(np.uint32).astype(np.uint64)
    # half a unit of the sixteenth bit, and one less on a tie with an even neighbour
    kept = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return kept.astype(np.uint32).view(np.float32).reshape(exact.shape)


def hash_values(values: NDArray[Any]) -> str:
    """SHA-256 of an array's values as little-endian float32."""
    return hashlib.sha256(np.ascontiguousarray(values, "<f4").tobytes()).hexdigest()


def fingerprint(values: NDArray[Any]) -> dict[str, str]:
    """Format -> SHA-256 of a parameter whose values are moved, not computed."""
    values = np.asarray(values, np.float32)
    return {dtype: hash_values(rounded(values, dtype)) for dtype in FORMATS}


def computed_fingerprint(values: NDArray[Any]) -> dict[str, Any]:
    """The same for computed values: grid -> SHA-256, ``either``: grid -> where two will do.

    ``either`` has two lists of indices into the flat array: where the number of the
    grid point nearer to zero, its bits read as an integer, is even, and where it is odd.
    """
    found: dict[str, Any] = {"either": {}}
    flat = np.asarray(values, np.float32).ravel()
    magnitude = np.abs(flat).view(np.uint32).astype(np.int64)
    lower, upper = (
        np.maximum(magnitude + step, 0).astype(np.uint32).view(np.float32)
        for step in (-COMPUTED_ULPS, COMPUTED_ULPS)
    )
    for grid in GRIDS:
        low, high = _number(lower, grid), _number(upper, grid)
        unsure = np.flatnonzero(low != high)
        odd = low[unsure] & 1 == 1
        either = {"even": unsure[~odd].tolist(), "odd": unsure[odd].tolist()}
        found[grid] = _hash_on_grid(flat, grid, either)
        found["either"][grid] = either
    return found


def agrees(values: NDArray[Any], dtype: str, known: Fingerprint) -> bool:
    """Whether loaded values, stored as ``dtype``, are those that ``known`` was made from."""
    if "either" not in known:
        return hash_values(values) == str(known[dtype])
    flat = np.asarray(values, np.float32).ravel()
    return all(
        _hash_on_grid(flat, grid, known["either"][grid]) == known[grid]
        for grid in (GRIDS if dtype == "float32" else (dtype,))
    )


def _number(values: NDArray[np.float32], grid: str) -> NDArray[np.int64]:
    """Which point of the grid each value is nearest to, counted from zero, without sign."""
    on_grid = np.abs(rounded(values, grid))
    on_grid = on_grid.view(np.uint32) >> 16 if grid == "bfloat16" else on_grid.view(np.uint16)
    return np.asarray(on_grid, np.int64)


def _hash_on_grid(flat: NDArray[np.float32], grid: str, either: Mapping[str, list[int]]) -> str:
    """SHA-256 of the grid points as signed integers, the unsure ones taken nearer to zero."""
    numbers = _number(flat, grid)
    for parity, name in enumerate(("even", "odd")):
        places = np.asarray(either[name], np.int64)
        numbers[places] -= (numbers[places] & 1) != parity
    numbers[flat < 0] *= -1
    return hashlib.sha256(numbers.astype("<i4").tobytes()).hexdigest()
