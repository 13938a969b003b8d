"""The steps that one thread takes on a CPU, in every form, against float64."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

from mlx_contentvec import ops
from mlx_contentvec.backend import mx
from mlx_contentvec.ops import cpu, kernels
from mlx_contentvec.ops.kernels_numpy import NumpyKernels, Scratch, Then
from tests.forks import run_python
from tests.kernel_forms import FORMS, kernels_of
from tests.optional import optional
from tests.small_models import TINY, noise, random_model

erf = np.vectorize(math.erf)
COMPILED = [form for form in FORMS if form != "numpy"]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> NumpyKernels:
    return kernels_of(request.param)


@pytest.fixture(params=COMPILED)
def compiled(request: pytest.FixtureRequest) -> NumpyKernels:
    return kernels_of(request.param)


def drawn(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def within(margin: int, *shape: int) -> tuple[np.ndarray, np.ndarray]:
    """A matrix of rows that are apart, and all of what it lies in, which is 7 everywhere."""
    rows, columns = shape
    around = np.full((rows + 2 * margin, columns + 2 * margin), 7, np.float32)
    return around[margin : margin + rows, margin : margin + columns], around


def exact_gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


@pytest.mark.parametrize("rows", [1, 5, 6, 7, 20])
@pytest.mark.parametrize("inputs", [1, 3, 64, 100])
@pytest.mark.parametrize("columns", [1, 15, 64, 130])
def test_a_product_of_any_size(
    form: NumpyKernels, rows: int, inputs: int, columns: int, rng: np.random.Generator
) -> None:
    a, b = within(2, rows, inputs)[0], within(3, inputs, columns)[0]
    a[:], b[:] = drawn(rng, rows, inputs), drawn(rng, inputs, columns)
    bias, mean, factor, shift = drawn(rng, 4, columns)
    out, around = within(1, rows, columns)
    summed = a.astype(np.float64) @ b
    for run in (1, 40, 96):
        form.product(a, b, out, run=run)
        np.testing.assert_allclose(out, summed, atol=1e-5 * inputs)
        form.product(a, b, out, run, Then(bias=bias, gelu=True))
        np.testing.assert_allclose(out, exact_gelu(summed + bias), atol=1e-5 * inputs)
        form.product(a, b, out, run, Then(scaling=(mean, factor, shift)))
        expected = (summed - mean) * factor + shift
        np.testing.assert_allclose(out, expected, atol=3e-5 * inputs)
    out[:] = 7
    assert (around == 7).all(), "numbers beside the result were written"


def test_a_product_of_more_rows_than_are_in_work_at_once(
    form: NumpyKernels, rng: np.random.Generator
) -> None:
    a, b, out = drawn(rng, 1100, 30), drawn(rng, 30, 70), np.empty((1100, 70), np.float32)
    form.product(a, b, out, run=16)
    np.testing.assert_allclose(out, a.astype(np.float64) @ b, atol=1e-4)


def test_each_row_is_what_it_is_alone(compiled: NumpyKernels, rng: np.random.Generator) -> None:
    """Products are OpenBLAS's in one of these forms, which takes few rows in another order."""
    keys, values = drawn(rng, 2, 300, 64)
    queries = drawn(rng, 77, 64)
    whole, part = np.empty((77, 64), np.float32), np.empty((5, 64), np.float32)
    compiled.attend(queries, keys, values, None, whole)
    compiled.attend(queries[70:75], keys, values, None, part)
    assert (part == whole[70:75]).all()
    many, few = np.empty((77, 64), np.float32), np.empty((3, 64), np.float32)
    compiled.layer_norm(queries, many, keys[0], keys[1])
    compiled.layer_norm(queries[4:7], few, keys[0], keys[1])
    assert (few == many[4:7]).all()


def test_products_of_its_own_are_the_same_for_any_rows(rng: np.random.Generator) -> None:
    form = kernels_of("compiled with products")
    a, b = drawn(rng, 77, 200), drawn(rng, 200, 130)
    whole, part = np.empty((77, 130), np.float32), np.empty((4, 60), np.float32)
    form.product(a, b, whole, run=96)
    form.product(a[30:34], b[:, 64:124], part, run=96)
    assert (part == whole[30:34, 64:124]).all()


