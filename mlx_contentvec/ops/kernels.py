"""Which form the steps of a pass on a CPU have, chosen once in a process."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import mmap
import os
import sys
import threading

from ..backend import address_space_left
from .kernels_numpy import NumpyKernels

#: the environment variable that chooses: "numpy", or "llvm" as where it is not set
VARIABLE = "MLX_CONTENTVEC_KERNELS"
#: address space below which nothing is compiled
ROOM = 1 << 30

_compiling = threading.Lock()


def chosen() -> NumpyKernels:
    """The compiled steps where they can be had and are right, else those of numpy."""
    with _compiling:
        return _chosen()


@functools.cache
def _chosen() -> NumpyKernels:
    return _compiled() or NumpyKernels()


def may_compile() -> bool:
    """Whether there is room, and what was written may be executed: LLVM ends the process if not.

    A service may be kept from the latter (systemd's ``MemoryDenyWriteExecute``, SELinux).
    """
    if address_space_left() < ROOM:
        return False
    page = mmap.mmap(-1, mmap.PAGESIZE)
    held = ctypes.c_char.from_buffer(page)
    place = ctypes.c_void_p(ctypes.addressof(held))
    size = ctypes.c_size_t(mmap.PAGESIZE)
    allowed = not ctypes.CDLL(None).mprotect(place, size, mmap.PROT_READ | mmap.PROT_EXEC)
    del held
    page.close()
    return allowed


def _compiled() -> NumpyKernels | None:
    # a Mac's processors have a unit for matrices, which numpy's products take
    if not sys.platform.startswith("linux") or os.environ.get(VARIABLE) == "numpy":
        return None
    if importlib.util.find_spec("llvmlite") is None or not may_compile():
        return None
    # a release of llvmlite that is not known must not keep anybody from features
    with contextlib.suppress(Exception):
        from . import kernels_llvm

        return kernels_llvm.compiled()
    return None
