"""Checkpoints with the tensor names of Hugging Face transformers.

Source of names and defaults: transformers/models/hubert/modeling_hubert.py and
configuration_hubert.py.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from mlx_contentvec.config import EXTRACTOR_EPS, ModelConfig
from mlx_contentvec.errors import ConfigError, CorruptCheckpoint, UnsupportedCheckpoint
from mlx_contentvec.json_text import JsonError, read_object

from ..checkpoint import Checkpoint
from ..rules import Drop, Plan, Rule
from .shapes import PROBE, config_from_shapes, told

NAMING = "transformers"

#: HubertModel has none, the models with a head on top carry the second
PREFIXES = ("", "hubert.")

#: what holds the kernel of the positional convolution, with the transform it
#: takes: the two names of a weight norm (torch >= 2.1, and before), and the
#: plain kernel of a batch norm model or of one whose weight norm was removed
POSITIONAL_KERNELS: dict[str, tuple[tuple[str, ...], str]] = {
    "parametrizations": (
        ("parametrizations.weight.original0", "parametrizations.weight.original1"),
        "fold_weight_norm",
    ),
    "weight_g": (("weight_g", "weight_v"), "fold_weight_norm"),
    "weight": (("weight",), "conv_kernel"),
}

#: tensors that no feature depends on
NOT_FEATURES = (
    Drop("masked_spec_embed", "stands in for masked frames in training"),
    Drop("label_embs_concat", "scores the clusters of pre-training"),
    Drop("lm_head.weight", "head for speech recognition"),
    Drop("lm_head.bias", "head for speech recognition"),
    Drop("projector.weight", "head for classification"),
    Drop("projector.bias", "head for classification"),
    Drop("classifier.weight", "head for classification"),
    Drop("classifier.bias", "head for classification"),
    Drop("layer_weights", "head for classification"),
    Drop(
        "encoder.pos_conv_embed.batch_norm.num_batches_tracked",
        "counts training steps; the running statistics are used as they are",
    ),
)

#: ModelConfig field <- key of config.json that every HubertConfig writes
FIELDS = {
    "conv_bias": "conv_bias",
    "extractor_norm": "feat_extract_norm",
    "encoder_embed_dim": "hidden_size",
    "encoder_ffn_embed_dim": "intermediate_size",
    "encoder_layers": "num_hidden_layers",
    "layer_norm_first": "do_stable_layer_norm",
    "conv_pos": "num_conv_pos_embeddings",
    "conv_pos_groups": "num_conv_pos_embedding_groups",
}

#: what the model computes with, where config.json could ask for something else;
#: a key that is absent means this value, in every version of HubertConfig
FIXED: dict[str, Any] = {
    "hidden_act": "gelu",
    "feat_extract_activation": "gelu",
    "layer_norm_eps": 1e-5,
    "feat_proj_layer_norm": True,
    "adapter_attn_dim": None,
}

#: which published models ask for something else, where they are known
_UNSUPPORTED = {
    "feat_proj_layer_norm": "distilhubert has no norm before its projection, and models without "
    "it are not supported",
}

HEADS = "num_attention_heads"

#: where a folder keeps its feature extractor, and in which section of the file
_EXTRACTOR_FILES = {"preprocessor_config.json": None, "processor_config.json": "feature_extractor"}


def rules(
    config: ModelConfig, *, prefix: str = "", final_proj: str = "final_proj", kernel: str
) -> Iterator[Rule]:
    """One rule per parameter of the model.

    prefix: of every name but the head's; final_proj: the head's name;
    kernel: a key of POSITIONAL_KERNELS.
    """

    def affine(target: str, source: str) -> Iterator[Rule]:
        yield Rule(f"{target}.weight", (f"{prefix}{source}.weight",), "move")
        yield Rule(f"{target}.bias", (f"{prefix}{source}.bias",), "move")

    for i in range(len(config.conv_layers)):
        block = f"feature_extractor.conv_layers.{i}"
        yield Rule(f"{block}.conv.weight", (f"{prefix}{block}.conv.weight",), "conv_kernel")
        if config.conv_bias:
            yield Rule(f"{block}.conv.bias", (f"{prefix}{block}.conv.bias",), "move")
        if config.extractor_norm == "layer" or i == 0:
            yield from affine(f"{block}.norm", f"{block}.layer_norm")
    yield from affine("layer_norm", "feature_projection.layer_norm")
    yield from affine("post_extract_proj", "feature_projection.projection")
    positional = "encoder.pos_conv_embed"
    if config.conv_pos_batch_norm:
        yield from affine("encoder.pos_conv_norm", f"{positional}.batch_norm")
        for statistic in ("running_mean", "running_var"):
            yield Rule(
                f"encoder.pos_conv_norm.{statistic}",
                (f"{prefix}{positional}.batch_norm.{statistic}",),
                "move",
            )
    names, transform = POSITIONAL_KERNELS[kernel]
    yield Rule(
        "encoder.pos_conv.weight",
        tuple(f"{prefix}{positional}.conv.{name}" for name in names),
        transform,
    )
    yield Rule("encoder.pos_conv.bias", (f"{prefix}{positional}.conv.bias",), "move")
    yield from affine("encoder.layer_norm", "encoder.layer_norm")
    for i in range(config.encoder_layers):
        layer = f"encoder.layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from affine(f"{layer}.self_attn.{projection}", f"{layer}.attention.{projection}")
        yield from affine(f"{layer}.self_attn_layer_norm", f"{layer}.layer_norm")
        yield from affine(f"{layer}.fc1", f"{layer}.feed_forward.intermediate_dense")
        yield from affine(f"{layer}.fc2", f"{layer}.feed_forward.output_dense")
        yield from affine(f"{layer}.final_layer_norm", f"{layer}.final_layer_norm")
    if config.final_dim is not None:
        yield Rule("final_proj.weight", (f"{final_proj}.weight",), "move")
        yield Rule("final_proj.bias", (f"{final_proj}.bias",), "move")


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the tensors have these names, whatever model they belong to."""
    return _prefix(checkpoint.tensors) is not None


