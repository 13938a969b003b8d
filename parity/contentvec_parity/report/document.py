"""The report of a parity run: one JSON document, and its renderings.

Everything that is shown is rendered from the document, and the verdict is a
function of it, so a saved run can be shown and judged again without running it.

The document, ``schema`` "mlx-contentvec-parity/1":

``schema``     name and version of this layout; a new field does not change it
``created``    UTC time, ISO 8601
``seconds``    how long the run took
``weights``    the converted file: ``name``, ``size``, ``sha256``, ``precision``
               (a name in ``contentvec_convert.precision``), ``source`` (what its
               metadata say it was made from)
``source``     the original: ``name``, ``size``, ``md5``, ``sha256``, ``known_as``
               (None for a file that is not in the table of known ones),
               ``stand_in`` (a sentence if its weights are synthetic, else None)
``machine``    ``chip``, ``architecture``, ``cores``, ``memory_gib``, ``system``,
               ``device`` {``kind``: "cpu", "metal" or "cuda", ...}
``versions``   package -> version
``flags``      ``tf32``: whether MLX was allowed TF32 products; ``environment``;
               ``torch_threads``; ``torch_blas``: "its own", or "OpenBLAS" if that was
               loaded before PyTorch and computes its products
``config``     the model's configuration (``mlx_contentvec.config``)
``reference``  ``name`` ("fairseq", "transformers", "recording"), ``versions`` of what
               computed it, ``recorded_from`` (which of the two, for a recording),
               ``stages`` in the order they run, ``inputs``: stage -> the stage it
               is fed by (None: the waveform), ``reads``: stage -> parameters it reads
``yardsticks`` name -> ``device`` ("cpu", "cuda", "mps"), its ``name``, ``dtype``, ``tf32``
               (None where there is none) of PyTorch as it was run besides float32 on
               the CPU: "device" in float32 on the device of MLX, TF32 off;
               "device_defaults" there with PyTorch's own settings of TF32, which is
               information; "half" in float16 or bfloat16, for weights stored so
``clips``      one entry per input: ``name``, ``about``, ``origin`` (seed or file and
               resampler), ``batch``, ``samples``, ``seconds``, ``frames``,
               ``padded``, ``mask_agrees`` (None without padding), ``failed``: yardstick ->
               why it could not run the clip
``stages``     one row per clip, stage and ``kind``:
               "stage"     the stage's output, from the audio
               "local"     the stage by itself, fed what the original's was given
               "features"  what a public call returned; ``name`` says which call
               Each has ``name``, ``stage``, ``clip``, ``values`` (how many numbers
               were compared), ``shape``, ``expected_shape``, ``comparable`` (False:
               another shape, or numbers that are not finite; then nothing follows),
               ``candidate`` (MLX against the float64 truth), ``reference`` (PyTorch
               float32 on the CPU against it), each further yardstick under its name,
               ``floor`` (the truth rounded to float32 against it), and for features
               ``variant`` (whether it is another way to ask for what a row has already),
               ``apart`` (MLX against PyTorch) and ``nearest``
               (another stage whose truth is nearer, or None). The metrics are
               those of ``contentvec_parity.compare.metrics.METRICS``.
``tensors``    the tensor-by-tensor proof (``contentvec_parity.compare.tensors``); None where
               the original's tensors were not at hand
``with_tf32``  features of a few clips with TF32 products: ``flags``, ``summary`` as in
               the verdict, the lowest ``snr_db``; None where that was not measured. It
               is information and decides nothing.
``verdict``    ``passed``, ``reason`` (one sentence), ``gates``, ``failures``,
               ``blame``, ``summary`` (``contentvec_parity.compare.verdict``)

Infinite numbers are written as the strings "inf" and "-inf".
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_contentvec.errors import ParityError, printable
from mlx_contentvec.json_text import JsonError, read_object

from ..compare.soundness import require_sound
from ..inputs import BUILT_IN

SCHEMA = "mlx-contentvec-parity/1"

Document = dict[str, Any]

#: a report of --thorough has 25 MB and two million values and keys
REPORT_BYTES, REPORT_VALUES = 96 * 1024 * 1024, 8_000_000


def to_json(document: Mapping[str, Any]) -> str:
    """The document as JSON; infinities become the strings that ``read`` undoes."""
    return json.dumps(_strict(document), indent=1)


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


#: what may be infinite in a report
_MAY_BE_INFINITE = frozenset(
    ("max_abs", "rms", "snr_db", "min_snr_db", "ratio", "local_ratio", "min_snr")
)
_INFINITE = {"inf": math.inf, "-inf": -math.inf}


def printable_texts(value: Any) -> Any:
    """``value`` with each of its texts as ``printable`` has it."""
    if isinstance(value, Mapping):
        return {printable_texts(name): printable_texts(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [printable_texts(item) for item in value]
    return printable(value) if isinstance(value, str) else value


def _undone(value: Any, key: str = "") -> Any:
    """``value`` with infinite numbers where ``to_json`` wrote strings."""
    if isinstance(value, dict):
        return {name: _undone(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_undone(item, key) for item in value]
    if key in _MAY_BE_INFINITE and isinstance(value, str):
        return _INFINITE.get(value, value)
    return value


def read(path: Path) -> Document:
    """A saved document, found to be complete and possible; its verdict is not looked at.

    Raises ParityError if the file is not one, of another schema, or not sound
    (``contentvec_parity.compare.soundness``).
    """
    try:
        found = read_object(path, size=REPORT_BYTES, values=REPORT_VALUES)
    except OSError as error:
        raise ParityError(f"{path} cannot be read: {error.strerror}") from error
    except JsonError as error:
        raise ParityError(
            f"{path.name} is not a saved parity run",
            found=str(error),
            expected=f"JSON with a schema, as --json FILE writes ({SCHEMA})",
        ) from error
    if "schema" not in found:
        raise ParityError(
            f"{path.name} is not a saved parity run",
            expected=f"JSON with a schema, as --json FILE writes ({SCHEMA})",
        )
    if found["schema"] != SCHEMA:
        raise ParityError(
            f"{path.name} was saved in another layout",
            found=repr(found["schema"])[:80],
            expected=SCHEMA,
            hint="run parity again with this version",
        )
    document: Document = _undone(printable_texts(found))
    require_sound(document)
    return document


# ---- words and figures the renderings share --------------------------------------------


def figure(value: float | None, digits: int = 2) -> str:
    """``1.2e-05``; a dash for nothing."""
    return "-" if value is None else f"{value:.{digits - 1}e}"


def times(value: float) -> str:
    """A ratio: ``0.87``, ``12``, ``2300``, ``inf``."""
    if math.isinf(value):
        return "inf"
    return f"{value:.2f}" if value < 10 else f"{value:.0f}" if value < 1e5 else f"{value:.1e}"


def similarity(cosine: float) -> str:
    """A cosine, with as many nines as it has: ``1-3.1e-11``; ``0.9412`` if it has few."""
    return f"{cosine:.4f}" if cosine < 0.999 else f"1-{max(0.0, 1 - cosine):.1e}"


def device_line(document: Mapping[str, Any]) -> str:
    """``cpu (OpenBLAS), TF32 off, mlx 0.32.4``."""
    device = document["machine"]["device"]
    name = device.get("device_name") or device.get("blas")
    tf32 = "TF32 allowed" if document["flags"]["tf32"] else "TF32 off"
    kind = f"{device['kind']} ({name})" if name else str(device["kind"])
    return f"{kind}, {tf32}, mlx {document['versions'].get('mlx', '?')}"


def reference_line(document: Mapping[str, Any]) -> str:
    """``fairseq 0.12.3.1, torch 2.13.0``, or that it is a recording of that."""
    reference = document["reference"]
    parts = [f"{package} {version}" for package, version in reference["versions"].items()]
    text = ", ".join(sorted(parts, key=lambda part: not part.startswith(_computed_by(reference))))
    if document["flags"].get("torch_blas") == "OpenBLAS":
        text += " (on an OpenBLAS that was loaded before it)"
    return f"a recording of {text}" if reference["name"] == "recording" else text


def _computed_by(reference: Mapping[str, Any]) -> str:
    return str(reference.get("recorded_from") or reference["name"])


#: yardstick -> what a table calls it
COLUMNS = {"device": "PyTorch on this device", "half": "PyTorch {dtype}"}


def extra_yardstick(document: Mapping[str, Any]) -> tuple[str, str] | None:
    """The yardstick that tables show beside PyTorch on the CPU: its name, and its heading."""
    for name, heading in COLUMNS.items():
        if name in document["yardsticks"]:
            return name, heading.format(dtype=document["yardsticks"][name]["dtype"])
    return None


def yardstick_line(document: Mapping[str, Any]) -> str | None:
    """One sentence on what PyTorch's error is elsewhere than in float32 on the CPU."""
    found = extra_yardstick(document)
    if found is None:
        return None
    name, heading = found
    about = document["yardsticks"][name]
    features = [e for e in document["verdict"]["summary"] if e["kind"] == "features" and name in e]
    failed = sum(name in clip["failed"] for clip in document["clips"])
    place = about["name"] or about["device"]
    text = f"{heading} ({place}" + (f", TF32 {about['tf32']}" if about["tf32"] else "") + ")"
    if not features:
        return f"{text}: could not run {failed} of {len(document['clips'])} clips, so is not used."
    worst = max(features, key=lambda entry: float(entry[name]["rms"]))
    text += (
        f": rms error of {worst['name']} {figure(worst[name]['rms'])}; "
        f"on the CPU in float32 {figure(worst['reference']['rms'])}"
    )
    if "device_defaults" in worst:
        text += (
            f"; on this device as it comes, TF32 by PyTorch's own settings, "
            f"{figure(worst['device_defaults']['rms'])} (information)"
        )
    if name == "device":
        stages = [e for e in document["verdict"]["summary"] if "yardstick" in e]
        held = sum("device" in entry["yardstick"].values() for entry in stages)
        text += (
            f". The larger error of the two is the limit's base: this device's in {held} of "
            f"{len(stages)} rows"
        )
    return text + "."


