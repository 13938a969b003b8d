"""Checkpoints with fairseq's tensor names: ``hubert_base.pt`` and its relatives.

Source of names, configuration and defaults: fairseq/models/hubert/hubert.py and
fairseq/models/wav2vec/wav2vec2.py; for the speaker-conditioned layers of full
ContentVec, contentvec/models/wav2vec/wav2vec2_1.py of its authors.
"""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator, Mapping
from typing import Any

from mlx_contentvec.config import ModelConfig
from mlx_contentvec.errors import ConfigError, UnsupportedCheckpoint

from ..checkpoint import Checkpoint
from ..rules import Drop, Plan, Rule
from .shapes import PROBE, config_from_shapes, told

NAMING = "fairseq"

#: what holds the kernel of the positional convolution, with the transform it takes
POSITIONAL_KERNELS: dict[str, tuple[tuple[str, ...], str]] = {
    "weight_g": (
        ("encoder.pos_conv.0.weight_g", "encoder.pos_conv.0.weight_v"),
        "fold_weight_norm",
    ),
    "parametrizations": (
        (
            "encoder.pos_conv.0.parametrizations.weight.original0",
            "encoder.pos_conv.0.parametrizations.weight.original1",
        ),
        "fold_weight_norm",
    ),
    # a batch norm takes place 0 of the sequence, and there is no weight norm
    "batch_norm": (("encoder.pos_conv.1.weight",), "conv_kernel"),
}

#: tensors that no feature depends on
NOT_FEATURES = (
    Drop("mask_emb", "takes the place of masked frames in pre-training; features are not masked"),
    Drop("label_embs_concat", "embeds the clusters that pre-training predicts"),
    Drop("layer_proj.weight", "projects a layer for ContentVec's contrastive training loss"),
    Drop("layer_proj.bias", "projects a layer for ContentVec's contrastive training loss"),
    Drop("target_glu.0.weight", "transforms cluster embeddings in pre-training"),
    Drop("target_glu.0.bias", "transforms cluster embeddings in pre-training"),
    Drop(
        "encoder.pos_conv.0.num_batches_tracked",
        "counts training steps; the running statistics are used as they are",
    ),
)

#: ``extractor_mode`` -> ``ModelConfig.extractor_norm``
EXTRACTOR_NORMS = {"default": "group", "layer_norm": "layer"}

#: what the model computes with, where a configuration could ask for something
#: else; a key that is absent means this value in the versions that lack it
FIXED: dict[str, Any] = {
    "activation_fn": "gelu",
    "layer_type": "transformer",
    "pos_conv_depth": 1,
    "attn_type": "",
}

#: the models this naming belongs to; others (wav2vec2) share most of the names
MODELS = ("hubert", "contentvec")

#: a published configuration needs 49 characters and 7 layers
_EXPRESSION_CHARACTERS = 1_000
_CONV_LAYERS = 64


