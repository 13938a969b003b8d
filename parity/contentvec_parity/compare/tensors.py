"""Tensor by tensor: what the original holds against what the MLX model loaded.

Features cannot show everything: the key bias cancels in the softmax, and a
tensor that no stage reads moves nothing. So every tensor of the original is
accounted for by name, and every parameter compared exactly.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_contentvec.config import ModelConfig

from .candidate import Parameter
from .fingerprints import FORMATS, Fingerprint, agrees, rounded
from .naming import LAYOUTS, ROUNDED_LAYOUTS, UNREAD, Row, rows

#: what quantised parameters are accompanied by; the features judge those
QUANTISED = (".scales", ".biases")


def prove_by_hash(
    fingerprints: Mapping[str, Fingerprint],
    parameters: Mapping[str, Parameter],
    config: ModelConfig,
) -> dict[str, Any]:
    """Compare loaded parameters with what a recording knows the original's by.

    fingerprints: parameter -> its ``contentvec_parity.compare.fingerprints``

    Every parameter must be known and agree, in whichever format it is stored.
    Quantised ones are counted; the features judge those.
    """
    failures: list[dict[str, Any]] = []
    counts = {"exact": 0, "rounded": 0, "quantized": 0}
    table = rows(config)
    for row in table:
        loaded, known = parameters.get(row.target), fingerprints.get(row.target)
        if loaded is None:
            failures.append(_failure(row, "the MLX model has no such parameter"))
        elif known is None:
            failures.append(_failure(row, "the recording does not say what its values are"))
        elif _is_quantised(row.target, parameters):
            counts["quantized"] += 1
        elif loaded.dtype not in FORMATS:
            failures.append(_failure(row, f"it is stored as {loaded.dtype}"))
        elif agrees(loaded.values, loaded.dtype, known):
            counts["rounded" if row.layout in ROUNDED_LAYOUTS else "exact"] += 1
        else:
            failures.append(_failure(row, "its values are not those that were recorded"))
    failures += _surplus(parameters, {row.target for row in table})
    return {
        "sources": None,
        "parameters": len(parameters),
        **counts,
        "largest_ulps": 0.0,
        "unread": [],
        "failures": failures,
    }


def _is_quantised(target: str, parameters: Mapping[str, Parameter]) -> bool:
    return target.removesuffix(".weight") + ".scales" in parameters


def _surplus(
    parameters: Mapping[str, Parameter], expected: Collection[str]
) -> list[dict[str, Any]]:
    """Parameters that the original lacks; what accompanies a quantised one belongs to it."""
    return [
        {"name": name, "stage": None, "what": "a parameter that the original lacks"}
        for name in parameters
        if name not in expected and not name.endswith(QUANTISED)
    ]


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
        if _is_quantised(row.target, parameters):
            counts["quantized"] += 1
            continue
        if row.layout in ROUNDED_LAYOUTS:
            exact = LAYOUTS[row.layout](*(originals[name].astype(np.float64) for name in sources))
        else:
            exact = LAYOUTS[row.layout](*(originals[name] for name in sources))
        if loaded.shape != exact.shape:
            fail(f"shape {loaded.shape} instead of {exact.shape}")
            continue
        expected = rounded(exact, parameters[row.target].dtype)
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
    failures += _surplus(parameters, expected_names)
    return {
        "sources": len(originals),
        "parameters": len(parameters),
        **counts,
        "largest_ulps": largest_ulps,
        "unread": sorted(name for name in originals if name in UNREAD),
        "failures": failures,
    }
