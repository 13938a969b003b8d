"""A Hugging Face folder: config.json, and the weights in one file or in shards."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from mlx_contentvec.errors import CheckpointError, UnsupportedCheckpoint, name_list
from mlx_contentvec.files import is_file
from mlx_contentvec.json_text import JSON_BYTES

from . import limits
from .json_text import parse_object
from .source_file import SourceFile
from .tensors import brief

#: names under which transformers saves weights, in the order in which it looks for them
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
#: where those names are of several files: which tensor is in which of them
INDEX_FILES = tuple(f"{name}.index.json" for name in WEIGHT_FILES)
CONFIG_FILE = "config.json"


def folder_config(folder: Path) -> dict[str, Any] | None:
    """The folder's config.json, None if it has none. Raises CorruptCheckpoint if it is no JSON."""
    path = folder / CONFIG_FILE
    # a pipe or a dead link is not taken for a folder without one
    return _json(path) if os.path.lexists(path) else None


def folder_weights(folder: Path) -> tuple[tuple[Path, ...], dict[str, str] | None]:
    """The weight files of a folder, and for shards which tensor is in which file.

    Raises UnsupportedCheckpoint if there are none, CorruptCheckpoint if the
    index names files outside the folder.
    """
    for name, index in zip(WEIGHT_FILES, INDEX_FILES, strict=True):
        if is_file(folder / name):
            return (folder / name,), None
        if is_file(folder / index):
            return _shards(folder, index)
    try:
        present = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"cannot open {folder}: {error.strerror}") from error
    raise UnsupportedCheckpoint(
        f"{folder} has no weights that can be read",
        found=name_list(map(brief, present)) or "an empty folder",
        expected=name_list((*WEIGHT_FILES, *INDEX_FILES)),
        hint="to convert one file of the folder, name that file",
    )


def _shards(folder: Path, index: str) -> tuple[tuple[Path, ...], dict[str, str]]:
    weight_map = _weight_map(folder / index)
    names = list(dict.fromkeys(weight_map.values()))
    missing = [name for name in names if not is_file(folder / name)]
    if missing:
        raise UnsupportedCheckpoint(
            f"{folder} lacks weight files that {index} names",
            found=f"{len(names) - len(missing)} of {len(names)} files",
            expected=name_list(map(brief, missing)),
            hint="download the missing files into the folder",
        )
    return tuple(folder / name for name in names), weight_map


def shard_names(index: Path) -> list[str]:
    """The weight files that an index names, which stand beside it. Raises CorruptCheckpoint."""
    return list(dict.fromkeys(_weight_map(index).values()))


def _weight_map(index: Path) -> dict[str, str]:
    file = SourceFile(index)
    try:
        weight_map = _parsed(file).get("weight_map")
        if type(weight_map) is not dict or not weight_map:
            raise file.corrupt("it has no weight_map")
        for shard in weight_map.values():
            # a name, never a path: shards stand beside their index
            plain = isinstance(shard, str) and shard.isprintable() and shard not in ("", ".", "..")
            if not plain or "/" in shard or "\\" in shard:
                raise file.corrupt(
                    "it names a file outside its folder",
                    found=brief(shard),
                    expected="the plain name of a file beside it",
                )
            if shard in INDEX_FILES:
                raise file.corrupt(
                    "it names an index in the place of weights",
                    found=shard,
                    expected="files that hold tensors",
                )
        if len(set(weight_map.values())) > limits.SHARDS:
            raise file.corrupt("it names too many files", expected=f"at most {limits.SHARDS:,}")
        return weight_map
    finally:
        file.close()


def _json(path: Path) -> dict[str, Any]:
    file = SourceFile(path)
    try:
        return _parsed(file)
    finally:
        file.close()


def _parsed(file: SourceFile) -> dict[str, Any]:
    if file.size > file.budget.json_bytes:
        raise file.corrupt(
            "it is too large",
            found=f"{file.size:,} bytes",
            expected=f"at most {JSON_BYTES:,}",
        )
    return parse_object(file, file.read(0, file.size), "it")
