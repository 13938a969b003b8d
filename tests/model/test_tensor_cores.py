"""float32 products on a GPU's tensor cores: which are computed there, and how exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mlx_contentvec.backend import device_kind, mx
from mlx_contentvec.ops import mlx as ops
from mlx_contentvec.ops import tensor_cores

erf = np.vectorize(math.erf)
on_tensor_cores = pytest.mark.skipif(
    device_kind() != "cuda" or not tensor_cores.are_here(),
    reason="no NVIDIA GPU with tensor cores for TF32",
)


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def true_product(x, weight, bias, kernel, stride, then_gelu):
    """In float64: x (batch, time, channels), weight (kernel * channels, out)."""
    batch, time, channels = x.shape
    frames = (time - kernel) // stride + 1
    windows = np.stack([x[:, i * stride : i * stride + kernel] for i in range(frames)], axis=1)
    y = windows.reshape(batch, frames, kernel * channels).astype(np.float64) @ weight
    y = y if bias is None else y + bias
    return gelu(y) if then_gelu else y


@pytest.fixture
def numbers():
    return np.random.default_rng(0)


def drawn(numbers, *shape):
    return numbers.standard_normal(shape).astype(np.float32)


CASES = [
    # batch, time, channels, kernel, stride, out, bias, gelu
    pytest.param(1, 49, 768, 1, 1, 768, True, False, id="linear"),
    pytest.param(3, 100, 768, 1, 1, 3072, True, True, id="first of a feed-forward"),
    pytest.param(1, 257, 3072, 1, 1, 768, True, False, id="second of a feed-forward"),
    pytest.param(2, 401, 512, 3, 2, 512, False, True, id="convolution of three"),
    pytest.param(2, 260, 512, 2, 2, 512, False, True, id="convolution of two"),
    pytest.param(1, 1, 32, 1, 1, 64, False, False, id="one row, one block"),
    pytest.param(1, 128, 32, 1, 1, 64, True, False, id="a whole block of rows"),
    pytest.param(1, 129, 64, 1, 1, 128, True, False, id="one row more than a block"),
    pytest.param(5, 7, 32, 3, 1, 64, True, True, id="clips shorter than a block"),
]


@on_tensor_cores
def test_the_kernel_is_compiled_and_exact_where_the_hardware_is():
    assert tensor_cores.works()


@on_tensor_cores
@pytest.mark.parametrize("batch, time, channels, kernel, stride, out, with_bias, then_gelu", CASES)
def test_a_product_is_as_exact_as_float32(
    numbers, batch, time, channels, kernel, stride, out, with_bias, then_gelu
):
    x = drawn(numbers, batch, time, channels)
    weight = drawn(numbers, kernel * channels, out) / np.float32(np.sqrt(kernel * channels))
    bias = drawn(numbers, out) if with_bias else None
    y = tensor_cores.product(
        mx.array(x),
        mx.array(weight),
        None if bias is None else mx.array(bias),
        kernel,
        stride,
        then_gelu,
    )
    true = true_product(x, weight, bias, kernel, stride, then_gelu)
    plain = true_product(x, weight, bias, kernel, stride, False).astype(np.float32)
    assert y.shape == true.shape
    # half of the last bit of each number, and as much as sums of 32 in a row and theirs lose
    error = np.array(y) - true
    assert np.sqrt((error**2).mean()) <= 3e-7 * np.sqrt((plain**2).mean())
    assert np.abs(error).max() <= 3e-6 * np.abs(plain).max()


@on_tensor_cores
@pytest.mark.parametrize("size", [1e-30, 1e-3, 1e4, 1e30])
def test_a_product_of_numbers_of_any_size(numbers, size):
    x, weight = drawn(numbers, 1, 200, 64) * np.float32(size), drawn(numbers, 64, 64)
    y = tensor_cores.product(mx.array(x), mx.array(weight), None, 1, 1, False)
    true = x.astype(np.float64) @ weight
    assert np.abs(np.array(y) - true).max() <= 1e-6 * np.abs(true).max()


@on_tensor_cores
def test_a_product_of_arrays_that_are_not_aligned_or_not_contiguous(numbers):
    flat, weight = drawn(numbers, 1 + 200 * 64), drawn(numbers, 64, 64)
    x = mx.array(flat)[1:].reshape(1, 200, 64)
    true = flat[1:].reshape(1, 200, 64).astype(np.float64) @ weight
    columns = mx.array(np.ascontiguousarray(weight.T)).T
    for given in (mx.array(weight), columns):
        y = np.array(tensor_cores.product(x, given, None, 1, 1, False))
        assert np.abs(y - true).max() <= 1e-6 * np.abs(true).max()
    turned = mx.array(np.ascontiguousarray(flat[1:].reshape(1, 200, 64).transpose(0, 2, 1)))
    y = np.array(tensor_cores.product(turned.transpose(0, 2, 1), given, None, 1, 1, False))
    assert np.abs(y - true).max() <= 1e-6 * np.abs(true).max()


class Recorder:
    """In the place of the kernel, and like it without a gradient; how it was called."""

    def __init__(self):
        self.calls = []

    def __call__(self, *, inputs, output_shapes, grid, threadgroup, **_):
        self.calls.append((grid, threadgroup))
        x, weight, bias, geometry = inputs
        kernel, stride, then_gelu = geometry.tolist()
        x, weight, bias = (np.array(part) for part in (x, weight, bias))
        y = true_product(x, weight, bias, kernel, stride, then_gelu).astype(np.float32)
        assert output_shapes == [y.shape]
        return [mx.array(y)]


@pytest.fixture
def recorder(monkeypatch):
    """A GPU with tensor cores, as far as it can be had without one."""
    recorder = Recorder()
    monkeypatch.setattr(tensor_cores, "_kernel", lambda: recorder)
    monkeypatch.setattr(tensor_cores, "works", lambda: True)
    monkeypatch.setattr(ops, "device_kind", lambda: "cuda")
    tensor_cores._prepared.cache_clear()
    yield recorder
    tensor_cores._prepared.cache_clear()


def layer(numbers, inputs=64, outputs=128):
    weight, bias = mx.array(drawn(numbers, outputs, inputs)), mx.array(drawn(numbers, outputs))
    return weight, bias


def test_a_linear_layer_of_many_rows_runs_on_tensor_cores(recorder, numbers):
    weight, bias = layer(numbers)
    x = drawn(numbers, 2, 100, 64)
    y = np.array(ops.linear(mx.array(x), weight, bias, then_gelu=True))
    # two blocks of rows, two of outputs
    assert recorder.calls == [((4 * tensor_cores.THREADS, 1, 1), (tensor_cores.THREADS, 1, 1))]
    true = gelu(x.astype(np.float64) @ np.array(weight).T + np.array(bias))
    np.testing.assert_allclose(y, true, rtol=1e-4, atol=1e-4)


def test_a_convolution_runs_on_tensor_cores(recorder, numbers):
    x, weight = drawn(numbers, 2, 41, 32), drawn(numbers, 64, 3, 32)
    y = np.array(ops.conv1d(mx.array(x), mx.array(weight), None, 2, then_gelu=True))
    assert len(recorder.calls) == 1
    matrix = weight.transpose(1, 2, 0).reshape(96, 64)
    true = true_product(x, matrix, None, 3, 2, then_gelu=True)
    np.testing.assert_allclose(y, true, rtol=1e-4, atol=1e-4)


def no_tensor_cores(monkeypatch):
    monkeypatch.setattr(tensor_cores, "works", lambda: False)


def other_device(monkeypatch):
    monkeypatch.setattr(ops, "device_kind", lambda: "metal")


def plain_sums(monkeypatch):
    monkeypatch.setattr(ops, "SHORT_SUMS", False)


def tf32_asked_for(monkeypatch):
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")


@pytest.mark.parametrize("change", [no_tensor_cores, other_device, plain_sums, tf32_asked_for])
def test_elsewhere_mlx_multiplies(recorder, numbers, monkeypatch, change):
    change(monkeypatch)
    weight, bias = layer(numbers)
    mx.eval(ops.linear(mx.array(drawn(numbers, 2, 100, 64)), weight, bias))
    mx.eval(ops.conv1d(mx.array(drawn(numbers, 1, 9, 32)), mx.ones((64, 3, 32)), None, 2))
    assert recorder.calls == []


@pytest.mark.parametrize(
    "rows, inputs, outputs, dtype",
    [
        pytest.param(49, 64, 64, mx.float32, id="few rows"),
        pytest.param(200, 48, 64, mx.float32, id="inputs of no whole block"),
        pytest.param(200, 64, 96, mx.float32, id="outputs of no whole block"),
        pytest.param(200, 64, 64, mx.float16, id="half precision"),
    ],
)
def test_mlx_multiplies_what_the_kernel_does_not(recorder, numbers, rows, inputs, outputs, dtype):
    weight, bias = (part.astype(dtype) for part in layer(numbers, inputs, outputs))
    x = mx.array(drawn(numbers, 1, rows, inputs)).astype(dtype)
    assert ops.linear(x, weight, bias).shape == (1, rows, outputs)
    assert recorder.calls == []


def plain_linear(x, weight, bias):
    return ops.gelu(x @ weight.T + bias)


def linear(x, weight, bias):
    return ops.linear(x, weight, bias, then_gelu=True)


def plain_convolution(x, weight, bias):
    return ops.gelu(mx.conv1d(x, weight, 2) + bias)


def convolution(x, weight, bias):
    return ops.conv1d(x, weight, bias, 2, then_gelu=True)


@pytest.mark.parametrize(
    "ours, plain, x, weight",
    [
        pytest.param(linear, plain_linear, (2, 100, 64), (128, 64), id="linear"),
        pytest.param(convolution, plain_convolution, (2, 9, 32), (64, 3, 32), id="convolution"),
    ],
)
def test_gradients_are_those_of_the_plain_product(recorder, numbers, ours, plain, x, weight):
    arguments = [mx.array(drawn(numbers, *shape)) for shape in (x, weight, weight[:1])]

    def gradients(function):
        def loss(*arguments):
            return (function(*arguments) ** 2).sum()

        return [np.array(part) for part in mx.grad(loss, argnums=(0, 1, 2))(*arguments)]

    for found, expected in zip(gradients(ours), gradients(plain), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
    assert recorder.calls


def trial(monkeypatch, kernel, capability=9):
    info = {"compute_capability_major": capability}
    monkeypatch.setattr(mx, "device_info", lambda: info, raising=False)
    monkeypatch.setattr(tensor_cores, "_kernel", lambda: kernel)
    tensor_cores._prepared.cache_clear()
    works = tensor_cores.works.__wrapped__()
    tensor_cores._prepared.cache_clear()
    return works


def refuses(**_):
    raise RuntimeError("Failed to compile kernel")


def less_exact(**call):
    call["inputs"][0] = call["inputs"][0].astype(mx.bfloat16).astype(mx.float32)
    return Recorder()(**call)


def has_no_memory(**_):
    raise RuntimeError("cudaMallocAsync failed: out of memory")


def test_a_trial_without_memory_is_no_answer(monkeypatch):
    with pytest.raises(RuntimeError, match="out of memory"):
        trial(monkeypatch, has_no_memory)
    assert trial(monkeypatch, Recorder())


def test_mlx_that_tells_no_capability_multiplies_itself(monkeypatch):
    monkeypatch.setattr(mx, "device_info", dict, raising=False)
    assert not tensor_cores.works.__wrapped__()
    monkeypatch.delattr(mx, "device_info")
    assert not tensor_cores.works.__wrapped__()


def test_nothing_is_convolved_to_nothing(recorder):
    assert ops.conv1d(mx.zeros((0, 9, 32)), mx.ones((64, 3, 32)), None, 2).shape[0] == 0
    assert recorder.calls == []


def test_the_trial_asks_for_a_right_product(monkeypatch):
    assert trial(monkeypatch, Recorder())
    assert not trial(monkeypatch, Recorder(), capability=7)
    assert not trial(monkeypatch, refuses)
    assert not trial(monkeypatch, less_exact)
