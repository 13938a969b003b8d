"""What a file is: size, MD5 and SHA-256 in one pass, held against the table of known files.

Only the standard library is imported, so that hashing can start before
anything else is ready; it runs on threads of its own, and OpenSSL's hash
functions let other threads run meanwhile.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_contentvec.errors import IdentityError
from mlx_contentvec.files import (
    FileState,
    file_state,
    is_file,
    open_regular,
    require_unchanged,
    similar_name,
)

from .known_files import KNOWN_FILES, KnownFile, known_as

#: called with the bytes hashed so far and the bytes there are
Hashed = Callable[[int, int], None]

#: large enough that a thread busy with Python delays hashing little
BLOCK_BYTES = 8 << 20
#: a checkpoint's weight files together: 189.5 MB in RVC's case, 12 GB in HuBERT XL's with Adam
#: state. What is larger is refused before it is hashed, which could take hours
FILE_BYTES = 64 << 30
#: seconds between two looks at how far hashing has come
_LOOK_EVERY = 0.1


@dataclass(frozen=True)
class FileIdentity:
    """One file's name, size in bytes, and checksums in lower-case hexadecimal."""

    name: str
    size: int
    md5: str
    sha256: str


@dataclass(frozen=True)
class Identity:
    """What a source is.

    ``size``, ``md5`` and ``sha256`` are those of the weight file; of several
    (a sharded model), those of their bytes one after the other. ``files``
    lists every file behind the source with its own.
    """

    name: str
    size: int
    md5: str
    sha256: str
    known: KnownFile | None
    files: tuple[FileIdentity, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; a source of several files lists them."""
        row: dict[str, Any] = {
            "name": self.name,
            "size": self.size,
            "md5": self.md5,
            "sha256": self.sha256,
            "known_as": self.known.key if self.known else None,
        }
        if [file.name for file in self.files] != [self.name]:
            row["files"] = [vars(file) for file in self.files]
        return row


def require_plausible_size(name: str, size: int) -> None:
    """Raise IdentityError for what is too large to be weights, before it is hashed or mapped."""
    if size > FILE_BYTES:
        raise IdentityError(
            f"{name} is larger than any checkpoint that is read here",
            found=f"{size:,} bytes",
            expected=f"at most {FILE_BYTES:,}",
        )


class Identification:
    """Hashes a source in the background; :meth:`result` waits for the answer.

    source: the file or folder, for its name.
    weights: the files that hold the tensors, in order; the source itself when it is a file.
    beside: further files of a folder that shape the result (``config.json``).
    since: states of the files before they were first read, where that was earlier.

    As a context manager it stops hashing when the block is left early. Raises
    IdentityError, from the constructor or from ``result``, if a file is not a
    regular file, cannot be read, or changes while it is read.
    """

    def __init__(
        self,
        source: Path,
        weights: Sequence[Path] | None = None,
        beside: Sequence[Path] = (),
        progress: Hashed | None = None,
        since: Mapping[Path, FileState] | None = None,
    ) -> None:
        self._source = source
        self._weights = tuple(weights if weights is not None else (source,))
        self._beside = tuple(beside)
        self._progress = progress
        self._stop = threading.Event()
        self._done = 0
        paths = (*self._weights, *self._beside)
        self._states = {path: (since or {}).get(path) or state_of(path) for path in paths}
        self.size = sum(self._states[path][0] for path in self._weights)
        require_plausible_size(str(source), self.size)
        self._outcome: Identity | BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="identity", daemon=True)
        self._thread.start()

    def __enter__(self) -> Identification:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def result(self, waiting: Hashed | None = None) -> Identity:
        """The identity; waits until every byte has been hashed.

        waiting: called now and then meanwhile, from this thread, with the bytes
        hashed so far and the bytes there are.
        """
        total = sum(state[0] for state in self._states.values())
        waited = False
        while waiting is not None and self._thread.is_alive():
            waiting(self._done, total)
            waited = True
            self._thread.join(_LOOK_EVERY)
        self._thread.join()
        if isinstance(self._outcome, Identity):
            if waiting is not None and waited:
                waiting(total, total)
            return self._outcome
        raise self._outcome or IdentityError(f"hashing {self._source.name} was stopped")

    def longest(self) -> Identity:
        """An identity that takes at least as many characters as the result will.

        For laying out a header before the checksums are known.
        """
        candidates = (
            row for row in KNOWN_FILES if row.verifiable and row.size in (None, self.size)
        )
        known = max(candidates, key=lambda row: len(row.key), default=None)
        files = tuple(
            FileIdentity(name_of(path), state[0], "0" * 32, "0" * 64)
            for path, state in self._states.items()
        )
        return Identity(name_of(self._source), self.size, "0" * 32, "0" * 64, known, files)

    def check_unchanged(self) -> None:
        """Raise IdentityError if a file is no longer the one that was hashed."""
        require_unchanged(self._states, IdentityError)

    def _run(self) -> None:
        try:
            self._outcome = self._hash()
        except BaseException as error:
            self._outcome = error

    def _hash(self) -> Identity:
        whole_md5 = hashlib.md5(usedforsecurity=False)
        whole_sha256 = hashlib.sha256()
        total, files = sum(state[0] for state in self._states.values()), []
        single = len(self._weights) == 1
        # no larger than the files: new memory is cleared, which for a small file takes longer
        # than to hash it
        length = max(1, min(BLOCK_BYTES, max(state[0] for state in self._states.values())))
        buffers = [memoryview(bytearray(length)) for _ in range(2)]
        with ThreadPoolExecutor(1, thread_name_prefix="sha256") as second:
            for path in (*self._weights, *self._beside):
                md5, sha256, size, turn = whole_md5, whole_sha256, 0, 0
                is_weight = path in self._weights
                if not (single and is_weight):
                    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
                also = not single and is_weight
                pending = None
                try:
                    with os.fdopen(open_regular(path), "rb", buffering=0) as stream:
                        while not self._stop.is_set():
                            # the other buffer may still be in the hands of the second thread
                            turn = 1 - turn
                            count = stream.readinto(buffers[turn])
                            if not count:
                                break
                            block = buffers[turn][:count]
                            if pending is not None:
                                pending.result()
                            pending = second.submit(sha256.update, block)
                            md5.update(block)
                            if also:
                                whole_md5.update(block)
                                whole_sha256.update(block)
                            size += count
                            self._done += count
                            if self._progress is not None:
                                self._progress(self._done, total)
                except (OSError, ValueError) as error:
                    reason = error.strerror if isinstance(error, OSError) else str(error)
                    raise IdentityError(f"cannot read {path}: {reason}") from error
                if pending is not None:
                    pending.result()
                if self._stop.is_set():
                    raise IdentityError(f"hashing {path.name} was stopped")
                files.append(FileIdentity(name_of(path), size, md5.hexdigest(), sha256.hexdigest()))
        self.check_unchanged()
        size = sum(file.size for file in files[: len(self._weights)])
        return Identity(
            name=name_of(self._source),
            size=size,
            md5=whole_md5.hexdigest(),
            sha256=whole_sha256.hexdigest(),
            known=known_as(size, whole_md5.hexdigest(), whole_sha256.hexdigest()),
            files=tuple(files),
        )


def name_of(path: Path) -> str:
    """A path's last part as text that can be stored and shown, whatever bytes it is made of."""
    return os.fsencode(path.name).decode("utf-8", "replace")


def identify(path: str | Path) -> Identity:
    """Size, MD5 and SHA-256 of one file, and which known file it is.

    Raises IdentityError if it is not a regular file or cannot be read.
    """
    with Identification(Path(path)) as identification:
        return identification.result()


def state_of(path: Path) -> FileState:
    """``files.file_state``. Raises IdentityError for what is no regular file."""
    try:
        return file_state(path)
    except FileNotFoundError as error:
        raise IdentityError(
            f"cannot read {path}: {error.strerror}", hint=similar_name(path)
        ) from error
    except OSError as error:
        raise IdentityError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise IdentityError(f"cannot read {path}: {error}", expected="a checkpoint file") from error


def folder_states(folder: Path) -> dict[Path, FileState]:
    """The state of every regular file of a folder."""
    try:
        return {path: state_of(path) for path in sorted(folder.iterdir()) if is_file(path)}
    except OSError as error:
        raise IdentityError(f"cannot read {folder}: {error.strerror}") from error


def is_known_size(size: int) -> bool:
    """Whether some known file has exactly this size, so that hashing is likely to confirm it."""
    return any(row.verifiable and row.size == size for row in KNOWN_FILES)