def rules(config: ModelConfig, *, kernel: str) -> Iterator[Rule]:
    """One rule per parameter of the model; ``kernel`` is a key of POSITIONAL_KERNELS."""

    def affine(target: str, source: str) -> Iterator[Rule]:
        yield Rule(f"{target}.weight", (f"{source}.weight",), "move")
        yield Rule(f"{target}.bias", (f"{source}.bias",), "move")

    def conditional(target: str) -> Iterator[Rule]:
        for part in ("weight_ln", "bias_ln"):
            yield Rule(f"{target}.{part}.weight", (f"{target}.{part}.weight",), "move")

    def norm(target: str, conditioned: bool) -> Iterator[Rule]:
        return conditional(target) if conditioned else affine(target, target)

    for i in range(len(config.conv_layers)):
        block = f"feature_extractor.conv_layers.{i}"
        yield Rule(f"{block}.conv.weight", (f"{block}.0.weight",), "conv_kernel")
        if config.conv_bias:
            yield Rule(f"{block}.conv.bias", (f"{block}.0.bias",), "move")
        if config.extractor_norm == "layer":
            # between two transpositions, hence the second index
            yield from affine(f"{block}.norm", f"{block}.2.1")
        elif i == 0:
            yield from affine(f"{block}.norm", f"{block}.2")
    yield from affine("layer_norm", "layer_norm")
    yield from affine("post_extract_proj", "post_extract_proj")
    names, transform = POSITIONAL_KERNELS[kernel]
    convolution = "encoder.pos_conv.0"
    if config.conv_pos_batch_norm:
        convolution = "encoder.pos_conv.1"
        yield from affine("encoder.pos_conv_norm", "encoder.pos_conv.0")
        for statistic in ("running_mean", "running_var"):
            yield Rule(
                f"encoder.pos_conv_norm.{statistic}", (f"encoder.pos_conv.0.{statistic}",), "move"
            )
    yield Rule("encoder.pos_conv.weight", names, transform)
    yield Rule("encoder.pos_conv.bias", (f"{convolution}.bias",), "move")
    yield from affine("encoder.layer_norm", "encoder.layer_norm")
    for i in range(config.encoder_layers + config.encoder_layers_1):
        layer, conditioned = f"encoder.layers.{i}", i >= config.encoder_layers
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            name = f"{layer}.self_attn.{projection}"
            yield from affine(name, name)
        yield from norm(f"{layer}.self_attn_layer_norm", conditioned)
        for linear in ("fc1", "fc2"):
            yield from affine(f"{layer}.{linear}", f"{layer}.{linear}")
        yield from norm(f"{layer}.final_layer_norm", conditioned)
    if config.encoder_layers_1:
        yield from conditional("encoder.cond_layer_norm")
    if config.final_dim is not None:
        yield from affine("final_proj", "final_proj")


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the tensors have these names, whatever model they belong to."""
    return "feature_extractor.conv_layers.0.0.weight" in checkpoint.tensors


def plan(
    checkpoint: Checkpoint, *, heads: int | None = None, normalize: bool | None = None
) -> Plan:
    """The configuration and the rules for a checkpoint that :func:`matches`.

    heads, normalize: what the caller knows, for a bare state dict; where the
    file says it too, the two must agree. Layers are counted in the tensors.

    Raises UnsupportedCheckpoint for another model under these names;
    ConfigError for a configuration that is missing, incomplete, or contradicts
    the caller or the tensors.
    """
    tensors = checkpoint.tensors
    notes: list[str] = []
    kernel = _kernel(tensors)
    model = checkpoint.config.get("model") if checkpoint.config else None
    if model is None:
        config = config_from_shapes(
            tensors,
            rules(PROBE, kernel=kernel),
            missing="a training configuration",
            heads=heads,
            normalize=told("normalize", normalize, None),
        )
        notes.append(
            "the file has no configuration: widths and depth are those of its tensors, "
            "strides and the order of norms those of HuBERT base"
        )
    else:
        task = (checkpoint.config or {}).get("task")
        config = _read_config(checkpoint, model, task, kernel, heads, normalize, notes)
    if config.final_dim is None:
        notes.append("the file has no final_proj: the model gives no projected features")
    return Plan(
        naming=NAMING,
        config=config,
        rules=tuple(rules(config, kernel=kernel)),
        drops=tuple(drop for drop in NOT_FEATURES if drop.source in tensors),
        notes=tuple(notes),
    )


def _kernel(names: Container[str]) -> str:
    for kernel, (parts, _) in POSITIONAL_KERNELS.items():
        if all(part in names for part in parts):
            return kernel
    # the ledger names what is missing
    return "weight_g"


def _read_config(
    checkpoint: Checkpoint,
    model: Any,
    task: Any,
    kernel: str,
    heads: int | None,
    normalize: bool | None,
    notes: list[str],
) -> ModelConfig:
    """The configuration that the file states, checked against the tensors it holds."""
    tensors = checkpoint.tensors
    if not isinstance(model, Mapping):
        raise ConfigError(
            f"the configuration in {checkpoint.path.name} cannot be read",
            found=f"cfg['model'] is a {type(model).__name__}",
            expected="a dictionary of settings",
        )
    # before fairseq had a section for the task, everything lay in one namespace
    settings = task if isinstance(task, Mapping) else model
    name = model.get("_name", model.get("arch"))
    if isinstance(name, str) and name not in MODELS:
        raise UnsupportedCheckpoint(
            f"{checkpoint.path.name} holds a {name} model, not HuBERT or ContentVec",
            expected=f"a model named {' or '.join(MODELS)} in its configuration",
            hint="its features are not those that RVC voices were trained on",
        )
    for key, value in FIXED.items():
        if model.get(key, value) != value:
            raise UnsupportedCheckpoint(
                "this model computes something that mlx-contentvec does not",
                found=f"{key}: {model[key]!r} in its configuration",
                expected=f"{key}: {value!r}, as HuBERT base, large and xlarge have it",
            )
    mode = model.get("extractor_mode", "default")
    if not isinstance(mode, str) or mode not in EXTRACTOR_NORMS:
        raise UnsupportedCheckpoint(
            "the feature extractor has a norm that mlx-contentvec does not compute",
            found=f"extractor_mode: {mode!r}",
            expected=" or ".join(EXTRACTOR_NORMS),
        )
    plain, conditioned = _count_layers(tensors)
    stated = _integer(model, "encoder_layers")
    if stated != plain:
        raise ConfigError(
            "the configuration contradicts the tensors",
            found=f"{plain} encoder layers in the weights",
            expected=f"encoder_layers: {stated}, as the configuration says",
            hint="the weights and the configuration belong to different models",
        )
    stated = _integer(model, "encoder_layers_1") if "encoder_layers_1" in model else 0
    if conditioned == 0 and stated:
        notes.append(
            f"encoder_layers_1: {stated} in the configuration is a leftover of training: "
            "the file has no speaker-conditioned layer"
        )
    elif conditioned != stated:
        raise ConfigError(
            "the configuration contradicts the tensors",
            found=f"{conditioned} speaker-conditioned layers in the weights",
            expected=f"encoder_layers_1: {stated}, as the configuration says",
        )
    final_proj = tensors.get("final_proj.weight")
    conditional = tensors.get(f"encoder.layers.{plain}.self_attn_layer_norm.weight_ln.weight")
    return ModelConfig(
        conv_layers=_conv_layers(model),
        conv_bias=_flag(model, "conv_bias", False),
        extractor_norm=EXTRACTOR_NORMS[mode],
        encoder_embed_dim=_integer(model, "encoder_embed_dim"),
        encoder_ffn_embed_dim=_integer(model, "encoder_ffn_embed_dim"),
        encoder_layers=plain,
        encoder_layers_1=conditioned,
        encoder_attention_heads=told("heads", heads, _stated_heads(model)),
        layer_norm_first=_flag(model, "layer_norm_first", None),
        conv_pos=_integer(model, "conv_pos"),
        conv_pos_groups=_integer(model, "conv_pos_groups"),
        conv_pos_batch_norm=kernel == "batch_norm",
        final_dim=None if final_proj is None or not final_proj.shape else final_proj.shape[0],
        speaker_dim=256 if conditional is None else conditional.shape[-1],
        normalize=told(
            "normalize",
            normalize,
            _flag(settings, "normalize", None) if "normalize" in settings else None,
        ),
        sample_rate=_integer(settings, "sample_rate") if "sample_rate" in settings else 16_000,
    )


def _count_layers(names: Container[str]) -> tuple[int, int]:
    """Plain layers, and the speaker-conditioned ones after them."""
    plain = conditioned = 0
    while f"encoder.layers.{plain}.self_attn_layer_norm.weight" in names:
        plain += 1
    while f"encoder.layers.{plain + conditioned}.self_attn_layer_norm.weight_ln.weight" in names:
        conditioned += 1
    return plain, conditioned


def _stated_heads(model: Mapping[str, Any]) -> int | None:
    return (
        _integer(model, "encoder_attention_heads") if "encoder_attention_heads" in model else None
    )


def _integer(settings: Mapping[str, Any], key: str) -> int:
    value = settings.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _unreadable(key, value, "a whole number")
    return value


def _flag(settings: Mapping[str, Any], key: str, absent: bool | None) -> bool:
    value = settings.get(key, absent)
    if not isinstance(value, bool):
        raise _unreadable(key, value, "true or false")
    return value


def _unreadable(key: str, value: Any, expected: str) -> ConfigError:
    found = "nothing" if value is None else repr(value)
    return ConfigError(
        f"the configuration in the checkpoint does not say {key}",
        found=found if len(found) <= 200 else f"{found[:200]}...",
        expected=expected,
    )


def _conv_layers(model: Mapping[str, Any]) -> tuple[tuple[int, int, int], ...]:
    """``conv_feature_layers``, a Python expression that fairseq evaluates; here it is only read."""
    text = model.get("conv_feature_layers")
    if not isinstance(text, str) or len(text) > _EXPRESSION_CHARACTERS:
        raise _unreadable("conv_feature_layers", text, "an expression such as [(512, 10, 5)] * 2")
    try:
        layers = _list_value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _unreadable(
            "conv_feature_layers", text, "lists of (channels, kernel, stride), joined by + and *"
        ) from error
    return tuple(layers)


def _list_value(node: ast.expr) -> list[Any]:
    """The list that a sum or a multiple of lists of integer triples is. ValueError if it is not."""
    if isinstance(node, ast.List):
        layers = [
            tuple(_integer_value(part) for part in element.elts)
            for element in node.elts
            if isinstance(element, (ast.Tuple, ast.List))
        ]
        if len(layers) != len(node.elts):
            raise ValueError("a list of something else than tuples")
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        layers = _list_value(node.left) + _list_value(node.right)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        part, times = node.left, node.right
        if isinstance(part, ast.Constant):
            part, times = times, part
        count = _integer_value(times)
        if not 0 <= count <= _CONV_LAYERS:
            raise ValueError("a list repeated too often")
        layers = _list_value(part) * count
    else:
        raise ValueError("not a list, a sum of lists or a multiple of a list")
    if len(layers) > _CONV_LAYERS:
        raise ValueError("too many layers")
    return layers


def _integer_value(node: ast.expr) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    raise ValueError("not an integer")
