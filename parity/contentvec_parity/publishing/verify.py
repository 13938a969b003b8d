"""Replay the recording that ships with published weights on the device at hand.

What was recorded is the original in float32, and its truth; so this says the
same as a parity run, without the original.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_contentvec import hub

from .. import harness
from ..report import document as report
from .evidence import RECORDING


def replay(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> report.Document:
    """Measure the weights of a repository or folder against the recording beside them.

    dtype: the variant to measure, as ``ContentvecModel.from_pretrained`` takes it

    Raises HubError if they cannot be had or are not the files that are stated,
    ParityError if they cannot be compared. A failed comparison is a report.
    """
    step(f"opening {name}")
    files = hub.open_package(name, revision)
    weights, recording = files.weights(dtype), files.file(RECORDING)
    step(f"replaying {RECORDING}")
    return harness.replay(recording, weights)


def line(document: report.Document, name: str | Path) -> str:
    """The whole result in one line."""
    rows = [row for row in document["stages"] if row["kind"] == "features" and row["comparable"]]
    told = f"{report.headline(document)}  {name}, {document['weights']['precision']}"
    if rows:
        mine, theirs = (
            max(float(row[who]["max_abs"]) for row in rows) for who in ("candidate", "reference")
        )
        told += (
            f": within {report.figure(mine)} of the float64 original "
            f"(PyTorch's own float32: {report.figure(theirs)})"
        )
    told += f", on {report.device_line(document)}"
    verdict: dict[str, Any] = document["verdict"]
    return told if verdict["passed"] else f"{told}: {verdict['reason']}"
