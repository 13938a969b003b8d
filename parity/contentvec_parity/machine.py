"""What a run ran on: machine, chip, system, versions and flags, for every report."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

#: packages whose versions a report names
PACKAGES = (
    *("mlx-contentvec", "mlx", "numpy", "llvmlite"),
    *("torch", "transformers", "fairseq-fixed", "fairseq"),
)

#: environment variables that change results or timings
VARIABLES = (
    *("MLX_ENABLE_TF32", "MLX_CONTENTVEC_KERNELS"),
    *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"),
)


def chip() -> str:
    """The processor's name."""
    if sys.platform == "darwin":
        try:
            command = ("sysctl", "-n", "machdep.cpu.brand_string")
            return subprocess.run(
                command, capture_output=True, text=True, check=True, timeout=5
            ).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _system() -> str:
    if sys.platform == "darwin":
        return f"macOS {platform.mac_ver()[0]}"
    try:
        release = platform.freedesktop_os_release()
        return f"{release.get('PRETTY_NAME', 'Linux')} (kernel {platform.release()})"
    except OSError:
        return platform.platform()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def describe() -> dict[str, Any]:
    """The machine and, once MLX is loaded, the device it computes on."""
    from mlx_contentvec import backend
    from mlx_contentvec.ops import kernels

    mx = backend.mx
    kind = backend.device_kind()
    device: dict[str, Any] = {"kind": kind}
    if kind != "cpu":
        info = mx.device_info() if hasattr(mx, "device_info") else mx.metal.device_info()
        device |= {key: info[key] for key in ("device_name", "architecture") if key in info}
    else:
        device["blas"] = kernels.chosen().name
    return {
        "chip": chip(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": _system(),
        "device": device,
    }


def versions(*others: str) -> dict[str, str]:
    """Python and every package that has a say in the numbers, with ``others``."""
    found = {"python": platform.python_version()}
    for package in (*PACKAGES, *others):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def torch_blas() -> str | None:
    """Whose matrix products PyTorch runs: its own, or an OpenBLAS that was loaded before it.

    A symbol of a library loaded globally before PyTorch takes the place of its
    own, so PyTorch's figures would be those of OpenBLAS. None if PyTorch is not
    loaded, or where libraries do not work like that (macOS).
    """
    if "torch" not in sys.modules or not sys.platform.startswith("linux"):
        return None
    loaded = [Path(path).name for path in _libraries()]
    first_torch = next((i for i, name in enumerate(loaded) if name.startswith("libtorch_cpu")), 0)
    before = loaded[:first_torch]
    return "OpenBLAS" if any(n.startswith("libopenblas.so") for n in before) else "its own"


def _libraries() -> list[str]:
    """The shared libraries of this process in the order they were loaded."""
    import ctypes

    class Info(ctypes.Structure):
        _fields_ = (("address", ctypes.c_void_p), ("name", ctypes.c_char_p))

    found: list[str] = []

    def keep(info: Any, _size: int, _data: Any) -> int:
        found.append((info.contents.name or b"").decode(errors="replace"))
        return 0

    visitor = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Info), ctypes.c_size_t, ctypes.c_void_p)
    ctypes.CDLL(None).dl_iterate_phdr(visitor(keep), None)
    return found


def flags() -> dict[str, Any]:
    """Settings that change the numbers: TF32, and the thread counts."""
    from mlx_contentvec.backend import tf32_enabled

    found: dict[str, Any] = {"tf32": tf32_enabled()}
    found["environment"] = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if "torch" in sys.modules:
        found["torch_threads"] = sys.modules["torch"].get_num_threads()
        found["torch_blas"] = torch_blas()
    return found
