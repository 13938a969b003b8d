"""Recordings that cannot be what they say, each wrong in one place."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

from contentvec_parity.inputs import Clip
from contentvec_parity.references import recording_checks as checks
from mlx_contentvec.errors import ParityError

Header = dict[str, Any]
Arrays = dict[str, Any]

#: a parameter as it is stored, and one that the converter computes
STORED, COMPUTED = "layer_norm.bias", "encoder.pos_conv.weight"
#: values of the latter in the stand-in
SIZE = 96 * 128 * 6
#: the shortest clip, which is kept alone
CLIP = "two frames"


@pytest.fixture(scope="module")
def recorded(evidence_folder: Path) -> tuple[Header, Arrays]:
    with safe_open(evidence_folder / "float32.recording.safetensors", framework="numpy") as file:
        header = json.loads(file.metadata()["recording"])
        arrays = {
            name: file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118
            if name.startswith(f"{CLIP}/")
        }
    header["clips"] = [row for row in header["clips"] if row["name"] == CLIP]
    for entry in header["half"].values():
        entry["errors"] = {CLIP: entry["errors"][CLIP]}
    header["scales"] = {key: scale for key, scale in header["scales"].items() if key in arrays}
    return header, arrays


@pytest.fixture
def header(recorded: tuple[Header, Arrays]) -> Header:
    return copy.deepcopy(recorded[0])


@pytest.fixture
def arrays(recorded: tuple[Header, Arrays]) -> Arrays:
    return {name: array.copy() for name, array in recorded[1].items()}


def clip(**facts: Any) -> Callable[[Header], None]:
    return lambda header: header["clips"][0].update(facts)


def of(name: str, **facts: Any) -> Callable[[Header], None]:
    return lambda header: header["tensors"][name].update(facts)


def grid(**lists: Any) -> Callable[[Header], None]:
    return lambda header: header["tensors"][COMPUTED]["either"]["float16"].update(lists)


def half(**facts: Any) -> Callable[[Header], None]:
    return lambda header: header["half"]["float16"].update(facts)


def errors(**kinds: Any) -> Callable[[Header], None]:
    return lambda header: header["half"]["float16"]["errors"][CLIP].update(kinds)


def same_stages_twice(header: Header) -> None:
    header["clips"][0]["stages"] *= 2


PLACES = "places that are no places of it"
TWO_VALUES = "does not say where two values will do"

HEADERS: dict[str, tuple[Callable[[Header], Any], str]] = {
    **{
        f"no {key}": (
            lambda header, key=key: header.pop(key),  # type: ignore[misc]
            f"no {key}, or not as a",
        )
        for key in checks._HEADER
    },
    "a source of no name": (lambda h: h["source"].update(name=None), "no name or no SHA-256"),
    "a source of no hash": (lambda h: h["source"].pop("sha256"), "no name or no SHA-256"),
    "a source of half a hash": (
        lambda h: h["source"].update(sha256="0" * 63),
        "no name or no SHA-256",
    ),
    "a hash in capitals": (lambda h: h["source"].update(sha256="A" * 64), "no name or no SHA-256"),
    "a hash and more": (
        lambda h: h["source"].update(sha256="0" * 64 + "\n"),
        "no name or no SHA-256",
    ),
    "no original": (lambda h: h["reference"].update(name="mlx"), "which original"),
    "no versions": (lambda h: h["reference"].pop("versions"), "which original"),
    "versions that are numbers": (
        lambda h: h["reference"].update(versions={"torch": 2}),
        "which original",
    ),
    "a clip that is a text": (lambda h: h.update(clips=[CLIP]), "not described by name"),
    "a clip of a number as name": (clip(name=1), "not described by name"),
    "a clip about nothing": (clip(about=None), "not described by name"),
    "a clip from nowhere": (clip(origin="here"), "not described by name"),
    "a clip of no stages": (clip(stages={}), "not described by name"),
    "a stage that the model lacks": (clip(stages=["layer.99"]), "that the model lacks"),
    "a stage twice": (same_stages_twice, "has stages twice"),
    "a clip without what it is for": (clip(stages=["conv.0"]), "lacks final_proj, layer.3"),
    "no clip": (lambda h: h["clips"].clear(), "it has no clips, or two of one name"),
    "two clips of one name": (
        lambda h: h["clips"].append(h["clips"][0]),
        "it has no clips, or two of one name",
    ),
    "a hash less": (lambda h: h["tensors"].pop(STORED), f"have no hash: {STORED}"),
    "a hash more": (
        lambda h: h["tensors"].update(other=h["tensors"][STORED]),
        "hashes of what the model does not have: other",
    ),
    "a hash that is a text": (lambda h: h["tensors"].update({STORED: "0" * 64}), "is not hashed"),
    "a format less": (lambda h: h["tensors"][STORED].pop("float16"), "is not hashed in each"),
    "a format more": (of(STORED, q8="0" * 64), "is not hashed in each"),
    "either of a stored parameter": (of(STORED, either={}), "is not hashed in each"),
    "no either": (lambda h: h["tensors"][COMPUTED].pop("either"), "is not hashed in each"),
    "a hash of a stored parameter": (of(STORED, bfloat16="x"), "is not a SHA-256"),
    "a hash of a computed one": (of(COMPUTED, bfloat16=None), "is not a SHA-256"),
    "either as a list": (of(COMPUTED, either=["float16", "bfloat16"]), TWO_VALUES),
    "either of one grid": (
        lambda h: h["tensors"][COMPUTED]["either"].pop("bfloat16"),
        TWO_VALUES,
    ),
    "places in a list": (
        lambda h: h["tensors"][COMPUTED]["either"].update(float16=["even", "odd"]),
        TWO_VALUES,
    ),
    "places of a third kind": (grid(neither=[]), TWO_VALUES),
    "places of the even alone": (
        lambda h: h["tensors"][COMPUTED]["either"]["float16"].pop("odd"),
        TWO_VALUES,
    ),
    "places that are no list": (grid(even={}), PLACES),
    "odd places that are no list": (grid(odd={}), PLACES),
    "a place of text": (grid(even=["0"], odd=[]), PLACES),
    "a place of truth": (grid(even=[True], odd=[]), PLACES),
    "a negative place": (grid(even=[-1], odd=[]), PLACES),
    "a place past the end": (grid(even=[], odd=[SIZE]), PLACES),
    "a place twice": (grid(even=[3], odd=[3]), "has a place twice"),
    "errors of float32": (
        lambda h: h["half"].update(float32=h["half"].pop("float16")),
        "its errors of float32 are not described",
    ),
    "errors in a list": (
        lambda h: h["half"].update(float16=["about", "errors"]),
        "its errors of float16 are not described",
    ),
    "errors of nothing": (
        lambda h: h["half"]["float16"].pop("about"),
        "its errors of float16 are not described",
    ),
    "errors and more": (half(more=1), "its errors of float16 are not described"),
    "errors of another format": (half(about={"dtype": "bfloat16"}), "do not say what computed"),
    "errors about nothing": (half(about=None), "do not say what computed them"),
    "errors that are a list": (half(errors=[CLIP]), "are not those of its clips"),
    "errors of another clip": (half(errors={"other": {}}), "are not those of its clips"),
    "errors of no stages": (
        lambda h: h["half"]["float16"]["errors"].update({CLIP: ["stage", "local"]}),
        "are not of stages",
    ),
    "errors of stages alone": (
        lambda h: h["half"]["float16"]["errors"][CLIP].pop("local"),
        "are not of stages",
    ),
    "errors of stages in a list": (errors(stage=["conv.0"]), "are not of its stages"),
    "errors of other stages": (errors(local={"layer.99": {}}), "are not of its stages"),
}


def test_a_header_as_it_was_written_is_sound(header: Header) -> None:
    path = Path("recording.safetensors")
    checks.require_header(path, header)
    # without errors in half precision, and with those of some stages
    errors(stage={}, local={})(header)
    checks.require_header(path, header)
    header["half"] = {}
    # the first and the last place
    grid(even=[0], odd=[SIZE - 1])(header)
    checks.require_header(path, header)
    checks.require_header(path, header)


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_is_wrong_in_one_place_is_refused(header: Header, name: str) -> None:
    change, said = HEADERS[name]
    change(header)
    with pytest.raises(ParityError) as refused:
        checks.require_header(Path("recording.safetensors"), header)
    assert said in str(refused.value)


# ---- arrays


def array(name: str, change: Callable[[Any], Any]) -> Callable[[Header, Arrays], None]:
    def changed(_: Header, arrays: Arrays) -> None:
        arrays[f"{CLIP}/{name}"] = change(arrays.get(f"{CLIP}/{name}"))

    return changed


def less(name: str) -> Callable[[Header, Arrays], None]:
    return lambda _, arrays: arrays.pop(f"{CLIP}/{name}")


def scale(value: Any) -> Callable[[Header, Arrays], None]:
    return lambda header, _: header["scales"].update({f"{CLIP}/layer.3/truth": value})


def mask(shape: tuple[int, ...], dtype: Any) -> Callable[[Header, Arrays], None]:
    return array("padding_mask", lambda _: np.zeros(shape, dtype))


def without_a_stage(header: Header, arrays: Arrays) -> None:
    """The next one's results by itself stay, on an input that is not there any more."""
    header["clips"][0]["stages"].remove("conv.3")
    for kind in ("", "/truth", "/local"):
        arrays.pop(f"{CLIP}/conv.3{kind}", None)
        header["scales"].pop(f"{CLIP}/conv.3{kind}", None)