@pytest.mark.parametrize("stride", [1, 2])
def test_a_convolution(form: NumpyKernels, stride: int, rng: np.random.Generator) -> None:
    clip, taps, bias = drawn(rng, 43, 5), drawn(rng, 3, 5, 20), drawn(rng, 20)
    count = (43 - 3) // stride + 1
    out, around = within(1, count, 20)
    expected = bias + sum(
        clip[tap : tap + (count - 1) * stride + 1 : stride].astype(np.float64) @ taps[tap]
        for tap in range(3)
    )
    form.convolve(clip, taps, out, stride, 64, Then(bias=bias))
    np.testing.assert_allclose(out, expected, atol=1e-5)
    form.convolve(clip, taps, out, stride, 64, Then(bias=bias, gelu=True))
    np.testing.assert_allclose(out, exact_gelu(expected), atol=1e-5)
    out[:] = 7
    assert (around == 7).all()


@pytest.mark.parametrize("rows", [1, 49, 64, 130])
@pytest.mark.parametrize("count", [1, 96, 97, 960, 2000])
@pytest.mark.parametrize("masked", [False, True])
def test_attention(
    form: NumpyKernels, rows: int, count: int, masked: bool, rng: np.random.Generator
) -> None:
    for width in (7, 64):
        queries, keys, values = (within(1, n, width)[0] for n in (rows, count, count))
        for part in (queries, keys, values):
            part[:] = 2 * drawn(rng, *part.shape)
        hidden = rng.random(count) < 0.3 if masked and count > 1 else None
        scores = queries.astype(np.float64) @ keys.T / math.sqrt(width)
        if hidden is not None:
            scores[:, hidden] = -np.inf
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        expected = weights @ values / weights.sum(axis=1, keepdims=True)
        out, around = within(1, rows, width)
        form.attend(queries, keys, values, hidden, out)
        np.testing.assert_allclose(out, expected, atol=1e-5)
        out[:] = 7
        assert (around == 7).all()


@pytest.mark.parametrize("width", [1, 15, 16, 768])
def test_a_layer_norm(form: NumpyKernels, width: int, rng: np.random.Generator) -> None:
    x, (scale, shift) = 3 * drawn(rng, 5, width) + 2, drawn(rng, 2, width)
    centred = x - x.mean(axis=1, keepdims=True, dtype=np.float64)
    expected = centred / np.sqrt((centred**2).mean(axis=1, keepdims=True) + 1e-5) * scale + shift
    out, around = within(1, 5, width)
    form.layer_norm(x, out, scale, shift)
    np.testing.assert_allclose(out, expected, atol=5e-6)
    form.layer_norm(x, x, scale, shift)
    assert (x == out).all(), "in place it is another"
    out[:] = 7
    assert (around == 7).all()


def test_gelu_is_exact_to_a_few_roundings(form: NumpyKernels) -> None:
    x = np.concatenate([np.linspace(-12, 12, 20001), [0.0, -0.0, 1e-30, -1e-30]])
    got = x.astype(np.float32)
    form.gelu_in_place(got)
    exact = exact_gelu(x.astype(np.float32).astype(np.float64))
    assert (np.abs(got - exact) <= 2.5e-7 * np.abs(x)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -1e30])
def test_gelu_of_what_is_no_number_or_very_large(compiled: NumpyKernels, value: float) -> None:
    x = np.full(33, value, np.float32)
    expected = np.where(x < 0, np.float32(0), x)
    compiled.gelu_in_place(x)
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_number_stays_in_its_rows(
    form: NumpyKernels, bad: float, rng: np.random.Generator
) -> None:
    a, b, out = drawn(rng, 9, 30), drawn(rng, 30, 40), np.empty((9, 40), np.float32)
    a[4, 7] = bad
    with np.errstate(all="ignore"):
        form.product(a, b, out, 16, Then(gelu=True))
        spoilt = ~np.isfinite(out)
        assert spoilt[4].any() and not spoilt[[0, 1, 2, 3, 5, 6, 7, 8]].any()
        queries, keys, out = drawn(rng, 9, 8), drawn(rng, 20, 8), np.empty((9, 8), np.float32)
        queries[4, 3] = bad
        form.attend(queries, keys, keys, None, out)
    assert np.isnan(out[4]).all() and np.isfinite(out[[0, 3, 5, 8]]).all()


