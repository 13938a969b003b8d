"""What users of the first mlx-contentvec release (0.1.0 and 0.1.1) have: its files and its calls.

That release kept the weight norm of the positional convolution as two
parameters and multiplied them out at every call; all other names and shapes
are still the same. Its files say nothing about the model they hold.

Its model was built from the options of fairseq's, and took a speaker embedding
that a model without speaker-conditioned layers ignored. docs/migration.md lists
what became of each call.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Container, Mapping
from typing import Any

import numpy as np

from .config import BASE_CONV_LAYERS, ModelConfig
from .errors import ConfigError, WeightsError
from .weight_norm import dead_taps, fold_weight_norm

Array = Any

#: where the weights of that release are, and what its ``from_pretrained()`` loads
HF_REPO_ID = "lexandstuff/mlx-contentvec"
HF_WEIGHTS_FILE = "contentvec_base.safetensors"
#: attention heads of every model that its ``from_pretrained`` built: no file says it
HEADS = 12

POSITIONAL = "encoder.pos_conv.layers.0"
MAGNITUDE = f"{POSITIONAL}.g"
DIRECTION = f"{POSITIONAL}.v"
BIAS = f"{POSITIONAL}.module.bias"
#: what the release computed from the first two at every call, if it was saved at all
COMPUTED_KERNEL = f"{POSITIONAL}.module.weight"
#: where its conversion script put the direction, losing the magnitude
LOST_MAGNITUDE = "encoder.pos_conv.0.module.weight"
#: what its model did not have
HEAD = frozenset({"final_proj.weight", "final_proj.bias"})


def is_first_release(names: Container[str]) -> bool:
    """Whether these are names of the first release."""
    return any(name in names for name in (DIRECTION, COMPUTED_KERNEL, LOST_MAGNITUDE))


def folded_kernel(magnitude: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """The kernel that the weight norm of that release computes, channels last.

    magnitude: (1, kernel, 1)    direction: (out, kernel, in / groups)
    returns:   (out, kernel, in / groups), float32, computed in float64

    The release also raised norms below 1e-5 to that value, which PyTorch does
    not, and neither does this. Raises WeightsError if the shapes do not fit, or
    a tap has a norm of zero.
    """
    if direction.ndim != 3 or magnitude.shape != (1, direction.shape[1], 1):
        raise WeightsError(
            "the weight norm of the positional convolution has impossible shapes",
            found=f"g {magnitude.shape}, v {direction.shape}",
            expected="g (1, kernel, 1), v (out, kernel, in / groups)",
        )
    direction = direction.swapaxes(1, 2)
    if dead := dead_taps(direction):
        raise WeightsError(
            "the weight norm of the positional convolution divides by zero",
            found=f"{dead} taps of v are all zero",
        )
    return fold_weight_norm(magnitude, direction)


def renamed(weights: Mapping[str, Array]) -> dict[str, Array]:
    """``weights`` of the first release under this version's names, the weight norm folded.

    Raises WeightsError if the magnitude of the weight norm is missing: the
    conversion script of that release lost it, and the kernel with it.
    """
    from .backend import mx

    if missing := [name for name in (MAGNITUDE, DIRECTION, BIAS) if name not in weights]:
        raise WeightsError(
            "the positional convolution of this first-release file is incomplete",
            found=f"no {', '.join(missing)}",
            expected=f"{MAGNITUDE}, {DIRECTION} and {BIAS}",
            hint="convert the original checkpoint again: mlx-contentvec convert hubert_base.pt",
        )
    kept = {
        name: array
        for name, array in weights.items()
        if name not in (MAGNITUDE, DIRECTION, BIAS, COMPUTED_KERNEL)
    }
    magnitude, direction = (
        np.array(weights[name].astype(mx.float32)) for name in (MAGNITUDE, DIRECTION)
    )
    kept["encoder.pos_conv.weight"] = mx.array(folded_kernel(magnitude, direction))
    kept["encoder.pos_conv.bias"] = weights[BIAS]
    return kept


def heads_of(width: int) -> int | None:
    """Attention heads of a model of that release; None for a width that they do not divide."""
    return HEADS if width % HEADS == 0 else None


def config_of(weights: Mapping[str, Array], origin: str) -> ModelConfig:
    """The model that a file of that release holds, as its ``from_pretrained`` built it.

    weights: the file's tensors, under its own names    origin: the file's name

    Widths and depths are those of the tensors. What tensors do not show is what
    the release had no other of: 12 heads, the strides and the norms of HuBERT
    base, input that is not normalised.
    Raises WeightsError for a file of another architecture or without its
    convolutions.
    """
    shapes = {name: tuple(array.shape) for name, array in weights.items()}
    convolutions = "feature_extractor.conv_layers"
    try:
        kernels = [
            shapes[f"{convolutions}.{i}.conv.weight"][:2] for i in range(len(BASE_CONV_LAYERS))
        ]
        width, conv_pos, inputs = shapes[DIRECTION]
        ffn = shapes["encoder.layers.0.fc1.weight"][0]
    except (KeyError, ValueError) as error:
        raise WeightsError(
            f"{origin} is not a whole file of the first release",
            found=f"no {error.args[0]}" if isinstance(error, KeyError) else str(shapes[DIRECTION]),
            hint="convert the original checkpoint again: mlx-contentvec convert hubert_base.pt",
        ) from error
    heads = heads_of(width)
    expected = [kernel for _, kernel, _ in BASE_CONV_LAYERS]
    if (
        heads is None
        or [kernel for _, kernel in kernels] != expected
        or f"{convolutions}.1.norm.weight" in shapes
    ):
        raise WeightsError(
            f"{origin} does not say what model it holds",
            found=f"{width} wide, convolutions of kernels {[kernel for _, kernel in kernels]}",
            expected=f"the model of that release: {HEADS} heads, kernels {expected}, one group "
            "norm",
            hint="build the model yourself and call load_weights:\n"
            "ContentvecModel(encoder_attention_heads=..., ...).load_weights(path)",
        )
    layers = {int(name.split(".")[2]) for name in shapes if name.startswith("encoder.layers.")}
    conditioned = [f"encoder.layers.{i}.final_layer_norm.weight_ln.weight" for i in sorted(layers)]
    speakers = [shapes[name][1] for name in conditioned if name in shapes]
    return ModelConfig(
        conv_layers=tuple(
            (channels, kernel, stride)
            for (channels, kernel), (_, _, stride) in zip(kernels, BASE_CONV_LAYERS, strict=True)
        ),
        conv_bias=f"{convolutions}.0.conv.bias" in shapes,
        encoder_embed_dim=width,
        encoder_ffn_embed_dim=ffn,
        encoder_layers=len(layers) - len(speakers),
        encoder_layers_1=len(speakers),
        encoder_attention_heads=heads,
        conv_pos=conv_pos,
        conv_pos_groups=width // inputs,
        speaker_dim=speakers[0] if speakers else ModelConfig.speaker_dim,
        final_dim=shapes["final_proj.weight"][0] if "final_proj.weight" in shapes else None,
    )


# its calls ----------------------------------------------------------------------

#: options of its constructor that only training reads
TRAINING = (
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "dropout_input",
    "dropout_features",
    "encoder_layerdrop",
    "feature_grad_mult",
)
EXTRACTOR_NORMS = {"default": "group", "layer_norm": "layer"}


def config_fields(**options: Any) -> dict[str, Any]:
    """Options of that release's constructor as fields of :class:`ModelConfig`.

    ``conv_feature_layers``, ``extractor_mode`` and ``dim_spk`` have other names
    now. Dropout and what else only training reads is left out: nothing is
    dropped here, as nothing was after its ``eval()``. All else is returned as it is.

    Raises ConfigError for an option that asks for another model than there is,
    or that contradicts the field of its new name.
    """
    fields = dict(options)
    for name in TRAINING:
        value = fields.pop(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{name} must be a number", found=repr(value))
    activation = fields.pop("activation_fn", "gelu")
    if activation != "gelu":
        raise ConfigError(
            "every model of this family uses the exact GELU",
            found=f"activation_fn={activation!r}",
            expected="'gelu', or the option left out",
        )
    renamed_options = {
        "conv_feature_layers": ("conv_layers", _conv_layers),
        "extractor_mode": ("extractor_norm", _extractor_norm),
        "dim_spk": ("speaker_dim", lambda value: value),
    }
    for name, (field, translate) in renamed_options.items():
        if name not in fields:
            continue
        given = fields.pop(name)
        value = translate(given)
        if field in fields and fields[field] != value:
            raise ConfigError(
                f"{name} and {field} say different things",
                found=f"{name}={given!r}, {field}={fields[field]!r}",
                hint=f"{name} is the first release's name for {field}: give one of them",
            )
        fields[field] = value
    return fields


def _extractor_norm(mode: Any) -> str:
    if mode not in EXTRACTOR_NORMS:
        raise ConfigError(
            f"no extractor_mode {mode!r}",
            expected=" or ".join(map(repr, EXTRACTOR_NORMS)),
            hint="instead of 'group_norm_masked': model(source, lengths=...) gives each clip of a\n"
            "batch the features it has alone",
        )
    return EXTRACTOR_NORMS[mode]


def _conv_layers(layers: Any) -> tuple[tuple[int, ...], ...]:
    """``[(512,10,5)] + [(512,3,2)] * 4``, which that release evaluated; here it is only read."""

    def listed(node: ast.expr) -> list[tuple[int, ...]]:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return listed(node.left) + listed(node.right)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            times = ast.literal_eval(node.right)
            if not isinstance(times, int) or not 0 <= times <= 64:
                raise ValueError(f"{times!r} times")
            return listed(node.left) * times
        return [tuple(layer) for layer in ast.literal_eval(node)]

    try:
        if not isinstance(layers, str):
            return tuple(tuple(layer) for layer in layers)
        return tuple(listed(ast.parse(layers[:10_000].strip(), mode="eval").body))
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(
            "conv_feature_layers cannot be read",
            found=repr(layers)[:200],
            expected="(channels, kernel, stride) triples, such as '[(512,10,5)] + [(512,3,2)] * 4'",
        ) from error


def ignore_speaker(speaker: Array, source: Array) -> None:
    """Warn that a model without speaker-conditioned layers does not read ``speaker``.

    That release ignored it in silence, and its documentation passed zeros. A
    value of the waveform's own shape is a mask: the second argument of its
    model was a speaker embedding, the second argument of fairseq's is a mask.
    Raises ConfigError for that.
    """
    if tuple(getattr(speaker, "shape", ())) == tuple(source.shape):
        raise ConfigError(
            "the second argument is a speaker embedding, and this has the shape of a mask",
            found=f"shape {tuple(source.shape)}, as the waveform has",
            hint="name it: padding_mask=",
        )
    warnings.warn(
        "spk_emb is ignored: this model has no speaker-conditioned layers",
        UserWarning,
        stacklevel=5,
    )
