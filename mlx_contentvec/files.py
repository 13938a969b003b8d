"""Files that appear complete or not at all, and the errors of the operating system in our words.

A file under construction bears a temporary name in the folder it is meant for.
It gets its own name when it is complete and flushed, in one step that either
has happened or has not. Nothing here needs more than the standard library.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind; leftovers then stay
    fcntl = None  # type: ignore[assignment]

from .errors import ContentvecError, OutputError, did_you_mean

_PREFIX, TEMPORARY_SUFFIX = ".mlx-contentvec-", ".partial"
#: no link at the path itself is followed, no pipe blocks, no child process inherits
_SAFE = (
    getattr(os, "O_NOFOLLOW", 0)
    | getattr(os, "O_NONBLOCK", 0)
    | getattr(os, "O_CLOEXEC", 0)
    | getattr(os, "O_BINARY", 0)
)
#: seconds to wait for another process that is just publishing into the same folder
_LOCK_SECONDS = 30.0

#: os.link cannot work here. macOS reports ENOTSUP (45) or EOPNOTSUPP (102) on
#: exFAT, whichever of the two this Python's errno module knows.
_NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOTSUP, 45, 102}

_HINTS = {
    errno.ENOSPC: "free some space there, or write to another folder with -o",
    errno.EDQUOT: "free some space there, or write to another folder with -o",
    errno.EFBIG: "the folder's file system or a limit of this session allows no file so large",
    errno.EROFS: "write to another folder with -o",
    errno.EACCES: "write to another folder with -o",
    errno.EPERM: "write to another folder with -o",
    errno.ENOENT: "make the folder first, or write to another one with -o",
    errno.ENOTDIR: "write to another folder with -o",
    errno.EISDIR: "a folder has that name: move it away, or write to another folder with -o",
    errno.EEXIST: "something else has that name: move it away, or write to another folder with -o",
    errno.ENAMETOOLONG: "give it a shorter name with -o",
}


def similar_name(missing: Path, others: Iterable[str] = ()) -> str | None:
    """A question that names the files beside ``missing``, or ``others``, which it may mean."""
    beside: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        beside = [str(missing.with_name(path.name)) for path in missing.parent.iterdir()]
    return did_you_mean(str(missing), [*others, *beside])


def cannot_write(path: Path, error: OSError) -> OutputError:
    """The operating system's refusal to write ``path`` as an OutputError."""
    return OutputError(
        f"cannot write {path}: {error.strerror or error}", hint=_HINTS.get(error.errno or 0)
    )


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn an OSError raised while writing ``path`` into one OutputError."""
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error) from error


def expand_home(name: str | Path) -> Path:
    """``name`` as a path, with ``~`` replaced by a home folder, where that is known."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def is_at(path: Path, descriptor: int) -> bool:
    """Whether ``path`` is still the name of what is open: another process may have moved it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:
        return False


def is_file(path: Path) -> bool:
    """Whether ``path`` is a regular file that can be seen; never an exception."""
    return _kind(path, stat.S_ISREG)


def is_there(path: Path) -> bool:
    """Whether anything that can be seen is at ``path``; never an exception."""
    return _kind(path, lambda _: True)


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a folder that can be seen; never an exception."""
    return _kind(path, stat.S_ISDIR)


