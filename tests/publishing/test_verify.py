"""verify: packages whose weights or recording were made to pass, and what lacks its proof."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contentvec_parity.publishing import package as packaging
from contentvec_parity.publishing.evidence import Package
from contentvec_parity.publishing.package import package
from contentvec_parity.publishing.verify import line, replay
from mlx_contentvec import hub
from mlx_contentvec.backend import mx
from mlx_contentvec.errors import ContentvecError, HubError, ParityError

DATA = Path(__file__).resolve().parents[1] / "data"

Header = dict[str, Any]
Arrays = dict[str, Any]


@pytest.fixture(scope="module")
def made(evidence_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Package:
    return package(
        evidence_folder / "float32.safetensors",
        tmp_path_factory.mktemp("packages") / "tiny",
        variants=[evidence_folder / "float16.safetensors"],
        allow_stand_in=True,
    )


@pytest.fixture
def copied(made: Package, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.folder, tmp_path / "package"))


def rewrite(path: Path, change: Callable[[Arrays, dict[str, str]], None]) -> None:
    """A safetensors file with other arrays or metadata, and its checksum along with it."""
    arrays, metadata = mx.load(str(path), return_metadata=True)
    change(arrays, metadata)
    path.unlink()
    mx.save_safetensors(str(path), arrays, metadata)
    packaging._sum_up(path.parent)


def forge(folder: Path, change: Callable[[Header, Arrays], None]) -> None:
    """The recording of a package, changed."""

    def rewritten(arrays: Arrays, metadata: dict[str, str]) -> None:
        header = json.loads(metadata["recording"])
        change(header, arrays)
        metadata["recording"] = json.dumps(header)

    rewrite(folder / "recording.safetensors", rewritten)


def scale_weights(folder: Path, name: str = "model.safetensors") -> None:
    rng = np.random.default_rng(0)

    def scaled(arrays: Arrays, _: object) -> None:
        for key, value in arrays.items():
            arrays[key] = value * rng.uniform(0.5, 1.5)

    rewrite(folder / name, scaled)


def nudge(folder: Path, parameter: str, places: slice, factor: float, name: str) -> None:
    def nudged(arrays: Arrays, _: object) -> None:
        values = np.array(arrays[parameter])
        values.ravel()[places] *= factor
        arrays[parameter] = mx.array(values)

    rewrite(folder / name, nudged)


def huge_scales(header: Header, _: object) -> None:
    header["scales"] = dict.fromkeys(header["scales"], 1e300)


def large_scales(header: Header, _: object) -> None:
    header["scales"] = dict.fromkeys(header["scales"], 1.0)


def a_clip_less(header: Header, arrays: Arrays) -> None:
    header["clips"] = [clip for clip in header["clips"] if clip["name"] != "1s"]
    for dtype in header["half"].values():
        del dtype["errors"]["1s"]
    for name in [name for name in (*arrays, *header["scales"]) if name.startswith("1s/")]:
        arrays.pop(name, None)
        header["scales"].pop(name, None)


def silence_for_speech(header: Header, arrays: Arrays) -> None:
    for name in list(arrays):
        if name.startswith("1s/"):
            arrays[name] = arrays[f"silence/{name[3:]}"]
            if name in header["scales"]:
                header["scales"][name] = header["scales"][f"silence/{name[3:]}"]


def stages_less(header: Header, arrays: Arrays) -> None:
    header["clips"][0]["stages"].remove("conv.3")
    for kind in ("", "/truth", "/local"):
        name = f"two frames/conv.3{kind}"
        del arrays[name]
        header["scales"].pop(name, None)
    # what is fed by it cannot be run by itself any more
    del arrays["two frames/conv.4/local"], header["scales"]["two frames/conv.4/local"]
    for dtype in header["half"].values():
        for kind in ("stage", "local"):
            del dtype["errors"]["two frames"][kind]["conv.3"]


def emptied(kind: str) -> Callable[[Header, Arrays], None]:
    return lambda header, _: header[kind].clear()


def without_a_hash(header: Header, _: object) -> None:
    del header["tensors"]["encoder.layers.1.fc2.weight"]


def hash_of_nothing(header: Header, _: object) -> None:
    header["tensors"]["layer_norm.bias"]["float32"] = ""


def more_hashes(header: Header, _: object) -> None:
    header["tensors"]["other"] = header["tensors"]["layer_norm.bias"]


def every_place_may_differ(header: Header, arrays: Arrays) -> None:
    either = header["tensors"]["encoder.pos_conv.weight"]["either"]
    either["float16"]["even"] = either["float16"]["even"] * 2 + [0, 0]


def places_outside(header: Header, arrays: Arrays) -> None:
    header["tensors"]["encoder.pos_conv.weight"]["either"]["bfloat16"]["odd"].append(10**12)


def another_source(header: Header, _: object) -> None:
    header["source"]["sha256"] = "0" * 64


def another_model(header: Header, _: object) -> None:
    header["config"]["layer_norm_first"] = True


def another_name_twice(header: Header, _: object) -> None:
    header["clips"].append(header["clips"][0])


def not_finite(_: object, arrays: Arrays) -> None:
    arrays["1s/layer.3"] = arrays["1s/layer.3"] * float("nan")


def another_shape(_: object, arrays: Arrays) -> None:
    arrays["1s/layer.3/truth"] = arrays["1s/layer.3/truth"][:, :-1]


def another_dtype(_: object, arrays: Arrays) -> None:
    arrays["1s/layer.3"] = arrays["1s/layer.3"].astype(mx.float16)


def more_arrays(_: object, arrays: Arrays) -> None:
    arrays["2s/waveform"] = arrays["1s/waveform"]


def scale_of_nothing(header: Header, _: object) -> None:
    header["scales"]["2s/layer.3/truth"] = 0.5


def no_power_of_two(header: Header, _: object) -> None:
    header["scales"] = {name: 1.5 * scale for name, scale in header["scales"].items()}


def nan_scale(header: Header, _: object) -> None:
    header["scales"] = dict.fromkeys(header["scales"], float("nan"))


def errors_less(header: Header, _: object) -> None:
    del header["half"]["float16"]["errors"]["1s"]


def not_a_list(header: Header, _: object) -> None:
    header["clips"] = {}


FORGERIES: dict[str, tuple[Callable[[Header, Arrays], None], str]] = {
    "scales of 1e300": (huge_scales, "an impossible one"),
    "scales of 1": (large_scales, "which no float32 is"),
    "scales that are no number": (nan_scale, "it has a NaN"),
    "scales that round": (no_power_of_two, "is not a power of two"),
    "a scale of nothing": (scale_of_nothing, "scales of what is not there"),
    "no scales": (emptied("scales"), "has no scale"),
    "no hashes": (emptied("tensors"), "parameters have no hash"),
    "a hash less": (without_a_hash, "1 parameters have no hash: encoder.layers.1.fc2.weight"),
    "a hash of nothing": (hash_of_nothing, "is not a SHA-256"),
    "a hash more": (more_hashes, "hashes of what the model does not have"),
    "places twice": (every_place_may_differ, "has a place twice"),
    "places outside": (places_outside, "places that are no places of it"),
    "another source": (another_source, "is not a recording of what"),
    "another model": (another_model, "lacks final_norm"),
    "no clips": (emptied("clips"), "it has no clips"),
    "a clip less": (a_clip_less, "it lacks the clip 1s"),
    "a clip twice": (another_name_twice, "two of one name"),
    "silence for speech": (silence_for_speech, "is other sound"),
    "stages less": (stages_less, "has other stages"),
    "numbers that are not finite": (not_finite, "not finite"),
    "an array of another shape": (another_shape, "of shape"),
    "an array of another dtype": (another_dtype, "1s/layer.3 is float16"),
    "an array more": (more_arrays, "arrays that no clip has"),
    "errors less": (errors_less, "are not those of its clips"),
    "clips that are no list": (not_a_list, "has no clips"),
}


def test_a_package_as_it_was_made_verifies(made: Package) -> None:
    for dtype in (None, "float16"):
        document = replay(made.folder, dtype=dtype)
        assert document["verdict"]["passed"], document["verdict"]["reason"]
        tensors = document["tensors"]
        assert (tensors["rounded"], tensors["failures"]) == (1, [])
        assert tensors["exact"] == tensors["parameters"] - 1
    assert line(document, "tiny").startswith("PASSED")


@pytest.mark.parametrize("how", FORGERIES)
def test_a_forged_recording_verifies_nothing(copied: Path, how: str) -> None:
    change, said = FORGERIES[how]
    forge(copied, change)
    with pytest.raises(ParityError) as refused:
        replay(copied)
    assert said in str(refused.value)
    assert len(str(refused.value).splitlines()) < 8


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_scaled_weights_fail(copied: Path, dtype: str | None) -> None:
    scale_weights(copied, "model.safetensors" if dtype is None else f"model.{dtype}.safetensors")
    document = replay(copied, dtype=dtype)
    assert not document["verdict"]["passed"]
    assert len(document["tensors"]["failures"]) == document["tensors"]["parameters"]
    assert line(document, "tiny").startswith("FAILED")


@pytest.mark.parametrize("name", ["model.safetensors", "model.float16.safetensors"])
@pytest.mark.parametrize(
    ("parameter", "places", "factor"),
    [
        ("encoder.layers.0.self_attn.k_proj.bias", slice(0, 1), 1.5),
        ("encoder.pos_conv.weight", slice(0, 1), 1.05),
        ("encoder.pos_conv.weight", slice(None), 1.001),
        ("encoder.pos_conv.weight", slice(None), -1.0),
    ],
)
def test_one_parameter_that_features_hardly_show_fails(
    copied: Path, name: str, parameter: str, places: slice, factor: float
) -> None:
    nudge(copied, parameter, places, factor, name)
    dtype = "float16" if "float16" in name else None
    document = replay(copied, dtype=dtype)
    assert [failure["name"] for failure in document["tensors"]["failures"]] == [parameter]
    assert not document["verdict"]["passed"]


def test_forged_errors_of_half_precision_excuse_nothing(copied: Path) -> None:
    def generous(header: Header, _: object) -> None:
        for kinds in header["half"]["float16"]["errors"].values():
            for stages in kinds.values():
                for figures in stages.values():
                    figures.update(max_abs=1e6, rms=1e6, snr_db=-100.0)

    forge(copied, generous)
    with pytest.raises(ParityError, match="cannot be what was measured"):
        replay(copied, dtype="float16")


def test_a_format_that_the_weights_do_not_have_is_refused(copied: Path) -> None:
    def as_q4(_: object, metadata: dict[str, str]) -> None:
        metadata["dtype"] = "q4"

    rewrite(copied / "model.safetensors", as_q4)
    with pytest.raises(ParityError, match="does not hold what it says"):
        replay(copied)


def test_the_evidence_of_another_package_verifies_nothing(
    copied: Path, make_standin: Callable[..., Path], tmp_path: Path
) -> None:
    from contentvec_convert.conversion import convert

    other = tmp_path / "other.safetensors"
    convert(make_standin("tiny", seed=5), other, allow_unknown=True)
    (copied / "model.safetensors").unlink()
    other.rename(copied / "model.safetensors")
    packaging._sum_up(copied)
    with pytest.raises(ParityError, match="is not a recording of what"):
        replay(copied)


def test_weights_that_claim_the_recorded_source_fail_by_their_values(
    copied: Path, make_standin: Callable[..., Path], tmp_path: Path
) -> None:
    from contentvec_convert.conversion import convert

    other = tmp_path / "other.safetensors"
    convert(make_standin("tiny", seed=5), other, allow_unknown=True)
    _, stated = mx.load(str(copied / "model.safetensors"), return_metadata=True)
    arrays, _ = mx.load(str(other), return_metadata=True)
    (copied / "model.safetensors").unlink()
    mx.save_safetensors(str(copied / "model.safetensors"), arrays, stated)
    packaging._sum_up(copied)
    assert not replay(copied)["verdict"]["passed"]


# what is not what was asked for ------------------------------------------------------


def test_a_variant_that_is_not_there_is_not_measured(copied: Path) -> None:
    """The main weights, cast, are what ``from_pretrained`` gives in its place."""
    with pytest.raises(HubError, match="there are no bfloat16 weights"):
        replay(copied, dtype="bfloat16")


def test_a_variant_that_was_replaced_by_the_main_weights_is_not_measured(copied: Path) -> None:
    shutil.copy(copied / "model.safetensors", copied / "model.float16.safetensors")
    packaging._sum_up(copied)
    with pytest.raises(HubError, match="there are no float16 weights") as refused:
        replay(copied, dtype="float16")
    assert refused.value.found == "model.float16.safetensors in float32"


# what lacks its proof ---------------------------------------------------------------


@pytest.mark.parametrize("lacking", ["SHA256SUMS", "recording.safetensors"])
def test_a_package_that_lacks_a_proof_says_which(copied: Path, lacking: str) -> None:
    (copied / lacking).unlink()
    with pytest.raises(HubError, match="cannot be verified") as refused:
        replay(copied)
    assert lacking in str(refused.value)


def test_a_file_of_the_first_release_is_told_what_it_lacks(run_cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "contentvec_base.safetensors"
    shutil.copy(DATA / "first_release.safetensors", path)
    for given in (path, tmp_path):
        done = run_cli("verify", given)
        assert done.returncode == 1
        assert done.stdout == ""
        for said in ("first release", "config in its metadata", "source in its metadata"):
            assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_what_is_not_in_the_cache_is_not_said_to_be_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub.RepositoryFiles, "find", lambda self, name: None)
    files = hub.RepositoryFiles("someone/contentvec-mlx")
    assert files.missing("recording.safetensors") == ["recording.safetensors"]
    files._unreachable = ConnectionError("refused")
    with pytest.raises(HubError, match=r"the connection to .* failed"):
        files.missing("recording.safetensors")


def test_a_home_folder_that_is_not_known_is_a_name_like_others() -> None:
    with pytest.raises(HubError, match="no weights at ~nobody-of-this-name/model"):
        replay("~nobody-of-this-name/model")


def test_one_converted_file_is_told_what_it_lacks(made: Package) -> None:
    with pytest.raises(HubError, match="cannot be verified") as refused:
        replay(made.folder / "model.safetensors")
    assert "first release" not in str(refused.value)


@pytest.mark.parametrize("key", ["source", "config"])
@pytest.mark.parametrize("value", ["", "[]", '{"a": ' * 90, "{}", "nul"])
def test_odd_metadata_are_refused(copied: Path, key: str, value: str) -> None:
    rewrite(copied / "model.safetensors", lambda _, metadata: metadata.update({key: value}))
    with pytest.raises(ContentvecError):
        replay(copied)


@pytest.mark.parametrize("name", ["SHA256SUMS", "config.json"])
@pytest.mark.parametrize("content", [b"\xff\xfe\x00", None])
def test_texts_too_large_or_not_utf8_are_refused(
    copied: Path, name: str, content: bytes | None
) -> None:
    with (copied / name).open("wb") as file:
        file.write(content or b"")
        file.truncate(3 << 30 if content is None else None)
    with pytest.raises(HubError):
        packaging.open_package(copied, allow_stand_in=True)
    if name == "SHA256SUMS":
        with pytest.raises(HubError, match="is not a list of checksums"):
            replay(copied)
