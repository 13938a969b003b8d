"""A whole parity run: open both sides, measure, prove the tensors, judge, report."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from contentvec_convert.checkpoint import open_checkpoint
from contentvec_convert.identity import Identification, Identity
from mlx_contentvec.errors import ParityError

from . import machine, report, tensors
from .candidate import MlxCandidate
from .inputs import INPUT_SETS, Clip, from_files
from .naming import stage_input, stage_names, stage_parameters
from .references import Reference, choose, open_reference
from .run import Progress, measure, require_same_architecture
from .verdict import Gates, judge

#: on these clips --quick also runs every stage by itself
QUICK_LOCAL = ("short", "quiet", "min")

STAND_IN = (
    "the weights are synthetic, made to be loud about mistakes: these figures say how exact the "
    "arithmetic is, not what the real weights give"
)


def compare_files(
    checkpoint: Path,
    converted: Path,
    *,
    reference: str | None = None,
    audio: Sequence[Path] = (),
    inputs: str = "standard",
    gates: Gates | None = None,
) -> report.Document:
    """Run the original at ``checkpoint`` and the MLX model of ``converted``, and report.

    inputs: a name in ``contentvec_parity.inputs.INPUT_SETS``

    Raises ParityError if the two cannot be compared at all; a failed
    comparison is a report whose verdict says so.
    """
    for path in (checkpoint, converted):
        if not path.exists():
            raise ParityError(f"no such file: {path}")
    name = reference or choose(checkpoint)
    with (
        _progress(f"loading {checkpoint.name}") as show,
        Identification(checkpoint, _weight_files(checkpoint)) as source,
        Identification(converted) as weights,
    ):
        original = open_reference(name, checkpoint)
        show(f"loading {converted.name}")
        candidate = MlxCandidate.open(converted)
        clips = INPUT_SETS[inputs]()
        clips += from_files(audio, original.config.receptive_field)
        local = QUICK_LOCAL if inputs == "built-in" else None
        return assemble(
            original,
            candidate,
            clips,
            gates=gates,
            local=local,
            progress=show,
            source=lambda: _source(source.result(), candidate),
            weights=lambda: _weights(weights.result(), candidate),
        )


def assemble(
    original: Reference,
    candidate: MlxCandidate,
    clips: Sequence[Clip],
    *,
    gates: Gates | None = None,
    local: Collection[str] | None = None,
    progress: Progress | None = None,
    source: Callable[[], dict[str, Any]] = dict,
    weights: Callable[[], dict[str, Any]] | None = None,
) -> report.Document:
    """Measure two opened sides on ``clips`` and make the whole report of it.

    local:           see ``contentvec_parity.run.measure``
    source, weights: called at the end for those two entries of the report

    Raises ParityError if the two are different architectures.
    """
    started = time.monotonic()
    require_same_architecture(original.config, candidate.config)
    if progress is not None:
        progress("comparing tensors")
    proof = tensors.prove(*original.tensors(), candidate.parameters(), original.config)
    clip_rows, rows = measure(original, candidate, clips, local=local, progress=progress)
    document: report.Document = {
        "schema": report.SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "weights": weights() if weights is not None else {"precision": candidate.precision},
        "source": source(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "flags": machine.flags(),
        "config": original.config.to_dict(),
        "reference": _reference(original),
        "clips": clip_rows,
        "stages": rows,
        "tensors": proof,
        "device_default": None,
        "seconds": round(time.monotonic() - started, 1),
    }
    document["verdict"] = judge(document, gates or Gates())
    return document


def _reference(original: Reference) -> dict[str, Any]:
    stages = stage_names(original.config)
    return {
        "name": original.name,
        "versions": original.versions,
        "stages": list(stages),
        "inputs": {stage: stage_input(original.config, stage) for stage in stages},
        "reads": {stage: list(stage_parameters(original.config, stage)) for stage in stages},
    }


def _weights(identity: Identity, candidate: MlxCandidate) -> dict[str, Any]:
    return {
        "name": identity.name,
        "size": identity.size,
        "sha256": identity.sha256,
        "precision": candidate.precision,
        "source": json.loads(candidate.metadata.get("source", "{}")),
    }


def _source(identity: Identity, candidate: MlxCandidate) -> dict[str, Any]:
    stated = json.loads(candidate.metadata.get("source", "{}"))
    return {
        **identity.to_dict(),
        "stand_in": STAND_IN if stated.get("stand_in") else None,
        "converted_from_it": stated.get("sha256") == identity.sha256
        if "sha256" in stated
        else None,
    }


def _weight_files(checkpoint: Path) -> list[Path]:
    if checkpoint.is_file():
        return [checkpoint]
    with open_checkpoint(checkpoint) as opened:
        return list(opened.files)


@contextlib.contextmanager
def _progress(first: str) -> Iterator[Progress]:
    """A spinner on stderr that names what is being done, gone when it ends."""
    from rich.console import Console

    with Console(stderr=True).status(first) as status:
        yield status.update