def test_what_does_not_fit_together_is_refused(compiled: NumpyKernels) -> None:
    def ones(*shape: int) -> np.ndarray:
        return np.ones(shape, np.float32)

    out, vector = np.full((3, 5), 7, np.float32), ones(5)
    product, attend = compiled.product, compiled.attend
    wrong: list[Any] = [
        lambda: product(ones(3, 4), ones(3, 5), out, run=96),
        lambda: product(ones(2, 4), ones(4, 5), out, run=96),
        lambda: product(ones(3, 4), ones(4, 6), out, run=96),
        lambda: product(ones(3, 4), ones(4, 5), out.astype(np.float64), run=96),
        lambda: product(ones(3, 4), ones(4, 5), np.ones((5, 3), "f").T, run=96),
        lambda: product(ones(3, 4), ones(4, 5), out, 96, Then(bias=ones(4))),
        lambda: product(ones(3, 4), ones(4, 5), out, 96, Then(scaling=(vector, ones(4), vector))),
        lambda: compiled.convolve(ones(6, 4), ones(3, 4, 5), out, 2, run=64),
        lambda: compiled.convolve(ones(7, 3), ones(3, 4, 5), out, 2, run=64),
        lambda: attend(ones(3, 5), ones(4, 4), ones(4, 4), None, out),
        lambda: attend(ones(3, 5), ones(4, 5), ones(3, 5), None, out),
        lambda: attend(ones(2, 5), ones(4, 5), ones(4, 5), None, out),
        lambda: attend(ones(3, 5), ones(4, 5), ones(4, 5), np.zeros(3, bool), out),
        lambda: compiled.layer_norm(ones(2, 5), out, vector, vector),
        lambda: compiled.layer_norm(ones(3, 5), out, vector, ones(4)),
        lambda: compiled.gelu_in_place(np.ones((4, 6), "f")[:, ::2]),
        lambda: compiled.gelu_in_place(np.ones((4, 6))),
    ]
    for index, call in enumerate(wrong):
        with pytest.raises(ValueError, match=r"fit together|product|float32|contiguous|broadcast"):
            call()
            pytest.fail(f"{index} was computed")
    assert np.isin(out, [0, 1, 7]).all(), "something was computed after all"


def test_matrices_that_lie_otherwise_are_read_as_they_are(
    compiled: NumpyKernels, rng: np.random.Generator
) -> None:
    a, b = drawn(rng, 30, 9).T, drawn(rng, 40, 30).T
    out = np.empty((9, 40), np.float32)
    compiled.product(a, b, out, run=96)
    np.testing.assert_allclose(out, a.astype(np.float64) @ b, atol=1e-5)
    turned = [drawn(rng, 8, n).T for n in (9, 20, 20)]
    out, plain = np.empty((2, 9, 8), np.float32)
    compiled.attend(*turned, None, out)
    compiled.attend(*map(np.ascontiguousarray, turned), None, plain)
    assert (out == plain).all()


def test_threads_have_memory_of_their_own() -> None:
    scratch, found = Scratch(), []
    mine = scratch.of(100)
    other = threading.Thread(target=lambda: found.append(scratch.of(100)))
    other.start()
    other.join()
    assert not np.shares_memory(mine, found[0])
    assert np.shares_memory(mine, scratch.of(90)) and len(scratch.of(1000)) == 1000
    assert mine.ctypes.data % 64 == 0 and scratch.of(77).ctypes.data % 64 == 0


def test_a_pass_is_the_same_on_any_number_of_threads(
    compiled: NumpyKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "chosen", lambda: compiled)
    model, waveform = random_model(TINY), mx.array(noise(20000)[None])
    passes = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(cpu.blas, "_stated", lambda threads=threads: threads)
        monkeypatch.setattr(cpu, "MIN_MACS_PER_THREAD", 1)
        passes.append(np.array(model(waveform)["x"]))
    for other in passes[1:]:
        np.testing.assert_allclose(other, passes[0], atol=1e-5)


