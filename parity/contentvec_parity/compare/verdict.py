"""Whether a run passed, and if not, which stage is to blame. Pure functions of a report.

The question is never "is the error below some number" but "is MLX further from
the truth than PyTorch is": both compute in float32, both round, and the truth is
the same model in float64. So every limit is a ratio, error(MLX) / error(PyTorch),
of the largest error and of the rms, for each stage over all clips together.

PyTorch's error is the larger of two, where both were measured: in float32 on the
CPU, and in float32 on the device that MLX ran on, with TF32 off. A GPU adds in
another order, and no implementation is more exact than its device allows. The
second counts only up to ``DEVICE_CAP`` times the first: beyond that PyTorch
computes something else there, which excuses nothing. float16 and bfloat16 are
held to PyTorch's own float16 and bfloat16 in the same way. PyTorch has no 8- or
4-bit weights to compare with: there the features must keep a signal-to-noise
ratio, as in half precision where PyTorch could not run in it.

Two things keep a ratio from meaning nothing. PyTorch's error is taken as at
least the error of the truth rounded to float32, which is what a perfect float32
implementation would have: so a stage where PyTorch happens to be exact cannot
divide by zero. And clips are pooled, because the largest error of a one-frame
clip is a lottery; a single clip still fails if it exceeds the limit
``CLIP_SLACK`` times over. Nothing else softens a limit.

Beside the ratio stands a limit that no figure of PyTorch moves: the features of
every clip keep ``LEAST_SNR``. It is far below what any format gives, and above
what is left where the truth or PyTorch's error is not what it is said to be.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

#: limit on error(MLX) / error(PyTorch)
RATIO = 2.0

#: what the tables call the metrics that are compared with PyTorch's
_ERRORS = {"max_abs": "largest", "rms": "rms"}
#: how many times the limit a single clip may reach before it fails by itself
CLIP_SLACK = 4.0

#: a stage fed the original's own input is wrong by itself beyond this ratio
WRONG_BY_ITSELF = 4.0

#: how far PyTorch on the device may exceed PyTorch on the CPU and still be a yardstick.
#: On an H100 it is 5.9 times in a convolution's largest error, 2.7 times in the features
DEVICE_CAP = 10.0

#: without PyTorch's error in the same format to compare with: the signal-to-noise ratio, in
#: dB, that the features must keep. At 20 dB the noise is a tenth of the features
SNR_LIMITS = {"float16": 40.0, "bfloat16": 25.0, "q8": 20.0, "q4": 20.0}

#: the signal-to-noise ratio, in dB, that the features keep whatever PyTorch's error is.
#: Measured: float32 102 dB, float16 37 to 72, bfloat16 19
LEAST_SNR = {"float32": 60.0, "float16": 25.0, "bfloat16": 12.0, "q8": 20.0, "q4": 20.0}

#: dB that a stage may lose on its input without having been given something else: half the
#: amplitude. Noise of the weights' format adds up, and crosses its limit somewhere
SNR_STEP = 6.0


@dataclass(frozen=True)
class Gates:
    """What a run must keep to. ``None`` leaves a gate open."""

    ratio: float = RATIO
    #: largest difference from the truth, of any feature
    max_abs: float | None = None
    #: cosine of the worst frame with the truth
    min_cosine: float | None = None
    #: signal-to-noise ratio of any features, in dB
    min_snr: float | None = None


Row = Mapping[str, Any]


#: name of a yardstick in the rows -> how a sentence calls it
YARDSTICKS = {
    "reference": "PyTorch's own float32",
    "device": "PyTorch's own float32 on this device",
}

#: what a row measures: MLX, PyTorch and the floor, and where they could be had the others
SIDES = ("candidate", "reference", "floor", "device", "device_defaults", "half")


def _pooled(rows: Iterable[Row]) -> dict[str, dict[str, float]]:
    """Largest error, and rms over every value, of several clips' rows.

    A yardstick that lacks one of the clips is left out.
    """
    rows = list(rows)
    total = sum(row["values"] for row in rows)
    found = {}
    for who in SIDES:
        if not all(who in row for row in rows):
            continue
        squares = sum(row["values"] * row[who]["rms"] ** 2 for row in rows)
        found[who] = {
            "max_abs": _largest(row[who]["max_abs"] for row in rows),
            "rms": math.sqrt(squares / max(total, 1)),
        }
    return found


def _largest(values: Iterable[float]) -> float:
    """The largest of some values; NaN if one is, which ``max`` passes over."""
    values = list(values)
    return math.nan if any(map(math.isnan, values)) else max(values)


def ratio(candidate: float, reference: float, floor: float) -> float:
    """error(MLX) / error(PyTorch), PyTorch's being taken as at least ``floor``."""
    allowed = max(reference, floor)
    if allowed == 0:
        return 1.0 if candidate == 0 else math.inf
    return candidate / allowed


