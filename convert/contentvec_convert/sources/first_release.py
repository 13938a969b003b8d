"""Safetensors written for the first mlx-contentvec release (0.1.0 and 0.1.1).

They hold no configuration. Everything but the weight norm of the positional
convolution has the names and the layout of this version.
"""

from __future__ import annotations

from collections.abc import Iterator

from mlx_contentvec.config import ModelConfig, parameter_shapes
from mlx_contentvec.errors import CorruptCheckpoint
from mlx_contentvec.first_release import (
    BIAS,
    COMPUTED_KERNEL,
    DIRECTION,
    MAGNITUDE,
    heads_of,
    is_first_release,
)

from ..checkpoint import Checkpoint
from ..rules import Drop, Plan, Rule
from .shapes import PROBE, config_from_shapes

NAMING = "mlx-contentvec 0.1"

#: what the release computed anew at every call
COMPUTED = Drop(COMPUTED_KERNEL, "computed from g and v; what is stored may be stale")

NO_HEAD = (
    "it lacks final_proj, so it gives no features of RVC v1; a conversion of hubert_base.pt has it"
)


def rules(config: ModelConfig) -> Iterator[Rule]:
    """One rule per parameter of the model."""
    for target in parameter_shapes(config):
        if target == "encoder.pos_conv.weight":
            yield Rule(target, (MAGNITUDE, DIRECTION), "fold_weight_norm_channels_last")
        elif target == "encoder.pos_conv.bias":
            yield Rule(target, (BIAS,), "move")
        else:
            yield Rule(target, (target,), "move")


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the positional convolution has the names of the first release."""
    return is_first_release(checkpoint.tensors)


def plan(
    checkpoint: Checkpoint, *, heads: int | None = None, normalize: bool | None = None
) -> Plan:
    """The configuration and the rules for a checkpoint that :func:`matches`.

    heads: 12 unless given, as the release built every model; to be given for a
    width that 12 does not divide. normalize: False
    unless given; this release had no model with normalised input.

    Raises ConfigError without heads; CorruptCheckpoint for a file whose weight
    norm lost its magnitude.
    """
    tensors = checkpoint.tensors
    if missing := [name for name in (MAGNITUDE, DIRECTION) if name not in tensors]:
        raise CorruptCheckpoint(
            "the positional convolution of this first-release file is incomplete",
            found=f"no {' and no '.join(missing)}",
            expected=f"{MAGNITUDE} and {DIRECTION}",
            hint="the conversion script of that release lost the magnitude of the weight norm: "
            "convert the original checkpoint instead",
        )
    config = config_from_shapes(
        tensors,
        rules(PROBE),
        missing="a configuration",
        heads=heads or heads_of(tensors[DIRECTION].shape[0]),
        normalize=bool(normalize),
    )
    return Plan(
        naming=NAMING,
        config=config,
        rules=tuple(rules(config)),
        drops=tuple(drop for drop in (COMPUTED,) if drop.source in tensors),
        notes=() if config.final_dim is not None else (NO_HEAD,),
    )
