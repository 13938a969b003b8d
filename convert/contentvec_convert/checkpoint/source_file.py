"""One regular file, read at offsets or mapped, that knows how to say what is wrong with it."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

from mlx_contentvec.errors import CheckpointError, CorruptCheckpoint, UnsupportedCheckpoint
from mlx_contentvec.files import open_regular, read_at

from .limits import Budget

_CHUNK = 1024 * 1024

DOWNLOAD_AGAIN = (
    "download the file again, and compare its size and checksum with those its publisher gives"
)


class SourceFile:
    """A file opened for reading, with a descriptor of its own.

    Raises CheckpointError if there is no such file, it is not a regular file
    (a pipe or a device could block or never end) or it may not be read.
    """

    def __init__(self, path: Path, budget: Budget | None = None) -> None:
        self.path = path
        #: what reading may cost, shared by the files of one checkpoint
        self.budget = budget or Budget()
        try:
            self._descriptor = open_regular(path)
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror}") from error
        except ValueError as error:
            raise CheckpointError(
                f"cannot open {path}: {error}",
                expected="a regular file, or a folder in the Hugging Face layout",
            ) from error
        self._map: mmap.mmap | None = None
        self._open = True
        self.size = os.fstat(self._descriptor).st_size

    @property
    def name(self) -> str:
        """The file's name without its folder, for messages."""
        return self.path.name

    def corrupt(
        self,
        what: str,
        *,
        found: str | None = None,
        expected: str | None = None,
        hint: str = DOWNLOAD_AGAIN,
    ) -> CorruptCheckpoint:
        """The error that says this file is damaged, to be raised by the caller."""
        return CorruptCheckpoint(
            f"{self.name} is damaged: {what}", found=found, expected=expected, hint=hint
        )

    def unsupported(
        self,
        what: str,
        *,
        found: str | None = None,
        expected: str | None = None,
        hint: str | None = None,
    ) -> UnsupportedCheckpoint:
        """The error that says this file is not one that can be read, to be raised by the caller."""
        return UnsupportedCheckpoint(
            f"{self.name}: {what}", found=found, expected=expected, hint=hint
        )

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill ``target`` (bytes) with what the file holds from ``offset`` on.

        Raises CorruptCheckpoint if the file ends before that.
        """
        self._require_open()
        done = 0
        while done < len(target):
            try:
                count = read_at(self._descriptor, target[done : done + _CHUNK], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from error
            if not count:
                raise self._ends_early(offset + done, offset + len(target))
            done += count

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes from ``offset`` on; CorruptCheckpoint if the file ends before that."""
        if offset + length > self.size:
            raise self._ends_early(self.size, offset + length)
        buffer = bytearray(length)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def head(self, length: int) -> bytes:
        """The first ``length`` bytes, or fewer if the file is shorter."""
        return self.read(0, min(length, self.size))

    def mapped(self) -> mmap.mmap:
        """The whole file mapped read-only; made on first use. The file must not be empty.

        Raises CorruptCheckpoint if the file has become shorter since it was opened.
        """
        self._require_open()
        if self._map is None:
            try:
                self._map = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"cannot map {self.path} into memory: {error}") from error
        if len(self._map) < self.size:
            raise self._ends_early(len(self._map), self.size)
        return self._map

    def close(self) -> None:
        """Give the descriptor back."""
        if not self._open:
            return
        self._open = False
        os.close(self._descriptor)
        self._map = None

    def _ends_early(self, size: int, needed: int) -> CorruptCheckpoint:
        return self.corrupt(
            "it ends in the middle of its data",
            found=f"{size:,} bytes",
            expected=f"at least {needed:,} bytes",
        )

    def _require_open(self) -> None:
        if not self._open:
            raise CheckpointError(f"{self.path} has been closed")
