"""Whether a recording can be what it says: complete, consistent, every number plausible.

A recording is a file that anybody may have written. What it leaves out, repeats
or exaggerates would make a comparison easier to pass, so nothing may be left out,
and every number has bounds that an honest recording keeps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from mlx_contentvec.config import ModelConfig, parameter_shapes, stage_input, stage_names
from mlx_contentvec.errors import ParityError, name_list

from ..compare.fingerprints import FORMATS, GRIDS
from ..compare.naming import ROUNDED_LAYOUTS, outputs, rows
from ..inputs import Clip
from .yardsticks import HALF

Arrays = dict[str, NDArray[Any]]

#: the error of float32 may reach this part of the largest value of a stage: a hundred
#: times what PyTorch has
LARGEST_ERROR = 1e-3

#: the part of its peak by which a waveform may differ from the one that is made here: the
#: sines of another machine round otherwise
WAVEFORM_TOLERANCE = 1e-5

_SHA256 = re.compile("[0-9a-f]{64}")
#: keys of the header -> their types
_HEADER = {
    "schema": str,
    "source": dict,
    "config": dict,
    "reference": dict,
    "chip": str,
    "clips": list,
    "scales": dict,
    "tensors": dict,
    "half": dict,
}


def _refuse(path: Path, problem: str) -> NoReturn:
    raise ParityError(
        f"{path.name} is not a sound recording",
        found=problem,
        hint="make it again from the checkpoint:\n"
        f"mlx-contentvec parity record CHECKPOINT {path.name} --force",
    )


def require_header(path: Path, header: Mapping[str, Any]) -> ModelConfig:
    """The configuration of a recording whose header is sound.

    Raises ParityError that says what is missing, surplus or of another type, and
    ConfigError for a configuration that is impossible.
    """
    for key, kind in _HEADER.items():
        if not isinstance(header.get(key), kind):
            _refuse(path, f"its header has no {key}, or not as a {kind.__name__}")
    source, reference = header["source"], header["reference"]
    if not isinstance(source.get("name"), str) or not _is_sha256(source.get("sha256")):
        _refuse(path, "its source has no name or no SHA-256")
    versions = reference.get("versions")
    if reference.get("name") not in ("fairseq", "transformers") or not (
        isinstance(versions, dict) and all(isinstance(v, str) for v in versions.values())
    ):
        _refuse(path, "it does not say which original was recorded")
    config = ModelConfig.from_dict(header["config"])
    _require_clip_rows(path, header["clips"], config)
    _require_fingerprints(path, header["tensors"], config)
    _require_half(path, header)
    return config


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _require_clip_rows(path: Path, clips: Sequence[Any], config: ModelConfig) -> None:
    known = stage_names(config)
    asked_for = {output.stage for output in outputs(config)}
    names = []
    for row in clips:
        if not isinstance(row, dict) or not all(
            isinstance(row.get(key), kind)
            for key, kind in (("name", str), ("about", str), ("origin", dict), ("stages", list))
        ):
            _refuse(path, "a clip is not described by name, about, origin and stages")
        stages = row["stages"]
        if any(stage not in known for stage in stages) or len(set(stages)) < len(stages):
            _refuse(path, f"the clip {row['name']} has stages twice, or that the model lacks")
        if missing := asked_for - set(stages):
            _refuse(path, f"the clip {row['name']} lacks {name_list(sorted(missing))}")
        names.append(row["name"])
    if not names or len(set(names)) < len(names):
        _refuse(path, "it has no clips, or two of one name")


def _require_fingerprints(path: Path, tensors: Mapping[str, Any], config: ModelConfig) -> None:
    """Of every parameter of the model and of nothing else."""
    shapes = parameter_shapes(config)
    table = {row.target: row for row in rows(config)}
    if missing := [name for name in table if name not in tensors]:
        _refuse(path, f"{len(missing)} parameters have no hash: {name_list(missing)}")
    if surplus := [name for name in tensors if name not in table]:
        _refuse(path, f"hashes of what the model does not have: {name_list(surplus)}")
    for name, known in tensors.items():
        computed = table[name].layout in ROUNDED_LAYOUTS
        formats = GRIDS if computed else FORMATS
        wanted = {*formats, "either"} if computed else set(formats)
        if not isinstance(known, dict) or set(known) != wanted:
            _refuse(path, f"{name} is not hashed in each of {name_list(formats)}")
        if not all(_is_sha256(known[dtype]) for dtype in formats):
            _refuse(path, f"a hash of {name} is not a SHA-256")
        if computed:
            _require_either(path, name, known["either"], math.prod(shapes[name]))


def _require_either(path: Path, name: str, either: Any, size: int) -> None:
    """Places in order and none twice, few enough to be those beside a boundary of the grid."""
    if not isinstance(either, dict) or set(either) != set(GRIDS):
        _refuse(path, f"{name} does not say where two values will do")
    for grid in GRIDS:
        lists = either[grid]
        if not isinstance(lists, dict) or set(lists) != {"even", "odd"}:
            _refuse(path, f"{name} does not say where two values will do")
        places = [*lists["even"], *lists["odd"]] if _are_lists(lists.values()) else [None]
        if not all(type(place) is int and 0 <= place < size for place in places):
            _refuse(path, f"{name} has places that are no places of it")
        if len(set(places)) < len(places):
            _refuse(path, f"{name} has a place twice")


def _are_lists(values: Any) -> bool:
    return all(isinstance(value, list) for value in values)


def _require_half(path: Path, header: Mapping[str, Any]) -> None:
    clips = {row["name"]: row["stages"] for row in header["clips"]}
    for dtype, entry in header["half"].items():
        if dtype not in HALF or not isinstance(entry, dict) or set(entry) != {"about", "errors"}:
            _refuse(path, f"its errors of {str(dtype)[:20]} are not described")
        about, errors = entry["about"], entry["errors"]
        if not isinstance(about, dict) or about.get("dtype") != dtype:
            _refuse(path, f"its errors of {dtype} do not say what computed them")
        if not isinstance(errors, dict) or set(errors) != set(clips):
            _refuse(path, f"its errors of {dtype} are not those of its clips")
        for clip, kinds in errors.items():
            if not isinstance(kinds, dict) or set(kinds) != {"stage", "local"}:
                _refuse(path, f"its errors of {dtype} on {clip} are not of stages")
            for found in kinds.values():
                if not isinstance(found, dict) or set(found) - set(clips[clip]):
                    _refuse(path, f"its errors of {dtype} on {clip} are not of its stages")


def read_arrays(path: Path, header: Mapping[str, Any]) -> Arrays:
    """Every array of a recording whose header is sound.

    Raises ParityError if one is missing, surplus, of another dtype or shape, not
    finite, or if a truth is further from what was recorded than float32 errs.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, TypeError) as error:
        raise ParityError(f"{path.name} is damaged", found=str(error)) from error
    config = ModelConfig.from_dict(header["config"])
    expected: set[str] = set()
    errors: set[str] = set()
    for row in header["clips"]:
        name = row["name"]
        waveform = _array(path, arrays, f"{name}/waveform", "<f4")
        if waveform.ndim != 2 or not waveform.size:
            _refuse(path, f"the clip {name} is not (batch, samples)")
        expected.add(f"{name}/waveform")
        for kind, dtype, there in (
            ("padding_mask", "<u4", f"{name}/padding_mask" in arrays),
            ("input", "<f4", config.normalize),
        ):
            if there:
                _array(path, arrays, f"{name}/{kind}", dtype, waveform.shape)
                expected.add(f"{name}/{kind}")
        for stage in row["stages"]:
            given = f"{name}/{stage}"
            output = _array(path, arrays, given, "<f4")
            expected.add(given)
            before = stage_input(config, stage)
            kinds = ["truth", *(["local"] if before is None or before in row["stages"] else [])]
            for kind in kinds:
                entry = f"{given}/{kind}"
                _array(path, arrays, entry, "<f2", output.shape)
                _require_plausible(path, entry, output, arrays[entry], header["scales"].get(entry))
                expected.add(entry)
                errors.add(entry)
    if surplus := set(arrays) - expected:
        _refuse(path, f"arrays that no clip has: {name_list(sorted(surplus))}")
    if surplus := set(header["scales"]) - errors:
        _refuse(path, f"scales of what is not there: {name_list(sorted(surplus))}")
    return arrays


