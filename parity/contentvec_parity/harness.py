"""A whole parity run: open both sides, measure, prove the tensors, judge, report."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from contentvec_convert.identity import identify
from mlx_contentvec.errors import ParityError

from . import machine, report, tensors
from .candidate import MlxCandidate
from .inputs import INPUT_SETS, from_files
from .naming import stage_names, stage_parameters
from .references import Reference, choose, open_reference
from .run import Progress, measure, require_same_architecture
from .verdict import Gates, judge

#: on these clips --quick also runs every stage by itself
QUICK_LOCAL = ("short", "quiet", "min")


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
    started = time.monotonic()
    gates = gates or Gates()
    for path in (checkpoint, converted):
        if not path.exists():
            raise ParityError(f"no such file: {path}")
    name = reference or choose(checkpoint)
    with _progress(f"loading {checkpoint.name}") as show:
        original = open_reference(name, checkpoint)
        show(f"loading {converted.name}")
        candidate = MlxCandidate.open(converted)
        require_same_architecture(original.config, candidate.config)
        clips = INPUT_SETS[inputs]()
        clips += from_files(audio, original.config.receptive_field)
        show("comparing tensors")
        proof = tensors.prove(*original.tensors(), candidate.parameters(), original.config)
        local = QUICK_LOCAL if inputs == "built-in" else None
        clip_rows, rows = measure(original, candidate, clips, local=local, progress=show)
    document: report.Document = {
        "schema": report.SCHEMA,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "weights": _weights(converted, candidate),
        "source": _source(checkpoint, candidate),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "flags": machine.flags(),
        "config": original.config.to_dict(),
        "reference": _reference(original),
        "clips": clip_rows,
        "stages": rows,
        "tensors": proof,
        "device_default": None,
    }
    document["seconds"] = round(time.monotonic() - started, 1)
    document["verdict"] = judge(document, gates)
    return document


def _reference(original: Reference) -> dict[str, Any]:
    stages = stage_names(original.config)
    return {
        "name": original.name,
        "versions": original.versions,
        "stages": list(stages),
        "reads": {stage: list(stage_parameters(original.config, stage)) for stage in stages},
    }


def _weights(converted: Path, candidate: MlxCandidate) -> dict[str, Any]:
    identity = identify(converted)
    return {
        "name": converted.name,
        "size": identity.size,
        "sha256": identity.sha256,
        "precision": candidate.precision,
        "source": json.loads(candidate.metadata.get("source", "{}")),
    }


def _source(checkpoint: Path, candidate: MlxCandidate) -> dict[str, Any]:
    stated = json.loads(candidate.metadata.get("source", "{}"))
    files = [checkpoint] if checkpoint.is_file() else _weight_files(checkpoint)
    found = [identify(path) for path in files]
    first = found[0]
    return {
        "name": checkpoint.name,
        "size": sum(item.size for item in found),
        "md5": first.md5,
        "sha256": first.sha256,
        "known_as": first.known.key if first.known else None,
        "stand_in": stated.get("stand_in") or None,
        "converted_from_it": stated.get("sha256") == first.sha256 if "sha256" in stated else None,
    }


def _weight_files(folder: Path) -> list[Path]:
    from contentvec_convert.checkpoint import open_checkpoint

    with open_checkpoint(folder) as opened:
        return list(opened.files)


@contextlib.contextmanager
def _progress(first: str) -> Iterator[Progress]:
    """A spinner on stderr that names what is being done, gone when it ends."""
    from rich.console import Console

    with Console(stderr=True).status(first) as status:
        yield status.update
