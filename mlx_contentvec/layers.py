"""The modules a HuBERT model is built from, channels last throughout.

Parameters start as placeholders that are never computed; the model refuses to
run while one of them is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import cpu, kernels
from .backend import device_kind, mx, nn
from .config import ModelConfig

Array = Any


def placeholder(*shape: int) -> Array:
    """A lazy array that only holds a parameter's shape until weights are loaded."""
    return mx.zeros(shape)


class Linear(nn.Linear):
    """``nn.Linear`` without the random initialisation."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        nn.Module.__init__(self)
        self.weight = placeholder(outputs, inputs)
        if bias:
            self.bias = placeholder(outputs)
        self._derived = kernels.Derived()

    def __call__(self, x: Array, then_gelu: bool = False) -> Array:
        """(..., inputs) to (..., outputs), and their GELU if asked."""
        return kernels.linear(x, self.weight, self.get("bias"), self._derived, then_gelu)

    def outputs(self, some: slice) -> Callable[[Array], Array]:
        """The layer with but some of its outputs."""
        weight, bias = kernels.arrange(self.weight[some]), self.bias[some]
        derived = kernels.Derived()
        return lambda x: kernels.linear(x, weight, bias, derived)

    def to_quantized(self, *arguments: Any, **keywords: Any) -> QuantizedLinear:
        """What ``nn.quantize`` puts in this layer's place."""
        quantized: QuantizedLinear = QuantizedLinear.from_linear(self, *arguments, **keywords)
        return quantized


class QuantizedLinear(nn.QuantizedLinear):
    """``nn.QuantizedLinear``, dequantised once on a CPU.

    MLX's quantised product takes 30 times as long there as a plain one (20 s
    instead of 0.6 for 5 s of audio; AMD EPYC, one core).
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._dequantized = kernels.Derived()
        self._derived = kernels.Derived()

    def _matrix(self) -> Array:
        def make(weight: Array, scales: Array, biases: Array) -> Array:
            matrix = mx.dequantize(
                weight, scales, biases, self.group_size, self.bits, mode=self.mode
            )
            return kernels.arrange(matrix.astype(mx.float32))

        return self._dequantized.of(make, self.weight, self.scales, self.biases)

    def __call__(self, x: Array, then_gelu: bool = False) -> Array:
        """(..., inputs) to (..., outputs), and their GELU if asked."""
        if device_kind() == "cpu":
            return kernels.linear(x, self._matrix(), self.get("bias"), self._derived, then_gelu)
        y = super().__call__(x)
        return kernels.gelu(y) if then_gelu else y

    def outputs(self, some: slice) -> Callable[[Array], Array]:
        """The layer with but some of its outputs."""
        bias = self.bias[some]
        if device_kind() == "cpu":
            matrix, derived = kernels.arrange(self._matrix()[some]), kernels.Derived()
            return lambda x: kernels.linear(x, matrix, bias, derived)
        weight, scales, biases = (
            mx.contiguous(array[some]) for array in (self.weight, self.scales, self.biases)
        )
        return lambda x: (
            bias
            + mx.quantized_matmul(
                x,
                weight,
                scales=scales,
                biases=biases,
                group_size=self.group_size,
                bits=self.bits,
                mode=self.mode,
            )
        )


class Norm(nn.Module):
    """The weight and bias of a normalisation over ``width`` channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = placeholder(width)
        self.bias = placeholder(width)
        self._derived = kernels.Derived()

    def __call__(self, x: Array) -> Array:
        """Layer norm over the last axis of (..., width)."""
        return kernels.layer_norm(x, self.weight, self.bias, self._derived)


