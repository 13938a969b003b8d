from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mlx_contentvec.audio import Clip, read_audio
from mlx_contentvec.config import ModelConfig
from mlx_contentvec.errors import AudioError, ConfigError, OutputError, printable
from mlx_contentvec.extract import decoding, packing
from mlx_contentvec.extract import manifest as manifest_module
from mlx_contentvec.extract import run as run_module
from mlx_contentvec.extract.applio import check_model_info, write_model_info
from mlx_contentvec.extract.manifest import (
    LOCK,
    Manifest,
    checksum,
    ignores_case,
    locked,
    prepared,
)
from mlx_contentvec.extract.packing import FILE, check_packs, pack, part_of
from mlx_contentvec.extract.run import Extraction, Job, Settings, Summary, plan_jobs
from mlx_contentvec.extract.sharding import Ranks, Shard, own_gpu, share_of
from mlx_contentvec.extract.sources import (
    Source,
    find_sources,
    name_applio_outputs,
    name_outputs,
    name_rvc_outputs,
)
from mlx_contentvec.extract.windows import cut_windows, windowed
from mlx_contentvec.features import FeatureKind
from mlx_contentvec.json_text import parse_object
from mlx_contentvec.model import ContentvecModel
from tests.checkpoint_files import change_in_place
from tests.small_models import TINY, in_one_go, noise, random_model

soundfile = pytest.importorskip(
    "soundfile", reason="audio files need soundfile: pip install 'mlx-contentvec[audio]'"
)
SETTINGS = Settings(weights="0" * 64, layer=3, project=False)


@pytest.fixture(scope="module")
def model() -> ContentvecModel:
    return random_model(TINY)


def write_clip(path: Path, samples: int = 8000, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, noise(samples, seed), 16000, subtype="PCM_16")
    return path


def samples_of(path: Path) -> np.ndarray:
    samples: np.ndarray = soundfile.read(path, dtype="float32")[0]
    return samples


def run(
    model: ContentvecModel,
    folder: Path,
    paths: list[Path],
    *,
    settings: Settings = SETTINGS,
    force: bool = False,
    **options: Any,
) -> tuple[Summary, int]:
    """Plan and extract; the summary and the number of outputs that were finished before."""
    manifest = Manifest(folder)
    sources = find_sources(paths)
    folder.mkdir(exist_ok=True)
    pending, finished = plan_jobs(sources, name_outputs(sources), manifest, settings, force=force)
    return Extraction(model, settings, manifest, **options).run(pending), finished


# ---- sources ----------------------------------------------------------------------


