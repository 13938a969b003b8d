"""Which BLAS a process gets, and what is said when there is none."""

from __future__ import annotations

import builtins
import contextlib
import ctypes.util
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_contentvec import ContentvecModel, backend
from mlx_contentvec.cli import _unexpected
from mlx_contentvec.errors import MORE_MEMORY, BackendError, import_hint
from mlx_contentvec.ops import blas
from tests.sources import PROJECT, search_path

linux = pytest.mark.skipif(sys.platform != "linux", reason="run it on Linux: a Mac has Accelerate")
without_a_gpu = pytest.mark.skipif(
    not backend._has_linux_backend("cpu"),
    reason="MLX computes on a GPU here: install mlx[cpu] in another environment",
)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        env={"PATH": "", "PYTHONPATH": search_path(), **environment},
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


@pytest.mark.parametrize(
    ("vendor", "family", "kernels"),
    [
        ("AuthenticAMD", "25", "HASWELL"),
        ("AuthenticAMD", "26", "SKYLAKEX"),
        ("GenuineIntel", "25", "SKYLAKEX"),
    ],
)
def test_a_processor_that_halves_avx512_takes_the_kernels_of_avx2(
    vendor: str, family: str, kernels: str
) -> None:
    flags = "fma avx2 avx512f avx512cd avx512bw avx512dq avx512vl"
    cpuinfo = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nflags\t\t: {flags}\n\n"
    assert backend.openblas_kernels(cpuinfo) == kernels


@linux
def test_a_choice_already_made_is_left_alone() -> None:
    code = "import os, mlx_contentvec.backend; print(os.environ['OPENBLAS_CORETYPE'])"
    assert python(code, OPENBLAS_CORETYPE="ZEN").stdout == "ZEN\n"


NO_LIBRARY = """
import ctypes
def missing(*a, **k): raise OSError("not here")
ctypes.CDLL = missing
"""
WHOSE = "from mlx_contentvec.ops import blas; print(blas.name(), blas._openblas() is not None)"


@linux
def test_without_openblas_products_go_to_numpys() -> None:
    code = (
        "import ctypes\n"
        "own = ctypes.CDLL\n"
        "def elsewhere(name, *a, **k):\n"
        "    if 'numpy' not in name: raise OSError('not here')\n"
        "    return own(name, *a, **k)\n"
        f"ctypes.CDLL = elsewhere\n{WHOSE}"
    )
    result = python(code)
    assert (result.stdout, result.stderr) == ("numpy True\n", "")
    assert python(NO_LIBRARY + WHOSE).stdout == "numpy False\n"


@linux
def test_so_they_do_where_mlx_was_imported_before() -> None:
    result = python(f"import mlx.core; {WHOSE}")
    assert (result.stdout, result.stderr) == ("numpy True\n", "")


@linux
@without_a_gpu
def test_openblas_is_taken_where_it_is() -> None:
    if ctypes.util.find_library("openblas") is None:
        pytest.skip("no OpenBLAS here: apt-get install libopenblas0")
    assert python(WHOSE).stdout.startswith("libopenblas.so")


@linux
@without_a_gpu
def test_openblas_is_left_out_where_a_limit_leaves_it_no_buffers() -> None:
    code = (
        "import resource, pathlib, numpy\n"
        "pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])\n"
        "most = pages * resource.getpagesize() + (250 << 20)\n"
        f"resource.setrlimit(resource.RLIMIT_AS, (most, most))\n{WHOSE}"
    )
    assert python(code, OPENBLAS_NUM_THREADS="1").stdout == "numpy True\n"


def test_a_library_without_room_is_not_to_be_installed() -> None:
    why = "libmlx.so: failed to map segment from shared object"
    driver = ImportError("cudaMalloc(&data, size) failed: out of memory")
    for error in (ImportError(why), OSError(12, "Cannot allocate memory"), MemoryError(), driver):
        assert "memory ran out" in import_hint(error, "pip install mlx")
    assert import_hint(ImportError("No module named 'mlx'"), "install it") == "install it"
    assert "not enough memory" in str(_unexpected(ImportError(why)))