class BatchNorm(Norm):
    """Batch norm by its running statistics, as in evaluation."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.running_mean = placeholder(width)
        self.running_var = placeholder(width)

    def __call__(self, x: Array) -> Array:
        """(batch, frames, width) in and out."""
        x, mean, variance, weight, bias = kernels.operands(
            x, self._derived, self.running_mean, self.running_var, self.weight, self.bias
        )
        return (x - mean) * (weight * (variance + kernels.EPS) ** -0.5) + bias


class ConditionalNorm(nn.Module):
    """A layer norm whose weight and bias are read off a speaker embedding.

    It normalises over batch and channels jointly: the result for one clip
    depends on the others in its batch. That is what the original computes.
    Source: contentvec/modules/cond_layer_norm.py, ``CondLayerNorm``, which is
    given (frames, batch, channels) and normalises over ``size()[1:]``.
    """

    def __init__(self, width: int, speaker_dim: int) -> None:
        super().__init__()
        self.weight_ln = Linear(speaker_dim, width, bias=False)
        self.bias_ln = Linear(speaker_dim, width, bias=False)

    def __call__(self, x: Array, speaker: Array) -> Array:
        """x: (batch, frames, width)    speaker: (batch, speaker_dim)."""
        exact = kernels.mlx(x).astype(mx.float32)
        centred = exact - exact.mean(axis=(0, 2), keepdims=True)
        variance = (centred * centred).mean(axis=(0, 2), keepdims=True)
        dtype = kernels.compute_dtype(self.weight_ln.weight.dtype)
        normalised = (centred * mx.rsqrt(variance + kernels.EPS)).astype(dtype)
        scale, shift = self.weight_ln(speaker)[:, None], self.bias_ln(speaker)[:, None]
        return kernels.as_given(x, normalised * scale + shift)


class Conv(nn.Module):
    """The kernel, and perhaps the bias, of a convolution."""

    def __init__(self, channels_in: int, channels: int, kernel: int, bias: bool) -> None:
        super().__init__()
        self.weight = placeholder(channels, kernel, channels_in)
        if bias:
            self.bias = placeholder(channels)


class ConvBlock(nn.Module):
    """One block of the feature extractor: convolution, norm where there is one, GELU.

    Source: fairseq/models/wav2vec/wav2vec2.py, ``ConvFeatureExtractionModel``.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        channels, self.kernel, self.stride = config.conv_layers[index]
        channels_in = config.conv_layers[index - 1][0] if index else 1
        self.conv = Conv(channels_in, channels, self.kernel, config.conv_bias)
        self.over_time = config.extractor_norm == "group" and index == 0
        if self.over_time or config.extractor_norm == "layer":
            self.norm = Norm(channels)
        self._derived = kernels.Derived()

    def __call__(
        self,
        x: Array,
        lengths: Array | None = None,
        moments: Sequence[cpu.Moments] | None = None,
    ) -> Array:
        """(batch, time, channels in) to (batch, time / stride, channels).

        ``lengths``, (batch,) in samples, bounds what the first block's group
        norm counts; ``moments`` are those of the longer clips of which ``x`` are
        pieces. Elsewhere neither changes anything.

        ``GroupNorm(channels, channels)`` normalises each channel over time. A
        bias of the convolution shifts a channel's mean and nothing else: it cancels.
        """
        if not self.over_time:
            norm = (self.norm.weight, self.norm.bias) if "norm" in self else None
            bias = self.conv.get("bias")
            return kernels.conv1d(x, self.conv.weight, bias, self.stride, norm, self._derived)
        y = kernels.conv1d_normalised_over_time(
            x[..., 0],
            self.conv.weight,
            self.norm.weight,
            self.norm.bias,
            self.stride,
            lengths,
            moments,
            self._derived,
        )
        return kernels.rounded(y, self.conv.weight.dtype)


