"""The header of a safetensors file: a length, then JSON that says where each tensor lies.

Every byte behind the header belongs to exactly one tensor. ``mlx.core.load`` does not
ask for that: it reads tensors that share their bytes, and of two of one name the last.

Source of the layout: the "Format" section of safetensors' README, and
validate() in safetensors/src/tensor.rs.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from .files import open_regular
from .json_text import JSON_BYTES, JsonError, parse_object

#: what the header calls what it says of the whole file
METADATA = "__metadata__"
#: safetensors' dtype -> its name here, and bytes of one element
DTYPES: dict[str, tuple[str, int]] = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "C64": ("complex64", 8),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}
#: the header's own length, in front of it
LENGTH = struct.Struct("<Q")
#: dimensions of a tensor (numpy's own limit was 32 for long)
DIMENSIONS = 32

_FIELDS = {"dtype", "shape", "data_offsets"}
_CHARACTERS = 80


class HeaderError(ValueError):
    """What contradicts itself or the file, as a clause: "its header is too long"."""

    def __init__(self, problem: str, *, found: object = None, expected: str | None = None) -> None:
        super().__init__(problem)
        self.problem = problem
        self.found = None if found is None else _brief(found)
        self.expected = expected


class UnknownDtype(HeaderError):
    """A tensor of a dtype that has no name here."""


class Place(NamedTuple):
    """Where a tensor's bytes lie, counted from the end of the header."""

    begin: int
    end: int
    name: str
    #: a name of this project
    dtype: str
    shape: tuple[int, ...]


def looks_like_safetensors(head: bytes) -> bool:
    """Whether a file's first bytes are a header's length and the header's opening brace.

    The length is not compared with anything: a file cut short is still one.
    """
    return head[8:9] == b"{" and LENGTH.unpack(head[:8])[0] < 2**40


def check_file(path: Path) -> None:
    """Raise HeaderError unless a safetensors file is whole and says so without contradiction.

    A file that does not look like one is not looked at. Raises OSError.
    """
    with os.fdopen(open_regular(path), "rb") as file:
        head = file.read(LENGTH.size + 1)
        if not looks_like_safetensors(head):
            return
        length = LENGTH.unpack(head[: LENGTH.size])[0]
        require_length(length)
        file.seek(LENGTH.size)
        raw = file.read(length)
        size = os.fstat(file.fileno()).st_size
    if len(raw) < length:
        raise HeaderError(
            "it ends within its header",
            found=f"{size:,} bytes",
            expected=f"{LENGTH.size + length:,} bytes and the tensors",
        )
    try:
        header = parse_object(raw)
    except JsonError as error:
        raise HeaderError(f"its header cannot be read: {error}") from None
    metadata_of(header)
    places_of(header, LENGTH.size + length, size)


def require_length(length: int, most: int = JSON_BYTES) -> None:
    """Raise HeaderError for a header too long to be parsed."""
    if length > most:
        raise HeaderError(
            "its header is too long",
            found=f"{length:,} bytes",
            expected=f"at most {most:,}",
        )


def metadata_of(header: Mapping[str, Any]) -> dict[str, str]:
    """What a header says of the whole file. Raises HeaderError."""
    # mlx.core.save_safetensors writes null where there is none
    metadata = header.get(METADATA)
    if metadata is None:
        return {}
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise HeaderError("the metadata in its header are not strings")
    return metadata


def places_of(header: Mapping[str, Any], start: int, size: int) -> list[Place]:
    """Where every tensor of a header lies, in the order of their bytes.

    start: where the tensors begin in the file    size: bytes of the file

    Raises HeaderError if there is a byte that belongs to no tensor or to two;
    UnknownDtype for a dtype that has no name here.
    """
    placed = sorted(_place(name, entry) for name, entry in header.items() if name != METADATA)
    reached = 0
    for place in placed:
        if place.begin != reached:
            raise HeaderError(
                f"the tensor {_brief(place.name)} does not follow the one before it",
                found=f"it begins at {place.begin:,}",
                expected=f"{reached:,}",
            )
        reached = place.end
    if start + reached != size:
        missing = start + reached - size
        raise HeaderError(
            f"it lacks {missing:,} bytes at its end" if missing > 0 else "it goes on past its end",
            found=f"{size:,} bytes",
            expected=f"{start + reached:,}",
        )
    return placed


def _place(name: str, entry: Any) -> Place:
    """One entry of the header."""

    def refuse(what: str, found: object) -> HeaderError:
        return HeaderError(f"the tensor {_brief(name)} {what}", found=found)

    if type(entry) is not dict or set(entry) != _FIELDS:
        raise refuse("is not described by a dtype, a shape and its place", entry)
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPES:
        raise UnknownDtype(
            f"the tensor {_brief(name)} is of an unknown dtype",
            found=dtype,
            expected=", ".join(DTYPES),
        )
    if type(shape) is not list or not all(type(n) is int and n >= 0 for n in shape):
        raise refuse("has an impossible shape", shape)
    if len(shape) > DIMENSIONS:
        raise refuse("has too many axes", len(shape))
    if type(place) is not list or len(place) != 2 or not all(type(n) is int for n in place):
        raise refuse("has no place in the file", place)
    begin, end = place
    if not 0 <= begin <= end:
        raise refuse("has an impossible place in the file", place)
    ours, item = DTYPES[dtype]
    if prod(shape) * item != end - begin:
        raise refuse(f"of shape {_brief(shape)} does not take {end - begin:,} bytes", dtype)
    return Place(begin, end, name, ours, tuple(shape))


def _brief(value: object) -> str:
    """``value`` on one line of bounded length."""
    # cut first: a list out of a file may be long
    shown = str(value[: _CHARACTERS + 1] if isinstance(value, (str, list)) else value)
    return shown if len(shown) <= _CHARACTERS else f"{shown[: _CHARACTERS - 3]}..."