def off_by(factor: float) -> Callable[[Header, Arrays], None]:
    """A truth that is apart from what was recorded by a part of the largest value."""

    def change(header: Header, arrays: Arrays) -> None:
        output = arrays[f"{CLIP}/layer.3"]
        output[...] = 1.0
        arrays[f"{CLIP}/layer.3/truth"] = np.full(output.shape, -factor * 1024, np.float16)
        header["scales"][f"{CLIP}/layer.3/truth"] = 1 / 1024

    return change


BODIES: dict[str, tuple[Callable[[Header, Arrays], Any], str]] = {
    "no waveform": (less("waveform"), "it has no two frames/waveform"),
    "a waveform of one axis": (array("waveform", lambda a: a[0]), "is not (batch, samples)"),
    "an empty waveform": (array("waveform", lambda a: a[:, :0]), "is not (batch, samples)"),
    "a waveform of another dtype": (
        array("waveform", lambda a: a.astype(np.float64)),
        "two frames/waveform is float64",
    ),
    "a mask of another dtype": (mask((1, 720), np.uint8), "two frames/padding_mask is uint8"),
    "a mask of another shape": (mask((1, 719), np.uint32), "of shape (1, 719)"),
    "an input that the model does not take": (
        array("input", lambda _: np.zeros((1, 720), np.float32)),
        "arrays that no clip has: two frames/input",
    ),
    "an input that is missing": (
        lambda header, _: header["config"].update(normalize=True),
        "it has no two frames/input",
    ),
    "no output": (less("conv.2"), "it has no two frames/conv.2"),
    "no truth": (less("conv.2/truth"), "it has no two frames/conv.2/truth"),
    "no truth of a stage by itself": (less("conv.2/local"), "it has no two frames/conv.2/local"),
    "a truth of another dtype": (
        array("conv.2/truth", lambda a: a.astype(np.float32)),
        "two frames/conv.2/truth is float32",
    ),
    "a truth of another shape": (array("conv.2/truth", lambda a: a[:, :, 1:]), "of shape"),
    "a truth that is not finite": (
        array("conv.2/truth", lambda a: a + np.float16("inf")),
        "two frames/conv.2/truth holds numbers that are not finite",
    ),
    "a stage by itself on nothing": (
        without_a_stage,
        "arrays that no clip has: two frames/conv.4/local",
    ),
    "an array of nothing": (
        array("other", lambda _: np.zeros(1)),
        "that no clip has: two frames/other",
    ),
    "a scale of nothing": (
        lambda header, _: header["scales"].update({"two frames/layer.3": 0.5}),
        "scales of what is not there: two frames/layer.3",
    ),
    "a scale that is missing": (
        lambda header, _: header["scales"].pop("two frames/layer.3/truth"),
        "two frames/layer.3/truth has no scale",
    ),
    "a scale of an integer": (scale(1), "has no scale, or an impossible one"),
    "a scale of nought": (scale(0.0), "has no scale, or an impossible one"),
    "a negative scale": (scale(-0.5), "has no scale, or an impossible one"),
    "a scale of two": (scale(2.0), "has no scale, or an impossible one"),
    "a scale that is no number": (scale(float("nan")), "has no scale, or an impossible one"),
    "a scale between powers": (scale(0.75), "is not a power of two"),
    "a truth far away": (off_by(1.001e-3), "which no float32 is"),
}


