"""Whether a report can be what a run measured: nothing left out, every figure possible.

A saved report is a file that anybody may have written, and one of a recording
repeats what the recording says. A verdict on it means something only if no clip,
stage or parameter is missing or counted twice, and if the figures are ones that
the same arrays can give: finite, no rms above the largest error, one signal
behind all signal-to-noise ratios, and an original that erred as float32 errs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

from contentvec_convert.precision import PRECISIONS
from mlx_contentvec.config import ModelConfig, stage_input, stage_names
from mlx_contentvec.errors import ParityError, name_list

from .naming import UNREAD, outputs, rows, stage_parameters
from .stages import VARIANT_SECONDS

#: signal-to-noise ratio, in dB, that PyTorch's own float32 keeps in every stage. The
#: features have about 100; below this it is not float32 that was measured
REFERENCE_SNR = 60.0

#: by which part figures that follow from each other may differ
_SLACK = 1e-6
#: half a unit in the last place of float32, and of its smallest numbers
_HALF_UNIT, _SMALLEST = 2.0**-24, 2.0**-150

_TEXT = (str,)
_FLOATING = (int, float)
_DOCUMENT: dict[str, tuple[type, ...]] = {
    "created": _TEXT,
    "seconds": _FLOATING,
    "weights": (dict,),
    "source": (dict,),
    "machine": (dict,),
    "versions": (dict,),
    "flags": (dict,),
    "config": (dict,),
    "reference": (dict,),
    "yardsticks": (dict,),
    "clips": (list,),
    "stages": (list,),
    "tensors": (dict, type(None)),
    "with_tf32": (dict, type(None)),
}
#: what a report shows of what lies inside these
_INSIDE: dict[str, dict[str, tuple[type, ...]]] = {
    "machine": {"chip": _TEXT, "system": _TEXT, "cores": (int, type(None)), "device": (dict,)},
    "flags": {"environment": (dict,)},
}
_CLIP: dict[str, tuple[type, ...]] = {
    "name": _TEXT,
    "about": _TEXT,
    "origin": (dict,),
    "batch": (int,),
    "samples": (int,),
    "seconds": _FLOATING,
    "frames": (int,),
    "padded": (bool,),
    "mask_agrees": (bool, type(None)),
    "failed": (dict,),
}
_ROW: dict[str, tuple[type, ...]] = {
    "kind": _TEXT,
    "name": _TEXT,
    "stage": _TEXT,
    "clip": _TEXT,
    "comparable": (bool,),
    "shape": (list,),
    "expected_shape": (list,),
    "values": (int,),
}
_COUNTS = ("parameters", "exact", "rounded", "quantized")
#: sides that were measured against the truth, by what a row calls them
_MEASURED = ("candidate", "reference", "device", "device_defaults", "half")

Fields = Mapping[str, Any]


def require_sound(document: Fields) -> None:
    """Raise ParityError, saying what cannot be, unless the report is complete and possible.

    ConfigError if its configuration is impossible. The verdict in it is not looked at.
    """
    _require_types("the report", document, _DOCUMENT)
    for key, types in _INSIDE.items():
        _require_types(f"its {key}", document[key], types)
    config = ModelConfig.from_dict(document["config"])
    precision = document["weights"].get("precision")
    if precision not in PRECISIONS:
        _refuse(f"weights in {str(precision)[:40]!r}, which is no number format")
    _require_reference(document["reference"], config)
    clips = _require_clips(document["clips"])
    for row in document["stages"]:
        _require_types("a row", row, _ROW)
    _require_rows(document, config, clips)
    _require_tensors(document["tensors"], document["reference"]["name"], config)


def _refuse(problem: str) -> NoReturn:
    raise ParityError(
        "the parity report cannot be what was measured",
        found=problem,
        hint="run parity again: mlx-contentvec parity CHECKPOINT CONVERTED --json FILE",
    )


def _require_types(what: str, found: Any, types: Mapping[str, tuple[type, ...]]) -> None:
    if not isinstance(found, dict):
        _refuse(f"{what} is no object")
    for key, kinds in types.items():
        if key not in found:
            _refuse(f"{what} has no {key}")
        value = found[key]
        # a bool is an int to isinstance
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            _refuse(f"{what} has no {key}, or not as a {kinds[0].__name__}")


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
    if not isinstance(reference.get("versions"), dict):
        _refuse("it does not say which versions the original ran on")
    recorded = reference.get("recorded_from")
    if reference.get("name") not in ("fairseq", "transformers", "recording") or (
        reference["name"] == "recording"
    ) != (recorded in ("fairseq", "transformers")):
        _refuse("it does not say what the original was")


def _require_clips(clips: Collection[Any]) -> dict[str, Fields]:
    found: dict[str, Fields] = {}
    for clip in clips:
        _require_types("a clip", clip, _CLIP)
        name = clip["name"]
        if name in found:
            _refuse(f"two clips are called {name[:80]!r}")
        if min(clip["batch"], clip["samples"], clip["frames"]) < 1:
            _refuse(f"the clip {name[:80]!r} is empty")
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
            _require_figures(about, row)
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
        if not all(type(length) is int and length >= 0 for length in shape):
            _refuse(f"{about} has an impossible shape")
    if not row["comparable"]:
        return
    if row["shape"] != row["expected_shape"]:
        _refuse(f"{about} is of another shape, and was compared")
    size = math.prod(row["shape"])
    there = 0 < row["values"] <= size if clip["padded"] else row["values"] == size
    if len(row["shape"]) != 3 or row["shape"][0] != clip["batch"] or not there:
        _refuse(f"{about} compared {row['values']:,} of {size:,} values")


def _require_figures(about: str, row: Fields) -> None:
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
        _require_features(about, row)


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


def _require_features(about: str, row: Fields) -> None:
    """What is published of the features besides."""
    for side in ("candidate", "reference", "apart"):
        figures = row.get(side)
        _require_errors(f"{about}, {side}:", figures)
        for name in ("cosine", "worst_frame_cosine"):
            if not abs(_number(f"{about}, {side}:", figures or {}, name)) <= 1 + _SLACK:
                _refuse(f"{about}, {side}: a {name} beyond 1")
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
    _require_types("the tensors", tensors, dict.fromkeys(_COUNTS, (int,)))
    _require_types("the tensors", tensors, {"failures": (list,), "unread": (list,)})
    _number("the tensors:", tensors, "largest_ulps")
    for failure in tensors["failures"]:
        _require_types("a tensor's failure", failure, {"name": _TEXT, "what": _TEXT})
        if "stage" not in failure:
            _refuse("a tensor's failure names no stage")
    if tensors["failures"]:
        return
    table = rows(config)
    exact, rounded, quantized = (tensors[name] for name in _COUNTS[1:])
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
