"""A recording: inputs and what the original made of them, in one small safetensors file.

Whoever has one can check their own device against the original without torch,
fairseq or the checkpoint. Per clip and stage it holds the original's float32
output, and the truth as what must be added to it: the error of float32, which
float16 and a scale hold to one part in two thousand. The same for the truth of
the stage by itself, on the input the original's stage was given.

Entries, for clip C and stage S:

    C/waveform       (batch, samples) float32
    C/padding_mask   (batch, samples) uint32, 1 where padded, where the clip has padding
    C/input          (batch, samples) float32, where the model wants it normalised
    C/S              (batch, frames, channels) float32
    C/S/truth        the same shape, float16: (truth - C/S) / scale
    C/S/local        the same shape, float16, where S was also run by itself

The metadata's ``recording`` is JSON: ``schema``, ``source`` (the checkpoint:
name, size, md5, sha256, known_as, stand_in), ``config``, ``reference`` (name,
versions), ``chip``, ``clips`` (name, about, origin, stages), ``scales``
(entry -> scale), ``tensors`` (parameter -> what its values are known by, see
``contentvec_parity.compare.fingerprints``) and ``half``: for float16 and
bfloat16 what computed it (``about``) and clip -> kind -> stage -> the errors of
PyTorch in that format, on the CPU. The same checkpoint on the same machine gives
the same bytes.

Everything in it is checked when it is opened: ``recording_checks``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from contentvec_convert.writer import Entry, header, lay_out
from mlx_contentvec.config import ModelConfig, stage_input, stage_names
from mlx_contentvec.errors import OutputError, ParityError
from mlx_contentvec.files import Draft, check_reports, check_target
from mlx_contentvec.json_text import JsonError, parse_object

from .. import machine
from ..compare.fingerprints import Fingerprint, computed_fingerprint, fingerprint
from ..compare.naming import LAYOUTS, ROUNDED_LAYOUTS, outputs, rows
from ..inputs import Clip, least_samples, lengthened, padded_batch, spoken
from . import Reference
from . import recording_checks as checks
from .original import TorchOriginal, frame_mask
from .yardsticks import HALF, HALF_PRECISION, RecordedYardstick, TorchYardstick, Yardstick

SCHEMA = "mlx-contentvec-recording/1"

#: which stages of a clip are kept
SELECTIONS: dict[str, Callable[[ModelConfig], tuple[str, ...]]] = {
    "every stage": stage_names,
    "from the last convolution on": lambda config: stage_names(config)[
        len(config.conv_layers) - 1 :
    ],
    "features": lambda config: tuple(dict.fromkeys(o.stage for o in outputs(config))),
}


def small() -> list[tuple[Clip, str]]:
    """What travels with published weights: every stage once, and features of six clips."""
    quarter = spoken("quarter", 4000, 82, "a quarter of a second")
    quiet = Clip(
        "quiet",
        (quarter.waveform * 1e-3).astype(np.float32),
        "a quarter of a second at a thousandth of the level",
        {**quarter.origin, "gain": 1e-3},
    )
    return [
        (spoken("two frames", 720, 81, "720 samples, two frames"), "every stage"),
        (quarter, "from the last convolution on"),
        (quiet, "features"),
        (Clip("silence", np.zeros((1, 1200), np.float32), "digital silence"), "features"),
        (padded_batch("batch", (2800, 1800), 83), "features"),
        (spoken("1s", 16000, 85, "one second"), "features"),
    ]


def record(
    checkpoint: Path,
    output: Path,
    *,
    reference: str | None = None,
    clips: Sequence[tuple[Clip, str]] | None = None,
    force: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run the original at ``checkpoint`` and write ``output``; its header comes back.

    clips: each with the name of a selection of stages; ``small()`` by default

    Raises OutputError if ``output`` exists and ``force`` is not given, or is the checkpoint.
    """
    from ..identity import checkpoint_being_identified
    from . import choose, open_reference

    check_target(output, force=force)
    check_reports([output], [checkpoint])
    progress(f"loading {checkpoint.name}")
    with checkpoint_being_identified(checkpoint) as facts:
        original = open_reference(reference or choose(checkpoint), checkpoint)
        source = facts.result()
    return write(original, source, output, clips or small(), force=force, progress=progress)


