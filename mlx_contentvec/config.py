"""What a HuBERT-family model is made of, and every tensor that follows from it.

Nothing here imports mlx: the converter plans with it, the model is built from it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import reprlib
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from .errors import ConfigError
from .json_text import JsonError, parse_object

#: the layer whose output RVC v1 projects
V1_LAYER = 9
#: epsilon of every normalisation in fairseq (torch.nn's default)
EPS = 1e-5
#: epsilon of the input's normalisation in transformers' ``Wav2Vec2FeatureExtractor``
EXTRACTOR_EPS = 1e-7

BASE_CONV_LAYERS = ((512, 10, 5), *(((512, 3, 2),) * 4), *(((512, 2, 2),) * 2))

#: far above every real model: xlarge has 48 layers and 7 convolutions
MAX_LAYERS, MAX_CONV_LAYERS = 1_000, 64
#: no width, kernel, stride or rate reaches this
MAX_SIZE = 2**24


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < MAX_SIZE


def require_layer(layer: object, layers: int) -> None:
    """Raise ConfigError unless ``layer`` is a whole number from 1 to ``layers``."""
    if isinstance(layer, bool) or not isinstance(layer, Integral) or not 1 <= int(layer) <= layers:
        raise ConfigError(
            f"this model has no layer {_shown(layer)} to take features from",
            expected=f"1 to {layers}, counted from 1 as in fairseq",
        )


def _shown(value: object) -> str:
    """A value as a file states it, however long or deeply nested it is."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    return reprlib.repr(value)


