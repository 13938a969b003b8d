"""Identity: what a file is, and what is said about one that is something else."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from contentvec_convert import identity as identity_module
from contentvec_convert.diagnosis import accept, stand_in_refused
from contentvec_convert.identity import BLOCK_BYTES, Identification, identify
from contentvec_convert.known_files import CONTENTVEC, KNOWN_FILES, KnownFile, known_as
from contentvec_parity.compare.candidate import read_metadata
from mlx_contentvec.errors import IdentityError


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(IdentityError) as caught:
        accept(path, identify(path), **options)
    return str(caught.value)


@pytest.fixture
def hubert_base(tmp_path: Path) -> Path:
    """A path named as the real file is."""
    return tmp_path / "hubert_base.pt"


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> KnownFile:
    """A row for a file that a test can make: the bytes of b"known" * 1000."""
    data = b"known" * 1000
    row = KnownFile(
        key="a-known-file",
        names=("known.pt",),
        what="made for a test",
        home="https://example.org/known",
        size=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
    )
    table = (*KNOWN_FILES, row)
    monkeypatch.setattr(identity_module, "KNOWN_FILES", table)
    monkeypatch.setattr("contentvec_convert.known_files.KNOWN_FILES", table)
    return row


# ---- the checksums


@pytest.mark.parametrize("size", [0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, 3 * BLOCK_BYTES + 7])
def test_size_and_both_checksums_are_those_of_the_bytes(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    path = tmp_path / "file"
    path.write_bytes(data)
    found = identify(path)
    assert (found.name, found.size) == ("file", size)
    assert found.md5 == hashlib.md5(data).hexdigest()
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert "files" not in found.to_dict()


def test_several_weight_files_count_as_their_bytes_in_order(tmp_path: Path) -> None:
    parts = [os.urandom(1000), os.urandom(BLOCK_BYTES + 5)]
    paths = [tmp_path / f"{i}.bin" for i in range(2)]
    for path, data in zip(paths, parts, strict=True):
        path.write_bytes(data)
    (tmp_path / "config.json").write_bytes(b"{}")
    with Identification(tmp_path, paths, [tmp_path / "config.json"]) as identification:
        found = identification.result()
    whole = b"".join(parts)
    assert (found.size, found.md5) == (len(whole), hashlib.md5(whole).hexdigest())
    assert found.sha256 == hashlib.sha256(whole).hexdigest()
    assert [file.sha256 for file in found.files] == [
        hashlib.sha256(data).hexdigest() for data in (*parts, b"{}")
    ]
    assert [file["name"] for file in found.to_dict()["files"]] == ["0.bin", "1.bin", "config.json"]


def test_the_longest_identity_takes_no_fewer_characters_than_the_result(
    tmp_path: Path, known: KnownFile
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"known" * 1000)
    with Identification(path) as identification:
        longest, found = identification.longest(), identification.result()
    assert found.known is known
    assert len(str(longest.to_dict())) >= len(str(found.to_dict()))


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with Identification(path) as identification:
        identification.result()
        path.write_bytes(b"after, and longer")
        with pytest.raises(IdentityError, match="changed"):
            identification.check_unchanged()


def test_a_file_that_changes_while_it_is_hashed_has_no_identity(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def change(done: int, total: int) -> None:
        os.utime(path, ns=(1, 1))

    with (
        Identification(path, progress=change) as identification,
        pytest.raises(IdentityError, match="changed"),
    ):
        identification.result()


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe"])
def test_what_is_not_a_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "thing"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with pytest.raises(IdentityError, match="thing"):
        identify(path)


def test_what_would_take_hours_to_hash_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for size, refused in ((identity_module.FILE_BYTES + 1, True), (BLOCK_BYTES, False)):
        with path.open("wb") as stream:
            stream.truncate(size)
        if refused:
            # nor is it mapped, for the metadata that it may have
            for read in (identify, read_metadata):
                with pytest.raises(IdentityError, match="larger than any checkpoint") as caught:
                    read(path)
                assert f"{size:,} bytes" in str(caught.value)
        else:
            assert identify(path).size == size


def test_leaving_early_stops_the_hashing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("wb") as stream:
        stream.truncate(8 << 30)  # takes seconds to hash, and no space
    before = threading.active_count()
    with pytest.raises(ValueError), Identification(path) as identification:
        raise ValueError
    assert threading.active_count() == before
    with pytest.raises(IdentityError, match="stopped"):
        identification.result()


def test_waiting_for_the_checksums_is_told_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    with path.open("wb") as stream:
        stream.truncate(300 << 20)
    monkeypatch.setattr(identity_module, "_LOOK_EVERY", 0.01)
    told: list[tuple[int, int]] = []
    with Identification(path) as identification:
        identification.result(lambda done, total: told.append((done, total)))
    assert len(told) > 2 and told[0][0] < told[-1][0] <= 300 << 20
    assert {total for _, total in told} == {300 << 20}


# ---- the table


def test_the_table_knows_the_real_file_by_all_three_marks() -> None:
    marks = (CONTENTVEC.size, CONTENTVEC.md5, CONTENTVEC.sha256)
    assert marks == (
        189_507_909,
        "b76f784c1958d4e535cd0f6151ca35e4",
        "f54b40fd2802423a5643779c4861af1e9ee9c1564dc9d32f54f20b5ffba7db96",
    )
    assert known_as(*marks) is CONTENTVEC
    assert known_as(marks[0] - 1, *marks[1:]) is None
    assert known_as(marks[0], "0" * 32, marks[2]) is None
    assert known_as(marks[0], marks[1], "0" * 64) is None


def test_a_row_without_a_checksum_matches_nothing() -> None:
    bare = [row for row in KNOWN_FILES if not row.verifiable]
    assert bare
    assert not any(row.is_file(row.size or 0, "", "") for row in bare)


def test_the_table_is_consistent() -> None:
    keys = [row.key for row in KNOWN_FILES]
    assert len(set(keys)) == len(keys)
    hashes = [row.sha256 for row in KNOWN_FILES if row.sha256]
    assert len(set(hashes)) == len(hashes)
    for row in KNOWN_FILES:
        assert row.names and row.what and row.home.startswith("https://")
        assert row.md5 is None or len(bytes.fromhex(row.md5)) == 16
        assert row.sha256 is None or len(bytes.fromhex(row.sha256)) == 32


# ---- acceptance


def test_a_known_file_is_accepted_under_any_name_of_its_own(
    tmp_path: Path, known: KnownFile
) -> None:
    for name in ("known.pt", "whatever.pt"):
        path = tmp_path / name
        path.write_bytes(b"known" * 1000)
        accept(path, identify(path))


def test_a_known_file_under_another_known_files_name_is_refused(
    hubert_base: Path, known: KnownFile
) -> None:
    hubert_base.write_bytes(b"known" * 1000)
    text = refusal(hubert_base)
    assert "is not the file it is named after" in text
    assert "which is a-known-file" in text
    assert "this is made for a test" in text
    accept(hubert_base, identify(hubert_base), allow_unknown=True)


def test_an_unknown_file_needs_a_word_from_the_caller(tmp_path: Path) -> None:
    path = tmp_path / "mine.pt"
    path.write_bytes(b"PK\x03\x04 mine PK\x05\x06")
    found = identify(path)
    text = refusal(path)
    assert "not a file that is known here" in text
    assert found.md5 in text and "--allow-unknown" in text
    accept(path, found, allow_unknown=True)
    accept(path, found, expect_md5=found.md5)
    accept(path, found, expect_sha256=found.sha256.upper() + " ")


@pytest.mark.parametrize("kind", ["md5", "sha256"])
def test_another_file_than_the_one_expected_is_refused_whatever_else_is_allowed(
    tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "mine.pt"
    path.write_bytes(b"mine")
    wrong = {f"expect_{kind}": "0" * (32 if kind == "md5" else 64)}
    text = refusal(path, allow_unknown=True, **wrong)
    assert "is not the file expected" in text
    assert getattr(identify(path), kind) in text and "0" * 32 in text


# ---- the diagnosis


def test_a_saved_web_page_is_recognised(hubert_base: Path) -> None:
    hubert_base.write_text("<!DOCTYPE html><html><body>Sign in</body></html>")
    text = refusal(hubert_base)
    assert "hubert_base.pt is not the file it is named after" in text
    assert "web page" in text
    assert f"expected  md5 {CONTENTVEC.md5} (189,507,909 bytes)" in text


def test_a_git_lfs_pointer_is_recognised(hubert_base: Path) -> None:
    hubert_base.write_text(
        "version https://git-lfs.github.com/spec/v1\n"
        f"oid sha256:{CONTENTVEC.sha256}\nsize 189507909\n"
    )
    text = refusal(hubert_base)
    assert "Git LFS pointer" in text and "git lfs pull" in text


def test_a_truncated_download_is_recognised_with_what_is_missing(
    hubert_base: Path, tiny_checkpoint: Path
) -> None:
    hubert_base.write_bytes(tiny_checkpoint.read_bytes()[:300_000])
    text = refusal(hubert_base)
    assert "cut short" in text
    assert "189,207,909 of the 189,507,909 bytes" in text


def test_an_empty_file_is_recognised(hubert_base: Path) -> None:
    hubert_base.touch()
    assert "empty" in refusal(hubert_base)


def test_a_damaged_file_of_the_right_size_is_recognised(hubert_base: Path) -> None:
    with hubert_base.open("wb") as stream:
        stream.write(b"PK\x03\x04")
        stream.truncate(189_507_909 - 22)
        stream.seek(0, os.SEEK_END)
        stream.write(b"PK\x05\x06".ljust(22, b"\0"))
    assert "its size is right and its bytes are not" in refusal(hubert_base)


def test_a_stand_in_is_refused_as_one(tmp_path: Path) -> None:
    path = tmp_path / "standin.pt"
    path.write_bytes(b"anything")
    text = str(stand_in_refused(identify(path), "synthetic weights, nothing learnt"))
    assert "is a stand-in" in text and "nothing learnt" in text and "--allow-unknown" in text


def test_who_waits_for_the_checksums_hears_of_their_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity_module, "_LOOK_EVERY", 60)
    path = tmp_path / "file"
    path.write_bytes(bytes(1000))
    begun = threading.Event()
    told: list[tuple[int, int]] = []

    def hold(done: int, total: int) -> None:
        begun.wait(30)

    def hear(done: int, total: int) -> None:
        told.append((done, total))
        begun.set()

    with Identification(path, progress=hold) as identification:
        identification.result(hear)
    assert (told[0][1], told[-1]) == (1000, (1000, 1000))
