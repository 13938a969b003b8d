"""One safetensors file for each folder of clips, from features kept clip by clip until then.

While a run goes on every clip is a ``.npy`` under ``.parts``, so that whatever
is finished survives. At the end each folder's parts, and the clips that its
file holds already, go into one new file that takes the old one's place.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OutputError, counted, name_list, printable
from ..files import is_folder, is_there, open_regular
from ..json_text import JSON_BYTES, JsonError, parse_object, require
from .manifest import Manifest, Record, holds, prepared, require_files

PARTS = ".parts"
FILE = "features.safetensors"
_DTYPES = {"float32": "F32", "float16": "F16"}
_ALIGNMENT = 8
#: what a safetensors header calls what it says of the whole file
_METADATA = "__metadata__"


@dataclass(frozen=True)
class _Tensor:
    """Where the bytes of one clip's features lie."""

    file: Path
    offset: int
    size: int
    shape: tuple[int, ...]

    def data(self) -> Iterator[bytes]:
        with self.file.open("rb") as file:
            file.seek(self.offset)
            left = self.size
            while left and (piece := file.read(min(left, 1 << 20))):
                left -= len(piece)
                yield piece


def part_of(output: str) -> str:
    """Where the features of a clip are kept until its folder is packed."""
    return f"{PARTS}/{output}"


def pack_of(part: str) -> str:
    """The file that the clips of a folder go into."""
    folder = part.removeprefix(f"{PARTS}/").rpartition("/")[0]
    return f"{folder}/{FILE}" if folder else FILE


def check_packs(parts: list[str], manifest: Manifest, settings: Record, force: bool) -> None:
    """Raise OutputError if a file to be packed into is not of this run, unless ``force``.

    Also if one would hold more clips than its header may name, or a clip with a name that
    the header has for something else.
    """
    taken = []
    packs: dict[str, set[str]] = {}
    for part in parts:
        packs.setdefault(pack_of(part), set()).add(part)
    require_files(manifest.folder, packs)
    for pack, clips in sorted(packs.items()):
        records = manifest.records(pack)
        if is_there(manifest.folder / pack) and not force:
            if not records:
                taken.append(f"{pack}: it was there before and is not in the manifest")
            elif records[-1]["settings"] != settings:
                taken.append(f"{pack}: it was made with other settings")
        # what it holds already stays in it
        there = records[-1].get("clips", {}) if records else {}
        clips.update(part for part, clip in there.items() if clip["settings"] == settings)
        _require_header(manifest.folder / pack, clips, settings)
    if taken:
        raise OutputError(
            f"{counted(len(taken), 'file')} in {manifest.folder} "
            f"{'is' if len(taken) == 1 else 'are'} not of this run",
            found=name_list(taken, limit=3),
            hint="choose another folder, or replace them with --force",
        )


def _require_header(path: Path, parts: set[str], settings: Record) -> None:
    """Raise OutputError unless clips of these names fit into one file that can be read again."""
    for key in map(_key, parts):
        if key == _METADATA or key != key.encode("utf-8", "ignore").decode():
            raise OutputError(
                f"{printable(str(path))} cannot hold a clip called {printable(key)}",
                hint="give it another name, or leave --safetensors out",
            )
    longest = _Tensor(path, 0, 10**10, (10**8, 10**4))
    try:
        parse_object(_header(dict.fromkeys(parts, longest), settings))
    except JsonError as error:
        raise OutputError(
            f"{printable(str(path))} cannot hold so many clips",
            found=f"a header for {counted(len(parts), 'clip')}: {error}",
            hint="sort the audio into several folders, or leave --safetensors out",
        ) from error


def pack(parts: list[str], manifest: Manifest, settings: Record) -> list[str]:
    """Put the parts that are there into the files of their folders; returns those files.

    Raises OutputError if one cannot be written.
    """
    folders: dict[str, dict[str, Record]] = {}
    for part in parts:
        whole = (r for r in reversed(manifest.records(part)) if holds(manifest.folder / part, r))
        if record := next(whole, None):
            folders.setdefault(pack_of(part), {})[part] = record
    for target, present in folders.items():
        clips = {
            part: record
            for part, record in manifest.packed(target).items()
            if record["settings"] == settings
        }
        tensors = _in_pack(manifest.folder / target, clips) if clips else {}
        clips.update(present)
        for part, record in present.items():
            tensors[part] = _in_part(manifest.folder / part, record)
        path = manifest.folder / target
        with prepared(path, _file(tensors, settings)) as (draft, written):
            manifest.add({"output": target, "settings": settings, "clips": clips, **written})
            draft.rename(force=True)
        for part in present:
            (manifest.folder / part).unlink()
    _remove_empty(manifest.folder / PARTS)
    return list(folders)


def _key(part: str) -> str:
    return part.rpartition("/")[2].removesuffix(".npy")


def _in_part(path: Path, record: Record) -> _Tensor:
    shape = (record["frames"], record["width"])
    size = shape[0] * shape[1] * np.dtype(record["settings"]["dtype"]).itemsize
    return _Tensor(path, record["bytes"] - size, size, shape)


def _in_pack(path: Path, parts: Iterable[str]) -> dict[str, _Tensor]:
    """Where the features of clips lie in the file that they were packed into."""
    found: dict[str, _Tensor] = {}
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_object(file.read(min(length, JSON_BYTES + 1)))
        for part in parts:
            entry: Any = header.get(_key(part))
            require(entry, {"data_offsets": [int], "shape": [int]}, _key(part))
            start, stop = entry["data_offsets"]
            found[part] = _Tensor(path, 8 + length + start, stop - start, tuple(entry["shape"]))
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{printable(str(path))} is not a file of features", found=str(error)
        ) from error
    return found


def _file(tensors: dict[str, _Tensor], settings: Record) -> Iterator[bytes]:
    """A safetensors file, piece by piece: (frames, width) for each clip, by its name."""
    text = _header(tensors, settings)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in sorted(tensors.items()):
        yield from tensor.data()


def _header(tensors: dict[str, _Tensor], settings: Record) -> bytes:
    header: dict[str, Any] = {
        _METADATA: {"format": "mlx", "settings": json.dumps(settings, sort_keys=True)}
    }
    offset = 0
    for part, tensor in sorted(tensors.items()):
        header[_key(part)] = {
            "dtype": _DTYPES[settings["dtype"]],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.size],
        }
        offset += tensor.size
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % _ALIGNMENT)


def _remove_empty(folder: Path) -> None:
    folders = sorted((path for path in folder.rglob("*") if is_folder(path)), reverse=True)
    for path in [*folders, folder]:
        with contextlib.suppress(OSError):
            path.rmdir()