def import_refused(monkeypatch: pytest.MonkeyPatch, why: str) -> str:
    """The hint where MLX cannot be imported because of ``why``."""
    own = builtins.__import__

    def refused(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "mlx.core":
            raise ImportError(why)
        return own(name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", refused)
        patch.setattr(backend, "_load_openblas", lambda: None)
        with pytest.raises(BackendError) as caught:
            backend._import_mlx()
    assert why in str(caught.value)
    return str(caught.value.hint)


def test_a_limit_on_addresses_is_said_to_be_too_low_for_cuda(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for limit, wheel, hint in (
        (2e11, "cuda", "CUDA takes addresses for all memory there is: ulimit -v unlimited"),
        (2e11, "cpu", f"memory ran out: {MORE_MEMORY}"),
        (math.inf, "cuda", f"memory ran out: {MORE_MEMORY}"),
    ):
        monkeypatch.setattr(backend, "address_space", lambda limit=limit: limit)
        monkeypatch.setattr(backend, "_has_linux_backend", lambda kind, wheel=wheel: kind == wheel)
        why = "cudaDeviceGetDefaultMemPool(&mem_pools_[i], i) failed: out of memory"
        assert import_refused(monkeypatch, why) == hint


@linux
def test_a_process_that_sees_no_gpu_is_told_which_it_may_see(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    why = "cudaMallocManaged(&data, size) failed: no CUDA-capable device is detected"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1\x1b[2J")
    hint = import_refused(monkeypatch, why)
    assert "sees no GPU (CUDA_VISIBLE_DEVICES: 1\\x1b[2J)" in hint
    assert "mlx-contentvec[cpu]" in hint
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "CUDA_VISIBLE_DEVICES: not set" in import_refused(monkeypatch, why)


def test_a_model_for_which_a_limit_leaves_no_memory_is_not_loaded(
    monkeypatch: pytest.MonkeyPatch, converted_tiny: Path
) -> None:
    size = converted_tiny.stat().st_size
    for left, fits in ((2 * size + (128 << 20), True), (size, False)):
        monkeypatch.setattr("mlx_contentvec.memory.address_space_left", lambda left=left: left)
        with contextlib.nullcontext() if fits else pytest.raises(BackendError, match="not enough"):
            ContentvecModel.from_file(converted_tiny)


def test_numpys_openblas_is_found_where_each_systems_wheel_has_it(tmp_path: Path) -> None:
    linux, mac = tmp_path / "linux/numpy", tmp_path / "mac/numpy"
    files = (
        tmp_path / "linux/numpy.libs/libscipy_openblas64_-1.so",
        mac / ".dylibs/libscipy_openblas64_.dylib",
        mac / ".dylibs/libgfortran.5.dylib",
    )
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    assert blas._brought_by_numpy(linux) == [files[0]]
    assert blas._brought_by_numpy(mac) == [files[1]]


@pytest.mark.parametrize("system", ["darwin", "linux"])
def test_warnings_of_products_are_kept_from_a_mac_only(
    monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(blas, "_openblas", lambda: None)
    huge = np.full((4, 4), 1e30, np.float32)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        blas.multiply(huge, huge, np.empty((4, 4), np.float32))
    assert (said == []) is (system == "darwin")
    # outside a product numpy warns as ever
    with pytest.warns(RuntimeWarning, match="overflow"):
        huge * huge


@linux
def test_an_openblas_that_threads_cannot_share_is_passed_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blas, "OPENBLAS", ctypes.util.find_library("openblas"))
    kinds = blas._OpenBlas

    def without_threads(library: ctypes.CDLL, prefix: str, suffix: str) -> blas._OpenBlas:
        found = kinds(library, prefix, suffix)
        if not prefix + suffix:
            found.get_parallel = lambda: 0
        return found

    monkeypatch.setattr(blas, "_OpenBlas", without_threads)
    blas._openblas.cache_clear()
    try:
        assert blas.name() == "numpy"
        brought = blas._openblas()
        assert brought is None or not brought.plain
    finally:
        blas._openblas.cache_clear()


@linux
def test_the_threads_are_those_that_the_environment_states() -> None:
    code = "from mlx_contentvec.ops import blas; print(blas.threads())"
    for before in ("", "import mlx.core\n", NO_LIBRARY):
        assert python(before + code, OPENBLAS_NUM_THREADS="1").stdout == "1\n"
    assert python(NO_LIBRARY + code, OPENBLAS_NUM_THREADS="3").stdout == "3\n"
    assert python(NO_LIBRARY + code, OMP_NUM_THREADS="5").stdout == "5\n"
    assert python(NO_LIBRARY + code).stdout == f"{os.cpu_count()}\n"


@linux
def test_mlx_without_a_backend_is_one_line_that_says_which_to_add() -> None:
    code = (
        "import sys; sys.modules['mlx.core'] = None\n"
        "from mlx_contentvec.errors import BackendError\n"
        "try:\n    import mlx_contentvec.backend\n"
        "except BackendError as error:\n    print(error.hint)"
    )
    assert "mlx-contentvec[cpu]" in python(code).stdout


@pytest.mark.parametrize("becomes", ["pass", "raise ImportError from error"])
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_signal_that_comes_while_mlx_is_imported_is_heeded(
    number: str, becomes: str, tmp_path: Path
) -> None:
    stand_in = {
        "__init__": "",
        "nn": "",
        "core": (
            "import signal, types\n"
            f"try:\n    signal.raise_signal(signal.{number})\n"
            f"except BaseException as error:\n    {becomes}\n"
            "DeviceType = types.SimpleNamespace(cpu=0)\n"
            "def default_device(): return types.SimpleNamespace(type=0)\n"
        ),
    }
    (tmp_path / "mlx").mkdir()
    for name, text in stand_in.items():
        (tmp_path / "mlx" / f"{name}.py").write_text(text, encoding="utf-8")
    code = (
        f"import signal, sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        f"signal.signal(signal.{number}, signal.default_int_handler)\n"
        "from mlx_contentvec.errors import BackendError\n"
        "try:\n    import mlx_contentvec.backend\n    print('lost')\n"
        "except BackendError as error:\n    print('an error')\n"
        "except KeyboardInterrupt:\n    print('heeded', 'mlx.nn' in sys.modules)\n"
    )
    done = python(code)
    assert (done.stdout, done.stderr) == ("heeded True\n", "")


class Nvrtc:
    """CUDA's compiler as a shared library; its calls and their program are noted."""

    def __init__(self, status: int = 0) -> None:
        self.calls: list[tuple[str, int | None]] = []
        self._status = status

    def nvrtcCreateProgram(self, program: Any, source: bytes, *_: Any) -> int:  # noqa: N802
        assert source == b""
        if not self._status:
            program._obj.value = 77
        self.calls.append(("create", program._obj.value))
        return self._status

    def nvrtcCompileProgram(self, program: Any, *_: Any) -> int:  # noqa: N802
        self.calls.append(("compile", program.value))
        return 0

    def nvrtcDestroyProgram(self, program: Any) -> int:  # noqa: N802
        self.calls.append(("destroy", program._obj.value))
        return 0


def start_compiler(
    monkeypatch: pytest.MonkeyPatch, libraries: dict[str, Any], system: str = "linux"
) -> list[str]:
    """Start the compiler where ``libraries`` are loaded; the names that were asked for."""
    asked = []

    def loaded(name: str, mode: int) -> Any:
        assert mode & os.RTLD_NOLOAD
        asked.append(name)
        if name not in libraries:
            raise OSError("not loaded")
        return libraries[name]

    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", system)
        patch.setattr(ctypes, "CDLL", loaded)
        backend._start_compiler()
    return asked


NVRTC = ["libnvrtc.so.13", "libnvrtc.so.12"]


@pytest.mark.parametrize("name", NVRTC)
def test_cudas_compiler_compiles_an_empty_program_where_it_is_loaded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Nvrtc()
    assert start_compiler(monkeypatch, {name: library}) == NVRTC
    assert library.calls == [("create", 77), ("compile", 77), ("destroy", 77)]


def test_without_cudas_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    assert start_compiler(monkeypatch, {}) == NVRTC
    # a library of that name without these functions
    assert start_compiler(monkeypatch, dict.fromkeys(NVRTC, object())) == NVRTC
    refuses = Nvrtc(status=1)
    start_compiler(monkeypatch, {NVRTC[0]: refuses})
    assert refuses.calls == [("create", None)]
    assert start_compiler(monkeypatch, {NVRTC[0]: refuses}, "darwin") == []


TAKES_SIGNALS = """
import ctypes, os, signal, threading, time
own, libc = ctypes.CDLL, ctypes.CDLL(None)
libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
class Nvrtc:
    def nvrtcCreateProgram(*_): return 0
    def nvrtcCompileProgram(*_):
        for number in (signal.SIGINT, signal.SIGTERM):
            libc.signal(number, libc.signal(number, None))
        print("taken")
    def nvrtcDestroyProgram(*_): pass
def loaded(name, *a, **k):
    return Nvrtc() if name == "libnvrtc.so.13" else own(name, *a, **k)
ctypes.CDLL = loaded
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.default_int_handler)
import mlx_contentvec.backend
for number in (signal.SIGINT, signal.SIGTERM):
    main, ended = threading.main_thread().ident, threading.Event()
    others = [threading.Timer(0.2, signal.pthread_kill, (main, number))]
    others.append(threading.Timer(4, ended.set))
    for other in others: other.start()
    try:
        ended.wait()  # the system ends one with a limit in any case
    except KeyboardInterrupt:
        print("late" if ended.is_set() else "at once")
    for other in others: other.cancel()
"""


@linux
def test_ctrl_c_ends_a_wait_after_cudas_compiler_has_had_the_signals() -> None:
    done = python(TAKES_SIGNALS)
    assert (done.stdout, done.stderr) == ("taken\nat once\nat once\n", "")


def test_an_mlx_that_cannot_tell_its_memory_limit_is_asked_by_setting_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As all before 0.32.3: every pass failed with an AttributeError."""
    limits = [1234]

    def set_limit(limit: int) -> int:
        limits.append(limit)
        return limits[-2]

    monkeypatch.delattr(backend.mx, "get_memory_limit", raising=False)
    monkeypatch.setattr(backend.mx, "set_memory_limit", set_limit)
    assert backend.memory_limit() == limits[-1] == 1234


def test_the_memory_limit_is_that_which_was_set() -> None:
    before = backend.mx.set_memory_limit(1 << 40)
    try:
        assert backend.memory_limit() == 1 << 40
    finally:
        backend.mx.set_memory_limit(before)


def test_the_device_is_named() -> None:
    assert backend.device_kind() in ("cpu", "metal", "cuda")


@pytest.mark.parametrize(("given", "expected"), [(None, "0"), ("0", "0"), ("1", "1")])
def test_tf32_is_off_unless_the_user_turns_it_on(given: str | None, expected: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "MLX_ENABLE_TF32"}
    if given is not None:
        environment["MLX_ENABLE_TF32"] = given
    code = (
        "import os, mlx_contentvec; print(os.environ['MLX_ENABLE_TF32'])\n"
        "from mlx_contentvec.backend import tf32_enabled; print(tf32_enabled())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=PROJECT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [expected, str(expected == "1")]
