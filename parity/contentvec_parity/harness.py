"""A whole parity run: open both sides, measure, prove the tensors, judge, report."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from contentvec_convert.identity import Identification
from mlx_contentvec.config import stage_input, stage_names
from mlx_contentvec.errors import ParityError
from mlx_contentvec.files import is_file, is_folder, is_there, similar_name

from . import machine, with_tf32
from .compare import tensors
from .compare.candidate import MlxCandidate
from .compare.naming import stage_parameters
from .compare.soundness import require_sound
from .compare.stages import Progress, measure, require_same_architecture
from .compare.verdict import Gates, judge
from .identity import checkpoint_being_identified, identify_checkpoint, weights_facts
from .inputs import INPUT_SETS, SAMPLE_RATE, Clip, from_files, least_samples, lengthened
from .references import REFERENCES, Reference, choose, open_reference
from .references.recording import Recording
from .references.yardsticks import Yardstick, yardsticks_for
from .report import document as report

#: on these clips --quick compares every stage, on the longer ones the features alone
QUICK_STAGED = ("short", "quiet", "silence", "min")


def compare_files(
    checkpoint: Path,
    converted: Path,
    *,
    reference: str | None = None,
    audio: Sequence[Path] = (),
    inputs: str = "standard",
    gates: Gates | None = None,
    compare_tf32: bool | None = None,
) -> report.Document:
    """Run the original at ``checkpoint`` and the MLX model of ``converted``, and report.

    reference: "fairseq" or "transformers"; the better one of those installed by default
    inputs:    a name in ``contentvec_parity.inputs.INPUT_SETS``
    compare_tf32: also measure the features with TF32 products, in a second process;
               by default where the device has them and they are off

    Raises ParityError if the two cannot be compared at all; a failed
    comparison is a report whose verdict says so.
    """
    require_files(checkpoint, converted)
    name = reference or choose(checkpoint)
    # first what can be refused at once
    heard = from_files(audio)
    with (
        _progress(f"loading {checkpoint.name}") as show,
        checkpoint_being_identified(checkpoint) as source,
        Identification(converted) as weights,
    ):
        original = open_reference(name, checkpoint)
        show(f"loading {converted.name}")
        candidate = MlxCandidate.open(converted)
        shortest, rate = least_samples(original.config), original.config.sample_rate
        if rate != SAMPLE_RATE:
            heard = from_files(audio, rate)
        for clip in heard:
            if clip.waveform.shape[1] < shortest:
                raise ParityError(
                    f"{clip.name} is too short to be compared",
                    found=f"{clip.waveform.shape[1]} samples at {rate} Hz",
                    expected=f"{shortest} samples or more",
                )
        clips = [lengthened(clip, shortest) for clip in INPUT_SETS[inputs]()] + heard
        document = assemble(
            original,
            candidate,
            clips,
            gates=gates,
            staged=QUICK_STAGED if inputs == "built-in" else None,
            progress=show,
            source=source.result,
            weights=lambda: weights_facts(weights, candidate),
        )
        if _tf32_is_off() if compare_tf32 is None else compare_tf32:
            show("the features with TF32")
            document["with_tf32"] = with_tf32.measure_original(
                original, document["source"], converted
            )
    return document


def _tf32_is_off() -> bool:
    """Whether MLX runs on a GPU without TF32 products."""
    from mlx_contentvec.backend import device_kind, tf32_enabled

    return device_kind() != "cpu" and not tf32_enabled()


def replay(
    recording: Path,
    converted: Path,
    *,
    checkpoint: Path | None = None,
    published: bool = False,
    gates: Gates | None = None,
    compare_tf32: bool | None = None,
) -> report.Document:
    """Hold the MLX model of ``converted`` against a recording, and report.

    Needs neither torch nor fairseq nor the checkpoint; if one is given, it must
    be the one that was recorded.

    published: the recording must hold the clips of all published ones, and be of the
               very file that the weights say they were made from

    Raises ParityError if the recording is of another checkpoint than the
    weights, saying which two do not fit.
    """
    require_files(recording, converted, *([checkpoint] if checkpoint else []))
    original = Recording(recording)
    if published:
        original.require_complete()
    if checkpoint is not None:
        found = identify_checkpoint(checkpoint)
        if found["sha256"] != original.header["source"]["sha256"]:
            raise ParityError(
                f"{recording.name} is a recording of another checkpoint than {checkpoint.name}",
                found=f"{checkpoint.name}, sha256 {found['sha256']}",
                expected="{name}, sha256 {sha256}".format(**original.header["source"]),
            )
    with _progress(f"loading {converted.name}") as show, Identification(converted) as weights:
        candidate = MlxCandidate.open(converted)
        require_same_architecture(original.config, candidate.config)
        _require_recorded(original, candidate, converted, same_file=published)
        document = assemble(
            original,
            candidate,
            original.clips,
            gates=gates,
            progress=show,
            source=lambda: original.header["source"],
            weights=lambda: weights_facts(weights, candidate),
        )
        # a recording's figures are another's word
        require_sound(document)
        if _tf32_is_off() if compare_tf32 is None else compare_tf32:
            show("the features with TF32")
            document["with_tf32"] = with_tf32.measure(recording, converted)
    return document


def _require_recorded(
    recording: Recording, candidate: MlxCandidate, converted: Path, *, same_file: bool
) -> None:
    """Raise ParityError unless the weights can be those that were recorded.

    Weights of another container of the same checkpoint have another source hash
    and the same tensors, every one; weights of another checkpoint have other tensors.

    same_file: another container will not do
    """
    recorded, stated = recording.header["source"], candidate.source
    if stated.get("sha256") == recorded["sha256"]:
        return
    if not same_file:
        table = recording.fingerprints
        proof = tensors.prove_by_hash(table, candidate.parameters(), recording.config)
        if not proof["failures"] and not proof["quantized"]:
            return
    raise ParityError(
        f"{recording.path.name} is not a recording of what {converted.name} was made from",
        found=f"recorded from {recorded['name']}, sha256 {recorded['sha256']}",
        expected=f"sha256 {stated['sha256']}, which {converted.name} was made from"
        if "sha256" in stated
        else f"what {converted.name} was made from, which it does not say",
    )


def assemble(
    original: Reference,
    candidate: MlxCandidate,
    clips: Sequence[Clip],
    *,
    gates: Gates | None = None,
    yardsticks: Mapping[str, Yardstick] | None = None,
    staged: Collection[str] | None = None,
    progress: Progress | None = None,
    source: Callable[[], dict[str, Any]] = dict,
    weights: Callable[[], dict[str, Any]] | None = None,
) -> report.Document:
    """Measure two opened sides on ``clips`` and make the whole report of it.

    yardsticks:      see ``contentvec_parity.references.yardsticks``; those that can be
                     had here by default
    staged:          see ``contentvec_parity.compare.stages.measure``
    source, weights: called at the end for those two entries of the report

    Raises ParityError if the two are different architectures.
    """
    started = time.monotonic()
    require_same_architecture(original.config, candidate.config)
    if progress is not None:
        progress("comparing tensors")
    parameters = candidate.parameters()
    if isinstance(original, Recording):
        proof = tensors.prove_by_hash(original.fingerprints, parameters, original.config)
    else:
        proof = tensors.prove(*original.tensors(), parameters, original.config)
    if yardsticks is None:
        yardsticks = (
            original.yardsticks(candidate.precision)
            if isinstance(original, Recording)
            else yardsticks_for(original, candidate.precision)
        )
    clip_rows, rows = measure(
        original, candidate, clips, yardsticks=yardsticks, staged=staged, progress=progress
    )
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
        "yardsticks": {name: yardstick.about for name, yardstick in yardsticks.items()},
        "clips": clip_rows,
        "stages": rows,
        "tensors": proof,
        "with_tf32": None,
        "seconds": round(time.monotonic() - started, 1),
    }
    # names and versions are a recording's and the weights' own
    document = report.printable_texts(document)
    document["verdict"] = judge(document, gates or Gates())
    return document


def _reference(original: Reference) -> dict[str, Any]:
    stages = stage_names(original.config)
    return {
        "name": original.name,
        "versions": original.versions,
        "recorded_from": original.recorded_from if isinstance(original, Recording) else None,
        "stages": list(stages),
        "inputs": {stage: stage_input(original.config, stage) for stage in stages},
        "reads": {stage: list(stage_parameters(original.config, stage)) for stage in stages},
    }


def require_files(*paths: Path) -> None:
    """Raise ParityError unless each of ``paths`` is a file or a folder."""
    for path in paths:
        if not is_there(path):
            raise ParityError(f"no such file: {path}", hint=similar_name(path))
        if not is_file(path) and not is_folder(path):
            raise ParityError(
                f"{path} is not a checkpoint, weights or a recording",
                found="a pipe, a device or a socket",
                expected="a regular file, or a folder in the Hugging Face layout",
            )


def reference_named(given: str | None) -> tuple[str | None, Path | None]:
    """What ``--reference`` names: an implementation, or a recording's file.

    Raises ParityError if it is neither.
    """
    if given is None or given in REFERENCES:
        return given, None
    path = Path(given)
    if path.suffix == ".safetensors" or is_file(path):
        return None, path
    raise ParityError(
        f"there is no reference {given!r}",
        expected=", ".join(REFERENCES) + ", or a recording (.safetensors)",
    )


@contextlib.contextmanager
def _progress(first: str) -> Iterator[Progress]:
    """A spinner on stderr that names what is being done, gone when it ends."""
    from mlx_contentvec.terminal import Status

    with Status(first) as status:
        yield status.update
