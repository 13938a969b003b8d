"""Files that are opened, kept, locked and written: what is no file, and what is another's."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from click.testing import CliRunner

from mlx_contentvec import files
from mlx_contentvec.cli import main
from mlx_contentvec.errors import OutputError, WeightsError
from mlx_contentvec.files import (
    TEMPORARY_SUFFIX,
    Draft,
    cannot_write,
    check_reports,
    check_target,
    file_state,
    folder_lock,
    is_file,
    is_folder,
    is_temporary_name,
    left_by_the_system,
    lock_now,
    open_own,
    open_regular,
    place,
    remove_leftovers,
    require_unchanged,
    signals_held,
    sync,
    sync_folder,
    temporary_prefix,
    write_text,
)


def open_descriptors() -> int:
    """How many this process has, where the system tells; else 0."""
    listed = Path("/proc/self/fd")
    return len(list(listed.iterdir())) if listed.exists() else 0


def test_what_is_a_file_and_what_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "nowhere").symlink_to(tmp_path / "nothing")
    assert [is_file(tmp_path / n) for n in ("file", "link", "pipe", "nowhere", "")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert is_folder(tmp_path)
    assert not is_folder(tmp_path / "file")
    assert not is_file(Path("\0"))
    assert not is_folder(tmp_path / ("x" * 300))


def test_names_that_the_system_leaves() -> None:
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._a.wav"):
        assert left_by_the_system(name)
    for name in ("a.wav", ".a.wav", "_a.wav", "DS_Store"):
        assert not left_by_the_system(name)


def test_regular_files_are_opened_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "link"):
        with os.fdopen(open_regular(tmp_path / name), "rb") as file:
            assert file.read() == b"12"
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(ValueError, match="not a regular file"):
            open_regular(path)


@pytest.mark.parametrize("change", ["none", "content", "replaced", "removed", "a pipe"])
def test_a_file_that_changed_since_its_state_was_taken_is_named(
    tmp_path: Path, change: str
) -> None:
    path, other = tmp_path / "file", tmp_path / "other"
    for one in (path, other):
        one.write_bytes(b"12")
    states = {other: file_state(other), path: file_state(path)}
    if change == "none":
        require_unchanged(states, WeightsError)
        return
    stat = path.stat()
    if change == "content":  # as a program does that puts the modification time back
        path.write_bytes(b"21")
        while path.stat().st_ctime_ns == stat.st_ctime_ns:  # clocks of files have ticks
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    else:
        path.unlink()
    if change == "replaced":
        path.write_bytes(b"12")
    elif change == "a pipe":
        os.mkfifo(path)
    with pytest.raises(WeightsError, match=f"{path} changed while it was being read"):
        require_unchanged(states, WeightsError)


def test_only_a_regular_file_has_a_state(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/null")):
        with pytest.raises(ValueError, match="not a regular file"):
            file_state(path)
    with pytest.raises(FileNotFoundError):
        file_state(tmp_path / "nothing")


def test_what_is_no_regular_file_is_not_even_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(os, "open", None)
    with pytest.raises(ValueError, match="not a regular file"):
        open_regular(tmp_path / "pipe")


def test_the_systems_refusal_is_said_in_its_words_with_what_to_do() -> None:
    full = cannot_write(Path("x"), OSError(errno.ENOSPC, "No space left on device"))
    assert full.problem == "cannot write x: No space left on device"
    assert full.hint is not None
    assert "free some space" in full.hint
    other = cannot_write(Path("x"), OSError("a library's own"))
    assert (other.problem, other.hint) == ("cannot write x: a library's own", None)


def test_a_file_exchanged_for_a_pipe_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    real = os.open

    def exchanged(path: Path, flags: int) -> int:
        assert flags & os.O_NONBLOCK
        return real(tmp_path / "pipe", flags)

    monkeypatch.setattr(os, "open", exchanged)
    before = open_descriptors()
    with pytest.raises(ValueError, match="not a regular file"):
        open_regular(tmp_path / "file")
    assert open_descriptors() == before


def test_a_file_of_our_own_is_made_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "own"
    os.close(open_own(path))
    path.write_bytes(b"kept")
    os.close(open_own(path))
    assert path.read_bytes() == b"kept"
    (tmp_path / "second").hardlink_to(path)
    with pytest.raises(OSError, match="something else has its name"):
        open_own(path)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        open_own(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()
    os.mkfifo(tmp_path / "pipe")
    before = open_descriptors()
    with pytest.raises(OSError, match="something else has its name"):
        open_own(tmp_path / "pipe")
    assert open_descriptors() == before


def test_locks_are_exclusive_or_shared(tmp_path: Path) -> None:
    one, other = (open_own(tmp_path / "lock") for _ in range(2))
    assert lock_now(one)
    assert not lock_now(other)
    assert not lock_now(other, share=True)
    os.close(one)
    assert lock_now(other, share=True)
    third = open_own(tmp_path / "lock")
    assert lock_now(third, share=True)
    assert not lock_now(third)
    os.close(other)
    os.close(third)


def test_where_there_are_no_locks_work_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if files.fcntl is None:
        pytest.skip("this system has no such locks")

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    descriptor = open_own(tmp_path / "lock")
    assert lock_now(descriptor)
    os.close(descriptor)
    with folder_lock(tmp_path):
        write_text(tmp_path / "a", "1")
    assert (tmp_path / "a").read_text() == "1"


def hold(folder: Path, held: multiprocessing.synchronize.Event) -> None:
    with folder_lock(folder):
        held.set()
        signal.pause()


def test_another_process_that_holds_a_folder_is_waited_for_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_LOCK_SECONDS", 0.2)
    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold, args=(tmp_path, held), daemon=True)
    process.start()
    assert held.wait(30)
    with pytest.raises(OutputError, match="keeps the folder"), folder_lock(tmp_path):
        pass
    process.kill()
    process.join()
    with folder_lock(tmp_path):
        pass


def test_without_force_a_name_that_is_taken_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").write_text("new")
    (tmp_path / "old").write_text("old")
    with pytest.raises(OutputError, match="appeared"):
        place(tmp_path / "new", tmp_path / "old", force=False)

    def refused(code: int) -> None:
        def link(*_: object) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "link", link)

    refused(errno.EPERM)
    with pytest.raises(OutputError, match="appeared"):
        place(tmp_path / "new", tmp_path / "old", force=False)
    assert (tmp_path / "old").read_text() == "old"
    refused(errno.EIO)
    with pytest.raises(OSError, match=r"Input/output|I/O"):
        place(tmp_path / "new", tmp_path / "free", force=False)
    refused(errno.EPERM)
    place(tmp_path / "new", tmp_path / "free", force=False)
    assert (tmp_path / "free").read_text() == "new"
    place(tmp_path / "free", tmp_path / "old", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_text_is_written_whole_and_replaces_files_only(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "\u00e4")
    write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_bytes() == b"new"
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, said in (("folder", "it is a folder"), ("pipe", "a pipe or a device")):
        with pytest.raises(OutputError, match=said):
            write_text(tmp_path / name, "new")
    with pytest.raises(OutputError, match="does not exist"):
        write_text(tmp_path / "none" / "a", "new")
    with pytest.raises(OutputError, match="is not a folder"):
        write_text(tmp_path / "a" / "b", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder", "pipe"]


def test_a_text_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named_before = []
    monkeypatch.setattr(files, "sync", lambda _: named_before.append((tmp_path / "a").exists()))
    write_text(tmp_path / "a", "1")
    assert named_before == [False]


def test_names_that_are_ours_for_a_while_begin_and_end_as_ours() -> None:
    assert is_temporary_name(f".mlx-contentvec-00000000{TEMPORARY_SUFFIX}")
    for name in (".mlx-contentvec.jsonl", ".mlx-contentvec-a", f"a{TEMPORARY_SUFFIX}"):
        assert not is_temporary_name(name)


def test_a_link_to_nothing_is_something_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "nothing")
    with pytest.raises(OutputError, match="already exists"):
        check_target(tmp_path / "a", force=False)
    check_target(tmp_path / "a", force=True)


def test_leftovers_below_a_folder_are_removed_and_drafts_are_not(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    leftover = tmp_path / "deep" / ".mlx-contentvec-00000000-00000000.partial"
    leftover.write_text("")
    mine = tmp_path / ".mlx-contentvec.partial"
    mine.write_text("")
    before = open_descriptors()
    with Draft(tmp_path / "deep" / "a") as draft:
        draft.write(0, b"1")
        remove_leftovers(tmp_path)
        draft.rename(force=False)
    assert open_descriptors() == before
    assert not leftover.exists()
    assert (tmp_path / "deep" / "a").read_bytes() == b"1"
    assert mine.exists()


def test_what_the_system_refuses_to_flush_is_said_but_for_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if files.fcntl is None:
        pytest.skip("this system has no fcntl")
    calls: list[str] = []

    def full_sync(code: int) -> None:
        def refuse(*_: object) -> None:
            calls.append("full")
            if code:
                raise OSError(code, os.strerror(code))

        monkeypatch.setattr(files.fcntl, "fcntl", refuse)
        monkeypatch.setattr(files.fcntl, "F_FULLFSYNC", 51, raising=False)

    monkeypatch.setattr(os, "fsync", lambda _: calls.append("fsync"))
    for code, done in (
        (0, ["full"]),
        (errno.ENOTSUP, ["full", "fsync"]),
        (errno.EINVAL, ["full", "fsync"]),
        (45, ["full", "fsync"]),
    ):
        calls.clear()
        full_sync(code)
        sync(0)
        assert calls == done
    full_sync(errno.EIO)
    with pytest.raises(OSError):
        sync(0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_wait_for_steps_that_belong_together(number: signal.Signals) -> None:
    """Also one that the system gives to another thread, as it may."""
    done: list[str] = []

    def terminated(*_: object) -> None:
        done.append("terminated")
        raise KeyboardInterrupt

    before = signal.signal(number, terminated)
    ended = threading.Event()
    other = threading.Thread(target=ended.wait)
    other.start()
    try:
        assert other.ident is not None
        with pytest.raises(KeyboardInterrupt):
            with signals_held():
                signal.pthread_kill(other.ident, number)
                for _ in range(100):
                    time.sleep(0.001)
                done.append("inside")
            done.append("outside")
        assert done == ["inside", "terminated"]
        assert signal.getsignal(number) is terminated
    finally:
        ended.set()
        other.join()
        signal.signal(number, before)


def test_in_another_thread_signals_are_left_alone() -> None:
    with ThreadPoolExecutor(1) as pool, signals_held():
        assert pool.submit(_held_elsewhere).result(timeout=10) == signal.getsignal(signal.SIGINT)


def _held_elsewhere() -> object:
    with signals_held():
        return signal.getsignal(signal.SIGINT)


def test_the_names_in_a_folder_are_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor)))
    before = open_descriptors()
    sync_folder(tmp_path)
    assert [os.path.samestat(there, tmp_path.stat()) for there in flushed] == [True]
    assert open_descriptors() == before


@contextlib.contextmanager
def no_standard_input() -> Iterator[None]:
    kept = os.dup(0)
    os.close(0)
    try:
        yield
    finally:
        os.dup2(kept, 0)
        os.close(kept)


def test_a_process_without_standard_input_locks_and_writes_as_others(tmp_path: Path) -> None:
    other = os.open(tmp_path, os.O_RDONLY)
    with no_standard_input(), folder_lock(tmp_path):
        locked = not lock_now(other)
    os.close(other)
    with no_standard_input(), Draft(tmp_path / "a") as draft:
        drafts = list(tmp_path.iterdir())
        draft.write(0, b"1")
        draft.rename(force=False)
    assert (locked, len(drafts)) == (files.fcntl is not None, 1)
    assert (tmp_path / "a").read_bytes() == b"1"


def test_a_draft_that_was_taken_for_a_leftover_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [False, True]
    monkeypatch.setattr(Draft, "_lock", lambda _: answers.pop(0))
    before = open_descriptors()
    with Draft(tmp_path / "a") as draft:
        draft.write(0, b"1")
        draft.rename(force=False)
    assert answers == []
    assert (tmp_path / "a").read_bytes() == b"1"
    assert open_descriptors() == before


def test_a_draft_does_not_look_for_leftovers_where_it_is_told_not_to(tmp_path: Path) -> None:
    leftover = tmp_path / f"{temporary_prefix(tmp_path / 'a')}00000000{TEMPORARY_SUFFIX}"
    leftover.write_text("")
    with Draft(tmp_path / "a", clean=False):
        assert leftover.exists()
    with Draft(tmp_path / "a"):
        assert leftover.exists() == (files.fcntl is None)


def test_a_draft_is_opened_from_its_begin_each_time(tmp_path: Path) -> None:
    with Draft(tmp_path / "a") as draft:
        with draft.open() as file:
            file.write(b"12")
        with draft.open() as file:
            assert file.read() == b"12"


#: a path that the system does not even look for
LONG = "x" * 5_000


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", LONG],
        ["convert", LONG],
        ["export", LONG, "--to", "fairseq"],
        ["extract", LONG, "-w", "nothing.safetensors", "-o", "out"],
        ["extract", "a.wav", "-w", LONG, "-o", "out"],
        ["fetch", "contentvec", "-o", LONG],
        ["parity", LONG, LONG],
        ["parity", "nothing.safetensors", "--reference", LONG],
        ["parity", "judge", LONG],
        ["package", LONG, "out"],
        ["publish", LONG, "--repo-id", "a/b"],
        ["verify", LONG],
        [LONG],
    ],
    ids=lambda command: " ".join(command)[:40],
)
def test_a_name_too_long_for_the_system_is_an_error_like_others(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, command)
    assert done.exit_code in (1, 2)
    assert "rror: " in done.output
    assert "a fault in" not in done.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("report", "refused"),
    [
        ("new.html", None),
        ("earlier.html", None),
        ("folder/new.html", None),
        ("folder/weights.pt", "{root}/folder is what it is made from"),
        ("folder/deep/down.pt", "{root}/folder is what it is made from"),
        ("weights.pt", "{root}/weights.pt is what it is made from"),
        ("link.html", "{root}/weights.pt is what it is made from"),
        ("second.html", "{root}/weights.pt is what it is made from"),
        ("first.html", "another one goes there"),
        ("deep/../first.html", "another one goes there"),
        ("pipe", "it is a pipe or a device"),
        ("nowhere/new.html", "the folder {root}/nowhere does not exist"),
    ],
)
def test_a_report_replaces_nothing_but_an_earlier_report(
    tmp_path: Path, report: str, refused: str | None
) -> None:
    for folder in (tmp_path / "folder" / "deep", tmp_path / "deep"):
        folder.mkdir(parents=True)
    for name in ("weights.pt", "folder/weights.pt", "folder/deep/down.pt", "earlier.html"):
        (tmp_path / name).touch()
    (tmp_path / "link.html").symlink_to("weights.pt")
    os.link(tmp_path / "weights.pt", tmp_path / "second.html")
    os.mkfifo(tmp_path / "pipe")
    reports = [tmp_path / "first.html", tmp_path / report]
    inputs = [tmp_path / "weights.pt", tmp_path / "folder", tmp_path / "gone.pt"]
    if refused is None:
        check_reports(reports, inputs)
        return
    with pytest.raises(OutputError) as caught:
        check_reports(reports, inputs)
    assert refused.format(root=tmp_path) in str(caught.value)


def test_a_report_may_be_written_beside_an_input_that_links_to_itself(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    check_reports([tmp_path / "report"], [tmp_path / "loop"])
    with pytest.raises(OutputError, match="is what it is made from"):
        check_reports([tmp_path / "loop"], [tmp_path / "loop"])


def test_a_limit_of_threads_is_no_fault_of_the_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")  # as CPython does

    (tmp_path / "a.pt").write_bytes(b"anything")
    monkeypatch.setattr(threading.Thread, "start", start)
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "a.pt")])
    assert done.exit_code == 1
    assert "the system starts no further thread" in done.output
    assert "a fault in" not in done.output
