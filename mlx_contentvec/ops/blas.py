"""Products of matrices in numpy's memory, by an OpenBLAS called in place.

Two things that a product by MLX or numpy does not give: a part of a matrix is
read where it lies, so that a long sum in short runs costs no copies; and each
product runs on the thread that asks for it, so that whatever follows it can
too, while no thread of OpenBLAS's own waits in a loop for the next.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backend import OPENBLAS, stated_threads

Matrix = npt.NDArray[np.float32]

_ROW_MAJOR, _AS_IT_IS, _TRANSPOSED = 101, 111, 112
_PTHREADS = 1


class _OpenBlas:
    """What is used of an OpenBLAS; its names may have a prefix and a suffix, as numpy's have."""

    def __init__(self, library: ctypes.CDLL, prefix: str, suffix: str) -> None:
        self.plain = not prefix + suffix
        integer = ctypes.c_int64 if suffix.startswith("64") else ctypes.c_int
        self.sgemm = getattr(library, f"{prefix}cblas_sgemm{suffix}")
        self.get_parallel = getattr(library, f"{prefix}openblas_get_parallel{suffix}")
        self.get_threads = getattr(library, f"{prefix}openblas_get_num_threads{suffix}")
        self.set_threads = getattr(library, f"{prefix}openblas_set_num_threads{suffix}")
        choice, number, place = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
        matrix = (place, integer)
        self.sgemm.argtypes = (
            *(choice, choice, choice, integer, integer, integer),
            *(number, *matrix, *matrix, number, *matrix),
        )
        self.sgemm.restype = None
        self.get_parallel.argtypes, self.get_parallel.restype = (), ctypes.c_int
        self.get_threads.argtypes, self.get_threads.restype = (), ctypes.c_int
        self.set_threads.argtypes, self.set_threads.restype = (ctypes.c_int,), None

    def may_be_shared(self) -> bool:
        """Whether several threads may call it at once, and each call can be kept on its own.

        One built without threads need not be safe to call from several, and one
        built with OpenMP goes by that for how many a call takes.
        Source: OpenBLAS, ``openblas_get_parallel``.
        """
        return bool(self.get_parallel() == _PTHREADS)


@functools.cache
def _openblas() -> _OpenBlas | None:
    """The OpenBLAS in front of MLX, else the one that numpy's wheel brings, else None."""
    candidates = [] if OPENBLAS is None else [(OPENBLAS, "", "")]
    for brought in _brought_by_numpy(Path(np.__file__).parent):
        # the names in the wheels of numpy 2 and numpy 1
        candidates += [(str(brought), "scipy_", "64_"), (str(brought), "", "64_")]
    for path, prefix, suffix in candidates:
        with contextlib.suppress(OSError, AttributeError):
            blas = _OpenBlas(ctypes.CDLL(path), prefix, suffix)
            if blas.may_be_shared():
                return blas
    return None


def _brought_by_numpy(numpy: Path) -> list[Path]:
    """The OpenBLAS in numpy's wheel: beside the package on Linux, inside it on a Mac."""
    return sorted([*numpy.parent.glob("numpy.libs/*openblas*"), *numpy.glob(".dylibs/*openblas*")])


def name() -> str:
    """Whose products these are: OpenBLAS's file, or "numpy" for that of numpy's wheel or build."""
    blas = _openblas()
    return OPENBLAS if OPENBLAS is not None and blas is not None and blas.plain else "numpy"


_borrowing = threading.Lock()
_borrowers = 0
#: while there are borrowers: how many threads they have, and OpenBLAS had
_lent = _kept = 1


def threads() -> int:
    """How many threads work on the CPU: as many as OpenBLAS would take for a product."""
    with _borrowing:
        return _lent if _borrowers else _stated()


def _stated() -> int:
    blas = _openblas()
    if blas is not None:
        count: int = blas.get_threads()
        return count
    return stated_threads()


@contextlib.contextmanager
def own_threads() -> Iterator[int]:
    """Have each product stay on the thread that asks for it; gives how many threads to use."""
    global _borrowers, _lent, _kept
    blas = _openblas()
    with _borrowing:
        if not _borrowers:
            _lent, _kept = _stated(), blas.get_threads() if blas is not None else 1
            if blas is not None and _kept > 1:
                blas.set_threads(1)
        _borrowers += 1
    try:
        yield _lent
    finally:
        with _borrowing:
            _borrowers -= 1
            if not _borrowers and blas is not None and _kept > 1:
                blas.set_threads(_kept)


def multiply(
    a: Matrix, b: Matrix, out: Matrix, *, factor: float = 1.0, add: bool = False, k_block: int = 0
) -> None:
    """``out = factor * a @ b``, or added to ``out``; ``k_block`` inputs summed in a row, or all.

    a: (rows, inputs)    b: (inputs, outputs)    out: (rows, outputs), its rows contiguous;
    of a and b, rows or columns are

    Raises ValueError if they do not fit together: the library would read what is beside them.
    """
    inputs = a.shape[1]
    if b.shape[0] != inputs or out.shape != (a.shape[0], b.shape[1]):
        raise ValueError(f"no product: {a.shape} and {b.shape} to {out.shape}")
    if not a.dtype == b.dtype == out.dtype == np.float32:
        raise ValueError(f"not float32: {a.dtype}, {b.dtype}, {out.dtype}")
    k_block = k_block or inputs
    blas = _openblas()
    if blas is None:
        for start in range(0, inputs, k_block):
            with quiet_product():
                product = a[:, start : start + k_block] @ b[start : start + k_block]
            product *= np.float32(factor)
            np.add(out, product, out=out) if add or start else np.copyto(out, product)
        return
    rows, outputs = out.shape
    a_order, a_pointer, a_width, a_step = _layout(a)
    b_order, b_pointer, b_width, b_step = _layout(b.T)
    b_order = _AS_IT_IS if b_order == _TRANSPOSED else _TRANSPOSED
    out_order, place, width, _ = _layout(out)
    if out_order != _AS_IT_IS:
        raise ValueError(f"rows are not contiguous: strides {out.strides}")
    for start in range(0, inputs, k_block):
        blas.sgemm(
            _ROW_MAJOR, a_order, b_order, rows, outputs, min(k_block, inputs - start),
            factor, a_pointer + start * a_step, a_width, b_pointer + start * b_step, b_width,
            1.0 if add or start else 0.0, place, width,
        )  # fmt: skip


def quiet_product() -> contextlib.AbstractContextManager[Any]:
    """Around a product of numpy's: on Accelerate it warns of what has not happened.

    That leaves the processor's flags of division by zero, overflow and invalid values set,
    which numpy reads. Features that are not finite are found at the end.
    """
    if sys.platform != "darwin":
        return contextlib.nullcontext()
    return np.errstate(divide="ignore", over="ignore", invalid="ignore")


def data_pointer(array: npt.NDArray[Any]) -> int:
    """Where in memory an array begins."""
    begin: int = array.__array_interface__["data"][0]
    return begin


def _layout(a: Matrix) -> tuple[int, int, int, int]:
    """Order, pointer, distance of two rows (or columns), bytes from one input to the next."""
    count, width = a.shape
    rows, columns = a.strides
    # strides along an axis of length 1 mean nothing
    if (columns == 4 or width == 1) and (rows >= 4 * width or count == 1):
        return _AS_IT_IS, data_pointer(a), max(rows // 4, width), 4
    if (rows == 4 or count == 1) and (columns >= 4 * count or width == 1):
        return _TRANSPOSED, data_pointer(a), max(columns // 4, count), columns
    raise ValueError(f"neither rows nor columns are contiguous: strides {a.strides}")