def _array(
    path: Path, arrays: Arrays, name: str, dtype: str, shape: tuple[int, ...] | None = None
) -> NDArray[Any]:
    found = arrays.get(name)
    if found is None:
        _refuse(path, f"it has no {name}")
    if found.dtype != np.dtype(dtype) or (shape is not None and found.shape != shape):
        _refuse(path, f"{name} is {found.dtype} of shape {found.shape}")
    if not np.isfinite(found).all():
        _refuse(path, f"{name} holds numbers that are not finite")
    return found


def _require_plausible(
    path: Path, entry: str, output: NDArray[Any], error: NDArray[Any], scale: Any
) -> None:
    """A truth is what float32 gave, and little added to it."""
    if type(scale) is not float or not 0 < scale <= 1:
        _refuse(path, f"{entry} has no scale, or an impossible one")
    if math.frexp(scale)[0] != 0.5:
        _refuse(path, f"the scale of {entry} is not a power of two")
    largest = float(np.abs(error.astype(np.float64)).max(initial=0.0)) * scale
    if largest > LARGEST_ERROR * float(np.abs(output).max(initial=0.0)):
        _refuse(path, f"{entry} is off by {largest:.1e}, which no float32 is")


def require_clips(
    path: Path,
    clips: Sequence[Clip],
    stages: Mapping[str, Sequence[str]],
    wanted: Sequence[tuple[Clip, Sequence[str]]],
) -> None:
    """Raise ParityError unless ``clips`` are those of ``wanted``, with the stages of each."""
    found = {clip.name: clip for clip in clips}
    for clip, selected in wanted:
        there = found.pop(clip.name, None)
        if there is None:
            _refuse(path, f"it lacks the clip {clip.name}")
        if list(stages[clip.name]) != list(selected):
            _refuse(path, f"the clip {clip.name} has other stages than published recordings have")
        same_mask = (
            there.padding_mask is None
            if clip.padding_mask is None
            else there.padding_mask is not None
            and np.array_equal(there.padding_mask, clip.padding_mask)
        )
        allowed = WAVEFORM_TOLERANCE * float(np.abs(clip.waveform).max())
        same_wave = there.waveform.shape == clip.waveform.shape and np.allclose(
            there.waveform, clip.waveform, rtol=0, atol=allowed
        )
        if not (same_mask and same_wave):
            _refuse(path, f"the clip {clip.name} is other sound than published recordings have")
    if found:
        _refuse(path, f"clips that published recordings do not have: {name_list(sorted(found))}")
