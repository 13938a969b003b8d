"""What is computed on a GPU's tensor cores, and how exactly."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import threading

import numpy as np
import pytest

from mlx_contentvec import ops as all_ops
from mlx_contentvec.backend import device_kind, mx, nn
from mlx_contentvec.config import ModelConfig
from mlx_contentvec.hubert import EncoderLayer, Linear
from mlx_contentvec.model import ContentvecModel
from mlx_contentvec.ops import mlx as ops
from mlx_contentvec.ops import tensor_cores
from tests.small_models import TINY, random_weights_file

erf = np.vectorize(math.erf)
on_tensor_cores = pytest.mark.skipif(
    device_kind() != "cuda" or not tensor_cores.are_here(),
    reason="no NVIDIA GPU with tensor cores for TF32",
)
HALVES = pytest.mark.parametrize("half", [mx.float16, mx.bfloat16], ids=["float16", "bfloat16"])


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def true_attention(qkv, heads, mask):
    """In float64: qkv (batch, frames, 3 * width), mask (batch, frames) or None."""
    batch, frames, row = qkv.shape
    parts = qkv.astype(np.float64).reshape(batch, frames, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    scores = parts[0] @ parts[1].swapaxes(-1, -2) / np.sqrt(parts.shape[-1])
    if mask is not None:
        scores = np.where(mask[:, None, None], scores, -1e30)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = weights / weights.sum(axis=-1, keepdims=True) @ parts[2]
    return mixed.transpose(0, 2, 1, 3).reshape(batch, frames, row // 3)


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
    pytest.param(1, 3000, 832, 1, 1, 64, True, True, id="three parts of which one is longer"),
]


@on_tensor_cores
def test_the_kernel_is_compiled_and_exact_where_the_hardware_is():
    assert all(map(tensor_cores.works, tensor_cores.CLOSE))


@on_tensor_cores
@pytest.mark.parametrize("batch, time, channels, kernel, stride, out, with_bias, then_gelu", CASES)
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_a_product_is_as_exact_as_float32(
    numbers, batch, time, channels, kernel, stride, out, with_bias, then_gelu, with_residual
):
    x = drawn(numbers, batch, time, channels)
    weight = drawn(numbers, kernel * channels, out) / np.float32(np.sqrt(kernel * channels))
    bias = drawn(numbers, out) if with_bias else None
    true = true_product(x, weight, bias, kernel, stride, then_gelu)
    residual = drawn(numbers, *true.shape) if with_residual else None
    y = tensor_cores.product(
        mx.array(x),
        mx.array(weight),
        None if bias is None else mx.array(bias),
        kernel,
        stride,
        then_gelu=then_gelu,
        residual=None if residual is None else mx.array(residual),
    )
    true = true if residual is None else true + residual
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
    y = tensor_cores.product(mx.array(x), mx.array(weight), None)
    true = x.astype(np.float64) @ weight
    assert np.abs(np.array(y) - true).max() <= 1e-6 * np.abs(true).max()


@on_tensor_cores
def test_a_product_of_arrays_that_are_not_aligned_or_not_contiguous(numbers):
    flat, weight = drawn(numbers, 1 + 200 * 64), drawn(numbers, 64, 64)
    x = mx.array(flat)[1:].reshape(1, 200, 64)
    true = flat[1:].reshape(1, 200, 64).astype(np.float64) @ weight
    columns = mx.array(np.ascontiguousarray(weight.T)).T
    for given in (mx.array(weight), columns):
        y = np.array(tensor_cores.product(x, given, None))
        assert np.abs(y - true).max() <= 1e-6 * np.abs(true).max()
    turned = mx.array(np.ascontiguousarray(flat[1:].reshape(1, 200, 64).transpose(0, 2, 1)))
    y = np.array(tensor_cores.product(turned.transpose(0, 2, 1), given, None))
    assert np.abs(y - true).max() <= 1e-6 * np.abs(true).max()


@on_tensor_cores
@pytest.mark.parametrize(
    "batch, frames, heads, size",
    [
        pytest.param(1, 1, 12, 1, id="one frame"),
        pytest.param(2, 64, 1, 1, id="a whole block"),
        pytest.param(1, 65, 12, 1, id="one frame more than a block"),
        pytest.param(3, 249, 12, 3, id="scores that differ by 100"),
        pytest.param(1, 1499, 2, 1, id="many blocks"),
    ],
)
@pytest.mark.parametrize("with_mask", [False, True], ids=["", "mask"])
def test_attention_is_as_exact_as_float32(numbers, batch, frames, heads, size, with_mask):
    qkv = drawn(numbers, batch, frames, 3 * heads * 64) * np.float32(size)
    mask = None
    if with_mask:
        # behind its end, and all of a block at its beginning
        mask = np.ones((batch, frames), bool)
        mask[0, frames - frames // 3 :] = False
        mask[-1, : frames // 2] = False
    y = tensor_cores.attention(mx.array(qkv), None if mask is None else mx.array(mask))
    true = true_attention(qkv, heads, mask)
    error = np.array(y) - true
    # a score is rounded where it is large, and its exponential is off by as much
    loss = 3e-7 + 1e-7 * size**2
    assert np.sqrt((error**2).mean()) <= loss * np.sqrt((true**2).mean())
    assert np.abs(error).max() <= 20 * loss * np.abs(true).max()


@on_tensor_cores
@HALVES
@pytest.mark.parametrize("with_mask", [False, True], ids=["", "mask"])
@pytest.mark.parametrize(
    "batch, frames, heads",
    [(1, 1, 12), (2, 64, 1), (1, 65, 12), (3, 249, 12), (1, 1499, 2)],
)
def test_attention_in_half_precision_is_rounded_twice(
    numbers, half, batch, frames, heads, with_mask
):
    qkv = mx.array(drawn(numbers, batch, frames, 3 * heads * 64)).astype(half)
    mask = None
    if with_mask:
        mask = np.ones((batch, frames), bool)
        mask[0, frames - frames // 3 :] = False
        mask[-1, : frames // 2] = False
    y = tensor_cores.attention(qkv, None if mask is None else mx.array(mask))
    assert y.dtype == half
    exact = np.array(qkv.astype(mx.float32))
    error = np.array(y.astype(mx.float32)) - (true := true_attention(exact, heads, mask))
    # weights and results: half of the last of 11 or 8 bits each
    bit = 2.0**-11 if half == mx.float16 else 2.0**-8
    assert np.sqrt((error**2).mean()) <= bit * np.sqrt((true**2).mean())
    assert np.abs(error).max() <= 2 * bit * np.abs(true).max()


@on_tensor_cores
@HALVES
def test_attention_in_half_precision_of_an_array_that_is_not_aligned(numbers, half):
    flat = mx.array(drawn(numbers, 1 + 2 * 200 * 192)).astype(half)
    qkv = flat[1:].reshape(2, 200, 192)
    mask = np.arange(200) < np.array([[200], [150]])
    true = true_attention(np.array(qkv.astype(mx.float32)), 1, mask)
    y = np.array(tensor_cores.attention(qkv, mx.array(mask)).astype(mx.float32))
    assert np.abs(y - true).max() <= tensor_cores.CLOSE[half] * np.abs(true).max()


@on_tensor_cores
def test_attention_of_an_array_that_is_not_aligned_or_not_contiguous(numbers):
    flat = drawn(numbers, 1 + 70 * 192)
    qkv = flat[1:].reshape(1, 70, 192)
    true = true_attention(qkv, 1, None)
    turned = mx.array(np.ascontiguousarray(qkv.transpose(0, 2, 1))).transpose(0, 2, 1)
    for given in (mx.array(flat)[1:].reshape(1, 70, 192), turned):
        y = np.array(tensor_cores.attention(given, None))
        assert np.abs(y - true).max() <= 1e-6 * np.abs(true).max()


@on_tensor_cores
@pytest.mark.parametrize("dtype", tensor_cores.CLOSE, ids=str)
def test_a_clip_without_a_key_gets_the_mean_of_its_values(numbers, dtype):
    qkv = mx.array(drawn(numbers, 2, 70, 192)).astype(dtype)
    exact = np.array(qkv.astype(mx.float32))
    mask = np.array([[True] * 70, [False] * 70])
    y = np.array(tensor_cores.attention(qkv, mx.array(mask)).astype(mx.float32))
    off = max(1e-5, 4 * tensor_cores.CLOSE[dtype])
    np.testing.assert_allclose(y[0], true_attention(exact[:1], 1, None)[0], rtol=1e-4, atol=off)
    mean = exact[1, :, 128:].mean(axis=0)
    np.testing.assert_allclose(y[1], np.tile(mean, (70, 1)), rtol=1e-4, atol=off)


@on_tensor_cores
@pytest.mark.parametrize("dtype", tensor_cores.CLOSE, ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_attention_to_what_is_no_number_is_none(numbers, dtype, value):
    qkv = drawn(numbers, 1, 70, 192)
    qkv[0, 69, 64] = value
    y = tensor_cores.attention(mx.array(qkv).astype(dtype), None)
    lost = np.isnan(np.array(y.astype(mx.float32)))
    # queries of the other sign give an infinite key no weight
    assert lost.all() if np.isnan(value) else lost.any()


@on_tensor_cores
def test_a_row_that_holds_no_number_is_seen(numbers):
    x = drawn(numbers, 1, 130, 64)
    x[0, 129, 0] = np.nan
    y = np.array(tensor_cores.product(mx.array(x), mx.array(drawn(numbers, 64, 64)), None))
    assert np.isnan(y[0, 129]).all() and not np.isnan(y[0, :129]).any()


class Recorder:
    """In the place of the kernel, and like it without a gradient; how it was called."""

    def __init__(self):
        self.calls = []
        self.dtype = mx.float32

    def of(self, dtype):
        """The kernel for a type."""
        self.dtype = dtype
        return self

    def __call__(self, *, inputs, output_shapes, output_dtypes, grid, threadgroup):
        # of other types it would be another kernel, or none
        dtype = inputs[0].dtype
        assert [part.dtype for part in inputs] == [dtype] * 4 + [mx.int32]
        assert output_dtypes == [dtype]
        geometry = np.array(inputs[4])
        x, weight, bias, residual = (np.array(part.astype(mx.float32)) for part in inputs[:4])
        mode, parts, kernel, stride, with_bias, then_gelu, with_residual = geometry.tolist()
        assert threadgroup == (tensor_cores.THREADS, 1, 1)
        self.calls.append((mode, parts, grid[0]))
        assert dtype == mx.float32 or mode == tensor_cores._ATTEND
        assert dtype == self.dtype
        if mode == tensor_cores._ATTEND:
            heads = x.shape[-1] // 3 // tensor_cores.HEAD_WIDTH
            y = true_attention(x, heads, bias != 0 if with_bias else None)
            finished = False
        elif mode == tensor_cores._ADD_UP:
            assert len(x) == parts
            y, finished = x.sum(axis=0), True
        else:
            by_part = np.array_split(np.arange(len(weight)), parts)
            y = [masked_product(x, weight, rows, kernel, stride) for rows in by_part]
            y, finished = (y[0], True) if parts == 1 else (np.stack(y), False)
        if finished:
            y = y + bias if with_bias else y
            y = gelu(y) if then_gelu else y
            y = y + residual if with_residual else y
        assert output_shapes == [y.shape]
        return [mx.array(y.astype(np.float32)).astype(dtype)]


def masked_product(x, weight, rows, kernel, stride):
    part = np.zeros_like(weight)
    part[rows] = weight[rows]
    return true_product(x, part, None, kernel, stride, False)


@pytest.fixture
def recorder(monkeypatch):
    """A GPU with tensor cores, as far as it can be had without one."""
    recorder = Recorder()
    monkeypatch.setattr(tensor_cores, "_kernel", recorder.of)
    monkeypatch.setattr(tensor_cores, "works", lambda dtype: True)
    for module in (ops, all_ops):
        monkeypatch.setattr(module, "device_kind", lambda: "cuda")
    forget()
    yield recorder
    forget()


def forget():
    tensor_cores._product.cache_clear()
    tensor_cores._attention.cache_clear()


def layer(numbers, inputs=64, outputs=128):
    weight, bias = mx.array(drawn(numbers, outputs, inputs)), mx.array(drawn(numbers, outputs))
    return weight, bias


def test_a_linear_layer_of_many_rows_runs_on_tensor_cores(recorder, numbers):
    weight, bias = layer(numbers)
    x = drawn(numbers, 2, 100, 64)
    y = np.array(ops.linear(mx.array(x), weight, bias, then_gelu=True))
    # two blocks of rows, two of outputs
    assert recorder.calls == [(tensor_cores._MULTIPLY, 1, 4 * tensor_cores.THREADS)]
    true = gelu(x.astype(np.float64) @ np.array(weight).T + np.array(bias))
    np.testing.assert_allclose(y, true, rtol=1e-4, atol=1e-4)


def test_a_convolution_runs_on_tensor_cores(recorder, numbers):
    x, weight = drawn(numbers, 2, 41, 32), drawn(numbers, 64, 3, 32)
    y = np.array(ops.conv1d(mx.array(x), mx.array(weight), None, 2, then_gelu=True))
    assert len(recorder.calls) == 1
    matrix = weight.transpose(1, 2, 0).reshape(96, 64)
    true = true_product(x, matrix, None, 3, 2, then_gelu=True)
    np.testing.assert_allclose(y, true, rtol=1e-4, atol=1e-4)


def test_a_layer_of_many_inputs_is_added_up_in_parts(recorder, numbers):
    weight, bias = layer(numbers, 3072, 128)
    x, residual = drawn(numbers, 2, 100, 3072), drawn(numbers, 2, 100, 128)
    y = ops.linear(mx.array(x), weight, bias, residual=mx.array(residual))
    threads = tensor_cores.THREADS
    # two blocks of rows, two of outputs, and parts of 256 inputs; 25,600 numbers of each
    assert recorder.calls == [
        (tensor_cores._MULTIPLY, 12, 4 * 12 * threads),
        (tensor_cores._ADD_UP, 12, 13 * threads),
    ]
    true = x.astype(np.float64) @ np.array(weight).T + np.array(bias) + residual
    np.testing.assert_allclose(np.array(y), true, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "rows, inputs, outputs, parts",
    [
        pytest.param(249, 768, 768, 1, id="as many inputs as are added up in one"),
        pytest.param(249, 800, 768, 3, id="a few more, few rows"),
        pytest.param(100_000, 800, 768, 2, id="a few more, many rows"),
        pytest.param(100_000, 3072, 768, 4, id="many rows"),
        pytest.param(249, 3072, 768, 11, id="few rows"),
        pytest.param(1, 3072, 64, 12, id="one row"),
        pytest.param(50_000, 1536, 512, 2, id="a convolution of three"),
    ],
)
def test_a_long_sum_is_one_of_parts(rows, inputs, outputs, parts):
    assert tensor_cores.parts_of(rows, inputs, outputs) == parts


@pytest.mark.parametrize("with_mask", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("beside", [False, True], ids=["three arrays", "one array"])
@pytest.mark.parametrize("dtype", tensor_cores.CLOSE, ids=str)
def test_attention_runs_on_tensor_cores(recorder, numbers, beside, with_mask, dtype):
    qkv = mx.array(drawn(numbers, 2, 70, 3 * 128)).astype(dtype)
    mask = np.arange(70) < np.array([[70], [60]]) if with_mask else None
    given = None if mask is None else mx.array(mask)[:, None, None]
    y = ops.self_attention([qkv] if beside else mx.split(qkv, 3, axis=-1), 2, given)
    assert y.dtype == dtype
    # of two clips and two heads two blocks of queries each
    assert recorder.calls == [(tensor_cores._ATTEND, 1, 8 * tensor_cores.THREADS)]
    true = true_attention(np.array(qkv.astype(mx.float32)), 2, mask)
    error = np.abs(np.array(y.astype(mx.float32)) - true).max()
    assert error <= 2 * tensor_cores.CLOSE[dtype] * np.abs(true).max()


def test_each_type_is_tried_for_itself(recorder, numbers, monkeypatch):
    monkeypatch.setattr(tensor_cores, "works", lambda dtype: dtype == mx.float16)
    qkv = mx.array(drawn(numbers, 1, 9, 192))
    mx.eval(ops.self_attention([qkv], 1, None))
    assert recorder.calls == []
    mx.eval(ops.self_attention([qkv.astype(mx.float16)], 1, None))
    assert recorder.calls


def test_half_precision_has_nothing_to_do_with_tf32(recorder, numbers, monkeypatch):
    monkeypatch.setenv("MLX_ENABLE_TF32", "1")
    qkv = mx.array(drawn(numbers, 1, 9, 192)).astype(mx.float16)
    mx.eval(ops.self_attention([qkv], 1, None))
    assert recorder.calls


@HALVES
def test_mlx_attends_with_a_mask_by_products_that_need_no_plan(
    recorder, numbers, monkeypatch, half
):
    monkeypatch.delattr(mx.fast, "scaled_dot_product_attention")
    by_head = [mx.array(drawn(numbers, 2, 3, 9, 64)).astype(half) for _ in range(3)]
    # as when a clip is streamed, a kernel or not
    assert ops.attention(*by_head, mx.ones((2, 1, 1, 9), mx.bool_)).shape == (2, 9, 192)


def test_queries_and_keys_of_two_types_are_left_to_mlx(recorder, numbers):
    parts = mx.split(mx.array(drawn(numbers, 1, 9, 192)), 3, axis=-1)
    parts[2] = parts[2].astype(mx.float16)
    assert ops.self_attention(parts, 1, None).shape == (1, 9, 64)
    assert recorder.calls == []


@HALVES
@pytest.mark.parametrize(
    "head_width, here, planned", [(64, True, False), (64, False, True), (32, True, True)]
)
def test_a_plan_is_made_where_mlx_attends_in_half_precision(
    recorder, monkeypatch, half, head_width, here, planned
):
    monkeypatch.setattr(tensor_cores, "works", lambda dtype: here)
    assert ops.plans_attention(half, head_width) is planned
    assert not ops.plans_attention(mx.float32, head_width)


@pytest.mark.parametrize(
    "x, residual",
    [
        pytest.param((2, 100, 64), (2, 100, 128), id="of its shape"),
        pytest.param((2, 100, 64), (1, 100, 128), id="one for all clips"),
        pytest.param((2, 100, 64), (128,), id="one for all rows"),
        pytest.param((200, 64), (200, 128), id="a matrix"),
        pytest.param((2, 2, 50, 64), (2, 2, 50, 128), id="of four axes"),
        pytest.param((2, 2, 50, 64), (2, 1, 128), id="of four axes, repeated"),
    ],
)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_residual_is_added_to_a_linear_layer(recorder, numbers, monkeypatch, device, x, residual):
    monkeypatch.setattr(ops, "device_kind", lambda: device)
    weight, bias = layer(numbers)
    x, residual = drawn(numbers, *x), drawn(numbers, *residual)
    y = ops.linear(mx.array(x), weight, bias, residual=mx.array(residual))
    true = x.astype(np.float64) @ np.array(weight).T + np.array(bias) + residual
    assert y.shape == true.shape
    np.testing.assert_allclose(y, true, rtol=1e-4, atol=1e-4)
    assert bool(recorder.calls) == (device == "cuda")


def test_one_mask_for_all_clips(recorder, numbers):
    qkv, mask = drawn(numbers, 2, 9, 192), np.arange(9) < 5
    y = np.array(ops.self_attention([mx.array(qkv)], 1, mx.array(mask)[None, None, None]))
    true = true_attention(qkv, 1, np.tile(mask, (2, 1)))
    np.testing.assert_allclose(y, true, rtol=1e-5, atol=1e-5)
    assert recorder.calls


@pytest.mark.parametrize("shape", [(0, 9, 192), (2, 0, 192)])
def test_nothing_attends_to_nothing(recorder, shape):
    assert ops.self_attention([mx.zeros(shape)], 1, None).shape == (*shape[:2], 64)
    assert recorder.calls == []


@pytest.mark.parametrize("added", ["bias", "residual"])
def test_mlx_adds_what_is_of_another_type(recorder, numbers, added):
    weight, bias = layer(numbers)
    residual = mx.array(drawn(numbers, 2, 100, 128))
    if added == "bias":
        bias = bias.astype(mx.float16)
    else:
        residual = residual.astype(mx.float16)
    x = mx.array(drawn(numbers, 2, 100, 64))
    assert ops.linear(x, weight, bias, residual=residual).shape == (2, 100, 128)
    assert ops.conv1d(x, mx.ones((64, 3, 64)), mx.zeros(64, mx.float16), 2).shape[-1] == 64
    assert recorder.calls == []


@pytest.fixture
def on_cpu():
    """MLX's quantised product on CUDA needs headers that few machines have."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