def _yardstick(pool: Mapping[str, Mapping[str, float]], metric: str) -> tuple[str, float]:
    """Which error of PyTorch a metric is held to, and how large it is."""
    if "half" in pool:
        return "half", pool["half"][metric]
    cpu = pool["reference"][metric]
    device = min(pool["device"][metric], DEVICE_CAP * cpu) if "device" in pool else 0.0
    return ("device", device) if device > cpu else ("reference", cpu)


def _ratios(pool: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    return {
        metric: ratio(pool["candidate"][metric], _yardstick(pool, metric)[1], pool["floor"][metric])
        for metric in ("max_abs", "rms")
    }


def summarise(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """One entry per kind and stage: pooled errors, their ratios, and the worst clip.

    Rows that could not be compared (other shapes, NaN) make the ratios infinite.
    """
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["name"]), []).append(row)
    found = []
    for (kind, name), group in groups.items():
        sound = [row for row in group if row["comparable"]]
        broken = [row for row in group if not row["comparable"]]
        entry: dict[str, Any] = {
            "kind": kind,
            "name": name,
            "stage": group[0]["stage"],
            "clips": len(group),
            "broken": [row["clip"] for row in broken],
        }
        if sound:
            pool = _pooled(sound)
            entry.update(pool)
            entry["ratio"] = _ratios(pool)
            entry["yardstick"] = {m: _yardstick(pool, m)[0] for m in ("max_abs", "rms")}
            noise = [row["candidate"]["snr_db"] for row in sound]
            entry["snr_db"] = min((value for value in noise if value is not None), default=None)
            worst = max(sound, key=lambda row: max(_ratios(_pooled([row])).values()))
            entry["worst_clip"] = {"clip": worst["clip"], "ratio": _ratios(_pooled([worst]))}
        if broken:
            entry["ratio"] = {"max_abs": math.inf, "rms": math.inf}
            entry["snr_db"] = -math.inf
            entry["worst_clip"] = {"clip": broken[0]["clip"], "ratio": entry["ratio"]}
        found.append(entry)
    return found


def worst_ratio(entry: Mapping[str, Any]) -> float:
    """The larger of an entry's two ratios."""
    return float(max(entry["ratio"].values()))


def _required_snr(report: Mapping[str, Any]) -> float | None:
    """The signal-to-noise ratio that is judged, in dB; None where the ratios of errors are."""
    comparable = [row for row in report["stages"] if row["comparable"]]
    if comparable and all("half" in row for row in comparable):
        return None
    return SNR_LIMITS.get(report["weights"]["precision"])


def exceeds_noise(entry: Mapping[str, Any], min_snr_db: float | None) -> bool:
    """Whether an entry of the summary is further off than rounding of its kind explains.

    min_snr_db: the signal-to-noise ratio that is judged, None for the ratio of errors
    """
    if min_snr_db is not None:
        return entry["snr_db"] is not None and not entry["snr_db"] >= min_snr_db
    return not worst_ratio(entry) <= WRONG_BY_ITSELF


