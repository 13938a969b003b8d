"""Each operation against plain float64 numpy, in every form that it takes here."""

from __future__ import annotations

import json
import math
import os
import signal
from typing import Any

import numpy as np
import pytest

from mlx_contentvec import ops
from mlx_contentvec.backend import mx
from mlx_contentvec.backend import nn as mlx_nn
from mlx_contentvec.ops import blas, cpu, cpu_hubert, kernels, kernels_numpy
from mlx_contentvec.ops import mlx as mlx_ops
from tests.forks import run_python
from tests.kernel_forms import kernels_of
from tests.small_models import TINY, noise, random_model
from tests.sources import PROJECT

erf = np.vectorize(math.erf)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def array(values: np.ndarray) -> mx.array:
    return mx.array(values.astype(np.float32))


def closeness(got: mx.array, expected: np.ndarray) -> float:
    return float(np.abs(np.array(got) - expected).max())


def exact_gelu(x: np.ndarray) -> np.ndarray:
    exact = x.astype(np.float64)
    return 0.5 * exact * (1 + erf(exact / math.sqrt(2)))


@pytest.fixture(params=["cpu", "metal", "cuda"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The form of MLX's operations for each kind of device, computed on the one that is here."""
    monkeypatch.setattr(mlx_ops, "device_kind", lambda: request.param)
    # here it would be compiled for the CPU, by a C++ compiler that need not be there
    monkeypatch.setattr(mlx_ops, "_compiled", lambda function: function)
    param: str = request.param
    return param


@pytest.mark.usefixtures("form")
class TestEveryForm:
    def test_gelu_is_the_exact_one(self) -> None:
        x = np.linspace(-12, 12, 40_001).astype(np.float32)
        # tanh GELU is off by 4.7e-4, sigmoid GELU by 2e-2
        assert closeness(mlx_ops.gelu(array(x)), exact_gelu(x)) < 1.5e-6
        near = x[np.abs(x) < 1]
        assert closeness(mlx_ops.gelu(array(near)), exact_gelu(near)) < 2e-7

    @pytest.mark.parametrize("inputs", [2048, 2052, 2053])
    @pytest.mark.parametrize("biased", [True, False])
    def test_a_linear_layer_is_one_product(
        self, inputs: int, biased: bool, rng: np.random.Generator
    ) -> None:
        x, weight = rng.standard_normal((2, 7, inputs)), rng.standard_normal((5, inputs)) / 45
        bias = rng.standard_normal(5)
        got = mlx_ops.linear(array(x), array(weight), array(bias) if biased else None)
        assert closeness(got, x @ weight.T + biased * bias) < 1e-5

    @pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (10, 5), (4, 1)])
    def test_a_convolution_is_the_sum_over_its_taps(
        self, kernel: int, stride: int, rng: np.random.Generator
    ) -> None:
        x = rng.standard_normal((2, 1300, 96))
        weight = rng.standard_normal((40, kernel, 96)) / math.sqrt(96 * kernel)
        bias = rng.standard_normal(40)
        count = (1300 - kernel) // stride + 1
        plain = sum(
            x[:, tap : tap + stride * (count - 1) + 1 : stride] @ weight[:, tap].T
            for tap in range(kernel)
        )
        arranged = mlx_ops.to_gemm_layout(array(weight))
        got = mlx_ops.conv1d(array(x), arranged, array(bias), stride)
        assert got.shape == (2, count, 40)
        assert closeness(got, plain + bias) < 1e-5
        assert closeness(mlx_ops.conv1d(array(x), arranged, None, stride), plain) < 1e-5

    @pytest.mark.parametrize("bias", [False, True])
    @pytest.mark.parametrize("kernel", [2, 3])
    def test_a_convolution_of_real_width_is_taken_in_parts(
        self, form: str, bias: bool, kernel: int, rng: np.random.Generator
    ) -> None:
        x = rng.standard_normal((2, 61, 512)).astype(np.float32)
        weight = (rng.standard_normal((24, kernel, 512)) / 39).astype(np.float32)
        shift = rng.standard_normal(24).astype(np.float32)
        exact = x.astype(np.float64)
        windows = np.lib.stride_tricks.sliding_window_view(exact, kernel, axis=1)[:, ::2]
        expected = np.einsum("btik,oki->bto", windows, weight.astype(np.float64))
        expected += shift if bias else 0
        given = array(x), array(weight), array(shift) if bias else None, 2
        bound = 2e-5 if form == "cpu" else 5e-6
        assert closeness(mlx_ops.conv1d(*given), expected) < bound
        assert closeness(mlx_ops.conv1d(*given, then_gelu=True), exact_gelu(expected)) < bound

    def test_half_precision_on_cuda_needs_no_plan_of_a_convolution(
        self, form: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        x, weight = rng.standard_normal((2, 61, 64)), rng.standard_normal((24, 3, 64)) / 14
        given = array(x).astype(mx.float16), array(weight).astype(mx.float16)
        expected = np.array(mx.conv1d(*(a.astype(mx.float32) for a in given), 2))
        planned = []

        def conv1d(*arguments: Any, **options: Any) -> Any:
            planned.append(arguments)
            return own(*arguments, **options)

        own = mx.conv1d
        monkeypatch.setattr(mx, "conv1d", conv1d)
        got = mlx_ops.conv1d(*given, None, 2)
        assert got.dtype == mx.float16
        assert closeness(got, expected) < 2e-3
        assert bool(planned) is (form != "cuda")

    @pytest.mark.parametrize("count", [1, 7, 8, 9, 64, 1003])
    def test_a_sum_over_time_is_in_short_sums(self, count: int, rng: np.random.Generator) -> None:
        x = rng.standard_normal((2, count, 3))
        assert closeness(mlx_ops._sum_over_time(array(x)), x.astype(np.float32).sum(1)) < 1e-4
        padded = mlx_ops._padded(array(x), mlx_ops.SUM_BLOCK)
        assert closeness(mlx_ops._sum_of_squares(padded), (x * x).sum(1)) < 2e-4

    def test_silence_does_not_lose_a_variance(self, rng: np.random.Generator) -> None:
        """Added one after the other, many small squares are lost beside a large sum."""
        clip = np.zeros((1, 9000), np.float32)
        clip[0, :400] = 0.3 * rng.standard_normal(400)
        weight = rng.standard_normal((64, 10)).astype(np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(clip[0].astype(np.float64), 10)[::5]
        exact = (windows @ weight.T.astype(np.float64)).var(axis=0)
        rows, counted = mlx_ops._centred_windows(array(clip), 10, 5, None)
        variance = mlx_ops._sum_of_squares(rows @ array(weight).T) / counted
        assert np.abs(np.array(variance)[0] / exact - 1).max() < 1.2e-6

    @pytest.mark.parametrize("frames", [1, 2, 63, 64, 65, 130, 700])
    @pytest.mark.parametrize("kernel", [64, 15])
    def test_the_positional_convolution_keeps_the_frames_and_drops_the_last(
        self, frames: int, kernel: int, rng: np.random.Generator
    ) -> None:
        x = rng.standard_normal((2, frames, 12))
        weight = rng.standard_normal((12, kernel, 4)) / 16
        bias = rng.standard_normal(12)
        padded = np.pad(x, ((0, 0), (kernel // 2, kernel // 2), (0, 0)))
        expected = np.zeros((2, frames, 12)) + bias
        for frame in range(frames):
            window = padded[:, frame : frame + kernel]
            for channel in range(12):
                group = channel // 4
                expected[:, frame, channel] += np.einsum(
                    "bki,ki->b", window[..., 4 * group : 4 * group + 4], weight[channel]
                )
        got = mlx_ops.grouped_conv1d(array(x), array(weight), array(bias))
        assert got.shape == x.shape
        assert closeness(got, expected) < 5e-6

    @pytest.mark.parametrize("masked", [False, True])
    @pytest.mark.parametrize("frames", [1, 40, 700])
    def test_attention_is_a_softmax_over_all_keys(
        self, frames: int, masked: bool, rng: np.random.Generator
    ) -> None:
        q, k, v = 3 * rng.standard_normal((3, 2, 3, frames, 16))
        valid = np.ones((2, 1, 1, frames), bool)
        if masked and frames > 1:
            valid[1, ..., frames // 2 :] = False
        scores = np.where(valid, q @ k.swapaxes(2, 3) / 4, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        expected = weights / weights.sum(-1, keepdims=True) @ v
        expected = expected.transpose(0, 2, 1, 3).reshape(2, frames, 48)
        mask = mx.array(valid) if masked else None
        got = mlx_ops.attention(array(q), array(k), array(v), mask)
        # scores reach 50: half a float32 ulp there is 2e-6, in each weight's exponent
        assert closeness(got, expected) < 1e-4

    @pytest.mark.parametrize("kind", ["float16", "bfloat16"])
    def test_attention_with_a_mask_in_half_precision_on_cuda_has_no_plan(
        self, kind: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # scores of up to 40: in half precision one is off by as much as 0.02, or 0.15
        drawn = (
            rng.standard_normal((3, 2, 3, 90, 64)) * np.array([3, 1, 1])[:, None, None, None, None]
        )
        q, k, v = (array(x).astype(getattr(mx, kind)) for x in drawn)
        valid = np.arange(90) < np.array([90, 40])[:, None]
        mask = mx.array(valid[:, None, None])
        exact = (x.astype(mx.float32) for x in (q, k, v))
        expected = mlx_ops.attention(*exact, mask)
        monkeypatch.setattr(mlx_ops, "device_kind", lambda: "cuda")
        monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", None)
        got = mlx_ops.attention(q, k, v, mask)
        assert got.dtype == q.dtype
        half_ulp = {"float16": 2**-11, "bfloat16": 2**-8}[kind]
        scale = float(np.abs(np.array(expected)).max())
        assert closeness(got.astype(mx.float32), np.array(expected)) < 2 * half_ulp * scale

    def test_arranging_changes_neither_shape_nor_values(self, rng: np.random.Generator) -> None:
        for shape in ((7,), (6, 4), (6, 3, 4)):
            weight = array(rng.standard_normal(shape))
            arranged = mlx_ops.to_gemm_layout(weight)
            assert arranged.shape == shape
            assert bool((arranged == weight).all())

    @pytest.mark.parametrize("offset", [0.0, 0.5])
    @pytest.mark.parametrize("lengths", [None, [3000, 2111]])
    @pytest.mark.parametrize("of_longer_clips", [False, True])
    def test_a_convolution_normalised_over_time(
        self,
        offset: float,
        lengths: list[int] | None,
        of_longer_clips: bool,
        rng: np.random.Generator,
    ) -> None:
        clips = np.cumsum(rng.standard_normal((2, 3000)), axis=1) / 40
        clips = (clips - clips.mean(axis=1, keepdims=True) + offset).astype(np.float32)
        weight = rng.standard_normal((6, 10, 1)).astype(np.float32)
        scale, shift = rng.standard_normal((2, 6)).astype(np.float32)
        heard = clips[:, 500:1500] if of_longer_clips else clips
        moments = [
            cpu.Moments.of(clip[:n], 10, 5)
            for clip, n in zip(clips, lengths or [3000] * 2, strict=True)
        ]
        got = mlx_ops.conv1d_group_norm_gelu(
            array(heard),
            array(weight),
            array(scale),
            array(shift),
            5,
            None if lengths is None else mx.array(lengths),
            moments if of_longer_clips else None,
        )
        on_cpu = cpu.normalised_conv1d(heard, weight[..., 0], scale, shift, 5, moments)
        for row, length in enumerate(lengths or [3000, 3000]):
            counted, channels = (
                np.lib.stride_tricks.sliding_window_view(clip.astype(np.float64), 10)[::5]
                @ weight[..., 0].T.astype(np.float64)
                for clip in (clips[row, :length], heard[row])
            )
            normalised = (channels - counted.mean(axis=0)) / np.sqrt(counted.var(axis=0) + 1e-5)
            expected = exact_gelu(normalised * scale + shift)
            # of what is padding, what comes is left open
            end = None if of_longer_clips else len(counted)
            assert closeness(got[row][:end], expected[:end]) < 2e-5
            assert np.isfinite(np.array(got)).all()
            assert closeness(on_cpu[row], expected) < 2e-5


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (ops, mlx_ops):
        monkeypatch.setattr(module, "device_kind", lambda: "cpu")


@pytest.mark.usefixtures("on_a_cpu")
class TestPreparation:
    def test_weights_are_prepared_once(self) -> None:
        model = random_model(TINY)
        assert model.walk() is model.walk()

    @pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
    def test_they_are_prepared_anew_when_one_was_changed_in_place(self, dtype: mx.Dtype) -> None:
        linear, x = mlx_nn.Linear(4, 4, bias=False), np.ones((1, 4), np.float32)
        linear.weight = mx.ones((4, 4), dtype)
        mx.eval(linear.parameters())
        for factor in (1.0, 2.0, 4.0):
            snapshot, prepared = ops.Snapshot(linear), cpu_hubert.Linear(linear)
            assert closeness(prepared(x), 4 * factor) == 0
            assert snapshot.still_holds()
            linear.weight *= 2
            assert not snapshot.still_holds()
            assert closeness(prepared(x), 4 * factor) == 0, "its memory changed"

    def test_they_are_prepared_anew_when_a_module_is_another(self) -> None:
        model = random_model(TINY)
        before = model.walk()
        layer = model.encoder.layers[1]
        layer.fc1 = mlx_nn.Linear(*reversed(layer.fc1.weight.shape))
        assert model.walk() is not before
        before = model.walk()
        model.encoder.layers.append(model.encoder.layers.pop(0))
        assert model.walk() is not before

    def test_what_is_traced_goes_through_mlx(self) -> None:
        model, x = random_model(TINY), mx.array(noise(4000))[None]
        seen: list[type] = []

        def function(x: mx.array) -> mx.array:
            seen.append(type(model.walk(x)))
            return x.sum()

        for traced in (mx.grad(function), mx.vmap(function), mx.compile(function)):
            traced(x)
        assert seen == [mlx_ops.MlxHubert] * 3
        function(x)
        assert seen.pop() is cpu_hubert.CpuHubert

    def test_traced_weights_go_through_mlx(self) -> None:
        model, seen = random_model(TINY), []

        def loss(model: mlx_nn.Module) -> mx.array:
            seen.append(type(model.walk()))
            return model.layer_norm.weight.sum()

        mlx_nn.value_and_grad(model, loss)(model)
        assert seen == [mlx_ops.MlxHubert]
        assert isinstance(model.walk(), cpu_hubert.CpuHubert)

    def test_queries_keys_and_values_are_one_product_in_place(self) -> None:
        model = random_model(TINY)
        parts = [
            cpu_hubert.to_numpy(model.encoder.layers[0].self_attn[name].weight)
            for name in ("q_proj", "k_proj", "v_proj")
        ]
        fused, _ = model.walk().layers[0].qkv
        assert np.shares_memory(fused, parts[0]) and np.shares_memory(fused, parts[2])
        assert closeness(fused, np.concatenate(parts)) == 0

    @pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
    def test_they_are_one_product_wherever_they_lie(self, dtype: mx.Dtype) -> None:
        model = random_model(TINY, dtype)
        attention = model.encoder.layers[0].self_attn
        attention.k_proj.weight = attention.k_proj.weight * 3
        layer = model.walk().layers[0]
        weights = [
            np.array(attention[name].weight.astype(mx.float32))
            for name in ("q_proj", "k_proj", "v_proj")
        ]
        assert closeness(layer.qkv[0], np.concatenate(weights)) == 0
        for projection, weight in zip(
            (layer.q_proj, layer.k_proj, layer.v_proj), weights, strict=True
        ):
            assert closeness(projection.weight, weight) == 0


def test_what_a_gpu_adds_in_a_row_is_short_in_every_form() -> None:
    """By the worst order of adding, which no BLAS that is loaded here can be asked for."""
    ran = run_python("-m", "tests.model.worst_order", cwd=PROJECT)
    assert ran.returncode == 0, ran.stderr
    losses = json.loads(ran.stdout)
    assert len(losses) == 6
    assert max(losses.values()) < 1.1, losses


def test_short_runs_lose_less_than_one_long_sum(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = rng.standard_normal((64, 3072)).astype(np.float32)
    weight = rng.standard_normal((64, 3072)).astype(np.float32)
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)

    def rms(k_block: int) -> float:
        monkeypatch.setattr(cpu, "K_BLOCK", k_block)
        return float(np.sqrt(np.mean((cpu.linear(x, weight) - exact) ** 2)))

    assert rms(96) < 0.95 * rms(3072)


class TestOnACpu:
    """In whatever parts, on however many threads and by whichever BLAS."""

    @pytest.fixture(
        params=[
            {},
            {"threads": 1, "kernels": "numpy"},
            {"threads": 2, "MIN_MACS_PER_THREAD": 1},
            {
                "threads": 3,
                "kernels": "numpy",
                "VALUES_PER_BLOCK": 50,
                "VALUES_PER_STEP": 50,
                "ROWS_PER_TILE": 7,
                "MIN_MACS_PER_THREAD": 1,
                "SAMPLES_PER_BLOCK": 60,
            },
            {
                "threads": 5,
                "kernels": "numpy",
                "MIN_MACS_PER_THREAD": 300,
                "MIN_OUTPUTS_PER_THREAD": 5,
            },
            {
                "threads": 2,
                "kernels": "numpy",
                "VALUES_PER_BLOCK": 50,
                "ROWS_PER_TILE": 7,
                "SCORES_PER_THREAD": 200,
                "KEYS_PER_BLOCK": 7,
                "own": False,
            },
            {"threads": 1, "kernels": "compiled"},
            {
                "threads": 3,
                "kernels": "compiled",
                "VALUES_PER_STEP": 50,
                "ROWS_PER_TILE": 7,
                "MIN_MACS_PER_THREAD": 1,
            },
            {"threads": 1, "kernels": "compiled with products"},
            {
                "threads": 3,
                "kernels": "compiled with products",
                "ROWS_PER_TILE": 7,
                "MIN_MACS_PER_THREAD": 1,
                "MIN_OUTPUTS_PER_THREAD": 5,
            },
        ],
        ids=str,
        autouse=True,
    )
    def division(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes = dict(request.param)
        threads, form = sizes.pop("threads", None), sizes.pop("kernels", None)
        if not sizes.pop("own", True):
            monkeypatch.setattr(blas, "_openblas", lambda: None)
        if threads is not None:
            monkeypatch.setattr(blas, "_stated", lambda: threads)
        if form is not None:
            monkeypatch.setattr(kernels, "chosen", lambda: kernels_of(form))
        for name, size in sizes.items():
            monkeypatch.setattr(cpu if hasattr(cpu, name) else kernels_numpy, name, size)

    @pytest.mark.parametrize("k_block", [0, 1, 4, 6])
    @pytest.mark.parametrize("rows", [1, 5])
    def test_products_of_parts_of_matrices(
        self, k_block: int, rows: int, rng: np.random.Generator
    ) -> None:
        a, b = rng.standard_normal((9, 9)), rng.standard_normal((9, 9))
        out = np.ones((9, 9), np.float32)
        for left in (a.astype(np.float32), a.astype(np.float32, order="F")):
            for right in (b.astype(np.float32), b.astype(np.float32, order="F")):
                for part in (slice(1, 7), slice(2, 8)):
                    x, y = left[:rows, part], right[part, 3:8]
                    out[:] = 1
                    blas.multiply(x, y, out[:rows, 2:7], k_block=k_block, factor=2)
                    assert closeness(out[:rows, 2:7], 2 * (x @ y)) < 1e-5
                    blas.multiply(x, y, out[:rows, 2:7], k_block=k_block, factor=2, add=True)
                    assert closeness(out[:rows, 2:7], 4 * (x @ y)) < 1e-5
                    assert (out[rows:] == 1).all() and (out[:, :2] == 1).all()
                    assert (out[:, 7:] == 1).all()

    def test_a_product_of_every_other_row(self, rng: np.random.Generator) -> None:
        a, b = rng.standard_normal((9, 4)).astype(np.float32), np.eye(4, dtype=np.float32)
        out = np.empty((5, 4), np.float32)
        blas.multiply(a[::2], b, out)
        assert closeness(out, a[::2]) == 0

    def test_what_does_not_fit_together_is_no_product(self) -> None:
        a, b, out = np.ones((3, 4), "f"), np.ones((4, 5), "f"), np.ones((3, 5), "f")
        for wrong in (
            (a, b[1:], out),
            (a, b[:, 1:], out),
            (a[1:], b, out),
            (a.astype(np.float64), b, out),
            (a, b, out.astype(np.float64)),
        ):
            with pytest.raises(ValueError, match=r"no product|not float32"):
                blas.multiply(*wrong)
        assert (out == 1).all()

    def test_a_layer_norm(self, rng: np.random.Generator) -> None:
        x = rng.standard_normal((2, 9, 48)).astype(np.float32)
        weight, bias = rng.standard_normal((2, 48)).astype(np.float32)
        centred = x - x.mean(-1, keepdims=True)
        expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias
        assert closeness(cpu.layer_norm(x, weight, bias), expected) < 3e-6

    def test_a_linear_layer(self, rng: np.random.Generator) -> None:
        x, weight = rng.standard_normal((2, 9, 30)), rng.standard_normal((13, 30))
        x, weight = x.astype(np.float32), weight.astype(np.float32)
        for bias in (None, rng.standard_normal(13).astype(np.float32)):
            expected = x @ weight.T + (0 if bias is None else bias)
            assert closeness(cpu.linear(x, weight, bias), expected) < 1e-5
            got = cpu.linear(x, weight, bias, then_gelu=True)
            assert closeness(got, exact_gelu(expected)) < 1e-5

    def test_a_convolution(self, rng: np.random.Generator) -> None:
        x, weight = rng.standard_normal((2, 50, 6)), rng.standard_normal((5, 3, 6))
        x, weight = x.astype(np.float32), weight.astype(np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(x, 3, axis=1)[:, ::2]
        expected = exact_gelu(np.einsum("btik,oki->bto", windows, weight))
        got = cpu.conv1d(x, weight, None, 2, None)
        assert closeness(got, expected) < 1e-5
        bias, scale, shift = rng.standard_normal((3, 5)).astype(np.float32)
        plain = np.einsum("btik,oki->bto", windows, weight) + bias
        assert closeness(cpu.conv1d(x, weight, bias, 2, None), exact_gelu(plain)) < 1e-5
        centred = plain - plain.mean(-1, keepdims=True)
        normalised = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        got = cpu.conv1d(x, weight, bias, 2, (scale, shift))
        assert closeness(got, exact_gelu(normalised * scale + shift)) < 2e-5

    def test_a_grouped_convolution(self, rng: np.random.Generator) -> None:
        x, weight = rng.standard_normal((2, 37, 6)), rng.standard_normal((6, 4, 2))
        x, weight, bias = x.astype(np.float32), weight.astype(np.float32), np.float32(range(6))
        padded = np.pad(x, ((0, 0), (2, 1), (0, 0))).reshape(2, 40, 3, 2)
        windows = np.lib.stride_tricks.sliding_window_view(padded, 4, axis=1)
        expected = np.einsum("btgik,goki->btgo", windows, weight.reshape(3, 2, 4, 2))
        got = cpu.grouped_conv1d(x, cpu.spectrum_of(weight, 2), bias, 4)
        assert closeness(got, expected.reshape(2, 37, 6) + bias) < 1e-5

    def test_gelu(self, rng: np.random.Generator) -> None:
        x = (4 * rng.standard_normal((3, 41, 7))).astype(np.float32)
        before = x.copy()
        assert closeness(cpu.gelu(x), exact_gelu(x)) < 6e-7
        assert closeness(x, before) == 0, "the input was overwritten"
        turned = np.ascontiguousarray(x.transpose(2, 0, 1)).transpose(1, 2, 0)
        assert closeness(cpu.gelu(turned), exact_gelu(x)) < 6e-7

    def test_gelu_of_what_is_far_from_zero(self) -> None:
        x = np.array([[-1e30, -1e6, -40.0, -6.5, 6.5, 40.0, 1e6, 1e30, np.inf]], np.float32)
        expected = np.where(x < 0, 0.0, x)
        assert np.allclose(cpu.gelu(x), expected, rtol=0, atol=1e-7)
        assert np.isnan(cpu.gelu(np.array([[np.nan]], np.float32))).all()

    @pytest.mark.parametrize("masked", [False, True])
    def test_attention(self, masked: bool, rng: np.random.Generator) -> None:
        q = 3 * rng.standard_normal((2, 3, 20, 16)).astype(np.float32)
        k, v = 3 * rng.standard_normal((2, 2, 3, 50, 16)).astype(np.float32)
        valid = np.ones((2, 1, 1, 50), bool)
        if masked:
            valid[1, ..., 9:] = False
        weights = np.where(valid, q @ k.swapaxes(2, 3) / 4, -np.inf)
        weights = np.exp(weights - weights.max(-1, keepdims=True))
        expected = (weights / weights.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3)
        got = cpu.attention(q, k, v, valid if masked else None)
        assert closeness(got, expected.reshape(2, 20, 48)) < 1e-4
        # heads as they lie in what their projection gives
        apart = [x.transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3) for x in (q, k, v)]
        assert closeness(cpu.attention(*apart, valid if masked else None), np.array(got)) < 1e-5

    @pytest.mark.parametrize("score", [-90, -50, 50, 90, 100])
    def test_scores_about_the_largest_that_an_exponential_takes(self, score: int) -> None:
        q = np.full((1, 1, 1, 4), 1.0, np.float32)
        k = np.array([score / 2, score / 2, score / 2 - 1], np.float32)
        v = np.array([1e9, 2e9, 3e9], np.float32)
        keys, values = (np.repeat(x[:, None], 4, axis=1)[None, None] for x in (k, v))
        got = cpu.attention(q, keys, values, None)
        expected = (3 + 3 * np.exp(-2.0)) / (2 + np.exp(-2.0)) * 1e9
        np.testing.assert_allclose(got, expected, rtol=2e-6)

    def test_where_every_key_is_hidden_all_count_alike(self) -> None:
        q, v = np.ones((1, 1, 2, 4), np.float32), np.arange(8, dtype=np.float32).reshape(1, 1, 2, 4)
        got = cpu.attention(q, q, v, np.zeros((1, 1, 1, 2), bool))
        assert closeness(got, np.broadcast_to(v.mean(axis=2), (1, 2, 4))) < 1e-6

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("value", [1e30, np.inf, np.nan])
    def test_what_is_beyond_every_range_warns_of_nothing(self, value: float) -> None:
        q = np.zeros((1, 1, 2, 4), np.float32)
        k = np.full_like(q, value)
        assert cpu.attention(q, k, q, None).shape == (1, 2, 4)

    def test_scores_beyond_the_range_of_an_exponential(self) -> None:
        q = np.full((1, 1, 1, 4), 60.0, np.float32)
        k = np.array([[[[60.0] * 4, [-60.0] * 4, [59.0] * 4]]], np.float32)
        v = np.array([[[[1.0] * 4, [2.0] * 4, [3.0] * 4]]], np.float32)
        assert closeness(cpu.attention(q, k, v, None), np.ones((1, 1, 4))) < 1e-6

    def test_moments_are_mean_and_covariance_of_the_windows(self, rng: np.random.Generator) -> None:
        waveform = rng.standard_normal(4003).astype(np.float32) + np.float32(0.5)
        rows = np.lib.stride_tricks.sliding_window_view(waveform.astype(np.float64), 10)[::5]
        moments = cpu.Moments.of(waveform, 10, 5)
        assert closeness(moments.mean + moments.offset, rows.mean(0)) < 1e-9
        assert closeness(moments.covariance, np.cov(rows.T, bias=True)) < 1e-12
        prepared = cpu.Moments.of(waveform + 1, 10, 5, lambda samples: samples - 1)
        assert closeness(prepared.covariance, moments.covariance) < 1e-6

    def test_matrices_that_the_library_cannot_read_are_refused(self) -> None:
        if blas._openblas() is None:
            return  # numpy reads any
        a = np.ones((6, 6), np.float32)
        scattered = a[::2, ::2]
        repeated = np.broadcast_to(np.ones(3, np.float32), (3, 3))
        out = np.zeros((3, 3), np.float32)
        fine = np.ones((3, 3), np.float32)
        for wrong in ((scattered, fine, out), (fine, scattered, out), (repeated, fine, out)):
            with pytest.raises(ValueError, match="contiguous"):
                blas.multiply(*wrong)
        with pytest.raises(ValueError, match="contiguous"):
            blas.multiply(fine, fine, out.T)
        assert (out == 0).all()

    def test_the_library_keeps_its_number_of_threads(self) -> None:
        found = blas._openblas()
        before = None if found is None else found.get_threads()
        with blas.own_threads() as threads:
            assert blas.threads() == threads
            if found is not None:
                assert found.get_threads() == 1
            with blas.own_threads() as within:
                assert within == threads
        if found is not None:
            assert found.get_threads() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_starts_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_stated", lambda: 2)
    done = np.zeros(40, np.int8)

    def work(rows: slice) -> None:
        done[rows] += 1

    cpu.parallel_for(work, 40, 5)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        cpu.parallel_for(work, 40, 5)
        os._exit(0 if (done == 2).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (done == 1).all()


def test_a_failure_on_any_thread_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blas, "_stated", lambda: 2)
    before = blas.threads()

    def work(rows: slice) -> None:
        if rows.start >= 20:
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        cpu.parallel_for(work, 40, 5)
    assert blas.threads() == before