class Doubled(Linear):
    """A layer of somebody's own."""

    def __call__(self, x):
        return 2 * super().__call__(x)


@pytest.mark.parametrize("kind", ["own", "plain", "subclass", "quantised"])
def test_a_layer_takes_what_somebody_put_in_the_place_of_its_own(numbers, on_cpu, kind):
    config = dataclasses.replace(TINY, encoder_embed_dim=64, encoder_ffn_embed_dim=64)
    encoder = EncoderLayer(config, conditioned=False)
    for module, name in ((encoder, "fc1"), (encoder, "fc2"), (encoder.self_attn, "out_proj")):
        layer = {"plain": nn.Linear, "subclass": Doubled}.get(kind, Linear)(64, 64)
        layer.weight, layer.bias = mx.array(drawn(numbers, 64, 64)), mx.array(drawn(numbers, 64))
        setattr(module, name, layer.to_quantized(64, 8) if kind == "quantised" else layer)
    x, attended = (mx.array(drawn(numbers, 2, 5, 64)) for _ in range(2))
    y = encoder.self_attn_layer_norm(x + encoder.self_attn.out_proj(attended))
    true = encoder.final_layer_norm(y + encoder.fc2(nn.gelu(encoder.fc1(y))))
    np.testing.assert_allclose(encoder.after_attention(x, attended), true, rtol=1e-4, atol=1e-4)