class FeatureExtractor(nn.Module):
    """The stack of convolution blocks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.conv_layers = [ConvBlock(config, i) for i in range(len(config.conv_layers))]


class PositionalConv(nn.Module):
    """The grouped convolution that gives the encoder its sense of position.

    The kernel is plain: the converter folds the weight norm into it.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.weight = placeholder(width, config.conv_pos, width // config.conv_pos_groups)
        self.bias = placeholder(width)
        self._derived = kernels.Derived()

    def __call__(self, x: Array) -> Array:
        """(batch, frames, width) in and out."""
        return kernels.gelu(kernels.grouped_conv1d(x, self.weight, self.bias, self._derived))


class SelfAttention(nn.Module):
    """Multi-head self-attention.

    Source: fairseq/modules/multihead_attention.py, ``MultiheadAttention``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.heads = config.encoder_attention_heads
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)
        self._joined: _Joined | None = None

    def join(self) -> None:
        """Store queries', keys' and values' weights as one matrix, of which they stay views.

        One product of three times the width instead of three: 0.07 ms instead of
        0.12 at 10 s of audio, 0.05 instead of 0.11 at 1 s (H100, float32).
        """
        parts = (self.q_proj, self.k_proj, self.v_proj)
        if not all(isinstance(part, Linear) for part in parts):
            return  # quantised
        weight = kernels.arrange(mx.concatenate([part.weight for part in parts]))
        bias = mx.concatenate([part.bias for part in parts])
        self._joined = _Joined(weight, bias, len(parts))
        for part, (own_weight, own_bias) in zip(parts, self._joined.parts, strict=True):
            part.weight, part.bias = own_weight, own_bias

    def _project(self, x: Array) -> list[Array]:
        """Queries, keys and values, (batch, frames, width) each."""
        parts = (self.q_proj, self.k_proj, self.v_proj)
        if self._joined is not None and self._joined.still_holds(parts):
            projected, width = self._joined(x), x.shape[-1]
            return [projected[..., i * width : (i + 1) * width] for i in range(3)]
        return [part(x) for part in parts]

    def __call__(self, x: Array, mask: Array | None) -> Array:
        """x: (batch, frames, width)    mask: (batch, 1, 1, frames), true where valid."""
        batch, frames, _ = x.shape
        queries, keys, values = (
            y.reshape(batch, frames, self.heads, -1).transpose(0, 2, 1, 3) for y in self._project(x)
        )
        return self.out_proj(kernels.attention(queries, keys, values, mask))


class _Joined:
    """One matrix and its parts, which become parameters."""

    def __init__(self, weight: Array, bias: Array, count: int) -> None:
        self._weight = weight
        self._bias = bias
        self._derived = kernels.Derived()
        width = len(bias) // count
        slices = [slice(i * width, (i + 1) * width) for i in range(count)]
        self.parts = [(weight[some], bias[some]) for some in slices]
        # the same memory, which nobody else can change
        self._originals = [(weight[some], bias[some]) for some in slices]

    def __call__(self, x: Array) -> Array:
        """(..., width) to (..., 3 * width)."""
        return kernels.linear(x, self._weight, self._bias, self._derived)

    def still_holds(self, modules: tuple[nn.Module, ...]) -> bool:
        """Whether the parameters are those parts still, neither replaced nor changed since."""
        return all(
            module.get("weight") is weight
            and module.get("bias") is bias
            and kernels.place(weight) == kernels.place(original_weight)
            and kernels.place(bias) == kernels.place(original_bias)
            for module, (weight, bias), (original_weight, original_bias) in zip(
                modules, self.parts, self._originals, strict=True
            )
        )


class EncoderLayer(nn.Module):
    """One transformer layer, norms after (base) or before (large) each half.

    Source: fairseq/models/wav2vec/wav2vec2.py, ``TransformerSentenceEncoderLayer``;
    conditioned: contentvec/models/wav2vec/wav2vec2_1.py, ``TransformerSentenceEncoderLayer_1``.
    """

    def __init__(self, config: ModelConfig, conditioned: bool) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.norm_first = config.layer_norm_first
        self.conditioned = conditioned
        self.self_attn = SelfAttention(config)
        self.self_attn_layer_norm = self._norm(config)
        self.fc1 = Linear(width, config.encoder_ffn_embed_dim)
        self.fc2 = Linear(config.encoder_ffn_embed_dim, width)
        self.final_layer_norm = self._norm(config)

    def _norm(self, config: ModelConfig) -> nn.Module:
        if self.conditioned:
            return ConditionalNorm(config.encoder_embed_dim, config.speaker_dim)
        return Norm(config.encoder_embed_dim)

    def _normalise(self, norm: nn.Module, x: Array, speaker: Array | None) -> Array:
        return norm(x, speaker) if self.conditioned else norm(x)

    def feed_forward(self, x: Array) -> Array:
        """(batch, frames, width) in and out."""
        return kernels.by_rows(lambda rows: self.fc2(self.fc1(rows, then_gelu=True)), x)

    def __call__(self, x: Array, mask: Array | None, speaker: Array | None = None) -> Array:
        """x: (batch, frames, width)    speaker: (batch, speaker_dim), conditioned layers only."""
        if self.norm_first:
            y = self._normalise(self.self_attn_layer_norm, x, speaker)
            x = x + self.self_attn(y, mask)
            return x + self.feed_forward(self._normalise(self.final_layer_norm, x, speaker))
        x = self._normalise(self.self_attn_layer_norm, x + self.self_attn(x, mask), speaker)
        return self._normalise(self.final_layer_norm, x + self.feed_forward(x), speaker)


class Encoder(nn.Module):
    """Positional convolution and transformer layers.

    Source: fairseq/models/wav2vec/wav2vec2.py, ``TransformerEncoder``. fairseq
    pads the frames to a multiple of two; padded keys are masked, so nothing changes.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_first = config.layer_norm_first
        if config.conv_pos_batch_norm:
            self.pos_conv_norm = BatchNorm(config.encoder_embed_dim)
        self.pos_conv = PositionalConv(config)
        self.layer_norm = Norm(config.encoder_embed_dim)
        self.layers = [
            EncoderLayer(config, conditioned=i >= config.encoder_layers)
            for i in range(config.encoder_layers + config.encoder_layers_1)
        ]
        if config.encoder_layers_1:
            self.cond_layer_norm = ConditionalNorm(config.encoder_embed_dim, config.speaker_dim)

    def positional(self, x: Array, padding_mask: Array | None, exact: bool = False) -> Array:
        """What the first layer is given: frames with position, normalised in base models.

        x: (batch, frames, width)    padding_mask: (batch, frames), true where padded
        exact: padding reaches the positional convolution as zeros even behind a
            batch norm, as the end of a clip does; the original zeroes it before
        """
        normalised = "pos_conv_norm" in self
        if padding_mask is not None:
            x = _without(x, padding_mask)
        y = self.pos_conv_norm(x) if normalised else x
        if normalised and exact and padding_mask is not None:
            y = _without(y, padding_mask)
        x = x + self.pos_conv(y)
        return x if self.norm_first else self.layer_norm(x)


def _without(x: Array, padding_mask: Array) -> Array:
    if isinstance(x, np.ndarray):
        return np.where(np.asarray(padding_mask)[..., None], np.float32(0), x)
    return mx.where(padding_mask[..., None], mx.zeros_like(x), x)