def _kind(path: Path, is_kind: Callable[[int], bool]) -> bool:
    try:
        return is_kind(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def left_by_the_system(name: str) -> bool:
    """Whether Finder or Explorer keeps a file of this name in folders that it has shown.

    ``._name`` holds what a file system that is not Apple's cannot keep of ``name``.
    """
    return name in (".DS_Store", "Thumbs.db", "desktop.ini") or name.startswith("._")


def open_regular(path: Path) -> int:
    """A descriptor of the regular file at ``path``, open for reading.

    Links are followed. Nothing blocks: a pipe or a device is opened without
    waiting and refused. Raises OSError; ValueError for what is no regular file
    or no path at all.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a regular file")
    descriptor = os.open(path, os.O_RDONLY | (_SAFE & ~getattr(os, "O_NOFOLLOW", 0)))
    # what the path names may have been exchanged since it was looked at
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError("not a regular file")
    return descriptor


def read_regular(path: Path, most: int) -> bytes:
    """The first ``most`` bytes of the regular file at ``path``.

    Raises what :func:`open_regular` does.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(most)


#: size, time of modification, time of change of status, device, inode
FileState = tuple[int, int, int, int, int]


def file_state(path: Path) -> FileState:
    """What changes when a file does: size, times, device and inode.

    The time of the last change of status is among them, because a program that
    writes into a file can put the modification time back and not this one.
    Raises OSError; ValueError for what is no regular file or no path at all.
    """
    state = path.stat()
    if not stat.S_ISREG(state.st_mode):
        raise ValueError("not a regular file")
    return state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_dev, state.st_ino


def require_unchanged(states: Mapping[Path, FileState], kind: type[ContentvecError]) -> None:
    """Raise an error of ``kind`` if a file is no longer the one whose state was taken before."""
    for path, before in states.items():
        try:
            now = file_state(path)
        except (OSError, ValueError):
            now = None
        if now != before:
            raise changed(path, kind)


def changed(path: Path, kind: type[ContentvecError]) -> ContentvecError:
    """What to raise where a file is no longer the one that was read."""
    return kind(
        f"{path} changed while it was being read",
        hint="wait until nothing writes to it any more, then try again",
    )


def open_own(path: Path, flags: int = os.O_RDWR) -> int:
    """A descriptor of a file that is kept from run to run, made if it is not there.

    Nothing is written elsewhere through it: a link, a pipe, a device, or a
    second name of another file in its place is an OSError.
    """
    descriptor = os.open(path, flags | os.O_CREAT | _SAFE, 0o666)
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.EEXIST, "something else has its name", str(path))
    return descriptor


def lock_now(descriptor: int, *, share: bool = False) -> bool:
    """Lock a file for this process; False if another one holds it, True where locks lack.

    share: beside other processes that share it
    """
    if fcntl is not None:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if share else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # some network file systems have no locks
            pass
    return True


def read_at(descriptor: int, target: memoryview, offset: int) -> int:
    """Read at most ``len(target)`` bytes at ``offset`` into ``target``; how many there were.

    The descriptor's position is neither used nor moved, so threads can share it.
    """
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, [target], offset)
    piece = os.pread(descriptor, len(target), offset)
    target[: len(piece)] = piece
    return len(piece)