def no_tensor_cores(monkeypatch):
    monkeypatch.setattr(tensor_cores, "works", lambda dtype: False)


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
    mx.eval(ops.self_attention([mx.array(drawn(numbers, 1, 9, 192))], 1, None))
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


@pytest.mark.parametrize("dtype", tensor_cores.CLOSE, ids=str)
def test_mlx_attends_where_heads_are_of_another_width(recorder, numbers, dtype):
    qkv = mx.array(drawn(numbers, 1, 9, 192)).astype(dtype)
    assert ops.self_attention([qkv], 2, None).shape == (1, 9, 64)
    assert recorder.calls == []


def test_mlx_convolves_frames_that_are_no_whole_fours(recorder, numbers):
    x, weight = mx.array(drawn(numbers, 1, 40, 6)), mx.array(drawn(numbers, 64, 16, 6))
    assert ops.conv1d(x, weight, None, 2).shape == (1, 13, 64)
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


@pytest.mark.parametrize("with_mask", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("dtype", tensor_cores.CLOSE, ids=str)
def test_gradients_of_attention_are_those_of_mlx(recorder, numbers, with_mask, dtype):
    qkv = mx.array(drawn(numbers, 2, 9, 3 * 128)).astype(dtype)
    mask = mx.array(np.arange(9) < np.array([[9], [5]]))[:, None, None] if with_mask else None

    def plain(qkv):
        queries, keys, values = qkv.reshape(2, 9, 3, 2, 64).transpose(2, 0, 3, 1, 4)
        return (ops.attention(queries, keys, values, mask) ** 2).sum()

    def ours(qkv):
        return (ops.self_attention([qkv], 2, mask) ** 2).sum()

    gradient, expected = (np.array(mx.grad(f)(qkv).astype(mx.float32)) for f in (ours, plain))
    off = 1e-4
    if dtype != mx.float32:
        off = 10 * tensor_cores.CLOSE[dtype] * np.abs(expected).max()
    np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=off)
    assert recorder.calls


