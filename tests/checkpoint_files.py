"""Checkpoints written byte by byte, so that a test can make them wrong in exactly one place.

``assemble`` writes a pickle without importing or calling what it names;
``torch_zip`` and ``torch_legacy`` put it into torch's two containers;
``zip_archive`` writes an archive whose every header field can be overridden.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Name:
    """A global: ``module.name``."""

    module: str
    name: str


@dataclass(frozen=True)
class Call:
    """``module.name(*args)``, and the state that the result is given if there is one."""

    module: str
    name: str
    args: Any = ()
    state: Any = None
    opcode: bytes = b"R"


@dataclass(frozen=True)
class Persistent:
    """A reference to something outside the pickle."""

    identity: Any


@dataclass(frozen=True)
class Raw:
    """Instructions as they are."""

    code: bytes


def text(value: str) -> bytes:
    encoded = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def instructions(value: Any) -> bytes:
    """The pickle instructions (protocol 2) that leave ``value`` on the stack."""
    match value:
        case Raw():
            return value.code
        case Name():
            return f"c{value.module}\n{value.name}\n".encode()
        case Call():
            made = (
                instructions(Name(value.module, value.name))
                + instructions(value.args)
                + value.opcode
            )
            return made if value.state is None else made + instructions(value.state) + b"b"
        case Persistent():
            return instructions(value.identity) + b"Q"
        case None:
            return b"N"
        case bool():
            return b"\x88" if value else b"\x89"
        case int():
            raw = value.to_bytes((value.bit_length() + 8) // 8, "little", signed=True)
            return b"\x8a" + bytes([len(raw)]) + raw
        case float():
            return b"G" + struct.pack(">d", value)
        case str():
            return text(value)
        case bytes():
            return b"B" + struct.pack("<I", len(value)) + value
        case tuple():
            return b"(" + b"".join(map(instructions, value)) + b"t"
        case list():
            return b"](" + b"".join(map(instructions, value)) + b"e"
        case dict():
            pairs = (instructions(part) for pair in value.items() for part in pair)
            return b"}(" + b"".join(pairs) + b"u"
    raise TypeError(value)


def assemble(value: Any) -> bytes:
    return b"\x80\x02" + instructions(value) + b"."


def storage(kind: str = "FloatStorage", key: Any = "0", count: Any = 6) -> Persistent:
    return Persistent(("storage", Name("torch", kind), key, "cpu", count))


def tensor(
    shape: Any = (2, 3),
    strides: Any = (3, 1),
    offset: Any = 0,
    of: Any = None,
    function: str = "_rebuild_tensor_v2",
) -> Call:
    """A tensor, by default all 6 elements of the float32 storage "0"."""
    hooks = Call("collections", "OrderedDict")
    return Call(
        "torch._utils",
        function,
        (storage() if of is None else of, offset, shape, strides, False, hooks),
    )


#: the storage that ``tensor()`` refers to
SIX_FLOATS = struct.pack("<6f", *range(6))


@dataclass
class Entry:
    """One entry of a zip archive; ``local`` and ``central`` override fields of its headers."""

    name: str | bytes
    content: bytes = b""
    local: Mapping[str, int | bytes] = field(default_factory=dict)
    central: Mapping[str, int | bytes] = field(default_factory=dict)
    before: bytes = b""


_LOCAL = ("signature", "version", "flags", "method", "time", "date", "crc", "packed", "length")
_CENTRAL = ("signature", "made", *_LOCAL[1:])


def zip_archive(
    entries: Sequence[Entry],
    *,
    prefix: bytes = b"",
    suffix: bytes = b"",
    comment: bytes = b"",
    end: Mapping[str, int] | None = None,
    end64: Mapping[str, int] | None = None,
    locator: Mapping[str, int] | None = None,
) -> bytes:
    """A zip archive of stored entries, as given.

    ``end``, ``end64`` and ``locator`` override fields of the records at its
    end; with one of the last two it has the larger records of zip64 as well,
    as every file of torch's has.
    """
    body, table = bytearray(prefix), bytearray()
    for entry in entries:
        name = entry.name.encode() if isinstance(entry.name, str) else entry.name
        body += entry.before
        facts: dict[str, Any] = {
            "signature": b"PK\x03\x04", "made": 20, "version": 20, "flags": 0, "method": 0,
            "time": 0, "date": 0, "crc": zlib.crc32(entry.content), "packed": len(entry.content),
            "length": len(entry.content), "name": name, "extra": b"", "offset": len(body),
        }  # fmt: skip
        local = {**facts, **entry.local}
        central = {**facts, "signature": b"PK\x01\x02", **entry.central}
        body += struct.pack("<4s5H3I", *(local[key] for key in _LOCAL))
        body += struct.pack("<2H", len(local["name"]), len(local["extra"]))
        body += local["name"] + local["extra"] + entry.content
        table += struct.pack("<4s6H3I", *(central[key] for key in _CENTRAL))
        table += struct.pack("<5H", len(central["name"]), len(central["extra"]), 0, 0, 0)
        table += struct.pack("<2I", 0, central["offset"]) + central["name"] + central["extra"]
    facts = {
        "disk": 0, "start_disk": 0, "here": len(entries), "count": len(entries),
        "length": len(table), "start": len(body),
    }  # fmt: skip
    large = b""
    if end64 is not None or locator is not None:
        wide = {"size": 44, "made": 45, "version": 45, **facts, **(end64 or {})}
        place = {"disk": 0, "at": len(body) + len(table), "disks": 1, **(locator or {})}
        large = struct.pack("<4sQ2H2I4Q", b"PK\x06\x06", *wide.values())
        large += struct.pack("<4sIQI", b"PK\x06\x07", *place.values())
    small = {**facts, "comment": len(comment), **(end or {})}
    record = struct.pack("<4s4H2IH", b"PK\x05\x06", *small.values())
    return bytes(body + table + large + record + comment + suffix)


def torch_zip(pickle: bytes, storages: Mapping[str, bytes] | None = None, **options: Any) -> bytes:
    """A file as torch.save writes it: ``pickle`` and the bytes of each storage."""
    storages = {"0": SIX_FLOATS} if storages is None else storages
    entries = [Entry("archive/data.pkl", pickle)]
    entries += [Entry(f"archive/data/{key}", content) for key, content in storages.items()]
    return zip_archive([*entries, Entry("archive/version", b"3\n")], **options)


def torch_legacy(
    pickle: bytes, storages: Mapping[str, tuple[int, bytes]] | None = None, suffix: bytes = b""
) -> bytes:
    """A file as torch before 1.6 wrote it; a storage is its number of elements and its bytes."""
    storages = {"0": (6, SIX_FLOATS)} if storages is None else storages
    facts = {
        "protocol_version": 1001, "little_endian": True,
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }  # fmt: skip
    body = assemble(0x1950A86A20F9469CFC6C) + assemble(1001) + assemble(facts)
    body += pickle + assemble(list(storages))
    for count, content in storages.values():
        body += struct.pack("<q", count) + content
    return body + suffix


def safetensors(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def change_in_place(path: Path) -> None:
    """Flip bytes in the middle of a file and put its modification time back."""
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        old = file.read(64)
        file.seek(-64, os.SEEK_CUR)
        file.write(bytes(byte ^ 1 for byte in old))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_mtime_ns == times.st_mtime_ns