def plan(
    checkpoint: Checkpoint, *, heads: int | None = None, normalize: bool | None = None
) -> Plan:
    """The configuration and the rules for a checkpoint that :func:`matches`.

    heads, normalize: what the caller knows, for a file without config.json or
    preprocessor_config.json; where the file says it too, the two must agree.

    Raises UnsupportedCheckpoint for another model under the same names;
    ConfigError for a configuration that is missing, incomplete, contradicts
    the caller or the tensors.
    """
    tensors = checkpoint.tensors
    prefix = _prefix(tensors)
    if prefix is None:
        raise UnsupportedCheckpoint(f"{checkpoint.path.name} has no HuBERT of transformers in it")
    if checkpoint.config is not None:
        _require_hubert(checkpoint.config)
    head = next((p for p in ("final_proj", f"{prefix}final_proj") if f"{p}.weight" in tensors), "")
    kernel = _kernel(tensors, prefix)
    stated, sample_rate = _stored_extractor(checkpoint)
    normalize = told("normalize", normalize, stated)
    if checkpoint.config is None:
        config = config_from_shapes(
            tensors,
            rules(PROBE, prefix=prefix, final_proj=head or "final_proj", kernel=kernel),
            missing="config.json",
            heads=heads,
            normalize=normalize,
        )
    else:
        final_dim = tensors[f"{head}.weight"].shape[0] if head else None
        config = _read_config(checkpoint.config, heads, normalize, sample_rate, final_dim)
        _require_layers(config, tensors, prefix)
    if config.normalize:
        config = replace(config, normalize_eps=EXTRACTOR_EPS)
    return Plan(
        naming=NAMING,
        config=config,
        rules=tuple(rules(config, prefix=prefix, final_proj=head, kernel=kernel)),
        drops=tuple(
            Drop(name, drop.reason)
            for drop in NOT_FEATURES
            for name in dict.fromkeys((drop.source, f"{prefix}{drop.source}"))
            if name in tensors
        ),
    )


def _prefix(names: Container[str]) -> str | None:
    for prefix in PREFIXES:
        if f"{prefix}feature_projection.projection.weight" in names:
            return prefix
    return None


def _kernel(names: Container[str], prefix: str) -> str:
    for kernel, (parts, _) in POSITIONAL_KERNELS.items():
        if all(f"{prefix}encoder.pos_conv_embed.conv.{part}" in names for part in parts):
            return kernel
    raise CorruptCheckpoint(
        "the positional convolution has no kernel",
        expected=f"{prefix}encoder.pos_conv_embed.conv.weight_g and weight_v, "
        "parametrizations.weight.original0 and original1, or weight",
        hint="a folder saved without its weight norm loads with random values elsewhere too: "
        "download it again",
    )