def test_a_folder_is_searched_through_and_hidden_files_are_left(tmp_path: Path) -> None:
    for name in ("b.wav", "a/c.FLAC", "a/.hidden.wav", ".trash/d.wav", "notes.txt", "a/._c.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(s.place) for s in find_sources([tmp_path])] == ["b.wav", "a/c.FLAC"]


def test_a_linked_folder_is_searched_once(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.wav").touch()
    (tmp_path / "a/up").symlink_to(tmp_path)
    assert [str(s.place) for s in find_sources([tmp_path])] == ["a/x.wav"]


def test_patterns_files_and_folders_name_each_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a/x.wav", "a/y.wav", "b/y.mp3", "b/notes.txt", "b/raw.bin"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).touch()
    sources = find_sources(["*/y.*", "a", "b/raw.bin", tmp_path / "a/x.wav"])
    assert [str(s.place) for s in sources] == ["a/y.wav", "b/y.mp3", "x.wav", "raw.bin"]
    assert all(s.path.is_absolute() for s in sources)


@pytest.mark.parametrize("pattern", ["*.wav", "**/*.wav", "*", "*/*.wav", "?*.wav"])
def test_patterns_leave_hidden_files_and_folders(tmp_path: Path, pattern: str) -> None:
    names = ["a.wav", "._a.wav", ".ipynb_checkpoints/b.wav", "b/c.wav", "b/._c.wav", ".DS_Store"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [str(source.place) for source in find_sources([tmp_path / pattern])]
    assert found and set(found) <= {"a.wav", "b/c.wav"}
    named = find_sources([tmp_path / "._a.wav", tmp_path / ".ipynb_checkpoints/*.wav"])
    assert [source.path.name for source in named] == ["._a.wav", "b.wav"]


def test_a_name_too_long_to_be_one_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AudioError, match=r"cannot be searched: File name too long|no file or"):
        find_sources([tmp_path / ("x" * 300 + ".wav")])


def test_a_folder_that_cannot_be_read_is_not_left_out_silently(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("x.wav", "locked/y.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    scandir = os.scandir

    def refusing(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    assert [str(s.place) for s in find_sources([tmp_path])] == ["x.wav", "locked"]


@pytest.mark.parametrize("path", ["nowhere", "nothing-*.wav", "empty"])
def test_a_path_without_audio_is_an_error(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(AudioError, match=path.replace("*", r"\*")):
        find_sources([tmp_path / path])


def test_a_name_with_brackets_is_a_name_where_it_exists(tmp_path: Path) -> None:
    (tmp_path / "a[1].wav").touch()
    assert [str(s.place) for s in find_sources([tmp_path / "a[1].wav"])] == ["a[1].wav"]


# ---- names ------------------------------------------------------------------------


def named(*paths: str) -> list[str]:
    return name_outputs([Source(Path(path), PurePosixPath(Path(path).name)) for path in paths])


def test_files_of_one_name_are_told_apart_by_folder_then_by_suffix() -> None:
    assert named("/d/a/x.wav", "/d/b/x.wav", "/d/b/y.wav") == ["a/x.npy", "b/x.npy", "y.npy"]
    assert named("/d/x.wav", "/d/x.flac", "/d/y.wav") == ["x.wav.npy", "x.flac.npy", "y.npy"]


def test_no_two_sources_share_an_output_whatever_they_are_called() -> None:
    paths = [f"/{a}/{b}/{c}" for a in "pq" for b in "pq" for c in ("x.wav", "x.flac", "x")]
    outputs = named(*paths)
    assert len(set(outputs)) == len(paths)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "a/b"]), st.sampled_from(["x.wav", "x.flac", "x.npy"])
        ),
        unique=True,
    )
)
def test_names_never_collide(files: list[tuple[str, str]]) -> None:
    outputs = named(*(f"/d/{folder}/{name}" for folder, name in files))
    assert len(set(outputs)) == len(files)


def test_names_that_a_mac_takes_for_one_are_told_apart() -> None:
    composed, decomposed = "\u00e9.wav", "e\u0301.wav"
    assert named(f"/d/a/{composed}", f"/d/b/{decomposed}") == ["a/\u00e9.npy", "b/e\u0301.npy"]
    with pytest.raises(OutputError, match="one output") as caught:
        named(f"/d/{composed}", f"/d/{decomposed}")
    assert "e\\u0301.wav" in str(caught.value)  # printed, the two look the same
    assert named("/d/a/Take.wav", "/d/b/take.wav") == ["Take.npy", "take.npy"]
    sources = [
        Source(Path(p), PurePosixPath(Path(p).name)) for p in ("/d/a/Take.wav", "/d/b/take.wav")
    ]
    assert name_outputs(sources, ignore_case=True) == ["a/Take.npy", "b/take.npy"]
    sources = [Source(Path(p), PurePosixPath(Path(p).name)) for p in ("/d/Take.wav", "/d/take.wav")]
    with pytest.raises(OutputError, match=r"/d/Take\.wav, /d/take\.wav"):
        name_outputs(sources, ignore_case=True)
    with pytest.raises(OutputError, match="RVC finds features by the file's name"):
        name_rvc_outputs(sources, 768, ignore_case=True)


def test_a_file_system_that_ignores_case_is_known_by_the_lock(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert not ignores_case(tmp_path)
        (tmp_path / LOCK.upper()).touch()
        assert ignores_case(tmp_path)


def test_applios_layout_is_flat_and_names_its_embedder(tmp_path: Path) -> None:
    sources = [Source(Path(f"/d/{n}.wav"), PurePosixPath(f"s/{n}.wav")) for n in ("0_0_0", "0_1")]
    assert name_applio_outputs(sources, 768) == ["extracted/0_0_0.npy", "extracted/0_1.npy"]
    with pytest.raises(OutputError, match="no features 256 wide"):
        name_applio_outputs(sources, 256)
    info = tmp_path / "model_info.json"
    info.write_text('{"total_seconds": 12.5, "speakers_id": 2}')
    check_model_info(tmp_path, "contentvec", force=False)
    write_model_info(tmp_path, "contentvec")
    kept = {"total_seconds": 12.5, "speakers_id": 2, "embedder_model": "contentvec"}
    assert json.loads(info.read_text()) == kept
    with pytest.raises(OutputError, match="states another embedder"):
        check_model_info(tmp_path, "spin", force=False)
    check_model_info(tmp_path, "spin", force=True)


@pytest.mark.parametrize(
    "text",
    ["[]", "{", "[" * 100_000, '{"a":' * 70 + "1" + "}" * 70, "\xff", " " * (1 << 21)],
)
def test_a_model_info_that_is_none_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    (tmp_path / "model_info.json").write_text(text, encoding="latin-1")
    with pytest.raises(OutputError, match="is not what Applio writes"):
        write_model_info(tmp_path, "contentvec")
    assert (tmp_path / "model_info.json").read_text(encoding="latin-1") == text


def test_rvcs_layout_is_flat_and_refuses_equal_names() -> None:
    sources = [Source(Path(f"/d/{n}.wav"), PurePosixPath(f"s/{n}.wav")) for n in ("0_0", "0_1")]
    assert name_rvc_outputs(sources, 768) == ["3_feature768/0_0.npy", "3_feature768/0_1.npy"]
    assert name_rvc_outputs(sources, 256)[0] == "3_feature256/0_0.npy"
    with pytest.raises(OutputError, match="512 wide"):
        name_rvc_outputs(sources, 512)
    twice = [*sources, Source(Path("/d/0_0.flac"), PurePosixPath("0_0.flac"))]
    with pytest.raises(OutputError, match=r"0_0\.wav, /d/0_0\.flac"):
        name_rvc_outputs(twice, 768)


# ---- the run and its resumption ---------------------------------------------------


def test_features_are_written_one_row_a_frame(model: ContentvecModel, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "in/a/x.wav")
    summary, _ = run(model, tmp_path / "out", [tmp_path / "in"])
    features = np.load(tmp_path / "out/a/x.npy", allow_pickle=False)
    assert features.dtype == np.float32
    np.testing.assert_allclose(
        features, in_one_go(model, samples_of(clip), output_layer=3), atol=2e-5
    )
    assert (summary.extracted, summary.failed, summary.audio_seconds) == (1, [], 0.5)


def test_half_precision_halves_the_file(model: ContentvecModel, tmp_path: Path) -> None:
    write_clip(tmp_path / "x.wav")
    run(model, tmp_path / "out", [tmp_path / "x.wav"])
    half = dataclasses.replace(SETTINGS, dtype="float16")
    run(model, tmp_path / "half", [tmp_path / "x.wav"], settings=half)
    features = np.load(tmp_path / "half/x.npy")
    assert features.dtype == np.float16
    np.testing.assert_array_equal(features, np.load(tmp_path / "out/x.npy").astype(np.float16))


def test_what_is_finished_is_not_done_again(model: ContentvecModel, tmp_path: Path) -> None:
    for i in range(3):
        write_clip(tmp_path / f"in/{i}.wav", seed=i)
    run(model, tmp_path / "out", [tmp_path / "in"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.npy")}
    write_clip(tmp_path / "in/3.wav", seed=3)
    summary, finished = run(model, tmp_path / "out", [tmp_path / "in"])
    assert (summary.extracted, finished) == (1, 3)
    assert all(path.stat().st_mtime_ns == mtime for path, mtime in before.items())


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "emptied"])
def test_a_broken_output_is_redone(model: ContentvecModel, tmp_path: Path, damage: str) -> None:
    write_clip(tmp_path / "x.wav")
    run(model, tmp_path / "out", [tmp_path / "x.wav"])
    output = tmp_path / "out/x.npy"
    good = output.read_bytes()
    if damage == "gone":
        output.unlink()
    else:
        flipped = good[:-1] + bytes([good[-1] ^ 1])
        output.write_bytes({"cut": good[:-8], "flipped": flipped, "emptied": b""}[damage])
    summary, finished = run(model, tmp_path / "out", [tmp_path / "x.wav"])
    assert (summary.extracted, finished) == (1, 0)
    assert output.read_bytes() == good


def test_a_changed_source_is_done_again(model: ContentvecModel, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "x.wav")
    run(model, tmp_path / "out", [clip])
    write_clip(clip, seed=1)
    summary, _ = run(model, tmp_path / "out", [clip])
    assert summary.extracted == 1
    expected = in_one_go(model, samples_of(clip), output_layer=3)
    np.testing.assert_allclose(np.load(tmp_path / "out/x.npy"), expected, atol=2e-5)


def test_a_moved_or_touched_dataset_stays_finished(model: ContentvecModel, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "in/x.wav")
    run(model, tmp_path / "out", [tmp_path / "in"])
    os.utime(clip, (1, 1))
    assert run(model, tmp_path / "out", [tmp_path / "in"])[1] == 1
    (tmp_path / "in").rename(tmp_path / "moved")
    assert run(model, tmp_path / "out", [tmp_path / "moved"])[1] == 1


def test_another_file_of_the_same_name_does_not_take_an_output(
    model: ContentvecModel, tmp_path: Path
) -> None:
    first = write_clip(tmp_path / "a/x.wav", seed=0)
    second = write_clip(tmp_path / "b/x.wav", seed=1)
    # equal in size and time: only what they hold tells them apart
    os.utime(first, (1, 1))
    os.utime(second, (1, 1))
    run(model, tmp_path / "out", [first])
    kept = (tmp_path / "out/x.npy").read_bytes()
    with pytest.raises(OutputError, match=r"x\.npy: it was made from .*a/x\.wav"):
        run(model, tmp_path / "out", [second])
    assert (tmp_path / "out/x.npy").read_bytes() == kept
    summary, _ = run(model, tmp_path / "out", [second], force=True)
    assert summary.extracted == 1
    assert (tmp_path / "out/x.npy").read_bytes() != kept


def test_other_settings_do_not_replace_an_output(model: ContentvecModel, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "x.wav")
    run(model, tmp_path / "out", [clip])
    with pytest.raises(OutputError, match=r"made with layer 3 \(now 2\)"):
        run(model, tmp_path / "out", [clip], settings=dataclasses.replace(SETTINGS, layer=2))


def test_a_file_of_somebody_else_is_not_replaced(model: ContentvecModel, tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "x.wav")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x.npy").write_bytes(b"precious")
    with pytest.raises(OutputError, match="was there before"):
        run(model, tmp_path / "out", [clip])
    assert (tmp_path / "out/x.npy").read_bytes() == b"precious"
    assert run(model, tmp_path / "out", [clip], force=True)[0].extracted == 1


def test_bad_files_are_listed_and_the_rest_goes_on(model: ContentvecModel, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    for i in range(3):
        write_clip(folder / f"good{i}.wav", seed=i)
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("not audio")
    (folder / "gone.wav").symlink_to(tmp_path / "nowhere")
    write_clip(folder / "short.wav", samples=100)
    nan = noise(8000)
    nan[4000] = np.nan
    soundfile.write(folder / "nan.wav", nan, 16000, subtype="FLOAT")
    summary, _ = run(model, tmp_path / "out", [folder])
    assert summary.extracted == 3
    reasons = {Path(failure.source).name: failure.reason for failure in summary.failed}
    assert set(reasons) == {"empty.wav", "text.wav", "gone.wav", "short.wav", "nan.wav"}
    assert "0 bytes" in reasons["empty.wav"]
    assert "b'not audio'" in reasons["text.wav"]
    assert "No such file" in reasons["gone.wav"]
    assert "100 samples" in reasons["short.wav"]
    assert "frame 4,000" in reasons["nan.wav"]
    assert len(list((tmp_path / "out").glob("*.npy"))) == 3


def test_batches_of_files_give_the_features_of_each_alone(
    model: ContentvecModel, tmp_path: Path
) -> None:
    for i, samples in enumerate([8000, 9000, 8000, 30000, 8500]):
        write_clip(tmp_path / f"in/{i}.wav", samples, seed=i)
    (tmp_path / "in/5.wav").write_text("bad")
    run(model, tmp_path / "alone", [tmp_path / "in"])
    summary, _ = run(model, tmp_path / "batched", [tmp_path / "in"], batch_seconds=60)
    assert (summary.extracted, len(summary.failed)) == (5, 1)
    for path in (tmp_path / "alone").glob("*.npy"):
        batched = np.load(tmp_path / "batched" / path.name)
        np.testing.assert_allclose(batched, np.load(path), atol=2e-5)


def test_a_clip_that_spoils_its_batch_is_found(
    model: ContentvecModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        write_clip(tmp_path / f"in/{i}.wav", 8000 + i, seed=i)
    extraction = Extraction(model, SETTINGS, Manifest(tmp_path), batch_seconds=60)
    whole = extraction._features

    def refusing(waveforms: list[Any], progress: Any) -> Any:
        if any(len(waveform) == 8001 for waveform in waveforms):
            raise AudioError("no")
        return whole(waveforms, progress)

    monkeypatch.setattr(extraction, "_features", refusing)
    sources = find_sources([tmp_path / "in"])
    pending, _ = plan_jobs(sources, name_outputs(sources), extraction.manifest, SETTINGS)
    summary = extraction.run(pending)
    assert summary.extracted == 2
    assert [Path(failure.source).name for failure in summary.failed] == ["1.wav"]


def test_a_device_that_refuses_a_clip_in_one_go_loses_none(
    model: ContentvecModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        write_clip(tmp_path / f"in/{i}.wav", 8000 + i, seed=i)
    run(model, tmp_path / "expected", [tmp_path / "in"])

    def thrashing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Cache thrashing is happening, please set MLX_CUDA_CONV_CACHE_SIZE")

    monkeypatch.setattr(ContentvecModel, "__call__", thrashing)
    summary, _ = run(model, tmp_path / "out", [tmp_path / "in"], batch_seconds=60)
    assert (summary.extracted, summary.failed) == (3, [])
    for path in (tmp_path / "expected").glob("*.npy"):
        np.testing.assert_allclose(np.load(tmp_path / "out" / path.name), np.load(path), atol=2e-5)
    monkeypatch.setattr(ContentvecModel, "walk", thrashing)
    summary, _ = run(model, tmp_path / "none", [tmp_path / "in/0.wav"])
    assert summary.failed[0].reason.startswith("the device has not enough for 0.5 s of audio")


def test_an_error_of_the_device_is_one_line_in_the_list(
    model: ContentvecModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path / "x.wav")

    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("cudaLaunchKernel failed: unspecified\n  at eval.cpp:12\n  and more")

    monkeypatch.setattr(ContentvecModel, "__call__", failing)
    summary, _ = run(model, tmp_path / "out", [tmp_path / "x.wav"])
    assert summary.failed[0].reason == (
        "the device could not compute its features (cudaLaunchKernel failed: unspecified)"
    )


def await_outputs(folder: Path, count: int) -> None:
    """Wait until outputs that have been computed are written."""
    for _ in range(1000):
        if len(list(folder.glob("*.npy"))) >= count:
            return
        time.sleep(0.01)
    pytest.fail(f"{count} outputs have not been written")


def extraction_of(
    model: ContentvecModel, tmp_path: Path, clips: int, batch_seconds: float = 60
) -> tuple[Extraction, list[Job]]:
    """One that is about to extract new clips, and its jobs."""
    for i in range(clips):
        write_clip(tmp_path / f"in/{i:02}.wav", 800, seed=i)
    extraction = Extraction(
        model, SETTINGS, Manifest(tmp_path / "out"), batch_seconds=batch_seconds
    )
    (tmp_path / "out").mkdir()
    sources = find_sources([tmp_path / "in"])
    return extraction, plan_jobs(sources, name_outputs(sources), extraction.manifest, SETTINGS)[0]


def test_a_batch_is_written_while_the_next_is_computed(
    model: ContentvecModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extraction, jobs = extraction_of(model, tmp_path, 2, batch_seconds=0)
    computed = threading.Event()
    features, keep = extraction._features, extraction._keep
    passes: list[int] = []
    waited: list[bool] = []

    def counting(waveforms: Any, progress: Any) -> Any:
        passes.append(len(waveforms))
        if len(passes) == 2:
            computed.set()
        return features(waveforms, progress)

    def waiting(made: Any) -> None:
        waited.append(computed.wait(20))
        keep(made)

    monkeypatch.setattr(extraction, "_features", counting)
    monkeypatch.setattr(extraction, "_keep", waiting)
    assert extraction.run(jobs).extracted == 2
    assert waited == [True, True]


def test_few_batches_wait_to_be_written(
    model: ContentvecModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 8
    extraction, jobs = extraction_of(model, tmp_path, most + 4, batch_seconds=0)
    features, keep = extraction._features, extraction._keep
    full = threading.Event()
    passes: list[int] = []
    computed_meanwhile: list[int] = []

    def counting(waveforms: Any, progress: Any) -> Any:
        passes.append(len(waveforms))
        if len(passes) == most + 1:
            full.set()
        return features(waveforms, progress)

    def waiting(made: Any) -> None:
        if not computed_meanwhile:
            full.wait(20)
            time.sleep(0.1)
            computed_meanwhile.append(len(passes))
        keep(made)

    monkeypatch.setattr(extraction, "_features", counting)
    monkeypatch.setattr(extraction, "_keep", waiting)
    assert extraction.run(jobs).extracted == most + 4
    assert computed_meanwhile == [most + 1]


@pytest.mark.parametrize(("seconds", "taken"), [(60.0, 4), (59.0, 4), (61.0, 3), (0.0, 65)])
def test_two_minutes_and_few_files_are_decoded_ahead(
    model: ContentvecModel, tmp_path: Path, seconds: float, taken: int
) -> None:
    extraction = Extraction(model, SETTINGS, Manifest(tmp_path))
    asked: list[int] = []

    def batched() -> Iterator[list[Job]]:
        for number in range(100):
            asked.append(number)
            yield [Job(f"{number}.wav", f"{number}.npy", seconds)]

    decoded = extraction._decoded(batched())
    for done in range(3):
        ((job, error),) = next(decoded)
        assert job.source == f"{done}.wav" and isinstance(error, AudioError)
        assert len(asked) == taken + done
    decoded.close()


@pytest.mark.parametrize(
    ("device", "cores", "threads"),
    [("cpu", 64, 1), ("cuda", 64, 8), ("metal", 2, 2), ("cuda", None, 1)],
)
def test_a_gpu_has_several_threads_decode_for_it(
    model: ContentvecModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    cores: int | None,
    threads: int,
) -> None:
    started: list[int] = []
    pool = run_module.ThreadPoolExecutor

    def start(count: int, **options: Any) -> Any:
        started.append(count)
        return pool(count, **options)

    monkeypatch.setattr(run_module, "ThreadPoolExecutor", start)
    monkeypatch.setattr("mlx_contentvec.backend.device_kind", lambda: device)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert list(Extraction(model, SETTINGS, Manifest(tmp_path))._decoded([])) == []
    assert started == [threads]


def test_what_has_been_computed_is_written_when_a_run_is_interrupted(
    model: ContentvecModel, tmp_path: Path
) -> None:
    extraction, jobs = extraction_of(model, tmp_path, 3, batch_seconds=0)

    def interrupted(job: Job, part: float) -> None:
        if job is jobs[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extraction.run(jobs, interrupted)
    assert extraction.summary.extracted == 2
    assert sorted(path.name for path in (tmp_path / "out").glob("*.npy")) == ["00.npy", "01.npy"]
    assert extraction.manifest.records("01.npy") and not extraction.manifest.records("02.npy")


def test_outputs_before_one_that_cannot_be_written_are_kept(
    model: ContentvecModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extraction, jobs = extraction_of(model, tmp_path, 3)

    def full(path: Path, parts: Any) -> Any:
        if path.name == "01.npy":
            raise OutputError(f"cannot write {path}: No space left on device")
        return prepared(path, parts)

    monkeypatch.setattr("mlx_contentvec.extract.run.prepared", full)
    with pytest.raises(OutputError, match=r"01\.npy: No space"):
        extraction.run(jobs)
    assert [path.name for path in (tmp_path / "out").glob("*.npy")] == ["00.npy"]
    assert Manifest(tmp_path / "out").records("00.npy")
    assert extraction.summary.extracted == 1
    assert not list((tmp_path / "out").glob(".*.partial"))


def test_outputs_of_a_batch_are_recorded_together_and_few_are_open_at_once(
    model: ContentvecModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extraction, jobs = extraction_of(model, tmp_path, 40)
    recorded: list[int] = []
    add = extraction.manifest.add

    def count(*records: Any) -> None:
        # each is whole on the disk by now, under another name
        assert not any((tmp_path / "out" / record["output"]).exists() for record in records)
        recorded.append(len(records))
        add(*records)

    monkeypatch.setattr(extraction.manifest, "add", count)
    assert extraction.run(jobs).extracted == 40
    assert recorded == [32, 8]


def test_an_output_folder_that_cannot_be_written_stops_the_run(
    model: ContentvecModel, tmp_path: Path
) -> None:
    clip = write_clip(tmp_path / "in/a/x.wav")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a").write_text("a file where a folder must be")
    with pytest.raises(OutputError, match="cannot write"):
        run(model, tmp_path / "out", [tmp_path / "in"])
    assert clip.exists()


def test_files_that_vanish_or_wait_are_listed_and_the_rest_goes_on(
    model: ContentvecModel, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    for i in range(3):
        write_clip(folder / f"{i}.wav", seed=i)
    os.mkfifo(folder / "pipe.wav")
    (folder / "zero.wav").symlink_to("/dev/zero")
    (tmp_path / "out").mkdir()
    sources = find_sources([folder])
    pending, _ = plan_jobs(sources, name_outputs(sources), Manifest(tmp_path / "out"), SETTINGS)
    (folder / "1.wav").unlink()
    summary = Extraction(model, SETTINGS, Manifest(tmp_path / "out")).run(pending)
    assert summary.extracted == 2
    reasons = {Path(failure.source).name: failure.reason for failure in summary.failed}
    assert reasons["pipe.wav"] == "is not a file (a named pipe)"
    assert reasons["zero.wav"] == "is not a file (a device)"
    assert "No such file" in reasons["1.wav"]


def test_an_interrupted_run_decodes_no_further(
    model: ContentvecModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(2):
        write_clip(tmp_path / f"in/{i}.wav", seed=i)
    begun, ended = threading.Event(), threading.Event()

    def read(path: Path, *, stopped: Callable[[], bool], **options: Any) -> Clip:
        if path.name == "1.wav":  # of hours
            begun.set()
            for _ in range(1000):
                if stopped():
                    ended.set()
                    break
                time.sleep(0.01)
        return read_audio(path, **options)

    def interrupt(*_: object) -> None:
        begun.wait(5)
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_contentvec.extract.decoding.read_audio", read)
    monkeypatch.setattr(Extraction, "_features", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out", [tmp_path / "in"])
    assert ended.wait(5)
    with pytest.raises(AudioError, match="was not read to its end"):
        read_audio(tmp_path / "in/1.wav", stopped=lambda: True)


def test_a_folder_that_may_not_be_read_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path / "in/a.wav")
    listed = os.scandir

    def refuse(path: str) -> Any:
        if os.fspath(path).endswith("in"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(AudioError, match=r"the folder .*in cannot be read"):
        find_sources([tmp_path / "in"])
    # in another it is listed as a file that cannot be read is
    assert [source.path for source in find_sources([tmp_path])] == [tmp_path / "in"]


def test_a_file_deleted_while_its_features_are_computed_ends_nothing(
    model: ContentvecModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(2):
        write_clip(tmp_path / f"in/{i}.wav", seed=i)
    computed = Extraction._features

    def deleting(self: Extraction, waveforms: list[Any], progress: Any) -> Any:
        (tmp_path / "in/0.wav").unlink(missing_ok=True)
        return computed(self, waveforms, progress)

    monkeypatch.setattr(Extraction, "_features", deleting)
    summary, _ = run(model, tmp_path / "out", [tmp_path / "in"])
    assert (summary.extracted, summary.failed) == (2, [])


def test_a_name_that_the_file_system_refuses_is_listed(
    model: ContentvecModel, tmp_path: Path
) -> None:
    write_clip(tmp_path / "in/x.wav")
    pending = [
        Job(str(tmp_path / "in/x.wav"), "y" * 260 + ".npy", 0.5),
        Job(str(tmp_path / "in/x.wav"), "x.npy", 0.5),
    ]
    (tmp_path / "out").mkdir()
    summary = Extraction(model, SETTINGS, Manifest(tmp_path / "out")).run(pending)
    assert summary.extracted == 1
    assert "File name too long" in summary.failed[0].reason


def test_outputs_that_disappear_are_not_counted(
    model: ContentvecModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(4):
        write_clip(tmp_path / f"in/{i}.wav", seed=i)
    computed, calls = Extraction._features, []

    def deleting(self: Extraction, waveforms: list[Any], progress: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            await_outputs(tmp_path / "out", 2)
            shutil.rmtree(tmp_path / "out")
        return computed(self, waveforms, progress)

    monkeypatch.setattr(Extraction, "_features", deleting)
    summary, _ = run(model, tmp_path / "out", [tmp_path / "in"])
    assert summary.extracted == len(list((tmp_path / "out").glob("*.npy"))) == 2
    assert [Path(failure.source).name for failure in summary.failed] == ["0.wav", "1.wav"]
    assert "has disappeared" in summary.failed[0].reason
    assert summary.audio_seconds == 1.0


def test_features_that_are_not_finite_are_not_written(
    model: ContentvecModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_clip(tmp_path / "x.wav")
    monkeypatch.setattr(Extraction, "_features", lambda *_: [np.full((24, 96), 1e9, np.float32)])
    half = dataclasses.replace(SETTINGS, dtype="float16")
    summary, _ = run(model, tmp_path / "out", [tmp_path / "x.wav"], settings=half)
    assert "not finite" in summary.failed[0].reason
    assert not (tmp_path / "out/x.npy").exists()


def test_a_file_that_appears_meanwhile_is_kept(
    model: ContentvecModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, theirs = Extraction._features, tmp_path / "out/b.npy"

    def appearing(extraction: Extraction, *given: Any) -> Any:
        theirs.write_bytes(b"another's")
        return features(extraction, *given)

    for name in ("a.wav", "b.wav"):
        write_clip(tmp_path / name)
    monkeypatch.setattr(Extraction, "_features", appearing)
    summary, _ = run(model, tmp_path / "out", [tmp_path / "a.wav", tmp_path / "b.wav"])
    assert theirs.read_bytes() == b"another's"
    assert [Path(failure.source).name for failure in summary.failed] == ["b.wav"]
    assert "appeared while it was being written" in summary.failed[0].reason
    assert (tmp_path / "out/a.npy").exists() and summary.extracted == 1
    monkeypatch.undo()
    with pytest.raises(OutputError, match=r"1 output in .* is not of this run"):
        run(model, tmp_path / "out", [tmp_path / "b.wav"])
    run(model, tmp_path / "out", [tmp_path / "b.wav"], force=True)
    assert np.load(theirs).ndim == 2


@pytest.mark.parametrize("when", ["_record", "add"])
def test_a_file_that_appears_at_the_last_moment_is_kept_and_fails_alone(
    when: str, model: ContentvecModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once the features have been written, or once their record has been."""
    theirs = tmp_path / "out/b.npy"
    where = Extraction if when == "_record" else Manifest
    own = getattr(where, when)

    def appearing(*given: Any) -> Any:
        theirs.write_bytes(b"another's")
        return own(*given)

    for name in ("a.wav", "b.wav", "c.wav"):
        write_clip(tmp_path / name)
    monkeypatch.setattr(where, when, appearing)
    clips = [tmp_path / name for name in ("a.wav", "b.wav", "c.wav")]
    summary, _ = run(model, tmp_path / "out", clips)
    assert theirs.read_bytes() == b"another's"
    assert [Path(failure.source).name for failure in summary.failed] == ["b.wav"]
    assert (tmp_path / "out/a.npy").exists() and (tmp_path / "out/c.npy").exists()
    assert summary.extracted == 2
    if when == "_record":  # no record says that it is ours
        monkeypatch.undo()
        with pytest.raises(OutputError, match="not of this run"):
            run(model, tmp_path / "out", clips)


def test_audio_that_is_tagged_meanwhile_is_the_same(
    model: ContentvecModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tag, a second name or another mode changes the time of its status, and nothing else."""
    clip = write_clip(tmp_path / "x.wav")
    decode = decoding.read_audio

    def tagging(path: Path, **options: Any) -> Any:
        clip.chmod(0o600)
        return decode(path, **options)

    monkeypatch.setattr(decoding, "read_audio", tagging)
    summary, _ = run(model, tmp_path / "out", [clip])
    assert summary.extracted == 1 and not summary.failed


@pytest.mark.parametrize("change", ["another mode", "another folder", "an earlier manifest"])
def test_what_was_found_by_its_content_is_not_read_again(
    change: str, model: ContentvecModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, out = write_clip(tmp_path / "x.wav"), tmp_path / "out"
    run(model, out, [clip])
    if change == "another mode":
        clip.chmod(0o600)
    elif change == "another folder":
        (tmp_path / "moved").mkdir()
        clip = clip.rename(tmp_path / "moved/x.wav")
    else:
        lines = (out / ".mlx-contentvec.jsonl").read_text()
        (out / ".mlx-contentvec.jsonl").write_text(re.sub(r'"ctime_ns": \d+, ', "", lines))
    read: list[Path] = []

    def noted(path: Path) -> str:
        read.append(path)
        return checksum(path)

    monkeypatch.setattr(manifest_module, "checksum", noted)
    for times in (1, 0):
        summary, finished = run(model, out, [clip])
        assert (summary.extracted, finished) == (0, 1)
        assert read.count(clip) == times
        read.clear()


def test_a_folder_that_comes_in_the_way_of_one_output_stops_no_other(
    model: ContentvecModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.wav", "b.wav"):
        write_clip(tmp_path / name)

    def just_after_the_look(*_: Any) -> None:
        (tmp_path / "out/a.npy").mkdir()

    monkeypatch.setattr(run_module, "require_files", just_after_the_look)
    summary, _ = run(model, tmp_path / "out", [tmp_path / "a.wav", tmp_path / "b.wav"], force=True)
    assert [Path(failure.source).name for failure in summary.failed] == ["a.wav"]
    assert (tmp_path / "out/b.npy").exists() and summary.extracted == 1


def test_audio_that_changes_while_it_is_decoded_is_refused(
    model: ContentvecModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its record would name one file, and its features be of another."""
    write_clip(tmp_path / "x.wav")
    decode = decoding.read_audio

    def changing(path: Path, **options: Any) -> Any:
        change_in_place(path)
        return decode(path, **options)

    monkeypatch.setattr(decoding, "read_audio", changing)
    summary, _ = run(model, tmp_path / "out", [tmp_path / "x.wav"])
    assert "changed while it was being read" in summary.failed[0].reason
    assert not (tmp_path / "out/x.npy").exists()


# ---- manifest ---------------------------------------------------------------------


def test_nothing_has_its_name_until_it_is_published(tmp_path: Path) -> None:
    path = tmp_path / "a/x.npy"
    with prepared(path, [b"abc", b"def"]) as (draft, written):
        assert written == {"bytes": 6, "crc32": "4b8e39ef"}
        assert not path.exists()
        draft.rename(force=True)
    assert path.read_bytes() == b"abcdef"
    assert [p.name for p in path.parent.iterdir()] == ["x.npy"]


@pytest.mark.parametrize("name", [LOCK, ".mlx-contentvec.jsonl"])
def test_a_link_planted_among_the_outputs_is_not_followed(tmp_path: Path, name: str) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / name).symlink_to(precious)
    with pytest.raises(OutputError, match="cannot write"), locked(folder):
        Manifest(folder).add({"output": "a.npy"})
    assert precious.read_text() == "kept"


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    with locked(tmp_path), pytest.raises(OutputError, match="another extraction"):  # noqa: SIM117
        with locked(tmp_path):
            pass
    with locked(tmp_path):
        pass


def test_a_pipe_in_the_place_of_an_output_is_kept(tmp_path: Path, model: ContentvecModel) -> None:
    clip = write_clip(tmp_path / "a.wav")
    for place in (tmp_path / "out/a.npy", tmp_path / "packed" / FILE):
        place.parent.mkdir()
        os.mkfifo(place)
    with pytest.raises(OutputError, match="cannot be written"):
        run(model, tmp_path / "out", [clip], force=True)
    with pytest.raises(OutputError, match="cannot be written"):
        check_packs([part_of("a.npy")], Manifest(tmp_path / "packed"), {}, force=True)
    assert (tmp_path / "out/a.npy").is_fifo()


# ---- packed folders ---------------------------------------------------------------


def packed_run(
    model: ContentvecModel, folder: Path, paths: list[Path], settings: Settings = SETTINGS
) -> tuple[Summary, int]:
    folder.mkdir(exist_ok=True)
    manifest = Manifest(folder)
    sources = find_sources(paths)
    parts = [part_of(output) for output in name_outputs(sources)]
    wanted = dataclasses.asdict(settings)
    check_packs(parts, manifest, wanted, force=False)
    pending, finished = plan_jobs(sources, parts, manifest, settings)
    summary = Extraction(model, settings, manifest).run(pending)
    pack(parts, manifest, wanted)
    return summary, finished


def test_a_folder_is_packed_into_one_file_and_grows(model: ContentvecModel, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    out = tmp_path / "out"
    for i, name in enumerate(["x", "y", "sub/z"]):
        write_clip(tmp_path / f"in/{name}.wav", seed=i)
    run(model, tmp_path / "single", [tmp_path / "in"])
    assert packed_run(model, out, [tmp_path / "in"])[0].extracted == 3
    assert sorted(load_file(out / FILE)) == ["x", "y"]
    for name, file, key in (("x", FILE, "x"), ("sub/z", f"sub/{FILE}", "z")):
        features = load_file(out / file)[key]
        np.testing.assert_array_equal(features, np.load(tmp_path / f"single/{name}.npy"))
    assert not (out / ".parts").exists()

    again, finished = packed_run(model, out, [tmp_path / "in"])
    assert (again.extracted, finished) == (0, 3)
    write_clip(tmp_path / "in/w.wav", seed=9)
    summary, finished = packed_run(model, out, [tmp_path / "in"])
    assert (summary.extracted, finished) == (1, 3)
    assert sorted(load_file(out / FILE)) == ["w", "x", "y"]
    np.testing.assert_array_equal(load_file(out / FILE)["y"], np.load(tmp_path / "single/y.npy"))


def test_a_run_stopped_before_packing_goes_on(model: ContentvecModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for i in range(2):
        write_clip(tmp_path / f"in/{i}.wav", seed=i)
    sources = find_sources([tmp_path / "in"])
    parts = [part_of(output) for output in name_outputs(sources)]
    manifest = Manifest(out)
    pending, _ = plan_jobs(sources, parts, manifest, SETTINGS)
    Extraction(model, SETTINGS, manifest).run(pending[:1])
    assert not (out / FILE).exists()
    summary, finished = packed_run(model, out, [tmp_path / "in"])
    assert (summary.extracted, finished) == (1, 1)
    assert (out / FILE).exists()


def test_a_damaged_pack_is_made_again(model: ContentvecModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_clip(tmp_path / "in/x.wav")
    packed_run(model, out, [tmp_path / "in"])
    good = (out / FILE).read_bytes()
    (out / FILE).write_bytes(good[:-4])
    summary, finished = packed_run(model, out, [tmp_path / "in"])
    assert (summary.extracted, finished) == (1, 0)
    assert (out / FILE).read_bytes() == good


def test_a_pack_of_other_settings_is_not_replaced(model: ContentvecModel, tmp_path: Path) -> None:
    write_clip(tmp_path / "in/x.wav")
    packed_run(model, tmp_path / "out", [tmp_path / "in"])
    other = dataclasses.replace(SETTINGS, layer=2)
    with pytest.raises(OutputError, match="made with other settings"):
        packed_run(model, tmp_path / "out", [tmp_path / "in"], other)


def test_a_pack_is_looked_into_once_however_many_clips_stay_in_it(
    model: ContentvecModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        write_clip(tmp_path / f"in/{i}.wav", seed=i)
    packed_run(model, tmp_path / "out", [tmp_path / "in"])
    parsed: list[int] = []

    def parse(text: bytes) -> dict[str, Any]:
        parsed.append(len(text))
        return parse_object(text)

    monkeypatch.setattr(packing, "parse_object", parse)
    write_clip(tmp_path / "in/3.wav", seed=3)
    packed_run(model, tmp_path / "out", [tmp_path / "in"])
    assert len(parsed) == 2  # the header that will be needed, and the one that is there


#: clips, bytes of their names -> whether one file can hold them: a header may have a million
#: values, 12 for each clip, and 16 MiB
PACKS = [(83_000, 6, True), (84_000, 6, False), (40_000, 250, True), (50_000, 250, False)]


@pytest.mark.parametrize(("clips", "length", "fits"), PACKS)
def test_more_clips_than_a_header_may_name_are_refused_before_the_work(
    tmp_path: Path, clips: int, length: int, fits: bool
) -> None:
    wanted = dataclasses.asdict(SETTINGS)
    parts = [part_of(f"in/{i:0{length}}.npy") for i in range(clips)]
    if not fits:
        with pytest.raises(OutputError, match=r"in/features\.safetensors cannot hold so many"):
            check_packs(parts, Manifest(tmp_path), wanted, force=True)
        return
    check_packs(parts, Manifest(tmp_path), wanted, force=False)
    # and what is written of them can be read again
    size = 10**6 * 768 * 4
    tensors = {part: packing._Tensor(tmp_path, 0, size, (10**6, 768)) for part in parts}
    header = parse_object(next(packing._file(tensors, wanted))[8:])
    assert len(header) == clips + 1


def test_the_clips_that_a_pack_has_already_count(tmp_path: Path) -> None:
    wanted = dataclasses.asdict(SETTINGS)
    manifest = Manifest(tmp_path)
    parts = [part_of(f"{i:06}.npy") for i in range(84_000)]
    for settings, fits in (({**wanted, "layer": 2}, True), (wanted, False)):
        clips = {part: {"settings": settings} for part in parts[1:]}
        manifest._records[FILE] = [{"output": FILE, "settings": settings, "clips": clips}]
        if fits:
            check_packs(parts[:1], manifest, wanted, force=True)
        else:
            with pytest.raises(OutputError, match="cannot hold so many clips"):
                check_packs(parts[:1], manifest, wanted, force=True)


@pytest.mark.parametrize("name", ["__metadata__", "caf\udce9"])
def test_a_clip_whose_name_no_header_can_have_is_refused(tmp_path: Path, name: str) -> None:
    parts = [part_of("a.npy"), part_of(f"{name}.npy")]
    said = f"cannot hold a clip called {printable(name)}"
    with pytest.raises(OutputError, match=re.escape(said)):
        check_packs(parts, Manifest(tmp_path), dataclasses.asdict(SETTINGS), force=False)


@pytest.mark.parametrize(
    "header",
    [{}, {"a": {"shape": [1, 1]}}, {"a": {"shape": [1, 1], "data_offsets": ["0", "4"]}}],
)
def test_a_pack_that_does_not_say_where_a_clip_lies_is_refused(
    tmp_path: Path, header: dict[str, Any]
) -> None:
    text = json.dumps(header).encode()
    (tmp_path / FILE).write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    with pytest.raises(OutputError, match="is not a file of features") as refused:
        packing._in_pack(tmp_path / FILE, [part_of("a.npy")])
    assert refused.value.found is not None and refused.value.found.startswith("a")


def test_a_file_that_is_not_in_the_manifest_is_not_packed_into(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"mine")
    wanted = dataclasses.asdict(SETTINGS)
    with pytest.raises(OutputError, match=r"1 file .* is not of this run") as refused:
        check_packs([part_of("a.npy")], Manifest(tmp_path), wanted, force=False)
    assert "was there before and is not in the manifest" in str(refused.value.found)
    check_packs([part_of("a.npy")], Manifest(tmp_path), wanted, force=True)


def test_the_features_of_a_pack_begin_at_a_multiple_of_eight_bytes(
    model: ContentvecModel, tmp_path: Path
) -> None:
    for length in range(1, 9):
        write_clip(tmp_path / f"in{length}" / f"{'x' * length}.wav")
        packed_run(model, tmp_path / f"out{length}", [tmp_path / f"in{length}"])
        written = (tmp_path / f"out{length}" / FILE).read_bytes()
        assert int.from_bytes(written[:8], "little") % 8 == 0


# ---- shares -----------------------------------------------------------------------


@given(st.lists(st.floats(0, 1000), max_size=60), st.integers(1, 8))
def test_shares_hold_everything_once_and_are_balanced(durations: list[float], count: int) -> None:
    divided = [share_of(durations, count, number) for number in range(count)]
    assert sorted(i for share in divided for i in share) == list(range(len(durations)))
    totals = [sum(durations[i] for i in share) for share in divided]
    assert max(totals) - min(totals) <= max(durations, default=0.0) + 1e-6


def test_more_shares_than_memory_has_room_for_are_empty_but_for_the_first() -> None:
    begun = time.monotonic()
    for number, share in ((0, [1]), (1, [0]), (2, []), (49_999_999, [])):
        assert share_of([1.0, 2.0], 50_000_000, number) == share
    # nor does it take long to find out
    assert time.monotonic() - begun < 5


def test_one_process_is_a_rank_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_RANK", raising=False)
    ranks = Ranks.launched()
    assert (ranks.rank, ranks.size) == (0, 1)
    assert ranks.gather({"a": 1}) == [{"a": 1}]
    assert ranks.from_first([2]) == [2]


@pytest.mark.parametrize("backend", ["ring", "nccl"])
def test_messages_pass_on_the_stream_that_the_backend_has(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    from mlx_contentvec.backend import mx

    def all_gather(x: Any, *, group: Any, stream: Any = None) -> Any:
        # MLX lets the backend choose; nccl has no stream on the CPU, ring none on a GPU
        if stream is not None and backend != {mx.cpu: "ring", mx.gpu: "nccl"}.get(stream):
            raise RuntimeError("There is no Stream(gpu, 1) in current thread.")
        return mx.concatenate([x, x])

    monkeypatch.setattr(mx.distributed, "all_gather", all_gather)
    assert Ranks(0, 2, object()).gather({"a": "b"}) == [{"a": "b"}] * 2


@pytest.mark.parametrize(
    ("environment", "gpu"),
    [
        ({"MLX_RANK": "1"}, "1"),
        ({"MLX_RANK": "2"}, "0"),
        ({"MLX_RANK": "3"}, "1"),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "5", "OMPI_COMM_WORLD_RANK": "9"}, "1"),
        ({"MLX_RANK": "1", "CUDA_VISIBLE_DEVICES": "6,GPU-7"}, "GPU-7"),
        # MLX's launcher has chosen already
        ({"MLX_RANK": "1", "CUDA_VISIBLE_DEVICES": "1"}, None),
        ({"MLX_RANK": "1", "CUDA_VISIBLE_DEVICES": ""}, None),
        ({}, None),
        ({"MLX_RANK": "9"}, None),
    ],
)
def test_each_process_has_a_gpu_of_its_machine(
    tmp_path: Path, environment: dict[str, str], gpu: str | None
) -> None:
    for card in range(4):
        (tmp_path / f"nvidia/gpus/0000:0{card}:00.0").mkdir(parents=True)
    hosts = [["10.0.0.1:5000"], ["10.0.0.1:5001"], ["10.0.0.2:5002"], ["10.0.0.2:5003"]]
    (tmp_path / "hosts").write_text(json.dumps(hosts))
    found = own_gpu({**environment, "MLX_HOSTFILE": str(tmp_path / "hosts")}, tmp_path)
    assert found == ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    assert own_gpu({"MLX_RANK": "1"}, tmp_path) == {}
    (tmp_path / "hosts").write_text("[" * 100_000)
    assert own_gpu({"MLX_RANK": "1", "MLX_HOSTFILE": str(tmp_path / "hosts")}, tmp_path) == {}


@given(st.lists(st.integers(0, 10**9), max_size=60), st.integers(1, 9))
def test_every_file_is_in_one_shard(sizes: list[int], count: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mlx_contentvec.extract.sharding._size", lambda path: float(path.name))
        paths = [Path(str(size)) for size in sizes]
        parts = [Shard(index, count).of(paths) for index in range(count)]
    assert sorted(i for part in parts for i in part) == list(range(len(sizes)))


@pytest.mark.parametrize(
    "text", ["4/4", "-1/4", "1", "1/", "/4", "a/4", "0/0", "1/4/2", "\u0661/4"]
)
def test_what_is_no_shard_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no shard"):
        Shard.parse(text)
    assert (str(Shard.parse("3/4")), Shard.parse("3/4")) == ("3/4", Shard(3, 4))


def test_shards_share_a_folder_that_nobody_else_writes_to(tmp_path: Path) -> None:
    with locked(tmp_path, "shard-0-of-2"), locked(tmp_path, "shard-1-of-2"):
        for name in (None, "shard-0-of-2"):
            with pytest.raises(OutputError, match="another extraction"), locked(tmp_path, name):
                pass
    with locked(tmp_path):  # noqa: SIM117
        with (
            pytest.raises(OutputError, match="another extraction"),
            locked(tmp_path, "shard-0-of-2"),
        ):
            pass


def test_summaries_add_up() -> None:
    first = Summary(extracted=2, audio_seconds=3.0, wall_seconds=5.0, seam_max=0.1, seams=1)
    second = Summary(extracted=1, audio_seconds=4.0, wall_seconds=2.0, seam_max=0.3, seams=2)
    total = Summary.joined(json.loads(json.dumps([first.to_dict(), second.to_dict()])))
    assert (total.extracted, total.audio_seconds, total.wall_seconds) == (3, 7.0, 5.0)
    assert (total.seams, total.seam_max, total.ranks) == (3, 0.3, 2)


def test_one_by_one_keeps_the_order(model: ContentvecModel, tmp_path: Path) -> None:
    jobs = [Job(f"{n}.wav", f"{n}.npy", n) for n in (3.0, 1.0, 2.0)]
    settings = dataclasses.replace(SETTINGS, padding="fairseq")
    extraction = Extraction(model, settings, Manifest(tmp_path), batch_seconds=0)
    assert extraction._batches(jobs) == [[job] for job in jobs]


def test_what_is_queued_is_not_decoded_for_nobody(
    model: ContentvecModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Job] = []

    def slowly(job: Job, stop: threading.Event) -> AudioError:
        read.append(job)
        time.sleep(0.02)
        return AudioError("a clip")

    jobs = [Job(f"{n}.wav", f"{n}.npy", 0.0) for n in range(60)]
    extraction = Extraction(model, SETTINGS, Manifest(tmp_path))
    monkeypatch.setattr(extraction, "_read", slowly)
    found: Any = extraction._decoded([job] for job in jobs)
    next(found)
    found.close()
    assert len(read) < 50


# ---- windows ----------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(2, 500), st.integers(0, 500))
@example(frames=115, shared=50, more=15)
def test_windows_keep_every_frame_once(frames: int, shared: int, more: int) -> None:
    length = 2 * shared + more
    pieces = cut_windows(ModelConfig(), frames, window=length / 50, overlap=shared / 50)
    kept = [frame for piece in pieces for frame in range(piece.keep_from, piece.keep_to)]
    assert kept == list(range(frames))
    assert all(p.start <= p.keep_from < p.keep_to <= p.stop for p in pieces)
    assert all(p.stop - p.start == min(length, frames) for p in pieces)
    assert all(a.stop - b.start >= shared for a, b in pairwise(pieces))


def test_windows_that_get_nowhere_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"windows of 1 s that overlap by 0\.6 s"):
        cut_windows(ModelConfig(), 1000, 1.0, 0.6)


def test_one_window_that_holds_the_clip_is_the_clip(model: ContentvecModel) -> None:
    clip = noise(16000)
    features, seams = windowed(model, clip, FeatureKind(3), window=10, overlap=1)
    np.testing.assert_allclose(features, in_one_go(model, clip, output_layer=3), atol=2e-5)
    assert seams.count == 0


def test_seams_report_what_windows_disagree_by(model: ContentvecModel) -> None:
    clip = noise(16000 * 4)
    features, seams = windowed(model, clip, FeatureKind(3), window=2, overlap=0.4)
    exact = in_one_go(model, clip, output_layer=3)
    assert features.shape == exact.shape
    assert seams.count == 2
    assert seams.max_abs >= seams.rms > 0.01
    # what is reported is of the size of what it cost
    error = np.sqrt(np.mean((features - exact) ** 2))
    assert error / 5 < seams.rms < error * 5


def test_windows_through_files_count_their_seams(model: ContentvecModel, tmp_path: Path) -> None:
    write_clip(tmp_path / "x.wav", 16000 * 4)
    settings = dataclasses.replace(SETTINGS, window=2.0, overlap=0.4)
    summary, _ = run(model, tmp_path / "out", [tmp_path / "x.wav"], settings=settings)
    assert summary.seams == 2
    assert summary.seam_max > 0.01