def headline(document: Mapping[str, Any]) -> str:
    """``PASSED`` or ``FAILED``."""
    return "PASSED" if document["verdict"]["passed"] else "FAILED"


@dataclass(frozen=True)
class Agreement:
    """One figure between MLX and the original in float32: the worst of all clips."""

    #: "max absolute difference" or "cosine similarity"
    what: str
    value: float
    #: the call that gave the features, ``layer 12``
    features: str
    clip: str

    @property
    def written(self) -> str:
        """The value as the reports show it."""
        return figure(self.value) if self.what == MAX_ABS else similarity(self.value)

    @property
    def where(self) -> str:
        """``layer 12, clip 3s``."""
        return f"{self.features}, clip {self.clip}"


MAX_ABS, COSINE = "max absolute difference", "cosine similarity"


def agreement(document: Mapping[str, Any], features: str | None = None) -> list[Agreement]:
    """Max absolute difference and cosine similarity between MLX and the original.

    features: of these only (a row's ``name``); of all by default

    Empty if nothing could be compared. The cosine is that of a clip's features taken
    as one vector each.
    """
    rows = [
        row
        for row in document["stages"]
        if row["kind"] == "features" and row["comparable"] and features in (None, row["name"])
    ]
    if not rows:
        return []
    largest = max(rows, key=lambda row: row["apart"]["max_abs"])
    lowest = min(rows, key=lambda row: row["apart"]["cosine"])
    return [
        Agreement(what, row["apart"][metric], row["name"], row["clip"])
        for what, metric, row in ((MAX_ABS, "max_abs", largest), (COSINE, "cosine", lowest))
    ]


