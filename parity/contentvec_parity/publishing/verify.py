"""Replay the recording that ships with published weights on the device at hand.

What was recorded is the original in float32, and its truth; so this says the
same as a parity run, without the original.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_contentvec import hub
from mlx_contentvec.errors import HubError, name_list
from mlx_contentvec.files import expand_home, is_file
from mlx_contentvec.first_release import is_first_release
from mlx_contentvec.weights import read_safetensors

from .. import harness
from ..compare.candidate import read_metadata
from ..report import document as report
from . import checks
from .evidence import RECORDING


def replay(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    step: Callable[[str], None] = lambda _: None,
) -> report.Document:
    """Measure the weights of a repository or folder against the recording beside them.

    dtype: the variant to measure; only what lies there in this format is measured

    Raises HubError if they cannot be had, are not the files that are stated, or lack
    what proves them, ParityError if the recording is not sound, or not of what the
    weights were made from. A failed comparison is a report.
    """
    step(f"opening {name}")
    path = expand_home(name)
    if is_file(path):
        raise _unproven(path, path.name, ["everything that a package has beside the weights"])
    files = hub.open_package(name, revision)
    weights = files.weights(dtype)
    if lacks := files.missing(hub.CHECKSUMS, RECORDING):
        raise _unproven(weights, f"{name}", lacks)
    recording = files.file(RECORDING)
    stated = read_metadata(weights)
    checks.check_metadata(weights, stated)
    if dtype not in (None, stated["dtype"]):
        raise HubError(
            f"there are no {dtype} weights in {name}",
            found=f"{weights.name} in {stated['dtype']}",
            hint="without --dtype the main weights are measured, as they are",
        )
    step(f"replaying {RECORDING}")
    return harness.replay(recording, weights, published=True)


def _unproven(weights: Path, called: str, lacks: list[str]) -> HubError:
    """What keeps these weights from being verified, and how to come by some that can be."""
    stated = read_metadata(weights)
    lacks = [
        *(f"{what} in its metadata" for what in ("config", "source") if what not in stated),
        *lacks,
    ]
    found = f"without {name_list(lacks)}"
    if "config" not in stated:
        arrays, _ = read_safetensors(weights)
        if is_first_release(arrays):
            found = f"weights of the first release (0.1): {found}"
    return HubError(
        f"{called} cannot be verified: nothing in it says what it must compute",
        found=found,
        expected="a folder made by `mlx-contentvec package`, or a repository like owner/name",
        hint="convert the original checkpoint and compare with that:\n"
        "mlx-contentvec convert hubert_base.pt -o contentvec_base.safetensors\n"
        "mlx-contentvec parity hubert_base.pt contentvec_base.safetensors",
    )


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
