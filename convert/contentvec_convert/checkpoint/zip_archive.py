"""The table of contents of a zip archive, for archives that torch wrote.

Nothing is extracted or decompressed, and no entry's name is ever used as a
path. The archive must be exactly what it says: it starts at byte 0, ends with
the file, its two tables agree, and no two entries share a byte.

Source of the layout: PKWARE's APPNOTE 6.3.10, sections 4.3 to 4.5;
torch/csrc/serialize (caffe2/serialize/inline_container.cc) for what torch writes.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from . import limits
from .source_file import SourceFile
from .tensors import brief

LOCAL_SIGNATURE = b"PK\x03\x04"
_CENTRAL_SIGNATURE = b"PK\x01\x02"
_END_SIGNATURE = b"PK\x05\x06"
_END64_SIGNATURE = b"PK\x06\x06"
_LOCATOR64_SIGNATURE = b"PK\x06\x07"

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR64 = struct.Struct("<4sIQI")

_STORED = 0
_ENCRYPTED, _SIZES_FOLLOW = 0x1, 0x8
_IN_ZIP64_16, _IN_ZIP64_32 = 0xFFFF, 0xFFFFFFFF


@dataclass(frozen=True)
class ZipEntry:
    """One stored entry: where its bytes lie in the file, and the CRC-32 given for them."""

    name: str
    start: int
    length: int
    crc: int
    method: int


class ZipArchive:
    """The entries of ``file``, checked against each other and the file.

    Raises CorruptCheckpoint where the archive contradicts itself or the file,
    UnsupportedCheckpoint for compressed, encrypted or split archives.
    """

    def __init__(self, file: SourceFile) -> None:
        self.file = file
        entries_at, entries_length, count = self._end()
        if entries_length > limits.ZIP_TABLE_BYTES:
            raise file.corrupt(
                "its zip archive's table of contents is too long",
                found=f"{entries_length:,} bytes",
                expected=f"at most {limits.ZIP_TABLE_BYTES:,}",
            )
        table = file.read(entries_at, entries_length)
        self.entries: dict[str, ZipEntry] = {}
        spans: list[tuple[int, int, str]] = []
        position = 0
        for _ in range(count):
            position, entry, header_at = self._entry(table, position, entries_at)
            if entry.name in self.entries:
                raise file.corrupt(f"two entries are named {brief(entry.name)}")
            self.entries[entry.name] = entry
            spans.append((header_at, entry.start + entry.length, entry.name))
        if position != len(table):
            raise file.corrupt("its table of contents has more in it than entries")
        self._check_spans(spans)
        self.has_checksums = self._has_checksums()

    def _check_spans(self, spans: list[tuple[int, int, str]]) -> None:
        spans.sort()
        if spans and spans[0][0] != 0:
            raise self.file.corrupt(
                "something stands before the archive", found=f"{spans[0][0]:,} bytes"
            )
        for (_, end, name), (start, _, following) in pairwise(spans):
            if start < end:
                raise self.file.corrupt(f"the entries {brief(name)} and {brief(following)} overlap")

    def _has_checksums(self) -> bool:
        """False if the archive was written without: torch then stores 0 for every entry."""
        return any(entry.crc for entry in self.entries.values())

    def stored(self, name: str) -> ZipEntry | None:
        """The entry of that name, None if there is none. UnsupportedCheckpoint if compressed."""
        entry = self.entries.get(name)
        if entry is not None and entry.method != _STORED:
            raise self.file.unsupported(
                f"the entry {brief(name)} is compressed",
                found=f"zip method {entry.method}",
                expected="stored entries, as torch writes them",
                hint="somebody packed the file again: get the original, or load it with torch "
                "and save it with torch.save",
            )
        return entry

    def read(self, name: str, limit: int) -> bytes | None:
        """The bytes of an entry of at most ``limit`` bytes, their checksum compared.

        None if there is no such entry.
        """
        entry = self.stored(name)
        if entry is None:
            return None
        if entry.length > limit:
            raise self.file.corrupt(
                f"the entry {brief(name)} is too large",
                found=f"{entry.length:,} bytes",
                expected=f"at most {limit:,}",
            )
        content = self.file.read(entry.start, entry.length)
        if self.has_checksums and zlib.crc32(content) != entry.crc:
            raise self.file.corrupt(
                f"the entry {brief(name)} does not have the checksum that the archive gives for it",
                found=f"CRC-32 {zlib.crc32(content):08x}",
                expected=f"{entry.crc:08x}",
            )
        return content

    def _end(self) -> tuple[int, int, int]:
        """Where the table of contents starts, its length, and its number of entries."""
        file = self.file
        tail_at, tail, found = _find_end(file)
        if found < 0 or len(tail) - found < _END.size:
            raise file.corrupt(
                "it begins as a zip archive and does not end as one",
                found=f"{file.size:,} bytes",
                expected="more: the file was probably cut short",
            )
        end_at = tail_at + found
        _, disk, start_disk, here, count, length, start, comment = _END.unpack_from(tail, found)
        table_end = end_at
        locator_at = end_at - _LOCATOR64.size
        if locator_at >= 0 and file.read(locator_at, 4) == _LOCATOR64_SIGNATURE:
            _, end64_disk, end64_at, disks = _LOCATOR64.unpack(
                file.read(locator_at, _LOCATOR64.size)
            )
            # the record must stand right before its locator: there is only one place for it
            if end64_disk or disks > 1 or end64_at != locator_at - _END64.size:
                raise file.corrupt("the end of its zip archive contradicts itself")
            end64 = _END64.unpack(file.read(end64_at, _END64.size))
            if end64[0] != _END64_SIGNATURE or end64[1] != _END64.size - 12:
                raise file.corrupt("the end of its zip archive contradicts itself")
            small = (disk, start_disk, here, count, length, start)
            large = end64[4:10]
            for narrow, wide, unset in zip(
                small, large, (_IN_ZIP64_16,) * 4 + (_IN_ZIP64_32,) * 2, strict=True
            ):
                if narrow not in (wide, unset):
                    raise file.corrupt("the end of its zip archive contradicts itself")
            disk, start_disk, here, count, length, start = large
            table_end = end64_at
        if end_at + _END.size + comment != file.size:
            raise file.corrupt(
                "something follows the end of its zip archive",
                found=f"{file.size:,} bytes",
                expected=f"{end_at + _END.size + comment:,}",
            )
        if disk or start_disk or here != count:
            raise file.unsupported("it is one part of a split zip archive")
        file.budget.zip_entries -= count
        if file.budget.zip_entries < 0:
            raise file.corrupt(
                "its zip archive has too many entries",
                found=f"{count:,}",
                expected=f"at most {limits.ZIP_ENTRIES:,}",
            )
        if start + length != table_end:
            raise file.corrupt(
                "its zip archive's table of contents is not where it should be",
                found=f"{length:,} bytes at {start:,}",
                expected=f"an end at {table_end:,}",
            )
        return start, length, count

    def _entry(self, table: bytes, position: int, limit: int) -> tuple[int, ZipEntry, int]:
        """The entry at ``position`` of the table, whose bytes must end before ``limit``."""
        file = self.file
        if len(table) - position < _CENTRAL.size:
            raise file.corrupt("its zip archive's table of contents ends too early")
        (
            signature, _, _, flags, method, _, _, crc, packed, length,
            name_length, extra_length, comment_length, disk, _, _, header_at,
        ) = _CENTRAL.unpack_from(table, position)  # fmt: skip
        position += _CENTRAL.size
        raw_name = table[position : position + name_length]
        position += name_length
        extra = table[position : position + extra_length]
        position += extra_length + comment_length
        if signature != _CENTRAL_SIGNATURE or position > len(table):
            raise file.corrupt("its zip archive's table of contents is garbled")
        name = self._name(raw_name)
        length, packed, header_at = self._zip64(extra, name, length, packed, header_at)
        if flags & _ENCRYPTED:
            raise file.unsupported(f"the entry {brief(name)} is encrypted")
        if disk not in (0, _IN_ZIP64_16) or (method == _STORED and packed != length):
            raise file.corrupt(f"the entry {brief(name)} contradicts itself")
        if header_at + _LOCAL.size > limit:
            raise file.corrupt(f"the entry {brief(name)} lies outside the archive")
        start = self._data_start(name, raw_name, flags, method, crc, packed, length, header_at)
        if start + packed > limit:
            raise file.corrupt(
                f"the entry {brief(name)} claims more than the file holds",
                found=f"{packed:,} bytes at {start:,}",
                expected=f"an end before {limit:,}",
            )
        return position, ZipEntry(name, start, packed, crc, method), header_at

    def _data_start(
        self,
        name: str,
        raw_name: bytes,
        flags: int,
        method: int,
        crc: int,
        packed: int,
        length: int,
        header_at: int,
    ) -> int:
        """Where the entry's bytes begin, its second header compared with the first."""
        header: tuple[Any, ...] = _LOCAL.unpack(self.file.read(header_at, _LOCAL.size))
        signature, _, flags_, method_, _, _, crc_, packed_, length_, names, extras = header
        if signature != LOCAL_SIGNATURE:
            raise self.file.corrupt(f"there is no entry where {brief(name)} should begin")
        # a writer that streams leaves zeros here and repeats the numbers after the bytes
        unknown = (0,) if flags & _SIZES_FOLLOW else ()
        if (
            (flags_, method_, names) != (flags, method, len(raw_name))
            or crc_ not in (crc, *unknown)
            or packed_ not in (packed, _IN_ZIP64_32, *unknown)
            or length_ not in (length, _IN_ZIP64_32, *unknown)
            or self.file.read(header_at + _LOCAL.size, names) != raw_name
        ):
            raise self.file.corrupt(
                f"the two headers of the entry {brief(name)} contradict each other"
            )
        start: int = header_at + _LOCAL.size + names + extras
        return start

    def _name(self, raw: bytes) -> str:
        """The name, which is only ever a key here, and still must not look like a way out."""
        try:
            name = raw.decode("utf-8")
        except ValueError:
            name = ""
        strange = not name.isprintable() or "\\" in name
        if strange or any(part in ("", ".", "..") for part in name.split("/")):
            raise self.file.corrupt(
                "an entry of its zip archive has an impossible name", found=brief(name)
            )
        return name

    def _zip64(
        self, extra: bytes, name: str, length: int, packed: int, header_at: int
    ) -> tuple[int, int, int]:
        """The three numbers, those that did not fit taken from the zip64 extra field."""
        values = [length, packed, header_at]
        missing = [i for i, value in enumerate(values) if value == _IN_ZIP64_32]
        position = 0
        while missing and position + 4 <= len(extra):
            kind, size = struct.unpack_from("<2H", extra, position)
            position += 4
            if kind == 1 and size >= 8 * len(missing) and position + size <= len(extra):
                numbers = struct.unpack_from(f"<{len(missing)}Q", extra, position)
                for index, number in zip(missing, numbers, strict=True):
                    values[index] = number
                return values[0], values[1], values[2]
            position += size
        if missing:
            raise self.file.corrupt(f"the entry {brief(name)} lacks its size")
        return length, packed, header_at


def has_end(file: SourceFile) -> bool:
    """Whether a file has the record that ends every zip archive."""
    return _find_end(file)[2] >= 0


def _find_end(file: SourceFile) -> tuple[int, bytes, int]:
    """Where a file's last 64 KiB begin, these bytes, and the end record's place in them or -1.

    The record is the last thing in an archive but for a comment of at most 65,535 bytes.
    """
    length = min(file.size, _END.size + 0xFFFF)
    tail = file.read(file.size - length, length)
    return file.size - length, tail, tail.rfind(_END_SIGNATURE)
