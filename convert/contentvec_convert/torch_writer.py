"""Write the file that ``torch.save`` writes, without torch.

A torch file is an uncompressed zip: ``data.pkl`` says what there is and refers
to the tensors' bytes, which lie in ``data/0``, ``data/1`` and so on. The few
pickle instructions that this takes are written out here, so that the result
depends on its content alone: no class is imported, no time stamp is kept.

Source: torch/serialization.py, ``_save``; torch/_utils.py, ``_rebuild_tensor_v2``.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np

#: dtype of the array -> torch's name for a storage of it
STORAGES = {
    "float16": "HalfStorage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "int64": "LongStorage",
}

#: the earliest time a zip can hold
_NO_TIME = (1980, 1, 1, 0, 0, 0)


def write_torch_file(stream: IO[bytes], state: Mapping[str, Any]) -> None:
    """Write ``state`` to ``stream`` as ``torch.save(state, stream)`` would.

    state: None, bool, int, float, str, lists, tuples, dicts and numpy arrays,
    nested; arrays become tensors on the CPU, each with a storage of its own.

    Raises TypeError for anything else.
    """
    arrays: list[np.ndarray] = []
    pickled = b"".join(
        (pickle.PROTO, b"\x02", *_pickled(state, arrays), pickle.STOP),
    )
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        # torch reads the version record before it reads anything else
        for name, content in (
            ("data.pkl", pickled),
            ("byteorder", b"little"),
            ("version", b"3\n"),
        ):
            archive.writestr(_member(name), content)
        for i, array in enumerate(arrays):
            with archive.open(_member(f"data/{i}"), "w", force_zip64=True) as member:
                member.write(array.reshape(-1).view(np.uint8).data)


def _member(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(f"archive/{name}", _NO_TIME)


def _pickled(value: Any, arrays: list[np.ndarray]) -> Iterator[bytes]:
    """Pickle instructions (protocol 2) that make ``value``; its arrays are added to ``arrays``."""
    if value is None:
        yield pickle.NONE
    elif isinstance(value, bool):
        yield pickle.NEWTRUE if value else pickle.NEWFALSE
    elif isinstance(value, int):
        size = value.bit_length() // 8 + 1
        yield pickle.LONG1 + bytes([size]) + value.to_bytes(size, "little", signed=True)
    elif isinstance(value, float):
        yield pickle.BINFLOAT + struct.pack(">d", value)
    elif isinstance(value, str):
        text = value.encode()
        yield pickle.BINUNICODE + struct.pack("<I", len(text)) + text
    elif isinstance(value, list):
        yield pickle.EMPTY_LIST + pickle.MARK
        for item in value:
            yield from _pickled(item, arrays)
        yield pickle.APPENDS
    elif isinstance(value, tuple):
        yield pickle.MARK
        for item in value:
            yield from _pickled(item, arrays)
        yield pickle.TUPLE
    elif isinstance(value, Mapping):
        yield pickle.EMPTY_DICT + pickle.MARK
        for key, item in value.items():
            yield from _pickled(key, arrays)
            yield from _pickled(item, arrays)
        yield pickle.SETITEMS
    elif isinstance(value, np.ndarray):
        yield from _pickled_tensor(value, arrays)
    else:
        raise TypeError(f"cannot be written to a torch file: {type(value).__name__}")


def _pickled_tensor(array: np.ndarray, arrays: list[np.ndarray]) -> Iterator[bytes]:
    """``_rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())``."""
    # ascontiguousarray would make a vector of a number
    array = array if array.flags.c_contiguous else array.copy()
    strides = tuple(stride // array.itemsize for stride in array.strides)
    yield _named("torch._utils", "_rebuild_tensor_v2") + pickle.MARK
    yield pickle.MARK
    yield from _pickled("storage", arrays)
    yield _named("torch", STORAGES[array.dtype.name])
    yield from _pickled(str(len(arrays)), arrays)
    yield from _pickled("cpu", arrays)
    yield from _pickled(array.size, arrays)
    yield pickle.TUPLE + pickle.BINPERSID
    for argument in (0, tuple(array.shape), strides, False):
        yield from _pickled(argument, arrays)
    yield _named("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE
    yield pickle.TUPLE + pickle.REDUCE
    arrays.append(array)


def _named(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()