def feature_tables(document: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Features -> one entry per clip, the clips that only widen the net pooled into one.

    An entry has ``clip`` and either ``problem`` (it could not be compared) or
    ``candidate``, ``reference`` and ``apart`` with their metrics. Other ways to
    ask for the same features are left out: the summary has them.
    """
    shown = {clip["name"] for clip in document["clips"] if _is_shown(document, clip)}
    rows = [row for row in document["stages"] if row["kind"] == "features"]
    found: dict[str, list[dict[str, Any]]] = {}
    for label in dict.fromkeys(row["name"] for row in rows if not row.get("variant")):
        mine = [row for row in rows if row["name"] == label]
        entries = [_feature_entry(row) for row in mine if row["clip"] in shown]
        others = [row for row in mine if row["clip"] not in shown]
        entries += [_feature_entry(row) for row in others if not row["comparable"]]
        pooled = [row for row in others if row["comparable"]]
        if pooled:
            entries.append({"clip": f"{len(pooled)} more", **_pool_features(pooled)})
        found[label] = entries
    return found


def _is_shown(document: Mapping[str, Any], clip: Mapping[str, Any]) -> bool:
    recorded = document["reference"]["name"] == "recording"
    return recorded or clip["name"] in BUILT_IN or "file" in clip["origin"]


#: what an entry of the feature tables shows, where it was measured
_MEASURED = ("candidate", "reference", "device", "half", "apart")


def _feature_entry(row: Mapping[str, Any]) -> dict[str, Any]:
    if row["comparable"]:
        return {key: row[key] for key in ("clip", *_MEASURED) if key in row}
    return {"clip": row["clip"], "problem": not_comparable(row)}


def not_comparable(row: Mapping[str, Any]) -> str:
    """Why a row of the report could not be compared."""
    if row["shape"] != row["expected_shape"]:
        return f"shape {tuple(row['shape'])}, not {tuple(row['expected_shape'])}"
    return "numbers that are not finite"


def _pool_features(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    """The worst of several clips in every metric; rms over all values."""
    total = sum(row["values"] for row in rows)
    found: dict[str, Any] = {}
    for who in _MEASURED:
        if not all(who in row for row in rows):
            continue
        squares = sum(row["values"] * row[who]["rms"] ** 2 for row in rows)
        found[who] = {
            "max_abs": max(row[who]["max_abs"] for row in rows),
            "rms": math.sqrt(squares / total),
            **{
                m: min(row[who][m] for row in rows)
                for m in ("cosine", "worst_frame_cosine")
                if m in rows[0][who]
            },
        }
    return found


def advice(document: Mapping[str, Any]) -> list[str]:
    """For a failed run: what it means and what to look at, in plain sentences."""
    verdict = document["verdict"]
    blame = verdict["blame"]
    if verdict["passed"] or not blame:
        return []
    lines = []
    for wrong in blame["wrong"][:3]:
        stage = wrong["stage"]
        if wrong["differing_tensors"]:
            lines.append(f"{stage} reads tensors that are not the original's:")
            what = {item["name"]: item["what"] for item in document["tensors"]["failures"]}
            names = wrong["differing_tensors"]
            lines += [f"  {name}: {what[name]}" for name in names[:10]]
            if len(names) > 10:
                lines.append(f"  and {len(names) - 10} more")
        else:
            lines.append(
                f"{stage} holds the original's tensors but computes something else: fed the "
                f"original's own input, its error is {times(wrong['local_ratio'])} x PyTorch's."
            )
            lines.append(
                "  it reads "
                + ", ".join(wrong["reads"][:6])
                + (f" and {len(wrong['reads']) - 6} more" if len(wrong["reads"]) > 6 else "")
            )
    if len(blame["wrong"]) > 3:
        rest = ", ".join(wrong["stage"] for wrong in blame["wrong"][3:])
        lines.append(f"also wrong by themselves: {rest}")
    if blame["wrong"]:
        lines.append(
            "Stages after the first wrong one are off as well because they are fed its output; "
            "by themselves they may be right."
        )
    for call in blame.get("calls", []):
        like = call["looks_like"]
        lines.append(
            f"every stage up to {call['stage']} is right, but asking for {call['name']!r} returns "
            "something else" + (f": what it returns is nearest to {like}." if like else ".")
        )
    orphans = [
        item for item in (document["tensors"] or {}).get("failures", []) if not item["stage"]
    ]
    lines += [f"{item['name']}: {item['what']}" for item in orphans[:10]]
    if blame.get("largest_local"):
        lines.append(
            "No stage is wrong by itself: the arithmetic is merely less exact than PyTorch's. "
            "Largest errors of single stages, as multiples of PyTorch's: "
            + ", ".join(f"{e['stage']} {times(e['ratio'])}" for e in blame["largest_local"])
        )
    return lines


def sentence(text: str) -> str:
    """``text`` with a full stop, and a capital unless it begins with a name."""
    word = text.split(" ", 1)[0]
    text = text[:1].upper() + text[1:] if word.isalpha() else text
    return text + ("" if text.endswith((".", ":")) else ".")


def stage_entries(
    document: Mapping[str, Any],
) -> dict[str, tuple[dict[str, Any], dict[str, Any] | None]]:
    """Stage -> its pooled errors from the audio, and by itself (None if it was not run so)."""
    summary = document["verdict"]["summary"]
    local = {entry["name"]: entry for entry in summary if entry["kind"] == "local"}
    return {
        entry["name"]: (entry, local.get(entry["name"]))
        for entry in summary
        if entry["kind"] == "stage"
    }


def tf32_line(document: Mapping[str, Any]) -> str | None:
    """One sentence on what turning TF32 on costs, where it was measured."""
    found = document["with_tf32"]
    if found is None:
        return None
    entry = max(found["summary"], key=lambda e: max(e["ratio"].values()))
    snr = "no error at all" if found["snr_db"] is None else f"{found['snr_db']:.0f} dB"
    largest = figure(entry["candidate"]["max_abs"] if "candidate" in entry else None)
    return (
        "With TF32 (MLX_ENABLE_TF32=1) the error of the features is up to "
        f"{times(max(entry['ratio'].values()))} x PyTorch's ({entry['name']}, largest "
        f"{largest}; signal to noise {snr} or better)."
    )


def tensor_line(document: Mapping[str, Any]) -> str:
    """One sentence on the tensor-by-tensor proof."""
    tensors = document["tensors"]
    if tensors is None:
        return "Tensors: not compared (the original's were not at hand)."
    if tensors["failures"]:
        return f"Tensors: {len(tensors['failures'])} of {tensors['parameters']} parameters differ."
    if tensors["sources"] is None:
        return (
            f"Tensors: {tensors['exact']} of {tensors['parameters']} parameters equal the recorded "
            f"ones bit for bit, {tensors['rounded']} computed to the recorded grid"
            + (f", {tensors['quantized']} quantised." if tensors["quantized"] else ".")
        )
    text = f"Tensors: all {tensors['sources']} of the original accounted for; {tensors['exact']} "
    text += "parameters equal it bit for bit"
    if tensors["rounded"]:
        text += f", {tensors['rounded']} computed to {tensors['largest_ulps']:.0f} ulp"
    if tensors["quantized"]:
        text += f", {tensors['quantized']} quantised"
    return text + f", {len(tensors['unread'])} unread ({', '.join(tensors['unread'])})."