def test_gradients_reach_a_residual(recorder, numbers):
    weight, bias = layer(numbers)
    x, residual = drawn(numbers, 2, 100, 64), drawn(numbers, 2, 100, 128)

    def loss(residual):
        return (ops.linear(mx.array(x), weight, bias, residual=residual) * 3).sum()

    np.testing.assert_array_equal(mx.grad(loss)(mx.array(residual)), np.full_like(residual, 3))
    assert recorder.calls


def trial(monkeypatch, kernel, capability=9, dtype=mx.float32):
    info = {"compute_capability_major": capability}
    monkeypatch.setattr(mx, "device_info", lambda: info, raising=False)
    monkeypatch.setattr(
        tensor_cores, "_kernel", kernel.of if isinstance(kernel, Recorder) else lambda _: kernel
    )
    forget()
    try:
        return tensor_cores.works.__wrapped__(dtype)
    finally:
        forget()


def right(call):
    return Recorder().of(call["inputs"][0].dtype)(**call)


def less_exact(**call):
    if call["inputs"][4][0] == tensor_cores._MULTIPLY:
        call["inputs"][0] = call["inputs"][0].astype(mx.bfloat16).astype(mx.float32)
    return right(call)


def ignores_masks(**call):
    if call["inputs"][4][0] == tensor_cores._ATTEND:
        call["inputs"][2] = mx.ones_like(call["inputs"][2])
    return right(call)


