"""MLX, imported once, in the right order, and what it will run on.

Every module that needs MLX takes ``mx`` and ``nn`` from here. On Linux the
``mlx[cpu]`` wheel is linked against the reference BLAS, some 40 times slower
than OpenBLAS at a matrix product. Symbols of libraries already loaded globally
win over the wheel's own, so OpenBLAS is loaded before MLX where it is found.
What is not traced does without MLX's products on a CPU (``mlx_contentvec.ops.cpu``).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import math
import os
import sys
import threading
from pathlib import Path
from typing import Any

from .errors import BackendError, import_hint, install_hint, is_out_of_memory, printable
from .files import signals_held

#: shared library names of OpenBLAS on the common Linux distributions
OPENBLAS_NAMES = ("libopenblas.so.0", "libopenblas.so")


#: OpenBLAS's name for its kernels, and the processor flags that they need
OPENBLAS_KERNELS = (
    ("SKYLAKEX", {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"}),
    ("HASWELL", {"avx2", "fma"}),
)


#: processors (vendor, family) that compute 512 bits in two halves, Zen 4: their peak is that
#: of AVX2, and OpenBLAS's kernels for AVX2 come nearer to it. A pass takes 0.90, 0.93,
#: 0.94 and 0.98 of the time with SKYLAKEX for 1, 5, 10 and 30 s (OpenBLAS 0.3.21, one thread)
HALVED_AVX512 = {("AuthenticAMD", "25")}


def openblas_kernels(cpuinfo: str) -> str | None:
    """The kernels that OpenBLAS should use on a processor, from the text of /proc/cpuinfo.

    OpenBLAS goes by the model number: a processor younger than itself it takes for
    the oldest that it knows (0.3.21 took a recent Xeon with AVX-512 for a Prescott:
    32 GFLOP/s on one core, 78 with its Haswell kernels). The flags do not age.
    """
    first, _, _ = cpuinfo.partition("\n\n")
    lines = (line.partition(":") for line in first.splitlines())
    facts = {key.strip(): value.strip() for key, _, value in lines}
    flags = set(facts.get("flags", "").split())
    if (facts.get("vendor_id"), facts.get("cpu family")) in HALVED_AVX512:
        flags -= {flag for flag in flags if flag.startswith("avx512")}
    return next((name for name, needed in OPENBLAS_KERNELS if needed <= flags), None)


#: address space that each thread of OpenBLAS 0.3.21 takes: a buffer of 128 MiB and its stack
#: when the library is loaded, and another buffer for a product. It waits forever for a buffer
#: that it does not get
OPENBLAS_THREAD_BYTES = 288 << 20


def stated_threads() -> int:
    """How many threads the environment states for products; the machine's cores by default."""
    stated = os.environ.get("OPENBLAS_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS") or ""
    return int(stated) if stated.isdecimal() and int(stated) else os.cpu_count() or 1


def address_space() -> float:
    """Bytes that this process may map; infinite where nothing limits it (``ulimit -v``)."""
    with contextlib.suppress(ImportError):
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            return limit
    return math.inf


def address_space_left() -> float:
    """Bytes that this process may still map; infinite where nothing limits or counts them."""
    limit = address_space()
    if limit < math.inf:
        with contextlib.suppress(OSError):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            return limit - pages * os.sysconf("SC_PAGE_SIZE")
    return math.inf


def _load_openblas() -> str | None:
    """Load OpenBLAS into the process; its name, or None where there is none or no room for it.

    Products are then those of numpy's, whose buffers are smaller. OPENBLAS_CORETYPE, if set,
    is left as it is.
    """
    threads = min(stated_threads(), os.cpu_count() or 1)
    if address_space_left() < threads * OPENBLAS_THREAD_BYTES:
        return None
    with contextlib.suppress(OSError):
        kernels = openblas_kernels(Path("/proc/cpuinfo").read_text())
        if kernels is not None:
            os.environ.setdefault("OPENBLAS_CORETYPE", kernels)
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
        # once MLX is there its products are bound to its own BLAS
        openblas = _load_openblas() if "mlx.core" not in sys.modules else None
    try:
        # what a signal's handler raises within is lost, or becomes an ImportError
        with signals_held():
            import mlx.core as core
            import mlx.nn as layers

            _start_compiler()
    except ImportError as error:
        raise BackendError(
            f"MLX cannot be imported: {error}", hint=_mlx_import_hint(error)
        ) from error
    return core, layers, openblas


