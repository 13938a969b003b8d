"""Models small enough for a test, and the noise that is fed to them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from mlx_contentvec.backend import mx
from mlx_contentvec.config import ModelConfig, parameter_shapes
from mlx_contentvec.model import ContentvecModel

TINY = ModelConfig(
    conv_layers=((32, 10, 5), *(((32, 3, 2),) * 4), *(((32, 2, 2),) * 2)),
    encoder_embed_dim=96,
    encoder_ffn_embed_dim=192,
    encoder_layers=3,
    encoder_attention_heads=4,
    conv_pos=16,
    conv_pos_groups=4,
    final_dim=32,
)
#: as deep as RVC's model, so that it has v1 and v2 features
DEEP = dataclasses.replace(TINY, encoder_layers=12)
LARGE = dataclasses.replace(
    TINY, extractor_norm="layer", layer_norm_first=True, normalize=True, conv_bias=True
)
MULTILINGUAL = dataclasses.replace(TINY, conv_pos=15, conv_pos_batch_norm=True, normalize=True)
CONFIGS = {"base": TINY, "large": LARGE, "batch norm, odd kernel, normalised": MULTILINGUAL}


def random_weights(config: ModelConfig, dtype: Any = mx.float32) -> dict[str, Any]:
    """Weights that keep signals near 1 and matter everywhere."""
    rng = np.random.default_rng(7)
    weights = {}
    for name, shape in parameter_shapes(config).items():
        values = rng.standard_normal(shape)
        if len(shape) > 1:
            values /= np.sqrt(np.prod(shape[1:]))
        elif name.endswith("running_var") or ("norm" in name and name.endswith("weight")):
            values = 1 + 0.2 * np.abs(values)
        else:
            values *= 0.2
        weights[name] = mx.array(values.astype(np.float32)).astype(dtype)
    return weights


def random_model(config: ModelConfig, dtype: Any = mx.float32) -> ContentvecModel:
    """A model with :func:`random_weights`."""
    return ContentvecModel(config).load_weights(random_weights(config, dtype).items())


def random_weights_file(path: Path, config: ModelConfig) -> Path:
    """The same as a converted file."""
    metadata = {"format": "mlx", "config": config.to_json()}
    mx.save_safetensors(str(path), random_weights(config), metadata)
    return path


def noise(samples: int, seed: int = 0) -> np.ndarray:
    """Noise that grows louder, with an offset: windows of it differ."""
    rng = np.random.default_rng(seed)
    swell = np.linspace(0.02, 0.4, samples)
    return (rng.standard_normal(samples) * swell + 0.05).astype(np.float32)


def in_one_go(model: ContentvecModel, waveform: np.ndarray, **options: Any) -> np.ndarray:
    """(frames, width) of one clip through a plain forward pass."""
    features: Any = model(waveform[None], **options)["x"]
    return np.array(features[0].astype(mx.float32))