def attends_wrongly(**call):
    (y,) = right(call)
    # of bfloat16 four times its last bit, of float16 as many
    off = {mx.float32: 1e-5, mx.float16: 2.0**-8, mx.bfloat16: 2.0**-5}[y.dtype]
    return [y * (1 + off)] if call["inputs"][4][0] == tensor_cores._ATTEND else [y]


def is_not_packed(_):
    raise FileNotFoundError("tensor_cores.cuh")


def has_no_memory(**_):
    raise RuntimeError("cudaMallocAsync failed: out of memory")


def test_a_trial_without_memory_is_no_answer(monkeypatch):
    with pytest.raises(RuntimeError, match="out of memory"):
        trial(monkeypatch, has_no_memory)
    assert trial(monkeypatch, Recorder())


def test_mlx_that_tells_no_capability_multiplies_itself(monkeypatch):
    monkeypatch.setattr(mx, "device_info", dict, raising=False)
    assert not tensor_cores.works.__wrapped__(mx.float32)
    monkeypatch.delattr(mx, "device_info")
    assert not tensor_cores.works.__wrapped__(mx.float32)


def test_nothing_is_convolved_to_nothing(recorder):
    assert ops.conv1d(mx.zeros((0, 9, 32)), mx.ones((64, 3, 32)), None, 2).shape[0] == 0
    assert recorder.calls == []


