"""Folders that appear complete or not at all, and what is never deleted for them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mlx_contentvec import folders
from mlx_contentvec.errors import OutputError
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