@dataclass(frozen=True)
class ModelConfig:
    """The shape and the conventions of one model.

    Field names follow fairseq's ``HubertConfig`` where it has the field
    (fairseq/models/hubert/hubert.py); the rest say what they hold.
    """

    #: (channels, kernel, stride) of each convolution of the feature extractor
    conv_layers: tuple[tuple[int, int, int], ...] = BASE_CONV_LAYERS
    conv_bias: bool = False
    #: "group": group norm over time after the first convolution only (base);
    #: "layer": layer norm after every convolution (large, xlarge)
    extractor_norm: str = "group"
    encoder_embed_dim: int = 768
    encoder_ffn_embed_dim: int = 3072
    encoder_layers: int = 12
    #: speaker-conditioned layers after the plain ones (full ContentVec has 3)
    encoder_layers_1: int = 0
    encoder_attention_heads: int = 12
    layer_norm_first: bool = False
    #: kernel length of the positional convolution, in frames
    conv_pos: int = 128
    conv_pos_groups: int = 16
    #: batch norm (running statistics) before the positional convolution (mHuBERT-147)
    conv_pos_batch_norm: bool = False
    #: width of ``final_proj``, None when the checkpoint has none
    final_dim: int | None = 256
    #: width of the speaker embedding that the conditioned layers read
    speaker_dim: int = 256
    #: the waveform must be brought to zero mean and unit variance first
    normalize: bool = False
    #: what is added to the variance in that
    normalize_eps: float = EPS
    sample_rate: int = 16000

    def __post_init__(self) -> None:
        def refuse(problem: str) -> None:
            raise ConfigError(f"impossible model configuration: {problem}")

        try:
            layers = tuple(tuple(layer) for layer in self.conv_layers)
        except TypeError:
            layers = ()
        if len(layers) > MAX_CONV_LAYERS:
            refuse(f"{len(layers)} convolutions, at most {MAX_CONV_LAYERS} are possible")
        if not layers or any(
            len(layer) != 3 or not all(_is_size(n) for n in layer) for layer in layers
        ):
            refuse(
                "conv_layers must be (channels, kernel, stride) triples, "
                f"not {_shown(self.conv_layers)}"
            )
        object.__setattr__(self, "conv_layers", layers)
        if self.extractor_norm not in ("group", "layer"):
            refuse(f"extractor_norm must be 'group' or 'layer', not {_shown(self.extractor_norm)}")
        for field in ("conv_bias", "layer_norm_first", "conv_pos_batch_norm", "normalize"):
            if not isinstance(getattr(self, field), bool):
                refuse(f"{field} must be true or false, not {_shown(getattr(self, field))}")
        for field in (
            "encoder_embed_dim",
            "encoder_ffn_embed_dim",
            "encoder_layers",
            "encoder_attention_heads",
            "conv_pos",
            "conv_pos_groups",
            "speaker_dim",
            "sample_rate",
        ):
            value = getattr(self, field)
            if not _is_size(value):
                refuse(
                    f"{field} must be a positive integer below {MAX_SIZE:,}, not {_shown(value)}"
                )
        eps = self.normalize_eps
        if not (isinstance(eps, float) and 0 < eps < 1):
            refuse(f"normalize_eps must be a number between 0 and 1, not {_shown(eps)}")
        conditioned = self.encoder_layers_1
        if not (_is_size(conditioned) or (type(conditioned) is int and conditioned == 0)):
            refuse(f"encoder_layers_1 must be 0 or more, not {_shown(conditioned)}")
        # before anything is expanded layer by layer
        if self.encoder_layers + conditioned > MAX_LAYERS:
            refuse(
                f"{self.encoder_layers + conditioned:,} encoder layers, "
                f"at most {MAX_LAYERS:,} are possible"
            )
        if self.final_dim is not None and not _is_size(self.final_dim):
            refuse(f"final_dim must be a positive integer or None, not {_shown(self.final_dim)}")
        if self.encoder_embed_dim % self.encoder_attention_heads:
            refuse(
                f"{self.encoder_attention_heads} heads do not divide "
                f"a width of {self.encoder_embed_dim}"
            )
        if self.encoder_embed_dim % self.conv_pos_groups:
            refuse(
                f"{self.conv_pos_groups} groups of the positional convolution do not divide "
                f"a width of {self.encoder_embed_dim}"
            )

    @property
    def head_width(self) -> int:
        """Numbers of one head of attention."""
        return self.encoder_embed_dim // self.encoder_attention_heads

    @functools.cached_property
    def hop(self) -> int:
        """Samples from one frame to the next (320 for every known model)."""
        hop = 1
        for _, _, stride in self.conv_layers:
            hop *= stride
        return hop

    @functools.cached_property
    def receptive_field(self) -> int:
        """Samples that one frame sees, and the shortest usable clip (400)."""
        field = 1
        for _, kernel, stride in reversed(self.conv_layers):
            field = (field - 1) * stride + kernel
        return field

    def frames(self, samples: int) -> int:
        """Frames that ``samples`` samples give; 0 when the clip is too short."""
        for _, kernel, stride in self.conv_layers:
            samples = (samples - kernel) // stride + 1 if samples >= kernel else 0
        return samples

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        fields = dataclasses.asdict(self)
        fields["conv_layers"] = [list(layer) for layer in self.conv_layers]
        return fields

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelConfig:
        """The inverse of :meth:`to_dict`; an unknown or missing field is an error."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown, missing = sorted(set(fields) - known), sorted(known - set(fields))
        if unknown or missing:
            kinds = {"unknown": unknown, "missing": missing}
            raise ConfigError(
                "the stored configuration does not fit this version",
                found=", ".join(
                    f"{k} fields {_shown(names)}" for k, names in kinds.items() if names
                ),
                hint="convert the checkpoint again with this version of mlx-contentvec",
            )
        return cls(**fields)

    @classmethod
    def from_json(cls, text: str) -> ModelConfig:
        """The inverse of :meth:`to_json`. Raises ConfigError for what is none."""
        try:
            fields = parse_object(text)
        except JsonError as error:
            raise ConfigError("the stored configuration cannot be read", found=str(error)) from None
        return cls.from_dict(fields)

    def to_json(self) -> str:
        """:meth:`to_dict` as one line of JSON with sorted keys."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))


