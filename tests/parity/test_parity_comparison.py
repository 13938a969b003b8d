"""The metrics and the verdict, on arrays made by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from contentvec_parity import compare_arrays
from contentvec_parity.compare.metrics import METRICS, difference, rounding_floor
from contentvec_parity.compare.verdict import CLIP_SLACK, Gates, exceeds_noise, judge, ratio
from mlx_contentvec.errors import ParityError


def frames(*values: float) -> np.ndarray:
    return np.array(values, np.float64).reshape(1, -1, 2)


def test_the_metrics_are_what_they_say() -> None:
    found = difference(frames(3, 4, 1, 0), frames(3, 4, 0, 2))
    assert found["max_abs"] == 2
    assert found["max_abs_at"] == [0, 1, 1]
    assert found["rms"] == pytest.approx(math.sqrt(5 / 4))
    assert found["cosine"] == pytest.approx(25 / math.sqrt(26 * 29))
    assert found["worst_frame_cosine"] == 0
    assert found["worst_frame_at"] == [0, 1]
    assert found["snr_db"] == pytest.approx(10 * math.log10(29 / 5))


def test_equal_arrays_have_no_error_and_no_noise() -> None:
    found = difference(frames(1, 2), frames(1, 2))
    assert (found["max_abs"], found["rms"], found["cosine"]) == (0, 0, 1)
    assert found["snr_db"] is None
    assert found["ulps"] == [0, 0, 0]


def test_two_silent_frames_are_alike_and_a_silent_one_is_not_like_a_loud_one() -> None:
    assert difference(frames(0, 0), frames(0, 0))["worst_frame_cosine"] == 1
    assert difference(frames(0, 0), frames(1, 0))["worst_frame_cosine"] == 0


def test_ulps_count_float32_steps() -> None:
    expected = np.full((1, 3, 2), 1.5)
    measured = expected.copy()
    measured[0, 0, 0] = np.nextafter(np.float32(1.5), np.float32(2))
    assert difference(measured, expected)["ulps"] == [0, pytest.approx(0.95, abs=0.1), 1]


def test_padded_frames_do_not_count_and_places_stay_those_of_the_whole() -> None:
    measured, expected = np.ones((2, 3, 2)), np.ones((2, 3, 2))
    measured[0, 2] = 99
    measured[1, 1, 1] = 1.25
    valid = np.array([[True, True, False], [True, True, True]])
    found = difference(measured, expected, valid=valid)
    assert found["max_abs"] == 0.25
    assert found["max_abs_at"] == [1, 1, 1]
    assert found["worst_frame_at"] == [1, 1]
    assert found.values == 10


def test_other_shapes_and_numbers_that_are_not_finite_are_not_comparable() -> None:
    assert not difference(frames(1, 2), frames(1, 2, 3, 4)).comparable
    assert not difference(frames(1, math.nan), frames(1, 2)).comparable
    assert difference(frames(1, 2), frames(1, 3)).comparable


def test_every_metric_has_a_name_of_its_own_and_says_what_it_is() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)
    assert all(metric.about for metric in METRICS)


def test_dictionaries_are_compared_stage_by_stage() -> None:
    found = compare_arrays(
        {"a": frames(1, 2), "b": frames(1, 3)}, {"a": frames(1, 2), "b": frames(1, 2)}
    )
    assert list(found) == ["a", "b"]
    assert found["a"]["max_abs"] == 0
    assert found["b"]["max_abs"] == 1


def test_dictionaries_of_other_stages_are_refused_by_name() -> None:
    with pytest.raises(ParityError, match="the same stages") as refused:
        compare_arrays({"a": frames(1, 2)}, {"a": frames(1, 2), "b": frames(1, 2)})
    assert "b" in str(refused.value)
    with pytest.raises(ParityError, match="the same stages"):
        compare_arrays({"a": frames(1, 2), "c": frames(1, 2)}, {"a": frames(1, 2)})


def test_no_float32_is_nearer_to_the_truth_than_the_floor() -> None:
    truth = np.array([1 / 3, 2 / 3, 1e-3])
    floor = rounding_floor(truth)
    nearest = truth.astype(np.float32).astype(np.float64)
    assert floor["max_abs"] == np.abs(nearest - truth).max()
    for step in (-1, 1):
        other = np.nextafter(truth.astype(np.float32), np.float32(step))
        assert np.abs(other - truth).max() > floor["max_abs"]


def test_an_exact_original_does_not_divide_by_zero_and_excuses_nothing() -> None:
    assert ratio(1e-6, 0, 1e-7) == pytest.approx(10)
    assert ratio(0, 0, 0) == 1
    assert ratio(1e-9, 0, 0) == math.inf


# ---- the verdict ---------------------------------------------------------------------------


def row(
    kind: str, stage: str, clip: str, mine: float, theirs: float, **more: Any
) -> dict[str, Any]:
    def side(error: float) -> dict[str, Any]:
        return {"max_abs": error, "rms": error, "worst_frame_cosine": 1 - error, "snr_db": 65.0}

    return {
        "kind": kind,
        "name": more.pop("name", stage),
        "stage": stage,
        "clip": clip,
        "comparable": True,
        "shape": [1, 1, 1],
        "expected_shape": [1, 1, 1],
        "values": 100,
        "candidate": side(mine),
        "reference": side(theirs),
        "floor": side(1e-9),
        **more,
    }


def report(*rows: dict[str, Any], precision: str = "float32", **more: Any) -> dict[str, Any]:
    return {
        "stages": list(rows),
        "clips": [{"name": "a", "mask_agrees": None}],
        "tensors": {"failures": []},
        "weights": {"precision": precision},
        "reference": {
            "stages": ["one", "two"],
            "inputs": {"one": None, "two": "one"},
            "reads": {"one": ["one.weight"], "two": ["two.weight"]},
        },
        **more,
    }


def healthy() -> list[dict[str, Any]]:
    return [
        row(kind, stage, clip, 1e-6, 1e-6)
        for stage in ("one", "two")
        for clip in ("a", "b")
        for kind in ("stage", "local", "features")
    ]


def test_a_port_as_exact_as_the_original_passes() -> None:
    verdict = judge(report(*healthy()), Gates())
    assert verdict["passed"]
    assert verdict["failures"] == []
    assert "1.00 x" in verdict["reason"]


def test_an_error_beyond_the_ratio_fails_and_within_it_does_not() -> None:
    rows = healthy()
    rows[0]["candidate"]["max_abs"] = 1.9e-6
    assert judge(report(*rows), Gates(ratio=2))["passed"]
    verdict = judge(report(*rows), Gates(ratio=1.8))
    assert not verdict["passed"]
    assert verdict["failures"][0]["name"] == "one"
    assert verdict["blame"]["largest_local"][0]["ratio"] == 1


def test_rms_alone_is_enough_to_fail() -> None:
    rows = healthy()
    for item in rows:
        if item["stage"] == "two" and item["kind"] == "stage":
            item["candidate"]["rms"] = 3e-6
    assert not judge(report(*rows), Gates(ratio=2))["passed"]


def test_clips_are_judged_together_but_one_cannot_hide_among_louder_ones() -> None:
    loud = row("stage", "one", "loud", 1e-3, 1e-3)
    for error, passes in ((2 * CLIP_SLACK * 0.9e-6, True), (2 * CLIP_SLACK * 1.1e-6, False)):
        quiet = row("stage", "one", "quiet", error, 1e-6)
        features = row("features", "one", "loud", 1e-3, 1e-3)
        verdict = judge(report(loud, quiet, features), Gates(ratio=2))
        assert verdict["passed"] is passes
    assert "quiet" in verdict["failures"][0]["what"]


def test_the_first_stage_wrong_by_itself_is_blamed_not_the_first_that_looks_wrong() -> None:
    rows = [
        *(row("stage", stage, "a", 1e-2, 1e-6) for stage in ("one", "two")),
        row("local", "one", "a", 1e-6, 1e-6),
        row("local", "two", "a", 1e-2, 1e-6),
        row("features", "two", "a", 1e-2, 1e-6),
    ]
    rows[0]["candidate"]["max_abs"] = rows[0]["candidate"]["rms"] = 1e-6
    verdict = judge(report(*rows), Gates())
    assert [wrong["stage"] for wrong in verdict["blame"]["wrong"]] == ["two"]
    assert verdict["blame"]["wrong"][0]["reads"] == ["two.weight"]


def test_a_differing_tensor_blames_the_stage_that_reads_it() -> None:
    failure = {"name": "two.weight", "stage": "two", "what": "differs"}
    verdict = judge(report(*healthy(), tensors={"failures": [failure]}), Gates())
    assert not verdict["passed"]
    assert verdict["blame"]["wrong"][0]["differing_tensors"] == ["two.weight"]
    assert verdict["reason"].endswith("it reads two.weight, which is not what the original holds")


def test_a_report_without_tensors_can_be_judged() -> None:
    assert judge(report(*healthy(), tensors=None), Gates())["passed"]


def test_a_padding_mask_that_differs_fails() -> None:
    clips = [{"name": "a", "mask_agrees": False}]
    verdict = judge(report(*healthy(), clips=clips), Gates())
    assert not verdict["passed"]
    assert "padding mask" in verdict["reason"]


def test_absolute_gates_are_kept() -> None:
    assert judge(report(*healthy()), Gates(max_abs=2e-6, min_cosine=0.9999))["passed"]
    assert not judge(report(*healthy()), Gates(max_abs=5e-7))["passed"]
    assert not judge(report(*healthy()), Gates(min_cosine=1 - 1e-7))["passed"]


def test_weights_in_half_precision_are_held_to_a_noise_limit_instead() -> None:
    rows = healthy()
    for item in rows:
        item["candidate"]["max_abs"] = item["candidate"]["rms"] = 1e-3
    assert not judge(report(*rows), Gates())["passed"]
    assert judge(report(*rows, precision="float16"), Gates())["passed"]
    rows[2]["candidate"]["snr_db"] = 30.0
    verdict = judge(report(*rows, precision="float16"), Gates())
    assert not verdict["passed"]
    assert "30.0 dB" in verdict["failures"][0]["what"]


@pytest.mark.parametrize(("given", "adds_up"), [(41.0, True), (50.0, False)])
def test_noise_that_adds_up_is_not_taken_for_another_input(given: float, adds_up: bool) -> None:
    rows = healthy()
    for item in rows:
        if item["kind"] != "local":
            item["candidate"]["snr_db"] = given if item["stage"] == "one" else 39.0
    verdict = judge(report(*rows, precision="float16"), Gates())
    assert not verdict["passed"]
    assert (verdict["blame"]["stage_input"] is None) == adds_up
    assert ("39.0 dB" in verdict["reason"] and "add up" in verdict["reason"]) == adds_up


# ---- PyTorch elsewhere, and in half precision ------------------------------------------------


def beside(rows: list[dict[str, Any]], name: str, error: float) -> list[dict[str, Any]]:
    """``rows`` with a further yardstick of that error."""
    return [{**item, name: {"max_abs": error, "rms": error, "snr_db": 65.0}} for item in rows]


def with_error(error: float) -> list[dict[str, Any]]:
    return [
        row(kind, stage, "a", error, 1e-6)
        for stage in ("one", "two")
        for kind in ("stage", "local", "features")
    ]


def test_the_larger_of_the_errors_on_the_cpu_and_on_the_device_is_the_yardstick() -> None:
    assert not judge(report(*with_error(3e-6)), Gates())["passed"]
    verdict = judge(report(*beside(with_error(3e-6), "device", 2e-6)), Gates())
    assert verdict["passed"]
    assert "PyTorch's own float32 on this device: at most 1.50 x" in verdict["reason"]
    assert {tuple(e["yardstick"].values()) for e in verdict["summary"]} == {("device", "device")}
    verdict = judge(report(*beside(with_error(1.5e-6), "device", 5e-7)), Gates())
    assert "PyTorch's own float32 on the CPU: at most 1.50 x" in verdict["reason"]
    assert not judge(report(*beside(with_error(3e-6), "device", 5e-7)), Gates())["passed"]


def test_what_pytorch_gets_wrong_on_a_device_excuses_nothing() -> None:
    assert judge(report(*beside(with_error(1.9e-5), "device", 1.0)), Gates())["passed"]
    assert not judge(report(*beside(with_error(2.1e-5), "device", 1.0)), Gates())["passed"]


def test_a_device_that_lacks_a_clip_is_no_yardstick() -> None:
    rows = beside(with_error(3e-6), "device", 2e-6)
    for item in with_error(3e-6):
        rows.append({**item, "clip": "b"})
    assert not judge(report(*rows), Gates())["passed"]


def test_pytorch_by_its_own_settings_is_information() -> None:
    rows = beside(with_error(3e-6), "device_defaults", 1e-3)
    verdict = judge(report(*rows), Gates())
    assert not verdict["passed"]
    assert verdict["summary"][0]["device_defaults"]["rms"] == pytest.approx(1e-3)


@pytest.mark.parametrize(("precision", "noise"), [("float16", 26.0), ("bfloat16", 13.0)])
def test_half_precision_is_held_to_pytorchs_own(precision: str, noise: float) -> None:
    for error, passes in ((1.9e-3, True), (2.1e-3, False)):
        rows = beside(with_error(error), "half", 1e-3)
        for item in rows:
            item["candidate"]["snr_db"] = noise  # less than where there is no ratio to hold it to
        verdict = judge(report(*rows, precision=precision), Gates())
        assert verdict["passed"] is passes
        assert verdict["limits"]["min_snr_db"] is None
        if passes:
            assert f"PyTorch's own {precision}: at most 1.90 x" in verdict["reason"]
            assert f"{noise} dB" in verdict["reason"]


def test_a_stage_wrong_in_half_precision_is_blamed_by_its_ratio() -> None:
    rows = beside(with_error(1e-3), "half", 1e-3)
    for item in rows:
        if item["stage"] == "two":
            item["candidate"]["rms"] = 5e-3
    verdict = judge(report(*rows, precision="float16"), Gates())
    assert [wrong["stage"] for wrong in verdict["blame"]["wrong"]] == ["two"]


def test_a_noise_limit_can_be_asked_for() -> None:
    rows = beside(with_error(1e-3), "half", 1e-3)
    assert judge(report(*rows, precision="float16"), Gates(min_snr=64))["passed"]
    verdict = judge(report(*rows, precision="float16"), Gates(min_snr=66))
    assert "65.0 dB, at least 66 dB was asked for" in verdict["failures"][0]["what"]


@pytest.mark.parametrize("precision", ["q8", "q4"])
def test_quantised_weights_are_told_what_they_are_worth(precision: str) -> None:
    rows = with_error(1e-3)
    verdict = judge(report(*rows, precision=precision), Gates())
    assert "the noise is up to 0.056 % of the features" in verdict["reason"]
    for item in rows:
        item["candidate"]["snr_db"] = 19.0
    assert not judge(report(*rows, precision=precision), Gates())["passed"]


@pytest.mark.parametrize(
    ("precision", "least"), [("float32", 60.0), ("float16", 25.0), ("bfloat16", 12.0)]
)
def test_features_keep_a_signal_whatever_pytorchs_error_is(precision: str, least: float) -> None:
    for noise, passes in ((least, True), (least - 0.1, False)):
        rows = beside(with_error(1.0), "half", 1.0) if precision != "float32" else healthy()
        for item in rows:
            item["candidate"]["snr_db"] = noise
        verdict = judge(report(*rows, precision=precision), Gates())
        assert verdict["passed"] is passes
    assert f"at least {least:g} dB" in verdict["failures"][0]["what"]


@pytest.mark.parametrize("precision", ["q8", "q4"])
def test_quantised_weights_have_no_half_precision_to_excuse_them(precision: str) -> None:
    rows = beside(with_error(1.0), "half", 1.0)
    for item in rows:
        item["candidate"]["snr_db"] = 19.0
    assert not judge(report(*rows, precision=precision), Gates())["passed"]


@pytest.mark.parametrize(("error", "passes"), [(8e-6, True), (8.001e-6, False)])
@pytest.mark.parametrize("metric", ["max_abs", "rms"])
def test_one_clip_may_reach_four_times_the_limit_and_no_more(
    metric: str, error: float, passes: bool
) -> None:
    quiet = row("stage", "one", "quiet", 1e-6, 1e-6)
    quiet["candidate"][metric] = error
    rows = [quiet, row("stage", "one", "loud", 1e-3, 1e-3), row("features", "one", "a", 1, 1)]
    verdict = judge(report(*rows), Gates())
    assert verdict["passed"] is passes
    if not passes:
        assert "on the clip quiet, the limit for one clip is 8 x" in verdict["failures"][0]["what"]


def test_a_stage_by_itself_may_reach_four_times_pytorchs_error_in_any_clip() -> None:
    for error, passes in ((4e-6, True), (4.001e-6, False)):
        rows = [*healthy(), row("local", "one", "c", error, 1e-6)]
        verdict = judge(report(*rows), Gates())
        assert verdict["passed"] is passes
    lenient = judge(report(*healthy(), row("local", "one", "c", 4.5e-6, 1e-6)), Gates(ratio=5))
    assert lenient["passed"]
    # of a stage by itself no single clip is judged: quiet ones are a lottery there
    rows = [row("local", "two", "a", 1e-6, 1e-6), row("local", "two", "loud", 1e-3, 1e-3)]
    rows[0]["candidate"].update(max_abs=1e-4, rms=1e-4)
    assert judge(report(*healthy(), *rows), Gates())["passed"]


@pytest.mark.parametrize(
    ("precision", "limit", "half"),
    [
        ("float16", 40.0, False),
        ("bfloat16", 25.0, False),
        *((name, 20.0, half) for name in ("q8", "q4") for half in (False, True)),
    ],
)
def test_the_noise_that_each_format_may_have(precision: str, limit: float, half: bool) -> None:
    for noise, passes in ((limit, True), (limit - 0.01, False)):
        rows = beside(with_error(1.0), "half", 1.0) if half else with_error(1.0)
        for item in rows:
            item["candidate"]["snr_db"] = noise
        assert judge(report(*rows, precision=precision), Gates())["passed"] is passes


# ---- what cannot be compared, and limits to the last digit ----------------------------------


def incomparable(clip: str, shape: list[int], stage: str = "two") -> dict[str, Any]:
    """A row of features of another shape, or with numbers that are not finite."""
    found = row("features", stage, clip, 1.0, 1.0, comparable=False, shape=shape)
    return {key: found[key] for key in found if key not in ("candidate", "reference", "floor")}


@pytest.mark.parametrize(
    ("shape", "what"),
    [
        ([1, 2, 1], "shape (1, 2, 1) instead of (1, 1, 1)"),
        ([1, 1, 1], "values that are not finite numbers"),
    ],
)
def test_what_cannot_be_compared_fails_and_says_why(shape: list[int], what: str) -> None:
    verdict = judge(report(*healthy(), incomparable("c", shape)), Gates())
    assert not verdict["passed"]
    assert verdict["failures"] == [
        {"gate": "shape", "kind": "features", "name": "two", "clip": "c", "what": what}
    ]
    (entry,) = [e for e in verdict["summary"] if (e["kind"], e["name"]) == ("features", "two")]
    assert entry["broken"] == ["c"]
    assert entry["clips"] == 3
    assert entry["ratio"] == {"max_abs": math.inf, "rms": math.inf}
    assert entry["snr_db"] == -math.inf
    assert entry["worst_clip"] == {"clip": "c", "ratio": entry["ratio"]}


def test_a_stage_that_can_be_compared_on_no_clip_has_no_figures() -> None:
    rows = [item for item in healthy() if (item["kind"], item["name"]) != ("features", "two")]
    verdict = judge(report(*rows, incomparable("a", [1, 2, 1])), Gates(max_abs=1, min_cosine=0))
    entry = verdict["summary"][-1]
    assert (entry["name"], entry["broken"]) == ("two", ["a"])
    assert "candidate" not in entry
    assert [failure["gate"] for failure in verdict["failures"]] == ["shape"]


def test_absolute_gates_hold_to_the_last_digit_and_for_features_alone() -> None:
    rows = healthy()
    for item in rows:
        item["candidate"]["worst_frame_cosine"] = 0.75 if item["kind"] == "features" else 0.5
    rows.append(row("stage", "two", "loud", 1.0, 1.0))
    assert judge(report(*rows), Gates(max_abs=1e-6, min_cosine=0.75))["passed"]
    for gates, name in (
        (Gates(max_abs=0.99e-6), "max_abs"),
        (Gates(min_cosine=0.76), "min_cosine"),
    ):
        failures = judge(report(*rows), gates)["failures"]
        assert [failure["gate"] for failure in failures] == [name] * 4
        assert {failure["kind"] for failure in failures} == {"features"}


def test_noise_begins_beyond_its_limit() -> None:
    entry = {"snr_db": 40.0, "ratio": {"max_abs": 4.0, "rms": 1.0}}
    assert not exceeds_noise(entry, 40.0)
    assert exceeds_noise(entry, 40.1)
    assert not exceeds_noise(entry, None)
    entry["ratio"] = {"max_abs": 1.0, "rms": 4.001}
    assert exceeds_noise(entry, None)
    assert not exceeds_noise({"snr_db": None}, 40.0)


def test_where_a_device_is_as_exact_as_the_cpu_the_cpu_is_named() -> None:
    verdict = judge(report(*beside(with_error(1e-6), "device", 1e-6)), Gates())
    assert {who for e in verdict["summary"] for who in e["yardstick"].values()} == {"reference"}


# ---- who is to blame -------------------------------------------------------------------------


def spoiled(*which: tuple[str, str], error: float = 1e-2) -> list[dict[str, Any]]:
    """Rows of one clip, those of these kinds and stages far off."""
    return [
        row(kind, stage, "a", error if (kind, stage) in which else 1e-6, 1e-6)
        for stage in ("one", "two")
        for kind in ("stage", "local", "features")
    ]


@pytest.mark.parametrize("nearest", ["one", None])
def test_a_call_that_gives_something_else_is_blamed(nearest: str | None) -> None:
    rows = spoiled(("features", "two"))
    rows[-1]["nearest"] = nearest
    # of what is not features nothing is nearer
    rows[3]["nearest"] = "nonsense"
    verdict = judge(report(*rows), Gates())
    blame = verdict["blame"]
    assert blame == {
        "wrong": [],
        "stage_input": None,
        "calls": [{"name": "two", "stage": "two", "looks_like": nearest}],
    }
    assert verdict["reason"] == (
        "asking for two gives something else than the stage two, which is right"
        + (": it is nearest to one" if nearest else "")
    )


@pytest.mark.parametrize(
    ("which", "stage", "given"),
    [((("stage", "two"),), "two", "one"), ((("stage", "one"),), "one", "the waveform")],
)
def test_a_stage_given_something_else_is_blamed(
    which: tuple[tuple[str, str], ...], stage: str, given: str
) -> None:
    document = report(*spoiled(*which))
    # a stage that was not run by itself, or not at all
    document["reference"]["stages"] = ["zero", "one", "two"]
    document["reference"]["reads"]["zero"] = []
    document["reference"]["inputs"]["zero"] = None
    document["stages"].append(row("stage", "zero", "a", 1e-2, 1e-6))
    verdict = judge(document, Gates())
    assert verdict["blame"] == {"wrong": [], "stage_input": {"stage": stage, "input": given}}
    assert f"{stage} is right by itself and {given} is right" in verdict["reason"]


def test_a_stage_wrong_by_itself_is_the_only_one_blamed() -> None:
    verdict = judge(report(*spoiled(("local", "two"), ("stage", "two"))), Gates())
    assert verdict["blame"] == {
        "wrong": [
            {
                "stage": "two",
                "differing_tensors": [],
                "local_ratio": pytest.approx(1e4),
                "reads": ["two.weight"],
            }
        ]
    }
    assert (
        "its error is 1e+04 x PyTorch's, with tensors that are the original's"
        in (verdict["reason"])
    )


def test_errors_that_add_up_name_the_largest_of_single_stages() -> None:
    rows = spoiled(("stage", "two"), ("features", "two"), error=3e-6)
    rows[1]["candidate"]["rms"] = 2e-6
    verdict = judge(report(*rows), Gates())
    assert verdict["blame"] == {
        "wrong": [],
        "stage_input": None,
        "largest_local": [
            {"stage": "one", "ratio": pytest.approx(2.0)},
            {"stage": "two", "ratio": pytest.approx(1.0)},
        ],
    }
    assert verdict["reason"] == (
        "two: max_abs error 3 x PyTorch's, the limit is 2 x; no stage is wrong by itself, the "
        "errors add up (the largest is one's own, 2 x PyTorch's)"
    )


def test_of_many_tensors_that_differ_the_first_is_named() -> None:
    failures = [
        {"name": f"{stage}.weight", "stage": stage, "what": "differs"} for stage in ("two", "one")
    ]
    document = report(*healthy(), tensors={"failures": failures})
    document["reference"]["reads"]["one"].append("two.weight")
    verdict = judge(document, Gates())
    assert [wrong["stage"] for wrong in verdict["blame"]["wrong"]] == ["one", "two"]
    assert verdict["reason"].endswith(
        "it reads one.weight and 1 more, which is not what the original holds"
    )


@pytest.mark.parametrize(
    ("one", "two", "given"), [(45.0, 39.0, "one"), (44.9, 39.0, None), (39.0, 38.0, "the waveform")]
)
def test_noise_may_grow_by_less_than_half_its_amplitude(
    one: float, two: float, given: str | None
) -> None:
    rows = spoiled()
    for item in rows:
        if item["kind"] != "local":
            item["candidate"]["snr_db"] = one if item["stage"] == "one" else two
    blame = judge(report(*rows, precision="float16"), Gates())["blame"]
    found = blame["stage_input"]
    assert (found and found["input"]) == given


def test_the_reason_speaks_of_features_and_not_of_stages() -> None:
    rows = [
        *spoiled(),
        row("stage", "two", "b", 1.9e-6, 1e-6),
        row("local", "two", "b", 3e-6, 1e-6),
    ]
    rows[2]["candidate"].update(max_abs=1.5e-6, rms=1.25e-6)
    assert (
        "at most 1.50 x its error (one; the limit is 2 x)"
        in judge(report(*rows), Gates())["reason"]
    )
    for noise, said in ((30.0, "at 30.0 dB or better"), (None, "at no noise at all")):
        rows = spoiled()
        for item in rows:
            item["candidate"]["snr_db"] = noise if item["kind"] == "features" else 25.0
        assert said in judge(report(*rows, precision="q8"), Gates())["reason"]
