"""Each operation against plain float64 numpy, in every form that it takes here."""

from __future__ import annotations

import math
import os
import signal

import numpy as np
import pytest

from mlx_contentvec import cpu, kernels
from mlx_contentvec.backend import mx

erf = np.vectorize(math.erf)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(3)


def array(values: np.ndarray) -> mx.array:
    return mx.array(values.astype(np.float32))


def closeness(got: mx.array, expected: np.ndarray) -> float:
    return float(np.abs(np.array(got) - expected).max())


@pytest.fixture(params=["cpu", "metal", "cuda"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The arrangement for each kind of device, computed on the one that is here."""
    kind: str = request.param
    monkeypatch.setattr(kernels, "device_kind", lambda: kind)
    # here it would be compiled for the CPU, by a C++ compiler that need not be there
    monkeypatch.setattr(kernels, "_gelu_fused", kernels._gelu_plain)
    monkeypatch.setattr(kernels, "_normalised_gelu_fused", kernels._normalised_gelu_plain)
    return kind


@pytest.mark.usefixtures("form")
class TestEveryForm:
    def test_gelu_is_the_exact_one(self) -> None:
        x = np.linspace(-12, 12, 40_001).astype(np.float32)
        exact = 0.5 * x.astype(np.float64) * (1 + erf(x.astype(np.float64) / math.sqrt(2)))
        # tanh GELU is off by 4.7e-4, sigmoid GELU by 2e-2
        assert closeness(kernels.gelu(mx.array(x)), exact) < 1.5e-6
        assert closeness(kernels.gelu(mx.array(x[np.abs(x) < 1])), exact[np.abs(x) < 1]) < 2e-7

    @pytest.mark.parametrize(("kernel", "stride"), [(3, 2), (2, 2), (10, 5), (4, 1)])
    def test_a_convolution_is_the_sum_over_its_taps(
        self, kernel: int, stride: int, rng: np.random.Generator
    ) -> None:
        x = rng.standard_normal((2, 1300, 96))
        weight = rng.standard_normal((40, kernel, 96)) / math.sqrt(96 * kernel)
        bias = rng.standard_normal(40)
        count = (1300 - kernel) // stride + 1
        expected = bias + sum(
            x[:, tap : tap + stride * (count - 1) + 1 : stride] @ weight[:, tap].T
            for tap in range(kernel)
        )
        got = kernels.conv1d(
            array(x), kernels.arrange(array(weight)), array(bias), stride, lambda y: y * 2
        )
        assert got.shape == (2, count, 40)
        assert closeness(got, 2 * expected) < 2e-5

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
        got = kernels.grouped_conv1d(array(x), array(weight), array(bias), kernels.Derived())
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
        got = kernels.attention(array(q), array(k), array(v), mask)
        # scores reach 50: half a float32 ulp there is 2e-6, in each weight's exponent
        assert closeness(got, expected) < 1e-4

    def test_a_linear_layer_adds_its_bias_once(self, rng: np.random.Generator) -> None:
        x = rng.standard_normal((2, 5, 200))
        weight, bias = rng.standard_normal((30, 200)) / 14, rng.standard_normal(30)
        got = kernels.linear(array(x), kernels.arrange(array(weight)), array(bias))
        assert closeness(got, x @ weight.T + bias) < 5e-6
        got = kernels.linear(array(x), array(weight), None)
        assert closeness(got, x @ weight.T) < 5e-6

    def test_arranging_changes_neither_shape_nor_values(self, rng: np.random.Generator) -> None:
        for shape in ((7,), (6, 4), (6, 3, 4)):
            weight = array(rng.standard_normal(shape))
            arranged = kernels.arrange(weight)
            assert arranged.shape == shape
            assert bool((arranged == weight).all())

    def test_work_by_rows_is_the_same_work(self, rng: np.random.Generator) -> None:
        x = array(rng.standard_normal((2, 700, 3)))
        assert bool((kernels.by_rows(lambda rows: rows * 3, x) == x * 3).all())


def test_what_is_derived_of_weights_is_made_anew_when_one_of_them_is_another() -> None:
    derived, first, second = kernels.Derived(), mx.array([1.0]), mx.array([1.0])
    made = derived.of(lambda a, b: a + b, first, second)
    assert derived.of(lambda a, b: a + b, first, second) is made
    assert derived.of(lambda a, b: a + b, first, mx.array([1.0])) is not made


def test_short_runs_lose_less_than_one_long_sum(rng: np.random.Generator) -> None:
    x = rng.standard_normal((64, 3072)).astype(np.float32)
    weight = rng.standard_normal((64, 3072)).astype(np.float32)
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)

    def rms(y: mx.array) -> float:
        return float(np.sqrt(np.mean((np.array(y) - exact) ** 2)))

    summed = kernels.linear(mx.array(x), kernels.arrange(mx.array(weight)), None)
    if kernels.device_kind() != "cpu":
        pytest.skip("sums are split on a CPU only: mx.set_default_device(mx.cpu)")
    assert rms(summed) < 0.95 * rms(mx.array(x) @ mx.array(weight).T)


class TestOnACpu:
    """What numpy computes on MLX's memory, in whatever parts and on however many threads."""

    @pytest.fixture(
        params=[(1, 1 << 17, "x"), (1, 50, "x"), (2, 50, "x"), (3, 50, "x"), (1, 50, "numpy")],
        autouse=True,
    )
    def division(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        threads, block, blas = request.param
        monkeypatch.setattr(cpu, "cpu_threads", lambda: threads)
        monkeypatch.setattr(cpu, "BLOCK", block)
        monkeypatch.setattr(cpu, "BLAS", blas)

    def test_products(self, rng: np.random.Generator) -> None:
        a, b = rng.standard_normal((2, 5, 6)), rng.standard_normal((2, 6, 7))
        assert closeness(cpu.matmul(array(a), array(b)), a @ b) < 1e-5
        turned = array(b.transpose(0, 2, 1)).swapaxes(1, 2)
        assert closeness(cpu.matmul(array(a), turned), a @ b) < 1e-5
        bias = rng.standard_normal(7)
        terms, matrices = [array(x) for x in a], [array(x) for x in b]
        expected = a[0] @ b[0] + a[1] @ b[1]
        assert closeness(cpu.summed(terms, matrices, None), expected) < 1e-5
        assert closeness(cpu.summed(terms, matrices, array(bias)), expected + bias) < 1e-5

    def test_gelu(self, rng: np.random.Generator) -> None:
        x = (4 * rng.standard_normal((3, 41, 7))).astype(np.float32)
        exact = 0.5 * x.astype(np.float64) * (1 + erf(x.astype(np.float64) / math.sqrt(2)))
        given = mx.array(x)
        assert closeness(cpu.gelu(given), exact) < 6e-7
        assert closeness(given, x) == 0, "the input was overwritten"
        turned = mx.array(x.transpose(2, 0, 1)).transpose(1, 2, 0)
        assert closeness(cpu.gelu(turned), exact) < 6e-7

    def test_gelu_of_what_is_far_from_zero(self) -> None:
        x = np.array([[-1e30, -1e6, -40.0, -6.5, 6.5, 40.0, 1e6, 1e30, np.inf]], np.float32)
        expected = np.where(x < 0, 0.0, x)
        assert np.allclose(np.array(cpu.gelu(mx.array(x))), expected, rtol=0, atol=1e-7)
        assert np.isnan(np.array(cpu.gelu(mx.array([[np.nan]])))).all()

    def test_a_normalised_gelu(self, rng: np.random.Generator) -> None:
        x = rng.standard_normal((2, 43, 9)).astype(np.float32)
        mean, scale = rng.standard_normal((2, 2, 1, 9)).astype(np.float32)
        bias = rng.standard_normal(9).astype(np.float32)
        y = ((x - mean.astype(np.float64)) * scale + bias).astype(np.float64)
        given = mx.array(x)
        got = cpu.normalised_gelu(given, mx.array(mean), mx.array(scale), mx.array(bias))
        assert closeness(got, 0.5 * y * (1 + erf(y / math.sqrt(2)))) < 2e-6
        assert closeness(given, x) == 0, "the input was overwritten"

    @pytest.mark.parametrize(("scores", "keys"), [(1 << 20, 8192), (200, 8192), (200, 7)])
    @pytest.mark.parametrize("masked", [False, True])
    def test_attention(
        self,
        scores: int,
        keys: int,
        masked: bool,
        rng: np.random.Generator,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(cpu, "SCORES", scores)
        monkeypatch.setattr(cpu, "KEYS", keys)
        q = 3 * rng.standard_normal((2, 3, 20, 16))
        k, v = 3 * rng.standard_normal((2, 2, 3, 50, 16))
        valid = np.ones((2, 1, 1, 50), bool)
        if masked:
            valid[1, ..., 9:] = False
        weights = np.where(valid, q @ k.swapaxes(2, 3) / 4, -np.inf)
        weights = np.exp(weights - weights.max(-1, keepdims=True))
        expected = (weights / weights.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3)
        mask = mx.array(valid) if masked else None
        got = cpu.attention(array(q), array(k), array(v), mask)
        assert closeness(got, expected.reshape(2, 20, 48)) < 1e-4

    def test_scores_beyond_the_range_of_an_exponential(self) -> None:
        q = mx.full((1, 1, 1, 4), 60.0)
        k = mx.array([[[[60.0] * 4, [-60.0] * 4, [59.0] * 4]]])
        v = mx.array([[[[1.0] * 4, [2.0] * 4, [3.0] * 4]]])
        assert closeness(cpu.attention(q, k, v, None), np.ones((1, 1, 4))) < 1e-6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_starts_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "cpu_threads", lambda: 2)
    monkeypatch.setattr(cpu, "BLOCK", 5)
    done = np.zeros(40, np.int8)

    def work(rows: slice) -> None:
        done[rows] += 1

    cpu._in_blocks(work, 40, 1)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        cpu._in_blocks(work, 40, 1)
        os._exit(0 if (done == 2).all() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (done == 1).all()


def test_a_traced_function_is_computed_by_mlx_alone(rng: np.random.Generator) -> None:
    """A gradient cannot be taken through numpy."""
    x, q = array(rng.standard_normal((1, 5, 4))), array(rng.standard_normal((1, 2, 5, 2)))
    step = 1e-2

    def loss(x: mx.array) -> mx.array:
        y = kernels.normalised_gelu(x, x.mean(axis=1, keepdims=True), mx.ones((1, 1, 4)), x[0, 0])
        return (kernels.gelu(y) + kernels.attention(q * x[0, 0, 0], q, q, None)).sum()

    gradient = np.array(mx.grad(loss)(x))
    for index in ((0, 0, 0), (0, 3, 2)):
        nudge = np.zeros((1, 5, 4), np.float32)
        nudge[index] = step
        difference = float(loss(x + mx.array(nudge)) - loss(x - mx.array(nudge)))
        assert abs(difference / (2 * step) - gradient[index]) < 2e-3
    assert closeness(mx.vmap(kernels.gelu)(x), np.array(kernels.gelu(x))) < 1e-6


class TestWindowMoments:
    def expected(self, waveform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rows = np.lib.stride_tricks.sliding_window_view(waveform.astype(np.float64), 10)[::5]
        return rows.mean(0), np.cov(rows.T, bias=True)

    def test_they_are_mean_and_covariance_of_the_windows(self, rng: np.random.Generator) -> None:
        waveform = rng.standard_normal((1, 4003)).astype(np.float32) + 0.5
        offset, mean, covariance = kernels.window_moments(mx.array(waveform), None, 10, 5)
        expected_mean, expected_covariance = self.expected(waveform[0])
        assert closeness(mean[0].astype(mx.float32) + offset, expected_mean) < 1e-6
        with mx.stream(mx.cpu):
            difference = covariance[0] - mx.array(expected_covariance, mx.float64)
            assert float(mx.abs(difference).max()) < 1e-12

    def test_what_lies_beyond_a_clip_does_not_count(self, rng: np.random.Generator) -> None:
        waveform = rng.standard_normal((2, 3000)).astype(np.float32)
        waveform[1, 2111:] = 99.0
        offset, mean, covariance = kernels.window_moments(
            mx.array(waveform), mx.array([3000, 2111]), 10, 5
        )
        alone = kernels.window_moments(mx.array(waveform[1:, :2111]), None, 10, 5)
        for padded, single in zip((offset, mean, covariance), alone, strict=True):
            with mx.stream(mx.cpu):
                assert float(mx.abs(padded[1] - single[0]).max()) < 1e-12


@pytest.mark.usefixtures("form")
class TestChannelStatistics:
    @pytest.mark.parametrize("offset", [0.0, 0.5])
    @pytest.mark.parametrize("lengths", [None, [3000, 2111]])
    def test_they_are_those_of_the_convolved_waveform(
        self, offset: float, lengths: list[int] | None, rng: np.random.Generator
    ) -> None:
        clips = np.cumsum(rng.standard_normal((2, 3000)), axis=1) / 40
        clips = (clips - clips.mean(axis=1, keepdims=True) + offset).astype(np.float32)
        weight = rng.standard_normal((6, 10)).astype(np.float32)
        got = kernels.channel_statistics(
            mx.array(clips), None if lengths is None else mx.array(lengths), mx.array(weight), 5
        )
        for row, length in enumerate(lengths or [3000, 3000]):
            clip = clips[row, :length].astype(np.float64)
            assert abs(float(got[0][row, 0]) - clip.mean()) < 1e-6
            windows = np.lib.stride_tricks.sliding_window_view(clip - float(got[0][row, 0]), 10)
            channels = windows[::5] @ weight.T.astype(np.float64)
            assert closeness(got[1][row], channels.mean(axis=0)) < 2e-6
            assert closeness(got[2][row] / mx.array(channels.var(axis=0)), np.ones(6)) < 2e-6
