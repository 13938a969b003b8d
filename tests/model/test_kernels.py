"""Each operation against plain float64 numpy, in every form that it takes here."""

from __future__ import annotations

import math
import os
import signal

import numpy as np
import pytest

from mlx_contentvec import blas, cpu, kernels
from mlx_contentvec.backend import mx
from mlx_contentvec.kernels import Derived, prepared

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


@pytest.fixture(params=["cpu", "cpu, traced", "metal", "cuda"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The arrangement for each kind of device, computed on the one that is here."""
    kind, _, traced = request.param.partition(", ")
    monkeypatch.setattr(kernels, "device_kind", lambda: kind)
    if traced:
        monkeypatch.setattr(cpu, "in_memory", lambda *_: False)
    # here it would be compiled for the CPU, by a C++ compiler that need not be there
    monkeypatch.setattr(kernels, "_gelu_fused", kernels._gelu_plain)
    monkeypatch.setattr(kernels, "_normalised_gelu_fused", kernels._normalised_gelu_plain)
    param: str = request.param
    return param


def given(values: np.ndarray) -> mx.array:
    """Values as the form computes with them."""
    return prepared(array(values))


@pytest.mark.usefixtures("form")
class TestEveryForm:
    def test_what_is_computed_with_is_numpys_on_a_cpu_alone(self, form: str) -> None:
        assert isinstance(given(np.zeros(3)), np.ndarray) == (form == "cpu")
        assert isinstance(prepared(np.zeros(3)), np.ndarray) == form.startswith("cpu")
        assert isinstance(kernels.mlx(given(np.zeros(3))), mx.array)

    def test_gelu_is_the_exact_one(self) -> None:
        x = np.linspace(-12, 12, 40_001).astype(np.float32)
        # tanh GELU is off by 4.7e-4, sigmoid GELU by 2e-2
        assert closeness(kernels.gelu(given(x)), exact_gelu(x)) < 1.5e-6
        near = x[np.abs(x) < 1]
        assert closeness(kernels.gelu(given(near)), exact_gelu(near)) < 2e-7

    def test_a_layer_norm(self, rng: np.random.Generator) -> None:
        x, weight, bias = rng.standard_normal((2, 9, 48)), *rng.standard_normal((2, 48))
        centred = x - x.mean(-1, keepdims=True)
        expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias
        got = kernels.layer_norm(given(x), array(weight), array(bias), Derived())
        assert closeness(got, expected) < 3e-6

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
        arranged = kernels.arrange(array(weight))
        got = kernels.conv1d(given(x), arranged, array(bias), stride, None, Derived())
        assert got.shape == (2, count, 40)
        assert closeness(got, exact_gelu(plain + bias)) < 1e-5
        got = kernels.conv1d(given(x), arranged, None, stride, None, Derived())
        assert closeness(got, exact_gelu(plain)) < 1e-5
        scale, shift = rng.standard_normal((2, 40))
        norm = array(scale), array(shift)
        got = kernels.conv1d(given(x), arranged, array(bias), stride, norm, Derived())
        centred = plain + bias - (plain + bias).mean(-1, keepdims=True)
        normalised = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        assert closeness(got, exact_gelu(normalised * scale + shift)) < 2e-5

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
        got = kernels.grouped_conv1d(given(x), array(weight), array(bias), Derived())
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
        got = kernels.attention(given(q), given(k), given(v), mask)
        # scores reach 50: half a float32 ulp there is 2e-6, in each weight's exponent
        assert closeness(got, expected) < 1e-4

    def test_a_linear_layer_adds_its_bias_once(self, rng: np.random.Generator) -> None:
        x = rng.standard_normal((2, 5, 200))
        weight, bias = rng.standard_normal((30, 200)) / 14, rng.standard_normal(30)
        arranged, expected = kernels.arrange(array(weight)), x @ weight.T
        got = kernels.linear(given(x), arranged, array(bias), Derived())
        assert closeness(got, expected + bias) < 5e-6
        got = kernels.linear(given(x), array(weight), None, Derived())
        assert closeness(got, expected) < 5e-6
        got = kernels.linear(given(x), arranged, array(bias), Derived(), then_gelu=True)
        assert closeness(got, exact_gelu(expected + bias)) < 5e-6

    def test_arranging_changes_neither_shape_nor_values(self, rng: np.random.Generator) -> None:
        for shape in ((7,), (6, 4), (6, 3, 4)):
            weight = array(rng.standard_normal(shape))
            arranged = kernels.arrange(weight)
            assert arranged.shape == shape
            assert bool((arranged == weight).all())

    def test_work_by_rows_is_the_same_work(self, rng: np.random.Generator) -> None:
        x = given(rng.standard_normal((2, 700, 3)))
        assert closeness(kernels.by_rows(lambda rows: rows * 3, x), np.array(x * 3)) == 0

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
        got = kernels.conv1d_normalised_over_time(
            given(heard),
            array(weight),
            array(scale),
            array(shift),
            5,
            None if lengths is None else mx.array(lengths),
            [
                cpu.Moments.of(clip[:n], 10, 5)
                for clip, n in zip(clips, lengths or [3000] * 2, strict=True)
            ]
            if of_longer_clips
            else None,
            Derived(),
        )
        for row, length in enumerate(lengths or [3000, 3000]):
            counted, channels = (
                np.lib.stride_tricks.sliding_window_view(clip.astype(np.float64), 10)[::5]
                @ weight[..., 0].T.astype(np.float64)
                for clip in (clips[row, :length], heard[row])
            )
            normalised = (channels - counted.mean(axis=0)) / np.sqrt(counted.var(axis=0) + 1e-5)
            assert closeness(got[row], exact_gelu(normalised * scale + shift)) < 2e-5


def test_what_is_derived_of_weights_is_made_anew_when_one_of_them_is_another() -> None:
    derived, first, second = kernels.Derived(), mx.array([1.0]), mx.array([1.0])
    made = derived.of(lambda a, b: a + b, first, second)
    assert derived.of(lambda a, b: a + b, first, second) is made
    assert derived.of(lambda a, b: a + b, first, mx.array([1.0])) is not made


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_it_is_made_anew_when_one_of_them_was_changed_in_place(
    dtype: mx.Dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "device_kind", lambda: "cpu")
    derived, weight = Derived(), mx.ones((4, 4), dtype)
    x = np.ones((1, 4), np.float32)
    for factor in (1.0, 2.0, 4.0, 8.0):
        assert closeness(kernels.linear(x, weight, None, derived), 4 * factor) == 0
        assert kernels.place(weight) == kernels.place(weight) is not None
        weight *= 2
    weight[1] = 0
    assert kernels.linear(x, weight, None, derived)[0, 1] == 0


def test_short_runs_lose_less_than_one_long_sum(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "device_kind", lambda: "cpu")
    x = rng.standard_normal((64, 3072)).astype(np.float32)
    weight = rng.standard_normal((64, 3072)).astype(np.float32)
    exact = x.astype(np.float64) @ weight.T.astype(np.float64)

    def rms(run: int) -> float:
        monkeypatch.setattr(kernels, "PART", run)
        y = kernels.linear(x, kernels.arrange(mx.array(weight)), None, Derived())
        return float(np.sqrt(np.mean((y - exact) ** 2)))

    assert rms(96) < 0.95 * rms(3072)


class TestOnACpu:
    """In whatever parts, on however many threads and by whichever BLAS."""

    @pytest.fixture(
        params=[
            {},
            {"threads": 1},
            {"threads": 2, "GRAIN": 1},
            {"threads": 3, "BLOCK": 50, "TILE": 7, "GRAIN": 1, "SAMPLES": 60},
            {"threads": 5, "GRAIN": 300, "OUTPUTS": 5},
            {"threads": 2, "BLOCK": 50, "TILE": 7, "SCORES": 200, "KEYS": 7, "own": False},
        ],
        ids=str,
        autouse=True,
    )
    def division(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        sizes = dict(request.param)
        threads = sizes.pop("threads", None)
        if not sizes.pop("own", True):
            monkeypatch.setattr(blas, "_openblas", lambda: None)
        if threads is not None:
            monkeypatch.setattr(blas, "_stated", lambda: threads)
        for name, size in sizes.items():
            monkeypatch.setattr(cpu, name, size)

    @pytest.mark.parametrize("run", [0, 1, 4, 6])
    @pytest.mark.parametrize("rows", [1, 5])
    def test_products_of_parts_of_matrices(
        self, run: int, rows: int, rng: np.random.Generator
    ) -> None:
        a, b = rng.standard_normal((9, 9)), rng.standard_normal((9, 9))
        out = np.ones((9, 9), np.float32)
        for left in (a.astype(np.float32), a.astype(np.float32, order="F")):
            for right in (b.astype(np.float32), b.astype(np.float32, order="F")):
                for part in (slice(1, 7), slice(2, 8)):
                    x, y = left[:rows, part], right[part, 3:8]
                    out[:] = 1
                    blas.multiply(x, y, out[:rows, 2:7], run=run, factor=2)
                    assert closeness(out[:rows, 2:7], 2 * (x @ y)) < 1e-5
                    blas.multiply(x, y, out[:rows, 2:7], run=run, factor=2, add=True)
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

    def test_a_linear_layer(self, rng: np.random.Generator) -> None:
        x, weight = rng.standard_normal((2, 9, 30)), rng.standard_normal((13, 30))
        x, weight = x.astype(np.float32), weight.astype(np.float32)
        for bias in (None, rng.standard_normal(13).astype(np.float32)):
            expected = x @ weight.T + (0 if bias is None else bias)
            assert closeness(cpu.linear(x, weight, bias, 8, False), expected) < 1e-5
            got = cpu.linear(x, weight, bias, 8, True)
            assert closeness(got, exact_gelu(expected)) < 1e-5

    def test_a_convolution(self, rng: np.random.Generator) -> None:
        x, weight = rng.standard_normal((2, 50, 6)), rng.standard_normal((5, 3, 6))
        x, weight = x.astype(np.float32), weight.astype(np.float32)
        windows = np.lib.stride_tricks.sliding_window_view(x, 3, axis=1)[:, ::2]
        expected = exact_gelu(np.einsum("btik,oki->bto", windows, weight))
        got = cpu.conv1d(x, weight, None, 2, None, 4, 1e-5)
        assert closeness(got, expected) < 1e-5

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

    cpu._share(work, 40, 5)
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        cpu._share(work, 40, 5)
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
        cpu._share(work, 40, 5)
    assert blas.threads() == before


def test_weights_that_are_traced_do_not_meet_numpys_arrays(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient cannot be taken through numpy."""
    monkeypatch.setattr(kernels, "device_kind", lambda: "cpu")
    x, weight = rng.standard_normal((1, 5, 4)).astype(np.float32), array(np.eye(4))

    def loss(weight: mx.array, given: mx.array) -> mx.array:
        return kernels.linear(given, weight, None, Derived()).sum()

    gradient = mx.grad(loss)(weight, mx.array(x))
    assert closeness(gradient, np.tile(x.sum((0, 1)), (4, 1))) < 1e-5
    with pytest.raises(kernels.Traced):
        mx.grad(loss)(weight, x)
    with pytest.raises(kernels.Traced):
        mx.grad(lambda w: mx.array(kernels.as_given(x, mx.array(x) @ w)).sum())(weight)


def test_what_is_traced_stays_mlxs(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "device_kind", lambda: "cpu")
    x = array(rng.standard_normal((3, 5)))
    seen = []

    def function(x: mx.array) -> mx.array:
        seen.append(type(prepared(x)))
        return kernels.gelu(x).sum()

    for traced in (mx.grad(function), mx.vmap(function), mx.compile(function)):
        traced(x)
    assert seen == [mx.array] * 3
    function(x)
    assert seen.pop() is np.ndarray
