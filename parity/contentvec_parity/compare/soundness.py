"""Whether a report can be what a run measured: nothing left out, every figure possible.

A saved report is a file that anybody may have written, and one of a recording
repeats what the recording says. A verdict on it means something only if no clip,
stage or parameter is missing or counted twice, and if the figures are ones that
the same arrays can give: finite, no rms above the largest error, one signal
behind all signal-to-noise ratios, and an original that erred as float32 errs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from contentvec_convert.precision import PRECISIONS
from mlx_contentvec.config import ModelConfig, stage_input, stage_names
from mlx_contentvec.errors import ParityError, name_list
from mlx_contentvec.json_text import NUMBER, JsonError, require

from ..references.yardsticks import DEVICE, DEVICE_DEFAULTS, HALF, HALF_PRECISION
from .naming import UNREAD, outputs, rows, stage_parameters
from .stages import VARIANT_SECONDS

#: signal-to-noise ratio, in dB, that PyTorch's own float32 keeps in every stage. The
#: features have about 100; below this it is not float32 that was measured
REFERENCE_SNR = 60.0

#: by which part figures that follow from each other may differ
_SLACK = 1e-6
#: half a unit in the last place of float32, and of its smallest numbers
_HALF_UNIT, _SMALLEST = 2.0**-24, 2.0**-150

#: characters of any text of a report, but for where a clip comes from, which can be a path
TEXT_CHARACTERS = 1_000
#: packages whose versions are named
_VERSIONS = 30

#: what a report holds, as :func:`~mlx_contentvec.json_text.require` has forms
_DOCUMENT = {
    "created": str,
    "seconds": NUMBER,
    "weights": {
        "precision": str,
        "name?": str,
        "size?": int,
        "sha256?": str,
        "source?": (dict, None),
    },
    "source": {
        "name?": str,
        "size?": int,
        "md5?": (str, None),
        "sha256?": str,
        "known_as?": (str, None),
        "stand_in?": (str, None),
    },
    "machine": {
        "chip": str,
        "system": str,
        "cores": (int, None),
        "device": {"kind": str, "device_name?": (str, None), "blas?": (str, None)},
    },
    "versions": {...: str},
    "flags": {"tf32": bool, "environment": {...: str}, "torch_blas?": (str, None)},
    "config": dict,
    "reference": {"name": str, "versions": {...: str}, "recorded_from?": (str, None)},
    "yardsticks": {
        ...: {"device": str, "name": (str, None), "dtype": str, "tf32": (str, None)},
    },
    "clips": [
        {
            "name": str,
            "about": str,
            "origin": dict,
            "batch": int,
            "samples": int,
            "seconds": NUMBER,
            "frames": int,
            "padded": bool,
            "mask_agrees": (bool, None),
            "failed": {...: str},
        }
    ],
    "stages": [
        {
            "kind": str,
            "name": str,
            "stage": str,
            "clip": str,
            "comparable": bool,
            "shape": [int],
            "expected_shape": [int],
            "values": int,
            "nearest?": (str, None),
        }
    ],
    "tensors": (dict, None),
    "with_tf32": (dict, None),
}
_TENSORS = {
    "sources": (int, None),
    "parameters": int,
    "exact": int,
    "rounded": int,
    "quantized": int,
    "unread": [str],
    "failures": [{"name": str, "what": str, "stage": (str, None)}],
}
_TF32 = {
    "snr_db": (*NUMBER, None),
    "summary": [
        {
            "name": str,
            "ratio": {"max_abs": NUMBER, "rms": NUMBER},
            "candidate?": {"max_abs": NUMBER},
        }
    ],
}
_COUNTS = ("exact", "rounded", "quantized")
#: sides that were measured against the truth, by what a row calls them
_MEASURED = ("candidate", "reference", "device", "device_defaults", "half")

Fields = Mapping[str, Any]


def require_sound(document: Fields) -> None:
    """Raise ParityError, saying what cannot be, unless the report is complete and possible.

    ConfigError if its configuration is impossible. The verdict in it is not looked at.
    """
    try:
        require(document, _DOCUMENT, "the report")
        if document["tensors"] is not None:
            require(document["tensors"], _TENSORS, "the report, tensors")
        if document["with_tf32"] is not None:
            require(document["with_tf32"], _TF32, "the report, with_tf32")
    except JsonError as error:
        _refuse(str(error))
    _require_short(document)
    config = ModelConfig.from_dict(document["config"])
    precision = document["weights"]["precision"]
    if precision not in PRECISIONS:
        _refuse(f"weights in {precision[:40]!r}, which is no number format")
    _require_reference(document["reference"], config)
    _require_yardsticks(document, precision)
    clips = _require_clips(document["clips"], config)
    _require_rows(document, config, clips)
    _require_tensors(document["tensors"], document["reference"]["name"], config)
    _require_tf32(document["with_tf32"])


def _refuse(problem: str) -> NoReturn:
    raise ParityError(
        "the parity report cannot be what was measured",
        found=problem,
        hint="run parity again: mlx-contentvec parity CHECKPOINT CONVERTED --json FILE",
    )


def _require_short(value: Any, name: str = "the report") -> None:
    """No text that would fill the screen that it is shown on."""
    if isinstance(value, dict):
        for key, part in value.items():
            _require_short(key, f"a name in {name}")
            if key != "origin":
                _require_short(part, f"{name}, {key}")
    elif isinstance(value, list):
        for part in value:
            _require_short(part, name)
    elif isinstance(value, str) and len(value) > TEXT_CHARACTERS:
        _refuse(f"{name}: a text of {len(value):,} characters")


def _require_reference(reference: Fields, config: ModelConfig) -> None:
    stages = stage_names(config)
    expected = {
        "stages": list(stages),
        "inputs": {stage: stage_input(config, stage) for stage in stages},
        "reads": {stage: list(stage_parameters(config, stage)) for stage in stages},
    }
    for key, value in expected.items():
        if reference.get(key) != value:
            _refuse(f"its reference has other {key} than the model of its configuration")
    if len(reference["versions"]) > _VERSIONS:
        _refuse(f"its original has versions of {len(reference['versions']):,} packages")
    recorded = reference.get("recorded_from")
    if reference["name"] not in ("fairseq", "transformers", "recording") or (
        reference["name"] == "recording"
    ) != (recorded in ("fairseq", "transformers")):
        _refuse("it does not say what the original was")


def _require_yardsticks(document: Fields, precision: str) -> None:
    """Those that a precision has, and no row measured by another."""
    known = {HALF_PRECISION: precision in HALF, DEVICE: True, DEVICE_DEFAULTS: True}
    there = document["yardsticks"]
    if other := [name for name in there if not known.get(name)]:
        _refuse(f"a yardstick for {precision} weights that there is not: {name_list(other)[:80]}")
    for row in document["stages"]:
        if other := [name for name in known if name in row and name not in there]:
            _refuse(f"a row was measured by a yardstick that is not listed: {other[0]}")


def _require_clips(clips: Collection[Any], config: ModelConfig) -> dict[str, Fields]:
    found: dict[str, Fields] = {}
    for clip in clips:
        name = clip["name"]
        if name in found:
            _refuse(f"two clips are called {name[:80]!r}")
        if min(clip["batch"], clip["samples"], clip["frames"]) < 1:
            _refuse(f"the clip {name[:80]!r} is empty")
        length = clip["samples"] / config.sample_rate
        if not abs(clip["seconds"] - length) <= _SLACK * length:
            _refuse(f"the clip {name[:80]!r} is not as long as its samples")
        if clip["frames"] != config.frames(clip["samples"]):
            _refuse(f"the clip {name[:80]!r} has other frames than the model makes of it")
        if clip["padded"] != (clip["mask_agrees"] is not None):
            _refuse(f"of the padding mask of {name[:80]!r} it is not said whether it agrees")
        found[name] = clip
    if not found:
        _refuse("no clip was measured")
    return found


def _require_rows(document: Fields, config: ModelConfig, clips: Mapping[str, Fields]) -> None:
    """Each row once, of a stage and a clip that there are; none missing; figures possible."""
    stages = stage_names(config)
    calls = {output.label: output for output in outputs(config)}
    found: set[tuple[str, str, str]] = set()
    for row in document["stages"]:
        key = (row["kind"], row["name"], row["clip"])
        about = " ".join(key)[:120]
        if key in found:
            _refuse(f"{about} was measured twice")
        if row["clip"] not in clips:
            _refuse(f"{about} is of a clip that is not listed")
        if row["kind"] == "features":
            if row["name"] not in calls or row["stage"] != calls[row["name"]].stage:
                _refuse(f"{about} is no call of this model")
        elif row["kind"] not in ("stage", "local") or not row["name"] == row["stage"] in stages:
            _refuse(f"{about} is no stage of this model")
        _require_shapes(about, row, clips[row["clip"]])
        if row["comparable"]:
            _require_figures(about, row, stages)
        found.add(key)
    failures = (document["tensors"] or {}).get("failures")
    for clip in clips.values():
        for label, output in calls.items():
            # a port that lacks the projection fails by its tensors
            excused = output.stage == "final_proj" and bool(failures)
            excused = excused or (output.variant and clip["seconds"] > VARIANT_SECONDS)
            if not excused and ("features", label, clip["name"]) not in found:
                _refuse(f"{label} was not measured on {clip['name'][:80]!r}")
    for kind in ("stage", "local"):
        measured = {name for found_kind, name, _ in found if found_kind == kind}
        missing = [s for s in stages if s not in measured and not (s == "final_proj" and failures)]
        if missing:
            _refuse(f"stages were not measured ({kind}): {name_list(missing)}")


def _require_shapes(about: str, row: Fields, clip: Fields) -> None:
    for shape in (row["shape"], row["expected_shape"]):
        if any(length < 0 for length in shape):
            _refuse(f"{about} has an impossible shape")
    if not row["comparable"]:
        return
    if row["shape"] != row["expected_shape"]:
        _refuse(f"{about} is of another shape, and was compared")
    size = math.prod(row["shape"])
    there = 0 < row["values"] <= size if clip["padded"] else row["values"] == size
    if len(row["shape"]) != 3 or row["shape"][0] != clip["batch"] or not there:
        _refuse(f"{about} compared {row['values']:,} of {size:,} values")


def _require_figures(about: str, row: Fields, stages: Collection[str]) -> None:
    for side in ("candidate", "reference", "floor"):
        if not isinstance(row.get(side), dict):
            _refuse(f"{about} has no {side}")
    signals = []
    for side in _MEASURED:
        if side in row:
            signals.append(_require_side(f"{about}, {side}:", row[side]))
    _require_errors(f"{about}, floor:", row["floor"])
    known = [signal for signal in signals if signal is not None]
    if known and max(known) - min(known) > _SLACK * max(known):
        _refuse(f"{about} has signal-to-noise ratios of several signals")
    if known and not row["floor"]["rms"] <= (1 + _SLACK) * (_HALF_UNIT * known[0] + _SMALLEST):
        _refuse(f"{about} has a rounding of float32 that is larger than float32's")
    noise = row["reference"]["snr_db"]
    if noise is not None and not noise >= REFERENCE_SNR:
        _refuse(f"{about}: PyTorch at {noise:.1f} dB, which is not float32")
    if row["kind"] == "features":
        _require_features(about, row, stages, known[0] if known else None)


def _require_errors(about: str, figures: Any) -> tuple[float, float]:
    """The largest and the rms error of a side."""
    if not isinstance(figures, dict):
        _refuse(f"{about} no figures")
    largest, rms = (_number(about, figures, name) for name in ("max_abs", "rms"))
    if not 0 <= rms <= (1 + _SLACK) * largest:
        _refuse(f"{about} an rms error of {rms:.3g} beside a largest of {largest:.3g}")
    return largest, rms


def _require_side(about: str, figures: Any) -> float | None:
    """The rms of the signal that a side's ratio is of; None where it does not follow."""
    _, rms = _require_errors(about, figures)
    noise = figures.get("snr_db", math.nan)
    if (noise is None) != (rms == 0):
        _refuse(f"{about} no noise is said to be an error, or an error to be no noise")
    if noise is None:
        return None
    if noise == -math.inf:
        return 0.0
    decibels = _number(about, figures, "snr_db", largest=1000.0)
    return float(rms * 10.0 ** (decibels / 20))


