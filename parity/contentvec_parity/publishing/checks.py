"""Whether the papers of converted weights are about those weights, and prove them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from contentvec_convert.checkpoint import open_checkpoint
from contentvec_convert.known_files import KNOWN_FILES
from contentvec_convert.precision import PRECISIONS
from mlx_contentvec.config import ModelConfig
from mlx_contentvec.errors import HubError, name_list
from mlx_contentvec.json_text import JsonError, parse_object

from ..compare import tensors
from ..compare.candidate import Parameter
from ..compare.stages import require_same_architecture
from ..compare.verdict import Gates, judge
from ..inputs import Clip, built_in
from .evidence import Evidence

#: what must have been measured: the clips that every figure refers to
MEASURED: Callable[[], list[Clip]] = built_in

#: a recording larger than this does not ship
RECORDING_LIMIT = 10_000_000

#: safetensors dtype -> its name in a checkpoint
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "U32": "uint32"}
#: keys of a ledger's row -> their types
_ROW = {
    "target": str,
    "sources": list,
    "transform": str,
    "encoding": str,
    "dtype": str,
    "shape": list,
    "sha256": str,
    "exact": bool,
}


def check_metadata(weights: Path, metadata: Mapping[str, str]) -> None:
    """HubError unless `convert` can have written a file with this metadata."""
    if {"config", "source", "dtype"} - set(metadata) or metadata.get("format") != "mlx":
        raise HubError(
            f"{weights.name} was not written by mlx-contentvec convert",
            found=f"metadata {name_list(sorted(metadata)) or 'none'}",
            hint="mlx-contentvec convert SOURCE",
        )
    try:
        parsed = {
            key: parse_object(metadata[key])
            for key in ("config", "source", "quantization")
            if key in metadata
        }
    except JsonError as error:
        raise HubError(
            f"the metadata of {weights.name} cannot be read", found=str(error)
        ) from error
    ModelConfig.from_dict(parsed["config"])
    source = parsed["source"]
    facts: list[Any] = [source.get(key) for key in ("size", "md5", "sha256")]
    if [type(fact) for fact in facts] != [int, str, str]:
        raise HubError(f"{weights.name} does not say what it was made from")
    known = source.get("known_as")
    row = next((row for row in KNOWN_FILES if row.key == known), None)
    if known is not None and (row is None or not row.is_file(*facts)):
        raise HubError(
            f"{weights.name} was not made from what it says",
            found=f"sha256 {source['sha256']}",
            expected=f"the source that is known as {str(known)[:80]}",
        )
    if metadata["dtype"] not in PRECISIONS:
        raise HubError(f"{weights.name} is in no known number format", found=metadata["dtype"][:40])


def check_ledger(evidence: Evidence, path: Path) -> None:
    """HubError unless the ledger is about the file, its source and its configuration."""
    output = evidence.ledger.get("output")
    stated = output.get("sha256") if isinstance(output, dict) else None
    if stated != evidence.sha256:
        raise HubError(
            f"the ledger {path.name} is not about {evidence.weights.name}",
            found=f"it describes a file of sha256 {stated}",
            expected=f"sha256 {evidence.sha256}",
            hint="convert again, and keep both files that come out of it",
        )
    source = evidence.ledger.get("source")
    named = isinstance(source, dict) and isinstance(source.get("name"), str)
    if (
        not named
        or source != evidence.source
        or evidence.ledger.get("config") != json.loads(evidence.metadata["config"])
    ):
        raise HubError(
            f"the ledger {path.name} does not fit {evidence.weights.name}",
            found="another source or configuration than the weights name",
            hint="convert again, and keep both files that come out of it",
        )


def check_ledger_rows(evidence: Evidence, path: Path) -> None:
    """HubError unless each tensor of the file has its row, with its shape and its bytes' hash."""

    def refuse(found: str) -> HubError:
        return HubError(
            f"the ledger {path.name} does not account for {evidence.weights.name}",
            found=found,
            hint="convert again, and keep both files that come out of it",
        )

    ledger = evidence.ledger
    listed, drops, counts = (ledger.get(key) for key in ("tensors", "drops", "counts"))
    if not (isinstance(listed, list) and isinstance(drops, list) and isinstance(counts, dict)):
        raise refuse("no tensors, drops or counts")
    for row in listed:
        if not isinstance(row, dict) or not all(
            isinstance(row.get(key), kind) for key, kind in _ROW.items()
        ):
            raise refuse("a tensor that is not described")
    names = [
        source.get("name") if isinstance(source, dict) else None
        for sources in [drops, *(row["sources"] for row in listed)]
        for source in sources
    ]
    if not all(isinstance(name, str) for name in names):
        raise refuse("a source tensor without a name")
    rows = {row["target"]: row for row in listed}
    with open_checkpoint(evidence.weights) as opened:
        if len(rows) < len(listed) or set(rows) != set(opened.tensors):
            raise refuse(f"{len(listed)} tensors, {len(opened.tensors)} are in the file")
        for name, tensor in opened.tensors.items():
            row = rows[name]
            digest = hashlib.sha256(tensor.read().tobytes()).hexdigest()
            facts = (_DTYPES.get(row["dtype"]), row["shape"], row["sha256"])
            if facts != (tensor.dtype, list(tensor.shape), digest):
                raise refuse(f"{name} is not as it says")
    expected = {
        "source_tensors": len(set(names)),
        "dropped": len(drops),
        "written": len(listed),
        "exact": sum(row["exact"] for row in listed),
    }
    if counts != expected:
        raise refuse("counts that its rows do not have")


