"""How each operation is carried out on each kind of device: the one place that knows.

The model says what is computed; this module says how. On Metal and CUDA the
operations go to MLX's own primitives. On a CPU they are matrix products
arranged so that the BLAS sees plain row-major operands.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from . import cpu
from .backend import device_kind, mx

Array = Any

#: epsilon of every normalisation in fairseq (torch.nn's default)
EPS = 1e-5

#: input channels that one product of a sum takes on a CPU. OpenBLAS adds up to 384
#: products in a row; short runs added to each other lose less: of PyTorch's own rms error
#: features keep 0.39 to 0.84 at 64, 0.39 to 0.86 at 96, 0.40 to 1.01 at 128, 0.60 to 1.32
#: at 256, in 100, 94, 93 and 91 % of the time (5 s of audio)
PART = 96
#: the same for convolutions, which reach 1.05 times PyTorch's error at 96 and 0.97 at 64
CONV_PART = 64
#: rows of a convolution or a feed-forward in work at once on a CPU
TILE = 512
#: length of the FFT of the positional convolution, in kernels: its response is read whole for
#: any clip, 38 MB at 2 and twice that at 4 (3.4 ms against 7.3 for 1 s of audio, 4.5 against
#: 7.4 for 5 s, 40 against 36 for 30 s; AMD EPYC, one core; mx.conv1d takes 25 and 98)
FFT_KERNELS = 2
#: taps of the positional convolution in one product on CUDA
TAPS = 32
#: samples of a batch above which its stages are computed two at a time
PIPELINED_SAMPLES = 20 * 16000


def gelu(x: Array) -> Array:
    """The exact (erf) GELU that every activation of the model is; on a CPU of float32 alone.

    Source: fairseq/modules/gelu.py, ``gelu``.
    """
    if device_kind() != "cpu":
        return _gelu_fused(x)
    computed = cpu.gelu(x)
    return _gelu_plain(x) if computed is None else computed


def _gelu_plain(x: Array) -> Array:
    return x * (1 + mx.erf(x * 0.7071067811865476)) * 0.5


def _normalised_gelu_plain(x: Array, mean: Array, scale: Array, bias: Array) -> Array:
    return _gelu_plain((x - mean) * scale + bias)


# one pass over memory instead of four; on a CPU mx.compile would call the C++ compiler
_gelu_fused = mx.compile(_gelu_plain, shapeless=True)
_normalised_gelu_fused = mx.compile(_normalised_gelu_plain, shapeless=True)


def normalised_gelu(x: Array, mean: Array, scale: Array, bias: Array) -> Array:
    """``gelu((x - mean) * scale + bias)``; x: (batch, rows, channels), the rest broadcast to it."""
    if device_kind() != "cpu":
        return _normalised_gelu_fused(x, mean, scale, bias)
    computed = cpu.normalised_gelu(x, mean, scale, bias)
    return _normalised_gelu_plain(x, mean, scale, bias) if computed is None else computed


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    """Layer norm over the last axis.

    On a CPU, MLX adds a row up one number after the other. Partial sums are as
    quick, and leave an error of 8e-8 rms where that leaves 2.2e-7 (768 wide).
    """
    if device_kind() != "cpu":
        return mx.fast.layer_norm(x, weight, bias, EPS)
    centred = x - _mean(x)
    return centred * mx.rsqrt(_mean(centred * centred) + EPS) * weight + bias


def _mean(x: Array) -> Array:
    """Mean over the last axis, which stays with length 1, from up to 32 partial sums."""
    parts = math.gcd(x.shape[-1], 32)
    return x.reshape(*x.shape[:-1], parts, -1).mean(-1).mean(-1)[..., None]


def windows(x: Array, kernel: int, stride: int) -> Array:
    """Every window of a sequence as one row.

    x:       (batch, time, channels)
    returns: (batch, (time - kernel) // stride + 1, kernel * channels)
    """
    batch, time, channels = x.shape
    count = (time - kernel) // stride + 1
    return mx.as_strided(
        mx.contiguous(x), (batch, count, kernel * channels), (time * channels, stride * channels, 1)
    )


def compute_dtype(stored: Any) -> Any:
    """What is computed in where weights are stored as ``stored``.

    On a CPU always float32: MLX's half precision is emulated there and takes 12
    (float16) and 10 times (bfloat16) as long (5 s of audio; AMD EPYC, one core).
    """
    return mx.float32 if device_kind() == "cpu" else stored


class Derived:
    """What was made of weights, made once as long as they are those weights."""

    def __init__(self) -> None:
        self._weights: tuple[Array, ...] = ()
        self._made: Array = None

    def of(self, make: Callable[..., Array], *weights: Array) -> Array:
        """``make(*weights)``, made now unless it was made of these very arrays before."""
        same = len(self._weights) == len(weights) and all(map(operator.is_, self._weights, weights))
        if not same:
            self._weights, self._made = weights, make(*weights)
        return self._made


def widened(weight: Array, derived: Derived) -> Array:
    """A weight in the precision that this device computes in."""
    dtype = compute_dtype(weight.dtype)
    if weight.dtype == dtype:
        return weight
    return derived.of(lambda stored: arrange(stored.astype(dtype)), weight)


def arrange(weight: Array) -> Array:
    """``weight`` stored as this device's products read it; shape and values stay.

    On a CPU a product takes the weight's transpose some input channels at a
    time: stored by columns, these are plain row-major blocks that the BLAS
    reads in place. On CUDA a float32 product of two row-major operands takes
    5 to 10 % less time than one with a transposed operand (H100).
    """
    if device_kind() == "metal" or weight.ndim < 2 or weight.dtype != mx.float32:
        return weight
    inputs_first = weight.transpose(*range(1, weight.ndim), 0)
    return mx.contiguous(inputs_first).transpose(weight.ndim - 1, *range(weight.ndim - 1))


def matmul(a: Array, b: Array) -> Array:
    """``a @ b``."""
    return cpu.matmul(a, b) if device_kind() == "cpu" else a @ b


def linear(x: Array, weight: Array, bias: Array | None) -> Array:
    """x: (..., in)    weight: (out, in)    bias: (out,) or None    returns (..., out)."""
    if device_kind() == "cpu":
        rows = x.astype(mx.float32).reshape(-1, x.shape[-1])
        parts = _parts(weight.T, PART)
        terms, matrices = [rows[:, part] for part, _ in parts], [matrix for _, matrix in parts]
        return cpu.summed(terms, matrices, bias).reshape(*x.shape[:-1], -1)
    if bias is None:
        return x @ weight.T
    return mx.addmm(bias, x, weight.T)


def _parts(matrix: Array, size: int) -> list[tuple[slice, Array]]:
    """A (in, out) matrix ``size`` inputs at a time, with the inputs that each takes."""
    slices = [slice(start, start + size) for start in range(0, matrix.shape[0], size)]
    return [(part, matrix[part]) for part in slices]


def by_rows(function: Callable[[Array], Array], x: Array) -> Array:
    """``function`` of ``x``, (batch, rows, channels), where rows do not see each other.

    On a CPU a few rows at a time, so that what lies between the first and the
    last operation never leaves the cache.
    """
    if device_kind() != "cpu" or x.shape[1] <= TILE:
        return function(x)
    return mx.concatenate(
        [function(x[:, start : start + TILE]) for start in range(0, x.shape[1], TILE)], axis=1
    )


def conv1d(
    x: Array,
    weight: Array,
    bias: Array | None,
    stride: int,
    finish: Callable[[Array], Array],
) -> Array:
    """A convolution without padding, channels last, and what follows it frame by frame.

    x: (batch, time, in)    weight: (out, kernel, in)    bias: (out,) or None
    finish: from (batch, frames, out) to the same shape, frames independent
    returns: (batch, (time - kernel) // stride + 1, out)
    """
    out, kernel, _ = weight.shape
    if device_kind() == "cuda" and x.dtype == mx.float32:
        # 0.62 ms instead of cuDNN's 0.70 for the second convolution of 10 s (H100, no TF32);
        # in half precision cuDNN takes 0.07 and this 0.11
        y = windows(x, kernel, stride) @ weight.transpose(1, 2, 0).reshape(-1, out)
        return finish(y if bias is None else y + bias)
    if device_kind() != "cpu":
        y = mx.conv1d(x, weight, stride)
        return finish(y if bias is None else y + bias)
    x = x.astype(mx.float32)
    count = (x.shape[1] - kernel) // stride + 1
    taps = [_parts(weight[:, tap].T, CONV_PART) for tap in range(kernel)]
    matrices = [matrix for tap in taps for _, matrix in tap]
    clips = []
    for clip in x:
        tiles = []
        for start in range(0, count, TILE):
            first, last = start * stride, (min(start + TILE, count) - 1) * stride
            terms = [
                clip[first + tap : last + tap + 1 : stride, part]
                for tap in range(kernel)
                for part, _ in taps[tap]
            ]
            tiles.append(finish(cpu.summed(terms, matrices, bias)[None]))
        clips.append(mx.concatenate(tiles, axis=1))
    return mx.concatenate(clips)


def _spectrum(kernel: Array) -> Array:
    """The frequency response of a grouped convolution's kernel.

    kernel: (channels, length, in)    returns: (bins, groups, in, out), complex64
    """
    channels, length, per_group = kernel.shape
    groups, size = channels // per_group, FFT_KERNELS * length
    flipped = np.array(kernel.astype(mx.float32))[:, ::-1]
    response = np.empty((size // 2 + 1, groups, per_group, per_group), np.complex64)
    # group by group: the whole in double precision is five times the kernel
    for group in range(groups):
        rows = flipped[group * per_group : (group + 1) * per_group].transpose(2, 0, 1)
        bins = np.fft.rfft(np.ascontiguousarray(rows, np.float64), size)
        response[:, group] = bins.transpose(2, 0, 1)
    return mx.array(response)


def grouped_conv1d(x: Array, weight: Array, bias: Array, spectrum: Derived) -> Array:
    """A grouped convolution of as many frames out as in, the last of an even kernel dropped.

    x: (batch, frames, channels)    weight: (channels, kernel, channels / groups)
    spectrum: where a CPU keeps the frequency response of the weight

    fairseq pads kernel // 2 on both sides and SamePad drops the last frame when
    the kernel is even: the same as padding one less on the right.
    Source: fairseq/models/wav2vec/wav2vec2.py, ``make_conv_pos``;
    fairseq/modules/same_pad.py.
    """
    kernel, per_group = weight.shape[1:]
    frames = x.shape[1]
    left, right = kernel // 2, (kernel - 1) // 2
    if device_kind() == "cuda" and kernel % TAPS == 0:
        return _grouped_in_blocks(x, weight, left, right) + bias
    if device_kind() != "cpu":
        # padded by the convolution itself and trimmed: given frames that were padded
        # before, cuDNN picks an engine that reads out of bounds (mlx 0.32.4, H100)
        y = mx.conv1d(x, weight, padding=left, groups=weight.shape[0] // per_group)
        return y[:, :frames] + bias
    # overlap-save: blocks of `size` frames give `step` each
    batch, _, channels = x.shape
    size = FFT_KERNELS * kernel
    step = size - kernel + 1
    blocks = -(-frames // step)
    padded = mx.pad(x, ((0, 0), (left, right + blocks * step - frames), (0, 0)))
    blocked = windows(padded, size, step).reshape(batch * blocks, size, channels)
    bins = mx.fft.rfft(blocked, axis=1).reshape(
        batch * blocks, -1, channels // per_group, per_group
    )
    product = cpu.matmul(bins.transpose(1, 2, 0, 3), spectrum.of(_spectrum, weight))
    product = product.transpose(2, 0, 1, 3).reshape(batch * blocks, -1, channels)
    y = mx.fft.irfft(product, n=size, axis=1)[:, kernel - 1 :]
    return y.reshape(batch, blocks * step, channels)[:, :frames] + bias


def _grouped_in_blocks(x: Array, weight: Array, left: int, right: int) -> Array:
    """A grouped convolution as a few batched products, ``TAPS`` taps unfolded at a time.

    0.30 ms instead of cuDNN's 0.59 at 10 s, 1.2 instead of 2.3 at 60 s (H100,
    float32); 0.2 instead of 0.8 and 0.5 instead of 2.4 in float16.
    """
    batch, frames, channels = x.shape
    kernel, per_group = weight.shape[1:]
    groups = channels // per_group
    padded = mx.pad(x, ((0, 0), (left, right), (0, 0)))
    by_group = padded.reshape(batch, -1, groups, per_group).transpose(0, 2, 1, 3)
    rows = windows(by_group.reshape(batch * groups, -1, per_group), TAPS, 1)
    rows = rows.reshape(batch, groups, -1, TAPS * per_group)
    matrices = weight.reshape(groups, per_group, kernel // TAPS, TAPS * per_group)
    total: Any = None
    for block in range(kernel // TAPS):
        start = block * TAPS
        part = rows[:, :, start : start + frames] @ matrices[:, :, block].swapaxes(1, 2)
        total = part if total is None else total + part
    return total.transpose(0, 2, 1, 3).reshape(batch, frames, channels)


def pipelined(x: Array, previous: Array | None) -> Array:
    """Start computing ``x``, and wait for what was started before it.

    A GPU holds every intermediate of a graph until the graph has run: 10 GB for
    60 s of audio on CUDA. Two stages at a time hold 1.5 GB.
    """
    try:
        mx.async_eval(x)
        if previous is not None:
            mx.eval(previous)
    except ValueError:  # being traced by mx.compile or a gradient
        return previous
    return x


def attention(queries: Array, keys: Array, values: Array, mask: Array | None) -> Array:
    """Scaled dot-product attention.

    queries, keys, values: (batch, heads, frames, head width)
    mask: (batch, 1, 1, frames), true where a key may be attended to, or None
    returns: (batch, frames, heads * head width)
    """
    if device_kind() == "cpu":
        attended = cpu.attention(queries, keys, values, mask)
        if attended is not None:
            return attended
    batch, heads, frames, width = queries.shape
    attended = mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=width**-0.5, mask=mask
    )
    return attended.transpose(0, 2, 1, 3).reshape(batch, frames, heads * width)


def window_moments(
    waveform: Array, lengths: Array | None, kernel: int, stride: int
) -> tuple[Array, Array, Array]:
    """Mean and covariance of a waveform's windows, in float64 on the CPU.

    A convolution is linear, so the mean and the variance over time of each of
    its channels follow from these: mean = w . m, variance = w' C w. That gives
    a group norm of one channel per group from the waveform alone, in one cheap
    pass and more exactly than from the float32 channels.

    waveform: (batch, samples)
    lengths:  (batch,) samples of each clip that count, or None for all
    returns:  offset (batch, 1) float32: the clip's own mean, to be subtracted first;
              mean (batch, kernel) and covariance (batch, kernel, kernel), float64,
              of the windows of ``waveform - offset``
    """
    with mx.stream(mx.cpu):
        samples = waveform.shape[1]
        count = (samples - kernel) // stride + 1
        exact = waveform.astype(mx.float64)
        if lengths is None:
            valid_samples = mx.array(samples, mx.float64)
            valid_windows = mx.array(count, mx.float64)
        else:
            inside = mx.arange(samples)[None] < lengths[:, None]
            exact = mx.where(inside, exact, mx.array(0.0, mx.float64))
            valid_samples = lengths[:, None].astype(mx.float64)
            valid_windows = ((lengths - kernel) // stride + 1)[:, None].astype(mx.float64)
        offset = (exact.sum(axis=1, keepdims=True) / valid_samples).astype(mx.float32)
        rows = windows((exact - offset.astype(mx.float64))[..., None], kernel, stride)
        if lengths is not None:
            counted = mx.arange(count)[None, :, None] < valid_windows[..., None]
            rows = mx.where(counted, rows, mx.array(0.0, mx.float64))
        rows = mx.contiguous(rows)
        mean = rows.sum(axis=1) / valid_windows
        second = (rows.swapaxes(1, 2) @ rows) / valid_windows[..., None]
        covariance = second - mean[:, :, None] * mean[:, None, :]
    return offset, mean, covariance


def channel_statistics(
    waveform: Array,
    lengths: Array | None,
    weight: Array,
    stride: int,
    moments: tuple[Array, Array, Array] | None = None,
) -> tuple[Array, Array, Array]:
    """Mean and variance over time of each channel of a convolution of a waveform.

    waveform: (batch, samples)    lengths: (batch,) samples that count, or None for all
    weight:   (channels, kernel)
    moments:  ``window_moments`` of the whole waveform, where this is a piece of it
    returns:  offset (batch, 1), to be subtracted from the waveform first, mean and
              variance (batch, channels) of what is convolved then, all float32

    On a CPU they follow from the moments of the windows. A GPU would wait for
    that; it has the bandwidth to look at the channels themselves, in two passes.
    """
    kernel = weight.shape[1]
    if moments is not None or device_kind() == "cpu":
        offset, mean, covariance = moments or window_moments(waveform, lengths, kernel, stride)
        with mx.stream(mx.cpu):
            exact = weight.astype(mx.float64)
            variance = ((exact[None] @ covariance) * exact[None]).sum(axis=-1)
            return (
                offset,
                (mean @ exact.T).astype(mx.float32),
                mx.maximum(variance, 0.0).astype(mx.float32),
            )
    samples = waveform.shape[1]
    valid_samples: Any = samples
    valid_windows: Any = (samples - kernel) // stride + 1
    if lengths is not None:
        waveform = mx.where(mx.arange(samples)[None] < lengths[:, None], waveform, 0.0)
        valid_samples = lengths[:, None]
        valid_windows = ((lengths - kernel) // stride + 1)[:, None]
    offset = waveform.sum(axis=1, keepdims=True) / valid_samples
    rows = windows((waveform - offset)[..., None], kernel, stride)
    if lengths is not None:
        counted = mx.arange(rows.shape[1])[None, :, None] < valid_windows[..., None]
        rows = mx.where(counted, rows, 0.0)
    row_mean = rows.sum(axis=1) / valid_windows
    channels = (rows - row_mean[:, None]) @ weight.T
    if lengths is not None:
        channels = mx.where(counted, channels, 0.0)
    return offset, row_mean @ weight.T, (channels * channels).sum(axis=1) / valid_windows