def _least_cosine(error: float, signal: float) -> float:
    """Of two vectors whose difference and whose second have these rms."""
    return math.sqrt(1 - (error / signal) ** 2) if error < signal else -1.0


def _is_place(at: Any, shape: Sequence[int]) -> bool:
    """Whether ``at`` is an index into an array of a shape."""
    return (
        isinstance(at, list)
        and len(at) == len(shape)
        and all(
            type(index) is int and 0 <= index < length
            for index, length in zip(at, shape, strict=True)
        )
    )


def _require_features(
    about: str, row: Fields, stages: Collection[str], signal: float | None
) -> None:
    """What is published of the features besides.

    signal: rms of the truth, None where nothing errs
    """
    for side in ("candidate", "reference", "apart"):
        figures: Any = row.get(side)
        _require_errors(f"{about}, {side}:", figures)
        for name in ("cosine", "worst_frame_cosine"):
            if not abs(_number(f"{about}, {side}:", figures or {}, name)) <= 1 + _SLACK:
                _refuse(f"{about}, {side}: a {name} beyond 1")
        # of MLX and the original: beside the latter, which is the truth and its own error
        length = (signal or 0.0) - (row["reference"]["rms"] if side == "apart" else 0.0)
        if not figures["cosine"] >= _least_cosine(figures["rms"], length) - _SLACK:
            _refuse(f"{about}, {side}: a cosine of {figures['cosine']:.3g} beside a small error")
    if row.get("nearest") not in (None, *stages):
        _refuse(f"{about} is nearest to what is no stage of this model")
    if not _is_place(row["candidate"].get("worst_frame_at"), row["shape"][:2]):
        _refuse(f"{about} has its worst frame nowhere")
    if type(row.get("variant")) is not bool:
        _refuse(f"{about} is not said to be a variant or not")
    for name in ("max_abs", "rms"):
        mine, theirs, apart = (row[side][name] for side in ("candidate", "reference", "apart"))
        room = _SLACK * (mine + theirs)
        if not abs(mine - theirs) - room <= apart or (not apart <= mine + theirs + room):
            _refuse(f"{about}: errors of {mine:.3g} and {theirs:.3g}, and {apart:.3g} apart")


