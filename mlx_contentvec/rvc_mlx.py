"""The embedder as rvc-mlx keeps it: ``hubert.safetensors``, with our names and layouts.

Its metadata says ``format`` "rvc-mlx", ``kind`` "hubert", a ``config`` with fields of
its own, and whether ``final_proj`` is the checkpoint's or zeros in its place.
Source: github.com/lancelotblanchard/rvc-mlx, rvc_mlx/io.py, rvc_mlx/convert.py
(``convert_hubert_checkpoint``) and rvc_mlx/hubert.py (``HubertConfig``).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from .config import ModelConfig
from .errors import ConfigError, WeightsError
from .first_release import HEAD
from .json_text import parse_object

Array = Any

FORMAT = "rvc-mlx"
#: of the zeros that stand for a projection the checkpoint did not have
HEAD_WIDTH = 256
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


def config_of(metadata: Mapping[str, str], origin: str) -> ModelConfig:
    """The model that a file with this metadata holds; without the projection that it lacks.

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
    lacks_head = metadata.get("has_final_proj") == "0"
    return dataclasses.replace(config, final_dim=None) if lacks_head else config


def metadata_of(config: ModelConfig) -> dict[str, str]:
    """What rvc-mlx writes beside the weights of this model.

    Of a model without a projection it says that, and gives the width of the zeros in its
    place. Raises ConfigError for a model that rvc-mlx does not build.
    """
    has_head = config.final_dim is not None
    described = config if has_head else dataclasses.replace(config, final_dim=HEAD_WIDTH)
    fields = {theirs: getattr(described, ours) for theirs, ours in FIELDS.items()}
    plain = ModelConfig(**{ours: fields[theirs] for theirs, ours in FIELDS.items()})
    if differing := [
        field.name
        for field in dataclasses.fields(ModelConfig)
        if getattr(plain, field.name) != getattr(described, field.name)
    ]:
        raise ConfigError(
            "rvc-mlx builds HuBERT base and nothing else",
            found=", ".join(f"{name} {getattr(config, name)}" for name in differing),
            expected=", ".join(f"{name} {getattr(plain, name)}" for name in differing),
        )
    return {
        "format": FORMAT,
        "format_version": "1",
        "kind": "hubert",
        "config": json.dumps(fields),
        "has_final_proj": "1" if has_head else "0",
    }


def translated(
    arrays: Mapping[str, Array], metadata: Mapping[str, str], origin: str
) -> tuple[dict[str, Array], dict[str, str]]:
    """The arrays and the metadata that the same model has in a file of this project.

    Raises WeightsError as :func:`config_of` does.
    """
    config = config_of(metadata, origin)
    left = HEAD if config.final_dim is None else frozenset()
    kept = {name: array for name, array in arrays.items() if name not in left}
    return kept, {"format": "mlx", "config": config.to_json()}
