"""Files that this project converted, as a source: for another precision, or a way back."""

from __future__ import annotations

from mlx_contentvec.config import ModelConfig, parameter_shapes
from mlx_contentvec.errors import ConfigError, CorruptCheckpoint, UnsupportedCheckpoint

from ..checkpoint import Checkpoint
from ..checkpoint.tensors import brief
from ..rules import Plan, Rule
from .shapes import told

NAMING = "mlx-contentvec"


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the metadata carries the configuration that ``convert`` writes."""
    return "config" in checkpoint.metadata and "mlx_contentvec_version" in checkpoint.metadata


def plan(
    checkpoint: Checkpoint, *, heads: int | None = None, normalize: bool | None = None
) -> Plan:
    """The stored configuration, and every parameter as it is.

    Raises UnsupportedCheckpoint for quantised weights, which cannot be taken
    back; ConfigError if the caller contradicts the file.
    """
    metadata = checkpoint.metadata
    if "quantization" in metadata:
        raise UnsupportedCheckpoint(
            f"{checkpoint.path.name} is quantised",
            found=brief(metadata["quantization"]),
            expected="float32, float16 or bfloat16 weights",
            hint="what quantising rounded away cannot be restored: start from the original file",
        )
    try:
        config = ModelConfig.from_json(metadata["config"])
    except ConfigError as error:
        raise CorruptCheckpoint(
            f"the configuration stored in {checkpoint.path.name} cannot be used",
            found=error.found or error.problem,
            hint=error.hint,
        ) from error
    told("heads", heads, config.encoder_attention_heads)
    told("normalize", normalize, config.normalize)
    return Plan(
        naming=NAMING,
        config=config,
        rules=tuple(Rule(target, (target,), "move") for target in parameter_shapes(config)),
        drops=(),
    )
