"""Recordings: the original without the original, and what does not fit one."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from contentvec_convert.conversion import convert
from contentvec_parity import harness, references
from contentvec_parity.compare.fingerprints import hash_values
from contentvec_parity.compare.soundness import require_sound
from contentvec_parity.compare.verdict import summarise
from contentvec_parity.harness import replay
from contentvec_parity.references import open_reference
from contentvec_parity.references.recording import (
    Recording,
    read_header,
    record,
    small,
    write,
)
from mlx_contentvec.backend import mx
from mlx_contentvec.errors import IdentityError, OutputError, ParityError
from mlx_contentvec.hub import sha256_of
from tests import attack_corpus
from tests.checkpoint_files import change_in_place, safetensors
from tests.originals import TINY_BASE, fairseq_hubert, save_fairseq
from tests.sources import PROJECT, search_path

#: run with this in front, no module of either original can be imported
BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("torch", "fairseq", "transformers"):
            raise ImportError(f"{name} is not here")
sys.meta_path.insert(0, Blocked())
sys.argv[0] = "mlx-contentvec"
from mlx_contentvec.cli import main
main()
"""


@pytest.fixture(scope="module")
def recording(
    fairseq: Any, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("recording") / "tiny.recording.safetensors"
    record(tiny_checkpoint, path)
    return path


def without_torch(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": search_path(), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_recording_holds_what_the_original_computed(
    recording: Path, tiny_checkpoint: Path
) -> None:
    original, recorded = open_reference("fairseq", tiny_checkpoint), Recording(recording)
    assert recorded.config == original.config
    for clip in recorded.clips:
        stages, truth = original.stages(clip), original.truth(clip)
        for stage, found in recorded.stages(clip).items():
            assert np.array_equal(found, stages[stage])
        for stage, kept in recorded.truth(clip).items():
            # the truth is kept to a small part of the error it is there to measure
            error = np.abs(stages[stage] - truth[stage]).max()
            assert np.abs(kept - truth[stage]).max() <= error / 1000


def test_the_recorded_clips_are_small_and_among_them_every_stage_is_run(recording: Path) -> None:
    header = read_header(recording)
    assert [clip["name"] for clip in header["clips"]] == [clip.name for clip, _ in small()]
    assert {stage for clip in header["clips"] for stage in clip["stages"]} >= {"conv.0", "layer.3"}
    assert recording.stat().st_size < 500_000


def test_the_same_checkpoint_is_recorded_in_the_same_bytes(
    recording: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    record(tiny_checkpoint, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == recording.read_bytes()


def test_replaying_gives_the_verdict_of_the_live_original(
    recording: Path, tiny_checkpoint: Path, converted_tiny: Path
) -> None:
    from contentvec_parity.compare.candidate import MlxCandidate
    from contentvec_parity.harness import assemble

    live = assemble(
        open_reference("fairseq", tiny_checkpoint),
        MlxCandidate.open(converted_tiny),
        [clip for clip, _ in small()],
    )
    replayed = replay(recording, converted_tiny)
    assert replayed["verdict"]["passed"]
    assert live["verdict"]["passed"]
    shared = {(row["kind"], row["name"], row["clip"]) for row in replayed["stages"]}
    rows = [row for row in live["stages"] if (row["kind"], row["name"], row["clip"]) in shared]
    assert len(rows) == len(shared)
    for one, other in zip(summarise(rows), summarise(replayed["stages"]), strict=True):
        assert (one["kind"], one["name"]) == (other["kind"], other["name"])
        for metric in ("max_abs", "rms"):
            assert other["ratio"][metric] == pytest.approx(one["ratio"][metric], rel=0.01)


def test_a_recording_is_replayed_without_torch_and_without_the_checkpoint(
    recording: Path, converted_tiny: Path
) -> None:
    done = without_torch("parity", converted_tiny, "--reference", recording, "--json", "-")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["verdict"]["passed"]
    assert document["reference"]["name"] == "recording"
    assert document["reference"]["recorded_from"] == "fairseq"
    assert document["flags"]["tf32"] is False
    assert "torch_threads" not in document["flags"]


def test_a_mistake_shows_in_a_replay_and_its_stage_is_named(
    recording: Path, converted_tiny: Path, tmp_path: Path
) -> None:
    tensors, metadata = mx.load(str(converted_tiny), return_metadata=True)
    name = "encoder.layers.1.fc2.weight"
    tensors[name] = tensors[name].at[0, 0].add(0.01)
    mx.save_safetensors(str(tmp_path / "wrong.safetensors"), tensors, metadata=metadata)
    verdict = replay(recording, tmp_path / "wrong.safetensors")["verdict"]
    assert not verdict["passed"]
    assert verdict["blame"]["wrong"][0]["stage"] == "layer.2"
    assert verdict["blame"]["wrong"][0]["differing_tensors"] == [name]


def test_normalised_models_are_recorded_with_their_input(
    fairseq: Any, tiny_large_checkpoint: Path, converted_tiny_large: Path, tmp_path: Path
) -> None:
    record(tiny_large_checkpoint, tmp_path / "large.safetensors")
    document = replay(tmp_path / "large.safetensors", converted_tiny_large)
    assert document["verdict"]["passed"], document["verdict"]["reason"]
    assert {row["name"] for row in document["stages"]} >= {"final_norm", "final norm", "conv.0"}


def test_a_model_of_another_sample_rate_is_compared_and_recorded(
    fairseq: Any, tmp_path: Path
) -> None:
    config = dataclasses.replace(TINY_BASE, sample_rate=8000)
    checkpoint = save_fairseq(fairseq_hubert(config), config, tmp_path / "a.pt")
    converted, recorded = tmp_path / "a.safetensors", tmp_path / "a.recording.safetensors"
    convert(checkpoint, converted, allow_unknown=True)
    soundfile = pytest.importorskip("soundfile", reason="pip install 'mlx-contentvec[audio]'")
    soundfile.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    document = harness.compare_files(
        checkpoint, converted, inputs="built-in", audio=[tmp_path / "a.wav"]
    )
    require_sound(document)
    assert (document["clips"][-1]["samples"], document["clips"][-1]["seconds"]) == (8000, 1.0)
    record(checkpoint, recorded)
    assert replay(recorded, converted)["config"]["sample_rate"] == 8000


def test_the_other_original_can_be_recorded_too(
    tiny_checkpoint: Path, converted_tiny: Path, tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="pip install 'mlx-contentvec[parity]'")
    record(tiny_checkpoint, tmp_path / "r.safetensors", reference="transformers")
    document = replay(tmp_path / "r.safetensors", converted_tiny)
    assert document["verdict"]["passed"]
    assert document["reference"]["recorded_from"] == "transformers"


# ---- what does not fit --------------------------------------------------------------------


@pytest.fixture(scope="module")
def other(
    make_standin: Callable[..., Path], fairseq: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """A checkpoint of the same shape and other weights, and its recording."""
    checkpoint = make_standin("tiny", seed=5)
    path = tmp_path_factory.mktemp("other") / "other.recording.safetensors"
    record(checkpoint, path)
    return checkpoint, path


def test_a_recording_of_another_checkpoint_is_refused_and_both_are_named(
    other: tuple[Path, Path], converted_tiny: Path, tiny_checkpoint: Path
) -> None:
    with pytest.raises(ParityError, match="is not a recording of what") as refused:
        replay(other[1], converted_tiny)
    assert other[0].name in str(refused.value)
    assert converted_tiny.name in str(refused.value)
    assert sha256_of(tiny_checkpoint) in str(refused.value)


def test_a_checkpoint_that_is_not_the_recorded_one_is_refused(
    other: tuple[Path, Path], recording: Path, converted_tiny: Path
) -> None:
    with pytest.raises(ParityError, match="recording of another checkpoint") as refused:
        replay(recording, converted_tiny, checkpoint=other[0])
    assert other[0].name in str(refused.value)


def test_the_same_weights_from_another_container_are_accepted(
    recording: Path, converted_tiny: Path, tmp_path: Path
) -> None:
    tensors, metadata = mx.load(str(converted_tiny), return_metadata=True)
    source = {**json.loads(metadata["source"]), "sha256": "0" * 64, "name": "hubert_base"}
    metadata = {**metadata, "source": json.dumps(source)}
    mx.save_safetensors(str(tmp_path / "same.safetensors"), tensors, metadata=metadata)
    assert replay(recording, tmp_path / "same.safetensors")["verdict"]["passed"]


def test_a_recording_of_another_architecture_is_refused_by_its_fields(
    recording: Path, converted_tiny_large: Path
) -> None:
    with pytest.raises(ParityError) as refused:
        replay(recording, converted_tiny_large)
    assert "layer_norm_first" in str(refused.value)


@pytest.mark.parametrize("what", ["weights", "nothing", "text", "cut", "other schema"])
def test_what_is_no_recording_is_refused(
    what: str, recording: Path, converted_tiny: Path, tmp_path: Path
) -> None:
    path = tmp_path / "r.safetensors"
    content = recording.read_bytes()
    contents: dict[str, Callable[[], bytes]] = {
        "weights": converted_tiny.read_bytes,
        "nothing": lambda: b"",
        "text": lambda: b"<!DOCTYPE html>" * 100,
        "cut": lambda: content[: len(content) // 2],
        "other schema": lambda: content.replace(b"recording/1", b"recording/9"),
    }
    path.write_bytes(contents[what]())
    with pytest.raises(ParityError) as refused:
        replay(path, converted_tiny)
    assert "r.safetensors" in str(refused.value)


def test_no_text_of_a_recording_is_obeyed_by_a_terminal(
    recording: Path, converted_tiny: Path, tmp_path: Path
) -> None:
    header, data = attack_corpus.read_header(recording.read_bytes())
    stated = json.loads(header["__metadata__"]["recording"])
    stated["reference"]["versions"] = {"torch\x1b[2J": "\u202e2.13"}
    header["__metadata__"]["recording"] = json.dumps(stated)
    path = tmp_path / "r.safetensors"
    path.write_bytes(safetensors(json.dumps(header).encode(), data))
    document = replay(path, converted_tiny)
    assert document["reference"]["versions"] == {r"torch\x1b[2J": r"\u202e2.13"}
    assert document["verdict"]["passed"]


def test_an_existing_recording_is_kept_unless_told_otherwise(
    recording: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    path = tmp_path / "r.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(OutputError, match="already exists"):
        record(tiny_checkpoint, path)
    assert path.read_bytes() == b"precious"
    record(tiny_checkpoint, path, force=True)
    assert path.read_bytes() == recording.read_bytes()


def test_a_checkpoint_that_changes_while_it_is_recorded_is_refused(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recording would name one file and hold what another computed."""
    checkpoint = tmp_path / "tiny.pt"
    checkpoint.write_bytes(tiny_checkpoint.read_bytes())

    def changing(*arguments: Any) -> Any:
        original = open_reference(*arguments)
        change_in_place(checkpoint)
        return original

    monkeypatch.setattr(references, "open_reference", changing)
    with pytest.raises(IdentityError, match="changed while it was being read"):
        record(checkpoint, tmp_path / "recording.safetensors", reference="transformers")
    assert list(tmp_path.iterdir()) == [checkpoint]


def test_weights_that_change_while_they_are_measured_are_refused(
    recording: Path, converted_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(converted_tiny.read_bytes())
    measure = harness.measure

    def changing(*arguments: Any, **options: Any) -> Any:
        change_in_place(weights)
        return measure(*arguments, **options)

    monkeypatch.setattr(harness, "measure", changing)
    with pytest.raises(IdentityError, match="changed while it was being read"):
        replay(recording, weights)


def test_a_recording_never_replaces_its_own_source(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "a.pt"
    checkpoint.write_bytes(tiny_checkpoint.read_bytes())
    (tmp_path / "link").symlink_to(checkpoint)
    for output in (checkpoint, tmp_path / "link"):
        with pytest.raises(OutputError, match="is what it is made from"):
            record(checkpoint, output, force=True)
    assert checkpoint.read_bytes() == tiny_checkpoint.read_bytes()


@pytest.mark.usefixtures("fairseq")
def test_a_folder_that_cannot_be_written_to_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    original = open_reference("fairseq", tiny_checkpoint)
    with pytest.raises(OutputError, match="cannot write"):
        write(original, {}, tmp_path / "nowhere" / "r.safetensors", small()[:1])
    assert list(tmp_path.iterdir()) == []


def test_values_are_hashed_as_they_are_whatever_their_layout() -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert hash_values(values.T) == hash_values(np.ascontiguousarray(values.T))
    assert hash_values(values) != hash_values(values.T)
    assert hash_values(values.astype(np.float16)) == hash_values(values)


def documented() -> dict[str, Any]:
    """``read`` and ``errors`` of docs/ports.md, for a port in another language."""
    text = (PROJECT / "docs" / "ports.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(block.partition("\nmodel = ")[0], names)
    return names


def test_the_reader_for_ports_reads_what_is_there(recording: Path) -> None:
    functions = documented()
    about, arrays = functions["read"](recording)
    assert about == read_header(recording)
    recorded = Recording(recording)
    listed = set()
    for clip in recorded.clips:
        assert np.array_equal(arrays[f"{clip.name}/waveform"], clip.waveform)
        listed.add(f"{clip.name}/waveform")
        if clip.padding_mask is not None:
            assert np.array_equal(arrays[f"{clip.name}/padding_mask"], clip.padding_mask)
            listed.add(f"{clip.name}/padding_mask")
        for stage, output in recorded.stages(clip).items():
            assert np.array_equal(arrays[f"{clip.name}/{stage}"], output)
            listed |= {f"{clip.name}/{stage}{kind}" for kind in ("", "/truth", "/local")}
    # a stage by itself needs the one before it, which not every clip keeps
    assert arrays.keys() <= listed
    assert {name for name in listed if not name.endswith("/local")} <= arrays.keys()

    def port(waveform: Any, mask: Any, stages: Any) -> Any:
        clip = next(c for c in recorded.clips if np.array_equal(c.waveform, waveform))
        return recorded.truth(clip)

    for ours, pytorch in functions["errors"](about, arrays, port).values():
        # who computes the truth has no error left
        assert not ours.any() and pytorch.any()


def test_the_page_for_ports_names_every_stage_and_field(recording: Path) -> None:
    text = (PROJECT / "docs" / "ports.md").read_text(encoding="utf-8")
    header = read_header(recording)
    for field in ("schema", "config", "clips", "scales", "source", "reference", "tensors"):
        assert field in header and f"`{field}`" in text
    assert header["schema"] in text
    for stage in ("conv.0", "conv.1", "projection", "positional", "layer.1", "final_proj"):
        assert f"`{stage}`" in text