def written(path: Path, arrays: Arrays) -> Path:
    save_file(arrays, path)
    return path


def test_arrays_as_they_were_written_are_sound(
    header: Header, arrays: Arrays, tmp_path: Path
) -> None:
    path = tmp_path / "recording.safetensors"
    found = checks.read_arrays(written(path, arrays), header)
    assert set(found) == set(arrays)
    # a scale of 1 is one, where nothing differs; a mask may be there; a truth may be this far
    arrays[f"{CLIP}/conv.2/truth"][...] = 0
    header["scales"][f"{CLIP}/conv.2/truth"] = 1.0
    mask((1, 720), np.uint32)(header, arrays)
    off_by(0.999e-3)(header, arrays)
    assert set(checks.read_arrays(written(path, arrays), header)) == set(arrays)
    array("input", lambda _: np.zeros((1, 720), np.float32))(header, arrays)
    header["config"]["normalize"] = True
    assert set(checks.read_arrays(written(path, arrays), header)) == set(arrays)


@pytest.mark.parametrize("name", BODIES)
def test_an_array_that_is_wrong_is_refused(
    header: Header, arrays: Arrays, tmp_path: Path, name: str
) -> None:
    change, said = BODIES[name]
    change(header, arrays)
    with pytest.raises(ParityError) as refused:
        checks.read_arrays(written(tmp_path / "recording.safetensors", arrays), header)
    assert said in str(refused.value)


