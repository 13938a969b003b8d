"""The forward pass on a CPU: one walk in numpy over the parameters of a ``Hubert``.

The stages are those of ``hubert.Hubert.stages`` under the same names. Weights are
read in MLX's own memory where they are float32 and stored as ``to_gemm_layout``
stores them; others are copied once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from ..backend import mx, nn
from ..config import EPS, ModelConfig
from . import blas, cpu
from .mlx import in_gemm_layout, to_gemm_layout

Buffer = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]
Stage = Callable[[Buffer], Buffer]
Weights = dict[str, Buffer]


def to_numpy(weight: mx.array) -> Buffer:
    """A parameter as float32 in the layout of products; MLX's own memory where it is that.

    In another layout OpenBLAS may choose another kernel, which rounds otherwise (AVX-512).
    """
    weight = weight.astype(mx.float32)
    if not in_gemm_layout(weight):
        weight = to_gemm_layout(weight)
    # another array of the same memory: the parameter may be changed in place
    held = weight[None]
    mx.eval(held)
    array: Buffer = np.asarray(held)[0]
    return array


def dequantized(layer: nn.QuantizedLinear) -> Buffer:
    """The matrix of a quantised layer.

    MLX's quantised product takes 30 times as long on a CPU as a plain one (20 s
    instead of 0.6 for 5 s of audio; AMD EPYC, one core).
    """
    matrix = mx.dequantize(
        layer.weight, layer.scales, layer.biases, layer.group_size, layer.bits, mode=layer.mode
    )
    return to_numpy(matrix)


class Norm:
    """A layer norm over the last axis."""

    def __init__(self, module: nn.Module) -> None:
        self.weight, self.bias = to_numpy(module.weight), to_numpy(module.bias)

    def __call__(self, x: Buffer, speaker: mx.array | None = None) -> Buffer:
        """(batch, frames, width) in and out."""
        return cpu.layer_norm(x, self.weight, self.bias)


class ConditionalNorm:
    """``hubert.ConditionalNorm``, a small part of a rare model: computed by MLX."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, x: Buffer, speaker: mx.array | None = None) -> Buffer:
        """x: (batch, frames, width)    speaker: (batch, speaker_dim)."""
        return np.asarray(self._module(mx.array(x), speaker).astype(mx.float32))


def norm_of(module: nn.Module) -> Norm | ConditionalNorm:
    """The norm that a module is."""
    return ConditionalNorm(module) if "weight_ln" in module else Norm(module)


class Linear:
    """A linear layer, plain or quantised."""

    def __init__(self, module: nn.Module) -> None:
        quantized = isinstance(module, nn.QuantizedLinear)
        self.weight = dequantized(module) if quantized else to_numpy(module.weight)
        self.bias = to_numpy(module.bias) if "bias" in module else None

    def __call__(self, x: Buffer, then_gelu: bool = False) -> Buffer:
        """(..., inputs) to (..., outputs), and their GELU if asked."""
        return cpu.linear(x, self.weight, self.bias, then_gelu)

    def output_slice(self, rows: slice) -> Stage:
        """The layer with some of its outputs only."""
        columns = np.ascontiguousarray(self.weight[rows].T)
        bias = None if self.bias is None else self.bias[rows]
        return lambda x: cpu.linear(x, columns.T, bias)


class ConvBlock:
    """One block of the feature extractor."""

    def __init__(self, module: nn.Module) -> None:
        self.weight, self.stride = to_numpy(module.conv.weight), module.stride
        self.bias = to_numpy(module.conv.bias) if "bias" in module.conv else None
        self.norm = None
        if "norm" in module:
            self.norm = to_numpy(module.norm.weight), to_numpy(module.norm.bias)
        self.group_norm = module.group_norm

    def __call__(self, x: Buffer) -> Buffer:
        """(batch, time, channels in) to (batch, time / stride, channels)."""
        return cpu.conv1d(x, self.weight, self.bias, self.stride, self.norm)

    def from_waveform(
        self, waveform: Buffer, lengths: Sequence[int] | None, moments: Sequence[cpu.Moments] | None
    ) -> Buffer:
        """The first block: (batch, samples) to (batch, time / stride, channels)."""
        if not self.group_norm or self.norm is None:
            return self(waveform[..., None])
        kernel = self.weight[..., 0]
        if moments is None:
            counts = [waveform.shape[1]] * len(waveform) if lengths is None else lengths
            moments = [
                cpu.Moments.of(clip[:count], kernel.shape[1], self.stride)
                for clip, count in zip(waveform, counts, strict=True)
            ]
        return cpu.normalised_conv1d(waveform, kernel, *self.norm, self.stride, moments)