def _number(about: str, figures: Fields, name: str, largest: float = 1e30) -> float:
    value: Any = figures.get(name)
    if type(value) not in (int, float) or not abs(value) <= largest:
        _refuse(f"{about} {name} is no finite number, or none that can be")
    return float(value)


def _require_tensors(tensors: Fields | None, naming: str, config: ModelConfig) -> None:
    """Every parameter counted once; every tensor of the original read, or known to be unread."""
    if tensors is None:
        return
    _number("the tensors:", tensors, "largest_ulps")
    if tensors["failures"]:
        return
    table = rows(config)
    exact, rounded, quantized = (tensors[name] for name in _COUNTS)
    if min(exact, rounded, quantized) < 0 or exact + rounded + quantized != len(table):
        _refuse(f"{exact + rounded + quantized} of {len(table)} parameters were compared")
    if tensors["parameters"] != len(table) + 2 * quantized:
        _refuse(f"{tensors['parameters']} parameters, {len(table)} expected")
    if naming == "recording":
        return
    used = {name for row in table for name in getattr(row, naming)}
    unread = tensors["unread"]
    if any(name not in UNREAD for name in unread) or tensors.get("sources") != len(used) + len(
        unread
    ):
        _refuse(f"{tensors.get('sources')} tensors of the original, {len(used)} are read")


def _require_tf32(found: Fields | None) -> None:
    """Figures that can be; they decide nothing. A ratio is infinite where there are none."""
    if found is None:
        return
    if not found["summary"]:
        _refuse("the features with TF32 are of nothing")
    for entry in found["summary"]:
        for name, value in entry["ratio"].items():
            if value != math.inf and not _number("with TF32:", entry["ratio"], name) >= 0:
                _refuse(f"with TF32: a ratio of {value:.3g}")
        if "candidate" in entry:
            _number("with TF32:", entry["candidate"], "max_abs")
    if found["snr_db"] not in (None, -math.inf):
        _number("with TF32:", found, "snr_db", largest=1000.0)
