"""Waveforms from the host to a GPU, and results back.

On CUDA MLX does both through memory that the GPU and the host share, page fault by page fault:
of a pass over 30 s of audio, whose features are 4.6 MB, that is 3.7 ms of 25 for the result
(H200, float32), and 1.3 for the waveform, 2.6 for 5 MB of a batch. One copy by the driver takes
0.8, 0.4 and 0.6.
Source: mlx/backend/cuda/allocator.cpp, ``malloc_async``, ``move_to_unified_memory``.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backend import device_kind, mx
from .blas import data_pointer

#: bytes of a result that the driver copies: 1 MiB takes it 0.2 ms, and 0.3 to 1.2 by page
#: faults (H200); less was not measured
MIN_DRIVER_COPY = 1 << 16
#: bytes of a waveform that the driver copies: one second takes it 0.19 ms until it has been
#: read, and 0.39 by page faults (H200); less was not measured
MIN_DRIVER_UPLOAD = 64_000


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """The library of the CUDA driver, or None."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
        library.cuMemcpy.argtypes = (ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t)
        library.cuStreamSynchronize.argtypes = (ctypes.c_void_p,)
    except (OSError, AttributeError):
        return None
    return library


def from_numpy(x: npt.NDArray[Any]) -> mx.array:
    """``x``, of a type that MLX has, as an MLX array of its own."""
    library = _driver() if device_kind() == "cuda" and x.nbytes >= MIN_DRIVER_UPLOAD else None
    if library is None or x.dtype != np.float32 or not x.flags.c_contiguous:
        return mx.array(x)
    # its pages are the GPU's, which has written them; those of a buffer that the host writes
    # would be fetched before, and sent after
    taken = mx.zeros(x.shape)
    shared = np.asarray(taken)
    refused = library.cuMemcpy(data_pointer(shared), data_pointer(x), x.nbytes)
    # MLX's streams do not wait for the one in which the last of it may still be on its way
    refused = refused or library.cuStreamSynchronize(None)
    return mx.array(x) if refused else taken


def _copy_by_driver(shared: npt.NDArray[Any]) -> npt.NDArray[Any] | None:
    """A copy in host memory; None where there is no CUDA, or the driver refuses."""
    if device_kind() != "cuda" or shared.nbytes < MIN_DRIVER_COPY:
        return None
    library = _driver()
    if library is None or not shared.flags.c_contiguous:
        return None
    host = np.empty(shared.shape, shared.dtype)
    # synchronous to host memory that is not page-locked; refused in a thread without a context
    refused = library.cuMemcpy(data_pointer(host), data_pointer(shared), shared.nbytes)
    return None if refused else host


def to_numpy(x: mx.array, *, copy: bool = True) -> npt.NDArray[Any]:
    """``x``, of a type that numpy knows, as a numpy array.

    copy: always an array of its own; else it may share the memory of ``x``
    """
    shared = np.asarray(x)
    host = _copy_by_driver(shared)
    if host is not None:
        return host
    return shared.copy() if copy else shared
