"""Saved reports that cannot be what was measured, and honest ones that look odd."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from contentvec_parity.compare import soundness
from contentvec_parity.compare.soundness import require_sound
from contentvec_parity.compare.verdict import Gates, judge
from contentvec_parity.report import document as report
from mlx_contentvec.errors import ConfigError, ParityError

Report = dict[str, Any]


@pytest.fixture(scope="module")
def measured(evidence_folder: Path) -> Report:
    return report.read(evidence_folder / "float32.parity.json")


@pytest.fixture
def document(measured: Report) -> Report:
    return copy.deepcopy(measured)


def row_of(document: Report, kind: str = "features", clip: str = "short") -> Report:
    return next(r for r in document["stages"] if (r["kind"], r["clip"]) == (kind, clip))


def clip_of(document: Report, name: str = "short") -> Report:
    return next(clip for clip in document["clips"] if clip["name"] == name)


def side(name: str, **figures: Any) -> Callable[[Report], None]:
    return lambda document: row_of(document)[name].update(figures)


def times_the_error(name: str, factor: float) -> Callable[[Report], None]:
    """A side of every row with its errors multiplied, its decibels along with them."""

    def change(document: Report) -> None:
        for row in document["stages"]:
            figures = row[name]
            figures.update(max_abs=factor * figures["max_abs"], rms=factor * figures["rms"])
            if figures.get("snr_db") is not None:
                figures["snr_db"] -= 20 * math.log10(factor)
            if "apart" in row:
                row["apart"].update(max_abs=figures["max_abs"], rms=figures["rms"])

    return change


def with_noise(decibels: float) -> Callable[[Report], None]:
    """A stage that the original computed with so much noise."""

    def change(document: Report) -> None:
        row = row_of(document, "stage")
        signal = row["candidate"]["rms"] * 10 ** (row["candidate"]["snr_db"] / 20)
        rms = signal / 10 ** (decibels / 20)
        row["reference"].update(max_abs=rms, rms=rms, snr_db=decibels)

    return change


def far_off(part: float, cosine: float, apart: float) -> Callable[[Report], None]:
    """Features of this model that err by a part of the signal, the original by a thousandth.

    cosine: beside the truth; apart: beside the original
    """

    def change(document: Report) -> None:
        row = row_of(document)
        signal = row["candidate"]["rms"] * 10 ** (row["candidate"]["snr_db"] / 20)
        rms, largest = part * signal, 5 * part * signal
        noise = -20 * math.log10(part)
        row["candidate"].update(rms=rms, max_abs=largest, snr_db=noise, cosine=cosine)
        row["reference"].update(rms=signal / 1000, max_abs=signal / 500, snr_db=60.0)
        row["apart"].update(rms=rms, max_abs=largest, cosine=apart)

    return change


def without_rows(**facts: str) -> Callable[[Report], None]:
    def change(document: Report) -> None:
        document["stages"] = [
            row for row in document["stages"] if any(row[key] != facts[key] for key in facts)
        ]

    return change


def both(*changes: Callable[[Report], Any]) -> Callable[[Report], None]:
    def change(document: Report) -> None:
        for one in changes:
            one(document)

    return change


def failing(document: Report) -> None:
    """A tensor that failed, which excuses what it is needed for."""
    failure = {"name": "final_proj.weight", "stage": "final_proj", "what": "is missing"}
    document["tensors"]["failures"].append(failure)


def of_one_second(document: Report) -> None:
    """The longest clip that is computed in all variants."""
    clip_of(document).update(samples=16000, seconds=1.0, frames=49)


def without_variants(clip: str) -> Callable[[Report], None]:
    def change(document: Report) -> None:
        document["stages"] = [
            row for row in document["stages"] if row["clip"] != clip or not row.get("variant")
        ]

    return change


def padded(values: int | None) -> Callable[[Report], None]:
    """A clip with padding, where so many values of a row are not of it; None for all."""

    def change(document: Report) -> None:
        clip_of(document).update(padded=True, mask_agrees=True)
        row = row_of(document)
        row["values"] = math.prod(row["shape"]) if values is None else values

    return change


def tensors(**facts: Any) -> Callable[[Report], None]:
    return lambda document: document["tensors"].update(facts)


YARDSTICK = {"device": "cpu", "name": None, "dtype": "float16", "tf32": None}


def tf32(**facts: Any) -> Callable[[Report], None]:
    """What a run with TF32 products adds, with some of it exchanged."""
    entry = {"name": "layer 3", "ratio": {"max_abs": 9.0, "rms": 8.0}, "candidate": {"max_abs": 1}}
    return lambda document: document.update(
        with_tf32={"flags": {}, "summary": [entry], "snr_db": 60.0, **facts}
    )


ATTACKS: dict[str, tuple[Callable[[Report], Any], str]] = {
    "no figure": (side("candidate", rms=None), "rms is no finite number"),
    "not a number": (side("candidate", rms=math.nan), "rms is no finite number"),
    "not a number, as text": (side("candidate", rms="nan"), "rms is no finite number"),
    "infinite": (side("candidate", max_abs=math.inf), "max_abs is no finite number"),
    "a true figure": (side("candidate", rms=True), "rms is no finite number"),
    "of another universe": (side("reference", max_abs=1e300), "max_abs is no finite number"),
    "negative": (side("candidate", rms=-1e-9), "an rms error of -1e-09"),
    "an rms above the largest": (side("reference", rms=1.0), "an rms error of 1"),
    "a noise that is not the error": (side("candidate", snr_db=150.0), "of several signals"),
    "noise without error": (side("candidate", rms=0.0), "no noise is said to be an error"),
    "error without noise": (side("candidate", snr_db=None), "no noise is said to be an error"),
    "a wide floor": (side("floor", max_abs=1.0, rms=1.0), "larger than float32's"),
    "an original that errs": (times_the_error("reference", 1e4), "which is not float32"),
    "nothing apart": (lambda d: row_of(d).pop("apart"), "apart: no figures"),
    "a yardstick without figures": (
        both(
            lambda d: d["yardsticks"].update(device={**YARDSTICK, "dtype": "float32"}),
            lambda d: row_of(d).update(device=7),
        ),
        "device: no figures",
    ),
    "a floor below nothing": (side("floor", rms=-1e-12), "an rms error of -1e-12"),
    "an original that errs a little too much": (with_noise(59.99), "which is not float32"),
    "no floor": (lambda d: row_of(d).pop("floor"), "has no floor"),
    "no cosine": (lambda d: row_of(d)["apart"].pop("cosine"), "cosine is no finite number"),
    "a cosine a little beyond 1": (side("candidate", worst_frame_cosine=1 + 2e-6), "beyond 1"),
    "a cosine that half of the signal cannot lower so far": (
        far_off(0.5, 0.8659, 0.8659),
        "candidate: a cosine of 0.866 beside a small error",
    ),
    "a cosine beside the original, as low": (
        far_off(0.5, 0.8661, 0.8656),
        "apart: a cosine of 0.866 beside a small error",
    ),
    "a cosine beyond 1": (side("candidate", worst_frame_cosine=1.1), "beyond 1"),
    "a cosine that is not the error's": (side("candidate", cosine=0.5), "beside a small error"),
    "a cosine that the difference has not": (side("apart", cosine=-1), "beside a small error"),
    "nearer to each other": (side("apart", max_abs=1e3, rms=1e3), "apart"),
    "no variant": (lambda d: row_of(d).pop("variant"), "a variant or not"),
    "no value compared": (lambda d: row_of(d).update(values=0), "compared 0 of"),
    "few values compared": (lambda d: row_of(d).update(values=96), "compared 96 of"),
    "no value outside the padding compared": (padded(0), "compared 0 of"),
    "more than all values of a padded clip": (padded(24 * 96 + 1), "compared 2,305 of 2,304"),
    "many values compared": (lambda d: row_of(d).update(values=10**9), "compared 1,000,000,000"),
    "another batch": (lambda d: clip_of(d).update(batch=2), "compared"),
    "other shapes compared": (lambda d: row_of(d).update(shape=[1, 2, 3]), "was compared"),
    "negative shapes": (
        lambda d: row_of(d).update(shape=[-1, -2, 3], expected_shape=[-1, -2, 3]),
        "an impossible shape",
    ),
    "a row twice": (lambda d: d["stages"].append(d["stages"][0]), "was measured twice"),
    "a row of no clip": (lambda d: row_of(d).update(clip="other"), "a clip that is not listed"),
    "a row of no kind": (lambda d: row_of(d).update(kind="other"), "no stage of this model"),
    "a row of no stage": (
        lambda d: row_of(d, "stage").update(name="layer.9", stage="layer.9"),
        "no stage of this model",
    ),
    "a row of another stage": (lambda d: row_of(d).update(stage="conv.0"), "no call of this"),
    "no rows": (lambda d: d.update(stages=[]), "was not measured on"),
    "features of a clip removed": (without_rows(kind="features", clip="quiet"), "on 'quiet'"),
    "a stage removed": (without_rows(stage="layer.2"), "not measured (stage): layer.2"),
    "a stage by itself removed": (
        without_rows(stage="conv.3", kind="local"),
        "not measured (local): conv.3",
    ),
    "features of the projection removed": (
        without_rows(kind="features", stage="final_proj"),
        "was not measured on",
    ),
    "features removed beside a failure": (
        both(failing, without_rows(kind="features", stage="layer.3")),
        "layer 3 was not measured on",
    ),
    "features of a long clip removed": (
        without_rows(kind="features", clip="3s", name="layer 3"),
        "layer 3 was not measured on '3s'",
    ),
    "variants of a short clip removed": (without_variants("short"), "not measured on 'short'"),
    "variants of one second removed": (
        both(of_one_second, without_variants("short")),
        "not measured on 'short'",
    ),
    "a stage removed beside a failure": (
        both(failing, without_rows(kind="stage", stage="layer.2")),
        "not measured (stage): layer.2",
    ),
    "the projection removed": (
        without_rows(kind="stage", stage="final_proj"),
        "not measured (stage): final_proj",
    ),
    "two clips of a name": (lambda d: d["clips"].append(d["clips"][0]), "two clips are called"),
    "an empty list of clips": (lambda d: d.update(clips=[], stages=[]), "no clip was measured"),
    "an empty clip": (lambda d: clip_of(d).update(samples=0), "is empty"),
    "a mask nobody looked at": (lambda d: clip_of(d).update(padded=True), "whether it agrees"),
    "a mask of nothing": (lambda d: clip_of(d).update(mask_agrees=True), "whether it agrees"),
    "an unknown format": (lambda d: d["weights"].update(precision="q1"), "no number format"),
    "no format": (lambda d: d["weights"].pop("precision"), "weights has no precision"),
    "stages left out of the order": (
        lambda d: d["reference"]["stages"].pop(),
        "its reference has other stages",
    ),
    "stages that read nothing": (
        lambda d: d["reference"]["reads"].update({"conv.0": []}),
        "its reference has other reads",
    ),
    "stages fed by others": (
        lambda d: d["reference"]["inputs"].update({"conv.1": None}),
        "its reference has other inputs",
    ),
    "no original": (lambda d: d["reference"].update(name="mlx"), "what the original was"),
    "a recording of nothing": (lambda d: d["reference"].update(name="recording"), "what the"),
    "no versions": (lambda d: d["reference"].pop("versions"), "reference has no versions"),
    "an environment that is a number": (
        lambda d: d["flags"].update(environment=0.5),
        "flags, environment: float instead of dict",
    ),
    "no chip": (lambda d: d["machine"].pop("chip"), "machine has no chip"),
    "a device that is a text": (
        lambda d: d["machine"].update(device="cpu"),
        "machine, device: str instead of dict",
    ),
    "units beyond what can be": (tensors(largest_ulps=1.1e30), "largest_ulps is no finite"),
    "no parameter compared": (tensors(exact=0), "parameters were compared"),
    "parameters compared twice": (tensors(quantized=10), "parameters were compared"),
    "parameters uncounted": (tensors(exact=-1, quantized=58), "parameters were compared"),
    "parameters of another model": (tensors(parameters=1), "1 parameters"),
    "tensors of the original left out": (tensors(sources=1), "1 tensors of the original"),
    "a tensor that is read left out": (
        lambda d: d["tensors"]["unread"].append("layer_norm.weight"),
        "tensors of the original",
    ),
    "failures that are none": (tensors(failures=[{}]), "failures, 0 has no name"),
    "failures without a stage": (
        tensors(failures=[{"name": "a", "what": "b"}]),
        "failures, 0 has no stage",
    ),
    "tensors of another kind": (tensors(failures="none"), "tensors, failures: str instead of list"),
    "versions of everything": (
        lambda d: d["reference"].update(versions={str(i): "1" for i in range(100)}),
        "versions of 100 packages",
    ),
    "versions of a package more than are shown": (
        lambda d: d["reference"].update(versions={str(i): "1" for i in range(31)}),
        "versions of 31 packages",
    ),
    "a package of a long name": (
        lambda d: d["versions"].update({"x" * 1001: "1"}),
        "a name in the report, versions: a text of 1,001 characters",
    ),
    "a long text in a list": (
        lambda d: d["tensors"]["unread"].append("x" * 1001),
        "the report, tensors, unread: a text of 1,001 characters",
    ),
    "a chip of many words": (lambda d: d["machine"].update(chip="x" * 2000), "machine, chip"),
    "a clip that is longer than its samples": (
        lambda d: clip_of(d).update(seconds=3600.0),
        "not as long as its samples",
    ),
    "a clip of other frames": (lambda d: clip_of(d).update(frames=10**9), "has other frames"),
    "a worst frame beyond the end": (
        side("candidate", worst_frame_at=[0, 10**9]),
        "its worst frame nowhere",
    ),
    "a worst frame at the end": (
        side("candidate", worst_frame_at=[0, 24]),
        "its worst frame nowhere",
    ),
    "a worst frame before the start": (
        side("candidate", worst_frame_at=[0, -1]),
        "its worst frame nowhere",
    ),
    "a worst frame of no row": (side("candidate", worst_frame_at=[3]), "its worst frame nowhere"),
    "nearest to nothing": (lambda d: row_of(d).update(nearest="layer.99"), "is nearest to"),
    "a yardstick that is not listed": (
        lambda d: row_of(d).update(half=row_of(d)["reference"]),
        "that is not listed: half",
    ),
    "a yardstick of another format": (
        lambda d: d["yardsticks"].update(half=YARDSTICK),
        "a yardstick for float32 weights that there is not: half",
    ),
    "TF32 of nothing": (tf32(summary=[]), "TF32 are of nothing"),
    "TF32 without figures": (tf32(summary=[{"name": "layer 3"}]), "summary, 0 has no ratio"),
    "TF32 with a negative ratio": (
        tf32(summary=[{"name": "layer 3", "ratio": {"max_abs": -1.0, "rms": 1.0}}]),
        "a ratio of -1",
    ),
    "TF32 with figures that cannot be": (
        tf32(
            summary=[
                {
                    "name": "layer 3",
                    "ratio": {"max_abs": 1.0, "rms": 1.0},
                    "candidate": {"max_abs": 1e31},
                }
            ]
        ),
        "max_abs is no finite number",
    ),
    "TF32 of noise beyond what can be": (tf32(snr_db=1000.5), "snr_db is no finite number"),
    "TF32 beyond what can be": (tf32(snr_db=1e308), "snr_db is no finite number"),
    "rows of another kind": (lambda d: d["stages"].append(7), "int instead of dict"),
    "clips of another kind": (lambda d: d["clips"].append(None), "NoneType instead of dict"),
}
ATTACKS |= {
    f"no {key}": (lambda d, key=key: d.pop(key), f"the report has no {key}")  # type: ignore[misc]
    for key in soundness._DOCUMENT
    if key not in ("tensors", "with_tf32")
}


def test_what_was_measured_is_sound_and_passes(document: Report) -> None:
    require_sound(document)
    assert judge(document, Gates())["passed"]


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_report_that_cannot_be_is_not_judged(
    document: Report, tmp_path: Path, attack: str
) -> None:
    change, said = ATTACKS[attack]
    change(document)
    path = tmp_path / "report.json"
    path.write_text(report.to_json(document))
    with pytest.raises(ParityError) as refused:
        report.read(path)
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) < 8


def test_what_a_run_with_tf32_adds_is_sound(document: Report) -> None:
    tf32()(document)
    require_sound(document)
    # figures that were not finite leave no error to name
    tf32(summary=[{"name": "layer 3", "ratio": {"max_abs": math.inf, "rms": math.inf}}])(document)
    require_sound(document)
    assert "layer 3" in str(report.tf32_line(document))


def test_an_impossible_configuration_is_refused(document: Report) -> None:
    document["config"]["encoder_layers"] = 10**9
    with pytest.raises(ConfigError):
        require_sound(document)


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_lacks_are_refused(document: Report, tmp_path: Path, text: str) -> None:
    row_of(document)["candidate"]["rms"] = "here"
    path = tmp_path / "report.json"
    path.write_text(report.to_json(document).replace('"here"', text))
    with pytest.raises(ParityError):
        report.read(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is not JSON"),
        (b"\xff\xfe", "it is not UTF-8"),
        (b"[" * 100_000, "it nests too deeply"),
        (b'{"schema": 1, "schema": 2}', "occurs twice"),
        (b"[]", "it is not an object"),
        (b"{}", "is not a saved parity run"),
        (b'{"schema": {"a": 1}}', "in another layout"),
        (b'{"schema": "mlx-contentvec-parity/1"}', "has no created"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(ParityError) as refused:
        report.read(path)
    assert said in str(refused.value)


def test_a_report_of_three_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with path.open("wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(ParityError, match="is not a saved parity run") as refused:
        report.read(path)
    assert "it is too large" in str(refused.value)


# ---- what is odd and honest ----------------------------------------------------------------


def incomparable(document: Report) -> None:
    row = row_of(document)
    row.update(comparable=False, shape=[1, 0, 1])
    for name in ("candidate", "reference", "floor", "apart"):
        del row[name]


def silent(document: Report) -> None:
    """A stage whose truth is zero, where both have made something of it."""
    row = row_of(document, "stage", "silence")
    for name in ("candidate", "reference"):
        row[name].update(max_abs=1e-9, rms=1e-9, snr_db=-math.inf)
    row["floor"].update(max_abs=0.0, rms=0.0)
    row["reference"].update(max_abs=0.0, rms=0.0, snr_db=None)


def nearly_silent(document: Report) -> None:
    """A stage whose truth is the smallest number of float32, which rounds by half of itself."""
    row = row_of(document, "stage", "silence")
    half = 2.0**-150
    row["candidate"].update(max_abs=half, rms=half, snr_db=20 * math.log10(2))
    row["floor"].update(max_abs=half, rms=half)
    row["reference"].update(max_abs=0.0, rms=0.0, snr_db=None)


def without_projection(document: Report) -> None:
    document["stages"] = [row for row in document["stages"] if row["stage"] != "final_proj"]
    failing(document)


def of_many_packages(document: Report) -> None:
    document["reference"]["versions"] = {str(i): "1" for i in range(30)}


def without_error(document: Report) -> None:
    row = row_of(document)
    for name in ("candidate", "reference", "apart", "floor"):
        row[name].update(max_abs=0.0, rms=0.0, snr_db=None)


def apart_by(sign: int) -> Callable[[Report], None]:
    """Two errors that are apart by as little (-1) or as much (1) as rounding allows."""

    def change(document: Report) -> None:
        row = row_of(document)
        for name in ("max_abs", "rms"):
            mine, theirs = row["candidate"][name], row["reference"][name]
            row["apart"][name] = abs(mine + sign * theirs) + sign * 1e-6 * (mine + theirs)

    return change


def without_one_parameter(document: Report) -> None:
    """What failed is not counted."""
    failing(document)
    document["tensors"].update(exact=66, parameters=66, sources=69)


def of_a_recording(document: Report) -> None:
    """What is compared with a recording has no tensors of the original to count."""
    document["reference"].update(name="recording", recorded_from="fairseq")
    document["tensors"].update(sources=None, unread=[])


def with_the_largest_floor(document: Report) -> None:
    """Half a unit in the last place of float32, all of it."""
    row = row_of(document, "stage")
    signal = row["candidate"]["rms"] * 10.0 ** (row["candidate"]["snr_db"] / 20)
    half = (1 + 1e-6) * (2.0**-24 * signal + 2.0**-150)
    row["floor"].update(max_abs=half, rms=half)


def with_long_texts(document: Report) -> None:
    document["machine"]["chip"] = "x" * 1000
    clip_of(document)["origin"] = {"path": "x" * 5000}


def longer_than_its_variants(document: Report) -> None:
    clip_of(document).update(samples=16080, seconds=1.005, frames=50)
    without_variants("short")(document)


def without_tensors(document: Report) -> None:
    document["tensors"] = None


@pytest.mark.parametrize(
    "change",
    [
        incomparable,
        silent,
        nearly_silent,
        without_projection,
        without_tensors,
        of_a_recording,
        tf32(snr_db=None),
        tf32(snr_db=-math.inf),
        tf32(snr_db=1000.0),
        tf32(summary=[{"name": "layer 3", "ratio": {"max_abs": 0, "rms": 0.0}}]),
        apart_by(-1),
        apart_by(1),
        without_one_parameter,
        tensors(largest_ulps=1e30),
        without_error,
        with_the_largest_floor,
        with_noise(60.0),
        padded(1),
        padded(None),
        of_many_packages,
        with_long_texts,
        side("candidate", worst_frame_cosine=1 + 1e-6),
        far_off(0.5, 0.8661, 0.8658),
        far_off(2.0, -1 - 1e-6, -1 - 1e-6),
        of_one_second,
        longer_than_its_variants,
        side("candidate", worst_frame_at=[0, 23]),
    ],
)
def test_honest_reports_may_be_odd(document: Report, change: Callable[[Report], None]) -> None:
    change(document)
    require_sound(json.loads(json.dumps(document)))


def test_a_clip_may_be_called_inf(document: Report, tmp_path: Path) -> None:
    clip_of(document)["name"] = "inf"
    for row in document["stages"]:
        row["clip"] = "inf" if row["clip"] == "short" else row["clip"]
    path = tmp_path / "report.json"
    path.write_text(report.to_json(document))
    assert clip_of(report.read(path), "inf")["samples"] == 8000


# ---- limits that no yardstick moves --------------------------------------------------------


@pytest.mark.parametrize("attack", ["rms", "max_abs"])
def test_a_figure_that_is_no_number_never_passes(document: Report, attack: str) -> None:
    row_of(document)["candidate"][attack] = math.nan
    assert not judge(document, Gates())["passed"]


def test_no_yardstick_excuses_features_that_are_gone(document: Report) -> None:
    for factor, passes in ((1.0, True), (1e3, False)):
        for row in document["stages"]:
            for name in ("candidate", "reference"):
                row[name]["max_abs"] *= factor
                row[name]["rms"] *= factor
                if row[name]["snr_db"] is not None:
                    row[name]["snr_db"] -= 20 * math.log10(factor)
        verdict = judge(document, Gates())
        assert verdict["passed"] is passes
    assert "the least that float32 weights keep" in verdict["failures"][0]["what"]