def check_parity(evidence: Evidence, path: Path) -> None:
    """HubError unless the report is about the file and its source, and proves it.

    The verdict is judged again by this project's limits: the report's own is not believed.
    """
    document = evidence.parity
    again = f"mlx-contentvec parity CHECKPOINT {evidence.weights.name} --json {path.name}"

    def refuse(problem: str, found: object, expected: object) -> HubError:
        return HubError(
            f"the parity report {path.name} {problem}",
            found=str(found)[:200],
            expected=str(expected),
            hint=again,
        )

    measured, source = document["weights"], document["source"]
    if measured.get("sha256") != evidence.sha256:
        raise refuse(
            f"is not about {evidence.weights.name}",
            f"it measured a file of sha256 {measured.get('sha256')}",
            f"sha256 {evidence.sha256}",
        )
    for key in ("sha256", "md5", "size", "known_as"):
        if source.get(key) != evidence.source.get(key):
            raise refuse(
                "compared with another checkpoint",
                f"{key} {source.get(key)}",
                f"{key} {evidence.source.get(key)}, of what the weights were made from",
            )
    if measured["precision"] != evidence.dtype:
        raise refuse("measured another number format", measured["precision"], evidence.dtype)
    if document["config"] != ModelConfig.from_json(evidence.metadata["config"]).to_dict():
        raise refuse("measured another model", "another configuration", "that of the weights")
    if document["tensors"] is None or document["reference"]["name"] == "recording":
        raise HubError(
            f"the parity report {path.name} did not compare the tensors",
            hint="run it against the checkpoint itself, not against a recording\n" + again,
        )
    clips = {clip["name"]: clip["samples"] for clip in document["clips"]}
    for clip in MEASURED():
        if clips.get(clip.name) != clip.waveform.shape[1]:
            raise refuse("lacks an input", name_list(clips), f"the clip {clip.name} among them")
    verdict = document["verdict"] = judge(document, Gates())
    if not verdict["passed"]:
        raise HubError(
            f"{evidence.weights.name} has not passed parity",
            found=verdict["reason"],
            hint="mlx-contentvec parity says which stage is to blame\n" + again,
        )


def check_recording(path: Path, evidence: Sequence[Evidence], *, proven: bool = False) -> None:
    """HubError or ParityError unless the recording is whole, and of these very weights.

    proven: the weights were held against it a moment ago
    """
    from ..references.recording import Recording

    size = path.stat().st_size
    if size > RECORDING_LIMIT:
        raise HubError(
            f"{path.name} is too large to ship",
            found=f"{size:,} bytes",
            expected=f"at most {RECORDING_LIMIT:,} bytes",
        )
    recording = Recording(path)
    source = recording.header["source"]
    for found in evidence:
        if source["sha256"] != found.source["sha256"]:
            raise HubError(
                f"{path.name} was recorded from another checkpoint",
                found=f"sha256 {source['sha256']}",
                expected=f"sha256 {found.source['sha256']}",
            )
    recording.require_complete()
    for found in () if proven else evidence:
        config = ModelConfig.from_json(found.metadata["config"])
        require_same_architecture(recording.config, config)
        proof = tensors.prove_by_hash(recording.fingerprints, _parameters(found.weights), config)
        if proof["failures"]:
            raise HubError(
                f"{path.name} was recorded from other weights than {found.weights.name} has",
                found=name_list(failure["name"] for failure in proof["failures"]),
                hint="record the checkpoint that was converted:\n"
                f"mlx-contentvec parity record CHECKPOINT {path.name} --force",
            )


def _parameters(weights: Path) -> dict[str, Parameter]:
    """What a converted file holds, bfloat16 widened, as the model would load it."""
    with open_checkpoint(weights) as opened:
        return {
            name: Parameter(
                tensor.float32() if tensor.dtype == "bfloat16" else tensor.read(), tensor.dtype
            )
            for name, tensor in opened.tensors.items()
        }
