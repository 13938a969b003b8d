"""Which form the steps of a pass on a CPU have, chosen once in a process."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import sys
import threading
from typing import TYPE_CHECKING

from ..backend import address_space_left
from .kernels_numpy import NumpyKernels

if TYPE_CHECKING:
    from .kernels_llvm import LlvmKernels

#: the environment variable that chooses: "numpy", or "llvm" as where it is not set
VARIABLE = "MLX_CONTENTVEC_KERNELS"
#: address space below which nothing is compiled: LLVM ends the process when it gets none
ROOM = 1 << 30

_compiling = threading.Lock()


def chosen() -> NumpyKernels | LlvmKernels:
    """The compiled steps where they can be had and are right, else those of numpy."""
    with _compiling:
        return _chosen()


@functools.cache
def _chosen() -> NumpyKernels | LlvmKernels:
    return _compiled() or NumpyKernels()


def _compiled() -> LlvmKernels | None:
    # numpy's products are faster on a Mac, whose processors have a unit for matrices
    if not sys.platform.startswith("linux") or os.environ.get(VARIABLE) == "numpy":
        return None
    if importlib.util.find_spec("llvmlite") is None or address_space_left() < ROOM:
        return None
    # a release of llvmlite that is not known must not keep anybody from features
    with contextlib.suppress(Exception):
        from . import kernels_llvm

        return kernels_llvm.compiled()
    return None