def judge(report: Mapping[str, Any], gates: Gates) -> dict[str, Any]:
    """The verdict on a report: ``passed``, ``reason``, every failure, and who is to blame.

    Needs only what a saved report holds, so a run can be judged again with
    other gates. A figure that is no number fails; whether all of them can be is
    ``contentvec_parity.compare.soundness``'s question.
    """
    summary = summarise(report["stages"])
    failures = [
        *_broken(report["stages"]),
        *_tensor_failures(report["tensors"]),
        *_mask_failures(report["clips"]),
    ]
    min_snr_db = _required_snr(report)
    if min_snr_db is None:
        failures += _ratio_failures(summary, gates)
        precision = report["weights"]["precision"]
        least = f"is the least that {precision} weights keep"
        failures += _snr_failures(report["stages"], LEAST_SNR[precision], least)
    else:
        expected = f"is expected of {report['weights']['precision']} weights"
        failures += _snr_failures(report["stages"], min_snr_db, expected)
    failures += _absolute_failures(report["stages"], gates)
    blame = _blame(report, summary, min_snr_db) if failures else None
    verdict = {
        "passed": not failures,
        "gates": asdict(gates),
        "limits": {
            "clip_slack": CLIP_SLACK,
            "wrong_by_itself": WRONG_BY_ITSELF,
            "min_snr_db": min_snr_db,
        },
        "failures": failures,
        "blame": blame,
        "summary": summary,
    }
    verdict["reason"] = _reason(report, verdict)
    return verdict


def _broken(rows: Iterable[Row]) -> list[dict[str, Any]]:
    found = []
    for row in rows:
        if row["comparable"]:
            continue
        if row["shape"] != row["expected_shape"]:
            what = f"shape {tuple(row['shape'])} instead of {tuple(row['expected_shape'])}"
        else:
            what = "values that are not finite numbers"
        found.append(
            {"gate": "shape", "kind": row["kind"], "name": row["name"], "clip": row["clip"]}
            | {"what": what}
        )
    return found


def _tensor_failures(tensors: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    return [
        {"gate": "tensor", "kind": "tensor", "name": item["name"], "what": item["what"]}
        for item in (tensors or {}).get("failures", [])
    ]


def _mask_failures(clips: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "gate": "mask",
            "kind": "mask",
            "name": "padding mask",
            "clip": clip["name"],
            "what": "the returned padding mask differs from the original's",
        }
        for clip in clips
        if clip.get("mask_agrees") is False
    ]


def _ratio_failures(summary: Iterable[Mapping[str, Any]], gates: Gates) -> list[dict[str, Any]]:
    found = []
    for entry in summary:
        if entry["broken"]:
            continue
        local = entry["kind"] == "local"
        limit = max(gates.ratio, WRONG_BY_ITSELF) if local else gates.ratio
        for metric, value in entry["ratio"].items():
            clip = entry["worst_clip"]["ratio"][metric]
            if not value <= limit:
                what = f"{_ERRORS[metric]} error {value:.3g} x PyTorch's, the limit is {limit:g} x"
            elif not (local or clip <= limit * CLIP_SLACK):
                what = (
                    f"{_ERRORS[metric]} error {clip:.3g} x PyTorch's on the clip "
                    f"{entry['worst_clip']['clip']}, the limit for one clip is "
                    f"{limit * CLIP_SLACK:g} x"
                )
            else:
                continue
            found.append(
                {"gate": "ratio", "kind": entry["kind"], "name": entry["name"], "what": what}
            )
    return found


def _snr_failures(rows: Iterable[Row], limit: float, expected: str) -> list[dict[str, Any]]:
    return [
        {
            "gate": "snr",
            "kind": row["kind"],
            "name": row["name"],
            "clip": row["clip"],
            "what": f"{row['candidate']['snr_db']:.1f} dB, at least {limit:g} dB {expected}",
        }
        for row in rows
        if row["kind"] == "features"
        and row["comparable"]
        and row["candidate"]["snr_db"] is not None
        and not row["candidate"]["snr_db"] >= limit
    ]


