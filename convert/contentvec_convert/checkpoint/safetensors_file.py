"""The tensors of a safetensors file, counted against the checkpoint's budget."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from math import prod

from mlx_contentvec.safetensors_header import (
    LENGTH,
    METADATA,
    HeaderError,
    UnknownDtype,
    metadata_of,
    places_of,
    require_length,
)

from . import limits
from .json_text import parse_object
from .source_file import SourceFile
from .state_dict import Contents, tensor_name
from .tensors import Storage, StoredTensor, TensorView, checked_tensor


def read_safetensors(file: SourceFile) -> Contents:
    """The tensors of a safetensors file, by their place in it, none of them read.

    Raises CorruptCheckpoint if the header contradicts itself or the file:
    every byte after the header must belong to exactly one tensor.
    Raises UnsupportedCheckpoint for a dtype that has no name here.
    """
    length = LENGTH.unpack(file.read(0, LENGTH.size))[0]
    with _explained(file):
        require_length(length, file.budget.json_bytes)
    header = parse_object(file, file.read(LENGTH.size, length), "its header")
    names = header.keys() - {METADATA}
    file.budget.tensors -= len(names)
    if file.budget.tensors < 0:
        raise file.corrupt("it has too many tensors", expected=f"at most {limits.TENSORS:,}")
    for name in names:
        tensor_name(file, name)
    start = LENGTH.size + length
    with _explained(file):
        metadata = metadata_of(header)
        placed = places_of(header, start, file.size)
    tensors: dict[str, StoredTensor] = {}
    for begin, end, name, dtype, shape in placed:
        strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        view = TensorView(Storage(file, start + begin, end - begin), dtype, 0, shape, strides)
        tensors[name] = checked_tensor(name, view)
    return Contents(tensors, {}, None, metadata)


@contextlib.contextmanager
def _explained(file: SourceFile) -> Iterator[None]:
    """Turn a HeaderError into one that names the file and says what to do."""
    try:
        yield
    except UnknownDtype as error:
        raise file.unsupported(error.problem, found=error.found, expected=error.expected) from None
    except HeaderError as error:
        raise file.corrupt(error.problem, found=error.found, expected=error.expected) from None
