"""Folders, and files that libraries write by their path, that appear complete or not at all.

They are made in a hidden folder beside the place they are meant for. A folder
that is replaced is exchanged in one step where the system can do that (Linux,
macOS): whoever looks sees the old one or the new one, each whole.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from .files import (
    TEMPORARY_SUFFIX,
    appeared,
    explained,
    folder_lock,
    is_at,
    is_leftover_name,
    is_temporary_name,
    lock_now,
    place,
    sync,
    sync_folder,
    temporary_prefix,
)

#: inside the hidden folder: what was in the place, while it cannot be exchanged in one step
_REPLACED = ".replaced"

#: exchange two names: renameat2(2) of Linux, renamex_np(2) of macOS
_EXCHANGE = 2
_AT_FDCWD = -100
#: the file system or the kernel cannot exchange names
_CANNOT_EXCHANGE = {
    errno.ENOSYS,
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.EPERM,
    45,
    102,
}


class Room:
    """A hidden folder beside ``final`` in which it is made, gone when the block is left.

    is_own: whether a file of this name, in a folder at ``final``, is one that is made
            here, and may be removed with the folder

    A process that is killed leaves its room behind. The next one for the same
    ``final`` removes it, which it recognises by its lock being free. Raises OutputError.
    """

    def __init__(self, final: Path, *, is_own: Callable[[str], bool] = lambda _: True) -> None:
        self.final = final
        self._is_own = is_own
        self._descriptor = -1
        #: the hidden folder
        self.path = final

    def __enter__(self) -> Room:
        with explained(self.final):
            for path in self.final.parent.iterdir():
                if is_leftover_name(path.name, self.final):
                    self._remove_leftover(path)
            while self._descriptor < 0:
                name = f"{temporary_prefix(self.final)}{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
                self.path = self.final.with_name(name)
                self.path.mkdir()
                self._descriptor = self._locked(self.path)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._remove(self.path)
        os.close(self._descriptor)

    def publish(self, made: Path, *, force: bool, may_replace: Callable[[], None]) -> None:
        """Let what was made in the room, a file or a folder, appear at ``final`` in one step.

        may_replace: called where something is there already and ``force`` is given;
                     raises if that may not be replaced

        Raises OutputError, also if something is there and ``force`` is not given.
        """
        with explained(self.final):
            for path in (made, *(made.iterdir() if made.is_dir() else ())):
                if path.is_file():
                    _sync_file(path)
            if made.is_dir():
                sync_folder(made)
            with folder_lock(self.final.parent):
                there = os.path.lexists(self.final)
                if there and force:
                    may_replace()
                if not made.is_dir():
                    place(made, self.final, force=force)
                elif not there:
                    made.rename(self.final)
                elif not force:
                    raise appeared(self.final)
                elif not exchange(made, self.final):
                    self._replace(made)
                sync_folder(self.final.parent)

    def _replace(self, made: Path) -> None:
        """In two steps; a process that is killed in between has its room set right by the next."""
        aside = self.path / _REPLACED
        self.final.rename(aside)
        try:
            made.rename(self.final)
        except OSError:
            aside.rename(self.final)
            raise

    def _locked(self, path: Path) -> int:
        """A descriptor that holds the folder; -1 if another run took it for a leftover."""
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError:
            return -1
        if lock_now(descriptor) and is_at(path, descriptor):
            return descriptor
        os.close(descriptor)
        return -1

    def _remove_leftover(self, path: Path) -> None:
        if not path.is_dir() or path.is_symlink():
            return
        descriptor = self._locked(path)
        if descriptor < 0:
            return
        replaced = path / _REPLACED
        with contextlib.suppress(OSError):
            if replaced.is_dir() and not os.path.lexists(self.final):
                replaced.rename(self.final)
        self._remove(path)
        os.close(descriptor)

    def _remove(self, room: Path) -> None:
        """Remove a room and what is ours in it; what somebody put into a replaced folder stays."""
        with contextlib.suppress(OSError):
            for path in room.iterdir():
                if path.is_dir() and not path.is_symlink():
                    for inner in path.iterdir():
                        # a process may have been killed while it wrote a file of the folder
                        if self._is_own(inner.name) or is_temporary_name(inner.name):
                            with contextlib.suppress(OSError):
                                inner.unlink()
                    path.rmdir()
                else:
                    path.unlink()
            room.rmdir()


def exchange(one: Path, other: Path) -> bool:
    """Exchange what two names of one file system stand for, in one step; False if it cannot.

    Raises OSError for what the system refuses otherwise.
    """
    try:
        library = ctypes.CDLL(None, use_errno=True)
        names = (os.fsencode(one), os.fsencode(other))
        if sys.platform == "darwin":
            failed = library.renamex_np(*names, _EXCHANGE)
        else:
            failed = library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _EXCHANGE)
    except (AttributeError, OSError, TypeError):  # another system, or an older C library
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _sync_file(path: Path) -> None:
    # for reading: weights that are linked here may be write-protected
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)