def _absolute_failures(rows: Iterable[Row], gates: Gates) -> list[dict[str, Any]]:
    rows = list(rows)
    found = []
    if gates.min_snr is not None:
        found += _snr_failures(rows, gates.min_snr, "was asked for")
    for row in rows:
        if row["kind"] != "features" or not row["comparable"]:
            continue
        where = {"kind": row["kind"], "name": row["name"], "clip": row["clip"]}
        off, cosine = row["candidate"]["max_abs"], row["candidate"]["worst_frame_cosine"]
        if gates.max_abs is not None and not off <= gates.max_abs:
            what = f"off by {off:.3g}, at most {gates.max_abs:g} was asked for"
            found.append({"gate": "max_abs", **where, "what": what})
        if gates.min_cosine is not None and not cosine >= gates.min_cosine:
            what = f"worst frame's cosine {cosine:.9f}, at least {gates.min_cosine:g} was asked for"
            found.append({"gate": "min_cosine", **where, "what": what})
    return found


def _blame(
    report: Mapping[str, Any], summary: Iterable[Mapping[str, Any]], min_snr_db: float | None
) -> dict[str, Any]:
    """The first stage, in the order they run, that is wrong by itself.

    A stage is wrong by itself if a tensor it reads differs from the original's,
    or if its output is, on the very input the original's stage was given. Later
    stages may look worse only because they are fed what it spoiled.
    """
    order = report["reference"]["stages"]
    reads = report["reference"]["reads"]
    tensors = {item["name"]: item for item in (report["tensors"] or {}).get("failures", [])}
    local = {entry["name"]: entry for entry in summary if entry["kind"] == "local"}
    wrong: list[dict[str, Any]] = []
    for stage in order:
        differing = [name for name in reads[stage] if name in tensors]
        entry = local.get(stage)
        computes_wrong = entry is not None and exceeds_noise(entry, min_snr_db)
        if differing or computes_wrong:
            wrong.append(
                {
                    "stage": stage,
                    "differing_tensors": differing,
                    "local_ratio": None if entry is None else worst_ratio(entry),
                    "reads": list(reads[stage]),
                }
            )
    found: dict[str, Any] = {"wrong": wrong}
    accumulated = {entry["name"]: entry for entry in summary if entry["kind"] == "stage"}
    if not wrong:
        found["stage_input"] = _blame_stage_input(
            report["reference"], accumulated, local, min_snr_db
        )
    calls = [
        {"name": entry["name"], "stage": entry["stage"]}
        for entry in summary
        if entry["kind"] == "features"
        and exceeds_noise(entry, min_snr_db)
        and not exceeds_noise(accumulated[entry["stage"]], min_snr_db)
    ]
    if calls:
        looks_like = {
            row["name"]: row["nearest"]
            for row in report["stages"]
            if row["kind"] == "features" and row.get("nearest")
        }
        found["calls"] = [{**call, "looks_like": looks_like.get(call["name"])} for call in calls]
    if not wrong and not calls and not found["stage_input"]:
        ranked = sorted(local.values(), key=worst_ratio, reverse=True)
        found["largest_local"] = [
            {"stage": entry["name"], "ratio": worst_ratio(entry)} for entry in ranked[:3]
        ]
    return found


def _blame_stage_input(
    reference: Mapping[str, Any],
    accumulated: Mapping[str, Mapping[str, Any]],
    local: Mapping[str, Mapping[str, Any]],
    min_snr_db: float | None,
) -> dict[str, Any] | None:
    """A stage that is right by itself, fed by one that is right, and wrong in the whole model.

    What it is given on the way is not what the original gives it: the waveform
    was altered, a padding mask differs, or another stage's output was passed on.
    """
    for stage in reference["stages"]:
        if stage not in accumulated or stage not in local:
            continue
        before = reference["inputs"][stage]
        if (
            exceeds_noise(accumulated[stage], min_snr_db)
            and not exceeds_noise(local[stage], min_snr_db)
            and (before is None or not exceeds_noise(accumulated[before], min_snr_db))
            and not _adds_up(accumulated, before, stage, min_snr_db)
        ):
            return {"stage": stage, "input": before or "the waveform"}
    return None


