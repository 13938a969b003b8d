"""What has been extracted: one line of JSON for every finished output, beside the outputs.

A line is on the disk before its output takes its final name, so an output that
is there is either as its line says, or broken, or not ours. Every process
writes a file of its own and reads all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any

from ..errors import OutputError, counted, name_list, printable
from ..files import (
    Draft,
    cannot_write,
    is_at,
    is_file,
    is_folder,
    is_there,
    lock_now,
    open_own,
    open_regular,
    remove_leftovers,
)
from ..json_text import JsonError, count_values, parse_object, require

NAME = "mlx-contentvec"
LOCK = f".{NAME}.lock"
Record = dict[str, Any]


class State(Enum):
    """Where one output stands before a run."""

    FINISHED = "finished"
    #: to be made: not there, broken, or its source has changed since
    PENDING = "pending"
    #: something else has this name: made from another file, with other settings, or not by us
    TAKEN = "taken"


@dataclass(frozen=True)
class OutputStatus:
    """The state of an output and, where it is taken, by what."""

    state: State
    reason: str = ""


class Manifest:
    """The records of a folder of outputs.

    folder: where the outputs are
    rank:   which of several processes this is; each appends to its own file
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.path = folder / (f".{NAME}.rank-{rank}.jsonl" if rank else f".{NAME}.jsonl")
        self._records: dict[str, list[Record]] = {}
        #: packed file -> the clips that it holds, once its checksum has been seen to be right
        self._packed: dict[str, dict[str, Record]] = {}
        #: clip -> the file that it was packed into
        self._pack_of: dict[str, str] = {}
        #: records of finished outputs, their sources as they are now
        self._found_again: list[Record] = []
        for path in sorted(folder.glob(f".{NAME}*.jsonl")):
            for record in _lines(path):
                self._note(record)

    def _note(self, record: Record) -> None:
        self._records.setdefault(record["output"], []).append(record)
        self._packed.pop(record["output"], None)
        for clip in record.get("clips", {}):
            self._pack_of[clip] = record["output"]

    def records(self, output: str) -> list[Record]:
        """What is known of ``output``, oldest first."""
        return self._records.get(output, [])

    def packed(self, output: str) -> dict[str, Record]:
        """The clips inside a packed file, by their own outputs; none if it is not as recorded."""
        if output not in self._packed:
            path = self.folder / output
            whole = (record for record in reversed(self.records(output)) if holds(path, record))
            self._packed[output] = next(whole, {}).get("clips", {})
        return self._packed[output]

    def status(self, output: str, source: Path, settings: Record) -> OutputStatus:
        """Whether ``output`` has to be made from ``source`` with ``settings``."""
        path = self.folder / output
        if not is_there(path):
            record = self.packed(self._pack_of.get(output, "")).get(output)
            made = record is not None and _source_of(record, source, settings) is not None
            return OutputStatus(State.FINISHED if made else State.PENDING)
        records = self.records(output)
        if not records:
            return OutputStatus(State.TAKEN, "it was there before and is not in the manifest")
        for record in reversed(records):  # the last one knows its source as it is now
            same = _source_of(record, source, settings)
            if same is not None and holds(path, record):
                if same != record["source"]:
                    self._found_again.append({**record, "source": same})
                return OutputStatus(State.FINISHED)
        latest = records[-1]
        if latest["source"]["path"] != str(source):
            return OutputStatus(State.TAKEN, f"it was made from {latest['source']['path']}")
        if latest["settings"] != settings:
            return OutputStatus(State.TAKEN, f"it was made with {_difference(latest, settings)}")
        return OutputStatus(State.PENDING)

    def note_found_again(self) -> None:
        """Record where finished sources lie now, and their times, so that none is read again.

        They had been moved, copied or touched, and were found to be the same by their content.
        """
        with contextlib.suppress(OutputError):  # it costs the next run time, nothing else
            self.add(*self._found_again)
        self._found_again.clear()

    def add(self, *records: Record) -> None:
        """Put records on the disk: when this returns, a power cut does not lose them.

        Raises OutputError if it cannot be written.
        """
        if not records:
            return
        lines = [json.dumps(record, sort_keys=True).encode() + b"\n" for record in records]
        for record, line in zip(records, lines, strict=True):
            if not _is_readable(line):
                raise OutputError(
                    f"{printable(record['output'])} cannot be listed in {self.path}",
                    found=f"a line of {len(line):,} bytes, {count_values(line):,} values at most",
                    expected=f"{_LINE_BYTES:,} bytes, {_LINE_VALUES:,} values",
                    hint="sort the audio into several folders, or leave --safetensors out",
                )
        try:
            with os.fdopen(open_own(self.path, os.O_WRONLY | os.O_APPEND), "ab") as file:
                # a line that a power cut tore must not swallow the first of these
                start = b"" if not file.tell() or _ends_a_line(self.path) else b"\n"
                file.write(start + b"".join(lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise cannot_write(self.path, error) from error
        for record in records:
            self._note(record)


def require_files(folder: Path, outputs: Iterable[str]) -> None:
    """Raise OutputError if a folder, a pipe or a device is where one of ``outputs`` goes."""
    places = {output: folder / output for output in outputs}
    others = [printable(o) for o, path in places.items() if is_there(path) and not is_file(path)]
    if others:
        raise OutputError(
            f"{counted(len(others), 'output')} in {folder} cannot be written",
            found=f"a folder, a pipe or a device at {name_list(others, limit=3)}",
            expected="files, or free names",
            hint="choose another folder, or move them away",
        )


def identity(path: Path) -> Record:
    """What a source file is known by. Where it lies and when it was written may change."""
    return {**_state(path), "crc32": checksum(path)}


def _state(path: Path) -> Record:
    stat = path.stat()
    return {
        "path": str(path),
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        # a program that writes into a file can put the other time back
        "ctime_ns": stat.st_ctime_ns,
    }


def holds(path: Path, record: Record) -> bool:
    """Whether a file has the size and the checksum that its record states."""
    try:
        return bool(path.stat().st_size == record["bytes"] and checksum(path) == record["crc32"])
    except OSError:
        return False


def checksum(path: Path) -> str:
    """CRC-32 of a file as eight hex digits, read in pieces."""
    value = 0
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        while piece := file.read(1 << 20):
            value = zlib.crc32(piece, value)
    return f"{value:08x}"


@contextlib.contextmanager
def prepared(path: Path, parts: Iterable[bytes | memoryview]) -> Iterator[tuple[Draft, Record]]:
    """Write ``parts`` to a temporary file beside ``path``; its ``rename`` gives it that name.

    The file is flushed to the disk and read back. Yields the draft with its
    ``bytes`` and ``crc32``.

    Raises OutputError if it cannot be written or does not read back.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    # a run removes what killed ones left, see locked()
    with Draft(path, clean=False) as draft:
        value = size = 0
        for part in parts:
            value = zlib.crc32(part, value)
            draft.write(size, part)
            size += memoryview(part).nbytes
        draft.sync()
        found, start = 0, 0
        buffer = bytearray(min(size, 1 << 20))
        while start < size:
            piece = memoryview(buffer)[: size - start]
            draft.read_into(start, piece)
            found = zlib.crc32(piece, found)
            start += len(piece)
        if found != value:
            raise OutputError(f"{path} does not read back as it was written")
        yield draft, {"bytes": size, "crc32": f"{value:08x}"}


@contextlib.contextmanager
def locked(folder: Path, shard: str | None = None) -> Iterator[None]:
    """Hold ``folder`` for this process; a killed process lets go of it.

    shard: a name of the part that this process does, held beside other processes' parts

    Raises OutputError if another process holds it.
    """
    if shard is None:
        with _held(folder, LOCK):
            remove_leftovers(folder)
            yield
    else:
        with _held(folder, LOCK, share=True), _held(folder, f".{NAME}.{shard}.lock"):
            remove_leftovers(folder)
            yield


@contextlib.contextmanager
def _held(folder: Path, name: str, *, share: bool = False) -> Iterator[None]:
    path = folder / name
    made = [p for p in (path, folder, *folder.parents) if not os.path.lexists(p)]
    with _lock_file(path, share) as file:
        try:
            yield
        except BaseException:
            # what refuses to begin leaves nothing, unless others share the lock
            if lock_now(file.fileno()):
                _remove_unused(folder, made)
            raise


def _lock_file(path: Path, share: bool) -> IO[bytes]:
    """The file at ``path``, locked. Raises OutputError if another process holds it."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = os.fdopen(open_own(path), "wb")
        except OSError as error:
            raise cannot_write(path.parent, error) from error
        free = lock_now(file.fileno(), share=share)
        # a run that was refused may just have taken it away
        if free and is_at(path, file.fileno()):
            return file
        file.close()
        if not free:
            raise OutputError(
                f"another extraction is writing to {path.parent}",
                hint="wait for it, or give this one another folder",
            )


def _remove_unused(folder: Path, made: Iterable[Path]) -> None:
    """Remove a lock, and the folders that were made for it, if nothing but locks is there."""
    with contextlib.suppress(OSError):
        names = [path.name for path in folder.iterdir()]
        if all(name.startswith(f".{NAME}.") and name.endswith(".lock") for name in names):
            for path in made:
                if is_folder(path):
                    path.rmdir()
                else:
                    path.unlink()


def ignores_case(folder: Path) -> bool:
    """Whether ``a`` and ``A`` are one file in a folder that is :func:`locked`."""
    return is_there(folder / LOCK.upper())


#: what every record has, and what those of single clips and of packed files have besides
_FORM = {"output": str, "settings": dict, "bytes": int, "crc32": str}
_CLIP = {
    **_FORM,
    "source": {"path": str, "bytes": int, "mtime_ns": int, "ctime_ns?": int, "crc32": str},
    "frames": int,
    "width": int,
}
_PACK = {**_FORM, "clips": {...: _CLIP}}
#: bytes and values of a line: a packed file's names each of its clips, 50 values for each
_LINE_BYTES, _LINE_VALUES = 1 << 27, 8_000_000


def _is_readable(line: bytes) -> bool:
    return len(line) <= _LINE_BYTES and count_values(line) <= _LINE_VALUES


def _lines(path: Path) -> Iterator[Record]:
    """The records of a file; what is none, such as a line torn by a power cut, is passed over."""
    try:
        file = os.fdopen(open_regular(path), "rb")
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{printable(str(path))} cannot be read: {getattr(error, 'strerror', None) or error}",
            hint="move it away: what it lists is made again with --force",
        ) from error
    with file:
        while line := file.readline(_LINE_BYTES):
            with contextlib.suppress(JsonError):
                record = parse_object(line, size=_LINE_BYTES, values=_LINE_VALUES, surrogates=True)
                require(record, _PACK if "clips" in record else _CLIP)
                yield record


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _source_of(record: Record, source: Path, settings: Record) -> Record | None:
    """``same_source`` of a record that was made with ``settings``."""
    return same_source(record["source"], source) if record["settings"] == settings else None


def same_source(recorded: Record, source: Path) -> Record | None:
    """What ``source`` is known by now, if it is, or by its content might be, the recorded file."""
    try:
        now = {**recorded, **_state(source)}
        # moved, copied or touched: its content decides
        same = now == recorded or (
            now["bytes"] == recorded["bytes"] and checksum(source) == recorded["crc32"]
        )
    except OSError:
        return None
    return now if same else None


def _difference(record: Record, settings: Record) -> str:
    keys = sorted(set(record["settings"]) | set(settings))
    return ", ".join(
        f"{key} {record['settings'].get(key)} (now {settings.get(key)})"
        for key in keys
        if record["settings"].get(key) != settings.get(key)
    )
