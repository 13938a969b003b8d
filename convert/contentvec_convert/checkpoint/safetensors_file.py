"""The safetensors format: a length, a JSON header, and the tensors without gaps.

Source of the layout: the "Format" section of safetensors' README, and
validate() in safetensors/src/tensor.rs.
"""

from __future__ import annotations

import struct
from math import prod
from typing import Any

from mlx_contentvec.json_text import JSON_BYTES

from . import limits
from .json_text import parse_object
from .source_file import DOWNLOAD_AGAIN, SourceFile
from .state_dict import Contents, tensor_name
from .tensors import DTYPES, Storage, StoredTensor, TensorView, brief, checked_tensor

#: safetensors' dtype -> ours
SAFETENSORS_DTYPES: dict[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_LENGTH = struct.Struct("<Q")
_FIELDS = {"dtype", "shape", "data_offsets"}


def looks_like_safetensors(head: bytes) -> bool:
    """Whether a file's first bytes are a header's length and the header's opening brace.

    The length is not compared with anything: a file cut short is still one.
    """
    return head[8:9] == b"{" and _LENGTH.unpack(head[:8])[0] < 2**40


def read_safetensors(file: SourceFile) -> Contents:
    """The tensors of a safetensors file, by their place in it, none of them read.

    Raises CorruptCheckpoint if the header contradicts itself or the file:
    every byte after the header must belong to exactly one tensor.
    Raises UnsupportedCheckpoint for a dtype that has no name here.
    """
    length = _LENGTH.unpack(file.read(0, _LENGTH.size))[0]
    if length > file.budget.json_bytes:
        raise file.corrupt(
            "its header is too long",
            found=f"{length:,} bytes",
            expected=f"at most {JSON_BYTES:,}",
        )
    header = parse_object(file, file.read(_LENGTH.size, length), "its header")
    # mlx.core.save_safetensors writes null where there is none
    stored = header.pop("__metadata__", None)
    metadata = {} if stored is None else _metadata(file, stored)
    file.budget.tensors -= len(header)
    if file.budget.tensors < 0:
        raise file.corrupt("it has too many tensors", expected=f"at most {limits.TENSORS:,}")
    start = _LENGTH.size + length
    placed = sorted(
        (_placed(file, name, entry) for name, entry in header.items()),
        key=lambda tensor: tensor[:2],
    )
    tensors: dict[str, StoredTensor] = {}
    reached = 0
    for begin, end, name, dtype, shape in placed:
        if begin != reached:
            raise file.corrupt(
                f"the tensor {brief(name)} does not follow the one before it",
                found=f"it begins at {begin:,}",
                expected=f"{reached:,}",
            )
        reached = end
        strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
        view = TensorView(Storage(file, start + begin, end - begin), dtype, 0, shape, strides)
        tensors[name] = checked_tensor(name, view)
    if start + reached != file.size:
        missing = start + reached - file.size
        raise file.corrupt(
            f"it lacks {missing:,} bytes at its end" if missing > 0 else "it goes on past its end",
            found=f"{file.size:,} bytes",
            expected=f"{start + reached:,}",
            hint=DOWNLOAD_AGAIN,
        )
    return Contents(tensors, {}, None, metadata)


def _placed(file: SourceFile, name: str, entry: Any) -> tuple[int, int, str, str, tuple[int, ...]]:
    """(begin, end, name, dtype, shape) of one entry of the header."""
    tensor_name(file, name)

    def refuse(what: str, found: object) -> Exception:
        return file.corrupt(f"the tensor {name} {what}", found=brief(found))

    if type(entry) is not dict or set(entry) != _FIELDS:
        raise refuse("is not described by a dtype, a shape and its place", entry)
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in SAFETENSORS_DTYPES:
        raise file.unsupported(
            f"the tensor {name} is of an unknown dtype",
            found=brief(dtype),
            expected=", ".join(SAFETENSORS_DTYPES),
        )
    if type(shape) is not list or not all(type(n) is int and n >= 0 for n in shape):
        raise refuse("has an impossible shape", shape)
    if len(shape) > limits.DIMENSIONS:
        raise refuse("has too many axes", len(shape))
    if type(place) is not list or len(place) != 2 or not all(type(n) is int for n in place):
        raise refuse("has no place in the file", place)
    begin, end = place
    if not 0 <= begin <= end:
        raise refuse("has an impossible place in the file", place)
    ours = SAFETENSORS_DTYPES[dtype]
    if prod(shape) * DTYPES[ours].itemsize != end - begin:
        raise refuse(f"of shape {brief(shape)} does not take {end - begin:,} bytes", dtype)
    return begin, end, name, ours, tuple(shape)


def _metadata(file: SourceFile, metadata: Any) -> dict[str, str]:
    if type(metadata) is not dict or not all(type(value) is str for value in metadata.values()):
        raise file.corrupt("the metadata in its header are not strings")
    return metadata
