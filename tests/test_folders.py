"""Folders that appear complete or not at all, and what is never deleted for them."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_contentvec import folders
from mlx_contentvec.errors import OutputError
from mlx_contentvec.files import Draft
from mlx_contentvec.folders import Room, exchange


def anything() -> None:
    """What is in the place may be replaced."""


def make(room: Room, **files: str) -> Path:
    made = room.path / "made"
    made.mkdir()
    for name, text in files.items():
        (made / name).write_text(text)
    return made


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def put(final: Path, *, force: bool = False, **files: str) -> None:
    with Room(final) as room:
        room.publish(make(room, **files), force=force, may_replace=anything)


@pytest.fixture(params=["in one step", "in two"])
def steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "in two":
        monkeypatch.setattr(folders, "exchange", lambda one, other: False)


@pytest.mark.usefixtures("steps")
def test_a_folder_appears_and_is_replaced_whole(tmp_path: Path) -> None:
    put(tmp_path / "f", a="1", b="2")
    assert contents(tmp_path / "f") == {"a": "1", "b": "2"}
    put(tmp_path / "f", force=True, c="3")
    assert contents(tmp_path / "f") == {"c": "3"}
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_what_can_be_exchanged_is_never_out_of_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_if_in_one_step(one: Path, other: Path) -> bool:
        other.rename(one.with_name("old"))
        one.rename(other)
        return True

    put(tmp_path / "f", a="1")
    monkeypatch.setattr(folders, "exchange", as_if_in_one_step)
    monkeypatch.setattr(Room, "_replace", lambda *_: pytest.fail("in two steps"))
    put(tmp_path / "f", force=True, b="2")
    assert contents(tmp_path / "f") == {"b": "2"}


def test_two_folders_change_names(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "is").write_text(name)
    if not exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange names")
    assert contents(tmp_path / "a") == {"is": "b"}
    assert contents(tmp_path / "b") == {"is": "a"}


def test_what_cannot_be_exchanged_says_why(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    try:
        exchanged = exchange(tmp_path / "a", tmp_path / "nothing")
    except FileNotFoundError:
        return
    assert not exchanged


def test_without_force_a_folder_that_is_there_stays(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    with pytest.raises(OutputError, match="appeared"):
        put(tmp_path / "f", a="1")
    assert contents(tmp_path / "f") == {}
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_what_may_not_be_replaced_is_asked_at_the_last_moment(tmp_path: Path) -> None:
    put(tmp_path / "f", a="1")

    def no() -> None:
        raise OutputError("no")

    with pytest.raises(OutputError, match="no"), Room(tmp_path / "f") as room:
        room.publish(make(room, b="2"), force=True, may_replace=no)
    assert contents(tmp_path / "f") == {"a": "1"}


@pytest.mark.usefixtures("steps")
def test_what_is_not_ours_in_a_replaced_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "mine").write_text("precious")
    with Room(tmp_path / "f", is_own=lambda name: name != "mine") as room:
        room.publish(make(room, b="2"), force=True, may_replace=anything)
    assert contents(tmp_path / "f") == {"b": "2"}
    (kept,) = tmp_path.rglob("mine")
    assert kept.read_text() == "precious"
    # nor is it taken for a leftover
    with Room(tmp_path / "f", is_own=lambda name: name != "mine"):
        assert kept.exists()


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), Room(tmp_path / "f") as room:
        make(room, a="1")
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_file_can_be_made_in_a_room_too(tmp_path: Path) -> None:
    final = tmp_path / "f.pt"

    def put_file(text: str, force: bool) -> None:
        with Room(final) as room:
            (room.path / "made").write_text(text)
            room.publish(room.path / "made", force=force, may_replace=anything)

    put_file("1", False)
    assert final.read_text() == "1"
    with pytest.raises(OutputError, match="appeared"):
        put_file("2", False)
    assert final.read_text() == "1"
    put_file("3", True)
    assert final.read_text() == "3"
    assert [path.name for path in tmp_path.iterdir()] == ["f.pt"]


def test_whether_it_may_be_replaced_is_asked_where_it_is_replaced_only(tmp_path: Path) -> None:
    asked: list[str] = []

    def put_folder(force: bool) -> None:
        with Room(tmp_path / "f") as room:
            made = make(room, a="1")
            room.publish(made, force=force, may_replace=lambda: asked.append("may I?"))

    put_folder(True)
    with pytest.raises(OutputError, match="appeared"):
        put_folder(False)
    assert asked == []
    put_folder(True)
    assert asked == ["may I?"]


@pytest.mark.parametrize("what", ["folder", "file"])
def test_all_of_it_is_on_the_disk_before_it_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    final = tmp_path / "f"
    synced: list[tuple[str, bool]] = []

    def note_file(descriptor: int) -> None:
        synced.append((Path(f"/proc/self/fd/{descriptor}").readlink().name, final.exists()))

    def note_folder(folder: Path) -> None:
        synced.append((folder.name, final.exists()))

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc (Linux)")
    monkeypatch.setattr(folders, "sync", note_file)
    monkeypatch.setattr(folders, "sync_folder", note_folder)
    with Room(final) as room:
        made = make(room, a="1", b="2")
        given = made if what == "folder" else made / "a"
        room.publish(given, force=False, may_replace=anything)
    inside = {("a", False), ("b", False), ("made", False)} if what == "folder" else {("a", False)}
    assert set(synced[:-1]) == inside
    assert synced[-1] == (tmp_path.name, True)


def test_a_write_protected_file_can_be_part_of_it(tmp_path: Path) -> None:
    with Room(tmp_path / "f") as room:
        made = make(room, a="1")
        (made / "a").chmod(0o444)
        room.publish(made, force=False, may_replace=anything)
    assert contents(tmp_path / "f") == {"a": "1"}


def test_files_are_flushed_without_being_opened_for_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, modes = os.open, []

    def noted(path: Path, flags: int, *more: int) -> int:
        modes.append(flags & os.O_ACCMODE)
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", noted)
    put(tmp_path / "f", a="1")
    assert set(modes) == {os.O_RDONLY}


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    listed = Path("/proc/self/fd")
    if not listed.exists():
        pytest.skip("needs /proc (Linux)")
    killed_in(tmp_path, lambda room: make(room, a="1"))
    with Room(tmp_path / "f"):
        before = len(list(listed.iterdir()))
        with Room(tmp_path / "f"):
            pass  # looks at the other's room, and leaves it alone
        assert len(list(listed.iterdir())) == before
    before = len(list(listed.iterdir()))
    put(tmp_path / "f", a="1")
    put(tmp_path / "f", force=True, b="2")
    killed_in(tmp_path, lambda room: make(room, a="1"))
    put(tmp_path / "f", force=True, b="2")
    assert len(list(listed.iterdir())) == before


def test_a_room_taken_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, given = folders.lock_now, []

    def lost_once(descriptor: int) -> bool:
        given.append(descriptor)
        return real(descriptor) if len(given) > 1 else False

    monkeypatch.setattr(folders, "lock_now", lost_once)
    put(tmp_path / "f", a="1")
    assert len(given) == 2
    assert contents(tmp_path / "f") == {"a": "1"}


@pytest.mark.parametrize("new", [{"a": "new"}, {}])
def test_what_was_replaced_stays_gone_where_the_new_one_is_there(
    tmp_path: Path, new: dict[str, str]
) -> None:
    def nearly_done(room: Room) -> None:
        (room.path / folders._REPLACED).mkdir()
        (room.path / folders._REPLACED / "a").write_text("old")
        (tmp_path / "f").mkdir()
        for name, text in new.items():
            (tmp_path / "f" / name).write_text(text)

    killed_in(tmp_path, nearly_done)
    with Room(tmp_path / "f"):
        assert contents(tmp_path / "f") == new
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_files_and_links_in_a_room_go_with_it(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("precious")
    with Room(tmp_path / "f") as room:
        (room.path / "half").write_text("1")
        (room.path / "link").symlink_to(elsewhere)
    assert (elsewhere / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, 45, 102])
def test_a_system_that_cannot_exchange_says_so_and_others_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    class Library:
        failed = -1

        def called(self, *_: object) -> int:
            return self.failed

    # that of the other system would not be there
    own = "renamex_np" if sys.platform == "darwin" else "renameat2"
    setattr(Library, own, Library.called)
    monkeypatch.setattr(folders.ctypes, "CDLL", lambda *_, **__: Library())
    monkeypatch.setattr(folders.ctypes, "get_errno", lambda: code)
    assert not exchange(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(folders.ctypes, "get_errno", lambda: errno.EIO)
    with pytest.raises(OSError, match="b"):
        exchange(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(Library, "failed", 0)
    assert exchange(tmp_path / "a", tmp_path / "b")
    monkeypatch.setattr(folders.ctypes, "CDLL", lambda *_, **__: object())
    assert not exchange(tmp_path / "a", tmp_path / "b")


def test_linux_exchanges_in_one_step(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("needs Linux")
    for name in "ab":
        (tmp_path / name).mkdir()
    before = (tmp_path / "a").stat().st_ino
    if exchange(tmp_path / "a", tmp_path / "b"):
        assert (tmp_path / "b").stat().st_ino == before


def killed_in(tmp_path: Path, code: Callable[[Room], object]) -> None:
    """Run ``code`` in a room of a process that ends as a kill ends it."""
    child = os.fork()
    if not child:
        try:
            with Room(tmp_path / "f") as room:
                code(room)
                os._exit(0)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    killed_in(tmp_path, lambda room: make(room, a="1"))
    assert len(list(tmp_path.iterdir())) == 1
    put(tmp_path / "f", b="2")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_file_that_a_killed_process_was_writing_goes_with_its_room(tmp_path: Path) -> None:
    def half_a_file(room: Room) -> None:
        made = make(room, a="1")
        with Draft(made / "b") as draft:
            draft.write(0, b"half")
            os._exit(0)

    killed_in(tmp_path, half_a_file)
    assert len(list(tmp_path.rglob("*.partial"))) == 2
    with Room(tmp_path / "f", is_own=lambda name: name in ("a", "b")):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_another_process_makes_is_left_alone(tmp_path: Path) -> None:
    with Room(tmp_path / "f") as room:
        made = make(room, a="1")
        put(tmp_path / "f", b="2")
        assert contents(made) == {"a": "1"}


def test_a_replacement_in_two_steps_that_was_killed_is_undone(tmp_path: Path) -> None:
    put(tmp_path / "f", a="1")

    def half(room: Room) -> None:
        make(room, b="2")
        (tmp_path / "f").rename(room.path / folders._REPLACED)

    killed_in(tmp_path, half)
    assert not (tmp_path / "f").exists()
    with Room(tmp_path / "f"):
        assert contents(tmp_path / "f") == {"a": "1"}


def test_a_replacement_in_two_steps_that_fails_is_undone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "f", a="1")
    monkeypatch.setattr(folders, "exchange", lambda one, other: False)
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name == "made":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="No space left"):
        put(tmp_path / "f", force=True, b="2")
    assert contents(tmp_path / "f") == {"a": "1"}


def test_a_link_with_the_name_of_a_leftover_is_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("precious")
    name = f"{folders.temporary_prefix(tmp_path / 'f')}12345678{folders.TEMPORARY_SUFFIX}"
    (tmp_path / name).symlink_to(elsewhere)
    put(tmp_path / "f", a="1")
    assert (elsewhere / "mine").exists()
