"""HuBERT and ContentVec in MLX: the architecture, and nothing else.

    waveform (batch, samples)
      -> feature extractor   convolutions, (batch, frames, 512), one frame every 320 samples
      -> projection          layer norm and a linear layer, (batch, frames, width)
      -> positional          a grouped convolution added to its input
      -> layers              transformer layers, whose outputs are the features

Arrays are channels last; parameter names are those of the converted file. ``ops.mlx``
carries out the operations on Metal and CUDA, ``ops.cpu_hubert`` all of it on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from .backend import mx, nn
from .config import EPS, ModelConfig
from .ops import mlx as ops
from .ops.cpu import Moments

if TYPE_CHECKING:
    from mlx.core import array as Array

    # weight and bias of one layer's queries, keys and values, stored as one matrix
    FusedQKV = tuple[Array, Array]
    # a stage of the forward pass: the output of the stage before it to its own
    Stage = Callable[[Array], Array]


class Affine(nn.Module):
    """A weight and perhaps a bias, lazy zeros until weights are loaded."""

    def __init__(self, *shape: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = mx.zeros(shape)
        if bias:
            self.bias = mx.zeros(shape[:1])


class Linear(nn.Linear):
    """``nn.Linear`` without the random initialisation, computed by ``ops.linear``."""

    def __init__(self, inputs: int, outputs: int, bias: bool = True) -> None:
        nn.Module.__init__(self)
        self.weight = mx.zeros((outputs, inputs))
        if bias:
            self.bias = mx.zeros(outputs)

    def __call__(self, x: Array, then_gelu: bool = False, residual: Array | None = None) -> Array:
        return ops.linear(x, self.weight, self.get("bias"), then_gelu, residual)


class ConvBlock(nn.Module):
    """One block of the feature extractor: convolution, norm where there is one, GELU.

    Base models normalise the first block over time, large ones every block over channels.
    Source: fairseq/models/wav2vec/wav2vec2.py, ``ConvFeatureExtractionModel``.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        channels, kernel, self.stride = config.conv_layers[index]
        channels_in = config.conv_layers[index - 1][0] if index else 1
        self.conv = Affine(channels, kernel, channels_in, bias=config.conv_bias)
        self.group_norm = config.extractor_norm == "group" and index == 0
        if self.group_norm or config.extractor_norm == "layer":
            self.norm = nn.LayerNorm(channels, EPS)

    def __call__(self, x: Array) -> Array:
        """(batch, time, channels in) to (batch, time / stride, channels)."""
        normed = "norm" in self
        y = ops.conv1d(x, self.conv.weight, self.conv.get("bias"), self.stride, not normed)
        return ops.gelu(self.norm(y)) if normed else y

    def from_waveform(
        self, waveform: Array, lengths: Array | None, moments: Sequence[Moments] | None
    ) -> Array:
        """The first block, of (batch, samples); the other arguments are those of ``stages``."""
        if not self.group_norm:
            return self(waveform[..., None])
        weight, norm = self.conv.weight, self.norm
        y = ops.conv1d_group_norm_gelu(
            waveform, weight, norm.weight, norm.bias, self.stride, lengths, moments
        )
        return y.astype(ops.compute_dtype(weight.dtype))


class FeatureExtractor(nn.Module):
    """The stack of convolution blocks."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.conv_layers = [ConvBlock(config, i) for i in range(len(config.conv_layers))]


class BatchNorm(Affine):
    """Batch norm by its running statistics, also while training."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.running_mean, self.running_var = mx.zeros(width), mx.zeros(width)

    def __call__(self, x: Array) -> Array:
        scale = self.weight * (self.running_var + EPS) ** -0.5
        return (x - self.running_mean) * scale + self.bias


