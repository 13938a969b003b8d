"""What each tensor of the original is called, where it goes, and which stage reads it.

This table is parity's own. It is expanded from the configuration like the
converter's, but shares nothing with ``contentvec_convert.rules``: an error made
there is not repeated here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mlx_contentvec.config import V1_LAYER, ModelConfig

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """One parameter of the MLX model and the tensors it is made of."""

    #: name in the MLX model (a key of ``mlx_contentvec.config.parameter_shapes``)
    target: str
    #: the stage that reads it
    stage: str
    #: names in a fairseq state dict
    fairseq: tuple[str, ...]
    #: names in a transformers ``HubertModel`` state dict
    transformers: tuple[str, ...]
    #: a key of LAYOUTS
    layout: str = "as it is"


def _taps_second(kernel: Array) -> Array:
    """(out, in, taps) to (out, taps, in)."""
    return np.moveaxis(kernel, 2, 1)


def _fold_per_tap(magnitude: Array, direction: Array) -> Array:
    """The kernel that a weight norm with ``dim=2`` computes, taps second.

    magnitude: (1, 1, taps)    direction: (out, in / groups, taps)
    Source: ``torch.nn.utils.weight_norm``, as fairseq's ``make_conv_pos`` calls it.
    """
    kernel = np.empty_like(direction)
    for tap in range(direction.shape[2]):
        one = direction[:, :, tap]
        kernel[:, :, tap] = one * (magnitude[0, 0, tap] / np.sqrt(np.square(one).sum()))
    return _taps_second(kernel)


#: layout -> the value the parameter must have, from its source tensors
LAYOUTS: dict[str, Callable[..., Array]] = {
    "as it is": lambda tensor: tensor,
    "taps second": _taps_second,
    "weight norm per tap": _fold_per_tap,
}

#: layouts that compute something, and how many units in the last place float32 may differ
ROUNDED_LAYOUTS = {"weight norm per tap": 1}

#: tensors no stage reads, by their name in either naming, and why
UNREAD = {
    "mask_emb": "replaces masked frames in training",
    "label_embs_concat": "embeddings of the training labels",
    "masked_spec_embed": "replaces masked frames in training",
    "encoder.pos_conv.0.num_batches_tracked": "a counter of batch norm's training",
    "encoder.pos_conv_embed.batch_norm.num_batches_tracked": "a counter of batch norm's training",
}


def _pair(
    target: str, stage: str, fairseq: str, transformers: str, parts: tuple[str, ...] = ()
) -> list[Row]:
    return [
        Row(f"{target}.{part}", stage, (f"{fairseq}.{part}",), (f"{transformers}.{part}",))
        for part in parts or ("weight", "bias")
    ]


def _positional(config: ModelConfig) -> list[Row]:
    target, ours = "encoder.pos_conv", "encoder.pos_conv_embed"
    if config.conv_pos_batch_norm:
        moments = ("weight", "bias", "running_mean", "running_var")
        return [
            *_pair(
                "encoder.pos_conv_norm",
                "positional",
                f"{target}.0",
                f"{ours}.batch_norm",
                moments,
            ),
            Row(
                f"{target}.weight",
                "positional",
                (f"{target}.1.weight",),
                (f"{ours}.conv.weight",),
                "taps second",
            ),
            *_pair(target, "positional", f"{target}.1", f"{ours}.conv", ("bias",)),
        ]
    parametrized = f"{ours}.conv.parametrizations.weight"
    return [
        Row(
            f"{target}.weight",
            "positional",
            (f"{target}.0.weight_g", f"{target}.0.weight_v"),
            (f"{parametrized}.original0", f"{parametrized}.original1"),
            "weight norm per tap",
        ),
        *_pair(target, "positional", f"{target}.0", f"{ours}.conv", ("bias",)),
    ]


def rows(config: ModelConfig) -> tuple[Row, ...]:
    """Every parameter of a plain HuBERT of this configuration."""
    table: list[Row] = []
    for i in range(len(config.conv_layers)):
        block = f"feature_extractor.conv_layers.{i}"
        stage = f"conv.{i}"
        table.append(
            Row(
                f"{block}.conv.weight",
                stage,
                (f"{block}.0.weight",),
                (f"{block}.conv.weight",),
                "taps second",
            )
        )
        if config.conv_bias:
            table += _pair(f"{block}.conv", stage, f"{block}.0", f"{block}.conv", ("bias",))
        if config.extractor_norm == "layer":
            table += _pair(f"{block}.norm", stage, f"{block}.2.1", f"{block}.layer_norm")
        elif i == 0:
            table += _pair(f"{block}.norm", stage, f"{block}.2", f"{block}.layer_norm")
    table += _pair("layer_norm", "projection", "layer_norm", "feature_projection.layer_norm")
    table += _pair(
        "post_extract_proj", "projection", "post_extract_proj", "feature_projection.projection"
    )
    table += _positional(config)
    norm_reader = "final_norm" if config.layer_norm_first else "positional"
    table += _pair(*("encoder.layer_norm", norm_reader), *("encoder.layer_norm",) * 2)
    for i in range(config.encoder_layers):
        layer = f"encoder.layers.{i}"
        stage = f"layer.{i + 1}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            name = f"{layer}.self_attn.{projection}"
            table += _pair(name, stage, name, f"{layer}.attention.{projection}")
        for ours, theirs in (
            ("self_attn_layer_norm", "layer_norm"),
            ("fc1", "feed_forward.intermediate_dense"),
            ("fc2", "feed_forward.output_dense"),
            ("final_layer_norm", "final_layer_norm"),
        ):
            table += _pair(f"{layer}.{ours}", stage, f"{layer}.{ours}", f"{layer}.{theirs}")
    if config.final_dim is not None:
        table += _pair("final_proj", "final_proj", "final_proj", "final_proj")
    return tuple(table)


def stage_parameters(config: ModelConfig, stage: str) -> tuple[str, ...]:
    """The parameters of the MLX model that ``stage`` reads."""
    return tuple(row.target for row in rows(config) if row.stage == stage)


@dataclass(frozen=True)
class Output:
    """One set of features that users ask the model for."""

    label: str
    #: the stage of the original it must equal
    stage: str
    #: keyword arguments of ``ContentvecModel.__call__``
    call: tuple[tuple[str, object], ...] = ()
    #: whether ``final_proj`` is then called on the result, as RVC does for v1
    projected: bool = False
    #: another way to ask for the same features: checked on clips of a second at most
    variant: bool = False


def outputs(config: ModelConfig) -> tuple[Output, ...]:
    """Layer 9, its projection (RVC v1) and the last layer (RVC v2), and other ways to ask.

    A model of fewer layers gives its last one in the place of layer 9.
    Source: RVC, infer/modules/vc/pipeline.py, ``vc``.
    """
    last = config.encoder_layers
    first = min(V1_LAYER, last)
    found = [Output(f"layer {first}", f"layer.{first}", (("output_layer", first),))]
    if config.final_dim is not None:
        call = (("output_layer", first),)
        label = f"layer {first} + projection"
        found.append(Output(label, "final_proj", call, projected=True))
        found.append(
            Output(
                f"{label} by project=True", "final_proj", (*call, ("project", True)), variant=True
            )
        )
    if last != first:
        found.append(Output(f"layer {last}", f"layer.{last}", (("output_layer", last),)))
    if config.layer_norm_first:
        found.append(Output("final norm", "final_norm"))
    else:
        found.append(Output(f"layer {last} by model(source)", f"layer.{last}", variant=True))
    return tuple(found)