PRESETS: dict[str, ModelConfig] = {
    "base": ModelConfig(),
    "large": ModelConfig(
        extractor_norm="layer",
        encoder_embed_dim=1024,
        encoder_ffn_embed_dim=4096,
        encoder_layers=24,
        encoder_attention_heads=16,
        layer_norm_first=True,
        final_dim=768,
        normalize=True,
    ),
    "xlarge": ModelConfig(
        extractor_norm="layer",
        encoder_embed_dim=1280,
        encoder_ffn_embed_dim=5120,
        encoder_layers=48,
        encoder_attention_heads=16,
        layer_norm_first=True,
        final_dim=1024,
        normalize=True,
    ),
}


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the MLX model, in the order a forward pass meets them.

    Convolution kernels are channels-last, (out, kernel, in / groups), as
    ``mlx.nn.Conv1d`` has them; linear weights are (out, in).
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def affine(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = (width,)
        shapes[f"{name}.bias"] = (width,)

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if bias:
            shapes[f"{name}.bias"] = (outputs,)

    def conditional(name: str, width: int) -> None:
        linear(f"{name}.weight_ln", config.speaker_dim, width, bias=False)
        linear(f"{name}.bias_ln", config.speaker_dim, width, bias=False)

    channels_in = 1
    for i, (channels, kernel, _) in enumerate(config.conv_layers):
        prefix = f"feature_extractor.conv_layers.{i}"
        shapes[f"{prefix}.conv.weight"] = (channels, kernel, channels_in)
        if config.conv_bias:
            shapes[f"{prefix}.conv.bias"] = (channels,)
        if config.extractor_norm == "layer" or i == 0:
            affine(f"{prefix}.norm", channels)
        channels_in = channels

    width = config.encoder_embed_dim
    affine("layer_norm", channels_in)
    linear("post_extract_proj", channels_in, width)
    if config.conv_pos_batch_norm:
        affine("encoder.pos_conv_norm", width)
        shapes["encoder.pos_conv_norm.running_mean"] = (width,)
        shapes["encoder.pos_conv_norm.running_var"] = (width,)
    shapes["encoder.pos_conv.weight"] = (width, config.conv_pos, width // config.conv_pos_groups)
    shapes["encoder.pos_conv.bias"] = (width,)
    affine("encoder.layer_norm", width)
    for i in range(config.encoder_layers + config.encoder_layers_1):
        prefix = f"encoder.layers.{i}"
        norm = affine if i < config.encoder_layers else conditional
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{prefix}.self_attn.{projection}", width, width)
        norm(f"{prefix}.self_attn_layer_norm", width)
        linear(f"{prefix}.fc1", width, config.encoder_ffn_embed_dim)
        linear(f"{prefix}.fc2", config.encoder_ffn_embed_dim, width)
        norm(f"{prefix}.final_layer_norm", width)
    if config.encoder_layers_1:
        conditional("encoder.cond_layer_norm", width)
    if config.final_dim is not None:
        linear("final_proj", width, config.final_dim)
    return shapes


@functools.lru_cache
def stage_names(config: ModelConfig) -> tuple[str, ...]:
    """The stages of a forward pass, in the order they run.

    ``conv.0`` to ``conv.6``, ``projection``, ``positional``, ``layer.1`` to
    ``layer.N`` (speaker-conditioned layers included), ``final_norm`` (models with
    norms first), ``final_proj`` (RVC v1: the projection of layer 9, or of the last
    one of a shorter model).
    """
    names = [f"conv.{i}" for i in range(len(config.conv_layers))]
    names += ["projection", "positional"]
    names += [f"layer.{i + 1}" for i in range(config.encoder_layers + config.encoder_layers_1)]
    if config.layer_norm_first:
        names.append("final_norm")
    if config.final_dim is not None:
        names.append("final_proj")
    return tuple(names)


def stage_input(config: ModelConfig, stage: str) -> str | None:
    """The stage whose output ``stage`` reads; None for the first, which reads the waveform.

    Raises ValueError if the model has no such stage.
    """
    names = stage_names(config)
    if stage not in names:
        raise ValueError(f"no stage {stage!r}: one of {', '.join(names)}")
    if stage == "final_proj":
        return f"layer.{min(V1_LAYER, config.encoder_layers + config.encoder_layers_1)}"
    index = names.index(stage)
    return names[index - 1] if index else None
