"""Which BLAS a process gets, and what is said when there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mlx_contentvec import backend

PROJECT = Path(__file__).resolve().parent.parent
linux = pytest.mark.skipif(sys.platform != "linux", reason="run it on Linux: a Mac has Accelerate")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        env={"PATH": "", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("flags", "kernels"),
    [
        ("fma avx2 avx512f avx512cd avx512bw avx512dq avx512vl amx_tile", "SKYLAKEX"),
        ("fma avx2 avx512f", "HASWELL"),
        ("avx sse4_2", None),
    ],
)
def test_the_kernels_follow_from_the_processors_flags(flags: str, kernels: str | None) -> None:
    cpuinfo = f"processor\t: 0\nmodel\t\t: 999\nflags\t\t: {flags}\n\nprocessor\t: 1\n"
    assert backend.openblas_kernels(cpuinfo) == kernels
    assert backend.openblas_kernels("processor\t: 0\nFeatures\t: asimd\n") is None


@linux
def test_a_choice_already_made_is_left_alone() -> None:
    code = "import os, mlx_contentvec.backend; print(os.environ['OPENBLAS_CORETYPE'])"
    assert python(code, OPENBLAS_CORETYPE="ZEN").stdout == "ZEN\n"


@linux
def test_without_openblas_it_is_said_once_what_to_install() -> None:
    code = (
        "import ctypes\n"
        "def missing(*a, **k): raise OSError('not here')\n"
        "ctypes.CDLL = missing\n"
        "import mlx_contentvec.backend, mlx_contentvec.model, mlx_contentvec.kernels"
    )
    assert python(code).stderr.count("apt-get install libopenblas0") == 1


@linux
def test_mlx_imported_too_early_is_noticed() -> None:
    result = python("import mlx.core, mlx_contentvec.backend")
    assert result.stderr.count("import mlx_contentvec first") == 1


@linux
def test_mlx_without_a_backend_is_one_line_that_says_which_to_add() -> None:
    code = (
        "import sys; sys.modules['mlx.core'] = None\n"
        "from mlx_contentvec.errors import BackendError\n"
        "try:\n    import mlx_contentvec.backend\n"
        "except BackendError as error:\n    print(error.hint)"
    )
    assert "mlx-contentvec[cpu]" in python(code).stdout


def test_the_device_is_named() -> None:
    assert backend.device_kind() in ("cpu", "metal", "cuda")