def _start_compiler() -> None:
    """Have NVRTC, CUDA's compiler, take the signals and give them back, where MLX has loaded it.

    For a process's first compilation it takes SIGINT and SIGTERM, and one that comes ends the
    process with status 4. It gives them back by signal(2): system calls go on after a signal,
    and a wait for another thread does not end by Ctrl-C. An empty program takes milliseconds,
    MLX's first kernel longer, and :func:`signals_held` then sets handlers as Python does. Seen
    with NVRTC 13.0.88.
    """
    if sys.platform != "linux":
        return
    for name in ("libnvrtc.so.13", "libnvrtc.so.12"):
        with contextlib.suppress(OSError, AttributeError):
            nvrtc = ctypes.CDLL(name, mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            program = ctypes.c_void_p()
            if not nvrtc.nvrtcCreateProgram(ctypes.byref(program), b"", None, 0, None, None):
                nvrtc.nvrtcCompileProgram(program, 0, None)
                nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _mlx_import_hint(error: ImportError) -> str:
    """What to do about MLX that cannot be imported."""
    if is_out_of_memory(error) and address_space() < math.inf and _has_linux_backend("cuda"):
        return "CUDA takes addresses for all memory there is: ulimit -v unlimited"
    if "no CUDA-capable device" in str(error):
        visible = printable(os.environ.get("CUDA_VISIBLE_DEVICES", "not set"))[:80]
        return (
            f"this process sees no GPU (CUDA_VISIBLE_DEVICES: {visible}). Under mlx.launch "
            "each process has one of its own; without a GPU:\n" + install_hint("cpu")
        )
    if importlib.util.find_spec("mlx") is None:
        install = "pip install mlx"
    elif sys.platform == "linux":
        install = "MLX on Linux needs one backend, cpu, cuda12 or cuda13:\n" + install_hint("cpu")
    else:
        install = "reinstall MLX: pip install --force-reinstall mlx"
    return import_hint(error, install)


mx, nn, OPENBLAS = _import_mlx()


def device_kind() -> str:
    """What MLX computes on now: "cpu", "metal" or "cuda"."""
    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


#: the process in which MLX first computed. On CUDA that is the one that imported it: the driver
#: is initialised by then, and refuses to work in a fork
_computing: int | None = os.getpid() if device_kind() == "cuda" else None


def require_no_fork() -> None:
    """Raise BackendError in a fork of a process that has computed (on CUDA, that imported MLX).

    The threads that MLX computes with are not in the fork, which would wait for them
    forever.
    """
    global _computing
    process = os.getpid()
    if _computing is None:
        _computing = process
    if process != _computing:
        on_cuda = device_kind() == "cuda"
        raise BackendError(
            "this process was forked from one that had "
            + ("imported MLX for CUDA" if on_cuda else "loaded a model")
            + ", and MLX cannot compute here",
            found=f"process {process}, forked from {_computing} or a fork of it",
            hint="start processes anew: multiprocessing.get_context('spawn'); or "
            + ("import\nmlx_contentvec" if on_cuda else "load the first\nmodel")
            + " after forking",
        )


#: held while the limit of what MLX may hold is set, or read by setting it
MEMORY_LIMIT_LOCK = threading.RLock()


def memory_limit() -> int:
    """Bytes that MLX may hold before it waits for what it computes.

    MLX before 0.32.3 has no ``get_memory_limit``: setting another tells which was set.
    """
    if hasattr(mx, "get_memory_limit"):
        return int(mx.get_memory_limit())
    with MEMORY_LIMIT_LOCK:
        limit = mx.set_memory_limit(1 << 60)
        mx.set_memory_limit(limit)
    return int(limit)


def tf32_enabled() -> bool:
    """Whether float32 products may run at TF32 precision (CUDA, Apple M5 and later).

    MLX reads ``MLX_ENABLE_TF32`` at its first product; it is on unless the variable is
    "0", to which importing this package sets it where it is not set.
    Source: mlx/utils.h, ``env::enable_tf32``.
    """
    return os.environ.get("MLX_ENABLE_TF32", "1") != "0"
