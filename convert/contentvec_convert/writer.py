"""Safetensors written by ourselves: header first, then data at known places, then the name.

A file under construction bears a temporary name in the folder it is meant for.
It gets its own name when it is complete, flushed and re-read, in one step that
either has happened or has not. Source of the format:
github.com/huggingface/safetensors, README, "Format".
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ImportError:  # Windows has no advisory locks of this kind; leftovers then stay
    fcntl = None  # type: ignore[assignment]

from mlx_contentvec.errors import OutputError

from .checkpoint.source_file import read_at
from .precision import STORED_BYTES

_SUFFIX = ".partial"

_HINTS = {
    errno.ENOSPC: "free some space there, or write to another folder with -o",
    errno.EDQUOT: "free some space there, or write to another folder with -o",
    errno.EFBIG: "the folder's file system or a limit of this session allows no file so large",
    errno.EROFS: "write to another folder with -o",
    errno.EACCES: "write to another folder with -o",
    errno.EPERM: "write to another folder with -o",
    errno.ENOENT: "make the folder first, or write to another one with -o",
    errno.ENOTDIR: "write to another folder with -o",
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a safetensors file: its dtype there ("F32"), and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that its elements take."""
        return prod(self.shape) * STORED_BYTES[self.dtype]


@dataclass(frozen=True)
class Layout:
    """Where everything lies in a safetensors file.

    ``starts`` are offsets from the start of the file. Tensors lie without gaps,
    wide elements first and then by name, so that each is aligned to its size.
    """

    entries: tuple[Entry, ...]
    starts: dict[str, int]
    header_bytes: int
    size: int


def lay_out(entries: Sequence[Entry], metadata: dict[str, str]) -> Layout:
    """The layout of a file with these tensors and this metadata."""
    ordered = tuple(sorted(entries, key=lambda e: (-STORED_BYTES[e.dtype], e.name)))
    header_bytes = len(_header(ordered, metadata))
    starts, position = {}, header_bytes
    for entry in ordered:
        starts[entry.name] = position
        position += entry.nbytes
    return Layout(ordered, starts, header_bytes, position)


def header(layout: Layout, metadata: dict[str, str]) -> bytes:
    """The head of the file, its length field included, padded to the length laid out.

    OutputError if ``metadata`` needs more room than the one laid out with.
    """
    data = _header(layout.entries, metadata)
    if len(data) > layout.header_bytes:
        raise OutputError(
            "the header grew after the data had been placed",
            found=f"{len(data)} bytes",
            expected=f"at most {layout.header_bytes} bytes",
        )
    body = data[8:].ljust(layout.header_bytes - 8)
    return len(body).to_bytes(8, "little") + body


def _header(ordered: Sequence[Entry], metadata: dict[str, str]) -> bytes:
    fields: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    position = 0
    for entry in ordered:
        end = position + entry.nbytes
        fields[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [position, end],
        }
        position = end
    body = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    # data begins at a multiple of 8, which the format asks for
    body = body.ljust(-(-len(body) // 8) * 8)
    return len(body).to_bytes(8, "little") + body


def check_target(final: Path, *, force: bool, needed: int = 0) -> None:
    """Raise OutputError if a file cannot appear at ``final``: before any work is done.

    ``needed``: bytes that have to fit into its folder.
    """
    folder = final.parent
    with _explained(final):
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
        if os.path.lexists(final) and not force:
            raise OutputError(
                f"{final} already exists", hint="--force replaces it, -o names another file"
            )
        space = shutil.disk_usage(folder)
    if space.total and space.free < needed:
        raise OutputError(
            f"cannot write {final.name}: the disk is too full",
            found=f"{space.free:,} bytes free in {folder}",
            expected=f"{needed:,} bytes",
            hint=_HINTS[errno.ENOSPC],
        )


class Draft:
    """A file on its way to ``final``: there is a temporary one until :func:`publish`.

    A context manager: leaving the block removes the temporary file unless it
    was published, whatever ended the block. A process that is killed cannot do
    that; its leftover is removed by the next draft of the same name, which
    knows it by its lock being free. Every method raises OutputError.
    """

    def __init__(self, final: Path) -> None:
        self.final = final
        self._descriptor = -1
        self._temporary = final

    def __enter__(self) -> Draft:
        with _explained(self.final):
            _remove_leftovers(self.final)
            while self._descriptor < 0:
                name = f".{self.final.name}.{secrets.token_hex(4)}{_SUFFIX}"
                self._temporary = self.final.with_name(name)
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
                self._descriptor = os.open(self._temporary, flags, 0o666)
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

    def write(self, offset: int, data: memoryview | bytes) -> None:
        """Put ``data`` at ``offset``, all of it."""
        view = memoryview(data).cast("B")
        with _explained(self.final):
            while view:
                count = os.pwrite(self._descriptor, view, offset)
                view, offset = view[count:], offset + count

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` (bytes) with what was written from ``offset`` on."""
        with _explained(self.final):
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
        with _explained(self.final):
            os.fsync(self._descriptor)

    def rename(self, *, force: bool) -> None:
        """Give the file its own name in one step; without ``force`` only if that name is free."""
        with _explained(self.final):
            if not force and self._link():
                self._temporary.unlink()
            else:
                self._temporary.replace(self.final)
            self._temporary = self.final

    def _link(self) -> bool:
        """Add the final name, if it is free; False if the file system has no second names."""
        try:
            os.link(self._temporary, self.final)
        except FileExistsError:
            raise OutputError(
                f"{self.final} appeared while it was being written",
                hint="another conversion may be at work; --force replaces it",
            ) from None
        except OSError as error:
            if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                return False
            raise
        return True


def publish(output: Draft, ledger: Draft, *, force: bool) -> None:
    """Let an output and its ledger appear under their names.

    An older ledger goes first and the new one comes last. Whenever this is
    interrupted there is an output without a ledger, or one with its own: never
    one beside the ledger of another file.
    """
    output.sync()
    ledger.sync()
    with _explained(ledger.final):
        ledger.final.unlink(missing_ok=True)
    _sync_folder(ledger.final.parent)
    output.rename(force=force)
    _sync_folder(output.final.parent)
    ledger.rename(force=True)
    _sync_folder(ledger.final.parent)


def _sync_folder(folder: Path) -> None:
    """Have the folder's names on the disk, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _remove_leftovers(final: Path) -> None:
    """Remove temporary files of ``final`` that no process works on any more."""
    if fcntl is None:
        return
    prefix = f".{final.name}."
    for path in final.parent.iterdir():
        if not (path.name.startswith(prefix) and path.name.endswith(_SUFFIX)):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            finally:
                os.close(descriptor)


@contextlib.contextmanager
def _explained(final: Path) -> Iterator[None]:
    """Turn the operating system's refusal into one OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {final}: {error.strerror or error}",
            hint=_HINTS.get(error.errno or 0),
        ) from error
