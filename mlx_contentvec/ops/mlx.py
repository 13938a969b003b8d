"""The operations of MLX that Metal and CUDA need in another form than the plain one.

Each form stands with the figure that earned it. A CPU uses these only for what
``mx.compile`` or a gradient traces; everything else it computes in ``ops.cpu``.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backend import device_kind, mx, nn, tf32_enabled
from ..config import EPS
from . import cpu, tensor_cores
from .host_copy import to_numpy

#: whether long float32 sums are taken in parts on a GPU, or products and attention on tensor
#: cores: MLX_CONTENTVEC_SUMS=plain turns both off. Errors of layers 9 and 12 are 0.93 and 0.90
#: times PyTorch's on a CPU with parts, 0.63 and 0.61 on tensor cores (H200), 1.51 and 1.38 times
#: without either (H100); with parts a pass takes 3 to 8 % longer (1 to 60 s, H200, float32).
#: On a device that adds one product after the other parts leave 0.5 instead of 1.3 (PyTorch on
#: an EPYC of family 25, model 1)
SHORT_SUMS = os.environ.get("MLX_CONTENTVEC_SUMS", "short") != "plain"
#: products that are summed in a row in a convolution on a GPU without tensor cores. Of windows
#: of 1536 inputs, blocks of 256, 192 and 128 give the stages 1.5 to 1.6, 1.3 to 1.4 and 1.1 to
#: 1.2 times PyTorch's rms error on a CPU; a pass of 30 s takes 2 % less at 192 (H200)
CONV_K_BLOCK = 128
#: the same for windows of at most FEW_INPUTS, those of the last two convolutions, which are
#: few: the last one's largest error, from the audio on, is 1.36 times PyTorch's on a CPU
#: with it, 1.51 with 64 (H200)
CONV_SHORT_K_BLOCK = 32
FEW_INPUTS = 1024
#: numbers that are summed in a row over time on a GPU
SUM_BLOCK = 8
#: a linear layer of more inputs than this, the second of each feed-forward, is added up in
#: parts on Metal. Of a device that adds one product after the other this leaves the features
#: 1.4 instead of 1.5 times PyTorch's rms error, a layer by itself 2.0 instead of 2.6 (PyTorch
#: on a Zen 4). cuBLAS splits such sums itself
LONG_SUM, LONG_SUM_PARTS = 2048, 4
#: taps of the positional convolution in one product on CUDA: its largest error is 0.96 times
#: PyTorch's on a CPU, with 32 taps 1.70 (float32, H200). Half precision rounds after each
#: product, so that fewer of them are better
TAPS_PER_GEMM = 16
TAPS_PER_HALF_GEMM = 32


def compute_dtype(stored: mx.Dtype) -> mx.Dtype:
    """What is computed in where weights are stored as ``stored``.

    A CPU computes in float32: MLX emulates half precision there and takes more
    than 10 times as long (5 s of audio; AMD EPYC, one core).
    """
    return mx.float32 if device_kind() == "cpu" else stored


def to_gemm_layout(weight: mx.array) -> mx.array:
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


def in_gemm_layout(weight: mx.array) -> bool:
    """Whether ``to_gemm_layout`` leaves ``weight``, or a part of it, where it is."""
    if device_kind() == "metal" or weight.ndim < 2 or weight.dtype != mx.float32:
        return True
    return weight.shape[0] == 1 or bool(np.asarray(weight).strides[0] == weight.itemsize)


def _gelu(x: mx.array) -> mx.array:
    return x * (1 + mx.erf(x * 0.7071067811865476)) * 0.5


def _add_and_gelu(x: mx.array, bias: mx.array) -> mx.array:
    return _gelu(x + bias)


def _scale_and_gelu(x: mx.array, scale: mx.array, bias: mx.array) -> mx.array:
    return _gelu(x * scale + bias)


def _add_up_squares(*parts: mx.array) -> mx.array:
    """Neighbours first, then sums of neighbours."""
    if len(parts) == 1:
        return parts[0] * parts[0]
    half = (len(parts) + 1) // 2
    return _add_up_squares(*parts[:half]) + _add_up_squares(*parts[half:])


@functools.cache
def _compiled(function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    compiled: Callable[..., mx.array] = mx.compile(function, shapeless=True)
    return compiled


def _in_one_pass(function: Callable[..., mx.array], *arrays: mx.array) -> mx.array:
    """Elementwise operations in one pass over memory; on a CPU that takes a C++ compiler."""
    return function(*arrays) if device_kind() == "cpu" else _compiled(function)(*arrays)


def gelu(x: mx.array) -> mx.array:
    """The exact (erf) GELU that every activation of the model is.

    Source: fairseq/modules/gelu.py, ``gelu``.
    """
    return _in_one_pass(_gelu, x)


def _is_for_tensor_cores(dtype: mx.Dtype) -> bool:
    """Whether numbers of this type are for a kernel of our own, where it can be had.

    Where TF32 products are asked for, one of MLX's takes less time than three.
    """
    return (
        device_kind() == "cuda"
        and SHORT_SUMS
        and dtype in tensor_cores.CLOSE
        and not (dtype == mx.float32 and tf32_enabled())
    )


def _multiplies_on_tensor_cores() -> bool:
    return _is_for_tensor_cores(mx.float32) and tensor_cores.works(mx.float32)


def attends_on_tensor_cores(dtype: mx.Dtype, head_width: int) -> bool:
    """Whether a kernel of our own computes attention of such heads."""
    fits = head_width == tensor_cores.HEAD_WIDTH
    return fits and _is_for_tensor_cores(dtype) and tensor_cores.works(dtype)


def convolves_on_tensor_cores(dtype: mx.Dtype, layers: Sequence[tuple[int, int, int]]) -> bool:
    """Whether a kernel of our own computes all convolutions but the first.

    layers: channels, kernel and stride of each
    """
    windows = itertools.pairwise(layers)
    return (
        dtype == mx.float32
        and all(
            tensor_cores.is_block_product(kernel * channels_in, channels, channels_in)
            for (channels_in, _, _), (channels, kernel, _) in windows
        )
        and _multiplies_on_tensor_cores()
    )


def kernels_for(dtypes: Iterable[mx.Dtype], head_width: int) -> Callable[[], None] | None:
    """What compiles the kernels that a pass with such weights and heads needs; None if none.

    That for tensor cores takes 1.4 s (float32, H200).
    """
    attends = head_width == tensor_cores.HEAD_WIDTH
    needed = {
        dtype
        for dtype in dtypes
        if _is_for_tensor_cores(dtype) and (attends or dtype == mx.float32)
    }

    def compile_kernels() -> None:
        for dtype in needed:
            with contextlib.suppress(Exception):
                tensor_cores.works(dtype)

    return compile_kernels if needed else None


def _on_tensor_cores(x: mx.array, weight: mx.array, *added: mx.array | None) -> bool:
    """Whether ``tensor_cores.product`` computes a product, in windows of ``x``."""
    inputs, outputs = math.prod(weight.shape[1:]), len(weight)
    return (
        all(part is None or part.dtype == mx.float32 for part in (x, weight, *added))
        and tensor_cores.is_block_product(inputs, outputs, x.shape[-1])
        and _multiplies_on_tensor_cores()
    )


def linear(
    x: mx.array,
    weight: mx.array,
    bias: mx.array | None,
    then_gelu: bool = False,
    residual: mx.array | None = None,
) -> mx.array:
    """A linear layer, its GELU if asked, plus a residual.

    x: (..., in)    weight: (out, in)    bias: (out,) or None
    residual: (..., out), or what MLX repeats to that, or None
    returns: (..., out)
    """
    out, inputs = weight.shape
    in_parts = SHORT_SUMS and device_kind() == "metal" and x.dtype == mx.float32
    if x.size >= tensor_cores.FEW_ROWS * inputs and _on_tensor_cores(x, weight, bias, residual):
        if residual is not None:
            residual = mx.broadcast_to(residual, (*x.shape[:-1], out))
        if x.ndim != 3:
            rows = x.reshape(1, -1, inputs)
            added = None if residual is None else residual.reshape(1, -1, out)
            y = tensor_cores.product(rows, weight.T, bias, then_gelu=then_gelu, residual=added)
            return y.reshape(*x.shape[:-1], out)
        return tensor_cores.product(x, weight.T, bias, then_gelu=then_gelu, residual=residual)
    if in_parts and inputs > LONG_SUM and inputs % LONG_SUM_PARTS == 0:
        rows = x.reshape(-1, LONG_SUM_PARTS, inputs // LONG_SUM_PARTS).transpose(1, 0, 2)
        matrices = weight.reshape(out, LONG_SUM_PARTS, -1).transpose(1, 2, 0)
        y = (rows @ matrices).sum(axis=0).reshape(*x.shape[:-1], out)
        y = y if bias is None else y + bias
    else:
        y = x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)
    y = gelu(y) if then_gelu else y
    return y if residual is None else residual + y


def windows(x: mx.array, kernel: int, stride: int) -> mx.array:
    """Every window of a sequence as one row.

    x:       (batch, time, channels)
    returns: (batch, (time - kernel) // stride + 1, kernel * channels)
    """
    batch, time, channels = x.shape
    count = (time - kernel) // stride + 1
    return mx.as_strided(
        mx.contiguous(x), (batch, count, kernel * channels), (time * channels, stride * channels, 1)
    )


def conv1d(
    x: mx.array, weight: mx.array, bias: mx.array | None, stride: int, then_gelu: bool = False
) -> mx.array:
    """A convolution without padding, channels last, and its GELU if asked.

    x: (batch, time, in)    weight: (out, kernel, in)    bias: (out,) or None
    returns: (batch, (time - kernel) // stride + 1, out)

    On a GPU a float32 convolution is a product of its windows: on tensor cores where these can
    be as exact, else a batched one, in parts of some inputs (CONV_K_BLOCK) that are added up
    afterwards. In half precision on CUDA it is one
    product: cuDNN takes 0.07 ms for the second convolution of 10 s and a product 0.11, but
    cuDNN's needs a plan for every length of a clip, which takes some 20 ms, and MLX keeps
    128 of them (H100).
    """
    out, kernel, channels = weight.shape
    batch, time, _ = x.shape
    inputs = kernel * channels
    block = CONV_SHORT_K_BLOCK if inputs <= FEW_INPUTS else CONV_K_BLOCK
    single = x.dtype == mx.float32
    if min(batch, time - kernel + 1) > 0 and _on_tensor_cores(x, weight, bias):
        matrix = weight.transpose(1, 2, 0).reshape(inputs, out)
        return tensor_cores.product(x, matrix, bias, kernel, stride, then_gelu=then_gelu)
    if device_kind() == "cpu" or (device_kind() == "metal" and not single):
        y = mx.conv1d(x, weight, stride)
    elif not (SHORT_SUMS and single) or inputs % block:
        y = windows(x, kernel, stride) @ weight.transpose(1, 2, 0).reshape(inputs, out)
    else:
        by_part = mx.as_strided(
            mx.contiguous(x),
            (inputs // block, batch, (time - kernel) // stride + 1, block),
            (block, time * channels, stride * channels, 1),
        )
        parts = by_part @ weight.transpose(1, 2, 0).reshape(-1, 1, block, out)
        if len(parts) % SUM_BLOCK == 0:
            parts = parts.reshape(-1, SUM_BLOCK, *parts.shape[1:]).sum(axis=1)
        y = parts.sum(axis=0)
    if bias is None:
        return gelu(y) if then_gelu else y
    return _in_one_pass(_add_and_gelu, y, bias) if then_gelu else y + bias


def conv1d_group_norm_gelu(
    waveform: mx.array,
    weight: mx.array,
    scale: mx.array,
    shift: mx.array,
    stride: int,
    lengths: mx.array | None = None,
    moments: Sequence[cpu.Moments] | None = None,
) -> mx.array:
    """A convolution of a waveform, a group norm of one channel per group, and GELU.

    waveform: (batch, samples)    weight: (channels, kernel, 1)    scale, shift: (channels,)
    lengths:  (batch,) samples of each clip that its norm counts, or None for all
    moments:  each clip's, where this is a piece of it
    returns:  (batch, (samples - kernel) // stride + 1, channels), float32; of windows that
              do not count, any numbers

    On a CPU the norm follows from the moments of the windows. A GPU would wait for
    that; it has the bandwidth to look at the channels themselves.
    A bias of the convolution shifts a channel's mean and nothing else: it cancels.
    """
    kernel = weight.shape[1]
    weight, scale, shift = (w.astype(mx.float32) for w in (weight[..., 0], scale, shift))
    if moments is None:
        rows, counted = _centred_windows(waveform, kernel, stride, lengths)
        y = rows @ weight.T
        variance = _sum_of_squares(y) / counted
        y = y[:, : (waveform.shape[1] - kernel) // stride + 1]
    else:
        of_channels = [moment.of_channels(np.array(weight)) for moment in moments]
        offset = mx.array([[float(moment.offset)] for moment in moments])
        mean, variance = (mx.array(np.stack(values)) for values in zip(*of_channels, strict=True))
        y = windows((waveform - offset)[..., None], kernel, stride) @ weight.T - mean[:, None]
    factor = scale / mx.sqrt(variance + EPS)
    return _in_one_pass(_scale_and_gelu, y, factor[:, None], shift)


def _centred_windows(
    waveform: mx.array, kernel: int, stride: int, lengths: mx.array | None
) -> tuple[mx.array, Any]:
    """The windows of a waveform without their mean over time, and how many of each clip count.

    waveform: (batch, samples)
    returns:  (batch, windows, kernel) with rows of zeros up to a multiple of SUM_BLOCK, and
              in the place of those that do not count; an integer or (batch, 1)
    """
    samples = waveform.shape[1]
    valid_samples: Any = samples
    valid_windows: Any = (samples - kernel) // stride + 1
    if lengths is not None:
        waveform = mx.where(mx.arange(samples)[None] < lengths[:, None], waveform, 0.0)
        valid_samples = lengths[:, None]
        valid_windows = ((lengths - kernel) // stride + 1)[:, None]
    # any number near the mean: what is left of it goes with the mean of the windows
    offset = waveform.sum(axis=1, keepdims=True) / valid_samples
    rows = windows((waveform - offset)[..., None], kernel, stride)
    if lengths is not None:
        counted = mx.arange(rows.shape[1])[None, :, None] < valid_windows[..., None]
        rows = mx.where(counted, rows, 0.0)
    rows = rows - (_sum_over_time(rows) / valid_windows)[:, None]
    if lengths is not None:
        rows = mx.where(counted, rows, 0.0)
    return _padded(rows, SUM_BLOCK), valid_windows


def _padded(x: mx.array, multiple: int) -> mx.array:
    """``x`` with zeros behind axis 1 up to a multiple of so many."""
    rest = -x.shape[1] % multiple
    return mx.pad(x, ((0, 0), (0, rest), (0, 0))) if rest else x


def _sum_over_time(x: mx.array) -> mx.array:
    """The sum over axis 1 of (batch, time, channels) in short sums of short sums.

    A clip has millions of samples, and silence in it adds a small number over and over,
    which a long float32 sum loses: a variance was off by 3e-6 in blocks of 128.
    """
    if not SHORT_SUMS:
        return x.sum(axis=1)
    levels = 0
    while SUM_BLOCK ** (levels + 1) < x.shape[1]:
        levels += 1
    x = _padded(x, SUM_BLOCK**levels)
    x = x.reshape(len(x), -1, *[SUM_BLOCK] * levels, x.shape[2])
    for axis in range(levels, -1, -1):
        x = x.sum(axis=1 + axis)
    return x


def _sum_of_squares(x: mx.array) -> mx.array:
    """The sum of the squares over axis 1, whose first short sums take one pass over ``x``.

    x: (batch, time, channels), time being a multiple of SUM_BLOCK
    """
    if not SHORT_SUMS:
        return (x * x).sum(axis=1)
    batch, _, channels = x.shape
    rows = mx.split(x.reshape(batch, -1, SUM_BLOCK, channels), SUM_BLOCK, axis=2)
    return _sum_over_time(_in_one_pass(_add_up_squares, *rows).squeeze(2))


def grouped_conv1d(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """A grouped convolution of as many frames out as in, the last of an even kernel dropped.

    x: (batch, frames, channels)    weight: (channels, kernel, channels / groups)

    fairseq pads kernel // 2 on both sides and SamePad drops the last frame when
    the kernel is even: the same as padding one less on the right.
    Source: fairseq/models/wav2vec/wav2vec2.py, ``make_conv_pos``;
    fairseq/modules/same_pad.py.
    """
    kernel, per_group = weight.shape[1:]
    left, right = kernel // 2, (kernel - 1) // 2
    taps = TAPS_PER_GEMM if x.dtype == mx.float32 else TAPS_PER_HALF_GEMM
    if device_kind() == "cuda" and kernel % taps == 0:
        return _grouped_as_products(x, weight, left, right, taps) + bias
    # padded by the convolution itself and trimmed: given frames that were padded
    # before, cuDNN picks an engine that reads out of bounds (mlx 0.32.4, H100)
    y = mx.conv1d(x, weight, padding=left, groups=weight.shape[0] // per_group)
    return y[:, : x.shape[1]] + bias


def _grouped_as_products(
    x: mx.array, weight: mx.array, left: int, right: int, taps: int
) -> mx.array:
    """A grouped convolution as one batched product, a matrix for each ``taps`` taps of a group.

    0.33 ms at 10 s and 0.74 at 30 s, where a product for each block of taps takes 0.53 and
    0.96 (float32, H200), and cuDNN twice that (H100).
    """
    batch, frames, channels = x.shape
    kernel, per_group = weight.shape[1:]
    groups, blocks = channels // per_group, kernel // taps
    padded = mx.pad(x, ((0, 0), (left, right), (0, 0)))
    by_group = padded.reshape(batch, -1, groups, per_group).transpose(0, 2, 1, 3)
    of_group = padded.shape[1] * per_group
    rows = mx.as_strided(
        mx.contiguous(by_group),
        (blocks, batch, groups, frames, taps * per_group),
        (taps * per_group, groups * of_group, of_group, per_group, 1),
    )
    matrices = weight.transpose(1, 2, 0).reshape(blocks, 1, taps * per_group, groups, per_group)
    y = (rows @ matrices.swapaxes(2, 3)).sum(axis=0)
    return y.transpose(0, 2, 1, 3).reshape(batch, frames, channels)


def self_attention(qkv: Sequence[mx.array], heads: int, mask: mx.array | None) -> mx.array:
    """Scaled dot-product attention among the frames of each clip.

    qkv: queries, keys and values, (batch, frames, width) each, or one array that has them beside
        each other
    mask: (batch, 1, 1, frames) or what MLX repeats to that, true where a key may be attended
        to, or None
    returns: (batch, frames, width)
    """
    batch, frames, row = qkv[0].shape
    width = row * len(qkv) // 3
    if (
        batch * frames > 0
        and all(part.dtype == qkv[0].dtype for part in qkv)
        and attends_on_tensor_cores(qkv[0].dtype, width // heads)
    ):
        whole = qkv[0] if len(qkv) == 1 else mx.concatenate(qkv, axis=-1)
        if mask is not None:
            mask = mx.broadcast_to(mask, (batch, 1, 1, frames)).reshape(batch, frames)
        return tensor_cores.attention(whole, mask)
    queries, keys, values = (
        y.reshape(batch, frames, heads, width // heads).transpose(0, 2, 1, 3)
        for y in (mx.split(qkv[0], 3, axis=-1) if len(qkv) == 1 else qkv)
    )
    return attention(queries, keys, values, mask)


def plans_attention(dtype: mx.Dtype, head_width: int) -> bool:
    """Whether attention without a mask makes a plan for every length on this device."""
    return _has_plans(dtype) and not attends_on_tensor_cores(dtype, head_width)


def _has_plans(dtype: mx.Dtype) -> bool:
    """Whether MLX's fused attention makes a plan for every length on this device."""
    return device_kind() == "cuda" and dtype != mx.float32


def attention(
    queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None
) -> mx.array:
    """Scaled dot-product attention.

    queries, keys, values: (batch, heads, frames, head width)
    mask: (batch, 1, 1, frames), true where a key may be attended to, or None
    returns: (batch, frames, heads * head width)

    In half precision on CUDA the fused kernel needs a plan for every length, which takes
    some 70 ms to make, and MLX keeps 256. With a mask it is 4 to 10 % faster than two
    products are up to 15 s of audio, 20 % at 30 s and 30 % at 60 s (a whole pass, H200):
    batches of many lengths, which have a mask, take the products where no kernel of our own
    attends.
    """
    batch, heads, frames, width = queries.shape
    if mask is not None and _has_plans(queries.dtype):
        # in float32, as within the fused kernel: a bfloat16 score of 32 may be off by 0.125
        exact = [part.astype(mx.float32) for part in (queries, keys)]
        scores = (exact[0] * width**-0.5) @ exact[1].swapaxes(-1, -2)
        scores = mx.where(mask, scores, mx.finfo(mx.float32).min)
        attended = mx.softmax(scores, axis=-1).astype(values.dtype) @ values
    else:
        attended = mx.fast.scaled_dot_product_attention(
            queries, keys, values, scale=width**-0.5, mask=mask
        )
    return attended.transpose(0, 2, 1, 3).reshape(batch, frames, heads * width)


def output_slice(layer: nn.Module, rows: slice) -> Callable[[mx.array], mx.array]:
    """A linear or quantised layer that computes some of its outputs only."""
    bias = layer.bias[rows]
    if not isinstance(layer, nn.QuantizedLinear):
        weight = to_gemm_layout(layer.weight[rows])
        return lambda x: linear(x, weight, bias)
    weight, scales, biases = (
        mx.contiguous(array[rows]) for array in (layer.weight, layer.scales, layer.biases)
    )
    return lambda x: (
        mx.quantized_matmul(
            x,
            weight,
            scales=scales,
            biases=biases,
            group_size=layer.group_size,
            bits=layer.bits,
            mode=layer.mode,
        )
        + bias
    )


class MlxHubert:
    """The model's own modules as a forward pass of MLX arrays.

    ``ops.cpu_hubert.CpuHubert`` has the same methods and computes with numpy arrays.
    """

    def __init__(
        self, model: nn.Module, qkv: Sequence[tuple[mx.array, mx.array]] | None = None
    ) -> None:
        """qkv: weight and bias of each layer's queries, keys and values as one product."""
        self._model = model
        self._qkv = qkv
        self.layers = model.encoder.layers
        self.final_proj = model.get("final_proj")

    def stages(self, **conditions: Any) -> Any:
        """``Hubert.stages``."""
        return self._model.stages(qkv=self._qkv, **conditions)

    def head_projections(self, layer: int, rows: slice) -> list[Callable[[mx.array], mx.array]]:
        """Queries, keys and values of some heads, whose outputs are ``rows``."""
        attention = self.layers[layer].self_attn
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        return [output_slice(part, rows) for part in parts]

    attention = staticmethod(attention)

    def waveform(self, x: npt.NDArray[np.float32] | mx.array) -> mx.array:
        """An input of a stage, as it is."""
        return mx.array(x) if isinstance(x, np.ndarray) else x

    def from_numpy(self, x: npt.NDArray[np.float32]) -> mx.array:
        """float32 as the model computes with it."""
        return mx.array(x).astype(compute_dtype(self._model.layer_norm.weight.dtype))

    def to_numpy(self, x: mx.array) -> npt.NDArray[np.float32]:
        """An output as float32."""
        return to_numpy(x.astype(mx.float32), copy=False)

    def concatenate(self, pieces: Sequence[mx.array], axis: int) -> mx.array:
        """Pieces as one array, computed now: a graph of all pieces would hold all their inputs."""
        whole = mx.concatenate(pieces, axis=axis)
        mx.eval(whole)
        return whole

    def compute(self, *arrays: mx.array) -> None:
        """Compute what is lazy."""
        mx.eval(*arrays)
