"""How each operation is carried out on each kind of device: the one place that knows.

The model says what is computed; this module says how. On Metal and CUDA the
operations go to MLX's own primitives. On a CPU they are matrix products
arranged so that the BLAS sees plain row-major operands.
"""

from __future__ import annotations

from typing import Any

from .backend import device_kind, mx

Array = Any

#: epsilon of every normalisation in fairseq (torch.nn's default)
EPS = 1e-5

# erf(z) ~ z P(z^2) / Q(z^2) on [-4, 4], the float32 minimax fit that Eigen and XLA use
# (Eigen/src/Core/MathFunctionsImpl.h, generic_fast_erf_float)
_ERF_P = (
    -2.72614225801306e-10,
    2.77068142495902e-08,
    -2.10102402082508e-06,
    -5.69250639462346e-05,
    -7.34990630326855e-04,
    -2.95459980854025e-03,
    -1.60960333262415e-02,
)
_ERF_Q = (
    -1.45660718464996e-05,
    -2.13374055278905e-04,
    -1.68282697438203e-03,
    -7.37332916720468e-03,
    -1.42647390514189e-02,
)


def gelu(x: Array) -> Array:
    """The exact (erf) GELU that every activation of the model is.

    Source: fairseq/modules/gelu.py, ``gelu``.
    """
    if device_kind() == "cpu" and x.dtype == mx.float32:
        # mx.erf calls fma out of line for each step on x86; mul, add and div vectorise
        half = x * 0.5
        z = mx.clip(x * 0.7071067811865476, -4.0, 4.0)
        z2 = z * z
        p: Any = _ERF_P[0]
        for coefficient in _ERF_P[1:]:
            p = p * z2 + coefficient
        q: Any = _ERF_Q[0]
        for coefficient in _ERF_Q[1:]:
            q = q * z2 + coefficient
        return half + half * (z * p / q)
    return x * (1 + mx.erf(x * 0.7071067811865476)) * 0.5


def layer_norm(x: Array, weight: Array, bias: Array) -> Array:
    """Layer norm over the last axis."""
    return mx.fast.layer_norm(x, weight, bias, EPS)


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


def conv1d(x: Array, weight: Array, bias: Array | None, stride: int) -> Array:
    """A convolution without padding, channels last.

    x: (batch, time, in)    weight: (out, kernel, in)    bias: (out,) or None
    returns: (batch, (time - kernel) // stride + 1, out)
    """
    if device_kind() == "cpu":
        out, kernel, _ = weight.shape
        y = windows(x, kernel, stride) @ weight.reshape(out, -1).T
    else:
        y = mx.conv1d(x, weight, stride)
    return y if bias is None else y + bias


def grouped_conv1d(x: Array, weight: Array, bias: Array) -> Array:
    """A grouped convolution of as many frames out as in, the last of an even kernel dropped.

    x: (batch, frames, channels)    weight: (channels, kernel, channels / groups)
    fairseq pads kernel // 2 on both sides and SamePad drops the last frame when
    the kernel is even: the same as padding one less on the right.
    Source: fairseq/models/wav2vec/wav2vec2.py, ``make_conv_pos``;
    fairseq/modules/same_pad.py.
    """
    channels, kernel, per_group = weight.shape
    padded = mx.pad(x, ((0, 0), (kernel // 2, (kernel - 1) // 2), (0, 0)))
    return mx.conv1d(padded, weight, groups=channels // per_group) + bias


def attention(queries: Array, keys: Array, values: Array, mask: Array | None) -> Array:
    """Scaled dot-product attention.

    queries, keys, values: (batch, heads, frames, head width)
    mask: (batch, 1, 1, frames), true where a key may be attended to, or None
    """
    return mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=queries.shape[-1] ** -0.5, mask=mask
    )


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
