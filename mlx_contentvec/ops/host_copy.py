"""Arrays to a GPU and back.

On CUDA MLX shares an array's memory between the GPU and the processor, and each touches
the other's pages one after the other: 5 MB of features take 1.8 ms to read, and 0.7 if the
driver copies them from there to memory of the processor's own (H200). The pages stay on
the GPU, so that what is computed next does not wait for them either.
Source: mlx/backend/cuda/allocator.cpp, ``move_to_unified_memory``.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backend import device_kind, mx
from .blas import data_pointer

#: bytes below which one touch of the processor's costs no more than a call of the driver
SMALLEST = 1 << 16


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """The library of the GPU's driver, or None."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        library.cuMemcpy.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t)
        library.cuStreamSynchronize.argtypes = (ctypes.c_void_p,)
    except (OSError, AttributeError):
        return None
    return library


def _copied(to: npt.NDArray[Any], source: npt.NDArray[Any]) -> bool:
    """Whether the driver copied one to the other; what it refuses is copied by touching it."""
    if device_kind() != "cuda" or to.nbytes < SMALLEST:
        return False
    library = _driver()
    if library is None or not (to.flags.c_contiguous and source.flags.c_contiguous):
        return False
    refused: int = library.cuMemcpy(data_pointer(to), data_pointer(source), to.nbytes)
    # a copy to the GPU may still be on its way when the call returns
    refused = refused or library.cuStreamSynchronize(None)
    return not refused


def to_numpy(x: mx.array) -> npt.NDArray[Any]:
    """``x``, of a type that numpy knows, as an array of its own."""
    shared = np.asarray(x)
    own = np.empty(shared.shape, shared.dtype)
    if not _copied(own, shared):
        np.copyto(own, shared)
    return own


def to_mlx(values: npt.NDArray[Any]) -> mx.array:
    """``values``, of a type that MLX knows, on the device that MLX computes on."""
    if device_kind() != "cuda" or values.nbytes < SMALLEST or values.dtype != np.float32:
        return mx.array(values)
    x = mx.zeros(values.shape, mx.float32)
    mx.eval(x)
    return x if _copied(np.asarray(x), values) else mx.array(values)