def test_the_trial_asks_for_a_right_product(monkeypatch):
    assert trial(monkeypatch, Recorder())
    assert not trial(monkeypatch, Recorder(), capability=7)
    for wrong in (less_exact, attends_wrongly, ignores_masks):
        assert not trial(monkeypatch, wrong)


@HALVES
def test_the_trial_asks_for_attention_in_half_precision(monkeypatch, half):
    asked = Recorder()
    assert trial(monkeypatch, asked, dtype=half)
    assert [mode for mode, *_ in asked.calls] == [tensor_cores._ATTEND]
    assert not trial(monkeypatch, Recorder(), dtype=mx.int32)
    for wrong in (attends_wrongly, ignores_masks):
        assert not trial(monkeypatch, wrong, dtype=half)


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError, ValueError])
def test_mlx_that_cannot_compile_for_them_multiplies_itself(monkeypatch, error):
    def refuses(**_):
        raise error("Failed to compile kernel")

    assert not trial(monkeypatch, refuses)


def test_an_application_packed_without_the_source_uses_mlx(monkeypatch):
    monkeypatch.setattr(tensor_cores, "are_here", lambda: True)
    monkeypatch.setattr(tensor_cores, "_kernel", is_not_packed)
    forget()
    assert not tensor_cores.works.__wrapped__(mx.float32)


