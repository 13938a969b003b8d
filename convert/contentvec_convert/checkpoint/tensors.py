"""A tensor as the file holds it: a name, a dtype, a shape, and a view on bytes not yet read."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from mlx_contentvec.errors import CorruptCheckpoint, UnsupportedCheckpoint
from mlx_contentvec.safetensors_header import DIMENSIONS

from .records import GlobalName, InertRecord
from .source_file import SourceFile

Array = npt.NDArray[Any]

#: dtype -> how numpy views its bytes. numpy has no bfloat16 and no float8: their bits stand in.
DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "float8_e4m3fn": np.dtype("u1"),
    "float8_e5m2": np.dtype("u1"),
    "float8_e4m3fnuz": np.dtype("u1"),
    "float8_e5m2fnuz": np.dtype("u1"),
    "complex64": np.dtype("<c8"),
    "complex128": np.dtype("<c16"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}

_NOT_REAL_NUMBERS = frozenset(name for name in DTYPES if name.startswith(("float8", "complex")))

_CHUNK = 1024 * 1024
#: elements whose bytes 63 bits can count, whatever the dtype: numpy makes no more, not even
#: of a tensor that another axis of length 0 leaves empty
_ELEMENTS = 2**59


@dataclass(eq=False)
class Storage:
    """The run of bytes in a file that one or more tensors view.

    ``checksum`` is the CRC-32 that the container stores for it, None if it stores none.
    """

    file: SourceFile
    start: int
    length: int
    checksum: int | None = None
    _matches: bool | None = None

    def matches_checksum(self) -> bool:
        """Whether the bytes have the stored CRC-32 (computed once; True if none is stored)."""
        if self._matches is None:
            crc, done = 0, 0
            buffer = bytearray(min(_CHUNK, self.length)) if self.checksum is not None else b""
            while buffer and done < self.length:
                piece = memoryview(buffer)[: self.length - done]
                self.file.read_into(self.start + done, piece)
                crc = zlib.crc32(piece, crc)
                done += len(piece)
            self._matches = self.checksum is None or crc == self.checksum
        return self._matches


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """One tensor of a checkpoint. Nothing of it is read before one of the methods is called.

    ``shape`` is the stored one (PyTorch order), ``dtype`` its PyTorch name.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    #: bytes from the start of the storage to element 0
    offset: int = field(repr=False)
    #: bytes from one element to the next, for each axis
    strides: tuple[int, ...] = field(repr=False)
    storage: Storage = field(repr=False)

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the elements take."""
        return self.size * DTYPES[self.dtype].itemsize

    def read(self) -> Array:
        """The elements as a contiguous array of its own, read from the file, not mapped.

        What is mapped ends the process when it is touched after the file was cut short.
        bfloat16 and float8 come as their bits (uint16, uint8).
        Raises CorruptCheckpoint if the file has become shorter since it was opened.
        """
        dtype = DTYPES[self.dtype]
        if self.size == 0:
            return np.zeros(self.shape, dtype)
        reach = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        span = np.empty(reach + dtype.itemsize, np.uint8)
        self.storage.file.read_into(self.storage.start + self.offset, span.data)
        # unlike ascontiguousarray this leaves a scalar without an axis
        return np.asarray(
            np.ndarray(self.shape, dtype, buffer=span.data, strides=self.strides), order="C"
        )

    def numbers(self) -> Array:
        """:meth:`read`, but bfloat16, which numpy lacks, as float32."""
        return self.float32() if self.dtype == "bfloat16" else self.read()

    def float32(self) -> Array:
        """The elements as contiguous float32.

        Exact for float16, bfloat16 and float32; float64 and wide integers are
        rounded to nearest. Raises UnsupportedCheckpoint for complex and float8.
        """
        return self._real("<f4")

    def float64(self) -> Array:
        """The elements as contiguous float64 (64-bit integers may round).

        Raises UnsupportedCheckpoint for complex and float8.
        """
        return self._real("<f8")

    def _real(self, dtype: str) -> Array:
        if self.dtype in _NOT_REAL_NUMBERS:
            raise UnsupportedCheckpoint(
                f"{self.storage.file.name}: the tensor {self.name} is of dtype {self.dtype}",
                expected="float16, bfloat16, float32, float64 or an integer type",
            )
        stored = self.read()
        if self.dtype == "bfloat16":
            # a bfloat16 is the upper half of a float32
            stored = (stored.astype("<u4") << np.uint32(16)).view("<f4")
        with np.errstate(over="ignore"):
            wide: Array = stored.astype(dtype, copy=False)
        return wide

    def verify(self) -> bool:
        """Compare the storage's bytes with the checksum that the container keeps for them.

        Returns True if they match, False if the container keeps none (torch's
        older format, safetensors). Reads the storage once, however many
        tensors share it. Raises CorruptCheckpoint if they differ.
        """
        if self.storage.checksum is None:
            return False
        if not self.storage.matches_checksum():
            raise self.storage.file.corrupt(
                f"the bytes of {self.name} do not have the checksum that the file gives for them",
                expected=f"CRC-32 {self.storage.checksum:08x}",
            )
        return True


@dataclass(frozen=True, eq=False, slots=True)
class TensorView:
    """A tensor as a pickle describes it: numbers that nobody has checked yet."""

    storage: Storage
    dtype: str
    offset: Any
    shape: Any
    strides: Any


def checked_tensor(name: str, view: TensorView) -> StoredTensor:
    """``view`` as a tensor that lies wholly within its storage.

    offset and strides are counted in elements. Raises CorruptCheckpoint, which
    names the tensor, for what is negative, not an integer, or reaches outside.
    """
    file = view.storage.file

    def refuse(what: str, *, found: str, expected: str | None = None) -> CorruptCheckpoint:
        return file.corrupt(f"the tensor {name} {what}", found=found, expected=expected)

    for label, numbers in (("shape", view.shape), ("strides", view.strides)):
        if not isinstance(numbers, (tuple, list)):
            raise refuse(f"has no {label}", found=brief(numbers))
        if len(numbers) > DIMENSIONS:
            raise refuse(
                "has too many axes", found=str(len(numbers)), expected=f"at most {DIMENSIONS}"
            )
        if not all(map(_is_count, numbers)):
            raise refuse(f"has impossible {label}", found=brief(numbers))
    if not _is_count(view.offset):
        raise refuse("has an impossible offset", found=brief(view.offset))
    shape, strides = tuple(view.shape), tuple(view.strides)
    if len(shape) != len(strides):
        raise refuse(
            "has as many strides as it has no axes",
            found=f"{len(shape)} axes, {len(strides)} strides",
        )
    itemsize = DTYPES[view.dtype].itemsize
    held = view.storage.length // itemsize
    if prod(n for n in shape if n) >= _ELEMENTS:
        raise refuse("has more elements than can be counted", found=f"shape {brief(shape)}")
    if any(stride >= _ELEMENTS for stride in strides):
        raise refuse("has impossible strides", found=brief(strides))
    count = prod(shape)
    reach = sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1 if count else 0
    if view.offset + reach > held:
        raise refuse(
            "reaches past the end of its storage",
            found=f"shape {brief(shape)}, strides {brief(strides)}, offset {view.offset}",
            expected=f"at most {held:,} elements",
        )
    if count > held:
        # an expanded tensor: a few stored bytes that claim any number of elements
        raise refuse(
            "has more elements than its storage",
            found=f"shape {brief(shape)}, strides {brief(strides)}",
            expected=f"at most {held:,} elements",
        )
    return StoredTensor(
        name,
        view.dtype,
        shape,
        view.offset * itemsize,
        tuple(stride * itemsize for stride in strides),
        view.storage,
    )


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def brief(value: object, length: int = 80) -> str:
    """``value`` on one line of ``length`` characters, whatever a hostile file made of it."""
    if isinstance(value, (tuple, list)):
        shown = ", ".join(
            type(part).__name__ if isinstance(part, (tuple, list)) else brief(part, length)
            for part in value[:8]
        )
        return _cut(f"({shown}{', ...' if len(value) > 8 else ''})", length)
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    if isinstance(value, str):
        # cut first: escaping a long text takes time and ten times its memory
        start = value[: length + 1]
        return _cut(
            start if start.isascii() and start.isprintable() else ascii(start)[1:-1], length
        )
    if isinstance(value, (GlobalName, InertRecord)):
        return _cut(f"{value.module}.{value.name}", length)
    return type(value).__name__


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 3]}..."