def write(
    original: Reference,
    source: Mapping[str, Any],
    output: Path,
    clips: Sequence[tuple[Clip, str]],
    *,
    force: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Write a recording of an opened original; its header comes back.

    source: the facts of its checkpoint (``contentvec_parity.identity``)
    clips:  those too short to give a frame are repeated until they do

    Raises OutputError if ``output`` cannot be written.
    """
    arrays: dict[str, NDArray[Any]] = {}
    scales: dict[str, float] = {}
    listed = []
    yardsticks = _half_yardsticks(original)
    half: dict[str, Any] = {
        dtype: {"about": yardstick.about, "errors": {}} for dtype, yardstick in yardsticks.items()
    }
    for number, (clip, selection) in enumerate(clips, 1):
        progress(f"clip {clip.name}, {number} of {len(clips)}")
        clip = lengthened(clip, least_samples(original.config))
        kept = SELECTIONS[selection](original.config)
        found, exact = original.stages(clip), original.truth(clip)
        outputs = {stage: found[stage] for stage in kept}
        truth = {stage: exact[stage] for stage in kept}
        arrays |= _record_clip(original, clip, outputs, truth, scales)
        for dtype, yardstick in yardsticks.items():
            half[dtype]["errors"][clip.name] = yardstick.errors(
                clip, original, outputs, truth, local=True
            )
        listed.append(
            {"name": clip.name, "about": clip.about, "origin": clip.origin, "stages": list(kept)}
        )
    about = {
        "schema": SCHEMA,
        "source": dict(source),
        "config": original.config.to_dict(),
        "reference": {"name": original.name, "versions": original.versions},
        "chip": machine.chip(),
        "clips": listed,
        "scales": scales,
        "tensors": _fingerprints(original),
        "half": half,
    }
    metadata = {"format": "mlx", "recording": json.dumps(about, sort_keys=True)}
    _save(arrays, metadata, output, force=force)
    return about


def _save(
    arrays: Mapping[str, NDArray[Any]], metadata: dict[str, str], output: Path, *, force: bool
) -> None:
    """Write a safetensors file whose bytes follow from what it holds, and read it back."""
    stored = {np.dtype("<f4"): "F32", np.dtype("<f2"): "F16", np.dtype("<u4"): "U32"}
    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    layout = lay_out([Entry(n, stored[a.dtype], a.shape) for n, a in plain.items()], metadata)
    with Draft(output) as draft:
        draft.write(0, header(layout, metadata))
        for name, array in plain.items():
            draft.write(layout.starts[name], array.tobytes())
        draft.sync()
        for name, array in plain.items():
            written = bytearray(array.nbytes)
            draft.read_into(layout.starts[name], memoryview(written))
            if written != array.tobytes():
                raise OutputError(f"{output.name}: {name} was not written as it is")
        draft.rename(force=force)


def _record_clip(
    original: Reference,
    clip: Clip,
    stages: Mapping[str, NDArray[np.float32]],
    truth: Mapping[str, NDArray[np.float64]],
    scales: dict[str, float],
) -> dict[str, NDArray[Any]]:
    arrays: dict[str, NDArray[Any]] = {f"{clip.name}/waveform": clip.waveform}
    if clip.padding_mask is not None:
        arrays[f"{clip.name}/padding_mask"] = clip.padding_mask.astype(np.uint32)
    if original.config.normalize:
        arrays[f"{clip.name}/input"] = np.ascontiguousarray(original.model_input(clip))
    for stage in stages:
        name = f"{clip.name}/{stage}"
        arrays[name] = stages[stage]
        exact = {"truth": truth[stage]}
        before = stage_input(original.config, stage)
        if before is None or before in stages:
            given = original.model_input(clip) if before is None else stages[before]
            exact["local"] = original.local_truth(clip, stage, given)
        for kind, value in exact.items():
            error = value - stages[stage]
            largest = float(np.abs(error).max(initial=0.0))
            # a power of two, so that scaling adds no rounding of its own
            scale = 2.0 ** (math.frexp(largest)[1] - 15) if largest else 1.0
            scales[f"{name}/{kind}"] = scale
            arrays[f"{name}/{kind}"] = np.ascontiguousarray((error / scale).astype(np.float16))
    return arrays


def _half_yardsticks(original: Reference) -> dict[str, TorchYardstick]:
    """PyTorch in each half precision, on the CPU."""
    if not isinstance(original, TorchOriginal):
        return {}
    return {dtype: TorchYardstick(original, "cpu", dtype) for dtype in HALF}


def _fingerprints(original: Reference) -> dict[str, dict[str, Any]]:
    """Parameter -> what it is known by, of every parameter that the original has tensors for."""
    naming, tensors = original.tensors()
    found: dict[str, dict[str, Any]] = {}
    for row in rows(original.config):
        sources = getattr(row, naming)
        if any(name not in tensors for name in sources):
            continue
        if row.layout in ROUNDED_LAYOUTS:
            exact = LAYOUTS[row.layout](*(tensors[name].astype(np.float64) for name in sources))
            found[row.target] = computed_fingerprint(exact)
        else:
            found[row.target] = fingerprint(LAYOUTS[row.layout](*(tensors[n] for n in sources)))
    return found


def read_header(path: Path) -> dict[str, Any]:
    """What a recording is of.

    Raises ParityError if the file is not a recording, or one of another layout.
    """
    from ..compare.candidate import read_metadata

    metadata = read_metadata(path)
    if "recording" not in metadata:
        raise ParityError(
            f"{path.name} is not a recording",
            found="safetensors without a 'recording' in its metadata",
            hint="mlx-contentvec parity record CHECKPOINT FILE makes one",
        )
    try:
        header = parse_object(metadata["recording"])
    except JsonError as error:
        raise ParityError(f"the header of {path.name} cannot be read", found=str(error)) from error
    if header.get("schema") != SCHEMA:
        raise ParityError(
            f"{path.name} is a recording of another layout",
            found=repr(header.get("schema"))[:80],
            expected=SCHEMA,
        )
    return header


class Recording:
    """A recorded original: the interface of a reference, for the clips it holds."""

    name = "recording"

    def __init__(self, path: Path) -> None:
        """Raises ParityError if the file is not a sound recording."""
        self.path = path
        self.header = read_header(path)
        self.config = checks.require_header(path, self.header)
        recorded = self.header["reference"]
        self.recorded_from: str = recorded["name"]
        self.versions: dict[str, str] = recorded["versions"]
        self._arrays = checks.read_arrays(path, self.header)
        self.clips = [self._clip(about) for about in self.header["clips"]]
        self._stages = {about["name"]: about["stages"] for about in self.header["clips"]}

    def require_complete(self) -> None:
        """Raise ParityError unless it holds the clips that travel with published weights."""
        wanted = [(clip, SELECTIONS[selection](self.config)) for clip, selection in small()]
        checks.require_clips(self.path, self.clips, self._stages, wanted)

    def _clip(self, about: Mapping[str, Any]) -> Clip:
        name = about["name"]
        mask = self._arrays.get(f"{name}/padding_mask")
        return Clip(
            name,
            self._arrays[f"{name}/waveform"],
            about["about"],
            about["origin"],
            None if mask is None else mask.astype(bool),
        )

    def model_input(self, clip: Clip) -> NDArray[np.float32]:
        """What the original's first stage was given."""
        given: NDArray[np.float32] = self._arrays.get(f"{clip.name}/input", clip.waveform)
        return given

    def frame_mask(self, clip: Clip) -> NDArray[np.bool_] | None:
        """The original's padding mask over frames."""
        return frame_mask(clip.padding_mask, self.config)

    def stages(self, clip: Clip) -> dict[str, NDArray[np.float32]]:
        """The recorded stages in float32."""
        return {stage: self._arrays[f"{clip.name}/{stage}"] for stage in self._stages[clip.name]}

    def truth(self, clip: Clip) -> dict[str, NDArray[np.float64]]:
        """The recorded stages in float64."""
        return {stage: self._exact(clip, stage, "truth") for stage in self._stages[clip.name]}

    def local_truth(
        self, clip: Clip, stage: str, stage_input: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """The recorded truth of one stage on the recorded input, which is the only one there is."""
        return self._exact(clip, stage, "local")

    def _exact(self, clip: Clip, stage: str, kind: str) -> NDArray[np.float64]:
        name = f"{clip.name}/{stage}"
        error = self._arrays[f"{name}/{kind}"].astype(np.float64)
        scale: float = self.header["scales"][f"{name}/{kind}"]
        return np.asarray(self._arrays[name].astype(np.float64) + error * scale)

    def tensors(self) -> tuple[str, Mapping[str, NDArray[Any]]]:
        """A recording holds no tensors, only what they are known by."""
        raise ParityError("a recording holds no tensors", hint="use fingerprints")

    def yardsticks(self, precision: str) -> dict[str, Yardstick]:
        """PyTorch in half precision, for weights stored in it; else none."""
        found = self.header["half"].get(precision)
        if found is None:
            return {}
        return {HALF_PRECISION: RecordedYardstick(found["about"], found["errors"])}

    @property
    def fingerprints(self) -> dict[str, Fingerprint]:
        """Parameter -> what its values are known by."""
        found: dict[str, Fingerprint] = self.header["tensors"]
        return found