class Compiler:
    """In the place of the trial: of what and in which threads it was asked, and where it ends."""

    def __init__(self, error=None):
        self.asked, self.threads, self.error = [], [], error
        self.begun, self.may_end = threading.Event(), threading.Event()

    def __call__(self, dtype):
        self.asked.append(dtype)
        self.threads.append(threading.current_thread())
        self.begun.set()
        assert self.may_end.wait(60)
        if self.error:
            raise self.error
        return True


@pytest.mark.parametrize(
    "error", [None, RuntimeError("out of memory"), OSError(12, "no memory"), MemoryError()]
)
@pytest.mark.filterwarnings("error")  # what is raised in a thread would be printed
def test_a_kernel_is_compiled_while_weights_are_loaded(recorder, monkeypatch, error):
    compiler = Compiler(error)
    monkeypatch.setattr(tensor_cores, "works", compiler)
    weights = [mx.zeros(1, mx.float16), mx.zeros(1), mx.zeros(1), mx.zeros(1, mx.uint32)]
    with all_ops.compiling_for(weights, 64):
        assert compiler.begun.wait(60)
        assert compiler.threads[0] is not threading.current_thread()
        compiler.may_end.set()
    assert not compiler.threads[0].is_alive()
    assert sorted(map(str, compiler.asked)) == ["mlx.core.float16", "mlx.core.float32"]


def test_where_no_thread_can_be_had_the_first_pass_compiles(recorder, monkeypatch):
    def refuses(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuses)
    done = False
    with all_ops.compiling_for([mx.zeros(1)], 64):
        done = True
    assert done