def choice(code: str = "", **environment: str) -> str:
    """Whose steps a new process takes, after ``code``."""
    ran = run_python(
        "-c",
        f"{code}\nfrom mlx_contentvec.ops import kernels\n"
        "print(type(kernels.chosen()).__name__, kernels.chosen() is kernels.chosen())",
        **({"env": environment} if environment else {}),
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    name, once = ran.stdout.split()
    assert once == "True"
    return name


def test_steps_are_compiled_where_they_can_be() -> None:
    kernels_of("compiled")
    assert choice() in ("LlvmKernels", "LlvmProducts")


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.environ['MLX_CONTENTVEC_KERNELS'] = 'numpy'",
        "import sys; sys.modules['llvmlite'] = None",
        "import sys; sys.modules['llvmlite.binding'] = None",
        "import sys; sys.platform = 'darwin'",
        # what systemd's MemoryDenyWriteExecute asks of the kernel: PR_SET_MDWE
        "import ctypes; assert ctypes.CDLL(None).prctl(65, 1, 0, 0, 0) == 0",
        "import resource; resource.setrlimit(resource.RLIMIT_AS, (900 << 20,) * 2)",
        "import llvmlite.binding as llvm; llvm.get_host_cpu_features = lambda: {'sse2': True}",
        "import llvmlite.binding as llvm; llvm.parse_assembly = None",
        "from mlx_contentvec.ops import kernels_llvm; kernels_llvm._LN2_HIGH = 0.7",
        "from mlx_contentvec.ops import kernels_llvm; kernels_llvm.KEYS_PER_RUN = 95.0",
        "from mlx_contentvec.ops import kernels_llvm; kernels_llvm.HIDDEN_SCORE = 0.0",
    ],
)
def test_else_they_are_numpys(code: str) -> None:
    kernels_of("compiled")
    assert choice(code) == "NumpyKernels"


def test_threads_that_ask_at_once_compile_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[NumpyKernels] = []
    kernels._chosen.cache_clear()
    monkeypatch.setattr(kernels, "_compiled", lambda: asked.append(NumpyKernels()))
    found: list[NumpyKernels] = []
    threads = [threading.Thread(target=lambda: found.append(kernels.chosen())) for _ in range(8)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(asked) == 1 and len(set(map(id, found))) == 1
    finally:
        kernels._chosen.cache_clear()


def test_they_are_compiled_while_weights_are_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    monkeypatch.setattr(ops, "device_kind", lambda: "cpu")
    monkeypatch.setattr(kernels, "chosen", lambda: threads.append(threading.current_thread()))
    with ops.compiling_for([mx.zeros(1)], 64):
        pass
    with ops.compiling_for([], 64):
        pass
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread() and not threads[0].is_alive()


def test_a_process_may_end_while_they_are_compiled() -> None:
    code = "import threading\nfrom mlx_contentvec.ops import kernels\n"
    code += "threading.Thread(target=kernels.chosen).start()\n"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize(
    ("features", "vendor", "family", "rows", "vectors", "multiplies"),
    [
        ("avx2 fma avx512f", "GenuineIntel", "6", 6, 4, True),
        ("avx2 fma avx512f", "AuthenticAMD", "26", 6, 4, True),
        ("avx2 fma avx512f", "AuthenticAMD", "25", 6, 4, False),
        ("avx2 fma", "AuthenticAMD", "23", 6, 1, False),
    ],
)
def test_a_processor_has_the_tile_that_is_fastest_there(
    features: str, vendor: str, family: str, rows: int, vectors: int, multiplies: bool
) -> None:
    optional("llvmlite", "pip install llvmlite")
    from mlx_contentvec.ops import kernels_llvm

    wide = " avx512cd avx512bw avx512dq avx512vl" if "avx512f" in features else ""
    cpuinfo = f"vendor_id\t: {vendor}\ncpu family\t: {family}\nflags\t\t: {features}{wide}\n\n"
    known = dict.fromkeys(features.split(), True)
    assert kernels_llvm.tile_for(known, cpuinfo) == (rows, vectors, multiplies)
    assert kernels_llvm.tile_for(dict.fromkeys(known, False), cpuinfo) is None
