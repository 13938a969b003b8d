"""The forms of the steps of a pass on a CPU, as far as this machine has them."""

from __future__ import annotations

import functools
import sys

import pytest

from mlx_contentvec.ops.kernels_numpy import NumpyKernels
from tests.optional import optional

FORMS = ("numpy", "compiled", "compiled with products")


@functools.cache
def _compiled(with_products: bool) -> NumpyKernels | None:
    llvm = optional("llvmlite.binding", "pip install llvmlite")
    from mlx_contentvec.ops import kernels_llvm

    tile = kernels_llvm.tile_for(dict(llvm.get_host_cpu_features()), "")
    if tile is None:
        return None
    kind = kernels_llvm.LlvmProducts if with_products else kernels_llvm.LlvmKernels
    return kind(tile._replace(multiplies=with_products))


def kernels_of(form: str) -> NumpyKernels:
    """Those of one of ``FORMS``; skips where llvmlite or the instructions are missing."""
    if form == "numpy":
        return NumpyKernels()
    if not sys.platform.startswith("linux"):
        pytest.skip("steps are compiled on Linux only")
    found = _compiled(form == "compiled with products")
    if found is None:
        pytest.skip("this processor lacks the instructions")
    return found