def sync(descriptor: int) -> None:
    """Have a file's bytes on the disk itself. Raises OSError."""
    # macOS: fsync leaves them in the drive's cache
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(descriptor, full)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY, 45, 102):
                raise
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Have the folder's names on the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_target(final: Path, *, force: bool, needed: int = 0) -> None:
    """Raise OutputError if a file cannot appear at ``final``: before any work is done.

    ``needed``: bytes that have to fit into its folder.
    """
    folder = final.parent
    with explained(final):
        if not folder.is_dir():
            problem = "is not a folder" if folder.exists() else "does not exist"
            raise OutputError(
                f"cannot write {final.name}: the folder {folder} {problem}",
                hint=_HINTS[errno.ENOENT],
            )
        if final.is_dir():
            raise OutputError(
                f"cannot write {final}: it is a folder", hint="name a file inside it with -o"
            )
        if os.path.lexists(final):
            if not force:
                raise OutputError(
                    f"{final} already exists", hint="--force replaces it, -o names another file"
                )
            if final.exists() and not is_file(final):
                raise OutputError(
                    f"cannot write {final}: it is a pipe or a device, not a file",
                    hint="name another file with -o",
                )
        space = shutil.disk_usage(folder)
    if space.total and space.free < needed:
        raise OutputError(
            f"cannot write {final.name}: the disk is too full",
            found=f"{space.free:,} bytes free in {folder}",
            expected=f"{needed:,} bytes",
            hint=_HINTS[errno.ENOSPC],
        )


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Keep other processes that use this lock from publishing into ``folder`` meanwhile.

    The lock is on the folder itself: it leaves no file behind, and ends with
    the process. Where the system has no such locks there is none. Raises
    OutputError if another process keeps it for long.
    """
    with contextlib.ExitStack() as stack:
        descriptor = -1
        if fcntl is not None:
            with contextlib.suppress(OSError):
                descriptor = os.open(folder, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
                stack.callback(os.close, descriptor)
        give_up = time.monotonic() + _LOCK_SECONDS
        while descriptor >= 0:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise OutputError(
                        f"another process keeps the folder {folder} locked",
                        hint="wait for it to end, or write to another folder with -o",
                    ) from None
                time.sleep(0.01)
            except OSError:  # some network file systems have no locks
                break
        yield


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Let Ctrl-C and a request to end wait for a few steps that belong together.

    Blocked in this thread alone, a signal would go to another, of a BLAS perhaps, and Python
    handles it here all the same: its handlers are put off instead. Only the main thread has
    and may change them; nothing interrupts the others.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: received.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
        if signal.getsignal(number) is not None
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for received_number in dict.fromkeys(received):
            signal.raise_signal(received_number)


class Draft:
    """A file on its way to ``final``: there is a temporary one until :meth:`rename`.

    A context manager: leaving the block removes the temporary file unless it
    was renamed, whatever ended the block. A process that is killed cannot do
    that; its leftover is removed by the next draft of the same name, which
    recognises it by its lock being free. ``clean=False`` spares reading the
    folder for that. Every method raises OutputError.
    """

    def __init__(self, final: Path, *, clean: bool = True) -> None:
        self.final = final
        self._clean = clean
        self._descriptor = -1
        self._temporary = final

    def __enter__(self) -> Draft:
        with explained(self.final):
            if self._clean:
                _remove_leftovers(self.final)
            while self._descriptor < 0:
                name = f"{temporary_prefix(self.final)}{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
                temporary = self.final.with_name(name)
                self._descriptor = os.open(
                    temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | _SAFE, 0o666
                )
                self._temporary = temporary
                if not self._lock():
                    os.close(self._descriptor)
                    self._descriptor = -1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._temporary != self.final:
            with contextlib.suppress(OSError):
                self._temporary.unlink()
        os.close(self._descriptor)

    def _lock(self) -> bool:
        """Mark the file as in use; False if another run took it for a leftover just before."""
        if fcntl is not None:
            with contextlib.suppress(OSError):  # some network file systems have no locks
                # waits for a run that is just looking whether this is a leftover
                fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        try:
            return os.path.samestat(self._temporary.stat(), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def open(self) -> BinaryIO:
        """The draft from its begin, for a library that reads or writes a file object."""
        with explained(self.final):
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            return os.fdopen(os.dup(self._descriptor), "r+b")

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Put ``data`` at ``offset``, all of it."""
        view = memoryview(data).cast("B")
        with explained(self.final):
            while view:
                count = os.pwrite(self._descriptor, view, offset)
                view, offset = view[count:], offset + count

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` (bytes) with what was written from ``offset`` on."""
        with explained(self.final):
            while target:
                count = read_at(self._descriptor, target, offset)
                if not count:
                    raise OutputError(
                        f"{self.final.name} came back shorter than it was written",
                        found=f"{offset:,} bytes",
                    )
                target, offset = target[count:], offset + count

    def sync(self) -> None:
        """Have everything written so far on the disk itself."""
        with explained(self.final):
            sync(self._descriptor)

    def require_kept(self) -> None:
        """Raise OutputError unless the temporary file is still the one that was written."""
        if not is_at(self._temporary, self._descriptor):
            raise OutputError(
                f"cannot write {self.final}",
                found=f"{self._temporary.name}, which was to become it, was moved, removed or "
                "replaced",
                hint="leave the folder and files that end in "
                f"{TEMPORARY_SUFFIX} alone until it is done",
            )

    def rename(self, *, force: bool) -> None:
        """Give the file its own name in one step; without ``force`` only if that name is free."""
        self.require_kept()
        with explained(self.final):
            place(self._temporary, self.final, force=force)
            self._temporary = self.final


def place(temporary: Path, final: Path, *, force: bool) -> None:
    """Rename a complete file of the same folder; without ``force`` only to a free name.

    Raises OutputError if the name is taken, OSError for what the system refuses.
    """
    if not force:
        try:
            os.link(temporary, final)
        except FileExistsError:
            raise appeared(final) from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # no second names here: look first, as closely before as can be
            if os.path.lexists(final):
                raise appeared(final) from None
        else:
            temporary.unlink()
            return
    temporary.replace(final)


def write_text(path: Path, text: str) -> None:
    """Put a text into the file ``path``, as :func:`write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Put ``content`` into the file ``path``, whole or not at all, replacing what is there.

    Raises OutputError, also where a folder, a pipe or a device has that name.
    """
    check_target(path, force=True)
    with Draft(path) as draft:
        draft.write(0, content)
        draft.sync()
        draft.rename(force=True)


def check_reports(reports: Iterable[Path], inputs: Iterable[Path]) -> None:
    """Raise OutputError if a report cannot be written where it should be: before it is made.

    It may replace an earlier one, but neither what it reports about nor another of ``reports``.

    inputs: files, and folders whose files are inputs
    """
    # unlike Path.resolve, realpath does not fail at a link to itself
    taken = {Path(os.path.realpath(path)): f"{path} is what it is made from" for path in inputs}
    for report in reports:
        check_target(report, force=True)
        place = Path(os.path.realpath(report))
        problem = taken.get(place)
        if problem is None and is_file(report):
            problem = next((taken[folder] for folder in place.parents if folder in taken), None)
        if problem is None and report.exists():
            problem = next((why for path, why in taken.items() if _same(path, place)), None)
        if problem is not None:
            raise OutputError(f"cannot write {report}: {problem}", hint="name another file")
        taken[place] = "another one goes there"


def _same(one: Path, other: Path) -> bool:
    with contextlib.suppress(OSError):
        return one.samefile(other)
    return False


def appeared(final: Path) -> OutputError:
    """What to raise where a name was free and is not any more."""
    return OutputError(
        f"{final} appeared while it was being written",
        hint="another process may be writing it; --force replaces it",
    )


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files that no process works on any more from ``folder`` and below."""
    for path in folder.rglob(f"{_PREFIX}*{TEMPORARY_SUFFIX}"):
        _remove_leftover(path)


def temporary_prefix(final: Path) -> str:
    """How the temporary names of ``final`` begin: short however long its own name is."""
    digest = hashlib.sha256(os.fsencode(final.name)).hexdigest()
    return f"{_PREFIX}{digest[:8]}-"


def is_leftover_name(name: str, final: Path) -> bool:
    """Whether ``name`` is a temporary name of ``final``."""
    return name.startswith(temporary_prefix(final)) and name.endswith(TEMPORARY_SUFFIX)


def is_temporary_name(name: str) -> bool:
    """Whether ``name`` is a temporary name of any file or folder."""
    return name.startswith(_PREFIX) and name.endswith(TEMPORARY_SUFFIX)


def _remove_leftovers(final: Path) -> None:
    """Remove temporary files of ``final`` that no process works on any more."""
    for path in final.parent.iterdir():
        if is_leftover_name(path.name, final):
            _remove_leftover(path)


def _remove_leftover(path: Path) -> None:
    if fcntl is None:
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | _SAFE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(descriptor)
