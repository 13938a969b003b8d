"""The manifest beside outputs: what is finished, what is taken, what must be made again."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mlx_contentvec.errors import OutputError
from mlx_contentvec.extract import manifest as manifests
from mlx_contentvec.extract.manifest import (
    LOCK,
    Manifest,
    State,
    checksum,
    holds,
    identity,
    ignores_case,
    locked,
    prepared,
    require_files,
)
from mlx_contentvec.extract.run import Settings
from mlx_contentvec.files import Draft
from tests.checkpoint_files import change_in_place

SETTINGS = {"weights": "a", "layer": 12}
CONTENT = b"features" * 1000


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "speech.wav"
    path.write_bytes(b"RIFF" + bytes(5000))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def open_files() -> int:
    """How many files this process has open, where the system says so."""
    listed = Path("/dev/fd")
    return len(list(listed.iterdir())) if listed.exists() else 0


def keep(folder: Path, source: Path, name: str = "a.npy", **more: Any) -> dict[str, Any]:
    """An output and its record, as a run leaves them."""
    manifest = Manifest(folder)
    with prepared(folder / name, [CONTENT]) as (draft, written):
        record = {
            "output": name,
            "source": identity(source),
            "settings": SETTINGS,
            "frames": 125,
            "width": 16,
            **written,
            **more,
        }
        manifest.add(record)
        draft.rename(force=True)
    return record


def status(folder: Path, source: Path, name: str = "a.npy", **settings: Any) -> tuple[State, str]:
    found = Manifest(folder).status(name, source, {**SETTINGS, **settings})
    return found.state, found.reason


def test_what_is_written_reads_back_and_is_described(folder: Path, source: Path) -> None:
    record = keep(folder, source)
    assert (folder / "a.npy").read_bytes() == CONTENT
    assert record["bytes"] == len(CONTENT)
    assert record["crc32"] == f"{zlib.crc32(CONTENT):08x}" == checksum(folder / "a.npy")
    assert holds(folder / "a.npy", record)
    assert status(folder, source) == (State.FINISHED, "")


@pytest.mark.parametrize("at", [0, 7999, (1 << 20) + 5])
def test_an_output_that_does_not_read_back_never_gets_its_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    read = Draft.read_into

    def flipped(self: Draft, offset: int, target: memoryview) -> None:
        read(self, offset, target)
        if offset <= at < offset + len(target):
            target[at - offset] ^= 1

    monkeypatch.setattr(Draft, "read_into", flipped)
    content = CONTENT if at < len(CONTENT) else CONTENT * 200
    with (
        pytest.raises(OutputError, match="does not read back as it was written"),
        prepared(folder / "a.npy", [content]) as (draft, _),
    ):
        draft.rename(force=True)
    assert list(folder.iterdir()) == []


def test_parts_follow_each_other_whatever_they_are_views_of(folder: Path) -> None:
    parts: list[bytes | memoryview] = [b"12", memoryview(bytearray(b"3456")).cast("H"), b""]
    with prepared(folder / "deep" / "a.npy", parts) as (draft, written):
        draft.rename(force=True)
    assert (folder / "deep" / "a.npy").read_bytes() == b"123456"
    assert written == {"bytes": 6, "crc32": f"{zlib.crc32(b'123456'):08x}"}


def test_an_output_is_flushed_before_it_is_read_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    monkeypatch.setattr(Draft, "sync", lambda _: steps.append("flushed"))
    read = Draft.read_into

    def noted(self: Draft, offset: int, target: memoryview) -> None:
        steps.append("read")
        read(self, offset, target)

    monkeypatch.setattr(Draft, "read_into", noted)
    with prepared(folder / "a.npy", [CONTENT]):
        pass
    assert steps == ["flushed", "read"]


def test_a_folder_that_cannot_be_made_is_said(folder: Path) -> None:
    (folder / "deep").write_text("a file")
    with pytest.raises(OutputError, match="cannot write"), prepared(folder / "deep/a.npy", [b""]):
        pass


def test_a_source_that_was_touched_is_noted_once_and_not_read_again(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(folder, source)
    listed = (folder / ".mlx-contentvec.jsonl").read_bytes()
    for touched in (False, True):
        if touched:
            os.utime(source, ns=(1, 1))
        manifest = Manifest(folder)
        assert manifest.status("a.npy", source, SETTINGS).state is State.FINISHED
        for _ in range(2):
            manifest.note_found_again()
        more = (folder / ".mlx-contentvec.jsonl").read_bytes().removeprefix(listed)
        assert more.count(b"\n") == touched
    (noted,) = (json.loads(line) for line in more.splitlines())
    assert noted["source"] == identity(source)
    hashed: list[Path] = []

    def noting(path: Path) -> str:
        hashed.append(path)
        return checksum(path)

    monkeypatch.setattr(manifests, "checksum", noting)
    assert Manifest(folder).status("a.npy", source, SETTINGS).state is State.FINISHED
    assert hashed == [folder / "a.npy"]


def test_a_source_that_was_touched_needs_no_note(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(folder, source)
    os.utime(source, ns=(1, 1))
    manifest = Manifest(folder)
    manifest.status("a.npy", source, SETTINGS)

    def refuse(*_: object) -> None:
        raise OutputError("the disk is full")

    monkeypatch.setattr(manifest, "add", refuse)
    manifest.note_found_again()


def test_what_is_not_there_is_to_be_made(folder: Path, source: Path) -> None:
    assert status(folder, source) == (State.PENDING, "")


def test_what_nobody_recorded_is_taken(folder: Path, source: Path) -> None:
    (folder / "a.npy").write_bytes(CONTENT)
    state, reason = status(folder, source)
    assert state is State.TAKEN
    assert "not in the manifest" in reason


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:-1] + b"X", b""])
def test_what_is_broken_is_to_be_made_again(folder: Path, source: Path, content: bytes) -> None:
    keep(folder, source)
    (folder / "a.npy").write_bytes(content)
    assert status(folder, source) == (State.PENDING, "")


def test_what_was_made_otherwise_is_taken(folder: Path, source: Path, tmp_path: Path) -> None:
    keep(folder, source)
    state, reason = status(folder, source, layer=9, version="v1")
    assert state is State.TAKEN
    assert reason == "it was made with layer 12 (now 9), version None (now v1)"
    other = tmp_path / "other.wav"
    other.write_bytes(b"RIFF" + bytes(5001))
    state, reason = status(folder, other)
    assert (state, reason) == (State.TAKEN, f"it was made from {source}")


def test_a_source_that_changed_is_made_again(folder: Path, source: Path) -> None:
    keep(folder, source)
    before = source.stat()
    content = bytearray(source.read_bytes())
    content[-1] ^= 1
    source.write_bytes(content)
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert status(folder, source) == (State.PENDING, "")
    source.write_bytes(content + b"more")
    assert status(folder, source) == (State.PENDING, "")
    source.unlink()
    assert status(folder, source) == (State.PENDING, "")


def test_a_source_that_was_changed_in_place_is_made_again(folder: Path, source: Path) -> None:
    keep(folder, source)
    change_in_place(source)
    assert status(folder, source) == (State.PENDING, "")


def test_a_record_without_the_time_of_the_change_is_held_to_the_content(
    folder: Path, source: Path
) -> None:
    keep(folder, source)
    path = next(folder.glob("*.jsonl"), None) or next(folder.glob(".*.jsonl"))
    record = json.loads(path.read_text())
    del record["source"]["ctime_ns"]
    path.write_text(json.dumps(record) + "\n")
    assert status(folder, source) == (State.FINISHED, "")
    change_in_place(source)
    assert status(folder, source) == (State.PENDING, "")


def test_a_source_of_another_size_is_made_again_whatever_its_time_stamp(
    folder: Path, source: Path
) -> None:
    keep(folder, source)
    before = source.stat()
    source.write_bytes(source.read_bytes() + b"more")
    os.utime(source, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert status(folder, source) == (State.PENDING, "")


def test_a_source_that_was_moved_or_touched_is_the_same(
    folder: Path, source: Path, tmp_path: Path
) -> None:
    keep(folder, source)
    os.utime(source, ns=(1, 1))
    assert status(folder, source) == (State.FINISHED, "")
    source.rename(tmp_path / "moved.wav")
    assert status(folder, tmp_path / "moved.wav") == (State.FINISHED, "")


def test_an_older_record_will_do_where_the_output_is_its(folder: Path, source: Path) -> None:
    keep(folder, source)
    Manifest(folder).add(
        {**Manifest(folder).records("a.npy")[0], "settings": {"layer": 9}, "crc32": "0" * 8}
    )
    assert status(folder, source) == (State.FINISHED, "")


def test_clips_of_a_packed_file_are_finished_while_it_is_whole(folder: Path, source: Path) -> None:
    clip = {**keep(folder, source, "other.npy"), "output": "a.npy"}
    keep(folder, source, "pack.safetensors", clips={"a.npy": clip})
    assert status(folder, source) == (State.FINISHED, "")
    assert status(folder, source, layer=9) == (State.PENDING, "")
    assert status(folder, source, "b.npy") == (State.PENDING, "")
    assert Manifest(folder).packed("pack.safetensors") == {"a.npy": clip}
    (folder / "pack.safetensors").write_bytes(b"broken")
    assert Manifest(folder).packed("pack.safetensors") == {}
    assert status(folder, source) == (State.PENDING, "")


def test_a_pack_that_is_written_again_is_looked_at_again(folder: Path, source: Path) -> None:
    manifest = Manifest(folder)
    assert manifest.packed("pack.safetensors") == {}
    record = keep(folder, source, "pack.safetensors", clips={"a.npy": {"of": "later"}})
    manifest.add(record)
    assert manifest.packed("pack.safetensors") == {"a.npy": {"of": "later"}}


def test_every_process_has_a_file_of_its_own_and_reads_all(folder: Path, source: Path) -> None:
    record = keep(folder, source)
    Manifest(folder, 3).add({**record, "output": "b.npy"})
    assert sorted(path.name for path in folder.glob(".*jsonl")) == [
        ".mlx-contentvec.jsonl",
        ".mlx-contentvec.rank-3.jsonl",
    ]
    found = Manifest(folder, 1)
    assert found.path.name == ".mlx-contentvec.rank-1.jsonl"
    assert [found.records(name)[0]["output"] for name in ("a.npy", "b.npy")] == ["a.npy", "b.npy"]
    assert found.records("c.npy") == []


@pytest.mark.parametrize(
    "torn", [b'{"output": "b', b'{"output": 7}\n', b"[]\n", b"7\n", b"\xff\xfe\n"]
)
def test_a_torn_line_swallows_no_other(folder: Path, source: Path, torn: bytes) -> None:
    keep(folder, source)
    path = Manifest(folder).path
    with path.open("ab") as file:
        file.write(torn)
    keep(folder, source, "c.npy")
    assert status(folder, source) == (State.FINISHED, "")
    assert status(folder, source, "c.npy") == (State.FINISHED, "")
    whole = path.read_bytes().splitlines()
    assert json.loads(whole[-1])["output"] == "c.npy"
    assert b"" not in whole


@pytest.mark.parametrize("lacking", ["output", "source", "settings", "crc32", "frames"])
def test_a_record_of_another_form_is_none(folder: Path, source: Path, lacking: str) -> None:
    record = keep(folder, source)
    del record[lacking]
    Manifest(folder).path.write_text(json.dumps(record) + "\n")
    assert Manifest(folder).records("a.npy") == []


def test_a_record_that_nests_deeply_is_none(folder: Path, source: Path) -> None:
    record = keep(folder, source)
    for depth, there in ((50, True), (70, False)):
        inner = "[" * depth + "]" * depth
        line = json.dumps({**record, "note": None}).replace("null", inner)
        Manifest(folder).path.write_text(line + "\n")
        assert bool(Manifest(folder).records("a.npy")) == there


def test_a_name_that_is_no_utf_8_is_listed(folder: Path, source: Path) -> None:
    name = os.fsdecode(b"\x82\xa0.npy")
    keep(folder, source, name)
    assert status(folder, source, name) == (State.FINISHED, "")


def test_a_line_of_too_many_values_is_none(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = keep(folder, source)
    needed = manifests.count_values(json.dumps(record).encode() + b"\n")
    for most, there in ((needed, True), (needed - 1, False)):
        monkeypatch.setattr(manifests, "_LINE_VALUES", most)
        assert bool(Manifest(folder).records("a.npy")) is there


def test_a_line_of_too_many_bytes_is_none(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = len(json.dumps(keep(folder, source))) + len("\n")
    for most, there in ((needed, True), (needed - 2, False)):
        monkeypatch.setattr(manifests, "_LINE_BYTES", most)
        assert bool(Manifest(folder).records("a.npy")) is there


@pytest.mark.parametrize("limit", ["_LINE_BYTES", "_LINE_VALUES"])
def test_what_could_not_be_read_again_is_not_written(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    record = keep(folder, source)
    manifest = Manifest(folder)
    before = manifest.path.read_bytes()
    monkeypatch.setattr(manifests, limit, 20)
    with pytest.raises(OutputError, match=r"a\.npy cannot be listed") as caught:
        manifest.add(record)
    assert "20" in str(caught.value.expected)
    assert manifest.path.read_bytes() == before


def test_a_line_has_room_for_a_folder_of_150_000_clips() -> None:
    path = f"/data/voices/speaker-12/{'a' * 40}.flac"
    clip = {
        "output": f"voices/speaker-12/{'a' * 40}.npy",
        "source": {"path": path, "bytes": 10**6, "mtime_ns": 10**18, "crc32": "0" * 8},
        "settings": asdict(Settings("0" * 64, 12, False)),
        "frames": 999,
        "width": 768,
        "bytes": 3_068_928,
        "crc32": "0" * 8,
        "seconds": 19.98,
        "source_rate": 16_000,
        "channels": 1,
        "decoder": "soundfile 0.13.1",
        "resampler": "none",
    }
    line = json.dumps({clip["output"]: clip}).encode()
    assert 150_000 < manifests._LINE_VALUES / manifests.count_values(line) < 200_000
    assert 150_000 < manifests._LINE_BYTES / len(line) < 250_000


def test_a_manifest_that_is_no_file_is_said(folder: Path) -> None:
    os.mkfifo(folder / ".mlx-contentvec.jsonl")
    with pytest.raises(OutputError, match="cannot be read: not a regular file"):
        Manifest(folder)
    (folder / ".mlx-contentvec.jsonl").unlink()
    (folder / ".mlx-contentvec.jsonl").symlink_to(folder / "nothing")
    with pytest.raises(OutputError, match="cannot be read: No such file"):
        Manifest(folder)


def test_no_records_make_no_file(folder: Path) -> None:
    Manifest(folder).add()
    assert list(folder.iterdir()) == []


def test_a_record_is_on_the_disk_when_it_is_said_to_be(
    folder: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []

    def note(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", note)
    manifest = Manifest(folder)
    manifest.add({"output": "a.npy"})
    assert synced == [manifest.path.stat().st_size]
    assert synced[0] > 0


@pytest.mark.parametrize("how", ["a link", "a pipe", "a second name"])
def test_a_manifest_that_is_something_else_is_not_written(
    folder: Path, tmp_path: Path, how: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_bytes(b"")
    manifest = Manifest(folder)
    if how == "a link":
        manifest.path.symlink_to(elsewhere)
    elif how == "a pipe":
        os.mkfifo(manifest.path)
    else:
        manifest.path.hardlink_to(elsewhere)
    with pytest.raises(OutputError, match="cannot write"):
        manifest.add({"output": "a.npy"})
    assert elsewhere.read_bytes() == b""


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_not_replaced(folder: Path, make: Callable[[Path], None]) -> None:
    make(folder / "a.npy")
    (folder / "b.npy").touch()
    with pytest.raises(OutputError, match=r"^1 output in .* cannot be written") as caught:
        require_files(folder, ["a.npy", "b.npy", "c.npy"])
    assert "at a.npy" in str(caught.value.found)
    require_files(folder, ["b.npy", "c.npy"])


def test_a_pipe_is_no_output(folder: Path) -> None:
    os.mkfifo(folder / "a.npy")
    assert not holds(folder / "a.npy", {"bytes": len(CONTENT), "crc32": "0" * 8})


# who may write ------------------------------------------------------------------------


def test_a_folder_is_made_to_be_locked(tmp_path: Path) -> None:
    with locked(tmp_path / "deep" / "out"):
        assert (tmp_path / "deep" / "out" / LOCK).exists()


def test_one_process_at_a_time_writes(folder: Path) -> None:
    with locked(folder):
        before = open_files()
        with pytest.raises(OutputError, match="another extraction is writing") as refused:
            locked(folder).__enter__()
        # the error, which is still there, holds no file
        assert open_files() == before, refused
    with locked(folder):
        pass


def test_shards_write_beside_each_other_and_each_once(folder: Path) -> None:
    def refused(shard: str | None) -> None:
        with pytest.raises(OutputError, match="another extraction"), locked(folder, shard):
            pass

    with locked(folder, "1-of-2"):
        refused(None)
        refused("1-of-2")
        with locked(folder, "2-of-2"):
            refused("2-of-2")
    with locked(folder):
        refused("1-of-2")


@pytest.mark.parametrize("shard", [None, "1-of-2"])
def test_what_killed_runs_left_is_removed(folder: Path, shard: str | None) -> None:
    leftover = folder / "deep" / ".mlx-contentvec-0123abcd-01234567.partial"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    with locked(folder, shard):
        assert not leftover.exists()


def test_a_folder_that_cannot_be_locked_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"), locked(tmp_path / "file"):
        pass


@pytest.mark.parametrize("shard", [None, "1-of-2"])
def test_a_run_that_is_refused_leaves_nothing(tmp_path: Path, shard: str | None) -> None:
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "new" / "deep", shard):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "there").mkdir()
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "there", shard):
        raise ZeroDivisionError
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]


def test_a_run_that_fails_leaves_what_it_made_and_what_others_hold(folder: Path) -> None:
    with (
        locked(folder, "1-of-2"),
        pytest.raises(ZeroDivisionError),
        locked(folder, "2-of-2"),
    ):
        raise ZeroDivisionError
    assert (folder / LOCK).exists()
    for name in ("a.npy", ".mlx-contentvec.jsonl", "a.lock"):
        new = folder / f"for {name}"
        with pytest.raises(ZeroDivisionError), locked(new):
            (new / name).touch()
            raise ZeroDivisionError
        assert {path.name for path in new.iterdir()} == {LOCK, name}


def test_a_shard_that_is_refused_leaves_the_lock_that_another_shares(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    first = locked(folder, "1-of-2")
    first.__enter__()
    with locked(folder, "2-of-2"):
        assert first.__exit__(ZeroDivisionError, ZeroDivisionError(), None) is False
        with pytest.raises(OutputError, match="another extraction"), locked(folder):
            pass


def test_a_lock_that_was_taken_away_meanwhile_is_made_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = manifests.lock_now
    given: list[int] = []

    def lost_once(descriptor: int, *, share: bool = False) -> bool:
        if not given:
            (folder / LOCK).unlink()
        given.append(descriptor)
        return real(descriptor, share=share)

    before = open_files()
    monkeypatch.setattr(manifests, "lock_now", lost_once)
    with locked(folder):
        assert open_files() in (0, before + 1)
        assert (folder / LOCK).exists()
        with pytest.raises(OutputError, match="another extraction"), locked(folder):
            pass


def test_a_folder_is_asked_whether_it_ignores_case(folder: Path) -> None:
    with locked(folder):
        assert ignores_case(folder) == (folder / LOCK.swapcase()).exists()
        (folder / LOCK.upper()).touch()
        assert ignores_case(folder)