class EncoderLayer:
    """One transformer layer, with the methods of ``hubert.EncoderLayer``."""

    def __init__(self, module: nn.Module) -> None:
        self.norm_first = module.norm_first
        attention = module.self_attn
        self.heads = attention.heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (
            Linear(part)
            for part in (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj)
        )
        self.qkv = None
        if not isinstance(attention.q_proj, nn.QuantizedLinear):
            self.qkv = fused_qkv(self.q_proj, self.k_proj, self.v_proj)
        self.self_attn_layer_norm = norm_of(module.self_attn_layer_norm)
        self.fc1, self.fc2 = Linear(module.fc1), Linear(module.fc2)
        self.final_layer_norm = norm_of(module.final_layer_norm)

    def before_attention(self, x: Buffer, speaker: mx.array | None = None) -> Buffer:
        """What queries, keys and values are projected from."""
        return self.self_attn_layer_norm(x, speaker) if self.norm_first else x

    def self_attn(
        self, x: Buffer, mask: Mask | None, clips: Sequence[slice] | None = None
    ) -> Buffer:
        """Attention before its output projection, (batch, frames, width); each clip's own."""
        batch, frames, width = x.shape
        if self.qkv is None:
            projected = [project(x) for project in (self.q_proj, self.k_proj, self.v_proj)]
        else:
            projected = np.split(cpu.linear(x, *self.qkv), 3, axis=-1)
        queries, keys, values = (
            y.reshape(batch, frames, self.heads, width // self.heads).transpose(0, 2, 1, 3)
            for y in projected
        )
        if clips is None:
            return cpu.attention(queries, keys, values, mask)
        attended = [
            cpu.attention(queries[:, :, clip], keys[:, :, clip], values[:, :, clip], None)
            for clip in clips
        ]
        return np.concatenate(attended, axis=1)

    def after_attention(
        self, x: Buffer, attended: Buffer, speaker: mx.array | None = None
    ) -> Buffer:
        """The rest of the layer, frame by frame."""
        x = x + self.out_proj(attended)
        if self.norm_first:
            return x + self.feed_forward(self.final_layer_norm(x, speaker))
        x = self.self_attn_layer_norm(x, speaker)
        return self.final_layer_norm(x + self.feed_forward(x), speaker)

    def feed_forward(self, x: Buffer) -> Buffer:
        """A few rows at a time, so that the hidden units never leave the cache."""
        step = cpu.ROWS_PER_TILE
        tiles = [x[:, at : at + step] for at in range(0, x.shape[1], step)]
        done = [self.fc2(self.fc1(tile, then_gelu=True)) for tile in tiles]
        return done[0] if len(done) == 1 else np.concatenate(done, axis=1)

    def __call__(
        self,
        x: Buffer,
        mask: Mask | None,
        speaker: mx.array | None,
        clips: Sequence[slice] | None = None,
    ) -> Buffer:
        """(batch, frames, width) in and out."""
        attended = self.self_attn(self.before_attention(x, speaker), mask, clips)
        return self.after_attention(x, attended, speaker)


def fused_qkv(*parts: Linear) -> tuple[Buffer, Buffer]:
    """Queries', keys' and values' layers as one: weight (3 * width, width), bias (3 * width,).

    Nothing is copied where they lie beside each other, as ``weights.fuse_qkv`` stores
    them; elsewhere the parts become views of the copy.
    """
    first = parts[0].weight
    outputs, inputs = first.shape
    row, begin = 4 * outputs * len(parts), blas.data_pointer(first)
    beside = all(
        part.weight.strides == (4, row)
        and blas.data_pointer(part.weight) == begin + 4 * outputs * index
        for index, part in enumerate(parts)
    )
    shape = (len(parts) * outputs, inputs)
    if beside:
        weight = np.lib.stride_tricks.as_strided(first, shape, (4, row), writeable=False)
    else:
        weight = np.concatenate([part.weight.T for part in parts], axis=1).T
        for index, part in enumerate(parts):
            part.weight = weight[index * outputs : (index + 1) * outputs]
    return weight, np.concatenate([part.bias for part in parts if part.bias is not None])


class CpuHubert:
    """The forward pass of one model, as long as its parameters stay what they are."""

    def __init__(self, model: nn.Module) -> None:
        self.config: ModelConfig = model.config
        encoder = model.encoder
        self.conv_layers = [ConvBlock(block) for block in model.feature_extractor.conv_layers]
        self.layer_norm = Norm(model.layer_norm)
        self.post_extract_proj = Linear(model.post_extract_proj)
        self.pos_conv_norm = None
        if "pos_conv_norm" in encoder:
            norm = encoder.pos_conv_norm
            self.pos_conv_norm = tuple(
                to_numpy(w) for w in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
            )
        self.pos_conv_spectrum = cpu.spectrum_of(to_numpy(encoder.pos_conv.weight))
        self.pos_conv_bias = to_numpy(encoder.pos_conv.bias)
        self.encoder_layer_norm = Norm(encoder.layer_norm)
        self.layers = [EncoderLayer(layer) for layer in encoder.layers]
        self.cond_layer_norm = None
        if "cond_layer_norm" in encoder:
            self.cond_layer_norm = norm_of(encoder.cond_layer_norm)
        self.final_proj = Linear(model.final_proj) if "final_proj" in model else None

    def stages(
        self,
        *,
        padding: mx.array | None = None,
        lengths: mx.array | None = None,
        speaker: mx.array | None = None,
        moments: Sequence[cpu.Moments] | None = None,
        clips: Sequence[slice] | None = None,
    ) -> Iterator[tuple[str, Stage]]:
        """``hubert.Hubert.stages``, of numpy arrays.

        clips: the frames of each clip, where from ``projection`` on several clips lie one
            behind the other in (1, frames, channels); what stands for ``padding`` then
        """
        counts = None if lengths is None else np.asarray(lengths).tolist()
        padded = None if padding is None else np.asarray(padding)
        first, *rest = self.conv_layers
        yield "conv.0", partial(first.from_waveform, lengths=counts, moments=moments)
        for i, block in enumerate(rest, 1):
            yield f"conv.{i}", block
        yield "projection", lambda x: self.post_extract_proj(self.layer_norm(x))
        yield (
            "positional",
            partial(self._positional, padding=padded, exact=lengths is not None, clips=clips),
        )
        mask = None if padded is None else ~padded[:, None, None, :]
        for i, layer in enumerate(self.layers):
            yield f"layer.{i + 1}", partial(layer, mask=mask, speaker=speaker, clips=clips)
        if self.config.layer_norm_first:
            norm = self.cond_layer_norm or self.encoder_layer_norm
            yield "final_norm", partial(norm, speaker=speaker)
        if self.final_proj is not None:
            yield "final_proj", self.final_proj

    def _positional(
        self, x: Buffer, padding: Mask | None, exact: bool, clips: Sequence[slice] | None
    ) -> Buffer:
        if padding is not None:
            x = np.where(padding[..., None], np.float32(0), x)
        y = x
        if self.pos_conv_norm is not None:
            weight, bias, mean, variance = self.pos_conv_norm
            y = (x - mean) * (weight * (variance + EPS) ** -0.5) + bias
            if exact and padding is not None:
                y = np.where(padding[..., None], np.float32(0), y)
        kernel = self.config.conv_pos
        y = cpu.grouped_conv1d(y, self.pos_conv_spectrum, self.pos_conv_bias, kernel, clips)
        x = x + cpu.gelu(y)
        return x if self.config.layer_norm_first else self.encoder_layer_norm(x)

    def head_projections(self, layer: int, rows: slice) -> list[Stage]:
        """Queries, keys and values of some heads, whose outputs are ``rows``."""
        chosen = self.layers[layer]
        return [p.output_slice(rows) for p in (chosen.q_proj, chosen.k_proj, chosen.v_proj)]

    attention = staticmethod(cpu.attention)

    def waveform(self, x: Buffer | mx.array) -> Buffer:
        """A waveform as the first stage takes it."""
        return np.asarray(mx.contiguous(x) if isinstance(x, mx.array) else x, np.float32)

    #: an output of one stage as the next one takes it
    from_numpy = waveform

    def to_numpy(self, x: Buffer) -> Buffer:
        """An output as float32."""
        return x

    def concatenate(self, pieces: Sequence[Buffer], axis: int) -> Buffer:
        """Pieces as one array."""
        return np.concatenate(pieces, axis=axis)

    def compute(self, *arrays: Any) -> None:
        """Nothing: numpy has computed already."""
