"""How each operation is carried out on each kind of device: the one place that knows.

The model says what is computed; this module says how. On Metal and CUDA the
operations go to MLX's own primitives. A CPU computes with numpy's arrays and
OpenBLAS (``mlx_contentvec.cpu``): ``prepared`` makes them of what comes in, and
``mlx`` makes MLX's of what goes out. What ``mx.compile`` or a gradient traces
stays MLX's throughout.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import blas, cpu
from .backend import device_kind, mx

Array = Any

#: epsilon of every normalisation in fairseq (torch.nn's default)
EPS = 1e-5

#: input channels that one product of a sum takes on a CPU. OpenBLAS adds up to 384
#: products in a row; short runs added to each other lose less: of PyTorch's own rms error
#: features keep 0.39 to 0.84 at 64, 0.39 to 0.86 at 96, 0.40 to 1.01 at 128, 0.60 to 1.32
#: at 256; 64 takes 2 % more time than the others (5 s of audio)
PART = 96
#: the same for convolutions, which reach 1.05 times PyTorch's error at 96 and 0.97 at 64
CONV_PART = 64
#: rows of a feed-forward in work at once on a CPU
TILE = 512
#: length of the FFT of the positional convolution, in kernels: its response is read whole for
#: any clip, 38 MB at 2 and twice that at 4 (3.8 ms against 7.6 for 1 s of audio, 5.1 against
#: 7.6 for 5 s, 19 against 16 for 30 s; AMD EPYC, one core; mx.conv1d takes 25 and 98)
FFT_KERNELS = 2
#: taps of the positional convolution in one product on CUDA
TAPS = 32
#: samples of a batch above which its stages are computed two at a time
PIPELINED_SAMPLES = 20 * 16000


class Traced(ValueError):
    """numpy's arrays meet weights that ``mx.compile`` or a gradient is tracing."""


def prepared(x: Array) -> Array:
    """``x`` as this device computes with it: on a CPU float32 of numpy's, unless it is traced."""
    if device_kind() != "cpu":
        return mlx(x)
    if isinstance(x, np.ndarray):
        return np.asarray(x, np.float32)
    wide = mx.contiguous(x.astype(mx.float32))
    return np.asarray(wide) if cpu.in_memory(wide) else x


def mlx(x: Array) -> Array:
    """``x`` as an array of MLX's."""
    return mx.array(x) if isinstance(x, np.ndarray) else x


def as_given(x: Array, y: Array) -> Array:
    """``y``, which MLX has computed of ``x``, as numpy's if ``x`` is.

    Raises Traced if it cannot be.
    """
    if not isinstance(x, np.ndarray):
        return y
    result = prepared(y)
    if not isinstance(result, np.ndarray):
        raise Traced("numpy's arrays and traced weights")
    return result


def rounded(x: Array, stored: Any) -> Array:
    """``x`` in what a GPU computes in where weights are stored as ``stored``."""
    return x if isinstance(x, np.ndarray) else x.astype(compute_dtype(stored))


def place(weight: Array | None) -> int | None:
    """Where in memory a weight lies: elsewhere once it was changed in place.

    None for no weight, for one that is being traced, and for bfloat16 on a GPU:
    numpy does not know the type, and another view would wait for all that is in work.
    """
    if weight is None:
        return None
    if weight.dtype == mx.bfloat16:
        if device_kind() != "cpu":
            return None
        weight = weight.view(mx.uint16)
    try:
        return blas.address(np.asarray(weight))
    except (ValueError, RuntimeError):
        return None


class Derived:
    """What was made of weights, made once as long as they are those weights."""

    def __init__(self) -> None:
        self._state: tuple[Any, ...] = ()

    def of(self, make: Callable[..., Array], *weights: Array | None) -> Array:
        """``make(*weights)``, made now unless it was made of these very weights before.

        An array of MLX's that is changed in place (``weight *= 2``) stays the same
        object with other memory.
        """
        if self._state:
            known, places, _, made = self._state
            same = len(known) == len(weights) and all(map(operator.is_, known, weights))
            if same and places == [place(weight) for weight in weights]:
                return made
        made = make(*weights)
        # as long as their memory is held, nothing else can come to lie there
        held = [None if weight is None else weight[None] for weight in weights]
        self._state = weights, [place(weight) for weight in weights], held, made
        return made


