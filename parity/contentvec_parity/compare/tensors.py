"""Tensor by tensor: what the original holds against what the MLX model loaded.

Features cannot show everything: the key bias cancels in the softmax, and a
tensor that no stage reads moves nothing. So every tensor of the original is
accounted for by name, and every parameter compared exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_contentvec.config import ModelConfig

from .candidate import Parameter
from .naming import LAYOUTS, ROUNDED_LAYOUTS, UNREAD, Row, rows

#: what quantised parameters are accompanied by; the features judge those
QUANTISED = (".scales", ".biases")


def prove_by_hash(
    hashes: Mapping[str, str], parameters: Mapping[str, Parameter], config: ModelConfig
) -> dict[str, Any]:
    """Compare loaded parameters with what the original's hash to, where a recording says so.

    hashes: parameter -> SHA-256 of the float32 values it must have

    Parameters of another dtype, quantised ones, and the computed positional
    kernel are counted as ``uncompared``.
    """
    from ..references.recording import hash_values

    failures: list[dict[str, Any]] = []
    exact = uncompared = 0
    for row in rows(config):
        loaded = parameters.get(row.target)
        if loaded is None:
            failures.append(_failure(row, "the MLX model has no such parameter"))
        elif row.target not in hashes or loaded.dtype != "float32":
            uncompared += 1
        elif hash_values(loaded.values) == hashes[row.target]:
            exact += 1
        else:
            failures.append(_failure(row, "its values are not those that were recorded"))
    return {
        "sources": None,
        "parameters": len(parameters),
        "exact": exact,
        "rounded": 0,
        "quantized": 0,
        "uncompared": uncompared,
        "largest_ulps": 0.0,
        "unread": [],
        "failures": failures,
    }


def _rounded(exact: NDArray[Any], dtype: str) -> NDArray[Any]:
    """``exact`` rounded to nearest in ``dtype``; bfloat16 as float32."""
    if dtype != "bfloat16":
        return exact.astype(dtype)
    bits = np.ascontiguousarray(exact, np.float32).view(np.uint32).astype(np.uint64)
    # half a unit of the sixteenth bit, and one less on a tie with an even neighbour
    kept = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return kept.astype(np.uint32).view(np.float32).reshape(exact.shape)


def _twin(
    row: Row,
    loaded: NDArray[Any],
    naming: str,
    originals: Mapping[str, NDArray[Any]],
    config: ModelConfig,
) -> str | None:
    """Which tensor of the original a parameter holds instead of its own, if it is one."""
    for other in rows(config):
        sources = getattr(other, naming)
        if other.layout in ROUNDED_LAYOUTS or sources[0] not in originals:
            continue
        values = LAYOUTS[other.layout](originals[sources[0]])
        if other != row and values.shape == loaded.shape and np.array_equal(values, loaded):
            return f"the values of {sources[0]}"
        if other == row and values.ndim == 2 and np.array_equal(values.T, loaded):
            return "the original transposed"
    return "nothing but zeros" if not loaded.any() else None


def _failure(row: Row, what: str) -> dict[str, Any]:
    return {"name": row.target, "stage": row.stage, "what": what}


def prove(
    naming: str,
    originals: Mapping[str, NDArray[Any]],
    parameters: Mapping[str, Parameter],
    config: ModelConfig,
) -> dict[str, Any]:
    """Compare each tensor of the original with the parameter it became.

    naming:     "fairseq" or "transformers": which names ``originals`` has
    parameters: name in the MLX model -> array, as loaded

    A parameter must equal the original exactly, once laid out alike and rounded
    to its own dtype; the folded positional kernel, a computed value, to one unit
    in the last place. Quantised parameters are counted, not compared.
    """
    failures: list[dict[str, Any]] = []
    counts = {"exact": 0, "rounded": 0, "quantized": 0}
    largest_ulps = 0.0
    used: set[str] = set()
    expected_names: set[str] = set()
    for row in rows(config):
        sources: tuple[str, ...] = getattr(row, naming)
        used.update(sources)
        expected_names.add(row.target)

        def fail(what: str, row: Row = row) -> None:
            failures.append(_failure(row, what))

        absent = [name for name in sources if name not in originals]
        if absent:
            fail(f"the original has no {absent[0]}")
            continue
        if row.target not in parameters:
            fail(f"{sources[-1]} of the original has no counterpart in the MLX model")
            continue
        loaded = parameters[row.target].values
        if row.target.removesuffix(".weight") + ".scales" in parameters:
            counts["quantized"] += 1
            continue
        if row.layout in ROUNDED_LAYOUTS:
            exact = LAYOUTS[row.layout](*(originals[name].astype(np.float64) for name in sources))
        else:
            exact = LAYOUTS[row.layout](*(originals[name] for name in sources))
        if loaded.shape != exact.shape:
            fail(f"shape {loaded.shape} instead of {exact.shape}")
            continue
        expected = _rounded(exact, parameters[row.target].dtype)
        if np.array_equal(loaded, expected):
            counts["exact"] += 1
            continue
        off = np.abs(loaded.astype(np.float64) - exact.astype(np.float64))
        if row.layout in ROUNDED_LAYOUTS:
            units = float((off / np.spacing(np.abs(expected)).astype(np.float64)).max())
            largest_ulps = max(largest_ulps, units)
            if units <= ROUNDED_LAYOUTS[row.layout]:
                counts["rounded"] += 1
                continue
        at = tuple(int(i) for i in np.unravel_index(int(np.nanargmax(off)), off.shape))
        wrong = int((loaded != expected).sum())
        twin = _twin(row, loaded, naming, originals, config)
        fail(
            f"differs from {' and '.join(sources)} in {wrong:,} of {off.size:,} values, "
            f"by up to {off[at]:.3g} (at {at})" + (f"; it holds {twin}" if twin else "")
        )
    for name in originals:
        if name not in used and name not in UNREAD:
            failures.append(
                {"name": name, "stage": None, "what": "a tensor of the original that nothing reads"}
            )
    for name in parameters:
        if name not in expected_names and not name.endswith(QUANTISED):
            failures.append(
                {"name": name, "stage": None, "what": "a parameter that the original lacks"}
            )
    return {
        "sources": len(originals),
        "parameters": len(parameters),
        **counts,
        "uncompared": 0,
        "largest_ulps": largest_ulps,
        "unread": sorted(name for name in originals if name in UNREAD),
        "failures": failures,
    }
