"""MLX, imported once, in the right order, and what it will run on.

Every module that needs MLX takes ``mx`` and ``nn`` from here. On Linux the
``mlx[cpu]`` wheel is linked against the reference BLAS, some 40 times slower
than OpenBLAS at a matrix product. Symbols of libraries already loaded globally
win over the wheel's own, so OpenBLAS is loaded before MLX where it is found.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
import warnings
from typing import Any

from .errors import BackendError

#: shared library names of OpenBLAS on the common Linux distributions
OPENBLAS_NAMES = ("libopenblas.so.0", "libopenblas.so")


def _load_openblas() -> str | None:
    """Load OpenBLAS into the process; its name, or None where there is none."""
    for name in OPENBLAS_NAMES:
        try:
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None


def _has_linux_backend(kind: str) -> bool:
    """Whether the MLX backend wheel of a ``kind`` ("cpu", "cuda") is installed."""
    from importlib.metadata import PackageNotFoundError, version

    names = {"cpu": ("mlx-cpu",), "cuda": ("mlx-cuda-12", "mlx-cuda-13")}[kind]
    for name in names:
        try:
            version(name)
        except PackageNotFoundError:
            continue
        return True
    return False


def _import_mlx() -> tuple[Any, Any, str | None]:
    """``mlx.core``, ``mlx.nn`` and the BLAS that was put in front of the wheel's own."""
    openblas = None
    if sys.platform == "linux" and _has_linux_backend("cpu"):
        early = "mlx.core" in sys.modules
        openblas = _load_openblas() if not early else None
        if early:
            warnings.warn(
                "mlx was imported before mlx_contentvec, so OpenBLAS could not be put in front of "
                "the reference BLAS of the mlx[cpu] wheel: import mlx_contentvec first, or expect "
                "a CPU 10 to 40 times slower",
                RuntimeWarning,
                stacklevel=3,
            )
        elif openblas is None:
            warnings.warn(
                "OpenBLAS was not found; mlx[cpu] will use its reference BLAS, 10 to 40 times "
                "slower. Install it, for example: apt-get install libopenblas0",
                RuntimeWarning,
                stacklevel=3,
            )
    try:
        import mlx.core as core
        import mlx.nn as layers
    except ImportError as error:
        if importlib.util.find_spec("mlx") is None:
            hint = "pip install mlx-contentvec"
        elif sys.platform == "linux":
            hint = (
                "MLX on Linux needs one backend: pip install 'mlx-contentvec[cpu]', "
                "'mlx-contentvec[cuda12]' or 'mlx-contentvec[cuda13]'"
            )
        else:
            hint = "reinstall MLX: pip install --force-reinstall mlx"
        raise BackendError(f"MLX cannot be imported: {error}", hint=hint) from error
    return core, layers, openblas


mx, nn, OPENBLAS = _import_mlx()


def device_kind() -> str:
    """What MLX computes on now: "cpu", "metal" or "cuda"."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def tf32_enabled() -> bool:
    """Whether float32 products may run at TF32 precision (CUDA, Apple M5 and later).

    MLX reads ``MLX_ENABLE_TF32`` once; it is on unless the variable is "0".
    Source: mlx/utils.h, ``env::enable_tf32``.
    """
    return os.environ.get("MLX_ENABLE_TF32", "1") != "0"