def operands(x: Array, derived: Derived, *weights: Array | None) -> tuple[Array, ...]:
    """``x`` and the weights that meet it: numpy's if ``x`` is, else MLX's.

    derived: where weights are kept as numpy's

    Half precision is widened on a CPU: MLX emulates it there and takes more than 10
    times as long (5 s of audio; AMD EPYC, one core).
    Raises Traced if ``x`` is numpy's and a weight is being traced.
    """
    if not isinstance(x, np.ndarray):
        return x, *weights
    return x, *derived.of(_in_memory, *weights)


def _in_memory(*weights: Array | None) -> tuple[Array, ...]:
    """Weights as a CPU computes with them: float32 of numpy's."""
    wide = [None if w is None else _widened(w) for w in weights]
    if not cpu.in_memory(*(w for w in wide if w is not None)):
        raise Traced("numpy's arrays and traced weights")
    return tuple(None if w is None else np.asarray(w) for w in wide)


def _widened(weight: Array) -> Array:
    return weight if weight.dtype == mx.float32 else arrange(weight.astype(mx.float32))


def gelu(x: Array) -> Array:
    """The exact (erf) GELU that every activation of the model is.

    Source: fairseq/modules/gelu.py, ``gelu``.
    """
    if isinstance(x, np.ndarray):
        return cpu.gelu(x)
    return _gelu_plain(x) if device_kind() == "cpu" else _gelu_fused(x)


def _gelu_plain(x: Array) -> Array:
    return x * (1 + mx.erf(x * 0.7071067811865476)) * 0.5


def _normalised_gelu_plain(x: Array, mean: Array, scale: Array, bias: Array) -> Array:
    return _gelu_plain((x - mean) * scale + bias)


# one pass over memory instead of four; on a CPU mx.compile would call the C++ compiler
_gelu_fused = mx.compile(_gelu_plain, shapeless=True)
_normalised_gelu_fused = mx.compile(_normalised_gelu_plain, shapeless=True)


def layer_norm(x: Array, weight: Array, bias: Array, derived: Derived) -> Array:
    """Layer norm over the last axis."""
    x, weight, bias = operands(x, derived, weight, bias)
    if isinstance(x, np.ndarray):
        return cpu.layer_norm(x, weight, bias, EPS)
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


def compute_dtype(stored: Any) -> Any:
    """What is computed in where weights are stored as ``stored``: see ``operands``."""
    return mx.float32 if device_kind() == "cpu" else stored


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


def linear(
    x: Array, weight: Array, bias: Array | None, derived: Derived, then_gelu: bool = False
) -> Array:
    """A linear layer, and its GELU if asked.

    x: (..., in)    weight: (out, in)    bias: (out,) or None    returns (..., out)
    """
    x, weight, bias = operands(x, derived, weight, bias)
    if isinstance(x, np.ndarray):
        return cpu.linear(x, weight, bias, PART, then_gelu)
    y = x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)
    return gelu(y) if then_gelu else y


def by_rows(function: Callable[[Array], Array], x: Array) -> Array:
    """``function`` of ``x``, (batch, rows, channels), where rows do not see each other.

    On a CPU a few rows at a time, so that what lies between the first and the
    last operation never leaves the cache.
    """
    if not isinstance(x, np.ndarray) or x.shape[1] <= TILE:
        return function(x)
    starts = range(0, x.shape[1], TILE)
    return np.concatenate([function(x[:, at : at + TILE]) for at in starts], axis=1)


def conv1d(
    x: Array,
    weight: Array,
    bias: Array | None,
    stride: int,
    norm: tuple[Array, Array] | None,
    derived: Derived,
) -> Array:
    """A convolution without padding, channels last, its layer norm where there is one, and GELU.

    x: (batch, time, in)    weight: (out, kernel, in)    bias: (out,) or None
    norm: weight and bias, (out,) each
    returns: (batch, (time - kernel) // stride + 1, out)
    """
    x, weight, bias, *norm_held = operands(x, derived, weight, bias, *(norm or ()))
    if isinstance(x, np.ndarray):
        return cpu.conv1d(x, weight, bias, stride, tuple(norm_held) or None, CONV_PART, EPS)
    if device_kind() == "cuda" and x.dtype == mx.float32:
        # 0.62 ms instead of cuDNN's 0.70 for the second convolution of 10 s (H100, no TF32);
        # in half precision cuDNN takes 0.07 and this 0.11
        out, kernel, _ = weight.shape
        y = windows(x, kernel, stride) @ weight.transpose(1, 2, 0).reshape(-1, out)
    else:
        y = mx.conv1d(x, weight, stride)
    if bias is not None:
        y = y + bias
    return gelu(mx.fast.layer_norm(y, *norm_held, EPS) if norm_held else y)


