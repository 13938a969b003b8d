"""``hubert.safetensors`` of rvc-mlx: our names and layouts, and a configuration of its own.

Source: see ``mlx_contentvec/rvc_mlx.py``.
"""

from __future__ import annotations

from mlx_contentvec.config import parameter_shapes
from mlx_contentvec.errors import CorruptCheckpoint, WeightsError
from mlx_contentvec.first_release import HEAD
from mlx_contentvec.rvc_mlx import config_of, is_rvc_mlx

from ..checkpoint import Checkpoint
from ..rules import Drop, Plan, Rule
from .shapes import told

NAMING = "rvc-mlx"

ZEROS = "zeros that rvc-mlx has where the checkpoint has no projection"


def matches(checkpoint: Checkpoint) -> bool:
    """Whether rvc-mlx wrote it, as its metadata says."""
    return is_rvc_mlx(checkpoint.metadata)


def plan(
    checkpoint: Checkpoint, *, heads: int | None = None, normalize: bool | None = None
) -> Plan:
    """The stored configuration, and every parameter as it is.

    Raises CorruptCheckpoint for a voice or a pitch estimator, or a configuration that
    cannot be read; ConfigError if the caller contradicts the file.
    """
    try:
        config = config_of(checkpoint.metadata, checkpoint.path.name)
    except WeightsError as error:
        raise CorruptCheckpoint(
            error.problem, found=error.found, expected=error.expected, hint=error.hint
        ) from error
    told("heads", heads, config.encoder_attention_heads)
    told("normalize", normalize, config.normalize)
    dropped = sorted(HEAD & checkpoint.tensors.keys()) if config.final_dim is None else ()
    return Plan(
        naming=NAMING,
        config=config,
        rules=tuple(Rule(target, (target,), "move") for target in parameter_shapes(config)),
        drops=tuple(Drop(name, ZEROS) for name in dropped),
    )