def _stored_extractor(checkpoint: Checkpoint) -> tuple[bool | None, int]:
    """``do_normalize`` and ``sampling_rate`` of the feature extractor beside the weights.

    Without one nothing is known of the first, and the second is the only one that models
    have as a rule.
    Source: transformers/models/wav2vec2/feature_extraction_wav2vec2.py, whose defaults are
    those of what the file does not say.
    """
    if checkpoint.config is None:
        # a file by itself: what else lies in its folder need not belong to it
        return None, ModelConfig.sample_rate
    folder = checkpoint.files[0].parent
    said: dict[str, tuple[bool, int]] = {}
    for name, section in _EXTRACTOR_FILES.items():
        path: Path = folder / name
        if not os.path.lexists(path):
            continue
        try:
            fields = read_object(path)
        except (JsonError, OSError) as error:
            raise CorruptCheckpoint(f"{name} cannot be read", found=str(error)) from error
        extractor = fields.get(section) if section else fields
        if extractor is None:
            continue
        if not isinstance(extractor, dict):
            raise CorruptCheckpoint(f"{name} cannot be read", found=f"{section} is not an object")
        rate = extractor.get("sampling_rate", ModelConfig.sample_rate)
        if not isinstance(rate, int) or isinstance(rate, bool):
            raise ConfigError(
                f"{name} does not say sampling_rate",
                found=json.dumps(rate)[:80],
                expected=f"a whole number of Hz, {ModelConfig.sample_rate} for HuBERT",
            )
        # the extractor normalises unless it is told not to
        said[name] = _flag(name, "do_normalize", extractor.get("do_normalize", True)), rate
    if len(set(said.values())) > 1:
        raise ConfigError(
            "the files of the feature extractor contradict each other",
            found="; ".join(
                f"{name}: do_normalize {json.dumps(normalize)}, sampling_rate {rate}"
                for name, (normalize, rate) in said.items()
            ),
            hint="which one is read depends on the version of transformers; leave one of them out",
        )
    return next(iter(said.values()), (None, ModelConfig.sample_rate))


def _require_hubert(stored: dict[str, Any]) -> None:
    model_type = json.dumps(stored.get("model_type"))
    if model_type != '"hubert"':
        raise UnsupportedCheckpoint(
            f"this is {MODEL_TYPES.get(model_type, 'another')} model, not HuBERT or ContentVec",
            found=f'config.json with "model_type": {model_type[:80]}',
            expected='"model_type": "hubert"',
            hint="its encoder has the same tensor names, but RVC voices were not trained on its\n"
            "features; RVC's embedder is hubert_base.pt: mlx-contentvec fetch contentvec",
        )


def _read_config(
    stored: dict[str, Any],
    heads: int | None,
    normalize: bool,
    sample_rate: int,
    final_dim: int | None,
) -> ModelConfig:
    required = [*FIELDS.values(), "conv_dim", "conv_kernel", "conv_stride"]
    if missing := [key for key in required if key not in stored]:
        raise ConfigError(
            "config.json is incomplete",
            found=f"no {', '.join(missing)}",
            hint="download config.json again from where the weights came from",
        )
    for key, value in FIXED.items():
        if stored.get(key, value) != value:
            raise UnsupportedCheckpoint(
                "this HuBERT computes something that mlx-contentvec does not",
                found=f'config.json with "{key}": {json.dumps(stored[key])}',
                expected=f"{json.dumps(value)}, as HuBERT base, large and xlarge have it",
                hint=_UNSUPPORTED.get(key),
            )
    conv = [stored[key] for key in ("conv_dim", "conv_kernel", "conv_stride")]
    if not all(isinstance(numbers, list) for numbers in conv) or len(set(map(len, conv))) != 1:
        raise ConfigError(
            "config.json contradicts itself",
            found="conv_dim, conv_kernel and conv_stride are not lists of one length",
        )
    for key in ("conv_bias", "do_stable_layer_norm"):
        _flag("config.json", key, stored[key])
    return ModelConfig(
        conv_layers=tuple(zip(*conv, strict=True)),
        encoder_attention_heads=told("heads", heads, stored.get(HEADS)),
        conv_pos_batch_norm=_flag(
            "config.json", "conv_pos_batch_norm", stored.get("conv_pos_batch_norm", False)
        ),
        final_dim=final_dim,
        normalize=normalize,
        sample_rate=sample_rate,
        **{field: stored[key] for field, key in FIELDS.items()},
    )


#: "model_type" of relatives whose encoders carry the same names
MODEL_TYPES = {
    '"wav2vec2"': "a wav2vec 2.0",
    '"wavlm"': "a WavLM",
    '"data2vec-audio"': "a data2vec",
    '"unispeech"': "a UniSpeech",
    '"unispeech-sat"': "a UniSpeech-SAT",
}


def _flag(file: str, key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ConfigError(
            f"{file} does not say {key}",
            found=json.dumps(value)[:80],
            expected="true or false",
        )
    return value


def _require_layers(config: ModelConfig, names: Container[str], prefix: str) -> None:
    def held(layer: int) -> bool:
        return f"{prefix}encoder.layers.{layer}.final_layer_norm.weight" in names

    if held(config.encoder_layers) or not held(config.encoder_layers - 1):
        held_layers = next(i for i in count() if not held(i))
        raise ConfigError(
            "config.json contradicts the tensors",
            found=f"{held_layers} encoder layers in the weights",
            expected=f'"num_hidden_layers": {config.encoder_layers}',
            hint="config.json and the weights belong to different models",
        )