def grouped_conv1d(x: Array, weight: Array, bias: Array, derived: Derived) -> Array:
    """A grouped convolution of as many frames out as in, the last of an even kernel dropped.

    x: (batch, frames, channels)    weight: (channels, kernel, channels / groups)

    fairseq pads kernel // 2 on both sides and SamePad drops the last frame when
    the kernel is even: the same as padding one less on the right.
    Source: fairseq/models/wav2vec/wav2vec2.py, ``make_conv_pos``;
    fairseq/modules/same_pad.py.
    """
    kernel, per_group = weight.shape[1:]
    if isinstance(x, np.ndarray):
        spectrum, added = derived.of(_spectrum_and_bias, weight, bias)
        return cpu.grouped_conv1d(x, spectrum, added, kernel)
    frames = x.shape[1]
    left, right = kernel // 2, (kernel - 1) // 2
    if device_kind() == "cuda" and kernel % TAPS == 0:
        return _grouped_in_blocks(x, weight, left, right) + bias
    # padded by the convolution itself and trimmed: given frames that were padded
    # before, cuDNN picks an engine that reads out of bounds (mlx 0.32.4, H100)
    y = mx.conv1d(x, weight, padding=left, groups=weight.shape[0] // per_group)
    return y[:, :frames] + bias


def _spectrum_and_bias(weight: Array, bias: Array) -> tuple[Array, Array]:
    kernel, added = _in_memory(weight, bias)
    return cpu.spectrum_of(kernel, FFT_KERNELS), added


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
    if isinstance(queries, np.ndarray):
        return cpu.attention(queries, keys, values, None if mask is None else np.asarray(mask))
    batch, heads, frames, width = queries.shape
    attended = mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=width**-0.5, mask=mask
    )
    return attended.transpose(0, 2, 1, 3).reshape(batch, frames, heads * width)


def conv1d_normalised_over_time(
    waveform: Array,
    weight: Array,
    scale: Array,
    shift: Array,
    stride: int,
    lengths: Array | None,
    moments: Sequence[cpu.Moments] | None,
    derived: Derived,
) -> Array:
    """A convolution of a waveform, a group norm of one channel per group, and GELU.

    waveform: (batch, samples)    weight: (channels, kernel, 1)    scale, shift: (channels,)
    lengths:  (batch,) samples of each clip that its norm counts, or None for all
    moments:  each clip's, where this is a piece of it
    returns:  (batch, (samples - kernel) // stride + 1, channels), float32

    On a CPU the norm follows from the moments of the windows. A GPU would wait for
    that; it has the bandwidth to look at the channels themselves, in two passes.
    """
    kernel = weight.shape[1]
    x, weight, scale, shift = operands(waveform, derived, weight, scale, shift)
    weight = weight[..., 0]
    if isinstance(x, np.ndarray):
        if moments is None:
            counts = [x.shape[1]] * len(x) if lengths is None else np.asarray(lengths).tolist()
            moments = [
                cpu.Moments.of(clip[:count], kernel, stride)
                for clip, count in zip(x, counts, strict=True)
            ]
        return cpu.normalised_conv1d(x, weight, scale, shift, stride, moments, EPS)
    weight, scale, shift = (w.astype(mx.float32) for w in (weight, scale, shift))
    if moments is None:
        offset, mean, variance = _channel_statistics(x, weight, stride, lengths)
    else:
        of_channels = [moment.of_channels(np.array(weight)) for moment in moments]
        offset = mx.array([[float(moment.offset)] for moment in moments])
        mean, variance = (mx.array(np.stack(values)) for values in zip(*of_channels, strict=True))
    factor = scale / mx.sqrt(variance + EPS)
    y = windows((x - offset)[..., None], kernel, stride) @ mx.contiguous(weight.T)
    finish = _normalised_gelu_plain if device_kind() == "cpu" else _normalised_gelu_fused
    return finish(y, mean[:, None], factor[:, None], shift)


def _channel_statistics(
    waveform: Array, weight: Array, stride: int, lengths: Array | None
) -> tuple[Array, Array, Array]:
    """Mean and variance over time of each channel of a convolution of a waveform.

    waveform: (batch, samples)    weight: (channels, kernel)
    returns:  offset (batch, 1), to be subtracted from the waveform first, mean and
              variance (batch, channels) of what is convolved then
    """
    kernel, samples = weight.shape[1], waveform.shape[1]
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