def test_what_fails_to_load_is_no_other_error(recorder, monkeypatch):
    compiler = Compiler()
    monkeypatch.setattr(tensor_cores, "works", compiler)
    with pytest.raises(KeyError), all_ops.compiling_for([mx.zeros(1)], 64):
        compiler.may_end.set()
        raise KeyError
    assert not compiler.threads[0].is_alive()


@pytest.mark.parametrize("change", [other_device, plain_sums, tf32_asked_for])
def test_nothing_is_compiled_that_is_not_used(recorder, monkeypatch, change):
    compiler = Compiler()
    monkeypatch.setattr(tensor_cores, "works", compiler)
    weights = [mx.zeros(1, mx.uint32)], [], [mx.zeros(1, mx.float16), mx.zeros(1, mx.bfloat16)]
    for given in weights:
        with all_ops.compiling_for(given, 80):
            pass
    change(monkeypatch)
    with all_ops.compiling_for([mx.zeros(1)], 64):
        pass
    assert compiler.threads == []


def test_products_of_float32_are_compiled_for_heads_of_any_width(recorder, monkeypatch):
    compiler = Compiler()
    compiler.may_end.set()
    monkeypatch.setattr(tensor_cores, "works", compiler)
    with all_ops.compiling_for([mx.zeros(1)], 80):
        pass
    assert compiler.asked == [mx.float32]


@pytest.mark.parametrize("lazy", [False, True])
def test_a_model_is_loaded_with_what_it_computes_by(monkeypatch, tmp_path, lazy):
    given = []

    @contextlib.contextmanager
    def compiling_for(weights, head_width):
        given.extend(weights)
        assert head_width == TINY.head_width
        yield

    path = random_weights_file(tmp_path / "tiny.safetensors", TINY)
    monkeypatch.setattr(all_ops, "compiling_for", compiling_for)
    ContentvecModel.from_file(path, lazy=lazy)
    assert bool(given) is not lazy


@pytest.mark.parametrize("dtype", tensor_cores.CLOSE, ids=str)
def test_the_source_names_every_number_it_is_given(monkeypatch, dtype):
    given = {}
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **options: given.update(options))
    tensor_cores._kernel(dtype)
    text = given["header"] + given["source"]
    named = re.findall(r"^constexpr int (\w+) = \d+;$", given["header"], re.MULTILINE)
    assert "HEAD_WIDTH" in named
    products = {mx.float32: "tf32.tf32", mx.float16: "f16.f16", mx.bfloat16: "bf16.bf16"}
    assert f".f32.{products[dtype]}.f32 " in given["header"]
    # each row of 16 bytes more, two blocks of keys and two of values
    assert f"constexpr int ROW_GAP = {16 // dtype.size};" in given["header"]
    assert given["shared_memory"] >= 4 * 64 * (64 * dtype.size + 16)
    if dtype == mx.float32:
        # three blocks of 128 rows of 32 inputs, and of 32 rows of 64 outputs
        assert given["shared_memory"] >= 3 * (128 * (4 * 32 + 16) + 32 * (4 * 64 + 32))
    assert [name for name in named if len(re.findall(rf"\b{name}\b", text)) < 2] == []
    assert "//" not in given["header"]


def test_each_type_has_a_kernel_of_its_own_name(monkeypatch):
    names = []
    monkeypatch.setattr(mx.fast, "cuda_kernel", lambda **options: names.append(options["name"]))
    for dtype in tensor_cores.CLOSE:
        tensor_cores._kernel(dtype)
    assert len(set(names)) == len(names) == 3
    assert all(name.isidentifier() for name in names)


@pytest.mark.parametrize(
    ("layers", "dtype", "here"),
    [
        pytest.param(ModelConfig().conv_layers, mx.float32, True, id="base"),
        pytest.param(ModelConfig().conv_layers, mx.float16, False, id="half precision"),
        pytest.param(((512, 10, 5), (480, 3, 2)), mx.float32, False, id="no whole blocks"),
        pytest.param(((480, 10, 5), (512, 3, 2)), mx.float32, True, id="whole blocks of inputs"),
        pytest.param(((490, 10, 5), (512, 2, 2)), mx.float32, False, id="no whole fours"),
    ],
)
def test_which_convolutions_run_on_tensor_cores(recorder, layers, dtype, here):
    assert ops.convolves_on_tensor_cores(dtype, layers) is here