def _adds_up(
    accumulated: Mapping[str, Mapping[str, Any]],
    before: str | None,
    stage: str,
    min_snr_db: float | None,
) -> bool:
    """Whether a stage has little more noise than its input, in a format that has noise."""
    if min_snr_db is None or before is None:
        return False
    given, gives = accumulated[before]["snr_db"], accumulated[stage]["snr_db"]
    return given is not None and gives is not None and given - gives < SNR_STEP


def _lowest_snr(rows: Iterable[Row]) -> float | None:
    """The lowest signal-to-noise ratio of any features, in dB; None if they equal the truth."""
    found = [row["candidate"]["snr_db"] for row in rows if row["kind"] == "features"]
    return min((value for value in found if value is not None), default=None)


def _reason_passed(report: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
    precision, limit = report["weights"]["precision"], verdict["limits"]["min_snr_db"]
    lowest = _lowest_snr(report["stages"])
    noise = "no noise at all" if lowest is None else f"{lowest:.1f} dB or better"
    if limit is not None:
        share = 0.0 if lowest is None else 100 * 10 ** (-lowest / 20)
        return (
            f"{precision} weights keep the features at {noise} (at least {limit:g} dB expected): "
            f"the noise is up to {share:.2g} % of the features"
        )
    entry = max(
        (entry for entry in verdict["summary"] if entry["kind"] == "features"), key=worst_ratio
    )
    metric = max(entry["ratio"], key=lambda metric: entry["ratio"][metric])
    which = entry["yardstick"][metric]
    name = f"PyTorch's own {precision}" if which == "half" else YARDSTICKS[which]
    if which == "reference" and "device" in entry:
        name += " on the CPU"
    return (
        f"every feature is as near the float64 truth as {name}: at most "
        f"{worst_ratio(entry):.2f} x its error ({entry['name']}; "
        f"the limit is {verdict['gates']['ratio']:g} x)"
        + (f", with a signal-to-noise ratio of {noise}" if which == "half" else "")
    )


def _reason(report: Mapping[str, Any], verdict: Mapping[str, Any]) -> str:
    if verdict["passed"]:
        return _reason_passed(report, verdict)
    blame = verdict["blame"]
    if blame["wrong"]:
        first = blame["wrong"][0]
        if first["differing_tensors"]:
            names = first["differing_tensors"]
            return (
                f"{first['stage']} is the first stage that is wrong by itself: it reads "
                f"{names[0]}"
                + (f" and {len(names) - 1} more" if len(names) > 1 else "")
                + ", which is not what the original holds"
            )
        return (
            f"{first['stage']} is the first stage that is wrong by itself: on the original's own "
            f"input its error is {first['local_ratio']:.3g} x PyTorch's, with tensors that are "
            "the original's, so the arithmetic differs"
        )
    if blame.get("stage_input"):
        stage, before = blame["stage_input"]["stage"], blame["stage_input"]["input"]
        return (
            f"{stage} is right by itself and {before} is right, but in the whole model {stage} "
            "is given something else: look at what happens between the two"
        )
    if blame.get("calls"):
        call = blame["calls"][0]
        like = call["looks_like"]
        return (
            f"asking for {call['name']} gives something else than the stage {call['stage']}, "
            "which is right" + (f": it is nearest to {like}" if like else "")
        )
    first = verdict["failures"][0]
    text = f"{first['name']}: {first['what']}"
    if blame.get("largest_local"):
        largest = blame["largest_local"][0]
        text += (
            "; no stage is wrong by itself, the errors add up "
            f"(the largest is {largest['stage']}'s own, {largest['ratio']:.2g} x PyTorch's)"
        )
    return text