@pytest.mark.parametrize(("error", "refused"), [(1.0, False), (1.001, True)])
def test_an_error_of_a_recording_may_have_its_limit(
    error: float, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "LARGEST_ERROR", 2.0**-10)
    arguments = (Path("r"), "clip/truth", np.ones(3), np.array([error], np.float16), 2.0**-10)
    with pytest.raises(ParityError) if refused else contextlib.nullcontext():
        checks._require_plausible(*arguments)


def test_a_file_that_is_damaged_is_said_to_be(header: Header, tmp_path: Path) -> None:
    path = tmp_path / "recording.safetensors"
    path.write_bytes(b"\xff" * 99)
    with pytest.raises(ParityError, match=r"recording\.safetensors is damaged"):
        checks.read_arrays(path, header)


# ---- the clips of published recordings

SOUND = Clip("a", np.array([[0.5, -1.0, 0.25]], np.float32), "about")
MASKED = replace(SOUND, padding_mask=np.array([[False, False, True]]))
#: what is recorded where ``SOUND`` is wanted -> what is said
OTHERS: dict[str, tuple[list[Clip], str]] = {
    "none": ([], "it lacks the clip a"),
    "one of another name": ([replace(SOUND, name="b")], "it lacks the clip a"),
    "one more": ([SOUND, replace(SOUND, name="b")], "clips that published recordings do not"),
    "another wave": ([replace(SOUND, waveform=SOUND.waveform * 1.01)], "is other sound"),
    "a longer one": ([replace(SOUND, waveform=np.zeros((1, 4), np.float32))], "is other sound"),
    "a batch": ([replace(SOUND, waveform=SOUND.waveform.repeat(2, 0))], "is other sound"),
    "a mask": ([MASKED], "is other sound"),
}


def required(found: list[Clip], wanted: Clip, stages: list[str]) -> None:
    path = Path("recording.safetensors")
    kept = {clip.name: ["x", "y"] for clip in found}
    checks.require_clips(path, found, kept, [(wanted, stages)])


@pytest.mark.parametrize("wanted", [SOUND, MASKED], ids=["plain", "padded"])
def test_the_clips_that_are_wanted_are_found(wanted: Clip) -> None:
    required([wanted], wanted, ["x", "y"])
    # as the sines of another machine round
    nearly = replace(wanted, waveform=wanted.waveform + np.float32(0.9e-5))
    required([nearly], wanted, ["x", "y"])
    with pytest.raises(ParityError, match="has other stages"):
        required([wanted], wanted, ["x"])


@pytest.mark.parametrize("name", OTHERS)
def test_other_clips_than_are_wanted_are_refused(name: str) -> None:
    found, said = OTHERS[name]
    with pytest.raises(ParityError, match=said):
        required(found, SOUND, ["x", "y"])


def test_another_mask_than_is_wanted_is_refused() -> None:
    other = replace(SOUND, padding_mask=np.array([[False, True, True]]))
    for found in (SOUND, other):
        with pytest.raises(ParityError, match="is other sound"):
            required([found], MASKED, ["x", "y"])