class ConditionalNorm(nn.Module):
    """A layer norm whose weight and bias are read off a speaker embedding.

    It normalises over batch and channels jointly, as the original does: the result for
    one clip depends on the others in its batch.
    Source: contentvec/modules/cond_layer_norm.py, ``CondLayerNorm``, which is
    given (frames, batch, channels) and normalises over ``size()[1:]``.
    """

    def __init__(self, width: int, speaker_dim: int) -> None:
        super().__init__()
        self.weight_ln = Linear(speaker_dim, width, bias=False)
        self.bias_ln = Linear(speaker_dim, width, bias=False)

    def __call__(self, x: Array, speaker: Array) -> Array:
        """x: (batch, frames, width)    speaker: (batch, speaker_dim)."""
        exact = x.astype(mx.float32)
        centred = exact - exact.mean(axis=(0, 2), keepdims=True)
        variance = (centred * centred).mean(axis=(0, 2), keepdims=True)
        normalised = (centred * mx.rsqrt(variance + EPS)).astype(x.dtype)
        scale, shift = self.weight_ln(speaker)[:, None], self.bias_ln(speaker)[:, None]
        return normalised * scale + shift


class PositionalConv(Affine):
    """Grouped convolution, its weight norm folded by the converter, and GELU."""

    def __init__(self, config: ModelConfig) -> None:
        width = config.encoder_embed_dim
        super().__init__(width, config.conv_pos, width // config.conv_pos_groups)

    def __call__(self, x: Array) -> Array:
        return ops.gelu(ops.grouped_conv1d(x, self.weight, self.bias))


class SelfAttention(nn.Module):
    """Multi-head self-attention; the output projection is left to the layer.

    Source: fairseq/modules/multihead_attention.py, ``MultiheadAttention``.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, self.heads = config.encoder_embed_dim, config.encoder_attention_heads
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)

    def __call__(self, x: Array, mask: Array | None, qkv: FusedQKV | None) -> Array:
        """x: (batch, frames, width)    mask: (batch, 1, 1, frames), true where valid."""
        if qkv is None:
            projected = [project(x) for project in (self.q_proj, self.k_proj, self.v_proj)]
        else:
            projected = [ops.linear(x, *qkv)]
        return ops.self_attention(projected, self.heads, mask)


def _added(residual: Array, layer: nn.Module, x: Array) -> Array:
    """``residual + layer(x)``: in one step, unless it is quantised or somebody's own layer."""
    return layer(x, residual=residual) if type(layer) is Linear else residual + layer(x)


class EncoderLayer(nn.Module):
    """One transformer layer, norms after (base) or before (large) each half.

    Source: fairseq/models/wav2vec/wav2vec2.py, ``TransformerSentenceEncoderLayer``;
    conditioned: contentvec/models/wav2vec/wav2vec2_1.py, ``TransformerSentenceEncoderLayer_1``.
    """

    def __init__(self, config: ModelConfig, conditioned: bool) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        self.norm_first, self.conditioned = config.layer_norm_first, conditioned
        norm = partial(nn.LayerNorm, width, EPS)
        if conditioned:
            norm = partial(ConditionalNorm, width, config.speaker_dim)
        self.self_attn = SelfAttention(config)
        self.self_attn_layer_norm = norm()
        self.fc1 = Linear(width, config.encoder_ffn_embed_dim)
        self.fc2 = Linear(config.encoder_ffn_embed_dim, width)
        self.final_layer_norm = norm()

    def _norm(self, norm: nn.Module, x: Array, speaker: Array | None) -> Array:
        return norm(x, speaker) if self.conditioned else norm(x)

    def before_attention(self, x: Array, speaker: Array | None = None) -> Array:
        """What queries, keys and values are projected from."""
        return self._norm(self.self_attn_layer_norm, x, speaker) if self.norm_first else x

    def after_attention(self, x: Array, attended: Array, speaker: Array | None = None) -> Array:
        """The rest of the layer, frame by frame: ``x`` is its input, (batch, frames, width)."""
        x = _added(x, self.self_attn.out_proj, attended)
        if self.norm_first:
            normed = self._norm(self.final_layer_norm, x, speaker)
            return _added(x, self.fc2, self._hidden(normed))
        x = self._norm(self.self_attn_layer_norm, x, speaker)
        return self._norm(self.final_layer_norm, _added(x, self.fc2, self._hidden(x)), speaker)

    def _hidden(self, x: Array) -> Array:
        """The hidden units of the feed-forward."""
        return self.fc1(x, then_gelu=True) if type(self.fc1) is Linear else ops.gelu(self.fc1(x))

    def __call__(
        self,
        x: Array,
        mask: Array | None = None,
        speaker: Array | None = None,
        qkv: FusedQKV | None = None,
    ) -> Array:
        """x: (batch, frames, width)    speaker: (batch, speaker_dim), conditioned layers only."""
        attended = self.self_attn(self.before_attention(x, speaker), mask, qkv)
        return self.after_attention(x, attended, speaker)


class Encoder(nn.Module):
    """Positional convolution and transformer layers.

    Source: fairseq/models/wav2vec/wav2vec2.py, ``TransformerEncoder``; its padding of the
    frames to a multiple of two changes nothing, as padded keys are masked.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.encoder_embed_dim
        if config.conv_pos_batch_norm:
            self.pos_conv_norm = BatchNorm(width)
        self.pos_conv = PositionalConv(config)
        self.layer_norm = nn.LayerNorm(width, EPS)
        self.layers = [
            EncoderLayer(config, conditioned=i >= config.encoder_layers)
            for i in range(config.encoder_layers + config.encoder_layers_1)
        ]
        if config.encoder_layers_1:
            self.cond_layer_norm = ConditionalNorm(width, config.speaker_dim)


class Hubert(nn.Module):
    """A HuBERT of any size. Source: fairseq/models/hubert/hubert.py, ``HubertModel``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels, width = config.conv_layers[-1][0], config.encoder_embed_dim
        self.config = config
        self.feature_extractor = FeatureExtractor(config)
        self.layer_norm = nn.LayerNorm(channels, EPS)
        self.post_extract_proj = Linear(channels, width)
        self.encoder = Encoder(config)
        if config.final_dim is not None:
            self.final_proj = Linear(width, config.final_dim)

    def stages(
        self,
        *,
        padding: Array | None = None,
        lengths: Array | None = None,
        speaker: Array | None = None,
        moments: Sequence[Moments] | None = None,
        qkv: Sequence[FusedQKV] | None = None,
    ) -> Iterator[tuple[str, Stage]]:
        """Name and function of every stage, in order; the first is given the waveform.

        padding: (batch, frames), true where padded
        lengths: (batch,) samples of each clip, whose padding must not change anything
        speaker: (batch, speaker_dim), for conditioned layers
        moments: of the clips of which the waveform is a piece, for the first group norm
        qkv:     a layer's queries, keys and values as one product, for each layer
        """
        first, *rest = self.feature_extractor.conv_layers
        yield "conv.0", partial(first.from_waveform, lengths=lengths, moments=moments)
        for i, block in enumerate(rest, 1):
            yield f"conv.{i}", block
        yield "projection", lambda x: self.post_extract_proj(self.layer_norm(x))
        yield "positional", partial(self._positional, padding=padding, exact=lengths is not None)
        mask = None if padding is None else ~padding[:, None, None, :]
        for i, layer in enumerate(self.encoder.layers):
            fused = None if qkv is None else qkv[i]
            yield f"layer.{i + 1}", partial(layer, mask=mask, speaker=speaker, qkv=fused)
        if self.config.layer_norm_first:
            conditioned = self.encoder.get("cond_layer_norm")
            plain = self.encoder.layer_norm
            yield "final_norm", partial(conditioned, speaker=speaker) if conditioned else plain
        if "final_proj" in self:
            yield "final_proj", self.final_proj

    def _positional(self, x: Array, padding: Array | None, exact: bool) -> Array:
        """What the first layer is given; ``exact`` zeroes padding behind a batch norm too."""
        encoder = self.encoder
        keep = None if padding is None else ~padding[..., None]
        if keep is not None:
            x = mx.where(keep, x, mx.zeros_like(x))
        y = encoder.pos_conv_norm(x) if "pos_conv_norm" in encoder else x
        if exact and keep is not None:
            y = mx.where(keep, y, mx.zeros_like(y))
        x = x + encoder.pos_conv(y)
        return x if self.config.layer_norm_first else encoder.layer_norm(x)
