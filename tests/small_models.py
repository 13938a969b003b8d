"""Models small enough for a test, and the noise that is fed to them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from mlx_contentvec import memory
from mlx_contentvec.backend import device_kind, mx
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
#: what MLX multiplies quantised on every device: on CUDA by 64 inputs at a time
QUANTISABLE = dataclasses.replace(
    TINY,
    conv_layers=((64, 10, 5), *(((64, 3, 2),) * 4), *(((64, 2, 2),) * 2)),
    encoder_embed_dim=128,
    encoder_ffn_embed_dim=256,
)
MULTILINGUAL = dataclasses.replace(TINY, conv_pos=15, conv_pos_batch_norm=True, normalize=True)
CONFIGS = {"base": TINY, "large": LARGE, "batch norm, odd kernel, normalised": MULTILINGUAL}


#: how close two answers of a GPU must be: it may choose another order of summing, and in
#: half precision and quantised products that shows
CLOSE = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 0.3, "quantised": 5e-2}


def assert_same(one: np.ndarray, other: np.ndarray, kind: str = "float32") -> None:
    """To the bit on a CPU, close on a GPU."""
    if device_kind() == "cpu":
        np.testing.assert_array_equal(one, other)
    else:
        np.testing.assert_allclose(one, other, atol=CLOSE[kind], rtol=0)


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


def least_memory(model: ContentvecModel, samples: int) -> int:
    """Bytes that a clip of so many samples is streamed in, on whatever device is here."""
    least = memory.streamed_bytes(model.config, samples, memory._least_plan())
    assert least < memory.whole_clip_bytes(model.config, samples)
    return least


def in_one_go(model: ContentvecModel, waveform: np.ndarray, **options: Any) -> np.ndarray:
    """(frames, width) of one clip through a plain forward pass."""
    features: Any = model(waveform[None], **options)["x"]
    return np.array(features[0].astype(mx.float32))
