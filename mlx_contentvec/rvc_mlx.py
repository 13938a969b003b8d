"""The embedder as rvc-mlx keeps it: ``hubert.safetensors``, with our names and layouts.

Its metadata says ``format`` "rvc-mlx", ``kind`` "hubert", a ``config`` with fields of
its own, and whether ``final_proj`` is the checkpoint's or zeros in its place.
Source: github.com/lancelotblanchard/rvc-mlx, rvc_mlx/io.py, rvc_mlx/convert.py
(``convert_hubert_checkpoint``) and rvc_mlx/hubert.py (``HubertConfig``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .config import ModelConfig
from .errors import ConfigError, WeightsError
from .first_release import HEAD
from .json_text import parse_object

Array = Any

FORMAT = "rvc-mlx"
#: its fields and ours. It builds no other model than HuBERT base of these sizes: one group
#: norm, norms after each half of a layer, no bias in the convolutions, input as it is
FIELDS = {
    "conv_layers": "conv_layers",
    "embed_dim": "encoder_embed_dim",
    "ffn_dim": "encoder_ffn_embed_dim",
    "num_heads": "encoder_attention_heads",
    "num_layers": "encoder_layers",
    "conv_pos": "conv_pos",
    "conv_pos_groups": "conv_pos_groups",
    "final_dim": "final_dim",
}


def is_rvc_mlx(metadata: Mapping[str, str]) -> bool:
    """Whether rvc-mlx wrote a file with this metadata."""
    return metadata.get("format") == FORMAT


def translated(
    arrays: Mapping[str, Array], metadata: Mapping[str, str], origin: str
) -> tuple[dict[str, Array], dict[str, str]]:
    """The arrays and the metadata that the same model has in a file of this project.

    Raises WeightsError for a voice or a pitch estimator, and for a configuration that
    cannot be read.
    """
    if metadata.get("kind") != "hubert":
        raise WeightsError(
            f"{origin} holds no embedder",
            found=f"rvc-mlx, kind {metadata.get('kind')!r}",
            expected="kind 'hubert': hubert.safetensors, which is beside it",
        )
    try:
        stored = parse_object(metadata["config"])
        fields = {FIELDS[name]: value for name, value in stored.items()}
        if len(fields) != len(FIELDS):
            raise KeyError(*(FIELDS.keys() - stored.keys()))
        config = ModelConfig(**fields)
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(
            f"the configuration stored in {origin} cannot be read",
            found=f"rvc-mlx, {type(error).__name__}: {str(error)[:200]}",
            hint="convert the original checkpoint: mlx-contentvec convert hubert_base.pt",
        ) from error
    kept = dict(arrays)
    if metadata.get("has_final_proj") == "0":
        config = dataclasses.replace(config, final_dim=None)
        kept = {name: array for name, array in kept.items() if name not in HEAD}
    return kept, {"format": "mlx", "config": config.to_json()}
